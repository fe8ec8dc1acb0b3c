"""ThinkSteer's recipes inside vLLM, request by request: a plugin, which changes no file of vLLM."""

from thinksteer_vllm.asking import probe
from thinksteer_vllm.settings import VERSION as __version__
from thinksteer_vllm.settings import Refused, fingerprint

__all__ = ["Refused", "__version__", "fingerprint", "probe", "register"]


def register() -> None:
    """What vLLM calls in each of its processes, once or more: the front end admits, the workers steer."""
    from thinksteer_vllm.engine import patches

    patches.install()
