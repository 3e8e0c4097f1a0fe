"""VTW: from a decoder layer on, the text goes on without the image."""

from __future__ import annotations

from dataclasses import dataclass

from vtprune.method.registry import register
from vtprune.pruners.parts.withdrawing import Withdrawing


@register(
    "vtw",
    paper="Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference",
    arxiv="2405.05803",
    licence="written from the rule alone",
    needs="nothing",
)
@dataclass(frozen=True)
class VTW(Withdrawing):
    """VTW: Boosting Multimodal Large Language Models with Visual Tokens Withdrawal (AAAI 2025, arXiv 2405.05803).

    Before decoder layer K (`layer`) all tokens of the image leave: what the text has read of them in the layers before
    is all that it goes on with, and the layers from K on compute and cache text alone. `keep` instead counts the mean
    over decoder layers, as for other methods between layers: 0.25 of 32 layers is K = 8; it contradicts a `layer`. It
    scores nothing, so it is the dull baseline of methods that drop late.

    The default K is half of the depth, the paper's 16 of LLaVA-1.5-7B's 32 and 20 of 13B's 40. The paper finds it as
    the first layer behind which the next token's distribution hardly moves (its Kullback-Leibler divergence, on a few
    samples); here it is given. Positions stay those of the unpruned prompt.
    """
