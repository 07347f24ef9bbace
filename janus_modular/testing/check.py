"""Checks: functions of a component and an example that raise an error where a contract is broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypeVar

from janus_modular.errors import CheckError, PluginError

Function = TypeVar("Function", bound=Callable[..., None])


class NotApplicable(Exception):  # noqa: N818 (not an error)
    """Raised by a check that does not apply to a component; the message is the reason."""


@dataclass(frozen=True)
class Check:
    """A check of a contract. It may change the component that it runs on."""

    name: str
    run: Callable[..., None]  # (component, example), and optionally the keyword slot
    slots: tuple[str, ...]  # whose contracts contain it
    slow: bool = False  # takes more than a few seconds for a small component

    def __call__(self, component: Any, example: Any, slot: str | None = None) -> None:
        """Run the check on a component of ``slot``; None: of the check's only slot.

        Raises:
            PluginError: the check needs the slot, and ``slot`` is not one of its slots.
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
        """What the contract promises, in a sentence."""
        return (self.run.__doc__ or self.name.replace("_", " ")).strip().splitlines()[0]


REGISTERED: dict[str, Check] = {}
"""The checks of all modules that were imported so far, by name, in order of definition."""


def check_for(*slots: str, slow: bool = False) -> Callable[[Function], Function]:
    """Register ``check_xxx(component, example)`` as the check ``xxx`` of these slots.

    A check of several slots may take the component's slot as the keyword ``slot``.

    The check runs on a component of its own, which it may change. It passes if it returns, fails if it raises
    (`ensure`), and is skipped if it raises `NotApplicable`.

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
    """Raise an error unless ``holds``.

    Raises:
        CheckError: with ``message``: what was found, and what the contract expects.
    """
    if not holds:
        raise CheckError(message)
