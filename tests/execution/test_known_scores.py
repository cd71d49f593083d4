"""Scores that are known are not computed again."""

import gymnasium as gym
import torch

CUSTOM = "SD/Classification-Custom-v0"


def test_scores_are_kept_whole(settings):
    split = gym.make(CUSTOM, quality="likelihood", **settings).unwrapped.core.split("train")
    assert split.scoring.scores()["rows"].numel() == 0
    rows = torch.arange(20).numpy()
    decisions = torch.randint(2, (20, 7), generator=torch.Generator().manual_seed(0)).numpy()
    decisions[:, -1] = 0
    before = split.scoring.quality(rows, decisions)
    saved = split.scoring.scores()
    split.scoring.load_scores(None)
    assert not split.scoring._scores
    split.scoring.load_scores(saved)
    assert {name: value.tolist() for name, value in split.scoring.scores().items() if name != "dense_log"} == {
        name: value.tolist() for name, value in saved.items() if name != "dense_log"
    }
    after = split.scoring.quality(rows, decisions)
    assert all((one == other).all() for one, other in zip(before, after, strict=True))


def test_the_qualities_that_were_not_asked_for_longest_are_forgotten(settings, monkeypatch):
    monkeypatch.setattr("sd_gym.execution.scoring.CACHED_QUALITIES", 4)
    scoring = gym.make(CUSTOM, quality="likelihood", **settings).unwrapped.core.split("train").scoring
    scoring.load_scores(None)
    dense = torch.zeros(1, 7, dtype=torch.int64).numpy()
    for row in (0, 1, 2, 3, 0, 4):
        scoring.quality(torch.tensor([row]).numpy(), dense)
    assert [row for row, _ in scoring._scores] == [2, 3, 0, 4]
    saved = scoring.scores()
    scoring.load_scores(saved)
    assert [row for row, _ in scoring._scores] == [2, 3, 0, 4]  # in the order of a run that was not cut off


def test_a_batch_is_judged_once(settings, monkeypatch):
    split = gym.make(CUSTOM, **settings).unwrapped.core.split("train")
    rows, masks = torch.arange(6).numpy(), torch.ones(6, 7, dtype=torch.int64).numpy()
    masks[:, -1] = 0
    first, passes = split.scoring.judged(rows, masks), []

    def run(rows, *_):
        passes.append(rows)
        return rows * 0.0, first[: len(rows)] + 1

    monkeypatch.setattr(split.scoring, "_run_and_judge", run)
    again = split.scoring.judged(rows, masks)
    assert (again == first).all()
    again[:] = 0  # what a caller does with it is its own affair
    assert (split.scoring.judged(rows, masks) == first).all()
    assert not passes
    assert (split.scoring.judged(rows[:5], masks[:5]) != first[:5]).all()
    monkeypatch.setattr("sd_gym.execution.scoring.BATCHES", 1)
    split.scoring.judged(rows[:4], masks[:4])
    split.scoring.judged(rows[:5], masks[:5])
    assert len(passes) == 3
