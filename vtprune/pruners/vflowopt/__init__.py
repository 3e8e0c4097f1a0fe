"""VFlowOpt: the method, and its parts."""

from vtprune.pruners.vflowopt.vflowopt import VFlowOpt

__all__ = ["VFlowOpt"]
