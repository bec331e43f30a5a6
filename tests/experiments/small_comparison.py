"""A comparison on few digits that takes seconds, and what is left of one."""

from pathlib import Path
from typing import NamedTuple

from timm_memwrap.experiments.configuration import Comparison
from timm_memwrap.experiments.table import ComparisonReport
from timm_memwrap.training.recipes import find_recipe, load_recipe


class Compared(NamedTuple):
    config: Comparison
    out: Path
    report: ComparisonReport


def make_comparison(**sections: dict) -> Comparison:
    """Returns a comparison on the digits that takes seconds; sections are overridden by name."""
    config = load_recipe(find_recipe("compare_digits"), Comparison)
    assert isinstance(config, Comparison)
    config.data.img_size, config.data.train_samples, config.data.val_samples = 16, 120, 60
    config.data.batch_size, config.training.epochs, config.memory.train_size = 40, 2, 30
    config.memory.size = 40
    config.comparison.seeds, config.comparison.samples_per_class = [0], [1, 3]
    config.comparison.draws, config.comparison.timing_rounds = 2, 0
    for section, values in sections.items():
        for key, value in values.items():
            assert hasattr(getattr(config, section), key)
            setattr(getattr(config, section), key, value)
    return config
