"""Which room imports which: one way, without cycles, and the network through one door."""

import ast
from pathlib import Path

import pytest
import timm

import timm_memwrap

PACKAGE = Path(timm_memwrap.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A room may import from rooms of a lower number only. Modules within a folder share its number and may import each
# other, as long as there is no cycle.
ORDER = {
    "constants": 0,
    "text": 0,
    "files": 0,
    "attention": 1,
    "fingerprint": 1,
    "selection": 1,
    "timm_interface": 1,
    "loading": 1,
    "memory_index": 2,
    "layers": 3,
    "memory_bank": 3,
    "model": 4,
    "registration": 5,
    "building": 5,
    "model_card": 6,
    "explaining": 6,
    "hub": 7,
    "exporting": 8,
    "training": 8,
    "comparing": 9,
    "arguments": 10,
    "cli": 11,
    "__init__": 12,
    "benchmark": 13,
    "run": 13,
}
# The only rooms that may import huggingface_hub: the two that reach the network, and the one that writes its cards.
HUB_ROOMS = {"hub", "loading", "model_card"}


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


@pytest.mark.parametrize("path", FILES, ids=_module)
def test_imports_point_one_way(path: Path) -> None:
    room = _room(_module(path))
    assert room in ORDER, f"{room} is a new room: give it a place in ORDER"
    for module in _own_imports(path):
        other = _room(module)
        assert other == room or ORDER[other] < ORDER[room], f"{_module(path)} imports {module}"


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
def test_only_the_hub_imports_huggingface_hub(path: Path) -> None:
    if _room(_module(path)) not in HUB_ROOMS:
        assert not {module for module in _imports(path) if module.split(".")[0] == "huggingface_hub"}


@pytest.mark.parametrize("path", FILES, ids=_module)
def test_heavy_and_optional_packages_are_imported_where_they_are_used(path: Path) -> None:
    heavy = {"matplotlib", "captum", "sklearn", "faiss", "onnx", "onnxruntime", "onnxscript", "torchvision", "scipy"}
    if _room(_module(path)) == "cli":
        heavy |= {"torch", "timm"}
    top = ast.parse(path.read_text()).body
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & heavy


def test_no_file_is_named_as_a_module_of_timm() -> None:
    """timm finds models by the last part of their module's name, so ours would answer for its own."""
    assert not {path.stem for path in FILES} & set(timm.list_modules()) - {"registration"}


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
