"""Random-LTD: draws that are uniform and each layer's own, in training alone unless it is told otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests.differences import text_labels
from tests.models import DECODER_LAYERS, ROWS, make, prompt
from vtprune.method.facts import ModelFacts
from vtprune.method.views import RoutedTokens
from vtprune.pruners import RandomLTD

KIND = "llava-clip"


def kept(model: Any, inputs: dict[str, Tensor]) -> list[list[list[int]]]:
    """By image and layer, what was computed."""
    with torch.no_grad():
        model(**inputs)
    return [image.kept_per_layer for sample in vtprune.report(model).samples for image in sample.images]


def tokens(training: bool, rows: int, index: int = 1) -> RoutedTokens:
    """Rows of a text token, eight of an image and a text token, of which half are to be computed."""
    image = torch.tensor([[-1, *[0] * 8, -1]]).expand(rows, -1)
    return RoutedTokens(
        hidden=torch.zeros(rows, 10, 4),
        norm=torch.nn.Identity(),
        real=torch.ones(rows, 10, dtype=torch.bool),
        image=image,
        text=image < 0,
        totals=torch.full((rows, 1), 8),
        budgets=torch.full((rows, 1), 4),
        index=index,
        depth=5,
        module=None,
        training=training,
        spared=(4,) * rows,
    )


def test_draws_of_training_are_uniform_and_leave_text_alone() -> None:
    torch.manual_seed(0)
    shown = tokens(True, 4000)
    mask = RandomLTD().route(shown).computed(shown.hidden).mask
    assert bool(mask[:, [0, 9]].all())
    counts = mask[:, 1:9].sum(dim=0).double()
    assert int(counts.sum()) == 4 * 4000
    # Each count has a variance of 4000 / 4, and counts of draws without repeats sum to a constant: 7 degrees.
    chi_square = float(((counts - 2000) ** 2).sum() / 1000 * 7 / 8)
    assert chi_square < 24.3
    pairs = mask[:, 1:9].double().T @ mask[:, 1:9].double() / 4000
    assert float((pairs[~torch.eye(8, dtype=torch.bool)] - 3 / 14).abs().max()) < 0.03


def test_training_draws_anew_for_every_layer_and_step_and_again_from_a_seed() -> None:
    inputs, model = prompt(KIND, ROWS[KIND]), vtprune.wrap(make(KIND), RandomLTD()).train()
    torch.manual_seed(1)
    first, second = kept(model, inputs), kept(model, inputs)
    torch.manual_seed(1)
    assert kept(model, inputs) == first != second
    for image in first:
        counts = list(map(len, image))
        assert counts == [36, 18, 18, 18, 36]
        assert image[1] != image[2] != image[3]


def test_in_use_everything_is_computed_bit_for_bit() -> None:
    inputs, model = prompt(KIND, ROWS[KIND]), make(KIND)
    with torch.no_grad():
        base = model(**inputs).logits
        with vtprune.wrapped(model, RandomLTD()):
            assert torch.equal(model(**inputs).logits, base)
            notes = [image.notes for one in vtprune.report(model).samples for image in one.images]
        assert all("random_ltd routes in training alone: here every layer computed everything" in own for own in notes)
        with vtprune.wrapped(model, RandomLTD(at_test=True)):
            model(**inputs)
            assert not any(image.notes for one in vtprune.report(model).samples for image in one.images)


def test_at_test_routes_the_same_tokens_again_and_others_by_another_seed() -> None:
    inputs = prompt(KIND, ROWS[KIND])
    found = [kept(vtprune.wrap(make(KIND), RandomLTD(at_test=True, seed=seed)), inputs) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    alone = kept(vtprune.wrap(make(KIND), RandomLTD(at_test=True)), prompt(KIND, ROWS[KIND][:1]))
    assert alone[0] == found[0][0]
    shown = tokens(False, 1, 3)
    assert torch.equal(RandomLTD(at_test=True).route(shown).columns, RandomLTD(at_test=True).route(shown).columns)


def test_gradients_of_tokens_that_skip_a_layer_pass_it_as_they_are() -> None:
    inputs, model = prompt(KIND, ROWS[KIND][:1]), vtprune.wrap(make(KIND), RandomLTD()).train()
    states: dict[int, Tensor] = {}

    def note(index: int) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            output.retain_grad()
            states[index] = output

        return hook

    for index in (0, 1):
        model.model.language_model.layers[index].register_forward_hook(note(index))
    model(**inputs, labels=text_labels(inputs)).loss.backward()
    (image,) = vtprune.report(model).samples[0].images
    first = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    skipped = [first + token for token in range(image.tokens) if token not in image.kept_per_layer[1]]
    assert len(skipped) == 18
    torch.testing.assert_close(states[0].grad[0, skipped], states[1].grad[0, skipped])


def test_keep_is_the_mean_over_layers() -> None:
    method = RandomLTD(keep=0.7).bind(ModelFacts(True, 1, DECODER_LAYERS, 1))
    assert method.routed_layers() == (1, 2, 3)
    assert method.routed_budget(100, 1, 100) == 50
    assert RandomLTD(skip=0.25).bind(ModelFacts(True, 1, DECODER_LAYERS, 1)).default_keep == pytest.approx(0.85)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": 1.0}, "skip is a number between"),
        ({"skip": 0.5, "keep": 0.8}, "contradict each other"),
        ({"at_test": 1}, "at_test is one of"),
        ({"seed": -1}, "seed is an int"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(vtprune.VTPruneError, match=message):
        RandomLTD(**options)


def test_a_mean_that_the_first_and_last_layer_exceed_is_refused() -> None:
    with pytest.raises(vtprune.VTPruneError, match="raise keep, or combine with a method that prunes before"):
        vtprune.wrap(make(KIND), RandomLTD(keep=0.3))
