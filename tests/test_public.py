"""The public surface: its names are a promise, and its examples run."""

import doctest
import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest
import torch

import timm_memwrap

PUBLIC = {
    # models and layers
    "BaselineMemory",
    "MemoryBank",
    "MemoryReadout",
    "MemoryWrapLayer",
    "MemoryWrapModel",
    "register_backbones",
    "wrap",
    # memory
    "build_memory_bank",
    "calibrate",
    "explain",
    "forget",
    "relabel",
    "remember",
    # disk and Hub
    "from_pretrained",
    "push_memory_bank",
    "push_memory_images",
    "push_to_hub",
    "save_pretrained",
    "stream_memory",
}


def _modules() -> list[ModuleType]:
    found = pkgutil.walk_packages(timm_memwrap.__path__, "timm_memwrap.")
    return [timm_memwrap, *(importlib.import_module(m.name) for m in found if not m.name.endswith("__main__"))]


def test_public_names_are_those_promised() -> None:
    names = timm_memwrap.__all__
    assert len(names) == len(set(names))
    assert set(names) == PUBLIC


@pytest.mark.parametrize("name", timm_memwrap.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(timm_memwrap, name)
    assert inspect.getdoc(value)
    assert len(inspect.getdoc(value).splitlines()[0]) <= 120


@pytest.mark.parametrize("module", _modules(), ids=lambda module: module.__name__)
def test_examples_run(module: ModuleType, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in timm_memwrap.__all__:
        monkeypatch.setitem(module.__dict__, name, getattr(timm_memwrap, name))
    result = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_every_module_lists_its_public_names() -> None:
    for module in _modules():
        names = getattr(module, "__all__", None)
        if names is not None:
            assert all(hasattr(module, name) for name in names), module.__name__


def test_examples_are_found() -> None:
    finder = doctest.DocTestFinder()
    examples = [test for module in _modules() for test in finder.find(module) if test.examples]
    assert {"MemoryWrapLayer", "MemoryBank", "build_memory_bank", "wrap"} <= {t.name.split(".")[-1] for t in examples}
