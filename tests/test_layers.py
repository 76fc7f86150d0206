"""Imports point down, heavy packages are imported late, and what can run a stranger's code is not used at all.

The checks read the syntax trees of the package; each is also shown to catch a planted violation.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import quantkit

PACKAGE = Path(quantkit.__file__).parent

# A module imports only from tiers above its own line; neighbours never import each other. The files of a
# subpackage (solvers, formats, kernels) are one entry, and may import each other.
TIERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    (
        "scheme",
        "arch",
        "allocate",
        "builtin_text",
        "digest",
        "documents",
        "heap",
        "experts",
        "findings",
        "outliers",
        "patterns",
        "precision",
        "quiet",
        "strict_json",
    ),
    ("qtensor", "stats", "structure", "text", "safetensors_header", "loaders"),
    ("grid", "packing", "calibration"),
    ("solvers", "transforms", "formats", "kernels"),
    ("attention",),
    (
        "linear",
        "embedding",
        "checkpoint",
        "source",
        "report",
        "activations",
        "perplexity",
        "static_activations",
        "generation",
        "doctor",
    ),
    ("replacing", "joining", "rounded_head", "card", "hub", "rolling"),
    ("tuned_weights",),
    ("tuning",),
    ("recipe", "model_config", "staging", "disk_names"),
    ("skeleton",),
    ("stored", "sharding", "config_names", "model_facts"),
    ("contents",),
    ("capture", "layer_plan", "transformers"),
    ("plan", "loader", "chosen_embeddings"),
    ("solving", "planning", "opening", "units", "watching"),
    ("modules",),
    ("head", "routing", "transforming", "measuring_room", "block_tuning"),
    ("streams", "sensitivity"),
    ("measuring",),
    ("input_outliers",),
    ("inspection",),
    ("plots",),
    ("pipeline", "verify", "evaluation"),
    ("run", "converting", "progress", "document_evaluation"),
    ("mixed", "bench", "harness"),
    ("cli",),
    ("__init__", "__main__"),
)
RANK = {name: rank for rank, tier in enumerate(TIERS) for name in tier}

# Seconds to import, or a network behind them; none is needed to import quantkit's modules.
LATE = {"transformers", "datasets", "huggingface_hub", "accelerate", "peft", "lm_eval"}
# Files that extend a package's classes, and that others import only inside of functions.
EXTENDING = {
    "transformers/registry.py": {"transformers"},
    "transformers/quantizer.py": {"transformers"},
    "transformers/adapters.py": {"peft"},
}
# Reading with these can run code that a file holds.
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"}
# The user's own random state is not touched; quantkit's generators are local.
GLOBAL_SEEDS = {
    "torch.manual_seed",
    "torch.seed",
    "torch.random.manual_seed",
    "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all",
    "random.seed",
    "np.random.seed",
    "numpy.random.seed",
    "set_seed",
    "transformers.set_seed",
}

Sources = dict[str, str]  # path relative to the package -> text


@dataclass(frozen=True)
class Import:
    """One imported module: ``name`` is dotted, ``top`` outside of functions, ``typing`` under TYPE_CHECKING."""

    name: str
    line: int
    top: bool
    typing: bool


def package_sources() -> Sources:
    return {str(p.relative_to(PACKAGE)): p.read_text(encoding="utf-8") for p in sorted(PACKAGE.rglob("*.py"))}


def imports(node: ast.AST, top: bool = True, typing: bool = False) -> Iterator[Import]:
    """Every import statement, and import_module or __import__ of a literal name."""
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, node.lineno, top, typing) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        prefix = "." * node.level + (node.module or "")
        yield from (Import(f"{prefix}.{alias.name}", node.lineno, top, typing) for alias in node.names)
    elif isinstance(node, ast.Call) and dotted(node.func).rpartition(".")[2] in ("import_module", "__import__"):
        if node.args and isinstance(node.args[0], ast.Constant):
            yield Import(str(node.args[0].value), node.lineno, top, typing)
    elif isinstance(node, ast.If) and dotted(node.test).rpartition(".")[2] == "TYPE_CHECKING":
        for statement in node.body:
            yield from imports(statement, top, typing=True)
        for statement in node.orelse:
            yield from imports(statement, top, typing)
        return
    inner = top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from imports(child, inner, typing)


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of a name or attribute; empty for any other expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def unit(path: str) -> str:
    """The entry of TIERS that a file belongs to."""
    first = Path(path).parts[0]
    return first.removesuffix(".py")


def wrong_directions(sources: Sources) -> list[str]:
    """Imports of quantkit's own modules that do not point down."""
    units = {unit(path) for path in sources}
    found = []
    for path, text in sources.items():
        for imported in imports(ast.parse(text)):
            where = f"{path}:{imported.line}"
            if imported.name.startswith("."):
                found.append(f"{where}: relative import")
                continue
            root, _, rest = imported.name.partition(".")
            if root != "quantkit":
                continue
            target = rest.partition(".")[0]
            target = target if target in units else "__init__"
            own = unit(path)
            if target != own and not RANK[target] < RANK[own]:
                found.append(f"{where}: {own} imports {target}")
    return found


