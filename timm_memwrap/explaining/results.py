"""What all results have in common: they are JSON, and a table for people; metrics are also lines of a model card."""

import json
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["Metrics", "Result"]

# What of the metrics a card shows beside the scores: also where the evidence fails, or is decoration.
_ON_CARD = {
    "accuracy without a memory": "accuracy_without_memory",
    "mean average precision without a memory": "mean_average_precision_without_memory",
    "error ranking (AUROC)": "error_ranking",
    "calibration error": "calibration_error",
    "true class among the contenders of errors": "true_class_contends_wrong",
    "missed classes among the strongest samples": "missed_class_shown",
    "changed without the strongest samples": "deletion_flip_rate",
    "changed without random samples": "random_flip_rate",
    "unfamiliar": "unfamiliar_rate",
    "explanation accuracy": "explanation_accuracy",
    "samples a prediction": "support_size",
}


@dataclass(frozen=True)
class Result:
    """Base class of results. Fields with `repr=False` hold images, which are neither printed nor in the JSON."""

    def __str__(self) -> str:
        """Returns a table with one row per value."""
        return self.table(self.to_dict())

    @staticmethod
    def table(values: dict[str, Any]) -> str:
        """Returns a table with one row per value."""
        width = max(map(len, values))
        return "\n".join(
            f"{name.replace('_', ' '):{width}}  {f'{value:.4g}' if isinstance(value, float) else value}"
            for name, value in values.items()
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the values by name, as JSON can hold them."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.repr}

    def to_json(self, indent: int | None = None) -> str:
        """Returns `to_dict()` as JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=indent)


class Metrics(Result):
    """Base class of what is measured over a data set."""

    @property
    def scores(self) -> dict[str, float]:
        """How good the predictions are, by the name that a model card gives it."""
        raise NotImplementedError

    def to_results(self, dataset: str, split: str | None = None, dataset_id: str | None = None) -> list[dict[str, Any]]:
        """Returns what a model card shows of the metrics, for `results` in `push_to_hub`'s `model_card`.

        Args:
            dataset: Name of the data set that was measured on.
            split: Name of its split.
            dataset_id: Its repository on the Hub, if it has one.
        """
        values = {**self.scores, **{name: getattr(self, field, None) for name, field in _ON_CARD.items()}}
        common = {"dataset": dataset, "split": split, "dataset_id": dataset_id}
        return [{"metric": name, "value": value, **common} for name, value in values.items() if value is not None]


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return value.to_dict() if isinstance(value, Result) else value
