"""Making a table: resumed, refused, and small."""

import json
import shutil
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from sd_gym.agents.experiment.tabulation import write_references
from typer.testing import CliRunner

import sd_gym
from sd_gym.cli import app
from sd_gym.config import SPLITS
from sd_gym.envs import ConfigError
from sd_gym.envs.config import load_config
from sd_gym.envs.packing import packed_qualities, smallest
from sd_gym.envs.shared import shared_core
from sd_gym.envs.tabulate import _without_paths
from sd_gym.execution.scoring import Scoring
from sd_gym.execution.split import BackboneSplit
from sd_gym.files import map_arrays
from sd_gym.registration import config_of
from sd_gym.registry import UnknownNameError
from tests.envs.conftest import contents_of

ID = "SD/Table-v0"


def test_numbers_are_kept_in_the_smallest_type_that_holds_them(shared_table):
    """And never in one that does not."""
    kinds = {name: values.dtype for name, values in map_arrays(Path(shared_table) / "train.safetensors").items()}
    expected = {"quality": np.uint8, "observations": np.float16, "costs": np.uint8}
    expected |= dict.fromkeys(("difficulty", "levels", "source_length", "fact.source_length"), np.uint8)
    assert {name: kinds[name] for name in expected} == {name: np.dtype(kind) for name, kind in expected.items()}
    assert smallest([0.5, 2.0**-24]).dtype == np.float16
    assert smallest([0.1]).dtype == np.float64
    assert smallest(np.array([0.1], np.float32)).dtype == np.float32
    assert smallest([1e300]).dtype == np.float64
    assert smallest([70_000]).dtype == np.int64
    assert smallest([-1]).dtype == np.int64
    assert smallest([True]).dtype == np.bool_


def test_numbers_of_one_chunk_are_not_rounded_as_those_of_another():
    values = np.random.default_rng(0).random((1, 2**16 + 1))
    parts = [{"rows": np.array([row]), "quality": smallest(row * values)} for row in range(2)]
    assert parts[0]["quality"].dtype == np.float16
    stored = packed_qualities(parts, 2, values.shape[1])["quality"]
    np.testing.assert_array_equal(stored[1], values[0].astype(np.float32))


def test_right_and_wrong_take_a_bit_a_mask(full_table):
    arrays = map_arrays(Path(full_table) / "train.safetensors")
    assert arrays["quality_values"].tolist() == [0, 1]
    assert arrays["quality"].shape[1] == len(gym.make(ID, table=full_table).unwrapped.core.masks) / 8


def test_a_table_that_was_cut_off_goes_on_and_becomes_the_same(tmp_path, monkeypatch, table_source):
    env_id, keys = table_source
    asked = {"decisions": ["random:16"], "pca": 4, **keys}
    monkeypatch.setattr("sd_gym.envs.tabulate.CHUNK", 7)
    whole = tmp_path / "whole"
    sd_gym.tabulate(env_id, whole, **asked)
    under_all, calls = Scoring.under_all, []

    def killed(self, rows, masks):
        calls.append(len(rows))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return under_all(self, rows, masks)

    monkeypatch.setattr(Scoring, "under_all", killed)
    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        sd_gym.tabulate(env_id, cut, **asked)
    with pytest.raises(ValueError, match="not complete; continue with sd-gym tabulate --resume"):
        gym.make(ID, table=str(cut))
    with pytest.raises(FileExistsError, match="interrupted table; pass --resume"):
        sd_gym.tabulate(env_id, cut, **asked)
    with pytest.raises(ValueError, match="another chosen"):
        sd_gym.tabulate(env_id, cut, resume=True, decisions="random:3", pca=4, **keys)
    done, losses, dense_loss_of = [], [], BackboneSplit.dense_loss_of
    monkeypatch.setattr(
        BackboneSplit, "dense_loss_of", lambda self, rows: (losses.append(len(rows)), dense_loss_of(self, rows))[1]
    )
    for split in SPLITS:  # as in another process, which knows nothing yet
        vars(shared_core(load_config(config_of(env_id), keys)).split(split)).pop("dense_loss", None)
    sd_gym.tabulate(env_id, cut, resume=True, on_progress=lambda *counts: done.append(counts), **asked)
    assert contents_of(cut) == contents_of(whole)
    assert len(losses) == len(done) - 1, "rows that were done ran densely again"
    assert done[-1][0] == done[-1][1]
    # The chunk that was cut off is the only one that ran twice; the four before it are told of at once.
    assert len(calls) == len(done) + 4
    with pytest.raises(FileExistsError, match="holds a table; pass --resume"):
        sd_gym.tabulate(env_id, cut, **asked)
    with pytest.raises(ValueError, match="holds a table with another chosen"):
        sd_gym.tabulate(env_id, cut, resume=True, decisions="random:3", pca=4, **keys)
    ran = len(calls)
    sd_gym.tabulate(env_id, cut, resume=True, references=True, **asked)  # where only these are missing
    assert len(calls) == ran
    assert contents_of(cut).keys() - contents_of(whole).keys() == {"references.json"}


