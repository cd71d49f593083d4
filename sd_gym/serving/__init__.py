"""A policy behind HTTP: requests that agree run together."""
