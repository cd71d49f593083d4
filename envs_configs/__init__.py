"""One commented YAML file per env; ``sd_gym.registration`` makes each a Gymnasium id."""
