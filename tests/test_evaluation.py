"""quantkit.evaluation on saved directories: figures, protocol, refusals and sizes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from families import VOCAB, save_tiny
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_perplexity import open_model, plain_perplexity
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from quantkit.errors import CalibrationError, CheckpointError, InputError
from quantkit.evaluation import EvalSpec, Evaluation, checkpoint_size, evaluate, evaluate_on, render
from quantkit.run import quantize
from quantkit.text import EvaluationText

LENGTH = 48


def make_text(words: int = 1500) -> str:
    generator = torch.Generator().manual_seed(5)
    syllables = ["ba", "ko", "ri", "tu", "me", "sol", "an", "del"]
    picks = torch.randint(len(syllables), (words, 3), generator=generator)
    return " ".join("".join(syllables[j] for j in row) for row in picks.tolist())


TEXT = make_text()


def train_tokenizer(path: Path, *, vocab_size: int = VOCAB) -> Tokenizer:
    """A byte-pair tokenizer, trained on the text and saved to ``path``; it adds a BOS by itself."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.save_pretrained(path)
    return tokenizer


def text_of(text: str) -> EvaluationText:
    return EvaluationText(text, hashlib.sha256(text.encode()).hexdigest(), "test", 1)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Path]]:
    """Two llamas of different weights with the same tokenizer: names and directories."""
    root = tmp_path_factory.mktemp("pair")
    named = [
        (name, save_tiny("llama", root / name, seed=seed, initializer_range=0.3))
        for seed, name in enumerate(["one", "two"])
    ]
    for _, path in named:
        train_tokenizer(path)
    return named


@pytest.fixture(scope="module")
def evaluation(pair: list[tuple[str, Path]]) -> Evaluation:
    return evaluate_on(text_of(TEXT), pair, EvalSpec(sequence_length=LENGTH, stride=30, limit=6), open_model)


def test_a_directory_scores_like_a_plain_loop_over_its_tokens(
    pair: list[tuple[str, Path]], evaluation: Evaluation
) -> None:
    ids = torch.tensor(Tokenizer.from_file(str(pair[0][1] / "tokenizer.json")).encode(TEXT).ids)
    assert ids[0] == 1
    assert (ids[1:] != 1).all()
    for (_, path), result in zip(pair, evaluation.results, strict=True):
        assert result.perplexity == pytest.approx(plain_perplexity(open_model(path), ids, LENGTH, 30, 6), rel=1e-5)
        assert result.num_tokens == LENGTH - 1 + 5 * 30
    protocol = evaluation.protocol
    assert protocol["text_tokens"] == len(ids)
    assert protocol["tokens_dropped"] == len(ids) - LENGTH - 5 * 30
    packed = b"".join(int(i).to_bytes(8, "little") for i in ids)
    assert protocol["token_sha256"] == hashlib.sha256(packed).hexdigest()
    assert protocol["special_token_ids"] == [1]


