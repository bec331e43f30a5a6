"""What is checked about a model from outside before it is built: its `config.json`, and the tensors that it describes.

A `config.json` is a few hundred bytes that anyone may have written, and could ask for terabytes or for other files.
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models import _hub, build_model_with_cfg, is_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from timm_memwrap.constants import CONFIG_FILE, CONFIG_FORMAT_VERSION, MEMORY_BANK, MEMORY_CONFIG_KEY, PREFIX
from timm_memwrap.tensor_files import FileError

__all__ = [
    "check_fits",
    "check_sizes",
    "misfits",
    "other_names",
    "parse_config",
    "shapes_only",
    "split_bank",
    "without_values",
]

# Elements of tensors that building a model may take beyond twice those in its file.
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
# Pixels a side that an image is resized to, at the most.
_LARGEST_IMAGE = 2**12

_TOO_LARGE = "describes a larger model than the file holds weights for. One of them is damaged, or of another model."


def parse_config(
    config: dict[str, Any], name: str, source: Mapping[str, Any]
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Returns architecture, pretrained cfg and model arguments as timm reads them, if they are of a model of ours.

    `source` is a pretrained cfg that says where the model is from, and `name` what to call the file in a `FileError`.
    """
    architecture = config.get("architecture")
    if not isinstance(architecture, str):
        raise FileError(f"{name} names no architecture: it is not the configuration of a timm model.")
    if not architecture.startswith(PREFIX):
        raise FileError(
            f"{name} is of {architecture!r}, which is not a Memory Wrap model. Load it with timm.create_model, and "
            f"give it a memory with timm_memwrap.wrap."
        )
    block, cfg, args = config.get(MEMORY_CONFIG_KEY, {}), config.get("pretrained_cfg"), config.get("model_args", {})
    for key, value in ((MEMORY_CONFIG_KEY, block), ("pretrained_cfg", cfg), ("model_args", args)):
        if not isinstance(value, dict):
            raise FileError(f"{name}: {key} is {value!r}, not an object. The file is damaged.")
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
    reserved = sorted(_RESERVED_ARGS & set(args))
    if reserved:
        raise FileError(f"{name}: model_args has {_some(reserved)}, which no saved model has. It is not to be trusted.")
    place = {key: source[key] for key in ("source", "file", "hf_hub_id") if source.get(key)}
    try:
        cfg, _, args = _hub._parse_model_cfg({**config, "pretrained_cfg": {**config["pretrained_cfg"]}}, place)
    except Exception as error:
        raise FileError(f"{name} cannot be read by timm ({type(error).__name__}: {error}).") from error
    classes = cfg.get("num_classes", 0)
    if not _is_number(classes, int) or classes < 0:
        raise FileError(f"{name}: num_classes is {classes!r}, not a number of classes. The file is damaged.")
    if args.get("num_classes", classes) != classes:
        # timm would take it for a wish for other classes, and the memory would be dropped.
        raise FileError(
            f"{name}: model_args has num_classes={str(args['num_classes'])[:50]}, but the rest of it describes "
            f"{str(classes)[:50]}. The file is damaged."
        )
    size = cfg.get("input_size", (3, 1, 1))
    for key, values in (("input_size", size), ("mean", cfg.get("mean", [0])), ("std", cfg.get("std", [1]))):
        values = list(values) if isinstance(values, tuple) else values
        # timm gives one value for all channels, three, or one for each.
        lengths = (3,) if key == "input_size" else (1, 3, size[0])
        if not isinstance(values, list) or not all(map(_is_number, values)) or len(values) not in lengths:
            raise FileError(f"{name}: {key} is {values!r}, not a list of numbers. The file is damaged.")
    for key in ("input_size", "test_input_size", "min_input_size"):
        sides, crop = cfg.get(key), cfg.get("test_crop_pct" if key == "test_input_size" else "crop_pct") or 1
        if not sides:
            continue
        numbers = isinstance(sides, list | tuple) and len(sides) == 3 and all(map(_is_number, [*sides, crop]))
        if not numbers or not max(sides[1:]) <= _LARGEST_IMAGE * min(crop, 1):
            raise FileError(
                f"{name}: images would be resized to {key}={str(sides)[:50]} over crop_pct={str(crop)[:20]}, "
                f"more than {_LARGEST_IMAGE} pixels a side. The file is damaged, or not to be trusted."
            )
    return architecture, cfg, dict(args)


