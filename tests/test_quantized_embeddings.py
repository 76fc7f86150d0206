"""Embeddings through a whole run: which rules mean them, what is written, and that every loader reads the same rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB, save_tiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

import quantkit
from quantkit.bench import weight_bytes
from quantkit.checkpoint import Checkpoint
from quantkit.generation import Decoder, Sampling, generate
from quantkit.inspection import inspect
from quantkit.planning import make_plan
from quantkit.recipe import make_recipe
from quantkit.report import LayerDone
from quantkit.run import execute, prepare
from quantkit.verify import verify

IDS = torch.arange(3, 43)[None] % VOCAB
NAMES = {"opt": "model.decoder.embed_tokens", "gpt2": "transformer.wte", "gpt_neox": "gpt_neox.embed_in"}
TIED = {"qwen2", "gemma2", "gemma3_text", "opt", "gpt2"}


def rule(name: str, scheme: str = "w8a16_g32") -> dict[str, Any]:
    return {"match": name, "scheme": scheme, "method": "rtn"}


def recipe(*rules: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"scheme": "w4a16_g32", "method": "rtn", **others, "rules": list(rules)}


EMBED, HEAD = rule("model.embed_tokens"), rule("lm_head")


def planned(source: Path, *rules: dict[str, Any], **others: Any) -> Any:
    return make_plan(Checkpoint(source), make_recipe(recipe(*rules, **others)))


def targets(path: Path) -> list[str]:
    """Of all groups of a config, sorted."""
    config = json.loads((path / "config.json").read_text())
    return sorted(one for group in config["quantization_config"]["config_groups"].values() for one in group["targets"])


def loaded(path: Path, **options: Any) -> Any:
    return quantkit.load(path, **options)


def tensors(path: Path) -> dict[str, Tensor]:
    return {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_is_written_and_opened(
    family: str, registered: None, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """The rows are those of the dense module with the decoded weight; both loaders agree; saving gives it back."""
    name, out = NAMES.get(family, "model.embed_tokens"), tmp_path / "q"
    result = quantkit.quantize(tiny(family), out, recipe=recipe(rule(name), HEAD))
    model = loaded(out)
    embedding, head = model.get_submodule(name), model.get_output_embeddings()
    assert isinstance(embedding, quantkit.QuantEmbedding)
    assert model.get_input_embeddings() is embedding
    dense: Any = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).get_submodule(name)
    before = dense.weight.clone()
    dense.weight.copy_(embedding.weight)
    assert torch.equal(embedding(IDS), dense(IDS))
    assert float((embedding.weight - before).abs().max()) < float(before.abs().max()) / 200  # 8 bits, groups of 32
    config = json.loads((out / "config.json").read_text())
    assert config.get("tie_word_embeddings", False) == (family in TIED)
    own = {"lm_head.weight_packed", "embed_out.weight_packed"} & tensors(out).keys()  # gpt_neox's name on disk
    assert bool(own) == (family not in TIED)
    if family in TIED:
        assert head.quantized().digest() == embedding.quantized().digest()
    assert verify(out).findings == ()
    opened = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    assert torch.equal(opened(IDS).logits, model(IDS).logits)
    opened.save_pretrained(tmp_path / "again")
    found, expected = tensors(tmp_path / "again"), tensors(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert torch.equal(loaded(tmp_path / "again")(IDS).logits, model(IDS).logits)
    records = {layer["name"]: layer for layer in result.report["layers"]}
    assert records[name]["scheme"] == "w8a16_g32_sym"
    assert records[name]["shape"] == (VOCAB, 64)


def test_a_tied_pair_has_one_set_of_codes(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Its bytes are half of those of two, and the figures count its weights once."""
    result = quantkit.quantize(tiny("qwen2"), tmp_path / "q", recipe=recipe(EMBED, HEAD))
    report, written = result.report, Checkpoint(tmp_path / "q")
    assert report["size_after"] == written.nbytes
    assert report["num_parameters"] == sum(t.numel for t in Checkpoint(tiny("qwen2")).tensors.values())
    assert any("lm_head stays tied to model.embed_tokens: one set of codes" in note for note in report["notes"])
    records = {layer["name"]: layer for layer in report["layers"]}
    assert records["lm_head"]["digest"] == records["model.embed_tokens"]["digest"]
    assert records["lm_head"]["notes"] == ("has the codes of model.embed_tokens",)
    profile = inspect(tmp_path / "q")
    assert [layer.name for layer in profile.layers if layer.block is None] == ["model.embed_tokens"]
    assert (profile.num_quantized, profile.nbytes) == (report["num_quantized"], written.nbytes)
    assert profile.num_parameters == report["num_parameters"]
    assert profile.bits_per_quantized_weight == pytest.approx(report["bits_per_quantized_weight"])
    apart = quantkit.quantize(tiny("qwen2"), tmp_path / "apart", recipe=recipe(EMBED, rule("lm_head", "w8a16_g64")))
    assert not json.loads((tmp_path / "apart" / "config.json").read_text())["tie_word_embeddings"]
    assert {"lm_head.weight_packed", "model.embed_tokens.weight_packed"} <= tensors(tmp_path / "apart").keys()
    assert any("has another scheme or method: it is untied" in note for note in apart.report["notes"])
    assert apart.report["size_after"] == Checkpoint(tmp_path / "apart").nbytes
    assert apart.report["size_after"] > report["size_after"] + VOCAB * 64


