"""The command that serves a policy over HTTP."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from sd_gym.cli import terminal
from sd_gym.cli.terminal import Imports

if TYPE_CHECKING:
    from sd_gym.serving.app import Service

NEEDED = ("starlette", "uvicorn", "prometheus_client")


def serve(
    policy: Annotated[
        str, Argument(metavar="POLICY_OR_FOLDER", help="Run folder, saved or exported policy, or its id on the hub.")
    ],
    host: Annotated[str, Option(help="Address to listen at; 0.0.0.0: all.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port; 0: any free one.")] = 8000,
    backbone: Annotated[str | None, Option(help="Where the backbone is [default: where it was in training].")] = None,
    device: Annotated[str, Option(help="Where the backbone runs: cpu, cuda, cuda:1.")] = "cpu",
    threads: Annotated[int | None, Option(min=1, help="Threads of the model [default: all cores].")] = None,
    max_loss: Annotated[float | None, Option(help="Default: the point with fewest FLOPs at this loss (0.005).")] = None,
    max_flops: Annotated[
        float | None, Option(help="Or the most cautious one within this share of FLOPs (0.4).")
    ] = None,
    allow_loss: Annotated[
        float | None, Option(help="Highest loss that a request may ask for [default: points that passed].")
    ] = None,
    allow_flops: Annotated[float, Option(min=0, max=1, help="Largest share of FLOPs that it may ask for.")] = 1.0,
    dial: Annotated[
        Path | None,
        Option(metavar="RUN", help="Run on a serving env: its dial chooses the operating point of each group."),
    ] = None,
    batch_size: Annotated[int, Option(min=1, help="Most rows that run together.")] = 32,
    batch_tokens: Annotated[int, Option(min=1, help="Most padded tokens that run together.")] = 8192,
    queue: Annotated[int, Option(min=1, help="Most waiting rows; further requests get 429.")] = 1024,
    queue_tokens: Annotated[int, Option(min=1, help="Most waiting tokens.")] = 131_072,
    max_wait: Annotated[
        float, Option(min=0, help="Seconds for which larger groups may overtake a row; then deadlines count.")
    ] = 0.05,
    timeout: Annotated[float, Option(min=0.001, help="Seconds after which a request gets 504.")] = 30.0,
    max_body: Annotated[int, Option(min=1, help="Most bytes of a request; longer ones get 413.")] = 2**20,
    max_inputs: Annotated[int, Option(min=1, help="Most inputs of a request; longer ones get 413.")] = 64,
    imports: Imports = [],
) -> None:
    """Serve a policy over HTTP: requests that share a mask run together. Needs `pip install "sd-gym[serve]"`.

    `POST /predict` (or `/generate`, and `/v1/completions` of decoder-only models), `/readyz`, `/metrics`, and a page at
    `/`. SIGTERM answers what was accepted, then stops.

    Example: `sd-gym serve runs/reviews-8 --port 8000 --max-loss 0.005`
    """
    terminal.import_all(imports)
    with terminal.errors_as_lines():
        if lacking := [name for name in NEEDED if find_spec(name) is None]:
            raise ValueError(f"sd-gym serve needs {', '.join(lacking)}: pip install 'sd-gym[serve]'")
        with terminal.status("loading"):
            from sd_gym.serving.app import Settings
            from sd_gym.serving.batcher import Limits
            from sd_gym.serving.server import run, service

            served = service(
                policy,
                Limits(batch_size, batch_tokens, queue, queue_tokens, max_wait),
                Settings(timeout, max_body, max_inputs),
                backbone=backbone,
                device=device,
                max_loss=max_loss,
                max_flops=max_flops,
                allow_loss=allow_loss,
                allow_flops=allow_flops,
                threads=threads,
                dial=dial,
            )
        _warn_of_many_masks(served)
        run(served, host, port, lambda address: terminal.print_line(f"Serving {Path(policy).name}: {address}"))


def _warn_of_many_masks(served: Service) -> None:
    if not served.engine.groups_masks:
        terminal.say(
            "this policy has too many masks to group requests by, or decides in the pass: they run together on the "
            "switchboard; sd-gym reduce makes a policy of few masks",
            "yellow",
        )
