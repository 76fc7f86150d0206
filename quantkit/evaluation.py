"""Evaluate model directories on a text: open, tokenize, score, and say exactly under which protocol.

Figures of different protocols do not compare, so all models of a run see the same tokens in the same windows,
models whose tokenizers disagree are refused, and the protocol goes with the results.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantkit.card import is_quantkit_card, markdown_table, update_card
from quantkit.checkpoint import Checkpoint
from quantkit.errors import CalibrationError, CheckpointError, InputError, message
from quantkit.loader import load
from quantkit.model_config import open_config
from quantkit.perplexity import Progress, Windows, plan_windows, score_models
from quantkit.precision import products_note
from quantkit.report import versions
from quantkit.rounded_head import check_head_bits, round_head
from quantkit.skeleton import open_skeleton
from quantkit.source import open_tokenizer, resolve_model
from quantkit.text import EvaluationText, evaluation_text

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

DEFAULT_LENGTH = 2048


@dataclass(frozen=True, slots=True)
class EvalSpec:
    """What to evaluate on.

    Attributes:
        data: text source, as ``quantkit.text`` reads it; its evaluation split where it has splits.
        sequence_length: tokens in a window; None means 2048, or the smallest of the models' own limits if
            that is less.
        stride: tokens from one window's start to the next one's; None means windows that do not overlap.
        limit: at most this many windows; None means the whole text.
        batch_size: windows in one forward pass.
        column: column of a table that holds the text.
        head_bits: the output heads of all models but the first are rounded to so many bits, as ``quantkit.load``
            does it; the first stays what the others are compared with.

    Raises:
        InputError: ``batch_size`` below 1, ``head_bits`` out of range. (The rest is checked against the text and
            the models.)
    """

    data: str = "builtin"
    sequence_length: int | None = None
    stride: int | None = None
    limit: int | None = None
    batch_size: int = 1
    column: str | None = None
    head_bits: int | None = None

    def __post_init__(self) -> None:
        check_head_bits(self.head_bits)
        if self.batch_size < 1:
            raise InputError(
                message("perplexity", f"batch_size={self.batch_size} is no window at all", "use 1 or more")
            )


@dataclass(frozen=True, slots=True)
class ModelScore:
    """One model's line of the table: ``quantkit.perplexity.Score``, and what the model weighs.

    Attributes:
        model: as it was named.
        perplexity, stderr, kl, top1_changed, num_tokens, tokens_per_second: as in ``Score``.
        size_bytes: bytes of the checkpoint's safetensors files.
        bits_per_weight: bits of all stored tensors by the number of the model's parameters.
    """

    model: str
    perplexity: float
    stderr: float | None
    kl: float
    top1_changed: float
    num_tokens: int
    tokens_per_second: float
    size_bytes: int
    bits_per_weight: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Results, in the order of the models, and the protocol under which they compare.

    Attributes:
        results: one line a model; divergences are from the first.
        protocol: plain JSON values.
    """

    results: tuple[ModelScore, ...]
    protocol: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """``{"results": [...], "protocol": {...}}``, of plain JSON values."""
        return {"results": [asdict(result) for result in self.results], "protocol": self.protocol}


@dataclass(frozen=True, slots=True)
class CheckpointSize:
    """What a model directory weighs.

    Attributes:
        file_bytes: bytes of its safetensors files.
        tensor_bytes: bytes of the tensors in them: file_bytes without the headers.
        parameters: of the model that config.json describes, a tied weight counted once; a quantized layer
            counts out_features x in_features, however it is stored.
    """

    file_bytes: int
    tensor_bytes: int
    parameters: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits by parameters: scales, zero points and unquantized tensors are in it."""
        return 8 * self.tensor_bytes / self.parameters


def checkpoint_size(path: Path) -> CheckpointSize:
    """Weigh a model directory, dense or quantized, from its headers and config.

    Raises:
        CheckpointError: unreadable, or not a causal language model.
    """
    checkpoint = Checkpoint(path)
    model = open_skeleton(checkpoint, torch.float32).model
    tied = model.all_tied_weights_keys
    return CheckpointSize(
        file_bytes=sum((path / file).stat().st_size for file in checkpoint.files),
        tensor_bytes=checkpoint.nbytes,
        parameters=sum(p.numel() for n, p in model.named_parameters(remove_duplicate=False) if n not in tied),
    )


def evaluate(
    models: Sequence[str],
    spec: EvalSpec,
    *,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate models, dense or quantized, on the same tokens, and compare them with the first.

    All models are in memory at once, so that each window goes through all of them: the first one's logits are
    computed once and the speeds are measured interleaved. Models that do not fit together can be evaluated
    one by one, without divergences.

    Args:
        models: local directories, hub ids or ``builtin``.
        spec: text and windows.
        device: where to run, as ``quantkit.load`` takes it.
        dtype: in which dtype to run, as ``quantkit.load`` takes it.
        progress: called after every batch with the windows done and the windows in all.

    Raises:
        InputError: nothing to evaluate, a window longer than a model allows, tokenizers that disagree.
        CalibrationError: text that is missing or shorter than one window.
        CheckpointError: a model that cannot be opened, vocabularies of different sizes, NaN or inf logits.
    """

    def opened(path: Path) -> PreTrainedModel:
        return load(path, device=device, dtype=dtype)

    named = [(name, resolve_model(name)) for name in models]
    return evaluate_on(evaluation_text(spec.data, column=spec.column), named, spec, opened, progress)


