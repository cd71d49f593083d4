"""Actions, observations and rewards by keyword."""

import doctest
import json
import pickle
import re
import warnings
from itertools import combinations, pairwise
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st
from sd_gym.agents.baselines.search import nested_codebook
from sd_gym.agents.experiment.run import train
from sd_gym.agents.experiment.trained import load_run
from sd_gym.agents.registry import make_agent
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.env_checker import check_env as check_sb3_env
from typer.testing import CliRunner

import sd_gym
from sd_gym import switch
from sd_gym.backbones.heads import model_inputs
from sd_gym.cli import app
from sd_gym.envs import spaces
from sd_gym.envs.sb3 import SwitchableVecEnv
from sd_gym.execution import passes
from sd_gym.switch import first_layer_input
from tests.envs.conftest import MASKS, MINI, SMALL


class Lengths(spaces.Standardised):
    """How many tokens and how many characters an input has."""

    def features(self, split, rows):
        characters = [len(split.instances[row].source) for row in rows]
        return np.column_stack([split.encoded.source_length[rows], characters])


class Apart(spaces.Observation):
    """Lengths with a name."""

    def __init__(self, core):
        self.lengths = Lengths(core)
        self.space = gym.spaces.Dict({"lengths": self.lengths.space})

    def observe(self, split, rows):
        return {"lengths": self.lengths.observe(split, rows)}


@pytest.fixture(autouse=True)
def lengths():
    """Observations that an extension has registered."""
    sd_gym.register_observation("lengths", Lengths)
    sd_gym.register_observation("apart", Apart)


VARIANTS = [
    {"action": "multi_binary"},
    {"action": "discrete"},
    {"observation": "lengths"},
    {"observation": "tokens"},
    {"observation": "tokens", "action": "discrete"},
]


@pytest.mark.parametrize("env_id", MINI)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_both_checkers_pass(env_id, variant):
    env = gym.make(env_id, **SMALL, **variant).unwrapped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env)
        # Stable-Baselines3 recommends flat arrays, and takes others.
        warnings.filterwarnings("ignore", message=".*tokens has an unconventional shape")
        check_sb3_env(env)


@pytest.mark.parametrize("variant", [*VARIANTS, {"vector_reward": True}], ids=str)
def test_the_vector_env_is_the_single_env_many_times(tiny, variant):
    ours = gym.make_vec(**tiny, **variant, num_envs=3)
    twin = pickle.loads(pickle.dumps(gym.make(**tiny, **variant).unwrapped))
    theirs = SyncVectorEnv([lambda: gym.make(**tiny, **variant)] * 3, autoreset_mode=AutoresetMode.SAME_STEP)
    assert (ours.observation_space, ours.action_space) == (theirs.observation_space, theirs.action_space)
    ours.action_space.seed(0)
    ids = ["train-4", "train-1", "train-4"]
    observations, _ = ours.reset(options={"instance": ids})
    assert observations in ours.observation_space
    for _ in range(3):
        ours.reset(options={"instance": ids})
        actions = ours.action_space.sample()
        following, rewards, *_, infos = ours.step(actions)
        assert following in ours.observation_space
        for row, (identity, action) in enumerate(zip(ids, actions, strict=True)):
            observation, _ = twin.reset(options={"instance": identity})
            np.testing.assert_equal(spaces.unbatched(observations)[row], observation)
            np.testing.assert_equal(infos["final_obs"][row], observation)
            _, reward, *_, info = twin.step(action)
            np.testing.assert_array_equal(rewards[row], reward)
            np.testing.assert_array_equal(infos["final_info"]["decision"][row], info["decision"])
            assert twin.observation_space.contains(observation)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_going_on_from_a_state_is_as_if_nothing_had_happened(tiny, variant):
    env = gym.make_vec(**tiny, **variant, num_envs=4).unwrapped
    env.action_space.seed(0)
    env.reset(seed=0)
    state, action = env.state(), env.action_space.sample()
    expected = env.step(action)
    other = gym.make_vec(**tiny, **variant, num_envs=4).unwrapped
    other.reset(seed=9)
    assert other.load_state(state) in other.observation_space
    assert data_equivalence(other.step(action), expected, exact=True)


