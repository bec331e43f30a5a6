"""What a recipe may say, as typed dataclasses, in timm's words where timm has them."""

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["DataConfig", "HubConfig", "MemoryConfig", "ModelConfig", "Recipe", "TrainingConfig"]


@dataclass
class ModelConfig:
    """The backbone, and how a memory is read.

    Args:
        name: A timm architecture, with or without a tag, e.g. resnet18.a1_in1k.
        pretrained: Whether to start from its pretrained weights.
        pretrained_path: A safetensors file to take these weights from, instead of the Hub.
        in_chans: Number of input channels; null for 3, and for the data set's own where it has others.
        head_init_scale: Factor on the initial weights of a new classifier; null for 0 on a pretrained backbone, else 1.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth; null for the architecture's own.
        memory_only: Whether to predict from the memory alone; null for what suits the read head.
        distance: cosine, l2 or dot.
        scale: Factor on the similarities, or learned; null for what suits the read head.
        read_head: linear, identity, classifier, pre_logits or probabilities; null for probabilities with memory.mode
            none, else linear.
        classifier: mlp, linear or vote; null for what suits the read head.
        temperature: What the logits are divided by; null for 1, or for what memory.calibrate finds.
        kwargs: More arguments of the timm architecture.
    """

    name: str = "resnet18"
    pretrained: bool = False
    pretrained_path: str | None = None
    in_chans: int | None = None
    head_init_scale: float | None = None
    drop_rate: float = 0.0
    drop_path_rate: float | None = None
    memory_only: bool | None = None
    distance: Literal["cosine", "l2", "dot"] = "cosine"
    scale: float | Literal["learned"] | None = None
    read_head: Literal["linear", "identity", "classifier", "pre_logits", "probabilities"] | None = None
    classifier: Literal["mlp", "linear", "vote"] | None = None
    temperature: float | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataConfig:
    """The images, and what is done to them in training.

    Args:
        dataset: The embedded digits, a data set that timm can read (torch/cifar10, hfds/owner/name, wds/...), or empty
            for an image folder or tar file.
        data_dir: Folder or tar file of the images.
        train_split: Name of the training split, or folder in data_dir.
        val_split: Name of the validation split; null to hold out a share of the training images.
        val_fraction: This share.
        train_samples: How many training images to use, as many of each class as there are; null for all.
        val_samples: The same for validation.
        subset_seed: Seed of these choices.
        download: Whether a torch/ data set may be downloaded.
        unreadable: What to do with images that cannot be read: fail, or skip them and say how many.
        img_size: Side of an image in pixels; null for the model's own.
        batch_size: Images a step, on each process.
        workers: Processes that load images.
        mean: Mean of the channels; null for the model's own.
        std: Standard deviation of the channels; null for the model's own.
        interpolation: How images are resized; null for the model's own.
        crop_pct: Share of an image that evaluation looks at; null for the model's own.
        scale: Smallest and largest share of an image that training crops.
        ratio: Smallest and largest aspect ratio of a crop.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        color_jitter: Strength of colour jitter.
        auto_augment: An AutoAugment policy in timm's words, e.g. rand-m9-mstd0.5.
        re_prob: Probability of random erasing.
        mixup: Alpha of Mixup; 0 for none.
        cutmix: Alpha of CutMix; 0 for none.
        mixup_prob: Probability of either.
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
    """The schedule.

    Args:
        epochs: Passes over the training images.
        opt: A timm optimizer.
        lr: Peak learning rate.
        momentum: Momentum, for optimizers that have one.
        weight_decay: Weight decay.
        layer_decay: Factor on the learning rate from one layer group to the one before; null for none.
        sched: A timm scheduler: cosine, tanh, step, multistep, poly, wsd, rsqrt, constant or none.
        warmup_epochs: Epochs of linear warmup, which are part of the epochs.
        warmup_lr: Learning rate at the start of it.
        min_lr: Learning rate at the end.
        decay_epochs: Epochs between decays (step), or of the decay (wsd, rsqrt); null for timm's own.
        decay_milestones: Epochs of the decays (multistep).
        decay_rate: Factor of a decay.
        clip_grad: Largest norm of the gradient; null for none.
        grad_accum_steps: Batches whose gradients make one step.
        smoothing: Label smoothing.
        amp: Whether to compute in mixed precision.
        amp_dtype: bfloat16 or float16.
        model_ema: Whether to keep, evaluate and save an average of the weights.
        model_ema_decay: Its decay.
        model_ema_warmup: Whether the decay starts lower and grows.
        channels_last: Whether weights of convolutions lie in memory channels last. On a CPU often faster.
        torchcompile: Whether to compile the model.
        freeze_backbone: Whether to train the head alone, on encodings that are computed once, without augmentation.
        val_interval: Epochs between evaluations; the last is always evaluated.
        keep: Which weights to save: of the last epoch, or of the best by validation accuracy, which is then no longer a
            fair estimate.
        seed: Seed of weights, batches and augmentation.
        device: A torch device; null for cuda if there is one, else cpu.
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
    """The memory, while training and after it.

    Args:
        mode: What is read in training. none: nothing, the plain classifier is trained and wrapped at the end; batch:
            the rest of the batch; sample: images drawn anew at each step, the paper's protocol; queue: recent
            encodings, without gradient.
        train_size: How many samples a step reads in the modes sample and queue.
        size: How many samples the memory bank remembers; null for all.
        selection: How they are chosen: balanced, random, kmeans or all.
        store_images: Whether small images of them are kept, for people to look at.
        calibrate: Whether the finished model gets the temperature that fits the validation images best; null for with
            the mode none, unless model.temperature is given.
        sampled_evaluations: How often the finished model is also evaluated as in the paper, with train_size training
            images drawn at random for each batch, and averaged; 0 for not at all.
    """

    mode: Literal["none", "batch", "sample", "queue"] = "none"
    train_size: int = 100
    size: int | None = 1000
    selection: Literal["random", "balanced", "kmeans", "all"] = "balanced"
    store_images: bool = False
    calibrate: bool | None = None
    sampled_evaluations: int = 0


@dataclass
class HubConfig:
    """The repository on the Hugging Face Hub.

    Args:
        push: Repository to push the finished model to, owner/name; null for none.
        private: Whether a repository that is made is private.
        include_images: Whether the images in the memory are sent.
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
    """All that a training can be told.

    Args:
        model: The backbone, and how a memory is read.
        data: The images.
        training: The schedule.
        memory: The memory.
        hub: The repository on the Hub.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    hub: HubConfig = field(default_factory=HubConfig)
