"""What `no_knobs.py` is made of: problems, the quality of x, grids of step sizes, runs without any."""
