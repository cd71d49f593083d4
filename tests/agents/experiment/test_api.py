"""From Python: any policy evaluated as a run is, instances listed, runs compared."""

import csv
import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from sd_gym.agents import make_agent
from sd_gym.agents.report import compare as comparing
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

import sd_gym
from sd_gym.envs.sb3 import SwitchableVecEnv
from tests.conftest import dense_policy, write_env
from tests.envs.conftest import SMALL

CUSTOM = "SD/Classification-Custom-v0"
TREC = "SD/Classification-TREC-Table-v1"


def without_time(result):
    of_a_run = ("time", "history", "data", "margin", "last_policy", "artefact", "selection", "guarantee")
    return {key: value for key, value in result.items() if key not in of_a_run}


def test_any_policy_that_decides_alike_has_the_same_result(custom, tmp_path):
    env = gym.make_vec(CUSTOM, num_envs=8, **custom).unwrapped
    policy = make_agent("hash", env, rate=0.4).policy()
    policy.save(tmp_path / "policy")
    expected = sd_gym.evaluate(CUSTOM, policy, **custom)
    assert expected["policy_flops_counted"]
    assert expected["flops_ratio_with_policy"] > expected["flops_ratio"]
    assert set(expected["time"]) == {"1", "8", "32", "in bulk"}

    class Model:
        flops = policy.flops

        def predict(self, observations, deterministic):
            assert deterministic
            return policy.decide(observations), None

    for other in (Model(), lambda observations: torch.from_numpy(policy.decide(observations)).int()):
        result = sd_gym.evaluate(CUSTOM, other, policy_flops=policy.flops, **custom)
        assert without_time(result) == without_time(expected)
    free = sd_gym.evaluate(CUSTOM, policy.decide, **custom)
    assert not free["policy_flops_counted"]
    assert free["flops_ratio_with_policy"] == free["flops_ratio"] == expected["flops_ratio"]
    given = sd_gym.evaluate(CUSTOM, policy, policy_flops=0, **custom)
    assert given["policy_flops_counted"]
    assert given["flops_ratio_with_policy"] == expected["flops_ratio"]


def test_a_model_of_stable_baselines3_is_evaluated_as_its_agent(custom, tmp_path):
    result = sd_gym.train(CUSTOM, "ppo", tmp_path / "run", steps=1_000, epsilon=1.0, confidence=0.5, **custom)
    assert result == json.loads((tmp_path / "run" / "result.json").read_text()) | {
        "quality_difference_interval": result["quality_difference_interval"]
    }
    again = sd_gym.evaluate(CUSTOM, tmp_path / "run")  # with the run's own settings of the env
    assert without_time(again) == without_time(result)
    wider = sd_gym.evaluate(CUSTOM, tmp_path / "run", split="validation", epsilon=0.5)
    assert (wider["split"], wider["epsilon"]) == ("validation", 0.5)

    vector = gym.make_vec(CUSTOM, num_envs=4, epsilon=1.0, **custom).unwrapped
    vector.reset(seed=0)
    model = PPO("MlpPolicy", SwitchableVecEnv(vector), n_steps=8, batch_size=8, device="cpu", seed=0).learn(32)
    result = sd_gym.evaluate(CUSTOM, model, epsilon=1.0, **custom)
    split = vector.core.split("test")
    decisions, _ = model.predict(vector.core.observe(split, np.arange(len(split))), deterministic=True)
    ratio = vector.core.score(split, np.arange(len(split)), decisions).flops_ratio
    assert result["flops_ratio"] == pytest.approx(ratio.mean())
    with pytest.raises(ValueError, match=r"trained on MultiDiscrete.* \(the env has MultiBinary\(6\)\)"):
        sd_gym.evaluate(CUSTOM, model, action="multi_binary", **custom)


