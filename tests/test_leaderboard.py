"""The leaderboard: what was played again becomes an entry, and what is none is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from sd_gym.agents.experiment.replay import ReplayError
from sd_gym.agents.experiment.verdict import Verdict
from sd_gym.agents.report.leaderboard import Entry, add, as_csv, entries, read_leaderboard, table_hash
from typer.testing import CliRunner

import sd_gym
from sd_gym.cli import app
from sd_gym.envs.config import load_config
from sd_gym.envs.exact import outcome, regret, static_regret
from sd_gym.envs.shared import shared_core
from sd_gym.envs.table import table_folder
from sd_gym.policy import DecisionPolicy
from sd_gym.registration import config_of, shipped_tables

ENV = "SD/Summarization-Mini-Table-v0"
COMMITTED = Path(__file__).parents[1] / "docs" / "leaderboard.csv"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        sd_gym.train(ENV, "hash", folder / f"hash-{seed}", steps=64, seed=seed)
    sd_gym.train(ENV, "ppo", folder / "ppo", steps=256)
    sd_gym.train(ENV, "dense", folder / "dense", steps=64)
    return folder


def test_the_committed_entries_are_of_the_tables_in_the_package():
    """Whoever changes a table has to make its entries again."""
    found = read_leaderboard(COMMITTED)
    assert found
    assert COMMITTED.read_text() == as_csv(sorted(found, key=lambda one: one.rank))
    for entry in found:
        assert entry.env in shipped_tables()
        assert entry.table == table_hash(table_folder(shipped_tables()[entry.env])), entry


def test_an_entry_says_what_the_runs_reached(runs):
    found = {one.algorithm: one for one in entries(runs.iterdir(), "A. Name", "https://example.org/agent@1")}
    assert {name: one.decisions for name, one in found.items()} == {"hash": 0, "dense": 0, "ppo": 256}
    entry = found["hash"]
    results = [json.loads((runs / f"hash-{seed}" / "result.json").read_text()) for seed in (0, 1)]
    assert (entry.env, entry.seeds) == (ENV, 2)
    assert (entry.who, entry.code) == ("A. Name", "https://example.org/agent@1")
    flops = [result["flops_ratio_with_policy"] for result in results]
    assert (entry.flops_ratio, entry.worst_flops_ratio) == pytest.approx((np.mean(flops), max(flops)), abs=1e-5)
    worst = min(results, key=lambda result: result["quality_difference"])
    came = (entry.worst_difference, entry.worst_low, entry.worst_high)
    assert came == pytest.approx((worst["quality_difference"], *worst["quality_difference_interval"]), abs=1e-5)
    split = shared_core(load_config(config_of(ENV), {})).split("test")
    policies = [DecisionPolicy.load(runs / f"hash-{seed}") for seed in (0, 1)]
    lost = np.mean([regret(split, policy.decide).mean() for policy in policies])
    assert entry.regret_oracle == pytest.approx(lost, abs=1e-5)
    assert entry.regret_static == pytest.approx(lost - static_regret(split), abs=1e-5)
    assert entry.quality_difference == pytest.approx(
        np.mean([one.quality - one.quality_ref for one in (outcome(split, policy.decide) for policy in policies)]),
        abs=1e-5,
    )
    assert (found["dense"].verdict, found["dense"].quality_difference) == (Verdict.KEPT, 0)
    assert entry.verdict == Verdict.NOT_SHOWN


def test_entries_are_written_best_first_and_replaced(runs, tmp_path):
    file = tmp_path / "leaderboard.csv"
    asked = ["leaderboard", str(runs / "hash-0"), str(runs / "dense"), "--who", "A. Name", "--output", str(file)]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    first = read_leaderboard(file)
    assert {one.algorithm for one in first} == {"hash", "dense"}
    assert all(line in done.output for line in file.read_text().splitlines())
    assert CliRunner().invoke(app, asked).exit_code == 0
    assert read_leaderboard(file) == first
    dense = next(one for one in first if one.algorithm == "dense")
    assert dense.verdict == Verdict.KEPT
    others = {"better": (Verdict.KEPT, 0.3), "best": (Verdict.KEPT, 0.2), "cheap": (Verdict.NOT_SHOWN, 0.1)}
    made = {name: dict(zip(("verdict", "flops_ratio"), came, strict=True)) for name, came in others.items()}
    add(file, [dense.model_copy(update={"algorithm": name, **came}) for name, came in made.items()])
    assert [one.algorithm for one in read_leaderboard(file)] == ["best", "better", "dense", "cheap", "hash"]


def test_what_is_no_entry_is_refused(runs, full_table, tmp_path):
    def refused(folder, error, words):
        with pytest.raises(error, match=words):
            entries([folder], "A. Name")

    sd_gym.train("SD/Table-v0", "dense", tmp_path / "other", table=full_table)
    refused(tmp_path / "other", ValueError, "has no table in the package; the leaderboard is of SD/")
    sd_gym.train(ENV, "dense", tmp_path / "lax", epsilon=0.5)
    refused(tmp_path / "lax", ValueError, r"the leaderboard has reward\.epsilon 0\.01 of SD/.*, got 0\.5")
    sd_gym.train(ENV, "dense", tmp_path / "own", table=full_table)
    refused(tmp_path / "own", ValueError, "the leaderboard has table 'tables/summarization-mini'")
    better = shutil.copytree(runs / "hash-0", tmp_path / "better")
    result = json.loads((better / "result.json").read_text())
    (better / "result.json").write_text(json.dumps({**result, "flops_ratio_with_policy": 0.01}))
    refused(better, ReplayError, "flops_ratio_with_policy is 0.01 there")


def test_a_damaged_leaderboard_is_told(tmp_path):
    file = tmp_path / "leaderboard.csv"
    add(file, [Entry.model_validate(dict.fromkeys(Entry.model_fields, "1") | {"decisions": 12345})])
    file.write_text(file.read_text().replace("12345", "many"))
    with pytest.raises(ValueError, match=r"leaderboard\.csv, line 2: decisions: "):
        read_leaderboard(file)
