"""The public names, and what importing the package and asking for help do not load."""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import quantkit

HEAVY = ("torch", "triton", "transformers", "datasets", "accelerate", "huggingface_hub", "numpy", "safetensors")

# The public API. A change here is a change for users: CHANGELOG.md and README.md go with it.
PUBLIC = {
    "AWQ",
    "Rotation",
    "SmoothQuant",
    "AutoRound",
    "BlockTuning",
    "CalibrationError",
    "CalibrationSpec",
    "CheckpointError",
    "Conversion",
    "EvalSpec",
    "Evaluation",
    "GPTQ",
    "HessianError",
    "InputError",
    "InterruptedRunError",
    "Joining",
    "KernelError",
    "MixedPlan",
    "OutputError",
    "QuantEmbedding",
    "QuantLinear",
    "QuantScheme",
    "QuantizedTensor",
    "QuantkitError",
    "RTN",
    "Recipe",
    "RecipeError",
    "Result",
    "Rule",
    "SchemeError",
    "UnreadFormatError",
    "convert",
    "evaluate",
    "join_linears",
    "load",
    "parse_scheme",
    "plan_mixed",
    "quantize",
    "quantize_module",
    "replace_linears",
}


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, from another directory's point of view."""
    environment = {**os.environ, "PYTHONPATH": str(Path(quantkit.__file__).parent.parent), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, timeout=120
    )


def loaded_after(code: str, *arguments: str) -> set[str]:
    """The heavy packages that are loaded when this code, which may exit with 0, is done."""
    wrapped = (
        "import json, sys\n"
        "try:\n" + "".join(f"    {line}\n" for line in code.splitlines()) + "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        f"print('LOADED', json.dumps([m for m in {HEAVY!r} if m in sys.modules]))\n"
    )
    done = run_python(wrapped, *arguments)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.rpartition("LOADED ")[2]))


def test_all_is_the_public_api() -> None:
    assert set(quantkit.__all__) == PUBLIC
    assert len(quantkit.__all__) == len(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(quantkit, name)
    assert value.__name__ == name
    assert value.__module__.startswith("quantkit.")
    assert (inspect.getdoc(value) or "").strip()


def test_every_error_is_public() -> None:
    errors = {n for n, v in vars(import_module("quantkit.errors")).items() if inspect.isclass(v)}
    assert errors <= PUBLIC
    assert all(issubclass(getattr(quantkit, name), quantkit.QuantkitError) for name in errors)


def test_type_checkers_see_the_same_names() -> None:
    """The imports under TYPE_CHECKING name the same objects as the lazy ones."""
    tree = ast.parse(Path(quantkit.__file__).read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    found = {}
    for statement in block.body:
        assert isinstance(statement, ast.ImportFrom)
        for alias in statement.names:
            found[alias.asname or alias.name] = getattr(import_module(str(statement.module)), alias.name)
    assert found == {name: getattr(quantkit, name) for name in PUBLIC}


def test_other_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="'quantkit' has no attribute 'quantise'"):
        _ = quantkit.quantise
    assert not hasattr(quantkit, "__wrapped__")


def test_dir_lists_the_public_names() -> None:
    assert set(dir(quantkit)) >= PUBLIC


def test_star_import() -> None:
    space: dict[str, object] = {}
    exec("from quantkit import *", space)
    assert space.keys() >= PUBLIC


def test_the_package_is_typed() -> None:
    assert (Path(quantkit.__file__).parent / "py.typed").is_file()


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_after("import quantkit") == set()
    assert (
        loaded_after("import quantkit\nquantkit.QuantkitError\nquantkit.parse_scheme('w4a16')\ndir(quantkit)") == set()
    )


ENTRY = """\
from importlib.metadata import entry_points
(entry,) = entry_points(group="console_scripts", name="quantkit")
main = entry.load()
sys.argv[0] = "quantkit"
main()
"""


@pytest.mark.parametrize("arguments", [["--help"], ["quantize", "--help"], ["perplexity", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    """By the modules that are loaded, not by the clock: they are what takes the seconds."""
    assert loaded_after(ENTRY, *arguments) == set()


def test_help_names_the_commands() -> None:
    done = run_python(f"import sys\n{ENTRY}", "--help")
    assert done.returncode == 0
    assert "quantize" in done.stdout
    assert "perplexity" in done.stdout


def test_everything_but_its_kernels_works_without_triton() -> None:
    code = """\
import sys

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTriton())
import quantkit
for name in quantkit.__all__:
    getattr(quantkit, name)
import torch
layer = quantkit.QuantLinear.from_linear(torch.nn.Linear(32, 8), quantkit.parse_scheme("w4a16_g16"))
assert layer(torch.ones(2, 32)).shape == (2, 8)
assert not any(name.partition(".")[0] == "triton" for name in sys.modules)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
