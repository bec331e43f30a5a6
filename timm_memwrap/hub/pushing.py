"""Pushes a model, or a new memory for it, to the Hugging Face Hub. What it refuses is `huggingface_hub`'s own error."""

import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import DatasetInfo, ModelInfo, SpaceInfo

from timm_memwrap._utils import plain_state
from timm_memwrap.bases import Base
from timm_memwrap.checks import split_bank
from timm_memwrap.constants import CARD_FILE, CONFIG_FILE, MEMORY_FILE, WEIGHTS_FILE
from timm_memwrap.hub.adapters import find_base
from timm_memwrap.hub.client import check_repo_id, hub_api
from timm_memwrap.hub.loading import from_pretrained
from timm_memwrap.hub.model_card import CardDetails, loading_code, update_memory, write_card
from timm_memwrap.hub.privacy import public_bank
from timm_memwrap.hub.saving import check_saveable, local_source, write_model
from timm_memwrap.memory_bank import MemoryBank
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.tensor_files import FileError, read_tensors, same_bits

__all__ = [
    "prepare_repo",
    "push_folder",
    "push_memory_bank",
    "push_to_hub",
    "reserve_repo",
    "send_commit",
    "with_owner",
]

_logger = logging.getLogger(__name__)


def reserve_repo(repo_id: str, *, token: str | bool | None = None, private: bool | None = None) -> str:
    """Makes a repository unless it exists, and returns its whole id: before hours of work whose result is pushed to it.

    Args:
        repo_id: As in `push_to_hub`.
        token: See `repo_id`.
        private: See `repo_id`.

    Raises:
        ValueError: If `repo_id` is not a valid repo id, or `private=True` was asked for a repository that is public.
        OSError: `huggingface_hub`'s own, if nobody is logged in, the Hub cannot be reached, or would refuse the push.
    """
    check_repo_id(repo_id)
    api = hub_api(token)
    repo_id = with_owner(repo_id, api)
    prepare_repo(api, repo_id, "model", private, None, create_pr=False)
    # One that exists may be another's, whom the client does not ask.
    api.auth_check(repo_id, write=True)
    return repo_id


def push_to_hub(
    model: MemoryWrapModel,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Push model with its memory",
    model_card: CardDetails = None,
    overwrite_card: bool = False,
    include_images: bool = False,
    allow_empty_memory: bool = False,
) -> CommitInfo:
    """Pushes a model with its memory bank to the Hugging Face Hub, in one commit.

    What `save_pretrained` writes is sent. A `README.md` that the repository has is kept, except for the part about the
    memory that this package wrote into it. Two things about the memory are not sent: its images, except with
    `include_images`, and the folders in sample ids that look like paths, except the one that is the sample's class
    name. The model in hand keeps both, and the order is the same: by its position, a sample's whole id is found.

    Args:
        model: The model to push.
        repo_id: The repository, `"owner/name"` or the name of your own; made if it does not exist.
        token: Token of the Hub with the role `write`; `None` for the one of `hf auth login` or `HF_TOKEN`.
        private: Whether a repository that is made is private; `None` for the default of the account.
        revision: Branch to push to; made if it does not exist. `None` for `main`.
        create_pr: Whether to open a pull request instead of pushing to the branch.
        commit_message: First line of the commit.
        model_card: What the card is to say beside what the model knows: a dict of any of `name`, `description`,
            `license`, `datasets`, `base_model`, `tags`, `accuracy` (between 0 and 1) or `results` (a list of dicts of
            `dataset`, `value`, `metric`, `split` and `dataset_id`, as `to_results` of what
            `explaining.evaluate_explanations` found gives them), `figure` (a PNG file) and `training` (a dict of
            `command`, `recipe`, `caveat`, `seed`, `data`, `device` and `versions`), or the whole text.
        overwrite_card: Whether to replace a `README.md` that the repository has.
        include_images: Whether the bank's small images are sent.
        allow_empty_memory: Whether to push a model whose bank is empty.

    Returns:
        What `huggingface_hub` returns about the commit: its `oid`, `commit_url`, `pr_url`. If nothing has changed, it
        is the last commit, with an empty `commit_message`.

    Raises:
        ValueError: If the bank is empty or stale, `repo_id` is not a valid repo id, `private=True` was asked for a
            repository that is public, or `model_card` does not fit.
        OSError: `huggingface_hub`'s own, if the Hub refuses or cannot be reached. The repository is then as before.
    """
    check_saveable(model, allow_empty_memory)
    api = hub_api(token)
    repo_id = with_owner(repo_id, api)
    bank = public_bank(model.memory_bank, include_images)
    with tempfile.TemporaryDirectory(prefix="timm-memwrap-") as name:
        folder = Path(name)
        # The disk may be full, or the card wrong: known before the Hub is asked for anything.
        files = write_model(model, folder, bank)
        card = _write_card(model, folder, bank, repo_id, model_card, include_images)
        info = prepare_repo(api, repo_id, "model", private, revision, create_pr)
        options: dict[str, Any] = {"revision": revision, "create_pr": create_pr, "commit_message": commit_message}
        return _commit(api, info, bank, files, card, overwrite_card=overwrite_card, **options)


