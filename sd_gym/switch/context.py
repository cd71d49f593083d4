"""Where a decision counts: in the thread, the task or the generator whose block put it in force, and nowhere else.

Decisions are kept in a context variable, so that threads and asyncio tasks have their own. Generators share the context
of whoever resumes them: a block that is open in one would count in its caller's code between two ``yield``. So such a
block counts only while its generator runs, wherever it is resumed.
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

from sd_gym.switch.decision import Decision, InForce, replays

# What stands between a ``with`` statement and the block that it enters.
_ENTERING = {"__enter__", "__aenter__", "enter_context", "enter_async_context"}
_SUSPENDED = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_LOCK = RLock()  # one for all boards: an entry may end in a garbage collection, in the middle of another's beginning


class StaleBoardError(RuntimeError):
    """The switchboard does not belong to the model as it is now; the message says what to do."""


class MethodPatch:
    """Called in the place of the method ``name`` of one object, while any decision is in force that needs it.

    What runs then is ``run(decision, method, *args, **kwargs)``, with the decision in force here.
    """

    def __init__(self, target: Any, name: str, scope: Scope, run: Callable[..., Any]) -> None:
        self.target, self.name, self.scope, self.run = target, name, scope, run
        self.replaced: Callable[..., Any] | None = None  # what another tool had put in the method's place before
        self.is_put = False  # whether it stands in the method's place
        self.is_lost = False  # whether another tool put itself in front meanwhile; then it is in the scope's ``lost``

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


class _Family:
    """A board's decisions and those of its copies: puts the patches in place that any decision in force needs."""

    def __init__(self) -> None:
        self._scopes: list[ref[Scope]] = []  # that live; a WeakSet takes longer to go through than the patches to put
        self._needs: dict[int, tuple[int, ...]] = {}  # numbers of the patches that an entry needs, by its id

    @property
    def is_open(self) -> bool:
        """Whether any decision is in force anywhere."""
        return bool(self._needs)

    def join(self, scope: Scope) -> None:
        """Have the patches of a board follow the decisions of the family."""
        with _LOCK:
            self._scopes = [known for known in self._scopes if known() is not None] + [ref(scope)]

    def leave(self, scope: Scope) -> None:
        """Have them no longer follow."""
        with _LOCK:
            self._scopes = [known for known in self._scopes if known() is not scope]

    def begin(self, entry: _Entry, needs: tuple[int, ...]) -> None:
        """A decision is in force that needs these patches, and those that it needed before it grew."""
        with _LOCK:
            before = self._needs.get(id(entry), ())
            # First, so that an entry that ends meanwhile takes none of them away.
            self._needs[id(entry)] = tuple({*before, *needs}) if before else needs
            for patches in self._patches():
                for number in needs:
                    patches[number].put()

    def end(self, entry: _Entry) -> None:
        """It is no longer in force, if ever it was."""
        with _LOCK:
            needs = self._needs.pop(id(entry), ())
            others = set().union(*list(self._needs.values())) if self._needs else ()
            for patches in self._patches():
                for number in needs:
                    if number not in others:
                        patches[number].take_away()

    def _patches(self) -> list[Sequence[MethodPatch]]:
        return [scope.patches for known in self._scopes if (scope := known()) is not None]


class _Entry:
    """A decision that was put in force, for as long as any context holds it."""

    def __init__(self, scope: Scope, decision: InForce, generator: FrameType | None, inside: _Entry | None) -> None:
        self.scope = scope
        self.decision = decision
        self.generator = generator  # the frame of the one that the block is open in
        self.streams = generator is not None  # whether it is or was open in one
        self.home = _here()  # the thread and the task in which it was put in force
        self.inside = inside  # what was in force there
        self.ended = False  # elsewhere than at home, where it could not be taken out of the context
        if decision is not None:
            scope.family.begin(self, decision.needs)

    def __del__(self) -> None:
        self.scope.family.end(self)

    def is_within(self, other: _Entry) -> bool:
        """Whether it was put in force while ``other`` was."""
        entry: _Entry | None = self
        while entry is not None and entry is not other:
            entry = entry.inside
        return entry is other


class _Known(local):
    """What compiled code takes for the decision in force in its thread, as it cannot ask a context variable."""

    sure: bool = False  # whether the thread has no tasks and generators that could have another one
    decision: InForce = None


# Of all boards, inner ones last.
_ENTRIES: ContextVar[tuple[_Entry, ...]] = ContextVar("decisions in force", default=())


