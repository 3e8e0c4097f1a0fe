"""The bundled golden cases pass, and the runner says so only when they do."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.golden.runner import case_files, main, run_case, run_folder
from tests.golden.towers import recording_attention

CASES = Path(__file__).parent / "golden" / "cases"
FILES = [path for folder in sorted(CASES.iterdir()) if folder.is_dir() for path in case_files(folder)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_bundled_case(path: Path) -> None:
    outcome = run_case(path.parent.name, path)
    assert outcome.status == "ok", outcome


def corrupted(path: Path, folder: Path, name: str) -> None:
    """A copy of a case with one value of tensor `name` changed."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    flat = tensors[name].flatten().clone()
    flat[-1] = ~flat[-1] if flat.dtype == torch.bool else flat[-1] + 1
    tensors[name] = flat.reshape(tensors[name].shape)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / path.name, metadata)


@pytest.mark.parametrize(
    ("case", "tensor"),
    [
        ("divprune/case0", "selected_in_order"),
        ("divprune/case1", "keep_sorted"),
        ("divprune/case5_duplicates", "features"),
        ("cdpruner/case0", "keep_sorted"),
        ("cdpruner/case1", "relevance"),
        ("cdpruner/case3_576_T64", "final_di2s"),
        ("dycoke/ttm_s0", "kept"),
        ("dycoke/ttm_s4", "kept"),
        ("fopru/case0", "rank_keep"),
        ("fopru/case0", "row_keep"),
        ("fopru/case4_logits_rowdominant", "row_mean_given"),
        ("holov/case1", "kept_positions"),
        ("holov/case1", "allocated"),
        ("holov/case6_overflow", "weights"),
        ("visionzip/case0_8x8_d10_c4", "all_indices"),
        ("visionzip/case0_8x8_d10_c4", "assign"),
        ("visionzip/case0_8x8_d10_c4", "cls_attn_sum"),
        ("visionzip/case0_8x8_d10_c4", "contextual_tokens"),
        ("visionzip/case0_8x8_d10_c4", "metric"),
        ("visionzip/case0_8x8_d10_c4", "target_indices"),
        ("visionzip/case3_tensor_small", "out_tokens"),
        ("visionzip/anyres0_restore", "out_tokens"),
        ("flowcut/case0_8x8_L8_T16", "keep_after_layer_03"),
        ("flowcut/case0_8x8_L8_T16", "final_features"),
        ("flowcut/case0_8x8_L8_T16", "cum_score_after_layer_05"),
        ("flowcut/unit0_score_ratio", "ratio_table_rpl_target_prune"),
        ("flowcut/unit0_score_ratio", "score"),
        ("flowcut/anyres0_restore", "mask_unpad_640x427"),
        ("flowcut/anyres0_restore", "tokens_3w_1h"),
        ("flowcut/llm0_T8_vis20", "keep_index_within_visual"),
        ("flowcut/llm0_T8_vis20", "last_hidden_state"),
        ("flowcut/qwen0_16x16_T4", "keep_patches_prune02"),
        ("flowcut/qwen2_full_12x16_T4", "keep_index_within_visual"),
    ],
)
def test_a_corrupted_expectation_fails(case: str, tensor: str, tmp_path: Path, capsys) -> None:
    path = CASES / f"{case}.safetensors"
    corrupted(path, tmp_path / path.parent.name, tensor)
    assert main(tmp_path) == 1
    assert f"FAIL    {path.parent.name}/{path.name}: " in capsys.readouterr().out


def test_one_methods_folder_is_named_after_it(tmp_path: Path, capsys) -> None:
    shutil.copytree(CASES / "holov", tmp_path / "holov")
    (tmp_path / "holov" / "README.md").write_text("what the cases are")
    assert main(tmp_path / "holov") == 0
    assert capsys.readouterr().out.endswith("5 ok, 0 failed, 0 unknown\n")


def test_unknown_things_are_reported(tmp_path: Path) -> None:
    (tmp_path / "fopru").mkdir()
    (tmp_path / "nosuchmethod").mkdir()
    shutil.copy(CASES / "fopru" / "case0.safetensors", tmp_path / "nosuchmethod")
    shutil.copy(CASES / "holov" / "case0.safetensors", tmp_path / "fopru")
    (tmp_path / "fopru" / "notes.txt").write_text("not a case")
    (tmp_path / "fopru" / "broken.safetensors").write_bytes(b"\x00\x01")
    (tmp_path / "holov").mkdir()
    outcomes = list(run_folder(tmp_path))
    assert [outcome.status for outcome in outcomes] == ["UNKNOWN"] * 5
    assert main(tmp_path) == 1


@pytest.mark.parametrize("name", ["", "missing"])
def test_an_empty_or_missing_folder_is_no_success(name: str, tmp_path: Path) -> None:
    assert main(tmp_path / name) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("extra", "code"), [(False, 0), (True, 1)])
def test_the_command_line(extra: bool, code: int, tmp_path: Path) -> None:
    shutil.copytree(CASES / "fopru", tmp_path / "fopru")
    if extra:
        (tmp_path / "fopru" / "case9.bin").write_bytes(b"?")
    command = [sys.executable, "-m", "tests.golden", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == code, done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("ok ") for line in lines) == 4
    assert lines[-1] == f"4 ok, 0 failed, {int(extra)} unknown"


def test_the_attention_of_recorded_towers_reads_masks_of_both_kinds() -> None:
    query, key, value = torch.randn(3, 1, 2, 5, 4, generator=torch.Generator().manual_seed(0)).unbind()
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    added = torch.zeros(5, 5).masked_fill(~seen, float("-inf"))
    found = [
        recording_attention(torch.nn.Identity(), query, key, value, mask, scaling=0.5)[0] for mask in (seen, added)
    ]
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=0.5).transpose(1, 2)
    for one in found:
        torch.testing.assert_close(one, expected)
