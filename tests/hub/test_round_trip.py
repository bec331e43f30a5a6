"""Whatever the writer accepts comes back: the same logits, and a memory that is true to the weights."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.utils import freeze
from torch.utils.data import TensorDataset

import timm_memwrap
from timm_memwrap.attention import DISTANCES
from timm_memwrap.memory_args import CLASSIFIERS, READ_HEADS
from timm_memwrap.reconstruction import READS

CLASSES = 3
# Between the smallest and the largest number that a float32 holds.
FACTORS = st.one_of(st.sampled_from([1e-38, 1e-3, 1.0, 70_000.0, 100_000.0, 1e38]), st.floats(1e-6, 1e6))
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "distance": st.sampled_from(DISTANCES),
        "scale": FACTORS | st.just("learned"),
        "read_head": st.sampled_from(READ_HEADS),
        "classifier": st.sampled_from(CLASSIFIERS),
        "read": st.sampled_from(READS),
    },
)
CASES = {
    "prefix": st.sampled_from(["memwrap_", "memwrap_baseline_", "memwrap_evidence_"]),
    "arguments": ARGUMENTS,
    "backbone": st.sampled_from(["test_resnet", "test_convnext", "test_vit", "test_efficientnet"]),
    "channels": st.integers(1, 6),
    "dtype": st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    "stored": st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    "frozen": st.booleans(),
    "temperature": FACTORS,
    "size": st.integers(1, 12),
}
_settings = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@given(**CASES)
@settings(max_examples=25, derandomize=True, **_settings)
def test_what_is_saved_comes_back(tmp_path_factory: pytest.TempPathFactory, **case: Any) -> None:
    round_trip(tmp_path_factory.mktemp("model") / "saved", **case)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@given(**CASES)
@settings(max_examples=500, **_settings)
def test_what_is_saved_comes_back_in_many_cases(tmp_path_factory: pytest.TempPathFactory, **case: Any) -> None:
    round_trip(tmp_path_factory.mktemp("model") / "saved", **case)


def round_trip(
    folder: Path,
    prefix: str,
    arguments: dict[str, Any],
    backbone: str,
    channels: int,
    dtype: torch.dtype,
    stored: torch.dtype,
    frozen: bool,
    temperature: float,
    size: int,
) -> None:
    """Saves and loads a model, if there is one of these arguments and it is saved."""
    torch.manual_seed(0)
    more = {"img_size": 32} if backbone == "test_vit" else {}
    try:
        model = timm.create_model(prefix + backbone, num_classes=CLASSES, in_chans=channels, **more, **arguments).eval()
    except ValueError:
        return
    if frozen:
        freeze(model.backbone)
    model.to(dtype).temperature = temperature
    images = torch.randn(12, channels, 32, 32)
    data = TensorDataset(images[:size], torch.arange(size) % CLASSES)
    try:
        timm_memwrap.build_memory_bank(model, data, size=None, progress=False, dtype=stored)
        timm_memwrap.save_pretrained(model, folder)
    except ValueError:
        assert not folder.exists()
        return
    loaded = timm_memwrap.from_pretrained(folder)
    assert loaded.memory_args == model.memory_args
    assert not loaded.memory_is_stale()
    # timm loads every model as one of float32, which rounds a temperature of float64, with norm layers to train.
    rounded = 1e-6 if dtype == torch.float64 else 0.0
    assert loaded.temperature == pytest.approx(model.temperature, rel=rounded, abs=0)
    if frozen:
        freeze(loaded.backbone)
    with torch.no_grad():
        got, expected = loaded.to(dtype)(images.to(dtype)), model(images.to(dtype))
    torch.testing.assert_close(got, expected, rtol=rounded, atol=0, equal_nan=True)
