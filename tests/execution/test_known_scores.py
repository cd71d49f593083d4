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
    monkeypatch.setattr("sd_gym.execution.scoring.KNOWN", 4)
    scoring = gym.make(CUSTOM, quality="likelihood", **settings).unwrapped.core.split("train").scoring
    scoring.load_scores(None)
    dense = torch.zeros(1, 7, dtype=torch.int64).numpy()
    for row in (0, 1, 2, 3, 0, 4):
        scoring.quality(torch.tensor([row]).numpy(), dense)
    assert [row for row, _ in scoring._scores] == [2, 3, 0, 4]
    saved = scoring.scores()
    scoring.load_scores(saved)
    assert [row for row, _ in scoring._scores] == [2, 3, 0, 4]  # in the order of a run that was not cut off
