"""What stands between files from outside and a model: checks, and errors that name the repository, file and cure.

The Hub's client, safetensors and timm each raise errors of their own kind, often several for one cause. Here each
becomes one: a `HubError` if the Hub or the way to it is at fault, a `FileError` if what a file says is.
"""

import errno
import hashlib
import inspect
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from huggingface_hub import constants as hf_constants
from huggingface_hub import hf_hub_download, model_info, try_to_load_from_cache
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from timm.models import build_model_with_cfg, is_model
from timm.models._hub import _parse_model_cfg
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from timm_memwrap.constants import (
    CONFIG_FILE,
    CONFIG_FORMAT_VERSION,
    MEMORY_BANK,
    MEMORY_CONFIG_KEY,
    PREFIX,
    WEIGHTS_FILE,
)

__all__ = ["FileError", "HubError"]

_logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# What passes if one waits, and for how long to wait each time, in seconds.
_PASSING = (429, 500, 502, 503, 504)
_WAITS = (1.0, 2.0, 4.0)

# The root of the errors of whichever HTTP library the client stands on: a connection that breaks reaches us as one.
_TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]

# Elements of parameters that building a model may take beyond twice those in its file.
_SLACK = 2**20

# What timm's functions take beside a model's own arguments. In a `config.json` from outside it has no place: it would
# steer how the model is loaded.
_RESERVED_ARGS = {
    *inspect.signature(timm.create_model).parameters,
    *inspect.signature(build_model_with_cfg).parameters,
    "features_only",
    "out_indices",
    "feature_cls",
}

# No image has more pixels a side, no network more layers.
_LARGEST_NUMBER = 2**16

_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN."


class HubError(OSError):
    """The Hub, or the way to it, does not give or take what was asked for."""


class FileError(ValueError):
    """A file of a model is damaged, or is not what this package can load."""


@contextmanager
def explained(action: str, repo_id: str, file: str | None = None) -> Iterator[None]:
    """Turns what the Hub's client raises into one error that names repository, file and cure.

    Args:
        action: What is being done, e.g. `"download"`.
        repo_id: The repository.
        file: The file in it, if it is about one.

    Raises:
        HubError: If the Hub or the connection is at fault.
        ValueError: If the repository's name is not one.
    """
    what = f"{file} of {repo_id!r}" if file else repr(repo_id)
    try:
        yield
    except (HubError, FileError):
        raise
    except HFValidationError as error:
        raise ValueError(
            f"Could not {action} {what}: {repo_id!r} is no name of a repository, which is 'owner/name' of letters, "
            f"digits, '-', '_' and '.'."
        ) from error
    except (OSError, EntryNotFoundError, _TRANSPORT_ERROR, RuntimeError) as error:
        reason = _reason(error, repo_id, file)
        if reason is None:
            raise
        raise HubError(f"Could not {action} {what}: {reason}") from error


def _reason(error: BaseException, repo_id: str, file: str | None) -> str | None:
    """Says what is wrong and what helps, or returns `None` if the Hub has nothing to do with it."""
    page = f"{hf_constants.ENDPOINT}/{repo_id}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    said = getattr(error, "server_message", None)
    said = f" ({said.strip()})" if said else ""
    if isinstance(error, GatedRepoError):
        return f"the repository is gated. Ask for access on {page}, then use a token of that account. {_LOG_IN}"
    if isinstance(error, RevisionNotFoundError):
        return f"the repository has no such revision. Its branches are on {page}/tree/main."
    if isinstance(error, RemoteEntryNotFoundError):
        return f"the repository has no such file. What it has is on {page}/tree/main."
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no such repository, or it is private and not of this token. Check the name. {_LOG_IN}"
    if isinstance(error, DisabledRepoError):
        return f"the repository was disabled by the Hub. See {page}."
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return (
            f"the Hub does not accept the token, or there is none{said}. {_LOG_IN} Tokens are made on "
            f"{hf_constants.ENDPOINT}/settings/tokens."
        )
    if status == 403:
        return (
            f"the token may not do that{said}. Use one with the role 'write', of an account that may write to this "
            f"repository, or open a pull request with create_pr=True."
        )
    if status == 429:
        return f"the Hub has had too many requests from here{said}. Try again in a few minutes."
    if status is not None and status >= 500:
        return f"the Hub answers with status {status}{said}. It is busy or down: try again later."
    if status == 412:
        return f"the repository has changed in the meantime{said}. Load it again, and repeat."
    if status is not None:
        return f"the Hub refuses with status {status}{said}."
    if isinstance(error, OfflineModeIsEnabled) or (
        isinstance(error, LocalEntryNotFoundError) and hf_constants.HF_HUB_OFFLINE
    ):
        return "HF_HUB_OFFLINE is set, and it is not in the cache. Unset it, or load the model once while online."
    if isinstance(error, LocalEntryNotFoundError | RuntimeError):
        cause = _reason(error.__cause__, repo_id, file) if error.__cause__ is not None else None
        if cause or isinstance(error, RuntimeError):
            return cause
        return f"{hf_constants.ENDPOINT} cannot be reached, and it is not in the cache. Check the connection."
    if isinstance(error, FileMetadataError):
        return f"{hf_constants.ENDPOINT} does not answer as the Hub does. Check HF_ENDPOINT and proxies."
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f"the disk is full ({error}). Free some space, or set HF_HOME to another disk."
        return None if error.errno is not None else f"{error}. Try again."
    if isinstance(error, _TRANSPORT_ERROR):
        return f"the connection to the Hub broke ({error or type(error).__name__}). Check it, and try again."
    return None


