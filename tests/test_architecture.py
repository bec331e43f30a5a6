"""Which room imports which: one way, without cycles, and the network through one door."""

import ast
import statistics
from pathlib import Path

import pytest
import timm

import timm_memwrap

PACKAGE = Path(timm_memwrap.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# From the bottom to the top. A room may import from rooms of lower lines only: those of a line do not know each other.
# Modules within a folder may import each other, as long as there is no cycle.
ROOMS = (
    ("constants", "_utils", "labels", "balancing"),
    ("tensor_files", "attention", "reconstruction", "fingerprint"),
    ("encoding_queue", "new_classes", "rows", "sample_ids", "bases", "readouts"),
    ("search", "memory_args", "meaning", "checks", "selection"),
    ("bank_format",),
    ("bank_state",),
    ("memory_layer", "read_heads", "memory_bank"),
    ("layers", "backbone"),
    ("heads", "bank_memory"),
    ("engines",),
    ("timm_interface", "tracing"),
    ("model",),
    ("memory_checks", "familiarity", "added_classes", "registry", "whole_model"),
    ("factory",),
    ("wrapping",),
    ("data",),
    ("building", "remembering"),
    ("streaming",),
    ("hub",),
    ("explaining",),
    ("exporting", "training", "demo"),
    ("jobs",),
    ("experiments",),
    ("cli",),
    ("__init__",),
)
ORDER = {room: place for place, rooms in enumerate(ROOMS) for room in rooms}
# What a room must not know although it stands lower, and what the layer must not know at all.
FORBIDDEN = {
    "exporting": {"explaining"},
    "training": {"explaining", "hub"},
    "memory_layer": {"memory_bank", "bank_format", "bank_memory", "search", "model"},
    "layers": {"memory_bank", "bank_format", "bank_memory", "search", "model"},
    "read_heads": {"memory_bank", "bank_format", "bank_memory", "search", "model"},
}
WITHOUT_TIMM = {
    "constants",
    "_utils",
    "labels",
    "attention",
    "reconstruction",
    "search",
    "memory_layer",
    "layers",
    "read_heads",
    "memory_bank",
}
# The core: what creates a model, reads its memory and fills it.
CORE = {room for rooms in ROOMS[: ROOMS.index(("streaming",)) + 1] for room in rooms}


def _module(path: Path) -> str:
    return ".".join(("timm_memwrap", *path.relative_to(PACKAGE).with_suffix("").parts))


def _room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def _imports(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it: a cycle hidden by a late import is a cycle."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a relative import"
            module = node.module or ""
            for alias in node.names:
                if (module, alias.name) == ("timm_memwrap", "__version__"):
                    continue  # a constant, not a room
                submodule = PACKAGE.parent.joinpath(*module.split("."), alias.name)
                is_module = module.startswith("timm_memwrap") and (
                    submodule.is_dir() or submodule.with_suffix(".py").is_file()
                )
                found.add(f"{module}.{alias.name}" if is_module else module)
    return found


def _own_imports(path: Path) -> set[str]:
    return {module for module in _imports(path) if module.split(".")[0] == "timm_memwrap"}


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines())


@pytest.mark.parametrize("path", FILES, ids=_module)
def test_imports_point_one_way(path: Path) -> None:
    room = _room(_module(path))
    assert room in ORDER, f"{room} is a new room: give it a place in ROOMS"
    for module in _own_imports(path):
        other = _room(module)
        assert other == room or ORDER[other] < ORDER[room], f"{_module(path)} imports {module}"


def test_every_room_is_there() -> None:
    assert set(ORDER) == {_room(_module(path)) for path in FILES}


def test_there_is_no_cycle() -> None:
    graph = {_module(path).removesuffix(".__init__"): set() for path in FILES}
    for path in FILES:
        module = _module(path).removesuffix(".__init__")
        graph[module] = {other for other in _own_imports(path) if other in graph and other != module}
    while graph:
        leaves = {module for module, others in graph.items() if not others & set(graph)}
        assert leaves, f"a cycle among {sorted(graph)}"
        graph = {module: others for module, others in graph.items() if module not in leaves}


@pytest.mark.parametrize("path", FILES, ids=_module)
def test_rooms_know_nothing_of_those_they_do_not_need(path: Path) -> None:
    room = _room(_module(path))
    assert not {_room(module) for module in _own_imports(path)} & FORBIDDEN.get(room, set())
    if room in WITHOUT_TIMM:
        assert not {module for module in _imports(path) if module.split(".")[0] == "timm"}


def test_experiments_are_imported_by_the_command_alone() -> None:
    importers = {
        _room(_module(path)) for path in FILES if any(_room(module) == "experiments" for module in _own_imports(path))
    }
    assert importers - {"experiments"} == {"cli"}


@pytest.mark.parametrize("path", FILES, ids=_module)
def test_only_the_hub_imports_huggingface_hub(path: Path) -> None:
    if _room(_module(path)) != "hub":
        assert not {module for module in _imports(path) if module.split(".")[0] == "huggingface_hub"}


@pytest.mark.parametrize("path", FILES, ids=_module)
def test_no_file_is_long(path: Path) -> None:
    assert _lines(path) <= 400


def test_the_files_of_the_core_are_short() -> None:
    assert statistics.median(_lines(path) for path in FILES if _room(_module(path)) in CORE) <= 200


@pytest.mark.parametrize("path", FILES, ids=_module)
def test_heavy_and_optional_packages_are_imported_where_they_are_used(path: Path) -> None:
    heavy = {
        "matplotlib",
        "captum",
        "sklearn",
        "faiss",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "torchvision",
        "scipy",
        "gradio",
        "pymilvus",
        "milvus_lite",
    }
    if _room(_module(path)) == "cli":
        heavy |= {"torch", "timm"}
    top = ast.parse(path.read_text()).body
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & heavy


def test_no_file_is_named_as_a_module_of_timm() -> None:
    """timm finds models by the last part of their module's name, so ours would answer for its own."""
    assert not {path.stem for path in FILES} & set(timm.list_modules()) - {"registry"}


@pytest.mark.parametrize("path", FILES, ids=_module)
def test_no_pickle_is_read_or_written(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not _imports(path) & {"pickle", "dill", "cloudpickle", "joblib"}
    calls = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    assert not calls & {"torch.load", "torch.save"}
