"""A policy as an HTTP service: requests with the same mask run together."""
