"""Many runs trained in one process or several: each is kept, gone on with, or reported."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sd_gym.agents.experiment.comparison_plan import PlannedRun
from sd_gym.agents.learning.agent import NotApplicableError

from sd_gym.errors import one_line, quiet
from sd_gym.registry import import_own


class RunStatus(NamedTuple):
    """What is told of a run.

    Attributes:
        run: The run.
        state: ``begun``, ``learning`` or ``searching`` while it goes on; ``kept`` (it was finished before),
            ``finished``, ``not applicable`` or ``failed`` in the end.
        steps: Decisions so far.
        message: Why it failed, or does not apply.
    """

    run: PlannedRun
    state: str
    steps: int = 0
    message: str = ""


OnStatus = Callable[[RunStatus], None]
GOING = ("begun", "learning", "searching")


def train_many(
    runs: Sequence[PlannedRun],
    *,
    jobs: int = 1,
    ray: str | None = None,
    imports: Sequence[str] = (),
    on_status: OnStatus = lambda word: None,
) -> list[RunStatus]:
    """Train those of the runs that are not finished; what was cut off goes on.

    Nothing that happens to one run stops the others. A run does not depend on what was trained before it; with ``jobs``
    each has one thread, which changes the last bits of sums.

    Args:
        runs: Each after those that it begins with.
        jobs: Processes, of one thread each; 1: all are trained in this one. A script that asks for
            more has to be guarded by ``if __name__ == "__main__":``, and what it registers be in ``imports``.
        ray: Address of a Ray cluster that trains them, one thread a run: ``auto``, ``local`` (one is started here), or
            as ``ray.init`` takes it. It has sd_gym installed, and sees the runs' folders under the same paths.
        imports: Modules and files that register what the runs need; import them first.
        on_status: Called whenever something happens to a run.

    Returns:
        The last word of each run, in their order: ``kept``, ``finished``, ``not applicable`` or ``failed``.

    Raises:
        ImportError: If Ray is asked for and not installed.
        ValueError: If both Ray and jobs are asked for.
    """
    if ray is not None and jobs > 1:
        raise ValueError(f"a Ray cluster has processes of its own; leave out jobs (got {jobs}) or ray (got {ray!r})")
    schedule = _Schedule(runs, on_status)
    if ray is not None:
        _share_on_ray(schedule, ray, imports)
    elif jobs == 1:
        for run in iter(schedule.next, None):
            schedule.tell(_attempt(run, imports, schedule.tell))
    else:
        _share(schedule, jobs, imports)
    return [schedule.last[run.folder] for run in runs]


class _Schedule:
    """Which run is next, and what became of each."""

    def __init__(self, runs: Sequence[PlannedRun], on_status: OnStatus) -> None:
        self._on_word = on_status
        self.last: dict[Path, RunStatus] = {}
        self.waiting: list[PlannedRun] = []
        for run in runs:
            try:
                finished = run.is_finished()
            except (ValueError, OSError) as error:
                self.tell(RunStatus(run, "failed", message=_said(error)))
                continue
            if finished:
                self.tell(RunStatus(run, "kept"))
            else:
                self.waiting.append(run)

    def tell(self, word: RunStatus) -> None:
        self.last[word.run.folder] = word
        self._on_word(word)

    def next(self) -> PlannedRun | None:
        """The first run that can begin now; ``None``: none can."""
        open_ = {run.folder for run in self.waiting}
        open_ |= {folder for folder, word in self.last.items() if word.state in GOING}
        for run in list(self.waiting):
            lost = [need for need in run.needs if need in self.last and self.last[need].state == "failed"]
            if not lost and any(need in open_ for need in run.needs):
                continue
            self.waiting.remove(run)
            if not lost:
                self.tell(RunStatus(run, "begun"))
                return run
            self.tell(RunStatus(run, "failed", message=f"{lost[0]}, which it begins with, failed"))
        return None


def _attempt(run: PlannedRun, imports: Sequence[str], on_status: OnStatus) -> RunStatus:
    """Train a run; returns what became of it."""

    def on_progress(steps: int, figures: dict[str, float]) -> None:
        on_status(RunStatus(run, "learning" if figures else "searching", steps))

    try:
        run.train(imports, on_progress)
    except NotApplicableError as error:
        return RunStatus(run, "not applicable", message=one_line(error))
    except Exception as error:  # whatever it is, the other runs go on
        return RunStatus(run, "failed", message=_said(error))
    return RunStatus(run, "finished")


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def _share(schedule: _Schedule, jobs: int, imports: Sequence[str]) -> None:
    """Have processes train what waits."""
    workers = [_Worker(imports) for _ in range(min(jobs, len(schedule.waiting)))]
    try:
        while True:
            for worker in workers:
                if worker.run is None and (run := schedule.next()) is not None:
                    worker.begin(run)
            busy = {worker.connection: worker for worker in workers if worker.run is not None}
            if not busy:
                return
            for connection in wait(list(busy)):
                worker = busy[connection]
                word = worker.hear()
                schedule.tell(word)
                if not worker.alive and schedule.waiting:
                    workers[workers.index(worker)] = _Worker(imports)
    finally:
        for worker in workers:
            worker.end()


def _share_on_ray(schedule: _Schedule, address: str, imports: Sequence[str]) -> None:
    """Have a cluster train what waits, one run a core; what it says on the way is not heard."""
    try:
        import ray
    except ImportError as error:
        raise ImportError("a Ray cluster needs Ray, which is not installed: pip install 'sd-gym[ray]'") from error
    ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    attempt = ray.remote(num_cpus=1, max_retries=0)(_attempt_there)
    cores = int(ray.cluster_resources().get("CPU", 1))
    running: dict[Any, PlannedRun] = {}
    while True:
        while len(running) < cores and (run := schedule.next()) is not None:
            running[attempt.remote(run, list(imports), os.getcwd())] = run
        if not running:
            return
        (ended,), _ = ray.wait(list(running), num_returns=1)
        run = running.pop(ended)
        try:
            word = ray.get(ended)
        except ray.exceptions.RayError as error:  # its process or its machine has ended
            word = RunStatus(run, "failed", message=_said(error))
        schedule.tell(word)


def _attempt_there(run: PlannedRun, imports: list[str], folder: str) -> RunStatus:
    """Train a run on another machine, in the folder that its relative paths start from."""
    os.chdir(folder)
    quiet()
    torch.set_num_threads(1)
    for name in imports:
        import_own(name)
    return _attempt(run, imports, lambda word: None)


class _Worker:
    """A process that trains one run after another."""

    def __init__(self, imports: Sequence[str]) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, list(imports)), daemon=True)
        self.process.start()
        theirs.close()
        self.run: PlannedRun | None = None
        self.alive = True

    def begin(self, run: PlannedRun) -> None:
        self.run = run
        with suppress(OSError):  # it has ended; to hear of it says so
            self.connection.send(run)

    def hear(self) -> RunStatus:
        """What it says of its run; if it has ended instead, that it failed."""
        try:
            word = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            self.alive = False
            code = self.process.exitcode
            word = RunStatus(
                self.run, "failed", message=f"its process ended with exit code {code}; is there enough memory?"
            )
        if word.state not in GOING:
            self.run = None
        return word

    def end(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join()


def _work(connection: Connection, imports: list[str]) -> None:
    """What a process does: train the runs that come, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a whole group of processes: the first one ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    quiet()
    torch.set_num_threads(1)  # threads of several processes that wait for each other are many times slower
    for name in imports:
        import_own(name)
    while True:
        try:
            run = connection.recv()
            connection.send(_attempt(run, imports, connection.send))
        except (EOFError, OSError):
            return


def _end_with_parent() -> None:
    """Where the first process was killed, nobody else ends this one, and it would hold the folder of its run."""
    wait([parent_process().sentinel])
    os._exit(1)
