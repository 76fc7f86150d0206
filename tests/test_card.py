"""The model card: what quantize writes, what an evaluation puts into it, and what is kept of the source's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor
from typer.testing import CliRunner

import quantkit
from quantkit.card import hub_id, is_quantkit_card, update_card
from quantkit.cli import app


def front_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((path / "README.md").read_text().split("---\n")[1])
    return found


@pytest.fixture
def source(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """As the hub's cache has it, with a card of its own."""
    path = tmp_path / "models--some-org--tiny.model" / "snapshots" / ("0" * 40)
    path.mkdir(parents=True)
    for file in tiny("llama").iterdir():
        shutil.copyfile(file, path / file.name)
    (path / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\ntags: [x]\n---\n# The original\n")
    return path


def test_what_a_run_writes(source: Path, tokens: list[Tensor], tmp_path: Path) -> None:
    rules = [{"match": "*.down_proj", "scheme": "w8a16_g32", "method": "rtn"}]
    recipe = {"scheme": "w4a16_g32", "rules": rules}
    quantkit.quantize(source, tmp_path / "out", recipe=recipe, tokens=tokens)
    text = (tmp_path / "out" / "README.md").read_text()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert front_of(tmp_path / "out") == {
        "base_model": "some-org/tiny.model",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["quantkit", "compressed-tensors", "gptq", "rtn"],
        "license": "apache-2.0",
        "language": ["en"],
    }
    assert "| schemes | w4a16_g32_sym (18), w8a16_g32_sym (3) |" in text
    assert "| methods | gptq (18), rtn (3) |" in text
    assert f"| bits per weight | {report['bits_per_weight']:.3f}, over the whole checkpoint |" in text
    assert f"6 samples, 201 tokens of {report['calibration']['source']}" in text
    assert "outside of the blocks (1)" in text
    assert 'quantkit.load("DIR")' in text
    assert "vllm serve DIR" in text
    assert "Not evaluated yet" in text
    assert "# some-org/tiny.model, w4a16_g32_sym\n" in text
    assert "The original" not in text
    assert str(tmp_path) not in text  # a card is for others
    stated = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert stated == yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())


def test_perplexity_is_written_where_it_is_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantkit.quantize("builtin", out, recipe={"scheme": "w4a16_g64", "method": "rtn"})
    before = (out / "README.md").read_text()
    arguments = ["perplexity", "builtin", str(out), "--sequence-length", "64", "--limit", "2"]
    arguments += ["--json", str(tmp_path / "found.json")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert (out / "README.md").read_text() == before
    for _ in range(2):
        done = CliRunner().invoke(app, [*arguments, "--card"])
        assert done.exit_code == 0, done.output
    assert f"written to {out / 'README.md'}" in done.output.replace("\n", "")
    text = (out / "README.md").read_text()
    first, second = json.loads((tmp_path / "found.json").read_text())["results"]
    assert f"| builtin | {first['perplexity']:.3f} |  |  |" in text
    assert f"{second['perplexity']:.3f} | {second['kl']:.5f} | {second['top1_changed']:.2%} |" in text
    assert "126 tokens of builtin" in text
    assert "Not evaluated yet" not in text
    assert text.count("KL divergence") == 1
    head, tail = before.split("Not evaluated yet")
    assert text.startswith(head)
    assert text.endswith(tail.split("\n", 1)[1])


def test_other_sections_go_behind_the_perplexity(tmp_path: Path) -> None:
    quantkit.quantize("builtin", tmp_path / "out", recipe={"scheme": "w8a16", "method": "rtn"})
    update_card(tmp_path / "out", "lm_eval", r"one \1")
    update_card(tmp_path / "out", "lm_eval", r"two \g<0>")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "one" not in text.split("Not evaluated yet")[1].split("## Recipe")[0]
    assert text.index("Not evaluated") < text.index(r"two \g<0>") < text.index("## Recipe")


@pytest.mark.parametrize("text", [None, "# Somebody's own\n"])
def test_a_card_of_somebody_else_is_not_touched(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert not is_quantkit_card(tmp_path)
    with pytest.raises(quantkit.OutputError, match="no model card of quantkit's"):
        update_card(tmp_path, "perplexity", "x")
    assert text is None or (tmp_path / "README.md").read_text() == text


@pytest.mark.parametrize(
    "front", ["---\nlicense: [\n---\n", "---\n- a\n---\n", "no front matter", "---\nlicense: mit\n"]
)
def test_a_malformed_card_of_the_source_is_ignored(front: str, source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text(front)
    quantkit.quantize(source, tmp_path / "out", recipe={"scheme": "w8a16", "method": "rtn"})
    assert "license" not in front_of(tmp_path / "out")


def test_hub_id(tmp_path: Path) -> None:
    assert hub_id(Path("/c/hub/models--a--b-1.5--x/snapshots/0")) == "a/b-1.5--x"
    assert hub_id(tmp_path) is None
