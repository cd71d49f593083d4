"""TensorBoard events of a run besides its agent's curves: settings, validation and the result."""

import json
from pathlib import Path
from typing import Any

import yaml
from sd_gym.agents.drawing.run_picture import plot_skip_rates
from stable_baselines3.common.logger import Figure, HParam, Logger, TensorBoardOutputFormat, configure
from tensorboard.compat.proto.event_pb2 import (
    Event,  # pyright: ignore[reportAttributeAccessIssue]  (made at import)
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]  (made at import)
)

from sd_gym.config import dotted
from sd_gym.files import as_json

OF_ENV = ("reward", "quality", "tokens")  # parts of an env's config that are hyperparameters
RESULTS = ("quality_difference", "flops_ratio_with_policy", "quality_kept")  # metrics of the hyperparameters
VALIDATED = ("reward", "quality", "flops_ratio")

# Charts with the runs of all agents, in the tab CUSTOM SCALARS.
LAYOUT = {
    "all agents": {
        "quality, validation": ["Multiline", ["validation/quality"]],
        "FLOPs, validation": ["Multiline", ["validation/flops_ratio"]],
        "reward, validation": ["Multiline", ["validation/reward"]],
        "quality and dense quality, rollout": ["Multiline", ["rollout/quality", "rollout/quality_ref"]],
        "FLOPs, rollout": ["Multiline", ["rollout/flops_ratio"]],
    }
}


def open_logger(folder: Path, description: dict[str, Any], done: int | None = None) -> Logger:
    """A logger into TensorBoard events of a run folder, with the run's settings (``config.json``).

    ``done``: decisions at the checkpoint that a run continues from; later events are hidden.
    """
    logger = configure(str(folder), ["tensorboard"])
    (output,) = logger.output_formats
    assert isinstance(output, TensorBoardOutputFormat)
    restart = Event(step=0 if done is None else done + 1, session_log=SessionLog(status=SessionLog.START))
    assert output.writer.file_writer is not None
    output.writer.file_writer.add_event(restart)
    if done is None:
        plain = json.loads(as_json(description))
        text = f"```yaml\n{yaml.safe_dump(plain, sort_keys=False)}```"
        metrics = {f"test/{name}": 0.0 for name in RESULTS}  # their values come from the scalars
        _write(logger, 0, {"config": text, "hparams": HParam(_hyperparameters(plain), metrics)})
        output.writer.add_custom_scalars(LAYOUT)
    return logger


def _hyperparameters(description: dict[str, Any]) -> dict[str, str | bool | int | float]:
    """Env, agent, seed and steps, all settings of the agent, some of the env."""
    values = {key: description[key] for key in ("env", "algo", "seed", "steps")}
    values |= dotted({part: description["env_config"][part] for part in OF_ENV}) | description["agent_settings"]
    return {key: value if isinstance(value, bool | int | float) else str(value) for key, value in values.items()}


def _write(logger: Logger, step: int, values: dict[str, Any]) -> None:
    """Write values at this step at once; ``record`` would wait for the agent's next ``dump``."""
    for output in logger.output_formats:
        output.write(values, dict.fromkeys(values, ()), step)


def log_validation(logger: Logger, entry: dict[str, Any]) -> None:
    """Write the means of an entry of ``Selection``'s history."""
    _write(logger, entry["step"], {f"validation/{name}": entry[name] for name in VALIDATED})


def log_result(logger: Logger, step: int, result: dict[str, Any], switches: list[str]) -> None:
    """Write the result on the test split: its means, and the skip rates of the switches as a picture."""
    picture = Figure(plot_skip_rates(result["by_difficulty"], switches), close=False)
    values = {f"test/{name}": float(result[name]) for name in RESULTS}
    _write(logger, step, values | {"test/skip_rates": picture})