def evaluate_on(
    text: EvaluationText,
    models: Sequence[tuple[str, Path]],
    spec: EvalSpec,
    open_model: Callable[[Path], PreTrainedModel],
    progress: Progress | None = None,
) -> Evaluation:
    """``evaluate`` on a text at hand, with model directories resolved and a function that opens one.

    All that can be known from configs, headers and tokenizers is checked before the first model is opened.

    Raises:
        As ``evaluate``.
    """
    if not models:
        raise InputError(message("perplexity", "no model was given", "name at least one"))
    if spec.head_bits is not None and len(models) == 1:
        what = "the first model's head is not rounded, for the others are compared with it, and there is no other"
        raise InputError(message("head_bits", what, f"name the model twice: {models[0][0]} {models[0][0]}"))
    configs = [(name, open_config(path).get_text_config()) for name, path in models]
    length, rule = _sequence_length(spec.sequence_length, configs)
    sizes = [checkpoint_size(path) for _, path in models]
    tokens, special = _shared_tokens(text.text, models, configs)
    windows = plan_windows(len(tokens), length, spec.stride, spec.limit)

    loaded = [(name, open_model(path)) for name, path in models]
    heads = [] if spec.head_bits is None else [round_head(model, spec.head_bits) for _, model in loaded[1:]]
    scores = score_models(loaded, tokens, windows, batch_size=spec.batch_size, progress=progress)
    results = tuple(
        ModelScore(name, **asdict(score), size_bytes=size.file_bytes, bits_per_weight=size.bits_per_weight)
        for (name, _), score, size in zip(models, scores, sizes, strict=True)
    )
    protocol = {
        "text_source": text.source,
        "text_documents": text.num_documents,
        "text_sha256": text.sha256,
        "text_tokens": len(tokens),
        "token_sha256": hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest(),
        "special_tokens": "the tokenizer's own, added once to the whole text",
        "special_token_ids": special,
        "sequence_length": windows.length,
        "sequence_length_rule": rule,
        **_window_protocol(windows, len(tokens)),
        "limit": spec.limit,
        "batch_size": spec.batch_size,
        "kl": "KL(first model || model), mean over the scored tokens, in nats",
        "products": next(filter(None, (products_note(model.dtype, model.device) for _, model in loaded)), None),
        "head_bits": spec.head_bits,
        "heads": heads,
        "dtype": _one_or_all([str(model.dtype).removeprefix("torch.") for _, model in loaded]),
        "device": _one_or_all([str(model.device) for _, model in loaded]),
        "versions": versions(),
    }
    return Evaluation(results, protocol)


def render(evaluation: Evaluation, console: Console) -> None:
    """Print the results as a table and the protocol below it."""
    from rich.box import SIMPLE_HEAD
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model", overflow="fold")
    for heading in ("perplexity", "± stderr", "KL, nats", "top-1 ≠", "tokens/s", "size", "bits/w"):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, result in enumerate(evaluation.results):
        table.add_row(
            escape(result.model),
            f"{result.perplexity:.3f}" if result.perplexity < 1e5 else f"{result.perplexity:.4g}",
            "-" if result.stderr is None else f"{result.stderr:.3g}",
            "-" if index == 0 else f"{result.kl:.5f}",
            "-" if index == 0 else f"{result.top1_changed:.2%}",
            f"{result.tokens_per_second:,.0f}",
            decimal(result.size_bytes),
            f"{result.bits_per_weight:.2f}",
        )
    console.print(table)
    p = evaluation.protocol
    console.print(
        f"{p['tokens_scored']:,} tokens scored in {p['windows']} windows of {p['sequence_length']} "
        f"({p['sequence_length_rule']}), stride {p['stride']}; {p['tokens_dropped']:,} tokens after them left out.\n"
        f"Text {p['text_source']}, sha256 {p['text_sha256'][:12]}; special tokens {p['special_token_ids']}, "
        f"{p['special_tokens']}. {p['dtype']} on {p['device']}.",
        highlight=False,
        markup=False,
    )
    for result, head in zip(evaluation.results[1:], p["heads"], strict=False):
        console.print(f"{result.model}: {head}.", highlight=False, markup=False)
    if p["products"] is not None:
        console.print(f"Dense {p['products']}.", highlight=False, markup=False)


