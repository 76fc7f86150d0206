"""What model, device and dtype names mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantkit.errors import CheckpointError, RecipeError
from quantkit.source import BUILTIN_PATH, open_tokenizer, resolve_device, resolve_dtype, resolve_model


def test_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model("builtin") == BUILTIN_PATH
    assert resolve_model(tmp_path) == tmp_path
    for name in ("./nowhere", "/nowhere", "a/b/c", "bad name", "~/nowhere-at-all"):
        with pytest.raises(CheckpointError, match="no such directory"):
            resolve_model(name)


def test_hub_snapshot_asks_for_no_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def snapshot_download(repo_id: str, **options: object) -> str:
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_model("org/name") == tmp_path
    assert asked["repo_id"] == "org/name"
    assert "*.safetensors" in asked["allow_patterns"]  # type: ignore[operator]
    assert "*.bin" in asked["ignore_patterns"]  # type: ignore[operator]


def test_hub_cache_is_used_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot in HF_HOME's layout is found without a network."""
    commit = "0" * 40
    repo = tmp_path / "models--org--name"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "snapshots" / commit / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert (resolve_model("org/name") / "config.json").read_text() == "{}"


def test_devices_and_dtypes() -> None:
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type in ("cpu", "cuda")
    for name in ("gpu", "cuda:99", "meta", "mps"):
        with pytest.raises(RecipeError):
            resolve_device(name)
    assert resolve_dtype("auto", torch.float16) == torch.float16
    assert resolve_dtype("bfloat16", torch.float16) == torch.bfloat16
    with pytest.raises(RecipeError, match="int8"):
        resolve_dtype("int8", torch.float16)


def test_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tokenizer cannot be opened"):
        open_tokenizer(tmp_path)
