"""Recipes inside vLLM: its server with them, and the settings that its plugin, `thinksteer-vllm`, is started with."""

from probes.exports import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
