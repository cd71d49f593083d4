"""Standing in the place of a method of one object, without touching its class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sd_gym.switch.context import Scope


class MethodPatch:
    """Called in the place of a method of one object, while any decision is in force that needs it.

    Args:
        target: The object.
        name: The method.
        scope: The board's decisions.
        run: ``run(decision, method, *args, **kwargs)``, called in the method's place with the decision in force here.

    Attributes:
        replaced: What another tool had put in the method's place before.
        is_put: Whether it stands in the method's place.
        is_lost: Whether another tool put itself in front meanwhile; then it is in the scope's ``lost``.
    """

    def __init__(self, target: Any, name: str, scope: Scope, run: Callable[..., Any]) -> None:
        self.target, self.name, self.scope, self.run = target, name, scope, run
        self.replaced: Callable[..., Any] | None = None
        self.is_put = self.is_lost = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What runs in the method's place."""
        return self.run(self.scope.current(), self.method, *args, **kwargs)

    def method(self, *args: Any, **kwargs: Any) -> Any:
        """What it stands in the place of; looked up anew, so that copies of the object have their own."""
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        return getattr(type(self.target), self.name)(self.target, *args, **kwargs)

    def put(self) -> None:
        """Stand in the method's place, if it does not yet."""
        if not self.is_put and not self.is_lost:
            place = vars(self.target)
            self.replaced = place.get(self.name)
            place[self.name] = self
            self.is_put = True

    def take_away(self) -> None:
        """Give the place back, if it was taken."""
        if not self.is_put:
            return
        self.is_put = False
        if vars(self.target).get(self.name) is not self:
            self.is_lost = True
            self.scope.lost.append(self)
        elif self.replaced is None:
            del vars(self.target)[self.name]
        else:
            vars(self.target)[self.name] = self.replaced
