"""Imitation at stages: the combinations of ways, their outcomes, and the expected cost of a policy."""

from itertools import product

import gymnasium as gym
import numpy as np
import pytest
import torch
from sd_gym.agents.imitation.agent import PRICES
from sd_gym.agents.imitation.staged import COMBINATIONS, Combinations, combinations_of, ways_of_stages
from sd_gym.agents.registry import make_agent
from stable_baselines3.common.logger import configure

ANSWERED = {"stages": ["first", "encoder.1", "answer"]}
PRICE = 3.0


def vec_env(reviews, tiny_backbone, **keys):
    files = {"dataset": str(reviews), "backbone": str(tiny_backbone)}
    return gym.make_vec("SD/Classification-Custom-Staged-v0", num_envs=2, **files, **keys).unwrapped


def path_of(core, seed=0):
    """A random path from dense to all skipped."""
    path = [np.zeros_like(core.nvec)]
    skipping = np.flatnonzero(core.nvec[: len(core.nvec) - core.has_answer_stage] > 1)
    for component in np.random.default_rng(seed).permutation(skipping):
        path.append(path[-1].copy())
        path[-1][component] = 1
    return np.stack(path)


@pytest.fixture(params=[{"stages": ["first", "encoder.1"], "token_shares": [0, 0.5]}, ANSWERED])
def env(reviews, tiny_backbone, request):
    return vec_env(reviews, tiny_backbone, **request.param)


@pytest.fixture
def known(env):
    core, rows = env.core, np.arange(12)
    return Combinations(core, rows, path_of(core), False, None, lambda scored: None, 0)


def decided_by(known, policy):
    """What a policy decides on the instances of the combinations, stage by stage."""
    decisions, _ = known.core.rollout(known.core.split("train"), known.rows, policy.decide)
    return decisions


def sure_policy(env, known, combination, *, goes_on):
    """A policy that takes one combination for all inputs."""
    policy, decision = make_agent("imitation", env).new_policy(), known.decisions[combination].copy()
    if known.core.has_answer_stage:
        decision[-1] = goes_on
    with torch.no_grad():
        policy.head.weight.zero_()
        policy.head.bias.zero_()
        policy.head.bias[np.cumsum([0, *known.core.nvec[:-1]]) + decision] = 100.0
    policy.codebook = known.codebook
    return policy


def test_the_ways_of_all_stages_together_are_the_path(env):
    core = env.core
    path = path_of(core)
    parts = ways_of_stages(core, path)
    for ways, components in zip(parts, core.stage_actions.components, strict=False):
        own = np.isin(np.arange(len(core.nvec)), components)
        assert (np.diff(ways, axis=0).sum(axis=1) == 1).all()
        assert {tuple(mask * own) for mask in path} == {tuple(way) for way in ways}


def test_few_ways_are_combined_in_all_ways_and_of_many_some_are_drawn():
    few = combinations_of([3, 2, 4], np.random.default_rng(0))
    assert len(np.unique(few, axis=0)) == len(few) == 24
    many = combinations_of([7, 7, 7], np.random.default_rng(0))
    assert 0.9 * COMBINATIONS < len(np.unique(many, axis=0)) == len(many) <= COMBINATIONS
    assert not many[0].any()
    assert (many.max(axis=0) == 6).all()


def test_outcomes_are_those_of_the_env(known):
    """Passes that several combinations share, in batches, give what each combination gives alone."""
    core, split, rows = known.core, known.core.split("train"), known.rows
    for number, decision in enumerate(known.decisions):
        decisions = np.tile(decision, (len(rows), 1))
        outcome = core.score(split, rows, decisions)
        np.testing.assert_allclose(known.outcomes.lost[:, number], outcome.cost, atol=1e-5)
        np.testing.assert_allclose(known.outcomes.flops[:, number], outcome.flops_ratio, rtol=1e-6)
        for place, (stage, seen) in enumerate(zip(known.stages, known.outcomes.seen, strict=True)):
            observed, _ = core.stage_observer.observe(split, rows, place, decisions, None)
            np.testing.assert_allclose(seen[:, stage.before[number]], observed, atol=1e-4)
        if core.has_answer_stage:
            decisions[:, -1] = 1
            both = known.outcomes.flops[:, number] + known.outcomes.going_on[:, number]
            np.testing.assert_allclose(both, core.score(split, rows, decisions).flops_ratio, rtol=1e-5)


