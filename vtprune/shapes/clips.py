"""Short clips in which one thing moves, changes its colour, comes or goes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from vtprune.shapes.questions import QA, pick
from vtprune.shapes.scene import COLORS, Scene, Thing, sample_scene, stands_free

FRAMES, FPS = 6, 2.0
SIDE = 64
# Pixels from one frame to the next.
SPEED = 4
WAYS = {"left": (-SPEED, 0), "right": (SPEED, 0), "up": (0, -SPEED), "down": (0, SPEED)}
EVENTS = ("move", "color", "come", "go")


@dataclass(frozen=True)
class Clip:
    """Frames, and what happens in them to the thing at `place` (of the first frame, or of the last for one that
    comes); way: where it moves, "" for other events."""

    frames: tuple[Scene, ...]
    event: str
    place: int
    way: str = ""

    @property
    def thing(self) -> Thing:
        """The thing that something happens to, as it is in the first frame that shows it."""
        return self.frames[-1 if self.event == "come" else 0].things[self.place]


def _steps(scene: Scene, place: int, shift: tuple[int, int]) -> tuple[Scene, ...] | None:
    """The frames in which a thing moves, None where it would leave the picture or touch another thing."""
    frames = []
    others = [thing for i, thing in enumerate(scene.things) if i != place]
    for step in range(FRAMES):
        thing = scene.things[place]
        thing = replace(thing, x=thing.x + step * shift[0], y=thing.y + step * shift[1])
        if not stands_free(thing, others, (scene.width, scene.height)):
            return None
        frames.append(replace(scene, things=(*scene.things[:place], thing, *scene.things[place + 1 :])))
    return tuple(frames)


def sample_clip(rng: np.random.Generator) -> Clip:
    """Draw a clip; which event it shows is drawn first, and scenes are drawn until one has room for it."""
    event = pick(rng, EVENTS)
    way = pick(rng, sorted(WAYS))
    while True:
        scene = sample_scene(rng, SIDE, SIDE)
        place = int(rng.integers(len(scene.things)))
        if event == "move":
            frames = _steps(scene, place, WAYS[way])
            if frames is not None:
                return Clip(frames, event, place, way)
            continue
        thing = scene.things[place]
        if event == "color":
            other = pick(rng, [color for color in COLORS if color != thing.color])
            after = replace(scene, things=tuple(replace(t, color=other) if t == thing else t for t in scene.things))
        else:
            after = replace(scene, things=tuple(t for t in scene.things if t != thing))
            if not after.things:
                continue
        # Frames are read in twos; what happens, happens between two of them or within.
        turn = int(rng.integers(2, FRAMES - 1))
        before, after = (after, scene) if event == "come" else (scene, after)
        return Clip((before,) * turn + (after,) * (FRAMES - turn), event, place)


def _single(clip: Clip, trait: str) -> bool:
    """Whether the thing's colour or shape singles it out in every frame."""
    value = getattr(clip.thing, trait)
    return all(Counter(getattr(t, trait) for t in frame.things)[value] <= 1 for frame in clip.frames)


def _way(clip: Clip, rng: np.random.Generator) -> QA | None:
    if clip.event != "move" or not _single(clip, "shape"):
        return None
    return QA(f"which way does the {clip.thing.shape} move?", clip.way, "clip", "clip_way")


def _mover(clip: Clip, rng: np.random.Generator) -> QA | None:
    if clip.event != "move" or len(clip.frames[0].things) < 2:
        return None
    return QA("what color is the shape that moves?", clip.thing.color, "clip", "clip_mover")


def _becomes(clip: Clip, rng: np.random.Generator) -> QA | None:
    if clip.event != "color" or not _single(clip, "shape"):
        return None
    last = clip.frames[-1].things[clip.place]
    return QA(f"what color does the {last.shape} become?", last.color, "clip", "clip_becomes")


def _end_count(clip: Clip, rng: np.random.Generator) -> QA | None:
    first = rng.random() < 0.5
    count = len(clip.frames[0 if first else -1].things)
    return QA(f"how many shapes are there at the {'start' if first else 'end'}?", str(count), "clip", "clip_count")


CLIP_FORMS: dict[str, tuple[Callable[[Clip, np.random.Generator], QA | None], tuple[str, ...]]] = {
    "clip_way": (_way, tuple(sorted(WAYS))),
    "clip_mover": (_mover, COLORS),
    "clip_becomes": (_becomes, COLORS),
    "clip_count": (_end_count, tuple("123")),
}
