"""An lmms-eval task over the bundled questions that asks how likely each of several answers is."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from lmms_eval.tasks import TaskManager

from vtprune.assets import SHAPES_EVAL

NAME = "vtprune_choices"


def write_choices(folder: Path, rows: int, *, output_type: str = "multiple_choice", extra: str = "") -> TaskManager:
    """The first questions whose answer is a colour, with four colours to choose from; extra: further lines of YAML."""
    table = pq.read_table(SHAPES_EVAL)
    colours = ("red", "green", "blue", "yellow")
    chosen = [place for place, answer in enumerate(table.column("answer").to_pylist()) if answer in colours][:rows]
    table = table.take(chosen).append_column("choices", pa.array([list(colours)] * len(chosen)))
    pq.write_table(table, folder / f"{NAME}.parquet")
    (folder / f"{NAME}.yaml").write_text(
        f"task: {NAME}\ndataset_path: parquet\ndataset_kwargs:\n  data_files:\n"
        f"    test: {folder / NAME}.parquet\ntest_split: test\noutput_type: {output_type}\n"
        "doc_to_visual: !function vtprune.evals.lmms.shapes_task.doc_to_visual\n"
        "doc_to_text: !function vtprune.evals.lmms.shapes_task.doc_to_text\n"
        "doc_to_target: answer\n"
        f"{extra}"
        + (
            "doc_to_choice: choices\n"
            "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
            "  - metric: acc_norm\n    aggregation: mean\n    higher_is_better: true\n"
            if output_type == "multiple_choice"
            else "metric_list:\n  - metric: loss\n    aggregation: mean\n    higher_is_better: false\n"
        )
    )
    return TaskManager("ERROR", include_path=str(folder), include_defaults=False)
