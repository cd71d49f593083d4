"""The files of envs: those of the package, and ones of a user."""

import gymnasium as gym
import pytest
import yaml

import sd_gym
from sd_gym.config import KEYS, PARTS, ConfigError, EnvConfig, dotted
from sd_gym.envs.config import parse_yaml, read_values
from sd_gym.registration import CONFIG_FOLDER, config_of, registered_ids
from tests.envs.conftest import ID


def test_the_base_configuration_explains_every_key_and_no_other_file_repeats_it():
    """Its values are the defaults of ``EnvConfig``; a key with a comment is explained above it, or above its part."""
    lines = (CONFIG_FOLDER / "base.yaml").read_text().splitlines()
    values = read_values(CONFIG_FOLDER / "base.yaml")
    assert set(KEYS) - set(values) == {"id", "table"}  # an env's own; table.yaml explains it
    defaults = EnvConfig(id="x", task="classification", data={"dataset": "d"}, backbone={"name": "b"}).model_dump()
    for key, value in dotted(defaults).items():
        if key not in ("id", "table", "data.dataset", "backbone.name"):
            assert list(values[key]) == list(value) if isinstance(value, tuple) else values[key] == value, key
    for part in [line.split(":")[0] for line in lines if line and not line.startswith((" ", "#"))]:
        assert lines[next(n for n, line in enumerate(lines) if line.startswith(f"{part}:")) - 1].startswith("# ")
    files = {file.name for file in CONFIG_FOLDER.glob("*.yaml")}
    bases = files - {config_of(name).name for name in registered_ids()}
    assert "base.yaml" in bases
    assert all("extends:" in (CONFIG_FOLDER / name).read_text() for name in files - {"base.yaml", "table.yaml"})
    assert {file.stem for file in (CONFIG_FOLDER / "codebooks").glob("*.json")} == {
        stem for name in registered_ids() if (stem := config_of(name).stem).endswith("mini")
    }


def test_a_users_flat_file_is_read_and_one_may_extend_another_of_the_other_form(reviews, tiny_backbone, own_names):
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


@pytest.mark.usefixtures("own_names")
def test_only_a_files_own_values_are_paths_beside_it(tmp_path):
    for name in ("mini", "procedural"):
        (tmp_path / name).mkdir()
    (tmp_path / "own.yaml").write_text("id: Own/Inherits-v0\nextends: classification_mini.yaml\n")
    assert read_values(tmp_path / "own.yaml")["backbone.name"] == "mini"
    assert gym.make(sd_gym.register_env(tmp_path / "own.yaml"), train_size=20).reset(seed=0)
    (tmp_path / "own.yaml").write_text("id: Own/Inherits-v0\nextends: classification_mini.yaml\nbackbone: mini\n")
    assert read_values(tmp_path / "own.yaml")["backbone.name"] == str((tmp_path / "mini").resolve())


@pytest.mark.parametrize(
    "text", ["reward: {epsilon: 1}\nsplit: test\nreward: {penalty: 3}", "{'a': 1, reward: 2, reward: 2}"]
)
def test_a_key_that_is_there_twice_is_told(text):
    with pytest.raises(ConfigError, match=r"the key 'reward' is given twice; keep one in .*, line \d"):
        parse_yaml(text, "own.yaml")


def test_the_files_of_the_package_are_nested():
    for file in map(config_of, registered_ids()):
        said = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert {*said} <= {*EnvConfig.model_fields, "extends"}, file
        assert all(isinstance(said[part], dict) for part in PARTS if part in said), file


def test_aliases_of_yaml_are_refused_at_once():
    """Nine lines of them make a list of a billion words."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    with pytest.raises(ConfigError, match=r"--set: not YAML \(the alias \*a0 is not supported; write its value"):
        parse_yaml("\n".join(lines), "the --set")


def test_an_unknown_key_is_a_type_error_too():
    for make in (gym.make, gym.make_vec):
        with pytest.raises(ConfigError, match=r"unknown config key 'frameskip'.*Known keys") as caught:
            make(ID, frameskip=4)
        assert isinstance(caught.value, TypeError)
        assert "unexpected keyword argument 'frameskip'" in str(caught.value)
