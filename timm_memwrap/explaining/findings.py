"""Findings about single memory samples, and the table in which a person ticks what to do about them."""

import csv
import io
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_memwrap._utils import write_text
from timm_memwrap.explaining.results import Result
from timm_memwrap.memory_bank import SampleId

__all__ = ["DUPLICATE_OF", "KINDS", "RELABEL_AS", "REMOVE", "Finding", "ticked", "write_findings"]

RELABEL_AS, REMOVE, DUPLICATE_OF = "relabel as", "remove", "duplicate of"
# What each kind is called in tables and figures, in their order.
KINDS = {
    "label": "Suspected labels",
    "duplicate": "Duplicates",
    "leak": "Leaks",
    "out_of_place": "Out of place",
}

_COLUMNS = ("apply", "action", "target", "id", "class_name", "kind", "score", "neighbours")
_TICKS, _EMPTY = ("x", "yes", "y", "true", "1"), ("", "no", "n", "false", "0")


@dataclass(frozen=True)
class Finding(Result):
    """Something that may be wrong with a memory sample, and what to do about it.

    Args:
        kind: `"label"` if its neighbours do not share its label, `"duplicate"` if it is a copy of another sample,
            `"leak"` if it is a copy of an image of the data that the model is evaluated with, `"out_of_place"` if it is
            unlike its class and unlike everything.
        position: Position in the memory bank.
        id: What names the sample in its data set.
        class_name: Name of its label.
        action: `"relabel as"`, `"duplicate of"`, which stands for removing it too, or `"remove"`.
        target: The class to relabel it as, or the id of the sample of which it is a duplicate.
        score: How sure it is, between 0 and 1; comparable within a kind.
        neighbours: Ids of what to look at beside it, nearest first: its nearest samples that are no copies of it, or
            the copy to keep; of a leak, images of the data, with the ids that a memory of them would have.
        similarities: Cosine similarities of the pre-logits of these to its own.
    """

    kind: str
    position: int
    id: SampleId
    class_name: str
    action: str
    target: str | int | None
    score: float
    neighbours: tuple[SampleId, ...]
    similarities: tuple[float, ...]


def write_findings(findings: Iterable[Finding], path: str | os.PathLike) -> Path:
    """Writes findings to a CSV file for a spreadsheet, and returns its path; `ticked` reads it back.

    The column `apply` is empty: put an x in the rows to be done. An apostrophe stands before text from outside: it
    keeps a spreadsheet from taking a name for a formula, a number or a date, and tells the id `'7` from 7.

    Args:
        findings: The findings, one a row.
        path: File to write, whole or not at all.
    """
    rows = io.StringIO(newline="")
    writer = csv.writer(rows)
    writer.writerow(_COLUMNS)
    for f in findings:
        near = json.dumps(f.neighbours, ensure_ascii=False)
        writer.writerow(
            ["", f.action, _cell(f.target), _cell(f.id), _cell(f.class_name), f.kind, f"{f.score:.4f}", near]
        )
    # Without the mark, a spreadsheet takes UTF-8 for its system's old encoding.
    return write_text(path, "\ufeff" + rows.getvalue())


def ticked(path: str | os.PathLike) -> tuple[list[SampleId], dict[SampleId, str]]:
    """Reads what a person ticked in a table that `write_findings` wrote.

    Args:
        path: The CSV file, also with the separators that a spreadsheet saves with, and with columns added or moved.

    Returns:
        The ids of the samples to forget, and by id the class names of those to relabel. A sample to be forgotten is not
        relabelled.

    Raises:
        ValueError: If the file is not such a table, or a row is not to be understood.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8: {error}. Save the table as CSV in UTF-8.") from None
    header = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        missing = [name for name in ("apply", "action", "target", "id") if name not in (rows.fieldnames or ())]
        if missing:
            raise ValueError(
                f"{path.name} has no column {missing[0]!r} in its first line {header[:80]!r}. Pass what timm-memwrap "
                f"report --out report.csv wrote."
            )
        return _done(rows, path.name)
    except csv.Error as error:
        raise ValueError(f"{path.name} is not a CSV file, line {rows.line_num}: {error}. Write it again.") from None


def _done(rows: "csv.DictReader[str]", name: str) -> tuple[list[SampleId], dict[SampleId, str]]:
    forget: dict[SampleId, None] = {}
    relabel: dict[SampleId, str] = {}
    for row in rows:
        where = f"{name}, line {rows.line_num}"
        tick = (row["apply"] or "").strip().lower()
        if tick in _EMPTY:
            continue
        if tick not in _TICKS:
            raise ValueError(f"{where}: apply={row['apply']!r} is not valid. Write x in a row to be done, or nothing.")
        if not row["id"]:
            raise ValueError(f"{where}: the row is ticked and has no id. Restore the column as it was written.")
        sample_id, action = _id(row["id"]), row["action"]
        if action in (REMOVE, DUPLICATE_OF):
            forget[sample_id] = None
            continue
        if action != RELABEL_AS:
            expected = f"{RELABEL_AS!r}, {REMOVE!r} or {DUPLICATE_OF!r}"
            raise ValueError(f"{where}: action={action!r} is not valid. Expected {expected}.")
        target = (row["target"] or "").removeprefix("'")
        if not target:
            raise ValueError(f"{where}: {sample_id!r} is to be relabelled, and target is empty. Name the class there.")
        if relabel.setdefault(sample_id, target) != target:
            raise ValueError(
                f"{where}: {sample_id!r} is to be relabelled as {relabel[sample_id]!r} and as {target!r}. Tick one."
            )
    return list(forget), {sample_id: target for sample_id, target in relabel.items() if sample_id not in forget}


def _cell(value: Any) -> str | int:
    if value is None:
        return ""
    return value if isinstance(value, int) else f"'{value}"


def _id(cell: str) -> SampleId:
    """Returns the id in a cell: a number, or text, also where a spreadsheet has dropped the apostrophe."""
    return int(cell) if re.fullmatch(r"-?[0-9]+", cell) else cell.removeprefix("'")
