"""Evaluate model directories on documents by the definitions of lm-evaluation-harness; see :mod:`quantkit.rolling`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import InputError, message
from quantkit.evaluation import DEFAULT_LENGTH, check_limit, check_vocabulary, checkpoint_size, smallest_limit
from quantkit.loader import load
from quantkit.model_config import open_config
from quantkit.perplexity import Progress
from quantkit.report import versions
from quantkit.rolling import Document, RollingScore, score_documents
from quantkit.source import open_tokenizer, resolve_model
from quantkit.text import evaluation_documents

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class DocumentScore:
    """One model's line: :class:`quantkit.rolling.RollingScore`, and what the model weighs."""

    model: str
    word_perplexity: float
    byte_perplexity: float
    bits_per_byte: float
    log_likelihood: float
    num_tokens: int
    size_bytes: int
    bits_per_weight: float


@dataclass(frozen=True, slots=True)
class DocumentEvaluation:
    """Results, in the order of the models, and the protocol under which they compare.

    Attributes:
        results: one line a model.
        protocol: plain JSON values.
    """

    results: tuple[DocumentScore, ...]
    protocol: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """``{"results": [...], "protocol": {...}}``, of plain JSON values."""
        return {"results": [asdict(result) for result in self.results], "protocol": self.protocol}


def evaluate_documents(
    models: Sequence[str],
    data: str = "builtin",
    *,
    column: str | None = None,
    sequence_length: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> DocumentEvaluation:
    """Word and byte perplexity of models, one after another; tokenizers may differ.

    Args:
        models: local directories, hub ids or ``builtin``.
        data: text source; its evaluation split where it has splits. A .txt file is one document.
        column: column of a table that holds the text.
        sequence_length: tokens of input at a time; None: the smallest of the models' own limits, 2048 without any.
        limit: at most this many documents; None: all.
        device: as ``quantkit.load`` takes it.
        dtype: as ``quantkit.load`` takes it.
        progress: called after every document, for each model anew.

    Raises:
        InputError: nothing to evaluate, a length or limit out of range, a tokenizer without a token to begin with.
        CalibrationError: text that is missing.
        CheckpointError: a model that cannot be opened, NaN or inf logits.
    """
    if not models:
        raise InputError(message("perplexity", "no model was given", "name at least one"))
    if limit is not None and limit < 1:
        raise InputError(message("perplexity", f"limit={limit} is no document at all", "use 1 or more, or no limit"))
    named = [(name, resolve_model(name)) for name in models]
    length = _length(sequence_length, named)
    text = evaluation_documents(data, column=column, limit=limit)
    results = []
    for name, path in named:
        prefix, documents = _documents(text.documents, name, path)
        model = load(path, device=device, dtype=dtype)
        score = score_documents(name, model, documents, prefix=prefix, length=length, progress=progress)
        size = checkpoint_size(path)
        results.append(_line(name, score, size.file_bytes, size.bits_per_weight))
        used = {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device)}
        del model
    protocol = {
        "protocol": "lm-eval",
        "definition": "rolling log-likelihood of each document; words by white space, bytes of UTF-8",
        "text_source": text.source,
        "text_documents": len(text.documents),
        "text_sha256": text.sha256,
        "sequence_length": length,
        "limit": limit,
        **used,
        "versions": versions(),
    }
    return DocumentEvaluation(tuple(results), protocol)


def render_documents(evaluation: DocumentEvaluation, console: Console) -> None:
    """Print the results as a table and the protocol below it."""
    from rich.box import SIMPLE_HEAD
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model", overflow="fold")
    for heading in ("word perplexity", "byte perplexity", "bits/byte", "size", "bits/w"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in evaluation.results:
        per_word = result.word_perplexity
        table.add_row(
            escape(result.model),
            f"{per_word:.3f}" if per_word < 1e5 else f"{per_word:.4g}",
            f"{result.byte_perplexity:.4f}",
            f"{result.bits_per_byte:.4f}",
            decimal(result.size_bytes),
            f"{result.bits_per_weight:.2f}",
        )
    console.print(table)
    p = evaluation.protocol
    console.print(
        f"{p['text_documents']:,} documents of {p['text_source']}, sha256 {p['text_sha256'][:12]}: {p['definition']}; "
        f"at most {p['sequence_length']} tokens at a time. {p['dtype']} on {p['device']}.",
        highlight=False,
        markup=False,
    )


def _line(name: str, score: RollingScore, size: int, bits: float) -> DocumentScore:
    return DocumentScore(name, **asdict(score), size_bytes=size, bits_per_weight=bits)


def _length(asked: int | None, models: Sequence[tuple[str, Path]]) -> int:
    smallest, name = smallest_limit([(name, open_config(path).get_text_config()) for name, path in models])
    if asked is None:
        return DEFAULT_LENGTH if smallest is None else int(smallest)
    if asked < 1:
        raise InputError(message("perplexity", f"sequence_length={asked} is no token at all", "use 1 or more"))
    if smallest is not None:
        check_limit(asked, name, smallest)
    return asked


def _documents(texts: Sequence[str], name: str, path: Path) -> tuple[int, list[Document]]:
    """The prefix token, and the documents in a model's tokens; what begins with the prefix gets no special tokens."""
    tokenizer = open_tokenizer(path)
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if not isinstance(prefix, int):
        what = "its tokenizer has neither a token for the beginning nor one for the end"
        raise InputError(message(name, what, "use the default protocol"))
    begins = str(tokenizer.decode([prefix]))
    encode = tokenizer.encode
    found = [
        Document.of(text, encode(text, add_special_tokens=not text.startswith(begins), verbose=False)) for text in texts
    ]
    largest = max((max(document.tokens) for document in found if document.tokens), default=-1)
    check_vocabulary(name, largest, open_config(path).get_text_config())
    return prefix, found
