"""Dials: learned, searched, bounded, saved and asked."""

import json

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sd_gym.agents.learning.agent import NotApplicableError
from sd_gym.agents.report.collect import collect
from sd_gym.agents.serving import controls
from sd_gym.agents.serving.controls import Played, play
from sd_gym.agents.serving.learn import DialSettings, PricedQueues, learn_dials
from sd_gym.agents.serving.run import _arrival_errors, goodput_at
from stable_baselines3.common.logger import configure
from typer.testing import CliRunner

import sd_gym
from sd_gym.cli import app
from sd_gym.envs.serving.config import serving_config
from sd_gym.envs.serving.dial import Dial, Network
from sd_gym.envs.serving.queues import expected_loss

TREC = "SD/Serving-TREC-Table-v0"
HEAVY = {"requests": 1000, "load": 4.0, "arrivals": "poisson"}


@pytest.fixture(scope="module")
def config():
    return serving_config(TREC, HEAVY)


@pytest.fixture
def dial(config):
    network = controls.threshold(config)[-1]
    return Dial(config, expected_loss(config), network)


def test_no_dial_exceeds_the_bound(config):
    networks = [*controls.fixed(config)[::4], *controls.threshold(config)[::15]]
    played = play(config, networks, "train", 3)
    loss, goodput = played.shares @ expected_loss(config), played.goodput.mean(axis=1)
    losses = np.array([0.01, 0.05, 0.2])
    bounds = controls.foresight(config, "train", 3, losses).goodput[:, 0]
    for most, bound in zip(losses, bounds, strict=True):
        assert goodput[loss <= most].max() <= bound + 1e-9
    assert bounds[0] < bounds[1] <= 1


def test_a_burst_may_be_answered_to_the_end_of_the_bin_of_its_deadline(config, monkeypatch):
    """All requests arrive at once, in the first bin; the cheapest point answers as many as it can."""
    config = config.model_copy(update={"requests": 10_000})
    monkeypatch.setattr(controls, "arrival_times", lambda *_: np.zeros(config.requests))
    fastest = min(point.per_request + point.per_group / config.max_batch for point in config.points)
    ((bound,),) = controls.foresight(config, "train", 1, np.array([1.0])).goodput
    seconds = config.deadline * (1 + 1 / controls.BINS)
    assert bound == pytest.approx(seconds / fastest / config.requests)
    assert bound < 1


def test_a_threshold_takes_the_bolder_point_where_the_queue_is_long(config):
    network = controls.threshold(config)[-1]  # the last two points, at twice what dense answers
    seen = np.zeros((2, 4))
    seen[:, 0] = 1.9, 2.1
    assert network.choose(seen, np.random.default_rng(0)).tolist() == [4, 5]


def test_a_staircase_climbs(config):
    seen = np.zeros((50, 4))
    seen[:, 0] = np.linspace(0, 5, 50)
    points = controls.staircase(config)[0].choose(seen, np.random.default_rng(0))
    assert points[0] == 0
    assert points[-1] == 5
    assert (np.diff(points) >= 0).all()


@pytest.mark.parametrize(
    ("algo", "steps", "settings"), [("ppo", 8_000, {"n_steps": 32}), ("a2c", 16_000, {"learning_rate": 0.01})]
)
def test_learning_finds_fast_points_where_quality_is_cheap_and_good_ones_where_it_is_dear(
    algo, steps, settings, config
):
    env = gym.make_vec(TREC, num_envs=16, **HEAVY).unwrapped
    own = DialSettings(num_envs=16, hidden=16, **settings)
    networks = learn_dials(algo, env, own, steps, 0, configure(None, []), lambda *_: None)
    cheap, dear = play(config, [networks[0], networks[-1]], "train", 2).shares @ expected_loss(config)
    assert cheap > 0.03
    assert dear < 0.005


def test_learning_prices_quality_in_epsilons():
    rewards = []
    for epsilon in (0.02, 0.04):
        queues = PricedQueues(gym.make_vec(TREC, num_envs=4, epsilon=epsilon, **HEAVY).unwrapped, seed=0)
        queues.reset()
        rewards.append(queues.step(np.full(4, 5))[1])  # nothing is refused yet
    assert rewards[0] == pytest.approx(2 * rewards[1])
    assert (rewards[0] < 0).all()


