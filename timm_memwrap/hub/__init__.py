"""Saves to disk, pushes to the Hugging Face Hub, and loads from either. Saving never touches the network."""

from timm_memwrap.hub.client import cached_commit, check_repo_id
from timm_memwrap.hub.loading import from_pretrained, pull
from timm_memwrap.hub.memory_images import push_memory_images
from timm_memwrap.hub.pushing import push_folder, push_memory_bank, push_to_hub, reserve_repo
from timm_memwrap.hub.saving import save_pretrained
from timm_memwrap.hub.spaces import push_space
from timm_memwrap.hub.summary import Summary, summarize
from timm_memwrap.tensor_files import FileError

__all__ = [
    "FileError",
    "Summary",
    "cached_commit",
    "check_repo_id",
    "from_pretrained",
    "pull",
    "push_folder",
    "push_memory_bank",
    "push_memory_images",
    "push_space",
    "push_to_hub",
    "reserve_repo",
    "save_pretrained",
    "summarize",
]
