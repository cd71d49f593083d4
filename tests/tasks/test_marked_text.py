"""What of a text was read, dropped or cut."""

import copy
import json

import gymnasium as gym
import numpy as np
import pytest

from sd_gym.config import BackboneConfig
from sd_gym.data.instance import Instance
from sd_gym.tasks.marked_text import CUT, DROPPED, READ, marked_texts
from tests.conftest import make_model, save
from tests.envs.conftest import MINI, SMALL


def read(marked):
    """The characters that are read, one space where something else stands."""
    return " ".join(" ".join(piece for piece, mark in marked.runs() if mark == READ).split())


@pytest.mark.parametrize("env_id", MINI)
def test_what_is_not_struck_out_is_what_the_backbone_reads(env_id):
    core = gym.make(env_id, token_shares=[0.0, 0.25, 0.5], **SMALL).unwrapped.core
    split = core.split("test")
    for row in range(20):
        for level in range(3):
            (marked,) = split.marked_texts(row, level)
            assert marked.text == split.instances[row].source
            kept = split.encoded.input_ids[row, : split.encoded.source_length[row]].numpy()
            keep = split.tokens.kept(np.array([row]), np.array([level]))
            kept = kept if keep is None else kept[keep[0]]
            assert read(marked) == core.backbone.tokenizer.decode(kept, skip_special_tokens=True)
            assert (level > 0) == (DROPPED in marked.marks)


def test_pairs_and_what_was_cut(tmp_path, tiny_backbone):
    rows = [{"text": "the food was good", "text_pair": "fine fine food", "label": 0}] * 15
    rows += [{"text": "the food was good not bad fine", "label": 1}] * 15  # one without its pair
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"dataset": str(file), "backbone": str(tiny_backbone), "token_shares": [0.0, 0.5], "overlap": "allow"}
    env = gym.make("SD/Classification-Custom-v0", max_source_length=8, **settings)
    split = env.unwrapped.core.split("train")
    first, second = split.marked_texts(0, 0)
    assert (first.text, second.text) == ("the food was good", "fine fine food")
    assert [mark for _, mark in second.runs()] == [READ, CUT]
    first, second = split.marked_texts(0, 1)
    assert {READ, DROPPED} <= {*first.marks, *second.marks}
    (alone,) = split.marked_texts(len(split) - 1, 1)
    assert [mark for _, mark in alone.runs()][-1] == CUT


def test_a_beginning_that_was_cut(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.truncation_side = "left"
    (marked,) = marked_texts(
        Instance("", "the food was good", 0), tokenizer, BackboneConfig(name="x", max_source_length=4)
    )
    assert marked.runs() == [("the food ", CUT), ("was good", READ)]


def test_a_prompt_is_shown_as_it_is_filled_in_and_never_struck_out(tmp_path, reviews, tiny_tokenizer):
    save(make_model("gpt2"), tiny_tokenizer, tmp_path / "gpt2")
    settings = {"dataset": str(reviews), "backbone": str(tmp_path / "gpt2"), "prompt": "bad room {source} not"}
    env = gym.make("SD/Classification-Custom-v0", max_target_length=4, stop="fine", token_shares=[0.0, 0.5], **settings)
    split = env.unwrapped.core.split("train")
    (marked,) = split.marked_texts(0, 1)
    assert marked.text == f"bad room {split.instances[0].source} not"
    assert (marked.marks[:9] == READ).all()
    assert (marked.marks[-3:] == READ).all()
    assert DROPPED in marked.marks
