"""Plots: written for what there is, and refused in words where they cannot be."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import quantkit
from quantkit.errors import InputError, OutputError
from quantkit.inspection import inspect
from quantkit.plots import check_plots, write_plots


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.plots.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install 'quantkit\[plots\]'"):
        check_plots(tmp_path)


def test_a_file_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.plots.find_spec", lambda _: sys)
    (tmp_path / "x").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        check_plots(tmp_path / "x")


def test_files(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    pytest.importorskip("matplotlib")
    quantkit.quantize(tiny("llama"), tmp_path / "q", recipe={"scheme": "w8a16", "method": "rtn"})
    written = write_plots(inspect(tmp_path / "q"), tmp_path / "plots")
    assert [path.name for path in written] == ["code-entropy.png", "clipped-codes.png"]
    assert [path.name for path in write_plots(inspect(tiny("gpt2")), tmp_path / "more")] == ["weight-outliers.png"]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")
