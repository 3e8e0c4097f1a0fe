"""auto: as few tokens as possible, with a promise that answers stay the whole model's."""

from vtprune.pruners.auto.auto import Auto

__all__ = ["Auto"]
