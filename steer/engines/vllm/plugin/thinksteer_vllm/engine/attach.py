"""A loaded model takes the operations in: the classes of its layers are swapped, their weights stay.

Every layer gets an operation at every site that some recipe names, whatever the layer: so a compiled graph depends on
the names of sites alone, which the fingerprints in the settings tell apart.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from thinksteer_vllm.engine import op
from thinksteer_vllm.refusal import Refused
from thinksteer_vllm.steering import Steering
from thinksteer_vllm.tables import Place, index_of


@dataclass(frozen=True)
class Family:
    """Where a decoder layer of vLLM keeps the sites. It gives back (hidden, residual), whose sum is the stream."""

    attention: str = "self_attn"
    o_proj: str = "o_proj"
    mlp: str = "mlp"
    mid_norm: str = "post_attention_layernorm"  # is given (hidden, residual) between attention and MLP


# By module and class of the layer. Run in tests: llama, qwen3. The others were read.
FAMILIES: Mapping[str, Family] = {
    "llama.LlamaDecoderLayer": Family(),
    "mistral.MistralDecoderLayer": Family(),
    "qwen2.Qwen2DecoderLayer": Family(),
    "qwen2_moe.Qwen2MoeDecoderLayer": Family(),
    "qwen3.Qwen3DecoderLayer": Family(),
    "qwen3_moe.Qwen3MoeDecoderLayer": Family(),
}
_HOME = "vllm.model_executor.models."


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The decoder layers. Raises Refused, naming the families that are known, where they are not of one."""
    lists = [m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and name.endswith("layers")]
    found = [own for own in lists if len(own) and all(_name(block) in FAMILIES for block in own)]
    if len(found) != 1:
        seen = sorted({_name(block) for own in lists for block in own})
        raise Refused(
            f"The layers of this model are {', '.join(seen) or 'not found'}, and it is not known where they keep the "
            f"stream. Known: {', '.join(FAMILIES)}. Serve one of these, or add a row to FAMILIES and test it."
        )
    return found[0]


def sizes_of(blocks: nn.ModuleList) -> tuple[dict[str, int], int]:
    """Widths of the stream, of z and of a head's z, as the matrices have them; and the number of heads."""
    family, block = FAMILIES[_name(blocks[0])], blocks[0]
    attention: Any = getattr(block, family.attention)
    o_proj: Any = getattr(attention, family.o_proj)
    head = int(attention.head_dim)
    return {"stream": int(o_proj.output_size), "z": int(o_proj.input_size), "head": head}, o_proj.input_size // head


def attach(blocks: nn.ModuleList, steering: Steering) -> None:
    """The operations, in every layer."""
    op.register()
    for layer, block in enumerate(blocks):
        family, sites = FAMILIES[_name(block)], steering.sites
        attention = block.get_submodule(family.attention)
        o_proj = attention.get_submodule(family.o_proj)
        for key, place in steering.places.items():
            if key[:2] == (layer, "result"):
                steering.places[key] = replace(place, matrix=_matrix(o_proj, place))
        if sites & {"z", "result"}:
            _swap(o_proj, _o_proj_class, layer, "z" in sites, "result" in sites)
        if "attn_out" in sites:
            _swap(attention, _output_class, layer, "attn_out")
        if "resid_mid" in sites:
            _swap(block.get_submodule(family.mid_norm), _norm_class, layer)
        if "mlp_out" in sites:
            _swap(block.get_submodule(family.mlp), _output_class, layer, "mlp_out")
        if sites & {"resid_pre", "resid_post"}:
            _swap(block, _block_class, layer, "resid_pre" in sites, "resid_post" in sites)


def _name(block: nn.Module) -> str:
    return f"{type(block).__module__.removeprefix(_HOME)}.{type(block).__name__}"


def _swap(module: nn.Module, make: Callable[..., type[nn.Module]], layer: int, *named: Any) -> None:
    module._thinksteer_layer = layer  # type: ignore[assignment]
    module.__class__ = make(type(module), *named)


@torch.inference_mode()
def _matrix(o_proj: Any, place: Place) -> Tensor:
    """A head's columns of o_proj, [d_head d_model], as the layer computes them, however its weights are packed."""
    assert place.part is not None
    like = next(o_proj.parameters())
    units = torch.zeros(place.part.stop - place.part.start, o_proj.input_size, dtype=like.dtype, device=like.device)
    units[:, place.part] = torch.eye(len(units), dtype=like.dtype, device=like.device)
    return o_proj.quant_method.apply(o_proj, units, None).float().clone()


def _made(cls: type, forward: Callable[..., Any]) -> type:
    return type(f"Steered{cls.__name__}", (cls,), {"forward": forward, "__module__": __name__})


@cache
def _block_class(cls: Any, pre: bool, post: bool) -> type:
    def forward(self: Any, positions: Any, hidden_states: Any, residual: Any, *more: Any, **named: Any) -> Any:
        layer = self._thinksteer_layer
        if pre and residual is None:
            torch.ops.thinksteer.whole(hidden_states, index_of(layer, "resid_pre"))
        elif pre:
            torch.ops.thinksteer.stream(hidden_states, residual, index_of(layer, "resid_pre"))
        hidden, residual = cls.forward(self, positions, hidden_states, residual, *more, **named)
        if post:
            torch.ops.thinksteer.stream(hidden, residual, index_of(layer, "resid_post"))
        return hidden, residual

    return _made(cls, forward)


@cache
def _norm_class(cls: Any) -> type:
    def forward(self: Any, x: Any, residual: Any) -> Any:
        torch.ops.thinksteer.stream(x, residual, index_of(self._thinksteer_layer, "resid_mid"))
        return cls.forward(self, x, residual)

    return _made(cls, forward)


@cache
def _output_class(cls: Any, site: str) -> type:
    def forward(self: Any, *args: Any, **named: Any) -> Any:
        out = cls.forward(self, *args, **named)
        torch.ops.thinksteer.whole(out, index_of(self._thinksteer_layer, site))
        return out

    return _made(cls, forward)


@cache
def _o_proj_class(cls: Any, z: bool, result: bool) -> type:
    def forward(self: Any, input_: Any) -> Any:
        if z:
            torch.ops.thinksteer.whole(input_, index_of(self._thinksteer_layer, "z"))
        out = cls.forward(self, input_)
        if result:
            torch.ops.thinksteer.results(input_, out[0], index_of(self._thinksteer_layer, "result"))
        return out

    return _made(cls, forward)
