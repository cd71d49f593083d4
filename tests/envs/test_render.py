"""What an env shows is what happened: the text, what was dropped and skipped, the answer, and what it was worth."""

import copy
import json
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import DependencyNotInstalled
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_gym.envs import pygame_window
from sd_gym.envs.picture import CELL, HEIGHT, LARGEST_CELL, LOST, RAN, WIDTH, as_image
from sd_gym.envs.render import Result, Scene, as_lines
from sd_gym.envs.single import SwitchableEnv
from sd_gym.envs.vector import SwitchableVectorEnv
from sd_gym.execution.passes import Passes
from sd_gym.execution.split import BackboneSplit
from sd_gym.tasks.marked_text import CUT, DROPPED, READ, MarkedText
from tests.conftest import make_extractor, make_model, varied

SMALL = {"train_size": 60, "validation_size": 20, "test_size": 20}
SUMMARIZATION = "SD/Summarization-Mini-v0"
MINI = ["SD/Classification-Mini-v0", "SD/QuestionAnswering-Mini-v0", SUMMARIZATION]


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


# --- lines ------------------------------------------------------------------------------------------------------------


def test_lines_say_what_happened():
    env = gym.make(SUMMARIZATION, render_mode="ansi", token_shares=[0.0, 0.25], **SMALL)
    _, info = env.reset(seed=0)
    first, *_, last = env.render().splitlines()
    assert first == "encoder af af af af af af | decoder acf acf acf acf acf acf"
    assert last == "no decision yet"
    _, reward, *_, info = env.step(action_for(env, [0, 3, 13], level=1))
    first, *lines = env.render().splitlines()
    assert first == "encoder .f a. af af af af | decoder a.f acf acf acf acf acf"
    said = dict(line.split(":", 1) for line in lines)
    core = env.unwrapped.core
    split, row = core.split("train"), core.split("train").number_of[info["instance"]]
    assert f"{info['instance']} of {SUMMARIZATION}, difficulty {info['difficulty']}" in said["instance"]
    assert said["reference"].strip() == split.instances[row].target
    assert said["answer"].strip() == split.passes.answers(np.array([row]), info["decision"][None])[0]
    assert "[-" in said["text"]
    assert f"{info['quality']:.2f} (dense: {info['quality_ref']:.2f})" in said["quality"]
    assert said["quality"].endswith("kept" if info["is_success"] else "lost")
    assert f"{info['flops_ratio']:.1%}" in said["FLOPs"]
    assert float(said["reward"]) == pytest.approx(reward, abs=5e-4)


def test_a_lost_answer_is_called_lost():
    scene = scene_of()
    lost = replace(scene.result, answer="", quality=0.0, kept=False, reward=-20.0)
    lines = as_lines(replace(scene, result=lost))
    assert "answer:    (nothing)" in lines
    assert "0.00 (dense: 1.00), lost" in lines
    assert "reward:    -20.000" in lines
    assert "reward:    +0.000, -0.500" in as_lines(replace(scene, result=replace(lost, reward=np.array([0.0, -0.5]))))


# --- marks ------------------------------------------------------------------------------------------------------------


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
    rows += [{"text": "the food was good not bad", "label": 1}] * 15  # one without its pair
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
    first, second = split.marked_texts(len(split) - 1, 1)
    assert second.text == ""
    assert [mark for _, mark in first.runs()][-1] == CUT


def test_a_prompt_is_shown_as_it_is_filled_in_and_never_struck_out(tmp_path, reviews, tiny_tokenizer):
    make_model("gpt2").save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer.save_pretrained(tmp_path / "gpt2")
    settings = {"dataset": str(reviews), "backbone": str(tmp_path / "gpt2"), "prompt": "bad room {source} not"}
    env = gym.make("SD/Classification-Custom-v0", max_target_length=4, stop="fine", token_shares=[0.0, 0.5], **settings)
    split = env.unwrapped.core.split("train")
    (marked,) = split.marked_texts(0, 1)
    assert marked.text == f"bad room {split.instances[0].source} not"
    assert (marked.marks[:9] == READ).all()
    assert (marked.marks[-3:] == READ).all()
    assert DROPPED in marked.marks


def test_answers_of_every_kind_can_be_read_beside_the_reference(tmp_path, reviews, tiny_backbone, tiny_tokenizer):
    env = gym.make("SD/Classification-Custom-v0", dataset=str(reviews), backbone=str(tiny_backbone))
    core = env.unwrapped.core
    split, rows = core.split("train"), np.arange(len(core.split("train")))
    dense = np.zeros((len(rows), len(core.nvec)), dtype=np.int64)
    answers = split.passes.answers(rows, dense)
    assert set(answers) <= {"LABEL_0", "LABEL_1"}
    right = [answer == split.reference(row) for row, answer in zip(rows, answers, strict=True)]
    np.testing.assert_array_equal(right, split.scoring.run(rows, dense) == 1)
    assert 0 < np.mean(right) < 1

    row = {"question": "was the food good", "context": "the food was good", "answers": ["good"]}
    file = tmp_path / "data.jsonl"
    file.write_text(varied(row, "context"))
    make_extractor("bert").save_pretrained(tmp_path / "extractor")
    tiny_tokenizer.save_pretrained(tmp_path / "extractor")
    arguments = {"dataset": str(file), "backbone": str(tmp_path / "extractor"), "render_mode": "ansi"}
    env = gym.make("SD/QuestionAnswering-Custom-v0", **arguments)
    env.reset()
    env.step(action_for(env, []))
    assert env.unwrapped.core.split("train").reference(0) == "good"
    assert "reference: good" in env.render()
    assert "text:      was the food good\ntext:      the food was good" in env.render()


