"""What a recipe does inside a trace of nnsight: plain tensors, and functions of torch alone. They come with the trace,
so that a server can run them that knows nothing of ThinkSteer."""

from typing import Any

import torch

_TINY = torch.finfo(torch.float32).tiny


class TraceEdits:
    """Called with a model of nnsight inside of its trace. `actions` are in the order in which their modules run.

    >>> from steer.interop import TraceEdits
    >>> TraceEdits([]).actions
    []
    """

    def __init__(self, actions: list[dict[str, Any]]) -> None:
        self.actions = actions

    def __call__(self, model: Any) -> None:
        kept: dict[int, Any] = {}
        for action in self.actions:
            envoy = model.get(action["path"]) if action["path"] else model
            read = action["side"] == "input"
            value = envoy.input if read else envoy.output
            x = value[0] if isinstance(value, tuple) else value
            if "keep" in action:
                kept[action["keep"]] = x
                continue
            new = _edited(x, action, kept)
            if read:
                envoy.input = new
            else:
                envoy.output = (new, *value[1:]) if isinstance(value, tuple) else new


def _edited(x: Any, action: dict[str, Any], kept: dict[int, Any]) -> Any:
    head, heads, matrix, scale = (action.get(name) for name in ("head", "heads", "matrix", "scale"))
    if "behind" in action:  # of what is added to a stream, so that the sum is as the steps want it
        before = kept[action["behind"]]
        mid = before + x
        new = _changed(mid, action["steps"])
        return torch.where(new == mid, x, new - before)
    if matrix is not None:  # what a head writes
        z = kept[action["of"]].unflatten(-1, (heads, -1))[..., head, :]
        write = z.float() @ matrix.to(x.device)
        return x + (_changed(write, action["steps"]) - write).to(x.dtype)
    if head is not None:
        split = x.unflatten(-1, (heads, -1)).clone()
        split[..., head, :] = _changed(split[..., head, :], action["steps"])
        return split.flatten(-2)
    if scale is not None:
        return _changed(x * scale, action["steps"]) / scale
    return _changed(x, action["steps"])


def _changed(x: Any, steps: list[dict[str, Any]]) -> Any:
    for step in steps:
        weight, numbers = step["weight"].to(x.device)[..., None], step["numbers"]
        vector = None if step["vector"] is None else step["vector"].to(x.device)
        if step["kind"] == "add":
            x = torch.addcmul(x, weight.to(x.dtype), (numbers["strength"] * vector).to(x.dtype))
            continue
        new, wide = _form(x, step["kind"], vector, numbers), x.float()
        between = (wide + weight * (new.float() - wide)).to(x.dtype)
        x = torch.where(weight == 0, x, torch.where(weight == 1, new, between))
    return x


def _form(x: Any, kind: str, vector: Any, numbers: dict[str, float]) -> Any:
    """As `steer.interventions` has it: float32 inside, the model's dtype at the door."""
    wide, strength = x.float(), numbers["strength"]
    if kind == "scale":
        return x * strength
    if kind == "rotate":
        new = wide + strength * vector
        return (new * (wide.norm(dim=-1, keepdim=True) / new.norm(dim=-1, keepdim=True).clamp(min=_TINY))).to(x.dtype)
    unit = vector / vector.norm()
    projection = (wide @ unit)[..., None]
    wanted = numbers["target"] if kind == "ablate" else projection.clamp(numbers["low"], numbers["high"])
    return (wide + strength * (wanted - projection) * unit).to(x.dtype)
