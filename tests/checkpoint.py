"""A LLaVA of random weights on disk, with the bundled model's processor, for tests that load one."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from vtprune.evals.training.architecture import build_model, build_processor


@cache
def random_checkpoint() -> str:
    """The folder, written once a process."""
    folder = mkdtemp(prefix="vtprune-checkpoint-")
    processor = build_processor()
    build_model(processor.tokenizer, seed=0).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def png(width: int, height: int, colour: str = "red") -> bytes:
    """A plain picture."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def write_task(folder: Path, name: str, images: list[bytes], **generation: Any) -> None:
    """An lmms-eval task in `folder` that asks the same about each image; ids are picture-0, picture-1, …"""
    from datasets import Features, Value
    from datasets import Image as ImageFeature

    columns = {
        "id": [f"picture-{i}" for i in range(len(images))],
        "image": [{"bytes": image, "path": None} for image in images],
        "question": ["what color is the circle?"] * len(images),
        "answer": ["red"] * len(images),
    }
    text = Value("string")
    features = Features({"id": text, "image": ImageFeature(), "question": text, "answer": text})
    pq.write_table(pa.table(columns, schema=features.arrow_schema), folder / f"{name}.parquet")
    options = {"max_new_tokens": 4, **generation}
    lines = "".join(f"  {key}: {value!r}\n" for key, value in options.items())
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: parquet\ndataset_kwargs:\n  data_files:\n"
        f"    test: {folder / name}.parquet\ntest_split: test\noutput_type: generate_until\n"
        "doc_to_visual: !function vtprune.evals.shapes_task.doc_to_visual\n"
        "doc_to_text: !function vtprune.evals.shapes_task.doc_to_text\n"
        "doc_to_target: answer\n"
        "process_results: !function vtprune.evals.shapes_task.process_results\n"
        f"generation_kwargs:\n{lines}"
        "metric_list:\n  - metric: accuracy\n    aggregation: mean\n    higher_is_better: true\n"
    )
