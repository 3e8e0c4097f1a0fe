"""What must hold for every case. Each judge answers complaints, none if all is well."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import vtprune
from tests.fuzz.architectures import fresh, original
from tests.fuzz.cases import Case
from tests.fuzz.eviction import Cut
from tests.fuzz.gates import Gates
from tests.fuzz.methods import TRAINED
from tests.fuzz.plan import heads_of, plan_of
from tests.fuzz.prompts import STEPS, Layout, Prompt, build
from tests.fuzz.reference import Masked
from tests.fuzz.returning import run_returning
from tests.fuzz.running import Run, image_features
from vtprune.method.pruner import Pruner
from vtprune.method.stages import revives, skips_text
from vtprune.report.report import ImageReport, ImageStep

# In logits of fp64 models. Vectors that merge, gates and cosines are fp32 by design, which the layers blow up.
EXACT, ROUNDED = 1e-9, 2e-3


def difference(actual: Tensor, expected: Tensor, where: Tensor) -> float:
    """The largest absolute difference of logits (B, n, V) where (B, n) says; infinite for what is no number."""
    found = (actual - expected)[where].abs()
    return float(found.max()) if bool(torch.isfinite(found).all()) else float("inf")


def tolerance(case: Case, report: vtprune.Report) -> float:
    """How far logits may be from the reference's."""
    merged = any(image.merged for sample in report.samples for image in sample.images)
    # Eager attention takes its softmax in fp32, too.
    rounded = merged or case.attention == "eager"
    rounded = rounded or any(
        isinstance(pruner, vtprune.D2O | vtprune.GammaMoD | vtprune.PMoD) for pruner in case.pruners
    )
    return ROUNDED if rounded else EXACT


# 1. Dropping equals masking.


def masked(case: Case, prompt: Prompt, run: Run, features: Tensor | None, gates: Gates | None) -> tuple[float, float]:
    """How far the run is from the unwrapped model under masks, and how far it may be.

    Where the released gamma-MoD skips text, and where D2O evicts it, the report does not say which tokens go: the
    first is not judged here, the second up to the step that still attends to everything; and so is D2O where two
    cosines tie.
    """
    assert run.prefill is not None
    model, last = original(case.shape.number), case.pruners[-1]
    model.set_attn_implementation(case.attention)
    plan, where, allowed = plan_of(prompt, run.prefill), prompt.words, tolerance(case, run.prefill)
    if features is None:
        features = image_features(model, prompt)
    if isinstance(last, vtprune.GammaMoD) and last.released:
        return 0.0, allowed
    if revives(last):
        expected = run_returning(case.shape, model, prompt, run.steps[-1], plan, features=features)
        return difference(run.logits, expected, where), allowed
    cut = None
    if isinstance(last, vtprune.D2O) and not last.text:
        cut = Cut(prompt, plan, heads_of(prompt, run.steps[-1], plan, case.shape.key_heads), last)
    expected = Masked(
        case.shape, model, prompt, plan, features=features, compact=case.renumbers, gates=gates, evict=cut
    ).run()
    if isinstance(last, vtprune.D2O) and (cut is None or cut.tied):
        where[:, prompt.length + 1 :] = False
    return difference(run.logits, expected, where), allowed


# 2. A row alone equals the row in its batch.


def shares_counts(pruner: Pruner) -> bool:
    """Whether the released code shares a quantity over the batch, so that a row depends on its neighbours."""
    return isinstance(pruner, vtprune.FlowCut | vtprune.MustDrop | vtprune.CDPruner) and pruner.variant == "released"


def alone(case: Case, row: int, batch: tuple[Prompt, Run], single: tuple[Prompt, Run]) -> Iterator[str]:
    """Complaints about one row of a batch beside the run of that row."""
    prompt, run = batch
    own, lonely = single
    assert run.prefill is not None
    assert lonely.prefill is not None
    ours = [_choices(report.samples[row].images) for report in (run.prefill, *run.steps)]
    theirs = [_choices(report.samples[0].images) for report in (lonely.prefill, *lonely.steps)]
    if ours != theirs:
        yield f"row {row} keeps other tokens alone than in its batch"
        return
    far = difference(run.logits[row][prompt.real[row]][None], lonely.logits, own.words)
    if far > tolerance(case, run.prefill):
        yield f"row {row} alone is {far:.1e} from itself in its batch"


def _choices(images: list[ImageReport]) -> list[Any]:
    """What methods decided."""
    return [
        (
            image.grid, image.kept, image.kept_per_layer, image.cached_per_layer, image.cached_per_head,
            [dataclasses.asdict(step) for step in image.steps if not _attends_to_all(step, image)],
            [(merge.stage, merge.into, merge.members, merge.layer) for merge in image.merged],
        )
        for image in images
    ]  # fmt: skip


