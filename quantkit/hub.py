"""A finished directory goes to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from quantkit.errors import OutputError, first_line, message

_OPTION = "--push-to-hub"


class HubApi(Protocol):
    """What is used of huggingface_hub.HfApi."""

    def create_repo(self, repo_id: str, *, exist_ok: bool) -> Any:
        """Make a repository."""
        ...

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        """Upload a directory in one commit."""
        ...


def check_push(repo: str) -> None:
    """Everything about a push that can be known before any work.

    Raises:
        OutputError: not a repository's name, no network by HF_HUB_OFFLINE, or no token.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise OutputError(message(_OPTION, f"{repo!r} is no repository's name", "write USER/NAME")) from error
    if constants.HF_HUB_OFFLINE:
        raise OutputError(message(_OPTION, "HF_HUB_OFFLINE is set", "unset it, or leave the option out"))
    if get_token() is None:
        raise OutputError(message(_OPTION, "there is no token for the hub", "run hf auth login, or set HF_TOKEN"))


def push(path: Path, repo: str, api: HubApi | None = None) -> str:
    """Upload a directory that was verified.

    Args:
        path: the directory.
        repo: such as ``user/name``; made where it is not there yet.
        api: None: huggingface_hub's own.

    Returns:
        Where it is now.

    Raises:
        OutputError: the hub refuses or cannot be reached; the directory is whole and stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    bases: Any = HfHubHTTPError.__bases__  # the error of its HTTP client, of which there were two, and OSError
    hub: HubApi = HfApi() if api is None else api
    try:
        hub.create_repo(repo, exist_ok=True)
        return str(hub.upload_folder(repo_id=repo, folder_path=path, commit_message="Upload with quantkit"))
    except (*bases, ValueError) as error:
        reason = first_line(error)
        what = f"cannot be pushed to {repo} ({reason})"
        fix = f"the checkpoint is whole; try again with: hf upload {repo} {path}"
        raise OutputError(message(str(path), what, fix)) from error
