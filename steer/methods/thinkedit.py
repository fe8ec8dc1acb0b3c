"""ThinkEdit: edit the few attention heads that write short thinking (Sun, Yan and Weng 2025, arXiv 2503.22048).

The paper's way is `PUBLISHED`: v = mean over long - mean over short completions of the residual stream after attention,
averaged over the positions [start-1, end-1); heads ranked by ⟨mean write over short completions, -v̂⟩; the top heads'
columns of `o_proj` projected, W ← (I - w v̂v̂ᵀ) W. `PUBLISHED` takes the share of the smallest published model, 20 of 336
heads (R1-Distill-Qwen-1.5B, 6.0 %); the others': 40 of 1024 (Llama-8B, 3.9 %), 80 of 1920 (Qwen-14B, 4.2 %), 160 of
2560 (Qwen-32B, 6.3 %).

Beyond the paper: read at the first thought alone, rank heads centred (short - long), and edit otherwise than by
projection. Behind a post-norm with gain g, u = g⊙v̂/‖g⊙v̂‖ stands for v̂, so that v̂ leaves the stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.activations.heads import Head, HeadScores, Inputs, mean_inputs, writes_along, written_unit
from probes.directions.direction import Direction, difference_in_means, random_direction
from probes.generation.completions import Completion
from probes.model.architectures import layers_with_heads, sites_in
from probes.model.sites import Site, SiteName
from probes.tables import Brief
from probes.thinking.spans import POSITIONS, Span
from probes.words import checked
from steer.interventions.activation import Ablate, Add, Clamp, Intervention
from steer.recipes.recipe import Recipe

Position = Literal["thinking", "first"]
Ranking = Literal["raw", "centred"]
Kind = Literal["project", "replace", "one_sided"]
METHOD = "ThinkEdit (Sun et al. 2025)"


@checked
@dataclass(frozen=True)
class ThinkEditSetting:
    """One way to edit. `heads` is a number of heads, or a share of all heads below 1.

    `weight` is how much of the projection is taken out: 1 is all of it.

    >>> from steer.methods.thinkedit import ThinkEditSetting
    >>> str(ThinkEditSetting("replace", "first", "centred", heads=3))
    'replace, first position, centred ranking, 3 heads'
    """

    kind: Kind = "project"
    position: Position = "thinking"
    ranking: Ranking = "raw"
    heads: float = 0.06
    weight: float = 1.0

    def __str__(self) -> str:
        count = f"{self.heads:.0%} of the heads" if self.heads < 1 else f"{int(self.heads)} heads"
        return f"{self.kind}, {self.position} position, {self.ranking} ranking, {count}"


PUBLISHED = ThinkEditSetting()


def n_edited(heads: float, total: int) -> int:
    """A number of heads as given, or a share of the `total`, at least one. Raises ValueError where there are fewer.

    >>> from steer.methods.thinkedit import n_edited
    >>> n_edited(0.06, 32), n_edited(5, 32)
    (2, 5)
    """
    count = max(1, round(heads * total)) if heads < 1 else int(heads)
    if count > total:
        raise ValueError(f"{count} heads are asked for, but the model has {total}.")
    return count


@dataclass(frozen=True, eq=False, repr=False)
class LengthSplit(Brief):
    """Completions that thought briefly and at length; the cut-offs are in thinking tokens, both excluded.

    >>> from probes import Sampling, load
    >>> from steer import task_named
    >>> from steer.evaluation import solve
    >>> from steer.methods.thinkedit import LengthSplit
    >>> model = load("organism")
    >>> problems, sampling = task_named("chains").sample(20, "probe"), Sampling.of(model, max_new_tokens=48)
    >>> completions = solve(model, problems, sampling=sampling)
    >>> split = LengthSplit.by_quantile(completions, minimum=2)
    >>> len(split.short), len(split.long), split.below, split.above
    (8, 6, 3.5, 22.5)
    """

    short: tuple[Completion, ...]
    long: tuple[Completion, ...]
    below: float
    above: float

    @classmethod
    def at(
        cls, completions: Sequence[Completion], *, below: float = 100, above: float = 1000, minimum: int = 10
    ) -> "LengthSplit":
        """Thinking shorter than `below` against longer than `above` tokens (the paper's 100 and 1000).

        Completions that never close their thinking are left out, as in the paper; correctness plays no part. Raises
        ValueError where a class has fewer than `minimum`.
        """
        closed = [c for c in completions if c.span is not None and c.span.closed]
        short = tuple(c for c in closed if c.thinking_tokens < below)
        long = tuple(c for c in closed if c.thinking_tokens > above)
        if min(len(short), len(long)) < minimum:
            lengths = sorted(c.thinking_tokens for c in closed)
            seen = f"their lengths are {lengths[0]} to {lengths[-1]}" if lengths else "none closed its thinking"
            raise ValueError(
                f"Of {len(completions)} completions, {len(short)} think in fewer than {below:g} tokens and {len(long)} "
                f"in more than {above:g}, but each class needs {minimum}; {seen}. Give other cut-offs, or quantiles."
            )
        return cls(short, long, below, above)

    @classmethod
    def by_quantile(cls, completions: Sequence[Completion], *, share: float = 0.25, minimum: int = 10) -> "LengthSplit":
        """The cut-offs that leave about `share` of the completions on each side, at most half of them."""
        if not 0 < share <= 0.5:
            raise ValueError(f"share is {share}, but a side is more than nothing and at most half: 0 < share <= 0.5.")
        lengths = [float(c.thinking_tokens) for c in completions if c.span is not None and c.span.closed]
        if not lengths:
            return cls.at(completions, minimum=minimum)
        low, high = torch.tensor(lengths).quantile(torch.tensor([share, 1 - share])).tolist()
        return cls.at(completions, below=low + 0.5, above=high - 0.5, minimum=minimum)

    @checked
    def spans(self, position: Position) -> tuple[list[Span], list[Span]]:
        """Short and long completions, as the positions to read."""
        read = POSITIONS[position]
        return [read(c) for c in self.short], [read(c) for c in self.long]


@checked
@dataclass(frozen=True, eq=False, repr=False)
class LengthReading(Brief):
    """The length direction of every layer (long - short), and what each head writes along it in either class.

    Writes are along v̂, or along u behind a post-norm: `units` holds which, layer by layer, [d_model] each.
    `short_writes` and `long_writes` are means over spans, [n_layers n_heads].

    >>> from probes import Sampling, load
    >>> from steer import task_named
    >>> from steer.evaluation import solve
    >>> from steer.methods.thinkedit import LengthReading, LengthSplit
    >>> model = load("organism")
    >>> problems, sampling = task_named("chains").sample(20, "probe"), Sampling.of(model, max_new_tokens=48)
    >>> completions = solve(model, problems, sampling=sampling)
    >>> split = LengthSplit.by_quantile(completions, minimum=2)
    >>> reading = LengthReading.of(model, split)
    >>> heads = reading.scores("raw").top(2)
    >>> heads, len(reading.edit(heads, kind="project").steps)
    ([(0, 6), (0, 3)], 2)
    """

    model: PreTrainedModel
    split: LengthSplit
    position: Position
    directions: tuple[Direction, ...]
    units: tuple[Float[Tensor, " d_model"], ...]
    short_writes: Float[Tensor, "n_layers n_heads"]
    long_writes: Float[Tensor, "n_layers n_heads"]
    inputs: tuple[Inputs, Inputs]  # of the heads, means over short and over long spans

    @classmethod
    @checked
    def of(
        cls,
        model: PreTrainedModel,
        split: LengthSplit,
        *,
        position: Position = "thinking",
        site: SiteName = "resid_mid",
    ) -> "LengthReading":
        short, long = split.spans(position)
        found = difference_in_means(model, long, short, sites_in(model, site))
        layers = layers_with_heads(model) or [0]  # of which none is refused
        inputs = (mean_inputs(model, short, layers), mean_inputs(model, long, layers))
        return cls._along(model, split, position, tuple(found.values()), inputs)

    @classmethod
    def _along(
        cls,
        model: PreTrainedModel,
        split: LengthSplit,
        position: Position,
        directions: tuple[Direction, ...],
        inputs: tuple[Inputs, Inputs],
    ) -> "LengthReading":
        units = {d.site.layer: written_unit(model, d.site.layer, d.unit) for d in directions}
        short, long = (writes_along(model, one, units) for one in inputs)
        return cls(model, split, position, directions, tuple(units.values()), short, long, inputs)

    def at_random(self, seed: int) -> "LengthReading":
        """The null: the same reading along random directions of the same norms."""
        drawn = tuple(random_direction(d, seed=seed * 1000 + d.site.layer) for d in self.directions)
        return self._along(self.model, self.split, self.position, drawn, self.inputs)

    @checked
    def scores(self, ranking: Ranking = "raw") -> HeadScores:
        """How much each head writes towards short thinking. `centred`: more on short than on long completions."""
        if ranking == "raw":
            return HeadScores(-self.short_writes, "mean write along -v̂ on short completions")
        return HeadScores(self.long_writes - self.short_writes, "mean write along -v̂, short less long completions")

    @checked
    def edit(self, heads: Sequence[Head], *, kind: Kind = "project", weight: float = 1.0) -> Recipe:
        """The recipe that edits these heads.

        `project` (the paper) takes v̂ out of what a head writes. `replace` sets the write along v̂ to its mean over
        long completions, which needs a bias to fold. `one_sided` lets a head write towards long or not at all, and
        works at run time only.
        """
        return Recipe.of(
            self.model, [self._edit_head(head, kind, weight) for head in heads], method=f"{METHOD}, {kind}"
        )

    def _edit_head(self, head: Head, kind: Kind, weight: float) -> Intervention:
        site, unit = Site(head[0], "result", head[1]), self.units[head[0]]
        birth = next(d.provenance for d in self.directions if d.site.layer == head[0])
        match kind:
            case "project":
                return Ablate(site, unit, weight, birth=birth)
            case "replace":
                return Ablate(site, unit, weight, target=float(self.long_writes[head]), birth=birth)
            case "one_sided":
                return Clamp(site, unit, weight, low=0.0, birth=birth)

    def steering(self, strength: float, *, layers: Sequence[int] | None = None) -> Recipe:
        """The paper's first experiment: strength * v_l added at every token to what attention (or the MLP) adds in
        layer l, raw and unnormalised, in all layers or in some. Positive is longer; the paper goes to ±0.08 in all
        layers, and to ±1 in one.

        A reading of `resid_mid` steers `attn_out`; one of `resid_post` steers `mlp_out`.
        """
        into: SiteName = "mlp_out" if self.directions[0].site.name == "resid_post" else "attn_out"
        selected = [d for d in self.directions if layers is None or d.site.layer in layers]
        adds = [Add(Site(d.site.layer, into), d.vector, strength, d.provenance) for d in selected]
        return Recipe.of(self.model, adds, method=f"{METHOD}, steering")

    def recipe(self, setting: ThinkEditSetting) -> Recipe:
        return self.edit(self.heads(setting), kind=setting.kind, weight=setting.weight)

    def heads(self, setting: ThinkEditSetting) -> list[Head]:
        if setting.position != self.position:
            raise ValueError(f"The setting reads at {setting.position!r}, this reading is at {self.position!r}.")
        return self.scores(setting.ranking).top(self.count(setting.heads))

    def count(self, heads: float) -> int:
        """A number of heads as given, or a share of all heads, at least one."""
        return n_edited(heads, self.short_writes.numel())
