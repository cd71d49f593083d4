"""Random misuse: whatever is tried works as it should, or is refused by an error of our own.

Never anything else: no error from the depths of a library (a traceback on the command line), and no result that is
wrong in silence. The long tests print how many tries of each kind there were.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import traceback
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sd_gym.agents.experiment.run import train

import sd_gym
from sd_gym.backbones.load import load_model
from sd_gym.config import KEYS, PARTS
from sd_gym.switch import Switchboard
from sd_gym.tasks.data import load_split
from tests.conftest import WORDS

pytestmark = pytest.mark.filterwarnings("ignore:splits of .* overlap")
ROOT = Path(sd_gym.__file__).parent.parent
CUSTOM = "SD/Classification-Custom-v0"
TRIES = {"config keys": 70, "data files": 150, "backbone folders": 50, "run folders": 50, "actions": 150}
LONG = 10  # times as many, with other seeds


@dataclass
class Place:
    """Where it is tried: a whole backbone, data, run and env, of which copies are damaged; and the outcomes."""

    backbone: Path
    data: Path
    run: Path
    env: gym.Env
    counts: Counter = field(default_factory=Counter)
    found: list[str] = field(default_factory=list)

    @contextmanager
    def attempt(self, what):
        """Count the outcome of a block; an error that is not ours, or a failed assertion (a wrong result), is noted."""
        self.counts["tries"] += 1
        try:
            yield
        except AssertionError as error:
            self._note("wrong in silence", what, error)
        except Exception as error:
            if ours(error):
                self.counts["refused"] += 1
            else:
                self._note("traceback", what, error)
        else:
            self.counts["worked"] += 1

    def _note(self, kind, what, error):
        self.counts[kind] += 1
        self.found.append(f"{kind}: {what!r:.600}\n{''.join(traceback.format_exception(error)[-6:]):.3000}")


def ours(error):
    """Whether the project raised it, or the system did (a disk's or path's error); a library's own is a traceback."""
    if isinstance(error.__cause__, ValueError):  # Gymnasium's own words around it
        error = error.__cause__ if "was raised from the environment creator" in str(error) else error
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if not isinstance(error, ValueError | OSError | gym.error.Error):
        return False
    by_system = isinstance(error, OSError) and error.errno is not None
    return by_system or any(Path(frame.filename).is_relative_to(ROOT / room) for room in ("sd_gym", "agents"))


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_backbone):
    """Nothing is asked of the hub."""
    folder = tmp_path_factory.mktemp("fuzz")
    rows = [{"text": " ".join([*WORDS[n % 9 :], str(n)]), "label": n % 2, "difficulty": n % 3} for n in range(30)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = {"dataset": str(folder / "data.jsonl"), "backbone": str(tiny_backbone)}
    with pytest.MonkeyPatch.context() as patch:
        for module in ("huggingface_hub.constants", "datasets.config"):
            patch.setattr(f"{module}.HF_HUB_OFFLINE", True)
        train(CUSTOM, "static", folder / "run", steps=1, **arguments)
        env = gym.make(CUSTOM, token_shares=[0.0, 0.5], **arguments)
        yield Place(tiny_backbone, folder / "data.jsonl", folder / "run", env)


TEXTS = st.sampled_from(["", " ", "the food", "NA", "\ud83d", "\0", "é", "[/]", "good " * 50, "\u2028", "{x}", "1"])
NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([-1, 2**31, 2**63, 10**30, 10**400, 1e300, math.nan, math.inf, -math.inf, 0.5, 1e-300, True]),
)
PATHS = st.sampled_from(
    ["", ".", "/", "~", "a\0b", "x" * 300, "no/such", "mini", "./no", "a/b/c", "x.gguf", "procedural"]
)
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS, PATHS)
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(TEXTS, st.integers(0, 2)), inner, max_size=3)
    ),
    max_leaves=6,
)
GOOD_TEXTS = st.lists(st.sampled_from([*WORDS, "NA", "é", "[/]"]), min_size=1, max_size=40).map(" ".join)


def mostly(sensible, other=VALUES):
    """Something sensible nine times of ten."""
    return st.integers(0, 9).flatmap(lambda number: other if number == 9 else sensible)


