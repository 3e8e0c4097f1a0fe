"""What pruning brings a server: `python -m vtprune.serving.timing MODEL --method divprune --keep 64`.

It runs in vLLM's environment. Two engines are started one after the other, vLLM's own and one that prunes. Each
answers one request at a time, until its first token, and then many at once, each about a picture of its own, so that
no cache has seen any before.
"""

from __future__ import annotations

import gc
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from vtprune.console.output import one_line_errors
from vtprune.files import check_new_file, write_json
from vtprune.method.texts import parse_keep
from vtprune.serving.arguments import config_of, engine_args

# Before the first request that counts, so that whatever is compiled or captured is.
WARM = 4


def pictures(count: int, side: int, seed: int) -> list[Any]:
    """So many pictures of noise, no two of them alike."""
    drawn = np.random.default_rng(seed)
    return [Image.fromarray(drawn.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def prompt_of(config: Any) -> str:
    """A question about one picture, as the family's models are asked, without a chat template."""
    if config.model_type == "llava":
        return "USER: <image>\nWhat is shown in this picture? ASSISTANT:"
    return (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is shown in this picture?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def measure(arguments: dict[str, Any], shown: list[Any], *, prompt: str, alone: int, tokens: int) -> dict[str, Any]:
    """Seconds to the first token of requests that are alone (the median), and requests a second, all at once.

    arguments: of the engine; shown: a picture for each request, the first WARM + `alone` of which are asked alone;
    tokens: of an answer, of those that are asked at once.
    """
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(**arguments)
    requests = [{"prompt": prompt, "multi_modal_data": {"image": picture}} for picture in shown]
    first = SamplingParams(temperature=0, max_tokens=1)
    seconds, length = [], 0
    for request in requests[: WARM + alone]:
        start = time.perf_counter()
        (answer,) = llm.generate([request], first, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
        length = len(answer.prompt_token_ids)
    rest = requests[WARM + alone :]
    start = time.perf_counter()
    llm.generate(rest, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), use_tqdm=False)
    together = time.perf_counter() - start
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return {
        "prompt_tokens": length,
        "first_token_s": statistics.median(seconds[WARM:]),
        "requests_a_second": len(rest) / together,
    }


def main(
    model: Annotated[str, typer.Argument(help="A folder with a checkpoint, or a model id.")],
    method: Annotated[str, typer.Option(help="A method that can be served.")],
    keep: Annotated[str, typer.Option(help="A count, a fraction or a percentage of an image's tokens.")] = "64",
    positions: Annotated[str, typer.Option(help="original or compact.")] = "original",
    requests: Annotated[int, typer.Option(min=1, help="Requests that are made at once.")] = 200,
    alone: Annotated[int, typer.Option(min=1, help="Requests that are made one by one.")] = 20,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 16,
    side: Annotated[int, typer.Option(min=28, help="Pixels of a picture's side.")] = 336,
    dtype: Annotated[str, typer.Option(help="As vLLM's --dtype.")] = "bfloat16",
    length: Annotated[int, typer.Option(min=64, help="As vLLM's --max-model-len.")] = 2048,
    eager: Annotated[bool, typer.Option(help="Without compiling and without graphs.")] = False,
    dummy: Annotated[bool, typer.Option(help="Random weights: MODEL need have none.")] = False,
    output: Annotated[Path | None, typer.Option(help="A JSON file for the numbers.")] = None,
) -> None:
    """Time vLLM's own model and the pruned one on the same requests."""
    with one_line_errors(traceback=False):
        if output is not None:
            check_new_file(output)
        given = engine_args(model, method, keep=parse_keep(keep), positions=positions)
        config = config_of(model)
    common: dict[str, Any] = {"dtype": dtype, "max_model_len": length, "enforce_eager": eager}
    common |= {"load_format": "dummy"} if dummy else {}
    shown = pictures(WARM + alone + requests, side, seed=0)
    found = {}
    for name, own in (("unpruned", {"model": model}), (f"{method} at {keep}", given)):
        found[name] = measure({**common, **own}, shown, prompt=prompt_of(config), alone=alone, tokens=tokens)
        said = found[name]
        typer.echo(
            f"{name}: prompts of {said['prompt_tokens']} tokens, first token after {1e3 * said['first_token_s']:.1f} "
            f"ms, {said['requests_a_second']:.2f} requests a second"
        )
    if output is not None:
        write_json(output, {"model": model, "requests": requests, "tokens": tokens, **common, "found": found})


if __name__ == "__main__":
    typer.run(main)
