"""Lists of tasks that papers report together, with the metric that they print of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vtprune.errors import InputError
from vtprune.evals.bench.suite import BUNDLED_TASKS

# By the name of the suite: lmms-eval's tasks, and the metric of each; "" is a task's first one. Tasks that a judge
# behind a network scores, and splits whose answers are held by a server, are not among them.
SUITES: Mapping[str, Mapping[str, str]] = {
    "llava": {
        "gqa": "exact_match",
        "mmbench_en_dev_static": "gpt_eval_score",
        "mme": "mme_perception_score",
        "pope": "pope_f1_score",
        "scienceqa_img": "exact_match",
        "textvqa_val": "exact_match",
        "vqav2_val": "exact_match",
        "vizwiz_vqa_val": "exact_match",
        "seedbench": "seed_image",
        "mmmu_val": "mmmu_acc",
    },
    "ocr": {
        "textvqa_val": "exact_match",
        "docvqa_val": "anls",
        "infovqa_val": "anls",
        "chartqa": "relaxed_overall",
        "ocrbench": "ocrbench_accuracy",
    },
    "video": {
        "videomme": "videomme_perception_score",
        "mvbench": "mvbench_accuracy",
        "egoschema_subset": "score",
        "longvideobench_val_v": "lvb_acc",
        # As lmms-eval spells it.
        "mlvu_dev": "mlvu_percetion_score",
    },
    # What every model can be asked; the bundled clips need one that takes videos, and are named by themselves.
    "bundled": {task: "" for task in BUNDLED_TASKS if task != "vtprune_clips"},
}


def tasks_of(suites: Sequence[str]) -> dict[str, str]:
    """The tasks of some suites with their metrics, each once; raises InputError for a suite that there is not."""
    found: dict[str, str] = {}
    for name in suites:
        if name not in SUITES:
            raise InputError(f"suite: there is no {name!r}; there are {', '.join(SUITES)}")
        found |= {task: metric for task, metric in SUITES[name].items() if task not in found}
    return found


def read_metrics(texts: Sequence[str], tasks: Sequence[str]) -> dict[str, str]:
    """From `accuracy` (of every task) and `pope=pope_f1_score` the metrics by task; raises InputError for a task that
    is not asked."""
    found: dict[str, str] = {}
    for text in texts:
        task, sign, metric = (part.strip() for part in text.rpartition("="))
        if not metric:
            raise InputError(f"metric: cannot read {text!r}; give a metric, or task=metric")
        if sign and task not in tasks:
            raise InputError(f"metric: {task!r} is not among the tasks: {', '.join(tasks)}")
        found |= {task: metric} if sign else dict.fromkeys(tasks, metric)
    return found
