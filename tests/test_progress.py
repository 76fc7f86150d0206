"""How a run is shown: plain lines, a terminal, JSON lines."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from quantkit.errors import OutputError
from quantkit.progress import duration, shown
from quantkit.report import Event, LayerDone, LayerRecord, Note, Stage, Step

RECORD = LayerRecord("model.layers.0.fc[1]", "gptq", "w4a16_g32_sym", (8, 64), 0.5, 0.0123, 20.5, 100, 1.5, "00")
EVENTS: list[Event] = [
    Note("2 of 3 [shards]"),
    Stage("quantizing", 2),
    LayerDone(RECORD, 1, 2),
    Step("block 1/2"),
    LayerDone(RECORD, 2, 2, resumed=True),
    Step("block 2/2"),
]


def show(terminal: bool, log: Path | None = None) -> str:
    page = io.StringIO()
    console = Console(file=page, force_terminal=terminal, width=150, color_system=None)
    with shown(console, log) as observer:
        for event in EVENTS:
            observer(event)
    return page.getvalue()


def test_plain_lines() -> None:
    lines = show(False).splitlines()
    assert len(lines) == len(EVENTS)
    assert all(line.startswith("[0s] ") for line in lines)
    assert lines[0].endswith("note: 2 of 3 [shards]")
    assert lines[2].endswith(
        "[1/2] model.layers.0.fc[1]  gptq w4a16_g32_sym  loss 0.5  error 1.23%  SQNR 20.5 dB  1.50 s"
    )
    assert "block 1/2, about 0s left" in lines[3]
    assert lines[4].endswith("(already done)")
    assert lines[5].endswith("block 2/2")


def test_what_the_solver_had_to_do_is_shown() -> None:
    page = io.StringIO()
    with shown(Console(file=page, force_terminal=False, width=150), None) as observer:
        observer(LayerDone(replace(RECORD, notes=("damp_percent 0.1",)), 1, 2))
    assert page.getvalue().rstrip().endswith("1.50 s  (damp_percent 0.1)")


def test_terminal() -> None:
    text = show(True)
    assert "model.layers.0.fc[1]" in text
    assert "2 of 3 [shards]" in text
    assert "2/2" in text


def test_json_lines(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    show(False, log)
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [e["event"] for e in events] == ["note", "stage", "layerdone", "step", "layerdone", "step"]
    assert events[2]["record"]["relative_error"] == 0.0123
    with pytest.raises(OutputError, match="cannot be written"):
        show(False, tmp_path / "no" / "log")


def test_durations() -> None:
    assert [duration(s) for s in (0, 59, 60, 185, 3600, 7620)] == ["0s", "59s", "1m00s", "3m05s", "1h00m", "2h07m"]