def test_a_table_that_was_cut_off_before_its_masks_goes_on_and_damaged_masks_are_named(
    tmp_path, monkeypatch, table_source
):
    def killed(*arguments):
        raise KeyboardInterrupt

    asked = {"decisions": "random:4", **table_source[1]}
    monkeypatch.setattr("sd_gym.envs.tabulate.write_masks", killed)
    with pytest.raises(KeyboardInterrupt):
        sd_gym.tabulate(table_source[0], tmp_path, **asked)
    monkeypatch.undo()
    sd_gym.tabulate(table_source[0], tmp_path, resume=True, **asked)
    masks = (tmp_path / "codebook.json").read_text()
    for text, words in [(masks[:9], "expected a list of masks"), (masks.replace("1", "0"), "another masks")]:
        (tmp_path / "codebook.json").write_text(text)
        with pytest.raises(ValueError, match=rf"{tmp_path}.*{words}"):
            sd_gym.tabulate(table_source[0], tmp_path, resume=True, **asked)


def test_another_folder_is_left_alone(tmp_path, table_source):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"it holds mine\.txt"):
        sd_gym.tabulate(table_source[0], tmp_path, **table_source[1])
    assert contents_of(tmp_path) == {"mine.txt": b"mine"}


@pytest.mark.parametrize(
    ("keys", "error", "words"),
    [
        ({"decisions": "most"}, ValueError, "expected all, layers, random:N, path, codebook or"),
        ({"decisions": "random:0"}, ValueError, "got 'random:0'"),
        ({"decisions": ["all", "path"]}, ValueError, "'all' stands alone"),
        ({"decisions": "codebook:none.json"}, FileNotFoundError, r"no codebook at none\.json"),
        ({"instances": 0}, ValueError, "at least one instance"),
        ({"pca": 0}, ValueError, "--pca: expected at least 1 component"),
        ({"pca": 1000}, ValueError, "no more than there are training instances"),
        ({"observation": "tokens"}, ConfigError, "observations of a table are one array"),
        ({"epsilom": 1}, ConfigError, "did you mean 'reward.epsilon'"),
    ],
)
def test_what_cannot_be_tabulated_is_told(keys, error, words, tmp_path, table_source):
    with pytest.raises(error, match=words):
        sd_gym.tabulate(table_source[0], tmp_path / "table", **{**table_source[1], **keys})
    assert not (tmp_path / "table").exists()


def test_all_masks_of_whole_layers(tmp_path, table_source):
    env_id, keys = table_source
    sd_gym.tabulate(env_id, tmp_path / "table", decisions="layers", **keys)
    env = gym.make(ID, table=str(tmp_path / "table"))
    layers = (len(env.unwrapped.core.mask_nvec) - 1) // 2
    assert env.action_space.nvec.tolist() == [2] * layers + [2]  # and the token level
    for action in product(*map(range, env.action_space.nvec)):
        env.reset(seed=0)
        mask = env.step(np.array(action))[4]["decision"]
        assert mask.tolist() == [*np.repeat(action[:-1], 2), action[-1]]
    core = env.unwrapped.core
    assert len(core.masks) == 2 ** (layers + 1)
    np.testing.assert_array_equal(core.to_masks(core.from_masks(core.masks)), core.masks)


def test_a_table_is_not_tabulated(full_table, tmp_path):
    with pytest.raises(ConfigError, match="is a table itself"):
        sd_gym.tabulate(ID, tmp_path / "again", table=full_table)
    with pytest.raises(UnknownNameError):
        sd_gym.tabulate("SD/Nothing-v0", tmp_path / "again")


def test_all_of_a_bfloat16_table_is_computed_in_bfloat16_and_no_later_one_is(tmp_path, table_source):
    env_id, keys = table_source
    arrays = {}
    for name in ("half", "full"):  # both in this process, where cores are shared
        asked = {"decisions": "random:3", "bf16": name == "half", "stages": ["first", "middle", "answer"], **keys}
        sd_gym.tabulate(env_id, tmp_path / name, **asked)
        arrays[name] = map_arrays(tmp_path / name / "test.safetensors")
    for name in ("observations.1", "judged", "fact.dense_loss"):
        half, full = (np.asarray(arrays[kind][name], dtype=np.float64) for kind in ("half", "full"))
        assert not np.array_equal(half, full), name
        np.testing.assert_allclose(half, full, atol=0.3)


