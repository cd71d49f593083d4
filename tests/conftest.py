"""Tiny backbones and data sets, made by the tests themselves."""

from __future__ import annotations

import json
import os
import resource
import sys
from contextlib import contextmanager
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

import sd_gym
from sd_gym.policy.card import write_card

os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # figures are the same on every machine

WORDS = ["good", "bad", "fine", "awful", "the", "food", "was", "not", "room"]

_BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 20,
    "max_position_embeddings": 32,
    "init_std": 0.3,
    "decoder_start_token_id": 2,
}
_T5 = {"d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 2}
_LLAMA = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
_BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
}
TINY = {
    "bart": _BART,
    "mbart": _BART,
    "pegasus": _BART,
    "marian": _BART,
    "t5": _T5 | {"feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 8},
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.3},
    "llama": _LLAMA,
    "mistral": _LLAMA | {"sliding_window": 4},
    "qwen2": {key: value for key, value in _LLAMA.items() if key != "head_dim"},
    "qwen3": _LLAMA,
    "gemma3_text": _LLAMA
    | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi3": {key: value for key, value in _LLAMA.items() if key != "head_dim"},
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": {"dim": 16, "n_layers": 3, "n_heads": 4, "hidden_dim": 24, "initializer_range": 0.3},
    "electra": _BERT | {"embedding_size": 12},
}
ENCODER_DECODER = ["bart", "mbart", "pegasus", "marian", "t5"]
DECODER = ["gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3"]
ENCODER = ["bert", "roberta", "distilbert", "electra"]


def make_model(name, attention="sdpa"):
    """A random model of an architecture, with weights large enough that every sublayer matters."""
    torch.manual_seed(0)
    special = {"vocab_size": 40, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    config = AutoConfig.for_model(name, **special, **TINY[name])
    family = (
        AutoModelForSeq2SeqLM
        if name in ENCODER_DECODER
        else AutoModelForCausalLM
        if name in DECODER
        else AutoModelForSequenceClassification
    )
    return family.from_config(config, attn_implementation=attention).eval()


def make_extractor(name):
    """A random model of an architecture with a head that marks spans."""
    torch.manual_seed(0)
    special = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(name, **special, **TINY[name])
    return AutoModelForQuestionAnswering.from_config(config).eval()


def make_last_token_classifier(name):
    """A random decoder-only model that classifies by its last token; its configuration names nothing to pad with."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, vocab_size=40, pad_token_id=None, eos_token_id=2, **TINY[name])
    return AutoModelForSequenceClassification.from_config(config).eval()


def save(model, tokenizer, folder):
    """A backbone as a local folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_inputs(name, batch=5, source=7, target=4, seed=0, side="right"):
    """Inputs with rows of different lengths, padded at one side."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 40, (batch, source), generator=generator)
    lengths = torch.randint(2, source + 1, (batch,), generator=generator)
    lengths[0] = source
    mask = (torch.arange(source) < lengths[:, None]).long()
    if side == "left":
        mask = mask.flip(1)
    inputs = {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}
    if name in ENCODER_DECODER:
        inputs["decoder_input_ids"] = torch.randint(4, 40, (batch, target), generator=generator)
    if name not in ENCODER:
        inputs["use_cache"] = False
    return inputs


def row_of(inputs, row):
    """The inputs of one row, as a batch of one."""
    return {key: value[row : row + 1] if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}


def dense_policy(env_id, **settings):
    """The policy that skips nothing, for an env of these settings."""
    from sd_gym.agents.registry import make_agent

    return make_agent("dense", gym.make_vec(env_id, num_envs=1, **settings).unwrapped).policy()


def write_mirror(folder, subset, splits):
    """Data sets as the hub stores them: Parquet files in a folder for each subset, and a card that names them."""
    (folder / subset).mkdir(parents=True, exist_ok=True)
    files = ""
    for split, data in splits.items():
        data.to_parquet(folder / subset / f"{split}-00000-of-00001.parquet")
        files += f"  - split: {split}\n    path: {subset}/{split}-*\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {subset}\n  data_files:\n{files}---\n")
    return str(folder)


def write_env(folder, dataset, backbone, **values):
    """A user's env as a YAML file; its id is ``Own/Reviews-v0`` if the values give no other."""
    values = {"task": "classification", "dataset": str(dataset), "backbone": str(backbone), **values}
    lines = [f"id: {values.pop('id', 'Own/Reviews-v0')}", *(f"{key}: {value}" for key, value in values.items())]
    file = folder / "own.yaml"
    file.write_text("\n".join(lines) + "\n")
    return file


def forget_own():
    """What a new process knows: only the project's own names, and none of the given modules."""
    from sd_gym.agents.registry import AGENTS

    from sd_gym.objectives import OBJECTIVES
    from sd_gym.policy import NETWORKS
    from sd_gym.registration import ENVS, SERVING
    from sd_gym.tasks.family import TASKS
    from sd_gym.tasks.metrics import METRICS
    from sd_gym.tasks.ranking import RANKINGS

    for identity in (*ENVS._own, *SERVING._own):
        gym.registry.pop(identity)
    for registry in (AGENTS, NETWORKS, OBJECTIVES, ENVS, SERVING, TASKS, METRICS, RANKINGS):
        registry._own.clear()


class CutError(Exception):
    """Stands for a kill."""


@pytest.fixture
def own_names(monkeypatch, tmp_path):
    """Names that a test registers, and modules that it imports by path, are gone after it."""
    modules = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    forget_own()
    for name in set(sys.modules) - modules:
        if {"examples", tmp_path.name} & set(Path(getattr(sys.modules[name], "__file__", None) or ".").parts):
            del sys.modules[name]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tests neither read nor write the user's cache, nor open windows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDL_VIDEODRIVER", "dummy")
        patch.setenv("SD_GYM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def little_timed():
    """Every run is timed, and what a test asks of it is never how long it took: three batches do."""
    from sd_gym.agents.experiment import timing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "TIMED_SECONDS", 0.0)
        yield


@pytest.fixture(scope="session", autouse=True)
def little_drawn():
    """Every run is drawn, which at full size takes half of the time of a short one."""
    from sd_gym.agents.drawing.style import figure, write_png
    from sd_gym.agents.experiment import run, tensorboard_logs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "plot_run", lambda result, switches, file: write_png(figure(0.1, width=0.1), file))
        patch.setattr(tensorboard_logs, "plot_skip_rates", lambda *_: figure(0.1, width=0.1))
        yield


