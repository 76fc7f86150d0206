"""The plan's figures against what is written, and the checks of disk and memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import quantkit
from quantkit.checkpoint import Checkpoint
from quantkit.planning import check_disk, check_memory, make_plan
from quantkit.recipe import make_recipe
from quantkit.skeleton import check_complete


@pytest.mark.parametrize("scheme", ["w4a16_g32", "w3a16_g16_asym", "w8a16", "w5a16_channel_asym", "w8a8", "w8a8_asym"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gpt_neox"])
def test_projected_size_is_the_size(family: str, scheme: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    result = quantkit.quantize(tiny(family), tmp_path / "q", recipe={"scheme": scheme, "method": "rtn"})
    written = Checkpoint(tmp_path / "q")
    assert result.report["size_after"] == written.nbytes
    assert result.report["size_before"] == Checkpoint(tiny(family)).nbytes


def test_skipped_layers_are_named(tiny: Callable[[str], Path]) -> None:
    recipe = make_recipe({"scheme": "w4a16_g32", "rules": [{"match": "*.1.mlp.*", "skip": True}]})
    plan = make_plan(Checkpoint(tiny("llama")), recipe)
    assert dict(plan.skipped) == {
        "lm_head": "outside of the blocks",
        **{f"model.layers.1.mlp.{n}_proj": "kept by a rule" for n in ("gate", "up", "down")},
    }
    check_complete(plan.skeleton, plan.checkpoint)


def test_reordered_groups_are_refused_where_the_format_does_not_hold_them(tiny: Callable[[str], Path]) -> None:
    """Before any work, with the first layer that would have them."""
    recipe = make_recipe({"scheme": "w4a16_g32", "method": {"name": "gptq", "act_order": "group"}})
    with pytest.raises(quantkit.RecipeError, match=r"q_proj: format compressed-tensors .*act_order: static"):
        make_plan(Checkpoint(tiny("llama")), recipe)


def test_drift_is_not_corrected_twice(tiny: Callable[[str], Path]) -> None:
    """Measured in one pass, what the layers in front correct themselves would count again."""
    recipe = {"scheme": "w4a16_g32", "method": {"name": "gptq", "drift_correction": 0.5}}
    with pytest.raises(quantkit.RecipeError, match=r"layers\.0\..*q_proj: drift_correction .*true_sequential: true"):
        make_plan(Checkpoint(tiny("llama")), make_recipe(recipe))
    assert make_plan(Checkpoint(tiny("llama")), make_recipe({**recipe, "true_sequential": True})).num_streams == 2


def test_nothing_left(tiny: Callable[[str], Path]) -> None:
    recipe = make_recipe({"scheme": "w4a16_g32", "rules": [{"match": "*", "skip": True}]})
    with pytest.raises(quantkit.RecipeError, match="nothing is left"):
        make_plan(Checkpoint(tiny("llama")), recipe)


def test_fused_layers_with_unequal_schemes(tiny: Callable[[str], Path]) -> None:
    rules = [{"match": "*.k_proj", "skip": True}, {"match": "*.0.mlp.up_proj", "scheme": "w8a16"}]
    plan = make_plan(Checkpoint(tiny("llama")), make_recipe({"scheme": "w4a16_g32", "rules": rules}))
    assert len(plan.notes) == 4  # q/k/v of three blocks, gate/up of one
    assert any("model.layers.0.mlp.up_proj: w8a16_channel_sym" in note for note in plan.notes)
    assert make_plan(Checkpoint(tiny("llama")), make_recipe({"scheme": "w4a16_g32"})).notes == ()


def test_notes_on_other_programs(tiny: Callable[[str], Path]) -> None:
    """What was seen to fail elsewhere is said before the run."""
    conv = make_plan(Checkpoint(tiny("gpt2")), make_recipe({"scheme": "w4a16_g32"}))
    assert any("Conv1D" in note for note in conv.notes)
    rules = [{"match": "*.down_proj", "scheme": "w8a16"}]
    mixed = make_plan(Checkpoint(tiny("llama")), make_recipe({"scheme": "w4a16_g32_asym", "rules": rules}))
    assert any("transformers 5.23.0: cannot load several schemes" in note for note in mixed.notes)
    gptq = make_plan(Checkpoint(tiny("llama")), make_recipe({"scheme": "w4a16_g32_asym", "format": "gptq"}))
    assert any(
        note.startswith("vllm 0.33.0: runs GPTQ of 4 or 8 bits with symmetric grids only") for note in gptq.notes
    )


def test_peak_memory_does_not_grow_with_blocks_and_grows_with_what_it_should(tiny: Callable[[str], Path]) -> None:
    plan = make_plan(Checkpoint(tiny("llama")), make_recipe({"scheme": "w4a16_g32"}))
    rtn = make_plan(Checkpoint(tiny("llama")), make_recipe({"scheme": "w4a16_g32", "method": "rtn"}))
    assert plan.peak_memory(1000, 100) > rtn.peak_memory(1000, 100)
    assert plan.peak_memory(2000, 100) - plan.peak_memory(1000, 100) == 1000 * 64 * 4
    assert plan.peak_memory(1000, 200) > plan.peak_memory(1000, 100)
    assert rtn.activation_bytes(1000) == 0


class _Free(NamedTuple):
    free: int = 0
    available: int = 0


def test_no_disk_or_memory(tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.disk_usage", lambda _: _Free())
    recipe = {"scheme": "w4a16_g32", "method": "rtn"}
    with pytest.raises(quantkit.OutputError, match="the disk has 0 MiB free"):
        quantkit.quantize(tiny("llama"), tmp_path / "q", recipe=recipe)
    monkeypatch.undo()
    monkeypatch.setattr("psutil.virtual_memory", _Free)
    with pytest.raises(quantkit.OutputError, match="0 MiB are available"):
        quantkit.quantize(tiny("llama"), tmp_path / "q", recipe=recipe)
    assert list(tmp_path.iterdir()) == []


def test_real_disk_and_memory_suffice(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    plan = make_plan(Checkpoint(tiny("llama")), make_recipe({"scheme": "w4a16_g32"}))
    check_disk(plan, tmp_path / "not" / "there" / "yet", 1000)
    check_memory(plan, 1000, 100)


def test_expected_share(tiny: Callable[[str], Path]) -> None:
    """The share at which a plan is refused is the one that it reports, and what is left out is listed by size."""
    source = Checkpoint(tiny("llama"))
    rules = [{"match": "*.mlp.*", "skip": True}]
    share = make_plan(source, make_recipe({"scheme": "w4a16_g32", "rules": rules})).to_dict()["share_quantized"]
    assert 0 < share < 0.5
    make_plan(source, make_recipe({"scheme": "w4a16_g32", "rules": rules, "min_share": share}))
    with pytest.raises(quantkit.RecipeError, match="the recipe expects") as refusal:
        make_plan(source, make_recipe({"scheme": "w4a16_g32", "rules": rules, "min_share": share + 1e-6}))
    text = str(refusal.value)
    assert "left out: lm_head.weight (" in text
    assert "model.embed_tokens.weight (" in text
    assert "model.layers.*.mlp.down_proj.weight (" in text
    assert "and 3 more (" in text


def test_left_out_and_quantized_make_the_whole(tiny: Callable[[str], Path]) -> None:
    for family in ("llama", "gpt2", "qwen2"):
        plan = make_plan(Checkpoint(tiny(family)), make_recipe({"scheme": "w4a16_g32"}))
        assert sum(numel for _, numel in plan.left_out) + plan.num_quantized == plan.num_parameters


@pytest.mark.parametrize("fmt", ["gptq", "awq"])
def test_experts_that_transformers_would_make_up_are_noted(fmt: str, tiny: Callable[[str], Path]) -> None:
    """Seen: from_pretrained of such a Mixtral or Qwen3-MoE warns of missing experts and goes on."""
    recipe = {"scheme": "w4a16_g32_asym", "method": "rtn", "format": fmt}
    notes = make_plan(Checkpoint(tiny("mixtral")), make_recipe(recipe)).notes
    assert sum("random weights" in note for note in notes) == 1
    kept = {**recipe, "rules": [{"match": "*.experts.*", "skip": True}]}
    assert not any("random weights" in note for note in make_plan(Checkpoint(tiny("mixtral")), make_recipe(kept)).notes)


_DOWN_8 = [{"match": "*.down_proj", "scheme": "w8a16_g32"}]


@pytest.mark.parametrize(
    ("recipe", "noted"),
    [
        ({"scheme": "w4a16_g32_sym", "format": "gptq"}, "holds scales of this format in 16 bits"),
        (
            {"scheme": "w4a16_g32_asym", "format": "gptq", "dtype": "bfloat16"},
            "runs GPTQ of 4 or 8 bits with symmetric grids only",
        ),
        (
            {"scheme": "w3a16_g32_sym", "format": "gptq", "dtype": "bfloat16"},
            "runs GPTQ of 4 or 8 bits with symmetric grids only",
        ),
        ({"scheme": "w4a16_g32_sym", "format": "gptq", "dtype": "bfloat16", "rules": _DOWN_8}, "reads one scheme"),
        ({"scheme": "w4a16_g32_sym", "format": "gptq", "dtype": "bfloat16"}, None),
        ({"scheme": "w4a16_g32_asym", "format": "awq", "dtype": "bfloat16"}, None),
    ],
)
def test_notes_on_what_other_programs_load(
    recipe: dict[str, Any], noted: str | None, tiny: Callable[[str], Path]
) -> None:
    plan = make_plan(Checkpoint(tiny("llama")), make_recipe({"method": "rtn", **recipe}))
    assert len(plan.notes) == (noted is not None)
    assert noted is None or noted in plan.notes[0]
