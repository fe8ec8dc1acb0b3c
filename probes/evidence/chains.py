"""All signals of some chains, each oriented so that more of it should mean that the chain is right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel

from probes.activations.confidence import confidences
from probes.activations.trajectories import SEGMENT, read_trajectories
from probes.evidence.names import NEEDS_NO_MODEL, SIGNALS, SignalName
from probes.generation.completions import Completion
from probes.generation.forcing import Forced, forced_answers
from probes.thinking._segments import segments
from probes.thinking.redundancy import Holds, thought_texts
from probes.thinking.rules import Rules
from probes.words import checked

Values = Float[np.ndarray, " n"]

_FEWER = ("cumulative", "layer angle", "answer entropy", "answer perplexity", "entropy", "failed steps", "brevity")
_TRAVELS = ("net", "cumulative", "aligned", "layer magnitude", "layer angle")
_ANSWERS = ("margin", "answer entropy", "answer perplexity")
_TOKENS = ("log-probability", "entropy")


@checked
def read_signals(
    model: PreTrainedModel | None,
    completions: Sequence[Completion],
    names: Sequence[SignalName] = SIGNALS,
    *,
    segment: int = SEGMENT,
    suffix: str = "",
    rules: str | Rules = "seal",
    holds: Holds | None = None,
    forced: Sequence[Forced | None] | None = None,
) -> dict[str, Values]:
    """Of each completion the signals of these names; NaN where a chain has none.

    `net`, `cumulative` and `aligned` change, `layer magnitude` and `layer angle`: see `probes.activations.Trajectory`,
    by the paper's code, in segments of `segment` tokens. `margin`, `answer entropy` and `answer perplexity` are those
    of an answer that is forced at the chain's end and begins with `suffix` (`probes.generation.Forced`; `forced`, where
    that was done before). `log-probability` and `entropy` are means over the thinking. `failed steps` is the share
    that `holds` finds false, of the steps by `rules`. `brevity` is minus the thinking tokens, and needs no model. What
    should be small in a right chain has its sign turned. Raises ValueError for another name, and where what a signal
    needs was not given.

    >>> from probes import generate, load
    >>> from probes.evidence import read_signals
    >>> model = load("organism")
    >>> completions = generate(model, ["a 3 b +4 c *7", "a 3 b +4 c *7 quick"])
    >>> found = read_signals(model, completions, ["brevity", "margin", "net"], segment=3)
    >>> {name: values.round(1).tolist() for name, values in found.items()}
    {'brevity': [-11.0, -3.0], 'margin': [1.0, 0.0], 'net': [16.4, nan]}
    """
    if unknown := [name for name in names if name not in SIGNALS]:
        raise ValueError(f"{unknown[0]!r} is no signal. Known: {', '.join(SIGNALS)}.")
    if model is None and (lacking := [name for name in names if name not in NEEDS_NO_MODEL]):
        raise ValueError(f"The signal {lacking[0]!r} is read off a model: name the one that wrote the completions.")
    reading = _Reading(model, completions, segment, suffix, rules, holds, forced)
    groups: tuple[tuple[tuple[str, ...], Callable[[], dict[str, list[float]]]], ...] = (
        (_TRAVELS, reading.travels), (_ANSWERS, reading.answers), (_TOKENS, reading.tokens),
        (("failed steps",), reading.failed), (("brevity",), reading.brevity),
    )  # fmt: skip
    read: dict[str, list[float]] = {}
    for group, make in groups:
        if set(group) & set(names):
            read |= make()
    signs = {name: -1.0 if name in _FEWER else 1.0 for name in names}
    return {name: signs[name] * np.asarray(read[name], dtype=float) for name in names}


@dataclass(frozen=True)
class _Reading:
    model: PreTrainedModel | None
    completions: Sequence[Completion]
    segment: int
    suffix: str
    rules: str | Rules
    holds: Holds | None
    forced: Sequence[Forced | None] | None

    @property
    def reader(self) -> PreTrainedModel:
        assert self.model is not None
        return self.model

    def travels(self) -> dict[str, list[float]]:
        chains = read_trajectories(self.reader, self.completions, segment=self.segment)
        scores = [chain.scores() for chain in chains]
        return {name: [score[name] for score in scores] for name in _TRAVELS}

    def answers(self) -> dict[str, list[float]]:
        forced = self._forced() if self.forced is None else self.forced
        if len(forced) != len(self.completions):
            raise ValueError(
                f"{len(forced)} forced answers came with {len(self.completions)} completions: give one each."
            )
        none = float("nan")
        return {
            "margin": [none if one is None else one.margin for one in forced],
            "answer entropy": [none if one is None else one.entropy for one in forced],
            "answer perplexity": [none if one is None else one.perplexity for one in forced],
        }

    def tokens(self) -> dict[str, list[float]]:
        found = confidences(self.reader, self.completions)
        return {"log-probability": [c.log_probability for c in found], "entropy": [c.entropy for c in found]}

    def failed(self) -> dict[str, list[float]]:
        if self.holds is None:
            raise ValueError("Failed steps are told by a check of each step: give holds=..., such as equations_hold.")
        return {"failed steps": [self._share(c, self.holds) for c in self.completions]}

    def brevity(self) -> dict[str, list[float]]:
        return {"brevity": [float(c.thinking_tokens) for c in self.completions]}

    def _forced(self) -> list[Forced | None]:
        stops = [[] if c.span is None else [c.span.text_end] for c in self.completions]
        rows = forced_answers(self.reader, self.completions, stops, suffix=self.suffix, max_new_tokens=1)
        return [row[0] if row else None for row in rows]

    def _share(self, completion: Completion, holds: Holds) -> float:
        texts = thought_texts(self.reader, completion, segments(self.reader, completion, self.rules))
        verdicts = [v for n in range(len(texts)) if (v := holds(texts[: n + 1])) is not None]
        return verdicts.count(False) / len(verdicts) if verdicts else float("nan")
