"""Saves to disk, pushes to the Hugging Face Hub, and loads from either. Saving never touches the network."""

import dataclasses
import errno
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import Tensor

from timm_memwrap import model_card as cards
from timm_memwrap.constants import (
    CARD_FIGURE_FILE,
    CARD_FILE,
    CONFIG_FILE,
    CONFIG_FORMAT_VERSION,
    MEMORY_BANK,
    MEMORY_CONFIG_KEY,
    SAFETENSORS_METADATA,
    WEIGHTS_FILE,
)
from timm_memwrap.loading import (
    FileError,
    HubError,
    check_config,
    download,
    explained,
    patiently,
    read_json,
    sha256,
    split_revision,
)
from timm_memwrap.memory_bank import MemoryBank, SampleId
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.text import printable

__all__ = [
    "FileError",
    "HubError",
    "from_pretrained",
    "pull",
    "push_folder",
    "push_memory_bank",
    "push_to_hub",
    "save_pretrained",
    "summarize",
]

_logger = logging.getLogger(__name__)

_HUB, _FOLDER = "hf-hub", "local-dir"
_BANK_PREFIX = f"{MEMORY_BANK}."

CardDetails = Mapping[str, Any] | str | None


def save_pretrained(
    model: MemoryWrapModel,
    save_directory: str | os.PathLike,
    *,
    allow_empty_memory: bool = False,
    model_card: CardDetails = None,
    overwrite_card: bool = False,
) -> Path:
    """Writes a model with its memory bank to a folder that stock timm loads.

    The folder gets `model.safetensors` and `config.json`, timm's own files, and a `README.md` if it has none; each is
    written whole or not at all. `timm.create_model("local-dir:" + folder, pretrained=True)` brings the model back once
    `timm_memwrap` is imported. Images in the bank are written too; only a push leaves them out.

    Args:
        model: The model to save.
        save_directory: Folder to write to; made if absent. Other files in it stay.
        allow_empty_memory: Whether to save a model whose bank is empty.
        model_card: What the card is to say beside what the model knows, as in `push_to_hub`.
        overwrite_card: Whether to replace a `README.md` that is there.

    Returns:
        The folder.

    Raises:
        ValueError: If the bank is empty or stale.
        OSError: If the disk is full, or the folder cannot be written. The files in it are then as before.
    """
    check_memory(model, allow_empty_memory)
    directory = Path(save_directory)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as folder:
        written = write_files(model, Path(folder), model.memory_bank)
        if overwrite_card or not (directory / CARD_FILE).exists():
            written += write_card(model, Path(folder), model.memory_bank, _local_source(directory), model_card)
        for file in written:
            os.replace(file, directory / file.name)
    return directory


