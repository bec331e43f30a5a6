"""The texts hold: their code runs, their commands parse, their links and names exist."""

import copy
import itertools
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.utils.data import TensorDataset

import timm_memwrap
from timm_memwrap.attention import DISTANCES
from timm_memwrap.cli import COMMANDS
from timm_memwrap.cli.arguments import expand, make_parser
from timm_memwrap.memory_args import CLASSIFIERS, READ_HEADS
from timm_memwrap.reconstruction import READS
from timm_memwrap.training.recipes import find_recipe, recipe_names

ROOT = Path(__file__).parent.parent
FRONT, RECIPES = ROOT / "README.md", ROOT / "hub_configs" / "README.md"
TEXTS = {"README.md": FRONT, "hub_configs/README.md": RECIPES}
each_text = pytest.mark.parametrize("path", TEXTS.values(), ids=TEXTS)

SIZE = (3, 32, 32)
CLASSES = 10


@dataclass(frozen=True)
class Block:
    """A block of code: its text, the line that it begins at, and why it is not run if it is not."""

    code: str
    line: int
    not_run: str | None


def _blocks(path: Path, language: str) -> list[Block]:
    """Finds blocks of code. `<!-- not run: REASON -->` before one leaves it out."""
    text = path.read_text(encoding="utf-8")
    pattern = rf"(?:<!-- not run: (.+?) -->\n+)?```{language}\n(.*?)```"
    return [
        Block(found[2], text[: found.start(2)].count("\n") + 1, found[1])
        for found in re.finditer(pattern, text, re.DOTALL)
    ]


def _inline(path: Path) -> list[str]:
    """Returns the pieces of code within lines of text."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def _commands(path: Path) -> Iterator[list[str]]:
    """Yields the arguments of each `timm-memwrap ...` in the blocks and lines of a text."""
    lines = [line for block in _blocks(path, "bash") for line in block.code.replace("\\\n", " ").splitlines()]
    for line in [*lines, *_inline(path)]:
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            for start in ("timm-memwrap", "timm_memwrap.cli"):
                if start in words:
                    yield words[words.index(start) + 1 :]


def _slugs(path: Path) -> set[str]:
    """Returns the anchors that GitHub makes of a text's headings."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# Code


def _dataset(size: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(size, *SIZE, generator=generator), torch.arange(size) % CLASSES)


@pytest.fixture(scope="module")
def placeholders() -> Callable[[], dict[str, Any]]:
    """Returns what the texts take for granted: a trained timm model, data, and a model with a memory."""
    overlay = {"input_size": SIZE}
    trained = timm.create_model("test_resnet", num_classes=CLASSES, pretrained_cfg_overlay=overlay).eval()
    model = timm_memwrap.wrap(copy.deepcopy(trained))
    train = _dataset(1000, seed=1)
    names = ["horse", *(f"animal {i}" for i in range(1, CLASSES))]
    timm_memwrap.build_memory_bank(model, train, size=40, class_names=names, progress=False)

    def make() -> dict[str, Any]:
        return {
            "model": copy.deepcopy(model),
            "my_trained_timm_model": copy.deepcopy(trained),
            "train_dataset": train,
            "held_out_dataset": _dataset(20, seed=2),
            "test_dataset": _dataset(20, seed=3),
            "photos": torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(6)),
            "images": torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(4)),
            "memory_images": torch.randn(6, *SIZE, generator=torch.Generator().manual_seed(5)),
        }

    return make


