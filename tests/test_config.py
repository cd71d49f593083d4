"""The keys of an env's config: dotted, in mappings of their parts, or short."""

import json

import gymnasium as gym
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sd_gym.agents.experiment.run import split_settings
from sd_gym.agents.registry import agent_class
from sd_gym.agents.report.compare import compare
from typer.testing import CliRunner

from sd_gym.cli import app
from sd_gym.config import (
    KEYS,
    PARTS,
    ConfigError,
    DataConfig,
    RewardConfig,
    TokensConfig,
    dotted,
    nested,
    stored_config,
)
from sd_gym.envs import shared_core
from sd_gym.envs.config import load_config, parse_yaml
from sd_gym.errors import short as short_of
from sd_gym.registration import config_of

MINI = "SD/Classification-Mini-v0"
SMALL = {"train_size": 40, "validation_size": 20, "test_size": 20}
SHORT = {
    "backbone.name": "backbone",
    "tokens.shares": "token_shares",
    "tokens.ranking": "token_ranking",
    "quality.kind": "quality",
    "reward.vector": "vector_reward",
    "reward.dense": "dense_reward",
}
# A value of each key, dotted, that is not its default.
OTHER = {
    "task": "summarization",
    "data.dataset": "reviews.jsonl",
    "data.subset": "sst2",
    "data.revision": "main",
    "data.columns": {"text": "sentence"},
    "data.splits": {"test": "validation"},
    "data.unanswerable": False,
    "data.overlap": "drop",
    "data.policy_rows": "all",
    "data.policy_labels": "dense",
    "data.train_size": 7,
    "data.validation_size": 8,
    "data.test_size": 9,
    "backbone.name": "my-model",
    "backbone.device": "cuda",
    "backbone.answers": "extracted",
    "backbone.prompt": "{source}:",
    "backbone.stop": ";",
    "backbone.max_source_length": 77,
    "backbone.max_target_length": 5,
    "backbone.num_beams": 3,
    "split": "test",
    "candidates": ["attention"],
    "tokens.shares": [0.0, 0.5],
    "tokens.ranking": "attention",
    "quality.kind": "likelihood",
    "quality.metric": "rouge",
    "quality.label_range": 5.0,
    "reward.objective": "mine",
    "reward.epsilon": 0.02,
    "reward.penalty": 3.0,
    "reward.cost_scale": 0.5,
    "reward.gains": "ignored",
    "reward.vector": True,
    "reward.dense": True,
    "action": "discrete",
    "codebook": "masks.json",
    "observation": "tokens",
    "stages": ["first", "decoder"],
    "table": "my-table",
}


def short(key):
    """A key's short name."""
    return SHORT.get(key, key.rpartition(".")[2])


def test_every_key_has_a_short_name_that_no_other_has():
    assert {*OTHER, "id"} == {*KEYS}
    assert len({short(key) for key in KEYS}) == len(KEYS)
    assert {short(key) for key in KEYS} & {*PARTS} == {"backbone", "quality"}  # a mapping there is the part


@pytest.mark.parametrize("key", OTHER)
def test_all_spellings_mean_the_same(key):
    value = OTHER[key]
    ways = {key: value}, {short(key): value}, nested({key: value})
    assert [dotted(way) for way in ways] == [{key: value}] * 3
    basis = {"id": "My/Env-v0", "task": "classification", "dataset": "none", "backbone": "none"}
    one, other, third = (stored_config({**dotted(basis), **dotted(way)}, "x") for way in ways)
    assert one == other == third
    assert one != stored_config(basis, "x")
    assert hash(one) == hash(other)


@given(st.sets(st.sampled_from(sorted(OTHER))), st.data())
def test_spellings_mix(keys, data):
    mixed = {}
    for key in keys:
        part = key.partition(".")[0]
        way = data.draw(st.sampled_from(["dotted", "short", "part"]))
        free = part in PARTS and isinstance(mixed.get(part, {}), dict)
        if way == "part" and free:
            mixed.setdefault(part, {})[key.rpartition(".")[2]] = OTHER[key]
        elif way == "short" and short(key) not in mixed:
            mixed[short(key)] = OTHER[key]
        else:
            mixed[key] = OTHER[key]
    assert dotted(mixed) == {key: OTHER[key] for key in keys}
    assert dotted(nested(dotted(mixed))) == dotted(mixed)


@pytest.mark.parametrize(
    "keys",
    [
        {"epsilon": 0.02, "penalty": 3.0},
        {"reward": {"epsilon": 0.02, "penalty": 3.0}},
        {"reward.epsilon": 0.02, "reward": {"penalty": 3.0}},
    ],
)
def test_an_env_is_made_by_any_spelling(keys):
    config = gym.make(MINI, **SMALL, **keys).unwrapped.config
    assert (config.reward.epsilon, config.reward.penalty, config.reward.cost_scale) == (0.02, 3.0, 1.0)
    assert config.data.train_size == 40
    vector = gym.make_vec(MINI, num_envs=2, **SMALL, **keys).unwrapped
    assert vector.config == config
    assert vector.core is shared_core(config)


