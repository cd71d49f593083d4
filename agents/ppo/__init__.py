"""Proximal policy optimisation (Schulman et al. 2017), by Stable-Baselines3."""
