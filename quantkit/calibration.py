"""Calibration samples: text becomes token ids, drawn with a seed of their own and hashed.

How a sample is drawn, so that the same specification, text and tokenizer give the same tokens everywhere:

1. The files of the source are put in a seeded order and read in turn, a document from each, at most
   ``FILES_AT_A_TIME`` open at once, until the pool holds ``POOL_CHARACTERS`` characters, or 32 for each token
   asked for if that is more. The rest of a large source is never read. Documents of white space are left out.
2. The pool is shuffled, and its documents tokenized one at a time with the tokenizer's own special tokens.
3. ``pack``: they are concatenated until there are ``WINDOW_POOL`` times as many tokens as asked for, or all;
   the stream is cut into windows of the sequence length, and ``num_samples`` of them are drawn without
   replacement. To bound the memory, a document of more than ``PIECE_CHARACTERS`` is cut after a line end into
   pieces that count as documents.
   ``truncate``: one document is one sample: its first tokens, fewer if it is shorter, never padded. Only the
   first 32 characters for each token of the sequence length are looked at; documents of fewer than 2 tokens
   are skipped.

The order comes from ``random.Random(seed).random()``, which Python keeps the same in all versions; no global
generator is read or written.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TextIO, TypeVar

import torch
from torch import Tensor

from quantkit.documents import ChatTemplate, Cut
from quantkit.errors import CalibrationError, message
from quantkit.text import open_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_T = TypeVar("_T")

POOL_CHARACTERS = 1 << 24
PIECE_CHARACTERS = 1 << 18
FILES_AT_A_TIME = 32
WINDOW_POOL = 2
# English has four to five characters a token; text with more than this is not text.
_CHARACTERS_PER_TOKEN = 32
_MIN_TOKENS = 2  # a model predicts nothing from one token
_PACKINGS = ("pack", "truncate")
_SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
_TOKEN_DTYPES = (*_SIGNED, torch.uint8, torch.uint16, torch.uint32)


@dataclass(frozen=True, slots=True)
class CalibrationSpec:
    """What to calibrate on.

    Attributes:
        source: builtin, a path, or hf:NAME; see ``quantkit.text``.
        num_samples: how many samples, at least 1.
        sequence_length: tokens a sample, at least 2; with truncate the most that a sample has.
        packing: pack (windows of concatenated documents) or truncate (one document a sample).
        seed: of the draw, at least 0.
        column: the column of a table, where the source does not name it.
    Raises:
        CalibrationError: a value that is not allowed.
    """

    source: str = "builtin"
    num_samples: int = 128
    sequence_length: int = 2048
    packing: Literal["pack", "truncate"] = "pack"
    seed: int = 0
    column: str | None = None
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("sequence_length", _MIN_TOKENS), ("seed", 0)):
            value: object = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                fix = f"give an integer of at least {least}"
                raise CalibrationError(message("calibration", f"{name}={value!r}", fix))
        if self.packing not in _PACKINGS:
            fix = f"give one of {', '.join(_PACKINGS)}"
            raise CalibrationError(message("calibration", f"packing={self.packing!r}", fix))


@dataclass(frozen=True, slots=True, eq=False)
class CalibrationSet:
    """Samples to run the model on.

    Attributes:
        samples: int64 [length] each, on the CPU; lengths differ only with truncate or the user's own tokens.
        sha256: hex digest over the samples in order: the length, then the ids, each as int64 little-endian.
        source: where the text came from, in full.
        num_tokens: the lengths' sum.
        notes: what the user should know: documents that were skipped, a second BOS that was removed.
    """

    samples: tuple[Tensor, ...]
    sha256: str
    source: str
    num_tokens: int
    notes: tuple[str, ...] = ()


def calibration_samples(
    spec: CalibrationSpec, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int | None
) -> CalibrationSet:
    """Draw samples from a source; the module's docstring says how.

    A document that begins with two BOS tokens, because its chat template writes one and the tokenizer adds
    one, loses one of them, and a note counts such documents.

    Args:
        spec: what to draw.
        tokenizer: the model's own.
        vocab_size: rows of the model's embedding; None: ids are not checked.
    Raises:
        CalibrationError: a source that cannot be read, too few tokens or documents, an id that the model
            does not have.
    """
    order = random.Random(spec.seed)
    cut = _pieces if spec.packing == "pack" else _head(spec.sequence_length)
    template = chat_template_of(tokenizer)
    opened = open_source(spec.source, split="calibration", column=spec.column, chat_template=template, cut=cut)
    pool = _read_pool(opened.name, _shuffled(opened.streams, order), _pool_characters(spec))
    encoder = _Encoder(tokenizer, vocab_size, opened.name)
    encoded = map(encoder.encode, _shuffled(pool.documents, order))
    if spec.packing == "pack":
        samples, notes = _packed(spec, pool, encoded, order), encoder.notes()
    else:
        samples, skipped = _truncated(spec, pool, encoded)
        notes = encoder.notes() + _skipped_note(skipped)
    return _calibration_set(samples, opened.name, notes)


def from_tokens(
    samples: Iterable[Tensor | Sequence[int]],
    *,
    vocab_size: int | None = None,
    bos_token_id: int | None = None,
    source: str = "tokens",
) -> CalibrationSet:
    """The user's own tokens as a calibration set, in their order; the tensors are copied.

    Args:
        samples: integers [length], [1, length] or [batch, length] each, without padding; a batch is that many
            samples. A finite iterable.
        vocab_size: rows of the model's embedding; None: only negative ids are refused.
        bos_token_id: a sample that begins with two of these is refused; None: not checked.
        source: what the report is to call them.
    Raises:
        CalibrationError: no samples, an empty one, a wrong shape or dtype, an id that the model does not
            have, two BOS.
    """
    rows: list[Tensor] = []
    for number, sample in enumerate(samples, 1):
        where = f"{source}, sample {number}"
        for row in _rows(sample, where):
            _check_ids(row, vocab_size, where)
            if bos_token_id is not None and _doubled_bos(row, bos_token_id):
                what = f"begins with two BOS tokens ({bos_token_id})"
                raise CalibrationError(message(where, what, "tokenize with add_special_tokens=False"))
            rows.append(row)
    if not rows:
        raise CalibrationError(message(source, "no samples", "give at least one tensor of token ids"))
    return _calibration_set(tuple(rows), source, ())


def chat_template_of(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """The tokenizer's chat template as a function for ``quantkit.text``; None where it has none."""
    if not tokenizer.chat_template:
        return None

    def render(turns: list[dict[str, str]]) -> str:
        import jinja2

        try:
            return str(tokenizer.apply_chat_template(turns, tokenize=False))
        except jinja2.TemplateError as error:  # the template's own raise_exception, too
            raise ValueError(str(error)) from error

    return render


