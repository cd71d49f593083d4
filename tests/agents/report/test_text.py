"""The sentences of a report never say more than the runs show."""

import pytest
from sd_gym.agents.report.collect import collect
from sd_gym.agents.report.compare import COLUMNS, cells, compare, markdown
from sd_gym.agents.report.text import (
    levels_table,
    overall_sentences,
    overall_tables,
    reproduction_table,
    results_table,
    verdict_sentences,
)

from tests.agents.report.conftest import ENV, OTHER, seeds


def words(folders):
    (task,) = collect(folders)
    return " ".join(verdict_sentences(task))


def test_on_too_few_instances_no_quality_is_said_to_be_kept(run):
    folders = seeds(run, "ppo", [0.3, 0.3], instances=298)
    (row,) = results_table(*collect(folders)).rows
    assert {"0 of 2", "too few instances to tell"} <= {*row}
    said = words(folders)
    assert "too few instances to tell: a verdict needs at least 299" in said
    assert "keeps the quality in" not in said
    assert "a verdict needs an epsilon above 0" in words([run("ppo", 8, epsilon=0.0)])
    assert "12 answers may be lost" in words([run("ppo", 9)])


def test_who_is_ahead_is_said_only_where_the_runs_tell(run):
    folders = seeds(run, "ppo", [0.3, 0.31, 0.32, 0.33, 0.34])
    assert "It is ahead of a2c" in words([*folders, *seeds(run, "a2c", [0.5, 0.51, 0.52, 0.53, 0.54])])
    near = [0.299, 0.312, 0.326, 0.334, 0.336]
    assert "It cannot be told apart from close" in words([*folders, *seeds(run, "close", near)])
    few = [*folders, *seeds(run, "few", [0.9] * 4)]
    assert "The runs are too few to compare it with few: that takes 5 runs each" in words(few)
    *_, probability, differ = overall_tables(collect(few))[1].rows[0]
    assert differ == "takes 5 runs each"
    assert "(" not in probability, "so few runs have no interval"


def test_controls_stand_in_the_first_sentence(run):
    folders = [*seeds(run, "ppo", [0.3, 0.31]), run("hull", flops=0.6), run("dense", 0, flops=1.0)]
    assert words(folders).startswith("FLOPs of the controls: hull 60.0% (kept in 1 of 1 runs), dense 100.0% (kept in 1")
    elsewhere = [run("ppo", flops=0.3, env=OTHER), run("hull", flops=0.7, env=OTHER)]
    assert "; the controls save: hull 35.0%." in overall_sentences(collect([*folders, *elsewhere]))[0]
    assert words(seeds(run, "ppo", [0.3, 0.31])).startswith("There are no controls here.")


def test_what_was_learned_stands_beside_what_was_selected(run):
    last = {"quality_difference": -0.019, "flops_ratio_with_policy": 0.25, "return": -0.5, "regret": 0.75}
    (task,) = collect([run("ppo", last=last, returned=0.125), run("hull", 7)])
    table = results_table(task)
    ppo, hull = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert (ppo["FLOPs, % of dense, as selected"], ppo["FLOPs, % of dense, as learned"]) == ("40.0", "25.0")
    assert ppo["quality against dense, points, as learned"] == "-1.90"
    assert (ppo["return, as selected"], ppo["return, as learned"], ppo["regret, as learned"]) == (
        "+0.125",
        "-0.500",
        "0.750",
    )
    assert hull["FLOPs, % of dense, as learned"] == "-"
    assert "regret, as selected" not in table.columns  # of no run it is known
    shown = {
        row["agent"]: dict(zip(COLUMNS, cells(row), strict=True))
        for row in compare([run.folder for _, run in task.runs])
    }
    assert shown["ppo"]["as learned: FLOPs (points)"] == "25.0% (-1.90)"
    assert (shown["ppo"]["return"], shown["ppo"]["regret"], shown["hull"]["return"]) == ("+0.125", "-", "-")


