"""The model card: what a visitor of the repository sees, and the metadata that the Hub reads."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from timm_memwrap._utils import printable
from timm_memwrap.bases import Base
from timm_memwrap.constants import CARD_FIGURE_FILE, CARD_FILE, CONFIG_FORMAT_VERSION
from timm_memwrap.hub.pins import image_dataset
from timm_memwrap.memory_bank import MemoryBank
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.registry import split_name
from timm_memwrap.sample_ids import short_name

__all__ = ["CardDetails", "describe_memory", "loading_code", "make_card", "named_counts", "update_memory", "write_card"]

# What a user gives for a card: details, or the whole text.
CardDetails = Mapping[str, Any] | str | None

_TEXTS = ("name", "description", "license", "base_model")
CARD_FIELDS = (*_TEXTS, "datasets", "tags", "accuracy", "results", "figure", "training")
RESULT_FIELDS = ("dataset", "dataset_id", "split", "metric", "value")
TRAINING_FIELDS = ("command", "recipe", "caveat", "seed", "data", "device", "versions")
TAGS = ("timm", "memory-wrap", "arxiv:2106.01440")

# What stands between the marks is replaced when the memory changes, and nothing else in a card is.
_BEGIN, _END = "<!-- timm_memwrap: memory -->", "<!-- timm_memwrap: end of memory -->"

# What no Markdown makes anything of: neither markup nor, by itself, a link.
_PLAIN = re.compile(r"([^\W_]|[ ,()/'-])*")


def loading_code(source: str) -> dict[str, str]:
    """Returns the lines of Python that load the model from `source`, a name for `timm.create_model`, by library."""
    name = json.dumps(source.split(":", 1)[1])
    return {
        "timm": f"import timm\nimport timm_memwrap\n"
        f"model = timm.create_model({json.dumps(source)}, pretrained=True).eval()",
        "timm_memwrap": f"import timm_memwrap\nmodel = timm_memwrap.from_pretrained({name})",
        "transformers": f"import timm_memwrap\nfrom transformers import AutoModelForImageClassification\n"
        f"classifier = AutoModelForImageClassification.from_pretrained({name})",
    }


def make_card(
    model: MemoryWrapModel,
    source: str,
    details: Mapping[str, Any] | None,
    bank: MemoryBank,
    base: Base | None = None,
) -> str:
    """Returns a model card for a model that is loaded from `source` with this bank: metadata and text.

    With a base, it is the card of a memory alone.
    """
    details = dict(details or {})
    unknown = sorted(set(details) - set(CARD_FIELDS))
    if unknown:
        raise ValueError(f"Unknown model_card fields {unknown}. Those known are {', '.join(CARD_FIELDS)}.")
    for key in _TEXTS:
        if not isinstance(details.get(key), str | None):
            raise ValueError(f"model_card[{key!r}] is {details[key]!r}. Pass text.")
    name = details.get("name") or source.split(":", 1)[1].split("@")[0].rstrip("/").split("/")[-1]
    results = _results(details, bank)
    relation: dict[str, Any] = {} if base is None else {"base_model_relation": "adapter"}
    data = ModelCardData(
        # As the Hub's guide spells the ids of libraries: once models have one, it cannot change.
        library_name="timm-memwrap",
        pipeline_tag="image-classification",
        tags=[*TAGS, *_texts(details, "tags")],
        license=details.get("license"),
        base_model=details.get("base_model") or (model.base_model if base is None else base.name),
        datasets=_texts(details, "datasets") or None,
        eval_results=results or None,
        model_name=name if results else None,
        **relation,
    )
    body = _render(
        "model_card.md.jinja",
        name=name,
        description=details.get("description"),
        backbone=split_name(model.pretrained_cfg["architecture"])[1],
        model=model,
        parameters=f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        loading=loading_code(source),
        figure=CARD_FIGURE_FILE if details.get("figure") else None,
        memory=_memory(bank),
        multi_label=bank.multi_label,
        base=base,
        results=results,
        training=_training(details.get("training")),
    )
    text = f"---\n{data.to_yaml()}\n---\n\n{body}\n"
    # The Hub's own class reads it back: what it cannot read, the Hub would not.
    if ModelCard(text).data.to_dict() != data.to_dict():
        raise ValueError(
            f"The metadata {data.to_dict()} has characters that YAML changes. Remove them from model_card."
        )
    return text


def write_card(
    model: MemoryWrapModel,
    folder: Path,
    bank: MemoryBank,
    source: str,
    details: CardDetails,
    base: Base | None = None,
) -> list[Path]:
    """Writes the model card, and its figure if it has one, and returns the files."""
    files = [folder / CARD_FILE]
    text = update_memory(details, bank) if isinstance(details, str) else make_card(model, source, details, bank, base)
    files[0].write_text(text, encoding="utf-8", errors="surrogateescape", newline="")
    figure = details.get("figure") if isinstance(details, Mapping) else None
    if figure is not None:
        if Path(figure).suffix.lower() != ".png" or not Path(figure).is_file():
            raise ValueError(f"model_card['figure'] is {str(figure)!r}, which is not a PNG file. Save one there.")
        files.append(shutil.copyfile(figure, folder / CARD_FIGURE_FILE))
    return files


def update_memory(card: str, bank: MemoryBank) -> str:
    """Returns a card with its part about the memory updated; as it is, if it has no such part."""
    # A line each: the name of a class may say the same.
    before, _, rest = card.partition(f"\n{_BEGIN}")
    _, end, after = rest.partition(f"\n{_END}")
    return f"{before}\n{_memory(bank)}{after}" if end else card


def describe_memory(bank: MemoryBank) -> dict[str, Any]:
    """Returns what a bank holds as JSON, for people who read `config.json`; nothing is loaded from it."""
    memory = {"format_version": CONFIG_FORMAT_VERSION, "size": len(bank)}
    if not memory["size"]:
        return memory
    counts = {str(label): count for label, count in bank.class_counts.items()}
    found = {
        "class_counts": counts,
        "multi_label": bank.multi_label,
        "images": bank.images is not None,
        "calibrated_on": bank.reference.count,
    }
    return {**memory, **found, **asdict(bank.provenance)}


def named_counts(bank: MemoryBank) -> list[tuple[str, int]]:
    """Returns the number of samples of each class in a bank, by the name of the class; of several, each counts."""
    names = bank.class_names
    return [(names[i] if i < len(names) else str(i), count) for i, count in bank.class_counts.items()]


def _memory(bank: MemoryBank) -> str:
    values = {**describe_memory(bank), "dataset": short_name(bank.provenance.dataset), "classes": named_counts(bank)}
    values["image_dataset"] = image_dataset(bank)
    return _render("memory.md.jinja", begin=_BEGIN, end=_END, **values)


def _render(template: str, **values: Any) -> str:
    return _environment().get_template(template).render(values)


# Compiling a template takes as long as writing the weights does.
@cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # Markdown, not HTML: the filters `text` and `code` show what comes from outside as it is.
    folder = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=folder, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"text": _as_text, "code": _as_code}
    return environment


def _as_text(text: str) -> str:
    """Shows any text as it is, in one line: as code unless it is plain, since some make links of escaped text too."""
    one_line = printable(" ".join(str(text).split()))
    return one_line if _PLAIN.fullmatch(one_line) else f"`{_as_code(one_line)}`"


def _as_code(text: str) -> str:
    """Makes any text fit between the marks of code in a table."""
    return printable(" ".join(str(text).split())).replace("`", "'").replace("|", "\\|")


def _texts(details: dict[str, Any], key: str) -> list[str]:
    value = details.get(key) or []
    values = [value] if isinstance(value, str) else list(value)
    if not all(isinstance(item, str) for item in values):
        raise ValueError(f"model_card[{key!r}] is {value!r}. Pass a list of texts.")
    return values


def _training(given: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Returns how a model was trained with the marks that its recipe stands between."""
    if given is None:
        return None
    if not isinstance(given, Mapping) or set(given) != set(TRAINING_FIELDS):
        raise ValueError(f"model_card['training'] is {given!r}. Pass a dict of {', '.join(TRAINING_FIELDS)}.")
    # Longer than any in the text, which they could end.
    longest = max(map(len, re.findall("`+", given["recipe"] + given["command"])), default=0)
    return {**given, "marks": "`" * max(3, longest + 1)}


