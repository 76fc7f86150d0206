"""Tuning inside of the pipeline: every family, mixed recipes, resuming, what is reported and verified."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, MOE_FAMILIES
from safetensors.torch import load_file, save_file
from test_run import files
from torch import Tensor

import quantkit
from quantkit.checkpoint import Checkpoint
from quantkit.planning import make_plan
from quantkit.recipe import make_recipe
from quantkit.report import BlockTuned, Event, Stage, Step
from quantkit.run import execute, prepare
from quantkit.staging import partial_path

AUTOROUND = {"name": "autoround", "iterations": 6, "batch": 2, "learning_rate": 0.04}
ROUNDED: dict[str, Any] = {"scheme": "w3a16_g16", "method": AUTOROUND}
TUNING: dict[str, Any] = {"epochs": 2, "batch": 2}
TUNED: dict[str, Any] = {"scheme": "w3a16_g16_asym", "method": "gptq", "tuning": TUNING}


@pytest.fixture
def thrice(tokens: list[Tensor]) -> list[Tensor]:
    """Every sample three times: what is held out is trained on too. Nothing can be generalized from random tokens."""
    return tokens * 3


class Recorder:
    """Keeps every event."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)


def report(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "report.json").read_text())
    return found


@pytest.mark.parametrize("family", [*FAMILIES, *MOE_FAMILIES])
def test_every_family(family: str, tiny: Callable[[str], Path], thrice: list[Tensor], tmp_path: Path) -> None:
    """Learned rounding, then tuning of scales, norms and biases: the output verifies, loads, and no block got worse."""
    recipe = {**ROUNDED, "tuning": {**TUNING, "learning_rate": 0.01}}
    result = quantkit.quantize(tiny(family), tmp_path / "out", recipe=recipe, tokens=thrice)
    blocks = result.report["tuned"]
    assert [block["method"] for block in blocks] == ["autoround", "tuning"] * 3
    for first, second in zip(blocks[::2], blocks[1::2], strict=True):
        assert first["error_after"] <= first["error_before"]
        assert second["error_after"] <= second["error_before"]
    assert sum(block["error_after"] < block["error_before"] for block in blocks) >= 4
    changed = [name for block in blocks for name in block["changed"]]
    assert len(changed) == len({*changed}) > 0
    dense, written = Checkpoint(tiny(family)), Checkpoint(tmp_path / "out")
    for name in dense.tensors.keys() & written.tensors.keys():
        same = torch.equal(dense.read([name])[name], written.read([name])[name])
        assert same == (name not in changed), name
    assert all(dense.tensors[name].shape == written.tensors[name].shape for name in changed)
    model = quantkit.load(tmp_path / "out")
    assert bool(torch.isfinite(model(input_ids=thrice[0][None]).logits).all())


