"""The report: one page that needs nothing else, which never says more than the runs show."""

import csv
import io
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from sd_gym.agents.drawing.style import as_svg, figure, style
from sd_gym.agents.registry import agent_names, is_control, learning_agents
from sd_gym.agents.report.collect import collect, example_decisions
from sd_gym.agents.report.page import write_report
from sd_gym.agents.report.text import overall_sentences, results_table, verdict_sentences
from sd_gym.agents.runs.finished import read_run
from typer.testing import CliRunner

from sd_gym.cli import app

ENV, OTHER = "SD/Classification-Mini-v0", "SD/QuestionAnswering-Mini-v0"
SWITCHES = ["encoder.0.attention", "encoder.0.feed_forward", "encoder.1.attention", "encoder.1.feed_forward"]


def level(difficulty, instances, rate):
    means = {"quality": 0.99, "quality_ref": 0.995, "flops_ratio": 1 - rate}
    return {"difficulty": difficulty, "instances": instances, **means, "skip_rate": [rate] * len(SWITCHES)}


@pytest.fixture
def run(tmp_path):
    """Writes the folder of a run; the agent needs not be known."""

    def make(algo, seed=0, *, flops=0.4, lost=0.002, kept=True, env=ENV, instances=2000, epsilon=0.01, steps=100):
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        config = {
            "env": env,
            "algo": algo,
            "steps": steps,
            "seed": seed,
            "command": f"sd-gym train {env} --algo {algo}",
            "env_config": {"id": env, "task": "classification", "dataset": "x", "backbone": "mini", "epsilon": epsilon},
            "agent_settings": {},
            "versions": {"torch": "2.13.0"},
            "data": {"test": {"hash": f"rows{instances}"}},
            "weights": "abc123",
            "control": algo in agent_names() and is_control(algo),
        }
        result = {
            "split": "test",
            "instances": instances,
            "epsilon": epsilon,
            "quality": 0.995 - lost,
            "quality_ref": 0.995,
            "quality_difference": -lost,
            "quality_difference_interval": [-lost - 0.004, -lost + 0.004],
            "flops_ratio_with_policy": flops,
            "quality_kept": kept,
            "policy_flops_counted": True,
            "decisions_hash": "0",
            "verdict": "quality kept" if kept else "quality not shown to be kept",
            "by_difficulty": [level(1, instances - 12, 0.7), level(2, 12, 0.3)],
            "skip_rate": dict.fromkeys(SWITCHES, 0.6),
            "time": {},
            "decisions_used": 3,
            "history": [
                {"step": step, "quality": 0.99, "quality_ref": 0.995, "flops_ratio": flops + 10 / step}
                for step in (25, 50, 100)
            ],
            "data": {"test": {"hash": f"rows{instances}"}},
        }
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "result.json").write_text(json.dumps(result))
        lines = [
            "id,level,decision,quality,quality_ref,flops_ratio",
            "test-0,1,11010,1.0,1.0,0.4",
            "test-1,2,00010,0,1,0.8",
        ]
        (folder / "instances.csv").write_text("\n".join(lines) + "\n")
        return folder

    return make


def seeds(run, algo, flops, **values):
    return [run(algo, seed, flops=one, **values) for seed, one in enumerate(flops)]


def words(folders):
    (task,) = collect(folders)
    return " ".join(verdict_sentences(task))


