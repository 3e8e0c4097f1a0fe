"""SparseVLM: the method, and its parts."""

from vtprune.pruners.sparsevlm.sparsevlm import SparseVLM

__all__ = ["SparseVLM"]
