"""What becomes of the placeholders between an image's tokens that are none (newlines at the ends of rows), once
its tokens are chosen."""

from __future__ import annotations

import numpy as np
import torch

from vtprune.decoder.outline import Ints
from vtprune.decoder.prompt import ImageSpan
from vtprune.decoder.run import DecoderRun
from vtprune.hooks.recording import Recording
from vtprune.method.asking import read_back

# All stay; those whose row has a token left; none. Of an image that is kept whole all stay.
POLICIES = ("keep", "rows", "drop")


def drop_newlines(run: DecoderRun, recording: Recording, policy: str) -> None:
    """Takes newlines out of the decoder's input, of the images that lost tokens before it; what is dropped between
    decoder layers leaves them where they are."""
    cut = [span for span in run.spans if span.structural.size and span.kept.numel() < span.places.numel()]
    if policy == "keep" or not cut:
        return
    stay = [np.zeros(span.structural.size, dtype=np.bool_) for span in cut]
    if policy == "rows":
        stay = read_back([_with_tokens(span) for span in cut])
    for span, stays in zip(cut, stay, strict=True):
        gone = span.structural[~stays.astype(np.bool_)]
        run.drop_structural(span, gone)
        recording.of(span).newlines_gone = int(gone.size)


def _with_tokens(span: ImageSpan) -> torch.Tensor:
    """(S,) bool, the newlines whose row has a token left."""
    # The last number is of tokens that stand in no row.
    rows = torch.from_numpy(rows_of(span)).to(span.kept.device)[span.kept]
    found = torch.zeros(span.structural.size + 1, dtype=torch.bool, device=span.kept.device)
    return found.index_fill(0, rows, True)[:-1]


def rows_of(span: ImageSpan) -> Ints:
    """(total,) the number of the newline that ends each token's row, that of all newlines for a token of a rectangle
    whose rows have none."""
    newlines, tokens = span.structural, span.stands
    row = np.searchsorted(newlines, tokens)
    part = np.repeat(np.arange(len(span.image.parts)), [part.tokens for part in span.image.parts])
    # A newline ends a row of the rectangle that the token before it belongs to.
    ends = part[np.maximum(np.searchsorted(tokens, newlines) - 1, 0)]
    own = np.append(ends, -1)[row] == part
    return np.where(own, row, newlines.size)
