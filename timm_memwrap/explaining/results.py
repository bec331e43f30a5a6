"""What all results have in common: they are JSON, and a table for people."""

import json
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["Result"]


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


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return value.to_dict() if isinstance(value, Result) else value
