"""The working directory: refusals that lose nothing, identity, whole shards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantkit.errors import OutputError
from quantkit.report import LayerRecord
from quantkit.staging import Staging, check_output, partial_path

RECORD = LayerRecord("a", "rtn", "w4a16_g32_sym", (2, 3), 0.1, None, 1.0, 0, 0.5, "ff", ("why", "more"))


def test_write_records_resume_publish(tmp_path: Path) -> None:
    out = tmp_path / "out"
    staging = Staging(out, 2, {"a": 1}, resume=False)
    staging.write(0, {"x": torch.ones(2)}, [RECORD])
    (staging.path / "junk.part").write_text("half")
    again = Staging(out, 2, {"a": 1}, resume=True)
    assert [again.is_done(0), again.is_done(1), again.num_done()] == [True, False, 1]
    assert again.records(0) == [RECORD]
    assert not (staging.path / "junk.part").exists()
    again.write(1, {"y": torch.ones(2)}, [])
    again.publish()
    assert sorted(p.name for p in out.iterdir()) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert not partial_path(out).exists()


def test_not_resumed_starts_afresh(tmp_path: Path) -> None:
    Staging(tmp_path / "out", 1, {}, resume=False).write(0, {"x": torch.ones(2)}, [])
    assert Staging(tmp_path / "out", 1, {}, resume=False).num_done() == 0


def test_another_identity(tmp_path: Path) -> None:
    Staging(tmp_path / "out", 1, {"a": 1, "b": [1, 2]}, resume=False)
    with pytest.raises(OutputError, match=r"another run \(b, c changed\)"):
        Staging(tmp_path / "out", 1, {"a": 1, "b": [2], "c": 0}, resume=True)


def test_publish_replaces_and_survives_a_stale_copy(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    (tmp_path / "out.old").mkdir()
    Staging(out, 1, {}, resume=False).publish()
    assert list(out.iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_check_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    check_output(out, overwrite=False, resume=False)
    out.mkdir()
    check_output(out, overwrite=False, resume=False)  # an empty directory is as good as none
    (out / "x").write_text("")
    with pytest.raises(OutputError, match="is not empty"):
        check_output(out, overwrite=False, resume=True)
    check_output(out, overwrite=True, resume=False)
    with pytest.raises(OutputError, match="is a file"):
        check_output(out / "x", overwrite=True, resume=False)
    partial_path(tmp_path / "new").mkdir()
    with pytest.raises(OutputError, match=r"an interrupted run is there; --resume continues it"):
        check_output(tmp_path / "new", overwrite=False, resume=False)
    with pytest.raises(OutputError, match=r"an interrupted run is there; start afresh with --overwrite"):
        check_output(tmp_path / "new", overwrite=False, resume=False, resumable=False)
    check_output(tmp_path / "new", overwrite=False, resume=True)
