"""What went wrong, and which setting made it: a run that blew up, an x that swings, a derivative that is not finite."""

from .sentences import LEAST, diagnose, largest, of_estimate
