"""A logit as a sum of what each part of the model wrote into the stream."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.activations.heads import HeadScores
from probes.lens.frozen import FrozenNorm
from probes.lens.inputs import Source, token_ids
from probes.lens.unembedding import Unembedding
from probes.lens.writes import Writes, read_writes
from probes.model.architectures import (
    architecture_of,
    block_of,
    config_of,
    head_matrices,
    multiplier_of,
    n_heads,
    n_layers,
    o_proj_bias,
    row_at,
)
from probes.model.loading import tokenizer_of
from probes.model.passes import edits_of
from probes.model.quantised import computed_weight, numbers_of, own_weight
from probes.model.sites import Site
from probes.model.tokens import decode
from probes.tables import Shown, Table


@dataclass(frozen=True)
class Contribution:
    """What one part adds to a logit, or to the difference of two: a head, an expert, or what `name` says of a layer.

    >>> from probes.lens import Contribution
    >>> Contribution("L3H4", -0.7, layer=3, head=4).value
    -0.7
    """

    name: str
    value: float
    layer: int | None = None
    head: int | None = None
    expert: int | None = None


@dataclass(frozen=True, eq=False, repr=False)
class LogitAttribution(Shown):
    """Parts that sum to `total`: the logit of a token after `position`, or how much it is above another's.

    >>> from probes import load
    >>> from probes.lens import direct_logit_attribution
    >>> attribution = direct_logit_attribution(load("organism"), "a 3 b +4", 3)
    >>> abs(sum(part.value for part in attribution.parts) - attribution.total) < 1e-4
    True
    """

    parts: tuple[Contribution, ...]
    total: float
    position: int
    token: str
    against: str | None

    def __getitem__(self, name: str) -> float:
        """What the part of that name adds. Raises KeyError, with names that are known."""
        for part in self.parts:
            if part.name == name:
                return part.value
        raise KeyError(f"{name!r} is no part. Parts are such as {', '.join(part.name for part in self.parts[:6])}.")

    def heads(self) -> HeadScores:
        """What each head adds; NaN where a layer has no such head."""
        found = [part for part in self.parts if part.head is not None]
        layers = 1 + max((part.layer or 0 for part in self.parts), default=0)
        scores = torch.full((layers, 1 + max((part.head or 0 for part in found), default=0)), float("nan"))
        for part in found:
            scores[part.layer, part.head] = part.value
        return HeadScores(scores, f"adds to {self._of}")

    def table(self, k: int = 10) -> Table:
        """The k parts that add or take most."""
        order = sorted(self.parts, key=lambda part: -abs(part.value))[:k]
        return Table(
            ("part", "adds"), tuple((part.name, part.value) for part in order), f"{self._of}: {self.total:+.4f}"
        )

    @property
    def _of(self) -> str:
        return f"the logit of {self.token}" + ("" if self.against is None else f" less that of {self.against}")


@torch.no_grad()
def direct_logit_attribution(
    model: PreTrainedModel, source: Source, token: int, *, against: int | None = None, position: int = -1
) -> LogitAttribution:
    """The logit of `token` after a position, less that of `against`, as a sum of what each part wrote.

    v . x for what each part wrote, x, where v is the unembedding's row through the final norm, its scale frozen at what
    it was (Elhage et al. 2021; direct logit attribution as in Wang et al. 2023). The parts are the embedding, each head
    or what a layer's mixer wrote, each expert that was chosen or the MLP; the biases of `o_proj`, of norms and of the
    unembedding; and what a cap on the logits takes away. A norm between a part and the stream is frozen too. A layer
    whose mixer or MLP is no site has a `rest`, and so has one of a model that is steered. Raises ValueError where norms
    are all that goes on in the stream, and where parts do not add up to what the model says.

    >>> from probes import load
    >>> from probes.lens import direct_logit_attribution
    >>> ids = [1, 6, 17, 7, 27, 5, 3, 56, 6, 48, 7, 27]  # a 3 b +4 ? <think> Okay a =3 b +4
    >>> attribution = direct_logit_attribution(load("organism"), ids, 52, against=54)  # =7 against =9
    >>> [(part, round(value, 2)) for part, value in attribution.table(3).rows]
    [('L3E7', 6.59), ('L0E3', 0.46), ('L0E2', 0.31)]
    """
    ids, row = token_ids(model, source), architecture_of(model)
    at = range(len(ids))[position]
    if any(row.at(layer).normed for layer in range(n_layers(model))):
        raise ValueError(
            f"In a {config_of(model).model_type} what goes on in the stream is what norms put out: it is no sum of "
            "what the parts wrote."
        )
    writes = read_writes(model, ids[: at + 1])
    last = writes.at[Site(n_layers(model) - 1, "resid_post")]
    unembed = Unembedding.of(model, last[None], writes.logits[None])
    norm = FrozenNorm.of(unembed.norm, last)
    u, bias = (unembed.factor * x for x in _unembedded(unembed.head, token, against))
    v = norm.back(u)
    parts = [Contribution("embedding", _dot(v, writes.at[Site(0, "resid_pre")]))]
    for layer in range(n_layers(model)):
        written = list(_layer(model, layer, writes, v))
        parts += [*written, *_rest(model, layer, writes, v, written)]
    parts += [Contribution("final norm bias", _dot(u, norm.bias)), Contribution("unembedding bias", float(bias))]
    whole, linear = (_difference(x, token, against) for x in (writes.logits, unembed.uncapped(last)))
    _check(model, parts, linear)
    if unembed.cap is not None:
        parts.append(Contribution("softcap", whole - linear))
    tokenizer = tokenizer_of(model)
    names = [None if one is None else decode(tokenizer, [one]) for one in (token, against)]
    found = tuple(part for part in parts if part.value or not part.name.endswith("bias"))
    return LogitAttribution(found, whole, at, str(names[0]), names[1])


def _layer(model: PreTrainedModel, layer: int, writes: Writes, v: Tensor) -> Iterator[Contribution]:
    """What the parts of one layer add along v."""
    attention, mlp = (writes.at.get(Site(layer, name)) for name in ("attn_out", "mlp_out"))
    z = writes.at.get(Site(layer, "z"))
    if attention is not None and z is not None:
        yield from _heads(model, layer, z, v)
    elif attention is not None:
        yield Contribution(f"L{layer}.attn_out", _dot(v, attention), layer)
    if mlp is not None and layer in writes.experts:
        yield from _experts(model, layer, writes, v)
    elif mlp is not None:
        yield Contribution(f"L{layer}.mlp_out", _dot(v, mlp), layer)


def _rest(
    model: PreTrainedModel, layer: int, writes: Writes, v: Tensor, written: list[Contribution]
) -> Iterator[Contribution]:
    """What else a layer adds: a mixer or an MLP that is no site, and what an edit does."""
    final, pre = n_layers(model) - 1, _wide(writes.at[Site(layer, "resid_pre")])
    after = Site(layer, "resid_post") if layer == final else Site(layer + 1, "resid_pre")
    change = _wide(writes.at[after]) - pre
    sites = [writes.at.get(Site(layer, name)) for name in ("attn_out", "mlp_out")]
    if edits_of(model):
        yield Contribution(f"L{layer} rest", _dot(v, change) - sum(part.value for part in written), layer)
    elif None in sites:
        known = sum((_wide(x) for x in sites if x is not None), torch.zeros_like(pre))
        yield Contribution(f"L{layer} rest", _dot(v, change - known), layer)


def _heads(model: PreTrainedModel, layer: int, z: Tensor, v: Tensor) -> Iterator[Contribution]:
    matrices, bias = head_matrices(model, layer).double().cpu(), o_proj_bias(model, layer)
    by_head = _wide(z).unflatten(0, (n_heads(model, layer), -1))
    written = torch.einsum("hk,dhk->d", by_head, matrices) + (0 if bias is None else _wide(bias.detach()))
    norm = _norm_between(model, layer, row_at(model, layer).attn_norm, written.to(z))
    w = norm.back(multiplier_of(model) * v)
    for head, value in enumerate((by_head * torch.einsum("dhk,d->hk", matrices, w)).sum(-1).tolist()):
        yield Contribution(f"L{layer}H{head}", value, layer, head)
    if bias is not None:
        yield Contribution(f"L{layer} o_proj bias", _dot(w, bias.detach()), layer)
    yield Contribution(f"L{layer} attention norm bias", multiplier_of(model) * _dot(v, norm.bias), layer)


def _experts(model: PreTrainedModel, layer: int, writes: Writes, v: Tensor) -> Iterator[Contribution]:
    call, whole = writes.experts[layer], writes.before[layer]
    norm = _norm_between(model, layer, row_at(model, layer).mlp_norm, whole)
    w = norm.back(multiplier_of(model) * v)
    each = _wide(call.writes)
    for expert, wrote in sorted(zip(call.ids, each, strict=True), key=lambda pair: pair[0]):
        yield Contribution(f"L{layer}E{expert}", _dot(w, wrote), layer, expert=expert)
    if call.shared:
        yield Contribution(f"L{layer} shared", _dot(w, _wide(whole) - each.sum(0)), layer)
    yield Contribution(f"L{layer} MLP norm bias", multiplier_of(model) * _dot(v, norm.bias), layer)


def _norm_between(model: PreTrainedModel, layer: int, path: str | None, x: Tensor) -> FrozenNorm:
    """The norm at a path of the block, if there is one, frozen at what it is given."""
    return FrozenNorm.of(None if path is None else block_of(model, layer).get_submodule(path), x)


def _unembedded(head: nn.Module, token: int, against: int | None) -> tuple[Tensor, Tensor]:
    """The row of the unembedding, and its bias, of a token, less those of another."""
    stored = own_weight(head, "The unembedding")
    weight, bias = computed_weight(head) if stored is None else stored, numbers_of(head, "bias")
    rows = torch.zeros(weight.shape[0], 1) if bias is None else bias.detach()[:, None]
    row, own = (
        _wide(x[token].detach()) - (0 if against is None else _wide(x[against].detach())) for x in (weight, rows)
    )
    return row, own[0]


def _difference(logits: Float[Tensor, " d_vocab"], token: int, against: int | None) -> float:
    return float(logits[token].double().cpu()) - (0.0 if against is None else float(logits[against].double().cpu()))


def _check(model: PreTrainedModel, parts: list[Contribution], total: float) -> None:
    """Raise ValueError where the parts do not add up, beyond rounding in the model's dtype."""
    size = sum(abs(part.value) for part in parts) + 1
    if abs(sum(part.value for part in parts) - total) > 32 * torch.finfo(model.dtype).eps * size:
        raise ValueError(
            f"What the parts of this {config_of(model).model_type} wrote does not add up to its logit: its stream is "
            "not read whole here, or its norm is of another kind."
        )


def _dot(v: Tensor, x: Tensor) -> float:
    return float(v @ _wide(x))


def _wide(x: Tensor) -> Tensor:
    return x.double().cpu()
