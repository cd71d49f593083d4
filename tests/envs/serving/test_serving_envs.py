"""The serving envs: what a queue does, and that every checker takes them."""

import pickle

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_of_sb3

import sd_gym
from sd_gym.config import ConfigError
from sd_gym.envs.config import load_config
from sd_gym.envs.listing import page_of
from sd_gym.envs.sb3 import SwitchableVecEnv
from sd_gym.envs.serving.arrivals import arrival_times
from sd_gym.envs.serving.queues import expected_loss, outcomes
from sd_gym.policy.artefact import SkipPolicy
from sd_gym.registration import SERVING, config_of, import_own, register_env

TREC = "SD/Serving-TREC-Table-v0"
SMALL = {"requests": 300}
HEAVY = {"arrivals": "poisson", "load": 3.0}


def played(env, choose, seed=0):
    """The infos of an episode of a single env."""
    observation, _ = env.reset(seed=seed)
    infos, over = [], False
    while not over:
        observation, _, over, _, info = env.step(choose(observation))
        infos.append(info)
    return infos


@pytest.mark.parametrize("env_id", SERVING.names())
@pytest.mark.filterwarnings("error")
def test_checkers_take_the_envs(env_id):
    env = gym.make(env_id, **SMALL).unwrapped
    check_env(env, skip_render_check=True)
    check_env_of_sb3(env)


@pytest.mark.parametrize("env_id", SERVING.names())
def test_points_are_a_path_from_dense_to_bold(env_id):
    config = gym.make(env_id).unwrapped.config
    times = [point.per_request * config.max_batch + point.per_group for point in config.points]
    assert times == sorted(times, reverse=True)
    assert expected_loss(config)[-1] > config.epsilon  # else there were nothing to decide
    assert (outcomes(config, "test").flops_ratio[:, 0] == 1).all()


def test_every_request_is_answered_in_time_or_refused():
    env = gym.make(TREC, requests=1000, **HEAVY).unwrapped
    infos = played(env, lambda observation: 0)
    assert sum(info["answers"] + info["refused"] for info in infos) == 1000
    assert all(info["answers"] <= env.config.max_batch for info in infos)
    assert sum(info["refused"] for info in infos) > 30
    assert max(info["seconds"] for info in infos) <= env.config.deadline


@pytest.mark.parametrize("deadline", [0.05, 0.1, 1.0])
def test_no_request_is_refused_that_a_smaller_group_answers(deadline):
    """By a plain loop, in which the server recomputes the time of the group after each refusal."""
    env = gym.make(TREC, requests=2000, deadline=deadline, **HEAVY).unwrapped
    config, dense = env.config, env.config.points[0]
    answers = sum(info["answers"] for info in played(env, lambda observation: 0))
    times, now, queue, expected = env._queues._times[0, :-1].tolist(), 0.0, [], 0
    while times or queue:
        now = max(now, times[0]) if not queue else now
        arrived = np.searchsorted(times, now, side="right")
        queue, times = queue + times[:arrived], times[arrived:]
        queue = [time for time in queue if time + deadline > now]
        while queue:
            size = min(len(queue), config.max_batch)
            end = now + dense.per_request * size + dense.per_group
            if queue[0] + deadline > end:
                now, expected, queue = end, expected + size, queue[size:]
                break
            queue = queue[1:]
    assert answers == expected


def test_bold_points_answer_more_and_lose_more():
    env = gym.make(TREC, requests=1000, **HEAVY).unwrapped
    dense, bold = (played(env, lambda observation, point=point: point) for point in (0, 5))
    assert sum(info["answers"] for info in bold) > 1.5 * sum(info["answers"] for info in dense)
    assert sum(info["cost"] for info in dense) == 0 < sum(info["cost"] for info in bold)


def test_the_reward_is_what_is_lost():
    env = gym.make(TREC, penalty=7.0, requests=1000, **HEAVY).unwrapped
    env.reset(seed=1)
    for _ in range(20):
        _, reward, _, _, info = env.step(4)
        assert reward == pytest.approx(-info["refused"] - 7 * info["cost"])
        assert info["cost"] == pytest.approx(info["quality_ref"] - info["quality"])


def test_actions_change_no_arrivals():
    env = gym.make(TREC, arrivals="poisson", load=0.2, **SMALL).unwrapped
    random = np.random.default_rng(0)
    for choose in (lambda observation: 0, lambda observation: int(random.integers(6))):
        assert sum(info["answers"] for info in played(env, choose)) == 300  # nothing is late at so low a load