def test_the_cost_of_a_sure_policy_is_that_of_its_decision(env, known):
    for goes_on, combination in product({False, known.core.has_answer_stage}, range(0, len(known.decisions), 3)):
        policy = sure_policy(env, known, combination, goes_on=goes_on)
        expected = known.decisions[combination].copy()
        expected[-1] = goes_on if known.core.has_answer_stage else expected[-1]
        assert (decided_by(known, policy) == expected).all()
        flops, risk = known.outcomes.flops[:, combination], known.risk[:, combination]
        answer = known.outcomes.going_on[:, combination] if goes_on else PRICE * risk
        cost = known.costs(known.log_probs(policy, slice(None)), slice(None), PRICE)[0].item()
        assert cost == pytest.approx((flops + answer).mean().item(), abs=1e-4)


def test_the_cost_of_an_unsure_policy_is_the_mean_over_its_draws(env, known):
    policy = make_agent("imitation", env).new_policy()
    with torch.no_grad():
        policy.head.weight.mul_(5)
    rng, chosen, outcomes = np.random.default_rng(0), slice(0, 4), known.outcomes
    total = []
    for _ in range(4000):
        taken = np.zeros((4, len(known.core.nvec)), dtype=np.int64)
        for stage, seen in zip(known.stages, outcomes.seen, strict=True):
            before = np.array([(stage.earlier == row).all(axis=1).argmax() for row in taken])
            with torch.no_grad():
                share = policy.log_likelihood(policy(seen[np.arange(4), before]), stage.ways).softmax(dim=1).numpy()
            way = [rng.choice(len(one), p=one / one.sum()) for one in share.astype(float)]
            ways = stage.ways.numpy()[way]
            if (stage.ways[:, -1] >= 0).all() and known.core.has_answer_stage:
                goes_on = ways[:, -1] == 1
                break
            taken = np.where(ways >= 0, ways, taken)
        else:
            goes_on = np.zeros(4, dtype=bool)
        number = np.array([(known.decisions == row).all(axis=1).argmax() for row in taken])
        at = np.arange(4)
        answer = np.where(goes_on, outcomes.going_on[at, number], PRICE * known.risk[at, number])
        total.append((outcomes.flops[at, number].numpy() + answer).mean())
    error = np.std(total) / len(total) ** 0.5
    with torch.no_grad():
        cost = known.costs(known.log_probs(policy, chosen), chosen, PRICE)[0].item()
    assert cost == pytest.approx(float(np.mean(total)), abs=float(4 * error))


def test_risk_is_foreseen_by_trees_that_have_not_learned_on_the_instance(reviews, tiny_backbone):
    """Where losses are chance, nothing can be foreseen: no prediction follows the loss of its own instance."""
    core = vec_env(reviews, tiny_backbone, **ANSWERED).core
    rows = np.arange(len(core.split("train")))
    known = Combinations(core, rows, path_of(core), False, None, lambda scored: None, 0)
    lost = torch.from_numpy(np.random.default_rng(0).choice([0.0, 1.0], known.outcomes.lost.shape)).float()
    known.outcomes = known.outcomes._replace(lost=lost)
    risk, skips = known._risk().numpy(), known.decisions.any(axis=1)
    assert not risk[:, ~skips].any()
    assert abs(np.corrcoef(risk[:, skips].ravel(), lost.numpy()[:, skips].ravel())[0, 1]) < 0.2


def test_each_price_gives_an_operating_point_that_takes_only_combinations_that_were_run(env, tmp_path):
    agent = make_agent("imitation", env, epochs=3, batch_size=8)
    agent.learn(1, configure(str(tmp_path), []), lambda rollout: None)
    points, path = agent.operating_points(), agent.path
    priced = [point for point in points if point.variant_of is not None]
    bold = [point for point in priced if not point.margin]
    assert len(bold) == len({id(point.policy.head) for point in bold}) == len(PRICES) < len(priced)
    ways = ways_of_stages(env.core, path)
    rows = np.arange(len(env.core.split("train")))
    for point in points:
        decisions, _ = env.core.rollout(env.core.split("train"), rows, point.policy.decide)
        for of_stage, components in zip(ways, env.core.stage_actions.components, strict=False):
            assert {tuple(row) for row in decisions[:, components]} <= {tuple(way) for way in of_stage[:, components]}


