"""Policies on the Hugging Face hub."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, snapshot_download

from sd_gym.policy.card import FILE, FILES


def download(name: str, revision: str | None) -> Path:
    """The folder of a local copy of a policy on the hub; ``FileNotFoundError`` if the download fails."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no folder {name!r}; expected one with {FILE}, or the id of a repository on the hub")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES)))
    except Exception as error:  # the hub raises many kinds of errors
        raise FileNotFoundError(
            f"no folder {name!r}, and the download from the Hugging Face hub failed ({type(error).__name__}); without "
            "network, pass the path of a local copy"
        ) from error


def upload(save: Callable[[str], None], repository: str, *, private: bool, token: str | None) -> str:
    """Upload the files that ``save`` writes into a folder to a model repository; returns the URL of the commit."""
    api = HfApi(token=token)
    api.create_repo(repository, private=private, exist_ok=True)
    with TemporaryDirectory() as folder:
        save(folder)
        return api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=list(FILES)).commit_url
