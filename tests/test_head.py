"""The output head: measured behind the quantized blocks, solved in pieces, untied on request, found by loaders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import quantkit
from quantkit.checkpoint import Checkpoint
from quantkit.grid import dequantize
from quantkit.head import solve_in_rows
from quantkit.layer_plan import LayerPlan
from quantkit.planning import make_plan
from quantkit.qtensor import QuantizedTensor
from quantkit.recipe import make_recipe
from quantkit.report import Event, LayerDone, Step
from quantkit.scheme import QuantScheme, parse_scheme
from quantkit.skeleton import LinearInfo
from quantkit.solvers import GPTQ, RTN
from quantkit.stats import LayerStats, Stat

HEAD = "w4a16_g32_asym"
RECIPE: dict[str, Any] = {"scheme": "w8a16_g32", "rules": [{"match": "re:lm_head|embed_out", "scheme": HEAD}]}
FAMILIES = ["llama", "qwen2", "gemma2", "opt", "gpt2", "gpt_neox"]  # untied and tied, caps, projections, Conv1D


def head_and_statistics(path: Path, samples: list[Tensor]) -> tuple[str, QuantizedTensor, LayerStats]:
    """The head of a finished directory and what it reads, by running the whole of it."""
    model = quantkit.load(path, backend="reference")
    head = model.get_output_embeddings()
    assert isinstance(head, quantkit.QuantLinear)
    stats = LayerStats(head.in_features, frozenset({Stat.HESSIAN}), torch.device("cpu"))
    handle = head.register_forward_pre_hook(lambda _, args: stats.update(args[0]))
    with torch.no_grad():
        for sample in samples:
            model(input_ids=sample[None], use_cache=False)
    handle.remove()
    return next(name for name, module in model.named_modules() if module is head), head.quantized(), stats


@pytest.mark.parametrize("family", FAMILIES)
def test_head_is_solved_for_what_it_reads(
    family: str, tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    """The codes are those of GPTQ on the input that the finished model's head has."""
    result = quantkit.quantize(tiny(family), tmp_path / "q", recipe=RECIPE, tokens=tokens)
    name, found, stats = head_and_statistics(tmp_path / "q", tokens)
    dense = quantkit.load(tiny(family)).get_output_embeddings().weight.detach().float()
    expected = GPTQ().solve(dense, parse_scheme(HEAD), stats, torch.float32)
    assert float((found.codes != expected.weight.codes).float().mean()) < 2e-3
    record = next(layer for layer in result.report["layers"] if layer["name"] == name)
    assert record["method"] == "gptq"
    assert record["num_tokens"] == sum(map(len, tokens))
    assert record["loss"] == pytest.approx(float(expected.loss.sum()), rel=1e-2)
    energy = float(((dense @ stats.hessian) * dense).sum())
    assert record["relative_error"] == pytest.approx((float(expected.loss.sum()) / energy) ** 0.5, rel=1e-2)
    assert result.report["size_after"] == Checkpoint(tmp_path / "q").nbytes
    assert json.loads((tmp_path / "q" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_head_is_corrected_for_the_drift(
    family: str, tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    """A method that compares with the full-precision model has that model's head input, too."""
    method = {"name": "gptq", "drift_correction": 1.0}
    recipe = {**RECIPE, "scheme": "w3a16_g32", "method": method, "true_sequential": True}
    quantkit.quantize(tiny(family), tmp_path / "q", recipe=recipe, tokens=tokens)
    inputs: list[list[Tensor]] = []
    heads: list[Any] = []
    for path, backend in ((tmp_path / "q", "reference"), (tiny(family), None)):
        model = quantkit.load(path, backend=backend)
        seen: list[Tensor] = []
        heads.append(model.get_output_embeddings())
        handle = heads[-1].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            for sample in tokens:
                model(input_ids=sample[None], use_cache=False)
        handle.remove()
        inputs.append(seen)
    found, dense = heads[0].quantized(), heads[1].weight.detach().float()
    stats = LayerStats(64, frozenset({Stat.HESSIAN, Stat.DRIFT}), torch.device("cpu"))
    for own, exact in zip(*inputs, strict=True):
        stats.update(own, exact)
    expected = GPTQ(drift_correction=1.0).solve(dense, parse_scheme(HEAD), stats, torch.float32).weight
    plain = GPTQ().solve(dense, parse_scheme(HEAD), stats, torch.float32).weight
    assert float((found.codes != expected.codes).float().mean()) < 5e-3
    assert float((found.codes != plain.codes).float().mean()) > 2e-2


def test_tied_head_is_untied_and_the_embedding_stays(
    tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    result = quantkit.quantize(tiny("qwen2"), tmp_path / "q", recipe=RECIPE, tokens=tokens)
    source, written = Checkpoint(tiny("qwen2")), Checkpoint(tmp_path / "q")
    embedding = source.read(["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    assert torch.equal(written.read(["model.embed_tokens.weight"])["model.embed_tokens.weight"], embedding)
    assert "lm_head.weight_packed" in written.tensors
    assert source.config["tie_word_embeddings"] is True
    model = quantkit.load(tmp_path / "q")
    assert isinstance(model.lm_head, quantkit.QuantLinear)
    assert torch.equal(dict(model.named_parameters())["model.embed_tokens.weight"], embedding)
    assert not torch.equal(model.lm_head.dequantize(), embedding)
    torch.testing.assert_close(model.lm_head.dequantize(), embedding, atol=0.02, rtol=0)
    (note,) = [note for note in result.report["notes"] if "untied" in note]
    plain = quantkit.quantize(tiny("qwen2"), tmp_path / "p", recipe={"scheme": "w8a16_g32"}, tokens=tokens)
    added = result.report["size_after"] - plain.report["size_after"]
    assert f"adds {added / 1e6:.1f} MB" in note
    assert result.report["num_parameters"] == plain.report["num_parameters"] + embedding.numel()


def test_rtn_head_needs_no_data(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = {"scheme": "w8a16_g32", "method": "rtn", "rules": [{"match": "lm_head", "scheme": "w4a16_g32"}]}
    quantkit.quantize(tiny("gemma2"), tmp_path / "q", recipe=recipe)
    head = quantkit.load(tmp_path / "q").lm_head
    assert head.scheme == QuantScheme(4, 32)


def test_engines_find_the_head_by_its_name(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """vLLM and SGLang do not take their head for a Linear, whichever group holds its scheme."""
    for scheme in ("w8a16_g32", "w4a16_g32"):
        rules = [{"match": "lm_head", "scheme": scheme}]
        out = tmp_path / scheme
        quantkit.quantize(tiny("llama"), out, recipe={"scheme": "w8a16_g32", "method": "rtn", "rules": rules})
        config = json.loads((out / "config.json").read_text())["quantization_config"]
        named = [group for group in config["config_groups"].values() if "lm_head" in group["targets"]]
        assert [group["weights"]["num_bits"] for group in named] == [parse_scheme(scheme).bits]
        assert config["ignore"] == []


@pytest.mark.parametrize("solver", [GPTQ(), RTN()])
def test_pieces_make_the_whole(solver: GPTQ | RTN, monkeypatch: pytest.MonkeyPatch) -> None:
    """Solving in pieces of any number of rows gives the codes and the figures of solving all rows at once."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(50, 64, generator=generator)
    stats = LayerStats(64, frozenset({Stat.HESSIAN}), torch.device("cpu"))
    stats.update(torch.randn(200, 64, generator=generator) @ torch.randn(64, 64, generator=generator))
    info = LinearInfo("lm_head", "lm_head", "lm_head", 50, 64, False, None, False)
    layer = LayerPlan(info, parse_scheme("w3a16_g32_asym"), solver)
    solved = solve_in_rows(layer, weight, stats, torch.device("cpu"), torch.float32)
    whole, record = solved.weight, solved.record
    for rows in (1, 7, 50):
        monkeypatch.setattr("quantkit.layer_plan._HEAD_WEIGHTS_AT_ONCE", rows * 64)
        solved = solve_in_rows(layer, weight, stats, torch.device("cpu"), torch.float32)
        pieces, again = solved.weight, solved.record
        assert float((pieces.codes != whole.codes).float().mean()) < 2e-3
        torch.testing.assert_close(pieces.scale, whole.scale, rtol=1e-4, atol=0)
        assert again.loss == pytest.approx(record.loss, rel=1e-3)
        assert again.relative_error == pytest.approx(record.relative_error, rel=1e-3)
        assert again.sqnr_db == pytest.approx(record.sqnr_db, abs=0.05)
    error = dequantize(whole, torch.float32) - weight
    if solver.needs:
        damped = stats.hessian + 0.01 * stats.hessian.diagonal().mean() * torch.eye(64)
        assert record.loss == pytest.approx(float(((error @ damped) * error).sum()), rel=1e-3)
    else:
        assert record.loss == pytest.approx(float(error.square().sum()), rel=1e-5)


class _Stop:
    def __init__(self, at: int) -> None:
        self.at, self.seen = at, 0

    def __call__(self, event: Event) -> None:
        self.seen += isinstance(event, Step | LayerDone)
        if self.seen == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [9, 23, 24, 25])
def test_resume_in_front_of_the_head(
    at: int, tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    """A run that is stopped within a block, behind the last block or behind the head gives the same bytes."""
    quantkit.quantize(tiny("llama"), tmp_path / "whole", recipe=RECIPE, tokens=tokens)
    with pytest.raises(KeyboardInterrupt):
        quantkit.quantize(tiny("llama"), tmp_path / "q", recipe=RECIPE, tokens=tokens, observer=_Stop(at))
    quantkit.quantize(tiny("llama"), tmp_path / "q", recipe=RECIPE, tokens=tokens, resume=True)
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        assert load_file(shard).keys() == load_file(tmp_path / "q" / shard.name).keys()
        assert shard.read_bytes() == (tmp_path / "q" / shard.name).read_bytes()


def test_other_layers_outside_of_the_blocks_are_not_measured(tmp_path: Path) -> None:
    from families import save_tiny

    path = save_tiny("opt", tmp_path / "opt", word_embed_proj_dim=32)
    recipe = {"scheme": "w4a16_g32", "rules": [{"match": "*project_out", "scheme": "w4a16_g32"}]}
    with pytest.raises(quantkit.RecipeError, match=r"project_out: method gptq measures .* the output head only"):
        make_plan(Checkpoint(path), make_recipe(recipe))
    rules = [{"match": "*project_out", "scheme": "w4a16_g32", "method": "rtn"}, {"match": "lm_head", "method": "gptq"}]
    samples = [torch.arange(3, 40), torch.arange(50, 90)]
    quantkit.quantize(path, tmp_path / "q", recipe={"scheme": "w4a16_g32", "rules": rules}, tokens=samples)
    model = quantkit.load(tmp_path / "q")
    kinds = {name for name, module in model.named_modules() if isinstance(module, quantkit.QuantLinear)}
    assert {"lm_head", "model.decoder.project_out"} <= kinds
    assert isinstance(model.model.decoder.project_in, nn.Linear)


def test_peak_memory_knows_the_head(tiny: Callable[[str], Path]) -> None:
    """The plan counts the head's pieces, not a float32 copy of it."""
    source = Checkpoint(tiny("llama"))
    with_head = make_plan(source, make_recipe({**RECIPE, "method": "rtn"}))
    without = make_plan(source, make_recipe({"scheme": "w8a16_g32", "method": "rtn"}))
    assert with_head.peak_memory(100, 10) >= without.peak_memory(100, 10)
    assert with_head.measures_head is False
    assert make_plan(source, make_recipe(RECIPE)).measures_head


@pytest.mark.parametrize("pattern", ["model.embed_tokens", "*embed*", "re:.*embed_tokens"])
def test_embeddings_are_meant_by_name(pattern: str, tiny: Callable[[str], Path]) -> None:
    """And rounded to nearest only, for nothing measures them; the refusal says what to write."""
    rule = {"match": pattern, "scheme": "w8a16_g32"}
    source = Checkpoint(tiny("llama"))
    with pytest.raises(quantkit.RecipeError, match=r"model.embed_tokens: method gptq measures .* add method: rtn"):
        make_plan(source, make_recipe({"scheme": "w4a16_g32", "rules": [rule]}))
    plan = make_plan(source, make_recipe({"scheme": "w4a16_g32", "rules": [{**rule, "method": "rtn"}]}))
    assert "model.embed_tokens" in {layer.info.name for layer in plan.layers}
