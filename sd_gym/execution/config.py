"""Checking the configuration of what runs a backbone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sd_gym.config import CANDIDATES, ConfigError, EnvConfig, stored_config
from sd_gym.going_on import ANSWER
from sd_gym.objectives import Objective
from sd_gym.registration import OBSERVATIONS
from sd_gym.tasks.data import DataError, check_splits
from sd_gym.tasks.family import TASKS
from sd_gym.tasks.metrics import METRICS
from sd_gym.tasks.ranking import RANKINGS


def checked_config(values: Mapping[str, Any], origin: str) -> EnvConfig:
    """A configuration whose values fit together, and whose names are registered; raises ``ConfigError``."""
    config = stored_config(values, origin)
    try:
        check_splits(config.data)
    except DataError as error:
        raise ConfigError(f"{origin}: config key {error}") from error
    named = {
        "reward.objective": (config.reward, Objective),
        "observation": (config.observation, OBSERVATIONS.find),
        "task": (config.task, TASKS.find),
        "quality.metric": (config.quality.metric, METRICS.find),
        "tokens.ranking": (config.tokens.ranking, RANKINGS.find),
    }
    for key, (name, find) in named.items():
        try:
            find(name)
        except ValueError as error:
            raise ConfigError(f"{origin}: config key {key!r}: {error}") from error
    _check_measured(config, origin)
    shares = config.tokens.shares
    if shares[:1] != (0.0,) or list(shares) != sorted(set(shares)) or shares[-1] >= 1:
        raise ConfigError(
            f"{origin}: config key 'tokens.shares': expected ascending shares below 1, the first one 0.0 (no token is "
            f"dropped), as in [0.0, 0.25, 0.5]; got {list(shares)}"
        )
    if not config.candidates and len(shares) == 1:
        raise ConfigError(
            f"{origin}: config key 'candidates': with no kind of sublayer there are only tokens to drop, and "
            f"tokens.shares has one level, {list(shares)}; name a kind, or pass token_shares=[0.0, 0.25, 0.5]"
        )
    if set(config.candidates) != set(CANDIDATES) and (config.action == "multi_binary" or config.stages != ("first",)):
        raise ConfigError(
            f"{origin}: config key 'candidates': some kinds of sublayers alone are decided on with action "
            f"multi_discrete or discrete, before the first layer; got action {config.action} at {list(config.stages)}"
        )
    if config.action == "multi_binary" and len(shares) > 1:
        raise ConfigError(
            f"{origin}: config key 'action': 'multi_binary' has a bit for each switch and none for the tokens, but "
            f"there are {len(shares)} tokens.shares; use multi_discrete, or discrete with a codebook"
        )
    if config.stages != ("first",) and (config.action == "discrete" or config.observation not in ("pooled", "tokens")):
        raise ConfigError(
            f"{origin}: config key 'stages': several stages are decided with action multi_discrete or multi_binary, on "
            f"observation pooled or tokens; got {config.action} on {config.observation}"
        )
    if ANSWER in config.stages[:1]:
        raise ConfigError(
            f"{origin}: config key 'stages': nothing is decided before the stage {ANSWER} in {list(config.stages)}; "
            f"name an earlier one, as in [first, {ANSWER}]"
        )
    if ANSWER in config.stages and config.action != "multi_discrete":
        raise ConfigError(
            f"{origin}: config key 'stages': the stage {ANSWER} is decided with action multi_discrete; got "
            f"{config.action}"
        )
    if config.reward.dense and config.reward.vector:
        raise ConfigError(
            f"{origin}: config key 'reward.dense': a reward.vector comes at the end; leave one of the two out"
        )
    return config


def _check_measured(config: EnvConfig, origin: str) -> None:
    """Raise ``ConfigError`` if the task has no such metric or quality."""
    task, metric = TASKS.find(config.task), METRICS.find(config.quality.metric)
    if config.quality.metric not in task.metrics and not metric.own:
        raise ConfigError(
            f"{origin}: config key 'quality.metric': {config.task} is measured by {', '.join(task.metrics)}; got "
            f"{config.quality.metric!r}"
        )
    if config.quality.kind == "metric" and (config.quality.metric == "exact_match" or not metric.of_texts):
        raise ConfigError(
            f"{origin}: config key 'quality.kind': 'metric' scores texts, by rouge or squad; the metric "
            f"is {config.quality.metric!r}, for which exact_match, likelihood and, of classes, balanced are there"
        )
    if config.quality.kind == "balanced" and not task.weighs_classes:
        raise ConfigError(f"{origin}: config key 'quality.kind': 'balanced' weighs classes; {config.task} has none")
