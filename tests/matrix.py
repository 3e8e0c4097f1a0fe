"""The one list of pruners that every property test runs over."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

import vtprune
from vtprune.method.answers import Merge, Selection
from vtprune.method.facts import PUBLISHED
from vtprune.method.pruner import Pruner
from vtprune.method.stages import NOTHING, BeforeDecoder, BetweenLayers, InEncoder, Query, Read
from vtprune.method.views import DecoderLayer, EncoderLayer, VisionStream

PRUNERS: list[Pruner] = [
    vtprune.NoPruning(),
    vtprune.Random(keep=9),
    vtprune.Grid(keep=0.25),
    vtprune.Pool(keep=0.25),
    vtprune.FoPru(keep=0.25),
    vtprune.FoPru(keep=0.34, strategy="row"),
    vtprune.FlowCut(keep=8),
    vtprune.FlowCut(keep=0.3, stages=2),
    vtprune.HoloV(keep=0.25),
    vtprune.DivPrune(keep=0.25),
    vtprune.CDPruner(keep=0.25),
    vtprune.PruMerge(keep=0.3, plus=True),
    vtprune.VisionZip(keep=0.25),
    vtprune.VisionZip(keep=0.25, cls=False),
    vtprune.VisionZip(keep=0.3, merge=False),
    vtprune.VisPruner(keep=0.25),
    vtprune.VFlowOpt(keep=0.25),
    vtprune.VFlowOpt(keep=0.4, first=1.5, second=0.8, alpha=-0.5, cell=2.5),
    vtprune.Turbo(keep=0.5),
    vtprune.Turbo(keep=0.4, merge=False),
    vtprune.ToMe(keep=0.5),
    vtprune.MustDrop(keep=0.4),
    vtprune.MustDrop(),
    vtprune.MustDrop(keep=0.5, merge=False),
    vtprune.MustDrop(keep=0.4, merge_threshold=0.1, key_share=0.2),
    vtprune.VScan(keep=0.3, window=2),
    vtprune.IARED2(keep=0.3),
    vtprune.IARED2(groups=2),
    vtprune.FastV(),
    vtprune.FastV(keep=0.4, schedule="linear"),
    vtprune.DART(keep=0.4),
    vtprune.PyramidDrop(),
    vtprune.PyramidDrop(keep=0.4),
    vtprune.PyramidDrop(keep=0.5, schedule="entropy", layers=(1, 2, 4)),
    vtprune.SparseVLM(),
    vtprune.SparseVLM(keep=0.4, recycle=False),
    vtprune.SparseVLM(keep=0.5, version=2),
    vtprune.SparseVLM(adaptive_rank=True, scale=2.5),
    vtprune.SpAtten(keep=0.4),
    vtprune.GemFilter(keep=0.25),
    vtprune.GemFilter(keep=5, layer=4, pooling="grid"),
    vtprune.PMoD(),
    vtprune.PMoD(keep=0.6, layers=(2,), schedule="linear"),
    vtprune.VTW(),
    vtprune.VTW(keep=0.4),
    vtprune.YOPO(mlp=1, keep=0.4),
    vtprune.MuE(theta=0.87),
    vtprune.RandomLTD(at_test=True),
    vtprune.LazyLLM(),
    vtprune.LazyLLM(keep=14),
    vtprune.LazyLLM(keep=0.6, schedule="linear"),
    vtprune.CoViPAL(keep=0.4, width=32, heads=2),
    vtprune.CoViPAL(keep=9, width=16, blocks=2, stage="guide"),
]

# Methods that cut caches head by head once the prompt is read. Up to the first decode step they are the unpruned
# model; no mask of whole tokens describes what follows: tests/pruners/test_d2o.py has a reference of its own for it.
CACHE: list[Pruner] = [
    vtprune.D2O(),
    vtprune.D2O(keep=9, merge=False),
    vtprune.D2O(keep=0.3, variant="released"),
    vtprune.D2O(keep=0.4, text=True),
]

# Methods that weigh what layers compute even where they skip nothing, so that they are never the unpruned model:
# tests/pruners/test_gamma_mod.py has their reference, and the properties of the list above.
GATED: list[Pruner] = [
    vtprune.GammaMoD(),
    vtprune.GammaMoD(keep=0.6),
    vtprune.GammaMoD(layers=(2, 4), skip=0.75),
]

# Methods for videos alone.
TEMPORAL: list[Pruner] = [
    vtprune.EVS(),
    vtprune.EVS(keep=3),
    vtprune.DyCoke(),
    vtprune.DyCoke(keep=0.6),
    vtprune.DyCoke(variant="released"),
    vtprune.VidCom2(keep=0.3),
    vtprune.HoliTom(keep=0.4, tau=0.2),
    vtprune.HoliTom(keep=0.6, inner=0.5),
    vtprune.FastVID(keep=0.5, segments=2, tau=-1.0),
    vtprune.FramePool(every=2),
    vtprune.FrameSkip(),
    vtprune.FrameSkip(keep=0.4),
]

# What the authors released: counts shared over the batch, positions renumbered (where they are 1-D).
RELEASED: list[Pruner] = [
    vtprune.FlowCut(keep=8, variant="released"),
    vtprune.FlowCut(keep=6, stages=2, variant="released"),
    vtprune.HoloV(keep=9, variant="released"),
    vtprune.DivPrune(keep=9, variant="released"),
    vtprune.CDPruner(keep=9, variant="released"),
    vtprune.VisionZip(keep=9, variant="released"),
    vtprune.VisPruner(keep=9, important_ratio=1.0, variant="released"),
    vtprune.VFlowOpt(keep=0.3, alpha=0.5, cell=3.0, variant="released"),
    vtprune.DART(keep=0.5, pivots=2, text_pivots=3, variant="released"),
    vtprune.PyramidDrop(keep=0.5, variant="released"),
    vtprune.VScan(keep=0.4, variant="released"),
    vtprune.SparseVLM(keep=0.5, variant="released"),
    vtprune.GemFilter(keep=9, variant="released"),
    vtprune.MustDrop(variant="released", merge_threshold=0.05, global_threshold=0.03, individual_threshold=0.2),
]


P = TypeVar("P", bound=Pruner)


def at_depth(pruner: P, depth: int) -> P:
    """The pruner for a decoder of `depth` layers."""
    return pruner.bind(replace(PUBLISHED, decoder_depth=depth))


def label(pruner: Pruner) -> str:
    """A test id."""
    return "-".join(str(value) for value in pruner.to_dict().values() if value is not None)


def kept_tokens(indices: Tensor, total: int, count: int, seed: int) -> Tensor:
    """A fixed pseudo-random choice of `count` of an image's tokens, whatever else is in the batch."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed + total))
    rank = order.argsort()[indices.cpu()]
    return rank.argsort()[:count].sort().values.to(indices.device)