def test_a_model_that_learned_on_normalised_observations_is_shown_such():
    env = VecNormalize(SwitchableVecEnv(gym.make_vec(TREC, num_envs=64)))
    model = PPO("MlpPolicy", env, n_steps=8, batch_size=128, learning_rate=0.01, device="cpu", seed=0).learn(2048)
    env.training = False

    def as_it_learned(observations):
        return model.predict(env.normalize_obs(observations), deterministic=True)[0]

    def decided(policy):
        return sd_gym.evaluate(TREC, policy)["decisions_hash"]

    assert decided(model) == decided(as_it_learned) != decided(lambda raw: model.predict(raw, deterministic=True)[0])


@pytest.mark.parametrize("vector", [True, False])
def test_a_model_whose_wrapper_changes_observations_is_refused(vector):
    if vector:
        env = SwitchableVecEnv(
            gym.wrappers.vector.NormalizeObservation(gym.make_vec(TREC, num_envs=2, autoreset_mode="NextStep"))
        )
    else:
        env = DummyVecEnv([lambda: gym.wrappers.NormalizeObservation(gym.make(TREC))])
    model = PPO("MlpPolicy", env, n_steps=8, batch_size=8, device="cpu")
    with pytest.raises(ValueError, match=r"wrapper changed .*ObservationWrapper.* normalise by VecNormalize"):
        sd_gym.evaluate(TREC, model)


def test_a_model_is_given_what_a_stage_allows_and_its_own_state():
    """``predict`` of MaskablePPO and of RecurrentPPO; with the models themselves see tests/ecosystem."""
    seen = []

    class Model:
        def predict(self, observation, state=None, episode_start=None, deterministic=False, action_masks=None):
            seen.append((len(observation), state, episode_start, action_masks))
            return np.zeros(len(observation), int), (0 if state is None else state + 1)

    sd_gym.evaluate("SD/Classification-TREC-Staged-Table-v0", Model())
    sizes = {None: 7, 0: 7, 1: 2}  # choices of a stage, by the state from the one before
    assert [state for _, state, *_ in seen[:3]] == [None, 0, 1]
    for n, state, start, masks in seen:
        assert masks.shape == (n, 7)
        assert (masks.sum(axis=1) == sizes[state]).all()
        assert start is None if state is None else not start.any()

    class Plain:
        def predict(self, observations, deterministic):
            return np.zeros(len(observations), int), "an extra", "and another"

    assert sd_gym.evaluate("SD/Classification-TREC-Staged-Table-v0", Plain())["flops_ratio"] == 1


def test_what_is_written_stands_beside_runs(custom, tmp_path):
    def half(observations):
        return np.tile([1, 0, 1, 0, 1, 0, 0], (len(observations), 1))

    result = sd_gym.evaluate(CUSTOM, half, "test", tmp_path / "half", **custom)
    assert result["quality_kept"] is False  # four rows show nothing
    assert json.loads((tmp_path / "half" / "result.json").read_text())["quality"] == result["quality"]
    assert (tmp_path / "half" / "result.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "half" / "instances.csv").open() as lines:
        assert {row["decision"] for row in csv.DictReader(lines)} == {"1010100"}
    with pytest.raises(FileExistsError, match="holds a result"):
        sd_gym.evaluate(CUSTOM, half, "test", tmp_path / "half", **custom)
    (tmp_path / "half" / "result.json").unlink()  # as if it had been killed; again, it writes all files
    assert sd_gym.evaluate(CUSTOM, half, "test", tmp_path / "half", **custom)["quality"] == result["quality"]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "instances.csv").write_text("my,own\n")
    with pytest.raises(FileExistsError, match=r"not a place for a result: it holds instances\.csv"):
        sd_gym.evaluate(CUSTOM, half, "test", tmp_path / "own", **custom)
    sd_gym.evaluate(CUSTOM, half, "validation", tmp_path / "validation", **custom)
    sd_gym.train(CUSTOM, "dense", tmp_path / "dense", steps=1, **custom)
    (tmp_path / "notes.txt").write_text("no run")
    with pytest.warns(UserWarning, match=r"ignored, as they hold no .*/notes.txt, .*/validation$"):
        rows = sd_gym.compare(sorted(tmp_path.glob("[dhnv]*")))
    assert [row["agent"] for row in rows] == ["dense", "half (its own FLOPs not counted)"]
    assert rows[1]["flops_ratio"] == result["flops_ratio"]
    assert rows[1]["quality_difference"] == rows[1]["worst_difference"] == result["quality_difference"]
    assert all(len(comparing.cells(row)) == len(comparing.COLUMNS) for row in rows)
    with pytest.raises(FileNotFoundError, match=r"no result\.json of a test split in .*notes\.txt; expected"):
        sd_gym.compare([tmp_path / "notes.txt"])
    with pytest.raises(FileNotFoundError, match="in no folder"):
        sd_gym.compare([])


