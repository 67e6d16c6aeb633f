"""Uploads to the Hugging Face hub, only when asked for. The token is huggingface_hub's business and is never shown."""

from collections.abc import Callable
from pathlib import Path

from fasttune.errors import FasttuneError, RunFailed


def check(repo: str) -> None:
    """Before the work is done: the name, the network and the token. Raises FasttuneError with the remedy."""
    import httpx
    import huggingface_hub
    from huggingface_hub import errors, utils

    try:
        utils.validate_repo_id(repo)
        if repo.count("/") != 1:
            raise errors.HFValidationError
    except errors.HFValidationError:
        raise FasttuneError(f"--push-to-hub {repo}: write owner/name") from None
    try:
        huggingface_hub.HfApi().whoami()
    except (errors.LocalTokenNotFoundError, errors.HfHubHTTPError) as error:
        raise FasttuneError("--push-to-hub: the hub knows no valid token of yours: `hf auth login`") from error
    except (OSError, httpx.HTTPError) as error:  # no network, or HF_HUB_OFFLINE=1
        raise FasttuneError("--push-to-hub: the hub cannot be reached; merge without it and upload later") from error


def push(folder: Path, repo: str, note: Callable[[str], None]) -> str:
    """Upload a folder and return its address. A new repository is private. Raises RunFailed; the folder stays."""
    import httpx
    import huggingface_hub

    note(f"uploading {folder} to {repo} (private, if it is new) …")
    api = huggingface_hub.HfApi()
    try:
        url = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(folder_path=str(folder), repo_id=repo, commit_message="Upload from fasttune merge")
    except (OSError, ValueError, httpx.HTTPError) as error:
        why = " ".join(str(error).split())[:200]
        raise RunFailed(f"--push-to-hub: {repo} was not uploaded: {why}; the model is in {folder}") from error
    return str(url)
