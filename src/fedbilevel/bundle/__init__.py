"""What an app consists of, wherever it runs: its modules and declared files, and the packages that it imports.

modules.py   its modules, imported under names of their own
imports.py   what a module imports, read from its text
packages.py  installed packages and their versions
bundle.py    all of it, by content and version
"""

from .bundle import Bundle, Told, bundle, checked_patterns, declared_files
from .modules import Modules
