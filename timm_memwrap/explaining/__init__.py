"""Explanations: which memory samples a prediction used, how far to trust them, and figures of them."""

from timm_memwrap.explaining.calibration import calibrate, fit_temperature
from timm_memwrap.explaining.contenders import Contender, NearSample
from timm_memwrap.explaining.correspondences import Correspondence
from timm_memwrap.explaining.counterfactuals import CounterfactualMetrics, evaluate_counterfactuals, im1, im2
from timm_memwrap.explaining.explanation import Explanation, MemorySample, explain
from timm_memwrap.explaining.figures.contenders import plot_contenders
from timm_memwrap.explaining.figures.correspondences import plot_correspondences
from timm_memwrap.explaining.figures.html import write_html
from timm_memwrap.explaining.figures.memory_reports import plot_memory_report, write_memory_report
from timm_memwrap.explaining.figures.plots import plot_explanation, plot_explanations, plot_heatmaps
from timm_memwrap.explaining.findings import Finding, ticked
from timm_memwrap.explaining.heatmaps import Attribution, attribute
from timm_memwrap.explaining.metrics import ExplanationMetrics, evaluate_explanations, randomisation_check
from timm_memwrap.explaining.multi_label import MultiLabelMetrics
from timm_memwrap.explaining.nearby import nearby
from timm_memwrap.explaining.report import MemoryReport, SampleUse, memory_report
from timm_memwrap.explaining.unknown import Detection, UnknownMetrics, evaluate_unknown

__all__ = [
    "explain", "Explanation", "MemorySample", "plot_explanation", "plot_explanations",
    "Contender", "NearSample", "plot_contenders",
    "evaluate_explanations", "ExplanationMetrics", "MultiLabelMetrics",
    "evaluate_unknown", "UnknownMetrics", "Detection",
    "calibrate", "fit_temperature",
    "evaluate_counterfactuals", "CounterfactualMetrics", "im1", "im2", "randomisation_check",
    "memory_report", "MemoryReport", "Finding", "SampleUse", "plot_memory_report",
    "write_memory_report", "ticked",
    "attribute", "Attribution", "plot_heatmaps", "nearby",
    "Correspondence", "plot_correspondences",
    "write_html",
]  # fmt: skip
