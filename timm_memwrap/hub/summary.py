"""What a saved model is and remembers, for people."""

import dataclasses
import os
from typing import Any

from timm_memwrap._utils import printable
from timm_memwrap.hub.loading import from_pretrained
from timm_memwrap.hub.saving import describe_memory

__all__ = ["Summary", "summarize"]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a saved model is and remembers.

    Attributes:
        source: Where it was loaded from.
        architecture: Its name in timm.
        num_classes: Number of classes.
        parameters: Number of parameters.
        memory: What the bank holds, as in `config.json`.
        class_counts: Number of samples in the memory by class name.
        memory_bytes: Size of the memory.
        image_bytes: Size of the images in it.
        stale: Whether the memory was encoded with other weights; `None` if it is empty or not recorded.
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
        """Returns the summary as lines of text."""
        lines = [
            printable(self.source),
            f"  architecture  {self.architecture}",
            f"  classes       {self.num_classes}",
            f"  parameters    {self.parameters:,}",
        ]
        memory = self.memory
        if not memory["size"]:
            return "\n".join([*lines, "  memory        empty: call timm_memwrap.build_memory_bank(model, data)"])
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
        counts = [(printable(name), count) for name, count in self.class_counts.items()]
        width = max(len(name) for name, _ in counts)
        return "\n".join([*lines, *(f"    {name:{width}}  {count:,}" for name, count in counts)])


def summarize(model_id: str | os.PathLike) -> Summary:
    """Loads a model and returns what it is and remembers.

    Args:
        model_id: As in `from_pretrained`.

    Raises:
        ValueError: As in `from_pretrained`.
        OSError: As in `from_pretrained`.
    """
    model = from_pretrained(model_id)
    bank = model.memory_bank
    names = bank.class_names
    return Summary(
        source=os.fspath(model_id),
        architecture=model.pretrained_cfg["architecture"],
        num_classes=model.num_classes,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        memory=describe_memory(bank),
        class_counts={names[i] if i < len(names) else str(i): count for i, count in bank.class_counts.items()},
        memory_bytes=sum(tensor.nbytes for tensor in bank.state_dict().values()),
        image_bytes=bank.images.nbytes if bank.images is not None else 0,
        stale=model.memory_is_stale() if bank.provenance.encoder else None,
    )


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
