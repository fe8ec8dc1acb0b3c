"""The names of the signals of a chain, which a command tells before anything heavy is imported."""

from typing import Literal, get_args

SignalName = Literal[
    "net", "cumulative", "aligned", "layer magnitude", "layer angle", "margin", "answer entropy", "answer perplexity",
    "log-probability", "entropy", "failed steps", "brevity",
]  # fmt: skip
SIGNALS: tuple[SignalName, ...] = get_args(SignalName)
NEEDS_NO_MODEL: tuple[SignalName, ...] = ("brevity",)
