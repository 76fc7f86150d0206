"""The model card (README.md) of a quantized directory: what it is, how it was made, what it lost, how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from quantkit.checkpoint import write_bytes
from quantkit.errors import OutputError, message

CARD = "README.md"
_BEGIN, _END = "<!-- quantkit: {} -->", "<!-- quantkit: end of {} -->"
_HUB_CACHE = re.compile(r"models--(?P<organisation>[\w.-]+?)--(?P<name>[\w.-]+)")
_MAX_CARD = 2**20
# Of the source's card, what says what may be done with the model; the rest describes another file.
_KEPT = ("license", "license_name", "license_link", "language")

_FORMAT = "format"
_FORMAT_ROW = re.compile(rf"^\| {_FORMAT} \| (?P<method>[\w-]+).*\|$", re.MULTILINE)
_ONCE_INSTALLED = re.compile(r"(where no package for )([\w-]+)( is installed)")

_LOADING = """\
## Loading

DIR is this directory, or its repository.

```python
import quantkit

model = quantkit.load("DIR")  # runs quantized, on quantkit's kernels
```

```python
import quantkit  # where no package for {method} is installed, transformers runs it on quantkit's kernels
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("DIR")
```

vLLM and SGLang read the same directory: `vllm serve DIR`, `python -m sglang.launch_server --model-path DIR`.
"""


def card(report: Mapping[str, Any], recipe: str, config: Mapping[str, Any], source: Path) -> str:
    """The text of a card; it does not depend on where the output lies.

    Args:
        report: what report.json holds.
        recipe: the recipe in YAML; comments, which may hold a path of this machine, are left out.
        config: the ``quantization_config``.
        source: the model's directory; its card's licence and language are kept, and a hub's cache names the base model.
    """
    base = hub_id(source)
    stated = "\n".join(line for line in recipe.splitlines() if not line.startswith("#"))
    schemes = _counted(layer["scheme"] for layer in report["layers"])
    methods = _counted(layer["method"] for layer in report["layers"])
    front = {
        **({"base_model": base, "base_model_relation": "quantized"} if base else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["quantkit", config["quant_method"], *methods],
        **_front_of(source),
    }
    rows = {
        "base model": base or source.name,
        "schemes": _listed(schemes),
        "methods": _listed(methods),
        "quantized": f"{report['share_quantized']:.1%} of {report['num_parameters']:,} parameters",
        "bits per quantized weight": f"{report['bits_per_quantized_weight']:.3f}, scales and zero points counted",
        "bits per weight": f"{report['bits_per_weight']:.3f}, over the whole checkpoint",
        "size": f"{report['size_before'] / 1e6:,.1f} MB -> {report['size_after'] / 1e6:,.1f} MB",
        _FORMAT: str(config["quant_method"]),
        "calibration": _calibration(report["calibration"]),
        "quantkit": str(report["environment"]["versions"]["quantkit"]),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    skipped = _listed(_counted(one["reason"] for one in report["skipped"]))
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
            f"# {base or source.name}, {next(iter(schemes), 'not quantized')}\n",
            f"Quantized with quantkit. Layer by layer: `report.json`.\n\n| | |\n|---|---|\n{table}\n",
            *([f"Linear layers left as they were: {skipped}.\n"] if skipped else []),
            _LOADING.format(method=config["quant_method"]),
            "## Evaluation\n",
            _section("perplexity", "Not evaluated yet: `quantkit perplexity BASE DIR --card`."),
            f"## Recipe\n\n```yaml\n{stated.strip()}\n```\n",
        ]
    )


def is_quantkit_card(path: Path) -> bool:
    """Whether a directory's card has sections that quantkit keeps."""
    text = _read(path / CARD)
    return text is not None and _BEGIN.format("perplexity") in text


def update_card(path: Path, section: str, body: str) -> None:
    """Write a section of a directory's card anew; one that is not there yet goes behind the perplexity.

    Args:
        path: the directory.
        section: ``perplexity``, or another name.
        body: Markdown.

    Raises:
        OutputError: no card of quantkit's is there, or it cannot be written.
    """
    text = _read(path / CARD)
    if text is None or _BEGIN.format("perplexity") not in text:
        raise OutputError(
            message(str(path / CARD), "is no model card of quantkit's", "give a directory that quantkit quantize wrote")
        )
    begin, end = re.escape(_BEGIN.format(section)), re.escape(_END.format(section))
    new, found = re.subn(rf"{begin}.*?{end}\n", lambda _: _section(section, body), text, count=1, flags=re.DOTALL)
    if not found:
        after = f"{_END.format('perplexity')}\n"
        new = text.replace(after, f"{after}\n{_section(section, body)}", 1)
    write_bytes(path / CARD, new.encode())


def converted_card(source: Path, before: str, config: Mapping[str, Any]) -> str | None:
    """The card of a directory whose layers are the same in another format; None where quantkit wrote none.

    What was measured still holds, for the weights are the same.

    Args:
        source: the directory that was converted.
        before: name of its format.
        config: the new ``quantization_config``.
    """
    if not is_quantkit_card(source):
        return None
    now = str(config["quant_method"])
    front, end, rest = (_read(source / CARD) or "").partition("\n---\n")
    stated = _FORMAT_ROW.search(rest)
    if stated is not None:
        front = re.sub(rf"^- {re.escape(stated['method'])}$", f"- {now}", front, count=1, flags=re.MULTILINE)
    row = f"| {_FORMAT} | {now}, converted by `quantkit convert` (the codes are the same) from {before} |"
    rest = _FORMAT_ROW.sub(lambda _: row, rest, count=1)
    return front + end + _ONCE_INSTALLED.sub(lambda found: found[1] + now + found[3], rest, count=1)


def hub_id(path: Path) -> str | None:
    """The repository that a directory in the hub's cache is a copy of, such as ``org/name``; None for others."""
    found = next((m for part in path.absolute().parts if (m := _HUB_CACHE.fullmatch(part))), None)
    return None if found is None else f"{found['organisation']}/{found['name']}"


def _section(name: str, body: str) -> str:
    return f"{_BEGIN.format(name)}\n{body.strip()}\n{_END.format(name)}\n"


def _read(path: Path) -> str | None:
    """A card's text; None where there is none, or none that could be a card."""
    if not path.is_file() or path.stat().st_size > _MAX_CARD:
        return None
    return path.read_text(encoding="utf-8", errors="replace")


def _front_of(source: Path) -> dict[str, Any]:
    text = _read(source / CARD)
    found = re.match(r"---\n(.*?)\n---", text, re.DOTALL) if text is not None else None
    if found is None:
        return {}
    try:
        front = yaml.safe_load(found[1])
    except (yaml.YAMLError, RecursionError):
        return {}  # a stranger's card; nothing here depends on it
    return {key: front[key] for key in _KEPT if key in front} if isinstance(front, dict) else {}


def _counted(values: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{value} ({count})" for value, count in counts.items())


def _calibration(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "none"
    drawn = "" if found["seed"] is None else f", seed {found['seed']}"
    tokens = f"{found['num_samples']} samples, {found['num_tokens']:,} tokens"
    return f"{tokens} of {found['source']}{drawn}; sha256 {found['sha256'][:12]}"


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
