"""Rows under decisions: passes cut by decision and length, what they cost, and what the answers are worth."""
