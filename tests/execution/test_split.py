"""A part of a split is what the split is."""

import json
from operator import eq

import gymnasium as gym
import numpy as np
import pytest

from sd_gym.backbones import load_backbone
from sd_gym.config import ConfigError
from sd_gym.errors import DataError
from tests.conftest import save
from tests.envs.conftest import regressor
from tests.execution.conftest import SMALL, Drawn


def test_an_unseen_part_of_a_split_is_what_the_split_is():
    core = gym.make("SD/QuestionAnswering-Mini-v0", **SMALL).unwrapped.core
    split, rows = core.split("test"), np.array([7, 3, 3, 30])
    part, decisions = split.uncached(rows), Drawn(core).decide(rows)
    everything = np.arange(4)
    np.testing.assert_allclose(core.observe(part, everything), core.observe(split, rows), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(part.costs.flops(everything, decisions), split.costs.flops(rows, decisions))
    np.testing.assert_array_equal(part.tokens.scores, split.tokens.scores[rows])
    np.testing.assert_array_equal(part.scoring.run(everything, decisions), split.scoring.run(rows, decisions))


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("Classification", {}),
        ("QuestionAnswering", {}),
        ("Summarization", {}),
        ("Summarization", {"max_target_length": 5}),  # which cuts most texts
    ],
)
def test_agreement_is_with_the_dense_answer(task, settings):
    core, other = (
        gym.make(f"SD/{task}-Mini-v0", **SMALL, **settings, **more).unwrapped.core
        for more in ({"quality": "agreement"}, {})
    )
    split, labelled = core.split("test"), other.split("test")
    rows, decisions = np.arange(len(split)), Drawn(core).decide(np.arange(len(split)))
    dense = labelled.passes.answers(rows, 0 * decisions)
    agreed = [said == one for said, one in zip(labelled.passes.answers(rows, decisions), dense, strict=True)]
    np.testing.assert_array_equal(split.scoring.run(rows, decisions), agreed)
    assert split.scoring.run(rows, 0 * decisions).all()
    assert 0 < np.mean(agreed) < 1
    assert split.scoring.metrics(rows, decisions) == {}


def test_an_end_that_is_forced_is_not_compared(monkeypatch):
    settings = load_backbone("mini", "cpu").model.generation_config
    monkeypatch.setattr(settings, "forced_eos_token_id", settings.eos_token_id)  # as BART's is
    options = {**SMALL, "test_size": 23, "max_target_length": 5}
    core = gym.make("SD/Summarization-Mini-v0", **options, quality="agreement").unwrapped.core
    assert core.split("test").scoring.run(np.arange(23), np.zeros((23, len(core.nvec)), dtype=np.int64)).all()


def test_a_first_token_that_is_forced_is_not_compared(monkeypatch):
    backbone = load_backbone("mini", "cpu")
    (forced,) = backbone.tokenizer("good", add_special_tokens=False).input_ids
    monkeypatch.setattr(backbone.model.generation_config, "forced_bos_token_id", forced)  # as BART's and mBART's are
    options = {**SMALL, "test_size": 21, "max_target_length": 5}
    split = gym.make("SD/Summarization-Mini-v0", **options, quality="agreement").unwrapped.core.split("test")
    rows = np.arange(21)
    for name in ("encoder", "decoder"):  # skipped, so that texts differ
        decisions = np.zeros((21, len(split.backbone.board) + 1), dtype=np.int64)
        decisions[:, [n for n, switch in enumerate(split.backbone.board.names) if switch.startswith(name)]] = 1
        nothing = np.zeros_like(decisions)
        texts = zip(split.passes.answers(rows, decisions), split.passes.answers(rows, nothing), strict=True)
        np.testing.assert_array_equal(split.scoring.run(rows, decisions), [one == dense for one, dense in texts])
    assert split.scoring.run(rows, nothing).all()


def test_a_first_token_that_is_forced_counts_in_a_likelihood(monkeypatch):
    def likelihood(size):
        options = {**SMALL, "test_size": size, "quality": "likelihood"}
        core = gym.make("SD/Summarization-Mini-v0", **options).unwrapped.core
        split, rows = core.split("test"), np.arange(18)
        return split.scoring.run(rows, Drawn(core).decide(rows)), split.passes.inputs(rows)["labels"][:, 0]

    free, first = likelihood(18)
    settings = load_backbone("mini", "cpu").model.generation_config
    monkeypatch.setattr(settings, "forced_bos_token_id", int(first[0]))
    np.testing.assert_array_equal(likelihood(20)[0], free)


def test_what_cannot_be_measured_is_refused_at_once():
    with pytest.raises(ConfigError, match=r"agreement compares greedy texts; expected num_beams=1, got 2"):
        gym.make("SD/Summarization-Mini-v0", **SMALL, quality="agreement", num_beams=2)
    with pytest.raises(ConfigError, match=r"'mini' gives a text, got 'f1', .*; expected accuracy"):
        gym.make("SD/Classification-Mini-v0", **SMALL, metric="f1")


