"""The one table of the neighbours' formats. To add one: a module here with `write` and `read`, and its row."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """Who reads it, what its files are called, the module that writes and reads it, and the key that tells its JSON.

    >>> from steer.interop import FORMATS
    >>> FORMATS["gguf"]
    Format(readers='llama.cpp, repeng, EasySteer', suffixes=('.gguf',), module='gguf_vectors', key='')
    """

    readers: str
    suffixes: tuple[str, ...]
    module: str
    key: str = ""


FORMATS: dict[str, Format] = {
    "gguf": Format("llama.cpp, repeng, EasySteer", (".gguf",), "gguf_vectors"),
    "easysteer": Format("EasySteer", (".json",), "easysteer", "vectors"),
    "vllm-lens": Format("vllm-lens", (".json",), "vllm_lens", "activations"),
    "lm-eval": Format("lm-eval, model type `steered`", (".pt", ".pth"), "lm_eval"),
}