# --- pictures ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(
    text=st.text(max_size=300) | st.text(alphabet="ab ", min_size=3000, max_size=6000),
    seed=st.integers(0, 1000),
    layers=st.sampled_from([1, 6, 24, 100]),
    decided=st.booleans(),
)
def test_every_picture_has_the_same_size(text, seed, layers, decided):
    random = np.random.default_rng(seed)
    marks = random.integers(3, size=len(text)).astype(np.int8)
    skipped = np.flatnonzero(random.random(2 * layers) < 0.5)
    scene = scene_of(text, layers, skipped, level=int(random.integers(2)), marks=marks, reference=text)
    image = as_image(scene if decided else replace(scene, result=None))
    assert (image.shape, image.dtype) == ((HEIGHT, WIDTH, 3), np.uint8)


def test_each_switch_has_a_cell_of_its_own():
    dense = as_image(scene_of())
    cells = []
    for switch in range(6):
        skipped = as_image(scene_of(skipped=[switch]))
        rows, columns = np.nonzero((skipped != dense).any(axis=2))
        cells.append((rows.min(), columns.min(), rows.max(), columns.max()))
        assert rows.max() - rows.min() <= CELL
        assert columns.max() - columns.min() <= LARGEST_CELL
        assert pixels_of(skipped, RAN) < pixels_of(dense, RAN)
    for number, (top, left, *_) in enumerate(cells):
        for other_top, other_left, other_bottom, other_right in cells[number + 1 :]:
            assert not (other_top <= top <= other_bottom and other_left <= left <= other_right)


def test_what_was_lost_or_dropped_is_marked_and_more_flops_are_a_longer_bar():
    scene = scene_of()
    assert pixels_of(as_image(scene), LOST) == 0
    assert pixels_of(as_image(scene_of(marks=np.repeat([READ, DROPPED], [4, 13]), level=1)), LOST) > 0
    assert pixels_of(as_image(replace(scene, result=replace(scene.result, kept=False))), LOST) > 0
    more = as_image(replace(scene, result=replace(scene.result, flops_ratio=0.9)))
    assert pixels_of(more, RAN) > pixels_of(as_image(scene), RAN)
    before = as_image(replace(scene, result=None))
    assert pixels_of(before, RAN) < pixels_of(as_image(scene), RAN)


def test_a_vector_env_shows_what_single_ones_do():
    arguments = {"token_shares": [0.0, 0.5], **SMALL}
    ids = ["train-3", "train-1", "train-4"]
    for mode in ("ansi", "rgb_array"):
        vector = gym.make_vec(SUMMARIZATION, num_envs=3, render_mode=mode, **arguments)
        single = gym.make(SUMMARIZATION, render_mode=mode, **arguments)
        vector.reset(options={"instance": ids})
        before = vector.render()
        actions = np.stack([action_for(vector, skipped, level) for skipped, level in (([], 0), ([3], 1), ([5, 9], 0))])
        vector.step(actions)
        for identity, action, undecided, decided in zip(ids, actions, before, vector.render(), strict=True):
            single.reset(options={"instance": identity})
            np.testing.assert_array_equal(single.render(), undecided)
            single.step(action)
            np.testing.assert_array_equal(single.render(), decided)


def test_each_env_shows_what_it_last_did_in_every_autoreset_mode():
    decided, undecided = "reward:", "no decision yet"
    arguments = {"num_envs": 2, "render_mode": "ansi", **SMALL}
    zeros = np.zeros((2, len(gym.make(SUMMARIZATION, **SMALL).action_space.nvec)), dtype=np.int64)

    env = gym.make_vec(SUMMARIZATION, autoreset_mode="NextStep", **arguments)
    env.reset(seed=0)
    for expected in (decided, undecided, decided):
        *_, infos = env.step(zeros)
        for lines, identity in zip(env.render(), infos["instance"], strict=True):
            assert f"{identity} of" in lines
            assert expected in lines

    env = gym.make_vec(SUMMARIZATION, autoreset_mode="Disabled", **arguments)
    env.reset(seed=0)
    env.step(zeros)
    first, second = env.render()
    _, infos = env.reset(options={"reset_mask": np.array([False, True])})
    now = env.render()
    assert now[0] == first
    assert undecided in now[1]
    assert f"{infos['instance'][1]} of" in now[1]
    assert decided in second


