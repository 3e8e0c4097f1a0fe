"""A method from one function, and what a plan knows of a prompt before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import vtprune
from tests.matrix import PRUNERS, at_depth, label
from tests.models import MODELS, ROWS, make, prompt
from tests.oracle import TOLERANCE, difference_from_masked
from vtprune.method import registry
from vtprune.method.config import from_dict, to_dict
from vtprune.method.facts import PUBLISHED, Work
from vtprune.method.plan import Plan
from vtprune.method.registry import create


@vtprune.scorer("test_lengths", paper="a test", reads=[vtprune.Read.ENCODER], flops=lambda work: 2 * work.tokens)
def lengths(stream: vtprune.VisionStream, *, power: float = 1.0, flip: bool = False) -> Tensor:
    """The longest vectors."""
    assert stream.signals is not None
    scores = stream.features.norm(dim=-1) ** power
    return -scores if flip else scores


def test_a_function_of_scores_is_a_method_of_its_own() -> None:
    info = vtprune.available()["test_lengths"]
    assert (info.stage, info.paper) == ("before decoder", "a test")
    assert create("test_lengths", keep=5, flip=True) == lengths(keep=5, flip=True) != lengths(keep=5)
    assert lengths.__doc__ == "The longest vectors."
    assert lengths().flops(replace(WORK, tokens=10)) == 20


def test_its_options_are_written_read_and_checked_like_any_other_method_s() -> None:
    method = lengths(keep=0.5, power=2.0)
    assert method.to_dict() == {"method": "test_lengths", "keep": 0.5, "power": 2.0, "flip": False}
    assert from_dict(to_dict(method)) == method
    with pytest.raises(vtprune.VTPruneError, match="power is of type float"):
        from_dict({"method": "test_lengths", "power": "high"})
    with pytest.raises(vtprune.VTPruneError, match="has no option speed"):
        create("test_lengths", speed=3)


@pytest.mark.parametrize("kind", MODELS)
def test_it_keeps_the_best_tokens_of_each_image_exactly(kind: str) -> None:
    model, inputs = make(kind), prompt(kind, ROWS[kind])
    vtprune.wrap(model, "test_lengths:keep=7")
    difference, report = difference_from_masked(kind, model, inputs)
    assert difference < TOLERANCE
    assert all(len(image.kept) == 7 for sample in report.samples for image in sample.images)


def test_ties_go_to_the_lowest_index_and_bad_scores_raise_by_name() -> None:
    model, inputs = make("llava-clip"), prompt("llava-clip", ROWS["llava-clip"][:1])
    for value, message in ((1.0, ""), (float("nan"), "test_constant: .* NaN")):

        @vtprune.scorer("test_constant")
        def test_constant(stream: vtprune.VisionStream) -> Tensor:
            return torch.full_like(stream.features[:, 0], value)  # noqa: B023 (called within the loop)

        with vtprune.wrapped(model, test_constant(keep=3)):
            if message:
                with pytest.raises(vtprune.ScoreError, match=message):
                    model(**inputs)
            else:
                model(**inputs)
                assert vtprune.report(model).samples[0].images[0].kept == [0, 1, 2]


@pytest.mark.parametrize("shape", [(3, 1), (2,)])
def test_scores_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    @vtprune.scorer("test_shapeless")
    def test_shapeless(stream: vtprune.VisionStream) -> Tensor:
        return torch.zeros(shape)

    model = vtprune.wrap(make("llava-clip"), test_shapeless(keep=3))
    with pytest.raises(vtprune.VTPruneError, match="test_shapeless: one score a token is wanted"):
        model(**prompt("llava-clip", ROWS["llava-clip"][:1]))


def test_a_function_that_cannot_be_a_method_is_refused() -> None:
    with pytest.raises(vtprune.VTPruneError, match="keyword-only argument with a default"):
        vtprune.scorer("test_bad")(lambda stream, power: stream.features)
    with pytest.raises(vtprune.VTPruneError, match="one argument, the image's VisionStream"):
        vtprune.scorer("test_bad")(lambda *, power=1.0: power)
    with pytest.raises(vtprune.VTPruneError, match="'fopru' is taken"):
        vtprune.scorer("fopru")(lambda stream: stream.features)
    with pytest.raises(vtprune.VTPruneError, match="takes the method's name first"):
        vtprune.scorer(lengths)
    for reads in (vtprune.Read.HIDDEN, ["encoder"], "encoder", [vtprune.Read.ENCODER, 3]):
        with pytest.raises(vtprune.VTPruneError, match=r"reads is a list of vtprune.Read.ENCODER, .*got"):
            vtprune.scorer("test_bad", reads=reads)


def test_options_need_a_type_a_default_of_it_and_a_name_of_their_own() -> None:
    def untyped(stream, *, power=1.0):  # type: ignore[no-untyped-def]
        return stream.features

    def contradicting(stream: vtprune.VisionStream, *, power: float = "high") -> Tensor:  # type: ignore[assignment]
        return stream.features

    def named_as_the_base(stream: vtprune.VisionStream, *, budget: float = 1.0) -> Tensor:
        return stream.features

    for function, message in (
        (untyped, "power needs a type"),
        (contradicting, "power is of type float, got 'high'"),
        (named_as_the_base, "every method has a budget already"),
    ):
        with pytest.raises(vtprune.VTPruneError, match=message):
            vtprune.scorer("test_bad")(function)


@pytest.mark.parametrize("power", ["2", None, True, float("nan")])
def test_options_from_code_are_held_to_their_type_before_an_image_comes(power: object) -> None:
    with pytest.raises(vtprune.VTPruneError, match="test_lengths: power is of type float"):
        vtprune.wrap(make("llava-clip"), "test_lengths", power=power)


def test_one_read_need_not_be_a_list() -> None:
    @vtprune.scorer("test_alone", reads=vtprune.Read.PICTURE)
    def test_alone(stream: vtprune.VisionStream) -> Tensor:
        assert stream.picture is not None
        return stream.features[:, 0]

    with vtprune.wrapped(make("llava-clip"), test_alone(keep=3)) as model:
        model(**prompt("llava-clip", ROWS["llava-clip"][:1]))


def test_a_field_that_was_not_asked_for_is_named_with_the_way_to_ask() -> None:
    @vtprune.scorer("test_forgetful")
    def test_forgetful(stream: vtprune.VisionStream) -> Tensor:
        return stream.signals.saliency()  # type: ignore[union-attr]

    model = vtprune.wrap(make("llava-clip"), test_forgetful(keep=3))
    with pytest.raises(AttributeError) as caught:
        model(**prompt("llava-clip", ROWS["llava-clip"][:1]))
    assert "stream.signals is None without reads=[vtprune.Read.ENCODER]" in "".join(caught.value.__notes__)


def test_an_unknown_name_says_how_a_method_of_one_s_own_becomes_known() -> None:
    with pytest.raises(vtprune.UnknownPrunerError, match="once its module is imported"):
        vtprune.wrap(make("llava-clip"), "test_unheard")


def test_a_config_is_saved_from_whatever_wrap_takes(tmp_path: Path) -> None:
    expected = lengths(keep=9, power=2.0)
    for index, source in enumerate((expected, "test_lengths:keep=9,power=2.0", to_dict(expected), [expected])):
        vtprune.save_config(source, tmp_path / str(index))
        assert vtprune.load_config(tmp_path / str(index)) == expected
    with pytest.raises(vtprune.VTPruneError, match=r"lengths is the method's class; write lengths\(\)"):
        vtprune.save_config(lengths, tmp_path)


WORK = Work(
    patches=10, tokens=10, shown=10, kept=4, encoder_width=8, encoder_heads=2, decoder_width=8, decoder_heads=2,
    prompt=12, text=2, encoder_patches=(10,), encoder_layers=(), decoder_layers=(),
)  # fmt: skip


@pytest.mark.lean
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("pruner", PRUNERS, ids=label)
def test_a_plan_knows_what_each_layer_computes_at_the_most(kind: str, pruner: vtprune.Pruner) -> None:
    model = vtprune.wrap(make(kind), pruner)
    with torch.no_grad():
        model(**prompt(kind, ROWS[kind]))
    bound = model._vtprune.pruners
    for sample in vtprune.report(model).samples:
        for image in sample.images:
            planned = Plan(tuple(bound), image.tokens).layers()
            for most, kept in zip(planned, image.kept_per_layer, strict=True):
                assert most is None or len(kept) <= most


@pytest.mark.parametrize(
    "pruner",
    [
        vtprune.Random(keep=9), vtprune.FoPru(keep=0.25), vtprune.DivPrune(keep=7), vtprune.FastV(keep=0.4),
        vtprune.PyramidDrop(keep=0.4), vtprune.LazyLLM(), vtprune.VisionZip(keep=9), vtprune.Turbo(keep=0.5),
        vtprune.FlowCut(keep=8), vtprune.FlowCut(keep=6, stages=2), vtprune.PMoD(keep=0.6),
    ],
    ids=label,
)  # fmt: skip
def test_counts_that_scores_do_not_decide_are_planned_exactly(pruner: vtprune.Pruner) -> None:
    model = vtprune.wrap(make("llava-clip"), pruner)
    with torch.no_grad():
        model(**prompt("llava-clip", ROWS["llava-clip"]))
    for sample in vtprune.report(model).samples:
        for image in sample.images:
            plan = Plan(tuple(model._vtprune.pruners), image.tokens)
            assert plan.layers() == [len(kept) for kept in image.kept_per_layer]


def test_from_where_a_method_decides_a_plan_says_nothing() -> None:
    deciding = Plan((at_depth(vtprune.MustDrop(), 6),), 36)
    assert deciding.layers() == [None] * 6
    assert deciding.selects(0, 36)
    ranked = Plan((at_depth(vtprune.SparseVLM(adaptive_rank=True), 6),), 36)
    assert ranked.layers()[0] == 36
    assert ranked.layers()[-1] is None


def test_a_budget_that_cannot_be_met_keeps_the_image_whole_and_says_why() -> None:
    plan = Plan((vtprune.FastV(keep=2).bind(replace(PUBLISHED, decoder_depth=6)),), 36)
    assert "fastv: schedule 'constant' cannot keep" in plan.whole(0, entered=36)
    assert plan.layers() == [36] * 6
    assert not plan.asks(0, 1, 36, alive=36)
    assert plan.whole(0, entered=2) == ""


def test_binding_is_part_of_equality_and_of_no_config() -> None:
    one, other = (vtprune.HoloV(keep=9).bind(replace(PUBLISHED, decoder_depth=depth)) for depth in (6, 32))
    assert one != other
    assert one.to_dict() == other.to_dict()
    assert one == vtprune.HoloV(keep=9).bind(one.model)
    assert one.bind(other.model) == other


def test_a_method_without_its_stage_s_answer_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    vtprune.available()
    monkeypatch.setattr(registry, "_pruners", dict(registry._pruners))

    @vtprune.register("test_silent")
    @dataclass(frozen=True)
    class Silent(vtprune.BeforeDecoder):
        """Says nothing."""

    with pytest.raises(TypeError, match=r"abstract method '?select"):
        Silent(keep=3)  # type: ignore[abstract]
