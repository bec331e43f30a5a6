"""The table of findings: what is ticked comes back as it was, and no text in it is more than text."""

import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from timm_memwrap.explaining.findings import DUPLICATE_OF, RELABEL_AS, REMOVE, Finding, ticked, write_findings
from timm_memwrap.memory_bank import SampleId

HOSTILE = ["=1+1", "+A1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "=cmd|' /C calc'!A0", '"=1', "'=1", ";=1", ",=1", "\n=1"]


def _finding(action: str, sample_id: SampleId, target: SampleId | None = None, name: str = "ant") -> Finding:
    return Finding("label", 0, sample_id, name, action, target, 0.5, (sample_id, 3), (0.5, 0.25))


def _tick(path: Path, *rows: int) -> Path:
    with path.open(encoding="utf-8-sig", newline="") as file:
        header, *lines = csv.reader(file)
    for row in rows:
        lines[row][0] = "x"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([header, *lines])
    return path


def test_nothing_is_ticked_at_first(tmp_path: Path) -> None:
    path = write_findings([_finding(REMOVE, 1), _finding(RELABEL_AS, 2, "bee")], tmp_path / "new" / "report.csv")
    assert ticked(path) == ([], {})
    assert [file.name for file in path.parent.iterdir()] == ["report.csv"]


def test_what_is_ticked_comes_back_by_action(tmp_path: Path) -> None:
    findings = [
        _finding(RELABEL_AS, "a.png", "bee"),
        _finding(RELABEL_AS, 7, "cow"),
        _finding(DUPLICATE_OF, 8, "a.png"),
        _finding(REMOVE, "b.png"),
        _finding(REMOVE, "not ticked"),
    ]
    path = _tick(write_findings(findings, tmp_path / "r.csv"), 0, 1, 2, 3)
    assert ticked(path) == ([8, "b.png"], {"a.png": "bee", 7: "cow"})


def test_what_is_forgotten_is_not_relabelled(tmp_path: Path) -> None:
    findings = [_finding(RELABEL_AS, 1, "bee"), _finding(REMOVE, 1), _finding(DUPLICATE_OF, 1, 2)]
    assert ticked(_tick(write_findings(findings, tmp_path / "r.csv"), 0, 1, 2)) == ([1], {})


@given(
    ids=st.lists(st.one_of(st.integers(), st.text(st.characters(codec="utf-8"), min_size=1)), min_size=1, unique=True),
    name=st.text(st.characters(codec="utf-8"), min_size=1),
)
def test_any_id_and_class_name_round_trips(
    tmp_path_factory: pytest.TempPathFactory, ids: list[SampleId], name: str
) -> None:
    path = tmp_path_factory.mktemp("table") / "r.csv"
    path = _tick(write_findings([_finding(RELABEL_AS, each, name) for each in ids], path), *range(len(ids)))
    forget, relabel = ticked(path)
    assert forget == []
    assert list(relabel.items()) == [(each, name) for each in ids]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_cell_is_a_formula(tmp_path: Path, text: str) -> None:
    path = write_findings([_finding(RELABEL_AS, text, text, text)], tmp_path / "r.csv")
    with path.open(encoding="utf-8-sig", newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert len(cells) == 16
    assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) for cell in cells)
    assert ticked(_tick(path, 0)) == ([], {text: text})


def test_a_number_and_its_text_are_two_ids(tmp_path: Path) -> None:
    path = _tick(
        write_findings([_finding(REMOVE, 7), _finding(REMOVE, "7"), _finding(REMOVE, "007")], tmp_path / "r"), 0, 1, 2
    )
    assert ticked(path) == ([7, "7", "007"], {})


@pytest.mark.parametrize("tick", ["x", "X", " yes ", "1", "true"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_spreadsheet_may_save_it_in_its_own_way(tmp_path: Path, tick: str, delimiter: str) -> None:
    rows = [["notes", "id", "target", "action", "apply"], ["see, this", "'a.png", "'bee", RELABEL_AS, tick],
            ["", "b.png", "", REMOVE, tick], ["", "9", "", REMOVE, "no"]]  # fmt: skip
    with (tmp_path / "r.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter, lineterminator="\r\n").writerows(rows)
    assert ticked(tmp_path / "r.csv") == (["b.png"], {"a.png": "bee"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column 'apply'"),
        ("apply,action,target\nx,remove,\n", "no column 'id'"),
        ("apply,action,target,id\nmaybe,remove,,1\n", r"r.csv, line 2: apply='maybe' is not valid"),
        ("apply,action,target,id\nx,burn,,1\n", r"line 2: action='burn' is not valid. Expected 'relabel as'"),
        ("apply,action,target,id\nx,remove,,\n", "ticked and has no id"),
        ("apply,action,target,id\nx,relabel as,,1\n", "1 is to be relabelled, and target is empty"),
        ("apply,action,target,id\nx,relabel as,a,1\nx,relabel as,b,1\n", "relabelled as 'a' and as 'b'"),
        ('apply,action,target,id\nx,"remove,,1\n', "is not a CSV file"),
        ("apply,action,target,id\nx\n", "ticked and has no id"),
    ],
)
def test_a_table_that_cannot_be_understood_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        ticked(tmp_path / "r.csv")


def test_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_bytes("apply,action,target,id\nx,remove,,\u00e9\n".encode("latin-1"))
    with pytest.raises(ValueError, match="Save the table as CSV in UTF-8"):
        ticked(tmp_path / "r.csv")