def test_one_mask_for_all_inputs_and_going_on_as_learned_are_operating_points(reviews, tiny_backbone):
    env = vec_env(reviews, tiny_backbone, **ANSWERED)
    agent = make_agent("imitation", env, epochs=3, batch_size=8)
    agent.learn(1, configure(None, []), lambda rollout: None)
    rows, learned = np.arange(len(env.core.split("train"))), agent.policy()
    points = [point for point in agent.operating_points() if point.variant_of is None]
    decided = [env.core.rollout(env.core.split("train"), rows, point.policy.decide)[0] for point in points]
    masks = np.unique(np.concatenate(decided)[:, :-1], axis=0)
    assert len(masks) == 1
    assert masks.any()
    shares = [decisions[:, -1].mean() for decisions in decided]
    assert shares == sorted(shares, reverse=True)  # from cautious to bold
    assert shares[0] > shares[-1]
    seen = np.random.default_rng(0).normal(size=(50, env.core.observation_space.shape[0])).astype(np.float32)
    seen[:, :3] = [0, 0, 1]
    np.testing.assert_array_equal(points[0].origin.preference(seen), learned.preference(seen))
    assert not points[0].origin.with_margin(1000.0).decide(seen)[:, :-1].any()


def test_the_best_mask_has_the_least_mean_cost_at_its_best_threshold(reviews, tiny_backbone):
    core = vec_env(reviews, tiny_backbone, **ANSWERED).core
    rows, random = np.arange(len(core.split("train"))), np.random.default_rng(0)
    known = Combinations(core, rows, path_of(core), False, None, lambda scored: None, 0)
    lost = random.choice([-1.0, 0.0, 1.0], known.outcomes.lost.shape, p=[0.1, 0.6, 0.3])
    known.outcomes = known.outcomes._replace(lost=torch.from_numpy(lost).float())
    policy = make_agent("imitation", vec_env(reviews, tiny_backbone, **ANSWERED)).new_policy()
    with torch.no_grad():
        preferred = known.log_probs(policy, slice(None))[-1]
    accepts, costs = (preferred[..., 0] - preferred[..., 1]).numpy(), []
    _, _, flops, going_on = (values if isinstance(values, list) else values.numpy() for values in known.outcomes)
    for number in range(len(known.decisions)):
        of_mask = accepts[:, number]
        accepted = [of_mask >= threshold for threshold in of_mask]
        answer = [np.where(taken, PRICE * lost[:, number], going_on[:, number]) for taken in accepted]
        costs.append(flops[:, number].mean() + np.mean(answer, axis=1).min())
    np.testing.assert_array_equal(known.best_mask(policy, PRICE), known.decisions[np.argmin(costs)])


def test_the_risk_of_a_single_instance_is_its_loss(env):
    core = env.core
    known = Combinations(core, np.zeros(1, dtype=np.int64), path_of(core), False, None, lambda _: None, 0)
    assert torch.equal(known.risk, known.outcomes.lost)


def test_an_answer_is_accepted_by_its_judgement_alone(reviews, tiny_backbone):
    env = vec_env(reviews, tiny_backbone, **ANSWERED)
    agent = make_agent("imitation", env, epochs=2)
    agent.learn(1, configure(None, []), lambda rollout: None)
    policy, size = agent.policy(), env.core.observation_space.shape[0]
    random = np.random.default_rng(0)
    observed = random.normal(size=(64, size)).astype(np.float32)
    observed[:, :3] = [0, 0, 1]
    others = observed.copy()
    others[:, 4:-3] = random.normal(size=(64, size - 7))
    logits, same = (policy(torch.from_numpy(values))[:, -2:] for values in (observed, others))
    torch.testing.assert_close(logits, same)
    assert len(logits.unique(dim=0)) == 64
