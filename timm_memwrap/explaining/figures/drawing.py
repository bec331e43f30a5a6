"""What figures are drawn of: an input with its prediction, a memory sample with its weight, titles and legend."""

from timm_memwrap.explaining.explanation import Explanation, MemorySample
from timm_memwrap.explaining.figures.page import BLUE, GREY, LINE, ORANGE, PALE, Card, Line, Page
from timm_memwrap.explaining.figures.pictures import HEAT
from timm_memwrap.explaining.report import SampleUse

__all__ = ["GAP", "MARGIN", "draw_legend", "draw_titles", "input_card", "sample_card", "short", "use_card"]

# In inches.
GAP, MARGIN = 0.3, 0.25


def short(text: str, most: int = 18) -> str:
    """Returns text on one line, with an ellipsis in place of what is beyond `most` characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def input_card(explanation: Explanation, label: int | None, names: list[str]) -> Card:
    """Makes the card of an input: the predicted class, and whether that is right if the label is known."""
    lines = [Line(f"{short(explanation.class_name)} {explanation.probability:.0%}", 9, weight="bold")]
    if label is not None:
        right = label == explanation.prediction
        true = names[label] if 0 <= label < len(names) else f"class {label}"
        verdict = "✓ right" if right else f"✗ wrong, it is {short(true, 14)}"
        lines.append(Line(verdict, 8, BLUE if right else ORANGE, gap=1.15))
    return Card(lines)


def sample_card(sample: MemorySample) -> Card:
    """Makes the card of a memory sample: its weight and the class that the model sees in it."""
    color, mark = (BLUE, "") if sample.is_example else (ORANGE, "≠ ")
    labelled = f"labelled {short(sample.class_name, 14)}" if sample.label != sample.prediction else ""
    lines = [
        Line(f"{sample.weight:.0%}" if sample.weight >= 0.01 else "<1%", 7.5, color, share=sample.weight),
        Line(f"{mark}{short(sample.predicted_class_name, 15)}", 8, color, gap=0.9),
        Line(labelled, 7, GREY),
    ]
    return Card(lines, short(str(sample.id), 40), color, dashed=not sample.is_example)


def use_card(sample: SampleUse, most: float, color: str, dashed: bool) -> Card:
    """Makes the card of how a memory sample was used, with bars of which the longest stands for `most`."""
    seen = short(sample.predicted_class_name, 14) if sample.disputed else "the same"
    misleading, helping = (value / most if most else 0.0 for value in (sample.misleading, sample.helping))
    lines = [
        Line(f"labelled {short(sample.class_name, 13)}"),
        Line(f"seen as {seen}", color="black" if sample.disputed else GREY),
        Line(f"{sample.misleading:.1f}", color=ORANGE, share=misleading, gap=1.2),
        Line(f"{sample.helping:.1f}", color=BLUE, share=helping, gap=0.9),
        Line(short(str(sample.id), 17), 6.5, GREY, gap=1.05),
    ]
    return Card(lines, short(str(sample.id), 40), color, dashed)


def draw_titles(page: Page, left: float) -> None:
    """Writes what stands in the rows: inputs, and from `left` on memory samples."""
    page.text(MARGIN, 0.14, "Predicted", size=9, weight="bold")
    page.text(left, 0.14, "from these remembered training images, strongest first", size=9, weight="bold")


def draw_legend(page: Page, heat: bool = False) -> None:
    """Draws what the frames mean, and either the bars or the heat."""
    y, box = page.height - 0.42, LINE
    page.frame(MARGIN, y, box, BLUE, dashed=False)
    page.frame(MARGIN + 2.6, y, box, ORANGE, dashed=True)
    if heat:
        page.block(MARGIN + 5.25, y, box, box, facecolor="#{:02x}{:02x}{:02x}".format(*HEAT))
    else:
        page.block(MARGIN + 5.25, y + 0.035, 0.25, 0.09, facecolor=PALE)
        page.block(MARGIN + 5.25, y + 0.035, 0.12, 0.09, facecolor=GREY)
    for x, text in (
        (0.25, "example: the model sees the same class"),
        (2.85, "≠ counterfactual: it sees another class"),
        (5.5, "source of the prediction") if heat else (5.57, "share of the evidence"),
    ):
        page.text(MARGIN + x, y + box / 2, text, size=7.5, va="center")
