"""How runs are drawn: the style of all pictures, and the picture of one run."""
