"""Transforms in the pipeline: the checkpoint has the model's function, the same bytes every time, and a report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, MOE_FAMILIES, save_tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantkit
from quantkit.checkpoint import Checkpoint
from quantkit.report import layer_from_dict
from quantkit.run import execute, prepare
from quantkit.verify import verify_output

ROTATABLE = sorted({*FAMILIES, *MOE_FAMILIES} - {"gemma2", "gemma3_text", "olmo2"})
HEADS: dict[str, Any] = {"name": "rotation", "residual": False}


def logits(path: Path, tokens: Tensor) -> Tensor:
    model = quantkit.load(path, device="cpu", dtype="float32")
    with torch.no_grad():
        return model(input_ids=tokens[None], use_cache=False).logits  # type: ignore[no-any-return]


def only_the_first(family: str, *layers: str) -> list[dict[str, Any]]:
    """Rules that quantize these layers of the first block, whose weights the model barely feels at 8 bits."""
    return [{"match": f"*.0.{layer}", "scheme": "w8a16"} for layer in layers] + [{"match": "*", "skip": True}]


SMALL = {
    "deepseek_v3": "self_attn.q_a_proj",
    "opt": "self_attn.k_proj",
    "gpt2": "attn.c_proj",
    "gpt_neox": "attention.dense",
    "phi3": "self_attn.o_proj",
}


def transformed(path: Path, out: Path, family: str, transforms: list[Any], tokens: list[Tensor]) -> quantkit.Result:
    """The whole model transformed, with one layer of it quantized, to 8 bits."""
    rules = only_the_first(family, SMALL.get(family, "self_attn.k_proj"))
    recipe = {"scheme": "w8a16", "method": "gptq", "rules": rules, "transforms": transforms}
    return quantkit.quantize(path, out, recipe=recipe, tokens=tokens)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


@pytest.mark.parametrize("family", [*FAMILIES, *MOE_FAMILIES])
def test_scales_and_heads_keep_the_function(
    family: str, tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    """The distance is that of the one quantized layer, with or without transforms."""
    before = logits(tiny(family), tokens[0])
    transformed(tiny(family), tmp_path / "plain", family, [], tokens)
    plain = distance(logits(tmp_path / "plain", tokens[0]), before)
    smooth = {"name": "smoothquant", "sources": "all"}
    result = transformed(tiny(family), tmp_path / "out", family, [HEADS, smooth, "awq"], tokens)
    after = distance(logits(tmp_path / "out", tokens[0]), before)
    assert 0 < after < 3 * plain + 1e-6
    assert {record["transform"] for record in result.report["transforms"]} <= {"smoothquant", "awq"}
    changed = changed_tensors(tiny(family), tmp_path / "out")
    assert any(part in name for name in changed for part in ("v_proj", "qkv", "c_attn", "query_key", "kv_b_proj"))


@pytest.mark.parametrize("family", MOE_FAMILIES)
@pytest.mark.parametrize("transform", [{"name": "smoothquant", "sources": "all"}, {"name": "awq", "grid": 4}])
def test_scales_of_experts_keep_the_function(
    transform: dict[str, Any], family: str, tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    """One norm's channels go to routers, experts and shared MLPs; within an expert, only where enough tokens came."""
    block = 1 if family == "deepseek_v3" else 0
    # About what an expert sees, so that some see less.
    threshold = {"mixtral": 1.0, "qwen3_moe": 2.5}.get(family, 3.0)
    before = logits(tiny(family), tokens[0])
    rules = [{"match": f"*.{block}.mlp.*", "scheme": "w8a16"}, {"match": "*", "skip": True}]
    recipe = {"method": "rtn", "rules": rules, "expert_tokens_per_column": threshold}
    quantkit.quantize(tiny(family), tmp_path / "plain", recipe=recipe, tokens=tokens)
    plain = distance(logits(tmp_path / "plain", tokens[0]), before)
    recipe["transforms"] = [transform]
    result = quantkit.quantize(tiny(family), tmp_path / "out", recipe=recipe, tokens=tokens)
    assert 0 < distance(logits(tmp_path / "out", tokens[0]), before) < 1.5 * plain + 1e-6
    mlp = f"model.layers.{block}.mlp"
    records = {record["source"]: record for record in result.report["transforms"]}
    norm = records[f"model.layers.{block}.post_attention_layernorm"]
    assert norm["readers"][0] == f"{mlp}.gate"
    of_experts = {name: record for name, record in records.items() if ".experts." in name}
    few = [record for record in of_experts.values() if record["choice"] == "none" and record["note"]]
    assert all("tokens, and" in record["note"] and record["loss"] is None for record in few)
    assert 0 < len(few) < len(of_experts)
    changed = changed_tensors(tiny(family), tmp_path / "out")
    scaled = any(name.startswith(f"model.layers.{block}.") and name.endswith(".gate.weight") for name in changed)
    assert scaled == (norm["choice"] != "none")  # a search may find that no scales are best
    assert scaled or transform["name"] == "awq"
    assert 2 * len(of_experts) == sum(".experts." in reader for reader in norm["readers"])  # gate and up of each


