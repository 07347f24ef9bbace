"""What a check is: a plain function that takes a component and an example, and raises where they disagree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypeVar

from janus_modular.errors import CheckError, PluginError

Function = TypeVar("Function", bound=Callable[..., None])


class NotApplicable(Exception):  # noqa: N818 (no fault of anybody's)
    """Raised by a check that has nothing to say about a component here; its message says why."""


@dataclass(frozen=True)
class Check:
    """One promise of a contract. A check may spoil the component that it is given."""

    name: str
    run: Callable[..., None]  # (component, example), and slot where it has such a parameter
    slots: tuple[str, ...]  # that promise it
    slow: bool = False  # takes more than a few seconds for a small component

    def __call__(self, component: Any, example: Any, slot: str | None = None) -> None:
        """Run the check on a component of ``slot``; that of a single slot needs not be told.

        Raises:
            PluginError: the check wants to know the slot, is for several, and none of them is given.
        """
        if "slot" not in signature(self.run).parameters:
            self.run(component, example)
            return
        slot = self.slots[0] if slot is None and len(self.slots) == 1 else slot
        if slot not in self.slots:
            raise PluginError(
                f"the check '{self.name}' needs a slot of {', '.join(self.slots)}; found {slot!r}"
            )
        self.run(component, example, slot=slot)

    @property
    def promise(self) -> str:
        """What is promised, in a sentence."""
        return (self.run.__doc__ or self.name.replace("_", " ")).strip().splitlines()[0]


REGISTERED: dict[str, Check] = {}
"""Every check of the modules that were imported so far, by name, in order of definition."""


def check_for(*slots: str, slow: bool = False) -> Callable[[Function], Function]:
    """Mark ``check_xxx(component, example)`` as the check ``xxx`` of these slots.

    Where it is for several and has to know which, it takes ``slot`` as a keyword: what a component is cannot
    be read off its methods.

    The component is one of its own: a check may change it. It passes by returning, fails by raising
    (`ensure`), and says by `NotApplicable` that it cannot tell.

    Raises:
        PluginError: another check has this name.
    """

    def mark(function: Function) -> Function:
        name = function.__name__.removeprefix("check_")
        if name in REGISTERED and REGISTERED[name].run is not function:
            raise PluginError(
                f"two checks are called '{name}': {REGISTERED[name].run.__module__} and {function.__module__}"
            )
        REGISTERED[name] = Check(name, function, slots, slow)
        return function

    return mark


def ensure(holds: bool, message: str) -> None:
    """Fail a check where something does not hold.

    Raises:
        CheckError: with ``message``, which says what was found and what the contract wants.
    """
    if not holds:
        raise CheckError(message)
