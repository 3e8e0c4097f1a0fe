"""Mixture of depths: methods that let each decoder layer choose which vision tokens it computes, one file a method."""

from vtprune.routing.gamma_mod import GammaMoD
from vtprune.routing.pmod import PMoD

__all__ = ["GammaMoD", "PMoD"]