def test_a_users_policies_are_selected_as_agents_are(custom, tmp_path):
    """Masks and callables are operating points in any order; a run's policy has versions; one callable is one point."""
    tests = {"epsilon": 0.99, "confidence": 0.5, "select": True, **custom}
    nothing, half, dense = np.ones(7, dtype=int) * [1, 1, 1, 1, 1, 1, 0], [1, 0, 1, 0, 1, 0, 0], [0] * 7

    def first(observations):
        return np.tile([1, 0, 0, 0, 0, 0, 0], (len(observations), 1))

    several = sd_gym.evaluate(CUSTOM, [nothing, first, dense, half], "test", tmp_path / "several", **tests)
    ratios = [point["flops_ratio"] for point in several["selection"]["points"]]
    assert ratios[-1] < ratios[0] < 1  # dense is no point to test
    assert ratios == sorted(ratios, reverse=True)
    assert several["flops_ratio"] < 0.8
    assert several["guarantee"].startswith("selected on 4 rows: loses less than 99 points with 50% confidence; on ")
    assert several["last_policy"]["flops_ratio"] < several["flops_ratio"]  # policy rows alone would choose the boldest
    masks = [nothing, np.array(half)]
    from_array = sd_gym.evaluate(CUSTOM, np.array(masks), **tests)
    assert from_array["selection"] == sd_gym.evaluate(CUSTOM, masks, **tests)["selection"]
    assert len(sd_gym.evaluate(CUSTOM, masks[1], **tests)["selection"]["points"]) == 1
    one = sd_gym.evaluate(CUSTOM, first, **{**tests, "epsilon": 0.01})
    assert one["guarantee"].startswith("dense: on 4 rows")
    assert one["flops_ratio"] == 1
    assert one["last_policy"]["flops_ratio"] < 1
    sd_gym.train(CUSTOM, "ppo", tmp_path / "run", steps=300, **custom)
    of_run = sd_gym.evaluate(CUSTOM, tmp_path / "run", "test", tmp_path / "again", **{**tests, "epsilon": 1.0})
    assert len(of_run["selection"]["points"]) > 1
    assert json.loads((tmp_path / "again" / "config.json").read_text())["confidence"] == 0.5
    assert of_run["last_policy"]["flops_ratio"] == 1  # as it stands there: four rows show nothing
    with pytest.raises(ValueError, match="expected one policy, got a list; to select from it, pass select=True"):
        sd_gym.evaluate(CUSTOM, [first, half], **custom)


