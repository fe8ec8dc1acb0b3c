"""A steering request of EasySteer (Xu et al. 2025) as JSON, its vectors within."""

import base64
import binascii
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.directions.vector import number_in
from probes.files import check_keys, staged_file
from probes.model.sites import Site
from probes.texts import read_json
from steer.interop.contents import check_mapping, check_steps, recipe_of, refusal
from steer.interop.gguf_vectors import directions_in
from steer.interventions.activation import Ablate, Add, Intervention, Rotate
from steer.recipes.recipe import Recipe, Step
from steer.recipes.scope import Scope

NAME = "easysteer"
_SELECTORS = ("tokens", "positions", "window")
_APPLY = ("prompt", "generation") + tuple(
    f"{exclude}{phase}_{what}"
    for exclude in ("", "exclude_")
    for phase in ("prompt", "generation")
    for what in _SELECTORS
)
_DEFAULTS: dict[str, Any] = {"scale": 1.0, "layers": None, "normalize": False, "params": {}, "name": None}


def write(recipe: Recipe, path: Path) -> None:
    """One vector for each step, applied in order: Add and Rotate (`direct`, of which Rotate keeps the norm), and Ablate
    (`erase`).

    The scopes are all, and all at some token ids. What EasySteer calls prompt and generation part where the first token
    is generated, which is none of our phases. It has no room for the model's identity. Raises ValueError for all that
    the format cannot hold.
    """
    check_steps(
        recipe,
        NAME,
        kinds=("add", "rotate", "ablate"),
        scope=lambda scope: scope == Scope(tokens=scope.tokens),
        scopes="all, or all at token ids,",
    )
    vectors = [_vector(number, step) for number, step in enumerate(recipe.steps)]
    vectors[0]["name"] = recipe.method or None
    with staged_file(path) as stage:
        stage.write_text(
            json.dumps({"vectors": vectors, "conflict": "sequential", "debug": False}, indent=1), encoding="utf-8"
        )


def read(path: Path, model: PreTrainedModel) -> Recipe:
    """A step for each layer of each vector. A `source` is read where it is a GGUF file beside the request.

    Raises ValueError for what we have no word for: another algorithm, a part of the prompt or of the generation, two
    vectors in one layer of which only the first counts; and for a payload that is damaged or does not fit.
    """
    whole = read_json(path)
    check_mapping(whole, str(path))
    check_keys({"conflict": "priority", "debug": False, **whole}, ("vectors", "conflict", "debug"), str(path))
    if not isinstance(whole["vectors"], list) or not whole["vectors"]:
        raise ValueError(f"{path} holds no list of vectors.")
    groups = [_steps(fields, f"Vector {i} in {path}", path.parent) for i, fields in enumerate(whole["vectors"])]
    layers = [step.intervention.site.layer for steps in groups for step in steps]
    conflict = whole.get("conflict", "priority")
    if len(set(layers)) < len(layers) and conflict != "sequential":
        twice = next(layer for layer in layers if layers.count(layer) > 1)
        raise ValueError(
            f"{path} steers layer {twice} with several vectors under the conflict rule {conflict!r}, and steps of a "
            "recipe add up, as under 'sequential'."
        )
    steps = [step for each in groups for step in each]
    return recipe_of(model, steps, path, None, str(whole["vectors"][0].get("name") or "a request of EasySteer"))


def _vector(number: int, step: Step) -> dict[str, Any]:
    x = step.intervention
    assert x.vector is not None
    vector = x.vector.detach().cpu().float()
    if isinstance(x, Ablate):
        if x.target != 0:
            raise refusal(NAME, number, step, f"it erases a projection, and cannot set it to {x.target:g}.")
        vector = vector / vector.norm()  # erase adds 1e-8 to the squared norm
    tokens = list(step.scope.tokens) or None
    every = "all" if tokens is None else None
    apply = {"prompt": every, "generation": every, "prompt_tokens": tokens, "generation_tokens": tokens}
    return {
        "data": _payload(x.site.layer, vector),
        "algorithm": "erase" if isinstance(x, Ablate) else "direct",
        "scale": x.strength,
        "layers": [x.site.layer],
        "normalize": isinstance(x, Rotate),
        "apply": {key: value for key, value in apply.items() if value is not None},
        "params": {},
        "name": None,
    }


def _payload(layer: int, vector: Float[Tensor, " d_model"]) -> dict[str, Any]:
    data = base64.b64encode(vector.contiguous().numpy().astype("<f4").tobytes()).decode()
    wire: dict[str, Any] = {
        "version": 1,
        "kind": "direction",
        "tensors": {f"layer.{layer}": {"shape": [len(vector)], "data": data}},
        "extra": {},
    }
    return {**wire, "sha256": _digest({f"layer.{layer}": vector})}


