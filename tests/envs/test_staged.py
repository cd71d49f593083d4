"""Envs of several stages: an episode is one instance, a step decides the switches up to the next stage."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from sd_gym.envs import ConfigError
from sd_gym.envs.sb3 import SwitchableVecEnv
from sd_gym.projection import standardised
from tests.envs.conftest import actions_of, played

ID = "SD/Classification-Mini-Staged-v0"
SMALL = {"train_size": 40, "validation_size": 20, "test_size": 20}
TASKS = ["Classification", "Summarization", "QuestionAnswering"]
STAGES = [["first", "encoder.3", "decoder"], ["every_layer"], ["encoder.2"]]


def mini(task, **settings):
    return gym.make(f"SD/{task}-Mini-v0", **SMALL, **settings).unwrapped


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("task", TASKS)
def test_the_return_is_the_reward_of_the_same_decision_in_one_step(task, stages):
    env, dense = (mini(task, stages=stages, dense_reward=pays, token_shares=[0, 0.5]) for pays in (False, True))
    one = mini(task, token_shares=[0, 0.5])
    for seed in range(3):
        actions = actions_of(env, seed)
        steps = played(env, actions)
        one.reset(seed=3)
        _, reward, _, _, info = one.step(steps[-1][2]["decision"])
        assert [step[0] for step in steps] == [0.0] * (len(steps) - 1) + [reward]
        np.testing.assert_equal({key: steps[-1][2][key] for key in info}, info)
        paid = [step[0] for step in played(dense, actions)]
        assert sum(paid) == pytest.approx(reward, abs=1e-9)
        assert len(paid) == 1 or any(paid[:-1])


def test_each_stage_decides_its_own_switches():
    env = gym.make(ID, **SMALL, token_shares=[0, 0.5]).unwrapped
    core = env.core
    assert core.stages == ["first", "encoder.3", "decoder"]
    widths = [columns.stop - columns.start for columns in core.columns]
    widest = max(widths)
    assert env.action_space.nvec.tolist() == [2] * widest + [2]
    _, info = env.reset(seed=0)
    masks, ones = [info["action_mask"]], np.ones(widest + 1, dtype=np.int64)
    for number in range(3):
        *_, info = env.step(ones)
        decided = np.zeros(len(core.nvec), dtype=np.int64)
        decided[: core.columns[number].stop], decided[-1] = 1, 1
        assert info["decision"].tolist() == decided.tolist()
        masks.append(info["action_mask"])
    for number, width in enumerate(widths):
        allowed = masks[number].reshape(-1, 2)
        assert allowed[:, 0].all()
        assert allowed[:-1, 1].tolist() == [1] * width + [0] * (widest - width)
        assert allowed[-1, 1] == (number == 0)  # tokens are dropped before the first layer


def test_what_is_seen_depends_on_what_was_decided():
    env = mini("Classification", stages=["first", "encoder.3"])
    (_, first, _), _ = played(env, [np.zeros(env.action_space.shape, int)] * 2)
    (_, other, _), _ = played(env, [np.ones(env.action_space.shape, int) * (env.action_space.nvec > 1)] * 2)
    assert first[:2].tolist() == other[:2].tolist() == [0, 1]  # the second stage
    assert not np.allclose(first, other)
    start, _ = env.reset(seed=3)
    np.testing.assert_array_equal(start[3:], mini("Classification").reset(seed=3)[0])


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_vector_env_is_its_single_envs(mode, stages):
    vector = gym.make_vec(
        "SD/Classification-Mini-v0", num_envs=3, stages=stages, autoreset_mode=mode, **SMALL
    ).unwrapped
    single = gym.vector.SyncVectorEnv(
        [lambda: gym.make("SD/Classification-Mini-v0", stages=stages, **SMALL)] * 3, autoreset_mode=mode
    )
    results = [env.reset(seed=[1, 2, 3]) for env in (vector, single)]
    vector.action_space.seed(0)
    for _ in range(2 * len(vector.core.stages) + 3):
        for (observation, infos), (other, others) in [results]:
            np.testing.assert_allclose(observation, other, rtol=1e-4, atol=1e-4)
            assert infos.keys() == others.keys()
            np.testing.assert_array_equal(infos["action_mask"], others["action_mask"])
            np.testing.assert_array_equal(infos["decision"], others["decision"])
        action, results = vector.action_space.sample(), []
        steps = [env.step(action) for env in (vector, single)]
        for one, other in zip(steps[0][1:4], steps[1][1:4], strict=True):
            np.testing.assert_array_equal(one, other)
        results = [(observation, infos) for observation, *_, infos in steps]
        if mode == AutoresetMode.DISABLED and steps[0][2].any():
            results = [env.reset(options={"reset_mask": steps[0][2]}) for env in (vector, single)]


@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
def test_sb3_sees_episodes_of_several_steps(mode):
    env = SwitchableVecEnv(gym.make_vec(ID, num_envs=2, autoreset_mode=mode, **SMALL))
    env.seed(0)
    env.reset()
    for number in range(7):
        observation, _, dones, infos = env.step(np.zeros((2, *env.action_space.shape), int))
        assert dones.tolist() == [number % 3 == 2] * 2
        assert all(("terminal_observation" in info) == done for info, done in zip(infos, dones, strict=True))
        assert (observation[:, (number + 1) % 3] == 1).all()


@pytest.mark.parametrize("task", TASKS)
def test_no_layer_runs_twice_to_look(task):
    """Each look goes on from the one before, and the last step from the last look."""
    env = mini(task, stages=["every_layer"])
    env.reset(seed=3)
    split, called = env.core.split("train"), []
    dense = np.zeros((len(split), len(env.core.nvec)), dtype=int)
    env.core.score(split, np.arange(len(split)), dense)  # so that quality_ref is known
    for switch in env.core.backbone.board.switches:
        switch.modules[0].register_forward_hook(lambda *_, name=switch.name: called.append(name))
    action = np.zeros(env.action_space.shape, int)
    for last in [False] * (len(env.core.stages) - 1) + [True]:
        action[0] = last  # one attention is skipped at the very end, or the score would be known
        env.step(action)
    for switch in env.core.backbone.board.switches:
        switch.modules[0]._forward_hooks.clear()
    assert sorted(called) == sorted(env.core.backbone.board.names)


def test_flops_and_the_heads_own_judgement_are_seen(reviews, tiny_backbone):
    """Where an encoder classifies: at each stage the log-odds of what the head says of the layers so far."""
    files = {"dataset": str(reviews), "backbone": str(tiny_backbone)}
    env = gym.make("SD/Classification-Custom-Staged-v0", stages=["every_layer"], **files).unwrapped
    core, split = env.core, env.core.split("train")
    rows, looked = np.arange(len(split)), core.stage_observer
    choices = np.random.default_rng(0).integers(2, size=(len(rows), len(core.nvec))) * (core.nvec > 1)
    seen = []

    def decide(observations):
        seen.append(observations)
        return choices

    decisions, _ = core.rollout(split, rows, decide)
    np.testing.assert_array_equal(decisions, choices)
    for stage, observations in enumerate(seen):
        exits = choices.copy()
        exits[:, core.columns[stage].start : -1] = 1
        np.testing.assert_allclose(observations[:, len(seen)], split.costs.flops_ratio(rows, exits), rtol=1e-6)
        sure = split.passes.confidence(rows, exits)
        odds = np.log(sure / (1 - sure)) if stage else np.zeros(len(rows))
        expected = standardised(odds, looked.mean[stage][-1], looked.deviation[stage][-1])
        np.testing.assert_allclose(observations[:, -1], expected, rtol=1e-3, atol=1e-3)
    judging = core.observing_flops(split, rows, blind=True)
    assert (judging == 2 * split.backbone.flops.costs(split.encoded.source_length)[0]).all()
    assert not mini("Classification", stages=["decoder"]).core.stage_observer.judges  # it generates


@pytest.mark.parametrize("quality", ["exact_match", "likelihood", "balanced"])
def test_a_score_that_goes_on_from_the_last_look_is_that_of_a_whole_pass(quality):
    core = mini("Classification", stages=["first", "encoder.3", "decoder"], token_shares=[0, 0.5], quality=quality).core
    split, random = core.split("train"), np.random.default_rng(0)
    rows, choices = np.arange(40), random.integers(2, size=(40, len(core.nvec)))
    decisions, seen = core.rollout(split, rows, lambda observations: choices)
    assert seen.stage == "decoder"
    resumed = core.score(split, rows, decisions, seen)
    split.scoring.load_scores(None)
    for name, whole in vars(core.score(split, rows, decisions)).items():
        np.testing.assert_allclose(getattr(resumed, name), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("last", ["encoder.3", "decoder", "decoder.1"])
@pytest.mark.parametrize("beams", [1, 2])
def test_texts_that_go_on_from_the_last_look_are_those_of_a_whole_generate(last, beams):
    """After a look at the encoder none of its layers runs again; elsewhere the text is generated anew."""
    settings = {"quality": "metric", "metric": "rouge", "token_shares": [0, 0.5], "num_beams": beams}
    core = mini("Summarization", stages=["first", last], **settings).core
    split, rows = core.split("train"), np.arange(12)
    choices = np.random.default_rng(0).integers(2, size=(12, len(core.nvec))) * (core.nvec > 1)
    choices[6:] = choices[0]  # some agree, and are generated together
    decisions, seen = core.rollout(split, rows, lambda observations: choices)
    expected = split.passes.answers(rows, decisions)
    called, encoder = [], core.backbone.model.get_encoder().layers
    hooks = [layer.register_forward_hook(lambda *_: called.append(1)) for layer in encoder]
    assert split.passes.answers(rows, decisions, seen) == expected
    assert bool(called) == (last != "decoder")
    for hook in hooks:
        hook.remove()
    quality, _ = split.scoring.quality(rows, decisions, seen)
    np.testing.assert_array_equal(quality, split.scoring.run(rows, decisions))


def test_wrong_stages_are_named():
    with pytest.raises(ConfigError, match=r"'stages': there is no stage 'encoder.9'.*choose from.*'answer' may be"):
        mini("Classification", stages=["encoder.9"])
    with pytest.raises(ConfigError, match="'stages': several stages are decided with action multi_discrete"):
        mini("Classification", stages=["first", "decoder"], action="discrete", codebook="mini_classification.json")
    with pytest.raises(ConfigError, match=r"'reward.dense': a reward.vector comes at the end"):
        mini("Classification", dense_reward=True, vector_reward=True)