def test_a_run_is_selected_compared_and_its_dial_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("sd_gym.agents.serving.run.EPISODES", 4)
    told = []
    for algo in ("threshold", "fixed", "foresight"):
        options = {"on_progress": lambda *progress: told.append(progress), "requests": 200, "load": 1.5}
        result = sd_gym.train(TREC, algo, tmp_path / algo, steps=1, **options)
        assert 0 < result["goodput"] <= 1
        low, high = result["quality_difference_interval"]
        assert low <= result["quality_difference"] <= high
        assert result["quality"] - result["quality_ref"] == pytest.approx(result["quality_difference"])
    assert len(told) > 2
    assert all(decisions > 0 and figures == {} for decisions, figures in told)  # shown as a search
    rows = {
        row["agent"]: row for row in sd_gym.compare([tmp_path / algo for algo in ("threshold", "fixed", "foresight")])
    }
    assert rows["foresight"]["return"] is None  # it answers most, whatever that costs
    assert rows["foresight"]["flops_ratio"] < 1
    for row in (rows["threshold"], rows["fixed"]):
        assert [one[0] for one in row["goodput_at"]] == sorted(one[0] for one in row["goodput_at"])
    dial = Dial.load(tmp_path / "threshold")
    assert 0 <= dial.choose(500, 0.9, 600.0) < len(dial.config.points)
    with pytest.raises(ValueError, match="use sd-gym compare"):
        collect([tmp_path / "fixed"])
    sd_gym.train("SD/QuestionAnswering-QAMR-Table-v0", "dense", tmp_path / "dense", steps=1)
    with pytest.warns(UserWarning, match="no runs of serving envs"):
        assert len(collect([tmp_path / "fixed", tmp_path / "dense"])) == 1
    with pytest.raises(FileExistsError, match="finished run"):
        sd_gym.train(TREC, "fixed", tmp_path / "fixed", steps=1, requests=200)
    commands = [["evaluate", tmp_path / "fixed"], ["validate", tmp_path / "fixed"], ["reduce", tmp_path / "fixed"]]
    commands += [["tune", TREC, "--algo", "ppo"], ["tabulate", TREC]]
    for number, command in enumerate(commands):
        output = [] if command[0] in ("evaluate", "validate") else ["--output", tmp_path / str(number)]
        shown = CliRunner().invoke(app, [*map(str, command), *map(str, output)])
        assert "is a serving env, which only train, compare and serve --dial take" in " ".join(shown.stderr.split())


def test_a_run_that_was_cut_off_starts_again_and_only_as_itself(tmp_path, monkeypatch):
    monkeypatch.setattr("sd_gym.agents.serving.run.EPISODES", 2)
    small = {"num_envs": 4, "n_steps": 16, "hidden": 8, "requests": 200, "steps": 256, "output": tmp_path}

    def kill(steps, figures):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sd_gym.train(TREC, "ppo", **small, on_progress=kill)
    with pytest.raises(ValueError, match="holds another run; choose another --output: its seed is 0, now it is 7"):
        sd_gym.train(TREC, "ppo", **small, seed=7, resume=True)
    sd_gym.train(TREC, "ppo", **small, resume=True)
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1


