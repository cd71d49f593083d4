"""Where a decision is in force: in the thread, task or generator whose block set it, and nowhere else.

Decisions are kept in a context variable, so threads and asyncio tasks have their own. A generator shares the context of
the code that resumes it: a block that is open in a generator would be in force in its caller between two ``yield``.
Therefore such a block is in force only while its generator runs, wherever that is resumed.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from threading import RLock, get_ident, local
from types import FrameType
from typing import Any, cast
from weakref import ref

import torch

from sd_gym.switch.decision import Decision, replays

# Functions that may be between a ``with`` statement and the block that it enters.
_ENTERING = {"__enter__", "__aenter__", "enter_context", "enter_async_context"}
_SUSPENDED = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_LOCK = RLock()  # reentrant and shared by all boards: garbage collection may end an entry while another one begins


class StaleBoardError(RuntimeError):
    """The switchboard does not match the model any more; the message says what to do."""


class MethodPatch:
    """Replaces the method ``name`` of one object while some decision in force needs that.

    It calls ``run(decision, method, *args, **kwargs)`` with the decision in force.
    """

    def __init__(self, target: Any, name: str, scope: Scope, run: Callable[..., Any]) -> None:
        self.target = target
        self.name = name
        self.scope = scope
        self.run = run
        self.replaced: Callable[..., Any] | None = None  # another tool's patch that this one replaces
        self.is_installed = False
        self.is_lost = False  # whether another tool has replaced it

    def __getstate__(self) -> dict[str, Any]:
        """Without what it replaced before: that may be of a policy, which cannot be pickled, and is not needed."""
        return vars(self) | {"replaced": self.replaced if self.is_installed else None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Called instead of the method."""
        return self.run(self.scope.current(), self.method, *args, **kwargs)

    def method(self, *args: Any, **kwargs: Any) -> Any:
        """The original method; looked up for each call, so that copies of the object use their own."""
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        return getattr(type(self.target), self.name)(self.target, *args, **kwargs)

    def install(self) -> None:
        """Replace the method, unless that is done already."""
        if not self.is_installed and not self.is_lost:
            attributes = vars(self.target)
            self.replaced = attributes.get(self.name)
            attributes[self.name] = self
            self.is_installed = True

    def uninstall(self) -> None:
        """Put the method back, if it is replaced."""
        if not self.is_installed:
            return
        self.is_installed = False
        if vars(self.target).get(self.name) is not self:
            self.is_lost = True
        elif self.replaced is None:
            del vars(self.target)[self.name]
        else:
            vars(self.target)[self.name] = self.replaced


class _Family:
    """The scopes of a board and its copies; it installs the patches that any decision in force needs."""

    def __init__(self) -> None:
        self._scopes: list[ref[Scope]] = []  # no WeakSet, which takes longer to iterate than patches to install
        self.needs: dict[int, set[int]] = {}  # indices of the patches that an entry needs, by its id

    def join(self, scope: Scope) -> None:
        """Let the family install a scope's patches."""
        with _LOCK:
            self._scopes = [known for known in self._scopes if known() is not None] + [ref(scope)]

    def leave(self, scope: Scope) -> None:
        """Undo ``join``."""
        with _LOCK:
            self._scopes = [known for known in self._scopes if known() is not scope]

    def begin(self, entry: _Entry, needs: tuple[int, ...]) -> None:
        """Install the patches that an entry needs; at a later stage it may need more."""
        with _LOCK:
            # Before installing, so that an entry that ends meanwhile removes none of them.
            self.needs.setdefault(id(entry), set()).update(needs)
            for patches in self._patches():
                for index in needs:
                    patches[index].install()

    def end(self, entry: _Entry) -> None:
        """Remove the patches that no other entry needs."""
        with _LOCK:
            unneeded = self.needs.pop(id(entry), set()).difference(*self.needs.values())
            for patches in self._patches():
                for index in unneeded:
                    patches[index].uninstall()

    def _patches(self) -> list[Sequence[MethodPatch]]:
        return [scope.patches for known in self._scopes if (scope := known()) is not None]


class _Entry:
    """A decision that was put in force; it exists as long as any context holds it."""

    def __init__(
        self, scope: Scope, decision: Decision | None, generator: FrameType | None, outer: _Entry | None
    ) -> None:
        self.scope = scope
        self.decision = decision
        self.generator = generator  # frame of the generator that the block is open in
        self.is_of_generator = generator is not None  # stays true after the block has ended
        self.origin = _origin()  # thread and task in which it was put in force
        self.outer = outer  # the entry that was in force there
        self.ended = False  # whether another thread or task ended it, which cannot remove it from this context
        if decision is not None:
            scope.family.begin(self, decision.needs)

    def __del__(self) -> None:
        self.scope.family.end(self)

    def is_within(self, other: _Entry) -> bool:
        """Whether it was put in force while ``other`` was in force."""
        entry: _Entry | None = self
        while entry is not None and entry is not other:
            entry = entry.outer
        return entry is other


class _Compiled(local):
    """The decision in force in this thread, for compiled code, which cannot read a context variable."""

    is_certain: bool = False  # whether no task or generator of the thread can have another decision
    decision: Decision | None = None


# Of all boards, the innermost last.
_ENTRIES: ContextVar[tuple[_Entry, ...]] = ContextVar("decisions in force", default=())


