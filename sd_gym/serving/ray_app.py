"""The service on Ray Serve, whose replicas, autoscaling and draining are Ray's.

    serve run sd_gym.serving.ray_app:app policy=/models/reviews-8 threads=4

Each replica has a batcher of its own. Ray Serve's options (``num_replicas``, ``autoscaling_config``) go into its YAML
file, where the arguments are ``args``.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict

from sd_gym.serving.app import Settings
from sd_gym.serving.batcher import Limits
from sd_gym.serving.server import service


class Arguments(BaseModel):
    """What ``serve run`` takes, as ``key=value``; see ``sd_gym.serving.server.service`` and ``sd-gym serve``.

    All machines of the cluster must see ``policy`` and ``backbone``. Ray reserves ``threads`` cores for a replica.
    """

    model_config = ConfigDict(extra="forbid")

    policy: str
    backbone: str | None = None
    max_loss: float | None = None
    max_flops: float | None = None
    threads: int = 1
    batch_size: int = 32
    queue: int = 1024
    timeout: float = 30.0


def app(arguments: Arguments) -> Any:
    """The application of Ray Serve; errors are those of ``service``, raised in the replica.

    Raises:
        ModuleNotFoundError: If Ray Serve is not installed: ``pip install 'sd-gym[ray]'``.
    """
    from ray import serve  # pyright: ignore[reportMissingImports]  (an extra)

    def build() -> Any:
        chosen = arguments.model_dump(include={"backbone", "max_loss", "max_flops", "threads"})
        limits = Limits(rows=arguments.batch_size, queued_rows=arguments.queue)
        served = service(arguments.policy, limits, Settings(timeout=arguments.timeout), **chosen)
        served.starts_warm = True  # Ray sends no requests before, and replaces a replica that fails
        return served.app()

    options = {"num_cpus": arguments.threads}
    deployment = serve.deployment(ray_actor_options=options, max_ongoing_requests=arguments.queue)
    return deployment(serve.ingress(build)(_Replica)).bind()


class _Replica:
    """The ASGI app does all its work."""

    app: Any  # Ray's

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        self.app.state.service.check()
