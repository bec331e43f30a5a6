"""The client of the Hugging Face Hub, and what it calls a repository."""

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

__all__ = ["check_repo_id", "hub_api"]


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
