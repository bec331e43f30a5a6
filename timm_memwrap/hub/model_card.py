"""The model card: what a visitor of the repository sees, and the metadata that the Hub reads."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from timm_memwrap.constants import CARD_FIGURE_FILE
from timm_memwrap.hub.privacy import file_name
from timm_memwrap.memory_bank import MemoryBank
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.registry import split_name

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["CARD_FIELDS", "CardDetails", "loading_code", "make_card", "update_memory"]

# What a user gives for a card: details, or the whole text.
CardDetails = Mapping[str, Any] | str | None

CARD_FIELDS = ("name", "description", "license", "datasets", "base_model", "tags", "accuracy", "results", "figure")
RESULT_FIELDS = ("dataset", "dataset_id", "split", "metric", "value")

TAGS = ("timm", "memory-wrap", "arxiv:2106.01440")

_SHOWN_CLASSES = 20

# What stands between the marks is replaced when the memory changes, and nothing else in a card is.
_BEGIN, _END = "<!-- timm_memwrap: memory -->", "<!-- timm_memwrap: end of memory -->"

_MARKDOWN = re.compile(r"[\\`*_{}\[\]|~$]")
# GitHub's Markdown makes links of bare addresses too.
_HTML = re.compile(r"[<>&]|:(?=//)|\.(?=[^.\s])(?<=www\.)", re.IGNORECASE)


def loading_code(source: str) -> str:
    """Returns the three lines of Python that load the model from `source`, a name for `timm.create_model`."""
    return f"import timm\nimport timm_memwrap\nmodel = timm.create_model({json.dumps(source)}, pretrained=True).eval()"


def make_card(model: MemoryWrapModel, source: str, details: Mapping[str, Any] | None, bank: MemoryBank) -> str:
    """Returns a model card: metadata and text.

    Args:
        model: The model.
        source: Where it is to be loaded from, e.g. `"hf-hub:me/model"`.
        details: What the model does not know about itself, all of it optional: `name`; `description`, in Markdown;
            `license`, `datasets` and `base_model`, as the Hub names them; more `tags`; `accuracy`, between 0 and 1, or
            `results`, a list of `dict(dataset=..., value=..., metric="accuracy", split=..., dataset_id=...)`;
            `figure`, the path of an image.
        bank: The memory as it is published.

    Raises:
        ValueError: If a detail is unknown or of the wrong type.
    """
    details = dict(details or {})
    unknown = sorted(set(details) - set(CARD_FIELDS))
    if unknown:
        raise ValueError(f"Unknown model_card fields {unknown}. Those known are {', '.join(CARD_FIELDS)}.")
    name = details.get("name") or source.split(":", 1)[1].split("@")[0].rstrip("/").split("/")[-1]
    architecture = model.pretrained_cfg["architecture"]
    results = _results(details, bank)
    data = ModelCardData(
        library_name="timm_memwrap",
        pipeline_tag="image-classification",
        tags=[*TAGS, *_texts(details, "tags")],
        license=_text(details, "license"),
        base_model=_text(details, "base_model") or model.base_model,
        datasets=_texts(details, "datasets") or None,
        eval_results=results or None,
        model_name=name if results else None,
    )
    environment = _environment()
    body = environment.get_template("model_card.md.jinja").render(
        name=name,
        description=_text(details, "description"),
        backbone=split_name(architecture)[1],
        architecture=architecture,
        num_classes=model.num_classes,
        parameters=f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        memory_only=model.memory_only,
        keeps_classifier=model.keeps_classifier,
        memory_args=model.memory_args,
        loading=loading_code(source),
        figure=CARD_FIGURE_FILE if details.get("figure") else None,
        memory=_memory(environment, bank),
        results=results,
    )
    text = f"---\n{data.to_yaml()}\n---\n\n{body}\n"
    # The Hub's own class reads it back: what it cannot read, the Hub would not.
    assert ModelCard(text).data.to_dict() == data.to_dict(), "The metadata of the model card does not come back."
    return text


def update_memory(card: str, bank: MemoryBank) -> str:
    """Returns a card with its part about the memory updated; as it is, if it has no such part."""
    begin, end = card.find(_BEGIN), card.find(_END)
    if begin < 0 or end < begin:
        return card
    return card[:begin] + _memory(_environment(), bank) + card[end + len(_END) :]


def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
        # Markdown, not HTML: the filters `text` and `code` escape what comes from outside.
        autoescape=False,
    )
    environment.filters |= {"text": _escape, "code": _escape_code}
    return environment


def _memory(environment: "Environment", bank: MemoryBank) -> str:
    names, provenance = bank.class_names, bank.provenance
    counts = bank.class_counts
    return environment.get_template("memory.md.jinja").render(
        begin=_BEGIN,
        end=_END,
        size=f"{len(bank):,}" if len(bank) else "",
        classes=[(names[i] if i < len(names) else str(i), f"{count:,}") for i, count in counts.items()],
        shown=_SHOWN_CLASSES,
        dataset=file_name(provenance.dataset),
        population=f"{provenance.population:,}" if provenance.population else "",
        selection=provenance.selection,
        seed=provenance.seed,
        images=bank.images is not None,
    )


def _escape(text: str) -> str:
    """Makes any text plain: no Markdown, no HTML, no links, one line."""
    one_line = " ".join(str(text).encode(errors="replace").decode().split())
    return _MARKDOWN.sub(r"\\\g<0>", _HTML.sub(lambda match: f"&#{ord(match[0])};", one_line))


def _escape_code(text: str) -> str:
    return " ".join(str(text).split()).replace("`", "'").replace("|", "\\|")


def _text(details: dict[str, Any], key: str) -> str | None:
    value = details.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"model_card[{key!r}] is {value!r}. Pass text.")
    return value


def _texts(details: dict[str, Any], key: str) -> list[str]:
    value = details.get(key) or []
    values = [value] if isinstance(value, str) else list(value)
    if not all(isinstance(item, str) for item in values):
        raise ValueError(f"model_card[{key!r}] is {value!r}. Pass a list of texts.")
    return values


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
        dataset = file_name(str(item.get("dataset") or item.get("dataset_id") or "unknown"))
        results.append(
            EvalResult(
                task_type="image-classification",
                task_name="Image Classification",
                dataset_type=str(item.get("dataset_id") or dataset),
                dataset_name=dataset,
                dataset_split=item.get("split"),
                metric_type=metric,
                metric_name=metric.replace("_", " ").capitalize(),
                metric_value=float(value),
            )
        )
    return results