def update_cards(evaluation: Evaluation, paths: Sequence[Path]) -> list[Path]:
    """Put each model's line, beside the first's, into the cards that quantkit wrote; returns their directories."""
    first, p = evaluation.results[0], evaluation.protocol
    updated = []
    for index, (result, path) in enumerate(zip(evaluation.results, paths, strict=True)):
        if not is_quantkit_card(path):
            continue
        rows = [[first.model, f"{first.perplexity:.3f}", "", ""]] if index else []
        kl = [f"{result.kl:.5f}", f"{result.top1_changed:.2%}"] if index else ["", ""]
        rows.append([result.model, f"{result.perplexity:.3f}", *kl])
        table = markdown_table(["model", "perplexity", "KL divergence, nats", "top-1 changed"], rows)
        protocol = (
            f"{p['tokens_scored']:,} tokens of {p['text_source']} (sha256 {p['text_sha256'][:12]}) in {p['windows']} "
            f"windows of {p['sequence_length']}, stride {p['stride']}; {p['dtype']} on {p['device']}."
        )
        update_card(path, "perplexity", f"{table}\n\n{protocol}")
        updated.append(path)
    return updated


def _sequence_length(asked: int | None, configs: Sequence[tuple[str, Any]]) -> tuple[int, str]:
    """The window's length, and why it is that."""
    smallest, name = smallest_limit(configs)
    if asked is None:
        if smallest is None or smallest >= DEFAULT_LENGTH:
            return DEFAULT_LENGTH, "the default"
        return smallest, f"the limit of {name}, below the default of {DEFAULT_LENGTH}"
    if smallest is not None:
        check_limit(asked, name, smallest)
    return asked, "as asked"


def smallest_limit(configs: Sequence[tuple[str, Any]]) -> tuple[int | None, str]:
    """The fewest positions that a model has, and that model's name; None where no config names a limit."""
    limits = [(limit, name) for name, config in configs if (limit := getattr(config, "max_position_embeddings", None))]
    return min(limits, default=(None, ""))


def check_limit(asked: int, name: str, limit: int) -> None:
    """A model has positions for a window.

    Raises:
        InputError: it has not.
    """
    if asked > limit:
        what = f"sequence_length={asked} is more than its max_position_embeddings={limit}"
        raise InputError(message(name, what, f"use {limit} or less"))


def check_vocabulary(name: str, largest: int, config: Any) -> None:
    """A model has an embedding for every id that its tokenizer gave.

    Raises:
        CheckpointError: it has not.
    """
    if largest >= config.vocab_size:
        what = f"its tokenizer gives the id {largest}, its vocabulary has {config.vocab_size}"
        raise CheckpointError(message(name, what, "use the model's own tokenizer"))


def _shared_tokens(
    text: str, models: Sequence[tuple[str, Path]], configs: Sequence[tuple[str, Any]]
) -> tuple[Tensor, list[int]]:
    """The ids that all tokenizers give for the text, int64 [tokens], and the special ones they add."""
    first, special = _tokenize(text, *models[0])
    for name, path in models[1:]:
        other, _ = _tokenize(text, name, path)
        if not torch.equal(other, first):
            shorter = min(len(first), len(other))
            differ = (first[:shorter] != other[:shorter]).nonzero()
            where = int(differ[0]) if len(differ) else shorter
            raise InputError(
                message(
                    name,
                    f"its tokenizer disagrees with that of {models[0][0]} from token {where} on",
                    "models compare on the same tokens only; evaluate this one by itself",
                )
            )
    for name, config in configs:
        check_vocabulary(name, int(first.max()) if len(first) else -1, config)
    return first, special


def _tokenize(text: str, name: str, path: Path) -> tuple[Tensor, list[int]]:
    """Ids of the text, int64 [tokens], with the special tokens that the tokenizer adds; and those alone."""
    tokenizer = open_tokenizer(path)
    ids = tokenizer(text, verbose=False)["input_ids"]
    special = list(tokenizer("", verbose=False)["input_ids"])
    if special and len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id == special[0]:
        raise CalibrationError(
            message(
                "perplexity",
                f"the text begins with {tokenizer.bos_token!r}, which the tokenizer of {name} adds by itself",
                "remove it from the text",
            )
        )
    return torch.tensor(ids, dtype=torch.int64), special


def _window_protocol(windows: Windows, num_tokens: int) -> dict[str, Any]:
    later = "tokens 2 to the last" if windows.stride == windows.length else f"the last {windows.scored(1)} tokens"
    return {
        "stride": windows.stride,
        "windows": windows.count,
        "scored": f"tokens 2 to the last of the first window, {later} of each later one",
        "tokens_scored": windows.num_scored,
        "tokens_dropped": num_tokens - windows.end,
    }


def _one_or_all(values: Sequence[str]) -> str:
    """The value if it is one for all models, else one for each, in their order."""
    return values[0] if len(set(values)) == 1 else ", ".join(values)
