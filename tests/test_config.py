"""The keys of an env's config: dotted, in mappings of their parts, or short; and what former versions wrote, flat."""

import json
import shutil

import gymnasium as gym
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sd_gym.agents.experiment.api import evaluate
from sd_gym.agents.experiment.run import load_run, split_settings, train
from sd_gym.agents.report.compare import compare
from sd_gym.agents.runs.folder import read_description
from typer.testing import CliRunner

import sd_gym
from sd_gym.cli import app
from sd_gym.config import (
    KEYS,
    PARTS,
    ConfigError,
    DataConfig,
    EnvConfig,
    RewardConfig,
    TokensConfig,
    nested,
    spelled,
    stored,
)
from sd_gym.envs import shared_core
from sd_gym.envs.config import load_config, stored_config
from sd_gym.registration import config_files, config_of
from tests.conftest import FORMER_NAMES, flat

CUSTOM, MINI = "SD/Classification-Custom-v0", "SD/Classification-Mini-v0"
SMALL = {"train_size": 40, "validation_size": 20, "test_size": 20}
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
    "reward.objective": "scalarized",
    "reward.epsilon": 0.02,
    "reward.penalty": 3.0,
    "reward.cost_scale": 0.5,
    "reward.vector": True,
    "reward.dense": True,
    "action": "discrete",
    "codebook": "masks.json",
    "observation": "tokens",
    "stages": ["first", "decoder"],
    "table": "my-table",
}


def short(key):
    """The name that a key had when configs were flat."""
    part, _, inner = key.rpartition(".")
    return FORMER_NAMES.get((part, inner), inner)


def test_every_key_has_a_short_name_that_no_other_has():
    assert {*OTHER, "id"} == {*KEYS}
    assert len({short(key) for key in KEYS}) == len(KEYS)
    assert {short(key) for key in KEYS} & {*PARTS} == {"backbone", "quality"}  # a mapping there is the part


@pytest.mark.parametrize("key", OTHER)
def test_all_spellings_mean_the_same(key):
    value = OTHER[key]
    ways = {key: value}, {short(key): value}, nested({key: value})
    assert [spelled(way) for way in ways] == [{key: value}] * 3
    basis = {"id": "My/Env-v0", "task": "classification", "dataset": "none", "backbone": "none"}
    one, other, third = (stored_config({**spelled(basis), **spelled(way)}, "x") for way in ways)
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
    assert spelled(mixed) == {key: OTHER[key] for key in keys}
    assert spelled(nested(spelled(mixed))) == spelled(mixed)


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
        config_of("SD/Summarization-Custom-v0"), {"dataset": "d", "backbone": "b", "quality": "likelihood"}
    )
    same = {"data": {"dataset": "d"}, "backbone": {"name": "b"}, "quality": {"kind": "likelihood"}}
    assert load_config(config_of("SD/Summarization-Custom-v0"), same) == config
    assert (config.backbone.name, config.quality.kind, config.backbone.max_source_length) == ("b", "likelihood", 512)
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
        ({"multiplier_rate": 1}, "train the agent ppo_lagrangian"),
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
        with pytest.raises(ValueError, match=f"unknown setting '{wrong}'. Of the env: .*reward.epsilon"):
            split_settings("ppo", {wrong: 1})


def test_a_flat_file_of_ones_own_is_read_and_one_may_extend_another_of_the_other_form(
    reviews, tiny_backbone, own_names
):
    folder = reviews.parent
    (folder / "flat.yaml").write_text(
        f"id: Own/Flat-v0\ntask: classification\ndataset: {reviews.name}\nbackbone: {tiny_backbone}\nepsilon: 0.5\n"
        "quality: likelihood\ntoken_shares: [0.0, 0.25]\n"
    )
    (folder / "nested.yaml").write_text(
        "id: Own/Nested-v0\nextends: flat.yaml\nreward:\n  penalty: 7\ntokens:\n  ranking: position\n"
    )
    config = gym.make(sd_gym.register_env(folder / "nested.yaml")).unwrapped.config
    assert (config.reward.epsilon, config.reward.penalty) == (0.5, 7.0)  # a part overrides its keys alone
    assert (config.tokens.shares, config.tokens.ranking) == ((0.0, 0.25), "position")
    assert (config.quality.kind, config.data.dataset) == ("likelihood", str(reviews.resolve()))
    (folder / "twice.yaml").write_text("id: Own/Twice-v0\nextends: flat.yaml\nepsilon: 1\nreward:\n  epsilon: 2\n")
    with pytest.raises(ConfigError, match=r"Own/Twice-v0: config key 'reward.epsilon' has two values"):
        gym.make(sd_gym.register_env(folder / "twice.yaml"))


