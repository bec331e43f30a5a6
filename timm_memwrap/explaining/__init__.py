"""Explanations: which memory samples a prediction used, how far to trust them, and figures of them."""

from timm_memwrap.explaining.explanation import Explanation as Explanation
from timm_memwrap.explaining.explanation import MemorySample as MemorySample
from timm_memwrap.explaining.explanation import explain as explain
from timm_memwrap.explaining.figures import plot_explanation as plot_explanation
from timm_memwrap.explaining.figures import plot_explanations as plot_explanations

__all__ = ["Explanation", "MemorySample", "explain", "plot_explanation", "plot_explanations"]
