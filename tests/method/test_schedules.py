"""Keep ratios by layer: their mean is the budget, they never rise, and a budget out of reach is refused."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import typer
from hypothesis import assume, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.streams import few
from vtprune.errors import VTPruneError
from vtprune.evals.speed.schedules import main
from vtprune.method import schedules

DOCS = Path(schedules.__file__).parent
APP = typer.Typer()
APP.command()(main)
names = st.sampled_from(schedules.NAMES)


@st.composite
def placed(draw: st.DrawFn) -> tuple[int, tuple[int, ...], float]:
    """A depth, layers before which tokens drop, and a mean that can be kept."""
    depth = draw(st.integers(2, 40))
    layers = tuple(sorted(draw(st.sets(st.integers(1, depth - 1), min_size=1, max_size=5))))
    least = layers[0] / depth
    return depth, layers, least + (1 - least) * draw(st.floats(0.01, 0.999))


@few
@given(names, placed())
def test_ratios_never_rise_and_their_mean_is_the_budget(name: str, where: tuple[int, tuple[int, ...], float]) -> None:
    depth, layers, keep = where
    ratios = schedules.fitted(name, depth, layers, keep)
    schedules.check_ratios(ratios)
    assert len(ratios) == depth
    assert ratios[: layers[0]] == (1.0,) * layers[0]
    assert schedules.mean(ratios) == pytest.approx(keep, abs=1e-6)


@few
@given(names, placed(), st.integers(1, 800))
def test_counts_stay_within_the_budget_and_spend_it(
    name: str, where: tuple[int, tuple[int, ...], float], tokens: int
) -> None:
    depth, layers, keep = where
    budget = max(1, round(keep * tokens))
    assume(budget < tokens and layers[0] * tokens + depth - layers[0] <= budget * depth)
    assume(budget / tokens > layers[0] / depth)
    counts = schedules.counts(schedules.fitted(name, depth, layers, budget / tokens), tokens, budget)
    assert sum(counts) <= budget * depth
    assert list(counts) == sorted(counts, reverse=True)
    assert counts[: layers[0]] == (tokens,) * layers[0]
    assert counts[-1] >= 1
    # What is left over would not buy every layer that is not whole one more token.
    assert budget * depth - sum(counts) < depth


@few
@given(names, placed())
def test_a_larger_budget_processes_more(name: str, where: tuple[int, tuple[int, ...], float]) -> None:
    depth, layers, keep = where
    more = min(1.0, keep + 0.1)
    assert sum(schedules.fitted(name, depth, layers, more)) >= sum(schedules.fitted(name, depth, layers, keep))


def test_each_schedule_has_its_shape() -> None:
    assert schedules.fitted("constant", 4, (1,), 0.4) == pytest.approx((1, 0.2, 0.2, 0.2))
    assert schedules.fitted("steps", 4, (1, 3), 0.5) == pytest.approx((1, *(x := 0.41421356,) * 2, x * x), abs=1e-6)
    whole, *falling = schedules.fitted("linear", 8, (1,), 0.6)
    assert whole == 1
    assert all(a - b == pytest.approx(falling[0] - falling[1]) for a, b in itertools.pairwise(falling))
    assert falling[-1] >= (0.6 * 8 - 1) / 7 / 4 - 1e-9
    steep = schedules.fitted("linear", 8, (1,), 0.2)
    assert steep[-1] == pytest.approx((0.2 * 8 - 1) / 7 / 4)


def test_steps_multiply_by_one_factor_as_published() -> None:
    published = schedules.factor_steps(32, (8, 16, 24), 0.5)
    assert published == (1.0,) * 8 + (0.5,) * 8 + (0.25,) * 8 + (0.125,) * 8
    assert schedules.mean(published) * 576 == 270
    assert schedules.fitted("steps", 32, (8, 16, 24), schedules.mean(published)) == pytest.approx(published)
    assert schedules.counts(published, 576)[::8] == (576, 288, 144, 72)


def test_the_shifted_cosine_is_p_mods_at_its_own_shift() -> None:
    ratios = schedules.cosine_ratios(32, 0.5)
    published = (
        0.8445, 0.8061, 0.7645, 0.7202, 0.6737, 0.6253, 0.5757, 0.5253, 0.4747, 0.4243, 0.3747, 0.3263, 0.2798,
        0.2355, 0.1939, 0.1555,
    )  # fmt: skip
    assert ratios[:8] == (1.0,) * 8
    assert ratios[8:24] == pytest.approx(published, abs=5e-5)
    assert ratios[24:] == (0.15,) * 8
    assert schedules.mean(ratios) == pytest.approx(0.5375, abs=5e-5)
    fitted = schedules.fitted("shifted_cosine", 32, (1,), schedules.mean(ratios))
    assert fitted == pytest.approx(ratios, abs=1e-6)


def test_keeping_everything_needs_no_reach() -> None:
    assert schedules.fitted("constant", 4, (3,), 1.0) == (1.0,) * 4


@pytest.mark.parametrize("name", schedules.NAMES)
@pytest.mark.parametrize("keep", [0.2, 0.5])
def test_a_budget_below_the_whole_layers_is_refused_with_the_reason(name: str, keep: float) -> None:
    says = f"cannot keep {keep} of the tokens on average: the 2 of 4 layers .* alone make 0.5; raise keep, or drop"
    with pytest.raises(VTPruneError, match=says):
        schedules.fitted(name, 4, (2, 3), keep)


def test_a_budget_below_one_token_a_layer_is_refused_with_the_reason() -> None:
    ratios = schedules.fitted("constant", 4, (1,), 0.26)
    with pytest.raises(VTPruneError, match=r"an image of 10 tokens cannot be cut to a mean of 3: .* make 3\.25"):
        schedules.counts(ratios, 10, 3)
    assert schedules.counts(ratios, 100, 26) == (100, 1, 1, 1)
    assert schedules.counts((1.0, 0.001), 10) == (10, 1)


@pytest.mark.parametrize(
    ("depth", "layers", "says"),
    [
        (4, (4,), "drop before decoder layer 4 .* needs at least 5 decoder layers, got 4"),
        (4, (0, 2), "rising ints of at least 1"),
        (4, (2, 2), "rising ints of at least 1"),
        (4, (3, 1), "rising ints of at least 1"),
        (4, (True, 2), "rising ints of at least 1"),
        (4, (1.0,), "rising ints of at least 1"),
        (4, (), "rising ints of at least 1"),
        (1, (1,), "at least 2 of them, got 1"),
    ],
)
def test_layers_that_cannot_drop_are_refused(depth: int, layers: tuple[int, ...], says: str) -> None:
    with pytest.raises(VTPruneError, match=says):
        schedules.fitted("steps", depth, layers, 0.9)


@pytest.mark.parametrize(
    ("ratios", "says"),
    [
        ((1.0, 0.5, 0.6), r"cannot rise, .* 0\.5 at layer 1, 0\.6 at layer 2"),
        ((1.1,), r"lie in 0 \.\. 1, got 1\.1 at layer 0"),
        ((1.0, -0.1), r"got -0\.1 at layer 1"),
        ((1.0, math.nan), "got nan at layer 1"),
    ],
)
def test_ratios_that_rise_or_are_none_are_refused(ratios: tuple[float, ...], says: str) -> None:
    with pytest.raises(VTPruneError, match=says):
        schedules.check_ratios(ratios)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(VTPruneError, match=r"one of constant, steps, linear, shifted_cosine, entropy, got 'cosine'"):
        schedules.fitted("cosine", 4, (1,), 0.5)


@few
@given(st.integers(1, 600), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 20_000))
def test_an_even_count_never_spends_more_than_is_left(alive: int, lengths: list[int], left: int) -> None:
    count = schedules.even_count(alive, lengths, left)
    assert 1 <= count <= alive
    # The stages after it can keep the same factor.
    spent = sum(length * alive * (count / alive) ** (stage + 1) for stage, length in enumerate(lengths))
    assert count == 1 or spent <= left + 1e-3


@few
@given(st.lists(st.floats(0, 1), min_size=1, max_size=50), st.integers(1, 60))
def test_the_entropys_count_is_half_to_twice_the_even_one(scores: list[float], cap: int) -> None:
    count = schedules.entropy_count(scores, cap)
    assert math.ceil(cap / 2) <= count <= 2 * cap


def test_spread_attention_keeps_more_than_peaked() -> None:
    assert schedules.entropy_count([0.1] * 10, 8) == 10
    assert schedules.entropy_count([1.0] + [0.0] * 9, 8) == 4
    assert schedules.entropy_count([0.5, 0.5] + [0.0] * 8, 2) == 2
    assert schedules.entropy_count([0.0] * 10, 8) == 4


def test_a_stage_leaves_half_of_their_even_counts_to_those_after_it() -> None:
    assert schedules.reserve(100, 50, [2, 3, 4]) == 3 * 13 + 4 * 7
    assert schedules.reserve(100, 2, [2, 3, 4]) == 3 + 4
    assert schedules.reserve(100, 50, [9]) == 0


def test_the_command_draws_each_schedule_that_the_documentation_shows(tmp_path: Path) -> None:
    done = CliRunner().invoke(APP, [str(tmp_path), "--images", "1"])
    assert done.exit_code == 0, done.output
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {f"{name}.png" for name in schedules.NAMES}
    text = (DOCS / "schedules.md").read_text()
    for name in drawn:
        assert f"(pictures/{name})" in text
        assert (DOCS / "pictures" / name).stat().st_size < 60_000
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_cannot_be_written_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(APP, [str(tmp_path / "file")])
    assert done.exit_code == 1
    assert done.output.startswith("error: output: cannot write to")
