"""Work shared with other processes, or a Ray cluster, whose machines see the same folders under the same paths."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import parent_process
from multiprocessing.connection import wait
from typing import Any
from uuid import uuid4

from sd_gym.errors import MissingExtraError, quiet
from sd_gym.registration import import_own

RETRIES = 3  # retries of a task whose process or machine has died


def connect(address: str) -> Any:
    """The module ``ray``, connected to the cluster at ``address``: ``auto``, ``local``, or as ``ray.init`` takes it.

    Raises:
        MissingExtraError: If Ray is not installed.
        ConnectionError: If there is no cluster at the address.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]  (an extra)
    except ModuleNotFoundError as error:
        raise MissingExtraError("a Ray cluster needs Ray, which is not installed: pip install 'sd-gym[ray]'") from error
    ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    return ray


def cores(ray: Any) -> int:
    """Cores of the cluster, at least one."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def submit(ray: Any, function: Callable[..., Any], *arguments: Any, imports: Sequence[str] = (), gpus: int = 0) -> Any:
    """Call a function on one core of the cluster; returns a reference to the outcome.

    It is called again where its process or machine dies, so it must be safe to repeat.
    """
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_call)
    return task.remote(function, arguments, list(imports), os.getcwd())


def in_any_order(
    ray: Any, function: Callable[..., Any], calls: Iterable[tuple[Any, ...]], imports: Sequence[str] = ()
) -> Iterator[Any]:
    """The outcomes of many calls, each as soon as it is there."""
    waiting = [submit(ray, function, *call, imports=imports) for call in calls]
    while waiting:
        (ended,), waiting = ray.wait(waiting, num_returns=1)
        yield ray.get(ended)


def in_order(
    ray: Any,
    make: Callable[[], Callable[[Any], Any]],
    inputs: Iterable[Any],
    imports: Sequence[str] = (),
    *,
    on_gpu: bool = False,
) -> Iterator[tuple[Any, Any]]:
    """Each input with its outcome, in input order; two inputs per core are read ahead.

    Each process of the cluster calls ``make`` once, to get the function that it applies to inputs.

    Raises:
        ValueError: If it is to run on GPUs and the cluster has none: tasks would wait forever.
    """
    if on_gpu and not ray.cluster_resources().get("GPU"):
        raise ValueError("the Ray cluster has no GPU; leave out --device, or add a machine with GPUs")
    key, ahead = uuid4().hex, 2 * cores(ray)
    pending: deque[tuple[Any, Any]] = deque()
    for value in inputs:
        pending.append((value, submit(ray, _apply, key, make, value, imports=imports, gpus=int(on_gpu))))
        if len(pending) == ahead:
            value, outcome = pending.popleft()
            yield value, ray.get(outcome)
    for value, outcome in pending:
        yield value, ray.get(outcome)


_made: dict[str, Callable[[Any], Any]] = {}  # functions made in this process, by the key of their ``in_order``


def _apply(key: str, make: Callable[[], Callable[[Any], Any]], value: Any) -> Any:
    if key not in _made:
        _made.clear()
        _made[key] = make()
    return _made[key](value)


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], imports: list[str], folder: str) -> Any:
    prepare_process(folder, imports)
    return function(*arguments)


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Processes that are started in here ignore Ctrl-C, which reaches all processes: their parent ends them."""
    if threading.current_thread() is not threading.main_thread():  # where no signal can be set
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which processes inherit
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def prepare_worker(imports: list[str], open_until: Any = None) -> None:  # the platform decides on its class
    """Prepare a process that was started by ``multiprocessing``: it ends with its parent.

    It also ends as soon as the other end of the connection ``open_until`` is closed, whatever it is doing.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it may have been started by another thread than the main one
    threading.Thread(target=_end_with_parent, args=(open_until,), daemon=True).start()
    prepare_process(os.getcwd(), imports)


def _end_with_parent(open_until: Any) -> None:
    """End this process with its parent or the connection; else it would go on, and keep its locks."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel] if open_until is None else [parent.sentinel, open_until])
    os._exit(1)


def prepare_process(folder: str, imports: list[str]) -> None:
    """Prepare a process: the folder that relative paths start from, one thread, and the user's modules."""
    import torch

    os.chdir(folder)
    quiet()
    torch.set_num_threads(1)  # threads of several processes that wait for each other are many times slower
    for name in imports:
        import_own(name)
