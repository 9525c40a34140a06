"""The version of the library, also in `pyproject.toml`."""

__version__ = "0.1.0"
