"""A service from files, and the process that runs it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import uvicorn

from sd_gym.inference.onnx import MANIFEST, OnnxModel
from sd_gym.inference.texts import load
from sd_gym.operating_points import OperatingPoint
from sd_gym.policy.artefact import SkipPolicy
from sd_gym.serving.app import Service, Settings
from sd_gym.serving.batcher import Dial, Limits
from sd_gym.serving.engine import BlockingEngine, GraphEngine, OperatingPoints, TextEngine

CONNECTIONS = 4096  # beyond them clients get 503
KEEP_ALIVE = 75  # seconds that a connection may be idle: longer than load balancers leave one
GRACE = 5.0  # seconds above a request's timeout, after which a shutdown waits for no client any more


def service(
    policy: str | Path | SkipPolicy,
    limits: Limits,
    settings: Settings,
    *,
    backbone: str | None = None,
    device: str = "cpu",
    max_loss: float | None = None,
    max_flops: float | None = None,
    allow_loss: float | None = None,
    allow_flops: float = 1.0,
    threads: int | None = None,
    dial: Dial | None = None,
) -> Service:
    """A policy as a service.

    Args:
        policy: See ``sd_gym.load``, or a folder that ``sd-gym export`` wrote.
        limits: Of the queue and of groups.
        settings: What the operator allows.
        backbone: See ``sd_gym.load``.
        device: See there.
        max_loss: Of the operating point of requests that ask for none.
        max_flops: The same.
        allow_loss: See ``OperatingPoints``.
        allow_flops: See there.
        threads: Threads that the model runs in; ``None``: as PyTorch, or ONNX Runtime, has it.
        dial: Chooses the operating point of each group, by its index among those that are allowed.

    Raises:
        FileNotFoundError, ValueError: See ``sd_gym.load``.
    """
    if not isinstance(policy, SkipPolicy) and Path(policy, MANIFEST).is_file():
        if backbone or device != "cpu":
            raise ValueError(f"{policy} is exported: it has its own backbone, and runs on the CPU")
        options = _session_options(threads)
        exported = OnnxModel(Path(policy), max_loss=max_loss, max_flops=max_flops, session_options=options)
        tested = [OperatingPoint(**point) for point in exported.manifest["operating_points"]]
        points = OperatingPoints(tested, float(exported._margin), allow_loss, allow_flops)
        engine: BlockingEngine = GraphEngine(exported, points, _dialled(points, dial))
    else:
        if threads is not None:
            torch.set_num_threads(threads)
        model = load(policy, backbone, device=device, max_loss=max_loss, max_flops=max_flops)
        points = OperatingPoints(model.policy.operating_points, 0.0, allow_loss, allow_flops)
        engine = TextEngine(model, points, _dialled(points, dial))
    return Service(engine, points, limits, settings, dial)


def _session_options(threads: int | None) -> Any:
    """Options of ONNX Runtime: every graph has threads of its own, and those that wait do not spin."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("ONNX Runtime is not installed: pip install 'sd-gym[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _dialled(points: OperatingPoints, dial: Dial | None) -> Sequence[int]:
    """The points that are chosen from for requests that ask for none."""
    return [points.default] if dial is None else range(len(points.points))


def run(served: Service, host: str, port: int, on_address: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; ``on_address`` is told where. OSError if the address cannot be had."""
    with socket.create_server((host, port), backlog=2048, family=_family(host)) as listening:
        on_address(f"http://{host}:{listening.getsockname()[1]}")
        config = uvicorn.Config(
            served.app(),
            log_level="warning",
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=round(served.settings.timeout + GRACE),
        )
        _Server(config, served).run(sockets=[listening])


class _Server(uvicorn.Server):
    """Refuses requests as soon as the signal comes, not when the last connection is closed."""

    def __init__(self, config: uvicorn.Config, served: Service) -> None:
        super().__init__(config)
        self._served = served

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._served.close()
        super().handle_exit(sig, frame)


def _family(host: str) -> Any:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