@vtprune.register("test_drops", paper="a test")
@dataclass(frozen=True)
class Drops(InEncoder, BeforeDecoder, BetweenLayers):
    """Keeps a fixed choice: half before the decoder (`first`), half again after each of the decoder `layers`,
    three quarters after each of the `encoder` layers. The caches of the layers `cut` are cut in the end; with `merge`
    each token dropped between decoder layers flows into the next kept one."""

    layers: tuple[int, ...] = ()
    first: bool = False
    encoder: tuple[int, ...] = ()
    cut: tuple[int, ...] = ()
    merge: bool = False

    query = Query.NOBODY

    @property
    def layer_reads(self) -> frozenset[Read]:
        return frozenset({Read.HIDDEN}) if self.merge else NOTHING

    def cut_caches(self) -> tuple[int, ...]:
        return self.cut

    def budget(self, tokens: int) -> int:
        return max(1, self.input_budget(tokens) >> len(self.layers))

    def encoder_budget(self, tokens: int) -> int:
        return max(1, round(tokens * 0.75 ** len(self.encoder)))

    def input_budget(self, tokens: int) -> int:
        return max(1, self.encoder_budget(tokens) // 2) if self.first else self.encoder_budget(tokens)

    def drop_budget(self, tokens: int, layer: int, entered: int) -> int:
        return max(1, self.input_budget(tokens) >> self.layers.index(layer) + 1)

    def encoder_layers(self) -> tuple[int, ...]:
        return self.encoder

    def prune_encoder(self, layer: EncoderLayer) -> Tensor | None:
        keep = torch.zeros_like(layer.valid)
        stage = self.encoder.index(layer.index) + 1
        for row, valid in enumerate(layer.valid):
            count = max(1, round(int(layer.total[row]) * 0.75**stage))
            chosen = kept_tokens(torch.arange(int(valid.sum())), int(layer.total[row]), count, layer.index)
            keep[row, valid.nonzero().flatten()[chosen]] = True
        return keep

    def select(self, stream: VisionStream) -> Selection | None:
        return Selection(kept_tokens(stream.indices, stream.total, stream.budget, 99)) if self.first else None

    def drop_layers(self) -> tuple[int, ...]:
        return self.layers

    def prune_decoder(self, layer: DecoderLayer) -> Selection | None:
        kept = kept_tokens(layer.indices, layer.total, layer.budget, layer.index)
        if not self.merge:
            return Selection(kept)
        assert layer.hidden is not None
        states = layer.hidden[layer.vision]
        into = torch.searchsorted(kept, torch.arange(len(states))).clamp(max=len(kept) - 1)
        merges, vectors = [], []
        for place, token in enumerate(kept.tolist()):
            members = (into == place).nonzero().flatten()
            weights = (1 + members) / (1 + members).sum()
            vectors.append((states[members] * weights[:, None]).sum(dim=0))
            merges.append(Merge(token, tuple(members.tolist()), tuple(weights.tolist())))
        return Selection(kept, torch.stack(vectors), tuple(merges))


# Drops before decoder layers 0, 1, the middle one and the last, alone and together; and in the encoder.
DROPS: list[Pruner] = [
    Drops(first=True),
    Drops(layers=(0,)),
    Drops(layers=(2,)),
    Drops(layers=(0, 1, 3), first=True),
    Drops(layers=(1, 3), cut=(0, 1, 3)),
    Drops(layers=(0, 2), first=True, merge=True),
    Drops(encoder=(0, 2)),
    Drops(encoder=(1, 4), first=True, layers=(1,)),
]
