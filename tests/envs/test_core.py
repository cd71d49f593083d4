"""The envs over the whole registry, and their three shells against each other."""

import pickle
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_sb3_env

import sd_gym
from sd_gym.backbones.load import BUNDLED
from sd_gym.envs import ConfigError, SwitchableEnv
from sd_gym.envs.sb3 import SwitchableVecEnv
from sd_gym.errors import DataError
from sd_gym.registration import shipped_tables
from sd_gym.switch import UnsupportedArchitectureError
from tests.conftest import varied
from tests.envs.conftest import MINI, SMALL, STEP_INFO


@pytest.fixture(params=sd_gym.registered_ids())
def env_arguments(request, reviews, tiny_backbone, generator, full_table, tmp_path):
    """(id, keyword arguments that make it small or give a Custom env its data and backbone)."""
    if request.param in shipped_tables():
        return request.param, {}
    if "Table" in request.param:
        return request.param, {"table": full_table}
    if "Mini" in request.param:
        return request.param, SMALL
    if "Classification" in request.param:
        return request.param, {"dataset": str(reviews), "backbone": str(tiny_backbone), "splits": {}, "columns": {}}
    row = {"question": "was the food good", "context": "the food was good", "answers": ["good"]}
    if "Summarization" in request.param:
        row = {"document": "the food was good the room was bad", "summary": "good food"}
    file = tmp_path / "data.jsonl"
    file.write_text(varied(row, "document" if "document" in row else "context"))
    return request.param, {"dataset": str(file), "backbone": str(generator), "splits": {}, "max_target_length": 32}