def _is_number(value: Any, kind: Any = int | float) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def check_sizes(args: dict[str, Any], cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> None:
    """Raises a `FileError` if a number in `model_args` or the cfg is out of all proportion to the weights."""
    # Constructors make lists of such a length, and loop, before there is a tensor to count. The scale of a memory and
    # what timm says about images are no sizes of a network.
    largest = max([_LARGEST_NUMBER, *(size for tensor in tensors.values() for size in tensor.shape)])
    for key, value in [*args.items(), *cfg.items()]:
        if key != "scale" and _largest(value) > largest:
            raise FileError(f"The {CONFIG_FILE} of {name}: {key} is {str(value)[:50]}, which {_TOO_LARGE}")


def _largest(value: Any) -> float:
    if isinstance(value, dict | list | tuple):
        items = value.values() if isinstance(value, dict) else value
        return max(map(_largest, items), default=0)
    return abs(value) if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)) else 0


class without_values(TorchFunctionMode):
    """A context in which this thread fills no new module with random numbers: their weights are loaded anyway."""

    # PyTorch hands some of its initialisers over as a whole, and does not ask again for what they call.
    _RANDOM = frozenset(
        {"normal_", "uniform_", "bernoulli_", "exponential_", "erfinv_", "trunc_normal_", "orthogonal_"}
        | {"kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_"}
    )

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Leaves out what fills a tensor with random numbers."""
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")
        if getattr(func, "__name__", "") in self._RANDOM and isinstance(tensor, Tensor):
            return tensor
        return self._call(func, args, kwargs)

    def _call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        return func(*args, **kwargs)


class shapes_only(without_values):
    """A context in which modules are built without storage, and stopped if they are larger than the file's tensors."""

    _CONSTRUCTORS = frozenset(
        {torch.empty, torch.zeros, torch.ones, torch.full, torch.eye, torch.arange, torch.linspace, torch.logspace}
        | {torch.rand, torch.randn, torch.randint, torch.randperm, torch.tensor, torch.as_tensor, torch.empty_strided}
        | {torch.tril_indices, torch.triu_indices, torch.hann_window, torch.hamming_window}
    )

    def __init__(self, tensors: Mapping[str, Tensor], name: str) -> None:
        super().__init__()
        self._name = name
        self._left = 2 * sum(tensor.numel() for tensor in split_bank(tensors)[0].values()) + _SLACK

    def _call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        if func not in self._CONSTRUCTORS:
            return func(*args, **kwargs)
        if kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        made = func(*args, **kwargs)
        # A tensor costs something even when it is empty.
        self._left -= made.numel() + 64
        if self._left < 0:
            raise FileError(f"The {CONFIG_FILE} of {self._name} {_TOO_LARGE}")
        return made


def check_fits(model: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    """Raises a `FileError` if names, shapes and kinds of a model's weights are not those in a file."""
    wrong = misfits(split_bank(model.state_dict())[0], split_bank(tensors)[0])
    if wrong:
        raise FileError(
            f"{name} does not fit {model.pretrained_cfg['architecture']!r}: {' '.join(wrong[:5])} The file is damaged, "  # type: ignore[index]
            f"or not of the architecture and model_args in {CONFIG_FILE}."
        )


def misfits(expected: Mapping[str, Tensor], found: Mapping[str, Any], names: bool = True) -> list[str]:
    """Returns in what weights differ from those expected: shapes, kinds, and with `names` which there are."""
    different = other_names(expected, found) if names else None
    wrong = [different] if different else []
    for key in sorted(expected.keys() & found.keys()):
        own, other = expected[key], found[key]
        if not isinstance(other, Tensor):
            wrong.append(f"{key} is a {type(other).__name__}, not a tensor.")
        elif own.shape != other.shape:
            wrong.append(f"size mismatch for {key}: its shape is {list(other.shape)}, expected {list(own.shape)}.")
        elif own.is_floating_point() != other.is_floating_point():
            wrong.append(f"{key} is of {other.dtype}, expected {own.dtype}.")
    return wrong


def other_names(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """Returns which names of weights are missing and unexpected, if any.

    Frozen norm layers do not count their batches, and PyTorch does without the count.
    """
    missing = sorted(name for name in expected.keys() - found.keys() if not name.endswith("num_batches_tracked"))
    unexpected = sorted(found.keys() - expected.keys())
    return f"missing {_some(missing)}, unexpected {_some(unexpected)}." if missing or unexpected else None


def split_bank(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a model's state dict into its weights and the memory bank."""
    bank = {name: value for name, value in tensors.items() if name.startswith(f"{MEMORY_BANK}.")}
    return {name: value for name, value in tensors.items() if name not in bank}, bank


def _some(names: list[str]) -> str:
    return f"{names[:5]}{' ...' if len(names) > 5 else ''}"
