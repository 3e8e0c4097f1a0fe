"""A recorded case: its tensors and settings, and the comparisons that a loader makes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor


class Mismatch(Exception):
    """A result that differs from what was recorded."""


class UnknownCase(Exception):
    """A case that no loader recognises."""


@dataclass(frozen=True)
class Case:
    """The tensors and the metadata of one file."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @classmethod
    def load(cls, path: Path) -> Case:
        """Reads .safetensors or .npz; raises UnknownCase for anything else and for an unreadable file."""
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                    return cls(path, tensors, file.metadata() or {})
            if path.suffix == ".npz":
                with np.load(path, allow_pickle=False) as file:
                    arrays = {name: file[name] for name in file.files}
                numeric = {name: torch.from_numpy(a) for name, a in arrays.items() if a.dtype.kind in "biuf"}
                return cls(path, numeric, {n: str(a) for n, a in arrays.items() if n not in numeric})
        except Exception as error:
            raise UnknownCase(f"cannot be read: {error}") from error
        raise UnknownCase("not a .safetensors or .npz file")

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise UnknownCase(f"no tensor {name!r}")
        return self.tensors[name]

    def setting(self, *names: str) -> Any:
        """The first of these settings that is there, decoded from JSON; raises UnknownCase if none is."""
        for name in names:
            if name in self.metadata:
                return json.loads(self.metadata[name])
        raise UnknownCase(f"no setting {' or '.join(names)}")

    def weights(self, prefix: str = "w.") -> dict[str, Tensor]:
        """The recorded weights below `prefix`, without it."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def expect_equal(what: str, got: Tensor, want: Tensor) -> None:
    """Raises Mismatch unless both hold the same integers or booleans."""
    if got.shape != want.shape:
        raise Mismatch(f"{what}: shape {tuple(got.shape)}, recorded {tuple(want.shape)}")
    if not torch.equal(got.long(), want.long()):
        raise Mismatch(f"{what}: {int((got.long() != want.long()).sum())} of {want.numel()} differ")


def expect_close(what: str, got: Tensor, want: Tensor, atol: float = 1e-5, rtol: float = 1e-4) -> None:
    """Raises Mismatch unless both agree within the tolerance, with the largest difference."""
    if got.shape != want.shape:
        raise Mismatch(f"{what}: shape {tuple(got.shape)}, recorded {tuple(want.shape)}")
    if not torch.allclose(got.float(), want.float(), atol=atol, rtol=rtol):
        raise Mismatch(f"{what}: differs by up to {float((got.float() - want.float()).abs().max()):.2e}")
