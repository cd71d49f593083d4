"""Imitation of searched decisions."""
