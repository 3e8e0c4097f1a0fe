"""The record of one pass through a vision encoder that stands alone, and the report that is made of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vtprune.cost.formulas import FlopsBreakdown
from vtprune.cost.sizes import FixedVisionCost
from vtprune.encoder.encoding import EncodedImage
from vtprune.method.answers import KEPT_WHOLE
from vtprune.method.facts import Work
from vtprune.method.plan import Plans
from vtprune.report.report import ImageReport, MergeReport, Report, SampleReport, StageReport


@dataclass(frozen=True)
class TowerPass:
    """What a pass leaves behind; pooled_macs: multiply-accumulates of projecting a pooled vector."""

    cost: FixedVisionCost
    pooled_macs: int
    plans: Plans
    images: list[EncodedImage]

    def build(self) -> Report:
        """The report: nothing of it is about a decoder or a cache."""
        kept = [image.alive.numel() for image in self.images]
        shares = [count / image.total for count, image in zip(kept, self.images, strict=True)]
        pruned, full = self._flops(), self._unpruned()
        pruners = self.plans.pruners
        asked = [pruner.keep for pruner in pruners]
        mean = sum(kept) / max(1, len(kept))
        return Report(
            method="+".join(pruner.name for pruner in pruners),
            samples=[self._sample(image) for image in self.images],
            tokens_per_layer=[],
            kv_tokens_per_layer=[],
            steps=0,
            asked_keep=asked[0] if len(asked) == 1 else asked,
            achieved_keep=sum(shares) / len(shares) if shares else 1.0,
            kept_tokens=mean,
            flops=pruned.total,
            flops_full=full,
            flops_breakdown=pruned,
            kv_bytes_prefill=0,
            kv_bytes_prefill_full=0,
            kv_bytes=0,
            kv_bytes_full=0,
            kv_bytes_allocated=0,
            stages=[StageReport(pruner.name, "encoder", pruner.keep, mean) for pruner in pruners],
        )

    def _sample(self, image: EncodedImage) -> SampleReport:
        alone = replace(self, images=[image])
        flops = alone._flops()
        return SampleReport(
            [self._image(image)], 0, flops=flops.total, flops_full=alone._unpruned(), scoring_flops=flops.scoring
        )

    def _image(self, image: EncodedImage) -> ImageReport:
        plan = self.plans.of(image.shown)
        reasons = [plan.whole(order, image.total) for order in range(len(self.plans.pruners))]
        kept, layer = image.alive.tolist(), int(image.merged_at)
        cls = torch.as_tensor(image.cls).reshape(-1).tolist()
        return ImageReport(
            grid=image.grid,
            tokens=image.total,
            kept=kept,
            kept_per_layer=[],
            merged=[
                MergeReport(merge.into, list(merge.members), list(merge.weights), layer, stage="encoder")
                for merge in image.merges()
            ],
            cls=cls[0],
            cls_tokens=[token for token in cls if token >= 0],
            notes=[f"{KEPT_WHOLE}{reason}" for reason in reasons if reason],
            achieved_tokens=float(len(kept)),
            kept_per_part=[len(kept)],
            parts=[part.grid for part in image.parts],
        )

    def _flops(self) -> FlopsBreakdown:
        macs = sum(self.cost.image_macs(one.grid, one.segments or None, one.mlp or None) for one in self.images)
        return FlopsBreakdown(
            vision_tower=2 * macs,
            projector=2 * self.pooled_macs * len(self.images),
            decoder=0,
            head=0,
            scoring=sum(map(self._scoring, self.images)),
        )

    def _unpruned(self) -> int:
        macs = sum(self.cost.image_macs(image.grid, None) for image in self.images)
        return 2 * (macs + self.pooled_macs * len(self.images))

    def _scoring(self, image: EncodedImage) -> int:
        """What methods add for one image."""
        blocks = self.cost.blocks
        whole = [sum(self.cost.segments(image.grid, layer)) for layer in range(blocks.layers)]
        alive = [sum(layer) for layer in image.segments] or whole
        total = 0
        plan, kept = self.plans.of(image.shown), image.alive.numel()
        for order in range(len(plan.pruners)):
            if not plan.acts(order):
                continue
            work = Work(
                patches=image.total,
                has_cls=self.cost.extra > 0,
                tokens=image.total,
                shown=kept,
                kept=kept,
                encoder_width=blocks.width,
                encoder_heads=blocks.heads,
                decoder_width=0,
                decoder_heads=0,
                prompt=0,
                text=0,
                encoder_patches=tuple(alive),
                encoder_layers=image.scored,
                decoder_layers=(),
            )
            total += plan.pruners[order].flops(work)
        return total