def test_recent_loss_is_what_the_points_are_expected_to_lose():
    env = gym.make(TREC, requests=5000, **HEAVY).unwrapped
    observation, _ = env.reset(seed=0)
    answers = 0
    for _ in range(60):
        observation, _, _, _, info = env.step(4)
        answers += info["answers"]
    expected = expected_loss(env.config)[4] / env.config.epsilon
    assert observation[3] == pytest.approx(expected * (1 - np.exp(-answers / 1000)), rel=1e-5)


def test_vector_env_is_the_single_env_many_times():
    vector = gym.make_vec(TREC, num_envs=3, **SMALL)
    single = gym.make(TREC, **SMALL).unwrapped
    seen, _ = vector.reset(seed=5)
    alone, _ = single.reset(seed=7)
    random = np.random.default_rng(0)
    for _ in range(400):
        assert np.array_equal(seen[2], alone)
        points = random.integers(6, size=3)
        seen, rewards, ended, _, infos = vector.step(points)
        alone, reward, over, _, info = single.step(int(points[2]))
        assert (rewards[2], ended[2]) == (reward, over)
        if over:
            assert np.array_equal(infos["final_obs"][2], alone)
            assert [one is not None for one in infos["final_obs"]] == ended.tolist()
            assert not ended.all()
            assert infos["final_info"]["answers"][2] == info["answers"]
            break
        assert infos["answers"][2] == info["answers"]
    assert over


def test_stable_baselines3_takes_the_vector_env():
    env = SwitchableVecEnv(gym.make_vec(TREC, num_envs=2, requests=50))
    env.reset()
    for _ in range(60):
        _, _, dones, infos = env.step(np.array([5, 5]))
        if dones.any():
            ended = infos[int(dones.argmax())]
            assert ended["terminal_observation"].shape == (4,)
            assert ended["episode"]["l"] > 1
            return
    pytest.fail("no episode ended")


@pytest.mark.parametrize("seed", [[1], [1, 2, 3, 4], 1.5])
def test_there_is_a_seed_for_each_queue(seed):
    env = gym.make_vec(TREC, num_envs=3, **SMALL)
    with pytest.raises(ValueError, match="3 seeds, one per env"):
        env.reset(seed=seed)
    np.testing.assert_array_equal(env.reset(seed=np.array([1, 2, 3]))[0], env.reset(seed=1)[0])


def test_seeded_and_picklable():
    one = gym.make_vec(TREC, num_envs=2, **SMALL)
    one.reset(seed=3)
    one.step(np.array([1, 2]))
    other = pickle.loads(pickle.dumps(one.unwrapped))
    for points in ([0, 5], [3, 3]):
        for mine, theirs in zip(one.step(np.array(points))[:3], other.step(np.array(points))[:3], strict=True):
            assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("kind", ["poisson", "bursts", "day"])
def test_arrivals_have_the_mean_rate(kind):
    times = [arrival_times(kind, 50.0, 20_000, np.random.default_rng(seed)) for seed in range(20)]
    assert np.mean([20_000 / one[-1] for one in times]) == pytest.approx(50, rel=0.15)
    assert all((np.diff(one) >= 0).all() and one[0] > 0 for one in times)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("load", 0),
        ("load", float("nan")),
        ("deadline", True),
        ("arrivals", "waves"),
        ("requests", 10**9),
        ("points", []),
    ],
)
def test_odd_values_name_their_key(key, value):
    with pytest.raises(ConfigError, match=f"config key '{key}': .*, got "):
        gym.make(TREC, **{key: value})


def test_errors_say_what_was_expected():
    with pytest.raises(TypeError, match="unknown key 'speed'"):
        gym.make(TREC, speed=3)
    env = gym.make(TREC, **SMALL).unwrapped
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        env.reset(options={"split": "dev"})
    env.reset()
    for action in (6, -1, 0.5, [1, 2], None):
        with pytest.raises(ValueError, match=r"must be in 0\.\.5|must be integers|expected actions of shape"):
            env.step(action)
    points = [
        {"mask": [0] * 13, "per_request": 1e-3, "per_group": 0},
        {"mask": [2] * 13, "per_request": 1e-3, "per_group": 0},
    ]
    with pytest.raises(ValueError, match="'points'"):
        gym.make(TREC, points=points)


