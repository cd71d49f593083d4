"""What an env shows is what happened: the text, what was dropped and skipped, the answer, and what it was worth."""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest

from sd_gym.envs.picture import HEIGHT, WIDTH
from sd_gym.envs.render import as_lines
from sd_gym.execution.passes import Passes
from sd_gym.execution.split import BackboneSplit
from tests.conftest import make_extractor, save, varied
from tests.envs.conftest import SMALL, action_for, scene_of

SUMMARIZATION = "SD/Summarization-Mini-v0"


# --- lines ------------------------------------------------------------------------------------------------------------


def test_lines_say_what_happened():
    env = gym.make(SUMMARIZATION, render_mode="ansi", token_shares=[0.0, 0.25], **SMALL)
    _, info = env.reset(seed=0)
    first, *_, last = env.render().splitlines()
    assert first == "encoder af af af af af af | decoder acf acf acf acf acf acf"
    assert last == "no answer yet"
    _, reward, *_, info = env.step(action_for(env, [0, 3, 13], level=1))
    first, *lines = env.render().splitlines()
    assert first == "encoder .f a. af af af af | decoder a.f acf acf acf acf acf"
    said = dict(line.split(":", 1) for line in lines)
    core = env.unwrapped.core
    split, row = core.split("train"), core.split("train").row_of[info["instance"]]
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
    assert "went on" not in lines
    assert "|, went on densely after the answer" in as_lines(replace(scene, result=replace(lost, went_on=True)))
    assert "reward:    -20.000" in lines
    assert "reward:    +0.000, -0.500" in as_lines(replace(scene, result=replace(lost, reward=np.array([0.0, -0.5]))))


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
    save(make_extractor("bert"), tiny_tokenizer, tmp_path / "extractor")
    arguments = {"dataset": str(file), "backbone": str(tmp_path / "extractor"), "render_mode": "ansi"}
    env = gym.make("SD/QuestionAnswering-Custom-v0", **arguments)
    env.reset()
    env.step(action_for(env, []))
    assert env.unwrapped.core.split("train").reference(0) == "good"
    assert "reference: good" in env.render()
    assert "text:      was the food good\ntext:      the food was good" in env.render()


# --- pictures ---------------------------------------------------------------------------------------------------------


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
    decided, undecided = "reward:", "no answer yet"
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


@pytest.mark.filterwarnings("ignore:.*HumanRendering")
def test_gymnasium_shows_the_picture_in_a_window():
    pygame = pytest.importorskip("pygame")
    env = gym.make(SUMMARIZATION, render_mode="human", **SMALL)
    env.metadata["render_fps"] = 1000
    env.reset(seed=0)
    env.step(action_for(env, [2]))
    shown = pygame.surfarray.array3d(pygame.display.get_surface()).swapaxes(0, 1)
    np.testing.assert_array_equal(shown, env.unwrapped.render())
    env.close()
    assert not pygame.display.get_init()


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
        assert video.duration == 2  # the text, and the outcome, a second each
