"""Bodies of requests, which are checked before they queue."""

import asyncio
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.requests import Request

from sd_gym.errors import first_problem, short

Limit = Annotated[float | None, Field(ge=0, allow_inf_nan=False)]
MOST_STOPS = 4  # as in OpenAI's API


class RefusedError(Exception):
    """A refused request, with its HTTP status and text-embeddings-inference's name of the error."""

    def __init__(self, status: int, message: str, kind: str = "Validation") -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind


class Body(BaseModel):
    """Fields of every body."""

    model_config = ConfigDict(extra="forbid", strict=True)

    max_loss: Limit = None  # the highest loss of quality, in the task's unit; see ``SkipPolicy.at``
    max_flops: Limit = None  # the largest share of the dense FLOPs
    point: Annotated[int | None, Field(ge=0)] = None  # index of a point of ``/info``, in place of these two limits
    timeout: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None  # seconds, at most the server's limit


class Predict(Body):
    """The body of ``POST /predict``, as in text-embeddings-inference."""

    inputs: Any
    details: bool = False
    truncate: Literal[True] = True
    truncation_direction: Literal["Right", "right"] = "Right"
    raw_scores: Literal[False] = False
    parameters: Annotated[dict[str, Any], Field(max_length=0)] | None = None  # huggingface_hub sends an empty object


class GenerateParameters(Body):
    """Parameters of ``Generate``."""

    max_new_tokens: Annotated[int | None, Field(ge=1)] = None
    details: bool = False
    do_sample: Literal[False] = False
    return_full_text: Literal[False] | None = None


class Generate(BaseModel):
    """The body of ``POST /generate``, as in text-generation-inference."""

    model_config = ConfigDict(extra="forbid", strict=True)

    inputs: Any
    parameters: GenerateParameters | None = None
    stream: Literal[False] = False


class Completions(Body):
    """The body of ``POST /v1/completions``, as in OpenAI's API; answers are greedy."""

    model: str | None = None
    prompt: str | list[str]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    seed: int | None = None
    user: str | None = None
    top_p: float | None = 1
    # Fields that clients send, with the values that change nothing.
    temperature: Annotated[float, Field(ge=0, le=0)] | None = 0
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = 0
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = 0
    n: Literal[1] | None = 1
    best_of: Literal[1] | None = 1
    echo: Literal[False] | None = False
    stream: Literal[False] | None = False
    suffix: None = None
    logprobs: None = None
    logit_bias: None = None
    stream_options: None = None

    @field_validator("model")
    @classmethod
    def _is_text(cls, model: str | None) -> str | None:
        """The response repeats the name, and JSON in UTF-8 has no lone surrogates."""
        if model is not None:
            model.encode()
        return model


Kind = TypeVar("Kind", bound=BaseModel)


async def body_of(request: Request, kind: type[Kind], most: int, seconds: float) -> Kind:
    """Read the body of a request.

    Raises:
        RefusedError: 400 if it is not a JSON object, 408 if it takes more than ``seconds`` to arrive, 413 if it has
            more than ``most`` bytes, 422 if a field is wrong.
    """
    received = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                received += part
                if len(received) > most:
                    raise RefusedError(413, f"expected a body of at most {most:,} bytes; send fewer or shorter inputs")
    except TimeoutError:
        raise RefusedError(408, f"the body did not arrive within {seconds:g} s") from None
    try:
        values = json.loads(received, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"expected a JSON object: {short(str(error))}") from None
    if not isinstance(values, Mapping):
        raise RefusedError(400, f"expected a JSON object, got {short(values)}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        place, problem = first_problem(error)
        raise RefusedError(422, f"{short(place)}: {problem}") from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"JSON has no number {name}")


def inputs_of(given: Any) -> tuple[list[Any], bool]:
    """The list of inputs, and whether it is a single one. Raises ``RefusedError`` (422) if there are none.

    As in text-embeddings-inference, a list of texts is one input (a pair), and several inputs are a list of lists.
    """
    if isinstance(given, str | Mapping):
        return [given], True
    if not isinstance(given, list) or not given:
        raise RefusedError(422, f"inputs: expected a text, a pair of texts, or a list of inputs; got {short(given)}")
    if not all(isinstance(one, str) for one in given):
        return given, False
    if len(given) > 2:
        raise RefusedError(
            422, "inputs: a list of texts is one input; put each input into a list of its own: [[...], ...]"
        )
    return [given], True