@pytest.fixture
def without_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Creates a small model without weights for each that timm would download."""
    create = timm.create_model

    def create_small(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
        if ":" in name:
            return create(name, pretrained=pretrained, **kwargs)
        assert timm.models.is_model_pretrained(name), f"timm has no weights for {name}"
        prefix, _ = timm_memwrap.registry.split_name(name)
        return create(f"{prefix}test_resnet", pretrained_cfg_overlay={"input_size": SIZE}, **kwargs)

    monkeypatch.setattr(timm, "create_model", create_small)


@pytest.fixture
def on_the_hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs in to an empty Hub on loopback as `me`."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "hub")
    monkeypatch.setenv("HF_TOKEN", request.getfixturevalue("hub").user("me"))


@each_text
@pytest.mark.usefixtures("without_downloads", "on_the_hub")
def test_code_runs(
    path: Path, placeholders: Callable[[], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs a text's blocks in order; what it takes for granted is as new in each."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "readme"}
    blocks = [block for block in _blocks(path, "python") if block.not_run is None]
    assert blocks
    for block in blocks:
        namespace |= placeholders()
        # Lines before it, so that a traceback names the line of the text.
        exec(compile("\n" * (block.line - 1) + block.code, f"<{path.name}>", "exec"), namespace)


def test_all_code_is_run() -> None:
    assert [block.not_run for path in TEXTS.values() for block in _blocks(path, "python") if block.not_run] == []


# Commands


@each_text
def test_commands_parse(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_recipe.yaml").write_text("base: quickstart\n")
    commands = list(_commands(path))
    assert commands
    for command, *args in commands:
        if command == "COMMAND":
            continue  # any of them
        assert command in COMMANDS
        if command == "run" or not args or args == ["--help"]:
            continue
        parser = make_parser(command, COMMANDS[command])
        parser.parse_args(expand(args, command, parser))


def test_options_of_training_exist() -> None:
    parser = make_parser("train", COMMANDS["train"])
    options = [code for code in _inline(RECIPES) if code.startswith("--")]
    assert len(options) > 5
    for option in options:
        expand(shlex.split(option), "train", parser)


def test_every_command_is_on_the_front_page() -> None:
    assert set(COMMANDS) <= {command for command, *_ in _commands(FRONT)}


# Names, links and length


def test_the_front_page_is_short_and_begins_with_what_can_be_tried() -> None:
    lines = FRONT.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 220
    top = "\n".join(lines[:30])
    for first in (
        "pip install -e '.[quickstart]' && timm-memwrap quickstart",
        "pip install -e '.[test]' && pytest",
        "hub_configs/quickstart.png",
        "timm_memwrap.wrap(",
    ):
        assert first in top


@each_text
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.is_file(), link
        if anchor:
            assert anchor in _slugs(target), link


def test_figures_are_shown() -> None:
    texts = "".join(path.read_text(encoding="utf-8") for path in TEXTS.values())
    assert all(figure.name in texts for figure in RECIPES.parent.glob("*.png"))


def _expanded(name: str) -> list[str]:
    """Expands braces as a shell does: `a_{1,2}` are `a_1` and `a_2`."""
    parts = [part.split(",") for part in re.split(r"[{}]", name)]
    return ["".join(chosen) for chosen in itertools.product(*parts)]


def test_every_recipe_is_named_and_every_recipe_named_exists() -> None:
    known = set(recipe_names())
    text = RECIPES.read_text(encoding="utf-8")
    table = [row.split("|")[1] for row in text.splitlines() if row.startswith("| `")]
    named = {name for cell in table for code in re.findall(r"`([^`]+)`", cell) for name in _expanded(code)}
    assert known <= named
    looks_like_one = re.compile(r"(compare_\w+|memwrap_\w+\.(finetune|(cifar10|svhn|cinic10)_\w+))(\.yaml)?")
    for path in TEXTS.values():
        found = [name for code in _inline(path) for name in _expanded(code) if looks_like_one.fullmatch(name)]
        configs = [args[args.index("--config") + 1] for args in _commands(path) if "--config" in args]
        for name in {*found, *configs} - {"my_recipe.yaml"}:
            assert find_recipe(name).stem in known


def test_the_table_of_arguments_is_complete() -> None:
    rows = {
        row.split("`")[1]: set(re.findall(r'`"(\w+)"`', row.split("|")[2]))
        for row in FRONT.read_text(encoding="utf-8").splitlines()
        if row.startswith(("| `read_head`", "| `classifier`", "| `read`", "| `distance`"))
    }
    assert rows == {
        "read_head": set(READ_HEADS),
        "classifier": set(CLASSIFIERS),
        "read": set(READS),
        "distance": set(DISTANCES),
    }


def test_the_rooms_of_the_contributing_section_exist() -> None:
    package = Path(timm_memwrap.__file__).parent
    contributing = FRONT.read_text(encoding="utf-8").partition("| in `timm_memwrap/` | |")[2].partition("## License")[0]
    named = {
        name.rstrip("/")
        for row in contributing.splitlines()
        for name in re.findall(r"`([\w/.]+)`", row.split("|")[1] if "|" in row else "")
    }
    assert named
    assert all((package / name).exists() for name in named)
    rooms = {name.split("/")[0] for name in named}
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert folders <= rooms


def test_the_extras_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    texts = "".join(path.read_text(encoding="utf-8") for path in TEXTS.values())
    assert set(re.findall(r"pip install -e '\.\[(\w+)\]'", texts)) <= set(extras)
