"""A run as data: its folder, its result, whether the quality is kept, and statistics over runs."""
