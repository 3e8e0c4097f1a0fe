"""CDPruner: diverse tokens, weighted by their relevance to the question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtprune.errors import VTPruneError
from vtprune.method.answers import Selection
from vtprune.method.asking import Asking, asking, started
from vtprune.method.beside import tokenizer_of
from vtprune.method.facts import Work
from vtprune.method.pruner import Tunable
from vtprune.method.registry import register
from vtprune.method.stages import NOTHING, BeforeDecoder, Read
from vtprune.method.views import VisionStream
from vtprune.pruners.cdpruner.clip_loading import find_clip
from vtprune.pruners.cdpruner.dpp import (
    greedy_dpp,
    mean_cosine,
    min_max,
    sharpen,
    takes_matrix,
)
from vtprune.pruners.cdpruner.question import question_of, question_text
from vtprune.pruners.parts.checks import check_choice
from vtprune.pruners.parts.cosines import matrix_flops


@register(
    "cdpruner",
    paper="Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs",
    arxiv="2506.10967",
    licence="Apache-2.0",
    needs="decoder-width features; the question: a CLIP beside the model (`clip`), or the decoder's embeddings of it",
    variants=("paper", "released"),
    serves="text",
)
@dataclass(frozen=True)
class CDPruner(BeforeDecoder):
    """CDPruner: Maximizing Conditional Diversity for Token Pruning in MLLMs (NeurIPS 2025, arXiv 2506.10967).

    clip: where the relevance comes from: the folder or hub id of a CLIP (transformers or open_clip, on this
    machine, never downloaded) or such a model; None takes the cosine of the vectors that enter the decoder to
    the decoder's embeddings of the question. negate: whether a low cosine means relevant; by default with a CLIP
    only, where the authors found it so. theta: in [0, 1), weighs relevance as exp(r theta / (2 - 2 theta)) instead
    of r; 0 is diversity alone. `default_keep` 64 of 576.

    Relevance is min-max normalised over the image's tokens, and 1 throughout where it is constant (the code
    divides by zero). A question longer than CLIP's 77 tokens is cut into segments whose cosines are averaged.

    variant="released" is the authors' code (Theia-4869/CDPruner): min and max over all images of a tensor (in
    `min_max`; a model's images come one by one), and renumbered positions. Departures from it, of both variants:
    the CLIP's own image side runs on the picture, squeezed into its input size, and its map of relevance is
    resampled to the grid of tokens (the code takes LLaVA's tower, the same CLIP, at the same grid); without a
    CLIP nothing but the decoder is used, as it has to be on Qwen (no code exists); segments without an end-of-text
    token pool at their highest id, as in the code; dependent tokens give no NaN; zero vectors come last.

    CLS is not used, so encoders without it (SigLIP, Qwen) need no substitute.
    """

    clip: str | nn.Module | None = None
    negate: bool | None = None
    theta: float | None = None
    variant: str = "paper"

    default_keep = 64 / 576

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, "negate", self.negate, (None, True, False))
        if self.clip is not None and not (isinstance(self.clip, str | nn.Module) and self.clip != ""):
            raise VTPruneError(f"cdpruner: clip is a folder, a hub id or a model, got {self.clip!r}")
        number = isinstance(self.theta, int | float) and not isinstance(self.theta, bool)
        if self.theta is not None and not (number and 0 <= self.theta < 1):
            raise VTPruneError(f"cdpruner: theta is a number of at least 0 and below 1, got {self.theta!r}")

    @property
    def input_reads(self) -> frozenset[Read]:
        """The picture, with a CLIP."""
        return NOTHING if self.clip is None else frozenset({Read.PICTURE, Read.GRID})

    @property
    def renumbers(self) -> bool:
        """True for variant="released"."""
        return self.variant == "released"

    def search_space(self, tokens: float) -> dict[str, Tunable]:
        """theta, but for the released code, which has it switched off."""
        return {} if self.variant == "released" else {"theta": Tunable(0.05, 0.95)}

    def resolve(self) -> dict[str, Any]:
        """Nothing; raises VTPruneError at once if there is no such CLIP, or no tokenizer to read questions."""
        if self.clip is not None:
            find_clip(self.clip)
            check_tokenizer(self.model.source)
        return {}

    @asking
    def select(self, stream: VisionStream) -> Asking[Selection]:
        """Keeps the budget; raises ScoreError for NaN."""
        scores, note = self.text_relevance(stream)
        negate = self.clip is not None if self.negate is None else self.negate
        relevance = min_max((-scores if negate else scores)[None])[0]
        if self.theta is not None:
            relevance = sharpen(relevance, self.theta)
        chosen, _ = yield from started(greedy_dpp, stream.features, relevance, stream.budget)
        return Selection(chosen.sort().values, note=note, sound=True)

    def text_relevance(self, stream: VisionStream) -> tuple[Tensor, str]:
        """The cosine of each token to the question, (N,) fp32, and where it came from."""
        question = question_of(stream.text_ids, stream.text.shape[0], stream.source)
        if self.clip is None:
            if not stream.text.shape[0]:
                none = torch.zeros(stream.features.shape[0], device=stream.features.device)
                return none, "no text, so all tokens are as relevant"
            texts = stream.text.index_select(0, question.places.to(stream.text.device))
            return mean_cosine(stream.features, texts), f"relevance from the decoder's embeddings of {question.note}"
        check_tokenizer(stream.source)
        if stream.text_ids is None or stream.picture is None:
            raise VTPruneError("cdpruner: with clip= the prompt has to come as input_ids, with the image's pixels")
        text = question_text(stream.text_ids, question, stream.source)
        if text is None:
            raise VTPruneError(f"cdpruner: the tokenizer in {stream.source!r} does not know all ids of the prompt")
        clip = find_clip(self.clip).on(stream.features.device)
        texts = clip.texts(text)
        grid = mean_cosine(clip.patches(stream.picture), texts).reshape(-1, *clip.cells)
        if grid.shape[0] != stream.grid[0]:
            raise VTPruneError(f"cdpruner: {grid.shape[0]} pictures for an image of grid {stream.grid}")
        if clip.cells != stream.grid[1:]:
            grid = F.interpolate(grid[:, None], stream.grid[1:], mode="bilinear", antialias=True)[:, 0]
        segments = f"{texts.shape[0]} segment{'s' * (texts.shape[0] > 1)}"
        return grid.flatten().to(stream.features.device)[
            stream.indices
        ], f"relevance from CLIP, {question.note} in {segments}"

    def flops(self, work: Work) -> int:
        """The cosines, a row of the Cholesky factor for each kept token, and the relevance."""
        tokens, width = work.tokens, work.decoder_width
        cosines = 2 * work.kept * tokens * width
        if takes_matrix(tokens, work.kept):
            cosines = matrix_flops(tokens, width)
        relevance = 2 * tokens * width if self.clip is None else find_clip(self.clip).flops(work.text)
        return cosines + work.kept * (work.kept - 1) * tokens + relevance


def check_tokenizer(source: str) -> None:
    """Raises VTPruneError unless the model's tokenizer is on this machine."""
    if tokenizer_of(source) is None:
        raise VTPruneError(
            f"cdpruner: clip= reads the question with the model's tokenizer, which is not on this machine (the model "
            f"came from {source or 'memory'!r}); load the model from a folder that holds it, or leave clip out"
        )
