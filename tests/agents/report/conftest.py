"""Folders of runs that nobody has trained."""

import json

import pytest
from sd_gym.agents.registry import agent_names, is_control
from sd_gym.agents.runs.verdict import Verdict, losses_allowed

ENV, OTHER = "SD/Classification-Mini-v0", "SD/QuestionAnswering-Mini-v0"
SWITCHES = ["encoder.0.attention", "encoder.0.feed_forward", "encoder.1.attention", "encoder.1.feed_forward"]


def level(difficulty, instances, rate):
    means = {"quality": 0.99, "quality_ref": 0.995, "flops_ratio_with_policy": 1 - rate}
    return {"difficulty": difficulty, "instances": instances, **means, "skip_rate": [rate] * len(SWITCHES)}


@pytest.fixture
def run(tmp_path):
    """Writes the folder of a run; the agent needs not be known."""

    def make(
        algo,
        seed=0,
        *,
        flops=0.4,
        lost=0.002,
        kept=True,
        env=ENV,
        instances=2000,
        epsilon=0.01,
        steps=100,
        last=None,
        returned=None,
    ):
        verdict = Verdict.KEPT if kept else Verdict.NOT_SHOWN
        if losses_allowed(instances, epsilon) is None:
            kept, verdict = False, Verdict.TOO_FEW
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        config = {
            "env": env,
            "algo": algo,
            "steps": steps,
            "seed": seed,
            "command": f"sd-gym train {env} --algo {algo}",
            "env_config": {"id": env, "task": "classification", "dataset": "x", "backbone": "mini", "epsilon": epsilon},
            "agent_settings": {},
            "versions": {"torch": "2.13.0"},
            "data": {"test": {"hash": f"rows{instances}"}},
            "weights": "abc123",
            "control": algo in agent_names() and is_control(algo),
        }
        result = {
            "split": "test",
            "instances": instances,
            "epsilon": epsilon,
            "quality": 0.995 - lost,
            "quality_ref": 0.995,
            "quality_difference": -lost,
            "quality_difference_interval": [-lost - 0.004, -lost + 0.004],
            "flops_ratio_with_policy": flops,
            "return": returned,
            "regret": None,
            "last_policy": last,
            "quality_kept": kept,
            "guarantee": None,
            "policy_flops_counted": True,
            "decisions_hash": "0",
            "verdict": str(verdict),
            "by_difficulty": [level(1, instances - 12, 0.7), level(2, 12, 0.3)],
            "skip_rate": dict.fromkeys(SWITCHES, 0.6),
            "time": {},
            "decisions_used": 3,
            "history": [
                {"step": step, "quality": 0.99, "quality_ref": 0.995, "flops_ratio_with_policy": flops + 10 / step}
                for step in (25, 50, 100)
            ],
            "data": {"test": {"hash": f"rows{instances}", "also_in": {}}},
        }
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "result.json").write_text(json.dumps(result))
        lines = [
            "id,level,decision,quality,quality_ref,flops_ratio",
            "test-0,1,11010,1.0,1.0,0.4",
            "test-1,2,00010,0,1,0.8",
        ]
        (folder / "instances.csv").write_text("\n".join(lines) + "\n")
        return folder

    return make


def seeds(run, algo, flops, **values):
    return [run(algo, seed, flops=one, **values) for seed, one in enumerate(flops)]
