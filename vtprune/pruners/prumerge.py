"""PruMerge: the tokens whose attention stands out, the others flowing into those that are like them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor

from vtprune.method.answers import Merge, Selection
from vtprune.method.asking import Asking, asking
from vtprune.method.checks import listed
from vtprune.method.facts import Work
from vtprune.method.pruner import Tunable
from vtprune.method.registry import register
from vtprune.method.stages import BeforeDecoder, Read
from vtprune.method.views import LayerSignals, VisionStream
from vtprune.pruners.parts.checks import check_choice
from vtprune.pruners.parts.cosines import unit_vectors
from vtprune.tensors.attention import at_least_single

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
# How many tokens flow into each selected one.
NEIGHBOURS = 32
# Above the upper quartile by so many times the distance between both a token stands out.
FENCE = 1.5
# With `plus`, one of so many selected tokens stands out and the others are sampled.
PART = 4


def outliers(attention: Floats) -> int:
    """How many of N tokens have an attention (N,) that stands out, at least one."""
    low, high = np.percentile(attention, (25, 75))
    return max(1, int((attention > high + FENCE * (high - low)).sum()))


def selected(attention: Floats, count: int | None, *, plus: bool) -> Ints:
    """The tokens that go on, ascending: those with the highest attention (N,), ties to the lowest index, as many as
    stand out, or `count`.

    plus: whether tokens of a regular grid go on, too, some three times as many; with a `count`, which then holds for
    both, they are spread evenly over the tokens that attention leaves.
    """
    tokens, order = len(attention), np.argsort(-attention, kind="stable")
    if count is None:
        best = order[: outliers(attention)]
        # As in the code the last token is never one of the grid.
        step = max(1, int(tokens / len(best)) // (PART - 1))
        return np.union1d(best, np.arange(0, tokens - 1, step)) if plus else np.sort(best)
    best = order[: -(-count // PART) if plus else count]
    rest, more = np.setdiff1d(np.arange(tokens), best), count - len(best)
    return np.union1d(best, rest[np.arange(more) * len(rest) // max(1, more)])


def neighbour_weights(attention: Tensor, unit_keys: Tensor, kept: Tensor, *, flowing: Tensor, count: int) -> Tensor:
    """(K, N) what flows into each of the tokens `kept` (K,): the `count` of the tokens `flowing` (N,) bool, itself
    left out, with the most similar keys (N, d), each by its attention (N,). Ties go to the lowest index."""
    cosines = (unit_keys.index_select(0, kept) @ unit_keys.T).masked_fill_(~flowing, -torch.inf)
    cosines.scatter_(1, kept[:, None], -torch.inf)
    near = torch.sort(cosines, dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(cosines, dtype=attention.dtype).scatter(1, near, attention[near])


def one_head(signals: LayerSignals) -> LayerSignals:
    """The same layer as if all its heads were one."""
    query, key, value = (
        rearrange(states, "h n d -> 1 n (h d)") for states in (signals.query, signals.key, signals.value)
    )
    return replace(signals, query=query, key=key, value=value, scale=query.shape[-1] ** -0.5)


@register(
    "prumerge",
    paper="LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models (plus=True: PruMerge+)",
    arxiv="2403.15388",
    licence="Apache-2.0",
    needs="q and k of the vision tower's last layer; decoder-width features",
    unserved="reads the tower's last layer, which servers leave out",
)
@dataclass(frozen=True)
class PruMerge(BeforeDecoder):
    """LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models (ICCV 2025, arXiv 2403.15388).

    plus: PruMerge+, which adds tokens of a regular grid, for about four times as many in all; merge: False drops what
    would flow into others, and with it the token of what is left over, to measure what merging buys. keep=None, the
    default: as many tokens as stand out by their CLS attention (more than 1.5 times the distance between the quartiles
    above the upper one) and one more; a `keep` is met exactly, by rank, with `plus` a quarter by attention and the
    others spread evenly over what attention leaves.

    The CLS attention is that of the tower's last layer, its heads taken as one. Into each selected token flow those 32
    of the others whose keys there are most similar (cosine), each by its CLS attention: a sum, not a mean, as in the
    code. One token more, which the code has and the paper's equations have not, is the sum of all tokens that are not
    selected by their attention; it stands in the place of the last one of these (the code appends it). Where nothing
    is left over, or keep=1, there is none.

    Reference: 42Shawn/LLaVA-PruMerge (Apache-2.0), not copied. Departures from it: neighbours are tokens that are not
    selected, as in the paper (the code looks among selected ones, too, so that these flow into each other); vectors
    are those behind the projector (the code merges before it); tokens stay in raster order at their own positions (the
    code orders them by attention, then grid, and numbers them anew); at least one token is selected, and where more
    than a third stands out the grid holds all tokens (the code divides by zero in either case); every image has
    quartiles of its own. The fixed share of tokens with which the authors trained is not part of this: its grid
    repeats tokens.

    Encoders without CLS (SigLIP, Qwen; not in the paper): the attention that a token receives, mean over queries,
    stands in. On Qwen attention and keys (with their rotary embedding) are means over a merge group.
    """

    plus: bool = False
    merge: bool = True

    # The attention decides.
    default_keep = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, "plus", self.plus, (True, False))
        check_choice(self.name, "merge", self.merge, (True, False))

    @property
    def input_reads(self) -> frozenset[Read]:
        """The last layer, whose attention weighs what flows."""
        return frozenset({Read.LAST_LAYER_FLOWS if self.merge else Read.LAST_LAYER})

    def search_space(self, tokens: float) -> dict[str, Tunable]:
        """Whether a grid is added."""
        return {"plus": Tunable(choices=(True, False))}

    def input_budget(self, tokens: int) -> int | None:
        """None without a `keep`: as many as stand out."""
        return None if self.keep is None else self.budget(tokens)

    @asking
    def select(self, stream: VisionStream) -> Asking[Selection]:
        """Selects, and lets the others flow; raises ScoreError for NaN."""
        assert stream.last_signals is not None
        signals, device = one_head(stream.last_signals), stream.features.device
        attention = signals.saliency()
        known = yield attention
        listed(known, self.name)
        # A budget of one is a token that was selected.
        extra = self.merge and stream.budget > 1
        count = None if self.keep is None else stream.budget - extra
        chosen = selected(known, count, plus=self.plus)
        rest = np.setdiff1d(np.arange(len(known)), chosen)
        if not self.merge or not len(rest):
            return Selection(torch.from_numpy(chosen).to(device), sound=True)
        kept = np.union1d(chosen, rest[-1:]) if extra else chosen
        places, flowing = torch.from_numpy(kept).to(device), np.ones(len(known), dtype=bool)
        flowing[chosen] = False
        own = ~flowing[kept]
        flows = torch.from_numpy(flowing).to(device)
        keys = unit_vectors(signals.token_keys().detach(), self.name)
        weights = neighbour_weights(attention, keys, places, flowing=flows, count=min(NEIGHBOURS, len(rest)))
        alone = torch.from_numpy(own).to(device)[:, None]
        weights = torch.where(alone, weights, attention * flows) if extra else weights

        def mix(values: Tensor) -> Tensor:
            """(N, D) values of the tokens to (K, D) of those that go on."""
            whole = at_least_single(values)
            return (whole.index_select(0, places) * alone + weights.to(whole) @ whole).to(values.dtype)

        merges = functools.partial(_merges, kept, own, weights.detach())
        return Selection(places, mix(stream.features), merges, sound=True, mix=mix)

    def flops(self, work: Work) -> int:
        """The attention row (all rows without CLS), the keys' similarities, and what flows."""
        pairs = work.patches + 1 if work.has_cls else work.encoder_pairs
        attention = 2 * pairs * work.encoder_width
        return attention + self.merge * 2 * work.kept * work.shown * (work.encoder_width + work.decoder_width)


def _merges(kept: Ints, own: npt.NDArray[np.bool_], weights: Tensor) -> tuple[Merge, ...]:
    """What flowed into each of the tokens `kept` (K,), by `weights` (K, N), those that hold their `own` vector (K,)
    first: what is left over flows as it was, into the place of one of its own."""
    found = []
    for row in np.argsort(~own, kind="stable"):
        shares = weights[row].tolist()
        shares[kept[row]] += float(own[row])
        members = [token for token, share in enumerate(shares) if share]
        found.append(Merge(int(kept[row]), tuple(members), tuple(shares[token] for token in members)))
    return tuple(found)
