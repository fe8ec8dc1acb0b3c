"""A linear probe on the stream at the end of a step: has the chain come to its answer?"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.activations._record import span_means
from probes.directions._logistic import fit_logistic
from probes.generation.completions import Completion
from probes.model.architectures import width_of
from probes.model.sites import Site
from probes.tables import Brief
from probes.thinking.spans import Span

FEWEST = 20


@dataclass(frozen=True, eq=False, repr=False)
class AnswerProbe(Brief):
    """Log odds x.vector + offset that the answer is decided where the stream is x. `n` step ends were fitted on.

    >>> import torch
    >>> from probes import Site
    >>> from probes.directions import AnswerProbe
    >>> probe = AnswerProbe(Site(2, "resid_post"), torch.tensor([2.0, 0.0]), offset=-1.0, n=90)
    >>> probe(torch.tensor([[1.0, 5.0]]))
    tensor([1.])
    """

    site: Site
    vector: Float[Tensor, " d_model"]
    offset: float
    n: int

    def __call__(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows"]:
        return x.float() @ self.vector.to(x.device) + self.offset

    def __str__(self) -> str:
        """The site, and a checksum of the numbers: two probes of one name are one."""
        digest = hashlib.sha256(self.vector.cpu().numpy().tobytes() + str(self.offset).encode()).hexdigest()
        return f"AnswerProbe({self.site}, {digest[:12]})"


def fit_answer_probe(
    model: PreTrainedModel,
    completions: Sequence[Completion],
    stops: Sequence[Sequence[int]],
    decided: Sequence[Sequence[bool]],
    site: Site,
    *,
    ridge: float = 1e-2,
) -> AnswerProbe:
    """Logistic regression of whether the answer is decided on the stream at the last token of each step.

    `stops` are the ends of each completion's steps, one past their last tokens, and `decided` says of each whether an
    answer forced there (`probes.generation.forced_answers`) is the chain's own (after Reasoning Theater and LYNX, which
    are known here by their abstracts). `ridge` is that on standardised features. Raises ValueError for fewer than 20
    steps, or where all are of one kind.

    >>> from probes import Sampling, Site, generate, load
    >>> from probes.directions import fit_answer_probe
    >>> from probes.thinking import segments
    >>> model = load("organism")
    >>> completions = generate(model, [f"a {k} b +4 c *7 d -2" for k in range(8)], sampling=Sampling(temperature=0))
    >>> stops = [[s.stop for s in segments(model, c, "organism")] for c in completions]
    >>> decided = [[stop == own[-1] for stop in own] for own in stops]
    >>> probe = fit_answer_probe(model, completions, stops, decided, Site(2, "resid_post"))
    >>> probe.n, probe.vector.shape
    (32, torch.Size([96]))
    """
    labels = torch.tensor([bool(label) for own in decided for label in own])
    if len(labels) < FEWEST:
        raise ValueError(f"A probe needs {FEWEST} steps, but these chains have {len(labels)}. Give more completions.")
    return answer_probe(step_states(model, completions, stops, [site])[site], labels, site, ridge=ridge)


def answer_probe(
    x: Float[Tensor, "steps d_model"], decided: Bool[Tensor, " steps"], site: Site, *, ridge: float = 1e-2
) -> AnswerProbe:
    """Of activations that are there already."""
    vector, offset = fit_logistic(x, decided, ridge=ridge)
    return AnswerProbe(site, vector.float(), offset, len(x))


def probe_scores(
    model: PreTrainedModel, probe: AnswerProbe, completions: Sequence[Completion], stops: Sequence[Sequence[int]]
) -> list[Float[Tensor, " _"]]:
    """The log odds at the end of each step of each completion.

    >>> import torch
    >>> from probes import Site, generate, load
    >>> from probes.directions import AnswerProbe, probe_scores
    >>> model = load("organism")
    >>> completions, probe = generate(model, ["a 3 b +4"]), AnswerProbe(Site(2, "resid_post"), torch.zeros(96), 1.5, 90)
    >>> probe_scores(model, probe, completions, [[10, 13]])
    [tensor([1.5000, 1.5000])]
    """
    x = step_states(model, completions, stops, [probe.site])[probe.site]
    return list(probe(x).split([len(own) for own in stops]))


def step_states(
    model: PreTrainedModel, completions: Sequence[Completion], stops: Sequence[Sequence[int]], sites: Sequence[Site]
) -> dict[Site, Float[Tensor, "steps d_model"]]:
    """The activation at the last token of each step, completion after completion, at each site, in one pass."""
    spans = [Span(c.all_ids, stop - 1, stop) for c, own in zip(completions, stops, strict=True) for stop in own]
    x = {site: torch.zeros(len(spans), width_of(model, site)) for site in sites}
    for batch in span_means(model, spans, sites, keep_sinks=True, label="steps"):
        for site in sites:
            x[site][batch.rows] = batch.means[site].float().cpu()
    return x


def decided_at(answers: Sequence[str | None], own: str | None) -> list[bool]:
    """Of answers that were forced along a chain: which are the chain's own. None is no answer, and never the same.

    >>> from probes.directions import decided_at
    >>> decided_at(["3", "9", "9"], "9")
    [False, True, True]
    """
    return [answer is not None and answer == own for answer in answers]


def conformal_threshold(
    scores: Sequence[Float[Tensor, " _"]], decided: Sequence[Bool[Tensor, " _"] | Sequence[bool]], risk: float
) -> float:
    """The score above which a chain may be stopped, so that the chance that it is stopped before its answer is decided
    is at most `risk`.

    Split conformal prediction (Vovk et al. 2005): of `n` chains that nothing was fitted on, each gives the highest
    score of its undecided steps; the threshold is the ceil((n + 1) (1 - risk))-th smallest of these, infinite where
    there are too few chains. The bound holds for a new chain of the same kind, whatever the probe is worth, on average
    over calibration sets. Raises ValueError for a risk that is no share.

    >>> import torch
    >>> from probes.directions import conformal_threshold
    >>> scores, decided = [torch.tensor([k / 10, 2.0]).double() for k in range(9)], [[False, True]] * 9
    >>> [round(conformal_threshold(scores, decided, risk), 2) for risk in (0.2, 0.05)]
    [0.7, inf]
    """
    if not 0 < risk < 1:
        raise ValueError(f"A risk is a share between 0 and 1, but {risk} was given.")
    highest = []
    for own, known in zip(scores, decided, strict=True):
        wrong = own.double()[~torch.as_tensor(known, dtype=torch.bool)]
        highest.append(float(wrong.max()) if len(wrong) else -torch.inf)
    rank = -int(-(len(highest) + 1) * (1 - risk) // 1)
    return sorted(highest)[rank - 1] if rank <= len(highest) else torch.inf