@pytest.mark.parametrize("family", ROTATABLE)
def test_rotations_keep_the_function(
    family: str, tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    before = logits(tiny(family), tokens[0])
    transformed(tiny(family), tmp_path / "plain", family, [], tokens)
    plain = distance(logits(tmp_path / "plain", tokens[0]), before)
    transformed(tiny(family), tmp_path / "out", family, ["rotation"], tokens)
    assert 0 < distance(logits(tmp_path / "out", tokens[0]), before) < 3 * plain + 1e-5
    changed = changed_tensors(tiny(family), tmp_path / "out")
    assert len(changed) > 0.8 * len(Checkpoint(tiny(family)).tensors)


def changed_tensors(source: Path, written: Path) -> set[str]:
    old, new = Checkpoint(source), Checkpoint(written)
    shared = old.tensors.keys() & new.tensors.keys()
    return {name for name in shared if not torch.equal(old.read([name])[name], new.read([name])[name])}


def test_a_tied_head_is_untied_by_rotating_the_stream(
    tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    source = Checkpoint(tiny("qwen2"))
    assert source.config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in source.tensors
    recipe = {"scheme": "w8a16", "method": "rtn", "transforms": ["rotation"]}
    prepared = prepare(tiny("qwen2"), tmp_path / "out", recipe=recipe)
    extra = source.tensors["model.embed_tokens.weight"].nbytes
    assert any(f"{extra / 1e6:.1f} MB" in note for note in prepared.plan.notes)
    execute(prepared)
    written = Checkpoint(tmp_path / "out")
    assert written.config["tie_word_embeddings"] is False
    assert written.tensors["lm_head.weight"].nbytes == extra
    assert written.nbytes == prepared.plan.size_after
    head, embedding = (written.read([n])[n] for n in ("lm_head.weight", "model.embed_tokens.weight"))
    assert not torch.equal(head, embedding)
    before = logits(tiny("qwen2"), tokens[0])
    assert distance(logits(tmp_path / "out", tokens[0]), before) < 0.02


def test_heads_alone_leave_a_tied_head_tied(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = {"scheme": "w8a16", "method": "rtn", "transforms": [HEADS]}
    quantkit.quantize(tiny("qwen2"), tmp_path / "out", recipe=recipe)
    written = Checkpoint(tmp_path / "out")
    assert written.config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in written.tensors
    assert changed_tensors(tiny("qwen2"), tmp_path / "out") == {
        f"model.layers.{index}.self_attn.v_proj.bias" for index in range(3)
    }


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("qwen2", {"method": "gptq", "transforms": ["rotation", "smoothquant", "awq"]}),
        ("llama", {"method": "gptq", "transforms": ["rotation", "awq"], "true_sequential": True}),
        ("gemma2", {"method": "rtn", "transforms": ["awq"]}),
        ("opt", {"method": "rtn", "transforms": ["rotation"]}),
        ("qwen2_moe", {"method": "gptq", "transforms": ["rotation"]}),
        ("qwen2_moe", {"method": "gptq", "transforms": ["awq"]}),
        ("qwen2_moe", {"scheme": "w8a8", "method": "rtn", "transforms": [{"name": "smoothquant", "sources": "all"}]}),
        ("mixtral", {"method": "gptq", "transforms": ["rotation", "smoothquant", "awq"], "true_sequential": True}),
        ("deepseek_v3", {"method": "gptq", "transforms": ["rotation"], "true_sequential": True}),
    ],
)
def test_a_resumed_run_gives_the_same_bytes(
    family: str, recipe: dict[str, Any], tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    """Interrupted behind the first block, and again behind all of them."""
    whole = {"scheme": "w4a16_g32", **recipe}
    expected = quantkit.quantize(tiny(family), tmp_path / "whole", recipe=whole, tokens=tokens)
    for stop in (1, 3):
        prepared = prepare(tiny(family), tmp_path / "again", recipe=whole, tokens=tokens)
        with pytest.raises(KeyboardInterrupt):
            execute(prepared, observer=_StopsAfter(stop))
        prepared = prepare(tiny(family), tmp_path / "again", recipe=whole, tokens=tokens, resume=True)
        result = execute(prepared, resume=True)
        assert result.report["shards_found_done"] == stop
        assert result.report["transforms"] == expected.report["transforms"]
        for shard in sorted((tmp_path / "whole").glob("*.safetensors")):
            assert shard.read_bytes() == (tmp_path / "again" / shard.name).read_bytes(), shard.name
        for file in (tmp_path / "again").iterdir():
            file.unlink()


class _StopsAfter:
    """An observer that interrupts the run behind as many steps."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def __call__(self, event: object) -> None:
        if type(event).__name__ == "Step":
            self._left -= 1
            if self._left == 0:
                raise KeyboardInterrupt


def test_true_sequential_measures_after_scaling(
    tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    """The scales are the same, found on the block as it was; the Hessians behind them are not."""
    recipe = {"scheme": "w4a16_g32", "method": "gptq", "transforms": ["awq"]}
    once = quantkit.quantize(tiny("llama"), tmp_path / "once", recipe=recipe, tokens=tokens).report
    parts = quantkit.quantize(
        tiny("llama"), tmp_path / "parts", recipe={**recipe, "true_sequential": True}, tokens=tokens
    ).report
    assert once["transforms"][:4] == parts["transforms"][:4]
    by_name = [{layer["name"]: layer for layer in report["layers"]} for report in (once, parts)]
    q, down = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
    # What is measured behind the scaled norm is what was measured before it and rescaled, to float32's rounding.
    assert by_name[0][q]["loss"] == pytest.approx(by_name[1][q]["loss"], rel=1e-3)
    assert by_name[0][down]["loss"] != pytest.approx(by_name[1][down]["loss"], rel=1e-3)


def test_statistics_are_rescaled_in_place_of_another_pass(
    tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    """Blocks run once to measure, a few samples to search, and once to hand on; GPTQ sees the scaled Hessian."""
    transforms = [{"name": "smoothquant"}]
    recipe = {"scheme": "w4a16_g32", "method": "gptq", "transforms": transforms}
    prepared = prepare(tiny("llama"), tmp_path / "out", recipe=recipe, tokens=tokens)
    calls = [0, 0, 0]
    for index, block in enumerate(prepared.plan.skeleton.blocks):

        def count(*_: object, index: int = index) -> None:
            calls[index] += 1

        block.register_forward_pre_hook(count)
    report = execute(prepared).report
    assert calls == [2 * len(tokens), 2 * len(tokens), len(tokens)]
    # The loss of a layer is the same function of its outputs as in a run without transforms: their energy is unchanged.
    plain = quantkit.quantize(
        tiny("llama"), tmp_path / "plain", recipe={**recipe, "transforms": []}, tokens=tokens
    ).report
    for ours, theirs in zip(report["layers"][:7], plain["layers"][:7], strict=True):
        ratios = [layer["loss"] / layer["relative_error"] ** 2 for layer in (ours, theirs)]
        assert ratios[0] == pytest.approx(ratios[1], rel=1e-3)


def test_awq_is_no_worse_than_rounding_on_what_it_compares(
    tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    for family in FAMILIES:
        recipe = {"scheme": "w3a16_g32_asym", "method": "rtn", "transforms": ["awq"]}
        report = quantkit.quantize(tiny(family), tmp_path / family, recipe=recipe, tokens=tokens).report
        assert report["transforms"]
        for record in report["transforms"]:
            assert record["loss"] <= record["loss_before"]
            assert (record["choice"] == "none") == (record["loss"] == record["loss_before"])
        assert any(record["choice"] != "none" for record in report["transforms"])


def test_groups_without_a_quantized_reader_are_left(
    tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    rules = [{"match": "*.self_attn.[qkv]_proj", "skip": True}, {"match": "*.down_proj", "method": "rtn"}]
    recipe = {"scheme": "w4a16_g32", "rules": rules, "transforms": ["awq"]}
    report = quantkit.quantize(tiny("llama"), tmp_path / "out", recipe=recipe, tokens=tokens).report
    sources = {record["source"].split(".", 3)[3] for record in report["transforms"]}
    assert sources == {"self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"}
    changed = changed_tensors(tiny("llama"), tmp_path / "out")
    assert "model.layers.1.self_attn.v_proj.weight" in changed  # dense, and divided by o_proj's scale
    assert "model.layers.0.input_layernorm.weight" not in changed


def test_bfloat16_models(tokens: list[Tensor], tmp_path: Path) -> None:
    """Gains and embeddings ship in bfloat16, and the function stays as near as that allows."""
    path = save_tiny("llama", tmp_path / "model", dtype=torch.bfloat16)
    before = logits(path, tokens[0])
    recipe = {"scheme": "w8a16", "method": "rtn", "transforms": ["rotation", "awq"]}
    quantkit.quantize(path, tmp_path / "out", recipe=recipe, tokens=tokens)
    assert distance(logits(tmp_path / "out", tokens[0]), before) < 0.03
    dtypes = {info.dtype for name, info in Checkpoint(tmp_path / "out").tensors.items() if name.endswith("norm.weight")}
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize(
    ("family", "overrides", "transforms", "words"),
    [
        ("gemma2", {}, ["rotation"], "norms stand between the block's outputs and the residual stream"),
        ("gemma3_text", {}, ["rotation"], "use residual: false"),
        ("olmo2", {}, ["rotation"], "norms stand between the block's outputs and the residual stream"),
        ("opt", {"do_layer_norm_before": False}, ["awq"], "opt models with do_layer_norm_before=True only"),
        ("opt", {"word_embed_proj_dim": 32}, ["rotation"], "model.decoder.embed_tokens is not an embedding of 64"),
        ("llama", {}, ["awq", "rotation"], "put rotation first"),
        ("deepseek_v3", {"q_lora_rank": None}, ["rotation"], "deepseek_v3 models with a q_lora_rank only"),
        ("llama", {}, ["awq", "awq"], "awq stands there 2 times"),
        ("stablelm", {}, ["awq"], "the structure of stablelm models is not known to transforms"),
    ],
)
def test_refusals(
    family: str, overrides: dict[str, Any], transforms: list[Any], words: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """By name, before any work, and nothing is left behind."""
    if family not in {*FAMILIES, *MOE_FAMILIES}:
        monkeypatch.setitem(FAMILIES, family, {})
    path = save_tiny(family, tmp_path / "model", **overrides)
    with pytest.raises(quantkit.RecipeError, match=words):
        prepare(path, tmp_path / "out", recipe={"scheme": "w4a16_g32", "method": "rtn", "transforms": transforms})
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_layer_with_infinite_activations_is_named(tmp_path: Path, tokens: list[Tensor]) -> None:
    path = save_tiny("llama", tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"][:] = 3e38
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    recipe = {"scheme": "w4a16_g32", "method": "rtn", "transforms": ["awq"]}
    with pytest.raises(quantkit.CalibrationError, match=r"model\.layers\.1\..*not finite"):
        quantkit.quantize(path, tmp_path / "out", recipe=recipe, tokens=tokens)
    assert not (tmp_path / "out").exists()


def test_the_report_is_written(tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path) -> None:
    recipe = {
        "scheme": "w4a16_g32",
        "method": "gptq",
        "transforms": [{"name": "smoothquant", "alpha": "search"}],
    }
    result = quantkit.quantize(tiny("phi3"), tmp_path / "out", recipe=recipe, tokens=tokens)
    written = json.loads((tmp_path / "out" / "report.json").read_text())["transforms"]
    assert [r["source"] for r in written] == [
        f"model.layers.{index}.{norm}" for index in range(3) for norm in ("input_layernorm", "post_attention_layernorm")
    ]
    assert written == json.loads(json.dumps(result.report["transforms"]))
    assert all(r["choice"] == "none" or r["choice"].startswith("alpha ") for r in written)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "llama"])
@pytest.mark.parametrize("transforms", [["rotation"], [HEADS, "awq"]])
def test_a_quantized_head_is_the_rotated_one(
    family: str, transforms: list[Any], tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    """Tied or not, by GPTQ: what the head reads is measured behind the rotated stream and the final norm."""
    before = logits(tiny(family), tokens[0])
    rules = [{"match": "lm_head", "scheme": "w8a16"}]
    recipe = {"scheme": "w8a16", "method": "gptq", "rules": rules, "transforms": transforms}
    result = quantkit.quantize(tiny(family), tmp_path / "out", recipe=recipe, tokens=tokens)
    assert distance(logits(tmp_path / "out", tokens[0]), before) < 0.02
    written = Checkpoint(tmp_path / "out")
    assert "lm_head.weight_packed" in written.tensors
    assert "lm_head.weight" not in written.tensors
    assert result.report["size_after"] == written.nbytes


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8_static"])
def test_smoothquant_lowers_the_error_of_outlier_channels(scheme: str, tokens: list[Tensor], tmp_path: Path) -> None:
    """A norm with a few large gains makes per-token and per-tensor steps coarse for all other channels."""
    path = save_tiny("llama", tmp_path / "model", num_hidden_layers=1)
    tensors = load_file(path / "model.safetensors")
    for norm, readers in {
        "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
    }.items():
        tensors[f"model.layers.0.{norm}.weight"][:3] *= 300
        for reader in readers:
            tensors[f"model.layers.0.{reader}.weight"][:, :3] /= 300
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    before = logits(path, tokens[0])
    distances = {}
    for name, alpha in {"plain": None, "given": 0.5, "search": "search"}.items():
        transforms = [] if alpha is None else [{"name": "smoothquant", "alpha": alpha}]
        recipe = {"scheme": scheme, "method": "gptq", "transforms": transforms}
        report = quantkit.quantize(path, tmp_path / name, recipe=recipe, tokens=tokens).report
        distances[name] = distance(logits(tmp_path / name, tokens[0]), before)
        for record in report["transforms"]:
            if alpha == "search":
                assert record["loss"] < 0.3 * record["loss_before"]
    assert distances["given"] < 0.7 * distances["plain"]
    assert distances["search"] < 0.7 * distances["plain"]


def test_clip_lowers_the_output_error_of_rounding(
    tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    """Every layer but q and k is clamped, to what makes its own measured error no larger."""
    for family in ("llama", "gpt2"):
        recipe = {"scheme": "w3a16_g32_asym", "method": "rtn", "transforms": [{"name": "awq", "clip": True}]}
        report = quantkit.quantize(tiny(family), tmp_path / family, recipe=recipe, tokens=tokens).report
        clipped = [record for record in report["transforms"] if record["choice"] == "clip"]
        layers = [layer["name"] for layer in report["layers"]]
        assert [record["source"] for record in clipped] == [n for n in layers if not n.endswith(("q_proj", "k_proj"))]
        assert all(0 < record["loss"] <= record["loss_before"] for record in clipped)
        assert sum(record["loss"] for record in clipped) < 0.97 * sum(record["loss_before"] for record in clipped)


def test_clip_is_refused_with_other_methods(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = {"scheme": "w4a16_g32", "method": "gptq", "transforms": [{"name": "awq", "clip": True}]}
    words = "clip: true is for method rtn, and model.layers.0.self_attn.q_proj has method gptq"
    with pytest.raises(quantkit.RecipeError, match=words):
        prepare(tiny("llama"), tmp_path / "out", recipe=recipe)


@pytest.mark.parametrize(
    ("family", "transforms"),
    [
        ("qwen2", ["rotation", "awq"]),
        ("qwen2", [HEADS]),
        ("gpt2", ["rotation"]),
        ("opt", [{"name": "smoothquant"}]),
        ("gemma3_text", [HEADS, "awq"]),
        ("gpt_neox", ["rotation", "awq"]),
        ("olmo2", ["awq"]),
        ("qwen2_moe", ["rotation"]),
        ("deepseek_v3", ["rotation"]),
    ],
)
def test_only_what_transforms_change_may_differ(
    family: str, transforms: list[Any], tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    """What differs is what the plan says; verification finds a single flipped value in any other tensor."""
    recipe = {"scheme": "w8a16", "method": "rtn", "transforms": transforms}
    prepared = prepare(tiny(family), tmp_path / "out", recipe=recipe, tokens=tokens)
    result = execute(prepared)
    kept = changed_tensors(tiny(family), tmp_path / "out")
    assert kept <= prepared.plan.changed
    assert bool(kept) == (family != "olmo2")  # all of whose changed tensors are quantized
    records = [layer_from_dict(layer) for layer in result.report["layers"]]
    verify_output(tmp_path / "out", prepared.plan, records)
    others = sorted(Checkpoint(tmp_path / "out").tensors.keys() & Checkpoint(tiny(family)).tensors.keys())
    for name in [n for n in others if n not in prepared.plan.changed][:2]:
        shard = tmp_path / "out" / Checkpoint(tmp_path / "out").tensors[name].file
        tensors = load_file(shard)
        tensors[name].view(-1)[0] += 1
        save_file(tensors, shard, metadata={"format": "pt"})
        with pytest.raises(quantkit.CheckpointError, match=f"{name}: differs from the source's"):
            verify_output(tmp_path / "out", prepared.plan, records)
        tensors[name] = Checkpoint(tiny(family)).read([name])[name]
        save_file(tensors, shard, metadata={"format": "pt"})
