"""The recipe of vLLM's environment, as far as it needs no network."""

from __future__ import annotations

from tests.serving.environment import name_of, wanted


def test_what_does_not_load_beside_a_torch_without_cuda_is_left_out() -> None:
    asked = [
        "numpy",
        "torch==2.13.0+cpu; platform_machine == 'x86_64'",
        'torchaudio; platform_machine != "s390x"',
        "torchvision",
        "torchcodec>=0.14",
        'pandas; extra == "bench"',
        "mistral_common[image]>=1.11.6",
    ]
    found = wanted(asked)
    assert found == ["numpy", "torch==2.13.0; platform_machine == 'x86_64'", "mistral_common[image]>=1.11.6"]
    assert [name_of(one) for one in found] == ["numpy", "torch", "mistral_common"]
