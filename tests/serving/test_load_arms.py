"""The arms of the load test, ``benchmarks/serving.py``."""

import pytest

import sd_gym
from benchmarks.serving import ARMS, engine_of
from sd_gym.serving.engine import Asked
from sd_gym.serving.limits import Limits, RequestLimits
from sd_gym.serving.server import service
from tests.envs.conftest import trained
from tests.serving.test_engine import few_masks


@pytest.mark.parametrize("stages", [["first"], ["first", "answer"]])
def test_arms_of_one_mask_decide_nothing_and_the_others_as_the_policy_does(stages, tmp_path, tiny_tokenizer):
    *_, policy, texts = trained("classification", None, tmp_path, tiny_tokenizer, stages=stages)
    few_masks(policy)
    wanted = sd_gym.load(policy)(texts)
    assert any(one.went_on for one in wanted) == ("answer" in stages)
    sd_gym.export(policy, tmp_path / "onnx")
    for served in (policy, str(tmp_path / "onnx")):
        for arm in ARMS:
            engine = engine_of(arm, service(served, Limits(), RequestLimits(), threads=1), texts)
            rows = engine.prepare([Asked([text]) for text in texts])
            answers = [one.answer for row in rows for one in engine.run([row], 0)]
            if arm.startswith("policy"):
                assert [one.answer for one in answers] == [one.answer for one in wanted]
                assert [one.went_on for one in answers] == [one.went_on for one in wanted]
            else:
                assert len({one.skip.tobytes() for one in answers}) == 1
                assert any(answers[0].skip) == (arm == "one mask")
                assert not any(one.went_on for one in answers)
