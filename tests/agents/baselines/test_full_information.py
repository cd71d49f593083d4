"""The learner that knows all outcomes."""

import gymnasium as gym
import pytest
from sd_gym.agents import make_agent
from sd_gym.agents.experiment.tabulation import write_references
from sd_gym.agents.report.compare import COLUMNS, cells, compare

import sd_gym
from sd_gym.envs.exact import REFERENCES
from sd_gym.files import read_json

TREC = "SD/Classification-TREC-Table-v1"


def test_it_is_ahead_of_the_hull_as_selected_and_results_say_how_far(tmp_path):
    results = {name: sd_gym.train(TREC, name, tmp_path / name) for name in ("full-information", "hull")}
    assert results["full-information"]["flops_ratio"] < results["hull"]["flops_ratio"] - 0.03
    assert results["full-information"]["normalised_score"] > results["hull"]["normalised_score"] + 0.3
    assert results["hull"]["normalised_score"] <= 0  # no coin is better than the hull in hindsight
    rows = compare([tmp_path / name for name in results])
    shown = {row["agent"]: dict(zip(COLUMNS, cells(row), strict=True))["score"] for row in rows}
    assert shown["hull"] == f"{results['hull']['normalised_score']:.2f}"


def test_references_come_with_a_table(tmp_path, table_source, full_table):
    env_id, settings = table_source
    folder = tmp_path / "table"
    sd_gym.tabulate(env_id, folder, decisions="random:12", references=True, **settings)
    assert read_json(folder / REFERENCES)["hull"] == write_references("SD/Table-v0", table=str(folder))["hull"]
    without = sd_gym.train("SD/Table-v0", "dense", tmp_path / "run", table=full_table)
    assert without["normalised_score"] is None


def test_only_a_table_has_all_outcomes(settings):
    env = gym.make_vec("SD/Classification-Custom-v0", num_envs=1, **settings).unwrapped
    with pytest.raises(ValueError, match="which only a table has"):
        make_agent("full-information", env)
