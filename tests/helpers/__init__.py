"""What tests share: problems with closed forms, apps as files, runs of the command, recorded runs."""

from . import checks
