"""What all tests share is in `helpers.fixtures`."""

from helpers.installed import only_what_is_installed

only_what_is_installed("torch")  # before anything imports it

from helpers.fixtures import fedbilevel, memory_maps  # noqa: E402, F401  fixtures