def test_a_text_or_list_where_a_part_has_the_name_of_a_key_is_the_key():
    config = load_config(
        config_of("SD/Summarization-Custom-v0"), {"dataset": "d", "backbone": "b", "quality": "agreement"}
    )
    same = {"data": {"dataset": "d"}, "backbone": {"name": "b"}, "quality": {"kind": "agreement"}}
    assert load_config(config_of("SD/Summarization-Custom-v0"), same) == config
    assert (config.backbone.name, config.quality.kind, config.backbone.max_source_length) == ("b", "agreement", 512)
    assert load_config(config_of(MINI), {"stages": ["first", "decoder"]}).stages == ("first", "decoder")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"epsilom": 1}, "unknown config key 'epsilom'; did you mean 'reward.epsilon'"),
        ({"reward.epsilom": 1}, "unknown config key 'reward.epsilom'; did you mean 'reward.epsilon'"),
        ({"reward": {"epsilom": 1}}, "unknown config key 'reward.epsilom'; did you mean 'reward.epsilon'"),
        ({"token_share": [0.0]}, "unknown config key 'token_share'; did you mean 'tokens.shares'"),
        ({"rewards": {}}, "unknown config key 'rewards'"),
        ({"shares": [0.0]}, "unknown config key 'shares'"),
        ({"reward": 3}, "config key 'reward': expected a mapping with keys of objective, epsilon, .*; got 3"),
        (
            {"data": "reviews.jsonl"},
            "config key 'data': expected a mapping with keys of dataset, .*; got 'reviews.jsonl'",
        ),
        ({"reward": {"penalty": -1}}, "config key 'reward.penalty': .*greater than 0, got -1"),
        ({"quality": {"kind": "metric"}}, "config key 'quality.kind': 'metric' scores texts"),
        ({"backbone": ["mini"]}, "config key 'backbone.name': .*string, got"),
        (
            {"epsilon": 0.1, "reward.epsilon": 0.2},
            "config key 'reward.epsilon' has two values: 'epsilon' is 0.1, and 'reward.epsilon' is 0.2; leave one",
        ),
        ({"penalty": 1, "reward": {"penalty": 2}}, "config key 'reward.penalty' has two values"),
    ],
)
def test_errors_name_the_key(keys, message):
    with pytest.raises(ConfigError, match=message):
        gym.make(MINI, **SMALL, **keys)


def test_the_same_value_may_be_given_twice():
    assert gym.make(MINI, **SMALL, epsilon=0.1, reward={"epsilon": 0.1}).unwrapped.config.reward.epsilon == 0.1


def test_the_command_line_takes_any_spelling(tmp_path):
    configs = []
    small = [f"{key}={value}" for key, value in SMALL.items()]
    for number, pair in enumerate(["epsilon=0.02", "reward.epsilon=0.02", "reward={epsilon: 0.02}"]):
        options = [word for one in [*small, pair] for word in ("--set", one)]
        folder = tmp_path / str(number)
        arguments = ["train", MINI, "--algo", "dense", "--steps", "1", "--output", str(folder), *options]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        configs.append(json.loads((folder / "config.json").read_text())["env_config"])
    assert configs[0] == configs[1] == configs[2]
    assert configs[0]["reward"]["epsilon"] == 0.02  # written nested
    with pytest.warns(UserWarning, match="counted once"):
        (row,) = compare(tmp_path / str(number) for number in range(3))
    assert row["seeds"] == 1  # one and the same, three times


def test_settings_of_the_agent_are_told_apart_from_keys_in_any_spelling():
    settings = {"reward": {"epsilon": 0.1}, "tokens.shares": [0.0], "backbone": "mini", "n_steps": 2}
    of_agent = {"n_steps": 2}
    assert split_settings("ppo", settings) == ({key: settings[key] for key in settings if key != "n_steps"}, of_agent)
    for wrong in ("id", "reward.epsilom", "shares"):
        with pytest.raises(ValueError, match=f"unknown setting '{wrong}'.*The env has .*reward.epsilon"):
            split_settings("ppo", {wrong: 1})


def test_what_a_file_lacks_is_the_default():
    config = stored_config({"id": "My/Env-v0", "task": "classification", "dataset": "d", "backbone": "b"}, "x")
    assert (config.reward, config.tokens, config.stages) == (RewardConfig(), TokensConfig(), ("first",))
    assert config.data == DataConfig(dataset="d")
    with pytest.raises(ConfigError, match=r"x: config key 'data.dataset': Field required"):
        stored_config({"id": "My/Env-v0", "task": "classification"}, "x")


@pytest.mark.parametrize("key", [key for key in OTHER if type(OTHER[key]) in (int, float)])
def test_what_is_no_number_is_refused_as_one(key):
    for value, message in ((True, "expected a number, not true or false"), ("1e400", ""), ("nan", "")):
        with pytest.raises(ConfigError, match=f"config key '{key}': .*{message}"):
            gym.make(MINI, **{**SMALL, short(key): parse_yaml(str(value), "x")})


@pytest.mark.parametrize("share", [True, float("nan")])
def test_shares_are_numbers(share):
    with pytest.raises(ConfigError, match=r"config key 'tokens\.shares.*number"):
        gym.make(MINI, **SMALL, token_shares=[0.0, share])


def test_settings_of_agents_are_numbers():
    for value in (True, float("inf")):
        with pytest.raises(ValueError, match="learning_rate"):
            agent_class("ppo").Settings(learning_rate=value)
    assert agent_class("ppo").Settings(learning_rate=parse_yaml("1e-3", "x")).learning_rate == 1e-3


def test_a_huge_value_is_cut_before_it_is_written_out():
    value = ["x"] * 10
    for _ in range(9):
        value = [value] * 10
    assert len(short_of(value)) < 100
