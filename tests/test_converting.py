"""convert(): the same weights in another format, back to the same bytes, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import MOE_FAMILIES, VOCAB, save_tiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import quantkit
from quantkit.checkpoint import Checkpoint
from quantkit.cli import app
from quantkit.report import Event, Note, Step

TOKENS = torch.arange(5, 45)[None] % VOCAB


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}


def assert_equal_tensors(a: Path, b: Path, but: Iterable[str] = ()) -> None:
    left, right = tensors_of(a), tensors_of(b)
    left = {n: t for n, t in left.items() if not n.endswith(tuple(but) or ("\0",))}
    right = {n: t for n, t in right.items() if not n.endswith(tuple(but) or ("\0",))}
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


def logits(path: Path) -> Tensor:
    """By one backend, whatever the groups: others sum in another order, and some run no reordered groups."""
    with torch.no_grad():
        found: Tensor = quantkit.load(path, backend="reference")(TOKENS).logits
    return found


def quantized(model: Path, output: Path, **recipe: Any) -> Path:
    return quantkit.quantize(model, output, recipe={"scheme": "w4a16_g16", "method": "rtn", **recipe}).path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_tiny("llama", tmp_path_factory.mktemp("llama") / "m", torch.bfloat16)
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.mark.parametrize(
    ("scheme", "there", "back"),
    [
        ("w4a16_g16_sym", "gptq", "compressed-tensors"),
        ("w4a16_g16_asym", "gptq_v2", "compressed-tensors"),
        ("w3a16_g32_asym", "gptq", "compressed-tensors"),
        ("w8a16_channel", "gptq", "compressed-tensors"),
        ("w2a16_g32_asym", "gptq", "compressed-tensors"),
        ("w4a16_g16_asym", "awq", "compressed-tensors"),
        ("w4a16_g16_sym", "awq", "compressed-tensors"),
    ],
)
def test_there_and_back(llama: Path, tmp_path: Path, scheme: str, there: str, back: str) -> None:
    """The same bytes of codes, scales and zero points, and the same logits on the way."""
    source = quantized(llama, tmp_path / "q", scheme=scheme)
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    first = quantkit.convert(source, tmp_path / "there", there)
    assert (first.source, first.target, sum(first.schemes.values())) == ("compressed-tensors", there, 21)
    assert torch.equal(logits(tmp_path / "there"), logits(source))
    quantkit.convert(tmp_path / "there", tmp_path / "back", back)
    assert_equal_tensors(source, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(before["config.json"])
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    assert not (tmp_path / "back" / "quantize_config.json").exists()
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before


def test_every_way_between_gptq_and_awq(llama: Path, tmp_path: Path) -> None:
    source = quantized(llama, tmp_path / "gptq", scheme="w4a16_g16_asym", format="gptq")
    for name, there in (("a", "awq"), ("b", "gptq_v2"), ("c", "awq"), ("d", "gptq")):
        quantkit.convert(source, tmp_path / name, there)
        source = tmp_path / name
    assert_equal_tensors(tmp_path / "gptq", tmp_path / "d")
    assert_equal_tensors(tmp_path / "a", tmp_path / "c")
    one, two = (tensors_of(tmp_path / name) for name in ("gptq", "b"))
    differing = {name.rpartition(".")[2] for name in one if not torch.equal(one[name], two[name])}
    assert differing == {"qzeros"}  # between the versions


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "opt", "gemma3_text", "phi3", *MOE_FAMILIES])
def test_families(family: str, tmp_path: Path) -> None:
    """Biases, tied heads, transposed layers, fused ones, experts under other names on disk."""
    model = save_tiny(family, tmp_path / "m", torch.bfloat16)
    source = quantized(model, tmp_path / "q", scheme="w4a16_g16_asym")
    for fmt in ("gptq", "awq"):
        quantkit.convert(source, tmp_path / fmt, fmt)
        assert_equal_tensors(
            tmp_path / fmt, quantized(model, tmp_path / f"{fmt}-direct", scheme="w4a16_g16_asym", format=fmt)
        )
    assert torch.equal(logits(tmp_path / "gptq"), logits(source))
    quantkit.convert(tmp_path / "awq", tmp_path / "back", "compressed-tensors")
    assert_equal_tensors(source, tmp_path / "back")


def test_several_schemes_and_the_head(llama: Path, tmp_path: Path) -> None:
    rules = [
        {"match": "*.down_proj", "scheme": "w8a16_channel"},
        {"match": "*.0.self_attn.*", "skip": True},
        {"match": "lm_head", "scheme": "w4a16_g32_asym"},
    ]
    source = quantized(llama, tmp_path / "q", rules=rules)
    done = quantkit.convert(source, tmp_path / "g", "gptq")
    assert {str(scheme): count for scheme, count in done.schemes.items()} == {
        "w4a16_g16_sym": 14,
        "w8a16_channel_sym": 3,
        "w4a16_g32_asym": 1,
    }
    assert torch.equal(logits(tmp_path / "g"), logits(source))
    quantkit.convert(tmp_path / "g", tmp_path / "back", "compressed-tensors")
    assert_equal_tensors(source, tmp_path / "back")
    assert torch.equal(logits(tmp_path / "back"), logits(source))


def test_bounded_shards(llama: Path, tmp_path: Path) -> None:
    """Portions of tensors whatever files they come from; a layer whose tensors are in two files stays in one piece."""
    source = quantized(llama, tmp_path / "q", format="gptq")
    tensors = tensors_of(source)
    for file in source.glob("*.safetensors"):
        file.unlink()
    files = {name: f"{'ab'[i % 2]}.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in ("a.safetensors", "b.safetensors"):
        save_file({n: t for n, t in tensors.items() if files[n] == shard}, source / shard)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    events: list[Event] = []
    quantkit.convert(source, tmp_path / "ct", "compressed-tensors", shard_bytes=8192, observer=events.append)
    shards = sorted((tmp_path / "ct").glob("*.safetensors"))
    largest = max(t.nbytes for t in tensors.values())
    assert len(shards) > 5
    assert max(p.stat().st_size for p in shards) < max(2 * 8192, 2 * largest)
    assert sum(isinstance(event, Step) for event in events) == len(shards) + 1
    assert torch.equal(logits(tmp_path / "ct"), logits(source))


def reordered_gptq(path: Path, model: Path) -> Path:
    tokens = [torch.randint(VOCAB, (32,), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    recipe = {"scheme": "w4a16_g16_asym", "method": {"name": "gptq", "act_order": "group"}, "format": "gptq"}
    return quantkit.quantize(model, path, recipe=recipe, tokens=tokens).path


def test_reordered_groups(llama: Path, tmp_path: Path) -> None:
    source = reordered_gptq(tmp_path / "q", llama)
    for fmt in ("awq", "compressed-tensors"):
        with pytest.raises(quantkit.SchemeError) as caught:
            quantkit.convert(source, tmp_path / "no", fmt)
        assert str(caught.value).startswith("model.layers.0.self_attn.q_proj: its groups are reordered (g_idx), as are")
        assert fmt in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} == {"q"}
    quantkit.convert(source, tmp_path / "v2", "gptq_v2")
    assert json.loads((tmp_path / "v2" / "config.json").read_text())["quantization_config"]["desc_act"] is True
    quantkit.convert(tmp_path / "v2", tmp_path / "back", "gptq")
    assert_equal_tensors(source, tmp_path / "back")


def test_contiguous_groups_in_another_order_are_sorted(llama: Path, tmp_path: Path) -> None:
    source = quantized(llama, tmp_path / "q", scheme="w4a16_g16_asym", format="gptq")
    expected = logits(source)
    name = "model.layers.1.mlp.up_proj"
    file = source / "model-00002-of-00004.safetensors"
    tensors = load_file(file)
    order = torch.tensor([2, 0, 3, 1])  # group g of the file is group order[g] of the columns
    tensors[f"{name}.g_idx"] = torch.argsort(order)[torch.arange(64) // 16].to(torch.int32)
    for leaf in ("scales", "qzeros"):
        tensors[f"{name}.{leaf}"] = tensors[f"{name}.{leaf}"][order].contiguous()
    save_file(tensors, file)
    assert torch.equal(logits(source), expected)
    done = quantkit.convert(source, tmp_path / "ct", "compressed-tensors")
    assert any("their scales are sorted" in note for note in done.notes)
    assert torch.equal(logits(tmp_path / "ct"), expected)


@pytest.mark.parametrize(
    ("recipe", "to", "reason"),
    [
        ({"scheme": "w5a16_g16"}, "gptq", "format gptq cannot hold w5a16_g16_sym: it holds 2, 3, 4, 8 bits"),
        ({"scheme": "w8a8"}, "gptq", "keeps activations in floating point"),
        ({"scheme": "w8a8"}, "awq", "keeps activations in floating point"),
        ({"scheme": "w8a16_channel"}, "awq", "it holds 4 bits"),
        ({"scheme": "w4a16_g32", "rules": [{"match": "*.o_proj", "scheme": "w4a16_g16"}]}, "awq", "2 schemes"),
    ],
)
def test_what_cannot_be_expressed(llama: Path, tmp_path: Path, recipe: dict[str, Any], to: str, reason: str) -> None:
    source = quantized(llama, tmp_path / "q", **recipe)
    with pytest.raises(quantkit.SchemeError) as caught:
        quantkit.convert(source, tmp_path / "no", to)
    assert reason.partition(": ")[2] in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} == {"q"}


def test_shapes_that_do_not_fill_words(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "m", torch.bfloat16, intermediate_size=100)
    source = quantized(model, tmp_path / "q", scheme="w4a16_channel")
    with pytest.raises(quantkit.SchemeError, match=r"layers\.0\.mlp\.gate_proj: .*out_features=100"):
        quantkit.convert(source, tmp_path / "no", "gptq")


def test_bad_inputs(llama: Path, tmp_path: Path) -> None:
    source = quantized(llama, tmp_path / "q")
    with pytest.raises(quantkit.InputError, match="'marlin' is not a format; choose one of compressed-tensors, gptq"):
        quantkit.convert(source, tmp_path / "no", "marlin")
    with pytest.raises(quantkit.CheckpointError, match="is not quantized"):
        quantkit.convert(llama, tmp_path / "no", "gptq")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(quantkit.OutputError, match="is not empty"):
        quantkit.convert(source, tmp_path / "full", "gptq")
    file = source / "model-00003-of-00004.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight_scale"] *= float("nan")
    save_file(tensors, file)
    with pytest.raises(quantkit.CheckpointError, match=r"layers\.2\.mlp\.up_proj\.weight_scale.*NaN"):
        quantkit.convert(source, tmp_path / "no", "gptq")
    assert {p.name for p in tmp_path.iterdir()} == {"q", "full"}


def test_a_file_that_is_written_wrong_is_not_published(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = quantized(llama, tmp_path / "q")
    from quantkit.staging import Staging

    write = Staging.write

    def flip(self: Staging, shard: int, tensors: dict[str, Tensor], *args: Any) -> None:
        name = next(n for n in tensors if n.endswith("k_proj.qweight"))
        write(self, shard, {**tensors, name: tensors[name] ^ 1}, *args)

    monkeypatch.setattr(Staging, "write", flip)
    with pytest.raises(quantkit.CheckpointError, match="k_proj: reads back different from what was read"):
        quantkit.convert(source, tmp_path / "g", "gptq")
    assert {p.name for p in tmp_path.iterdir()} == {"q"}


def test_in_place_on_the_command_line(llama: Path, tmp_path: Path) -> None:
    source = quantized(llama, tmp_path / "q")
    expected = logits(source)
    refused = CliRunner().invoke(app, ["convert", str(source), "--to", "gptq", "--output", str(source)])
    assert "is not empty" in str(refused.exception)
    done = CliRunner().invoke(app, ["convert", str(source), "--to", "awq", "--output", str(source), "--overwrite"])
    assert done.exit_code == 0, done.exception
    last = done.output.strip().splitlines()[-1]
    assert "compressed-tensors -> awq: 21 layers w4a16_g16_asym; 9 tensors copied; " in last
    assert "note: symmetric weights are written with zero points in the middle" in done.output
    assert Checkpoint(source).config["quantization_config"]["quant_method"] == "awq"
    assert torch.equal(logits(source), expected)
    events: list[Event] = []
    quantkit.convert(source, source, "gptq", overwrite=True, observer=events.append)
    assert Note("all zero points are in the middle: the weights are written as symmetric") in events
    assert Checkpoint(source).config["quantization_config"]["sym"] is True
    assert torch.equal(logits(source), expected)
    assert {p.name for p in tmp_path.iterdir()} == {"q"}


def test_what_was_done_is_told(llama: Path, tmp_path: Path) -> None:
    """The run's recipe and report stay as they were; conversion.json and the card say what was done since."""
    source = quantized(llama, tmp_path / "q", scheme="w4a16_g16_asym")
    quantkit.convert(source, tmp_path / "a", "awq")
    quantkit.convert(tmp_path / "a", tmp_path / "b", "gptq_v2")
    for name in ("recipe.yaml", "report.json"):
        assert (tmp_path / "b" / name).read_bytes() == (source / name).read_bytes()
    first, second = json.loads((tmp_path / "b" / "conversion.json").read_text())["conversions"]
    assert (first["from"], first["to"], first["source"]) == ("compressed-tensors", "awq", "q")
    assert (second["from"], second["to"], second["source"]) == ("awq", "gptq_v2", "a")
    assert (
        second["versions"]["quantkit"]
        == json.loads((source / "report.json").read_text())["environment"]["versions"]["quantkit"]
    )
    before, after = ((path / "README.md").read_text() for path in (source, tmp_path / "b"))
    assert "| format | gptq, converted by `quantkit convert` (the codes are the same) from awq |" in after
    assert yaml.safe_load(after.split("---\n")[1])["tags"] == ["quantkit", "gptq", "rtn"]
    assert "where no package for gptq is installed" in after
    changed = [line for line, other in zip(before.splitlines(), after.splitlines(), strict=True) if line != other]
    assert len(changed) == 3


def test_a_card_of_somebody_else_stays(llama: Path, tmp_path: Path) -> None:
    source = quantized(llama, tmp_path / "q")
    for name in ("recipe.yaml", "report.json"):
        (source / name).unlink()
    (source / "README.md").write_text("# Mine\n\n| format | compressed-tensors |\n")
    quantkit.convert(source, tmp_path / "g", "gptq")
    assert (tmp_path / "g" / "README.md").read_bytes() == (source / "README.md").read_bytes()
    assert len(json.loads((tmp_path / "g" / "conversion.json").read_text())["conversions"]) == 1
    (tmp_path / "g" / "conversion.json").write_text('{"conversions": 3}')
    told: list[object] = []
    with pytest.raises(quantkit.CheckpointError, match=r"conversion\.json: holds no list"):
        quantkit.convert(tmp_path / "g", tmp_path / "no", "awq", observer=told.append)
    assert not (tmp_path / "no").exists()
    assert not told  # refused before any work
