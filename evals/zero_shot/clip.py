"""A small open_clip model of the drawn shapes: the bundled LLaVA's tower, and a text tower that is trained with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from vtprune.assets import TINY_LLAVA
from vtprune.evals.tiny_models.labels import pixel_batch
from vtprune.evals.zero_shot.tower import from_transformers
from vtprune.shapes.scene import COLORS, MAX_THINGS, SHAPES, SPLITS, Scene, sample_scene

WIDTH = 128
# Of the text: begin, two words a thing, end. The end has the highest id, by which open_clip finds it.
LENGTH = 2 * MAX_THINGS + 2
WORDS = {word: number for number, word in enumerate(("", "<begin>", *COLORS, *SHAPES, "<end>"))}
# The scenes of this example are drawn apart from all others.
STREAM = 11
BATCH, RATE = 64, 5e-4


def tokens_of(captions: Sequence[str]) -> Tensor:
    """(B, LENGTH) ids of captions."""
    ids = torch.zeros(len(captions), LENGTH, dtype=torch.long)
    for row, caption in enumerate(captions):
        words = ["<begin>", *caption.split(), "<end>"]
        ids[row, : len(words)] = torch.tensor([WORDS[word] for word in words])
    return ids


def caption_of(scene: Scene, rng: np.random.Generator) -> str:
    """The names of all things, in any order."""
    return " ".join(scene.things[i].name for i in rng.permutation(len(scene.things)))


def pairs(split: str, seed: int, start: int, count: int) -> tuple[Tensor, list[str]]:
    """Pictures (B, 3, 96, 96), and the caption of each."""
    scenes, captions = [], []
    for index in range(start, start + count):
        rng = np.random.default_rng([SPLITS[split], seed, index, STREAM])
        scenes.append(sample_scene(rng))
        captions.append(caption_of(scenes[-1], rng))
    return pixel_batch(scenes), captions


def build(seed: int) -> Any:
    """The model before training: its image tower is the bundled LLaVA's."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(seed)
    text = CLIPTextCfg(context_length=LENGTH, vocab_size=len(WORDS), width=WIDTH, heads=4, layers=3)
    model = CLIP(WIDTH, CLIPVisionCfg(layers=1, width=WIDTH, head_width=32, patch_size=8, image_size=96), text)
    llava = LlavaForConditionalGeneration.from_pretrained(TINY_LLAVA)
    model.visual = from_transformers(llava.model.vision_tower)
    model.visual.proj = torch.nn.Parameter(torch.randn(WIDTH, WIDTH) * WIDTH**-0.5)
    return model


def train(model: Any, steps: int, seed: int) -> Iterator[float]:
    """Contrastive training; yields the loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        pictures, captions = pairs("train", seed, step * BATCH, BATCH)
        image, text, scale = model(pictures, tokens_of(captions))[:3]
        logits = scale * image @ text.T
        # Two pictures of a batch may have the same things: either's caption is right for both.
        same = torch.tensor([[sorted(a.split()) == sorted(b.split()) for b in captions] for a in captions])
        wanted = F.normalize(same.float(), p=1, dim=1)
        loss = (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, float(np.log(100)))
        yield loss.item()
    model.eval()
