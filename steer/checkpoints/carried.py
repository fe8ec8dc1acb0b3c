"""What a source checkpoint holds and transformers never loads, such as layers that predict several tokens at once.

An export made of the model in memory alone would lose it, while the config goes on to promise it.
"""

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file
from transformers import PreTrainedModel

from probes.model.loading import origin_of
from probes.texts import read_json
from steer.checkpoints.checkpoint import Checkpoint, weight_map
from steer.checkpoints.proof import Meant, prove_tensors

_PROMISES = ("num_nextn_predict_layers", "num_mtp_layers")  # what a config calls how many of these layers there are
_COMPUTED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")  # what old checkpoints keep of what is computed
_SHARD = 2 << 30


def carry_over(model: PreTrainedModel, folder: Path) -> tuple[str, ...]:
    """Copy into `folder`, bit for bit, the tensors of the model's source that transformers ignores; gives their names.

    Where they cannot be copied, as out of a quantised source, they are named in a warning, and the config in `folder`
    promises them no more.
    """
    source, names = _ignored(model)
    if not names:
        return ()
    if source is None:
        config = read_json(folder / "config.json", finite=False)
        promised = {key: 0 for key in _PROMISES if config.get(key)}
        (folder / "config.json").write_text(json.dumps(config | promised, indent=2) + "\n", encoding="utf-8")
        warnings.warn(
            f"{len(names)} tensors of {origin_of(model).name!r}, such as {min(names)}, are not in the export: "
            "transformers does not load them, and they are quantised there."
            + (f" Its config now says {', '.join(promised)} = 0." if promised else ""),
            stacklevel=4,
        )
        return ()
    _append(folder, source, names)
    return names


def _ignored(model: PreTrainedModel) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """The source, None where its numbers cannot be copied, and the names in it that the model's class ignores."""
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    if not patterns or getattr(model, "_thinksteer", None) is None:  # a model made here has no source
        return None, ()
    origin = origin_of(model)
    try:
        source: Checkpoint | None = Checkpoint.open(origin.name, revision=origin.revision, download=False)
        held: Sequence[str] = list(source.places) if source is not None else ()
    except FileNotFoundError:
        return None, ()
    except (ValueError, OSError):
        source, held = None, _named(origin.name)
    ours = model.state_dict().keys()
    return source, tuple(
        name
        for name in held
        if name not in ours and not name.endswith(_COMPUTED) and any(pattern.search(name) for pattern in patterns)
    )


def _named(folder: str) -> list[str]:
    """The names in the index of a folder's shards, where it has one."""
    index = Path(folder) / "model.safetensors.index.json"
    return list(weight_map(index)) if index.is_file() else []


def _append(folder: Path, source: Checkpoint, names: Sequence[str]) -> None:
    """Further shards beside those of the folder, and an index of them all; then they are read back and compared."""
    written = Checkpoint.open(folder)
    parts: list[list[str]] = [[]]
    size = 0
    for name in names:
        size += source.places[name][1].bytes
        if parts[-1] and size > _SHARD:
            parts.append([])
            size = source.places[name][1].bytes
        parts[-1].append(name)
    files = [shard.path for shard in written.shards]
    total = len(files) + len(parts)
    named: dict[str, str] = {}
    for number, (path, shard) in enumerate(zip(files, written.shards, strict=True), start=1):
        final = path.with_name(f"model-{number:05}-of-{total:05}.safetensors")
        named |= dict.fromkeys((place.name for place in shard.places), final.name)
        path.rename(final)
    for number, part in enumerate(parts, start=len(files) + 1):
        final = folder / f"model-{number:05}-of-{total:05}.safetensors"
        save_file({name: source.read(name) for name in part}, final, metadata={"format": "pt"})
        named |= dict.fromkeys(part, final.name)
    size = sum(path.stat().st_size for path in folder.glob("model-*.safetensors"))
    words = {"metadata": {"total_size": size}, "weight_map": dict(sorted(named.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(words, indent=2) + "\n", encoding="utf-8")
    prove_tensors(folder, {name: Meant.of(source.read(name)) for name in names})
