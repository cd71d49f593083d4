"""Checks of the configuration of an env with a backbone."""

from collections.abc import Iterator, Mapping
from typing import Any

from sd_gym.config import CANDIDATES, ConfigError, EnvConfig, stored_config
from sd_gym.errors import DataError
from sd_gym.going_on import ANSWER
from sd_gym.objectives import Objective
from sd_gym.registration import OBSERVATIONS
from sd_gym.tasks.data import check_splits
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
    for key, problem in _problems(config):
        raise ConfigError(f"{origin}: config key {key!r}: {problem}")
    return config


def _problems(config: EnvConfig) -> Iterator[tuple[str, str]]:
    """Keys whose values do not fit the others, each with the reason."""
    task = TASKS.find(config.task)
    quality = config.quality
    metric = METRICS.find(config.quality.metric)
    shares = list(config.tokens.shares)
    stages = list(config.stages)
    action = config.action
    kinds = config.candidates
    if quality.metric not in task.metrics and not metric.own:
        yield "quality.metric", f"{config.task} is measured by {', '.join(task.metrics)}; got {quality.metric!r}"
    if quality.kind == "metric" and (quality.metric == "exact_match" or metric.of_text is None):
        remedy = f"with {quality.metric!r} use exact_match, likelihood or, for classes, balanced"
        yield "quality.kind", f"'metric' scores texts, by rouge or squad; {remedy}"
    if quality.kind == "balanced" and not task.weighs_classes:
        yield "quality.kind", f"'balanced' weighs classes; {config.task} has none"
    if shares[:1] != [0.0] or shares != sorted(set(shares)) or shares[-1] >= 1:
        yield "tokens.shares", f"expected ascending shares from 0.0 to below 1, as in [0.0, 0.25, 0.5]; got {shares}"
    if not kinds and len(shares) == 1:
        remedy = "name a kind, or pass token_shares=[0.0, 0.25, 0.5]"
        yield "candidates", f"without a kind there are only tokens to drop, and tokens.shares is {shares}; {remedy}"
    if set(kinds) != set(CANDIDATES) and (action == "multi_binary" or stages != ["first"]):
        needed = "skipping only some kinds needs action multi_discrete or discrete, and stages [first]"
        yield "candidates", f"{needed}; got action {action} at {stages}"
    if action == "multi_binary" and len(shares) > 1:
        remedy = f"to choose among {shares}, use multi_discrete, or discrete with a codebook"
        yield "action", f"'multi_binary' has a bit for each switch and none for the tokens; {remedy}"
    if stages != ["first"] and (action != "multi_discrete" or config.observation not in ("pooled", "tokens")):
        needed = "several stages are decided with action multi_discrete, on pooled or tokens"
        yield "stages", f"{needed}; got {action} on {config.observation}"
    if stages[:1] == [ANSWER]:
        yield "stages", f"nothing is decided before the stage {ANSWER}; expected [first, {ANSWER}], got {stages}"
    if config.reward.dense and config.reward.vector:
        yield "reward.dense", "a reward.vector comes at the end; leave one of the two out"
