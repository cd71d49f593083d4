"""What the agents share: their interface, run folder, logging, evaluation, model selection, pictures."""
