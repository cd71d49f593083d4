"""Four parts of a data set: rows of the backbone, and new ones for policies."""

import json
import shutil

import gymnasium as gym
import numpy as np
import pytest
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st

from sd_gym.config import DataConfig
from sd_gym.data.instance import Instance
from sd_gym.errors import DataError
from sd_gym.tasks.backbone_rows import ROWS, backbone_part, backbone_rows, row_hashes, write_backbone_rows
from sd_gym.tasks.splits import BACKBONE, Splits


def instances_of(texts):
    return [Instance(str(number), text, 0) for number, text in enumerate(texts)]


@given(texts=st.lists(st.text(min_size=1), min_size=1, max_size=30), share=st.floats(0.01, 1), seed=st.integers(0, 9))
def test_the_part_depends_on_the_texts_alone(texts, share, seed):
    part = backbone_part(instances_of(texts), share)
    order = np.random.default_rng(seed).permutation(len(texts))
    assert (backbone_part(instances_of([texts[row] for row in order]), share) == part[order]).all()
    sides = {text.strip(): set() for text in texts}
    for text, own in zip(texts, part, strict=True):
        sides[text.strip()].add(bool(own))
    assert all(len(side) == 1 for side in sides.values())
    different = len({text.strip() for text in texts})
    if different == len(texts):
        assert part.sum() == max(1, round(share * len(texts)))


def test_a_number_of_rows():
    texts = instances_of(f"text {number}" for number in range(20))
    assert backbone_part(texts, 5).sum() == 5
    for wrong in (0, -1, 21, float("nan")):
        with pytest.raises(ValueError, match="expected a share of the 20 training rows"):
            backbone_part(texts, wrong)


@pytest.fixture
def prepared(tmp_path):
    """A folder with 30 training and 10 other rows, and that of a backbone that was prepared on 12 of the 30."""
    for split, texts in (("train", range(30)), ("validation", range(30, 35)), ("test", range(35, 40))):
        lines = [json.dumps({"text": f"text {number}", "label": number % 2}) + "\n" for number in texts]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    whole = Splits(DataConfig(dataset=str(tmp_path)), "classification")["train"]
    own = backbone_part(whole, 0.4)
    backbone = tmp_path / "backbone"
    backbone.mkdir()
    write_backbone_rows(backbone, row_hashes(whole)[own])
    return tmp_path, str(backbone), {one.source for one, is_own in zip(whole, own, strict=True) if is_own}


def splits_of(folder, backbone, **values):
    return Splits(DataConfig(dataset=str(folder), **values), "classification", backbone)


def test_policies_learn_on_rows_that_the_backbone_does_not_know(prepared):
    folder, backbone, known = prepared
    train = splits_of(folder, backbone)["train"]
    assert len(train) == 18
    assert not known & {one.source for one in train}
    assert train.provenance["of_backbone"] == 12
    assert len(splits_of(folder, backbone, train_size=10)["train"]) == 10
    every = splits_of(folder, backbone, policy_rows="all")["train"]
    assert len(every) == 30
    assert every.also_in == {BACKBONE: 12}
    assert len(Splits(DataConfig(dataset=str(folder)), "classification")["train"]) == 30


def test_selection_and_test_rows_of_the_backbone_are_an_error(prepared):
    folder, backbone, _ = prepared
    cut = {"test": "train[:15]"}
    with pytest.raises(DataError, match=r"rows of test .* are rows of the backbone"):
        splits_of(folder, backbone, splits=cut)["train"]
    dropped = splits_of(folder, backbone, splits=cut, overlap="drop")["test"]
    assert 0 < len(dropped) == 15 - dropped.of_backbone
    with pytest.warns(UserWarning, match="as overlap=allow says"):
        assert len(splits_of(folder, backbone, splits=cut, overlap="allow")["test"]) == 15


def test_the_size_of_train_counts_what_is_left(prepared):
    folder, backbone, known = prepared
    unknown = [text for text in (f"text {number}" for number in range(30)) if text not in known]
    lines = [json.dumps({"text": text, "label": 0}) + "\n" for text in unknown[:8]]
    (folder / "test.jsonl").write_text("".join(lines))
    train = splits_of(folder, backbone, overlap="drop", train_size=9)["train"]
    assert [one.source for one in train] == unknown[8:17]
    with pytest.raises(DataError, match="5 of the 5 rows of train"):
        splits_of(folder, backbone, train_size=5)["train"]


def test_a_backbone_that_knows_all_rows_leaves_none(prepared):
    folder, backbone, _ = prepared
    whole = splits_of(folder, backbone, policy_rows="all")["train"]
    write_backbone_rows(folder / "backbone", row_hashes(whole))
    with pytest.raises(DataError, match=r"all 30 rows of train .* set policy_rows=all"):
        splits_of(folder, backbone)["train"]


def test_a_damaged_file_is_named(prepared):
    folder, backbone, _ = prepared
    (folder / "backbone" / ROWS).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="backbone_rows"):
        backbone_rows(backbone)


def test_rows_of_a_backbone_on_the_hub_are_known(prepared, tmp_path, monkeypatch):
    _, backbone, _ = prepared
    in_cache = tmp_path / "models--me--prepared"
    shutil.copytree(backbone, in_cache / "snapshots" / "1")
    (in_cache / "refs").mkdir()
    (in_cache / "refs" / "main").write_text("1")
    for name, value in (("HF_HUB_CACHE", str(tmp_path)), ("HF_HUB_OFFLINE", True)):
        monkeypatch.setattr(constants, name, value)
    np.testing.assert_array_equal(backbone_rows("me/prepared"), backbone_rows(backbone))
    assert not len(backbone_rows("me/other"))


def test_the_bundled_backbone_knows_no_rows():
    env = gym.make("SD/Classification-Mini-v0", train_size=20, validation_size=20, test_size=20)
    assert env.unwrapped.core.data["train"].provenance["of_backbone"] == 0
