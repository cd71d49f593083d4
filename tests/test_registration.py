"""A user's own envs, from YAML files."""

import gymnasium as gym
import pytest

import sd_gym
from sd_gym.envs import ConfigError, SwitchableEnv, TableEnv
from sd_gym.envs.listing import page_of
from sd_gym.registration import SERVING
from tests.conftest import write_env

TABLES = [name for name in sd_gym.registered_ids() if "-Table-" in name and name not in SERVING]

pytestmark = pytest.mark.usefixtures("own_names")


def test_an_env_from_a_yaml_file(reviews, tiny_backbone, tmp_path, monkeypatch):
    (tmp_path / "model").symlink_to(tiny_backbone)
    file = write_env(tmp_path, reviews.name, "./model", penalty=7.0)  # paths from where the file lies
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    env_id = sd_gym.register_env(file)
    assert env_id == "Own/Reviews-v0"
    assert env_id in sd_gym.registered_ids()
    env = gym.make(env_id, epsilon=0.5)
    assert (env.unwrapped.config.reward.penalty, env.unwrapped.config.reward.epsilon) == (7.0, 0.5)
    assert env.unwrapped.config.data.dataset == str(reviews.resolve())
    vector = gym.make_vec(env_id, num_envs=3)
    vector.reset(seed=0)
    vector.step(vector.action_space.sample())
    assert SwitchableEnv(str(file)).config == gym.make(env_id).unwrapped.config
    (elsewhere / "other.jsonl").write_text(reviews.read_text())  # those that are passed: from the working directory
    assert gym.make(env_id, dataset="other.jsonl").unwrapped.config.data.dataset == "other.jsonl"
    assert sd_gym.register_env(write_env(tmp_path, reviews.name, "./model", penalty=8.0)) == env_id
    assert gym.make(env_id).unwrapped.config.reward.penalty == 8.0


def test_an_env_that_extends_another_one(reviews, tiny_backbone, tmp_path):
    """One of its own beside it, or one of the package's."""
    base = write_env(tmp_path, reviews, tiny_backbone, penalty=7.0, epsilon=0.5)
    (tmp_path / "more.yaml").write_text(f"id: Own/More-v0\nextends: {base.name}\nepsilon: 0.25\n")
    config = gym.make(sd_gym.register_env(tmp_path / "more.yaml")).unwrapped.config
    assert (config.id, config.reward.penalty, config.reward.epsilon) == ("Own/More-v0", 7.0, 0.25)
    (tmp_path / "mini.yaml").write_text("id: Own/Mini-v0\nextends: summarization_mini.yaml\ntrain_size: 20\n")
    config = gym.make(sd_gym.register_env(tmp_path / "mini.yaml")).unwrapped.config
    assert (config.task, config.data.train_size, config.data.test_size) == ("summarization", 20, 2000)
    (tmp_path / "most.yaml").write_text(
        "id: Own/Most-v0\nextends: more.yaml\npenalty: 3\n"
    )  # which extends another one
    config = gym.make(sd_gym.register_env(tmp_path / "most.yaml")).unwrapped.config
    assert (config.id, config.reward.penalty, config.reward.epsilon) == ("Own/Most-v0", 3.0, 0.25)
    (tmp_path / "table.yaml").write_text("id: Own/Table-v0\nextends: classification_trec_table.yaml\nepsilon: 0.1\n")
    assert type(gym.make(sd_gym.register_env(tmp_path / "table.yaml")).unwrapped) is TableEnv
    (tmp_path / "circle.yaml").write_text("extends: bad.yaml\n")
    for name, message in (
        ("bad.yaml", r"in a circle \(bad.yaml -> bad.yaml\)"),
        ("circle.yaml", r"in a circle \(bad.yaml -> circle.yaml -> bad.yaml\)"),
        ("missing.yaml", "extends 'missing.yaml', which is neither in .* nor in the package"),
        ("../own.yaml", "expected the name of a YAML file.*'../own.yaml'"),
    ):
        (tmp_path / "bad.yaml").write_text(f"id: Own/Bad-v0\nextends: {name}\n")
        with pytest.raises(ConfigError, match=message):
            gym.make(sd_gym.register_env(tmp_path / "bad.yaml"))


@pytest.mark.parametrize(
    ("lines", "kind"),
    [
        ("extends: classification_mini.yaml\ntable: null", SwitchableEnv),
        ("extends: classification_mini.yaml\ntable:", SwitchableEnv),
        ("extends: table.yaml\ntable: ~  # passed later", TableEnv),
        ("extends: classification_trec_table.yaml\ntable: null", TableEnv),
        ("table: null", TableEnv),  # as table.yaml itself
    ],
)
def test_an_env_without_the_name_of_a_table(lines, kind, tmp_path):
    (tmp_path / "own.yaml").write_text(f"id: Own/Tableless-v0\n{lines}\n")
    env_id, table = sd_gym.register_env(tmp_path / "own.yaml"), {"table": "tables/classification-trec"}
    if kind is SwitchableEnv:
        with pytest.raises(ConfigError, match="this env computes outcomes and takes no table"):
            gym.make(env_id, **table)
        table = {"train_size": 20}
    env = gym.make(env_id, **table)
    env.reset(seed=0)
    assert type(env.unwrapped) is kind


@pytest.mark.parametrize("first", ["id: Own/Marked-v0", "# Mine.\nid: Own/Marked-v0"])
def test_a_file_may_begin_with_a_byte_order_mark(first, tmp_path):
    (tmp_path / "own.yaml").write_text(f"{first}\nextends: classification_mini.yaml\n", encoding="utf-8-sig")
    assert sd_gym.register_env(tmp_path / "own.yaml") == "Own/Marked-v0"
    assert page_of("Own/Marked-v0").about == ("Mine." if first.startswith("#") else "")


def test_yaml_files_that_are_no_envs(reviews, tiny_backbone, tmp_path):
    with pytest.raises(FileNotFoundError, match="no configuration file"):
        sd_gym.register_env(tmp_path / "none.yaml")
    nameless = tmp_path / "nameless.yaml"
    nameless.write_text("task: classification\n")
    with pytest.raises(ValueError, match="no line 'id: "):
        sd_gym.register_env(nameless)
    with pytest.raises(ValueError, match="needs a name of its own"):
        sd_gym.register_env(write_env(tmp_path, reviews, tiny_backbone, id="SD/Classification-Mini-v0"))
    with pytest.raises(ValueError, match="'CartPole-v1' is taken by another env"):
        sd_gym.register_env(write_env(tmp_path, reviews, tiny_backbone, id="CartPole-v1"))
    with pytest.raises(gym.error.Error, match="Malformed"):
        sd_gym.register_env(write_env(tmp_path, reviews, tiny_backbone, id="my own"))
    assert set(gym.registry) >= {"SD/Classification-Mini-v0", "CartPole-v1"}
    assert "my own" not in sd_gym.registered_ids()
    env_id = sd_gym.register_env(write_env(tmp_path, reviews, tiny_backbone, epsilom=1))
    with pytest.raises(
        ConfigError, match=r"Own/Reviews-v0: unknown config key 'epsilom'; did you mean 'reward.epsilon'"
    ):
        gym.make(env_id)


@pytest.mark.parametrize("env_id", TABLES)
def test_the_page_of_a_table_names_its_action_space(env_id):
    kinds = {"discrete": gym.spaces.Discrete, "multi_discrete": gym.spaces.MultiDiscrete}
    assert isinstance(gym.make(env_id).action_space, kinds[page_of(env_id).facts["action"]])
