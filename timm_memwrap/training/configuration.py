"""What a recipe may say, as typed dataclasses, and where the recipes are."""

from argparse import ArgumentError
from dataclasses import dataclass, field, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar, get_type_hints

from jsonargparse import ArgumentParser

__all__ = [
    "DataConfig",
    "MemoryConfig",
    "ModelConfig",
    "QuickstartConfig",
    "TrainingConfig",
    "find_recipe",
    "load_config",
]

C = TypeVar("C")


@dataclass
class ModelConfig:
    """The backbone.

    Args:
        name: A timm architecture.
        distance: Distance of the head that is trained for comparison.
        read_head: Read head of that head.
        classifier: Classifier of that head.
    """

    name: str = "test_resnet"
    distance: str = "cosine"
    read_head: str = "linear"
    classifier: str = "mlp"


@dataclass
class DataConfig:
    """The images.

    Args:
        img_size: Side to which images are resized, in pixels.
        batch_size: Images per step.
    """

    img_size: int = 32
    batch_size: int = 64


@dataclass
class TrainingConfig:
    """The schedule, in timm's words.

    Args:
        epochs: Passes over the training images.
        opt: A timm optimizer.
        lr: Peak learning rate.
        weight_decay: Weight decay.
        warmup_epochs: Epochs of linear warmup before the cosine decay.
        seed: Seed of weights and batches.
    """

    epochs: int = 10
    opt: str = "adamw"
    lr: float = 4e-3
    weight_decay: float = 0.05
    warmup_epochs: int = 1
    seed: int = 0


@dataclass
class MemoryConfig:
    """The memory bank.

    Args:
        size: Number of samples to remember.
        selection: How they are chosen.
        store_images: Whether small images of them are kept for the figure.
    """

    size: int = 1000
    selection: str = "balanced"
    store_images: bool = True


@dataclass
class QuickstartConfig:
    """All that the quickstart can be told.

    Args:
        model: The backbone.
        data: The images.
        training: The schedule.
        memory: The memory bank.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)


def find_recipe(name: str) -> Path:
    """Returns the file of a recipe: one that comes with the package, by its stem, or the given path.

    Raises:
        ValueError: If there is none.
    """
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return Path(name)
    # Inside the package once installed, beside it in the repository.
    package = Path(__file__).parent.parent
    folders = [package / "hub_configs", package.parent / "hub_configs"]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted(path.stem for folder in folders for path in folder.glob("*.yaml"))
    raise ValueError(f"No recipe {name!r}. There are {', '.join(map(repr, known))}; or pass the path of a YAML file.")


def load_config(config_class: type[C], path: Path) -> C:
    """Reads a YAML file into a configuration, whose fields and types it must fit.

    Raises:
        ValueError: If the file has unknown keys or wrong types.
    """
    content = _read_yaml(path)
    _refuse_unknown(content, config_class, path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(config_class, "config")
    try:
        parsed = parser.parse_object({"config": content})
    except (ArgumentError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return parser.instantiate(parsed).config


def _refuse_unknown(content: dict, config_class: type, path: Path, section: str = "") -> None:
    """Names an unknown key and the nearest known one; the parser would pass over an empty section."""
    types = get_type_hints(config_class)
    for key, value in content.items():
        if key not in types:
            near = get_close_matches(str(key), types, n=1)
            hint = f"Did you mean {section + near[0]!r}?" if near else f"Known are {', '.join(types)}."
            raise ValueError(f"{path}: unknown key {section + str(key)!r}. {hint}")
        if is_dataclass(types[key]) and isinstance(value, dict):
            _refuse_unknown(value, types[key], path, f"{section}{key}.")


def _read_yaml(path: Path) -> dict:
    """Reads a YAML file that holds a mapping.

    Raises:
        ValueError: If the file is not YAML, or not a mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not sections such as 'model:'.")
    return content
