"""Twins of modules: copies that share all weights, and whose parts can be replaced with nobody seeing it."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

from sd_gym.switch.context import MethodPatch

Module = TypeVar("Module", bound=nn.Module)


def twin_of(module: Module) -> Module:
    """A copy of a module that has the same parts and the same weights, but no switches.

    Raises:
        NotImplementedError: If another tool has replaced its ``forward`` or ``generate``, bound to the module itself.
    """
    twin = copy.copy(module)
    own = vars(twin)
    # The dictionaries of weights stay those of the module: a weight that is replaced there is replaced here.
    own |= {name: value.copy() for name, value in own.items() if name == "_modules" or name.endswith("_hooks")}
    for name in ("_switchboard", "_attached", "decisions") if "_attached" in own else ("_switchboard",):
        own.pop(name, None)
    for name in ("forward", "generate", "_expand_inputs_for_generation"):
        method = own.pop(name, None)
        while isinstance(method, MethodPatch):
            method = method.replaced
        if method is not None and not getattr(method, "is_attached", False):
            raise NotImplementedError(
                f"another tool has replaced {name}() of a {type(module).__name__}, so no copy of it can share its "
                "weights; remove what that tool has put there"
            )
    return twin


def twin_at(twin: nn.Module, path: str) -> Any:
    """The part of a twin at a path, which is then a twin itself, as are all on the way."""
    for name in path.split(".") if path else ():
        part = twin._modules[name]
        assert part is not None  # a path leads to modules
        twin._modules[name] = twin = twin_of(part)
    return twin
