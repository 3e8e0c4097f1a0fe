"""Trained weights run on the base that they were trained on, and what is untrained says so."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

import vtprune
from tests.matrix import GATED, PRUNERS, label
from tests.models import MODELS, make
from tests.pruners.test_pmod import trained
from vtprune.assets import ASSETS, TINY_LLAVA, TRAINED
from vtprune.evals.settings import build_settings
from vtprune.files import write_tensors
from vtprune.hooks.base_sample import sample_base
from vtprune.hooks.weights import SUBMODULE
from vtprune.method.pruner import Pruner
from vtprune.method.stages import Trained
from vtprune.pruners import PMoD

every_model = pytest.mark.parametrize("kind", MODELS)
BRING = [pruner for pruner in [*PRUNERS, *GATED] if isinstance(pruner, Trained)]


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_fit_their_base_in_any_dtype(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    vtprune.save(trained(kind, PMoD()), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", vtprune.UncheckedBaseWarning)
        vtprune.wrap(make(kind).to(dtype), str(tmp_path))
        # A base that was held in half precision and is back in fp32.
        vtprune.wrap(make(kind).to(dtype).float(), str(tmp_path))


@every_model
def test_weights_are_refused_on_other_weights_of_the_same_architecture(kind: str, tmp_path: Path) -> None:
    vtprune.save(trained(kind, PMoD()), tmp_path)
    for name, _ in list(make(kind).named_parameters())[::7]:
        other = make(kind)
        with torch.no_grad():
            other.get_parameter(name).add_(0.01)
        with pytest.raises(vtprune.VTPruneError, match="trained on another base model: the architecture is the same"):
            vtprune.wrap(other, str(tmp_path))
        with pytest.raises(vtprune.VTPruneError, match="trained on another base model"):
            vtprune.load_weights(vtprune.wrap(other, PMoD()), tmp_path)


def test_weights_of_a_folder_that_tells_nothing_of_its_base_load_with_a_warning(tmp_path: Path) -> None:
    from safetensors import safe_open

    vtprune.save(trained("llava-clip", PMoD()), tmp_path)
    path = tmp_path / "vtprune_weights.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = {key: value for key, value in file.metadata().items() if not key.startswith("base_")}
    write_tensors(path, tensors, metadata)
    with pytest.warns(vtprune.UncheckedBaseWarning, match="says nothing of its base's weights"):
        vtprune.wrap(make("llava-clip"), str(tmp_path))


def test_the_bundled_trained_folder_knows_its_base() -> None:
    other = AutoModelForImageTextToText.from_pretrained(TINY_LLAVA)
    with pytest.raises(vtprune.VTPruneError, match="trained on another base model"):
        vtprune.wrap(other, str(TRAINED[0]))
    own = AutoModelForImageTextToText.from_pretrained(TRAINED[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vtprune.wrap(own, str(TRAINED[0]))
    assert sample_base(own, SUBMODULE).matches(sample_base(other, SUBMODULE)) is False


@pytest.mark.parametrize("pruner", BRING, ids=label)
def test_an_untrained_method_says_so_once(pruner: Pruner, tmp_path: Path) -> None:
    model = make("llava-clip")
    with pytest.warns(vtprune.UntrainedWarning, match=f"{pruner.name} is untrained: ") as told:
        vtprune.wrap(model, pruner)
    assert [one.filename for one in told] == [__file__]
    vtprune.save(model, tmp_path)
    vtprune.unwrap(model)
    with pytest.warns(vtprune.UntrainedWarning) as told, vtprune.wrapped(model, pruner):
        pass
    assert [one.filename for one in told] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vtprune.wrap(model, str(tmp_path))


def test_settings_of_a_sweep_say_what_is_untrained() -> None:
    none, covipal, folder = build_settings(["covipal:keep=0.4", str(TRAINED[0])], [0.25])
    assert "covipal is untrained" in covipal.untrained
    assert "of no use" in covipal.untrained
    assert (none.untrained, folder.untrained) == ("", "")


def test_the_bundled_module_of_covipal_goes_with_the_bundled_model_alone() -> None:
    model = AutoModelForImageTextToText.from_pretrained(TINY_LLAVA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vtprune.wrap(model, str(ASSETS / "tiny-llava-covipal"))
    own = AutoModelForImageTextToText.from_pretrained(TRAINED[0])
    with pytest.raises(vtprune.VTPruneError, match="trained on another base model"):
        vtprune.wrap(own, str(ASSETS / "tiny-llava-covipal"))
