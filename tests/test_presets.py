"""Presets: what is set on top of an agent's defaults, by env or by name."""

import json

import pytest
from sd_gym.agents.presets import BUNDLED, find_preset, read_presets
from sd_gym.agents.registry import agent_class
from typer.testing import CliRunner

import sd_gym
from sd_gym.cli import app

CUSTOM = "SD/Classification-Custom-v0"
OWN = f"hash:\n  {CUSTOM}:\n    rate: 0.4\n"
CASES = [(algo, name) for algo, named in read_presets(BUNDLED).items() for name in named]


@pytest.mark.parametrize(("algo", "name"), CASES)
def test_those_that_are_shipped_hold_what_differs_from_the_defaults_and_no_more(algo, name):
    settings, kind = read_presets(BUNDLED)[algo][name], agent_class(algo).Settings
    known, defaults = kind(**settings).model_dump(), kind().model_dump()
    assert {key for key in known if known[key] != defaults[key]} == set(settings)


def test_a_blind_agent_has_that_of_the_agent_where_it_has_none_of_its_own(tmp_path):
    (tmp_path / "own.yaml").write_text(f"ppo:\n  {CUSTOM}:\n    n_epochs: 2\n")
    found = find_preset(str(tmp_path / "own.yaml"), CUSTOM, "blind-ppo")
    assert found.settings == {"n_epochs": 2}
    assert find_preset("refine", CUSTOM, "blind-ppo") != find_preset("refine", CUSTOM, "ppo")
    assert find_preset("refine", CUSTOM, "dense") is None
    assert find_preset("env", CUSTOM, "ppo") is None


def test_the_one_of_an_env_is_taken_by_itself_told_and_recorded(reviews, tiny_backbone, tmp_path, monkeypatch):
    own = tmp_path / "own.yaml"
    own.write_text(OWN)
    settings = {"dataset": str(reviews), "backbone": str(tiny_backbone), "steps": 1}
    monkeypatch.setattr("sd_gym.agents.presets.BUNDLED", own)

    def trained(name, **more):
        sd_gym.train(CUSTOM, "hash", tmp_path / name, **settings, **more)
        config = json.loads((tmp_path / name / "config.json").read_text())
        return config["preset"], config["agent_settings"]["rate"]

    assert trained("by itself") == (CUSTOM, 0.4)
    assert trained("set", rate=0.3) == (CUSTOM, 0.3)
    assert trained("none", preset="none") == (None, 0.2)
    monkeypatch.undo()
    assert trained("nothing there") == (None, 0.2)
    assert trained("file", preset=str(own)) == (str(own), 0.4)
    pairs = ["--set", f"dataset={reviews}", "--set", f"backbone={tiny_backbone}", "--steps", "1"]
    options = ["--algo", "hash", "--preset", str(own), "--output", str(tmp_path / "told"), *pairs]
    result = CliRunner().invoke(app, ["train", CUSTOM, *options])
    assert result.exit_code == 0, result.output
    assert f"Preset {own} (rate 0.4)" in result.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hash:\n  x:\n    rat: 0.4\n", "unknown setting 'rat'"),
        ("hush:\n  x: {}\n", "did you mean 'hash'"),
        ("hash: 3\n", "hash: expected keys and values, got 3"),
        ("hash:\n  x: [1]\n", r"hash: x: expected keys and values, got \[1\]"),
        (OWN.replace("Custom", "Mini"), f"no preset '{CUSTOM}'; .* has presets for SD/Classification-Mini-v0"),
    ],
)
def test_a_file_that_is_none_says_where(text, message, tmp_path):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        find_preset(str(tmp_path / "own.yaml"), CUSTOM, "hash")


def test_a_preset_that_has_nothing_for_the_agent_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the preset refine has nothing for hash"):
        sd_gym.train(CUSTOM, "hash", tmp_path / "run", preset="refine")
    assert not (tmp_path / "run").exists()
