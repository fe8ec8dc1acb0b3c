"""A folder as a repository of the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils._validators import validate_repo_id


def push(folder: str | Path, repository: str, *, private: bool = True) -> None:
    """Upload a folder to the Hugging Face hub in one commit; a repository that is not there is made, `private` or not.

    The account is the one that `hf auth login` left, or the variable HF_TOKEN. Raises ValueError for a name that cannot
    be a repository's, FileNotFoundError where there is no such folder.

    >>> from steer.checkpoints import push
    >>> push("edited", "someone/qwen3-shorter")
    Traceback (most recent call last):
        ...
    FileNotFoundError: edited is not a folder, so there is nothing to push.
    """
    check_repository(repository)
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is not a folder, so there is nothing to push.")
    hub = HfApi(library_name="thinksteer")
    place = hub.create_repo(repository, private=private, exist_ok=True).repo_id  # with the account's name before it
    hub.upload_folder(repo_id=place, folder_path=folder, commit_message=f"Export of {Path(folder).name}")


def check_repository(name: str | None) -> None:
    """Raise ValueError where `name` cannot name a repository: before any work, not after it. None is let be.

    >>> from steer.checkpoints import check_repository
    >>> check_repository("someone/qwen3-shorter")
    >>> check_repository("a/b/c")
    Traceback (most recent call last):
        ...
    huggingface_hub.errors.HFValidationError: Repo id must be in the form ...'a/b/c'...
    """
    if name is not None:
        validate_repo_id(name)
