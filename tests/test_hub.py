"""--push-to-hub: checked before any work, done after the verification, and a hub that cannot be reached is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import quantkit
from quantkit import hub, verify
from quantkit.cli import app


class StandIn:
    """A hub that takes down what it is asked."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.error = error

    def create_repo(self, repo_id: str, *, exist_ok: bool) -> None:
        self.calls.append(("create_repo", (repo_id, exist_ok)))

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> str:  # noqa: ARG002
        if self.error is not None:
            raise self.error
        self.calls.append(("upload_folder", (repo_id, sorted(p.name for p in folder_path.iterdir()))))
        return f"https://hub/{repo_id}"


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")


def run(tmp_path: Path, repo: str) -> Any:
    arguments = ["quantize", "builtin", "--output", str(tmp_path / "out"), "--method", "rtn", "--scheme", "w8a16"]
    return CliRunner().invoke(app, [*arguments, "--push-to-hub", repo])


def test_the_verified_directory_is_pushed(tmp_path: Path, online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = StandIn()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: stand_in)
    done = run(tmp_path, "me/small")
    assert done.exit_code == 0, done.output
    assert done.output.endswith("pushed to https://hub/me/small\n")
    assert [name for name, _ in stand_in.calls] == ["create_repo", "upload_folder"]
    assert {"README.md", "config.json", "report.json", "model.safetensors.index.json"} <= set(stand_in.calls[1][1][1])


def test_nothing_is_pushed_that_was_not_verified(tmp_path: Path, online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = StandIn()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: stand_in)

    def refuse(*_: object) -> None:
        raise quantkit.CheckpointError("differs")

    monkeypatch.setattr(verify, "_verify_rest", refuse)
    done = run(tmp_path, "me/small")
    assert isinstance(done.exception, quantkit.CheckpointError)
    assert stand_in.calls == []
    assert not (tmp_path / "out").exists()


def test_a_hub_that_cannot_be_reached_leaves_the_directory(tmp_path: Path, online: None) -> None:
    stand_in = StandIn(ConnectionError("Name or service not known\nmore"))
    (tmp_path / "out").mkdir()
    with pytest.raises(quantkit.OutputError) as caught:
        hub.push(tmp_path / "out", "me/small", stand_in)
    assert str(caught.value) == (
        f"{tmp_path / 'out'}: cannot be pushed to me/small (Name or service not known); "
        f"the checkpoint is whole; try again with: hf upload me/small {tmp_path / 'out'}"
    )


def test_no_network_is_one_line(tmp_path: Path, online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub's own client against an address where nobody listens."""
    from huggingface_hub import HfApi

    (tmp_path / "out").mkdir()
    with pytest.raises(quantkit.OutputError, match=r"^[^\n]*cannot be pushed to me/small[^\n]*$"):
        hub.push(tmp_path / "out", "me/small", HfApi(endpoint="http://127.0.0.1:9"))


@pytest.mark.parametrize(
    ("repo", "offline", "token", "text"),
    [
        ("a/b/c", False, "x", "no repository's name"),
        ("me/small", True, "x", "HF_HUB_OFFLINE is set"),
        ("me/small", False, None, "there is no token"),
    ],
)
def test_what_can_be_known_before_any_work(
    repo: str, offline: bool, token: str | None, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    done = run(tmp_path, repo)
    assert isinstance(done.exception, quantkit.OutputError)
    assert text in str(done.exception)
    assert list(tmp_path.iterdir()) == []
