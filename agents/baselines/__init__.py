"""Controls: agents that do not look at their input."""
