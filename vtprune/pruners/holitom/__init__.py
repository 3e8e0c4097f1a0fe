"""HoliTom: a video's still places merge over runs of frames, before the decoder, and tokens once more inside it."""

from vtprune.pruners.holitom.holitom import HoliTom

__all__ = ["HoliTom"]
