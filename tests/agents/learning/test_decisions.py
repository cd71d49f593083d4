"""What a policy decides on a split, and what that costs."""

import numpy as np
import torch
from sd_gym.agents.learning.decisions import decision_flops, outcomes, score_decisions
from sd_gym.agents.registry import make_agent


def test_evaluation_walks_the_split_in_order(env):
    split = env.core.split("train")
    policy = make_agent("random", env).policy()
    scored = outcomes(env.core, policy, split)
    rows = np.arange(len(split))
    outcome = env.core.score(split, rows, scored["decision"])
    for name in ("quality", "quality_ref", "flops_ratio"):
        np.testing.assert_array_equal(scored[name], getattr(outcome, name))


def test_looking_counts_at_every_stage(staged_env):
    core, split = staged_env.core, staged_env.core.split("test")
    policy, rows = make_agent("dense", staged_env).policy(), np.arange(len(split))
    size, logits = policy.observation_size, int(core.nvec.sum())
    one = 2 * (size * 64 + 64 * 64 + 64 * logits)
    assert policy.flops == 3 * one
    head = split.backbone.flops.costs(split.encoded.source_length)[0]
    np.testing.assert_array_equal(decision_flops(core, policy, split, rows), 3 * one + 2 * head)


def test_a_walk_is_scored_as_its_decisions_are(staged_env):
    core, split = staged_env.core, staged_env.core.split("validation")
    policy = make_agent("ppo", staged_env, seed=3).policy()
    with torch.no_grad():
        policy.head.weight.mul_(100)
    walked = outcomes(core, policy, split)
    assert len(np.unique(walked["decision"], axis=0)) > 1
    split.scoring.load_scores(None)
    scored = score_decisions(core, split, np.arange(len(split)), walked["decision"])
    for name, values in scored.items():
        np.testing.assert_allclose(walked[name], values)