def from_pretrained(model_id: str | os.PathLike, **kwargs: Any) -> MemoryWrapModel:
    """Loads a model with its memory bank from a folder or the Hugging Face Hub.

    The same as `timm.create_model(..., pretrained=True)` with `import timm_memwrap` done, with clearer errors, and with
    all files taken from the same commit.

    Args:
        model_id: A folder, a Hub repository (`"me/model"`, `"me/model@revision"`), or either with timm's prefix
            (`"local-dir:..."`, `"hf-hub:..."`).
        **kwargs: Passed to `timm.create_model`, e.g. `num_classes` or `cache_dir`.

    Raises:
        HubError: If the Hub does not give the files; it is an `OSError`.
        ValueError: If there is no such folder, or the files are damaged or not of a Memory Wrap model.

    Example:
        ```python
        >>> model = timm_memwrap.from_pretrained("me/model@v1.0", cache_dir="models")  # doctest: +SKIP

        ```
    """
    return timm.create_model(_checked_name(model_id, kwargs.get("cache_dir")), pretrained=True, **kwargs)  # type: ignore[return-value]


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
    include_images: bool = False,
    allow_empty_memory: bool = False,
) -> CommitInfo:
    """Pushes a model with its memory bank to the Hugging Face Hub, in one commit.

    What `save_pretrained` writes is sent. A `README.md` that the repository has is kept, but for the part about the
    memory that this package wrote into it. Two things about the memory are not sent: its images, except with
    `include_images`, and the folders in sample ids that look like paths. The model in hand keeps both.

    Args:
        model: The model to push.
        repo_id: The repository, `"owner/name"`; made if absent.
        token: Token of the Hub with the role `write`; `None` for the one of `hf auth login` or `HF_TOKEN`.
        private: Whether a repository that is made is private; `None` for the default of the account.
        revision: Branch to push to; made if absent. `None` for `main`.
        create_pr: Whether to open a pull request instead of pushing to the branch.
        commit_message: First line of the commit.
        model_card: What the card is to say beside what the model knows: a dict of any of `name`, `description`,
            `license`, `datasets`, `base_model`, `tags`, `accuracy`, `results` and `figure`, or the whole text.
        include_images: Whether the bank's small images are sent.
        allow_empty_memory: Whether to push a model whose bank is empty.

    Returns:
        What `huggingface_hub` returns about the commit: its `oid`, `commit_url`, `pr_url`.

    Raises:
        HubError: If the Hub refuses or breaks off; the repository is then as before. It is an `OSError`.
        ValueError: If the bank is empty or stale, `repo_id` is no name of a repository, `private=True` was asked for a
            repository that is public, or `model_card` does not fit.

    Example:
        ```python
        >>> commit = timm_memwrap.push_to_hub(model, "me/model", private=True)  # doctest: +SKIP

        ```
    """
    check_memory(model, allow_empty_memory)
    check_repo_id(repo_id)
    figure = isinstance(model_card, Mapping) and model_card.get("figure") is not None
    if figure and not include_images:
        raise ValueError(
            "model_card has a figure, which shows images, but include_images=False. Pass include_images=True, or leave "
            "the figure out."
        )
    bank = public_bank(model.memory_bank, include_images)
    with tempfile.TemporaryDirectory(prefix="timm-memwrap-") as name:
        folder = Path(name)
        # The disk may be full, or the card wrong: known before the Hub is asked for anything.
        files = write_files(model, folder, bank)
        files += write_card(model, folder, bank, f"{_HUB}:{repo_id}", model_card)
        api = _api(token)
        with explained("push to", repo_id):
            repo_id = patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
            info = patiently(lambda: api.model_info(repo_id))
            if private and info.private is False:
                raise ValueError(
                    f"private=True, but {repo_id!r} exists and is public. Make it private in its settings on the Hub "
                    f"first, or push to another repository."
                )
            if (bank.images is not None or figure) and not info.private:
                _logger.warning(
                    "%s is public: the images of %d samples of the memory will be visible to everyone. Leave out "
                    "include_images to push without them.",
                    repo_id,
                    len(bank),
                )
            if revision is not None and not create_pr and not revision.startswith("refs/"):
                patiently(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
            kept = _card_on_hub(api, repo_id, revision)
            if kept is not None:
                if model_card is not None:
                    _logger.info("%s of %s is kept; model_card is not used.", CARD_FILE, repo_id)
                files = [file for file in files if file.name in (WEIGHTS_FILE, CONFIG_FILE)]
                files += _update_card(kept, folder, bank)
            return _commit(api, repo_id, files, revision, create_pr, commit_message)


def push_memory_bank(
    model: MemoryWrapModel,
    repo_id: str,
    *,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Push a new memory",
    include_images: bool = False,
) -> CommitInfo:
    """Pushes a new memory bank for a model that is on the Hub, in one commit that leaves its weights as they are.

    Args:
        model: The model with the new bank. Its weights must be those in the repository.
        repo_id: The repository.
        token: As in `push_to_hub`.
        revision: Branch to push to; `None` for `main`.
        create_pr: As in `push_to_hub`.
        commit_message: First line of the commit.
        include_images: As in `push_to_hub`.

    Returns:
        What `huggingface_hub` returns about the commit.

    Raises:
        HubError: If the Hub refuses, breaks off, or has changed in the meantime.
        ValueError: If the bank is empty or stale, or the weights in the repository are not the model's.
    """
    check_memory(model)
    check_repo_id(repo_id)
    bank = public_bank(model.memory_bank, include_images)
    api = _api(token)
    with explained("push a memory to", repo_id):
        info = patiently(lambda: api.model_info(repo_id, revision=revision))
    with explained("download", repo_id, WEIGHTS_FILE):
        path = patiently(lambda: api.hf_hub_download(repo_id, WEIGHTS_FILE, revision=info.sha))
    _check_same_weights(model, Path(path), f"{repo_id}@{info.sha}")
    if bank.images is not None and not info.private:
        _logger.warning("%s is public: the images of the memory will be visible to everyone.", repo_id)
    with tempfile.TemporaryDirectory(prefix="timm-memwrap-") as name:
        folder = Path(name)
        files = write_files(model, folder, bank)
        with explained("push a memory to", repo_id):
            card = _card_on_hub(api, repo_id, info.sha)
            if card is not None:
                files += _update_card(card, folder, bank)
            return _commit(api, repo_id, files, revision, create_pr, commit_message, parent=info.sha)


def push_folder(folder: str | os.PathLike, repo_id: str, **kwargs: Any) -> CommitInfo:
    """Pushes a model from a folder, after loading it to see that it is whole.

    A `README.md` in the folder is its card; the line in it that loads the model from the folder is made to load it from
    the repository.

    Args:
        folder: Folder that `save_pretrained` or `pull` wrote.
        repo_id: The repository.
        **kwargs: Passed to `push_to_hub`.

    Raises:
        HubError: As in `push_to_hub`.
        ValueError: As in `push_to_hub`, or if the folder holds no model.
    """
    directory = Path(folder)
    if not directory.is_dir():
        raise FileError(f"{str(folder)!r} is no folder. Pass one that timm_memwrap.save_pretrained wrote.")
    model = from_pretrained(directory)
    card = directory / CARD_FILE
    text = card.read_text(encoding="utf-8") if card.is_file() else None
    if text is not None:
        here, there = (cards.loading_code(source) for source in (_local_source(directory), f"{_HUB}:{repo_id}"))
        public = public_bank(model.memory_bank, kwargs.get("include_images", False))
        text = cards.update_memory(text.replace(here, there), public)
    return push_to_hub(model, repo_id, model_card=text, **kwargs)


def _local_source(directory: Path) -> str:
    return f"{_FOLDER}:{directory.resolve().name}"


def pull(repo_id: str, folder: str | os.PathLike, *, token: str | bool | None = None, overwrite: bool = False) -> Path:
    """Downloads a model to a folder, after loading it once to see that it is whole.

    Args:
        repo_id: The repository, `"owner/name"` or `"owner/name@revision"`.
        folder: Folder to write to; made if absent.
        token: Token of the Hub; `None` for the one of `hf auth login` or `HF_TOKEN`.
        overwrite: Whether to replace a model that the folder holds.

    Returns:
        The folder.

    Raises:
        HubError: If the Hub does not give the files.
        ValueError: If the folder holds a model, or the files are damaged or not of a Memory Wrap model.
    """
    directory = Path(folder)
    there = [name for name in (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE) if (directory / name).exists()]
    if there and not overwrite:
        raise ValueError(f"{str(directory)!r} has {', '.join(there)} already. Pass another folder, or overwrite=True.")
    name, revision = split_revision(repo_id)
    check_repo_id(name)
    api = _api(token)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".pulling-") as temporary:
        with explained("list the files of", repo_id):
            info = patiently(lambda: api.model_info(name, revision=revision))
        wanted = (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE, CARD_FIGURE_FILE)
        present = {sibling.rfilename for sibling in info.siblings or []}
        for file in [file for file in wanted if file in present]:
            with explained("download", repo_id, file):
                path = patiently(lambda file=file: api.hf_hub_download(name, file, revision=info.sha))  # type: ignore[misc]
                shutil.copyfile(path, Path(temporary) / file)
        if CONFIG_FILE not in present:
            raise FileError(f"{repo_id!r} has no {CONFIG_FILE}: it is not a model of timm.")
        if WEIGHTS_FILE not in present:
            from_pretrained(repo_id)  # Says what is there instead.
        from_pretrained(temporary)
        directory.mkdir(exist_ok=True)
        for file in os.listdir(temporary):
            os.replace(Path(temporary) / file, directory / file)
    return directory


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a saved model is and remembers.

    Attributes:
        source: Where it was loaded from.
        architecture: Its name in timm.
        num_classes: Number of classes.
        parameters: Number of parameters.
        memory: What the bank holds, as in `config.json`.
        class_counts: Number of samples in the memory by name of the class.
        memory_bytes: Size of the memory.
        image_bytes: Size of the images in it.
        stale: Whether the memory was encoded with other weights; `None` if it is empty or does not say.
    """

    source: str
    architecture: str
    num_classes: int
    parameters: int
    memory: dict[str, Any]
    class_counts: dict[str, int]
    memory_bytes: int
    image_bytes: int
    stale: bool | None

    def report(self) -> str:
        """Says it in lines for people."""
        lines = [
            f"{self.source}",
            f"  architecture  {self.architecture}",
            f"  classes       {self.num_classes}",
            f"  parameters    {self.parameters:,}",
        ]
        if not self.memory["size"]:
            return "\n".join([*lines, "  memory        empty: call timm_memwrap.build_memory_bank(model, data)"])
        memory = self.memory
        fits = {
            True: "STALE: encoded with other weights; call timm_memwrap.build_memory_bank(model, data) again",
            False: "fits the weights",
            None: "not recorded",
        }
        source = f"{memory['dataset'] or 'unknown data'}: {memory['selection'] or 'unknown'}"
        population = f" of {memory['population']:,}" if memory["population"] else ""
        seed = f", seed {memory['seed']}" if memory["seed"] is not None else ""
        lines += [
            f"  memory        {memory['size']:,} samples, {_size(self.memory_bytes)}",
            f"  from          {printable(source)}{population}{seed}",
            f"  images        {_size(self.image_bytes) if memory['images'] else 'not inside'}",
            f"  fingerprint   {fits[self.stale]}",
            "  by class",
        ]
        counts = {printable(name): count for name, count in self.class_counts.items()}
        width = max(map(len, counts))
        return "\n".join([*lines, *(f"    {name:{width}}  {count:,}" for name, count in counts.items())])


def summarize(model_id: str | os.PathLike) -> Summary:
    """Loads a model, and says what it is and remembers.

    Args:
        model_id: As in `from_pretrained`.

    Raises:
        HubError: If the Hub does not give the files.
        ValueError: If the files are damaged or not of a Memory Wrap model.
    """
    model = from_pretrained(model_id)
    bank = model.memory_bank
    names = bank.class_names
    tensors = bank.state_dict()
    return Summary(
        source=os.fspath(model_id),
        architecture=model.pretrained_cfg["architecture"],
        num_classes=model.num_classes,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        memory=describe_memory(bank),
        class_counts={names[i] if i < len(names) else str(i): count for i, count in bank.class_counts.items()},
        memory_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        image_bytes=bank.images.nbytes if bank.images is not None else 0,
        stale=model.memory_is_stale() if bank.provenance.encoder else None,
    )


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


# -- what is written --------------------------------------------------------------------------------------------------


def check_memory(model: MemoryWrapModel, allow_empty_memory: bool = False) -> None:
    """Refuses a model whose memory could not be true to its weights.

    Raises:
        ValueError: If `model` is no Memory Wrap model, or its bank is empty or stale.
    """
    if not isinstance(model, MemoryWrapModel):
        raise ValueError(f"{type(model).__name__} is not a Memory Wrap model. Wrap it: timm_memwrap.wrap(model).")
    if not len(model.memory_bank) and not allow_empty_memory:
        raise ValueError(
            "The memory bank is empty: the model would come back without evidence. Call "
            "timm_memwrap.build_memory_bank(model, data) first, or pass allow_empty_memory=True."
        )
    if model.memory_is_stale():
        raise ValueError(
            "The memory bank is stale: the weights have changed since it was built, so its encodings are not theirs. "
            "Call timm_memwrap.build_memory_bank(model, data) again."
        )


def public_bank(bank: MemoryBank, include_images: bool = False) -> MemoryBank:
    """Returns what of a bank may be published: no images unless asked for, and no folders in names."""
    public = MemoryBank()
    if not len(bank):
        return public
    assert bank.encodings is not None and bank.labels is not None and bank.predictions is not None
    public.replace(
        bank.encodings,
        bank.labels,
        bank.predictions,
        _names(bank.ids),
        bank.images if include_images else None,
        bank.class_names,
        dataclasses.replace(bank.provenance, dataset=_name(bank.provenance.dataset)),
        bank.encodings.dtype,
    )
    return public


def _names(ids: Iterable[SampleId]) -> list[SampleId]:
    """Reduces ids that look like paths to names, and keeps them unique."""
    ids = list(ids)
    taken = {sample_id for sample_id in ids if not isinstance(sample_id, str) or _name(sample_id) == sample_id}
    names: list[SampleId] = []
    for sample_id in ids:
        if sample_id not in taken:
            assert isinstance(sample_id, str)
            name = candidate = _name(sample_id)
            count = 1
            while candidate in taken:
                count += 1
                candidate = f"{name} ({count})"
            taken.add(candidate)
            names.append(candidate)
        else:
            names.append(sample_id)
    return names


def _name(path: str) -> str:
    """Returns the last part of a path or link, of any system, without the query of a link."""
    if "://" in path:
        path = re.split(r"[?#]", path, maxsplit=1)[0]
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "unnamed" if re.search(r"[/\\]", path) else path


def write_files(model: MemoryWrapModel, folder: Path, bank: MemoryBank) -> list[Path]:
    """Writes a model with this bank into an empty folder, and returns the files, the weights first."""
    weights, config = folder / WEIGHTS_FILE, folder / CONFIG_FILE
    # Kept as they are: a state dict otherwise holds copies of a bank, which may be large.
    state, remembered = model.state_dict(keep_vars=True), bank.state_dict(keep_vars=True)
    tensors = {name: tensor for name, tensor in state.items() if not name.startswith(_BANK_PREFIX)}
    tensors |= {_BANK_PREFIX + name: tensor for name, tensor in remembered.items()}
    try:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            weights,
            metadata=SAFETENSORS_METADATA,
        )
    except SafetensorError as error:
        raise OSError(
            errno.ENOSPC if "os error 28" in str(error) else errno.EIO,
            f"Could not write {WEIGHTS_FILE} ({error}). Free some space on the disk, or save elsewhere",
            str(folder.parent),
        ) from error
    extra: dict[str, Any] = {
        MEMORY_CONFIG_KEY: {
            "format_version": CONFIG_FORMAT_VERSION,
            **describe_memory(bank),
            "weights_sha256": sha256(weights),
        }
    }
    if bank.class_names:
        extra["label_names"] = bank.class_names
    if model.base_model:
        extra["base_model"] = model.base_model
    save_config_for_hf(model, str(config), model_config=extra)
    return [weights, config]


def write_card(
    model: MemoryWrapModel, folder: Path, bank: MemoryBank, source: str, model_card: CardDetails
) -> list[Path]:
    """Writes the model card, and its figure if it has one."""
    path = folder / CARD_FILE
    files = [path]
    if isinstance(model_card, str):
        text = model_card
    else:
        text = cards.make_card(model, source, model_card, bank)
        figure = (model_card or {}).get("figure")
        if figure is not None:
            if Path(figure).suffix.lower() != ".png" or not Path(figure).is_file():
                raise ValueError(f"model_card['figure'] is {str(figure)!r}, which is not a PNG file. Save one there.")
            shutil.copyfile(figure, folder / CARD_FIGURE_FILE)
            files.append(folder / CARD_FIGURE_FILE)
    path.write_text(text, encoding="utf-8", newline="")
    return files


def describe_memory(bank: MemoryBank) -> dict[str, Any]:
    """Says in JSON what a bank holds, for people who read `config.json`; nothing is loaded from it."""
    if not len(bank):
        return {"size": 0}
    provenance = bank.provenance
    return {
        "size": len(bank),
        "class_counts": {str(label): count for label, count in bank.class_counts.items()},
        "dataset": provenance.dataset,
        "selection": provenance.selection,
        "seed": provenance.seed,
        "population": provenance.population,
        "images": bank.images is not None,
        "encoder": provenance.encoder,
    }


# -- the Hub ----------------------------------------------------------------------------------------------------------


def _checked_name(model_id: str | os.PathLike, cache_dir: str | Path | None) -> str:
    """Returns timm's name for a model, its configuration checked and, on the Hub, its commit fixed."""
    name = os.fspath(model_id)
    prefix, _, rest = name.partition(":")
    source = {"hf-hub": _HUB, "hf_hub": _HUB, "local-dir": _FOLDER}.get(prefix)
    if source is None:
        # Path("") is the folder at hand, which nobody means by an empty name.
        source, rest = _FOLDER if name and Path(name).is_dir() else _HUB, name
    if source == _FOLDER:
        path = Path(rest) / CONFIG_FILE
        if not path.is_file():
            what = f"has no {CONFIG_FILE}" if Path(rest).is_dir() else "is no folder"
            raise FileError(f"{rest!r} {what}. Pass a folder that timm_memwrap.save_pretrained wrote.")
        check_config(read_json(path, f"{CONFIG_FILE} in {rest!r}"), f"{CONFIG_FILE} in {rest!r}")
        return f"{_FOLDER}:{rest}"
    repo_id, revision = split_revision(rest)
    if not isinstance(model_id, str) or not _is_repo_id(repo_id):
        raise ValueError(
            f"{name!r} is neither a folder nor the name of a repository, which is 'owner/name' or "
            f"'owner/name@revision'. Check the path."
        )
    path = download(repo_id, CONFIG_FILE, revision, cache_dir)
    check_config(read_json(path, f"{CONFIG_FILE} of {rest!r}"), f"{CONFIG_FILE} of {rest!r}")
    # The cache keeps a folder per commit.
    return f"{_HUB}:{repo_id}@{path.parent.name}"


