"""Ranks of attention maps: against whole maps of the model's own, and through the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import vtprune
from tests.checkpoint import random_qwen3_checkpoint
from tests.clips import write_clip
from tests.evals.test_tune_parts import pictures
from tests.evals.tuning import private_environment  # noqa: F401 (a fixture of every test here)
from tests.matrix import at_depth
from tests.models import MODELS, ROWS, make, prompt
from tests.test_properties import _traces
from vtprune.cli.app import app
from vtprune.evals.arank.ranks import (
    arank,
    choose,
    head_ranks,
    rank_layers,
)


def run(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["arank", *(str(argument) for argument in arguments)])


def test_the_rank_is_that_of_what_stands_below_the_diagonal() -> None:
    # Every token looks at the first one: one direction, whatever the diagonal says.
    first = torch.zeros(6, 6)
    first[:, 0] = 1
    # Every token looks at the one before it: as many directions as there are such tokens.
    before = torch.eye(6).roll(1, dims=0)
    identity, above = torch.eye(6), torch.ones(6, 6).triu(1)
    maps = torch.stack([first, before, identity, above, first + identity])
    assert head_ranks(maps).tolist() == [1, 5, 0, 0, 1]
    assert arank(maps) == pytest.approx(7 / 5)
    assert arank(maps.half()) == arank(maps)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_layers_are_ranked_as_by_the_models_own_maps(kind: str, padding: str) -> None:
    model = make(kind)
    with torch.no_grad():
        model(**prompt(kind, ROWS[kind]))
    before = _traces(model)
    found = rank_layers(model, [prompt(kind, ROWS[kind], padding)])
    assert _traces(model) == before
    assert rank_layers(model, [prompt(kind, [row]) for row in ROWS[kind]]) == pytest.approx(found, abs=0.5)
    expected = torch.zeros(len(found))
    eager = make(kind, "eager")
    for row in ROWS[kind]:
        with torch.no_grad():
            maps = eager(**prompt(kind, [row]), output_attentions=True).attentions
        expected += torch.tensor([arank(one[0]) for one in maps]) / len(ROWS[kind])
    # A singular value at the tolerance may fall on either side of it.
    assert found == pytest.approx(expected.tolist(), abs=0.5)
    assert len(set(found)) > 1


def test_a_wrapped_model_and_no_samples_are_refused() -> None:
    model = make("llava-clip")
    with pytest.raises(vtprune.VTPruneError, match="no samples"):
        rank_layers(model, [])
    vtprune.wrap(model, "grid", keep=4)
    with pytest.raises(vtprune.VTPruneError, match=r"call vtprune\.unwrap\(model\) first"):
        rank_layers(model, [prompt("llava-clip", ROWS["llava-clip"][:1])])


def test_the_lowest_ranks_are_chosen_between_the_first_layer_and_the_last() -> None:
    ranks = [1.0, 9.0, 3.0, 5.0, 3.0, 2.0]
    assert choose(ranks, count=1) == (2,)
    assert choose(ranks, count=3) == (2, 3, 4)
    assert choose(ranks, share=0.34) == (2, 4)
    assert choose(ranks, share=1.0) == (1, 2, 3, 4)
    assert choose(ranks, count=2, dense=(2,)) == (4, 5)
    assert choose(ranks, count=5, dense=()) == (1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of them"),
        ({"count": 1, "share": 0.5}, "one of them"),
        ({"count": 0}, "it is 1 to 4"),
        ({"count": 5}, "it is 1 to 4"),
        ({"count": True}, "it is 1 to 4"),
        ({"share": 0.0}, "above 0 and at most 1"),
        ({"share": 1.5}, "above 0 and at most 1"),
        ({"share": float("nan")}, "above 0 and at most 1"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(vtprune.VTPruneError, match=message):
        choose([1.0] * 6, **options)


def test_the_command_ranks_the_bundled_model_and_names_layers_that_wrap_takes(tmp_path: Path) -> None:
    output = tmp_path / "ranks" / "arank.json"
    result = run("--samples", "2", "--count", "1", "--output", output)
    assert result.exit_code == 0, result.output
    data = json.loads(output.read_text())
    assert (data["samples"], data["source"]) == (2, "drawn shapes")
    inner = data["arank"][1:-1]
    assert data["layers"] == [1 + inner.index(min(inner))]
    layers = tuple(data["layers"])
    assert f"layers={layers}" in result.output
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    from vtprune.loading.model import load_model

    model, _ = load_model()
    assert len(data["arank"]) == model.config.text_config.num_hidden_layers
    vtprune.wrap(model, "gamma_mod", layers=layers)


def test_the_command_takes_a_folder_and_routes_as_many_layers_as_the_method(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "data", 2)
    result = run("--samples", "3", "--data", folder, "--output", tmp_path / "ranks.json")
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "ranks.json").read_text())
    assert data["samples"] == 2
    assert f"{folder} holds 2 of the 3 samples" in result.output.replace("\n", "")
    assert tuple(data["layers"]) == at_depth(vtprune.GammaMoD(), len(data["arank"])).routed_layers()


def test_the_command_takes_videos_where_the_model_does(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "data", 1)
    write_clip(folder / "clip.mp4", 30, 10, (96, 64))
    options = ("--data", folder, "--output", tmp_path / "ranks.json", "--frames", "4")
    result = run(*options, "--samples", "2", "--model", random_qwen3_checkpoint(experts=False))
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "ranks.json").read_text())["samples"] == 2
    result = run(*options, "--samples", "2")
    assert result.exit_code == 2
    assert "the processor refuses clip.mp4: llava takes images; a video needs" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--count", "9"), "9 layers cannot be routed"),
        (("--count", "1", "--share", "0.5"), "--count or --share"),
        (("--share", "2"), "above 0 and at most 1"),
        (("--data", "missing"), "missing is not a folder"),
        (("--model", "missing"), "--data FOLDER"),
        (("--output", "ranks.png"), "JSON file"),
    ],
)
def test_a_request_that_cannot_be_carried_out_is_one_red_line(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