SENSIBLE = {
    "task": st.sampled_from(["classification", "question_answering", "summarization"]),
    "splits": st.sampled_from([{"validation": "train[-5:]"}, {"test": "train[5:2]"}, {"train": "train[:1]"}]),
    "overlap": st.sampled_from(["error", "drop", "allow"]),
    "columns": st.sampled_from([{"text": "label"}, {"label": "text"}, {"text": "no"}, {"difficulty": "text"}]),
    "train_size": st.integers(1, 4),
    "test_size": st.integers(1, 4),
    "max_source_length": st.integers(1, 50),
    "max_target_length": st.integers(1, 50),
    "token_shares": st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.99, 1.0]), max_size=4),
    "token_ranking": st.sampled_from(["attention", "idf", "position", "random"]),
    "metric": st.sampled_from(["exact_match", "accuracy", "f1", "matthews", "correlation", "rouge", "squad"]),
    "quality": st.sampled_from(["exact_match", "balanced", "likelihood", "metric"]),
    "answers": st.sampled_from(["generated", "extracted"]),
    "prompt": st.sampled_from(["{source}", "{", "{x}", "{source.x}", "{0}", ""]),
    "objective": st.sampled_from(["lexicographic", "no"]),
    "action": st.sampled_from(["multi_discrete", "multi_binary", "discrete"]),
    "observation": st.sampled_from(["pooled", "tokens", "no"]),
    "device": st.sampled_from(["cpu", "cuda", "cuda:7", "gpu", "meta", "mps", "cpu:0", "cpu:5"]),
    "split": st.sampled_from(["train", "validation", "test"]),
}


def config_keys(data, place):
    keys = st.sampled_from([*SENSIBLE, *sorted({*PARTS, *KEYS} - {"id"}), "", "epsilom"])
    changed = {
        key: data.draw(mostly(SENSIBLE.get(key, VALUES))) for key in data.draw(st.sets(keys, min_size=1, max_size=3))
    }
    arguments = {"dataset": str(place.data), "backbone": str(place.backbone), **changed}
    with place.attempt(changed):
        env = gym.make(CUSTOM, disable_env_checker=True, **arguments)  # which warns of rewards that are vectors
        observation, _ = env.reset(seed=0)
        if arguments.get("action", "multi_discrete") == "multi_discrete":
            dense = np.zeros(env.action_space.shape, dtype=np.int64)
            following, reward, _, _, info = env.step(dense)
            assert info["flops_ratio"] == 1
            assert info["quality"] == info["quality_ref"]
            assert np.isfinite([*np.ravel(reward), info["quality"]]).all()  # a vector of both parts, too
        else:
            following, *_ = env.step(env.action_space.sample())
        for seen in (observation, following):
            assert all(np.isfinite(part).all() for part in (seen.values() if isinstance(seen, dict) else [seen]))


def damaged(data, content):
    """Bytes with something wrong with them, or not."""
    place = data.draw(st.integers(0, len(content)))
    return {
        "whole": content,
        "cut": content[:place],
        "garbage": data.draw(st.binary(max_size=40)),
        "inserted": content[:place] + data.draw(st.binary(min_size=1, max_size=4)) + content[place:],
    }[data.draw(st.sampled_from(["whole", "cut", "garbage", "inserted"]))]


def data_files(data, place):
    row = st.fixed_dictionaries(
        {"text": mostly(GOOD_TEXTS, TEXTS | VALUES), "label": mostly(st.integers(0, 1), TEXTS | VALUES)},
        optional={"difficulty": mostly(st.integers(0, 3)), "text_pair": mostly(GOOD_TEXTS), "x": VALUES},
    )
    rows = data.draw(st.lists(row, min_size=1, max_size=4))
    suffix = data.draw(st.sampled_from(["jsonl", "jsonl", "csv", "parquet"]))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"train.{suffix}"
        if suffix == "jsonl":
            content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        elif suffix == "csv":
            cells = [[str(row["text"]), str(row["label"])] for row in rows]
            quoted = [
                ",".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in [["text", "label"], *cells]
            ]
            content = "\n".join(quoted).encode(errors="surrogatepass")
        else:
            frame = {
                "text": [str(row["text"]).encode(errors="replace").decode() for row in rows],
                "label": [n % 2 for n in range(len(rows))],
            }
            Dataset.from_dict(frame).to_parquet(file)
            content = file.read_bytes()
        written = damaged(data, content)
        file.write_bytes(written)
        with place.attempt((suffix, written)):
            instances = load_split(folder, "classification", "train")
            if suffix == "jsonl" and written == content:  # what was written is what is read
                kept = [row for row in rows if (row["text"] or "").strip()]
                assert [one.source for one in instances] == [row["text"] for row in kept]
                assert [one.target for one in instances] == [row["label"] for row in kept]
                assert [one.difficulty for one in instances] == [row.get("difficulty") or 0 for row in kept]
            if suffix == "csv" and written == content:
                assert [one.source for one in instances] == [
                    str(row["text"]) for row in rows if str(row["text"]).strip()
                ]
            whole = {"splits": {"validation": "train", "test": "train"}, "overlap": "allow"}
            env = gym.make(CUSTOM, dataset=folder, backbone=str(place.backbone), **whole)
            env.reset(seed=0)


def json_changed(data, file):
    """A JSON file with another value under one of its keys, or without it."""
    values = json.loads(file.read_text())
    key = data.draw(st.sampled_from(sorted(values)))
    if data.draw(st.booleans()):
        values[key] = data.draw(VALUES)
    else:
        del values[key]
    file.write_text(json.dumps(values, default=str))
    return key, values.get(key)


