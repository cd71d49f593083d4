"""Make a service from files, and run it in a process."""

import gc
import os
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import uvicorn

from sd_gym.envs.serving.dial import Dial
from sd_gym.inference.manifest import is_exported
from sd_gym.inference.onnx import OnnxModel, runtime
from sd_gym.inference.texts import load
from sd_gym.operating_points import OperatingPoint, margin_for
from sd_gym.policy.artefact import SkipPolicy
from sd_gym.serving.app import Service
from sd_gym.serving.dial import Trained
from sd_gym.serving.engine import GraphEngine, OperatingPoints, TextEngine
from sd_gym.serving.limits import Limits, RequestLimits

CONNECTIONS = 4096  # more clients get 503
KEEP_ALIVE = 75  # seconds that a connection may be idle: more than load balancers allow
SWITCH_INTERVAL = 2e-4  # seconds that the model's thread waits for the GIL while requests are parsed; Python's is 5e-3
GRACE = 5.0  # seconds that a shutdown waits for clients, in addition to a request's timeout


def service(
    policy: str | Path | SkipPolicy,
    limits: Limits,
    settings: RequestLimits,
    *,
    backbone: str | None = None,
    device: str = "cpu",
    max_loss: float | None = None,
    max_flops: float | None = None,
    allow_loss: float | None = None,
    allow_flops: float = 1.0,
    threads: int | None = None,
    dial: str | Path | None = None,
) -> Service:
    """A policy as a service.

    ``policy`` (which may also be a folder of ``sd-gym export``), ``backbone``, ``device`` and the limits of the default
    operating point are as in ``sd_gym.load``. For ``allow_loss`` and ``allow_flops`` see ``OperatingPoints``.
    ``threads``: the model's threads; ``None``: the default of PyTorch or ONNX Runtime. ``dial``: run folder of a
    serving env, whose dial chooses the operating point of each group.

    Raises:
        FileNotFoundError, ValueError: See ``sd_gym.load`` and ``sd_gym.serving.dial.Trained``.
    """
    if dial is not None and (max_loss, max_flops) != (None, None):
        raise ValueError(
            "a dial chooses the operating point, so max_loss and max_flops have no effect; leave them out, or limit "
            "the dial by allow_loss and allow_flops (--allow-loss, --allow-flops)"
        )
    if is_exported(policy):
        if backbone or device != "cpu":
            raise ValueError(f"{policy} is exported: it has its own backbone and runs on the CPU")
        exported = OnnxModel(Path(policy), session_options=_session_options(threads))
        tested = [OperatingPoint(**point) for point in exported.manifest["operating_points"]]
        usual = margin_for(tested, max_loss=max_loss, max_flops=max_flops)
        points = OperatingPoints(tested, usual, allow_loss, allow_flops)
        engine_of: Any = partial(GraphEngine, exported)
    else:
        if threads is not None:
            torch.set_num_threads(threads)
        model = load(policy, backbone, device=device, max_loss=max_loss, max_flops=max_flops)
        points = OperatingPoints(model.policy.operating_points, 0.0, allow_loss, allow_flops)
        engine_of = partial(TextEngine, model)
    if dial is None:
        return Service(engine_of(points, [points.default]), points, limits, settings)
    trained = Trained(dial, [point.margin for point in points.points])
    if settings.timeout != trained.window:
        raise ValueError(
            f"the dial {dial} was trained for answers within {trained.window:g} s, but this server has "
            f"{settings.timeout:g} s for a request; expected the same: --timeout {trained.window:g}"
        )
    return Service(engine_of(points, trained.points), points, limits, settings, trained)


def timeout_of(given: float | None, dial: str | Path | None) -> float:
    """Seconds for a request: those given, or else those of the dial's env, or of ``RequestLimits``."""
    if given is not None:
        return given
    return RequestLimits.timeout if dial is None else Dial.load(dial).config.deadline


def _session_options(threads: int | None) -> Any:
    """Options of ONNX Runtime: each graph has its own threads, and idle threads do not spin."""
    options = runtime().SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def run(served: Service, host: str, port: int, on_address: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; call ``on_address`` with the URL.

    Raises:
        OSError: If the port is taken.
        RuntimeError: If the model fails when it is warmed up, or the batcher does.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), backlog=2048, family=family) as listening:
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or a response's body waits for an ACK
        on_address(f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}")
        config = uvicorn.Config(
            served.app(),
            log_level="warning",
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=round(served.settings.timeout + GRACE),
        )
        gc.collect()
        gc.freeze()  # collections while requests are served need not visit the model and its libraries
        sys.setswitchinterval(SWITCH_INTERVAL)
        _Server(config, served).run(sockets=[listening])
    served.check()


class _Server(uvicorn.Server):
    """Refuses requests as soon as the signal arrives, not only after the last connection is closed."""

    def __init__(self, config: uvicorn.Config, served: Service) -> None:
        super().__init__(config)
        self._served = served
        served.on_failure = self._end

    def _end(self) -> None:
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._served.close()
        if self._served.batcher is None:  # nothing was accepted, and the warm-up cannot be interrupted
            os._exit(128 + sig)
        super().handle_exit(sig, frame)
