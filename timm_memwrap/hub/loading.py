"""Loads a model from a folder or the Hugging Face Hub, and downloads it to a folder."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError, RepositoryNotFoundError

from timm_memwrap.constants import CARD_FIGURE_FILE, CARD_FILE, CONFIG_FILE, MEMORY_FILE, WEIGHTS_FILE
from timm_memwrap.hub.client import check_repo_id, hub_api
from timm_memwrap.hub.saving import staging
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.tensor_files import FileError
from timm_memwrap.whole_model import find_weights, no_weights, read_config, split_revision, weights_file

__all__ = ["find_config", "from_pretrained", "pull"]


def from_pretrained(
    model_id: str | os.PathLike,
    *,
    token: str | bool | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    **kwargs: Any,
) -> MemoryWrapModel:
    """Loads a model with its memory bank from a folder or the Hugging Face Hub, in evaluation mode.

    The same as `timm.create_model(..., pretrained=True).eval()` with `import timm_memwrap` done, with all files taken
    from the same commit and the options that `huggingface_hub` has for a download.

    Args:
        model_id: A folder, a Hub repository (`"me/model"`, `"me/model@revision"`), or either with timm's prefix
            (`"local-dir:..."`, `"hf-hub:..."`).
        token: Token of the Hub; `None` for the one of `hf auth login` or `HF_TOKEN`.
        revision: Branch, tag or commit; as good as `"me/model@revision"`.
        cache_dir: Where downloads are kept; `None` for the cache of `huggingface_hub`.
        local_files_only: Whether to take the files from the cache, without asking the Hub.
        force_download: Whether to download files that are in the cache again.
        **kwargs: Passed to `timm.create_model`, e.g. `num_classes`.

    Raises:
        ValueError: If there is no such folder, the name is not a repo id, or the files are damaged or not of a Memory
            Wrap model.
        OSError: `huggingface_hub`'s own, if the Hub does not give the files.
    """
    source, name = _source(model_id)
    if source == "local-dir":
        _check_folder(Path(name))
    else:
        repo_id, _ = split_revision(name)
        download = partial(
            hub_api(token).hf_hub_download,
            repo_id,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        config = _download_config(download, name, revision)
        read_config(config, f"{CONFIG_FILE} of {name!r}")
        # The cache keeps a folder per commit, and timm takes the files of a commit from it without asking.
        commit = config.parent.name
        try:
            download(weights_file(config), revision=commit)
        except RemoteEntryNotFoundError as error:
            raise no_weights(name, hub_api(token).list_repo_files(repo_id, revision=commit)) from error
        name = f"{repo_id}@{commit}"
    try:
        model = timm.create_model(f"{source}:{name}", pretrained=True, cache_dir=cache_dir, **kwargs)  # type: ignore[arg-type]
    except (TypeError, AssertionError) as error:
        if not kwargs:
            raise
        # The model in the files was built without them before.
        raise ValueError(
            f"{name!r} cannot be loaded with {', '.join(kwargs)}: {error}. Pass arguments of timm.create_model."
        ) from error
    return model.eval()  # type: ignore[return-value]


def pull(repo_id: str, folder: str | os.PathLike, *, token: str | bool | None = None, overwrite: bool = False) -> Path:
    """Downloads a model to a folder, after loading it once to see that it is whole, and returns the folder.

    Args:
        repo_id: The repository, `"owner/name"` or `"owner/name@revision"`.
        folder: Folder to write to; made if it does not exist.
        token: Token of the Hub; `None` for the one of `hf auth login` or `HF_TOKEN`.
        overwrite: Whether to replace a model that the folder holds.

    Raises:
        ValueError: If the folder holds a model, or the files are damaged or not of a Memory Wrap model.
        OSError: `huggingface_hub`'s own, if the Hub does not give the files.
    """
    directory = Path(folder).expanduser()
    wanted = (WEIGHTS_FILE, MEMORY_FILE, CONFIG_FILE, CARD_FILE, CARD_FIGURE_FILE)
    there = [name for name in wanted[:4] if (directory / name).exists()]
    if there and not overwrite:
        raise ValueError(f"{str(directory)!r} has {', '.join(there)} already. Pass another folder, or overwrite=True.")
    name, revision = split_revision(repo_id)
    check_repo_id(name)
    api = hub_api(token)
    info = api.model_info(name, revision=revision)
    from_pretrained(f"hf-hub:{name}", revision=info.sha, token=token)
    present = {sibling.rfilename for sibling in info.siblings or []}
    with staging(directory) as temporary:
        files = [file for file in wanted if file in present]
        for file in files:
            shutil.copyfile(api.hf_hub_download(name, file, revision=info.sha), temporary / file)
        for file in files:
            os.replace(temporary / file, directory / file)
    return directory


def find_config(model_id: str | os.PathLike, token: str | bool | None) -> tuple[str, str, Path]:
    """Returns timm's prefix of a model, its folder or its repo id at a commit, and the path of its `config.json`.

    Nothing else is downloaded, and nothing in a folder is mended.

    Raises:
        ValueError, OSError: As in `from_pretrained`.
    """
    source, name = _source(model_id)
    if source == "local-dir":
        return source, name, Path(name, CONFIG_FILE)
    repo_id, _ = split_revision(name)
    config = _download_config(partial(hub_api(token).hf_hub_download, repo_id), name)
    return source, f"{repo_id}@{config.parent.name}", config


def _download_config(download: Callable[..., str], name: str, revision: str | None = None) -> Path:
    """Downloads the `config.json` of a repository, which may be meant for a folder."""
    try:
        return Path(download(CONFIG_FILE, revision=revision or split_revision(name)[1]))
    except (RepositoryNotFoundError, LocalEntryNotFoundError) as error:
        error.args = (f"{error} {name!r} is not a directory either.",)
        raise


def _source(model_id: str | os.PathLike) -> tuple[str, str]:
    """Returns timm's name for where a model is from, `"local-dir"` or `"hf-hub"`, and the folder or repo id."""
    name = os.fspath(model_id)
    prefix, _, rest = name.partition(":")
    if prefix in ("hf-hub", "hf_hub"):
        check_repo_id(split_revision(rest)[0])
        return "hf-hub", rest
    path = rest if prefix == "local-dir" else name
    if os.path.isdir(folder := os.path.expanduser(path)):
        return "local-dir", folder
    if prefix == "local-dir" or not isinstance(model_id, str):
        raise FileError(f"{path!r} is not a directory. Pass one that timm_memwrap.save_pretrained wrote.")
    repo_id, _ = split_revision(name)
    try:
        # Only the Hub's oldest models have no owner.
        check_repo_id(repo_id if "/" in repo_id else "")
    except ValueError as error:
        raise FileError(
            f"{name!r} is neither a directory nor a repo id. Pass a directory that timm_memwrap.save_pretrained wrote, "
            f"or 'owner/name'."
        ) from error
    return "hf-hub", name


def _check_folder(folder: Path) -> None:
    """Raises a `FileError` if a folder holds no model, after its `config.json` is mended if the weights hold a copy."""
    try:
        read_config(folder / CONFIG_FILE, f"{CONFIG_FILE} in {str(folder)!r}")
    except FileError:
        if not (folder / WEIGHTS_FILE).is_file():
            raise
        find_weights({"source": "local-dir", "file": str(folder)})