@pytest.mark.parametrize("mode", ["NextStep", "Disabled"])
@pytest.mark.parametrize("variant", [{"vector_reward": True}, {"observation": "tokens", "action": "discrete"}], ids=str)
def test_other_autoreset_modes_have_all_variants(tiny, variant, mode):
    env = gym.make_vec(**tiny, **variant, num_envs=3, autoreset_mode=mode)
    observations, _ = env.reset(seed=0)
    actions = env.action_space.sample()
    same, rewards, *_, infos = env.step(actions.astype(float))  # whole numbers of any type
    assert data_equivalence(same, observations, exact=True)
    if "vector_reward" in variant:
        np.testing.assert_array_equal(rewards, infos["vector_reward"].astype(np.float32))
    if mode == "Disabled":
        env.reset(options={"reset_mask": np.array([True, False, True])})
        return
    following, nothing, terminated, _, _ = env.step(actions)
    assert following in env.observation_space
    assert (nothing.shape, nothing.any(), terminated.any()) == (rewards.shape, False, False)


@settings(deadline=None)
@given(data=st.data())
def test_the_nested_codebook_is_the_best_chain_there_is(data):
    n = data.draw(st.integers(1, 5))
    drawn = data.draw(st.lists(st.lists(st.integers(0, 1), min_size=4, max_size=4), max_size=6))
    masks = np.unique([[0, 0, 0, 0], *drawn], axis=0)
    quality = np.array(data.draw(st.lists(st.floats(0, 1), min_size=len(masks), max_size=len(masks))))
    flops = 1 - masks @ np.array([0.1, 0.2, 0.3, 0.4])

    def worth(chain):
        return sum((flops[a] - flops[b]) * quality[b] for a, b in pairwise(chain))

    def nested(chain):
        return not masks[chain[0]].any() and all((masks[a] <= masks[b]).all() for a, b in pairwise(chain))

    order = np.argsort(-flops, kind="stable").tolist()
    chains = [chain for size in range(1, n + 1) for chain in combinations(order, size) if nested(chain)]
    found = nested_codebook(masks, quality, flops, n)
    assert len(found) <= n
    assert nested(found)
    assert worth(found) == pytest.approx(max(map(worth, chains)))


def test_a_run_of_static_is_a_codebook(tiny, tmp_path):
    settings = {key: value for key, value in tiny.items() if key not in ("id", "codebook")}
    train(tiny["id"], "static", tmp_path / "run", steps=1, **settings)
    env = gym.make(**tiny | {"codebook": str(tmp_path / "run")}, action="discrete")
    masks = env.unwrapped.core.actions.codebook
    assert not masks[0].any()
    assert (np.diff(masks, axis=0) >= 0).all()
    searched = json.loads((tmp_path / "run" / "masks.json").read_text())
    assert all(mask in searched for mask in masks.tolist())
    every = gym.make(**tiny | {"codebook": str(tmp_path / "run" / "masks.json")}, action="discrete")
    assert every.action_space.n == len(searched) == 64


