"""What a saved model is and remembers, for people."""

import dataclasses
import os
from typing import Any

from timm_memwrap._utils import printable
from timm_memwrap.hub.loading import from_pretrained
from timm_memwrap.hub.model_card import describe_memory, named_counts

__all__ = ["Summary", "summarize"]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a saved model is and remembers."""

    source: str
    architecture: str
    num_classes: int
    parameters: int
    memory: dict[str, Any]  # what the bank holds, as in `config.json`
    class_counts: list[tuple[str, int]]  # samples in the memory by the name of their class
    memory_bytes: int  # with the images
    image_bytes: int
    stale: bool | None  # whether other weights encoded the memory; `None` if it is empty or not recorded

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
        since = [(what, memory[what]) for what in ("appended", "removed")]
        changes = "".join(f", {count:,} {what} since" for what, count in since if count)
        calibrated = f"on {memory['calibrated_on']:,} images" if memory["calibrated_on"] else "no"
        elsewhere = f"; in {printable(memory['image_dataset'])}" if memory["image_dataset"] else ""
        lines += [
            f"  memory        {memory['size']:,} samples, {self.memory_bytes / 1e6:,.2f} MB",
            *(["  labels        several classes per sample, or none"] if memory["multi_label"] else []),
            f"  from          {printable(source)}{population}{seed}{changes}",
            f"  images        {f'{self.image_bytes / 1e6:,.2f} MB' if memory['images'] else 'not inside'}{elsewhere}",
            f"  fingerprint   {fits[self.stale]}",
            f"  calibrated    {calibrated}",
            "  by class",
        ]
        counts = [(printable(name), count) for name, count in self.class_counts]
        width = max(len(name) for name, _ in counts)
        return "\n".join([*lines, *(f"    {name:{width}}  {count:,}" for name, count in counts)])


def summarize(model_id: str | os.PathLike) -> Summary:
    """Loads a model and returns what it is and remembers.

    Args:
        model_id: As in `from_pretrained`.

    Raises:
        ValueError, OSError: As in `from_pretrained`.
    """
    model = from_pretrained(model_id)
    bank, images = model.memory_bank, model.memory_bank.images
    return Summary(
        source=os.fspath(model_id),
        architecture=model.pretrained_cfg["architecture"],
        num_classes=model.num_classes,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        memory=describe_memory(bank),
        class_counts=named_counts(bank),
        memory_bytes=sum(tensor.nbytes for tensor in bank.state_dict().values()),
        image_bytes=0 if images is None else images.nbytes,
        stale=model.memory_is_stale() if bank.provenance.encoder else None,
    )