@pytest.mark.parametrize("control", [name for name in agent_names() if name not in learning_agents()])
def test_a_control_is_never_the_best_agent(run, control):
    (task,) = collect([run(control, flops=0.1), run("ppo", flops=0.4)])
    assert [one.name for one in task.learned] == ["ppo"]
    assert f"{control} keeps the quality in" not in " ".join(verdict_sentences(task))


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.open, self.pictures = set(), [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        found = dict(attributes)
        self.addresses += [found[name] for name in ("href", "src", "xlink:href") if name in found]
        if tag == "svg":
            self.pictures.append(found["aria-label"])


def test_the_page_needs_nothing_else_and_begins_with_the_verdict(run, tmp_path):
    folders = [*seeds(run, "ppo", [0.3, 0.32, 0.31]), *seeds(run, "mine", [0.5, 0.52, 0.51]), run("static", flops=0.6)]
    page = tmp_path / "deep" / "report.html"
    shown = CliRunner().invoke(app, ["report", *map(str, folders), "-o", str(page)])
    assert shown.exit_code == 0, shown.output
    text = page.read_text()
    parsed = Page(text)
    assert not {"script", "link", "img", "iframe"} & parsed.tags
    assert all(address.startswith(("#", "data:")) for address in parsed.addresses)  # inside the page
    assert set(re.findall(r"https?://[^\"' )]*", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text
    assert text.index("ppo keeps the quality in all 3 runs") < text.index("<table") < text.index("<svg")
    assert len(parsed.pictures) == 7  # profiles, plane, curves, instances, and what each of three agents skips
    assert "sd-gym train SD/Classification-Mini-v0 --algo mine" in text
    for shown in ("2.13.0", "abc123", "rows2000"):
        assert shown in text


def test_ids_in_a_page_are_unique(run, tmp_path):
    """Or the clip paths of one picture cut another."""
    (page,) = write_report([*seeds(run, "ppo", [0.3, 0.4]), *seeds(run, "a2c", [0.3, 0.5])], tmp_path / "report.html")
    text = page.read_text()
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    used = {*re.findall(r'xlink:href="#([^"]*)"', text), *re.findall(r"url\(#([^)]*)\)", text)}
    assert used <= set(ids)
    assert text.count("<style") == 1  # one within a picture would count for all of the page


def test_a_picture_of_a_page_shows_all_that_the_figure_does():
    with style():
        made = figure(2)
        axes = made.subplots()
        axes.plot([0, 1 / 3, 1], [0.1234567, 1 / 3, 1], "o-", label="0.1234567 & <b>")
        axes.legend()
        plain = io.StringIO()
        made.savefig(plain, format="svg", transparent=True)
        light = as_svg(made, "some", 'said "so"')
    pictures = [ElementTree.fromstring(one) for one in (plain.getvalue(), light)]
    name = "{http://www.w3.org/2000/svg}"
    for kind in ("path", "use", "text", "clipPath"):
        counts = [len(list(one.iter(name + kind))) for one in pictures]
        assert counts[0] == counts[1] > 0
    shown = [[one.text for one in picture.iter(name + "text")] for picture in pictures]
    assert shown[0] == shown[1]
    assert "0.1234567 & <b>" in shown[1]
    first, second = ([one.attrib["d"].split() for one in picture.iter(name + "path")] for picture in pictures)
    for full, short in zip(first, second, strict=True):
        assert [word for word in full if word.isalpha()] == [word for word in short if word.isalpha()]
        numbers = [[float(word) for word in words if not word.isalpha()] for words in (full, short)]
        np.testing.assert_allclose(*numbers, atol=0.006)
    assert pictures[1].attrib["aria-label"] == 'said "so"'
    assert not re.search(r"<g>|font-family|<style", light)  # what the page says once, or nobody sees


def test_names_are_text(run, tmp_path):
    (page,) = write_report([run("<b>bold</b>")], tmp_path / "report.html")
    assert "b" not in Page(page.read_text()).tags
    assert "&lt;b&gt;bold" in page.read_text()


def test_the_same_is_there_as_markdown_csv_and_png(run, tmp_path):
    folders = seeds(run, "ppo", [0.3, 0.4])
    written = write_report(folders, tmp_path / "report.html", also=True)
    assert {file.suffix for file in written} == {".html", ".md", ".csv", ".png"}
    with (tmp_path / "report.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [float(row["flops_ratio_with_policy"]) for row in rows] == [0.3, 0.4]
    assert [row["seed"] for row in rows] == ["0", "1"]
    text = (tmp_path / "report.md").read_text()
    pictures = re.findall(r"\]\(([^)]*\.png)\)", text)
    assert pictures
    assert all((tmp_path / picture).exists() for picture in pictures)
    assert "ppo keeps the quality in all 2 runs and runs 35.0% of the FLOPs" in text


def test_on_too_few_instances_no_quality_is_said_to_be_kept(run):
    folders = seeds(run, "ppo", [0.3, 0.3], instances=298)
    (row,) = results_table(*collect(folders)).rows
    assert row[4:6] == ["0 of 2", "too few instances to tell"]
    said = words(folders)
    assert "too few instances to tell: a verdict takes at least 299" in said
    assert "keeps the quality in" not in said
    assert "a verdict takes that some quality may be lost" in words([run("ppo", 8, epsilon=0.0)])
    assert "12 answers may be lost" in words([run("ppo", 9)])


def test_who_is_ahead_is_said_only_where_the_runs_tell(run):
    folders = seeds(run, "ppo", [0.3, 0.31, 0.32, 0.33])
    assert "It is ahead of a2c" in words([*folders, *seeds(run, "a2c", [0.5, 0.51, 0.52, 0.53])])
    near = [0.299, 0.312, 0.326, 0.334]
    assert "It cannot be told apart from close" in words([*folders, *seeds(run, "close", near)])
    assert "Against single nothing can be told" in words([*folders, run("single", flops=0.9)])


def test_an_agent_that_loses_quality_saves_nothing(run):
    careful, bold = seeds(run, "careful", [0.6, 0.6]), seeds(run, "bold", [0.1, 0.1], kept=False, lost=0.02)
    said = words([*careful, *bold])
    assert "careful keeps the quality in all 2 runs" in said
    assert "It is ahead of bold" in said
    assert "No agent keeps the quality in all its runs; bold" in words(bold)


def test_an_agent_that_does_not_beat_the_static_masks_is_said_to_have_learned_nothing_of_its_inputs(run):
    folders = seeds(run, "ppo", [0.4, 0.42])
    nothing = "not shown to have learned anything about its inputs"
    assert nothing in words([*folders, *seeds(run, "static", [0.3, 0.31])])
    assert "It is ahead of static" in words([*folders, *seeds(run, "static", [0.6, 0.61], instances=2000, steps=7)])
    assert "no run of static masks" in words(folders)
    alone = words([*seeds(run, "a2c", [0.4, 0.42]), run("static", 7, flops=0.6)])
    assert "Every run of it saves more than the best static mask, 60.0%" in alone
    assert nothing not in alone


def test_other_test_rows_are_another_task(run):
    tasks = collect([run("ppo"), run("a2c"), run("ppo", 1, instances=500)])
    assert sorted(len(task.agents) for task in tasks) == [1, 2]
    assert all(task.name.startswith(f"{ENV} (test rows rows") for task in tasks)


def test_over_all_envs_agents_are_compared_that_ran_on_all(run):
    folders = [
        run(algo, seed, env=env, flops=flops)
        for env in (ENV, OTHER)
        for seed in (0, 1, 2)
        for algo, flops in (("ppo", 0.3 + 0.01 * seed), ("a2c", 0.7))
    ]
    tasks = collect([*folders, run("once", flops=0.1)])
    said = overall_sentences(tasks)
    assert said[0].startswith("ppo saves most with the quality kept: 69.0%")
    assert said[1].startswith("It is ahead of a2c")
    assert len(said) == 2
    assert overall_sentences(tasks[:1]) == []


def test_who_saves_most_may_be_behind_in_most_envs(run):
    of_envs = {ENV: (0.1, 0.9), OTHER: (0.7, 0.65), "SD/Third-v0": (0.7, 0.65)}
    folders = [
        run(algo, seed, env=env, flops=ratio + 0.001 * seed)
        for env, ratios in of_envs.items()
        for seed in (0, 1, 2)
        for algo, ratio in zip(("bold", "steady"), ratios, strict=True)
    ]
    said = overall_sentences(collect(folders))
    assert said[0].startswith("bold saves most")
    assert said[1] == "It is behind steady: a run of bold is better with a probability of 33% (33% to 33%)."


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


def test_single_instances_are_of_each_level_and_of_what_was_lost(run):
    first, second = example_decisions(read_run(run("ppo")))
    assert (first.label, first.skip.tolist(), first.flops) == ("test-0, level 1", [True, True, False, True], 0.4)
    assert (first.lost, second.lost) == (False, True)
    other = run("a2c")
    config = json.loads((other / "config.json").read_text())
    config["env_config"]["token_shares"] = [0.0, 0.25]
    (other / "config.json").write_text(json.dumps(config))
    text = (other / "instances.csv").read_text()
    (other / "instances.csv").write_text(text.replace("11010", "11011"))
    assert [one.dropped for one in example_decisions(read_run(other))] == [0.25, 0.0]


def test_folders_that_hold_no_run_are_said(tmp_path):
    shown = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert shown.exit_code == 2
    assert "expected finished runs" in shown.stderr
