"""Control baselines: agents that do not learn from their observations."""
