"""Checks of recipe options that several methods share."""

from __future__ import annotations

from quantkit.errors import RecipeError, message


def check_integer(where: str, name: str, value: object, smallest: int, usual: str) -> None:
    """An integer of at least ``smallest``.

    Raises:
        RecipeError: with the option's name and what is usual.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise RecipeError(message(where, f"{name}={value!r} is not an integer", f"usually {usual}"))
    if value < smallest:
        raise RecipeError(
            message(where, f"{name}={value} is out of range", f"choose at least {smallest}, usually {usual}")
        )


def check_fraction(where: str, name: str, value: object, largest: float, usual: str) -> None:
    """A number above 0 and at most ``largest``.

    Raises:
        RecipeError: with the option's name and what is usual.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecipeError(message(where, f"{name}={value!r} is not a number", f"usually {usual}"))
    if not 0 < value <= largest:
        raise RecipeError(
            message(where, f"{name}={value} is out of range", f"choose above 0, at most {largest}, usually {usual}")
        )


def check_flag(where: str, name: str, value: object) -> None:
    """A truth value.

    Raises:
        RecipeError: with the option's name.
    """
    if not isinstance(value, bool):
        raise RecipeError(message(where, f"{name}={value!r} is not a truth value", "choose true or false"))
