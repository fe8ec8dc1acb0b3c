"""What a run measured, as a page that needs no network."""

from probes.exports import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__, {"check_record": "RunRecord"})