def test_the_tuned_block_is_what_is_handed_on(
    tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    """The last block's reported error, from the written files alone: dense and quantized model side by side."""
    samples = tokens[:1]  # the one sample is trained on and held out
    result = quantkit.quantize(tiny("llama"), tmp_path / "out", recipe=TUNED, tokens=samples)
    dense, quantized = quantkit.load(tiny("llama")), quantkit.load(tmp_path / "out")
    seen: list[Tensor] = []
    for model in (dense, quantized):
        model.get_submodule("model.layers.2").register_forward_hook(
            lambda *a: seen.append(a[2][0] if isinstance(a[2], tuple) else a[2])
        )
        with torch.no_grad():
            model(input_ids=samples[0][None])
    error = float((seen[1] - seen[0]).norm() / seen[0].norm())
    assert result.report["tuned"][-1]["error_after"] == pytest.approx(error, rel=1e-3)


def test_tuning_after_any_method(tiny: Callable[[str], Path], thrice: list[Tensor], tmp_path: Path) -> None:
    """Codes stay unless they are asked to move; scales and norms do not stay."""
    for method in ("rtn", "gptq"):
        plain = {"scheme": "w3a16_g16", "method": method}
        quantkit.quantize(tiny("qwen2"), tmp_path / method, recipe=plain, tokens=thrice)
        for codes in (False, True):
            out = tmp_path / f"{method}-{codes}"
            tuning = {**TUNING, "codes": codes, "codes_learning_rate": 0.05}
            quantkit.quantize(tiny("qwen2"), out, recipe={**plain, "tuning": tuning}, tokens=thrice)
            before, after = (load_file(next(p.glob("model-00001-*"))) for p in (tmp_path / method, out))
            assert before.keys() == after.keys()
            packed = [torch.equal(before[n], after[n]) for n in before if n.endswith("weight_packed")]
            assert not any(packed) if codes else all(packed)
            for kind in ("weight_scale", "norm.weight", "q_proj.bias"):
                assert not any(torch.equal(before[n], after[n]) for n in before if n.endswith(kind)), kind


def test_parts_that_are_switched_off_stay(tiny: Callable[[str], Path], thrice: list[Tensor], tmp_path: Path) -> None:
    plain = {"scheme": "w3a16_g16", "method": "rtn"}
    quantkit.quantize(tiny("qwen2"), tmp_path / "plain", recipe=plain)
    before = load_file(next((tmp_path / "plain").glob("model-00001-*")))
    kinds = {"scales": "weight_scale", "norms": "norm.weight", "biases": "proj.bias"}
    for off, kind in kinds.items():
        recipe = {**plain, "tuning": {**TUNING, off: False}}
        quantkit.quantize(tiny("qwen2"), tmp_path / off, recipe=recipe, tokens=thrice)
        after = load_file(next((tmp_path / off).glob("model-00001-*")))
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved
        assert not [name for name in moved if name.endswith(kind)]


def test_mixed_methods_in_one_block(tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path) -> None:
    """GPTQ, RTN and kept layers stand first, as without their neighbours; then the rest is learned."""
    rules = [
        {"match": "*.o_proj", "skip": True},
        {"match": "*.down_proj", "scheme": "w8a16", "method": "rtn"},
        {"match": "re:.*[qkv]_proj", "method": "gptq"},
    ]
    quantkit.quantize(tiny("llama"), tmp_path / "out", recipe={**ROUNDED, "rules": rules}, tokens=tokens)
    layers = {layer["name"]: layer for layer in report(tmp_path / "out")["layers"]}
    methods = {name.rpartition(".")[2]: layer["method"] for name, layer in layers.items()}
    assert methods == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "gptq"),
        "gate_proj": "autoround",
        "up_proj": "autoround",
        "down_proj": "rtn",
    }
    assert all(block["layers"] == 2 for block in report(tmp_path / "out")["tuned"])
    # The solved layers of the first block are the plain run's.
    gptq = {"scheme": "w3a16_g16", "method": "gptq", "rules": [*rules[:2], {"match": "*.mlp.*", "skip": True}]}
    plain = quantkit.quantize(tiny("llama"), tmp_path / "plain", recipe=gptq, tokens=tokens).report["layers"]
    for layer in plain[:3]:
        assert layers[layer["name"]]["digest"] == layer["digest"]


