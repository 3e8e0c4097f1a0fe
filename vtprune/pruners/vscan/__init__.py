"""VScan: the method, and its scans."""

from vtprune.pruners.vscan.vscan import VScan

__all__ = ["VScan"]
