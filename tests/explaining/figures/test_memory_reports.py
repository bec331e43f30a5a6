"""The figure and the page of what is wrong with a memory: what stands in them, and that names stay text."""

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from timm_memwrap.explaining import MemoryReport, memory_report, plot_memory_report, write_memory_report
from timm_memwrap.explaining.figures.beside import MEANINGS, shown_findings
from timm_memwrap.explaining.findings import KINDS
from timm_memwrap.model import MemoryWrapModel

PLAIN = ["ant", "bee", "cow", "doe"]
HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}", "$x^2$"]


def _texts(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def _reported(
    make_model: Callable[..., MemoryWrapModel], images: torch.Tensor, names: list[str], ids: list[str], pictures: bool
) -> tuple[MemoryWrapModel, MemoryReport, TensorDataset]:
    """A model with suspected labels, duplicates and leaks, and the data that leaked."""
    model = make_model("wrapped", size=40, store_images=pictures)
    bank = model.memory_bank
    thumbnails = None if bank.images is None else torch.cat([bank.images, bank.images[:3]])
    encodings, labels = torch.cat([bank.encodings, bank.encodings[:3]]), torch.cat([bank.labels, bank.labels[1:4]])
    bank.replace(encodings, labels, ids[:43], thumbnails, names)
    data = TensorDataset(images, torch.arange(len(images)) % 4)
    return model, memory_report(model, data, progress=False), data


@pytest.fixture
def leaking(make_images: Callable[..., torch.Tensor]) -> torch.Tensor:
    return torch.cat([make_images(6, seed=9), make_images(40, seed=1)[20:22]])


def test_the_figure_shows_each_kind_with_what_to_do(
    make_model: Callable[..., MemoryWrapModel], leaking: torch.Tensor, tmp_path: Path
) -> None:
    ids = [f"{i}.png" for i in range(43)]
    model, report, data = _reported(make_model, leaking, PLAIN, ids, pictures=True)
    assert all(report.of_kind(kind) for kind in ("label", "duplicate", "leak"))
    path = tmp_path / "new" / "report.png"
    text = "\n".join(_texts(plot_memory_report(model, report, path, data=data, top_k=4)))
    for kind, title in KINDS.items():
        found = report.of_kind(kind)
        assert (f"{title}: {len(found)}" in text) == bool(found)
        assert (MEANINGS[kind] in text) == bool(found)
    for finding in report.of_kind("label")[:4]:
        assert f"relabel as {finding.target}" in text
        for similarity in finding.similarities:
            assert f"{similarity:.2f}" in text
    assert "in the data" in text
    assert "no picture" not in text
    assert f"{report.wrong} of 8 predictions are wrong, 2 of these images are in the memory" in text
    assert f"Misleading: {len(report.misleading)}" in text
    with Image.open(path) as picture:
        assert picture.format == "PNG"


def test_what_stands_beside_a_finding_is_what_it_names(
    make_model: Callable[..., MemoryWrapModel], leaking: torch.Tensor
) -> None:
    ids = [f"{i}.png" for i in range(43)]
    model, report, data = _reported(make_model, leaking, PLAIN, ids, pictures=True)
    found = shown_findings(model, report, None, data, top_k=100)
    bank = model.memory_bank
    assert [row.finding for rows in found.values() for row in rows] == list(report.findings)
    for row in (row for rows in found.values() for row in rows):
        assert tuple(other.id for other in row.beside) == row.finding.neighbours
        assert (row.picture == bank.images[row.finding.position].permute(1, 2, 0).numpy()).all()
        for other in row.beside:
            assert other.picture is not None
            if row.finding.kind == "leak":
                # The same picture, from the data.
                assert abs(other.picture.astype(int) - row.picture.astype(int)).max() <= 1
            else:
                assert other.class_name == PLAIN[int(bank.labels[bank.ids.index(other.id)])]


def test_the_page_shows_the_pictures_side_by_side(
    make_model: Callable[..., MemoryWrapModel], leaking: torch.Tensor, tmp_path: Path
) -> None:
    ids = [f"{i}.png" for i in range(43)]
    model, report, data = _reported(make_model, leaking, PLAIN, ids, pictures=True)
    html = write_memory_report(model, report, tmp_path / "r.html", data=data).read_text(encoding="utf-8")
    for finding in report.findings:
        assert f"{finding.action}" in html
        assert f"<bdi>{finding.id}</bdi>" in html
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    assert len(pictures) == sum(1 + len(finding.neighbours) for finding in report.findings)
    for picture in pictures[:3]:
        with Image.open(io.BytesIO(base64.b64decode(picture, validate=True))) as image:
            assert image.format == "JPEG"
    assert "The surest" not in html
    few = write_memory_report(model, report, tmp_path / "r.html", top_k=1).read_text(encoding="utf-8")
    assert f"The surest 1 of {len(report.of_kind('label'))}." in few
    assert few.count("<article>") == sum(bool(report.of_kind(kind)) for kind in KINDS)


def test_the_page_runs_and_loads_nothing(
    make_model: Callable[..., MemoryWrapModel], leaking: torch.Tensor, tmp_path: Path
) -> None:
    pages = []
    for names, start in ((PLAIN, "id"), (HOSTILE, HOSTILE[0])):
        ids = [f"{start}{i}" for i in range(43)]
        model, report, data = _reported(make_model, leaking, names, ids, pictures=False)
        pages.append(
            write_memory_report(model, report, tmp_path / "r.html", title=names[1]).read_text(encoding="utf-8")
        )
        if names is HOSTILE:
            # In a figure too, a name is no formula.
            plot_memory_report(model, report, tmp_path / "r.png", data=data)
    plain, hostile = pages
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in hostile
    for tag in ("script", "img", "link", "iframe", "form"):
        assert hostile.count(f"<{tag}") == plain.count(f"<{tag}") == 0
    assert re.findall(r"<[a-z]+", hostile) == re.findall(r"<[a-z]+", plain)
    assert set(re.findall(r'href="([^"]*)"', hostile)) <= {f"#{kind}" for kind in KINDS}
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in hostile
    assert "{{ 7 * 7 }}" in hostile


def test_a_report_is_shown_for_the_bank_as_it_is(make_model: Callable[..., MemoryWrapModel], tmp_path: Path) -> None:
    model = make_model("wrapped", size=40)
    report = memory_report(model, progress=False)
    model.memory_bank.select(reversed(range(40)))
    for show in (plot_memory_report, write_memory_report):
        with pytest.raises(ValueError, match="memory_report again"):
            show(model, report, tmp_path / "r.html")
    model.memory_bank.remove([0])
    with pytest.raises(ValueError, match="on 40 samples"):
        plot_memory_report(model, report)


def test_a_report_without_findings_is_shown(make_model: Callable[..., MemoryWrapModel], tmp_path: Path) -> None:
    model = make_model("wrapped", size=40)
    report = MemoryReport(40, ())
    assert _texts(plot_memory_report(model, report))
    assert "<article>" not in write_memory_report(model, report, tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_stale_memory_is_said(make_model: Callable[..., MemoryWrapModel], tmp_path: Path) -> None:
    model = make_model("wrapped", size=40)
    report = memory_report(model, progress=False)
    assert "stale:" not in write_memory_report(model, report, tmp_path / "r.html").read_text(encoding="utf-8")
    with torch.no_grad():
        next(model.backbone.parameters()).mul_(2)
    assert "stale:" in write_memory_report(model, report, tmp_path / "r.html").read_text(encoding="utf-8")