def tensors_changed(data, file):
    """A safetensors file with one tensor that is missing, of another size or type, or not finite."""
    tensors = load_file(file)
    key, how = (
        data.draw(st.sampled_from(sorted(tensors))),
        data.draw(st.sampled_from(["gone", "size", "type", "nan", "name"])),
    )
    value = tensors.pop(key)
    if how == "size":
        tensors[key] = torch.zeros(*value.shape, 2)
    if how == "type":
        tensors[key] = value.to(data.draw(st.sampled_from([torch.int64, torch.float64, torch.float16, torch.bool])))
    if how == "nan":
        tensors[key] = torch.full_like(value, data.draw(st.sampled_from([math.nan, math.inf])))
    if how == "name":
        tensors[key + "x"] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return key, how


def file_changed(data, folder, names):
    """One of a folder's files, and what was done to it."""
    file = folder / data.draw(st.sampled_from(names))
    ways = ["gone", "bytes", "folder"]
    ways += {".json": ["json"] * 6, ".safetensors": ["tensors"] * 6}.get(file.suffix, [])
    way = data.draw(st.sampled_from(ways))
    if way == "json":
        return file.name, json_changed(data, file)
    if way == "tensors":
        return file.name, tensors_changed(data, file)
    content = file.read_bytes()
    file.unlink()
    if way == "bytes":
        file.write_bytes(damaged(data, content))
    if way == "folder":
        file.mkdir()
    return file.name, way


def backbone_folders(data, place):
    with tempfile.TemporaryDirectory() as temporary:
        folder = shutil.copytree(place.backbone, Path(temporary) / "backbone")
        names = ["config.json", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
        what = file_changed(data, folder, names)
        with place.attempt(what):
            model, tokenizer = load_model(str(folder))
            stored = load_file(folder / "model.safetensors")
            for name, value in model.state_dict().items():  # no weight is anything else than what is stored
                assert torch.equal(value.float(), stored[name].float()), name
            board = Switchboard(model.eval())
            inputs = tokenizer(["the food was good"], return_tensors="pt")
            with board.decide(np.ones((1, len(board)), dtype=np.int64)), torch.inference_mode():
                assert torch.isfinite(model(**inputs).logits).all()


def run_folders(data, place):
    with tempfile.TemporaryDirectory() as temporary:
        folder = shutil.copytree(place.run, Path(temporary) / "run")
        what = file_changed(data, folder, ["config.json", "policy.json", "policy.safetensors", "result.json"])
        with place.attempt((what, "evaluate")):
            result = sd_gym.evaluate(CUSTOM, folder, test_size=3)
            assert np.isfinite([result["quality"], result["flops_ratio_with_policy"]]).all()
        with place.attempt((what, "compare")):
            sd_gym.compare([folder])


def actions(data, place):
    env = place.env
    shape, nvec = env.action_space.shape, env.action_space.nvec
    wrong = st.one_of(
        VALUES,
        st.lists(NUMBERS, min_size=len(nvec), max_size=len(nvec)),
        st.lists(st.integers(0, 1), min_size=len(nvec) - 1, max_size=len(nvec) + 1),
        st.sampled_from(
            [np.zeros(shape, dtype=kind) for kind in ("i1", "u8", "f2", "f8", "c8", "U1", "O", "M8[s]", "?")]
        ),
        st.sampled_from([torch.zeros(shape), torch.zeros(shape, dtype=torch.bfloat16), torch.full(shape, math.nan)]),
    )
    action = data.draw(wrong)
    with place.attempt(action):
        env.reset(seed=0)
        *_, info = env.step(action)
        decision = np.asarray(info["decision"])
        given = action.float().numpy() if isinstance(action, torch.Tensor) else np.asarray(action).astype(float)
        assert np.array_equal(decision, given)  # what was meant is what was done
        assert ((decision >= 0) & (decision < nvec)).all()


KINDS = {
    "config keys": config_keys,
    "data files": data_files,
    "backbone folders": backbone_folders,
    "run folders": run_folders,
    "actions": actions,
}


def fuzz(kind, place, tries, number):
    place.counts.clear()
    place.found.clear()

    @seed(number)
    @settings(
        max_examples=tries,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def attempt(data):
        KINDS[kind](data, place)

    attempt()
    print(f"{kind}: {dict(place.counts)}")
    if place.found:
        pytest.fail("\n\n".join(place.found[:20]), pytrace=False)
    assert place.counts["worked"]
    assert place.counts["refused"]


@pytest.mark.parametrize("kind", KINDS)
def test_misuse_works_or_is_refused(kind, place):
    fuzz(kind, place, TRIES[kind], 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_much_misuse_works_or_is_refused(kind, place):
    fuzz(kind, place, LONG * TRIES[kind], 1)
