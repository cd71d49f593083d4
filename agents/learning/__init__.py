"""The agents' interface, and what those of Stable-Baselines3 share."""