def _is_repo_id(repo_id: str) -> bool:
    try:
        validate_repo_id(repo_id)
    except ValueError:
        return False
    return True


def check_repo_id(repo_id: str) -> None:
    if not isinstance(repo_id, str) or not _is_repo_id(repo_id):
        raise ValueError(
            f"{repo_id!r} is no name of a repository. Pass 'owner/name' of letters, digits, '-', '_' and '.'."
        )


def _api(token: str | bool | None) -> HfApi:
    from timm_memwrap import __version__

    return HfApi(token=token, library_name="timm_memwrap", library_version=__version__)


def _card_on_hub(api: HfApi, repo_id: str, revision: str | None) -> bytes | None:
    if not patiently(lambda: api.file_exists(repo_id, CARD_FILE, revision=revision)):
        return None
    return Path(patiently(lambda: api.hf_hub_download(repo_id, CARD_FILE, revision=revision))).read_bytes()


def _update_card(card: bytes, folder: Path, bank: MemoryBank) -> list[Path]:
    """Writes a card that is on the Hub with its part about the memory anew; nothing, if that changes nothing."""
    path = folder / CARD_FILE
    try:
        updated = cards.update_memory(card.decode(), bank).encode()
    except UnicodeError:
        return []
    path.write_bytes(updated)
    return [path] if updated != card else []