def push_memory_bank(
    model: MemoryWrapModel,
    repo_id: str,
    *,
    base_model: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Push a new memory",
    model_card: CardDetails = None,
    include_images: bool = False,
) -> CommitInfo:
    """Pushes the memory bank alone, in one commit: to the model's repository, or to one of its own.

    Where the repository holds the model, its weights stay as they are. Any other is made, if need be, and then holds a
    memory alone, megabytes in all: the bank, what of the model is not as its base has it, such as a head, and a pointer
    to the base, at its commit and with the hash of its file. `from_pretrained` and `timm.create_model` fetch the base
    from where it lives and join them.

    Args:
        model: The model with the new bank. Its weights, or those of its encoder, must be those in the repository or in
            the base.
        repo_id: The repository.
        base_model: The base of a memory alone: `"owner/name"` or `"owner/name@revision"`; `None` for the repository
            that the model was loaded from.
        token: As in `push_to_hub`, and so are all that follow.
        private: See `token`.
        revision: See `token`; where the repository holds the model, it must exist.
        create_pr: See `token`.
        commit_message: See `token`.
        model_card: See `token`.
        include_images: See `token`.

    Raises:
        ValueError: If the bank is empty or stale, the weights in the repository or the base are not the model's, or the
            repository holds another model.
        OSError: `huggingface_hub`'s own, if the Hub refuses, cannot be reached, or has changed in the meantime.
    """
    check_saveable(model)
    api = hub_api(token)
    repo_id = with_owner(repo_id, api)
    bank = public_bank(model.memory_bank, include_images)
    files = _files(api, repo_id, revision)
    base = None
    if WEIGHTS_FILE in files:
        info = api.model_info(repo_id, revision=revision)
        path = api.hf_hub_download(repo_id, WEIGHTS_FILE, revision=info.sha)
        _check_same_weights(model, path, f"{repo_id}@{info.sha}")
    else:
        if CONFIG_FILE in files and MEMORY_FILE not in files:
            raise FileError(f"{repo_id!r} holds another model. Push the memory to a repository of its own.")
        base = find_base(model, base_model, token)
    with tempfile.TemporaryDirectory(prefix="timm-memwrap-") as name:
        folder = Path(name)
        written = write_model(model, folder, bank, base)
        card = []
        if base is not None:
            card = _write_card(model, folder, bank, repo_id, model_card, include_images, base)
        options: dict[str, Any] = {"revision": revision, "create_pr": create_pr, "commit_message": commit_message}
        if base is not None:
            info = prepare_repo(api, repo_id, "model", private, revision, create_pr)
        return _commit(api, info, bank, written, card, **options)


def push_folder(folder: str | os.PathLike, repo_id: str, **kwargs: Any) -> CommitInfo:
    """Pushes a model from a folder, after loading it to see that it is whole.

    A `README.md` in the folder is its card; the line in it that loads the model from the folder is made to load it from
    the repository.

    Args:
        folder: Folder that `save_pretrained` or `pull` wrote.
        repo_id: As in `push_to_hub`.
        **kwargs: Passed to `push_to_hub`.

    Raises:
        ValueError, OSError: As in `push_to_hub`, or if the folder does not hold a model.
    """
    directory = Path(folder).expanduser()
    repo_id = with_owner(repo_id, hub_api(kwargs.get("token")))
    model = from_pretrained(f"local-dir:{directory}")
    card = directory / CARD_FILE
    if card.is_file():
        try:
            text = card.read_text(encoding="utf-8")
        except UnicodeError as error:
            raise FileError(f"{str(card)!r} is not UTF-8 ({error}). Save it as UTF-8, or delete it.") from error
        here, there = loading_code(local_source(directory)), loading_code(f"hf-hub:{repo_id}")
        for library, code in here.items():
            text = text.replace(code, there[library])
        kwargs = {"model_card": text, **kwargs}
    return push_to_hub(model, repo_id, **kwargs)


def prepare_repo(
    api: HfApi, repo_id: str, repo_type: str, private: bool | None, revision: str | None, create_pr: bool
) -> Any:
    """Makes the repository and the branch to push to if they do not exist, and returns the client's info about it."""
    # Says how to log in, which the Hub's answer to whoever is not logged in does not.
    api.whoami()
    api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
    if revision is not None and not create_pr and not revision.startswith("refs/"):
        api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
    info = api.repo_info(repo_id, repo_type=repo_type, revision=revision)
    if private and info.private is False:
        raise ValueError(
            f"private=True, but {repo_id!r} exists and is public. Make it private in its settings on the Hub first, or "
            f"push to another repository."
        )
    return info


