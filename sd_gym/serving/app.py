"""A batcher over HTTP: routes, status codes, metrics and a page."""

import asyncio
import contextlib
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from sd_gym.errors import DataError, short
from sd_gym.serving.batcher import Batcher, ClosedError, LateError, QueueFullError
from sd_gym.serving.dial import ServerDial
from sd_gym.serving.engine import Asked, BlockingEngine, OperatingPoints, Served
from sd_gym.serving.limits import Limits, RequestLimits
from sd_gym.serving.metrics import Metrics
from sd_gym.serving.requests import (
    Body,
    Completions,
    Generate,
    GenerateParameters,
    Predict,
    RefusedError,
    body_of,
    inputs_of,
)
from sd_gym.version import __version__

Endpoint = Callable[[Request], Awaitable[Response]]
PAGE = Path(__file__).with_name("page.html")
log = logging.getLogger(__name__)


class GoneError(Exception):
    """The client has hung up."""


class Service:
    """A model that answers over HTTP.

    Attributes:
        dial: Chooses the operating point of each group; by default always the default point.
        batcher: Groups the requests; ``None`` until the model is warm.
        starts_warm: Whether the app starts only when the model is warm, and fails to start if it cannot be.
        failure: The error after which the model cannot answer; ``None`` while it can.
        on_failure: Called when there is one.
    """

    def __init__(
        self,
        engine: BlockingEngine,
        points: OperatingPoints,
        limits: Limits,
        settings: RequestLimits,
        dial: ServerDial | None = None,
    ) -> None:
        self.engine = engine
        self.points = points
        self.settings = settings
        self._limits = limits
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")  # so that the event loop never blocks
        self._served = engine.served
        self.dial = dial or ServerDial(points.default)
        self.metrics = Metrics(lambda: self.batcher.queued if self.batcher else 0)
        self.batcher: Batcher | None = None
        self.starts_warm = False
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._work: asyncio.Task[None] | None = None
        self._is_closing = False

    @property
    def is_ready(self) -> bool:
        """Whether the server takes requests."""
        return self._work is not None and not self._work.done() and not self._is_closing

    def close(self) -> None:
        """Take no more requests, but answer those that were accepted. Safe in a signal handler."""
        self._is_closing = True

    def check(self) -> None:
        """Raise ``RuntimeError`` if the model cannot answer."""
        if self.failure is not None:
            raise RuntimeError("the model cannot answer, so the server ends") from self.failure

    @contextlib.asynccontextmanager
    async def running(self, app: Starlette) -> AsyncIterator[None]:
        """Warm up and answer requests during the block; on exit, answer what was accepted.

        Raises:
            RuntimeError: If the model fails when it is warmed up, and the service ``starts_warm``.
        """
        starting = asyncio.create_task(self._start())
        try:
            if self.starts_warm:
                await starting
                self.check()
            yield
        finally:
            self.close()
            await starting
            if self.batcher is not None and self._work is not None:
                self.batcher.close()
                await asyncio.wait([self._work])
            self._thread.shutdown()

    async def _start(self) -> None:
        try:
            cost = await self._call(self.engine.warm_up)
        except Exception as error:
            self._fail(error)
            return
        prepare, run = partial(self._call, self.engine.prepare), partial(self._call, self.engine.run)
        self.batcher = Batcher(prepare, run, self._limits, cost, self.dial, self.metrics.group)
        self._work = asyncio.create_task(self.batcher.work())
        self._work.add_done_callback(self._watch)

    async def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    def _watch(self, work: asyncio.Task[None]) -> None:
        if not work.cancelled() and (error := work.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        log.error("the model cannot answer", exc_info=error)
        self.close()
        self.failure = error
        self.on_failure()

    async def answer(self, request: Request, given: list[Any], body: Body, longest: int | None = None) -> list[Served]:
        """The answers to the inputs of a request.

        Raises:
            RefusedError: 413 for too many inputs, 422 for wrong ones, 503 if the server is not ready.
            QueueFullError, LateError: See ``Batcher.answer``.
            GoneError: If the client hangs up.
        """
        if not self.is_ready or self.batcher is None:
            what = "is shutting down" if self._is_closing else "is starting"
            raise RefusedError(503, f"the server {what}", "Unhealthy")
        if len(given) > self.settings.inputs:
            raise RefusedError(413, f"expected at most {self.settings.inputs} inputs, got {len(given)}")
        point = self._point(body)
        asked = [Asked(self._texts(number, content), point, longest) for number, content in enumerate(given)]
        timeout = min(body.timeout or self.settings.timeout, self.settings.timeout)
        return await _unless_gone(request, self.batcher.answer(asked, timeout))

    def _texts(self, number: int, given: Any) -> list[str]:
        if isinstance(given, dict) and (unknown := [*given.keys() - {*self._served.fields}]):
            fields = ", ".join(self._served.fields)
            raise RefusedError(422, f"input {number}: unknown field {short(unknown[0])}; the fields are {fields}")
        try:
            texts = self.engine.checked(given)
        except ValueError as error:
            raise RefusedError(422, f"input {number}: {error}") from None
        if (length := sum(map(len, texts))) > (most := self.settings.characters):
            raise RefusedError(413, f"input {number}: expected at most {most:,} characters, got {length:,}")
        return texts

    def _point(self, body: Body) -> int | None:
        if body.point is not None:
            if body.max_loss is not None or body.max_flops is not None or body.point >= len(self.points.points):
                raise RefusedError(422, f"point: expected one of {len(self.points.points)} points, and no other limit")
            return body.point
        try:
            return self.points.index(body.max_loss, body.max_flops)
        except ValueError as error:
            raise RefusedError(422, str(error)) from None

    # --- routes -------------------------------------------------------------------------------------------------------

    async def predict(self, request: Request) -> Response:
        """``POST /predict``."""
        body = await body_of(request, Predict, self.settings.body, self.settings.timeout)
        given, is_single = inputs_of(body.inputs)
        served = await self.answer(request, given, body)
        answers = [_details(row) if body.details else _prediction(row) for row in served]
        return _json(answers[0] if is_single else answers, served)

    async def generate(self, request: Request) -> Response:
        """``POST /generate``."""
        body = await body_of(request, Generate, self.settings.body, self.settings.timeout)
        given, is_single = inputs_of(body.inputs)
        parameters = body.parameters or GenerateParameters()
        longest = self._longest(parameters.max_new_tokens, "parameters.max_new_tokens")
        served = await self.answer(request, given, parameters, longest)
        texts = [
            {"generated_text": row.answer.answer} | ({"details": _details(row)} if parameters.details else {})
            for row in served
        ]
        return _json(texts[0] if is_single else texts, served)

    async def completions(self, request: Request) -> Response:
        """``POST /v1/completions``."""
        body = await body_of(request, Completions, self.settings.body, self.settings.timeout)
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        if not prompts:
            raise RefusedError(422, "prompt: expected at least one text")
        longest = self._longest(body.max_tokens, "max_tokens")
        served = await self.answer(request, list(prompts), body, longest)
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        texts = [_cut(row.answer.answer, stops) for row in served]
        ended = [row.finished or text != row.answer.answer for row, text in zip(served, texts, strict=True)]
        choices = [
            {"index": at, "text": text, "logprobs": None, "finish_reason": "stop" if has_ended else "length"}
            for at, (text, has_ended) in enumerate(zip(texts, ended, strict=True))
        ]
        usage = {
            "prompt_tokens": sum(row.length for row in served),
            "completion_tokens": sum(row.generated for row in served),
        }
        content = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model or self._served.name,
            "choices": choices,
            "usage": usage | {"total_tokens": sum(usage.values())},
        }
        return _json(content, served)

    def _longest(self, asked: int | None, field: str) -> int | None:
        if asked is not None and asked > self._served.longest:
            raise RefusedError(422, f"{field}: expected at most {self._served.longest}, got {asked}")
        return None if asked == self._served.longest else asked  # as in requests without it, to share their groups

    async def info(self, request: Request) -> Response:
        """``GET /info``: the model and its operating points."""
        return JSONResponse(
            {
                "model_id": self._served.name,
                "version": __version__,
                "fields": list(self._served.fields),
                "gives": self._served.gives,
                "switches": self._served.switches,
                "operating_points": [
                    {"highest_loss": _number(point.highest_loss), "flops_ratio": _number(point.flops_ratio)}
                    for point in self.points.points
                ],
                "default_point": self.points.default,
                "max_client_batch_size": self.settings.inputs,
                "timeout": self.settings.timeout,
            }
        )

    async def ready(self, request: Request) -> Response:
        """``GET /readyz``."""
        return Response("ok" if self.is_ready else "not ready", status_code=200 if self.is_ready else 503)

    async def exposed(self, request: Request) -> Response:
        """``GET /metrics``."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def app(self) -> Starlette:
        """The application."""
        posts = {"/predict": self.predict}
        if self._served.gives == "text":
            posts["/generate"] = self.generate
        if self._served.completes:
            posts["/v1/completions"] = self.completions
        gets: dict[str, Any] = {"/info": self.info, "/readyz": self.ready, "/metrics": self.exposed}
        gets |= {"/": FileResponse(PAGE), "/livez": Response("ok")}
        routes = [Route(path, endpoint, methods=["GET"]) for path, endpoint in gets.items()]
        routes += [Route(path, self._counted(path, endpoint), methods=["POST"]) for path, endpoint in posts.items()]
        app = Starlette(routes=routes, lifespan=self.running)
        app.state.service = self
        return app

    def _counted(self, path: str, endpoint: Endpoint) -> Endpoint:
        """Wrap an endpoint: errors become responses, and metrics count and time each request."""

        async def call(request: Request) -> Response:
            started = time.perf_counter()
            try:
                response = await endpoint(request)
            except Exception as error:
                response = _failed(error, openai=path.startswith("/v1/"))
            self.metrics.request(path, response.status_code, time.perf_counter() - started)
            return response

        return call


def _failed(error: Exception, *, openai: bool) -> Response:
    headers = {}
    match error:
        case RefusedError():
            status, kind = error.status, error.kind
        case QueueFullError():
            status = 429
            kind = "Overloaded"
            headers = {"Retry-After": str(error.retry_after)}
        case ClosedError():
            status, kind = 503, "Unhealthy"
        case LateError():
            status, kind = 504, "Overloaded"
        case GoneError() | ClientDisconnect():
            return Response(status_code=499)  # the client does not read it
        case DataError():  # the input is wrong: a question leaves no room for its context
            status, kind = 422, "Tokenizer"
        case _:
            log.error("a request failed", exc_info=error)
            status, kind = 500, "Backend"
    message = str(error) if status != 500 else "the model failed on this input; the server's log says why"
    content: dict[str, Any] = {"error": message, "error_type": kind}
    if openai:
        content = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return JSONResponse(content, status_code=status, headers=headers)


async def _unless_gone(request: Request, answering: Awaitable[list[Served]]) -> list[Served]:
    """Wait for the answers. If the client hangs up first, cancel them and raise ``GoneError``."""
    waiting: Any = asyncio.current_task()

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        waiting.cancel()

    gone = asyncio.create_task(hang_up())
    try:
        return await answering
    except asyncio.CancelledError:
        if gone.done() and waiting.uncancel() == 0:  # nobody else has cancelled it
            raise GoneError from None
        raise
    finally:
        gone.cancel()


def _prediction(served: Served) -> Any:
    """An answer in the shape of text-embeddings-inference, where that has one."""
    if served.scores is None:
        return {"answer": served.answer.answer}
    return [{"label": label, "score": score} for label, score in served.scores.items()]


def _details(served: Served) -> dict[str, Any]:
    skip = served.answer.skip.astype(int).tolist()
    return served.answer._asdict() | {"skip": skip, "scores": served.scores, "tokens": served.length}


def _json(content: Any, served: list[Served]) -> Response:
    share = sum(row.promised for row in served) / sum(row.dense for row in served)
    return JSONResponse(content, headers={"x-flops-ratio": f"{share:.4f}"})


def _cut(text: str, stops: list[str]) -> str:
    """The text before the first of the ``stops``."""
    return min((text.partition(stop)[0] for stop in stops if stop), key=len, default=text)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
