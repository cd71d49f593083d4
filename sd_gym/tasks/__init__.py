"""Tasks: their data, how it is encoded, and the quality of a backbone's output."""