class Scope:
    """The decisions of one board, by context."""

    def __init__(self, original: Scope | None = None) -> None:
        self.patches: Sequence[MethodPatch] = []  # patches of the model's methods
        self.original = original  # the scope that this one is a copy of (copy.deepcopy)
        self.is_copy = original is not None  # or unpickled
        self.family = _Family() if original is None else original.family
        self.in_generators: list[_Entry] = []
        self._compiled = _Compiled()

    def fill(self, patches: Sequence[MethodPatch]) -> None:
        """Set the patches."""
        self.patches = patches
        self.family.join(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Scope:
        memo[id(self)] = scope = Scope(original=self)
        scope.fill(copy.deepcopy(self.patches, memo))
        return scope

    def __getstate__(self) -> list[MethodPatch]:
        return [*self.patches]  # decisions stay in their process

    def __setstate__(self, patches: list[MethodPatch]) -> None:
        self.__init__()
        self.is_copy = True
        self.fill(patches)

    def current(self) -> Decision | None:
        """The decision in force here; ``None``: everything runs.

        Raises:
            StaleBoardError: If a decision is in force on the model that this board's model was copied from.
        """
        if torch.compiler.is_dynamo_compiling():
            return self._compiled.decision if self._compiled.is_certain else _current_uncompiled(self)
        entries = _ENTRIES.get()
        if entries and not self.in_generators:  # nearly always: the last block is this board's, and no generator's
            entry = entries[-1]
            if entry.scope is self and not entry.ended and not entry.is_of_generator:
                return entry.decision
        return self._current()

    def _current(self) -> Decision | None:
        entry = self.entry()
        if entry is not None:
            return entry.decision
        if self.original is not None and self.original.current() is not None:
            raise StaleBoardError(
                "this model is a copy of the model that the decision in force is for (quantisation also copies); make "
                "a Switchboard of the copy and decide with that, or run the copy outside of the block"
            )
        return None

    def entry(self) -> _Entry | None:
        """The innermost block that is open here, even if everything runs in it."""
        entry = self._of_context()
        if self.in_generators:
            running = self._of_running_generator()
            if running is not None and (entry is None or not entry.is_within(running)):
                return running
        return entry

    def settle(self, decision: Decision | None) -> None:
        """Replace the decision in force by ``decision``, which the next stage made."""
        entry = self.entry()
        assert entry is not None  # a stage is reached only inside of the block that decides
        entry.decision = decision
        if decision is not None:
            self.family.begin(entry, decision.needs)
        self.note(entry)

    def note(self, entry: _Entry | None) -> None:
        """Note the decision in force in this thread, for compiled code."""
        compiled = self._compiled
        compiled.is_certain = entry is not None and entry.generator is None and _origin() == (get_ident(), None)
        compiled.decision = entry.decision if entry is not None and compiled.is_certain else None

    def _of_context(self) -> _Entry | None:
        # A generator's own entry counts only in other threads and tasks, to which its context was passed.
        entries = [
            entry
            for entry in reversed(_ENTRIES.get())
            if entry.scope is self and not entry.ended and (entry.generator is None or entry.origin != _origin())
        ]
        if not entries:
            return None
        innermost = entries[0]
        if innermost.is_of_generator and any(
            other.is_of_generator and not innermost.is_within(other) for other in entries
        ):
            raise RuntimeError(
                "blocks of several generators were open in the context that was passed to this thread or task, so the "
                "decision is ambiguous; call decide() in the thread or task itself"
            )
        return innermost

    def _of_running_generator(self) -> _Entry | None:
        """The entry of the innermost generator that is running here."""
        entries = {entry.generator: entry for entry in tuple(self.in_generators)}
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame in entries:
                return entries[frame]
            frame = frame.f_back
        return None


_current_uncompiled = cast("Callable[[Scope], Decision | None]", torch.compiler.disable(Scope._current))


class Block:
    """A ``with`` block in which a decision is in force."""

    def __init__(self, scope: Scope, decision: Decision | None) -> None:
        self._scope = scope
        self._decision = decision
        self._entry: _Entry | None = None

    def __enter__(self) -> None:
        if self._entry is not None:
            raise RuntimeError("this block is already open; call decide() again for another one")
        scope = self._scope
        decision = self._decision
        frame = sys._getframe(1)
        if decision is not None and not torch.is_inference_mode_enabled():
            decision.replays = replays(frame)
        self._entry = entry = _Entry(scope, decision, _generator(frame), scope.entry())
        if entry.generator is not None:
            scope.in_generators.append(entry)
        _ENTRIES.set((*_ENTRIES.get(), entry))
        scope.note(entry)

    def __exit__(self, *_: object) -> None:
        """End the block, in any order and context; copies of the context keep the entry."""
        entry, self._entry = self._entry, None
        if entry is None:
            return
        entries = _ENTRIES.get()
        entry.ended = entry not in entries or entry.origin != _origin()
        _ENTRIES.set(tuple(other for other in entries if other is not entry))
        if entry.generator is not None:
            self._scope.in_generators.remove(entry)
            entry.generator = None
        self._scope.note(self._scope.entry())


def _origin() -> tuple[int, int | None]:
    """The running thread and asyncio task."""
    has_loop = asyncio._get_running_loop() is not None  # otherwise current_task() raises, which is slow
    return get_ident(), id(asyncio.current_task()) if has_loop else None


def _generator(frame: FrameType) -> FrameType | None:
    """The frame of the generator whose code runs in ``frame``; frames of ``contextlib`` are skipped."""
    while frame.f_back is not None and (
        frame.f_code.co_name in _ENTERING
        or (frame.f_code.co_flags & _SUSPENDED and frame.f_back.f_code.co_name in _ENTERING)
    ):
        frame = frame.f_back
    return frame if frame.f_code.co_flags & _SUSPENDED else None
