"""HoliTom: a video's still places merge over runs of frames, what moves stays where it is attended to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtprune.errors import VTPruneError
from vtprune.method.answers import Selection
from vtprune.method.asking import Asking, asking, started
from vtprune.method.checks import check_scores
from vtprune.method.facts import Work
from vtprune.method.pruner import Tunable
from vtprune.method.registry import register
from vtprune.method.stages import NOTHING, BeforeDecoder, BetweenLayers, Query, Read
from vtprune.method.views import DecoderLayer, VisionStream
from vtprune.pruners.holitom.clusters import Clusters, gather_still
from vtprune.pruners.holitom.folding import fold
from vtprune.pruners.holitom.windows import Flags, cut_windows, still_places
from vtprune.pruners.parts.attending import check_attending, snapped
from vtprune.pruners.parts.checks import check_share, is_number
from vtprune.pruners.parts.frames import alike, apportioned, best_of_frames, by_frame, whole_frames
from vtprune.pruners.parts.prompt_attention import last_attention
from vtprune.pruners.parts.staged import scaled_layers

PUBLISHED_DEPTH = 28


@dataclass(frozen=True)
class Cut:
    """How a video is cut into windows: which of its n places stand still in each, (W, n) bool."""

    windows: list[range]
    still: Flags

    @classmethod
    def of(cls, still: Flags, places: int) -> Cut:
        """From (T - 1, n) whether each of the places hardly differs from one frame to the next."""
        windows = cut_windows(still.reshape(-1, places))
        return cls(windows, still_places(still.reshape(-1, places), windows))

    @cached_property
    def sizes(self) -> list[int]:
        """The tokens that the windows come to: of each, one for every still place, then the others of each frame."""
        found, places = [], self.still.shape[1]
        for window, count in zip(self.windows, self.still.sum(axis=1).tolist(), strict=True):
            found += [count, *[places - count] * len(window)]
        return found

    def shared(self, total: int) -> list[int]:
        """Of `sizes`, how many stay, in proportion, so that `total` do in all, or all of them."""
        weights = [max(1, size) for size in self.sizes]
        return apportioned(weights, min(total, sum(self.sizes)), most=self.sizes)

    def released(self, total: float) -> list[int]:
        """The same as released: of still places rounded, of the others of each frame rounded up."""
        share, counts, sizes = min(1.0, total / sum(self.sizes)), [], iter(self.sizes)
        for window in self.windows:
            counts.append(round(next(sizes) * share))
            counts += [math.ceil(next(sizes) * share) for _ in window]
        # Where everything stands still, all of it may round to nothing.
        counts[0] += not any(counts)
        return counts

    def chosen(
        self, frames: Tensor, attention: Tensor, counts: Sequence[int], beta: float
    ) -> tuple[Tensor, Clusters | None]:
        """The tokens that go on as they are, ascending, of frames (T, n, D) by the attention (T, n) that they get; and
        the clusters of still places, if there are any. counts: of `sizes`."""
        left = iter(counts)
        still, moving = [], []
        for window in self.windows:
            still.append(next(left))
            moving += [next(left) for _ in window]
        held = torch.from_numpy(self.still).to(frames.device)
        lengths = [len(window) for window in self.windows]
        inside = torch.tensor([row for row, length in enumerate(lengths) for _ in range(length)], device=held.device)
        kept = best_of_frames(attention.masked_fill(held.index_select(0, inside), -torch.inf), moving)
        rows = [row for row, count in enumerate(still) if count]
        if not rows:
            return kept, None
        windows = [self.windows[row] for row in rows]
        return kept, gather_still(frames, windows, held[rows], [still[row] for row in rows], beta=beta)


@register(
    "holitom",
    paper="HoliTom: Holistic Token Merging for Fast Video Large Language Models",
    arxiv="2505.21334",
    licence="Apache-2.0",
    needs="decoder-width features of whole frames; attention among patches, of the encoder layer that feeds the "
    "decoder; for `inner`, the last prompt token's attention in a decoder layer, and hidden states",
    variants=("paper", "released"),
)
@dataclass(frozen=True)
class HoliTom(BeforeDecoder, BetweenLayers):
    """HoliTom: Holistic Token Merging (NeurIPS 2025, arXiv 2505.21334).

    Before the decoder the video is cut into windows of frames. A place stands still in a window where its tokens have
    a cosine above `tau` from each frame to the next; the windows are those that save most tokens if such a place needs
    one token a window (dynamic programming, on the host). Still places are averaged over their window and clustered by
    the peaks of their density (7 neighbours); a cluster is `beta` times its centre and the rest the mean of what
    joined it, and stands at the centre's place in the window's first frame. Of the other places the tokens stay, frame
    by frame, that received most attention from patches in the encoder, whether or not it has a CLS token. Still and
    moving ones stay in one proportion, so that `keep` is met over the whole video.

    inner: the share of the video's tokens that merges between decoder layers (the published 0.5), before `layer` (18
    of 28 as a fraction of the depth): those that the last prompt token attends to least flow, one after the other,
    half and half into the most similar one that stays; `keep` does not count it. None, as in the authors' script for
    their largest model, leaves it out. `default_keep` 0.25 goes with `tau` 0.8; at 10% the authors take 0.65.

    Reference: cokeshao/HoliTom, not copied. Departures: `keep` is met to the token, or by fewer where merging leaves
    fewer (the code rounds window by window, and up in each frame); equal densities are told apart by their place (the
    code: by random noise); tokens stand in raster order at positions of their own (the code: still ones first in each
    window, numbered anew). Contextual tokens among the moving ones (D above 0), which fail in the code, are left out.
    variant="released" rounds as the code does and numbers positions anew where they are 1-D. Images stay whole. A
    frame is what the decoder sees as one: on Qwen two of the video's.
    """

    tau: float = 0.8
    beta: float = 0.6
    inner: float | None = None
    layer: int | None = None
    variant: str = "paper"

    videos_only = True
    query = Query.LAST
    input_reads = frozenset({Read.ENCODER})
    published_layer: ClassVar[int] = 18

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, value, least in (("tau", self.tau, -1), ("beta", self.beta, 0)):
            if not is_number(value) or not least <= value <= 1:
                raise VTPruneError(f"{self.name}: {option} is a number from {least} to 1, got {value!r}")
        check_share(self.name, "inner", self.inner, None)
        if self.layer is None:
            return
        if self.inner is None:
            raise VTPruneError(f"{self.name}: layer belongs to inner; set inner=0.5 too")
        if type(self.layer) is not int or self.layer < 1:
            raise VTPruneError(f"{self.name}: layer is an int of at least 1, got {self.layer!r}")

    @property
    def renumbers(self) -> bool:
        """True for variant="released"."""
        return self.variant == "released"

    @property
    def layer_reads(self) -> frozenset[Read]:
        """Hidden states, which merge."""
        return NOTHING if self.inner is None else frozenset({Read.HIDDEN})

    def search_space(self, tokens: float) -> dict[str, Tunable]:
        """How alike what stands still has to be, and how much a centre counts."""
        return {"tau": Tunable(0.5, 0.98), "beta": Tunable(0.0, 1.0)}

    def resolve(self) -> dict[str, Any]:
        """Nothing; raises VTPruneError for a layer that the decoder does not have, or that has no attention before
        it."""
        if self.inner is None:
            return {}
        depth = self.model.decoder_depth
        if depth < 2 or (self.layer or 0) >= depth:
            raise VTPruneError(
                f"{self.name}: inner merges before one of the layers 1 to {depth - 1}, got {self.layer}"
            )
        check_attending(self.name, "layer", () if self.layer is None else (self.layer,), self._rankable)
        return {}

    @property
    def _rankable(self) -> tuple[int, ...] | None:
        """The layers behind one with attention, None for all."""
        layers = self.model.attention_layers
        return None if layers is None else tuple(one + 1 for one in layers if one + 1 < self.model.decoder_depth)

    def drop_layers(self) -> tuple[int, ...]:
        """The layer just before the one before which tokens merge, if they do."""
        if self.inner is None:
            return ()
        scaled = scaled_layers((self.published_layer,), self.model.decoder_depth, PUBLISHED_DEPTH)
        places = snapped(scaled, self._rankable) if self.layer is None else (self.layer,)
        return tuple(place - 1 for place in places)

    def drop_budget(self, tokens: int, layer: int, entered: int) -> int | None:
        """What `inner` leaves of those that entered."""
        return max(1, round(entered * (1 - (self.inner or 0))))

    def input_budget(self, tokens: int) -> int | None:
        """None: what stands still decides."""
        return tokens if self.budget(tokens) >= tokens else None

    @asking
    def select(self, stream: VisionStream) -> Asking[Selection]:
        """Merges what stands still and keeps what is attended to of the rest; raises ScoreError for NaN, VTPruneError
        where a frame is not whole."""
        yield from started(whole_frames, self.name, stream)
        assert stream.signals is not None
        frames = by_frame(stream.features, stream)
        attention = check_scores(stream.signals.received_attention(), self.name).to(frames.device)
        similar = check_scores(alike(frames[1:], frames[:-1]), self.name)
        still = yield similar > self.tau
        cut = Cut.of(still, frames.shape[1])
        counts = cut.released(self._asked(stream)) if self.variant == "released" else cut.shared(stream.budget)
        kept, clusters = cut.chosen(frames, by_frame(attention, stream), counts, self.beta)
        if clusters is None:
            return Selection(kept, sound=True)
        into = clusters.tokens
        everything = torch.cat([kept, into])
        order = everything.argsort()

        def mix(values: Tensor) -> Tensor:
            """(N, D) values of the tokens to (K, D) of those that go on."""
            return torch.cat([values.index_select(0, kept), clusters.mixed(values)]).index_select(0, order)

        return Selection(everything[order], mix(stream.features), clusters.merges, sound=True, mix=mix)

    def _asked(self, stream: VisionStream) -> float:
        """Of the video's tokens those to keep, not yet rounded."""
        keep = self.default_keep if self.keep is None else self.keep
        assert keep is not None
        return keep * stream.total if isinstance(keep, float) else keep

    def prune_decoder(self, layer: DecoderLayer) -> Selection | None:
        """Keeps what the last token attends to, the others flow into it; raises ScoreError for NaN."""
        if layer.budget >= layer.vision.numel():
            return None
        assert layer.hidden is not None
        scores = check_scores(last_attention(layer), self.name)
        return fold(layer.hidden[layer.vision], scores, layer.budget)

    def flops(self, work: Work) -> int:
        """The encoder's logits; a product and two lengths a token; at most, in windows of two frames that stand still,
        the distances among their places and the clusters' means. Inside the decoder a row of logits, and the
        similarities."""
        total = 2 * work.encoder_pairs * work.encoder_width + 6 * work.shown * work.decoder_width
        total += 2 * work.shown * (work.tokens // work.units) * work.decoder_width
        for row, video in zip(work.decoder_tokens, work.image_tokens, strict=True):
            left = self.drop_budget(work.tokens, 0, video) or 0
            total += 2 * row * work.attention_width + 2 * (video - left) * left * work.decoder_width
        return total
