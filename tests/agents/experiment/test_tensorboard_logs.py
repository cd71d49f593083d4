"""What TensorBoard shows of a run: the same tags of all agents, with the same meaning, each point once."""

import json

import pytest
from sd_gym.agents.drawing import run_picture
from sd_gym.agents.experiment import tensorboard_logs
from sd_gym.agents.experiment.run import train
from sd_gym.agents.imitation.agent import ImitationAgent
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from tests.agents.conftest import cut_off
from tests.conftest import CutError

CUSTOM = "SD/Classification-Custom-v0"


def events_of(folder):
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def points(events, tag):
    return [(event.step, event.value) for event in events.Scalars(tag)]


def hyperparameters_of(events):
    """The settings of the one session, and the tags that sessions are compared by."""
    found = events.summary_metadata["_hparams_/session_start_info"]
    start = HParamsPluginData.FromString(found.plugin_data.content).session_start_info
    experiment = HParamsPluginData.FromString(
        events.summary_metadata["_hparams_/experiment"].plugin_data.content
    ).experiment
    values = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    return values, {metric.name.tag for metric in experiment.metric_infos}


@pytest.mark.parametrize("name", ["ppo", "reinforce", "imitation", "static", "random", "early-exit"])
def test_settings_result_and_validation_are_there_for_every_agent(name, custom, tmp_path):
    settings = {**custom, "penalty": 3.0}
    result = train(CUSTOM, name, tmp_path / "run", steps=600, seed=5, **settings)
    events = events_of(tmp_path / "run")
    if name in ("ppo", "reinforce"):  # a run shorter than what lies between two points has its curves too
        assert {"rollout/ep_rew_mean", "rollout/success_rate"} <= set(events.Tags()["scalars"])
    values, metrics = hyperparameters_of(events)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (values["env"], values["algo"], values["seed"], values["steps"]) == (CUSTOM, name, 5, 600)
    assert (values["reward.penalty"], values["reward.objective"]) == (3.0, "lexicographic")
    for key, value in config["agent_settings"].items():
        assert values[key] == (value if isinstance(value, int | float) else str(value))
    assert metrics == {"test/quality_difference", "test/flops_ratio_with_policy", "test/quality_kept"}
    for tag in metrics:
        ((_, value),) = points(events, tag)
        assert value == pytest.approx(float(result[tag.removeprefix("test/")]), abs=1e-6)
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "penalty: 3.0" in text
    assert f"algo: {name}" in text
    if name != "early-exit":  # it is no policy
        for key in ("reward", "quality", "flops_ratio"):
            logged = points(events, f"validation/{key}")
            expected = [(entry["step"], pytest.approx(entry[key], abs=1e-5)) for entry in result["history"]]
            assert logged == expected or (not expected and len(logged) == 1)


def test_skip_rates_are_a_picture_beside_the_result_and_charts_lay_agents_over_each_other(
    custom, tmp_path, monkeypatch
):
    monkeypatch.setattr(tensorboard_logs, "plot_skip_rates", run_picture.plot_skip_rates)  # as large as it is
    result = train(CUSTOM, "ppo", tmp_path / "run", steps=600, **custom)
    events = events_of(tmp_path / "run")
    (picture,) = events.Images("test/skip_rates")
    assert picture.step == result["history"][-1]["step"]
    assert picture.width > 200 < picture.height
    found = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    charts = Layout.FromString(found).category[0].chart
    tags = {tag for chart in charts for tag in chart.multiline.tag}
    assert {"validation/quality", "validation/flops_ratio"} <= tags <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("name", ["ppo", "a2c", "reinforce"])
def test_no_point_is_there_twice_after_a_run_was_cut_off_and_went_on(name, custom, tmp_path):
    arguments = {"steps": 800, **{**custom, "num_envs": 4}}  # several rollouts per point
    whole = train(CUSTOM, name, tmp_path / "whole", **arguments)
    cut_off(CUSTOM, name, tmp_path / "cut", **arguments, after=520)
    train(CUSTOM, name, tmp_path / "cut", **arguments, resume=True)
    curves = []
    for folder in ("whole", "cut"):
        events = events_of(tmp_path / folder)
        for tag in events.Tags()["scalars"]:
            steps = [step for step, _ in points(events, tag)]
            assert steps == sorted(set(steps)), tag
        assert points(events, "rollout/ep_rew_mean")[-1][0] == whole["history"][-1]["step"]
        curves.append(points(events, "rollout/flops_ratio"))
    assert curves[0] == curves[1]  # also the point at which it was cut off
    logged = points(events, "validation/reward")
    assert logged == [(entry["step"], pytest.approx(entry["reward"], abs=1e-5)) for entry in whole["history"]]
    assert len(events.Tensors("config/text_summary")) == 1
    assert hyperparameters_of(events)[0]["algo"] == name


def test_a_run_that_begins_again_hides_what_was_there(custom, tmp_path, monkeypatch):
    """An agent that searches has no checkpoint: it starts anew in the folder that it was cut off in."""

    def kill(agent, folder):
        raise CutError

    with monkeypatch.context() as patch:
        patch.setattr(ImitationAgent, "save_extra", kill)
        with pytest.raises(CutError):
            train(CUSTOM, "imitation", tmp_path / "run", steps=100, **custom)
    train(CUSTOM, "imitation", tmp_path / "run", steps=100, **custom, resume=True)
    assert len(list((tmp_path / "run").glob("events.*"))) == 2
    events = plugin_event_accumulator.EventAccumulator(
        str(tmp_path / "run")
    ).Reload()  # as TensorBoard itself reads them
    for tag in ("config/text_summary", "imitation/risk_loss_0", "validation/reward"):
        steps = [event.step for event in events.Tensors(tag)]
        assert steps == sorted(set(steps)), tag
