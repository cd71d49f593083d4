"""What several tests of envs share."""

SMALL = {"train_size": 60, "validation_size": 20, "test_size": 20}
STEP_INFO = {
    "quality",
    "quality_ref",
    "cost",
    "flops_ratio",
    "vector_reward",
    "is_success",
    "instance",
    "difficulty",
    "decision",
}