def test_the_files_of_the_package_are_nested():
    for file in config_files():
        import yaml

        said = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert {*said} <= {*EnvConfig.model_fields, "extends"}, file
        assert all(isinstance(said[part], dict) for part in PARTS if part in said), file


def test_what_a_file_lacks_is_the_default():
    config = stored_config({"id": "My/Env-v0", "task": "classification", "dataset": "d", "backbone": "b"}, "x")
    assert (config.reward, config.tokens, config.stages) == (RewardConfig(), TokensConfig(), ("first",))
    assert config.data == DataConfig(dataset="d")
    with pytest.raises(ConfigError, match=r"x: config key 'data.dataset': Field required"):
        stored_config({"id": "My/Env-v0", "task": "classification"}, "x")
    assert stored({"objective": "lagrangian", "multiplier_rate": 1}, "x") == {"reward.objective": "lexicographic"}


@pytest.fixture
def runs(tmp_path):
    """A run, and the same one as a former version wrote it."""
    settings = {**SMALL, "epsilon": 0.3, "num_envs": 8, "token_shares": [0.0, 0.25]}
    train(MINI, "a2c", tmp_path / "now", steps=64, settings=settings, strictness=0)
    old = shutil.copytree(tmp_path / "now", tmp_path / "old")
    for name, key in (("config.json", "env_config"), ("skip_policy.json", "env")):
        said = json.loads((old / name).read_text())
        said[key] = flat(said[key])
        (old / name).write_text(json.dumps(said))
    return tmp_path / "now", old


def test_a_run_of_a_former_version_is_read(runs, tmp_path):
    now, old = runs
    assert "epsilon" in json.loads((old / "config.json").read_text())["env_config"]
    assert read_description(old) == read_description(now)
    assert load_run(old)[1] is load_run(now)[1]  # the same env
    texts = ["the food was good", "a bad room"]
    one, other = (sd_gym.load(folder)(texts) for folder in runs)
    assert [(a.answer, a.flops_ratio, a.skip.tolist()) for a in one] == [
        (a.answer, a.flops_ratio, a.skip.tolist()) for a in other
    ]
    one, other = (evaluate(MINI, folder, "validation") for folder in runs)
    assert one["quality"] == other["quality"]
    with pytest.warns(UserWarning, match="counted once"):
        (row,) = compare(runs)
    assert (row["agent"], row["seeds"]) == ("a2c", 1)
    said = json.loads((old / "config.json").read_text())
    said["env_config"]["epsilon"], said["seed"] = 0.4, 1
    (old / "config.json").write_text(json.dumps(said))
    assert {row["agent"] for row in compare(runs)} == {"a2c (reward.epsilon 0.3)", "a2c (reward.epsilon 0.4)"}
    said["env_config"]["colour"] = "red"
    (old / "config.json").write_text(json.dumps(said))
    with pytest.raises(ConfigError, match=r"old/config.json: unknown config key 'colour'"):
        read_description(old)


def test_a_table_of_a_former_version_is_read(tmp_path):
    sd_gym.tabulate(MINI, tmp_path / "now", decisions="random:4", instances=6, epsilon=0.3)
    old = shutil.copytree(tmp_path / "now", tmp_path / "old")
    said = json.loads((old / "table.json").read_text())
    assert said["env_config"]["reward"]["epsilon"] == 0.3
    said["env_config"] = flat(said["env_config"])
    (old / "table.json").write_text(json.dumps(said))
    one, other = (gym.make("SD/Table-v0", table=str(tmp_path / name), penalty=3) for name in ("now", "old"))
    assert one.unwrapped.config.model_copy(update={"table": str(old)}) == other.unwrapped.config
    assert (other.unwrapped.config.reward.epsilon, other.unwrapped.config.reward.penalty) == (0.3, 3.0)
    with pytest.raises(ConfigError, match=r"config key 'data.test_size': the table .* is of 6, got 2"):
        gym.make("SD/Table-v0", table=str(old), test_size=2)
    with pytest.raises(ConfigError, match=r"config key 'reward.dense': the table .* is of False, got True"):
        gym.make("SD/Table-v0", table=str(old), dense_reward=True)
