"""Limits of a server, with their defaults."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of the queue and of a group."""

    rows: int = 32  # most rows of a group
    tokens: int = 8192  # most padded tokens of a group; a longer row runs alone
    queued_rows: int = 1024
    queued_tokens: int = 131_072
    max_wait: float = 0.05  # seconds in which larger groups may overtake a row; then it is in the next group


@dataclass(frozen=True)
class RequestLimits:
    """Limits of a request."""

    timeout: float = 30.0  # seconds for an answer; also for the body to arrive
    body: int = 2**20  # bytes
    inputs: int = 64
    characters: int = 50_000  # most of an input: all are tokenised, also those that are then cut
