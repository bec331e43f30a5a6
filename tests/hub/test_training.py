from collections.abc import Callable
from pathlib import Path

import pytest
from small_training import digits  # noqa: F401  (fixture)

import timm_memwrap
from timm_memwrap.jobs.train import train
from timm_memwrap.training.configuration import Recipe


@pytest.mark.parametrize("mode", ["none", "batch"])
def test_a_model_of_the_hub_is_trained_further_and_stays_named(
    tmp_path: Path,
    digits: Callable[..., Recipe],  # noqa: F811
    token: str,
    mode: str,
) -> None:
    options = {"training": {"epochs": 1}, "memory": {"mode": mode}}
    train(digits(**options), tmp_path / "first", progress=False)
    timm_memwrap.push_to_hub(timm_memwrap.from_pretrained(tmp_path / "first"), "me/digits")
    report = train(digits(**options, model={"name": "hf-hub:me/digits"}), tmp_path / "second", progress=False)
    assert report.model.base_model == "me/digits"
    assert "base_model: me/digits" in (tmp_path / "second" / "README.md").read_text()
    assert len(timm_memwrap.from_pretrained(tmp_path / "second").memory_bank) == 40