@pytest.mark.parametrize("quality", ["exact_match", "agreement"])
def test_texts_that_are_not_plain_greedy_are_not_compared_in_one_pass(quality, monkeypatch):
    settings = load_backbone("mini", "cpu").model.generation_config
    monkeypatch.setattr(settings, "no_repeat_ngram_size", 3)
    options = {**SMALL, "test_size": 19}
    with pytest.raises(ConfigError, match=f"{quality} compares plain greedy.*no_repeat_ngram_size=3; remove that"):
        gym.make("SD/Summarization-Mini-v0", **options, quality=quality).unwrapped.core.split("test")
    gym.make("SD/Summarization-Mini-v0", **options, quality="likelihood").unwrapped.core.split("test")


def test_the_accuracy_of_classes_that_are_written():
    core = gym.make("SD/Classification-Mini-v0", **SMALL, quality="likelihood", metric="accuracy").unwrapped.core
    split, rows = core.split("test"), np.arange(40)
    decisions = Drawn(core).decide(rows)
    answers, right = split.passes.answers(rows, decisions), [instance.target for instance in split.instances]
    assert split.scoring.metrics(rows, decisions) == {"accuracy": pytest.approx(np.mean([*map(eq, answers, right)]))}


def test_questions_without_answers_are_learned_from_on_an_env_that_needs_them(tmp_path):
    row = {"context": "the food was good", "question": "what was good?"}
    for split in ("train", "validation", "test"):
        lines = [json.dumps({**row, "id": f"{split}-{number}"}) + "\n" for number in range(4)]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    options = {"dataset": str(tmp_path), "backbone": "mini", "unanswerable": False, "overlap": "allow"}
    core = gym.make("SD/QuestionAnswering-Custom-v0", **options, quality="agreement").unwrapped.core
    assert core.split("train").scoring.run(np.arange(4), np.zeros((4, len(core.nvec)), dtype=np.int64)).all()


def test_agreement_needs_no_labels(tmp_path):
    for split in ("train", "validation", "test"):
        lines = [json.dumps({"text": f"{split} {number} good"}) + "\n" for number in range(4)]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    options = {"dataset": str(tmp_path), "backbone": "mini"}
    with pytest.raises(DataError, match="no field 'document'"):
        gym.make("SD/Summarization-Custom-v0", **options, quality="agreement")
    columns = {"document": "text"}
    with pytest.raises(DataError, match="no field 'summary'"):
        gym.make("SD/Summarization-Custom-v0", **options, columns=columns)
    core = gym.make("SD/Summarization-Custom-v0", **options, columns=columns, quality="agreement").unwrapped.core
    assert core.split("train").scoring.run(np.arange(4), np.zeros((4, len(core.nvec)), dtype=np.int64)).all()


def test_policies_learn_on_text_without_labels(tmp_path):
    for split, label in (("train", {}), ("validation", {"label": 0}), ("test", {"label": 1})):
        lines = [json.dumps({"text": f"{split} {number} good"} | label) + "\n" for number in range(4)]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    options = {"dataset": str(tmp_path), "backbone": "mini", "max_target_length": 8}
    with pytest.raises(DataError, match="no field 'label'"):
        gym.make("SD/Classification-Custom-v0", **options)
    core = gym.make("SD/Classification-Custom-v0", **options, policy_labels="dense").unwrapped.core
    train, rows, dense = core.split("train"), np.arange(4), np.zeros((4, len(core.nvec)), dtype=np.int64)
    assert train.scoring.run(rows, dense).all()
    assert [instance.target for instance in train.instances] == train.passes.answers(rows, dense)
    assert train.instances.identity == core.data["train"].identity
    assert {instance.target for instance in core.split("test").instances} == {1}


def test_scores_are_no_classes(tmp_path, tiny_tokenizer):
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "food {n}", "label": {n % 5}.5}}\n' for n in range(30)))
    settings = {"dataset": str(tmp_path / "rows.jsonl"), "overlap": "allow"}
    settings["backbone"] = str(save(regressor(), tiny_tokenizer, tmp_path / "regressor"))
    for metric in ("matthews", "f1"):
        with pytest.raises(ConfigError, match=f"gives a score, and {metric} compares classes"):
            gym.make("SD/Classification-Custom-v0", metric=metric, **settings).unwrapped.core.split("test")
    core = gym.make("SD/Classification-Custom-v0", quality="likelihood", **settings).unwrapped.core
    split, rows = core.split("test"), np.arange(3)
    assert split.scoring.metrics(rows, np.zeros((3, len(core.nvec)), dtype=np.int64)) == {}
    assert split.head._to_text(0.00188) == "0.00188"  # two digits would say 0
