"""The tables in the package: envs like any other, which need no model, no data set and no path."""

import csv
import subprocess
import sys
import tomllib
import zlib
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from sd_gym.agents.experiment.replay import replay
from stable_baselines3 import PPO

import sd_gym
from sd_gym.envs.config import load_config
from sd_gym.envs.exact import REFERENCES, hull, normalised_score
from sd_gym.envs.sb3 import SwitchableVecEnv
from sd_gym.envs.shared import shared_core
from sd_gym.envs.table_files import read_table, table_folder
from sd_gym.files import read_json
from sd_gym.registration import CONFIG_FOLDER, config_of, shipped_tables
from tests.envs.conftest import called

SPLITS = ("train", "validation", "test")
AT_MOST = 12 * 10**6  # bytes that all tables together take in the wheel, which is compressed


@pytest.fixture(params=sorted(shipped_tables()))
def env_id(request):
    return request.param


def test_there_are_these():
    assert set(shipped_tables()) == {
        "SD/QuestionAnswering-QAMR-Table-v0",
        "SD/Classification-TREC-Table-v1",
        "SD/Classification-TREC-Staged-Table-v0",
        "SD/Classification-AGNews-Table-v1",
        "SD/Classification-SNLI-Table-v1",
        "SD/Summarization-Mini-Table-v0",
        "SD/Summarization-RNNLG-Table-v1",
    }


def test_folder_and_id_belong_together(env_id):
    """And every folder has an env."""
    folder = shipped_tables()[env_id]
    assert folder == f"tables/{config_of(env_id).stem.removesuffix('_table').replace('_', '-')}"
    there = {f"tables/{one.name}" for one in (CONFIG_FOLDER / "tables").iterdir()}
    assert there <= set(shipped_tables().values())


def test_it_is_small_complete_and_says_nothing_of_where_it_was_made(env_id):
    folder = table_folder(shipped_tables()[env_id])
    said = read_table(folder)
    assert said["pca"] is not None
    names = {"table.json", "projection.safetensors", "codebook.json"} if said["chosen"] else set()
    names |= {f"{split}.{kind}" for split in SPLITS for kind in ("json", "safetensors")}
    assert {one.name for one in folder.iterdir()} - {".lock"} >= names
    for split in SPLITS:
        assert said["splits"][split]["instances"] > 0
        assert set(said["splits"][split]["identity"]) == {"file", "part", "instances", "hash"}
        assert "/" not in said["splits"][split]["identity"]["file"]
    assert "/" not in said["env_config"]["backbone"]["name"]
    assert "/" not in said["env_config"]["data"]["dataset"]
    core = shared_core(load_config(config_of(env_id), {}))
    assert all(core.split(split).ids[0] == f"{split}-0" for split in SPLITS)


def test_together_they_are_small():
    files = [one for one in (CONFIG_FOLDER / "tables").rglob("*") if one.is_file()]
    assert 0 < sum(len(zlib.compress(one.read_bytes())) for one in files) <= AT_MOST


