"""The subcommand `doctor`."""

from __future__ import annotations

import json

import typer

from .options import Json, app


@app.command()
def doctor(as_json: Json = False):
    """Say what is installed, and test it against closed forms in ten seconds: for bug reports."""
    from rich.console import Console
    from rich.text import Text

    from ..doctor import facts, tests

    told = facts()
    if as_json:
        done = list(tests())
        whole = {"facts": [each._asdict() for each in told], "tests": [each._asdict() for each in done]}
        print(json.dumps(whole, indent=2))
        raise typer.Exit(0 if all(each.passed for each in done) else 1)
    console, section = Console(highlight=False), ""
    wide = max(len(each.name) for each in told)
    for each in told:
        if each.section != section:
            console.print(Text(each.section, style="bold"))
            section = each.section
        console.print(Text(f"  {each.name:<{wide}}  {each.value}"), soft_wrap=True)
    console.print(Text("test", style="bold"))
    failed = 0
    with console.status("compiling, about five seconds"):
        for test in tests():
            failed += not test.passed
            word, style = ("passed", "green") if test.passed else ("FAILED", "bold red")
            line = Text.assemble("  ", (word, style), f"  {test.name}: {test.seen} ({test.seconds:.1f} s)")
            console.print(line, soft_wrap=True)
    if failed:
        console.print("Something is wrong with this installation: send all of the above with your report.")
    raise typer.Exit(1 if failed else 0)
