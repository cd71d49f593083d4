"""The decision network: what it chooses."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_gym.policy import DecisionPolicy
from tests.policy.conftest import policy_of


def log_prob(policy, observations, decisions):
    """Of whole decisions."""
    with torch.no_grad():
        each, _ = policy.evaluate_decisions(policy(torch.as_tensor(observations)), torch.as_tensor(decisions))
    return each.sum(dim=1).numpy()


@settings(max_examples=40, deadline=None)
@given(
    nvec=st.lists(st.integers(1, 4), min_size=1, max_size=7),
    seed=st.integers(0, 1000),
    exploration=st.sampled_from([0.0, 0.01]),
)
def test_log_probabilities_and_entropy_are_those_of_each_component(nvec, seed, exploration):
    policy, seen = policy_of(seed, nvec=nvec)
    decisions = torch.from_numpy(np.random.default_rng(seed).integers(nvec, size=(len(seen), len(nvec))))
    with torch.no_grad():
        logits = policy(torch.as_tensor(seen))
        taken, entropy = policy.evaluate_decisions(logits, decisions, exploration)
    expected, ends = torch.zeros(len(seen)), np.cumsum(nvec)
    for number, (size, end) in enumerate(zip(nvec, ends, strict=True)):
        of_one = logits[:, end - size : end]
        probability = (1 - size * exploration) * of_one.softmax(dim=1) + exploration
        torch.testing.assert_close(
            taken[:, number].exp(), probability.gather(1, decisions[:, [number]])[:, 0], atol=1e-6, rtol=1e-4
        )
        expected += torch.special.entr(probability).sum(dim=1)
    torch.testing.assert_close(entropy, expected, atol=1e-4, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), size=st.integers(1, 12))
def test_a_reduced_policy_makes_the_most_probable_of_few_decisions(seed, size):
    policy, seen = policy_of(seed)
    small = policy.reduced(size, seen)
    masks, decisions = small.codebook.numpy(), small.decide(seen)
    assert len(np.unique(masks, axis=0)) == len(masks) <= size
    assert not masks[0].any()  # the dense one is always among them
    own = {tuple(decision) for decision in policy.decide(seen)}
    assert all(tuple(mask) in own for mask in masks[1:])
    of_masks = np.stack([log_prob(policy, seen, np.tile(mask, (60, 1))) for mask in masks])
    np.testing.assert_allclose(log_prob(policy, seen, decisions), of_masks.max(axis=0), atol=1e-4)
    assert policy.codebook is None


def test_with_room_for_all_its_decisions_a_policy_decides_as_before():
    policy, seen = policy_of(0)
    small = policy.reduced(100, seen)
    np.testing.assert_array_equal(small.decide(seen), policy.decide(seen))
    assert not small.with_margin(1000.0).decide(seen).any()


def test_a_margin_counts_for_each_choice_of_graded_components(tmp_path):
    policy = DecisionPolicy(3, [2, 4], [], graded=True)
    policy.initialise(torch.tensor([0.0, 2.5, 0.0, 3.0, 5.0, 6.0]))
    policy.save(tmp_path)
    again, seen = DecisionPolicy.load(tmp_path), np.zeros((1, 3), dtype=np.float32)
    torch.nn.init.zeros_(again.head.weight)
    decided = [again.with_margin(margin).decide(seen)[0].tolist() for margin in (0.0, 1.5, 2.2, 2.7, 3.5)]
    assert decided == [[1, 3], [1, 2], [1, 1], [0, 1], [0, 0]]
    found = again.preference(seen)
    np.testing.assert_allclose(found[np.isfinite(found)], [2.5, 3.0, 2.0, 1.0])


@pytest.mark.parametrize("graded", [False, True])
def test_preferences_are_the_margins_at_which_decisions_change(graded):
    torch.manual_seed(0)
    policy = DecisionPolicy(3, [2, 2, 2, 4], [], graded=graded).eval()
    with torch.no_grad():
        policy.head.bias.copy_(4 * torch.randn(len(policy.head.bias)))
    seen = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    # Without a codebook, graded choices compare with the choice before them alone.
    for one in (*([] if graded else [policy]), policy.reduced(5, seen), policy.reduced(1, seen)):
        found = one.preference(seen)
        for row in range(len(seen)):
            changes = np.unique(found[row][np.isfinite(found[row])].round(4))
            between = np.convolve(np.concatenate([[-100], changes, [100]]), [0.5, 0.5], mode="valid")
            decided = [one.with_margin(margin).decide(seen[row : row + 1])[0].tolist() for margin in between]
            assert all(one != other for one, other in pairwise(decided))
            for low, high, skipped in zip([-100, *changes], [*changes, 100], decided, strict=True):
                for margin in np.linspace(low + 1e-3, high - 1e-3, 4):
                    assert one.with_margin(margin).decide(seen[row : row + 1])[0].tolist() == skipped


def test_a_codebook_is_saved_and_checked(tmp_path):
    policy, seen = policy_of(0)
    small = policy.reduced(4, seen)
    small.save(tmp_path)
    loaded = DecisionPolicy.load(tmp_path)
    np.testing.assert_array_equal(loaded.decide(seen), small.decide(seen))
    assert loaded.flops == small.flops == policy.flops + 2 * 11 * len(small.codebook)
    description = json.loads((tmp_path / "policy.json").read_text())
    for wrong, message in (
        ([[0, 0, 0, 0, 3]], "expected a codebook of decisions, each below"),
        ([[0, 0]], "expected a codebook of decisions, each below"),
        ([], "codebook: List should have at least 1 item"),
    ):
        (tmp_path / "policy.json").write_text(json.dumps({**description, "codebook": wrong}))
        with pytest.raises(ValueError, match=message):
            DecisionPolicy.load(tmp_path)
    with pytest.raises(ValueError, match="a policy with a codebook has no odds"):
        small.skip_logits(seen)
    with pytest.raises(ValueError, match="at least one decision"):
        policy.reduced(0, seen)


@pytest.mark.parametrize("kind", ["plain", "codebook", "per stage", "tokens"])
def test_under_autocast_a_policy_decides_as_without(kind):
    stages = {"stages": ["first", "middle"], "per_stage": True} if kind == "per stage" else {}
    policy, _ = policy_of(0, **stages, channels=5 if kind == "tokens" else None)
    seen = np.random.default_rng(0).normal(size=(2000, 4)).astype(np.float32)
    if kind == "tokens":
        seen = {"tokens": seen.reshape(200, 10, 4), "mask": np.ones((200, 10), dtype=np.int8)}
    if kind == "codebook":
        policy = policy.reduced(8, seen)
    asked = [policy.decide] if kind == "codebook" else [policy.decide, policy.skip_logits, policy.preference]
    for ask in asked:
        wanted = ask(seen)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            np.testing.assert_array_equal(ask(seen), wanted)
