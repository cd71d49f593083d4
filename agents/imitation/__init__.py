"""Imitation of decisions that a search found."""
