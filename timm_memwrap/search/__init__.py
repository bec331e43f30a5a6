"""Searches for the samples of a memory that a query reads: one call, `search`, whatever is behind it."""

from timm_memwrap.search.again import SearchAgain as SearchAgain
from timm_memwrap.search.by_class import ClassIndex as ClassIndex
from timm_memwrap.search.exact import ExactIndex as ExactIndex
from timm_memwrap.search.faiss_index import FaissIndex as FaissIndex
from timm_memwrap.search.faiss_index import check_index as check_index
from timm_memwrap.search.quantized import QuantizedIndex as QuantizedIndex
from timm_memwrap.search.quantized import exact_index as exact_index

__all__ = ["ClassIndex", "ExactIndex", "FaissIndex", "QuantizedIndex", "SearchAgain", "check_index", "exact_index"]
