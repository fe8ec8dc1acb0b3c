"""How large a weight delta is in each layer, and how it lies to others: norms and cosines, read once."""

import re
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from probes.figures.plots import grids_figure
from probes.late import go
from probes.tables import Table
from steer.checkpoints.checkpoint import blocks
from steer.deltas.delta import WeightDelta

Gram = Float[Tensor, "deltas deltas"]
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(.+)")


def grams(deltas: Sequence[WeightDelta]) -> dict[str, Gram]:
    """⟨Δᵢ, Δⱼ⟩ for every tensor of the first delta, in float64; zero for a delta that does not hold it."""
    products = {}
    for name in deltas[0].names:
        shape = deltas[0].shape(name)
        holders = [i for i, delta in enumerate(deltas) if name in delta.names and delta.shape(name) == shape]
        gram = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
        for rows in blocks(shape):
            values = torch.stack([deltas[i].block(name, rows).reshape(-1) for i in holders])
            gram[torch.tensor(holders)[:, None], torch.tensor(holders)] += values @ values.T
        products[name] = gram
    return products


def norms(delta: WeightDelta, others: Mapping[str, WeightDelta] | None = None) -> Table:
    """‖Δ‖ per layer and kind of module, and the cosine to each of the others there; the last row is for all.

    Sums are float64. The cosine is NaN where a delta is zero, or does not hold the tensor.

    >>> from steer.deltas import norms, open_delta
    >>> rl, sft = open_delta("organism-rl"), open_delta("organism-sft")
    >>> table = norms(rl, {"their sum": rl + sft})
    >>> table.columns
    ('layer', 'module', 'tensors', 'norm', 'cosine to their sum')
    >>> table.rows[-1][0], round(table.rows[-1][3], 2), round(table.rows[-1][4], 2)
    ('all', 3.64, 0.53)
    """
    others = others or {}
    groups: dict[tuple[str, str], list[Gram]] = {}
    for name, gram in grams([delta, *others.values()]).items():
        groups.setdefault(place_in_model(name), []).append(gram)
    rows = [(*key, *_row(products)) for key, products in sorted(groups.items(), key=lambda item: _order(item[0]))]
    rows.append(("all", "", *_row([gram for products in groups.values() for gram in products])))
    return Table(("layer", "module", "tensors", "norm", *(f"cosine to {name}" for name in others)), tuple(rows))


def figure_of(table: Table) -> "go.Figure":
    """The table of `norms` as a picture: ‖Δ‖ [kinds of module, layers], and beside it each cosine.

    >>> from steer.deltas import figure_of, norms, open_delta
    >>> figure = figure_of(norms(open_delta("organism-rl"), {"sft": open_delta("organism-sft")}))
    >>> [annotation.text for annotation in figure.layout.annotations]
    ['‖Δ‖', 'cosine to sft']
    """
    cells = {row[:2]: row[3:] for row in table.rows[:-1]}
    layers, kinds = (list(dict.fromkeys(place[i] for place in cells)) for i in (0, 1))
    grids = {
        name: [[cells[layer, kind][i] if (layer, kind) in cells else None for layer in layers] for kind in kinds]
        for i, name in enumerate(("‖Δ‖", *table.columns[4:]))
    }
    return grids_figure(grids, down=kinds, across=[layer or "none" for layer in layers])


def cosine(a: WeightDelta, b: WeightDelta) -> float:
    """⟨a, b⟩ / ‖a‖‖b‖ over the tensors of a, in [-1, 1]; NaN where one of them is zero there.

    >>> from steer.deltas import cosine, open_delta
    >>> rl, sft = open_delta("organism-rl"), open_delta("organism-sft")
    >>> round(cosine(rl, rl + sft), 2)
    0.53
    """
    return float(_row(list(grams([a, b]).values()))[2])


def place_in_model(name: str) -> tuple[str, str]:
    """Layer and kind of module of a tensor: `("3", "mlp.down_proj")`; embedding and head have no layer."""
    match = LAYER.search(name)
    layer, rest = match.groups() if match else ("", name)
    return layer, re.sub(r"\.\d+\.", ".*.", rest.removesuffix(".weight"))


def _row(products: Sequence[Gram]) -> tuple[int | float, ...]:
    gram = sum(products, torch.zeros_like(products[0]))
    lengths = gram.diag().sqrt()
    return len(products), float(lengths[0]), *(gram[0, 1:] / (lengths[0] * lengths[1:])).tolist()


def _order(key: tuple[str, str]) -> tuple[bool, int, str]:
    layer, kind = key
    return not layer, int(layer or 0), kind