@pytest.fixture(scope="session")
def tiny_tokenizer():
    vocabulary = {word: index for index, word in enumerate(["<pad>", "[CLS]", "[SEP]", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", model_max_length=32
    )


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory, tiny_tokenizer) -> Path:
    """A random BERT classifier with two classes, saved as a local folder."""
    folder = tmp_path_factory.mktemp("backbone")
    return save(make_model("bert"), tiny_tokenizer, folder)


@pytest.fixture(scope="module")
def generator(tmp_path_factory, tiny_tokenizer):
    """A random BART with the tiny tokenizer, saved as a local folder."""
    folder = tmp_path_factory.mktemp("generator")
    return save(make_model("bart"), tiny_tokenizer, folder)


def varied(row, field, count=20):
    """Copies of a row, as JSON lines, whose texts in a field all differ: they end differently."""
    rows = [{**row, field: row[field] + " fine" * (n % 5) + " room" * (n // 5)} for n in range(count)]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def reviews(tmp_path) -> Path:
    """Forty labelled reviews in one JSONL file, all of them different."""
    return write_reviews(tmp_path / "reviews.jsonl")


def write_reviews(file):
    """As ``reviews``."""
    rows = []
    for number in range(40):
        label = number % 2
        word = ["bad", "good"][label]
        text = " ".join(["the", ["food", "room"][number % 3 % 2], "was", word] + ["fine"] * (number % 5))
        while any(row["text"] == text for row in rows):
            text = f"the {text}"
        rows.append({"text": text, "label": label})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def settings(reviews, tiny_backbone):
    """What an env on these reviews needs to be told."""
    return {"dataset": str(reviews), "backbone": str(tiny_backbone)}


@pytest.fixture
def translation(tmp_path, tiny_tokenizer):
    """A data set of German and English texts, which nearly are, and a backbone that writes."""
    texts = [f"the {one} was {other}" for one in WORDS for other in WORDS]
    rows = [json.dumps({"german": text, "english": text.split()[-1]}) + "\n" for text in texts]
    (tmp_path / "pairs.jsonl").write_text("".join(rows))
    backbone = save(make_model("t5"), tiny_tokenizer, tmp_path / "model")
    return {"dataset": str(tmp_path / "pairs.jsonl"), "backbone": str(backbone)}


@pytest.fixture(scope="session")
def table_source(tmp_path_factory, tiny_backbone):
    """An env of six switches and two token levels, 128 decisions: its id and settings."""
    file = write_reviews(tmp_path_factory.mktemp("data") / "reviews.jsonl")
    settings = {"dataset": str(file), "backbone": str(tiny_backbone), "splits": {}, "token_shares": [0.0, 0.5]}
    return "SD/Classification-Custom-v0", settings


@pytest.fixture(scope="session")
def full_table(tmp_path_factory, table_source) -> str:
    """A table of all decisions."""
    folder = tmp_path_factory.mktemp("tables") / "full"
    sd_gym.tabulate(table_source[0], folder, **table_source[1])
    return str(folder)


@pytest.fixture(scope="session")
def small_table(tmp_path_factory, table_source) -> str:
    """A table of some decisions."""
    folder = tmp_path_factory.mktemp("tables") / "some"
    sd_gym.tabulate(table_source[0], folder, decisions=["random:12", "path"], **table_source[1])
    return str(folder)


def sign(folder):
    """Have the files of a policy belong together again, after a test has changed them."""
    card = json.loads((folder / "skip_policy.json").read_text())
    write_card(folder, {key: value for key, value in card.items() if key not in ("files", "format")})


@contextmanager
def small_disk(size):
    """No file may grow beyond ``size`` bytes: real errors of the system, in every library."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
