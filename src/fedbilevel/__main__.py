"""`python -m fedbilevel`."""

from .cli import main

main()
