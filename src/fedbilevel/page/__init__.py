"""A results folder as one page of HTML: `write` makes it.

found.py reads the folder, whole.py puts the page together. Each part of the page has a file: head.py, ended.py, warned.py,
curves.py, exchanges.py (the protocol), clients.py with held.py (what each client holds), networks.py (what it would cost).
markup.py holds what they are written with: escaping, tables, the style; axes.py scales and ticks.
"""

from .whole import write
