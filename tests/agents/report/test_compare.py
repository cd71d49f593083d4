"""Only runs that differ in nothing but their seed are seeds of one agent, and each counts once."""

import json
import shutil

import pytest
from rich.console import Console
from sd_gym.agents.report.collect import collect
from sd_gym.agents.report.compare import markdown
from sd_gym.agents.report.terminal import comparison_tables, fit
from typer.testing import CliRunner

import sd_gym
from sd_gym.cli import app

CUSTOM = "SD/Classification-Custom-v0"


@pytest.fixture
def run(reviews, tiny_backbone, tmp_path):
    """Makes a run, by default of the agent ``random``."""

    def make(name, seed=0, steps=1, algo="random", **settings):
        settings = {"dataset": str(reviews), "backbone": str(tiny_backbone), **settings}
        sd_gym.train(CUSTOM, algo, tmp_path / name, seed=seed, steps=steps, **settings)
        return tmp_path / name

    return make


def agents(folders):
    return {row["agent"]: row["seeds"] for row in sd_gym.compare(folders)}


def test_what_differs_is_a_row_of_its_own_and_its_name_says_what(run, reviews, tiny_backbone, tmp_path):
    other_data, other_backbone = tmp_path / "other.jsonl", tmp_path / "other-backbone"
    shutil.copytree(tiny_backbone, other_backbone)
    lines = reviews.read_text().splitlines()
    other_data.write_text("\n".join(lines[:30]))
    first = [run("first", 0), run("second", 1)]
    assert agents(first) == {"random": 2}
    (row,) = sd_gym.compare(first)
    told = json.loads((first[0] / "result.json").read_text())["data"]["test"]
    assert row["test_rows"] == f"4, hash {told['hash']}"
    changed = {
        "reward.epsilon": run("strict", epsilon=0.5),
        "rate": run("bold", rate=0.6),
        "steps": run("long", steps=5),
        "data.dataset": run("elsewhere", dataset=str(other_data)),
        "backbone.name": run("tuned", backbone=str(other_backbone)),
    }
    for key, folder in changed.items():
        found = agents([*first, folder])
        assert sorted(found.values()) == [1, 2], key
        assert all(f"({key} " in name or f", {key} " in name for name in found), key


def test_names_have_one_line(run):
    prompts = "{source}\nLabel:", "{source} Label:", "{source}\\nLabel:"
    found = agents([run(f"run-{number}", prompt=prompt) for number, prompt in enumerate(prompts)])
    assert sorted(found.values()) == [1, 1, 1]
    assert not any("\n" in name for name in found)
    assert markdown(["a"], [["b\n|<c"]]) == "| a |\n| --- |\n| b \\|&lt;c |"


@pytest.mark.parametrize(
    ("key", "value"), [("reward.epsilon", 0.5), ("quality.kind", "likelihood"), ("backbone.max_source_length", 8)]
)
def test_names_of_all_agents_say_what_they_are_judged_by_if_that_differs(run, key, value):
    first = run("first")
    assert agents([first, run("same", algo="hash")]) == {"hash": 1, "random": 1}
    found = agents([first, run("other", algo="hash", **{key.replace("quality.kind", "quality"): value})])
    assert all(f"{key} " in name for name in found)
    assert len(collect([first, first.with_name("other")])) == 2


def test_rows_of_a_file_that_has_changed_are_no_seeds_of_one_agent(run, reviews):
    first = run("first")
    lines = reviews.read_text().splitlines()
    lines[9] = json.dumps({"text": "the room was not awful", "label": 1})  # of the test split
    reviews.write_text("\n".join(lines) + "\n")
    found = agents([first, run("second", 1)])
    assert len(found) == 2
    assert all(name.startswith("random (test data ") for name in found)


def test_one_folder_counts_once_by_whatever_path_and_it_says_so(run, tmp_path, monkeypatch):
    folder, other = run("first"), run("second", 1)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    given = [folder, "first", tmp_path / "second" / ".." / "first", tmp_path / "link", other]
    with pytest.warns(UserWarning, match=f"3 of the folders were given before; counted once: {folder}$"):
        assert agents(given) == {"random": 2}
    shown = CliRunner().invoke(app, ["compare", str(folder), str(tmp_path / "link")])
    assert "counted once" in shown.stderr
    assert " 1 " in shown.output


def test_a_copy_of_a_run_is_no_other_seed(run, tmp_path):
    folder = run("first")
    shutil.copytree(folder, tmp_path / "copy")
    with pytest.warns(UserWarning, match="copy is a copy of the run .*first"):
        assert agents([folder, tmp_path / "copy"]) == {"random": 1}


def test_runs_that_start_from_others_are_seeds_if_those_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def train(name, algo, **settings):
        sd_gym.train("SD/Classification-TREC-Table-v1", algo, name, steps=64, **settings)
        return tmp_path / name

    train("imitation-0", "imitation", epochs=1)
    train("imitation-1", "imitation", epochs=1, seed=1)
    train("weak", "imitation", epochs=2)
    seeds = [train(f"ppo-{seed}", "ppo", start=f"imitation-{seed}", seed=seed) for seed in (0, 1)]
    seeds.append(train("another-start", "ppo", start="imitation-1", seed=0))
    other = train("ppo-weak", "ppo", start="weak")
    train("again/imitation", "imitation", epochs=1)
    again = train("again/ppo", "ppo", start="again/imitation")
    monkeypatch.chdir("/")
    assert agents(seeds) == {"ppo from imitation": 3}
    with pytest.warns(UserWarning, match="again/ppo is a copy of the run .*ppo-0"):
        assert agents([*seeds, again]) == {"ppo from imitation": 3}
    sd_gym.evaluate("SD/Classification-TREC-Table-v1", seeds[0], output=tmp_path / "evaluated")
    with pytest.warns(UserWarning, match="evaluated is a copy of the run .*ppo-0"):
        assert agents([*seeds, tmp_path / "evaluated"]) == {"ppo from imitation": 3}
    found = agents([*seeds, other])
    assert sorted(found.values()) == [1, 3]
    assert all(name.startswith("ppo from imitation (start imitation, ") for name in found)


def test_rows_of_validation_in_the_test_are_told(run):
    with pytest.warns(UserWarning, match="overlap"):
        folder = run("first", splits={"validation": "train[-10:]", "test": "train[-6:]"}, overlap="allow")
    (row,) = sd_gym.compare([folder])
    assert row["agent"] == "random (6 of its 6 test rows in validation)"


def test_a_folder_of_runs_stands_for_its_runs(run, tmp_path):
    first, second = run("runs/random-0"), run("runs/deeper/random-1", 1)
    assert agents([tmp_path / "runs"]) == {"random": 2}
    assert agents([tmp_path / "runs" / "deeper", first]) == {"random": 2}
    with pytest.warns(UserWarning, match=f"1 of the folders were given before; counted once: {second}$"):
        assert agents([tmp_path / "runs", second]) == {"random": 2}


def test_a_comparison_fits_a_terminal_of_80_characters():
    cells = [
        "SD/Env-v0",
        "blind-ppo",
        "1000, hash c638061ae3259524",
        "92.8%",
        "-1.90 (-2.10, -3.49 to -0.70)",
        "-",
        "-",
    ]
    cells += ["85.8% (100.0%)", "61.0% (-17.25)", "-0.237", "2.598", "-5.61", "85% / 86%", "-", "171 to 237", "0 of 2"]
    console = Console(width=80)
    with console.capture() as printed:
        for table in comparison_tables([cells]):
            console.print(fit(table, Console(width=80)), crop=False)
    lines = printed.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert any("(-17.25)" in line for line in lines)
