"""The command line, as a user would call it."""

import json
import re

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from sd_gym.cli import app

pytestmark = pytest.mark.usefixtures("own_names")
runner = CliRunner()


def run(*arguments):
    return runner.invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("command", get_command(app).commands)
def test_help_has_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: sd-gym {command} " in result.output


def test_envs_lists_the_ids():
    output = run("envs").output
    assert "SD/Classification-Mini-v0" in output
    assert "SD/Summarization-Custom-v0" in output


def test_envs_describes_one_of_a_table_and_a_users_own(tmp_path):
    shown = run("envs", "SD/Classification-TREC-Table-v1").output
    assert "kind of answer that a question asks for" in shown
    for fact in ("instances    1,224 train", "epsilon      0.02", "decisions    4,096", "v1 "):
        assert fact in shown
    assert "requests     10000" in run("envs", "SD/Serving-TREC-Table-v0").output
    assert "unknown env 'nope'" in run("envs", "nope").output
    file = tmp_path / "own.yaml"
    file.write_text("# My reviews.\nid: My/Reviews-v0\nextends: classification.yaml\n")
    own = tmp_path / "own.py"
    own.write_text(f"import sd_gym\nsd_gym.register_env({str(file)!r})\n")
    shown = run("envs", "My/Reviews-v0", "--import", own).output
    assert "My reviews." in shown
    assert "data set     yours" in shown


def test_envs_reports_a_missing_table_in_its_row(tmp_path):
    (tmp_path / "own.yaml").write_text("id: My/Lost-v0\nextends: table.yaml\ntable: ./nowhere\n")
    own = tmp_path / "own.py"
    own.write_text(f"import sd_gym\nsd_gym.register_env({str(tmp_path / 'own.yaml')!r})\n")
    listed = run("envs", "--import", own)
    assert listed.exit_code == 0
    assert re.search(r"My/Lost-v0 +no table\.json in", listed.output)
    assert "SD/Classification-Mini-v0" in listed.output
    assert run("envs", "My/Lost-v0", "--import", own).exit_code == 2


def test_prepare_train_evaluate_compare(tmp_path, reviews, tiny_backbone, monkeypatch):
    monkeypatch.setattr("sd_gym.cli.terminal.console.width", 80)
    prepared = tmp_path / "prepared"
    arguments = ["--dataset", reviews, "--output", prepared, "--steps", 120, "--learning-rate", 0.003, "--rows", 1]
    result = run("prepare", "--backbone", tiny_backbone, *arguments)
    assert result.exit_code == 0, result.output
    report = json.loads((prepared / "preparation.json").read_text())
    assert report["quality"]["after"]["0.0"] == 1.0
    assert (prepared / "model.safetensors").exists()
    assert run("prepare", "--backbone", tiny_backbone, *arguments).exit_code == 2

    folder = tmp_path / "run"
    settings = ["--set", f"dataset={reviews}", "--set", f"backbone={prepared}", "--set", "penalty=4"]
    settings += ["--set", "max_source_length=7", "--set", "policy_rows=all"]
    options = ["--steps", 2000, "--output", folder]
    result = run("train", "SD/Classification-Custom-v0", "--algo", "a2c", *options, *settings)
    assert result.exit_code == 0, result.output
    assert "│ dense " in result.output
    assert max(len(line) for line in result.output.splitlines() if "│" in line) <= 80
    assert "different decisions used" in result.output
    assert "train: 32 instances, 32 of the 40 rows of train, from 0 to 37 of" in " ".join(result.output.split())

    result = run("evaluate", folder, "--split", "validation")
    assert result.exit_code == 0, result.output
    assert "validation split, 4 instances" in " ".join(result.output.split())
    result = run("evaluate", folder, "--set", "test_size=3")
    assert "test split, 3 instances" in " ".join(result.output.split())
    result = run("evaluate", folder, "--set", "select=true")
    assert "select is not a setting; leave it out" in " ".join(result.output.split())

    result = run("compare", folder, "--markdown")
    assert result.exit_code == 0, result.output
    assert "| SD/Classification-Custom-v0 | a2c | 4, hash" in result.output

    options = ["--steps", 256, "--output", tmp_path / "warm", "--set", f"start={folder}"]
    assert run("train", "SD/Classification-Custom-v0", "--algo", "a2c", *options, *settings).exit_code == 0
    result = run("compare", folder, tmp_path / "warm", "--markdown")
    assert "| SD/Classification-Custom-v0 | a2c from a2c | 4, hash" in result.output

    result = run("compare", folder, tmp_path / "warm")
    assert "SD/Classification-Custom-v0, dense quality" in result.output
    assert "…" not in result.output
    header = result.output.partition("───")[0].split()
    assert {"agent", "points", "FLOPs", "return", "masks", "kept"} <= {*header}, "columns are missing"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "SD/Clasification-Mini-v0"], "did you mean 'SD/Classification-Mini-v0'"),
        (["train", "SD/Classification-Mini-v0", "--algo", "pp0"], "did you mean 'ppo'"),
        (["train", "SD/Classification-Mini-v0", "--set", "epsilom=1"], "unknown setting 'epsilom'"),
        (["train", "SD/Classification-Mini-v0", "--set", "epsilon"], "expected key=value"),
        (["train", "SD/Classification-Custom-v0"], "'dataset' has no value"),
        (["train", "SD/Classification-Custom-v0", "--set", "dataset=./no.jsonl"], "'backbone' has no value"),
        (["train", "SD/Classification-TREC-Table-v1", "--set", "num_envs=1"], "at least 2 decisions per rollout"),
        (["evaluate", "nowhere"], "no config.json"),
        (["report", ".", "-o", "report.md"], "expected a page with the suffix .html"),
        (["evaluate", "nowhere", "--split", "dev"], "'dev' is not one of 'train'"),
        (["compare", "nowhere"], "no folder 'nowhere', and unknown env 'nowhere'"),
        (["compare", "."], "no result.json"),
        (["compare", ".", "SD/Classification-TREC-Tabel-v1"], "did you mean 'SD/Classification-TREC-Table-v1'"),
        (["prepare", "--backbone", "./no", "--dataset", "./no.jsonl", "--output", "out"], "no data at"),
    ],
)
def test_errors_say_what_to_do_and_exit_with_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join((result.output + result.stderr).split())
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "command",
    [
        ["tune", "SD/Table-v0", "--set", "seeds=3"],
        ["train", "SD/Table-v0", "--set", "seed=3"],
        ["tabulate", "SD/Table-v0", "--set", "jobs=3", "--output", "never"],
    ],
)
def test_an_option_is_not_a_setting(command):
    key = command[3].partition("=")[0]
    done = run(*command)
    assert done.exit_code == 2
    assert f"{key} is not a setting; use the option --{key}" in " ".join(done.output.split())