def test_dqn_learns_which_mask_to_choose(tiny):
    torch.manual_seed(0)
    env = SwitchableVecEnv(gym.make_vec(**tiny, action="discrete", num_envs=4).unwrapped)
    agent = DQN("MlpPolicy", env, learning_starts=100, train_freq=1, exploration_fraction=0.5, gamma=0.0, seed=0)

    def mean_reward(choose):
        env.seed(1)
        observations, rewards = env.reset(), []
        for _ in range(25):
            observations, reward, _, _ = env.step(choose(observations))
            rewards += reward.tolist()
        return np.mean(rewards)

    random = np.random.default_rng(0)
    before = mean_reward(lambda seen: random.integers(len(MASKS), size=4))
    agent.learn(800)
    assert mean_reward(lambda seen: agent.predict(seen, deterministic=True)[0]) > before + 1
    settings = {key: value for key, value in tiny.items() if key != "id"}
    result = sd_gym.evaluate(tiny["id"], agent, **settings, action="discrete")
    core = env.env.core
    split, rows = core.split("test"), np.arange(len(core.split("test")))
    chosen = np.array(MASKS)[agent.predict(core.observe(split, rows), deterministic=True)[0]]
    assert result["flops_ratio"] == pytest.approx(split.costs.flops_ratio(rows, chosen).mean())


def test_a_bandit_without_a_look_at_the_input_learns_a_good_arm(tiny):
    env = gym.make(**tiny, action="discrete", penalty=1.0)
    random, pulls, means = np.random.default_rng(0), np.zeros(len(MASKS)), np.zeros(len(MASKS))
    env.reset(seed=0)
    for _ in range(300):
        arm = random.integers(len(MASKS)) if random.random() < 0.2 else int(means.argmax())
        _, reward, *_ = env.step(arm)
        env.reset()
        pulls[arm] += 1
        means[arm] += (reward - means[arm]) / pulls[arm]
    core = env.unwrapped.core
    split, rows = core.split("train"), np.arange(len(core.split("train")))
    outcomes = [core.score(split, rows, np.tile(mask, (len(rows), 1))) for mask in MASKS]
    true = [(1 - outcome.flops_ratio - outcome.cost).mean() for outcome in outcomes]
    assert true[int(means.argmax())] >= max(true) - 0.05
    assert np.ptp(true) > 0.1


def test_the_tokens_are_the_first_layers_input_by_channel(tiny):
    core = gym.make(**tiny, observation="tokens").unwrapped.core
    split, rows = core.split("train"), np.arange(len(core.split("train")))
    seen = core.observe(split, rows)
    assert seen["tokens"].shape == (len(rows), 12, 16)
    assert (seen["tokens"].dtype, seen["mask"].dtype) == (np.float32, np.int8)
    np.testing.assert_array_equal(seen["mask"].sum(axis=1), split.encoded.source_length)
    assert not seen["tokens"][seen["mask"] == 0].any()
    hidden = first_layer_input(core.backbone.board, model_inputs(split.passes.inputs(rows))).numpy()
    kept = hidden[seen["mask"][:, : hidden.shape[1]] == 1]
    expected = (kept - kept.mean(axis=0)) / kept.std(axis=0)
    np.testing.assert_allclose(seen["tokens"][seen["mask"] == 1], expected, atol=1e-4)


@pytest.fixture(scope="module")
def token_core():
    return gym.make(MINI[1], **SMALL, observation="tokens").unwrapped.core


@settings(deadline=None)
@given(rows=st.lists(st.integers(0, 59), min_size=1, max_size=5))
def test_a_batch_of_tokens_is_each_row_alone(token_core, rows):
    split = token_core.split("train")
    together = token_core.observe(split, np.array(rows))
    alone = [token_core.observe(split, np.array([row])) for row in rows]
    for key, values in together.items():
        np.testing.assert_array_equal(values, np.concatenate([one[key] for one in alone]))


def test_tokens_are_embedded_a_bounded_number_at_a_time(tiny, monkeypatch):
    core = gym.make(**tiny, observation="tokens").unwrapped.core
    split, rows = core.split("train"), np.arange(20)
    expected, embedded = core.observe(split, rows), []
    original = switch.first_layer_input
    monkeypatch.setattr(passes, "PASS_TOKENS", 100)
    monkeypatch.setattr(
        switch, "first_layer_input", lambda board, inputs: (embedded.append(inputs), original(board, inputs))[1]
    )
    np.testing.assert_equal(core.observe(split, rows), expected)
    assert [len(inputs["input_ids"]) for inputs in embedded] == [8, 8, 4]
    assert "features" not in split.__dict__  # what is pooled is not computed where nobody looks at it


