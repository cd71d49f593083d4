"""Read and check the files of a decision network, ``policy.json`` and ``policy.safetensors``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from sd_gym.errors import first_problem, short
from sd_gym.files import read_tensors
from sd_gym.going_on import ANSWER
from sd_gym.policy.choices import Noise

FORMAT = 2


class Strict(BaseModel):
    """Refuses missing and unknown fields, and other types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=BaseModel)


def read_model(model: type[Model], file: Path, problem: str) -> Model:
    """The content of a JSON file; ``ValueError`` with the problem and the field if it does not fit the model."""
    try:
        return model.model_validate_json(file.read_bytes())
    except ValidationError as error:
        field, found = first_problem(error)
        raise ValueError(f"{file}: {problem}: {field or 'whole file'}: {found}") from error


class NetworkDescription(Strict):
    """The content of ``policy.json``; see ``DecisionPolicy``."""

    format: Literal[2]
    observation_size: int = Field(ge=1)
    nvec: list[Annotated[int, Field(ge=1)]] = Field(min_length=1)
    switches: list[str]
    blind: bool
    noise: Noise
    hidden: int = Field(ge=1)
    network: str | None = None
    codebook: Annotated[list[list[int]], Field(min_length=1)] | None = None
    stages: Annotated[list[str], Field(min_length=1)] = ["first"]
    per_stage: bool = False
    channels: Annotated[int, Field(ge=1)] | None = None
    token_width: Annotated[int, Field(ge=1)] | None = None
    graded: bool = False

    @model_validator(mode="after")
    def _one_choice_a_switch(self) -> NetworkDescription:
        if len(set(self.switches)) < len(self.switches):
            raise ValueError("expected switches that are all different")
        # On a table: one component per stage, also if all are decided at once.
        of_table = not self.switches and (self.stages == ["first"] or len(self.nvec) == len(self.stages))
        switches, answers = len(self.switches), self.stages[-1] == ANSWER
        fits = len(self.nvec) == switches + 1 + answers and set(self.nvec[:switches]) <= {1, 2}
        if not of_table and not (fits and self.nvec[switches + 1 :] == [2] * answers):
            raise ValueError(
                f"expected nvec with a 2 for each of the {switches} switches (a 1 where it always runs), then the "
                f"number of token levels, and a 2 for the stage {ANSWER} if there is one; got {self.nvec}"
            )
        lowest = 0 if self.stages == ["first"] else -1  # -1: decided at other stages
        for mask in self.codebook or []:
            fits = len(mask) == len(self.nvec)
            if not fits or not all(lowest <= choice < size for choice, size in zip(mask, self.nvec, strict=True)):
                raise ValueError(f"expected a codebook of decisions, each below {self.nvec}, got {short(mask)}")
        stages = {tuple(at for at, choice in enumerate(mask) if choice >= 0) for mask in self.codebook or []}
        decided = [component for stage in stages for component in stage]
        if len(decided) > len(set(decided)):
            raise ValueError("expected a codebook in which two decisions share all of their components, or none")
        return self


def read_weights(file: Path, policy: nn.Module) -> dict[str, Tensor]:
    """The weights in a file; ``ValueError`` if names, shapes or types are not the policy's, or values not finite."""
    weights = read_tensors(file)
    expected, parameters = policy.state_dict(), dict(policy.named_parameters())
    if names := ", ".join(sorted(expected.keys() ^ weights.keys())):
        raise ValueError(f"{file}: expected the weights {', '.join(sorted(expected))}; missing or unknown: {names}")
    for name, weight in weights.items():
        if (weight.shape, weight.dtype) != (expected[name].shape, expected[name].dtype):
            raise ValueError(
                f"{file}: expected {name} of shape {list(expected[name].shape)} and {expected[name].dtype}, as in "
                f"policy.json; got {list(weight.shape)} and {weight.dtype}"
            )
        finite = weight.isfinite() if name in parameters else ~weight.isnan()
        if not finite.all():
            raise ValueError(f"{file}: expected finite numbers, but {(~finite).sum().item()} in {name} are not")
    return weights
