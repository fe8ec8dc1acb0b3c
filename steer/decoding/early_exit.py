"""Stop thinking at the end of a step: when a probe on the stream says that the answer is decided, or entropy is low."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from probes.directions.answer_probe import AnswerProbe
from probes.model.hooks import hook_site
from probes.model.loading import tokenizer_of
from probes.needles import Needle
from probes.thinking._segments import present_rules, step_ids
from steer.decoding.control import Processors
from steer.decoding.state import DecodingState, Ids, Scores


@dataclass(frozen=True)
class EarlyExit:
    """Ends the thinking at the first step end whose score by `probe` is above `threshold`, in log odds.

    The probe is `probes.directions.fit_answer_probe`'s, the threshold such as `conformal_threshold` gives. A step ends
    at a token that ends a text of `rules.after` (`probes.thinking.RULES`; "seal": a blank line). The score is that of
    the pass that reads this token, and decides over the next one; nothing leaves the device. Raises ValueError at the
    start of a run where the rules end no step.

    >>> import torch
    >>> from probes import Site, generate, load
    >>> from probes.directions import AnswerProbe
    >>> from steer.decoding import Controlled, EarlyExit
    >>> model, always = load("organism"), AnswerProbe(Site(2, "resid_post"), torch.zeros(96), offset=1.0, n=90)
    >>> control = EarlyExit(always, threshold=0.0, rules="organism")
    >>> completion = generate(model, ["a 3 b +4 c *7"], decoding=Controlled(model, control))[0]
    >>> completion.thinking, completion.events
    ('Okay a =3', (('close', 4),))
    """

    probe: AnswerProbe
    threshold: float = 0.0
    rules: str = "seal"

    def __str__(self) -> str:
        return f"EarlyExit({self.probe}, threshold={self.threshold!r}, rules={self.rules!r})"

    def processors(self, model: PreTrainedModel, rows: DecodingState) -> Processors:
        """The processors of one run."""
        score = _Score(self.probe, self.threshold, model)
        return Processors(
            after=(_Exit(rows, StepEnds.of(model, self.rules), score),), turns=True, listens=(score.listening,)
        )


@dataclass(frozen=True)
class EntropyExit:
    """Ends the thinking at the first step end after which the next token's distribution has an entropy below `below`
    nats, at temperature 1.

    >>> from probes import generate, load
    >>> from steer.decoding import Controlled, EntropyExit
    >>> model, control = load("organism"), EntropyExit(below=9.0, rules="organism")
    >>> generate(model, ["a 3 b +4 c *7"], decoding=Controlled(model, control))[0].thinking
    'Okay a =3'
    """

    below: float
    rules: str = "seal"

    def __post_init__(self) -> None:
        if not self.below > 0:
            raise ValueError(f"An entropy is a number of nats above 0, but got below={self.below}.")

    def processors(self, model: PreTrainedModel, rows: DecodingState) -> Processors:
        """The processors of one run."""
        entropy = _Entropy(self.below)
        return Processors(before=(entropy,), after=(_Exit(rows, StepEnds.of(model, self.rules), entropy),), turns=True)


@dataclass(frozen=True, eq=False)
class StepEnds:
    """What ends a step: texts that are found whatever tokens they share, and tokens where a text is one of its own."""

    texts: tuple[Needle, ...]
    ids: tuple[int, ...]
    _listed: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel, rules: str) -> "StepEnds":
        """By these rules. Raises ValueError where they end none."""
        tokenizer = tokenizer_of(model)
        known, _ = present_rules(tokenizer, rules)
        if not known.after:
            raise ValueError(
                f"The rules {rules!r} say where a step begins, not where it ends: name rules with `after`."
            )
        needles = {words: Needle.of(tokenizer, words) for words in known.after}
        alone = [words for words, needle in needles.items() if needle is None]
        ids = sorted({token for words in alone for token in step_ids(tokenizer, words)})
        return cls(tuple(needle for needle in needles.values() if needle is not None), tuple(ids))

    def at(self, input_ids: Ids, width: int) -> Tensor:
        """Whether each row's newest token ends a step, in a vocabulary of that many tokens."""
        found = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for needle in self.texts:
            found = found | needle.ends(input_ids[:, -len(needle.text) :])[:, -1]
        if self.ids:
            key = (width, input_ids.device)
            if key not in self._listed:
                listed = torch.zeros(max(width, max(self.ids) + 1), dtype=torch.bool, device=input_ids.device)
                listed[list(self.ids)] = True
                self._listed[key] = listed
            found = found | self._listed[key][input_ids[:, -1]]
        return found


class _Score:
    """The probe's verdict on the last token of each row, in the latest pass."""

    fires: Tensor

    def __init__(self, probe: AnswerProbe, threshold: float, model: PreTrainedModel) -> None:
        self.probe, self.threshold, self.model = probe, threshold, model

    @contextmanager
    def listening(self) -> Iterator[None]:
        with hook_site(self.model, self.probe.site, self.see):
            yield

    def see(self, x: Tensor) -> None:
        self.fires = self.probe(x[:, -1]) > self.threshold


class _Entropy(LogitsProcessor):
    """Whether the distribution of each row's next token is narrow; changes nothing."""

    fires: Tensor

    def __init__(self, below: float) -> None:
        self.below = below

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:  # noqa: ARG002
        log = scores.float().log_softmax(-1)
        self.fires = -(log.exp() * log.clamp(min=-math.log(torch.finfo(torch.float32).max))).sum(-1) < self.below
        return scores


class _Exit(LogitsProcessor):
    def __init__(self, rows: DecodingState, ends: StepEnds, verdict: "_Score | _Entropy") -> None:
        self.rows, self.ends, self.verdict = rows, ends, verdict

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:
        rows = self.rows
        over = self.ends.at(input_ids, scores.shape[1]) & (rows.thoughts > 0)
        fires = self.verdict.fires.to(rows.device) & over
        return rows.end_thinking(scores, rows.thinking & rows.free & (fires | rows.shut))
