"""The command line: one file a verb, put together here. Heavy imports wait until a command runs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from quantkit.cli.bench import bench
from quantkit.cli.convert import convert
from quantkit.cli.doctor import doctor
from quantkit.cli.eval import evaluate
from quantkit.cli.generate import generate
from quantkit.cli.inspect import inspect
from quantkit.cli.perplexity import perplexity
from quantkit.cli.plan import plan
from quantkit.cli.quantize import quantize
from quantkit.cli.tune import tune
from quantkit.cli.verify import verify
from quantkit.errors import QuantkitError
from quantkit.heap import use_huge_pages

EXIT_BAD_INPUT = 2

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Make a causal language model small and fast without retraining. "
    "Start with: quantkit quantize builtin --output out",
)
for _verb in (quantize, perplexity, plan, inspect, verify, convert, generate, bench, doctor, tune):
    app.command()(_verb)
app.command("eval")(evaluate)


def main() -> None:
    """Run the command line; an error that quantkit raises on purpose is one line and exit code 2."""
    use_huge_pages()
    try:
        app()
    except QuantkitError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_BAD_INPUT)


def _print_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"quantkit {version('quantkit')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make a causal language model small and fast without retraining."""
