"""CoViPAL: what its module learns from a guide and from the task, and that training is no part of inference."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests.flop_helper import measured_flops
from tests.models import IMAGE, MODELS, PAST, ROWS, TEXT, Row, make, prompt
from vtprune import CoViPAL
from vtprune.pruners.covipal.module import log_soft_top

every_model = pytest.mark.parametrize("kind", MODELS)
SMALL = CoViPAL(keep=0.4, width=16, heads=2, relaxation="soft")
HARD = dataclasses.replace(SMALL, relaxation="hard")
GUIDED = dataclasses.replace(SMALL, stage="guide", guide=3)


def wrapped(kind: str, method: CoViPAL = SMALL, attention: str = "sdpa", *, training: bool = True) -> Any:
    """A wrapped model whose own weights are frozen."""
    model = vtprune.wrap(make(kind, attention), method).requires_grad_(False)
    model.vtprune_weights.requires_grad_(True)
    return model.train(training)


def labels_of(inputs: dict[str, Tensor], answers: int = 1) -> Tensor:
    """Labels on the last tokens of each row, which are real with padding on the left."""
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -answers:] = inputs["input_ids"][:, -answers:]
    return labels


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def scores_seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The scores that the method gives from now on, image by image, with their gradients kept."""
    seen: list[Tensor] = []
    original = CoViPAL.scores

    def watched(self: CoViPAL, stream: Any) -> Tensor:
        scores = original(self, stream)
        if scores.requires_grad:
            scores.retain_grad()
        seen.append(scores)
        return scores

    monkeypatch.setattr(CoViPAL, "scores", watched)
    return seen


def attention_maps(kind: str, inputs: dict[str, Tensor], layer: int) -> Tensor:
    """(B, L, L) the mean map over heads of a layer of the unwrapped model, as transformers returns it."""
    model = make(kind, "eager")
    with torch.no_grad():
        return model(**inputs, output_attentions=True).attentions[layer].mean(dim=1)


def guide_target(maps: Tensor, ids: Tensor, row: int, image: Tensor, answers: int, queries: str) -> Tensor:
    places = torch.arange(ids.shape[1])
    asking = (places > image[-1]) & (ids[row] != IMAGE) & (places < ids.shape[1] - answers)
    rows = asking.nonzero().flatten()
    received = maps[row, rows[-1:] if queries == "last" else rows][:, image].mean(dim=0)
    return received / received.sum()


@every_model
@pytest.mark.parametrize("method", [SMALL, HARD, GUIDED])
def test_gradients_reach_the_module_and_nothing_else(kind: str, method: CoViPAL) -> None:
    inputs, model = prompt(kind, ROWS[kind]), wrapped(kind, method)
    model(**inputs, labels=labels_of(inputs)).loss.backward()
    found = gradients(model)
    assert found.keys() == {name for name, _ in model.named_parameters() if name.startswith("vtprune_weights")}
    # The last bias moves all scores alike, and no choice with them.
    assert all(float(grad.abs().sum()) > 0 for name, grad in found.items() if not name.endswith("head.1.bias"))


@every_model
@pytest.mark.parametrize("method", [SMALL, HARD, GUIDED])
def test_gradient_checkpointing_gives_the_same_gradients(kind: str, method: CoViPAL) -> None:
    inputs, found = prompt(kind, ROWS[kind]), []
    for checkpointing in (False, True):
        model = wrapped(kind, method)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**inputs, labels=labels_of(inputs)).loss.backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        assert torch.allclose(grad, found[1][name], atol=1e-6), name


@every_model
@pytest.mark.parametrize("relaxation", ["soft", "hard"])
def test_sdpa_and_eager_give_the_same_gradients(kind: str, relaxation: str) -> None:
    inputs, found = prompt(kind, ROWS[kind]), []
    for attention in ("sdpa", "eager"):
        model = wrapped(kind, dataclasses.replace(SMALL, relaxation=relaxation), attention)
        model(**inputs, labels=labels_of(inputs)).loss.backward()
        found.append(gradients(model))
    for name, grad in found[0].items():
        assert torch.allclose(grad, found[1][name], atol=1e-5, rtol=1e-3), name


