"""What an engine is told, what a request may ask for, and what is refused before anything is served."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig, LlavaConfig

import vtprune
from tests.models import make
from tests.serving.cases import COVIPAL, LLAVA, write_covipal
from vtprune.hooks.weights import read_module
from vtprune.serving import command, release
from vtprune.serving.arguments import arguments_for, engine_args
from vtprune.serving.settings import Settings

CONFIG = AutoConfig.from_pretrained(LLAVA)
GRID = (1, 12, 12)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the right release of vLLM were installed."""
    monkeypatch.setattr(release, "installed", lambda: "0.32.1")


def settings(method: str = "divprune", positions: str = "original", **options: Any) -> Settings:
    most = options.pop("most", None)
    return Settings(vtprune.method.registry.create(method, **options), positions, most)


def test_settings_come_back_from_a_config_as_they_were() -> None:
    for told in (settings(keep=36), settings("fopru", "compact", keep=0.25, softmax=False, most=0.5)):
        config = SimpleNamespace(vtprune=json.loads(json.dumps(told.to_dict())))
        assert Settings.of(config) == told


def test_a_config_without_settings_is_told_how_to_start() -> None:
    with pytest.raises(vtprune.VTPruneError, match="vtprune serve"):
        Settings.of(SimpleNamespace())


def test_a_request_may_ask_for_another_method_within_the_most() -> None:
    told = settings(keep=36, most=72)
    assert told.asked_for(None) == told.pruner
    asked = told.asked_for({"method": "grid", "keep": 0.5})
    assert told.count(asked, GRID) == asked.count(GRID) <= 72
    with pytest.raises(vtprune.VTPruneError, match=r"none keeps 144 tokens .* at most 72"):
        told.count(told.asked_for({"method": "none"}), GRID)


def test_without_a_most_a_request_keeps_what_the_engines_method_keeps() -> None:
    told = settings(keep=36)
    assert told.count(told.asked_for({"method": "fopru", "keep": 36}), GRID) == 36
    with pytest.raises(vtprune.VTPruneError, match="at most 36"):
        told.count(told.asked_for({"method": "fopru", "keep": 37}), GRID)


@pytest.mark.parametrize(
    "largest", [settings(keep=36), settings(keep=36, most=72), settings(keep=36, most=1.0), settings("grid", most=0.3)]
)
def test_memory_is_measured_with_the_most_that_is_kept(largest: Settings) -> None:
    assert largest.count(largest.largest(), GRID) >= largest.count(largest.pruner, GRID)
    assert largest.largest().count(GRID) <= 144
    if largest.limit == 1.0:
        assert largest.largest().count(GRID) == 144


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"method": "fastv", "keep": 36}, "fastv cannot be served: it acts inside the decoder"),
        ({"method": "holov", "variant": "released"}, "fewer tokens than its budget"),
        ({"method": "divprune", "variant": "released"}, "positions='compact'"),
        ({"method": "cdpruner", "clip": "anywhere"}, "second model"),
        ({"method": "grid", "keep_video": 4}, "keep_video"),
        ({"method": "divprune", "keep": 0}, "int of at least 1"),
        ({"method": "none", "keep": 3}, "none prunes nothing"),
        ({"method": "nothing"}, "unknown pruner"),
        ({"method": "grid", "depth": 3}, "no option depth"),
        ("divprune", "a request says"),
        ({"keep": 36}, "a request says"),
        ([{"method": "grid"}], "a request says"),
    ],
)
def test_what_a_request_cannot_have_is_said_by_name(asked: object, why: str) -> None:
    with pytest.raises(vtprune.VTPruneError, match=why) as found:
        settings(keep=36).asked_for(asked)
    assert "\n" not in str(found.value)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with CoViPAL's weights for the bundled LLaVA."""
    return write_covipal(tmp_path_factory.mktemp("covipal"))


def test_a_trained_method_comes_with_its_weights_and_requests_may_change_its_keep_alone(
    served: None, trained: Path
) -> None:
    given = engine_args(str(LLAVA), str(trained), most=0.5)["hf_overrides"]["vtprune"]
    assert given["weights"] == str(trained.resolve())
    told = Settings.of(SimpleNamespace(vtprune=given))
    assert told.asked_for({**told.pruner.to_dict(), "keep": 20}).count(GRID) == 20
    assert told.asked_for({"method": "grid", "keep": 20}).count(GRID) <= 20
    with pytest.raises(vtprune.VTPruneError, match="a request may change keep alone"):
        told.asked_for({"method": "covipal", "keep": 20, "blocks": 3})
    with pytest.raises(vtprune.VTPruneError, match="covipal cannot be served without trained weights"):
        settings("covipal", keep=36)


def test_weights_of_another_model_are_refused(trained: Path) -> None:
    with pytest.raises(vtprune.VTPruneError, match="trained on a llava, and this is a qwen2_5_vl"):
        read_module(vtprune.CoViPAL(**COVIPAL).bind(facts(128)).make_module(), trained, "qwen2_5_vl")
    with pytest.raises(vtprune.VTPruneError, match="of another shape"):
        read_module(vtprune.CoViPAL(**COVIPAL).bind(facts(64)).make_module(), trained, "llava")


