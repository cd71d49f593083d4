"""The service on Ray Serve, whose replicas, autoscaling and draining are Ray's.

    serve run sd_gym.serving.ray_app:app policy=/models/reviews-8 threads=4

Each replica has a batcher of its own. Ray Serve's options go into its YAML file, for ``serve run FILE``:

    applications:
      - import_path: sd_gym.serving.ray_app:app
        args: {policy: /models/reviews-8, threads: 4}
        deployments:
          - name: sd_gym
            autoscaling_config: {min_replicas: 1, max_replicas: 4}
"""

from typing import Any

from pydantic import BaseModel, ConfigDict

from sd_gym.serving.limits import Limits, RequestLimits
from sd_gym.serving.server import service, timeout_of


class Arguments(BaseModel):
    """What ``serve run`` takes, as ``key=value``; see ``sd_gym.serving.server.service`` and ``sd-gym serve``.

    All machines of the cluster must see ``policy``, ``backbone`` and ``dial``. Ray reserves ``threads`` cores for a
    replica.
    """

    model_config = ConfigDict(extra="forbid")

    policy: str
    backbone: str | None = None
    device: str = "cpu"
    max_loss: float | None = None
    max_flops: float | None = None
    allow_loss: float | None = None
    allow_flops: float = 1.0
    dial: str | None = None
    threads: int = 1
    batch_size: int = Limits.rows
    queue: int = Limits.queued_rows
    max_wait: float = Limits.max_wait
    timeout: float | None = None


def app(arguments: Arguments) -> Any:
    """The application of Ray Serve; errors are those of ``service``, raised in the replica.

    Raises:
        ModuleNotFoundError: If Ray Serve is not installed: ``pip install 'sd-gym[ray]'``.
    """
    from ray import serve  # pyright: ignore[reportMissingImports]  (an extra)

    def build() -> Any:
        chosen = arguments.model_dump(exclude={"policy", "batch_size", "queue", "max_wait", "timeout"})
        limits = Limits(rows=arguments.batch_size, queued_rows=arguments.queue, max_wait=arguments.max_wait)
        settings = RequestLimits(timeout_of(arguments.timeout, arguments.dial))
        served = service(arguments.policy, limits, settings, **chosen)
        served.starts_warm = True  # Ray sends no requests before, and replaces a replica that fails
        return served.app()

    options = {"num_cpus": arguments.threads}
    deployment = serve.deployment(name="sd_gym", ray_actor_options=options, max_ongoing_requests=arguments.queue)
    return deployment(serve.ingress(build)(_Replica)).bind()


class _Replica:
    """The ASGI app does all its work."""

    app: Any  # Ray's

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        self.app.state.service.check()
