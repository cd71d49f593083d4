"""A run: its folder, training with selection, evaluation, verdict, and what it writes."""
