"""What is wrong in vLLM 0.32 and stepped around. Each test fails once vLLM has put it right: then take the step out.

They run in vLLM's environment: `make serve-test`.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make serve-test runs this in it")

import torch

import vtprune


def test_the_cpus_runner_does_not_ask_whether_a_model_prunes() -> None:
    """`vtprune/serving/cpu.py` has it ask."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    own = inspect.unwrap(CPUModelRunner.load_model)
    assert "is_multimodal_pruning_enabled" in inspect.getsource(GPUModelRunner.load_model)
    assert "is_multimodal_pruning_enabled" not in inspect.getsource(own)


def test_positions_behind_a_tall_picture_advance_by_its_width() -> None:
    """`PrunedQwen25VL.recompute_mrope_positions` takes the place of vLLM's: text stands behind the longer side."""
    from vllm.multimodal.video_prune.evs import compute_mrope_for_media, recompute_mrope_positions

    height, width = 6, 4
    ids = torch.tensor([3, *[5] * (height * width), 4, 9])
    media = compute_mrope_for_media(torch.tensor([1, 2 * height, 2 * width]), 2).T.long()
    start = torch.arange(len(ids)).expand(3, -1).clone()
    found, _ = recompute_mrope_positions(
        ids, [media], start, 0, vision_start_token_id=3, image_token_id=5, video_token_id=6
    )
    assert int(found[0, -2]) == 1 + width, "transformers has 1 + max(height, width) there"


def test_positions_stay_where_no_embedding_is_gathered() -> None:
    """`places.planned` has text right before anything is encoded, so that a cached image needs nothing."""
    from vllm.multimodal.video_prune.evs import recompute_mrope_positions

    ids = torch.tensor([3, 5, 5, 4, 9])
    wrong = torch.zeros(3, 5, dtype=torch.long)
    found, _ = recompute_mrope_positions(
        ids, [], wrong, 5, vision_start_token_id=3, image_token_id=5, video_token_id=6
    )
    assert torch.equal(found, wrong)


def test_the_names_of_llavas_tower_are_those_of_older_checkpoints() -> None:
    """`PrunedLlava.load_weights` renames."""
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration

    mapped = LlavaForConditionalGeneration.hf_to_vllm_mapper.apply_list(["model.vision_tower.embeddings.weight"])
    assert list(mapped) == ["vision_tower.embeddings.weight"]


def test_the_command_of_vllm_asks_for_a_package_of_its_name() -> None:
    """`vtprune/serving/command.py` starts the server's module instead."""
    from vllm.entrypoints.cli import main

    assert 'importlib.metadata.version("vllm")' in inspect.getsource(main)


def test_the_plugin_registers_its_classes_again_and_again() -> None:
    from vllm import ModelRegistry

    from vtprune.serving.plugin import ARCHITECTURES, register

    for _ in range(2):
        register()
    assert ARCHITECTURES.keys() <= set(ModelRegistry.get_supported_archs())


def test_an_engine_that_would_not_prune_rightly_is_refused_by_name() -> None:
    from vtprune.serving import Settings
    from vtprune.serving.engine import check_engine

    def config(ranks: int = 1, mode: str = "weights", compiled: bool = False, switch: bool = True) -> SimpleNamespace:
        multimodal = SimpleNamespace(mm_encoder_tp_mode=mode, is_multimodal_pruning_enabled=lambda: switch)
        return SimpleNamespace(
            model_config=SimpleNamespace(multimodal_config=multimodal),
            parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
            compilation_config=SimpleNamespace(compile_mm_encoder=compiled),
            speculative_config=None,
        )

    settings = Settings(vtprune.DivPrune(keep=4))
    check_engine(config(), settings)
    check_engine(config(ranks=2, mode="data"), settings)
    for wrong, why in (
        (config(ranks=2), "mm-encoder-tp-mode data"),
        (config(compiled=True), "compile_mm_encoder"),
        (config(switch=False), "video_pruning_rate"),
    ):
        with pytest.raises(vtprune.VTPruneError, match=why):
            check_engine(wrong, settings)
