"""Which module is a part of which in a model, to find out later where another one is in its place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn


class ModuleSnapshot(NamedTuple):
    """All modules on the ways from a model to some of its modules."""

    paths: tuple[str, ...]  # paths of the modules in the model
    holders: tuple[dict[str, nn.Module | None], ...]  # the parts of each one's parent, by name
    names: tuple[str, ...]  # each one's name there
    children: list[nn.Module]

    @classmethod
    def of(cls, model: nn.Module, ways: Iterable[str]) -> ModuleSnapshot:
        """The modules on the ways to those with these paths in the model."""
        links: dict[str, tuple[dict[str, nn.Module | None], str, nn.Module]] = {}
        for way in sorted(ways):
            parent, steps = model, way.split(".")
            for depth, name in enumerate(steps):
                child = parent.get_submodule(name)
                links[".".join(steps[: depth + 1])] = (parent._modules, name, child)
                parent = child
        holders, names, children = zip(*links.values(), strict=True)
        return cls(tuple(links), holders, names, list(children))

    def replaced(self) -> list[str]:
        """Paths at which another module is now.

        Asked for every decision, so it is quick in the usual case, where nothing was replaced.
        """
        modules = list(map(dict.get, self.holders, self.names))
        if modules == self.children:
            return []
        return [path for path, now, child in zip(self.paths, modules, self.children, strict=True) if now is not child]
