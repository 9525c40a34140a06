"""Tables as rows: read from whatever holds them, agreed on between clients without pooling, turned into numbers.

What clients tell each other of their tables is written down in `wanted.py`, and said in two exchanges: `schema.py` is
the first, `moments.py` the second. `prepared.py` is what comes of them, and `prepare.py` both for tables in one process.
"""