def test_the_command(tmp_path, table_source):
    sets = [f"--set={key}={json.dumps(value)}" for key, value in table_source[1].items()]
    asked = ["tabulate", table_source[0], "--output", str(tmp_path / "table"), "--decisions", "random:3", *sets]
    done = CliRunner().invoke(app, [*asked, "--instances", "5", "--seed", "2", "--bf16"])
    assert done.exit_code == 0, done.output
    said = json.loads((tmp_path / "table" / "table.json").read_text())
    counts = ", ".join(f"{one['instances']} of {name}" for name, one in said["splits"].items())
    assert f"3 decisions (random:3, seed 2) on instances: {counts}" in done.output
    assert (said["splits"]["train"]["instances"], said["precision"]) == (5, "bf16")
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 2


def test_a_table_that_is_made_again_in_its_place_is_another_table(tmp_path, table_source):
    """As in a notebook; so are its references."""
    env_id, keys = table_source
    for number in (3, 9):
        shutil.rmtree(tmp_path / "table", ignore_errors=True)
        sd_gym.tabulate(env_id, tmp_path / "table", decisions=f"random:{number}", references=True, **keys)
        env = gym.make(ID, table=str(tmp_path / "table"))
        assert env.action_space.n == number
    written = (tmp_path / "table" / "references.json").read_text()
    shutil.copytree(tmp_path / "table", tmp_path / "copy")
    write_references(ID, table=str(tmp_path / "copy"))
    assert (tmp_path / "copy" / "references.json").read_text() == written


@pytest.mark.slow  # ten seconds: two processes import torch
def test_the_processes_of_a_table_end_with_it(tmp_path, reviews, tiny_backbone):
    program = f"""
import os, signal, sd_gym

def stop(done, total):
    if done:
        print(done, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

if __name__ == "__main__":
    settings = {{"dataset": {str(reviews)!r}, "backbone": {str(tiny_backbone)!r}, "decisions": "random:8"}}
    sd_gym.tabulate("SD/Classification-Custom-v0", "table", jobs=2, on_progress=stop, **settings)
"""
    (tmp_path / "program.py").write_text(program)
    # The pipe is closed when the last process that holds it has ended.
    command = [sys.executable, tmp_path / "program.py"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=240, check=False)
    assert ended.returncode == -signal.SIGTERM
    assert ended.stdout


@pytest.mark.slow  # ten seconds: two processes import torch
def test_an_interrupted_table_does_not_wait_for_what_its_processes_are_doing(tmp_path, reviews, tiny_backbone):
    program = f"""
import time
import sd_gym
import sd_gym.envs.tabulate

write = sd_gym.envs.tabulate._write_chunk

def slow(chunk, *others):
    if chunk.split != "train":
        time.sleep(1000)
    return write(chunk, *others)

def stop(done, total):
    if done:
        raise KeyboardInterrupt

if __name__ == "__main__":
    sd_gym.envs.tabulate._write_chunk = slow
    settings = {{"dataset": {str(reviews)!r}, "backbone": {str(tiny_backbone)!r}, "decisions": "random:8"}}
    sd_gym.tabulate("SD/Classification-Custom-v0", "table", jobs=2, on_progress=stop, **settings)
"""
    (tmp_path / "program.py").write_text(program)
    ended = subprocess.run(
        [sys.executable, tmp_path / "program.py"], cwd=tmp_path, capture_output=True, timeout=240, check=False
    )
    assert ended.stderr.rstrip().endswith(b"KeyboardInterrupt")


def test_a_table_that_is_not_to_be_shared_does_not_become_one_that_is(tmp_path, table_source):
    env_id, keys = table_source
    sd_gym.tabulate(env_id, tmp_path / "table", decisions="random:3", **keys)
    with pytest.raises(ValueError, match="share; choose another --output"):
        sd_gym.tabulate(env_id, tmp_path / "table", decisions="random:3", share=True, resume=True, **keys)


def test_paths_leave_a_shared_table_with_what_follows_them(tmp_path):
    said = {"file": f"{tmp_path}, main", "backbone": str(tmp_path), "prompt": "a/b, c", "task": "classification"}
    wanted = {"file": f"{tmp_path.name}, main", "backbone": tmp_path.name}
    assert _without_paths(said) == {**said, **wanted}
