"""The options of a recipe as typed dataclasses, named as in timm where timm has them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "DataConfig",
    "HubConfig",
    "MemoryConfig",
    "ModelConfig",
    "Recipe",
    "TrainingConfig",
    "check_values",
]


@dataclass
class ModelConfig:
    """The backbone, and how it reads a memory.

    Args:
        name: A timm architecture, with or without a tag, e.g. resnet18.a1_in1k; or a model to train further, on the Hub
            (hf-hub:owner/name) or in a folder, whose weights are loaded and whose head is kept where it fits.
        pretrained: Whether to start from the architecture's pretrained weights.
        pretrained_path: A safetensors file to load these weights from, instead of the Hub.
        in_chans: Number of input channels; null for 3, or 1 with the embedded digits.
        head_init_scale: Factor on the initial weights of a new classifier; null for 0 on a pretrained backbone, else 1.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth; null for the architecture's default.
        memory_only: Whether a trained head predicts from the memory alone. Always true with memory.mode none.
        distance: cosine, l2 or dot.
        scale: Factor on the similarities, or learned; null for the read head's default.
        read_head: joint, joint_equal, probabilities, pre_logits or logits with memory.mode none, else linear or
            identity; null: the first, or joint_equal where images may have several classes.
        classifier: own or vote with memory.mode none, else mlp or linear; null for the read head's default.
        read: sparsemax or reconstruction; null for the read head's default.
        temperature: Divisor of the logits; null for 1, or for what memory.calibrate finds.
        kwargs: Further arguments of the timm architecture.
    """

    name: str = "resnet18"
    pretrained: bool = False
    pretrained_path: str | None = None
    in_chans: int | None = None
    head_init_scale: float | None = None
    drop_rate: float = 0.0
    drop_path_rate: float | None = None
    memory_only: bool = False
    distance: Literal["cosine", "l2", "dot"] = "cosine"
    scale: float | Literal["learned"] | None = None
    read_head: Literal["linear", "identity", "joint", "joint_equal", "probabilities", "pre_logits", "logits"] | None = (
        None
    )
    classifier: Literal["mlp", "linear", "own", "vote"] | None = None
    read: Literal["sparsemax", "reconstruction"] | None = None
    temperature: float | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataConfig:
    """The images, and how they are augmented.

    Args:
        dataset: digits, a data set that timm reads (torch/cifar10, hfds/owner/name, wds/...), or empty for data_dir.
        data_dir: Folder, tar file or CSV file of the images, or a folder with a CSV file for each split.
        train_split: Name of the training split, or folder or CSV file in data_dir.
        val_split: Name of the validation split; null to hold out a fraction of the training images.
        val_fraction: That fraction.
        train_samples: Number of training images to use, balanced over the classes; null for all.
        val_samples: The same for validation.
        subset_seed: Seed of these choices.
        download: Whether a torch/ data set may be downloaded.
        unreadable: What to do with images that cannot be read: fail, or skip them and log how many.
        img_size: Image size in pixels; null for the model's default.
        batch_size: Images per batch on each process; fewer images make one batch.
        workers: Processes that load images.
        mean: Mean of each channel; null for the model's default.
        std: Standard deviation of each channel; null for the model's default.
        interpolation: How images are resized; null for the model's default.
        crop_pct: Fraction of an image that is evaluated; null for the model's default.
        scale: Range of the fraction of an image that a training crop takes.
        ratio: Range of its aspect ratio.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        color_jitter: Strength of colour jitter.
        auto_augment: An AutoAugment policy as timm names it, e.g. rand-m9-mstd0.5.
        re_prob: Probability of random erasing.
        mixup: Alpha of Mixup; 0 to disable.
        cutmix: Alpha of CutMix; 0 to disable.
        mixup_prob: Probability of applying either.
    """

    dataset: str = ""
    data_dir: str | None = None
    train_split: str = "train"
    val_split: str | None = "validation"
    val_fraction: float = 0.1
    train_samples: int | None = None
    val_samples: int | None = None
    subset_seed: int = 0
    download: bool = False
    unreadable: Literal["fail", "skip"] = "fail"
    img_size: int | None = None
    batch_size: int = 128
    workers: int = 2
    mean: list[float] | None = None
    std: list[float] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.4
    auto_augment: str | None = None
    re_prob: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0


@dataclass
class TrainingConfig:
    """The optimizer, its schedule, and how it is run.

    Args:
        epochs: Passes over the training images.
        opt: A timm optimizer.
        lr: Peak learning rate.
        momentum: Momentum, for optimizers that have one.
        weight_decay: Weight decay.
        layer_decay: Factor on the learning rate from one layer group to the group before it; null to disable.
        sched: A timm scheduler: cosine, tanh, step, multistep, poly, wsd, rsqrt, constant or none.
        warmup_epochs: Epochs of linear warmup, counted among the epochs.
        warmup_lr: Learning rate at the start of the warmup.
        min_lr: Learning rate at the end.
        decay_epochs: Epochs between decays (step), or of the decay (wsd, rsqrt); null for timm's default.
        decay_milestones: Epochs of the decays (multistep).
        decay_rate: Factor of a decay.
        clip_grad: Largest norm of the gradient; null to disable.
        grad_accum_steps: Batches whose gradients are accumulated for one step.
        smoothing: Label smoothing.
        class_weight: balanced to weigh an image in the loss by how rare its class is; null to weigh all the same, and
            where images may have several classes.
        amp: Whether to train in mixed precision.
        amp_dtype: bfloat16 or float16.
        model_ema: Whether to keep, evaluate and save an average of the weights.
        model_ema_decay: Its decay.
        model_ema_warmup: Whether the decay starts lower and grows.
        channels_last: Whether to use the channels-last memory format, which is often faster on a CPU.
        torchcompile: Whether to compile the model.
        freeze_backbone: Whether to train the head alone, on encodings that are computed once, without augmentation.
        val_interval: Epochs between evaluations; the last epoch is always evaluated.
        keep: Whether to save the weights of the last epoch, or of the best by validation accuracy (by mean average
            precision where images may have several classes), which is then biased.
        seed: Seed of weights, batches and augmentation.
        device: A torch device; null for cuda if available, else cpu.
        tensorboard: Whether to write TensorBoard events.
    """

    epochs: int = 20
    opt: str = "adamw"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.05
    layer_decay: float | None = None
    sched: str = "cosine"
    warmup_epochs: int = 1
    warmup_lr: float = 1e-5
    min_lr: float = 0.0
    decay_epochs: float | None = None
    decay_milestones: list[int] = field(default_factory=lambda: [90, 180, 270])
    decay_rate: float = 0.1
    clip_grad: float | None = None
    grad_accum_steps: int = 1
    smoothing: float = 0.0
    class_weight: Literal["balanced"] | None = None
    amp: bool = False
    amp_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    model_ema: bool = False
    model_ema_decay: float = 0.9998
    model_ema_warmup: bool = False
    channels_last: bool = False
    torchcompile: bool = False
    freeze_backbone: bool = False
    val_interval: int = 1
    keep: Literal["last", "best"] = "last"
    seed: int = 0
    device: str | None = None
    tensorboard: bool = False


@dataclass
class MemoryConfig:
    """The memory, during training and after it.

    Args:
        mode: What training reads. none: nothing, and the plain classifier is wrapped at the end; batch: the rest of the
            batch; sample: images drawn for each step, as in the paper; queue: recent encodings, without gradient.
        train_size: Number of samples that a step reads in the modes sample and queue.
        size: Most samples in the memory bank; null for all.
        selection: How they are chosen: herding, balanced, random or all.
        store_images: Whether to store small images of them for people to look at.
        calibrate: Whether to fit temperature, confidence and familiarity to the validation images; null for only with
            mode none, unless model.temperature is given.
        sampled_evaluations: Number of evaluations as in the paper, with train_size images drawn for each batch.
    """

    mode: Literal["none", "batch", "sample", "queue"] = "none"
    train_size: int = 100
    size: int | None = 1000
    selection: Literal["herding", "balanced", "random", "all"] = "herding"
    store_images: bool = False
    calibrate: bool | None = None
    sampled_evaluations: int = 0


@dataclass
class HubConfig:
    """The repository on the Hugging Face Hub.

    Args:
        push: Repository to push the finished model to, owner/name; null for none.
        private: Whether a new repository is private.
        include_images: Whether to upload the images in the memory.
        license: License for the model card.
        dataset_id: Data set on the Hub for the model card.
    """

    push: str | None = None
    private: bool | None = None
    include_images: bool = False
    license: str | None = None
    dataset_id: str | None = None


@dataclass
class Recipe:
    """All options of a training.

    Args:
        model: The backbone, and how it reads a memory.
        data: The images, and how they are augmented.
        training: The optimizer, its schedule, and how it is run.
        memory: The memory, during training and after it.
        hub: The repository on the Hub.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    hub: HubConfig = field(default_factory=HubConfig)


