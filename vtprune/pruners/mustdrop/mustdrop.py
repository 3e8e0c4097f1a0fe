"""MustDrop: tokens merge in the encoder, drop out while the decoder reads the prompt, and leave its cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vtprune.errors import VTPruneError
from vtprune.method.answers import EncoderSelection, Selection
from vtprune.method.checks import check_scores
from vtprune.method.facts import Work
from vtprune.method.pruner import Counted, Tunable
from vtprune.method.registry import register
from vtprune.method.stages import BeforeDecoder, BetweenLayers, InEncoder, Read
from vtprune.method.views import DecoderLayer, EncoderLayer, VisionStream
from vtprune.pruners.mustdrop import filters as dual
from vtprune.pruners.mustdrop.windows import merge_alike
from vtprune.pruners.parts.checks import check_choice, check_factor
from vtprune.pruners.parts.prompt_attention import attention_to_image


@register(
    "mustdrop",
    paper="Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model",
    arxiv="2411.10803",
    licence="Apache-2.0 (says its README; no licence file)",
    needs="hidden states of encoder layer 0; CLS attention, or attention received, of the tower's last layer; "
    "q and k of the decoder's filter layers",
    variants=("paper", "released"),
)
@dataclass(frozen=True)
class MustDrop(InEncoder, BeforeDecoder, BetweenLayers):
    """MustDrop: Multi-Stage Vision Token Dropping (arXiv 2411.10803).

    Encoder (`merge`): after layer 0, 3x3 windows whose mean pairwise cosine is at least `merge_threshold` become
    their mean. The `key_share` of tokens with the most CLS attention in the tower's last layer is the key set.
    Prefill: after decoder `layers` (2, 6, 10 and 14 of 32 by default) tokens outside the key set go that get less
    than `global_threshold` of the text's attention to the image and less than `individual_threshold` from each text
    token. Afterwards (`cut_cache`) the caches of the layers in between are cut to what the last filter left.

    keep=None: the thresholds decide, by default those for 128 of 576 tokens, 0.0012 and 0.001 (192: 0.001, 0.001;
    64: 0.011, 0.01); they were chosen for 576 tokens and drop next to nothing of a few dozen. `keep` counts the
    mean over decoder layers and takes no thresholds: windows merge, most similar first, as far as `keep`; each
    filter leaves the same share of what it sees, ranked by the factor up to which both thresholds can be raised
    together before a token falls below them; the key set takes at most half the places. Where filters that
    leave half each would leave too much, the tokens with the least CLS attention do not enter the decoder.

    Reference: liuting20/MustDrop, with Apache-2.0 in its README and no licence file. The paper's own text was not
    at hand: its decoding-stage "output-aware cache policy" is the cut above, which is all that the code has.
    Departures from the code: an image merges all its alike windows (the code: as many as the image of the batch
    with the fewest); windows at ragged edges merge with the members that they have (the code needs grids that 3
    divides); merged tokens stand in raster order at their first member (the code puts them first, by similarity);
    text rows are the text tokens after the image (the code: all tokens, later images included) or, without any,
    the last prompt token; positions are kept. variant="released" shares the count of windows, leaves ragged
    windows alone, takes all tokens after the image and renumbers positions, layer by layer.

    Encoders without CLS (SigLIP, Qwen): attention received stands in. On Qwen a token is a merge group: the cosine
    is of the means of its patches, windows merge patch by patch.
    """

    merge: bool = True
    merge_threshold: float = 0.8
    key_share: float = 0.08
    global_threshold: float | None = None
    individual_threshold: float | None = None
    layers: tuple[int, ...] | None = None
    cut_cache: bool = True
    variant: str = "paper"

    # Thresholds decide.
    default_keep = None
    counted = Counted.MEAN_OF_LAYERS
    merges = True
    encoder_reads = frozenset({Read.HIDDEN})
    input_reads = frozenset({Read.LAST_LAYER})

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("merge", "cut_cache"):
            check_choice(self.name, option, getattr(self, option), (True, False))
        for option, value in (("merge_threshold", self.merge_threshold), ("key_share", self.key_share)):
            check_factor(self.name, option, value)
        if self.key_share > 1:
            raise VTPruneError(f"{self.name}: key_share is at most 1, got {self.key_share!r}")
        dual.check_thresholds(self.name, self.keep, self.global_threshold, self.individual_threshold)
        dual.check_layers(self.name, self.layers)

    @property
    def _whole(self) -> bool:
        """Whether nothing is to go."""
        return isinstance(self.keep, float) and self.keep == 1

    @property
    def renumbers(self) -> bool:
        """True for variant="released"."""
        return self.variant == "released"

    def search_space(self, tokens: float) -> dict[str, Tunable]:
        """Without `keep` the filters' thresholds too."""
        space = {"merge_threshold": Tunable(0.5, 1.0)} if self.merge else {}
        space["key_share"] = Tunable(0.0, 0.3)
        if self.keep is None:
            space["global_threshold"] = space["individual_threshold"] = Tunable(1e-4, 1e-1, log=True)
        return space

    def resolve(self) -> dict[str, Any]:
        """The filter layers; raises VTPruneError where the decoder has no place for them. Without a decoder there are
        none, and windows merge."""
        if not self.model.decoder_depth:
            if not self.merge:
                raise VTPruneError(f"{self.name}: merge=False leaves nothing to do in an encoder that stands alone")
            return {}
        return {"layers": dual.layers_of(self.name, self.layers, self.model)}

    def encoder_budget(self, tokens: int) -> int:
        """The fewest that merging may leave: what `keep` asks for; without it, one."""
        return 1 if self.keep is None else self.budget(tokens)

    def input_budget(self, tokens: int) -> int | None:
        """None: how many windows were alike decides, or thresholds."""
        return tokens if self._whole else None

    def drop_budget(self, tokens: int, layer: int, entered: int) -> int | None:
        """None: what was kept is counted over all layers."""
        return entered if self._whole else None

    def encoder_layers(self) -> tuple[int, ...]:
        """Layer 0 where windows merge."""
        return (0,) if self.merge else ()

    def prune_encoder(self, layer: EncoderLayer) -> EncoderSelection | None:
        """The mean of each window whose tokens look alike; raises ScoreError for NaN."""
        return merge_alike(layer, self.merge_threshold, self.name, released=self.variant == "released")

    def remember(self, stream: VisionStream) -> dict[str, Any]:
        """CLS attention (N,), the key set (N,) bool and its size, and how many tokens enter the decoder."""
        assert stream.last_signals is not None
        score = check_scores(stream.last_signals.saliency(), self.name)
        tokens = score.numel()
        entering = tokens
        if self.keep is not None:
            entering = dual.most_entering(tokens, self.budget(stream.total), self._lengths())
        key, held = dual.key_set(score, self.key_share), dual.key_size(tokens, self.key_share)
        return {"saliency": score, "key": key, "held": held, "entering": entering}

    def select(self, stream: VisionStream) -> Selection | None:
        """All tokens, or the most salient ones where the filters alone cannot meet `keep`."""
        entering, score = stream.memory["entering"], stream.memory["saliency"]
        return None if entering >= score.numel() else Selection.best(score, entering)

    def drop_layers(self) -> tuple[int, ...]:
        """`layers`, or the published ones as fractions of the depth."""
        if not self.model.decoder_depth:
            return ()
        return dual.default_layers(self.model) if self.layers is None else self.layers

    def _lengths(self) -> tuple[int, ...]:
        return dual.stage_lengths(self.drop_layers(), self.model.decoder_depth)

    def prune_decoder(self, layer: DecoderLayer) -> Selection | None:
        """The key set and what the text looks at; None if the schedule lets all pass. Raises ScoreError for NaN."""
        tokens, count = layer.vision.numel(), 0
        if self.keep is not None:
            stage = self.drop_layers().index(layer.index) + 1
            count = dual.schedule(layer.memory["entering"], self.budget(layer.total), self._lengths())[stage]
            if count >= tokens:
                return None
        key = layer.memory["key"].to(layer.key.device)
        rows = dual.rows_after(layer, text_only=self.variant == "paper")
        attention = check_scores(attention_to_image(layer, rows), self.name, still=True)
        if count:
            scores, held = dual.threshold_factor(attention), layer.memory["held"]
            return Selection(dual.top_with_key(scores, key, count, held), sound=True)
        thresholds = dual.thresholds(self.global_threshold, self.individual_threshold)
        keep = key | dual.passes(attention, *thresholds)
        kept = keep.nonzero().flatten()
        return Selection(kept, sound=True) if kept.numel() else Selection.best(attention.sum(dim=0), 1)

    def cut_caches(self) -> tuple[int, ...]:
        """From the first filter layer to the last, if `cut_cache`."""
        layers = self.drop_layers()
        return tuple(range(layers[0], layers[-1] + 1)) if self.cut_cache and layers else ()

    def flops(self, work: Work) -> int:
        """The windows' cosines, the last layer's CLS row or map, and the text's rows at the filter layers."""
        patches = work.encoder_patches[-1]
        cosines = 2 * work.tokens * work.encoder_width if self.merge else 0
        if not self.model.decoder_depth:
            return cosines
        key = 2 * patches * (1 if work.has_cls else patches // work.units) * work.encoder_width
        columns = work.prompt - work.tokens + work.kept
        return cosines + key + len(work.decoder_layers) * 2 * max(1, work.text_after) * columns * work.attention_width
