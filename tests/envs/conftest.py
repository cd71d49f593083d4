"""What several tests of envs share."""

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from sd_gym.agents.experiment.export import export, run_card
from sd_gym.agents.runs.folder import run_description
from tokenizers import processors
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

import sd_gym
from sd_gym.cli import app
from sd_gym.envs import shared_core
from sd_gym.envs.config import load_config
from sd_gym.envs.render import Result, Scene
from sd_gym.envs.spaces import flat_size, token_width
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.observations import to_tensors
from sd_gym.registration import config_of
from sd_gym.tasks.marked_text import READ, MarkedText
from tests.conftest import WORDS, make_extractor, make_last_token_classifier, make_model

SMALL = {"train_size": 60, "validation_size": 20, "test_size": 20}
STEP_INFO = {
    "quality",
    "quality_ref",
    "cost",
    "flops_ratio",
    "vector_reward",
    "is_success",
    "instance",
    "difficulty",
    "decision",
}
ID = "SD/Classification-Mini-v0"
MINI = [id for id in sd_gym.registered_ids() if id.endswith("Mini-v0")]
N = 3
MODES = list(AutoresetMode)
COPIES = [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))]
MASKS = [[0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]]
RESULT = {
    "guarantee": None,
    "selection": None,
    "split": "test",
    "instances": 24,
    "quality": 0.9,
    "quality_ref": 0.95,
    "flops_ratio": 0.4,
    "flops_ratio_with_policy": 0.41,
    "quality_difference": -0.05,
    "quality_difference_interval": [-0.1, 0.0],
    "verdict": "too few instances to tell",
    "goes_on": 0.25,
}
PROMPT = "the {source} room {source_pair} food"


def make_vec(mode=AutoresetMode.SAME_STEP, n=N, **keys):
    return gym.make_vec(ID, num_envs=n, autoreset_mode=mode, **SMALL, **keys)


def random_actions(env, random):
    """Decisions that skip a fifth of the switches; there is one token level."""
    actions = (random.random(env.action_space.shape) < 0.2).astype(env.action_space.dtype)
    return np.minimum(actions, env.action_space.high)


