"""The client of the Hugging Face Hub, and what it calls a repository."""

from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.utils import validate_repo_id

from timm_memwrap.constants import CONFIG_FILE

__all__ = ["cached_commit", "check_repo_id", "hub_api"]


def check_repo_id(repo_id: str) -> None:
    """Raises a `ValueError` if `repo_id` is not a valid repo id."""
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"{repo_id!r} is not a valid repo id. Pass 'owner/name'. {error}") from error


def hub_api(token: str | bool | None) -> HfApi:
    """Returns the client of the Hub, which tells it who asks."""
    from timm_memwrap import __version__

    return HfApi(token=token, library_name="timm_memwrap", library_version=__version__)


def cached_commit(repo_id: str, revision: str | None = None) -> str | None:
    """Returns the commit at which a model was last loaded from a branch; `None` if the cache does not have it."""
    path = try_to_load_from_cache(repo_id, CONFIG_FILE, revision=revision)
    return Path(path).parent.name if isinstance(path, str) else None
