"""verify(): anybody's checkpoint, each spoiled in one way, and what programs would make of sound ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import quantkit
from quantkit.cli import app
from quantkit.errors import InputError
from quantkit.verify import Verification, verify

Tensors = dict[str, Tensor]
_LAYER = "model.layers.1.mlp.down_proj"
_FORMATS = {"packed": ("compressed-tensors", "w4a16_g32_asym"), "gptq": ("gptq", "w4a16_g32_asym")}
_FORMATS |= {"gptq_sym": ("gptq", "w4a16_g32"), "v2": ("gptq_v2", "w4a16_g32_asym"), "awq": ("awq", "w4a16_g32_asym")}
_FORMATS |= {"int8": ("compressed-tensors", "w8a8"), "3 bits": ("compressed-tensors", "w3a16_g32")}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Format -> a tiny Llama in it; not to be changed."""
    root = tmp_path_factory.mktemp("sound")

    def saved(name: str) -> Path:
        path = root / name
        if not path.exists():
            dense = root / "dense"
            if not dense.exists():
                save_tiny("llama", dense, torch.bfloat16, num_hidden_layers=2)
            fmt, scheme = _FORMATS[name]
            quantkit.quantize(dense, path, recipe={"scheme": scheme, "method": "rtn", "format": fmt})
        return path

    return saved


