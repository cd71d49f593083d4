"""Which modules are on which path of a model, to find out later which of them were replaced."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


class ModuleSnapshot:
    """All modules on some paths of a model, those on the way included."""

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        self._modules: dict[str, tuple[dict[str, nn.Module | None], str, nn.Module]] = {}
        for path in sorted(paths):
            parent, names = model, path.split(".")
            for depth, name in enumerate(names, start=1):
                child = parent.get_submodule(name)
                self._modules[".".join(names[:depth])] = (parent._modules, name, child)
                parent = child

    def replaced(self) -> list[str]:
        """Paths of modules that were replaced."""
        return [path for path, (siblings, name, child) in self._modules.items() if siblings.get(name) is not child]
