"""The file that lm-eval's `steered` models take: module names, each with its vector."""

import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from probes.directions.vector import number_in
from probes.files import check_keys, reading, staged_file
from probes.model.architectures import architecture_of, multiplier_of, site_of
from probes.model.families import ARCHITECTURES, Architecture
from probes.model.sites import Site
from steer.interop.contents import OURS, added, check_mapping, check_steps, notes, recipe_of, refusal
from steer.interventions.activation import Ablate, Add
from steer.recipes.recipe import Recipe, Step

NAME = "lm-eval"
_WHAT = "torch file of plain tensors"
_BYTES, _WORDS = 1 << 30, 1 << 20  # the most that such a file has: in all, and of what is not a tensor's data
# All that a file of tensors, numbers and words names; what else torch would build, some make huge out of a number.
_GLOBALS = re.compile(r"collections OrderedDict|torch \w+Storage|torch\._utils _rebuild_(tensor_v2|parameter)")
_KEYS = ("steering_vector", "steering_coefficient", "action", "bias", "head_index")


def write(recipe: Recipe, path: Path, *, model: PreTrainedModel | None = None) -> None:
    """One entry for each module: Adds as `add`, summed where a site has several, an Ablate as `clamp` to its target.

    Modules are named from `model.base_model` on, such as `layers.20`; `model` is needed only for a family without a row
    in `probes.model.families`. A torch file by lm-eval's own definition, of tensors, numbers and words alone.
    Raises ValueError for all that the format cannot hold.
    """
    row = _row(recipe, model)
    outputs = tuple(name for name, tap in row.taps.items() if tap.side == "output" and name != "result")
    sites = outputs if row.multiplier is None else ("resid_post",)  # its modules' outputs are scaled later
    check_steps(recipe, NAME, kinds=("add", "ablate"), sites=sites)
    shifts = added([step for step in recipe.steps if isinstance(step.intervention, Add)])
    entries = {_module(row, site): _entry("add", vector, 1.0, recipe) for site, vector in shifts.items()}
    for number, step in enumerate(recipe.steps):
        x = step.intervention
        if isinstance(x, Ablate):
            if (name := _module(row, x.site)) in entries:
                raise refusal(NAME, number, step, f"it has one entry for {name}, and another step is there.")
            entries[name] = _entry("clamp", x.vector.detach().cpu().float(), x.target, recipe)
    with staged_file(path) as stage:
        torch.save(entries, stage)


def read(path: Path, model: PreTrainedModel) -> Recipe:
    """An Add for each `add`, an Ablate with a target for each `clamp`. No code that the file may hold is run.

    Raises ValueError for a file that is not whole or holds more than tensors, numbers and words, for what lm-eval
    itself refuses (a bias with `add`, heads), for a module whose output is no site, and for a vector that does not fit.
    """
    with reading(path, _WHAT):
        _check_archive(path)
        entries = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(entries, dict) or not entries or not all(isinstance(name, str) for name in entries):
        raise ValueError(f"{path} holds no modules by name.")
    noted, steps = None, []
    for name, entry in entries.items():
        where = f"{name} in {path}"
        check_mapping(entry, where)
        noted = entry.get(OURS, noted)
        fields = {"bias": None, "head_index": None, "steering_coefficient": 1.0, **entry}
        fields.pop(OURS, None)
        check_keys(fields, _KEYS, where)
        steps.append(Step(_intervention(fields, _site(model, name, path), where)))
    return recipe_of(model, steps, path, None if noted is None else str(noted), "a steered model of lm-eval")


def _check_archive(path: Path) -> None:
    """Raise ValueError, before anything is built, for a file that unpacks to more than it is, or names a function."""
    if Path(path).stat().st_size > _BYTES:
        raise ValueError(f"{path} has more than {_BYTES:,} bytes, which no steering vectors have.")
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED or part.file_size > _BYTES for part in parts):
            raise ValueError("it is packed, and torch packs nothing")
        for part in parts:
            if part.filename.endswith(".pkl"):
                if part.file_size > _WORDS:
                    raise ValueError(f"its words have {part.file_size:,} bytes")
                _check_words(archive.read(part))


def _check_words(words: bytes) -> None:
    for code, argument, _ in pickletools.genops(words):
        if code.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4") or (
            code.name == "GLOBAL" and not _GLOBALS.fullmatch(str(argument))
        ):
            raise ValueError(f"it names {argument or code.name}, which is no tensor, number or word")


def _row(recipe: Recipe, model: PreTrainedModel | None) -> Architecture:
    if model is not None:
        return architecture_of(model)
    family = recipe.model["model_type"]
    if family not in ARCHITECTURES:
        raise ValueError(f"lm-eval names modules, and those of {family!r} are not known: give the model.")
    return ARCHITECTURES[family]


def _module(row: Architecture, site: Site) -> str:
    base = row.layers.partition(".")[2]  # without base_model_prefix
    return ".".join(part for part in (base, str(site.layer), row.at(site.layer).taps[site.name].path) if part)


def _site(model: PreTrainedModel, name: str, path: Path) -> Site:
    layers = architecture_of(model).layers
    head, _, base = layers.partition(".")
    if not name.startswith(f"{base}."):
        raise ValueError(f"{path} steers {name!r}, and lm-eval names modules of model.base_model, such as {base}.0.")
    site = site_of(model, f"{head}.{name}")
    if _module(architecture_of(model), site) != name:
        raise ValueError(f"{path} steers {name!r}, which is no module of the model.")
    if site.name != "resid_post" and multiplier_of(model) != 1:
        raise ValueError(f"{path} steers {name!r}, whose output this family scales before the stream: it is no site.")
    return site


def _entry(action: str, vector: Tensor, coefficient: float, recipe: Recipe) -> dict[str, Any]:
    values = (vector.contiguous(), float(coefficient), action, None, None)
    return {**dict(zip(_KEYS, values, strict=True)), OURS: notes(recipe)}


def _intervention(fields: dict[str, Any], site: Site, where: str) -> Add | Ablate:
    vector, bias = (_vector(fields[key], f"{key} of {where}") for key in ("steering_vector", "bias"))
    if vector is None or fields["head_index"] is not None:
        raise ValueError(f"{where} needs a steering_vector and no head_index: its module has no heads to index.")
    strength = number_in(fields, "steering_coefficient", where)
    if fields["action"] == "add" and bias is None:
        return Add(site, vector, strength)
    if fields["action"] == "clamp":
        unit = vector / vector.norm()
        if bias is not None and len(bias) != len(unit):
            raise ValueError(f"{where} has a bias of {len(bias)} entries and a vector of {len(unit)}.")
        target = strength if bias is None else strength + float(bias @ unit)
        return Ablate(site, vector, target=target)
    raise ValueError(f"{where} has action {fields['action']!r}. Known: add without a bias, and clamp.")


def _vector(value: Any, where: str) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() != value.shape[-1:].numel():
        raise ValueError(f"{where} is no vector of numbers: {type(value).__name__}.")
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        raise ValueError(f"{where} claims {value.numel():,} numbers, and the file does not hold them.")
    return value.float().flatten()
