"""``plugins check``: a component against its slot's contract."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from janus_modular.plugins import EntryPointInfo, Plugins
    from janus_modular.testing import Result


def check(
    name: Annotated[str, typer.Argument(help="A component: NAME, SLOT:NAME or DISTRIBUTION:NAME.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[A.B=C]...", help="Options of the component.")
    ] = None,
    slow: Annotated[
        bool, typer.Option("--slow", help="Run the slow checks, too: two processes, engines.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Hold a component to its slot's contract, as `janus_modular.testing` does; 1 if a check fails."""
    from janus_modular.plugins import default_plugins

    plugins = default_plugins()
    one = the_component(plugins, name)
    results = run(plugins, one, list(overrides or []), slow=slow)
    if as_json:
        rows = [vars(result) for result in results]
        typer.echo(
            json.dumps({"slot": one.slot, "name": one.name, "plugin": one.origin, "checks": rows}, indent=2)
        )
    else:
        print_results(one, results)
    if any(result.outcome == "failed" for result in results):
        raise typer.Exit(1)


def the_component(plugins: Plugins, name: str) -> EntryPointInfo:
    """Return the one component that a name means.

    Raises:
        PluginError: none is called so, or several are.
    """
    from janus_modular.errors import PluginError
    from janus_modular.suggest import did_you_mean

    found = [one for one in plugins.entry_points if one.matches(name) and plugins.is_enabled(one)]
    if len(found) == 1:
        return found[0]
    if found:
        names = [f"{one.slot}:{one.name}" for one in found]
        if len(set(names)) < len(names):
            names = [f"{one.dist}:{one.name}" for one in found]
        raise PluginError(f"'{name}' means {len(found)} components: write {' or '.join(names)}")
    known = [word for one in plugins.entry_points for word in (one.name, f"{one.slot}:{one.name}")]
    raise PluginError(
        f"no component is called '{name}'. {did_you_mean(name, known)}".rstrip()
        + "\nSee them all with: janus-modular plugins list"
    )


def run(plugins: Plugins, one: EntryPointInfo, overrides: list[str], *, slow: bool) -> list[Result]:
    """Build a component in small surroundings, and run the checks of its slot on copies of it."""
    from rich.console import Console
    from rich.progress import track

    from janus_modular.testing import Result, checks_of, run_check
    from janus_modular.testing.fixtures import context
    from janus_modular.testing.sharding import close_pair

    same = [other for other in plugins.usable(one.slot) if other.name == one.name]
    make = context(plugins, one.slot, one.name if len(same) == 1 else f"{one.dist}:{one.name}", overrides)
    results = []
    quietly = Console(stderr=True)
    try:
        for each in track(checks_of(one.slot), "Checking", console=quietly, transient=True):
            if each.slow and not slow:
                results.append(Result(each.name, "skipped", 0.0, "it is slow: run it with --slow"))
            else:
                results.append(run_check(each, make, slot=one.slot))
    finally:
        close_pair()
    return results


def print_results(one: EntryPointInfo, results: list[Result]) -> None:
    """Print a line a check, what is wrong beside it, and the sum."""
    from janus_modular.registry import slot_label

    typer.echo(f"{one.name}: {slot_label(one.slot)} of {one.origin} ({one.file or one.module})\n")
    width = max(len(result.check) for result in results)
    for result in results:
        note = " ".join(result.note.split())
        line = f"{result.check:<{width}}  {result.outcome:<8}  {result.seconds:6.2f} s  {note}"
        typer.echo(line.rstrip())
    counts = {
        word: sum(result.outcome == word for result in results) for word in ("passed", "failed", "skipped")
    }
    typer.echo("\n" + ", ".join(f"{count} {word}" for word, count in counts.items() if count))
