"""The command ``plugins check``: a component against the contract of its slot."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from janus_modular.errors import PluginError
    from janus_modular.plugins import EntryPointInfo, Plugins
    from janus_modular.testing import Result


def check(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A component: NAME, SLOT:NAME or DISTRIBUTION:NAME; or a distribution: all its components.",
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[A.B=C]...", help="Options of the component.")
    ] = None,
    slow: Annotated[
        bool, typer.Option("--slow", help="Also run the slow checks (several processes, engines).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check components against their slot's contract, with `janus_modular.testing`; exit code 1 on failure.

    Example: janus-modular plugins check adaptors:mlp depth=3
    """
    from janus_modular.errors import JanusError, PluginError
    from janus_modular.plugins import default_plugins
    from janus_modular.testing.fixtures import EXAMPLES

    plugins = default_plugins()
    components, options = find_components(plugins, name), list(overrides or [])
    if options and len(components) > 1:
        raise PluginError(
            f"found the option {options[0]} for '{name}', a distribution of {len(components)} components;"
            f" expected one component: write {' or '.join(f'{item.slot}:{item.name}' for item in components)}"
        )
    reports, errors = list[dict[str, Any]](), list[str]()
    for component in components:
        try:
            results = run(plugins, component, options, slow=slow)
        except JanusError as error:
            if len(components) == 1:
                raise
            results, text = [], f"{component.slot}:{component.name}: {error}"
            if component.slot in EXAMPLES:
                errors.append(text)
            else:
                typer.echo(f"not checked: {text}", err=True)
        rows = [vars(result) for result in results]
        reports.append(
            {"slot": component.slot, "name": component.name, "plugin": component.origin, "checks": rows}
        )
        if results and not as_json:
            print_results(component, results)
    if as_json:
        typer.echo(json.dumps(reports if len(reports) > 1 else reports[0], indent=2))
    if errors:
        raise PluginError("not checked:\n" + "\n".join(errors))
    if any(row["outcome"] == "failed" for report in reports for row in report["checks"]):
        raise typer.Exit(1)


def find_components(plugins: Plugins, name: str) -> list[EntryPointInfo]:
    """Return the components of a distribution, or the only component of a name.

    A distribution has priority over a component of the same name, which ``SLOT:NAME`` means.

    Raises:
        PluginError: no enabled component has the name, or several have it.
    """
    from janus_modular.errors import PluginError

    enabled = [item for item in plugins.entry_points if plugins.is_enabled(item)]
    if of_distribution := [item for item in enabled if item.dist == name]:
        return of_distribution
    matches = [item for item in enabled if item.matches(name)]
    if len(matches) == 1:
        return matches
    if matches:
        names = [f"{item.slot}:{item.name}" for item in matches]
        if len(set(names)) < len(names):
            names = [f"{item.dist}:{item.name}" for item in matches]
        raise PluginError(f"'{name}' means {len(matches)} components: write {' or '.join(names)}")
    raise unknown_component(plugins, name)


def unknown_component(plugins: Plugins, name: str) -> PluginError:
    """Return the error about a name that no component and no distribution has."""
    from janus_modular.errors import PluginError
    from janus_modular.suggest import did_you_mean

    if name.endswith(".py"):
        hint = f"A file is loaded by --plugin {name}, beside the NAME of a component in it."
    else:
        words = ((item.name, f"{item.slot}:{item.name}", item.dist) for item in plugins.entry_points)
        hint = did_you_mean(name, [word for group in words for word in group])
    return PluginError(
        f"no component is called '{name}'. {hint}".rstrip()
        + "\nSee them all with: janus-modular plugins list"
    )


def run(plugins: Plugins, component: EntryPointInfo, overrides: list[str], *, slow: bool) -> list[Result]:
    """Build a component with small neighbours, and run the checks of its slot on copies of it."""
    from rich.console import Console
    from rich.progress import track

    from janus_modular.testing import Result, checks_of, run_check
    from janus_modular.testing.fixtures import context
    from janus_modular.testing.sharding import close_pair

    same_name = [item for item in plugins.usable(component.slot) if item.name == component.name]
    make = context(
        plugins,
        component.slot,
        component.name if len(same_name) == 1 else f"{component.dist}:{component.name}",
        overrides,
    )
    results = []
    console = Console(stderr=True)
    try:
        for slot_check in track(checks_of(component.slot), "Checking", console=console, transient=True):
            if slot_check.slow and not slow:
                results.append(Result(slot_check.name, "skipped", 0.0, "it is slow: run it with --slow"))
            else:
                results.append(run_check(slot_check, make, slot=component.slot))
    finally:
        close_pair()
    return results


def print_results(component: EntryPointInfo, results: list[Result]) -> None:
    """Print a line for each check, with the error if it failed, and the totals."""
    from janus_modular.registry import slot_label

    location = component.file or component.module
    typer.echo(f"{component.name}: {slot_label(component.slot)} of {component.origin} ({location})\n")
    longest = max(len(result.check) for result in results)
    for result in results:
        note = " ".join(result.note.split())
        line = f"{result.check:<{longest}}  {result.outcome:<8}  {result.seconds:6.2f} s  {note}"
        typer.echo(line.rstrip())
    counts = {
        word: sum(result.outcome == word for result in results) for word in ("passed", "failed", "skipped")
    }
    typer.echo("\n" + ", ".join(f"{count} {word}" for word, count in counts.items() if count))