def test_the_multi_input_policy_learns_on_tokens(tiny):
    env = SwitchableVecEnv(gym.make_vec(**tiny, observation="tokens", num_envs=4).unwrapped)
    agent = PPO("MultiInputPolicy", env, n_steps=8, batch_size=16, n_epochs=2, seed=0)
    before = [parameter.clone() for parameter in agent.policy.features_extractor.parameters()]
    before += [parameter.clone() for parameter in agent.policy.mlp_extractor.parameters()]
    agent.learn(64)
    after = [*agent.policy.features_extractor.parameters(), *agent.policy.mlp_extractor.parameters()]
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    settings = {key: value for key, value in tiny.items() if key != "id"}
    assert sd_gym.evaluate(tiny["id"], agent, **settings, observation="tokens")["instances"] > 0
    env.reset()
    env.step_async(np.zeros((4, 7), dtype=int))
    observations, _, _, infos = env.step_wait()
    kept = infos[0]["terminal_observation"]["tokens"].copy()
    observations["tokens"][:] = 7
    np.testing.assert_array_equal(infos[0]["terminal_observation"]["tokens"], kept)
    assert all(mask.shape == (13,) for mask in env.env_method("action_masks"))


def test_agents_learn_on_a_registered_observation(tiny, tmp_path):
    settings = {key: value for key, value in tiny.items() if key != "id"} | {"observation": "lengths", "num_envs": 64}
    result = train(tiny["id"], "ppo", tmp_path / "run", steps=256, **settings)
    _, core, policy = load_run(tmp_path / "run")
    assert policy.observation_size == 2
    split = core.split("train")
    seen = core.observe(split, np.arange(20))
    assert core.observation.mean[1] == pytest.approx(np.mean([len(one.source) for one in split.instances]))
    assert seen.std(axis=0) == pytest.approx(1, abs=0.4)
    assert result["decisions_used"] >= 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"action": "discrete"}, "decide by action=multi_discrete, got action=discrete"),
        ({"action": "multi_binary"}, "decide by action=multi_discrete, got action=multi_binary"),
        ({"observation": "apart"}, r"read flat observations or tokens: .*got observation=apart with the space Dict"),
        ({"vector_reward": True}, "learn from one number, got reward.vector=True"),
    ],
)
@pytest.mark.parametrize("agent", ["ppo", "reinforce", "static", "dense"])
def test_the_agents_say_what_they_take(tiny, agent, keys, message):
    env = gym.make_vec(**tiny, **keys, num_envs=2).unwrapped
    with pytest.raises(ValueError, match=message):
        make_agent(agent, env)


def test_the_command_line_says_what_agents_take(tmp_path):
    command = ["train", MINI[0], "--output", str(tmp_path / "run"), "--set", "action=discrete"]
    small = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
    result = CliRunner().invoke(app, command + small)
    assert result.exit_code == 2
    assert "decide by action=multi_discrete, got action=discrete" in result.stderr
    assert not (tmp_path / "run").exists()


def test_what_may_be_registered(tiny):
    assert gym.make(**tiny, observation="lengths").observation_space.shape == (2,)
    shorter = type("Shorter", (Lengths,), {"features": lambda self, split, rows: np.ones((len(rows), 1))})
    sd_gym.register_observation("lengths", shorter)
    assert gym.make(**tiny, observation="lengths").observation_space.shape == (1,)
    with pytest.raises(ValueError, match="needs a name of its own; 'pooled' is taken"):
        sd_gym.register_observation("pooled", Lengths)
    with pytest.raises(TypeError, match="'numbers' must be a subclass of"):
        sd_gym.register_observation("numbers", lambda core: None)


