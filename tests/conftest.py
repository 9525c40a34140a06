"""What all tests share is in `helpers.fixtures`."""

from helpers.fixtures import fedbilevel, memory_maps  # noqa: F401  fixtures