_NUMBERS: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "0 to 1",
        lambda value: 0 <= value <= 1,
        "model.drop_rate model.drop_path_rate data.hflip data.vflip data.re_prob data.mixup_prob training.momentum "
        "training.layer_decay training.smoothing training.model_ema_decay",
    ),
    (
        "0 or a number above it",
        lambda value: 0 <= value < math.inf,
        "model.head_init_scale data.workers data.subset_seed data.color_jitter data.mixup data.cutmix training.lr "
        "training.weight_decay training.warmup_epochs training.warmup_lr training.min_lr training.decay_milestones "
        "training.decay_rate training.seed memory.sampled_evaluations",
    ),
    (
        "a number above 0",
        lambda value: 0 < value < math.inf,
        "model.temperature data.std data.crop_pct data.scale data.ratio training.decay_epochs training.clip_grad",
    ),
    ("a finite number", math.isfinite, "data.mean"),
    (
        "1 or a number above it",
        lambda value: 1 <= value < math.inf,
        "data.train_samples data.val_samples data.img_size data.batch_size training.epochs training.grad_accum_steps "
        "training.val_interval memory.train_size memory.size",
    ),
)


def check_values(recipe: Recipe) -> None:
    """Raises if a number of a recipe is outside what its option allows."""
    for expected, fits, names in _NUMBERS:
        for name in names.split():
            section, _, key = name.partition(".")
            value = getattr(getattr(recipe, section), key)
            # NaN is in no range.
            if not all(each is None or fits(each) for each in (value if isinstance(value, list | tuple) else [value])):
                raise ValueError(f"{name}={value!r} is not valid. Pass {expected}.")
    for key in ("scale", "ratio"):
        least, most = getattr(recipe.data, key)
        if least > most:
            raise ValueError(f"data.{key}={[least, most]} is not a range. Pass the smaller number first.")