def test_functions_of_one_name_are_not_runs_of_one_agent(custom, tmp_path):
    def act(observations):
        return np.zeros((len(observations), 7), dtype=int)

    learned = act

    def act(observations):
        return np.tile([1, 0, 1, 0, 1, 0, 0], (len(observations), 1))

    for folder, policy, name in (("0", learned, "mine"), ("1", learned, "mine"), ("constant", act, None)):
        sd_gym.evaluate(CUSTOM, policy, "test", tmp_path / folder, name=name, policy_flops=0, **custom)
    sd_gym.evaluate(CUSTOM, act, "test", tmp_path / "more" / "constant", policy_flops=0, **custom)
    rows = sd_gym.compare([*tmp_path.glob("[01c]*"), tmp_path / "more" / "constant"])
    assert [(row["agent"].split(" ")[0], row["seeds"]) for row in rows] == [
        ("constant", 1),
        ("constant", 1),
        ("mine", 2),
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((CUSTOM, lambda observations: observations), ValueError, "expected actions of shape"),
        ((CUSTOM, lambda observations: np.full((len(observations), 7), 2)), ValueError, "must be in 0..1, got 2"),
        ((CUSTOM, 3), ValueError, "expected a policy: a callable from observations to decisions"),
        ((CUSTOM, "nowhere"), FileNotFoundError, r"no config\.json in nowhere"),
        ((CUSTOM, print, "dev"), ValueError, "unknown split 'dev'; expected train, validation or test"),
        (("SD/Classification-Costum-v0", print), ValueError, "did you mean 'SD/Classification-Custom-v0'"),
    ],
)
def test_what_cannot_be_evaluated(arguments, error, message, custom):
    with pytest.raises(error, match=message):
        sd_gym.evaluate(*arguments, **custom)


def test_a_policy_of_another_env_is_refused(custom):
    policy = dense_policy("SD/Classification-Mini-v0", **SMALL)
    with pytest.raises(ValueError, match=r"the policy decides on components \[2, .*but SD/Classification-Custom"):
        sd_gym.evaluate(CUSTOM, policy, **custom)


def test_instances_are_those_of_the_env(custom):
    env = gym.make(CUSTOM, **custom)
    listed = sd_gym.instances(CUSTOM, "validation", **custom)
    assert [set(one) for one in listed] == [{"id", "row", "text", "text_pair", "label", "level"}] * 4
    assert listed[0] == {
        "id": "validation-0",
        "row": f"{custom['dataset']}, row 9",
        "text": "the food was bad fine fine fine",
        "text_pair": None,
        "label": 0,
        "level": 0,
    }
    for one in listed:
        _, info = env.reset(options={"split": "validation", "instance": one["id"]})
        assert (info["instance"], info["difficulty"]) == (one["id"], one["level"])
    levels = {one["level"] for one in sd_gym.instances("SD/QuestionAnswering-Mini-v0", test_size=40)}
    assert min(levels) >= 1
    assert len(levels) > 1
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        sd_gym.instances(CUSTOM, "dev", **custom)


def test_instances_load_no_backbone(reviews):
    assert len(sd_gym.instances(CUSTOM, "train", dataset=str(reviews), backbone="./nowhere")) == 32


@pytest.mark.usefixtures("own_names")
def test_train_writes_where_the_command_line_does(reviews, tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env_id = sd_gym.register_env(write_env(tmp_path, reviews, tiny_backbone, id="Own/Reviews-v3"))
    sd_gym.train(env_id, "dense", seed=2, steps=1)
    assert (tmp_path / "runs" / "Own-Reviews-v3-dense-2" / "result.json").exists()
    with pytest.raises(ValueError, match="unknown setting 'epsilom'"):
        sd_gym.train(env_id, "dense", epsilom=1)


def test_every_public_name_is_there_and_documented():
    for name in sd_gym.__all__:
        assert name.startswith("__") or getattr(sd_gym, name).__doc__
    assert set(sd_gym.__all__) <= set(dir(sd_gym))
    with pytest.raises(AttributeError, match="no attribute 'evaluat'"):
        sd_gym.evaluat  # noqa: B018


def test_an_evaluation_that_failed_leaves_its_folder_free(custom, tmp_path):
    with pytest.raises(ValueError, match="expected actions of shape"):
        sd_gym.evaluate(
            CUSTOM, lambda observations: np.zeros((len(observations), 3)), output=tmp_path / "out", **custom
        )
    sd_gym.evaluate(CUSTOM, lambda observations: np.zeros((len(observations), 7)), output=tmp_path / "out", **custom)
    assert (tmp_path / "out" / "result.json").exists()
