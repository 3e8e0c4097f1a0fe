"""FastVID: segments of alike frames; in each the most attended tokens, and anchors into which the others merge."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtprune.errors import VTPruneError
from vtprune.method.answers import Merge, Selection
from vtprune.method.asking import Asking, asking, started
from vtprune.method.checks import check_scores, listed
from vtprune.method.facts import Work
from vtprune.method.pruner import Tunable
from vtprune.method.registry import register
from vtprune.method.stages import BeforeDecoder, Read
from vtprune.method.views import VisionStream
from vtprune.pruners.parts.checks import check_count, is_number
from vtprune.pruners.parts.density_peaks import at_once, peaks, spread
from vtprune.pruners.parts.frames import alike, by_frame, whole_frames
from vtprune.tensors.attention import at_least_single
from vtprune.tensors.compaction import gather_tokens

NEIGHBOURS = 4


def cut_segments(similar: Sequence[float], pieces: int, tau: float) -> list[range]:
    """Runs of frames, cut between those whose `similar` (T - 1,) to the next are below `tau`, and where it is lowest,
    so that there are at least `pieces` (as far as there are frames)."""
    lowest = sorted(range(len(similar)), key=lambda place: similar[place])[: pieces - 1]
    cuts = {place + 1 for place, value in enumerate(similar) if value < tau} | {place + 1 for place in lowest}
    return [range(*pair) for pair in itertools.pairwise([0, *sorted(cuts), len(similar) + 1])]


def anchor_frames(segment: range, every: int, *, released: bool) -> list[int]:
    """Every so many frames of a segment: from its first one, or as released so that the last is among them."""
    return sorted(segment[::-1][::every]) if released else list(segment[::every])


@dataclass(frozen=True)
class Merged:
    """What flows into the anchors of one frame in each of S segments of equal length, of m tokens a segment.

    tokens: (S, m) the segments' tokens that may flow; anchors: (S, k) tokens; into: (S, m) which of the k each of the
    tokens flows into; beta: the share of an anchor that it keeps at the least.
    """

    tokens: Tensor
    anchors: Tensor
    into: Tensor
    beta: float

    def shares(self) -> tuple[Tensor, Tensor]:
        """(S, k) the share that each anchor keeps, and (S, k, m) those of what flows into it."""
        slot = torch.arange(self.anchors.shape[1], device=self.into.device)
        joins = (self.into[:, None] == slot[:, None]).double()
        number = joins.sum(dim=-1)
        own = (1 / (number + 1)).clamp(min=self.beta).where(number > 0, 1.0)
        return own, joins * ((1 - own) / number.clamp(min=1))[..., None]

    def mixed(self, values: Tensor) -> Tensor:
        """(S * k, D) the vectors of the anchors, of (N, D) values in fp32 at the least."""
        own, shares = (part.to(values) for part in self.shares())
        return (own[..., None] * values[self.anchors] + shares @ values[self.tokens]).flatten(0, 1)

    def merges(self) -> list[Merge]:
        """What flowed where."""
        found, (own, shares) = [], self.shares()
        for tokens, anchors, kept, rows in zip(self.tokens.tolist(), self.anchors.tolist(), own, shares, strict=True):
            for anchor, share, row in zip(anchors, kept.tolist(), rows, strict=True):
                weights = {tokens[one]: float(row[one]) for one in row.nonzero().flatten().tolist()}
                weights[anchor] = weights.get(anchor, 0.0) + share
                if len(weights) > 1:
                    found.append(Merge(anchor, *zip(*sorted(weights.items()), strict=True)))
        return found


@register(
    "fastvid",
    paper="FastVID: Dynamic Density Pruning for Fast Video Large Language Models",
    arxiv="2503.11187",
    licence="MIT",
    needs="decoder-width features of whole frames; attention of the encoder layer that feeds the decoder",
    variants=("paper", "released"),
    unserved="prunes videos alone",
)
@dataclass(frozen=True)
class FastVID(BeforeDecoder):
    """FastVID: Dynamic Density Pruning (NeurIPS 2025, arXiv 2503.11187).

    The video is cut into segments where the cosine of a frame's descriptor to the next one's is below `tau`, and where
    it is lowest, so that there are at least `segments`. Each frame keeps as many tokens as fit `keep`: a share of 1 -
    `contextual` are those that get most attention. The rest of its segment's budget are anchors, in one of `every`
    frames of the segment, equally many in each: the tokens that are the best peaks of density in their frame (4
    neighbours). For each anchor frame every token of the segment that is not among the most attended flows into the
    most similar anchor, which keeps a share of `beta` (or 1 / (n + 1) of n that flow, if that is more); the rest is
    their mean. `default_keep` is the paper's 10%. One token of each frame is the least that stays.

    A frame's descriptor is the mean of its features behind the projector or merger, as in the authors' code for Qwen;
    their LLaVA code loads SigLIP's pooling head beside the tower, and takes its vector and its attention. Here CLS
    attention stands in, or on encoders without CLS the attention that a token receives from its frame.

    Reference: LunarShen/FastVID, not copied, and without outputs to compare with. Anchor frames are the first of each
    segment and every so many from there, as the paper has it; variant="released" counts them from its last frame, as
    the code does. Departures from the code: equal densities are told apart by their place (the code: by random noise);
    anchors are at most what the most attended leave of a frame. The code for Qwen, which also discards frames alike to
    the next one, is not followed. Images stay whole. A frame is what the decoder sees as one: on Qwen two of the
    video's.
    """

    segments: int = 8
    tau: float = 0.9
    contextual: float = 0.4
    every: int = 4
    beta: float = 0.6
    variant: str = "paper"

    videos_only = True
    default_keep = 0.1
    input_reads = frozenset({Read.ENCODER})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.name, "segments", self.segments)
        check_count(self.name, "every", self.every)
        for option, least in (("tau", -1), ("contextual", 0), ("beta", 0)):
            value: Any = getattr(self, option)
            if not is_number(value) or not least <= value <= 1:
                raise VTPruneError(f"{self.name}: {option} is a number from {least} to 1, got {value!r}")

    def search_space(self, tokens: float) -> dict[str, Tunable]:
        """How segments are cut, how much is left to anchors, and how much of themselves these keep."""
        return {"tau": Tunable(0.5, 0.99), "contextual": Tunable(0.0, 1.0), "beta": Tunable(0.0, 1.0)}

    def input_budget(self, tokens: int) -> int | None:
        """None: all frames keep as many tokens, and anchors are shared out evenly."""
        return tokens if self.keep == 1 and isinstance(self.keep, float) else None

    @asking
    def select(self, stream: VisionStream) -> Asking[Selection | None]:
        """Keeps what is attended to, and anchors for the rest; raises ScoreError for NaN, VTPruneError where a frame
        is not whole."""
        yield from started(whole_frames, self.name, stream)
        assert stream.signals is not None
        frames = by_frame(stream.features.detach().float(), stream)
        attention = check_scores(by_frame(stream.signals.saliency().to(frames.device), stream), self.name)
        count, places = frames.shape[:2]
        each = max(1, stream.budget // count)
        if stream.budget >= count * places:
            return None
        context = int(each * self.contextual)
        descriptors = frames.mean(dim=1)
        similar = yield alike(descriptors[1:], descriptors[:-1])
        segments = cut_segments(listed(similar, self.name), self.segments, self.tau)
        order = attention.sort(dim=1, descending=True, stable=True).indices
        order = order + places * torch.arange(count, device=order.device)[:, None]
        best, rest = order[:, : each - context], order[:, each - context :].sort(dim=1).values
        merged = self._anchored(frames, rest, segments, context) if context else []
        everything = torch.cat([best.flatten(), *(one.anchors.flatten() for one in merged)])
        rank = everything.argsort()

        def mix(values: Tensor) -> Tensor:
            """(N, D) values of the tokens to (K, D) of those that go on."""
            wide = at_least_single(values)
            mixed = torch.cat([wide.index_select(0, best.flatten()), *(one.mixed(wide) for one in merged)])
            return mixed.index_select(0, rank).to(values.dtype)

        def merges() -> tuple[Merge, ...]:
            """What flowed where, in raster order."""
            return tuple(sorted((merge for one in merged for merge in one.merges()), key=lambda merge: merge.into))

        least = f"one token of each frame is the least that stays: {count} tokens, of a budget of {stream.budget}"
        note = least if stream.budget < count else ""
        return Selection(everything[rank], mix(stream.features), merges, note=note, sound=True, mix=mix)

    def _anchored(self, frames: Tensor, rest: Tensor, segments: list[range], context: int) -> list[Merged]:
        """The anchors of all segments and what flows into them: of frames (T, n, D) the tokens `rest` (T, m), with
        `context` anchors a frame; segments of one length together."""
        left = frames.flatten(0, 1)[rest]
        unit = torch.nn.functional.normalize(left, dim=-1)
        quality = torch.cat([peaks(spread(some), NEIGHBOURS) for some in left.split(at_once(left.shape[1]))])
        by_length = defaultdict(list)
        for segment in segments:
            by_length[len(segment)].append(segment)
        found = []
        for length, alike_long in by_length.items():
            shown = torch.tensor([list(segment) for segment in alike_long], device=rest.device)
            chosen = [anchor_frames(one, self.every, released=self.variant == "released") for one in alike_long]
            number = min(rest.shape[1], context * length // len(chosen[0]))
            for own in zip(*chosen, strict=True):
                frame = torch.tensor(own, device=rest.device)
                order = quality.index_select(0, frame).sort(dim=1, descending=True, stable=True).indices
                anchors = order[:, :number].sort(dim=1).values
                targets = gather_tokens(unit.index_select(0, frame), anchors)
                into = (unit[shown].flatten(1, 2) @ targets.mT).argmax(dim=-1)
                there = rest.index_select(0, frame).gather(1, anchors)
                found.append(Merged(rest[shown].flatten(1, 2), there, into, self.beta))
        return found

    def flops(self, work: Work) -> int:
        """The encoder's logits, the distances within frames, and, in the fewest segments that are cut, of equal
        length, the similarities to the anchors and the means of what flows into them."""
        pairs = work.encoder_pairs if not work.has_cls else work.patches + work.units
        total = 2 * pairs * work.encoder_width + 2 * work.shown * (work.tokens // work.units) * work.decoder_width
        anchors = int(work.kept * self.contextual) // min(work.units, self.segments)
        return total + 4 * work.shown * anchors * work.decoder_width
