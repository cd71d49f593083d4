"""``python -m sd_gym.cli``, which launchers of several processes need."""

from sd_gym.cli import app

app()
