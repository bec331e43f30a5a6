"""Explanations: which memory samples a prediction used, how far to trust them, and figures of them."""

from timm_memwrap.explaining.calibration import calibrate as calibrate
from timm_memwrap.explaining.calibration import fit_temperature as fit_temperature
from timm_memwrap.explaining.counterfactuals import CounterfactualMetrics as CounterfactualMetrics
from timm_memwrap.explaining.counterfactuals import evaluate_counterfactuals as evaluate_counterfactuals
from timm_memwrap.explaining.explanation import Explanation as Explanation
from timm_memwrap.explaining.explanation import MemorySample as MemorySample
from timm_memwrap.explaining.explanation import explain as explain
from timm_memwrap.explaining.figures import plot_explanation as plot_explanation
from timm_memwrap.explaining.figures import plot_explanations as plot_explanations
from timm_memwrap.explaining.figures import plot_heatmaps as plot_heatmaps
from timm_memwrap.explaining.figures import plot_memory_report as plot_memory_report
from timm_memwrap.explaining.heatmaps import Attribution as Attribution
from timm_memwrap.explaining.heatmaps import attribute as attribute
from timm_memwrap.explaining.html import write_html as write_html
from timm_memwrap.explaining.metrics import ExplanationMeter as ExplanationMeter
from timm_memwrap.explaining.metrics import ExplanationMetrics as ExplanationMetrics
from timm_memwrap.explaining.metrics import evaluate_explanations as evaluate_explanations
from timm_memwrap.explaining.metrics import im1 as im1
from timm_memwrap.explaining.metrics import im2 as im2
from timm_memwrap.explaining.metrics import randomisation_check as randomisation_check
from timm_memwrap.explaining.report import MemoryReport as MemoryReport
from timm_memwrap.explaining.report import SampleUse as SampleUse
from timm_memwrap.explaining.report import memory_report as memory_report

__all__ = [
    "explain",
    "Explanation",
    "MemorySample",
    "plot_explanation",
    "plot_explanations",
    "evaluate_explanations",
    "ExplanationMetrics",
    "ExplanationMeter",
    "calibrate",
    "fit_temperature",
    "evaluate_counterfactuals",
    "CounterfactualMetrics",
    "im1",
    "im2",
    "randomisation_check",
    "memory_report",
    "MemoryReport",
    "SampleUse",
    "plot_memory_report",
    "attribute",
    "Attribution",
    "plot_heatmaps",
    "write_html",
]