def test_reinforce_does_not_apply(tmp_path):
    with pytest.raises(NotApplicableError, match="thousands of decisions"):
        sd_gym.train(TREC, "reinforce", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_comparing_takes_the_serving_controls_and_says_what_does_not_apply(tmp_path):
    statuses = sd_gym.train_all([TREC], ["reinforce"], tmp_path, controls=False, seeds=1)
    assert [status.state for status in statuses] == ["not applicable"]


def test_saved_dials_decide_the_same(dial, tmp_path):
    dial.save(tmp_path)
    same = Dial.load(tmp_path)
    for queue, wait, rate in ((1, 0.0, 1.0), (300, 0.7, 400.0), (900, 1.0, 900.0)):
        assert same.choose(queue, wait, rate) == dial.choose(queue, wait, rate)
    assert same.config == dial.config


def test_a_dial_remembers_what_was_answered_not_what_it_chose(config):
    weight, bias = np.zeros((4, 6)), np.zeros(6)
    weight[3, 0], bias[5] = 1.0, 0.5  # dense, once the recent loss is half of epsilon
    dial = Dial(config, np.full(6, config.epsilon), Network([(weight, bias)]))
    assert [dial.choose(1000, 0.1, 9.0) for _ in range(50)] == [5] * 50
    dial.answered(5, 600)
    assert dial.choose(1, 0.1, 9.0) == 5
    dial.answered(5, 200)
    assert dial.choose(1, 0.1, 9.0) == 0


@settings(deadline=None, max_examples=50)
@given(queue=st.integers(0, 10**9), wait=st.floats(), rate=st.floats())
def test_whatever_a_server_says_there_is_a_point(config, queue, wait, rate):
    dial = Dial(config, expected_loss(config), controls.staircase(config)[0])
    assert dial.choose(queue, wait, rate) in range(len(config.points))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        ({"env": 3}, "must be a mapping"),
        ({"env": {}}, "'id': Field required"),
        ({"env": serving_config(TREC, {}).model_dump(mode="json", exclude={"deadline"})}, "env: no deadline"),
        ({"expected_loss": [1.0]}, "expected layers"),
        ({"expected_loss": ["a"] * 6}, "to float: 'a'"),
        ({"expected_loss": [float("nan")] * 6}, "expected finite"),
    ],
)
def test_damaged_dials_are_refused(dial, tmp_path, damage, why):
    dial.save(tmp_path)
    file = tmp_path / "dial.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    with pytest.raises(ValueError, match=rf"dial\.json, .* is damaged \(.*{why}"):
        Dial.load(tmp_path)


def test_a_network_of_another_env_is_refused(config):
    with pytest.raises(ValueError, match="expected layers"):
        Dial(config, expected_loss(config), Network([(np.zeros((4, 3)), np.zeros(3))]))
    with pytest.raises(FileNotFoundError, match="sd-gym train"):
        Dial.load("nowhere")


@given(st.integers(0, 2**16), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_the_goodput_at_a_loss_is_that_of_the_best_mixture(seed, dials):
    random = np.random.default_rng(seed)
    goodput, loss = np.sort(random.uniform(0.2, 1, dials + 1)), np.append(0, random.uniform(0, 0.1, dials))
    limits = random.uniform(0.001, 0.1, 3)
    share = np.linspace(0, 1, 501)[:, None, None]
    mixed = share * goodput + (1 - share) * goodput[:, None]
    lost = share * goodput * loss + (1 - share) * (goodput * loss)[:, None]
    best = [mixed[lost <= limit * mixed + 1e-12].max() for limit in limits]
    np.testing.assert_allclose(goodput_at(loss, goodput, limits), best, atol=3e-3)


def test_the_loss_of_a_dial_is_as_sure_as_its_arrivals(config):
    played = play(config, [controls.fixed(config)[4], *controls.threshold(config)[::15]], "validation", 6)
    fixed, *thresholds = _arrival_errors(config, played)
    assert fixed == pytest.approx(0, abs=1e-12)
    assert max(thresholds) > 1e-5


def test_a_dial_that_answers_nothing_is_dense_not_worthless():
    played = Played(np.array([[[0, 0], [0, 0]], [[1, 0], [0, 3]]]), np.array([[5, 5], [4, 2]]))
    np.testing.assert_array_equal(played.shares, [[1, 0], [0.25, 0.75]])
    np.testing.assert_array_equal(played.goodput[0], 0)


def test_steps_of_one_rollout_teach_nothing_and_it_says_so(tmp_path):
    with pytest.warns(UserWarning, match="64 steps are at most one rollout of 64, so nothing is learned"):
        sd_gym.train(TREC, "ppo", tmp_path / "run", steps=64, requests=200, num_envs=8, n_steps=8)