def _attends_to_all(step: ImageStep, image: ImageReport) -> bool:
    """Whether a step says no more of an image than that it is whole, as it does beside one of which tokens return."""
    return step.attended_per_layer == image.kept_per_layer and not any(step.computed_per_layer)


# 3. The report is true of the cache, and within what was asked.


def counted(case: Case, prompt: Prompt, run: Run) -> Iterator[str]:
    """Complaints about the report: sizes, cache, bytes, FLOPs, what was kept."""
    assert run.prefill is not None
    report = run.steps[-1]
    sizes = [[(1, *item)[-3:] for item in row if not isinstance(item, int)] for row in case.layout.rows]
    for number, (sample, images) in enumerate(zip(report.samples, sizes, strict=True)):
        if [image.grid for image in sample.images] != images:
            yield f"grids of row {number} are {[image.grid for image in sample.images]}, not {images}"
        if sample.text_tokens != int(prompt.words[number, : prompt.length].sum()):
            yield f"row {number} has {sample.text_tokens} text tokens by the report"
    yield from _entries(case, prompt, run)
    yield from _bytes(case, prompt, run, report)
    if report.flops != report.flops_breakdown.total:
        yield f"flops {report.flops} are not the sum of their parts {report.flops_breakdown.total}"
    # What a method computes to choose comes on top.
    if report.flops - report.flops_breakdown.scoring > report.flops_full:
        yield f"flops without scoring {report.flops - report.flops_breakdown.scoring} above {report.flops_full}"
    yield from _budgets(case, report)


def _entries(case: Case, prompt: Prompt, run: Run) -> Iterator[str]:
    """Vision tokens processed, and entries cached, against the lists of tokens."""
    assert run.prefill is not None
    text = prompt.words[:, : prompt.length].sum(dim=1).tolist()
    cut = any(skips_text(pruner) or (isinstance(pruner, vtprune.D2O) and pruner.text) for pruner in case.pruners)
    for number, report in enumerate((run.prefill, *run.steps)):
        if report.steps != number:
            yield f"{report.steps} steps by the report, {number} were made"
        for layer, (processed, entries) in enumerate(
            zip(report.tokens_per_layer, report.kv_tokens_per_layer, strict=True)
        ):
            for row, sample in enumerate(report.samples):
                if processed[row] != sum(len(image.kept_per_layer[layer]) for image in sample.images):
                    yield f"layer {layer}, row {row}: {processed[row]} vision tokens are not those of the lists"
                expected = {text[row] + number + one for one in _cached(sample.images, layer)}
                if not cut and expected != {entries[row]}:
                    yield f"layer {layer}, row {row}, step {number}: {entries[row]} entries, {expected} by the lists"


def _cached(images: list[ImageReport], layer: int) -> set[int]:
    """Vision entries of a row in a layer's cache, by each head (all heads hold as many)."""
    heads = max((len(image.cached_per_head[layer]) for image in images if image.cached_per_head), default=0)
    counts = [0] * max(1, heads)
    for image in images:
        own = image.cached_per_head[layer] if image.cached_per_head else []
        returned = sum(len(step.computed_per_layer[layer]) for step in image.steps)
        for head in range(len(counts)):
            counts[head] += len(own[head]) if own else len(image.cached_per_layer[layer]) + returned
    return set(counts)


def _bytes(case: Case, prompt: Prompt, run: Run, report: vtprune.Report) -> Iterator[str]:
    """The cache's tensors against the report."""
    entry = 2 * case.shape.key_heads * case.shape.head_size * torch.finfo(torch.float64).bits // 8
    padding = (~prompt.real).sum(dim=1).tolist()
    uneven = any(skips_text(pruner) or revives(pruner) for pruner in case.pruners)
    allocated = 0
    for index, (layer, entries) in enumerate(zip(run.cache.layers, report.kv_tokens_per_layer, strict=True)):
        allocated += layer.keys.nbytes + layer.values.nbytes
        rows, heads, width, size = layer.keys.shape
        if (rows, heads, size) != (len(case.layout.rows), case.shape.key_heads, case.shape.head_size):
            yield f"layer {index}: keys of shape {tuple(layer.keys.shape)}"
        # Padding may be held, and no more than that, but where rows grow by different numbers of entries in a step.
        most = max(count + blank for count, blank in zip(entries, padding, strict=True))
        if width < max(entries) or (width > most and not uneven):
            yield f"layer {index}: the cache is {width} wide, rows hold {entries} and have {padding} of padding"
    full = [int(real.sum()) for real in prompt.real]
    for name, expected in (
        ("kv_bytes_allocated", allocated),
        ("kv_bytes", entry * sum(map(sum, report.kv_tokens_per_layer))),
        ("kv_bytes_full", entry * sum(full) * case.shape.depth),
        ("kv_bytes_prefill_full", entry * (sum(full) - STEPS * len(full)) * case.shape.depth),
    ):
        if getattr(report, name) != expected:
            yield f"{name} is {getattr(report, name)}, should be {expected}"


