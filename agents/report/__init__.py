"""Runs beside each other: comparison, fronts, savings, pictures."""
