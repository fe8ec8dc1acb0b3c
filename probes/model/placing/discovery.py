"""Where the sites of a family without a row are: told by what the modules of a block read and put out.

One short pass is watched. The stream between attention and MLP is what some module reads, and the block puts out its
sum with another one's output; what attention adds is the output by which that stream and the block's input differ. No
name of a family is known here, so a new one needs no code if its blocks are sums. What is found is held to the
identities, like any row.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.model.architectures import config_of
from probes.model.families import ARCHITECTURES, Architecture, Tap
from probes.model.placing.identities import broken_identity, missing
from probes.model.placing.sums import add_up, carries, close
from probes.model.placing.watching import NotFound, Seen, alike, decoder_of, is_norm, list_of_blocks, same, watched
from probes.model.quantised import numbers_of
from probes.model.sites import SiteName

# Names that children of a block have: attention, its queries, and what only an MLP holds.
_MIXERS = {"self_attn", "attn", "attention", "self_attention", "temporal_block", "mixer", "multi_head_attention"}
_QUERIES = {"q_proj", "q_a_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "query", "q_b_proj", "Wq"}
_MLP = {"up_proj", "experts", "fc1", "dense_h_to_4h", "c_fc"}
_MULTIPLIER = "residual_multiplier"

Taps = dict[SiteName, Tap]
Outs = Mapping[str, Tensor]


def place(model: PreTrainedModel) -> None:
    """Give the model a row where its family's own does not fit: by another class of it, or for a family without one.

    A text decoder inside a wrapper (vision, audio) is found where `get_decoder` says; the row of a family without one
    is found by a short forward pass. Either is taken only if its identities hold on another. Raises ValueError, naming
    what broke, where none holds: a wrong place is never read in silence.
    """
    family = config_of(model).model_type
    own = ARCHITECTURES.get(family)
    if own is not None and not missing(model, own.layers) and not missing(model, own.final_norm):
        setattr(model, "_thinksteer_row", own)
        return
    try:
        row = found_row(model) if own is None else _inside(own, decoder_of(model))
    except NotFound as error:
        fault: str | None = str(error)
    else:
        setattr(model, "_thinksteer_row", row)
        fault = broken_identity(model)
        if fault is None:
            return
        del model._thinksteer_row
    if own is not None:
        raise ValueError(f"A {type(model).__name__} is no model that the row of {family!r} fits: {fault}.")
    raise ValueError(
        f"No architecture row for model_type {family!r}, and none is found that holds: {fault}. Add a row to "
        "probes/model/families.py; the tests then check it."
    )


@torch.no_grad()
def found_row(model: PreTrainedModel) -> Architecture:
    """The row that a short pass shows. Raises NotFound."""
    layers = list_of_blocks(model)
    blocks = list(model.get_submodule(layers).children())
    seen, norm = watched(model, layers, blocks)
    rows = [_row(model, block, one, layer) for layer, (block, one) in enumerate(zip(blocks, seen, strict=True))]
    centred = bool(norm) and _takes_mean_out(model.get_submodule(norm), seen[-1].put[""])
    rows = [replace(row, layers=layers, final_norm=norm, centred=centred) for row in rows]
    first = next((row for row in rows if row.o_proj), rows[0])
    return first if all(row == first for row in rows) else replace(first, blocks=tuple(rows))


def _inside(row: Architecture, decoder: str | None) -> Architecture:
    """The row, its decoder under another name."""
    if decoder is None:
        return row
    layers, norm = (path.partition(".")[2] for path in (row.layers, row.final_norm))
    return replace(row, layers=f"{decoder}.{layers}", final_norm=f"{decoder}.{norm}")


def _row(model: PreTrainedModel, block: nn.Module, seen: Seen, layer: int) -> Architecture:
    """The row of one block. Raises NotFound where nothing in it adds up to what it puts out."""
    pre, post = seen.read[""], seen.put[""]
    if not alike(post, pre):
        raise NotFound(f"block {layer} reads {list(pre.shape)} and puts out {list(post.shape)}")
    value = getattr(config_of(model), _MULTIPLIER, 1.0)
    factors = {None: 1.0} if value in (None, 1) else {_MULTIPLIER: float(value), None: 1.0}
    if any(same(x, post) and path and is_norm(block.get_submodule(path)) for path, x in seen.put.items()):
        raise NotFound(f"a norm stands on the stream itself at the end of block {layer}")
    outs = _outputs(seen)
    scaled = {key: {path: x * factor for path, x in outs.items()} for key, factor in factors.items()}
    for find in (_sequential, _alone, _parallel, _normed, _partly):
        for key, added in scaled.items():
            taps = find(block, seen, added)
            if taps is not None:
                row = Architecture(
                    taps={"resid_pre": Tap("", "input"), "resid_post": Tap("", "output"), **taps},
                    o_proj=None,
                    multiplier=key,
                    parallel="always" if find is _parallel else None,
                    normed=find is _normed,
                )
                return _with_care(block, seen, _with_heads(block, seen, _with_mlp(block, seen, row)))
    raise NotFound(f"the modules of block {layer} do not add up to what it puts out")


def _outputs(seen: Seen) -> dict[str, Tensor]:
    """What may be added to the stream: each value once, by the outermost module that puts it out."""
    outs: dict[str, Tensor] = {}
    for path in seen.read:
        x = seen.put.get(path)
        if path and alike(x, seen.read[""]) and not any(same(x, other) for other in outs.values()):
            outs[path] = x
    return outs


def _between(seen: Seen) -> Iterator[tuple[str, Tensor]]:
    """Who may read the stream between attention and MLP, and what is read."""
    for path, x in seen.read.items():
        if path and alike(x, seen.read[""]) and not (same(x, seen.read[""]) or same(x, seen.put[""])):
            yield path, x


def _sequential(_block: nn.Module, seen: Seen, outs: Outs) -> Taps | None:
    pre, post = seen.read[""], seen.put[""]
    for reader, mid in _between(seen):
        first = next((path for path, x in outs.items() if add_up(mid, [pre, x])), None)
        second = first and next((path for path, x in outs.items() if add_up(post, [mid, x])), None)
        if first and second:
            return _three(reader, first, second)
    return None


def _parallel(_block: nn.Module, seen: Seen, outs: Outs) -> Taps | None:
    pre, post = seen.read[""], seen.put[""]
    for one, other in combinations(outs, 2):
        if not other.startswith(f"{one}.") and add_up(post, [pre, outs[one], outs[other]]):
            mixer, mlp = (other, one) if _is_mixer(other) and not _is_mixer(one) else (one, other)
            return {"attn_out": Tap(mixer, "output"), "mlp_out": Tap(mlp, "output")}
    return None


def _alone(block: nn.Module, seen: Seen, outs: Outs) -> Taps | None:
    """A block of one mixer, or of one MLP."""
    pre, post = seen.read[""], seen.put[""]
    found = next((path for path, x in outs.items() if add_up(post, [pre, x])), None)
    if found is None:
        return None
    heavy = {path.partition(".")[0] for path, parameter in block.named_parameters() if parameter.dim() > 1}
    if heavy != {found.partition(".")[0]}:
        return None
    inner = {name for path in seen.read if path.startswith(f"{found}.") for name in path.split(".")}
    return {"mlp_out" if inner & _MLP and not inner & {*_QUERIES, "conv1d"} else "attn_out": Tap(found, "output")}


def _normed(_block: nn.Module, seen: Seen, outs: Outs) -> Taps | None:
    """The norms' outputs are what goes on, times a number of the model's (MiniMax)."""
    pre, post = seen.read[""], seen.put[""]
    bases = [path for path, x in seen.read.items() if path and same(x, pre) and path in outs]
    for reader, mid in _between(seen):
        for base in bases:
            first = next((path for path, x in outs.items() if _is_mixer(path) and carries(mid, outs[base], x)), None)
            last = outs.get(reader)
            if first is None or last is None:
                continue
            second = next((path for path, x in outs.items() if carries(post, last, x)), None)
            if second:
                return _three(reader, first, second)
    return None


def _partly(_block: nn.Module, seen: Seen, outs: Outs) -> Taps | None:
    """The stream between where only one of its two summands is a module's output: two mixers write beside each other
    (Falcon-H1), two MLPs do (Granite 4), or the block goes on after its MLP (Gemma 4)."""
    pre, post = seen.read[""], seen.put[""]
    for reader, mid in _between(seen):
        first = next((path for path, x in outs.items() if add_up(mid, [pre, x])), None)
        if first:
            return {"resid_mid": Tap(reader, "input"), "attn_out": Tap(first, "output")}
    for reader, mid in _between(seen):
        second = next((path for path, x in outs.items() if add_up(post, [mid, x])), None)
        if second:
            return {"resid_mid": Tap(reader, "input"), "mlp_out": Tap(second, "output")}
    return None


def _three(reader: str, first: str, second: str) -> Taps:
    return {"resid_mid": Tap(reader, "input"), "attn_out": Tap(first, "output"), "mlp_out": Tap(second, "output")}


def _with_mlp(block: nn.Module, seen: Seen, row: Architecture) -> Architecture:
    """The row and what its MLP reads, and the one matrix that writes `mlp_out`, where it is one."""
    taps, writers, norm = dict(row.taps), tuple[str, ...](), None
    reader = taps.get("resid_mid")
    if "mlp_out" in taps:
        source = _source(block, seen, taps["mlp_out"].path)
        norm = taps["mlp_out"].path if source != taps["mlp_out"].path else None
        mlp = source if not _is_linear(block, source) else source.rpartition(".")[0]
        if mlp and alike(seen.read.get(mlp), seen.read[""]):
            taps["mlp_in"] = Tap(mlp, "input")
        writers = tuple(path for path in _linears(block, source) if same(seen.put.get(path), seen.put[source]))[:1]
    if "mlp_in" not in taps and reader is not None and is_norm(block.get_submodule(reader.path)):
        taps["mlp_in"] = Tap(reader.path, "output")
    turned = tuple(path for path in writers if hasattr(block.get_submodule(path), "nf"))
    return replace(row, taps=taps, mlp_writers=writers, mlp_norm=norm, input_first=turned)


def _with_heads(block: nn.Module, seen: Seen, row: Architecture) -> Architecture:
    """The row and what its mixer reads, and where its heads are, if it has any."""
    taps, norm, o_proj, turned = dict(row.taps), None, None, row.input_first
    if "attn_out" in taps:
        source = _source(block, seen, taps["attn_out"].path)
        norm = taps["attn_out"].path if source != taps["attn_out"].path else None
        mixer = next((path for path in _upward(source) if _is_mixer(path)), source)
    elif "resid_mid" in taps:
        mixer = source = next((name for name, _ in block.named_children() if _is_mixer(name)), "")
    else:
        return row
    if alike(seen.read.get(mixer), seen.read[""]):
        taps["attn_in"] = Tap(mixer, "input")
    inner = {name.rpartition(".")[2] for name in seen.read if name.startswith(f"{mixer}.")}
    if _is_mixer(mixer) and inner & _QUERIES:
        wanted = seen.put.get(source)
        o_proj = next((path for path in _linears(block, mixer) if same(seen.put.get(path), wanted)), None)
    if o_proj is not None:
        taps |= {"z": Tap(o_proj, "input"), "result": Tap(o_proj, "output")}
        turned += (o_proj,) if hasattr(block.get_submodule(o_proj), "nf") else ()
    return replace(row, taps=taps, o_proj=o_proj, attn_norm=norm, input_first=turned)


def _with_care(block: nn.Module, seen: Seen, row: Architecture) -> Architecture:
    """The row, told which of its places are overwritten later, and what its norm's gain is counted from; without
    heads where something else than such a norm is between them and the stream."""
    changed = seen.overwritten()
    sites = frozenset(name for name, tap in row.taps.items() if tap.path and (tap.side, tap.path) in changed)
    row = replace(row, overwritten=sites)
    if row.attn_norm is None or row.o_proj is None:
        return row
    norm, x = block.get_submodule(row.attn_norm), seen.read[row.attn_norm].float()
    weight = numbers_of(norm)
    even = x * x.pow(2).mean(-1, keepdim=True).rsqrt()
    for offset in (0.0, 1.0):
        if weight is not None and close(even * (weight.float() + offset), seen.put[row.attn_norm].float()):
            return replace(row, gain_offset=offset)
    return replace(row, o_proj=None, taps={name: tap for name, tap in row.taps.items() if name not in ("z", "result")})


def _is_mixer(path: str) -> bool:
    return any(part in _MIXERS for part in path.split("."))


def _upward(path: str) -> Iterator[str]:
    """The path, and those around it, from the outermost on."""
    parts = path.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


def _source(block: nn.Module, seen: Seen, path: str) -> str:
    """The module that made what this one puts out, before norms and convolutions that stand between."""
    parts = block.get_submodule(path).modules()
    if not all(isinstance(p, nn.Conv1d) or all(x.dim() < 2 for x in p.parameters(recurse=False)) for p in parts):
        return path
    read = seen.read.get(path)
    before = next((one for one in seen.read if one not in ("", path) and same(seen.put.get(one), read)), None)
    return path if before is None else _source(block, seen, before)


def _is_linear(block: nn.Module, path: str) -> bool:
    module = block.get_submodule(path)
    return hasattr(module, "in_features") or hasattr(module, "nf")


def _linears(block: nn.Module, path: str) -> list[str]:
    inside = [name for name, _ in block.named_modules() if name == path or name.startswith(f"{path}.")]
    return [name for name in inside if _is_linear(block, name)]


def _takes_mean_out(norm: nn.Module, x: Tensor) -> bool:
    """Is the norm's output the same where a constant is added to all that it reads?"""
    return close(norm(x + 1), norm(x))