def _digest(tensors: dict[str, Tensor]) -> str:
    """The checksum of a `direction` payload, as its readers compute it."""
    digest = hashlib.sha256(b"direction:1")
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + str(tuple(tensor.shape)).encode())
        digest.update(tensor.numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def _steps(fields: Any, where: str, folder: Path) -> list[Step]:
    check_mapping(fields, where)
    if ("data" in fields) == ("source" in fields):
        raise ValueError(f"{where} needs either data or a source.")
    origin = "data" if "data" in fields else "source"
    check_keys({**_DEFAULTS, "algorithm": "direct", **fields}, (*_DEFAULTS, "algorithm", "apply", origin), where)
    fields = {**_DEFAULTS, "algorithm": "direct", **fields}
    if fields["params"]:
        raise ValueError(f"{where} has params, and the algorithms that we read have none.")
    scope = _scope(fields["apply"], where)
    directions = _beside(fields["source"], where, folder) if origin == "source" else _payload_in(fields["data"], where)
    wanted = list(directions) if fields["layers"] is None else fields["layers"]
    if not isinstance(wanted, list):
        raise ValueError(f"{where} has layers {wanted!r}, which are no list.")
    steps = [Step(_intervention(fields, k, v, where), scope) for k, v in sorted(directions.items()) if k in wanted]
    if not steps:
        raise ValueError(f"{where} steers the layers {fields['layers']}, and its vectors are for {list(directions)}.")
    return steps


def _intervention(fields: dict[str, Any], layer: int, vector: Tensor, where: str) -> Intervention:
    site, scale = Site(layer, "resid_post"), number_in(fields, "scale", where)
    match fields["algorithm"], fields["normalize"]:
        case "direct", False:
            return Add(site, vector, scale)
        case "direct", True:
            return Rotate(site, vector, scale)
        case "erase", False if scale != 0:
            return Ablate(site, vector)  # whatever the scale
    raise ValueError(
        f"{where} has algorithm {fields['algorithm']!r}, normalize {fields['normalize']!r} and scale {scale:g}. "
        "A recipe holds direct with either, and erase without normalize."
    )


def _scope(apply: Any, where: str) -> Scope:
    check_mapping(apply, f"apply in {where}")
    check_keys({**dict.fromkeys(_APPLY), **apply}, _APPLY, f"apply in {where}")
    given = {key: value for key, value in apply.items() if value is not None}
    if given == {"prompt": "all", "generation": "all"}:
        return Scope()
    ids = given.get("prompt_tokens")
    alike = given == {"prompt_tokens": ids, "generation_tokens": ids}
    if alike and isinstance(ids, list) and ids and all(type(i) is int and i >= 0 for i in ids):
        return Scope(tokens=tuple(ids))
    raise ValueError(
        f"{where} applies at {given}, which no scope of ours is: they know all tokens, and all at the same token ids "
        "in prompt and generation."
    )


def _payload_in(wire: Any, where: str) -> dict[int, Tensor]:
    """The vectors of a payload by layer. Raises ValueError where it is damaged."""
    check_mapping(wire, f"data in {where}")
    check_keys(wire, ("version", "kind", "tensors", "extra", "sha256"), f"data in {where}")
    if wire["version"] != 1 or wire["kind"] != "direction" or wire["extra"] != {}:
        raise ValueError(
            f"{where} has a payload of kind {wire['kind']!r}, version {wire['version']!r}: read: direction, 1."
        )
    check_mapping(wire["tensors"], f"The tensors of {where}")
    tensors = {name: _tensor(entry, f"{name} in {where}") for name, entry in wire["tensors"].items()}
    if _digest(tensors) != wire["sha256"]:
        raise ValueError(f"{where} does not match its sha256: it is damaged. Make it again.")
    layers = {name: name.removeprefix("layer.") for name in tensors}
    if unknown := [name for name, layer in layers.items() if not layer.isdecimal() or name != f"layer.{int(layer)}"]:
        raise ValueError(f"{where} has unknown keys: {', '.join(unknown)}. Known: layer.<number>.")
    return {int(layers[name]): tensor for name, tensor in tensors.items()}


def _tensor(entry: Any, where: str) -> Float[Tensor, " d_model"]:
    check_mapping(entry, where)
    check_keys(entry, ("shape", "data"), where)
    try:
        data = base64.b64decode(entry["data"], validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError(f"{where} is not base64: {error}.") from error
    if entry["shape"] != [len(data) / 4]:
        raise ValueError(f"{where} holds {len(data)} bytes, which are no float32 of shape {entry['shape']}.")
    return torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32))


def _beside(source: Any, where: str, folder: Path) -> dict[int, Tensor]:
    if not isinstance(source, str) or Path(source).name != source or not source.endswith(".gguf"):
        raise ValueError(f"{where} has source {source!r}: we read a GGUF file beside the request, by its bare name.")
    return directions_in(folder / source)[0]
