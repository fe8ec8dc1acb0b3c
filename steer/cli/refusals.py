"""What a command says in place of a traceback: one sentence, in the words of a command line."""

import re

import typer

EXPECTED = (ValueError, TypeError, OSError, IndexError, ImportError, NotImplementedError)
USAGE = next(base for base in reversed(typer.BadParameter.__mro__) if hasattr(base, "format_message"))

# What the library says to those who write Python, and what a shell has for it.
_WORDS = (
    (r"load it with delimiters=\('(.*?)', '(.*?)'\)", r"give --delimiters '\1' '\2'"),
    (
        r"Set tokenizer\.chat_template, load the instruction-tuned model, or give template='raw' for a base model",
        "Name the instruction-tuned model; base models are asked raw texts from Python alone",
    ),
    (r"Set the tokenizer's chat template, or give Delimiters\(turn=\.\.\.\)", "Name a model that has a chat template"),
    (r"give it with phase='(\w+)', not '(\w+)'", r"give it with --scope \1, not \2"),
    (r"take delta\.selected\(skip=\['(\w+)'\]\)", r"give --skip \1"),
    (r"Give other cut-offs, or quantiles", "Give other --short and --long, or --share"),
    (r"Input should be greater than or equal to (-?\d+)", r"it must be at least \1."),
    (r"Input should be less than or equal to (-?\d+)", r"it must be at most \1."),
    (r"Input should be a valid integer.*", "it must be a whole number."),
    (r"Input should be a valid number.*", "it must be a number."),
    (r"invalid literal for int\(\) with base 10: (.*)", r"\1 is no whole number."),
    (r"could not convert string to float: (.*)", r"\1 is no number."),
    (r"\bshift=(-?\d+)", r"--shift \1"),
    (r"\b(batch_size|samples) is (-?\d+)", lambda found: f"--{found[1].replace('_', '-')} is {found[2]}"),
)


def is_expected(error: Exception) -> bool:
    """Is it a refusal, ours or a library's, and no fault of the code?"""
    return isinstance(error, (*EXPECTED, USAGE)) or type(error).__name__ == "OutOfMemoryError"


def sentence(error: Exception) -> str:
    """What went wrong, on one line that no character of can steer a terminal."""
    if isinstance(error, USAGE):  # the base of what the parser raises, public in no version
        text = str(getattr(error, "format_message")())
    elif type(error).__name__ == "OutOfMemoryError":
        text = f"The device has too little memory: give a smaller --batch-size. ({error})"
    elif type(error).__module__.startswith("huggingface_hub."):
        text = f"It is not on this machine, and the hub does not give it ({type(error).__name__}): {error}"
    elif isinstance(error, FileNotFoundError) and error.filename is not None:
        text = f"{error.filename} does not exist."
    elif isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename} cannot be used: {error.strerror}."
    else:
        text = str(error) or type(error).__name__
    for pattern, words in _WORDS:
        text = re.sub(pattern, words, text)
    text = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
