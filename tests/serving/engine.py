"""Runs in vLLM's environment: an engine for each job, its requests, and what was answered, from file to file.

python tests/serving/engine.py jobs.json answers
"""

from __future__ import annotations

import gc
import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
# Blocks of 32 tokens are filled by short prompts, so that the prefix cache is seen to be used.
OPTIONS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8, "block_size": 32}


def run(job: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """What each pass of a job answers to each of its requests."""
    from PIL import Image
    from vllm import LLM, SamplingParams

    import vtprune
    from vtprune.serving import choosing, engine_args

    kept: list[list[int]] = []

    def watched(select: Any) -> Any:
        def told(*args: Any, **kwargs: Any) -> Any:
            found = select(*args, **kwargs)
            kept.append(found.kept.tolist())
            return found

        return told

    choosing.select = watched(vtprune.select)
    choosing.select_encoded = watched(vtprune.select_encoded)
    given = {"model": job["model"]}
    if job.get("pruner"):
        given = engine_args(job["model"], job["pruner"], **job["settings"])
    llm = LLM(**{**OPTIONS, **given, "limit_mm_per_prompt": {"image": 3}, **job.get("options", {})})
    answers = []
    kept.clear()
    for requests in job["passes"]:
        prompts = []
        for request in requests:
            images = [Image.open(path).convert("RGB") for path in request["images"]]
            prompt = {"prompt": request["prompt"], "multi_modal_data": {"image": images} if images else {}}
            if "method" in request.get("method", {}) and job.get("pruner"):
                prompt["mm_processor_kwargs"] = {"vtprune": request["method"]}
            prompts.append(prompt)
        found = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8, logprobs=5), use_tqdm=False)
        answers.append([told(one) for one in found])
        answers[-1][0]["choices"] = list(kept)
        kept.clear()
    return answers


def told(output: Any) -> dict[str, Any]:
    """One answer as plain values."""
    (answer,) = output.outputs
    return {
        "ids": list(answer.token_ids),
        "logprobs": [{str(token): one.logprob for token, one in step.items()} for step in answer.logprobs],
        "prompt": len(output.prompt_token_ids),
        "cached": output.num_cached_tokens or 0,
    }


def main(jobs: dict[str, dict[str, Any]], folder: Path) -> None:
    """Runs the jobs one after the other and writes NAME.json of each, or the error that ended it."""
    from vllm import ModelRegistry
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.plugins import load_general_plugins

    from vtprune.serving.plugin import ARCHITECTURES

    load_general_plugins()
    # vLLM looks at classes that are known by name in a process of their own, which takes as long as this one to start.
    for name, home in ARCHITECTURES.items():
        module, _, cls = home.partition(":")
        ModelRegistry.register_model(name, getattr(import_module(module), cls))
    for name, job in jobs.items():
        try:
            found: Any = run(job)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        (folder / f"{name}.json").write_text(json.dumps(found))
        print(f"{name} done", flush=True)
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
