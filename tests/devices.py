"""Devices that this machine does not have: what Python sees of them; the values stay on the CPU."""

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CPU, MPS, ONE, OTHER = (torch.device(name) for name in ("cpu", "mps", "xpu:0", "xpu:1"))


def _place(tensor):
    return vars(tensor).get("place", CPU)


class Devices(TorchFunctionMode):
    """Inside, tensors are where they were moved or placed; devices do not mix, and only the CPU has float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function == Tensor.device.__get__:
            return _place(args[0])
        leaves = tree_leaves((args, kwargs or {}))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        places = {_place(tensor) for tensor in tensors if tensor.ndim} or {_place(tensor) for tensor in tensors[:1]}
        asked = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
        if function is Tensor.to and len(tensors) == 2:
            asked = [_place(tensors[1])]
        if len(places) > 1 and not asked:
            raise RuntimeError(f"{function.__name__}: expected tensors on one device, got {places}")
        where = CPU if function is Tensor.cpu else [*asked, *places, CPU][0]
        real = tree_map(lambda leaf: CPU if isinstance(leaf, torch.device) else leaf, (args, kwargs or {}))
        output = function(*real[0], **real[1])
        if any(output is tensor and _place(tensor) != where for tensor in tensors):
            output = output.view_as(output)
        for made in tree_leaves(output):
            if isinstance(made, Tensor):
                if where != CPU and made.dtype == torch.float64:
                    raise TypeError(f"{function.__name__}: {where} has no float64")
                vars(made)["place"] = where
        return output


def place(model: nn.Module, device: torch.device) -> None:
    """Place all weights on a device."""
    for tensor in (*model.parameters(), *model.buffers()):
        vars(tensor)["place"] = device


def spread(model: nn.Module, paths: list[str]) -> None:
    """Place the modules at these paths on another device than the rest, with the hooks of a ``device_map``."""
    place(model, ONE)
    for path in paths:
        place(model.get_submodule(path), OTHER)
    for path, module in model.named_modules():
        if not path or not any(inner.startswith(path + ".") for inner in paths):
            hook = AlignDevicesHook(io_same_device=not path)
            add_hook_to_module(module, hook)
            hook.execution_device = OTHER if any(f"{path}.".startswith(inner + ".") for inner in paths) else ONE
