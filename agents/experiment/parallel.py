"""Many runs trained in one process, several, or on a Ray cluster."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from sd_gym.agents.experiment.comparison_plan import PlannedRun
from sd_gym.agents.learning.agent import NotApplicableError

from sd_gym import cluster
from sd_gym.errors import one_line


class RunStatus(NamedTuple):
    """The status of a run.

    Its ``state`` is ``begun``, ``learning`` or ``searching`` while it runs; at the end ``kept`` (it was finished
    already), ``finished``, ``not applicable`` or ``failed``.
    """

    run: PlannedRun
    state: str
    steps: int = 0  # decisions so far
    message: str = ""  # why it failed, or does not apply


OnStatus = Callable[[RunStatus], None]
UNFINISHED = ("begun", "learning", "searching")


def train_many(
    runs: Sequence[PlannedRun],
    *,
    jobs: int = 1,
    ray: str | None = None,
    imports: Sequence[str] = (),
    on_status: OnStatus = lambda status: None,
) -> list[RunStatus]:
    """Train the runs that are not finished; interrupted ones are resumed.

    A run that fails does not stop the others, and no run depends on those trained before it. With several ``jobs`` each
    has one thread, which changes the last bits of sums.

    Each of ``runs`` comes after the run that it starts from; see ``sd_gym.train_all`` for the other arguments and
    errors. Returns the last status of each run, in the same order.
    """
    if ray is not None and jobs > 1:
        raise ValueError(f"a Ray cluster has processes of its own; leave out jobs (got {jobs}) or ray (got {ray!r})")
    schedule = _Schedule(runs, on_status)
    if ray is not None:
        _train_on_ray(schedule, ray, imports)
    elif jobs == 1:
        for run in iter(schedule.next, None):
            schedule.update(_attempt(run, imports, schedule.update))
    else:
        _train_in_processes(schedule, jobs, imports)
    return [schedule.last[run.folder] for run in runs]


class _Schedule:
    """The waiting runs, and the status of all."""

    def __init__(self, runs: Sequence[PlannedRun], on_status: OnStatus) -> None:
        self._on_status = on_status
        self.last: dict[Path, RunStatus] = {}
        self.waiting: list[PlannedRun] = []
        for run in runs:
            try:
                if run.is_finished():
                    self.update(RunStatus(run, "kept"))
                else:
                    self.waiting.append(run)
            except (ValueError, OSError) as error:
                self.update(RunStatus(run, "failed", message=_message(error)))

    def update(self, status: RunStatus) -> None:
        self.last[status.run.folder] = status
        self._on_status(status)

    def next(self) -> PlannedRun | None:
        """The first run that can begin now, if any."""
        unfinished = {run.folder for run in self.waiting}
        unfinished |= {folder for folder, status in self.last.items() if status.state in UNFINISHED}
        for run in list(self.waiting):
            failed = [need for need in run.needs if need in self.last and self.last[need].state == "failed"]
            if not failed and any(need in unfinished for need in run.needs):
                continue
            self.waiting.remove(run)
            if not failed:
                self.update(RunStatus(run, "begun"))
                return run
            self.update(RunStatus(run, "failed", message=f"{failed[0]}, which it starts from, failed"))
        return None


def _attempt(run: PlannedRun, imports: Sequence[str], on_status: OnStatus = lambda status: None) -> RunStatus:

    def on_progress(steps: int, figures: dict[str, float]) -> None:
        on_status(RunStatus(run, "learning" if figures else "searching", steps))

    try:
        run.train(imports, on_progress)
    except NotApplicableError as error:
        return RunStatus(run, "not applicable", message=one_line(error))
    except Exception as error:  # the other runs go on
        return RunStatus(run, "failed", message=_message(error))
    return RunStatus(run, "finished")


def _message(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def _train_in_processes(schedule: _Schedule, jobs: int, imports: Sequence[str]) -> None:
    workers = [_Worker(imports) for _ in range(min(jobs, len(schedule.waiting)))]
    try:
        while True:
            for worker in workers:
                if worker.run is None and (run := schedule.next()) is not None:
                    worker.begin(run)
            busy: dict[Any, _Worker] = {worker.connection: worker for worker in workers if worker.run is not None}
            if not busy:
                return
            for connection in wait(list(busy)):
                worker = busy[connection]
                schedule.update(worker.status())
                if not worker.alive and schedule.waiting:
                    workers[workers.index(worker)] = _Worker(imports)
    finally:
        for worker in workers:
            worker.end()


def _train_on_ray(schedule: _Schedule, address: str, imports: Sequence[str]) -> None:
    """Train the waiting runs on a cluster, one per core; only their last status is reported."""
    ray = cluster.connect(address)
    cores = cluster.cores(ray)
    running: dict[Any, PlannedRun] = {}
    while True:
        while len(running) < cores and (run := schedule.next()) is not None:
            running[cluster.submit(ray, _attempt, run, imports, imports=imports)] = run
        if not running:
            return
        (ended,), _ = ray.wait(list(running), num_returns=1)
        run = running.pop(ended)
        try:
            schedule.update(ray.get(ended))
        except ray.exceptions.RayError as error:  # its process or its machine died several times
            schedule.update(RunStatus(run, "failed", message=_message(error)))


class _Worker:
    """A process that trains one run after another."""

    def __init__(self, imports: Sequence[str]) -> None:
        context = get_context("spawn")
        self.connection, worker_end = context.Pipe()
        self.process = context.Process(target=_work, args=(worker_end, list(imports)), daemon=True)
        with cluster.without_interrupts():
            self.process.start()
        worker_end.close()
        self.run: PlannedRun | None = None
        self.alive = True

    def begin(self, run: PlannedRun) -> None:
        self.run = run
        with suppress(OSError):  # the process has ended; ``status`` reports it
            self.connection.send(run)

    def status(self) -> RunStatus:
        """The next status of its run; ``failed`` if the process has ended."""
        assert self.run is not None  # it is called only for workers with a run
        try:
            status = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            self.alive = False
            message = f"its process ended with exit code {self.process.exitcode}; is there enough memory?"
            status = RunStatus(self.run, "failed", message=message)
        if status.state not in UNFINISHED:
            self.run = None
        return status

    def end(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join()


def _work(connection: Connection, imports: list[str]) -> None:
    """Train the runs that come over a connection, until it is closed."""
    cluster.prepare_worker(imports)
    while True:
        try:
            run = connection.recv()
            connection.send(_attempt(run, imports, connection.send))
        except (EOFError, OSError):
            return
