"""Registries of named things: built-in ones, imported on demand, and those that a user registers."""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Generic, TypeVar

Thing = TypeVar("Thing")


class UnknownNameError(ValueError):
    """An unregistered name; the message suggests the nearest registered name."""


class Registry(Generic[Thing]):
    """Named things of one kind.

    Only registered names are known, so a name in a file cannot make the program import or call anything else. ``kind``
    is the kind of thing, in the singular. A built-in ``"module:attribute"`` is imported on demand.
    """

    def __init__(self, kind: str, built_in: Mapping[str, Thing | str]) -> None:
        self.kind = kind
        self._built_in = dict(built_in)
        self._own: dict[str, Thing] = {}

    def register(self, name: str, thing: Thing) -> None:
        """Register or replace a user's thing; raises ``ValueError`` if the name is empty, built in or no string."""
        if not isinstance(name, str) or not name:
            raise ValueError(f"the {self.kind} needs a name of its own, a text that is not empty; got {name!r}")
        if name in self._built_in:
            raise ValueError(f"the {self.kind} needs a name of its own; {name!r} is taken")
        self._own[name] = thing

    def built_in(self) -> list[str]:
        """The built-in names."""
        return list(self._built_in)

    def names(self) -> list[str]:
        """All names, built-in ones first."""
        return [*self._built_in, *self._own]

    def __contains__(self, name: str) -> bool:
        return name in self._own or name in self._built_in

    def find(self, name: str) -> Thing:
        """What is registered under a name; raises ``UnknownNameError`` if there is no such name."""
        if name in self._own:
            return self._own[name]
        if name not in self._built_in:
            raise UnknownNameError(unknown(self.kind, name, self.names()))
        thing = self._built_in[name]
        if isinstance(thing, str):
            module, _, attribute = thing.partition(":")
            return getattr(import_module(module), attribute)
        return thing


def check_function(what: str, thing: object) -> None:
    """Raise ``TypeError`` if a thing to be registered cannot be called."""
    if not callable(thing):
        raise TypeError(f"{what} must be a function, got {thing!r}")


def unknown(kind: str, name: str, known: list[str]) -> str:
    """The message for an unregistered name."""
    return (
        f"unknown {kind} {name!r}{nearest(name, known)} Known {kind}s: {', '.join(known) or 'none'}. To use your own, "
        "first import the module that registers it (on the command line: --import MODULE_OR_FILE)."
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: a suggestion of the nearest known one, or a full stop."""
    known = sorted(known, key=len)
    near = [one for one in known if name and one.startswith(name)] or difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else "."


@contextmanager
def naming_imports(run: Path) -> Iterator[None]:
    """If a name in a run is unknown, add the run's ``--import`` options to the error; this imports nothing."""
    try:
        yield
    except ValueError as error:
        unknown_name = UnknownNameError in (type(error), type(error.__cause__))
        if not unknown_name or not (imports := _imports_of(run)):
            raise
        options = " ".join(f"--import {name}" for name in imports)
        raise type(error)(f"{error} {run} was made with {options}; pass that again.") from error


def _imports_of(run: Path) -> list[str]:
    """The imports in ``config.json``; empty if it is missing or damaged."""
    try:
        return list(json.loads((run / "config.json").read_text(encoding="utf-8"))["imports"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
