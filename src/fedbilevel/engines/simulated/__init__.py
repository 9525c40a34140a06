"""The inside of the simulation: its programs, `fed` in them, and the books that they keep."""
