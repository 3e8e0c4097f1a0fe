"""The importance map of VFlowOpt: attention from the tokens that all look at, and how much a patch's pixels vary."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor

from vtprune.method.asking import Asking, asking, started
from vtprune.method.checks import check_scores
from vtprune.method.views import LayerSignals, VisionStream
from vtprune.pruners.parts.cells import Grid3
from vtprune.tensors.attention import attention_received

LEVELS = 256
RELEASED_GREY = 0.3333
RELEASED_EPS = 1e-10


def grey_levels(picture: Tensor) -> Tensor:
    """Grey levels 0 .. 255, the mean of the colours: (t, 3, H, W) in [0, 1] to (t, H, W) int64."""
    return (picture.float().mean(dim=1) * 255).round().long().clamp(0, LEVELS - 1)


def wrapped_levels(pixels: Tensor) -> Tensor:
    """The released code's grey levels: (A, 3, ...) normalised pixels to (A, ...) int64.

    Normalised values times 255 are cut to whole numbers and wrapped around into one byte, then averaged.
    """
    wrapped = (pixels.float() * 255).trunc().long().remainder(LEVELS)
    return (RELEASED_GREY * wrapped.sum(dim=1)).round().long()


def patch_levels(levels: Tensor, grid: Grid3, patch: tuple[int, int] | None = None) -> Tensor:
    """Levels (t, H, W) by the token whose area they lie in: (t * h * w, pixels).

    patch: rows and columns of pixels of an area, by default as many whole ones as each token can have; pixels
    beyond the last area are left out, as the encoder leaves them out.
    """
    _, rows, cols = grid
    height, width = patch or (levels.shape[-2] // rows, levels.shape[-1] // cols)
    whole = levels[:, : rows * height, : cols * width]
    areas: Tensor = rearrange(whole, "t (h ph) (w pw) -> (t h w) (ph pw)", h=rows, w=cols)
    return areas


def level_entropy(levels: Tensor, eps: float = 0.0) -> Tensor:
    """Entropy, in bits, of the histogram of each row of (N, pixels) levels: (N,) fp32; eps: inside the log."""
    counts = torch.zeros(levels.shape[0], LEVELS, device=levels.device, dtype=torch.float32)
    shares = counts.scatter_add_(1, levels, torch.ones(1, device=levels.device).expand_as(levels)) / levels.shape[1]
    entropy: Tensor = torch.special.xlogy(shares, shares + eps).sum(dim=1) / -math.log(2)
    return entropy


def released_entropy(pixels: Tensor, grid: Grid3) -> Tensor:
    """Entropy of each token's area by the released code's levels: (N,).

    pixels: normalised, (3, H, W), (t, 3, H, W) or (patches, 3 * t * p * p), as the encoder gets them.
    """
    if pixels.ndim == 2:
        levels = wrapped_levels(rearrange(pixels, "(n g) (c x) -> n c (g x)", n=math.prod(grid), c=3))
    else:
        levels = patch_levels(wrapped_levels(pixels if pixels.ndim == 4 else pixels[None]), grid)
    return level_entropy(levels, RELEASED_EPS)


def token_entropy(stream: VisionStream, *, released: bool) -> Tensor:
    """Entropy of the pixels of each of the stream's tokens, by real grey levels or as released: (N,) fp32."""
    if released:
        entropy = released_entropy(stream.pixels, stream.grid)
    else:
        assert stream.picture is not None
        entropy = level_entropy(patch_levels(grey_levels(stream.picture), stream.grid))
    return entropy.index_select(0, stream.indices.to(entropy.device))


@asking
def global_attention(signals: LayerSignals, threshold: float) -> Asking[Tensor]:
    """Mean over heads and global patches of the attention that each patch gets from them: (N * group,) fp32.

    Global patches are those that receive more than `threshold` times the mean; where there are none, the one
    that receives most. CLS takes part in the softmax and is left out of queries and of the answer. No map is
    materialised: a pass over all rows finds the global ones, a second one goes over these. Each frame of a video has
    its own. Raises ScoreError for NaN.
    """
    units = signals.units
    with torch.no_grad():
        received = [
            check_scores(attention_received(unit.query, unit.key, unit.scale, skip=unit.prefix), "vflowopt")
            for unit in units
        ]
        above = torch.cat([one > threshold * one.mean() for one in received])
    known = yield above
    ends = np.cumsum([one.numel() for one in received])[:-1]
    found = [one.nonzero()[0] for one in np.split(known, ends)]
    return torch.cat([_from_global(*one) for one in zip(units, received, found, strict=True)])


def _from_global(signals: LayerSignals, received: Tensor, found: npt.NDArray[np.int64]) -> Tensor:
    """What each patch of one unit gets from the patches `found`, from all if it is all of them, and from the one that
    has received most if it is none."""
    query, prefix = signals.query, signals.prefix
    if len(found) == received.numel() and not query.requires_grad:
        return received
    rows = torch.from_numpy(found).to(received.device) if len(found) else received.argmax()[None]
    chosen = torch.cat([query[:, :prefix], query.index_select(1, prefix + rows)], dim=1)
    return attention_received(chosen, signals.key, signals.scale, skip=prefix) * (received.numel() / rows.numel())


@asking
def importance_map(signals: LayerSignals, entropy: Tensor | None, threshold: float, alpha: float) -> Asking[Tensor]:
    """Attention from the global patches plus alpha times the softmax of the entropies: (N,) fp32.

    entropy: (N,), None for alpha 0. Patches that form one token share its entropy, so that both terms are means
    over the patches of a distribution over all of them, frame by frame. Raises ScoreError for NaN.
    """
    received = yield from started(global_attention, signals, threshold)
    attention = signals.pool(received)
    if entropy is None:
        return attention
    # The crops of one picture are one picture; frames are several.
    tokens = [attention.numel()] if signals.sources is not None else [unit.tokens for unit in signals.units]
    shares = torch.cat([one.softmax(dim=0) for one in entropy.to(attention).split(tokens)])
    return check_scores(attention + alpha * shares / signals.group, "vflowopt")