def facts(width: int) -> vtprune.ModelFacts:
    return vtprune.ModelFacts(has_cls=False, encoder_depth=2, decoder_depth=2, group=1, decoder_width=width)


def test_positions_are_one_of_two() -> None:
    with pytest.raises(vtprune.VTPruneError, match="positions"):
        settings(positions="dense")


def test_llava_has_one_class_for_each_kind_of_positions() -> None:
    compact = arguments_for(CONFIG, settings(positions="compact", keep=36))
    assert compact["hf_overrides"]["architectures"] == ["VTPruneLlava"]
    assert "video_pruning_rate" not in compact
    original = arguments_for(CONFIG, settings(keep=36))
    assert original["hf_overrides"]["architectures"] == ["VTPruneLlavaOriginal"]
    assert original["video_pruning_rate"] > 0
    rows = original["hf_overrides"]["text_config"]["rope_parameters"]
    assert rows["mrope_section"] == [0, 8, 8]
    assert rows["rope_theta"] == CONFIG.text_config.rope_parameters["rope_theta"]
    json.dumps(original)


def test_qwen_keeps_original_positions() -> None:
    config = make("qwen2.5-vl").config
    assert arguments_for(config, settings())["hf_overrides"]["architectures"] == ["VTPruneQwen2_5_VL"]
    with pytest.raises(vtprune.VTPruneError, match=r"Qwen2\.5-VL is served with positions='original'"):
        arguments_for(config, settings(positions="compact"))


@pytest.mark.parametrize(
    ("kind", "why"), [("qwen3-vl", "planes"), ("llava-next", "crops"), ("qwen2-vl", "no class in the plugin")]
)
def test_families_that_are_not_served_are_refused_by_name(kind: str, why: str) -> None:
    with pytest.raises(vtprune.VTPruneError, match=f"cannot be served.*{why}"):
        arguments_for(make(kind).config, settings())


def test_a_scaled_rotary_embedding_is_for_compact_positions_alone() -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    config = LlavaConfig(text_config=LlamaConfig(rope_parameters=rope))
    with pytest.raises(vtprune.VTPruneError, match="take 'compact'"):
        arguments_for(config, settings())
    assert arguments_for(config, settings(positions="compact"))


@pytest.mark.parametrize(("found", "why"), [(None, "is not installed"), ("0.33.0", r"0\.33\.0 is installed")])
def test_another_release_of_vllm_is_refused_by_name(
    found: str | None, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release, "installed", lambda: found)
    with pytest.raises(vtprune.VTPruneError, match=why):
        engine_args(str(LLAVA), "grid")


@pytest.mark.usefixtures("served")
def test_the_arguments_of_an_engine_hold_the_method() -> None:
    given = engine_args(str(LLAVA), "fopru:softmax=false", keep=36, most=0.5)
    assert given["model"] == str(LLAVA)
    told = given["hf_overrides"]["vtprune"]
    assert told["pruner"]["method"] == "fopru"
    assert told["pruner"]["keep"] == 36
    assert told["pruner"]["softmax"] is False
    assert told["most"] == 0.5


@pytest.mark.usefixtures("served")
def test_a_folder_of_save_config_is_served(tmp_path: Path) -> None:
    vtprune.save_config(vtprune.DivPrune(keep=12), tmp_path)
    assert engine_args(str(LLAVA), str(tmp_path))["hf_overrides"]["vtprune"]["pruner"]["keep"] == 12


@pytest.mark.usefixtures("served")
def test_a_list_of_methods_and_a_folder_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(vtprune.VTPruneError, match="one method, got 2"):
        engine_args(str(LLAVA), "grid:keep=0.5+divprune:keep=0.2")
    with pytest.raises(vtprune.VTPruneError, match="no config of a model"):
        engine_args(str(tmp_path), "grid")


@pytest.mark.usefixtures("served")
def test_the_servers_command_passes_vllms_own_options_on() -> None:
    words = command.server_command(str(LLAVA), "divprune", keep=36, most=1.0, others=["--port", "8001"])
    assert words[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert words[-2:] == ["--port", "8001"]
    overrides = json.loads(words[words.index("--hf-overrides") + 1])
    assert overrides["vtprune"] == {**overrides["vtprune"], "most": 1.0, "positions": "original"}
    assert float(words[words.index("--video-pruning-rate") + 1]) > 0


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("option", ["--hf-overrides", "--video_pruning_rate", "--model=other", "--hf-overrides.x"])
def test_options_that_are_vtprunes_to_set_are_refused(option: str) -> None:
    with pytest.raises(vtprune.VTPruneError, match="set by vtprune serve"):
        command.server_command(str(LLAVA), "divprune", others=[option, "1"])


def test_the_config_of_a_model_is_left_as_it_was() -> None:
    before = copy.deepcopy(CONFIG.to_dict())
    arguments_for(CONFIG, settings(keep=36))
    assert CONFIG.to_dict() == before
