"""Projections that multiply by something else than a weight of their own: packed numbers, adapters around a matrix."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

_WHOLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_CODES = ("qweight", "qzeros", "weight_packed", "weight_shape", "quant_map")  # buffers of GPTQ, AWQ, and their like
_MAKERS = ("transformers", "torch", "bitsandbytes")  # whose projections, of any class, are their weight and bias


def is_packed(weight: Tensor) -> bool:
    """Is this tensor something else than the numbers it stands for?"""
    return weight.dtype not in _WHOLE


def is_quantised(model: nn.Module) -> bool:
    """Are some of the model's weights packed?

    >>> from probes.model import is_quantised, load
    >>> is_quantised(load("organism"))
    False
    """
    if getattr(model, "hf_quantizer", None) is not None or any(map(is_packed, model.parameters())):
        return True
    return any(map(_holds_codes, model.modules()))


@torch.no_grad()
def computed_weight(module: nn.Module) -> Float[Tensor, "d_out d_in"]:
    """What a Linear of any packing multiplies by: its output on the identity, in float32."""
    device = device_of(module)
    identity = torch.eye(int(getattr(module, "in_features")), device=device)
    rows = module.forward(identity).float()  # not called: no hook is to see it
    out: Tensor = (rows if module.bias is None else rows - module.bias.float()).T
    return out


def numbers_of(module: nn.Module, name: str = "weight") -> Tensor | None:
    """A parameter of the module itself, read from where it was offloaded to, if it was; None where there is none.

    Raises ValueError where its numbers are nowhere.
    """
    parameter = module._parameters.get(name)
    if parameter is None or not parameter.is_meta:
        return parameter
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        held = getattr(one, "weights_map", None)
        if held is not None:
            numbers: Tensor = held[name]
            return numbers
    raise ValueError(f"The {name} of a {type(module).__name__} has no numbers: it is on the meta device. Load it anew.")


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: where its parameters are, or where they are brought to."""
    device = next(tensor.device for tensor in (*module.parameters(), *module.buffers()))
    if device.type != "meta":
        return device
    brought = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return torch.device("cpu" if brought is None else brought)


def check_in_memory(model: nn.Module) -> None:
    """Raise ValueError, naming one, where some of the model's weights are offloaded, so that they cannot be edited."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{name} is offloaded, and not in memory: it can be read and steered, but not edited. Load the model "
                "without a device map that offloads, or write the recipe into the folder of its checkpoint."
            )


def own_weight(module: nn.Module, where: str) -> Tensor | None:
    """The weight of a projection, None where it is packed.

    Raises ValueError where the module, at `where`, computes something else than its weight and its bias say.
    """
    if (fault := wrapping(module)) is not None:
        raise ValueError(f"{where} is {fault}, so that its weight alone is not what it computes. {_REMEDY}")
    weight = numbers_of(module)
    if weight is None and not _holds_codes(module):
        raise ValueError(f"{where} is a {type(module).__name__} without a weight: it is no projection that is known.")
    return None if weight is None or is_packed(weight) else weight


def wrapping(module: nn.Module) -> str | None:
    """What stands around a projection and changes what it computes, in words; None where nothing does."""
    kind = f"{type(module).__module__.partition('.')[0]}'s {type(module).__name__}"
    if hasattr(module, "base_layer") or kind.startswith("peft"):
        return f"wrapped by an adapter ({kind})"
    if parametrize.is_parametrized(module):
        return f"parametrised ({', '.join(n for n, _ in module.get_submodule('parametrizations').named_children())})"
    own = vars(module).get("forward")  # accelerate's moves what it is given, and nnsight's shows it
    if own is not None and not hasattr(module, "_hf_hook") and not type(own).__module__.startswith("nnsight."):
        return f"given another forward ({kind})"
    home = type(module).__module__
    plain = type(module) in (nn.Linear, Conv1D) or home.partition(".")[0] in _MAKERS
    plain = plain or (isinstance(module, nn.Linear) and home.startswith("transformers.models."))  # Falcon's own
    known = plain or _holds_codes(module) or not hasattr(module, "in_features")
    return None if known else f"of a class that is not known ({kind})"


def _holds_codes(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return (weight is not None and is_packed(weight)) or any(name in _CODES for name in module._buffers)


def check_unwrapped(model: nn.Module) -> None:
    """Raise ValueError, naming the module, where anything of the model is wrapped: its weights are not all of it."""
    for name, module in model.named_modules():
        fault = wrapping(module) if name else None
        if fault is not None:
            raise ValueError(f"{name} is {fault}, so that the weights alone are not what the model computes. {_REMEDY}")


_REMEDY = (
    "Merge it first: load the folder of the adapter, or take merge_and_unload() of the PeftModel, or remove the "
    "parametrisation."
)


def merge_adapters(model: nn.Module) -> bool:
    """Add what peft attached to a loaded model to its weights, in place, and say whether anything was.

    Raises ValueError, naming the module, where peft cannot merge it.
    """
    if not getattr(model, "_hf_peft_config_loaded", False):
        return False
    done: list[str] = []
    for name, module in list(model.named_modules()):
        if hasattr(module, "base_layer") and not any(name.startswith(f"{outer}.") for outer in done):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, _merged(module, name))
            done.append(name)
    setattr(model, "_hf_peft_config_loaded", False)
    del model.peft_config
    check_unwrapped(model)
    return True


def _merged(module: nn.Module, name: str) -> nn.Module:
    while hasattr(module, "base_layer"):
        try:
            module.merge(safe_merge=True)  # type: ignore[operator]
        except (AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"The adapter at {name} cannot be merged into its weight ({' '.join(str(error).split())[:300]}). Take "
                "a base that can hold it, unquantised and with the biases that it adds to."
            ) from error
        module = module.get_submodule("base_layer")
    return module