@pytest.fixture(scope="module")
def of_policy(tmp_path_factory):
    """A run on the TREC table, its result, and the settings of a serving env of its operating points."""
    folder = tmp_path_factory.mktemp("policy") / "run"
    result = sd_gym.train("SD/Classification-TREC-Table-v1", "imitation", folder, steps=100, epsilon=0.05)
    margins = [point.margin for point in SkipPolicy.from_pretrained(folder).operating_points if point.passed][::-1]
    points = [{"margin": margin, "per_request": 1e-3, "per_group": 0} for margin in margins]
    return folder, result, {"policy": str(folder), "points": points}


def test_points_of_a_policy_do_what_its_run_has_measured(of_policy):
    _, result, settings = of_policy
    config = gym.make(TREC, **settings).unwrapped.config
    own = next(number for number, point in enumerate(config.points) if point.margin == 0)
    known = outcomes(config, "test")
    assert 1 <= own < len(config.points)
    assert known.quality[:, own].mean() == pytest.approx(result["quality"])
    assert known.quality[:, 0].mean() == pytest.approx(result["quality_ref"])
    assert known.flops_ratio[:, own].mean() == pytest.approx(result["flops_ratio_with_policy"])
    assert (np.diff(known.flops_ratio.mean(axis=0)) < 0).all()


def test_judgements_of_the_head_between_layers_count(tmp_path):
    staged = "SD/Classification-TREC-Staged-Table-v0"
    result = sd_gym.train(staged, "imitation", tmp_path / "run", steps=100, epochs=1)
    last = SkipPolicy.from_pretrained(tmp_path / "run").operating_points[-1].margin
    points = [{"margin": margin, "per_request": 1e-3, "per_group": 0} for margin in (last, 0.0)]
    table = load_config(config_of(staged), {}).table
    config = gym.make(TREC, policy=str(tmp_path / "run"), table=table, points=points).unwrapped.config
    assert outcomes(config, "test").flops_ratio[:, 1].mean() == pytest.approx(result["flops_ratio_with_policy"])


def test_points_must_be_those_of_the_policy(of_policy):
    _, _, settings = of_policy
    points = settings["points"]
    for wrong in (points[::-1], points[1:], [{**points[0], "mask": [0] * 13}, points[1]]):
        with pytest.raises(ConfigError, match="'points'"):
            gym.make(TREC, policy=settings["policy"], points=wrong)
    with pytest.raises(ConfigError, match="the margin of dense, the last of 'operating_points'"):
        gym.make(TREC, policy=settings["policy"], points=points[1:]).reset()
    with pytest.raises(ConfigError, match="margins with it"):
        gym.make(TREC, policy=settings["policy"])
    with pytest.raises(ConfigError, match="margins with it"):
        gym.make(TREC, points=points)
    with pytest.raises(ConfigError, match="was not trained on the table"):
        gym.make("SD/Serving-AGNews-Table-v0", **settings)
    with pytest.raises(FileNotFoundError):
        gym.make(TREC, policy="nowhere", points=points)


@pytest.mark.usefixtures("own_names")
def test_an_own_file_is_an_env(of_policy, tmp_path):
    folder, _, settings = of_policy
    file = folder.parent / "mine.yaml"
    keys = ["id: Mine/Serving-v0", "table: tables/classification-trec", "policy: run", "points:"]
    file.write_text("\n".join([*keys, *(f"  - {point}" for point in settings["points"])]))
    assert register_env(file) == "Mine/Serving-v0"
    assert gym.make("Mine/Serving-v0").unwrapped.config.policy == str(folder.resolve())
    assert gym.make_vec("Mine/Serving-v0", num_envs=2, load=0.5).unwrapped.config.load == 0.5
    assert page_of("Mine/Serving-v0").facts["deadline"] == "1.0"
    assert import_own(str(file)) == str(file)
    result = sd_gym.train("Mine/Serving-v0", "threshold", tmp_path / "dial", steps=1, requests=200)
    assert 0 < result["goodput"] <= 1
    for taken in (TREC, "CartPole-v1", "SD/Classification-Mini-v0"):
        file.write_text(f"id: {taken}\npoints:\n")
        with pytest.raises(ValueError, match="is taken"):
            register_env(file)