def _calibration_set(samples: tuple[Tensor, ...], source: str, notes: tuple[str, ...]) -> CalibrationSet:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(len(sample).to_bytes(8, "little"))
        digest.update(sample.numpy().astype("<i8").tobytes())
    return CalibrationSet(samples, digest.hexdigest(), source, sum(map(len, samples)), notes)


def _shuffled(items: Sequence[_T], order: random.Random) -> list[_T]:
    """A permutation from ``random()`` alone: Python promises that sequence, but not ``shuffle``'s."""
    return sorted(items, key=lambda _: order.random())


# Reading


@dataclass(frozen=True, slots=True)
class _Pool:
    source: str
    documents: list[str]
    extent: str  # for messages: how much of the source this is


def _pool_characters(spec: CalibrationSpec) -> int:
    return max(POOL_CHARACTERS, _CHARACTERS_PER_TOKEN * spec.num_samples * spec.sequence_length)


def _read_pool(source: str, streams: Sequence[Iterator[str]], limit: int) -> _Pool:
    documents: list[str] = []
    characters = 0
    for document in _in_turn(streams):
        if document.strip():
            documents.append(document)
            characters += len(document)
        if characters >= limit:
            return _Pool(source, documents, f"the first {characters} characters")
    if not documents:
        raise CalibrationError(message(source, "there is no text in it", "give a source that has some"))
    return _Pool(source, documents, "all of it")


def _in_turn(streams: Iterable[Iterator[str]]) -> Iterator[str]:
    """One document from each stream in turn, so that the pool is not the first file only."""
    waiting = iter(streams)
    reading = deque(islice(waiting, FILES_AT_A_TIME))
    while reading:
        stream = reading.popleft()
        document = next(stream, None)
        if document is not None:
            yield document
            reading.append(stream)
        elif (following := next(waiting, None)) is not None:
            reading.append(following)


def _pieces(document: TextIO) -> Iterator[str]:
    """Cut a long document after the first line end beyond the limit, or at twice the limit."""
    while piece := document.read(PIECE_CHARACTERS) + document.readline(PIECE_CHARACTERS):
        yield piece


def _head(sequence_length: int) -> Cut:
    return lambda document: iter([document.read(_CHARACTERS_PER_TOKEN * sequence_length)])


