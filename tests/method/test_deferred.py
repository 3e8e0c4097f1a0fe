"""What a method is shown of a layer is worked out once, and only if the method reads it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

import vtprune
from tests.models import ROWS, make, prompt
from vtprune.hooks.scoring import SeenLayer
from vtprune.method.deferred import deferring, later


@deferring(("answer", "other"))
@dataclass(frozen=True)
class Shown:
    question: int
    answer: int
    other: int = -1


def test_a_field_is_worked_out_once_when_it_is_first_read() -> None:
    asked: list[int] = []

    def work() -> int:
        asked.append(1)
        return 42

    shown = Shown(6, later(work))
    assert not asked
    assert [shown.answer, shown.answer, shown.other] == [42, 42, -1]
    assert len(asked) == 1
    changed = replace(shown, question=7, other=later(lambda: 3))
    assert (changed.question, changed.answer, changed.other) == (7, 42, 3)
    assert len(asked) == 1


def test_a_value_may_be_given_as_it_is() -> None:
    assert Shown(1, answer=2).answer == 2
    with pytest.raises(TypeError, match="answer"):
        Shown(1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("method", "row", "text", "values"),
    [
        ("spatten:keep=0.5", 0, 0, 0), ("flowcut:stages=2,keep=0.5", 0, 0, 1),
        # Text that ends the prompt is known without; before the second image stands some that is not.
        ("sparsevlm:keep=0.5", 0, 0, 0), ("sparsevlm:keep=0.5", 2, 3, 0),
    ],
)  # fmt: skip
def test_methods_that_read_no_text_and_no_values_have_none_worked_out(
    method: str, row: int, text: int, values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"_words_of": 0, "_value": 0}
    for name in found:
        own = getattr(SeenLayer, name)

        def counted(self: SeenLayer, given: object, name: str = name, own: object = own) -> torch.Tensor:
            found[name] += 1
            return own(self, given)  # type: ignore[operator, no-any-return]

        monkeypatch.setattr(SeenLayer, name, counted)
    model = vtprune.wrap(make("llava-clip"), method)
    model(**prompt("llava-clip", ROWS["llava-clip"][row : row + 1]))
    assert found == {"_words_of": text, "_value": values}
