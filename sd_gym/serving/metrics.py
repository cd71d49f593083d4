"""Metrics under the names of text-embeddings-inference, and metrics of skipping."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from sd_gym.serving.batcher import Group

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = tuple(2**power for power in range(3, 15))
SHARES = tuple(number / 10 for number in range(1, 12))


class Metrics:
    """The metrics of one server; ``queued`` returns the number of waiting rows."""

    def __init__(self, queued: Callable[[], int]) -> None:
        self.registry = registry = CollectorRegistry()

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, what, registry=registry, buckets=buckets)

        self._requests = Counter("te_request_count", "Requests", ["method"], registry=registry)
        self._success = Counter("te_request_success", "Requests that were answered", ["method"], registry=registry)
        self._failure = Counter("te_request_failure", "Requests that failed", ["err"], registry=registry)
        self._duration = histogram("te_request_duration", "Seconds of a request", SECONDS)
        self._queued = histogram("te_request_queue_duration", "Seconds from arrival to start", SECONDS)
        self._inference = histogram("te_request_inference_duration", "Seconds of a group", SECONDS)
        self._length = histogram("te_request_input_length", "Tokens of an input", TOKENS)
        self._size = histogram("te_batch_next_size", "Rows of a group", ROWS)
        self._tokens = histogram("te_batch_next_tokens", "Padded tokens of a group", TOKENS)
        Gauge("te_queue_size", "Waiting rows", registry=registry).set_function(queued)
        self._ratio = histogram("sd_gym_flops_ratio", "FLOPs of an answer over dense FLOPs", SHARES)
        self._point = Gauge(
            "sd_gym_operating_point", "Index of the operating point that the dial chose last", registry=registry
        )
        self._flops = Counter(
            "sd_gym_flops",
            "FLOPs: promised (of each row alone), executed (with padding), dense (of each row alone)",
            ["what"],
            registry=registry,
        )

    def request(self, method: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(method).inc()
        if status < 400:
            self._success.labels(method).inc()
            self._duration.observe(seconds)
        else:
            self._failure.labels(str(status)).inc()

    def group(self, group: Group) -> None:
        """Count a group of rows that ran together."""
        lengths = [row.length for row in group.rows]
        self._size.observe(len(lengths))
        self._tokens.observe(len(lengths) * max(lengths))
        self._inference.observe(group.seconds)
        self._point.set(group.point)
        for length, wait in zip(lengths, group.waits, strict=True):
            self._length.observe(length)
            self._queued.observe(wait)
        answered = [served for served in group.answers if not isinstance(served, Exception)]
        for served in answered:
            self._ratio.observe(served.answer.flops_ratio)
        for what in ("promised", "executed", "dense"):
            self._flops.labels(what).inc(sum(getattr(served, what) for served in answered))
