"""YOPO: vision goes through fewer heads, neighbours and channels, and leaves before the last layers."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from vtprune.errors import VTPruneError
from vtprune.json_files import read_json
from vtprune.method.answers import Routes, VisionPlan
from vtprune.method.registry import register
from vtprune.method.stages import InAttention, InLayers
from vtprune.method.views import RoutedTokens
from vtprune.pruners.parts.checks import check_choice, check_count, is_number
from vtprune.pruners.parts.withdrawing import Withdrawing


class HeadFile(TypedDict):
    """Which key-value heads read vision, by layer (those that are not named keep all), of a decoder of so many."""

    kv_heads: int
    depth: int
    kept: dict[str, list[int]]


HEADS = TypeAdapter(HeadFile)


@register(
    "yopo",
    paper="Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to See",
    arxiv="2410.06169",
    licence="MIT",
    needs="nothing, or a file that says which heads read vision",
    variants=("paper", "released"),
)
@dataclass(frozen=True)
class YOPO(InAttention, InLayers, Withdrawing):
    """YOPO: Treat Visual Tokens as Text? (arXiv 2410.06169), for prompts with images; text is computed as ever.

    mlp: vision tokens go through the first 1 / `mlp` of the MLP's channels (2; unranked, a prefix). layer: before this
    decoder layer all of them leave, the layers from it on read text alone (half of the depth by default, 20 of 40).
    `keep` instead counts the mean over decoder layers of the tokens, as for `vtw`, and contradicts a `layer`; keep=1.0
    leaves everything as it is. head_file: a JSON file, {"kv_heads": 32, "depth": 40, "kept": {"2": [0, 5], ...}}: in
    a layer that it names the other heads have no queries and no values of vision; what attention they give it is lost,
    as in the released code, for which its keys stay. None ships, and None cuts none. window: vision tokens attend to
    those at most (window - 1) / 2 rows and columns away, later ones among them, and to what stands before the image;
    None, the default, is as the model attends: a model that was not trained with it never saw later tokens (the
    authors, too, leave it off where they do not train). causal: a window without later tokens.

    The released code masks what is computed in full; here it is not computed. Heads that do not read vision still
    weigh its keys for text, by values of 0, and the cache holds both: heads save FLOPs and no bytes. From `layer` on
    the attention of text is renormalised, as nothing of vision is left, which the released Qwen2-VL code does as well.
    variant="released" is the LLaVA code's: the image is no longer computed, but its keys stay in those layers, by
    values of 0, so that the mass that text gives it is lost; this saves no bytes. Departures: these keys are made of
    the states that the image had when it stopped (the code goes on computing it, for nothing else); with grouped
    queries the heads that share a key-value head go or stay together; a window needs one still picture on one grid, as
    the paper's, and is refused for others. Reference: ZhangAIPI/YOPO_MLLM_Pruning.
    """

    mlp: int | float = 2
    head_file: str | None = None
    window: int | None = None
    causal: bool = False
    variant: str = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, "causal", self.causal, (True, False))
        if not is_number(self.mlp) or self.mlp < 1:
            raise VTPruneError(
                f"{self.name}: mlp divides the channels of the MLP, a number of at least 1, got {self.mlp!r}"
            )
        if self.window is not None:
            check_count(self.name, "window", self.window)

    def resolve(self) -> dict[str, Any]:
        """Raises VTPruneError, besides, for a file of heads that is none or that is another decoder's."""
        if self.head_file is None:
            return super().resolve()
        found, model = read_heads(self.head_file), self.model
        if (found["depth"], found["kv_heads"]) != (model.decoder_depth, model.decoder_kv_heads):
            raise VTPruneError(
                f"{self.name}: {self.head_file} is of a decoder of {found['depth']} layers with {found['kv_heads']} "
                f"key-value heads, and this one has {model.decoder_depth} with {model.decoder_kv_heads}; give a file "
                "of this model"
            )
        return super().resolve()

    @property
    def keys_alone(self) -> bool:
        """True for variant="released"."""
        return self.variant == "released"

    def drop_layers(self) -> tuple[int, ...]:
        """Those after which an image may leave; none where its keys stay."""
        return () if self.keys_alone else super().drop_layers()

    def routed_layers(self) -> tuple[int, ...]:
        """Those that may have the keys of an image alone; none where it leaves."""
        if not self.keys_alone:
            return ()
        return tuple(range(super().drop_layers()[0] + 1, self.model.decoder_depth))

    def routed_budget(self, tokens: int, layer: int, entered: int) -> int:
        """All of an image, or nothing."""
        return 0 if layer >= self.first_without(tokens, entered) else entered

    def route(self, tokens: RoutedTokens) -> Routes:
        """All text, and the images whose time has not come."""
        if tokens.complete:
            return Routes(read=True, counts=tokens.counts)
        stays = (tokens.budgets > 0).gather(1, tokens.image.clamp(min=0))
        return Routes(tokens.text | stays, counts=tokens.counts, read=True)

    def planned_layers(self) -> tuple[int, ...]:
        """Those in which anything of vision is left out while it is there."""
        if isinstance(self.keep, float) and self.keep == 1:
            return ()
        last = (
            self.model.decoder_depth if self.keep is not None else round(self.default_keep * self.model.decoder_depth)
        )
        whole = self._channels is None and self.window is None
        named = set() if self.head_file is None else {int(layer) for layer in read_heads(self.head_file)["kept"]}
        return tuple(layer for layer in range(last) if not whole or layer in named)

    @property
    def _channels(self) -> int | None:
        """Channels of the MLP that are left, None for all."""
        return None if self.mlp == 1 else max(1, int(self.model.decoder_mlp_width / self.mlp))

    def vision_plan(self, layer: int) -> VisionPlan:
        """The heads of the file, the window and the channels."""
        kept = None if self.head_file is None else read_heads(self.head_file)["kept"].get(str(layer))
        heads = None if kept is None or len(kept) == self.model.decoder_kv_heads else tuple(sorted(kept))
        return VisionPlan(heads, window=self.window, causal=self.causal, mlp=self._channels)


@functools.lru_cache(maxsize=64)
def read_heads(file: str) -> HeadFile:
    """What a file of heads says; raises FileError for a file that is none, VTPruneError for heads out of range."""
    found: HeadFile = read_json(HEADS, Path(file), "a file of the heads that read vision")
    for layer, heads in found["kept"].items():
        known = layer.isdecimal() and int(layer) < found["depth"]
        if not known or len(set(heads)) != len(heads) or not all(0 <= head < found["kv_heads"] for head in heads):
            raise VTPruneError(
                f"{file}: layers are of 0 to {found['depth'] - 1} and their heads distinct ones of 0 to "
                f"{found['kv_heads'] - 1}, got {heads} in layer {layer}"
            )
    return found