def asked_of(keep: int | float, tokens: int) -> int:
    """How many of `tokens` a keep asks for."""
    return min(keep, tokens) if isinstance(keep, int) else max(1, min(tokens, round(keep * tokens)))


def exceeds(pruner: Pruner) -> bool:
    """Methods that say of themselves that they may keep more than was asked: VFlowOpt's released code recycles on top
    of it; DART's keeps its pivots on top of it; D2O's spreads the budget over layers that it does not cut, and with
    text=True counts text too; random-LTD drops in training alone unless it is told otherwise."""
    if isinstance(pruner, vtprune.RandomLTD) and not pruner.at_test:
        return True
    released = getattr(pruner, "variant", "") == "released"
    above = isinstance(pruner, vtprune.VFlowOpt | vtprune.DART | vtprune.D2O)
    return (above and released) or getattr(pruner, "text", False) is True


def _budgets(case: Case, report: vtprune.Report) -> Iterator[str]:
    """What was kept, as the last method counts it, against what it was asked for (its own setting where no keep is
    given is thresholds, or a schedule)."""
    last = case.pruners[-1]
    # Of these an image may leave all at once, and does not come back.
    leaves = isinstance(last, vtprune.MuE) or any(isinstance(one, vtprune.VTW | vtprune.YOPO) for one in case.pruners)
    for sample in report.samples:
        for image in sample.images:
            lists = [image.kept, *image.kept_per_layer, *image.cached_per_layer]
            if any(tokens != sorted(set(tokens)) or not set(tokens) <= set(range(image.tokens)) for tokens in lists):
                yield "kept tokens are no ascending indices into their image"
            gone = [not tokens for tokens in image.kept_per_layer]
            if any(gone) and not (leaves and gone == sorted(gone)):
                yield "a layer keeps nothing of an image"
            if last.keep is None or exceeds(last):
                continue
            most = float(asked_of(last.keep, image.tokens))
            if isinstance(last, vtprune.PMoD) and isinstance(last.keep, float):
                # Its routers stand where the fraction itself needs them, not what it is rounded down to.
                most = max(most, last.keep * image.tokens)
            # An image that no setting of the method cuts so far is kept whole, and says so.
            if image.achieved_tokens > most + 1e-9 and not image.kept_whole:
                yield f"{image.achieved_tokens} of {image.tokens} tokens are kept where keep is {last.keep}"


# 4. Unwrapping leaves nothing.


def traces(model: Any) -> dict[str, Any]:
    """Every hook, attribute and setting of a model and its modules, and where its weights are."""
    found: dict[str, Any] = {
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "attention": model.config._attn_implementation,
        "weights": [(name, id(weight), weight.requires_grad, weight.dtype) for name, weight in _weights(model)],
    }
    for name, module in model.named_modules():
        hooks = {
            key: list(value) for key, value in module.__dict__.items() if "hook" in key and hasattr(value, "keys")
        }
        found[f"module {name}"] = type(module), sorted(module.__dict__), hooks, module.training
    return found


def _weights(model: Any) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def left_behind(before: dict[str, Any], model: Any, number: int) -> Iterator[str]:
    """Complaints about an unwrapped model."""
    after = traces(model)
    for name in before.keys() | after.keys():
        if before.get(name) != after.get(name):
            yield f"unwrap leaves {name}: {before.get(name)} became {after.get(name)}"
    for (name, ours), (_, theirs) in zip(_weights(model), _weights(original(number)), strict=True):
        if not torch.equal(ours, theirs):
            yield f"{name} has changed"


# 5. Keeping everything changes nothing.


def keeps_everything(case: Case) -> bool:
    """Whether the case asks for all tokens of methods that train nothing."""
    whole = all(
        pruner.name == "none" or (isinstance(pruner.keep, float) and pruner.keep == 1) for pruner in case.pruners
    )
    return whole and not any(pruner.name in TRAINED for pruner in case.pruners)


_working: dict[int, Any] = {}


def working(case: Case) -> Any:
    """A model of the case's architecture that may be wrapped; the same one for every case that leaves it clean."""
    model = _working.get(case.shape.number)
    if model is None:
        model = _working[case.shape.number] = fresh(case.shape.number)
        # transformers leaves attributes of its own at the first forward that sees an image.
        size = (case.shape.side or 2,) * 2
        warm = build(case.shape, Layout(((1, size),), "left", 0, masked=False, seed=0))
        with torch.no_grad():
            model(**warm.inputs)
    model.set_attn_implementation(case.attention)
    return model


def discard(case: Case) -> None:
    """Another model for the next case."""
    _working.pop(case.shape.number, None)
