"""How a run is shown: a live display on a terminal, plain lines elsewhere, JSON lines for machines."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from quantkit.errors import OutputError, message
from quantkit.report import BlockRecord, BlockTuned, Event, LayerDone, LayerRecord, Note, Observer, Stage, Step


@contextmanager
def shown(console: Console, log_json: Path | None) -> Iterator[Observer]:
    """An observer that shows a run on ``console`` and, where asked, logs it to a file.

    Raises:
        OutputError: the log cannot be written.
    """
    with ExitStack() as stack:
        display: Observer = stack.enter_context(_Live(console)) if console.is_terminal else _Plain(console)
        log = stack.enter_context(_opened(log_json)) if log_json is not None else None

        def observe(event: Event) -> None:
            display(event)
            if log is not None:
                log.write(json.dumps(_as_dict(event)) + "\n")
                log.flush()

        yield observe


def layer_line(record: LayerRecord) -> str:
    """One solved layer in one line."""
    error = "" if record.relative_error is None else f"  error {record.relative_error:.2%}"
    sqnr = "" if record.sqnr_db is None else f"  SQNR {record.sqnr_db:.1f} dB"
    notes = "".join(f"  ({note})" for note in record.notes)
    return (
        f"{record.name}  {record.method} {record.scheme}  loss {record.loss:.3g}{error}{sqnr}  {record.seconds:.2f} s"
        f"{notes}"
    )


def block_line(record: BlockRecord) -> str:
    """One tuned block in one line."""
    kept = (
        f"kept step {record.kept_step} of {record.steps}" if record.kept_step else "nothing was better: kept as it was"
    )
    return (
        f"{record.name}  {record.method} of {record.layers} layers  output error {record.error_before:.3%} -> "
        f"{record.error_after:.3%} on {record.held_out} held-out samples, {kept}  {record.seconds:.1f} s"
    )


def duration(seconds: float) -> str:
    """Seconds as ``42s``, ``3m05s`` or ``2h07m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class _Plain:
    """A line an event, with elapsed and remaining time."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._begun = self._stage_begun = time.monotonic()
        self._title, self._steps, self._done = "", 0, 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Stage):
            self._title, self._steps, self._done = event.title, event.steps, 0
            self._stage_begun = time.monotonic()
            self._say(event.title)
        elif isinstance(event, Step):
            self._done += 1
            self._say(f"{self._title}: {event.title}{self._remaining()}")
        elif isinstance(event, LayerDone):
            found = " (already done)" if event.resumed else ""
            self._say(f"  [{event.done}/{event.total}] {layer_line(event.record)}{found}")
        elif isinstance(event, BlockTuned):
            found = " (already done)" if event.resumed else ""
            self._say(f"  {block_line(event.record)}{found}")
        else:
            self._say(f"note: {event.text}")

    def _remaining(self) -> str:
        left = self._steps - self._done
        if left <= 0:
            return ""
        return f", about {duration((time.monotonic() - self._stage_begun) / self._done * left)} left"

    def _say(self, text: str) -> None:
        elapsed = duration(time.monotonic() - self._begun)
        self._console.print(f"[{elapsed}] {text}", markup=False, highlight=False, soft_wrap=True)


class _Live:
    """A progress bar at the foot of the terminal, with the layers scrolling above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> _Live:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Stage):
            self._task = self._progress.add_task(escape(event.title), total=event.steps)
        elif isinstance(event, Step) and self._task is not None:
            self._progress.update(self._task, advance=1)
        elif isinstance(event, LayerDone):
            self._console.print(escape(layer_line(event.record)), highlight=False)
        elif isinstance(event, BlockTuned):
            self._console.print(escape(block_line(event.record)), highlight=False)
        elif isinstance(event, Note):
            self._console.print(f"[yellow]note:[/] {escape(event.text)}", highlight=False)


def _as_dict(event: Event) -> dict[str, object]:
    return {"event": type(event).__name__.lower(), "time": time.time(), **asdict(event)}


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        handle = path.open("a", encoding="utf-8")
    except OSError as error:
        raise OutputError(message(str(path), f"cannot be written ({error})", "choose another --log-json")) from error
    with handle:
        yield handle
