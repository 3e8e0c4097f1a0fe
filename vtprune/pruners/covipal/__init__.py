"""CoViPAL: the method, and its parts."""

from vtprune.pruners.covipal.covipal import CoViPAL

__all__ = ["CoViPAL"]