def test_nothing_is_answered_or_marked_unless_it_is_shown(monkeypatch):
    envs = [gym.make(SUMMARIZATION, render_mode=mode, **SMALL) for mode in (None, "ansi", "rgb_array")]
    vector = gym.make_vec(SUMMARIZATION, num_envs=2, render_mode="rgb_array", **SMALL)
    for kind, name in ((Passes, "answers"), (BackboneSplit, "marked_texts"), (BackboneSplit, "reference")):
        monkeypatch.setattr(kind, name, lambda *args: pytest.fail("nobody asked"))
    for env in (*envs, vector):
        env.reset(seed=0)
        env.step(np.zeros(env.action_space.shape, dtype=np.int64))
    assert envs[0].unwrapped.render() is None


def test_a_video_can_be_recorded(tmp_path):
    pytest.importorskip("moviepy")
    from gymnasium.wrappers import RecordVideo
    from moviepy import VideoFileClip

    folder = tmp_path / "videos"
    env = gym.make(SUMMARIZATION, render_mode="rgb_array", **SMALL)
    env = RecordVideo(env, str(folder), episode_trigger=lambda episode: True)
    for _ in range(2):
        env.reset(seed=0)
        env.step(action_for(env, [1]))
    env.close()
    assert len(list(folder.glob("*.mp4"))) == 2
    with VideoFileClip(str(folder / "rl-video-episode-0.mp4")) as video:
        assert video.size == [WIDTH, HEIGHT]
        assert video.duration == 2  # the text, and what came of the decision, a second each


# --- the window -------------------------------------------------------------------------------------------------------


def test_a_window_opens_and_closes(monkeypatch):
    pygame = pytest.importorskip("pygame")
    monkeypatch.setitem(SwitchableEnv.metadata, "render_fps", 1000)
    env = gym.make(SUMMARIZATION, render_mode="human", **SMALL)
    picture = gym.make(SUMMARIZATION, render_mode="rgb_array", **SMALL)
    for one in (env, picture):
        one.reset(seed=0)
    shown = pygame.surfarray.array3d(pygame.display.get_surface()).swapaxes(0, 1)
    np.testing.assert_array_equal(shown, picture.render())
    for one in (env, picture):
        one.step(action_for(env, [2]))
    shown = pygame.surfarray.array3d(pygame.display.get_surface()).swapaxes(0, 1)
    np.testing.assert_array_equal(shown, picture.render())
    assert env.render() is None
    copy.deepcopy(env.unwrapped._window).close()  # one of its own
    assert pygame.display.get_init()
    env.close()
    assert not pygame.display.get_init()
    env.close()
    check_env(env.unwrapped)


def test_without_pygame_there_is_no_window_and_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(pygame_window, "HAS_PYGAME", False)
    with pytest.raises(DependencyNotInstalled, match="run `pip install pygame`"):
        SwitchableEnv("summarization_mini.yaml", render_mode="human", **SMALL)
    with pytest.raises(ValueError, match="render_mode must be one of ansi, rgb_array or None, got 'human'"):
        SwitchableVectorEnv("summarization_mini.yaml", render_mode="human", **SMALL)


# --- texts in the infos -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", MINI)
def test_infos_hold_the_texts_on_request(env_id):
    env = gym.make(env_id, info_text=True, **SMALL)
    check_env(env.unwrapped)
    _, before = env.reset(seed=0)
    *_, after = env.step(action_for(env, [0]))
    split = env.unwrapped.core.split("train")
    instance = split.instances[split.number_of[before["instance"]]]
    for info in (before, after):
        assert info["source"] == instance.source
        assert info["reference"] == instance.target
        assert "source_pair" not in info

    vector = gym.make_vec(env_id, num_envs=3, info_text=True, **SMALL)
    _, before = vector.reset(seed=0)
    *_, after = vector.step(np.zeros(vector.action_space.shape, dtype=np.int64))
    for info in (before, after["final_info"]):
        np.testing.assert_array_equal(info["_source"], True)
        expected = [split.instances[split.number_of[identity]].source for identity in info["instance"]]
        assert info["source"].tolist() == expected
    assert before["instance"].tolist() == after["final_info"]["instance"].tolist()
    assert after["source"].tolist() != before["source"].tolist()


def test_infos_hold_the_second_text_of_pairs(tmp_path, tiny_backbone):
    file = tmp_path / "pairs.jsonl"
    file.write_text(varied({"text": "the food", "text_pair": "was good", "label": 1}, "text_pair"))
    arguments = {"dataset": str(file), "backbone": str(tiny_backbone), "info_text": True}
    _, info = gym.make("SD/Classification-Custom-v0", **arguments).reset(seed=0)
    assert (info["source"], info["reference"]) == ("the food", "LABEL_1")
    assert info["source_pair"].startswith("was good")
    _, infos = gym.make_vec("SD/Classification-Custom-v0", num_envs=2, **arguments).reset(seed=0)
    assert all(text.startswith("was good") for text in infos["source_pair"])
