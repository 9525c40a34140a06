"""Subcommands that another installed package brings, under the entry points `fedbilevel.commands`."""

from __future__ import annotations

import typer

from .options import Command, app

GROUP = "fedbilevel.commands"


@app.command(
    cls=Command,
    add_help_option=False,  # the command that is found has its own
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
)
def reproduce(context: typer.Context):
    """Run a study of the results page again: the grid, the seeds, tables and figures."""
    command = typer.main.get_command(_found("reproduce"))
    with command.make_context("reproduce", context.args, parent=context.parent) as own:
        command.invoke(own)


def _found(name: str) -> typer.Typer:
    """The command of that name.

    Raises:
        InputError: no installed package has it.
    """
    from importlib.metadata import entry_points

    from ..errors import check

    points = list(entry_points(group=GROUP, name=name))
    check(points, f"the studies are not installed: in a clone of fedbilevel, `pip install ./studies` brings {name}.")
    return points[0].load()
