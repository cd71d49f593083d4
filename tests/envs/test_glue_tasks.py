"""The GLUE envs, on local mirrors of a few instances in the hub's own form, with tiny backbones."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from gymnasium.utils.env_checker import check_env
from sd_gym.agents.experiment.evaluation import evaluate
from sklearn.metrics import balanced_accuracy_score
from transformers import AutoConfig, AutoModelForSequenceClassification

import sd_gym
from sd_gym.config import ConfigError, DataConfig
from sd_gym.errors import DataError
from sd_gym.tasks.data import load_split
from tests.conftest import TINY, WORDS, dense_policy, make_model, save, varied, write_mirror

# Column names as on the hub, and the number of classes; 1 = a score.
GLUE = {
    "SST2": (("sentence",), 2),
    "MRPC": (("sentence1", "sentence2"), 2),
    "RTE": (("sentence1", "sentence2"), 2),
    "CoLA": (("sentence",), 2),
    "QNLI": (("question", "sentence"), 2),
    "MNLI": (("premise", "hypothesis"), 3),
    "QQP": (("question1", "question2"), 2),
    "STSB": (("sentence1", "sentence2"), 1),
}
# Smaller than in the YAML files, where the end of the training split selects.
SPLITS = {"train": "train[:-10]", "validation": "train[-10:]"}


def mirror(folder, subset, columns, classes):
    """A GLUE data set of a few instances, the labels of its test split hidden."""
    random = np.random.default_rng(0)
    sizes = {"train": 40, "validation_matched" if subset == "mnli" else "validation": 12, "test": 5}
    label = Value("float32") if classes == 1 else ClassLabel(num_classes=classes)
    features = Features({**{column: Value("string") for column in columns}, "label": label, "idx": Value("int32")})
    splits = {}
    for split, size in sizes.items():
        rows = {column: [" ".join(random.choice(WORDS, 5)) for _ in range(size)] for column in columns}
        labels = random.random(size) * 5 if classes == 1 else random.integers(classes, size=size)
        rows["label"] = [-1] * size if split == "test" else labels.tolist()
        rows["idx"] = list(range(size))
        splits[split] = Dataset.from_dict(rows, features=features)
    return write_mirror(folder, subset, splits)


def backbone(folder, tokenizer, classes, architecture):
    # Named classes: transformers forgets the number of unnamed ones where it is the default of another architecture.
    labels = {
        "id2label": {n: f"class {n}" for n in range(classes)},
        "label2id": {f"class {n}": n for n in range(classes)},
    }
    config = AutoConfig.for_model(
        architecture, vocab_size=40, pad_token_id=0, eos_token_id=2, **labels, **TINY[architecture]
    )
    torch.manual_seed(0)
    return save(AutoModelForSequenceClassification.from_config(config), tokenizer, folder)


@pytest.mark.parametrize("architecture", ["bart", "bert"])
@pytest.mark.parametrize("name", list(GLUE))
def test_every_glue_env_runs(name, architecture, tmp_path, tiny_tokenizer):
    columns, classes = GLUE[name]
    data = mirror(tmp_path / "glue", name.lower(), columns, classes)
    model = backbone(tmp_path / "model", tiny_tokenizer, classes, architecture)
    splits = SPLITS | {"test": "validation_matched" if name == "MNLI" else "validation"}
    settings = {"dataset": data, "backbone": str(model), "splits": splits}
    env = gym.make(f"SD/Classification-{name}-v0", **settings)
    check_env(env.unwrapped)
    core = env.unwrapped.core
    assert {split: len(core.split(split)) for split in ("train", "validation", "test")} == {
        "train": 30,
        "validation": 10,
        "test": 12,
    }
    split, rows = core.split("test"), np.arange(12)
    decisions = np.zeros((12, len(core.nvec)), dtype=np.int64)
    outcome = core.score(split, rows, decisions)
    assert (outcome.flops_ratio == 1).all()
    decisions[:, :-1] = 1
    assert (core.score(split, rows, decisions).flops_ratio < 0.5).all()
    result = evaluate(core, dense_policy(env.spec.id, **settings), "test")
    assert len(result["by_fact"]["label"]) <= 4  # classes, or quartiles of scores
    metrics = result["metrics"]
    assert metrics["policy"] == metrics["dense"]
    expected = {"MRPC": "f1", "QQP": "f1", "CoLA": "matthews", "STSB": "correlation"}.get(name)
    assert list(metrics["dense"]) == ([expected] if expected else [])


def test_balanced_quality_is_balanced_accuracy_and_tells_matthews(tmp_path, tiny_tokenizer):
    data = mirror(tmp_path / "glue", "cola", GLUE["CoLA"][0], 2)
    model = str(backbone(tmp_path / "model", tiny_tokenizer, 2, "bert"))
    splits = SPLITS | {"train": "train[:12]"}
    core = gym.make("SD/Classification-CoLA-v0", dataset=data, backbone=model, splits=splits).unwrapped.core
    split = core.split("train")
    rows = np.arange(len(split))
    decisions = np.random.default_rng(0).integers(core.nvec, size=(len(rows), len(core.nvec)))
    quality = split.scoring.run(rows, decisions)
    labels = split.encoded.labels.numpy()
    predicted = np.where(quality > 0, labels, 1 - labels)
    assert labels.mean() == 5 / 12
    assert 0 < predicted.mean() < 1
    balanced = quality.mean()
    assert balanced == pytest.approx(balanced_accuracy_score(labels, predicted))
    matthews = (2 * balanced - 1) * labels.std() / predicted.std()
    assert split.scoring.metrics(rows, decisions) == {"matthews": pytest.approx(matthews)}
    np.testing.assert_array_equal(split.scoring.quality_and_likelihood(rows, decisions)[0], quality)
    assert split.scoring.highest == 12 / (2 * 5)  # a right answer of the rarer class, whether there is one or not


def test_scores_and_texts_have_no_classes_to_balance(tmp_path, tiny_tokenizer):
    data = mirror(tmp_path / "glue", "stsb", GLUE["STSB"][0], 1)
    model = str(backbone(tmp_path / "model", tiny_tokenizer, 1, "bert"))
    with pytest.raises(ConfigError, match="weighs classes, not scores"):
        gym.make("SD/Classification-STSB-v0", dataset=data, backbone=model, splits=SPLITS, quality="balanced")
    with pytest.raises(ConfigError, match="weighs classes; summarization has none"):
        gym.make("SD/Summarization-Mini-v0", quality="balanced")


def test_the_flops_of_a_bart_classifier_are_counted(tmp_path, tiny_tokenizer):
    from torch.utils.flop_counter import FlopCounterMode

    data = mirror(tmp_path / "glue", "sst2", ("sentence",), 2)
    model = backbone(tmp_path / "model", tiny_tokenizer, 2, "bart")
    settings = {"dataset": data, "backbone": str(model), "splits": SPLITS}
    core = gym.make("SD/Classification-SST2-v0", **settings).unwrapped.core
    core.backbone.model.set_attn_implementation("eager")
    split, decision = core.split("train"), np.zeros((1, len(core.nvec)), dtype=np.int64)
    decision[0, ::3] = 1
    decision[0, -1] = 0
    with FlopCounterMode(display=False) as counter:
        split.scoring.run(np.array([3]), decision)
    assert counter.get_total_flops() == split.costs.flops(np.array([3]), decision)[0]


def test_all_glue_ids_are_registered():
    assert {f"SD/Classification-{name}-v0" for name in GLUE} <= set(sd_gym.registered_ids())


def test_hidden_labels_and_missing_columns_are_refused(tmp_path):
    data = mirror(tmp_path / "glue", "sst2", ("sentence",), 2)
    source = DataConfig(dataset=data, subset="sst2", columns={"text": "sentence"})
    with pytest.raises(DataError, match="-1 may hide the labels of a test split"):
        load_split(source, "classification", "test")
    with pytest.raises(DataError, match=r"no column 'review' \(for text\); the columns are sentence, label, idx"):
        load_split(DataConfig(dataset=data, subset="sst2", columns={"text": "review"}), "classification", "train")
    with pytest.raises(FileNotFoundError, match="copy of a hub data set with the split 'train'"):
        load_split(DataConfig(dataset=data, subset="no-such-subset"), "classification", "train")
    with pytest.raises(DataError, match="expected a split such as"):
        load_split(DataConfig(dataset=data, subset="sst2", splits={"train": "train[::2]"}), "classification", "train")


def test_a_score_needs_numbers(tmp_path, tiny_tokenizer):
    file = tmp_path / "data.jsonl"
    file.write_text(varied({"text": "good", "label": "yes"}, "text"))
    model = backbone(tmp_path / "model", tiny_tokenizer, 1, "bert")
    with pytest.raises(DataError, match="gives a score, but the label is 'yes'"):
        gym.make("SD/Classification-Custom-v0", dataset=str(file), backbone=str(model))


def test_a_backbone_without_a_classifier_says_what_to_do(tmp_path, tiny_tokenizer):
    data = mirror(tmp_path / "glue", "sst2", ("sentence",), 2)
    save(make_model("bert").bert, tiny_tokenizer, tmp_path / "bare")
    with pytest.raises(ValueError, match="no task head; fine-tune one with"):
        gym.make("SD/Classification-SST2-v0", dataset=data, backbone=str(tmp_path / "bare"), splits=SPLITS)