def _commit(
    api: HfApi,
    repo_id: str,
    files: list[Path],
    revision: str | None,
    create_pr: bool,
    message: str,
    parent: str | None = None,
) -> CommitInfo:
    """Sends files in one commit, which the Hub makes whole or not at all.

    `upload_folder` would do, but promises one commit for small folders only.
    """

    def commit() -> CommitInfo:
        # Made anew for each try: the client marks them as sent.
        operations = [CommitOperationAdd(file.name, file) for file in files]
        return api.create_commit(
            repo_id,
            operations,
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent,
        )

    # A commit that came through although its answer was lost finds nothing to change the second time. A pull request
    # would be opened twice.
    return commit() if create_pr else patiently(commit)


def _check_same_weights(model: MemoryWrapModel, path: Path, source: str) -> None:
    """Compares a model's weights with those in a repository, bit by bit, one tensor at a time."""
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(_BANK_PREFIX)}
    with safe_open(path, framework="pt") as file:
        theirs = {name for name in file.keys() if not name.startswith(_BANK_PREFIX)}  # noqa: SIM118
        different = sorted(theirs ^ own.keys())
        for name in sorted(theirs & own.keys()):
            if not _same_bits(own[name].detach().cpu(), file.get_tensor(name)):
                different.append(name)
    if different:
        raise ValueError(
            f"The weights in {source!r} are not those that encoded the memory: {len(different)} tensors differ, e.g. "
            f"{different[0]!r}. Push weights and memory together with timm_memwrap.push_to_hub, or load the model from "
            f"there and build the memory with it."
        )


def _same_bits(first: Tensor, second: Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    if not first.numel():
        return True
    return torch.equal(first.contiguous().view(-1).view(torch.uint8), second.contiguous().view(-1).view(torch.uint8))
