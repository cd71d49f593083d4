"""The recipes of CONTRIBUTING.md: each code block is executed as it stands, and what it makes is used."""

import re
from pathlib import Path

import gymnasium as gym
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import sd_gym
from sd_gym.backbones import heads
from sd_gym.switch import Switchboard, architectures
from tests.conftest import write_env

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RECIPES = {
    part.splitlines()[0]: blocks[0]
    for part in PAGE.split("\n## ")[1:]
    if (blocks := re.findall(r"```python\n(.*?)```", part, flags=re.DOTALL))
}
pytestmark = pytest.mark.usefixtures("own_names")


def follow(recipe):
    """The names that the recipe's code block defines."""
    names = {"__name__": "recipe"}
    exec(compile(RECIPES[recipe], f"CONTRIBUTING.md: {recipe}", "exec"), names)
    return names


def test_the_page_has_one_recipe_each_and_is_short():
    assert list(RECIPES) == ["A task family", "A head", "An algorithm", "An architecture", "An objective"]
    assert len(PAGE.split()) <= 900


def test_a_task_family(translation):
    follow("A task family")
    settings = {"task": "translation", "metric": "word-overlap", "quality": "metric", "max_source_length": 12}
    env = gym.make("SD/Summarization-Custom-v0", **settings, **translation, max_target_length=3)
    env.reset(seed=0)
    *_, info = env.step(env.action_space.sample() * 0)
    assert info["quality"] == info["quality_ref"]
    assert 0 <= info["quality"] <= 1


def test_a_head(tiny_backbone, monkeypatch):
    head = follow("A head")["SureHead"]
    monkeypatch.setattr(heads, "HEADS", (head, *heads.HEADS))
    model = AutoModelForSequenceClassification.from_pretrained(tiny_backbone)
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.4, 0.0, 0.0], [0.0, 2.0, 0.0]])
    found = heads.head_of(model)
    assert isinstance(found, head)
    assert found.exact(logits, torch.zeros(3, dtype=torch.long)).tolist() == [1.0, 0.0, 0.0]


def test_an_algorithm(reviews, tiny_backbone, tmp_path):
    follow("An algorithm")
    env_id = sd_gym.register_env(write_env(tmp_path, reviews, tiny_backbone))
    result = sd_gym.train(env_id, "untrained", tmp_path / "run", steps=300)
    assert result["history"]
    assert result["instances"] == 4


def test_an_architecture():
    before = dict(architectures._REGISTRY)
    try:
        follow("An architecture")
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        torch.manual_seed(0)
        config = AutoConfig.for_model("olmo2", vocab_size=40, num_key_value_heads=2, **sizes)
        model = AutoModelForCausalLM.from_config(config).eval()
        tokens = torch.randint(4, 40, (2, 5))
        with torch.no_grad():
            untouched = model(tokens).logits
            board = Switchboard(model)
            skip = torch.zeros(2, len(board), dtype=torch.long)
            with board.decide(skip):
                assert torch.equal(model(tokens).logits, untouched)
            skip[0] = 1
            with board.decide(skip):
                mixed = model(tokens).logits
        assert list(board.names) == [f"decoder.{n}.{kind}" for n in (0, 1) for kind in ("attention", "feed_forward")]
        assert not torch.allclose(mixed[0], untouched[0])
        torch.testing.assert_close(mixed[1], untouched[1])
    finally:
        architectures._REGISTRY.clear()
        architectures._REGISTRY.update(before)


def test_an_objective():
    follow("An objective")
    env = gym.make("SD/Classification-Mini-v0", objective="budget", train_size=20, validation_size=20, test_size=20)
    env.reset(seed=0)
    _, reward, *_ = env.step(env.action_space.sample() * 0)
    assert reward == pytest.approx(0.3 - 1.0)


def test_the_citation_names_the_version_and_the_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == sd_gym.__version__
    assert "2405.04513" in cited["references"][0]["url"]
