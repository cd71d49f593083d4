"""Dials: what chooses the operating point of a server. Learned by PPO and A2C, and their controls."""
