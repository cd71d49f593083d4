"""Learning curves: all agents write their points at the same decisions, however often they update."""

from typing import Any

from stable_baselines3.common.logger import Logger

MAX_POINTS = 96  # most points of a curve; a multiple of VALIDATIONS, so that no point is half made at a checkpoint


class CurveLogger(Logger):
    """Writes to another logger's outputs, at most ``MAX_POINTS`` times; a point is the mean since the last one.

    Args:
        logger: The logger with the outputs.
        total_steps: Decisions of the whole run.
        done: Decisions made before a resumed run goes on.
        stages: Steps per decision; ``dump`` counts steps.
    """

    def __init__(self, logger: Logger, total_steps: int, done: int = 0, stages: int = 1) -> None:
        super().__init__(logger.dir, logger.output_formats)
        self._total = total_steps
        self._stages = stages
        self._point = self._points(done)

    def record(self, key: str, value: Any, exclude: str | tuple[str, ...] | None = None) -> None:
        """Add a number to the mean of the next point."""
        self.record_mean(key, value, exclude)

    def dump(self, step: int = 0) -> None:
        """Write a point if one is due after ``step`` steps; the last rollout always makes one."""
        decisions = step // self._stages
        if self._points(decisions) > self._point:
            self._point = self._points(decisions)
            super().dump(decisions)

    def _points(self, decisions: int) -> int:
        return decisions * MAX_POINTS // self._total