def misplaced_imports(sources: Sources) -> list[str]:
    """triton outside of the Triton kernels; heavy packages at module level."""
    found = []
    for path, text in sources.items():
        for imported in imports(ast.parse(text)):
            package = imported.name.partition(".")[0]
            if package == "triton" and not Path(path).match("kernels/triton_*.py"):
                found.append(f"{path}:{imported.line}: triton outside of kernels/triton_*")
            extended = package in EXTENDING.get(path, ())
            if package in LATE and imported.top and not imported.typing and not extended:
                found.append(f"{path}:{imported.line}: {package} at module level")
    return found


def unsafe_uses(sources: Sources) -> list[str]:
    """Pickles, remote code, code in data, and the global random state."""
    found = []
    for path, text in sources.items():
        tree = ast.parse(text)
        for imported in imports(tree):
            if imported.name.partition(".")[0] in UNSAFE_MODULES or imported.name in UNSAFE_CALLS | GLOBAL_SEEDS:
                found.append(f"{path}:{imported.line}: {imported.name}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Name | ast.Attribute) and dotted(node) in UNSAFE_CALLS | GLOBAL_SEEDS:
                found.append(f"{path}:{node.lineno}: {dotted(node)}")
            if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
                off = isinstance(node.value, ast.Constant) and node.value.value is False
                found += [] if off else [f"{path}:{node.value.lineno}: {node.arg} is not False"]
            if isinstance(node, ast.Constant) and node.value == "trust_remote_code":
                found.append(f"{path}:{node.lineno}: trust_remote_code in a mapping of options")
    return found


def test_every_module_stands_in_the_tiers_once() -> None:
    listed = [name for tier in TIERS for name in tier]
    assert sorted(listed) == sorted({unit(path) for path in package_sources()})


def test_imports_point_down() -> None:
    assert wrong_directions(package_sources()) == []


def test_heavy_packages_are_imported_late_and_triton_in_its_kernels() -> None:
    assert misplaced_imports(package_sources()) == []


def test_nothing_can_run_a_strangers_code_or_seed_the_users_generators() -> None:
    assert unsafe_uses(package_sources()) == []


def planted(path: str, text: str) -> Sources:
    """A package of the same files, all of them empty but this one."""
    return {**dict.fromkeys(package_sources(), ""), path: text}


@pytest.mark.parametrize(
    ("path", "text", "said"),
    [
        ("errors.py", "from quantkit.scheme import QuantScheme", "errors imports scheme"),
        ("grid.py", "from quantkit.packing import pack", "grid imports packing"),
        ("grid.py", "def f():\n    from quantkit.solvers import RTN", "grid imports solvers"),
        ("grid.py", "import quantkit.run as r", "grid imports run"),
        ("grid.py", "from quantkit import run", "grid imports run"),
        ("grid.py", "from quantkit import quantize", "grid imports __init__"),
        ("grid.py", "import quantkit", "grid imports __init__"),
        ("grid.py", "from . import packing", "relative import"),
        ("grid.py", "from importlib import import_module\nimport_module('quantkit.cli')", "grid imports cli"),
        (
            "grid.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from quantkit.linear import QuantLinear",
            "grid imports linear",
        ),
        ("solvers/gptq.py", "from quantkit.formats import FORMATS", "solvers imports formats"),
        ("kernels/triton_gemv.py", "from quantkit.linear import QuantLinear", "kernels imports linear"),
        ("plan.py", "class A:\n    from quantkit.loader import load", "plan imports loader"),
    ],
)
def test_a_planted_import_that_points_up_is_caught(path: str, text: str, said: str) -> None:
    (found,) = wrong_directions(planted(path, text))
    assert found.startswith(f"{path}:")
    assert said in found


def test_imports_within_a_subpackage_and_downwards_are_allowed() -> None:
    text = "from quantkit.solvers.rtn import RTN\nfrom quantkit import errors\nimport quantkit.grid"
    assert wrong_directions(planted("solvers/gptq.py", text)) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("linear.py", "import triton"),
        ("linear.py", "def f():\n    import triton.language as tl"),
        ("kernels/cpu.py", "from triton import jit"),
        ("source.py", "import transformers"),
        ("source.py", "from huggingface_hub import snapshot_download"),
        ("text.py", "class A:\n    import datasets"),
        ("skeleton.py", "try:\n    from accelerate import init_empty_weights\nexcept ImportError:\n    pass"),
        ("skeleton.py", "if True:\n    import transformers.modeling_utils"),
        ("transformers/__init__.py", "import transformers"),
        ("transformers/quantizer.py", "import accelerate"),
        ("skeleton.py", "import typing\nif typing.TYPE_CHECKING:\n    pass\nelse:\n    import transformers"),
    ],
)
def test_a_planted_import_in_the_wrong_place_is_caught(path: str, text: str) -> None:
    assert len(misplaced_imports(planted(path, text))) == 1


