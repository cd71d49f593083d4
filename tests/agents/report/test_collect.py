"""Runs of the same env and the same test rows are one task of a report."""

import json
from contextlib import suppress
from copy import deepcopy
from functools import reduce
from operator import getitem

import numpy as np
import pytest
from sd_gym.agents.registry import agent_names, learning_agents
from sd_gym.agents.report.collect import collect, example_decisions
from sd_gym.agents.report.compare import cells, compare
from sd_gym.agents.report.text import levels_table, results_table, verdict_sentences, versions_table
from sd_gym.agents.runs.finished_runs import finished_runs

from tests.agents.report.conftest import ENV


@pytest.mark.parametrize("control", [name for name in agent_names() if name not in learning_agents()])
def test_a_control_is_never_the_best_agent(run, control):
    (task,) = collect([run(control, flops=0.1), run("ppo", flops=0.4)])
    assert [one.name for one in task.learned] == ["ppo"]
    assert f"{control} keeps the quality in" not in " ".join(verdict_sentences(task))


def test_other_test_rows_are_another_task(run):
    tasks = collect([run("ppo"), run("a2c"), run("ppo", 1, instances=500)])
    assert sorted(len(task.agents) for task in tasks) == [1, 2]
    assert all(task.name.startswith(f"{ENV} (test rows rows") for task in tasks)


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_a_result_that_was_computed_again_does_not_replace_its_run(run, order):
    folder, again = run("ppo"), run("ppo")
    result = json.loads((again / "result.json").read_text())
    (again / "result.json").write_text(json.dumps({**result, "history": []}))
    with pytest.warns(UserWarning, match=f"counted once: {again} is a copy of the run {folder}"):
        (task,) = collect([folder, again][order])
    assert [one.folder for one in task.learned[0].runs] == [folder]


def test_areas_are_between_dense_and_nothing(run):
    (task,) = collect(
        [
            run("dense", flops=1.0, lost=0.0),
            run("ppo", flops=0.4, lost=0.01),
            run("bad", flops=0.1, lost=0.05, kept=False),
        ]
    )
    areas = {one.name: one.areas.tolist() for one in task.agents}
    assert areas["dense"] == [0]
    assert areas["bad"] == [0]
    np.testing.assert_allclose(areas["ppo"], [0.6 * 0.8])
    assert results_table(task).rows[0][0] == "ppo"


def test_a_policy_that_costs_more_than_dense_is_not_behind_one_that_fails(run):
    (task,) = collect([run("dense", flops=1.0001, lost=0.0), run("bad", flops=0.1, lost=0.05, kept=False)])
    assert [one.score.tolist() for one in task.agents] == [[0], [0]]


def test_single_instances_are_of_each_level_and_of_what_was_lost(run):
    first, second = example_decisions(finished_runs([run("ppo")])[0])
    assert (first.label, first.skip.tolist(), first.flops) == ("test-0, level 1", [True, True, False, True], 0.4)
    assert (first.lost, second.lost) == (False, True)
    other = run("a2c")
    config = json.loads((other / "config.json").read_text())
    config["env_config"]["token_shares"] = [0.0, 0.25]
    (other / "config.json").write_text(json.dumps(config))
    text = (other / "instances.csv").read_text()
    (other / "instances.csv").write_text(text.replace("11010", "11011"))
    assert [one.dropped for one in example_decisions(finished_runs([other])[0])] == [0.25, 0.0]
    assert not first.went_on
    lines = (other / "instances.csv").read_text().splitlines()
    text = "\n".join([f"{lines[0]},goes_on", f"{lines[1]},True", *(f"{line},False" for line in lines[2:])])
    (other / "instances.csv").write_text(text)
    assert [one.went_on for one in example_decisions(finished_runs([other])[0])] == [True, False]


@pytest.mark.parametrize(
    ("before", "after", "encoding"),
    [
        ("id,", "id,", "utf-16"),
        ("level,", "", "utf-8"),
        ("11010", "1101", "utf-8"),  # a spreadsheet drops zeros
        ("11010", "11019", "utf-8"),
        ("0.4", "40%", "utf-8"),
        ("test-0,", "t" * 200_000, "utf-8"),
    ],
)
def test_damaged_instances_are_named(run, before, after, encoding):
    file = (folder := run("ppo")) / "instances.csv"
    text = file.read_text()
    file.write_text(text, encoding="utf-8-sig")
    assert len(example_decisions(finished_runs([folder])[0])) == 2
    assert before in text
    file.write_text(text.replace(before, after), encoding=encoding)
    with pytest.raises(ValueError, match=rf"{file} is damaged: expected a line per instance"):
        example_decisions(finished_runs([folder])[0])


def _fields(values, path=()):
    """The path of each value in nested JSON; of a list, that of its first item."""
    inner = values.items() if isinstance(values, dict) else enumerate(values[:1]) if isinstance(values, list) else ()
    for key, value in inner:
        yield (*path, key)
        yield from _fields(value, (*path, key))


@pytest.mark.parametrize("name", ["config.json", "result.json"])
def test_a_damaged_run_is_an_error_of_a_line_or_is_still_compared(run, name):
    folder = run("ppo", last={"quality_difference": -0.01, "flops_ratio_with_policy": 0.5})
    values = json.loads((folder / name).read_text()) | {"time": {"32": {"time_ratio": 0.5, "dense_by_length": 0.9}}}
    values["highest_quality"] = 1.0
    for path in _fields(values):
        for broken in (None, "x", []):
            changed = deepcopy(values)
            of_key = reduce(getitem, path[:-1], changed)
            of_key[path[-1]] = broken
            (folder / name).write_text(json.dumps(changed))
            with suppress(ValueError, FileNotFoundError):
                (task,) = collect([folder])
                _ = results_table(task), levels_table(task), versions_table([task]), verdict_sentences(task)
                _ = [cells(row) for row in compare([folder])]