def test_both_checkers_pass_without_a_warning(env_arguments, monkeypatch):
    """In every render mode."""
    monkeypatch.setitem(SwitchableEnv.metadata, "render_fps", 1000)
    env_id, arguments = env_arguments
    env = gym.make(env_id, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
        check_sb3_env(env.unwrapped)


def rollout(env, seed, steps=5):
    env.action_space.seed(seed)
    trace = []
    for number in range(steps):
        observation, info = env.reset(seed=seed if number == 0 else None)
        trace += [observation, info, *env.step(env.action_space.sample())]
    return trace


def test_a_twin_rollout_is_equal(env_arguments):
    env_id, arguments = env_arguments
    first = rollout(gym.make(env_id, **arguments), seed=3)
    second = rollout(gym.make(env_id, **arguments), seed=3)
    np.testing.assert_equal(first, second)


def test_an_episode_is_one_decision_with_the_documented_info(env_arguments):
    """Of one stage; see test_staged.py for several."""
    env_id, arguments = env_arguments
    env = gym.make(env_id, **{**arguments, "stages": ["first"]})
    _, info = env.reset(seed=0)
    assert set(info) == STEP_INFO  # what is not known yet is zero, see test_infos.py
    action = env.action_space.sample()
    observation, reward, terminated, truncated, info = env.step(action)
    assert set(info) == STEP_INFO
    assert (type(reward), terminated, truncated) == (float, True, False)
    np.testing.assert_array_equal(info["decision"], env.unwrapped.core.to_masks(np.atleast_2d(action))[0])
    np.testing.assert_allclose(info["vector_reward"], [info["quality"], -info["flops_ratio"]])
    assert info["is_success"] is (info["cost"] <= 0.01)
    assert info["cost"] == info["quality_ref"] - info["quality"]
    assert reward == pytest.approx(1 - info["flops_ratio"] - 20 * info["cost"])
    assert env.observation_space.contains(observation)
    with pytest.raises(gym.error.ResetNeeded):
        env.unwrapped.step(action)


def test_an_env_survives_pickling(env_arguments):
    env_id, arguments = env_arguments
    env = gym.make(env_id, **arguments).unwrapped
    twin = pickle.loads(pickle.dumps(env))
    np.testing.assert_equal(rollout(env, seed=1), rollout(twin, seed=1))


@pytest.mark.parametrize("env_id", MINI)
def test_all_zeros_is_the_untouched_model_bit_for_bit(env_id):
    from transformers import AutoModelForSeq2SeqLM

    core = gym.make(env_id, **SMALL).unwrapped.core
    split, rows = core.split("test"), np.arange(20)
    outcome = core.score(split, rows, np.zeros((20, len(core.nvec)), dtype=int))
    assert (outcome.flops_ratio == 1).all()
    np.testing.assert_array_equal(outcome.quality, outcome.quality_ref)
    untouched = AutoModelForSeq2SeqLM.from_pretrained(BUNDLED["mini"]).eval()
    inputs = split.passes.inputs(rows)
    with torch.inference_mode(), core.backbone.board.decide(np.zeros((20, core.n_switches))):
        assert torch.equal(core.backbone.logits(inputs), untouched(**inputs, use_cache=False).logits)


@pytest.mark.parametrize("env_id", MINI)
def test_the_bundled_backbone_is_right_on_at_least_95_percent(env_id):
    core = gym.make(env_id, train_size=60, validation_size=20, test_size=500).unwrapped.core
    split = core.split("test")
    assert split.scoring.run(np.arange(500), np.zeros((500, len(core.nvec)), dtype=np.int64)).mean() >= 0.95


def test_all_shells_agree_on_the_same_instances_and_decisions():
    env_id = "SD/QuestionAnswering-Mini-v0"
    single = gym.make(env_id, **SMALL)
    vector = gym.make_vec(env_id, num_envs=6, **SMALL)
    ids = [f"train-{number}" for number in (3, 1, 4, 1, 5, 9)]
    observations, reset_infos = vector.reset(options={"instance": ids})
    assert list(reset_infos["instance"]) == ids
    actions = (np.random.default_rng(2).random(vector.action_space.shape) < 0.2).astype(np.int64)
    actions[:, -1] = 0  # there is one token level
    _, rewards, terminated, truncated, infos = vector.step(actions)
    assert terminated.all()
    assert not truncated.any()
    for row, identity in enumerate(ids):
        observation, _ = single.reset(options={"instance": identity})
        np.testing.assert_array_equal(observation, observations[row])
        _, reward, _, _, info = single.step(actions[row])
        assert reward == rewards[row]
        for key in STEP_INFO:
            np.testing.assert_array_equal(infos["final_info"][key][row], info[key])

    sb3 = SwitchableVecEnv(gym.make_vec(env_id, num_envs=6, **SMALL).unwrapped)
    sb3.set_options({"instance": ids})
    np.testing.assert_array_equal(sb3.reset(), observations)
    _, sb3_rewards, dones, sb3_infos = sb3.step(actions)
    np.testing.assert_array_equal(sb3_rewards, rewards.astype(np.float32))
    assert dones.all()
    for row, info in enumerate(sb3_infos):
        assert set(info) > STEP_INFO
        assert info["TimeLimit.truncated"] is False
        np.testing.assert_array_equal(info["terminal_observation"], observations[row])
        assert info["quality"] == infos["final_info"]["quality"][row]
    assert all(mask.shape == (int(single.action_space.nvec.sum()),) for mask in sb3.env_method("action_masks"))
    sb3.set_options([{"split": "train", "instance": identity} for identity in ids])  # options of each env
    np.testing.assert_array_equal(sb3.reset(), observations)
    sb3.set_options([{"split": "test"}, *[{}] * 5])
    with pytest.raises(ValueError, match="expected the same options for all envs, or an 'instance' for each"):
        sb3.reset()


def test_observations_are_standardised_and_differ():
    core = gym.make(MINI[0], **SMALL).unwrapped.core
    observations = core.observe(core.split("train"), np.arange(60))
    assert observations.dtype == np.float32
    assert np.isfinite(observations).all()
    assert abs(observations.mean()) < 0.05
    assert 0.8 < observations.std() < 1.1
    assert len(np.unique(observations, axis=0)) == 60


def test_the_custom_env_trains_on_a_file(reviews, tiny_backbone):
    env = gym.make("SD/Classification-Custom-v0", dataset=str(reviews), backbone=str(tiny_backbone))
    _, info = env.reset(options={"split": "test", "instance": "test-1"})
    assert info["instance"] == "test-1"
    *_, info = env.step(np.zeros(7, dtype=int))
    assert info["flops_ratio"] == 1
    assert info["quality"] == info["quality_ref"]


def test_unknown_ids_and_wrong_values():
    with pytest.raises(gym.error.NameNotFound, match="Did you mean"):
        gym.make("SD/Clasification-Mini-v0")
    with pytest.raises(ConfigError, match="'dataset' has no value"):
        gym.make("SD/Classification-Custom-v0")
    for shares in ([0.3], [0.0, 0.5, 0.3], [0.0, 1.0], []):
        with pytest.raises(ConfigError, match=r"'tokens.shares': expected ascending shares from 0.0 to below 1"):
            gym.make(MINI[0], token_shares=shares)
    with pytest.raises(ConfigError, match=r"config key 'tokens.ranking'.*'tfidf'"):
        gym.make(MINI[0], token_ranking="tfidf")
    with pytest.raises(ValueError, match="render_mode must be one of ansi, rgb_array"):
        SwitchableEnv("classification_mini.yaml", render_mode="html", **SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda action: action[:-1], "expected an action of shape"),
        (lambda action: action + 2, "action component 0 must be in 0..1, got 2"),
        (lambda action: action - 1, "action component 0 must be in 0..1, got -1"),
        (lambda action: action + 0.5, "must be integers"),
    ],
)
def test_bad_actions(change, message):
    env = gym.make(MINI[0], **SMALL).unwrapped
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(change(np.zeros(env.action_space.shape, dtype=np.int64)))
    vector = gym.make_vec(MINI[0], num_envs=2, **SMALL)
    vector.reset(seed=0)
    with pytest.raises(ValueError, match=message.replace("an action of shape", "actions of shape")):
        vector.step(np.stack([change(np.zeros(env.action_space.shape, dtype=np.int64))] * 2))


def test_bad_backbones(reviews, tmp_path):
    from transformers import BertConfig, BertModel, BloomConfig, BloomForCausalLM

    arguments = {"id": "SD/Classification-Custom-v0", "dataset": str(reviews)}
    with pytest.raises(FileNotFoundError, match=r"no backbone folder at './missing'"):
        gym.make(**arguments, backbone="./missing")
    bloom = tmp_path / "bloom"
    BloomForCausalLM(BloomConfig(vocab_size=10, hidden_size=8, n_layer=1, n_head=2)).save_pretrained(bloom)
    with pytest.raises(UnsupportedArchitectureError, match=r"'bloom'; supported: bart, bert, distilbert"):
        gym.make(**arguments, backbone=str(bloom))
    headless = tmp_path / "headless"
    BertModel(BertConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        headless
    )
    with pytest.raises(ValueError, match=r"has no task head.*sd-gym prepare"):
        gym.make(**arguments, backbone=str(headless))


def test_labels_that_the_backbone_does_not_know(tmp_path, tiny_backbone):
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "the food", "label": 7}\n')
    with pytest.raises(DataError, match="label 7 is not one of the backbone's 2 classes"):
        gym.make("SD/Classification-Custom-v0", dataset=str(file), backbone=str(tiny_backbone))
