"""One script as several processes: `launcher.py` starts them and sees that none is left, `child.py` is what each runs in."""