def _results(details: dict[str, Any], bank: MemoryBank) -> list[EvalResult]:
    given = list(details.get("results") or [])
    if details.get("accuracy") is not None:
        given.append({"value": details["accuracy"], "dataset": bank.provenance.dataset or "unknown"})
    results = []
    for item in given:
        unknown = sorted(set(item) - set(RESULT_FIELDS)) if isinstance(item, Mapping) else [item]
        if unknown:
            raise ValueError(
                f"model_card['results'] has {unknown}. Pass a list of dicts of {', '.join(RESULT_FIELDS)}."
            )
        metric, value = item.get("metric", "accuracy"), item.get("value")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"The {metric} for the model card is {value!r}. Pass a number.")
        if metric == "accuracy" and not 0 <= value <= 1:
            raise ValueError(f"The accuracy for the model card is {value!r}. Pass a fraction, between 0 and 1.")
        # A path stays here.
        dataset = short_name(str(item.get("dataset") or item.get("dataset_id") or "unknown"))
        results.append(
            EvalResult(
                task_type="image-classification",
                task_name="Image Classification",
                dataset_type=str(item.get("dataset_id") or dataset),
                dataset_name=dataset,
                dataset_split=item.get("split"),
                metric_type=metric,
                metric_name=metric[:1].upper() + metric[1:].replace("_", " "),
                metric_value=float(value),
            )
        )
    return results
