"""Models that are asked for and would be wrong are refused by their own name, with the reason."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from torch import nn

import vtprune
from tests.models import make
from vtprune.adapters import REFUSED, adapter_for, model_cost
from vtprune.errors import UnsupportedModelError


class Named(nn.Module):
    """A model of which nothing is known but what its config calls itself."""

    def __init__(self, model_type: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type=model_type)


def _check(model: Any, says: str) -> None:
    for refused in (lambda: vtprune.wrap(model, "none"), lambda: adapter_for(model), lambda: model_cost(model.config)):
        with pytest.raises(UnsupportedModelError, match=says) as found:
            refused()
        assert "\n" not in str(found.value)


def test_qwen4_exp_is_refused() -> None:
    model = Named("qwen4_exp")
    known = getattr(transformers, "Qwen4ExpConfig", None)
    assert known is None or known.model_type == "qwen4_exp"
    _check(model, "qwen4_exp cannot be wrapped: its attention picks what each query sees")


def test_video_llava_is_refused() -> None:
    assert transformers.VideoLlavaConfig.model_type == "video_llava"
    _check(Named("video_llava"), "video_llava cannot be wrapped: it has a tower for images and another for videos")


@pytest.mark.parametrize("name", ["llavaonevision1_5", "llava_onevision1_5"])
def test_llava_onevision_1_5_is_refused(name: str) -> None:
    _check(Named(name), f"{name} cannot be wrapped: no release of transformers that vtprune is tested on")


def test_every_refusal_has_a_test() -> None:
    assert set(REFUSED) == {"qwen4exp", "llavaonevision15", "videollava"}


def test_a_model_that_nobody_knows_is_told_which_are_known() -> None:
    with pytest.raises(UnsupportedModelError, match="no adapter for Named; vtprune wraps LlavaForConditional"):
        adapter_for(Named("somebody's"))


def test_a_release_of_transformers_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", "5.19.0")
    with pytest.raises(vtprune.UnsupportedModelError, match=r"5\.19\.0 .* 5\.20 and later"):
        vtprune.wrap(make("llava-clip"), "grid")
