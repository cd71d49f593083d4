"""Reads runs, and compares, draws and describes them; trains nothing."""
