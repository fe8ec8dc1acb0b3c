"""One reading of many completions, shared out among workers: statistics of shards, added up."""

from probes.exports import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