def test_an_agent_that_loses_quality_saves_nothing(run):
    careful, bold = seeds(run, "careful", [0.6] * 5), seeds(run, "bold", [0.1] * 5, kept=False, lost=0.02)
    said = words([*careful, *bold])
    assert "careful keeps the quality in all 5 runs" in said
    assert "It is ahead of bold" in said
    assert "No agent keeps the quality in all its runs; bold" in words(bold)


def test_who_is_said_to_save_most_keeps_the_quality_in_all_runs(run):
    once_lost = [run("bold", seed, flops=0.4, kept=seed < 4) for seed in range(5)]
    (task,) = collect([*once_lost, *seeds(run, "steady", [0.8] * 5)])
    assert (task.learned[0].name, task.best.name) == ("bold", "steady")
    said = " ".join(verdict_sentences(task))
    assert "steady keeps the quality in all 5 runs and runs 80.0% of the FLOPs (80.0 to 80.0)." in said
    assert "Of the agents that keep it in all runs, it saves most by its mean." in said


def test_what_a_run_does_not_tell_is_a_dash(run):
    (task,) = collect([run("mine", seed=None, steps=None)])
    assert reproduction_table(task).rows[0][1:3] == ["-", "-"]


def test_a_bar_in_a_name_begins_no_cell_in_markdown():
    assert markdown(["a|b"], [["c"]]).splitlines() == ["| a\\|b |", "| --- |", "| c |"]


def test_flops_against_difficulty_are_those_that_are_compared(run):
    folder = run("ppo")
    assert levels_table(*collect([folder])).rows == [["ppo", "30.0%", "70.0%"]]
    (row,) = compare([folder])
    assert (row["flops_easy"], row["flops_hard"]) == pytest.approx((0.3, 0.7))


def test_an_agent_that_does_not_beat_the_hull_is_said_to_have_learned_nothing_of_its_inputs(run):
    folders = seeds(run, "ppo", [0.4, 0.41, 0.42, 0.43, 0.44])
    nothing = "not shown to have learned anything about its inputs"
    assert nothing in words([*folders, *seeds(run, "hull", [0.3, 0.31])])
    assert "It is ahead of hull" in words([*folders, *seeds(run, "hull", [0.6] * 5, steps=7)])
    assert "no run of hull" in words(folders)
    alone = words([*seeds(run, "a2c", [0.4, 0.42]), run("hull", 7, flops=0.6)])
    assert "Every run of it saves more than the best mixture of masks (hull), 60.0%" in alone
    assert nothing not in alone
    alone = words([*seeds(run, "a2c", [0.4, 0.42]), run("hull", 8, flops=0.3, kept=False)])
    assert "hull) is not shown to keep the quality" in alone


def test_over_all_envs_agents_are_compared_that_ran_on_all(run):
    folders = [
        run(algo, seed, env=env, flops=flops)
        for env in (ENV, OTHER)
        for seed in range(5)
        for algo, flops in (("ppo", 0.3 + 0.01 * seed), ("a2c", 0.7))
    ]
    tasks = collect([*folders, run("once", flops=0.1)])
    said = overall_sentences(tasks)
    assert said[0].startswith("ppo saves most with the quality kept: 68.0%")
    assert said[1].startswith("It is ahead of a2c")
    assert len(said) == 2
    assert overall_sentences(tasks[:1]) == []


def test_who_saves_most_may_be_behind_in_most_envs(run):
    of_envs = {ENV: (0.1, 0.9), OTHER: (0.7, 0.65), "SD/Third-v0": (0.7, 0.65)}
    folders = [
        run(algo, seed, env=env, flops=ratio + 0.001 * seed)
        for env, ratios in of_envs.items()
        for seed in range(5)
        for algo, ratio in zip(("bold", "steady"), ratios, strict=True)
    ]
    said = overall_sentences(collect(folders))
    assert said[0].startswith("bold saves most")
    assert said[1] == "It is behind steady: a run of bold is better with a probability of 33% (33% to 33%)."