@pytest.mark.parametrize(
    ("features", "got"),
    [
        (lambda self, split, rows: np.full((len(rows), 2), np.inf), r"\[\d+, 2\], some of them NaN or infinite"),
        (lambda self, split, rows: split.encoded.source_length[rows], r"\[\d+\]$"),
        (lambda self, split, rows: [[1.0, 2.0]], r"\[1, 2\]$"),
    ],
)
def test_features_that_are_no_finite_numbers_per_row_are_told(tiny, features, got):
    sd_gym.register_observation("lengths", type("Wrong", (Lengths,), {"features": features}))
    with pytest.raises(ValueError, match=r"Wrong.features has to give finite numbers \[\d+, features\], got " + got):
        gym.make(**tiny, observation="lengths")


@pytest.mark.parametrize("shape", [(1, 2), (3, 1), (3,)])
def test_observations_of_another_shape_are_not_repeated(tiny, shape):
    wrong = type("Wrong", (Apart,), {"observe": lambda self, split, rows: {"lengths": np.zeros(shape)}})
    sd_gym.register_observation("apart", wrong)
    with pytest.raises(ValueError, match=r"expected observations of the shape \[3, 2\], one per instance, got"):
        gym.make_vec(**tiny, observation="apart", num_envs=3).reset(seed=0)


def test_a_vector_reward(tiny):
    env = gym.make(**tiny, vector_reward=True).unwrapped
    env.reset(seed=0)
    for _ in range(5):
        _, reward, *_, info = env.step(env.action_space.sample())
        env.reset()
        assert reward in env.reward_space
        np.testing.assert_array_equal(reward, np.float32(info["vector_reward"]))
    np.testing.assert_array_equal([env.reward_space.low, env.reward_space.high], [[0, -1], [1, 0]])
    vector = gym.make_vec(**tiny, vector_reward=True, num_envs=3).unwrapped
    vector.reset(seed=0)
    _, rewards, *_ = vector.step(vector.action_space.sample())
    assert (rewards.shape, rewards.dtype) == ((3, 2), np.float32)
    assert all(reward in vector.reward_space for reward in rewards)
    assert not hasattr(gym.make(**tiny).unwrapped, "reward_space")
    with pytest.raises(ValueError, match=r"learns from one number, but the env has reward.vector=True"):
        SwitchableVecEnv(vector)


@pytest.mark.parametrize(
    ("keys", "low", "high"),
    [
        ({"quality": "likelihood"}, [0, -1], [2, 0]),
        ({"quality": "balanced"}, [0, -1], [np.inf, 0]),
        ({"token_shares": [0.0, 0.1], "token_ranking": "attention"}, [0, -2], [1, 0]),
    ],
)
def test_the_reward_spaces_bounds_hold(tiny, keys, low, high):
    env = gym.make_vec(**tiny, **keys, vector_reward=True, num_envs=40).unwrapped
    np.testing.assert_array_equal([env.reward_space.low, env.reward_space.high], [low, high])
    env.action_space.seed(0)
    env.reset(seed=0)
    for _ in range(5):
        assert all(reward in env.reward_space for reward in env.step(env.action_space.sample())[1])


@pytest.mark.parametrize("name", ["envs.md", "stages.md"])
def test_the_pages_about_envs_say_what_happens(monkeypatch, name):
    """Their examples, on small splits."""
    for function in ("make", "make_vec"):
        made = getattr(gym, function)
        monkeypatch.setattr(gym, function, lambda id, made=made, **keys: made(id, **SMALL | keys))
    page = (Path(__file__).parents[2] / "docs" / name).read_text()
    blocks, names = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL), {}
    assert len(blocks) >= 2
    for block in blocks:
        examples = doctest.DocTestParser().get_doctest(block, names, f"docs/{name}", None, 0)
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        runner.run(examples, clear_globs=False)
        names = examples.globs
        assert runner.summarize(verbose=False).failed == 0