@pytest.mark.parametrize(
    ("family", "recipe"),
    [("gemma3_text", ROUNDED), ("gemma3_text", TUNED), ("qwen2_moe", {**ROUNDED, "tuning": TUNING})],
    ids=["rounded", "tuned", "experts"],
)
def test_resumed_run_writes_the_same_bytes(
    family: str, recipe: dict[str, Any], tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    """Interrupted behind each block, also the tuning of finished blocks is reported and verified."""
    whole = quantkit.quantize(tiny(family), tmp_path / "whole", recipe=recipe, tokens=tokens)
    tunings = len(whole.report["tuned"]) // 3  # of each block
    for stop in (1, 2, 3):
        out = tmp_path / f"stopped-{stop}"
        blocks = 0

        def interrupt(event: Event, stop: int = stop) -> None:
            nonlocal blocks
            blocks += isinstance(event, Step)
            if blocks == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            quantkit.quantize(tiny(family), out, recipe=recipe, tokens=tokens, observer=interrupt)
        assert len(list(partial_path(out).glob("model-*.safetensors"))) == stop
        recorder = Recorder()
        again = quantkit.quantize(tiny(family), out, recipe=recipe, tokens=tokens, resume=True, observer=recorder)
        assert files(out) == files(tmp_path / "whole")
        found = [{**b, "seconds": 0} for b in again.report["tuned"]]
        assert found == [{**b, "seconds": 0} for b in whole.report["tuned"]]
        assert [e.resumed for e in recorder.events if isinstance(e, BlockTuned)] == [
            i // tunings < stop for i in range(3 * tunings)
        ]


def test_a_spoiled_norm_is_found(tiny: Callable[[str], Path], thrice: list[Tensor], tmp_path: Path) -> None:
    """Verification knows what each tuned gain should be, not only its shape."""
    prepared = prepare(tiny("llama"), tmp_path / "out", recipe=TUNED, tokens=thrice)

    def spoil(event: Event) -> None:
        if isinstance(event, Stage) and event.title == "verifying":
            shard = next(partial_path(tmp_path / "out").glob("model-00002-*"))
            tensors = load_file(shard)
            tensors["model.layers.1.input_layernorm.weight"] += 0.5
            save_file(tensors, shard)

    with pytest.raises(quantkit.CheckpointError, match=r"layers\.1\.input_layernorm\.weight: reads back different"):
        execute(prepared, observer=spoil)
    assert not (tmp_path / "out").exists()


def test_one_block_one_set_of_options(tiny: Callable[[str], Path]) -> None:
    rules = [{"match": "*.mlp.*", "method": {"name": "autoround", "iterations": 7}}]
    with pytest.raises(
        quantkit.RecipeError, match=r"model\.layers\.0: its layers have autoround with different options"
    ):
        make_plan(Checkpoint(tiny("llama")), make_recipe({**ROUNDED, "rules": rules}))


def test_after_transforms(tiny: Callable[[str], Path], thrice: list[Tensor], tmp_path: Path) -> None:
    """Scaled norms are tuned from where the transform left them, against the stream that was rotated alike."""
    recipe = {**TUNED, "method": "rtn", "transforms": ["rotation", "awq"]}
    tuned = quantkit.quantize(tiny("llama"), tmp_path / "out", recipe=recipe, tokens=thrice).report["tuned"]
    assert all(0 < block["error_after"] < block["error_before"] < 0.5 for block in tuned)
    assert all(block["changed"] for block in tuned)
    plain = quantkit.quantize(tiny("llama"), tmp_path / "plain", recipe={**recipe, "tuning": None}, tokens=thrice)
    norms = [Checkpoint(tmp_path / n).read(tuned[0]["changed"]) for n in ("plain", "out")]
    assert plain.report["tuned"] == []
    for name, before in norms[0].items():
        assert 0 < float((norms[1][name] - before).norm()) < 0.3 * float(before.norm())


def test_experts_learn_from_their_tokens(tiny: Callable[[str], Path], thrice: list[Tensor], tmp_path: Path) -> None:
    """Those that some token is sent to; one that the router never chooses stays, and its record says so."""
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_bytes((tiny("deepseek_v3") / "config.json").read_bytes())
    tensors = load_file(tiny("deepseek_v3") / "model.safetensors")
    tensors["model.layers.1.mlp.gate.e_score_correction_bias"][3] = -100.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    learned = quantkit.quantize(source, tmp_path / "out", recipe=ROUNDED, tokens=thrice).report
    plain = quantkit.quantize(source, tmp_path / "plain", recipe={**ROUNDED, "method": "rtn"}).report
    rounded = {layer["name"]: layer["digest"] for layer in plain["layers"]}
    experts = [layer for layer in learned["layers"] if ".layers.1.mlp.experts." in layer["name"]]
    idle = [layer for layer in experts if ".experts.3." in layer["name"]]
    assert [layer["digest"] for layer in idle] == [rounded[layer["name"]] for layer in idle]
    assert all(any("no token" in note for note in layer["notes"]) for layer in idle)
    others = [layer for layer in experts if layer not in idle]
    assert not any(layer["digest"] == rounded[layer["name"]] or layer["notes"] for layer in others)


@pytest.mark.parametrize(
    "transforms", [[], ["awq"], [{"name": "smoothquant", "sources": "all"}]], ids=["alone", "awq", "smoothquant"]
)
def test_a_layer_that_nothing_activates(
    transforms: list[Any], tiny: Callable[[str], Path], thrice: list[Tensor], tmp_path: Path
) -> None:
    """Its input is zero for all tokens: it is rounded to nearest, and its record and the transform's say so."""
    source = tmp_path / "model"
    shutil.copytree(tiny("llama"), source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].zero_()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    recipe = {**ROUNDED, "transforms": transforms}
    report = quantkit.quantize(source, tmp_path / "out", recipe=recipe, tokens=thrice).report
    rounded = quantkit.quantize(source, tmp_path / "plain", recipe={**ROUNDED, "method": "rtn"}).report
    name = "model.layers.1.mlp.down_proj"
    found, plain = (next(layer for layer in r["layers"] if layer["name"] == name) for r in (report, rounded))
    assert found["digest"] == plain["digest"]
    assert any("no token" in note for note in found["notes"])
    noted = [layer["name"] for layer in report["layers"] if layer["notes"]]
    assert noted == ["model.layers.1.mlp.gate_proj", name]  # the gate is multiplied by zero: it changes nothing
    idle = [record for record in report["transforms"] if "never activates" in record["note"]]
    assert bool(idle) == bool(transforms)
    assert all("layers.1." in record["readers"][0] and record["choice"] == "none" for record in idle)


@pytest.mark.parametrize("recipe", [ROUNDED, TUNED], ids=["rounded", "tuned"])
def test_rounded_activations_are_refused(recipe: dict[str, Any], tiny: Callable[[str], Path]) -> None:
    with pytest.raises(quantkit.RecipeError, match=r"q_proj: scheme w8a8.* rounds activations"):
        make_plan(Checkpoint(tiny("llama")), make_recipe({**recipe, "scheme": "w8a8"}))


def test_the_head_is_not_learned(tiny: Callable[[str], Path]) -> None:
    rules = [{"match": "lm_head", "scheme": "w8a16"}]
    with pytest.raises(quantkit.RecipeError, match=r"lm_head: method autoround .* inside of the blocks"):
        make_plan(Checkpoint(tiny("llama")), make_recipe({**ROUNDED, "rules": rules}))


def test_the_plan_shows_what_it_costs(tiny: Callable[[str], Path]) -> None:
    source = Checkpoint(tiny("llama"))
    rtn = make_plan(source, make_recipe({"scheme": "w3a16_g16", "method": "rtn"}))
    rounded = make_plan(source, make_recipe(ROUNDED))
    tuned = make_plan(source, make_recipe(TUNED))
    gptq = make_plan(source, make_recipe({**TUNED, "tuning": None}))
    assert rounded.peak_memory(1000, 100) > rtn.peak_memory(1000, 100)
    assert tuned.peak_memory(1000, 100) > gptq.peak_memory(1000, 100)
    assert tuned.activation_bytes(1000) == 2 * gptq.activation_bytes(1000)
    assert rounded.training_passes(12) == pytest.approx(6 * 2 / 12)  # iterations x batch samples of 12
    assert tuned.training_passes(12) == pytest.approx(2 * 11 / 12, rel=0.1)  # epochs over those not held out
    assert gptq.training_passes(12) == 0.0


def test_the_plan_counts_the_training_of_the_block_that_is_trained_most(tiny: Callable[[str], Path]) -> None:
    """A first block that a rule skips is not trained; the others are."""
    tuning = {"name": "block", "epochs": 2, "batch": 1, "held_out": 0.25}
    recipe = {"scheme": "w4a16_g32", "method": "rtn", "tuning": tuning}
    rules = [{"match": "*.layers.0.*", "skip": True}]
    whole = make_plan(Checkpoint(tiny("llama")), make_recipe(recipe))
    skipping = make_plan(Checkpoint(tiny("llama")), make_recipe({**recipe, "rules": rules}))
    assert skipping.training_passes(8) == whole.training_passes(8) == 2 * 6 / 8
