"""Bundled tiny checkpoints, their evaluation data and an example image."""

from pathlib import Path

ASSETS = Path(__file__).parent
TINY_LLAVA = ASSETS / "tiny-llava"
TINY_QWEN = ASSETS / "tiny-qwen"
# By the names that `--model` takes them by; the first one is what runs where none is named.
BUNDLED = {folder.name: folder for folder in (TINY_LLAVA, TINY_QWEN)}
SHAPES_EVAL = ASSETS / "shapes_eval.parquet"
# What the first set cannot ask, a part a file (`vtprune.shapes.more`).
PARTS = ("grounding", "descriptions", "forms", "pairs", "clips")
SHAPES_MORE = {part: ASSETS / "shapes_more" / f"{part}.parquet" for part in PARTS}
EXAMPLE_IMAGE = ASSETS / "example.png"
# The same model trained on with a method that brings weights; `vtprune bench` runs them beside the others.
TRAINED = (ASSETS / "tiny-llava-pmod",)
# What `vtprune calibrate` found of the bundled models, beside them.
CALIBRATIONS = {name: ASSETS / f"{name}-auto" for name in BUNDLED}


def calibration_of(source: str) -> Path | None:
    """The folder with the calibration of a bundled model that was loaded from `source`; None for any other."""
    name = next((name for name, folder in BUNDLED.items() if source and Path(source) == folder), None)
    return CALIBRATIONS[name] if name is not None and CALIBRATIONS[name].is_dir() else None


def folder_of(model: str | None) -> str:
    """The folder of a bundled model by its name, of the first one for None; anything else as it is, and so is a name
    that a folder of the user's own has."""
    if model is None:
        return str(TINY_LLAVA)
    return model if Path(model).exists() else str(BUNDLED.get(model, model))


def title_of(model: str | None) -> str:
    """What a model is called where results are shown."""
    folder = folder_of(model)
    return next((f"bundled {name}" for name, own in BUNDLED.items() if str(own) == folder), folder)


__all__ = [
    "ASSETS",
    "BUNDLED",
    "CALIBRATIONS",
    "EXAMPLE_IMAGE",
    "PARTS",
    "SHAPES_EVAL",
    "SHAPES_MORE",
    "TINY_LLAVA",
    "TINY_QWEN",
    "TRAINED",
    "calibration_of",
    "folder_of",
    "title_of",
]