def patiently(call: Callable[[], _T]) -> _T:
    """Calls the Hub, and again after a while if it is busy. For calls that may safely be repeated."""
    for wait in _WAITS:
        try:
            return call()
        except HfHubHTTPError as error:
            if error.response.status_code not in _PASSING:
                raise
            asked = error.response.headers.get("Retry-After", "")
            seconds = float(asked) if asked.isdigit() else wait
            _logger.warning("The Hub answers with status %d; again in %g s.", error.response.status_code, seconds)
            time.sleep(seconds)
    return call()


# -- files ------------------------------------------------------------------------------------------------------------


def split_revision(model_id: str) -> tuple[str, str | None]:
    """Splits `"me/model@revision"`."""
    repo_id, _, revision = model_id.partition("@")
    return repo_id, revision or None


def download(repo_id: str, file: str, revision: str | None, cache_dir: str | Path | None = None) -> Path:
    """Returns the path in the cache of a file on the Hub.

    Raises:
        HubError: If it cannot be had.
    """
    with explained("download", f"{repo_id}@{revision}" if revision else repo_id, file):
        path = patiently(lambda: hf_hub_download(repo_id, file, revision=revision, cache_dir=cache_dir))
    return Path(path)


@dataclass
class Weights:
    """Weights of a whole model, as a file.

    Attributes:
        path: The file.
        config: The `config.json` beside it, if there is one.
        name: What to call it in an error: file and source.
        verified: Whether it has the checksum that was written when it was saved.
    """

    path: Path
    config: dict[str, Any]
    name: str
    verified: bool = False

    @property
    def base_model(self) -> str | None:
        """Id of the model on the Hub that the backbone's weights were of before training, if known."""
        value = self.config.get("base_model")
        return value if isinstance(value, str) else None

    def verify(self) -> None:
        """Compares the file with the checksum in its `config.json`, if there is one.

        Raises:
            FileError: If they differ.
        """
        block = self.config.get(MEMORY_CONFIG_KEY)
        expected = block.get("weights_sha256") if isinstance(block, dict) else None
        if expected is None:
            return
        if sha256(self.path) != expected:
            raise FileError(
                f"{self.name} is not the file that was saved: its checksum is not the one in {CONFIG_FILE}. It is "
                f"damaged or was exchanged. {_damaged(self.name)}"
            )
        self.verified = True


def find_weights(cfg: dict[str, Any], cache_dir: str | Path | None) -> Weights:
    """Finds the weights that a whole model's `pretrained_cfg` points to, downloaded if need be.

    Raises:
        HubError: If they cannot be downloaded.
        FileError: If there are none, or only a pickle.
    """
    if cfg["source"] == "local-dir":
        folder = Path(cfg["file"])
        path, config = folder / WEIGHTS_FILE, folder / CONFIG_FILE
        if not path.is_file():
            raise FileError(_no_weights(str(folder), [path.name for path in folder.glob("*")]))
        return Weights(
            path, read_json(config, f"{CONFIG_FILE} in {str(folder)!r}"), f"{WEIGHTS_FILE} in {str(folder)!r}"
        )
    model_id = cfg["hf_hub_id"]
    repo_id, revision = split_revision(model_id)
    try:
        path = download(repo_id, WEIGHTS_FILE, revision, cache_dir)
    except HubError as error:
        if not isinstance(error.__cause__, RemoteEntryNotFoundError):
            raise
        with explained("list the files of", repo_id):
            files = patiently(lambda: model_info(repo_id, revision=revision).siblings or [])
        raise FileError(_no_weights(model_id, [file.rfilename for file in files])) from error
    cached = try_to_load_from_cache(repo_id, CONFIG_FILE, cache_dir=cache_dir, revision=revision)
    data = read_json(Path(cached), f"{CONFIG_FILE} of {model_id!r}") if isinstance(cached, str) else {}
    return Weights(path, data, f"{WEIGHTS_FILE} of {model_id!r}, cached as {str(path)!r}")


