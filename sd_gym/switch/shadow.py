"""Standing in the place of a method of one object, without touching its class."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sd_gym.switch.context import Scope


class Shadow:
    """Called in the place of a method of one object: asks for the decision in force, if there is any anywhere.

    Args:
        target: The object.
        name: The method.
        scope: The board's decisions.
        run: ``run(decision, method, *args, **kwargs)``, called in the method's place while a decision is in force
            anywhere; with ``None`` where none is in force here.
    """

    def __init__(self, target: Any, name: str, scope: Scope, run: Callable[..., Any]) -> None:
        self.target = target
        self.name = name
        self.run = run
        self.scope = scope
        self.replaced: Callable[..., Any] | None = vars(target).get(name)  # by another tool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The method, or what runs in its place."""
        if self.scope.open.any:
            return self.run(self.scope.current(), self.method, *args, **kwargs)
        return self.method(*args, **kwargs)

    @property
    def method(self) -> Callable[..., Any]:
        """What it stands in the place of; looked up anew, so that copies of the object have their own."""
        return self.replaced or partial(getattr(type(self.target), self.name), self.target)

    @property
    def is_in_place(self) -> bool:
        """Whether it still is what is called."""
        return vars(self.target).get(self.name) is self

    def put(self) -> None:
        """Stand in the method's place."""
        vars(self.target)[self.name] = self

    def take_away(self) -> None:
        """Give the place back, unless another tool has put itself in front since."""
        if not self.is_in_place:
            return
        if self.replaced is None:
            del vars(self.target)[self.name]
        else:
            vars(self.target)[self.name] = self.replaced
