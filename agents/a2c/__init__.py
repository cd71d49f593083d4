"""Advantage actor-critic (Mnih et al. 2016), by Stable-Baselines3."""
