"""Where calibration and evaluation text comes from: one way to open a source, whatever it is.

    builtin                               the text that every Python installation carries
    PATH[:COLUMN]                         a .txt, .jsonl, .json or .parquet file, or a directory of them
    hf:NAME[/CONFIG][:SPLIT[:COLUMN]]     a dataset of the Hugging Face hub, or a local dataset directory

A source is a tuple of lazy streams of documents, one per file, so that nothing is read before it is asked
for and a caller that stops early leaves the rest on the disk or the hub:

- A .txt file is one document, as it is (UTF-8; a byte order mark is dropped).
- .jsonl holds one object a line; .json an array of objects (read whole, so at most 2**30 characters), or
  one object a line. Parquet is read by batches of rows.
- A directory is read recursively, in the order of its sorted paths; hidden files and other suffixes are
  left out.
- The column is named, or guessed only when exactly one holds text. Text is a string, or a chat, i.e. a list
  of {"role": ..., "content": ...}, which goes through the tokenizer's chat template. A null is an empty
  document.
- ``hf:ORG/NAME/CONFIG`` has one reading. ``hf:A/B`` is tried as the dataset B of the organisation A, and,
  when neither the hub nor its local cache has that, as the config B of the dataset A; ``TextSource.name``
  tells which one it was. A NAME that begins with ``.``, ``/`` or ``~`` is a local directory. Without a
  SPLIT, calibration reads train, and evaluation reads test, or validation where there is no test.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

from quantkit.documents import SUFFIXES, ChatTemplate, Cut, Record, cut_each, documents_of, read_file, whole
from quantkit.errors import CalibrationError, message

Split: TypeAlias = Literal["calibration", "evaluation"]

HUB_PREFIX = "hf:"
# The hub splits that serve a purpose when none is named, the preferred one first.
HUB_SPLITS: dict[Split, tuple[str, ...]] = {"calibration": ("train",), "evaluation": ("test", "validation")}
_WHAT_TO_GIVE = f"give builtin, {HUB_PREFIX}NAME, or an existing {', '.join(SUFFIXES)} file or directory of them"


@dataclass(frozen=True, slots=True)
class TextSource:
    """An opened source.

    Attributes:
        name: the source as it was given; for ``hf:`` with the dataset, config and split that were chosen.
        streams: one lazy iterator of documents per file, in order; each can be read once, and raises
            CalibrationError where its file is malformed.
    """

    name: str
    streams: tuple[Iterator[str], ...]


@dataclass(frozen=True, slots=True)
class EvaluationText:
    """The whole text of a source.

    Attributes:
        text: the documents, empty ones too, joined with two newlines.
        sha256: hex digest of the text's UTF-8 bytes.
        source: ``TextSource.name``.
        num_documents: how many documents were joined.
    """

    text: str
    sha256: str
    source: str
    num_documents: int


def open_source(
    source: str,
    *,
    split: Split,
    column: str | None = None,
    chat_template: ChatTemplate | None = None,
    cut: Cut = whole,
) -> TextSource:
    """Open a source; the module's docstring says what it may be.

    Args:
        source: what the user typed.
        split: what the text is for; decides the half of ``builtin`` and the default split of ``hf:``.
        column: the column of a table, where the source does not name it.
        chat_template: turns a chat into text; None: chats are an error.
        cut: what is read of each document; a caller that wants only part of a huge file reads only that part.
    Raises:
        CalibrationError: nothing there, an unknown suffix, a hub that cannot be reached, an unknown split.
    """
    if source == "builtin":
        _refuse_column(source, column)
        return TextSource(source, (cut_each(_builtin(split), cut),))
    if source.startswith(HUB_PREFIX):
        return _open_hub(source, split, column, chat_template, cut)
    if not source:  # Path("") would be the current directory
        raise CalibrationError(message("calibration", "no source", _WHAT_TO_GIVE))
    try:
        path, column = _path_and_column(source, column)
        files = _files(path)
    except OSError as error:  # a name too long for a file, a directory that may not be listed
        raise CalibrationError(message(source[:80], f"cannot be opened ({error})", _WHAT_TO_GIVE)) from error
    if all(file.suffix.lower() == ".txt" for file in files):
        _refuse_column(source, column)
    streams = (read_file(file, column=column, chat_template=chat_template, cut=cut) for file in files)
    return TextSource(source, tuple(streams))


def evaluation_text(
    source: str, *, column: str | None = None, chat_template: ChatTemplate | None = None
) -> EvaluationText:
    """The whole evaluation text of a source as one string, in memory.

    Documents are joined with two newlines and empty ones are kept, as for the published perplexities on
    WikiText-2 (``"\\n\\n".join(dataset["text"])``). A single .txt file is taken as it is.

    Raises:
        CalibrationError: as ``open_source``; a malformed file; no text at all.
    """
    opened = open_source(source, split="evaluation", column=column, chat_template=chat_template)
    documents = list(chain.from_iterable(opened.streams))
    text = "\n\n".join(documents)
    if not text.strip():
        raise CalibrationError(message(opened.name, "there is no text in it", "give a source that has some"))
    return EvaluationText(text, hashlib.sha256(text.encode()).hexdigest(), opened.name, len(documents))


@dataclass(frozen=True, slots=True)
class EvaluationDocuments:
    """The documents of a source, one by one.

    Attributes:
        documents: as they are read, empty ones too.
        sha256: hex digest over each document's UTF-8 length in bytes (as digits and a colon) and bytes.
        source: ``TextSource.name``.
    """

    documents: tuple[str, ...]
    sha256: str
    source: str


def evaluation_documents(source: str, *, column: str | None = None, limit: int | None = None) -> EvaluationDocuments:
    """The first ``limit`` documents of a source's evaluation split, in memory; None: all.

    Raises:
        CalibrationError: as ``open_source``; a malformed file; no text at all.
    """
    opened = open_source(source, split="evaluation", column=column)
    documents = tuple(islice(chain.from_iterable(opened.streams), limit))
    if not any(document.strip() for document in documents):
        raise CalibrationError(message(opened.name, "there is no text in it", "give a source that has some"))
    sha = hashlib.sha256()
    for data in (document.encode() for document in documents):
        sha.update(b"%d:%s" % (len(data), data))
    return EvaluationDocuments(documents, sha.hexdigest(), opened.name)


def _builtin(split: Split) -> Iterator[str]:
    from quantkit.builtin_text import builtin_documents

    yield from builtin_documents(split)


def _refuse_column(source: str, column: str | None) -> None:
    if column is not None:
        what = f"column '{column}' of a source that has no columns"
        raise CalibrationError(message(source, what, "leave the column out"))


def _path_and_column(source: str, column: str | None) -> tuple[Path, str | None]:
    """Tell PATH:COLUMN from a path with a colon in it: what exists as it stands is a path."""
    path, _, in_source = source.rpartition(":")
    if Path(source).exists() or not path or not Path(path).exists():
        return Path(source), column
    return Path(path), _one_column(source, in_source, column)


def _one_column(source: str, in_source: str, given: str | None) -> str | None:
    if in_source and given and in_source != given:
        what = f"column '{in_source}' in the source, column '{given}' beside it"
        raise CalibrationError(message(source, what, "name one column"))
    return in_source or given


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return _directory_files(path)
    if not path.is_file():
        raise CalibrationError(message(str(path), "no such file or directory", _WHAT_TO_GIVE))
    if path.suffix.lower() not in SUFFIXES:
        what = f"'{path.suffix}' is not a kind of text file that can be read"
        raise CalibrationError(message(str(path), what, f"give one of {', '.join(SUFFIXES)}"))
    return [path]


def _directory_files(directory: Path) -> list[Path]:
    inside = sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    visible = [path for path in inside if not any(part.startswith(".") for part in path.parts)]
    chosen = [directory / path for path in visible if path.suffix.lower() in SUFFIXES]
    if not chosen:
        what = f"no text file in the directory ({len(visible)} files of other kinds)"
        raise CalibrationError(message(str(directory), what, f"give one with {', '.join(SUFFIXES)} files"))
    return chosen


@dataclass(frozen=True, slots=True)
class _HubSource:
    """What ``hf:...`` says: (dataset, config) as they are tried in turn; the split "" is the default."""

    readings: tuple[tuple[str, str | None], ...]
    split: str
    column: str | None


def _parse_hub(source: str, column: str | None) -> _HubSource:
    name, _, rest = source.removeprefix(HUB_PREFIX).partition(":")
    split, _, in_source = rest.partition(":")
    if not re.fullmatch(r"[\w.-]*", split):
        what = f"'{split}' is not the name of a split"
        raise CalibrationError(message(source, what, "name a whole split, such as train; slices are not read"))
    return _HubSource(_readings(source, name), split, _one_column(source, in_source, column))


def _readings(source: str, name: str) -> tuple[tuple[str, str | None], ...]:
    if name.startswith((".", "/", "~")):
        return ((str(Path(name).expanduser()), None),)
    match name.split("/"):
        case [dataset] if dataset:
            return ((dataset, None),)
        case [first, second] if first and second:
            return ((name, None), (first, second))
        case [organisation, dataset, config] if organisation and dataset and config:
            return ((f"{organisation}/{dataset}", config),)
    what = f"'{name}' is not the name of a dataset"
    raise CalibrationError(message(source, what, "write hf:NAME[/CONFIG][:SPLIT[:COLUMN]]"))


def _open_hub(
    source: str, purpose: Split, column: str | None, chat_template: ChatTemplate | None, cut: Cut
) -> TextSource:
    hub = _parse_hub(source, column)
    dataset, splits = _load_hub(source, hub)
    wanted = (hub.split,) if hub.split else HUB_SPLITS[purpose]
    split = next((name for name in wanted if name in splits), None)
    if split is None:
        what = f"no split {' or '.join(wanted)}"
        fix = f"name one of: {', '.join(splits)} (as in {HUB_PREFIX}{dataset}:SPLIT)"
        raise CalibrationError(message(source, what, fix))
    name = f"{HUB_PREFIX}{dataset}:{split}"
    rows = _hub_rows(splits[split], name)
    documents = documents_of(rows, name, column=hub.column, chat_template=chat_template)
    return TextSource(name, (cut_each(documents, cut),))


def _load_hub(source: str, hub: _HubSource) -> tuple[str, Any]:
    """The dataset with its config, and its splits by name; nothing is downloaded that is not read."""
    import datasets

    refusals = []
    for dataset, config in hub.readings:
        # Streaming reads no further than asked, but not from the hub's cache, which is all there is offline.
        streaming = Path(dataset).is_dir() or not datasets.config.HF_HUB_OFFLINE
        try:
            splits = datasets.load_dataset(dataset, config, streaming=streaming)
        except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
            refusals.append(str(error))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            fix = "give a dataset and config that datasets.load_dataset can open"
            raise CalibrationError(message(source, f"cannot be opened ({error})", fix)) from error
        else:
            return (dataset if config is None else f"{dataset}/{config}"), splits
    fix = "check the name and the network, or give a local file; offline, only cached datasets can be read"
    raise CalibrationError(message(source, "; ".join(refusals), fix))


def _hub_rows(rows: Any, name: str) -> Iterator[Record]:
    import datasets
    import pyarrow

    number = 0
    try:
        for number, row in enumerate(rows, 1):
            yield f"{name}, row {number}", row
    except (OSError, ValueError, datasets.exceptions.DatasetsError, pyarrow.ArrowException) as error:
        what = f"cannot be read ({error})"
        raise CalibrationError(
            message(f"{name}, after row {number}", what, "check the network and the data")
        ) from error
