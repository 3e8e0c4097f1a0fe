"""Fewer pixels instead of fewer tokens: the baseline that a method has to beat where a model takes any size."""

from __future__ import annotations

import copy
from typing import Any

import torch

from vtprune.errors import VTPruneError
from vtprune.method.pruner import budget_of, checked_keep
from vtprune.pruners.parts.cells import cell_grid


def downscale(processor: Any, keep: int | float, *, keep_video: int | float | None = None) -> Any:
    """A processor like this one that makes pictures and videos smaller, so that each has `keep` of its vision tokens.

    keep: tokens an image (int), or a fraction (float in (0, 1]) of those that the processor itself would make of it;
    keep_video: the same for videos, None: as `keep`. The sides are those of the largest grid within the budget whose
    aspect is closest, and a picture is resized once, from its original. All frames of a video have one size, and at
    least one token each. How many tokens there are says `vtprune.report` (`tokens`) of a model that is wrapped with
    "none". The processor that is given stays as it is.

    Raises VTPruneError for a processor whose pictures all have one size, as the positions of its tower do (LLaVA).
    """
    wanted, of_videos = checked_keep(keep), checked_keep(keep_video, "keep_video")
    if wanted is None:
        raise VTPruneError("downscale needs a keep: a count of tokens an image, or a fraction of them")
    smaller = copy.copy(processor)
    names = [name for name in ("image_processor", "video_processor") if hasattr(processor, name)]
    for name in names:
        own = getattr(processor, name)
        if not all(hasattr(own, size) for size in ("patch_size", "merge_size", "resize")):
            what = "cuts pictures into crops" if hasattr(own, "image_grid_pinpoints") else "makes pictures"
            raise VTPruneError(
                f"{type(own).__name__} {what} of one size, which the positions of its tower are for; "
                "downscale takes processors of models that see any size (the Qwen-VL families)"
            )
        share = of_videos if name == "video_processor" and of_videos is not None else wanted
        setattr(smaller, name, _downscaled(own, share))
    if not names:
        raise VTPruneError(f"{type(processor).__name__} has no image processor, so that nothing can be made smaller")
    return smaller


# Set on the classes that are made here.
MADE = "_vtprune_downscaled"


def _downscaled(own: Any, keep: int | float) -> Any:
    """A copy of an image or video processor whose resizing goes on to the budget."""
    kind = type(own)
    # The class that knows how large a picture is to be; above it is the one that resizes.
    sizes: Any = next(base for base in kind.__mro__ if "resize" in vars(base) and MADE not in vars(base))

    def resize(self: Any, images: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        shown = kwargs.pop("videos") if images is None and "videos" in kwargs else images
        assert shown is not None
        # Only its shape is asked for.
        whole = kind.resize(self, shown.to("meta"), *args, **kwargs)
        factor = kwargs["factor"]
        grid = (1, whole.shape[-2] // factor, whole.shape[-1] // factor)
        frames = -(-shown.shape[1] // kwargs["temporal_factor"]) if "temporal_factor" in kwargs else 1
        budget = max(1, budget_of(keep, frames * grid[1] * grid[2]) // frames)
        _, rows, columns = cell_grid(grid, budget)
        size = type(kwargs["size"])(height=rows * factor, width=columns * factor)
        return super(sizes, self).resize(image=shown, size=size, resample=kwargs.get("resample"))

    def _preprocess(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("do_resize", True):
            raise VTPruneError("do_resize=False leaves pictures as large as they are; use the processor itself")
        return kind._preprocess(self, *args, **kwargs)

    def reduce(self: Any, protocol: int = 0) -> Any:
        return _downscaled, (own, keep)

    members = {"resize": resize, "_preprocess": _preprocess, "__reduce_ex__": reduce, MADE: True}
    made = copy.copy(own)
    made.__class__ = type(kind.__name__, (kind,), {**members, "__module__": kind.__module__})
    return made