# Tokens


@dataclass(slots=True)
class _Encoder:
    """Text -> int64 [length], and what had to be mended on the way."""

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int | None
    source: str
    mended: int = field(default=0, init=False)

    def encode(self, text: str) -> Tensor:
        encoded = self.tokenizer(text, truncation=False, padding=False, verbose=False)
        ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
        bos = self.tokenizer.bos_token_id
        if isinstance(bos, int) and _doubled_bos(ids, bos):
            self.mended += 1
            ids = ids[1:]
        _check_ids(ids, self.vocab_size, self.source)
        return ids

    def notes(self) -> tuple[str, ...]:
        if not self.mended:
            return ()
        return (f"{self.mended} documents began with two BOS tokens; one was removed from each",)


def _doubled_bos(ids: Tensor, bos_token_id: int) -> bool:
    return ids[:2].tolist() == [bos_token_id, bos_token_id]


def _check_ids(ids: Tensor, vocab_size: int | None, where: str) -> None:
    if not len(ids):
        return
    least, most = int(ids.min()), int(ids.max())
    if least < 0:
        raise CalibrationError(message(where, f"token id {least}", "give ids of 0 and more, without padding"))
    if vocab_size is not None and most >= vocab_size:
        what = f"token id {most} is outside of the model's vocabulary of {vocab_size}"
        raise CalibrationError(message(where, what, "use the model's own tokenizer"))


def _packed(spec: CalibrationSpec, pool: _Pool, encoded: Iterable[Tensor], order: random.Random) -> tuple[Tensor, ...]:
    wanted = WINDOW_POOL * spec.num_samples * spec.sequence_length
    parts: list[Tensor] = []
    total = 0
    for ids in encoded:
        parts.append(ids)
        total += len(ids)
        if total >= wanted:
            break
    length = spec.sequence_length
    windows = torch.cat(parts)[: total // length * length].reshape(-1, length)
    if len(windows) < spec.num_samples:
        raise _too_few_tokens(spec, pool, total)
    drawn = _shuffled(range(len(windows)), order)[: spec.num_samples]
    return tuple(windows[index].clone() for index in drawn)


def _too_few_tokens(spec: CalibrationSpec, pool: _Pool, total: int) -> CalibrationError:
    what = (
        f"{total} tokens ({pool.extent}), {spec.num_samples * spec.sequence_length} are needed for "
        f"{spec.num_samples} samples of {spec.sequence_length}"
    )
    fixes = ["give more text"]
    if samples := total // spec.sequence_length:
        fixes.append(f"--num-samples {samples}")
    if (length := total // spec.num_samples) >= _MIN_TOKENS:
        fixes.append(f"--sequence-length {length}")
    return CalibrationError(message(pool.source, what, ", or ".join(fixes)))


def _truncated(spec: CalibrationSpec, pool: _Pool, encoded: Iterable[Tensor]) -> tuple[tuple[Tensor, ...], int]:
    samples: list[Tensor] = []
    skipped = 0
    for ids in encoded:
        if len(ids) < _MIN_TOKENS:
            skipped += 1
            continue
        samples.append(ids[: spec.sequence_length].clone())
        if len(samples) == spec.num_samples:
            return tuple(samples), skipped
    what = (
        f"{len(samples)} documents of at least {_MIN_TOKENS} tokens ({pool.extent}), "
        f"{spec.num_samples} are needed for as many truncated samples"
    )
    fixes = ["give more documents", "packing pack"]
    if samples:
        fixes.append(f"--num-samples {len(samples)}")
    raise CalibrationError(message(pool.source, what, ", or ".join(fixes)))


def _skipped_note(skipped: int) -> tuple[str, ...]:
    return (f"{skipped} documents of fewer than {_MIN_TOKENS} tokens were skipped",) if skipped else ()


def _rows(sample: Tensor | Sequence[int], where: str) -> tuple[Tensor, ...]:
    """The sample's rows, each a copy of int64 [length] on the CPU."""
    fix = "give integers of shape [length] or [batch, length]"
    try:
        tokens = torch.as_tensor(sample)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(message(where, f"not a tensor of token ids ({error})", fix)) from error
    if tokens.dtype not in _TOKEN_DTYPES or tokens.dim() not in (1, 2) or not tokens.numel():
        what = f"{tokens.dtype} of shape {list(tokens.shape)}"
        raise CalibrationError(message(where, what, fix))
    return tuple(row.to("cpu", torch.int64, copy=True) for row in tokens.detach().reshape(-1, tokens.shape[-1]))