def test_nothing_imports_the_extending_files_at_module_level() -> None:
    """But each other: else their packages would be loaded with quantkit."""
    modules = {"quantkit." + path.removesuffix(".py").replace("/", ".") for path in EXTENDING}
    for path, text in package_sources().items():
        for imported in imports(ast.parse(text)):
            if imported.top and not imported.typing and path not in EXTENDING:
                assert not any(imported.name.startswith(f"{module}.") for module in modules), path


def test_late_and_typing_imports_are_allowed() -> None:
    text = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from transformers import PreTrainedModel\n"
        "def f():\n    import datasets\n    import transformers\n"
    )
    assert misplaced_imports(planted("source.py", text)) == []
    assert misplaced_imports(planted("kernels/triton_gemv.py", "import triton\nimport triton.language as tl")) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "def f():\n    from cloudpickle import loads",
        "import torch\nx = torch.load('x', weights_only=True)",
        "import torch\nread = torch.load",
        "from torch import load",
        "f(trust_remote_code=True)",
        "def f(x):\n    g(trust_remote_code=x)",
        "options = {'trust_remote_code': True}",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import yaml\nyaml.load('x', yaml.Loader)",
        "eval('1')",
        "import torch\ntorch.manual_seed(0)",
        "import random\nrandom.seed(0)",
        "def f():\n    from transformers import set_seed",
    ],
)
def test_a_planted_unsafe_use_is_caught(text: str) -> None:
    assert len(unsafe_uses(planted("source.py", text))) == 1


def test_local_generators_and_refusals_are_allowed() -> None:
    text = (
        "import torch, random\ng = torch.Generator().manual_seed(0)\nr = random.Random(0)\n"
        "model.eval()\nf(trust_remote_code=False)\n"
    )
    assert unsafe_uses(planted("source.py", text)) == []
