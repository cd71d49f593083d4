"""REINFORCE with a self-critical baseline, our own."""
