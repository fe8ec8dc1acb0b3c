"""A sum of checkpoints in mergekit's words, for the methods that are mergekit's own: TIES, DARE, SLERP."""

from typing import Any

import yaml

from steer.checkpoints.checkpoint import Checkpoint
from steer.deltas.delta import WeightDelta

METHODS = ("linear", "task_arithmetic", "ties", "dare_ties", "dare_linear", "slerp")


def to_mergekit(
    target: Checkpoint,
    delta: WeightDelta,
    *,
    strength: float = 1.0,
    method: str = "linear",
    density: float | None = None,
    dtype: str = "bfloat16",
) -> str:
    """The YAML that `mergekit-yaml` takes.

    `linear` is target + strength · delta, weights not normalised *(Goddard et al. 2024)*. The others merge what
    differs from a base model, which is the target: there the delta may subtract nothing but the target itself. SLERP
    goes from the target to one checkpoint, `strength` of the way.
    Raises ValueError for what mergekit's words cannot say: adapters, stored deltas, a selection of tensors.

    >>> from probes import load
    >>> from probes.model import tokenizer_of
    >>> from steer.checkpoints import Checkpoint
    >>> from steer.deltas import WeightDelta, to_mergekit
    >>> model = load("organism")
    >>> for folder in ("base", "tuned"):
    ...     files = model.save_pretrained(folder), tokenizer_of(model).save_pretrained(folder)
    >>> base = Checkpoint.open("base")
    >>> print(to_mergekit(base, WeightDelta.between("tuned", base), method="ties", density=0.5))
    merge_method: ties
    dtype: bfloat16
    base_model: base
    models:
    - model: tuned
      parameters:
        weight: 1.0
        density: 0.5
    parameters:
      normalize: false
    """
    if method not in METHODS:
        raise ValueError(f"{method!r} is no method known here. Known: {', '.join(METHODS)}.")
    if (density is not None) != (method in ("ties", "dare_ties", "dare_linear")):
        raise ValueError(f"A density belongs to ties, dare_ties and dare_linear; {method} was asked for.")
    weights = _weights(target, delta * strength)
    fields: dict[str, Any] = {"merge_method": method, "dtype": dtype}
    home = str(target.folder)
    if method == "linear":
        fields["models"] = [{"model": name, "parameters": {"weight": weight}} for name, weight in weights.items()]
        fields["parameters"] = {"normalize": False}
    else:
        others = {name: weight for name, weight in weights.items() if name != home}
        if any(weight < 0 for weight in others.values()) or abs(sum(weights.values()) - 1) > 1e-9:
            raise ValueError(
                f"{method} merges differences from one base, and this delta subtracts another checkpoint than the "
                f"target {home}: take `linear`, or merge onto the checkpoint that is subtracted."
            )
        fields["base_model"] = home
        if method == "slerp":
            if len(others) != 1:
                raise ValueError(f"slerp goes to one checkpoint, and the delta adds {len(others)}.")
            fields["models"] = [{"model": name} for name in (home, *others)]
            fields["parameters"] = {"t": strength}
        else:
            more = {} if density is None else {"density": density}
            fields["models"] = [{"model": name, "parameters": {"weight": w, **more}} for name, w in others.items()]
            fields["parameters"] = {"normalize": False}
    return yaml.safe_dump(fields, sort_keys=False)


def _weights(target: Checkpoint, delta: WeightDelta) -> dict[str, float]:
    """The weight of each checkpoint in target + delta, by its folder; the target is first."""
    weights = {str(target.folder): 1.0}
    for term in delta.terms:
        if not isinstance(term.source, Checkpoint) or not term.whole:
            raise ValueError(
                "mergekit sums whole checkpoints: this delta has an adapter, stored tensors or a selection. Link the "
                "delta instead of storing it, or write the sum with `steer vector add`."
            )
        folder = str(term.source.folder)
        weights[folder] = weights.get(folder, 0.0) + term.weight
    return weights