def _no_weights(source: str, files: list[str]) -> str:
    pickles = [file for file in files if file.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
    if pickles:
        return (
            f"{source!r} has no {WEIGHTS_FILE}, only {', '.join(sorted(pickles)[:3])}: a pickle, which can run any "
            f"code when it is opened, and is never loaded. Ask its author for safetensors, or save the model with "
            f"timm_memwrap.save_pretrained."
        )
    return f"{source!r} has no {WEIGHTS_FILE}. Save a model with timm_memwrap.save_pretrained or push_to_hub."


def sha256(path: Path) -> str:
    """Hashes a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_header(path: Path, name: str) -> dict[str, tuple[str, list[int]]]:
    """Reads the types and shapes of the tensors in a safetensors file, and nothing else of it.

    Raises:
        FileError: If it is not a whole safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {key: (part.get_dtype(), part.get_shape()) for key, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise FileError(f"{name} is not a whole safetensors file ({error}). {_damaged(name)}") from error


def _damaged(name: str) -> str:
    return (
        "Delete it and load the model again, to download it anew."
        if ", cached as " in name
        else "Copy or save the model anew."
    )


def read_json(path: Path, name: str) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        FileError: If it holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{name} is not JSON ({error}). Load the model from another copy, or save it anew.") from error
    if not isinstance(data, dict):
        raise FileError(f"{name} holds a {type(data).__name__}, not the configuration of a model.")
    return data


def check_config(config: dict[str, Any], name: str) -> None:
    """Says what about a `config.json` this package cannot load.

    Raises:
        FileError: If it is not of a Memory Wrap model, is of a newer format, or needs what this timm lacks.
    """
    architecture = config.get("architecture")
    if not isinstance(architecture, str):
        raise FileError(f"{name} names no architecture: it is not the configuration of a timm model.")
    if not architecture.startswith(PREFIX):
        raise FileError(
            f"{name} is of {architecture!r}, which is no Memory Wrap model. Load it with timm.create_model, and give "
            f"it a memory with timm_memwrap.wrap."
        )
    block = config.get(MEMORY_CONFIG_KEY, {})
    if not isinstance(block, dict):
        raise FileError(f"{name}: {MEMORY_CONFIG_KEY} is {block!r}, not an object. The file is damaged.")
    version = block.get("format_version", CONFIG_FORMAT_VERSION)
    if version != CONFIG_FORMAT_VERSION:
        raise FileError(
            f"{name} has format_version={version!r}; this version of timm-memwrap reads {CONFIG_FORMAT_VERSION}. "
            f"Upgrade it: pip install --upgrade timm-memwrap."
        )
    if not is_model(architecture):
        raise FileError(
            f"{name} is of {architecture!r}, which timm {timm.__version__} does not have. Upgrade timm; or if it is "
            f"an architecture of your own, import it and call timm_memwrap.register_backbones first."
        )
    cfg, args = config.get("pretrained_cfg"), config.get("model_args", {})
    for key, value in (("pretrained_cfg", cfg), ("model_args", args)):
        if not isinstance(value, dict):
            raise FileError(f"{name}: {key} is {value!r}, not an object. The file is damaged.")
    assert isinstance(cfg, dict)
    _check_reserved(args, name)
    for holder in (config, args, cfg):
        classes = holder.get("num_classes", 0)
        if not isinstance(classes, int) or isinstance(classes, bool) or classes < 0:
            raise FileError(f"{name}: num_classes is {classes!r}, not a number of classes. The file is damaged.")
    for key, length in (("input_size", 3), ("mean", None), ("std", None)):
        values = cfg.get(key, [1, 1, 1])
        valid = isinstance(values, list) and all(
            isinstance(value, int | float) and not isinstance(value, bool) for value in values
        )
        if not valid or len(values) not in ((length,) if length else (1, 3, config.get("in_chans", 3))):
            raise FileError(f"{name}: {key} is {values!r}, not a list of numbers. The file is damaged.")
    try:
        _parse_model_cfg(deepcopy(config), {})
    except Exception as error:
        raise FileError(f"{name} cannot be read by timm ({type(error).__name__}: {error}).") from error


# -- what a file may make us build ------------------------------------------------------------------------------------


@contextmanager
def parameter_budget(header: dict[str, tuple[str, list[int]]], name: str) -> Iterator[None]:
    """Stops the building of a model that is far larger than the file that it is for.

    A configuration is a few hundred bytes that could ask for terabytes, or for modules without end.

    Raises:
        FileError: In the body, as soon as more parameters were made than the file could fill.
    """
    limit = 2 * sum(math.prod(shape) for key, (_, shape) in header.items() if not key.startswith(MEMORY_BANK)) + _SLACK
    made = 0
    thread = threading.get_ident()

    def count(_module: nn.Module, _name: str, parameter: Tensor | None) -> None:
        nonlocal made
        if parameter is None or threading.get_ident() != thread:
            return
        # A parameter costs something even when it is empty.
        made += parameter.numel() + 64
        if made > limit:
            raise FileError(
                f"{CONFIG_FILE} describes a larger model than {name} holds weights for. One of the two is damaged, or "
                f"they are not of the same model."
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


class shapes_only(TorchFunctionMode):
    """A context in which modules are built without storage and without values: quick, and of any size."""

    # PyTorch fills these in Python when there is no storage, and first imports its compiler for it: seconds.
    _RANDOM = frozenset({"normal_", "uniform_", "bernoulli_", "exponential_"})

    def __init__(self) -> None:
        super().__init__()
        self._device = torch.device("meta")

    def __enter__(self) -> "shapes_only":
        self._device.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._device.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Leaves out what fills a tensor with random numbers."""
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")
        if getattr(func, "__name__", "") in self._RANDOM and isinstance(tensor, Tensor) and tensor.is_meta:
            return tensor
        return func(*args, **kwargs)


def check_fits(model: nn.Module, header: dict[str, tuple[str, list[int]]], name: str) -> None:
    """Compares the names, shapes and kinds of a model's weights with those in a file.

    Raises:
        FileError: If they differ.
    """
    bank = f"{MEMORY_BANK}."
    expected = {key: value for key, value in model.state_dict().items() if not key.startswith(bank)}
    found = {key: value for key, value in header.items() if not key.startswith(bank)}
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unexpected:
        raise FileError(
            f"{name} does not fit {model.pretrained_cfg['architecture']!r}: missing {_some(missing)}, unexpected "  # type: ignore[index]
            f"{_some(unexpected)}. It is not of the architecture and model_args in {CONFIG_FILE}."
        )
    for key, tensor in expected.items():
        dtype, shape = found[key]
        if list(tensor.shape) != shape:
            raise FileError(
                f"{name}: {key} has shape {shape}; {CONFIG_FILE} describes {list(tensor.shape)}. They are not of the "
                f"same model, or one is damaged."
            )
        if tensor.is_floating_point() != dtype.startswith(("F", "BF")):
            raise FileError(f"{name}: {key} is of type {dtype}; expected {tensor.dtype}. The file is damaged.")


def _some(names: list[str]) -> str:
    return f"{names[:5]}{' ...' if len(names) > 5 else ''}"


def check_model_args(
    args: dict[str, Any],
    cfg: dict[str, Any],
    header: dict[str, tuple[str, list[int]]],
    name: str,
) -> None:
    """Refuses `model_args` that are no arguments of a model, and numbers out of all proportion to its weights.

    Raises:
        FileError: If there is one.
    """
    _check_reserved(args, f"The {CONFIG_FILE} beside {name}")
    classes = args.get("num_classes", cfg.get("num_classes"))
    if classes != cfg.get("num_classes"):
        # timm would take it for a wish for other classes, and the memory would be dropped.
        raise FileError(
            f"The {CONFIG_FILE} beside {name}: model_args has num_classes={str(classes)[:50]}, but the rest of it "
            f"describes {str(cfg.get('num_classes'))[:50]}. The file is damaged."
        )
    # Constructors make lists of such a length, and loop, before there is a parameter to count.
    largest = max([_LARGEST_NUMBER, *(size for _, shape in header.values() for size in shape)])
    for key, value in [*args.items(), *cfg.items()]:
        if _largest(value) > largest:
            raise FileError(
                f"The {CONFIG_FILE} beside {name}: {key} is {str(value)[:50]}, which describes a larger model than the "
                f"file holds weights for. One of the two is damaged, or they are not of the same model."
            )


def _check_reserved(args: dict[str, Any], name: str) -> None:
    wrong = sorted(_RESERVED_ARGS & set(args))
    if wrong:
        raise FileError(
            f"{name}: model_args has {_some(wrong)}, which no saved model has. The file is not to be trusted."
        )


def _largest(value: Any) -> float:
    if isinstance(value, dict | list | tuple):
        items = value.values() if isinstance(value, dict) else value
        return max(map(_largest, items), default=0)
    return abs(value) if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)) else 0


@contextmanager
def loading_errors(name: str | None) -> Iterator[None]:
    """Names the file in errors of loading its tensors; passes everything through if `name` is `None`.

    Raises:
        FileError: If the body finds the tensors wrong.
    """
    try:
        yield
    except FileError:
        raise
    except (ValueError, RuntimeError, RecursionError) as error:
        # PyTorch raises this one type for all it finds wrong with weights; any other is not about the file.
        if name is None or (type(error) is RuntimeError and "loading state_dict" not in str(error)):
            raise
        lines = [line.strip() for line in str(error).splitlines() if "loading state_dict" not in line]
        raise FileError(f"{name} cannot be loaded: {' '.join(lines)}") from error