@pytest.fixture
def spoiled(sound: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy in one file, with its tensors, its quantization_config or the rest of its config changed."""

    def change(name: str, tensors: Callable[[Tensors], Any] | None = None, **config: Any) -> Path:
        path = tmp_path / "spoiled"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        stated = json.loads((sound(name) / "config.json").read_text())
        for key, value in config.items():
            owner = stated["quantization_config"] if key in stated["quantization_config"] else stated
            owner[key] = value
        (path / "config.json").write_text(json.dumps(stated))
        files = sorted(sound(name).glob("*.safetensors"))
        held = {k: v for file in files for k, v in load_file(file).items()}
        if tensors is not None:
            tensors(held)
        save_file(held, path / "model.safetensors")
        return path

    return change


def codes(found: Verification) -> list[str]:
    return [finding.code for finding in found.findings]


@pytest.mark.parametrize("name", _FORMATS)
def test_sound_checkpoints(name: str, sound: Callable[[str], Path]) -> None:
    found = verify(sound(name))
    assert found.findings == ()
    assert found.num_layers == 14
    assert found.format == _FORMATS[name][0]


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "mixtral", "gemma3_text"])
def test_dense_families(family: str, tiny: Callable[[str], Path]) -> None:
    found = verify(tiny(family))
    assert (found.findings, found.format, found.num_layers) == ((), "dense", 0)


def test_experts(tmp_path: Path) -> None:
    dense = save_tiny("mixtral", tmp_path / "dense", num_hidden_layers=1)
    rules = [{"match": "*.experts.2.down_proj", "scheme": "w8a16_g32"}]
    quantkit.quantize(dense, tmp_path / "q", recipe={"scheme": "w3a16_g32", "method": "rtn", "rules": rules})
    assert verify(tmp_path / "q").is_fine
    assert {"expert-bits", "expert-schemes"} <= set(codes(verify(tmp_path / "q", target="vllm")))
    assert "transformers-experts" in codes(verify(tmp_path / "q", target="transformers"))


def _set(name: str, value: float) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors[name].flatten()[:1].fill_(value)


def _replace(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: make(tensors[name]).contiguous()})


def _put(name: str, tensor: Tensor) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: tensor})


SPOILED: dict[str, tuple[str, Callable[[Tensors], Any], str, str, str]] = {
    "a NaN scale": ("packed", _set(f"{_LAYER}.weight_scale", float("nan")), "layer", "weight_scale", "NaN"),
    "a scale of zero": ("gptq", _set(f"{_LAYER}.scales", 0.0), "layer", f"{_LAYER}.scales", "0"),
    "a scale of another shape": (
        "awq",
        _replace(f"{_LAYER}.scales", lambda t: t[:, :-1]),
        "layer",
        f"{_LAYER}.scales",
        "is bfloat16 [3, 63]",
    ),
    "a scale of another dtype": (
        "packed",
        _replace(f"{_LAYER}.weight_scale", lambda t: t.to(torch.int32)),
        "layer",
        f"{_LAYER}.weight_scale",
        "int32",
    ),
    "codes of another width": (
        "packed",
        _replace(f"{_LAYER}.weight_packed", lambda t: t[:, :-1]),
        "layer",
        f"{_LAYER}.weight_packed",
        "is int32 [64, 11]",
    ),
    "codes that are missing": (
        "gptq",
        lambda tensors: tensors.pop(f"{_LAYER}.qweight"),
        "layer",
        f"{_LAYER}.qweight",
        "is missing",
    ),
    "codes beside the dense weight": (
        "packed",
        _put(f"{_LAYER}.weight", torch.ones(2)),
        "extra",
        f"{_LAYER}.weight",
        "lies beside",
    ),
    "a tensor of no module": ("packed", _put("model.x", torch.ones(2)), "extra", "model.x", "has no place"),
    "a norm that is missing": (
        "packed",
        lambda tensors: tensors.pop("model.norm.weight"),
        "missing",
        "model.norm.weight",
        "is missing",
    ),
    "a norm of another shape": (
        "int8",
        _replace("model.norm.weight", lambda t: t[:-1]),
        "shape",
        "model.norm.weight",
        "should be [64]",
    ),
    "a norm of integers": (
        "int8",
        _replace("model.norm.weight", lambda t: t.to(torch.int32)),
        "dtype",
        "model.norm.weight",
        "int32",
    ),
    "an embedding with inf": (
        "awq",
        _set("model.embed_tokens.weight", float("inf")),
        "values",
        "model.embed_tokens.weight",
        "1 of",
    ),
    "a g_idx of groups that are not": (
        "gptq",
        _set(f"{_LAYER}.g_idx", 99),
        "layer",
        f"{_LAYER}.g_idx",
        "groups 0 to 99",
    ),
    "huge tensors in a layer": (
        "packed",
        _put(f"{_LAYER}.weight_scale", torch.zeros(2**19)),
        "shape",
        _LAYER,
        "at most",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_spoiled_tensors(case: str, spoiled: Callable[..., Path]) -> None:
    name, change, code, where, what = SPOILED[case]
    (finding,) = verify(spoiled(name, change)).findings
    assert finding.code == code
    assert where in finding.where
    assert what in finding.what
    assert finding.fix


def test_negative_scales_are_legal(spoiled: Callable[..., Path]) -> None:
    """AutoRound writes them."""
    assert verify(spoiled("gptq", _replace(f"{_LAYER}.scales", torch.neg))).is_fine


@pytest.mark.parametrize(("name", "other"), [("gptq", "gptq_v2"), ("v2", "gptq")])
def test_zero_points_of_the_other_version(name: str, other: str, spoiled: Callable[..., Path]) -> None:
    """Asymmetric zero points may be anything, but the mean weight tells that all of them are one off."""
    (finding,) = verify(spoiled(name, checkpoint_format=other)).findings
    assert finding.code == "zero-points"
    stored_in = {"gptq": "gptq_v2", "gptq_v2": "gptq"}[other]
    assert finding.fix == f'config.json: write "checkpoint_format": "{stored_in}"'


def test_symmetric_zero_points_of_the_other_version(spoiled: Callable[..., Path]) -> None:
    found = verify(spoiled("gptq_sym", checkpoint_format="gptq_v2"))
    assert codes(found) == ["layer"] * 14
    assert "checkpoint_format is of the other version" in found.findings[0].fix


def test_bits_that_contradict_the_tensors(spoiled: Callable[..., Path]) -> None:
    for bits in (2, 8):
        assert codes(verify(spoiled("gptq", bits=bits))) == ["layer"] * 14


@pytest.mark.parametrize("size", [7, 2**31, 0, -5])
def test_group_sizes_that_cannot_be(size: int, spoiled: Callable[..., Path]) -> None:
    assert set(codes(verify(spoiled("gptq", group_size=size)))) <= {"layer", "config"}
    assert not verify(spoiled("gptq", group_size=size)).is_fine


def test_two_configs_that_differ(spoiled: Callable[..., Path]) -> None:
    path = spoiled("gptq")
    stated = json.loads((path / "config.json").read_text())["quantization_config"]
    (path / "quantize_config.json").write_text(json.dumps(stated))
    assert verify(path).is_fine
    (path / "quantize_config.json").write_text(json.dumps({**stated, "bits": 8, "group_size": 64}))
    found = verify(path)
    assert codes(found) == ["config", "config"]
    assert found.findings[0].what == "says bits=8, and config.json 4"


def test_tied_tensors_that_differ(spoiled: Callable[..., Path]) -> None:
    found = verify(spoiled("packed", tie_word_embeddings=True))
    assert codes(found) == ["tied"]
    assert "loaders use the latter" in found.findings[0].what


def test_what_cannot_be_opened_is_a_finding(spoiled: Callable[..., Path]) -> None:
    path = spoiled("packed")
    (path / "model.safetensors").write_bytes(b"\0" * 20)
    assert codes(verify(path)) == ["files"]
    assert codes(verify(spoiled("packed", model_type="no_such"))) == ["config"]
    with pytest.raises(quantkit.UnreadFormatError, match="quant_method 'other' is not read"):
        verify(spoiled("packed", quant_method="other"))


TARGETS = [
    ("packed", "vllm", []),
    ("packed", "sglang", []),
    ("packed", "transformers", ["transformers-asymmetric"]),
    ("int8", "vllm-cpu", ["cpu-vnni"]),
    ("gptq_sym", "vllm-cpu", ["cpu-avx512", "cpu-w4a8"]),
    ("int8", "transformers", []),
    ("3 bits", "vllm", []),
    ("3 bits", "sglang", ["sglang-bits"]),
    ("gptq", "vllm", ["gptq-grid"]),
    ("gptq_sym", "vllm==0.32", []),
    ("gptq_sym", "sglang", ["sglang-float16"]),
    ("awq", "transformers==5.23.0", ["transformers-gptq-awq"]),
]


@pytest.mark.parametrize(("name", "target", "expected"), TARGETS)
def test_targets(name: str, target: str, expected: list[str], sound: Callable[[str], Path]) -> None:
    found = verify(sound(name), target=target)
    assert codes(found) == expected
    assert all(finding.source for finding in found.findings)


def test_a_target_s_version(spoiled: Callable[..., Path]) -> None:
    path = spoiled("gptq_sym", desc_act=True)
    assert codes(verify(path, target="vllm==0.32.0")) == ["gptq-desc-act"]
    assert codes(verify(path, target="vllm==0.20")) == []


def test_fused_layers_of_several_schemes(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    rules = [{"match": "*.0.self_attn.k_proj", "scheme": "w8a16_g32"}, {"match": "*.1.mlp.up_proj", "skip": True}]
    quantkit.quantize(tiny("llama"), tmp_path / "q", recipe={"scheme": "w4a16_g32", "method": "rtn", "rules": rules})
    (finding,) = verify(tmp_path / "q", target="vllm").findings
    assert finding.code == "fused"
    for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj"):
        assert f"model.layers.*.{part}" in finding.where
    assert "down_proj" not in finding.where


@pytest.mark.parametrize(
    ("name", "shards", "what"),
    [
        ("packed", 2, "a shard has 48 of in_features=96, which is no multiple of group_size=32"),
        ("int8", 2, None),
        ("int8", 64, "4 attention heads do not divide"),
        ("int8", 5, "do not divide"),
        ("packed", 2000, None),
    ],
)
def test_tensor_parallel(name: str, shards: int, what: str | None, sound: Callable[[str], Path]) -> None:
    if shards > 1024:
        with pytest.raises(InputError, match="--tensor-parallel"):
            verify(sound(name), tensor_parallel=shards)
        return
    found = [finding.what for finding in verify(sound(name), tensor_parallel=shards).findings]
    assert found == [] if what is None else any(what in one for one in found)


def test_the_command(sound: Callable[[str], Path], spoiled: Callable[..., Path]) -> None:
    run = CliRunner().invoke
    fine = run(app, ["verify", str(sound("packed")), "--target", "vllm", "--json"])
    assert fine.exit_code == 0
    assert json.loads(fine.stdout)["ok"] is True
    path = spoiled("packed", _set(f"{_LAYER}.weight_scale", float("nan")))
    broken = run(app, ["verify", str(path), "--json"])
    assert broken.exit_code == 1
    (finding,) = json.loads(broken.stdout)["findings"]
    assert set(finding) == {"code", "severity", "where", "what", "fix", "source"}
    table = run(app, ["verify", str(path)])
    assert table.exit_code == 1
    assert "1 errors, 0 warnings, 0 notes" in table.stdout
    assert max(map(len, table.stdout.splitlines()[:-1])) <= 120


def test_a_note_is_no_failure(sound: Callable[[str], Path], spoiled: Callable[..., Path]) -> None:
    run = CliRunner().invoke
    noted = ["verify", str(sound("packed")), "--target", "vllm-cpu"]
    printed = run(app, noted)
    assert printed.exit_code == 0
    assert "AVX-512" in " ".join(printed.stdout.split())
    assert "0 errors, 0 warnings, 2 notes" in printed.stdout
    found = json.loads(run(app, [*noted, "--json"]).stdout)
    assert (found["ok"], [finding["severity"] for finding in found["findings"]]) == (True, ["note", "note"])
    path = spoiled("packed", _put("model.x", torch.ones(2)))
    warned = run(app, ["verify", str(path), "--target", "vllm-cpu", "--json"])
    assert warned.exit_code == 1
    found = json.loads(warned.stdout)
    assert (found["ok"], [finding["severity"] for finding in found["findings"]]) == (False, ["warning", "note", "note"])


@pytest.mark.parametrize(
    "arguments", [["/no/such"], ["builtin", "--target", "word"], ["builtin", "--target", "vllm==x"]]
)
def test_what_could_not_be_checked(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["verify", *arguments])
    assert isinstance(result.exception, quantkit.QuantkitError)  # main() prints it and exits with 2