def test_a_tied_head_that_would_stay_dense_is_refused(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(
        quantkit.RecipeError, match=r"model\.embed_tokens: lm_head is tied .*match: lm_head, scheme: w8"
    ):
        planned(tiny("qwen2"), EMBED)
    with pytest.raises(quantkit.RecipeError, match="lm_head is tied"):
        planned(tiny("qwen2"), EMBED, {"match": "lm_head", "skip": True})
    assert planned(tiny("llama"), EMBED).layers[-1].info.name == "model.embed_tokens"  # not tied


def test_a_head_that_is_measured_has_codes_of_its_own(
    tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    rules = (EMBED, {"match": "lm_head", "scheme": "w8a16_g32"})
    quantkit.quantize(tiny("qwen2"), tmp_path / "q", recipe=recipe(*rules, method="gptq"), tokens=tokens)
    model = loaded(tmp_path / "q")
    assert not model.config.tie_word_embeddings
    digests = [m.quantized().digest() for m in (model.get_output_embeddings(), model.get_input_embeddings())]
    assert digests[0] != digests[1]


@pytest.mark.parametrize("match", ["*", "re:.*", "*.*", "re:(model.embed_tokens|lm_head)"])
def test_a_rule_for_linear_layers_means_no_embedding(match: str, tiny: Callable[[str], Path]) -> None:
    """Patterns mean what they meant; that one fits an embedding too is said."""
    plan = planned(tiny("llama"), {"match": match, "scheme": "w8a16_g32"})
    assert all(not layer.info.embedding for layer in plan.layers)
    assert any("leaves model.embed_tokens as it is" in note for note in plan.notes)
    named = planned(tiny("llama"), {"match": match, "scheme": "w8a16_g32"}, rule("*embed_tokens", "w4a16_g16"))
    (embedding,) = (layer for layer in named.layers if layer.info.embedding)
    assert str(embedding.scheme) == "w4a16_g16_sym"


def test_the_first_rule_that_means_it_decides(tiny: Callable[[str], Path]) -> None:
    kept = planned(tiny("llama"), {"match": "*.embed_tokens", "skip": True}, EMBED)
    assert all(not layer.info.embedding for layer in kept.layers)
    whole = planned(tiny("llama"), {"match": "*", "skip": True}, EMBED)
    assert [layer.info.name for layer in whole.layers] == ["model.embed_tokens"]
    recipe_s = planned(tiny("llama"), {"match": "model.embed_tokens", "method": "rtn"}, method="gptq")
    assert (str(recipe_s.layers[-1].scheme), recipe_s.layers[-1].solver.name) == ("w4a16_g32_sym", "rtn")


@pytest.mark.parametrize(
    ("family", "rules", "others", "reason"),
    [
        ("llama", [{**EMBED, "method": None}], {"method": "gptq"}, "method gptq .* add method: rtn"),
        ("llama", [{**EMBED, "method": "autoround"}], {}, "method autoround .* token ids"),
        ("llama", [rule("model.embed_tokens", "w8a8")], {}, "rounds activations, and an embedding has none"),
        ("llama", [{"match": "model.embed_tokens", "method": "rtn"}], {"scheme": "w8a8_static"}, "rounds activations"),
        ("llama", [rule("model.embed_tokens", "w8a16_g128")], {}, r"embed_tokens: in_features=64 .* choose a divisor"),
        ("llama", [EMBED], {"format": "gptq"}, "format gptq holds linear layers only"),
        ("llama", [EMBED], {"format": "awq", "scheme": "w4a16_g32_asym"}, "format awq holds linear layers only"),
        ("opt", [rule("*.embed_positions")], {}, "OPTLearnedPositionalEmbedding does not look rows up"),
        ("llama", [rule("model.embed_token")], {}, "no linear layer of this model, and no embedding"),
    ],
)
def test_refusals(
    family: str, rules: list[dict[str, Any]], others: dict[str, Any], reason: str, tiny: Callable[[str], Path]
) -> None:
    with pytest.raises(quantkit.InputError, match=reason):
        planned(tiny(family), *rules, **others)


def test_the_embedding_counts_in_min_share(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(quantkit.RecipeError, match=r"left out: model\.embed_tokens\.weight"):
        planned(tiny("llama"), HEAD, min_share=0.95)
    assert planned(tiny("llama"), HEAD, EMBED, min_share=0.95).num_quantized


def test_learned_positions(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """GPT-2 has two embeddings: one alone is named, both in one scheme are their class as well."""
    word = rule("transformer.wte")
    quantkit.quantize(tiny("gpt2"), tmp_path / "one", recipe=recipe(word, HEAD))
    assert targets(tmp_path / "one") == ["Linear", "lm_head", "transformer.wte"]
    quantkit.quantize(tiny("gpt2"), tmp_path / "two", recipe=recipe(word, HEAD, rule("transformer.wpe")))
    names = ["Embedding", "Linear", "lm_head", "transformer.wpe", "transformer.wte"]
    assert targets(tmp_path / "two") == names
    model = loaded(tmp_path / "two")
    assert isinstance(model.transformer.wpe, quantkit.QuantEmbedding)
    assert bool(model(IDS).logits.isfinite().all())


@pytest.mark.parametrize("named", [["Embedding"], ["model.embed_tokens"], ["re:.*embed_tokens$"]])
def test_configs_of_others(named: list[str], tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """llm-compressor names the class, others the module or a pattern; a class alone leaves linear layers out."""
    path = tmp_path / "q"
    quantkit.quantize(tiny("llama"), path, recipe=recipe({"match": "*", "skip": True}, EMBED))
    expected = loaded(path)(IDS).logits
    config = json.loads((path / "config.json").read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    assert group["format"] == "pack-quantized"
    group["targets"] = named
    config["quantization_config"]["ignore"] = []
    (path / "config.json").write_text(json.dumps(config))
    assert verify(path).findings == ()
    assert torch.equal(loaded(path)(IDS).logits, expected)
    config["quantization_config"]["ignore"] = ["model.embed_tokens"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(quantkit.CheckpointError, match="missing"):
        loaded(path)


def test_spoiled_files(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "q"
    quantkit.quantize(tiny("qwen2"), path, recipe=recipe(EMBED, HEAD))
    (file,) = (one for one in path.glob("*.safetensors") if "model.embed_tokens.weight_scale" in load_file(one))
    held = load_file(file)
    for change, reason in (
        ({"model.embed_tokens.weight_scale": torch.full((VOCAB, 2), float("nan"))}, "weight_scale"),
        ({"model.embed_tokens.weight_scale": torch.ones(VOCAB, 4)}, "weight_scale"),
        ({"model.embed_tokens.weight_packed": held["model.embed_tokens.weight_packed"][:9].clone()}, "weight_packed"),
    ):
        save_file({**held, **change}, file, metadata={"format": "pt"})
        with pytest.raises(quantkit.CheckpointError, match=reason):
            loaded(path)
        assert any(reason in finding.what + finding.where for finding in verify(path).findings)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_rotation_comes_first(family: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """The rotated rows are what is rounded. A tied head has a matrix of its own then, dense unless a rule asks."""
    rotated = [{"name": "rotation", "seed": 3}]
    quantkit.quantize(tiny(family), tmp_path / "dense", recipe=recipe(transforms=rotated))
    quantkit.quantize(tiny(family), tmp_path / "q", recipe=recipe(EMBED, transforms=rotated))
    whole, part = loaded(tmp_path / "dense"), loaded(tmp_path / "q")
    weight, found = whole.get_input_embeddings().weight, part.get_input_embeddings().weight
    assert float((found - weight).abs().max()) < float(weight.abs().max()) / 200
    original = loaded(tiny(family)).get_input_embeddings().weight.detach()
    assert float((found - original).abs().max()) > float(original.abs().max()) / 10
    assert torch.equal(part.get_output_embeddings().weight, whole.get_output_embeddings().weight)
    quantkit.quantize(tiny(family), tmp_path / "both", recipe=recipe(EMBED, HEAD, transforms=rotated))
    assert "lm_head.weight_packed" in tensors(tmp_path / "both")
    assert not json.loads((tmp_path / "both" / "config.json").read_text())["tie_word_embeddings"]


def test_what_is_measured_comes_from_the_quantized_embedding(
    tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    """GPTQ in front of block 0 sees the rows that will run: as if the source's embedding had been rounded before."""
    embed = rule("model.embed_tokens", "w2a16_g16")
    quantkit.quantize(tiny("llama"), tmp_path / "q", recipe=recipe(embed, method="gptq"), tokens=tokens)
    rounded = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    with torch.no_grad():
        rounded.model.embed_tokens.weight.copy_(loaded(tmp_path / "q").get_input_embeddings().weight)
    rounded.save_pretrained(tmp_path / "rounded")
    quantkit.quantize(tmp_path / "rounded", tmp_path / "r", recipe=recipe(method="gptq"), tokens=tokens)
    one, other = tensors(tmp_path / "q"), tensors(tmp_path / "r")
    for name in other.keys() - {"model.embed_tokens.weight"}:
        assert torch.equal(one[name], other[name]), name
    quantkit.quantize(tiny("llama"), tmp_path / "p", recipe=recipe(method="gptq"), tokens=tokens)
    plain = tensors(tmp_path / "p")
    assert any(not torch.equal(one[name], plain[name]) for name in one.keys() & plain.keys())


def test_drift_compares_with_the_full_precision_embedding(
    tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    """Two streams start from different rows: the first layers' drift is not zero any more."""
    method = {"name": "gptq", "drift_correction": 1.0}
    rules = {"dense": (), "rounded": (rule("model.embed_tokens", "w2a16_g16"),)}
    found = {}
    for name, one in rules.items():
        values = recipe(*one, method=method, true_sequential=True)
        quantkit.quantize(tiny("llama"), tmp_path / name, recipe=values, tokens=tokens)
        found[name] = tensors(tmp_path / name)["model.layers.0.self_attn.q_proj.weight_packed"]
    plain = recipe(method="gptq", true_sequential=True)
    quantkit.quantize(tiny("llama"), tmp_path / "plain", recipe=plain, tokens=tokens)
    # In front of the first layers nothing has drifted in the run with a dense embedding.
    assert torch.equal(found["dense"], tensors(tmp_path / "plain")["model.layers.0.self_attn.q_proj.weight_packed"])
    assert not torch.equal(found["dense"], found["rounded"])


class Stop(Exception):  # noqa: N818
    """Stands for a power cut."""


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("after", [0, 10, 21, 22])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    after: int, family: str, tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    rules = (EMBED, HEAD)
    values = recipe(*rules, method={"name": "gptq", "drift_correction": 0.5}, true_sequential=True)
    quantkit.quantize(tiny(family), tmp_path / "whole", recipe=values, tokens=tokens)
    done = 0

    def stop(event: object) -> None:
        nonlocal done
        if isinstance(event, LayerDone):
            if done == after:
                raise Stop
            done += 1

    with pytest.raises(Stop):
        execute(prepare(tiny(family), tmp_path / "q", recipe=values, tokens=tokens), resume=False, observer=stop)
    result = quantkit.quantize(tiny(family), tmp_path / "q", recipe=values, tokens=tokens, resume=True)
    assert {layer["name"] for layer in result.report["layers"]} >= {"lm_head", "model.embed_tokens"}
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "q" / shard.name).read_bytes()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_the_compiled_step_has_the_same_tokens(family: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    quantkit.quantize(tiny(family), tmp_path / "q", recipe=recipe(EMBED, HEAD))
    model = loaded(tmp_path / "q", dtype="bfloat16")
    prompt, stops = torch.tensor([1, 17, 30, 4, 99, 8, 51]), frozenset[int]()
    eager = list(generate(Decoder(model, 19), prompt, 12, stops, Sampling()))
    torch._dynamo.reset()
    compiled = Decoder(model, 19, compiled=True, backend="aot_eager")
    assert list(generate(compiled, prompt, 12, stops, Sampling())) == eager
    torch._dynamo.reset()


def test_a_token_reads_one_row(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    quantkit.quantize(tiny("llama"), tmp_path / "dense", recipe=recipe())
    quantkit.quantize(tiny("llama"), tmp_path / "q", recipe=recipe(EMBED))
    dense, model = loaded(tmp_path / "dense"), loaded(tmp_path / "q")
    assert weight_bytes(dense) - weight_bytes(model) == 64 * 4 - (64 + 2 * 4)  # a float32 row, and 8 bits with 2 scales


def test_what_programs_do_with_it(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    quantkit.quantize(tiny("llama"), tmp_path / "q", recipe=recipe(EMBED))
    quantkit.quantize(tiny("llama"), tmp_path / "asym", recipe=recipe(rule("model.embed_tokens", "w8a16_g32_asym")))
    quantkit.quantize(tiny("qwen2"), tmp_path / "tied", recipe=recipe(EMBED, HEAD))
    for name, target, expected in (
        ("q", "vllm", ["embedding-vllm"]),
        ("q", "sglang", ["embedding-sglang"]),
        ("q", "transformers", ["embedding-transformers"]),
        ("asym", "vllm", ["embedding-vllm-grid"]),
        ("tied", "vllm", ["embedding-vllm-tied"]),
        ("tied", "vllm-cpu", ["embedding-cpu", "embedding-vllm-tied"]),
        ("tied", "sglang", ["embedding-sglang"]),
        ("tied", "transformers", ["embedding-transformers-tied"]),
    ):
        found = [finding for finding in verify(tmp_path / name, target=target).findings if "embedding" in finding.code]
        assert sorted(finding.code for finding in found) == expected
        assert {finding.where for finding in found} == {"model.embed_tokens"}
        assert [finding.severity for finding in found] == ["note" if expected == ["embedding-vllm"] else "error"] * len(
            found
        )
    notes = planned(tiny("qwen2"), EMBED, HEAD).notes
    assert any("sglang" in note and "random numbers: model.embed_tokens" in note for note in notes)


def test_conversion(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """To the same format it is copied, codes and all; those that hold no embedding are refused with its name."""
    quantkit.quantize(tiny("qwen2"), tmp_path / "q", recipe=recipe(EMBED, HEAD))
    quantkit.convert(tmp_path / "q", tmp_path / "c", "compressed-tensors")
    found, expected = tensors(tmp_path / "c"), tensors(tmp_path / "q")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert targets(tmp_path / "c") == targets(tmp_path / "q")
    with pytest.raises(quantkit.SchemeError, match=r"model\.embed_tokens: format gptq holds linear layers only"):
        quantkit.convert(tmp_path / "q", tmp_path / "g", "gptq")


@torch.no_grad()
def test_transformers_without_a_head_offloaded_and_dense_again(
    registered: None, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "q"
    quantkit.quantize(tiny("qwen2"), path, recipe=recipe(EMBED, HEAD))
    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    body = AutoModel.from_pretrained(path, local_files_only=True)
    assert torch.equal(body(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    model.tie_weights()  # anybody may call it: nothing is tied to a weight that is not there
    logits = model(IDS).logits
    dense = model.dequantize()
    torch.testing.assert_close(dense(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    assert type(dense.get_input_embeddings()) is torch.nn.Embedding
    places = {"model.embed_tokens": "disk", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places["lm_head"] = "cpu"
    with pytest.raises(quantkit.CheckpointError, match=r"model\.embed_tokens: lm_head has its codes"):
        AutoModelForCausalLM.from_pretrained(path, device_map=places, offload_folder=tmp_path / "o")
    quantkit.quantize(tiny("llama"), tmp_path / "l", recipe=recipe(EMBED))
    offloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "l", device_map=places, offload_folder=tmp_path / "ol")
    assert all(parameter.is_meta for parameter in offloaded.model.embed_tokens.parameters())
    expected = loaded(tmp_path / "l")(IDS).logits
    torch.testing.assert_close(offloaded(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_gemma_s_scale_is_kept(tmp_path: Path) -> None:
    """In bfloat16 the factor is rounded before it multiplies, as in the family's own class."""
    source = save_tiny("gemma3_text", tmp_path / "m", dtype=torch.bfloat16, hidden_size=96)
    quantkit.quantize(source, tmp_path / "q", recipe=recipe(EMBED, HEAD))
    found = loaded(tmp_path / "q").get_input_embeddings()
    dense = loaded(source).get_input_embeddings()
    with torch.no_grad():
        dense.weight.copy_(found.weight)
        assert torch.equal(found(IDS), dense(IDS))
    assert found.embed_scale == pytest.approx(96**0.5)
    assert not torch.equal(found(IDS), found.weight[IDS])
