"""The commands that teach a saved model, and make it forget."""

from timm_memwrap._utils import printable
from timm_memwrap.cli.arguments import IN_TERMINAL
from timm_memwrap.jobs.remember import editing, forget_samples, remember_folder

__all__ = ["forget", "remember"]


def remember(
    source: str,
    folder: str,
    label: str | None = None,
    out: str | None = None,
    device: str | None = None,
    unreadable: str = "fail",
    progress: bool = IN_TERMINAL,
) -> None:
    """Adds images to the memory of a model, without training; a class that it does not know is added too.

    Args:
        source: The model: a folder, or with out a repository on the Hub, owner/name or owner/name@revision.
        folder: Images to remember, in a folder for each class.
        label: Class of all images in the folder, if there are no folders for classes.
        out: Folder to save to; null for the model's own.
        device: A torch device; null for cuda if available, else cpu.
        unreadable: What to do with images that cannot be read: fail, or skip them and log which.
        progress: Whether to show progress bars; by default in a terminal.
    """
    with editing(source, out, device) as model:
        before = model.num_classes
        counts = remember_folder(model, folder, label, unreadable, progress)
        names = model.memory_bank.class_names
        new = set(names[before:])
    for name, count in counts.items():
        print(printable(f"Remembered {count:,} of {name}{', a new class' if name in new else ''}."))
    print(
        f"The memory has {len(model.memory_bank):,} samples of {model.num_classes} classes. Saved in {out or source}."
    )


def forget(
    source: str,
    ids: list[str],
    classes: list[str] | None = None,
    from_report: str | None = None,
    out: str | None = None,
) -> None:
    """Removes samples from the memory of a model, without training, and applies what was ticked in a report.

    Args:
        source: The model: a folder, or with out a repository on the Hub, owner/name or owner/name@revision.
        ids: Samples to forget; explain and report show their ids.
        classes: Classes to forget all samples of, by name: '[zebra, horse]'.
        from_report: A table that report wrote, in which what is to be applied is marked; also as --from.
        out: Folder to save to; null for the model's own.
    """
    from timm_memwrap.explaining import ticked

    removed, relabels = ([], {}) if from_report is None else ticked(from_report)
    with editing(source, out) as model:
        before = len(model.memory_bank)
        forget_samples(model, [*ids, *removed], classes or (), relabels)
    print(
        f"Forgot {before - len(model.memory_bank):,} samples, relabelled {len(relabels):,}. The memory has "
        f"{len(model.memory_bank):,} samples. Saved in {out or source}."
    )