@every_model
@pytest.mark.parametrize("queries", ["text", "last"])
def test_the_guide_loss_is_the_divergence_from_its_attention(
    kind: str, queries: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, seen = prompt(kind, ROWS[kind]), scores_seen(monkeypatch)
    model = wrapped(kind, dataclasses.replace(GUIDED, queries=queries))
    out = model(**inputs, labels=labels_of(inputs, 2))
    maps, ids = attention_maps(kind, inputs, 3), inputs["input_ids"]
    losses, scores = [], iter(seen)
    for row, sample in enumerate(vtprune.report(model).samples):
        places = (ids[row] == IMAGE).nonzero().flatten()
        for image, own in zip(sample.images, places.split([one.tokens for one in sample.images]), strict=True):
            assert image.kept == list(range(image.tokens))
            target = guide_target(maps, ids, row, own, 2, queries)
            losses.append((target * (target.log() - next(scores).log_softmax(dim=0))).sum())
    extra = vtprune.auxiliary_loss(model)
    assert float((extra - torch.stack(losses).mean()).abs()) < 1e-5
    with torch.no_grad():
        plain = make(kind)(**inputs, labels=labels_of(inputs, 2)).loss
    assert float((out.loss - extra - plain).abs()) < 1e-5


def test_the_module_learns_to_rank_as_the_guide_does() -> None:
    kind = "llava-clip"
    rows = [Row([2, 5], [(6, 6)], seed) for seed in range(4)]
    inputs, model = prompt(kind, rows), wrapped(kind, dataclasses.replace(GUIDED, width=32))
    ids, maps = inputs["input_ids"], attention_maps(kind, inputs, 3)
    optimizer = torch.optim.Adam(model.vtprune_weights.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        model(**inputs)
        loss = vtprune.auxiliary_loss(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    with torch.no_grad():
        model.eval()(**inputs)
    for row, sample in enumerate(vtprune.report(model).samples):
        image = (ids[row] == IMAGE).nonzero().flatten()
        target = guide_target(maps, ids, row, image, 0, "text")
        best = set(target.topk(14).indices.tolist())
        assert len(best & set(sample.images[0].kept)) >= 11


@every_model
def test_the_soft_choice_is_the_model_with_log_shares_on_its_keys(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, seen = prompt(kind, ROWS[kind]), scores_seen(monkeypatch)
    model = wrapped(kind)
    logits = model(**inputs).logits
    report, ids = vtprune.report(model), inputs["input_ids"]
    bias = torch.zeros(ids.shape)
    scores = iter(seen)
    for row, sample in enumerate(report.samples):
        places = (ids[row] == IMAGE).nonzero().flatten()
        for image, own in zip(sample.images, places.split([one.tokens for one in sample.images]), strict=True):
            bias[row, own] = log_soft_top(next(scores).detach(), round(0.4 * image.tokens), 1.0)
    plain = make(kind, "eager")

    def add_bias(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": kwargs["attention_mask"] + bias[:, None, None]}

    for layer in plain.model.language_model.layers:
        layer.self_attn.register_forward_pre_hook(add_bias, with_kwargs=True)
    with torch.no_grad():
        expected = plain(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert float((logits - expected)[real].abs().max()) < 2e-5


@every_model
def test_the_hard_choice_computes_what_inference_does(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind])
    model = wrapped(kind, HARD)
    logits, kept = model(**inputs).logits, kept_of(model)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        assert torch.allclose(model.eval()(**inputs).logits[real], logits[real], atol=1e-5)
    assert kept_of(model) == kept


def kept_of(model: Any) -> list[list[list[int]]]:
    return [[image.kept for image in sample.images] for sample in vtprune.report(model).samples]


@pytest.mark.parametrize("relaxation", ["soft", "hard"])
def test_the_task_reaches_the_score_of_every_token(relaxation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, seen = prompt("llava-clip", ROWS["llava-clip"]), scores_seen(monkeypatch)
    model = wrapped("llava-clip", dataclasses.replace(SMALL, relaxation=relaxation))
    model(**inputs, labels=labels_of(inputs)).loss.backward()
    assert len(seen) == 4
    for scores in seen:
        assert scores.grad is not None
        assert bool((scores.grad != 0).all())
        # What one token gains the others lose.
        assert abs(float(scores.grad.sum())) < 1e-3 * float(scores.grad.abs().sum())


def test_the_task_loss_falls_when_the_module_is_trained() -> None:
    kind = "llava-clip"
    inputs, model = prompt(kind, ROWS[kind]), wrapped(kind)
    optimizer = torch.optim.Adam(model.vtprune_weights.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = model(**inputs, labels=labels_of(inputs)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("method", [SMALL, GUIDED])
@pytest.mark.parametrize("state", ["evaluation", "no gradients"])
def test_outside_of_training_tokens_are_dropped(method: CoViPAL, state: str) -> None:
    inputs = prompt("llava-clip", ROWS["llava-clip"])
    model = wrapped("llava-clip", method, training=state != "evaluation")
    with torch.set_grad_enabled(state == "evaluation"):
        model(**inputs)
    assert vtprune.report(model).achieved_keep == pytest.approx(14 / 36)
    assert vtprune.auxiliary_loss(model) is None


@pytest.mark.parametrize("method", [SMALL, GUIDED])
def test_a_new_module_is_in_the_mode_of_its_model(method: CoViPAL) -> None:
    inputs = prompt("llava-clip", ROWS["llava-clip"])
    for model, kept in ((make("llava-clip"), 14), (make("llava-clip").train(), 36)):
        vtprune.wrap(model, method)(**inputs)
        assert len(vtprune.report(model).samples[0].images[0].kept) == kept


@every_model
@pytest.mark.parametrize("method", [SMALL, GUIDED])
def test_answers_are_not_shown(kind: str, method: CoViPAL, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    original = CoViPAL.scores

    def watched(self: CoViPAL, stream: Any) -> Tensor:
        seen.append(stream.text)
        return original(self, stream)

    monkeypatch.setattr(CoViPAL, "scores", watched)
    inputs, model = prompt(kind, ROWS[kind]), wrapped(kind, method)
    losses = []
    for answer in (5, 6):
        inputs["input_ids"][:, -1] = answer
        model(**inputs, labels=labels_of(inputs))
        losses.append(vtprune.auxiliary_loss(model))
    model(**inputs)
    images = len(seen) // 3
    for first, second, third in zip(seen[:images], seen[images : 2 * images], seen[2 * images :], strict=True):
        assert torch.equal(first, second)
        assert len(third) == len(second) + 1
    if method is GUIDED:
        assert torch.equal(losses[0], losses[1])


@every_model
def test_answers_may_be_marked_without_labels(kind: str) -> None:
    inputs, model = prompt(kind, ROWS[kind]), wrapped(kind, GUIDED)
    losses = []
    for marked in (True, False):
        if marked:
            vtprune.mark_answers(model, labels_of(inputs))
        model(**inputs)
        losses.append(vtprune.auxiliary_loss(model))
    model(**inputs, labels=labels_of(inputs))
    assert torch.equal(losses[0], vtprune.auxiliary_loss(model))
    assert not torch.equal(losses[0], losses[1])
    plain = vtprune.wrap(make(kind), "grid", keep=4)
    vtprune.mark_answers(plain, labels_of(inputs))
    plain(**prompt(kind, ROWS[kind][:1]))


@every_model
def test_every_row_teaches_as_it_does_alone(kind: str) -> None:
    inputs, model = prompt(kind, ROWS[kind][:2]), wrapped(kind, GUIDED)
    model(**inputs)
    together = float(vtprune.auxiliary_loss(model))
    alone = []
    for row in ROWS[kind][:2]:
        model(**prompt(kind, [row]))
        alone.append(float(vtprune.auxiliary_loss(model)))
    assert together == pytest.approx(sum(alone) / 2, abs=1e-5)


@every_model
@pytest.mark.parametrize("method", [SMALL, GUIDED])
def test_rows_without_an_image_teach_nothing(kind: str, method: CoViPAL) -> None:
    model = wrapped(kind, method)
    inputs = prompt(kind, [ROWS[kind][0]])
    model(**inputs, labels=labels_of(inputs)).loss.backward()
    alone, loss = gradients(model), vtprune.auxiliary_loss(model)
    model.zero_grad()
    mixed = prompt(kind, [ROWS[kind][0], TEXT])
    labels = labels_of(mixed)
    labels[1] = -100
    model(**mixed, labels=labels).loss.backward()
    for name, grad in gradients(model).items():
        assert torch.allclose(grad, alone[name], atol=1e-5), name
    assert method is SMALL or float((vtprune.auxiliary_loss(model) - loss).abs()) < 1e-5
    model(**prompt(kind, [TEXT]))
    assert vtprune.auxiliary_loss(model) is None


@pytest.mark.parametrize("method", [SMALL, HARD, GUIDED])
@pytest.mark.parametrize("row", [Row([0, 4], [(6, 6)], 1), Row([3, 0], [(6, 6)], 2), Row([0, 0], [(6, 6)], 3)])
def test_an_image_may_stand_anywhere(method: CoViPAL, row: Row) -> None:
    model = wrapped("llava-clip", method)
    out = model(**prompt("llava-clip", [row]))
    extra = vtprune.auxiliary_loss(model)
    (out.logits[0, -1].log_softmax(dim=0)[3] if extra is None else extra).backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


@every_model
@pytest.mark.parametrize("method", [SMALL, HARD, GUIDED])
def test_a_later_turn_with_an_image_trains_too(kind: str, method: CoViPAL) -> None:
    model, inputs = wrapped(kind, method), prompt(kind, ROWS[kind][:1])
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    mask = torch.ones(1, 2 * length, dtype=torch.long)
    model(**{**inputs, "attention_mask": mask}, **{PAST: cache}, labels=labels_of(inputs)).loss.backward()
    assert gradients(model)
    assert all(grad.isfinite().all() for grad in gradients(model).values())


@every_model
def test_a_list_trains_each_stage_on_what_is_left(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind])
    guided = dataclasses.replace(GUIDED, guide=4)
    model = vtprune.wrap(make(kind), [vtprune.Random(keep=0.8), guided, vtprune.FastV(keep=0.3)])
    model.requires_grad_(False)
    model.vtprune_weights.requires_grad_(True)
    model.train()(**inputs, labels=labels_of(inputs)).loss.backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())
    assert float(vtprune.auxiliary_loss(model)) > 0


@every_model
@pytest.mark.parametrize("rows", [[0], [2]])
def test_costs_are_what_is_measured(kind: str, rows: list[int]) -> None:
    model = wrapped(kind, dataclasses.replace(SMALL, blocks=2), training=False)
    measured = measured_flops(model, prompt(kind, [ROWS[kind][row] for row in rows]))
    report = vtprune.report(model)
    assert report.flops == pytest.approx(measured, rel=0.01)
    assert report.flops_breakdown.scoring > 0


@every_model
def test_weights_come_back_for_the_other_stage(kind: str, tmp_path: Path) -> None:
    inputs, model = prompt(kind, ROWS[kind]), wrapped(kind, GUIDED, training=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        untrained = model(**inputs).logits
        for weight in model.vtprune_weights.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
        expected = model(**inputs).logits
        assert not torch.equal(expected, untrained)
        vtprune.save(model, tmp_path)
        assert torch.equal(vtprune.wrap(make(kind), str(tmp_path))(**inputs).logits, expected)
        other = wrapped(kind, SMALL, training=False)
        vtprune.load_weights(other, tmp_path)
        assert torch.equal(other(**inputs).logits, expected)


@every_model
@pytest.mark.parametrize("method", [SMALL, GUIDED])
def test_keeping_everything_trains_nothing(kind: str, method: CoViPAL) -> None:
    inputs, model = prompt(kind, ROWS[kind]), wrapped(kind, dataclasses.replace(method, keep=1.0))
    with torch.no_grad():
        expected = make(kind)(**inputs).logits
    assert torch.equal(model(**inputs).logits, expected)
    assert vtprune.auxiliary_loss(model) is None


@pytest.mark.parametrize("training", [False, True])
def test_weights_that_are_not_numbers_are_named(training: bool) -> None:
    model = wrapped("llava-clip", training=training)
    with torch.no_grad():
        next(model.vtprune_weights.parameters()).fill_(float("nan"))
    with pytest.raises(vtprune.ScoreError, match="covipal"):
        model(**prompt("llava-clip", ROWS["llava-clip"]))
