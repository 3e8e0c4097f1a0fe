"""MustDrop: the method, and its parts."""

from vtprune.pruners.mustdrop.mustdrop import MustDrop

__all__ = ["MustDrop"]