def assert_same(ours, theirs):
    """Equal in type, dtype, keys and values, all the way down."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert set(ours) == set(theirs)
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, (tuple, list)) or (isinstance(ours, np.ndarray) and ours.dtype == object):
        assert len(ours) == len(theirs)
        for mine, yours in zip(ours, theirs, strict=True):
            assert_same(mine, yours)
    elif isinstance(ours, np.ndarray):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        np.testing.assert_array_equal(ours, theirs)
    else:
        assert ours == theirs


def continued(env, seed, steps=3):
    """What the next steps give; where autoreset is disabled, all envs are reset before each."""
    random, trace = np.random.default_rng(seed), []
    for _ in range(steps):
        if env.metadata["autoreset_mode"] == AutoresetMode.DISABLED:
            trace.append(env.reset(options={"reset_mask": np.ones(env.num_envs, dtype=bool)}))
        trace.append(env.step(random_actions(env, random)))
    return trace


@pytest.fixture
def tiny(reviews, tiny_backbone, tmp_path):
    """Arguments of an env with six switches, and a codebook of four masks for it."""
    file = tmp_path / "masks.json"
    file.write_text(json.dumps(MASKS))
    return {
        "id": "SD/Classification-Custom-v0",
        "dataset": str(reviews),
        "backbone": str(tiny_backbone),
        "codebook": str(file),
        "max_source_length": 12,
    }


def core_of(env_id, **keys):
    return shared_core(load_config(config_of(env_id), keys))


def called(*words):
    """What a command prints."""
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(params=["full", "some"])
def table(request, full_table, small_table):
    return full_table if request.param == "full" else small_table


@pytest.fixture(scope="module")
def shared_table(tmp_path_factory, table_source):
    """A table of some decisions, with reduced observations and nothing that is not to be passed on."""
    folder = tmp_path_factory.mktemp("tables") / "shared"
    codebook = folder.parent / "masks.json"
    codebook.write_text(json.dumps([[0] * 7, [1] * 7, [0, 1, 0, 1, 0, 1, 0]]))
    chosen = ["random:6", f"codebook:{codebook}"]
    sd_gym.tabulate(table_source[0], folder, decisions=chosen, pca=3, share=True, **table_source[1])
    return str(folder)


def contents_of(folder):
    return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir()) if file.name != ".lock"}


def edited(folder, **values):
    said = json.loads((folder / "table.json").read_text())
    (folder / "table.json").write_text(json.dumps({**said, **values}))


def action_for(env, skipped, level=0):
    action = np.zeros(env.action_space.shape[-1], dtype=np.int64)
    action[skipped], action[-1] = 1, level
    return action


def scene_of(text="the food was good", layers=3, skipped=(), level=0, marks=None, **changes):
    switches = [f"encoder.{layer}.{kind}" for layer in range(layers) for kind in ("attention", "feed_forward")]
    decision = np.zeros(len(switches) + 1, dtype=np.int64)
    decision[list(skipped)], decision[-1] = 1, level
    result = Result(decision, "good", quality=1.0, quality_ref=1.0, kept=True, flops_ratio=0.5, reward=0.5)
    marks = np.full(len(text), READ, dtype=np.int8) if marks is None else marks
    scene = Scene("SD/Env-v0", "test-3", 2, [MarkedText(text, marks)], "good", switches, (0.0, 0.5), result)
    return replace(scene, **changes)


def pixels_of(image, colour):
    return int((image == np.array(colour)).all(axis=2).sum())


def words(random, low=3, high=12):
    return " ".join(random.choice(WORDS, random.integers(low, high)))


def row(random, task):
    if task in ("classification", "last token"):
        return {"text": words(random), "label": int(random.integers(2))}
    if task == "pairs":
        return {"text": words(random), "text_pair": words(random), "label": int(random.integers(2))}
    if task == "scores":
        return {"text": words(random), "label": float(random.random())}
    if task == "summarization":
        return {"document": words(random), "summary": words(random, 1, 4)}
    context = words(random)
    return {"question": words(random, 2, 4), "context": context, "answers": [context.split()[1]]}


def texts_of(task, one):
    if task == "pairs":
        return one["text"], one["text_pair"]
    if task in ("extracted", "prompted", "answered"):
        return {"question": one["question"], "context": one["context"]}
    return one.get("text") or one["document"]


MODELS = {
    "classification": (lambda: make_model("roberta"), "SD/Classification-Custom-v0"),
    "pairs": (lambda: make_model("bert"), "SD/Classification-Custom-v0"),
    "scores": (lambda: regressor(), "SD/Classification-Custom-v0"),
    "summarization": (lambda: make_model("bart"), "SD/Summarization-Custom-v0"),
    "answered": (lambda: make_model("t5"), "SD/QuestionAnswering-Custom-v0"),
    "extracted": (lambda: make_extractor("bert"), "SD/QuestionAnswering-Custom-v0"),
    "prompted": (lambda: make_model("llama"), "SD/QuestionAnswering-Custom-v0"),
    "last token": (lambda: make_last_token_classifier("llama"), "SD/Classification-Custom-v0"),
}


def regressor():
    config = make_model("bert").config
    config.num_labels = 1
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).eval()


def trained(task, ranking, folder, tokenizer, observation="pooled", stages=("first",)):
    """An env, a policy of it that decides differently on every input, and the artefact's folder."""
    random = np.random.default_rng(0)
    rows = {split: [row(random, task) for _ in range(24)] for split in ("train", "validation", "test")}
    data = folder / "data"
    data.mkdir()
    for split, lines in rows.items():
        (data / f"{split}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    make, env_id = MODELS[task]
    make().save_pretrained(folder / "backbone")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = "[SEP]"
    if task == "last token":  # such tokenizers add nothing at the end, and have nothing to pad with
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
        tokenizer.pad_token = None
    tokenizer.save_pretrained(folder / "backbone")
    settings = {"dataset": str(data), "backbone": str(folder / "backbone"), "max_target_length": 4, "splits": {}}
    settings |= {"max_source_length": 26, "overlap": "allow", "observation": observation, "stages": list(stages)}
    settings |= {"prompt": PROMPT} if task == "prompted" else {}
    settings |= {"token_shares": [0.0, 0.4], "token_ranking": ranking} if ranking else {}
    core = gym.make_vec(env_id, num_envs=1, **settings).unwrapped.core
    policy = looking(core)
    names = {"env": env_id, "algo": "ppo", "steps": 1, "seed": 0}
    description = run_description(names, core.config, core.backbone, {}, ())
    artefact = export(core, policy, (), run_card(RESULT, json.loads(json.dumps(description, default=str))))
    artefact.save_pretrained(folder / "artefact")
    return core, policy, artefact, [texts_of(task, one) for one in rows["test"]]


def looking(core, bias=0.0):
    """A policy that decides differently on every input, prefers running by a bias, and accepts half of the answers."""
    torch.manual_seed(1)
    space = core.observation_space
    flat, width = flat_size(space), token_width(space)
    encoder = {"channels": None if width is None else 5, "token_width": width if flat else None}
    known = core.nvec.tolist(), core.backbone.board.names
    policy = DecisionPolicy(flat or width, *known, **encoder, stages=core.stages).eval()
    with torch.no_grad():
        policy.head.weight.mul_(20)
        policy.head.bias[: 2 * core.n_switches : 2] += bias
        if core.has_answer_stage:
            split, seen = core.split("test"), []
            rows = np.arange(min(16, len(split)))
            core.rollout(split, rows, lambda shown: seen.append(shown) or policy.decide(shown))
            logits = policy(to_tensors(seen[-1]))
            policy.head.bias[-1] += (logits[:, -2] - logits[:, -1]).quantile(0.5)
    return policy


def actions_of(env, seed):
    """An action a stage, of choices that there are."""
    env.action_space.seed(seed)
    return [env.action_space.sample() for _ in env.core.stages]


def played(env, actions, seed=3):
    """Reward, observation and info of each step of one episode."""
    env.reset(seed=seed)
    steps = [env.step(action) for action in actions]
    assert [terminated for _, _, terminated, _, _ in steps] == [False] * (len(steps) - 1) + [True]
    return [(reward, observation, info) for observation, reward, _, _, info in steps]
