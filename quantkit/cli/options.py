"""What the verbs share: options that mean the same everywhere, the terminal, other libraries kept quiet."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

_PAGE_WIDTH = 120

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str, typer.Option(help="auto, float32, bfloat16 or float16: of the forward passes (and of the scales).")
]


def terminal() -> Console:
    """The terminal, or a wide page where the output goes to a file or a pipe."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=_PAGE_WIDTH)


def quiet() -> None:
    """Keep the libraries' own progress bars and warnings out of the display."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()


def method_name(stated: dict[str, Any]) -> str:
    """The method that the values of a recipe name, or the default one."""
    from quantkit.recipe import make_recipe

    return make_recipe(stated).method.name