def send_commit(
    api: HfApi,
    info: ModelInfo | DatasetInfo | SpaceInfo,
    repo_type: str,
    operations: Sequence[CommitOperationAdd | CommitOperationDelete],
    **options: Any,
) -> CommitInfo:
    """Sends operations in one commit, on top of the commit that was looked at, so that no other push is lost.

    If they change nothing, no commit is made, and what is returned is the last one, with an empty `commit_message`.
    """
    try:
        commit = api.create_commit(info.id, operations, repo_type=repo_type, parent_commit=info.sha, **options)
        if commit.oid == info.sha:
            _logger.info("%s has all of it already: no commit is made.", info.id)
            commit.commit_message = ""
        return commit
    except (ConnectionError, RuntimeError) as error:
        # The client's errors of a transfer, which do not tell what to do or even what was wrong.
        cure = " If the server has no Xet storage, set HF_HUB_DISABLE_XET=1." if "/xet-" in str(error) else ""
        raise OSError(f"{error} {error.__cause__ or ''}{cure}") from error


def with_owner(repo_id: str, api: HfApi) -> str:
    """Returns a repo id that loads: the Hub takes a name without an owner for one of the user's when it is pushed."""
    check_repo_id(repo_id)
    return repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"


def _files(api: HfApi, repo_id: str, revision: str | None) -> set[str]:
    """Returns the names of the files of a repository; none if it, or the branch, does not exist."""
    try:
        info = api.model_info(repo_id, revision=revision)
    except GatedRepoError:
        raise
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return set()
    return {sibling.rfilename for sibling in info.siblings or []}


def _write_card(
    model: MemoryWrapModel,
    folder: Path,
    bank: MemoryBank,
    repo_id: str,
    details: CardDetails,
    include_images: bool,
    base: Base | None = None,
) -> list[Path]:
    card = write_card(model, folder, bank, f"hf-hub:{repo_id}", details, base)
    if len(card) > 1 and not include_images:
        raise ValueError("model_card has a figure, which shows images. Pass include_images=True, or leave it out.")
    return card


def _commit(
    api: HfApi,
    info: ModelInfo,
    bank: MemoryBank,
    files: list[Path],
    card: list[Path],
    overwrite_card: bool = False,
    **options: Any,
) -> CommitInfo:
    """Sends a model in one commit. A card that is there is kept, but for its part about the memory, or overwritten."""
    if (bank.images is not None or len(card) > 1) and not info.private:
        _logger.warning(
            "%s is public: the images of %d samples of the memory will be visible to everyone. Leave out "
            "include_images to push without them.",
            info.id,
            len(bank),
        )
    if not overwrite_card and CARD_FILE in {sibling.rfilename for sibling in info.siblings or []}:
        _logger.info("%s has a %s, of which only the part about the memory is updated.", info.id, CARD_FILE)
        there = Path(api.hf_hub_download(info.id, CARD_FILE, revision=info.sha))
        card = _update_card(there.read_bytes(), files[0].parent, bank)
    # `upload_folder` promises one commit for small folders only.
    return send_commit(api, info, "model", [CommitOperationAdd(file.name, file) for file in files + card], **options)


def _update_card(card: bytes, folder: Path, bank: MemoryBank) -> list[Path]:
    """Writes a card that is on the Hub with its part about the memory updated; nothing, if that changes nothing."""
    path = folder / CARD_FILE
    try:
        updated = update_memory(card.decode(), bank).encode()
    except UnicodeError:
        _logger.warning("The %s on the Hub is not UTF-8: what it says about the memory stays as it is.", CARD_FILE)
        return []
    path.write_bytes(updated)
    return [path] if updated != card else []


def _check_same_weights(model: MemoryWrapModel, path: str, source: str) -> None:
    """Compares a model's weights with those in a repository, bit by bit."""
    file = read_tensors(path, f"{WEIGHTS_FILE} of {source!r}")
    own, theirs = (split_bank(tensors)[0] for tensors in (plain_state(model), file.tensors))
    different = sorted(own.keys() ^ theirs.keys())
    different += [name for name in sorted(own.keys() & theirs.keys()) if not same_bits(own[name], theirs[name])]
    if different:
        raise ValueError(
            f"The weights in {source!r} are not those that encoded the memory: {len(different)} tensors differ, e.g. "
            f"{different[0]!r}. Push both with timm_memwrap.push_to_hub, or build the memory with the model from there."
        )
