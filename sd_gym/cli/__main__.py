"""``python -m sd_gym.cli``, as launchers of several processes start it."""

from sd_gym.cli import app

app()
