"""VScan: two scans of the encoder's attention, merging of what they leave out, and a drop inside the decoder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from einops import rearrange
from torch import Tensor

from vtprune.errors import VTPruneError
from vtprune.method import schedules
from vtprune.method.answers import EncoderSelection
from vtprune.method.checks import check_scores
from vtprune.method.facts import Work
from vtprune.method.pruner import Tunable
from vtprune.method.registry import register
from vtprune.method.stages import NOTHING, InEncoder, Query, Read
from vtprune.method.views import DecoderLayer, EncoderLayer
from vtprune.pruners.parts.checks import check_choice, check_count, check_factor
from vtprune.pruners.parts.patches import saliency
from vtprune.pruners.parts.prompt_attention import last_attention, next_layer_flops
from vtprune.pruners.parts.staged import Staged
from vtprune.pruners.vscan.scans import batch_windows, flow, global_scan, local_scan, window_count
from vtprune.tensors.rotary import rotate

# The sixth of the 23 layers that feed LLaVA-1.5's decoder, counted from 1; the same share of Qwen2.5-VL's 32 is the
# eighth, the first one that attends to the whole image, which is the authors' choice there.
LOCAL_LAYER, ENCODER_DEPTH = 6, 23
# The side of a window where a patch is a token (16 windows of 24 x 24), and where several patches are one.
PATCH_WINDOW, GROUP_WINDOW = 6, 4
LOCAL, WINDOWS = "vscan_local", "vscan_windows"


@register(
    "vscan",
    paper="VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models",
    arxiv="2505.22654",
    licence="MIT",
    needs="CLS attention, or attention received, of two encoder layers; the last prompt token's query, and all keys, "
    "of the decoder layer before which tokens drop",
    variants=("paper", "released"),
)
@dataclass(frozen=True)
class VScan(InEncoder, Staged):
    """VScan: Rethinking Visual Token Reduction (TMLR 2026, arXiv 2505.22654).

    Encoder: of the tokens that it leaves, the share `local` (a half) are those with the most CLS attention of an early
    layer (`shallow`, by default the 6th of 23 as a fraction of the depth), no window of `window` x `window` tokens
    giving more than an even share of them; the others are those with the most CLS attention of the layer that feeds
    the decoder. Every other token flows into the one of these whose hidden states are most like its own (cosine),
    which becomes the plain mean of all (`merge=False` drops them). Decoder: before `layers` (16 of 32 as a fraction of
    the depth) the share `left` (1/3) of the tokens stays, by the attention of the last prompt token in that very
    layer, as in PyramidDrop. Several `layers`, with schedule="steps", each leave that share.

    `keep` counts the mean over decoder layers; the encoder leaves as many tokens as make it the budget with `left`: 96
    of 576 for a mean of 64 (`default_keep`), 32 of which go on. Where the encoder would have to leave more than all,
    it leaves all, and the decoder drops what the budget asks for. In an encoder that stands alone `keep` is what it
    leaves.

    Reference: Tencent/SelfEvolvingAgent, folder VScan (MIT), not copied. Departures: tokens are likened and merged
    before the projector (the code: behind it, where the tower is long done); counts are met exactly (the code loses
    tokens where half of them are not a multiple of 16 windows: 98 of 100); windows of grids that they do not divide
    take in what is left over at the edges, as the code has it for Qwen; where windows have too few tokens for their
    share, the next best ones of others fill up; positions are kept (the code renumbers them: variant="released",
    where they are 1-D); the images of a prompt, and the frames of a video, are pruned one by one (the code: the
    first image). Tokens that already stand for several count as one in a mean.

    Encoders without CLS (SigLIP: not in the paper; Qwen: the authors' own variant): attention received, mean over
    heads and queries and summed over a token's patches, stands in; a tower's window attention is scored as if it were
    over the whole image. On Qwen windows have 4 x 4 merged tokens, and patches flow in their places of the group. The
    code's maps are of queries and keys that it turns twice by the rotary embedding: here they are the model's own. The
    attention in the decoder is that of queries and keys with their rotary embedding; without it, as the code has it
    on Qwen, with variant="released" on towers whose patches merge.
    """

    left: float = 1 / 3
    local: float = 0.5
    shallow: int | None = None
    window: int | None = None
    merge: bool = True
    variant: str = "paper"

    published_layers: ClassVar[tuple[int, ...]] = (16,)
    default_keep = 64 / 576
    merges = True
    query = Query.NEXT_LAYER

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("left", "local"):
            value = getattr(self, option)
            check_factor(self.name, option, value)
            if value > 1:
                raise VTPruneError(f"{self.name}: {option} is a share of the tokens, at most 1, got {value!r}")
        if not self.left:
            raise VTPruneError(f"{self.name}: left is the share that goes on, above 0, got {self.left!r}")
        if self.shallow is not None:
            check_count(self.name, "shallow", self.shallow, least=0)
        if self.window is not None:
            check_count(self.name, "window", self.window)
        check_choice(self.name, "merge", self.merge, (True, False))

    @property
    def renumbers(self) -> bool:
        """True for variant="released"."""
        return self.variant == "released"

    @property
    def encoder_reads(self) -> frozenset[Read]:
        """Hidden states, where tokens merge."""
        return frozenset({Read.HIDDEN}) if self.merge else NOTHING

    @property
    def meets_whole(self) -> bool:
        """False: the encoder's stage comes before the decoder's."""
        return False

    def search_space(self, tokens: float) -> dict[str, Tunable]:
        """How the budget is spread, what each scan is worth, and the side of the windows."""
        space = {"local": Tunable(0.0, 1.0), "window": Tunable(1, 12, whole=True, start=self.side)}
        return {"left": Tunable(0.05, 1.0), **space} if self.model.decoder_depth else space

    def resolve(self) -> dict[str, Any]:
        """Nothing; raises VTPruneError for layers that the encoder or the decoder does not have. Without a decoder
        there is no drop in it."""
        if self.early > self.model.encoder_depth - 1:
            raise VTPruneError(
                f"{self.name}: shallow={self.shallow} (counted from 0), but only {self.model.encoder_depth} encoder "
                "layers feed the decoder"
            )
        return super().resolve() if self.model.decoder_depth else {}

    @property
    def early(self) -> int:
        """`shallow`, or the published layer as a fraction of the encoder's depth."""
        if self.shallow is not None:
            return self.shallow
        depth = self.model.encoder_depth
        return max(0, (2 * LOCAL_LAYER * depth + ENCODER_DEPTH) // (2 * ENCODER_DEPTH) - 1)

    @property
    def side(self) -> int:
        """`window`, or the published one for tokens of this kind."""
        published = PATCH_WINDOW if self.model.group == 1 else GROUP_WINDOW
        return published if self.window is None else self.window

    def own_ratios(self, layers: tuple[int, ...]) -> schedules.Ratios:
        """Of what the encoder left: all before the first layer, the share `left` from each of them on."""
        if self.schedule != "steps":
            return self.dropped_once(layers, self.left)
        return schedules.factor_steps(self.model.decoder_depth, layers, self.left)

    def encoder_layers(self) -> tuple[int, ...]:
        """The early one, and the one that feeds the decoder."""
        return tuple(sorted({self.early, self.model.encoder_depth - 1}))

    def encoder_budget(self, tokens: int) -> int:
        """As many as make the mean over decoder layers what is asked for where each drop leaves `left`, and one token
        at least has room behind the first drop."""
        budget, depth = self.budget(tokens), self.model.decoder_depth
        if not depth:
            return budget
        start = self.places()[0]
        most = (budget * depth - (depth - start)) // start
        spread = schedules.mean(self.own_ratios(self.places()))
        return max(1, min(tokens, most, round(budget / spread)))

    def prune_encoder(self, layer: EncoderLayer) -> EncoderSelection | None:
        """Takes note of the early layer's attention; by it and by the last one's, what goes on and what flows into it.
        Raises ScoreError for NaN, and VTPruneError where a token is missing."""
        scores = check_scores(saliency(layer), self.name)
        if layer.index == self.early:
            self._check_whole(layer)
            layer.memory[LOCAL] = scores
            layer.memory[WINDOWS] = batch_windows(layer.grids, self.side).to(scores.device)
        if layer.index < layer.depth - 1:
            return None
        valid = None if layer.full and not any(layer.unseen) else layer.valid
        counts = tuple(map(min, layer.budgets, layer.alive))
        local = [int(count * self.local) for count in counts]
        quotas = [-(-count // window_count(grid, self.side)) for count, grid in zip(local, layer.grids, strict=True)]
        near = local_scan(layer.memory[LOCAL], layer.memory[WINDOWS], valid, quotas=quotas, counts=local)
        rest = [count - own for count, own in zip(counts, local, strict=True)]
        keep = global_scan(scores, near, valid, rest)
        if not self.merge:
            return EncoderSelection.drop(keep, counts)
        assert layer.hidden is not None
        states = layer.hidden[:, layer.prefix :]
        states = states if layer.group == 1 else rearrange(states, "b (n g) d -> b n (g d)", g=layer.group)
        into, share = flow(states, keep, valid, counts=counts, method=self.name)
        return EncoderSelection(
            keep,
            into,
            share,
            counts=counts,
            flows=any(count < alive for count, alive in zip(counts, layer.alive, strict=True)),
            sound=True,
            lossless=valid is None,
            keeps_names=True,
        )

    def _check_whole(self, layer: EncoderLayer) -> None:
        unseen = layer.unseen or (0,) * len(layer.alive)
        if any(
            t * h * w != alive + gone for (t, h, w), alive, gone in zip(layer.grids, layer.alive, unseen, strict=True)
        ):
            raise VTPruneError(f"{self.name} scans windows of whole images: no stage may drop tokens before it")

    def scores(self, layer: DecoderLayer) -> Tensor:
        """The attention of the last prompt token: (N,)."""
        if self.variant == "released" and self.model.group > 1:
            layer = unturned(layer)
        return last_attention(layer)

    def flops(self, work: Work) -> int:
        """The two rows of attention (all rows without CLS), the cosines with what stays, and the decoder's rank."""
        total = next_layer_flops(work)
        for layer in work.encoder_layers:
            patches = work.encoder_patches[layer]
            rows = 1 if work.has_cls else patches // work.units
            total += 2 * rows * patches * work.encoder_width
        if self.merge and work.encoder_layers:
            total += 2 * work.patches * work.encoder_width * work.shown // work.units
        return total


def unturned(layer: DecoderLayer) -> DecoderLayer:
    """The layer with its queries and keys as they were before the rotary embedding."""
    assert layer.rotary is not None
    cos, sin = layer.rotary
    last = slice(layer.last, layer.last + 1)
    return replace(
        layer,
        query=rotate(layer.last_query, cos[last].float(), -sin[last].float()),
        key=rotate(layer.key, cos.float(), -sin.float()),
    )
