"""What nobody can do better."""

from sd_gym.agents.experiment.run import train


def test_no_policy_saves_more_than_the_oracle(settings, tmp_path):
    oracle = train("SD/Classification-Custom-v0", "oracle", tmp_path / "oracle", steps=1, **settings)
    static = train("SD/Classification-Custom-v0", "static", tmp_path / "static", steps=1, **settings)
    assert oracle["quality"] >= oracle["quality_ref"]
    assert oracle["flops_ratio"] <= static["flops_ratio"]
    assert not (tmp_path / "oracle" / "policy.json").exists()
    assert oracle["time"] == {}
