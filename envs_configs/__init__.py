"""One commented YAML file an env; ``sd_gym.registration`` makes each a Gymnasium id."""