class Scope:
    """The decisions of one board, by context."""

    def __init__(self, original: Scope | None = None) -> None:
        self.patches: Sequence[MethodPatch] = []  # for the model's methods, while a decision needs them
        self.lost: list[MethodPatch] = []  # those of them whose place another tool has taken
        self.original = original  # what this one is a copy of (copy.deepcopy)
        self.family = _Family() if original is None else original.family  # all that is in force here or in a copy
        self._in_generators: list[_Entry] = []
        self._known = _Known()

    def fill(self, patches: Sequence[MethodPatch]) -> None:
        """Have these patches put in place where a decision needs them."""
        self.patches = patches
        self.family.join(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Scope:
        memo[id(self)] = scope = Scope(original=self)
        patches, scope.lost = copy.deepcopy((self.patches, self.lost), memo)
        scope.fill(patches)
        return scope

    def __getstate__(self) -> tuple[Sequence[MethodPatch], list[MethodPatch]]:
        return self.patches, self.lost  # decisions stay in their process

    def __setstate__(self, state: tuple[Sequence[MethodPatch], list[MethodPatch]]) -> None:
        self.__init__()
        patches, self.lost = state
        self.fill(patches)

    def current(self) -> InForce:
        """The decision in force here; ``None``: everything runs.

        Raises:
            StaleBoardError: If a decision on the model that this one was copied from is.
        """
        if torch.compiler.is_dynamo_compiling():
            return self._known.decision if self._known.sure else _ask_uncompiled(self)
        entries = _ENTRIES.get()
        if entries and not self._in_generators:  # nearly always: the last block is this board's, and no generator's
            entry = entries[-1]
            if entry.scope is self and not entry.ended and not entry.streams:
                return entry.decision
        return self._ask()

    def _ask(self) -> InForce:
        entry = self._entry()
        if entry is not None:
            return entry.decision
        if self.original is not None and self.original.current() is not None:
            raise StaleBoardError(
                "this model is a copy of the one that the decision in force is for (quantisation copies, too); make a "
                "Switchboard of the copy and decide with that, or run the copy outside of the block"
            )
        return None

    @property
    def is_decided(self) -> bool:
        """Whether a block is open here, including one in which everything runs."""
        return self._entry() is not None

    def put(self, decision: InForce) -> Block:
        """A block in which a decision is in force."""
        return Block(self, decision)

    def enter(self, decision: InForce, frame: FrameType) -> _Entry:
        """Put a decision in force, for the code that runs in ``frame``."""
        if isinstance(decision, Decision) and not torch.is_inference_mode_enabled():
            decision.replays = replays(frame)
        entry = _Entry(self, decision, _generator(frame), self._entry())
        if entry.generator is not None:
            self._in_generators.append(entry)
        _ENTRIES.set((*_ENTRIES.get(), entry))
        self._note(entry)
        return entry

    def settle(self, decision: Decision | None) -> None:
        """Put what was decided at a stage in the place of the decision in force, which it has grown from."""
        entry = self._entry()
        assert entry is not None  # a stage is reached only inside of the block that decides
        entry.decision = decision
        if decision is not None:
            self.family.begin(entry, decision.needs)
        self._note(entry)

    def leave(self, entry: _Entry) -> None:
        """End what ``enter`` began, in whatever order and context; copies of the context keep it."""
        entries = _ENTRIES.get()
        entry.ended = entry not in entries or entry.home != _here()
        _ENTRIES.set(tuple(other for other in entries if other is not entry))
        if entry.generator is not None:
            self._in_generators.remove(entry)
            entry.generator = None
        self._note(self._entry())

    def _note(self, entry: _Entry | None) -> None:
        """Note for compiled code what is in force in this thread."""
        known = self._known
        if entry is not None and entry.generator is None and _here() == (get_ident(), None):
            known.sure, known.decision = True, entry.decision
        else:
            known.sure, known.decision = False, None

    def _entry(self) -> _Entry | None:
        entry = self._of_context()
        if self._in_generators:
            running = self._of_running_generator()
            if running is not None and (entry is None or not entry.is_within(running)):
                return running
        return entry

    def _of_context(self) -> _Entry | None:
        innermost = None
        for entry in reversed(_ENTRIES.get()):
            # A generator's own counts elsewhere only: in threads and tasks that were given its context.
            suspended = entry.generator is not None and entry.home == _here()
            if entry.scope is not self or entry.ended or suspended:
                continue
            if innermost is None and not entry.streams:
                return entry
            if innermost is None:
                innermost = entry
            elif entry.streams and not innermost.is_within(entry):
                raise RuntimeError(
                    "blocks of several generators were open in the context that this thread or task was given, so "
                    "that it cannot be told which decision is meant; call decide() in the thread or task itself"
                )
        return innermost

    def _of_running_generator(self) -> _Entry | None:
        """The entry of the innermost generator that is running here."""
        entries = {entry.generator: entry for entry in tuple(self._in_generators)}
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame in entries:
                return entries[frame]
            frame = frame.f_back
        return None


_ask_uncompiled = cast("Callable[[Scope], InForce]", torch.compiler.disable(Scope._ask))


class Block:
    """A ``with`` block in which a decision is in force."""

    def __init__(self, scope: Scope, decision: InForce) -> None:
        self._scope, self._decision = scope, decision
        self._entry: _Entry | None = None

    def __enter__(self) -> None:
        if self._entry is not None:
            raise RuntimeError("this block is entered already; call decide() again for another one")
        self._entry = self._scope.enter(self._decision, sys._getframe(1))

    def __exit__(self, *_: object) -> None:
        entry, self._entry = self._entry, None
        if entry is not None:
            self._scope.leave(entry)


def _here() -> tuple[int, int | None]:
    """The running thread and task."""
    runs = asyncio._get_running_loop() is not None  # current_task() would raise, which is slow
    return get_ident(), id(asyncio.current_task()) if runs else None


def _generator(frame: FrameType) -> FrameType | None:
    """The generator whose code runs in ``frame``; skips ``contextlib``'s frames and its generators."""
    while frame.f_back is not None and (
        frame.f_code.co_name in _ENTERING
        or (frame.f_code.co_flags & _SUSPENDED and frame.f_back.f_code.co_name in _ENTERING)
    ):
        frame = frame.f_back
    return frame if frame.f_code.co_flags & _SUSPENDED else None
