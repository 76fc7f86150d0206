"""What the verbs share: options that mean the same everywhere, the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.quiet import quiet as quiet

if TYPE_CHECKING:
    from rich.console import Console

_PAGE_WIDTH = 120

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str, typer.Option(help="auto, float32, bfloat16 or float16: of the forward passes (and of the scales).")
]
HeadBits = Annotated[
    int | None,
    typer.Option(help="Round the output head to so many bits (8 is nearly lossless), unless it is quantized already."),
]


def terminal() -> Console:
    """The terminal, or a wide page where the output goes to a file or a pipe."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=_PAGE_WIDTH)


def method_name(stated: dict[str, Any]) -> str:
    """The method that the values of a recipe name, or the default one."""
    from quantkit.recipe import make_recipe

    return make_recipe(stated).method.name
