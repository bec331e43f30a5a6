"""A comparison of all heads on few digits, made once."""

from collections.abc import Callable

import pytest
from small_comparison import Compared, make_comparison

from timm_memwrap.experiments.comparison import compare
from timm_memwrap.experiments.configuration import Comparison
from timm_memwrap.experiments.heads import HEADS


@pytest.fixture
def comparison() -> Callable[..., Comparison]:
    return make_comparison


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """All heads and two seeds; not to be written to."""
    config = make_comparison(comparison={"heads": list(HEADS), "seeds": [0, 1], "timing_rounds": 1})
    out = tmp_path_factory.mktemp("comparison")
    return Compared(config, out, compare(config, out, progress=False))
