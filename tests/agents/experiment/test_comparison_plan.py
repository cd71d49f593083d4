"""The runs of a comparison, before any of them is trained."""

import shlex
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sd_gym.agents.experiment.comparison_plan import PlannedRun, plan_comparison

from sd_gym.cli.terminal import settings_of

CUSTOM = "SD/Classification-Custom-v0"
WORDS = st.one_of(
    st.sampled_from(["my reviews #1.jsonl", "Q: {question}", "no", "007", "1e3", "null", "*x", "ü", "", "a\\nb"]),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=9),
)
VALUES = st.one_of(
    WORDS,
    st.booleans(),
    st.none(),
    st.integers(-9, 9),
    st.floats(-1e9, 1e9),
    st.lists(st.integers(0, 3), max_size=2),
    WORDS.filter(bool).map(Path),
)


def test_the_plan_has_every_agent_and_control_with_the_same_seeds():
    runs = plan_comparison([CUSTOM], ["a2c", "ppo-from-imitation"], seeds=2, steps=9, output=Path("out"))
    first = [run.folder.name for run in runs if run.seed == 0]
    assert first == [
        *["a2c-0", "imitation-0", "ppo-from-imitation-0", "hull-0", "early-exit-0", "random-0", "hash-0", "dense-0"],
        "blind-a2c-0",
    ]
    second = [run.folder.name for run in runs if run.seed == 1]
    assert second == ["a2c-1", "imitation-1", "ppo-from-imitation-1", "blind-a2c-1"]  # all others are always the same
    assert {run.folder.parent for run in runs} == {Path("out/Classification-Custom")}
    assert {run.steps for run in runs} == {9}
    (warm,) = [run for run in runs if run.folder.name == "ppo-from-imitation-1"]
    assert warm.settings == {"start": Path("out/Classification-Custom/imitation-1")}


@pytest.mark.parametrize(
    ("algo", "start", "key"),
    [
        ("imitation", "static", "path"),
        ("imitation", "ppo", "start"),
        ("imitation", "blind-imitation", "path"),
        ("hull", "imitation", "path"),
        ("ppo", "static", "start"),
    ],
)
def test_an_agent_takes_masks_from_those_who_have_them_and_weights_from_others(algo, start, key):
    runs = plan_comparison([CUSTOM], [f"{algo}-from-{start}"], controls=False, seeds=1, output=Path("out"))
    assert runs[-1].settings == {key: Path(f"out/Classification-Custom/{start}-0")}


def test_an_id_with_the_module_is_the_plain_id():
    plans = [plan_comparison([env], ["ppo"], seeds=1) for env in (CUSTOM, f"sd_gym:{CUSTOM}")]
    assert plans[0] == plans[1]


def test_a_blind_agent_begins_with_what_sees_nothing_and_settings_go_to_who_has_them():
    runs = plan_comparison([CUSTOM], ["ppo-from-imitation"], seeds=1, settings={"n_steps": 8, "penalty": 3})
    by_name = {run.folder.name: run.settings for run in runs}
    assert by_name["blind-ppo-from-static-0"]["start"] == Path("runs/compare/Classification-Custom/static-0")
    assert by_name["blind-ppo-from-static-0"]["n_steps"] == 8
    assert by_name["static-0"] == {"penalty": 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"algos": ["pp0"]}, "did you mean 'ppo'"),
        ({"algos": ["ppo-from-statc"]}, "did you mean 'static'"),
        ({"algos": ["dense-from-static"]}, "dense cannot start from a run of static"),
        ({"algos": ["hull-from-ppo"]}, "hull cannot start from a run of ppo"),
        ({"envs": [CUSTOM, "SD/Clasification-Mini-v0"]}, "did you mean 'SD/Classification-Mini-v0'"),
        ({"settings": {"n_stepz": 3}}, "unknown setting 'n_stepz'"),
    ],
)
def test_what_is_wrong_with_a_name_is_told_before_anything_is_trained(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_comparison(**{"envs": [CUSTOM], "algos": ["ppo"], **arguments})


@given(st.dictionaries(st.sampled_from(["dataset", "prompt", "backbone"]), VALUES, min_size=1))
def test_the_command_of_a_run_gives_its_settings_again(settings):
    words = shlex.split(PlannedRun("SD/Env-v0", "ppo", Path("runs/a"), 10, 0, settings).command())
    pairs = [word for option, word in pairwise(words) if option == "--set"]
    assert settings_of(pairs) == {
        key: str(value) if isinstance(value, Path) else value for key, value in settings.items()
    }