def test_its_references_are_at_its_epsilon_and_its_outcomes_are_packed(env_id):
    core = shared_core(load_config(config_of(env_id), {}))
    assert read_json(core.folder / REFERENCES)["losses"][-1] == core.config.reward.epsilon
    quality = core.split("train").tensors["quality"]
    packed = len(core.split("train").tensors["quality_values"]) == 2
    assert quality.itemsize <= 2  # an index of a value
    assert quality[0].nbytes == (-(-len(core.masks) // 8) if packed else len(core.masks) * quality.itemsize)


def test_a_wheel_holds_them():
    """Every file of the folder that is no code matches a pattern of the package's data."""
    setup = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["tool"]["setuptools"]
    root, covered = CONFIG_FOLDER, set()
    for package, patterns in setup["package-data"].items():
        if package.startswith("sd_gym.envs_configs"):
            below = root.joinpath(*package.split(".")[2:])
            covered |= {file for pattern in patterns for file in below.glob(pattern)}
    files = {one for one in root.rglob("*") if one.is_file() and one.suffix not in (".py", ".pyc")}
    left = {one.relative_to(root).as_posix() for one in files - covered if one.name != ".lock"}
    assert not left


def test_it_works_from_anywhere_without_torch(env_id, tmp_path):
    program = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'transformers', 'datasets', 'sklearn', 'scipy'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "import gymnasium as gym, sd_gym\n"
        f"env = gym.make({env_id!r})\n"
        "env.reset(seed=0)\n"
        "print(env.step(env.action_space.sample())[1])\n"
        f"envs = gym.make_vec({env_id!r}, num_envs=3, split='test')\n"
        "envs.reset(seed=0)\n"
        "envs.step(envs.action_space.sample())\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


def test_there_is_something_to_learn(env_id):
    """A mask that costs less and is as good, and more than that to be had by looking."""
    split = shared_core(load_config(config_of(env_id), {})).split("test")
    rows = np.arange(len(split))
    quality, flops = split.scoring.of_masks(rows), split.costs.of_masks(rows)
    keeps = quality.mean(axis=0) >= quality[:, 0].mean() - 0.01
    best = np.where(quality >= quality[:, :1], flops, np.inf).argmin(axis=1)
    assert flops[rows, best].mean() < flops.mean(axis=0)[keeps].min() < 1
    assert quality[rows, best].mean() >= quality[:, 0].mean()


def test_references_say_what_there_is_to_learn(env_id):
    """They are those of its test rows; the hull scores 0 and full information 1; two are negative controls."""
    core = shared_core(load_config(config_of(env_id), {}))
    said, test, epsilon = read_json(core.folder / REFERENCES), core.split("test"), core.config.reward.epsilon
    assert said["losses"] == [0, epsilon / 2, epsilon]
    assert said["hull"] == pytest.approx([hull(test).at(loss) for loss in said["losses"]])
    assert said["negative_control"] == any(name in env_id for name in ("QAMR", "SNLI"))
    for loss, masks, full, best in zip(*(said[key] for key in ("losses", *said["curves"])), strict=True):
        assert best < full
        if full >= masks:  # then there is no score
            assert said["negative_control"]
            continue
        assert normalised_score(core.folder, loss, masks) == pytest.approx(0)
        assert normalised_score(core.folder, loss, full) == pytest.approx(1)


def test_stable_baselines3_learns_on_it(env_id):
    env = SwitchableVecEnv(gym.make_vec(env_id, num_envs=8).unwrapped)
    model = PPO("MlpPolicy", env, n_steps=8, batch_size=32, device="cpu").learn(128)
    result = sd_gym.evaluate(env_id, model, "validation")
    assert 0 < result["flops_ratio"] <= shared_core(load_config(config_of(env_id), {})).highest_flops_ratio


def test_commands_take_it(env_id, tmp_path, monkeypatch):
    """Listed, trained on, evaluated, played again, compared; and a run does not say where the package is."""
    monkeypatch.chdir(tmp_path)

    assert f"{env_id} " in called("envs")
    called("train", env_id, "--algo", "ppo", "--steps", "256", "--output", "run")
    assert "decides the same again" in called("validate", "run")
    assert str(CONFIG_FOLDER) not in (tmp_path / "run" / "config.json").read_text()
    called("compare", env_id, "--algos", "ppo", "--no-controls", "--seeds", "1", "--steps", "256", "--output", "many")
    with (tmp_path / "run" / "instances.csv").open(newline="") as lines:
        assert len(list(csv.DictReader(lines))) == len(shared_core(load_config(config_of(env_id), {})).split("test"))
    assert replay(tmp_path / "run").split == "test"


def test_an_own_table_is_an_env_too(full_table, tmp_path):
    """Named in a YAML file, by a path from where that lies."""
    file = tmp_path / "mine.yaml"
    (tmp_path / "mine").symlink_to(full_table, target_is_directory=True)
    file.write_text("extends: table.yaml\nid: My/Reviews-Table-v0\ntable: mine\nepsilon: 0.25\n")
    assert sd_gym.register_env(file) == "My/Reviews-Table-v0"
    env = gym.make("My/Reviews-Table-v0")
    assert env.unwrapped.config.reward.epsilon == 0.25
    theirs = gym.make("SD/Table-v0", table=full_table, epsilon=0.25)
    np.testing.assert_array_equal(env.reset(seed=1)[0], theirs.reset(seed=1)[0])
    result = sd_gym.train("My/Reviews-Table-v0", "dense", tmp_path / "run")
    assert sd_gym.evaluate("My/Reviews-Table-v0", tmp_path / "run")["quality"] == result["quality"]