def test_json_has_the_documented_keys(evaluation: Evaluation) -> None:
    value = json.loads(json.dumps(evaluation.to_json(), allow_nan=False))
    assert set(value) == {"results", "protocol"}
    expected = {"model", "perplexity", "stderr", "kl", "top1_changed", "num_tokens", "tokens_per_second"}
    assert [set(result) for result in value["results"]] == [expected | {"size_bytes", "bits_per_weight"}] * 2
    assert [result["model"] for result in value["results"]] == ["one", "two"]
    protocol = value["protocol"]
    assert (protocol["sequence_length"], protocol["stride"], protocol["windows"], protocol["limit"]) == (
        LENGTH,
        30,
        6,
        6,
    )
    assert protocol["text_sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert (protocol["dtype"], protocol["device"]) == ("float32", "cpu")
    assert protocol["versions"]["torch"] == torch.__version__


@pytest.fixture(scope="module")
def quantized(pair: list[tuple[str, Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first model in 4 bits, by quantkit itself."""
    output = tmp_path_factory.mktemp("quantized") / "w4"
    return quantize(pair[0][1], output, recipe={"scheme": "w4a16_g32", "method": "rtn"}, device="cpu").path


def test_dense_and_quantized_directories_compare(pair: list[tuple[str, Path]], quantized: Path, tmp_path: Path) -> None:
    dense = pair[0][1]
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    spec = EvalSpec(str(file), LENGTH, limit=4, batch_size=3)
    calls: list[tuple[int, int]] = []
    got = evaluate(
        [str(dense), str(quantized), str(dense)], spec, device="cpu", progress=lambda *done: calls.append(done)
    )
    ids = torch.tensor(Tokenizer.from_file(str(dense / "tokenizer.json")).encode(TEXT).ids)
    before, after, again = got.results
    assert before.perplexity == pytest.approx(plain_perplexity(open_model(dense), ids, LENGTH, None, 4), rel=1e-5)
    assert (again.kl, again.top1_changed, again.perplexity) == (0.0, 0.0, before.perplexity)
    assert after.kl > 0.001
    assert after.top1_changed > 0
    assert after.bits_per_weight < before.bits_per_weight == 32
    assert after.size_bytes < before.size_bytes
    assert calls == [(3, 4), (4, 4)]
    assert got.protocol["text_source"] == str(file)


def test_rounded_heads_are_compared_with_the_first(pair: list[tuple[str, Path]]) -> None:
    """The first model stays as it is; of the others what was done is said; 8 bits lose less than 3."""
    spec = EvalSpec(sequence_length=LENGTH, limit=3, head_bits=8)
    same = [pair[0], pair[0]]
    plain, rounded = evaluate_on(text_of(TEXT), same, spec, open_model).results
    assert plain.kl == 0 < rounded.kl
    coarse = evaluate_on(text_of(TEXT), same, replace(spec, head_bits=3), open_model)
    assert coarse.results[0].perplexity == plain.perplexity
    assert coarse.results[1].kl > 10 * rounded.kl
    assert coarse.protocol["head_bits"] == 3
    out = StringIO()
    render(coarse, Console(file=out, width=200))
    assert "one: lm_head: rounded to w3a16_channel_sym for the product" in out.getvalue()
    with pytest.raises(InputError, match=r"^head_bits: .* there is no other; name the model twice: one one$"):
        evaluate_on(text_of(TEXT), pair[:1], spec, never)
    with pytest.raises(InputError, match=r"^head_bits: 9 is not a width; choose 2 to 8$"):
        EvalSpec(head_bits=9)


@pytest.mark.parametrize("width", [80, 160])
def test_the_table_shows_results_and_protocol(evaluation: Evaluation, width: int) -> None:
    out = StringIO()
    render(evaluation, Console(file=out, width=width))
    shown = out.getvalue()
    for result in evaluation.results:
        assert result.model in shown
        assert f"{result.perplexity:.3f}" in shown
    assert f"{evaluation.results[1].kl:.5f}" in shown
    assert f"windows of {LENGTH}" in shown
    assert evaluation.protocol["text_sha256"][:12] in shown


def test_the_default_length_is_the_smallest_limit(pair: list[tuple[str, Path]], tmp_path: Path) -> None:
    shorter = save_tiny("llama", tmp_path, max_position_embeddings=64)
    train_tokenizer(shorter)
    got = evaluate_on(text_of(TEXT), [pair[0], ("short", shorter)], EvalSpec(limit=2), open_model)
    assert got.protocol["sequence_length"] == 64
    assert got.protocol["sequence_length_rule"] == "the limit of short, below the default of 2048"
    assert got.protocol["stride"] == 64


def never(path: Path) -> PreTrainedModel:
    pytest.fail(f"{path} was loaded before the check")


@pytest.mark.parametrize(
    ("spec", "text", "error", "says"),
    [
        (
            EvalSpec(sequence_length=129),
            TEXT,
            InputError,
            r"^one: sequence_length=129 .*=128; use 128 or less",
        ),
        (EvalSpec(stride=129), TEXT, InputError, "stride=129"),
        (EvalSpec(), "ba ko ri", CalibrationError, "the text has 4 tokens, fewer than one window of 128"),
        (EvalSpec(), "<s> " + TEXT, CalibrationError, "begins with '<s>'"),
    ],
)
def test_bad_input_is_refused_before_loading(
    pair: list[tuple[str, Path]], spec: EvalSpec, text: str, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        evaluate_on(text_of(text), pair, spec, never)


def test_other_tokens_are_refused(pair: list[tuple[str, Path]], tmp_path: Path) -> None:
    other = save_tiny("llama", tmp_path)
    train_tokenizer(other, vocab_size=40)
    with pytest.raises(InputError, match=r"^other: its tokenizer disagrees with that of one from token 1 on"):
        evaluate_on(text_of(TEXT), [pair[0], ("other", other)], EvalSpec(), never)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    small = save_tiny("llama", tmp_path, vocab_size=30)
    train_tokenizer(small)
    with pytest.raises(CheckpointError, match=r"^small: its tokenizer gives the id \d+, its vocabulary has 30"):
        evaluate_on(text_of(TEXT), [("small", small)], EvalSpec(), never)


def test_a_missing_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tokenizer"):
        evaluate_on(text_of(TEXT), [("bare", save_tiny("llama", tmp_path))], EvalSpec(), never)


def test_no_model_and_no_window_are_errors() -> None:
    with pytest.raises(InputError, match="no model"):
        evaluate_on(text_of(TEXT), [], EvalSpec(), never)
    with pytest.raises(InputError, match="batch_size=0"):
        EvalSpec(batch_size=0)


# --- size -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 16.0), (torch.float32, 32.0)])
def test_a_dense_model_has_the_bits_of_its_dtype(tmp_path: Path, tied: bool, dtype: torch.dtype, bits: float) -> None:
    path = save_tiny("llama", tmp_path, dtype=dtype, tie_word_embeddings=tied)
    size = checkpoint_size(path)
    model = open_model(path)
    assert size.parameters == model.num_parameters()
    assert size.bits_per_weight == bits
    assert size.file_bytes == (path / "model.safetensors").stat().st_size > size.tensor_bytes


def pack(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What a 4-bit compressed-tensors layer in groups of 32 stores (its values do not matter here)."""
    rows, columns = weight.shape
    yield name + "_packed", torch.zeros(rows, columns // 8, dtype=torch.int32)
    yield name + "_scale", torch.ones(rows, columns // 32, dtype=torch.bfloat16)
    yield name + "_shape", torch.tensor([rows, columns])


def test_a_quantized_layer_counts_its_logical_weights(tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path, dtype=torch.bfloat16)
    before = checkpoint_size(path)
    dense = load_file(path / "model.safetensors")
    linears = {name: t for name, t in dense.items() if "_proj" in name}
    kept = {name: t for name, t in dense.items() if name not in linears}
    packed = dict(part for name, t in linears.items() for part in pack(name, t))
    # Two shards and a file that is none, which must not be counted.
    save_file(kept, path / "a.safetensors")
    save_file(packed, path / "b.safetensors")
    save_file({"x": torch.zeros(1000)}, path / "consolidated.safetensors")
    (path / "model.safetensors").unlink()
    weight_map = dict.fromkeys(kept, "a.safetensors") | dict.fromkeys(packed, "b.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = json.loads((path / "config.json").read_text())
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    (path / "config.json").write_text(json.dumps(config))

    size = checkpoint_size(path)
    quantized = sum(t.numel() for t in linears.values())
    assert size.parameters == before.parameters
    stored = 16 * (before.parameters - quantized) + 4.5 * quantized + 2 * 64 * len(linears)
    assert size.bits_per_weight == pytest.approx(stored / before.parameters, rel=1e-12)
    assert size.file_bytes == sum((path / f"{shard}.safetensors").stat().st_size for shard in "ab")
