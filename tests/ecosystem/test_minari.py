"""Minari: a data set of decisions with their infos, recorded and read back."""

import gymnasium as gym
import numpy as np
import pytest

import sd_gym  # noqa: F401  (registers the ids)
from tests.ecosystem import ID, SMALL

PINS = ["minari[arrow,create,hdf5]==0.5.4"]
minari = pytest.importorskip("minari")


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_episodes_are_recorded_with_their_infos(data_format, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = minari.DataCollector(gym.make(ID, **SMALL), record_infos=True, data_format=data_format)
    env.action_space.seed(0)
    given = []
    for number in range(4):
        observation, info = env.reset(seed=number)
        action = env.action_space.sample()
        _, reward, _, _, step_info = env.step(action)
        given.append((observation, action, reward, step_info))
    env.create_dataset("sd/decisions-v0", algorithm_name="random")
    dataset = minari.load_dataset("sd/decisions-v0")
    assert dataset.total_episodes == 4
    for episode, (observation, action, reward, info) in zip(dataset, given, strict=True):
        np.testing.assert_array_equal(episode.observations[0], observation)
        np.testing.assert_array_equal(episode.actions[0], action)
        assert episode.rewards[0] == reward
        assert set(episode.infos) == set(info)
        assert episode.infos["quality"].tolist() == [0, info["quality"]]
        assert episode.infos["flops_ratio"].tolist() == [0, info["flops_ratio"]]
        np.testing.assert_array_equal(episode.infos["decision"], [np.zeros_like(action), action])
    env.close()
    recovered = dataset.recover_environment()
    assert recovered.action_space == gym.make(ID, **SMALL).action_space
