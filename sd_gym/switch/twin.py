"""Twins of modules: copies that share all weights, and whose parts can be replaced without changing the original."""

import copy
from typing import Any, TypeVar

from torch import nn

from sd_gym.switch.context import MethodPatch

Module = TypeVar("Module", bound=nn.Module)


def twin_of(module: Module) -> Module:
    """A copy of a module with the same submodules and weights, but without switches.

    Raises:
        NotImplementedError: If another tool has replaced its ``forward`` or ``generate``.
    """
    twin = copy.copy(module)
    own = vars(twin)
    # The dictionaries of weights are shared: a weight that is replaced in the module is replaced in the twin.
    own |= {name: value.copy() for name, value in own.items() if name == "_modules" or name.endswith("_hooks")}
    for name in ("_switchboard", "_attached", "decisions") if "_attached" in own else ("_switchboard",):
        own.pop(name, None)
    for name in ("forward", "generate", "_expand_inputs_for_generation"):
        method = own.pop(name, None)
        while isinstance(method, MethodPatch):
            method = method.replaced
        if method is not None and not getattr(method, "is_attached", False):
            raise NotImplementedError(
                f"another tool has replaced {name}() of a {type(module).__name__}, so a copy cannot share its weights; "
                "remove that tool's patch"
            )
    return twin


def twin_at(twin: nn.Module, path: str) -> Any:
    """The submodule of a twin at a path; it and all modules on the path become twins."""
    for name in path.split(".") if path else ():
        part = twin._modules[name]
        assert part is not None  # paths name modules
        twin._modules[name] = twin = twin_of(part)
    return twin
