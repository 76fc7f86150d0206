"""The command line: plans, results, and one line with exit code 2 for every kind of bad input."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.cli import main

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process; returns what it printed. ``code`` is the exit code that is expected."""

    def command(*arguments: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["quantkit", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        assert (stop.value.code or 0) == code, printed.err
        return printed.err if code else printed.out

    return command


@pytest.fixture
def refused(run: Run, tmp_path: Path) -> Callable[..., str]:
    """Quantizing fails with one line and leaves no output; returns the line."""

    def command(model: object, *options: object) -> str:
        text = run("quantize", model, "--output", tmp_path / "out" / "q", *options, code=2)
        assert text.startswith("error: ")
        assert text.count("\n") == 1, text
        assert "Traceback" not in text
        assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []
        return text

    return command


RTN = ("--method", "rtn")
FEW = ("--num-samples", "2", "--sequence-length", "32")


def test_quantize_and_compare(run: Run, tmp_path: Path) -> None:
    out, log = tmp_path / "q", tmp_path / "log.jsonl"
    printed = run("quantize", "builtin", "--output", out, *FEW, "--group-size", "64", "--log-json", log)
    last = printed.strip().splitlines()[-1]
    assert "quantized 85.6% of 1.8 M parameters" in last
    assert last.endswith(f"Next: quantkit perplexity builtin {out}")
    assert "[56/56] model.layers.7.mlp.down_proj  gptq w4a16_g64_sym  loss" in printed
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert sum(event["event"] == "layerdone" for event in events) == 56
    found = tmp_path / "p.json"
    table = run("perplexity", "builtin", out, "--sequence-length", "64", "--limit", "3", "--json", found)
    assert "perplexity" in table
    results = json.loads(found.read_text())
    assert [r["model"] for r in results["results"]] == ["builtin", str(out)]
    assert set(results["results"][0]) == {
        "model", "perplexity", "stderr", "kl", "top1_changed", "num_tokens", "tokens_per_second", "size_bytes",
        "bits_per_weight",
    }  # fmt: skip
    assert results["results"][1]["kl"] > 0
    assert results["protocol"]["text_sha256"]


def test_dry_run_prints_the_plan_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    printed = run("quantize", "builtin", "--output", tmp_path / "q", "--dry-run", "--scheme", "w3a16_g32_asym")
    for text in (
        "model.layers.*.self_attn.q_proj  x8  [128, 128]  w3a16_g32_asym  gptq",
        "lm_head  kept",
        "size before: 3.7 MB",
        "size after:",
        "bits per weight:",
        "projected peak memory:",
        "forward passes per block: 2",
    ):
        assert text in printed
    assert list(tmp_path.iterdir()) == []


def test_flags_override_the_recipe(run: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("scheme: w8a16_g64_asym\nmethod: {name: gptq, damp_percent: 0.05}\n")
    base = ("quantize", "builtin", "--output", tmp_path / "q", "--recipe", recipe, "--dry-run")
    assert "w8a16_g64_asym  gptq" in run(*base)
    assert "w8a16_g64_asym  rtn" in run(*base, *RTN)
    assert "w8a16_g128_asym" in run(*base, "--group-size", "128")
    assert "w8a16_channel_sym" in run(*base, "--group-size", "-1", "--symmetric")
    assert "w4a16_g128_sym" in run(*base, "--scheme", "w4a16")


def test_help_and_version(run: Run) -> None:
    assert "quantize" in run("--help")
    text = run("quantize", "--help")
    for option in (
        *("--output", "--recipe", "--scheme", "--method", "--group-size", "--symmetric", "--asymmetric"),
        *("--calibration", "--num-samples", "--sequence-length", "--seed", "--format", "--device", "--dtype"),
        *("--dry-run", "--resume", "--overwrite", "--log-json"),
    ):
        assert option in text
    assert run("--version").startswith("quantkit ")


@pytest.mark.parametrize("option", ["--scheme", "--method", "--format", "--dtype", "--device"])
def test_unknown_words(refused: Callable[..., str], option: str) -> None:
    assert "nonsense" in refused("builtin", option, "nonsense")


def test_missing_model(refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such directory" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in refused(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(tmp_path / "file")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "hub cannot be reached" in refused("some-org/some-model")


def test_no_weights_or_pickles_only(refused: Callable[..., str], model_copy: Path) -> None:
    (model_copy / "model.safetensors").unlink()
    assert "no weights" in refused(model_copy)
    (model_copy / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "pickled" in refused(model_copy)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "not a causal language model"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "not a causal language model"),
        ({"model_type": "no-such-family"}, "transformers cannot read it"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
        ({"num_hidden_layers": 10}, "is missing"),
        ({"intermediate_size": 512}, "should be [512, 128]"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized (gptq)"),
    ],
)
def test_bad_config(refused: Callable[..., str], model_copy: Path, changes: dict[str, object], expected: str) -> None:
    config = json.loads((model_copy / "config.json").read_text())
    (model_copy / "config.json").write_text(json.dumps({**config, **changes}))
    assert expected in refused(model_copy)


def test_config_that_is_not_json(refused: Callable[..., str], model_copy: Path) -> None:
    (model_copy / "config.json").write_text("{")
    assert "not readable JSON" in refused(model_copy)


def test_truncated_safetensors(refused: Callable[..., str], model_copy: Path) -> None:
    path = model_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "not a whole safetensors file" in refused(model_copy)


def test_header_larger_than_the_file(refused: Callable[..., str], model_copy: Path) -> None:
    (model_copy / "model.safetensors").write_bytes((10**12).to_bytes(8, "little") + b"{}")
    assert "not a whole safetensors file" in refused(model_copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("options", [RTN, FEW])
def test_not_finite(
    refused: Callable[..., str], model_copy: Path, name: str, value: float, options: tuple[str, ...]
) -> None:
    tensors = load_file(model_copy / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, model_copy / "model.safetensors", metadata={"format": "pt"})
    text = refused(model_copy, *options)
    assert name in text
    assert "NaN or inf" in text


def test_group_size_that_does_not_divide(refused: Callable[..., str]) -> None:
    text = refused("builtin", "--group-size", "96")
    assert "in_features=128 is not a multiple of group_size=96; choose a divisor (16, 32, 64, 128)" in text
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
        assert f"model.layers.*.{name} (8)" in text
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        assert f"model.layers.*.{name} (8)" in text
    assert "down_proj" not in text
    assert "down_proj" not in text  # 96 divides 384


def test_recipe_errors(refused: Callable[..., str], tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("scheme: w4a16\nmethod:\n  name: gptq\n  damp_precent: 0.01\n")
    text = refused("builtin", "--recipe", recipe)
    assert "line 4" in text
    assert "did you mean damp_percent?" in text
    recipe.write_text("rules:\n  - match: '*.no_such_proj'\n    skip: true\n")
    assert "matches no linear layer" in refused("builtin", "--recipe", recipe)
    recipe.write_text("rules:\n  - {match: '*embed_tokens', scheme: w8a16}\n")
    assert "model.embed_tokens: method gptq measures" in refused("builtin", "--recipe", recipe)
    assert "add method: rtn" in refused("builtin", "--recipe", recipe)
    assert "cannot be read" in refused("builtin", "--recipe", tmp_path / "none.yaml")


def test_what_does_not_go_together(refused: Callable[..., str], tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    assert "act_bits=4" in refused("builtin", "--scheme", "w4a4")
    assert "write w8a8_channel" in refused("builtin", "--scheme", "w8a8_g64")
    assert "bits=9" in refused("builtin", "--scheme", "w9a16")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("min_share: 0.9\n")
    text = refused("builtin", "--recipe", recipe)
    assert "85.6% of the parameters would be quantized and the recipe expects 90.0%" in text
    assert "left out: model.embed_tokens.weight (14.3%)" in text
    assert "tokenizer cannot be opened" in refused(tiny("llama"), "--group-size", "32", *FEW)


def test_calibration_text(refused: Callable[..., str], tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("")
    assert "no text" in refused("builtin", "--calibration", text)
    text.write_text("Too short to calibrate on.")
    assert "tokens" in refused("builtin", "--calibration", text)
    assert "nowhere" in refused("builtin", "--calibration", tmp_path / "nowhere.txt")
    assert "more than the model's" in refused("builtin", "--sequence-length", "1000000")


def test_output_directory(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "q"
    out.mkdir()
    (out / "precious").write_text("kept")
    text = run("quantize", "builtin", "--output", out, *RTN, code=2)
    assert "is not empty" in text
    assert [p.name for p in out.iterdir()] == ["precious"]
    assert "is a file" in run("quantize", "builtin", "--output", out / "precious", *RTN, code=2)
    assert "is not a directory" in run("quantize", "builtin", "--output", out / "precious" / "x", *RTN, code=2)
    run("quantize", "builtin", "--output", out, *RTN, "--overwrite")
    assert not (out / "precious").exists()


def test_already_quantized_source(run: Run, refused: Callable[..., str], tmp_path: Path) -> None:
    run("quantize", "builtin", "--output", tmp_path / "first", *RTN)
    assert "already quantized (compressed-tensors)" in refused(tmp_path / "first")


def test_perplexity_refuses_in_one_line(run: Run, tmp_path: Path) -> None:
    for arguments in (("nowhere/at/all",), ("builtin", "--data", tmp_path / "none.txt"), ("builtin", "--stride", "0")):
        text = run("perplexity", *arguments, code=2)
        assert text.startswith("error: ")
        assert text.count("\n") == 1


def test_dead_layer(refused: Callable[..., str], model_copy: Path) -> None:
    """A layer whose input is always zero has no Hessian; it is named."""
    tensors = load_file(model_copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros_like(tensors["model.layers.1.mlp.up_proj.weight"])
    save_file(tensors, model_copy / "model.safetensors", metadata={"format": "pt"})
    text = refused(model_copy, *FEW)
    assert "model.layers.1.mlp.down_proj" in text
    assert "never activates" in text


SMALL_PLAN = ("--num-samples", "2", "--sequence-length", "32", "--method", "rtn")


def test_plan_writes_a_recipe_that_quantize_takes(run: Run, tmp_path: Path) -> None:
    recipe, figures = tmp_path / "r.yaml", tmp_path / "f.json"
    printed = run("plan", "builtin", "--bits", "4.5", "--output", recipe, *SMALL_PLAN, "--json", figures)
    assert "model.layers.0.self_attn.q_proj+k_proj+v_proj" in printed
    assert "the smallest for this size; Lagrangian bound" in printed
    found = json.loads(figures.read_text())
    assert len(found["units"]) == 32
    assert found["bits"] <= 4.5
    assert f"{found['bits']:.4f} bits per weight. Next: quantkit quantize builtin --recipe {recipe}" in printed
    dry = run("quantize", "builtin", "--recipe", recipe, "--output", tmp_path / "q", "--dry-run")
    assert f"bits per quantized weight: {found['bits']:.3f}" in dry
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.json", "r.yaml"]


def test_plan_refuses_in_one_line(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "r.yaml"
    for options, said in (
        (("--bits", "2"), "ask for at least 3."),
        (("--bits", "4.5", "--schemes", "w4a16,w17a16"), "bits=17"),
        (("--bits", "4.5", "--schemes", "four"), "'four' is not a scheme"),
        (("--bits", "4.5", "--schemes", ","), "no schemes leaves nothing to choose"),
        (("--bits", "4.5", "--schemes", "w4a16_g96,w8a16"), "not a multiple of group_size=96"),
        (("--bits", "4.5", "--metric", "magic"), "use hessian or kl"),
        (("--bits", "4.5", "--recipe", tmp_path / "none.yaml"), "cannot be read"),
        (("--bits", "4.5", "--calibration", tmp_path / "none.txt"), "none.txt"),
        (("--bits", "4.5", "--activation-memory", "lots"), "is not a size"),
    ):
        text = run("plan", "builtin", "--output", out, *options, code=2)
        assert said in text
        assert text.startswith("error: ")
        assert text.count("\n") == 1
        assert list(tmp_path.iterdir()) == []
    assert "no such directory" in run("plan", tmp_path / "none", "--bits", "4.5", "--output", out, code=2)
    assert "is not there" in run("plan", "builtin", "--bits", "4", "--output", tmp_path / "x" / "r.yaml", code=2)
    out.write_text("precious")
    assert "is there already" in run("plan", "builtin", "--bits", "4.5", "--output", out, code=2)
    assert out.read_text() == "precious"
    run("plan", "builtin", "--bits", "4.5", "--output", out, *SMALL_PLAN, "--overwrite")
    assert "precious" not in out.read_text()
