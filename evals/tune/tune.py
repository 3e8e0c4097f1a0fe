"""`vtprune tune`: the hyper-parameters of a method that change the model's own state least, at a budget.

The objective is VFlowOpt's visual information flow (ICCV 2025, arXiv 2508.05211): the cosine of the last prompt
token's final hidden state with and without pruning, for any method that declares a search space.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from vtprune.adapters import adapter_for
from vtprune.assets import folder_of, title_of
from vtprune.console.output import notice
from vtprune.console.progress import Steps
from vtprune.errors import InputError
from vtprune.evals.samples import Calibration, Wanted, gather
from vtprune.evals.tune.budget import FlopsBudget, TokenBudget
from vtprune.evals.tune.measure import Meter
from vtprune.evals.tune.output import write_outputs
from vtprune.evals.tune.search import Tuner
from vtprune.evals.tune.space import require_optuna, searched
from vtprune.evals.tune.store import Search, search_fingerprint
from vtprune.files import held
from vtprune.loading.environment import prepare_environment
from vtprune.loading.model import default_batch, is_local, load_model, pick_device
from vtprune.method.registry import available, create, read_options
from vtprune.method.texts import parse_entry
from vtprune.provenance import PACKAGES, machine, model_fingerprint, versions

DEFAULT_SAMPLES = 30
# Six times what is drawn at random; methods here have two to five hyper-parameters, and best-so-far is flat by then.
DEFAULT_TRIALS = 60
PROBES = 4

# A method's name, and the options that a search leaves as they are.
Fixed = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class TuneConfig:
    """What to search. Exactly one of keep and flops (a share of the unpruned prefill's FLOPs) is given."""

    method: str
    output: Path
    keep: int | float | None = None
    flops: float | None = None
    model: str | None = None
    data: Path | None = None
    question: str | None = None
    samples: int = DEFAULT_SAMPLES
    check_samples: int = DEFAULT_SAMPLES
    frames: int | None = None
    trials: int = DEFAULT_TRIALS
    seed: int = 0
    device: str | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    batch_size: int | None = None
    restart: bool = False

    @property
    def pretrained(self) -> str:
        """The id or folder that the model is loaded from."""
        return folder_of(self.model)


def run_tune(config: TuneConfig, console: Console) -> dict[str, Any]:
    """Runs the search, prints what it found, and returns the content of search.json.

    Raises VTPruneError for a request that cannot be carried out, before anything is computed where that can
    be seen, and RunError for what goes wrong later.
    """
    require_optuna()
    method = _method(config)

    def tell(text: str) -> None:
        notice(console, text)

    wanted = Wanted(config.samples, config.check_samples, config.seed, config.frames)
    calibration = gather(wanted, data=config.data, question=config.question, model=config.model, tell=tell)
    with held(config.output):
        return _search(config, calibration, method, console)


def _search(config: TuneConfig, calibration: Calibration, method: Fixed, console: Console) -> dict[str, Any]:
    """The run itself, once the folder is held."""
    prepare_environment(offline=is_local(config.pretrained))
    search = Search(config.output, _identity(config, calibration), restart=config.restart)
    if search.moved is not None:
        notice(console, f"the earlier search is now in {search.moved}; starting afresh")
    model, processor = load_model(
        config.pretrained, device=config.device, dtype=config.dtype, attn_implementation=config.attn_implementation
    )
    adapter_for(model)
    search.data.update(versions=versions((*PACKAGES, "optuna", "scipy")), machine=machine(model))
    batch = config.batch_size or default_batch(model)
    meters = {
        name: Meter(model, processor, samples, batch)
        for name, samples in (("search", calibration.search), ("check", calibration.check))
        if samples
    }
    states = _unpruned(meters, search, console)
    probe = Meter(model, processor, calibration.search[:PROBES], batch)
    budget = _budget(config, method, probe, states["search"][:PROBES])
    done = len(search.trials)
    if done:
        notice(console, f"{done} trials are in {search.path} already")
    with Steps(console, "trials", max(config.trials, done), done) as steps:
        tuner = Tuner(model, budget, meters, states, search=search, steps=steps)
        tuner.run(config.trials, config.seed)
        tuner.check()
    write_outputs(search, str(budget), console)
    return search.data


def _method(config: TuneConfig) -> Fixed:
    """The method and its fixed options; raises InputError if the request leaves nothing to search."""
    if (config.keep is None) == (config.flops is None):
        raise InputError("budget: give one of --keep (64, 15%) and --flops (40%)")
    for name, least in (("samples", 1), ("check_samples", 0), ("trials", 1)):
        if getattr(config, name) < least:
            raise InputError(f"{name.replace('_', '-')}: at least {least}, got {getattr(config, name)}")
    if config.keep == 1.0 and isinstance(config.keep, float):
        raise InputError("keep: at 100% nothing is pruned, so there is nothing to tune")
    stages = parse_entry(config.method)
    if len(stages) > 1 or stages[0].folder:
        what = "a list of methods" if len(stages) > 1 else "a folder, whose options are set"
        raise InputError(f"method: {config.method} is {what}; a search takes one method by name, as holov:tau=1")
    method, options = stages[0].name, read_options(stages[0].name, dict(stages[0].options))
    if "keep" in options:
        raise InputError(f"method: the budget is --keep or --flops, not an option of {method}")
    pruner = create(method, **options, keep=config.keep)
    if not searched(pruner, options):
        others = [name for name in available() if create(name).search_space(576)]
        fixed = " beside the options that are given" if pruner.search_space(576) else ""
        raise InputError(f"method: {method} has nothing to tune{fixed}; these have: {', '.join(others)}")
    return method, options


def _identity(config: TuneConfig, calibration: Calibration) -> dict[str, Any]:
    """What a trial depends on; a resumed search must agree in all of it."""
    return {
        "model": title_of(config.model),
        "model_files": model_fingerprint(config.pretrained),
        "method": config.method,
        "keep": config.keep,
        "flops": config.flops,
        "source": calibration.source,
        "data": calibration.fingerprint(),
        "samples": len(calibration.search),
        "check_samples": len(calibration.check),
        "seed": config.seed,
        "dtype": config.dtype,
        "device": pick_device(config.device),
        "attn_implementation": config.attn_implementation,
        "batch_size": config.batch_size,
        "code": search_fingerprint(),
    }


def _unpruned(meters: dict[str, Meter], search: Search, console: Console) -> dict[str, Tensor]:
    """The unpruned states of both sets, read from the folder where an earlier run has left them."""
    states = search.load_states()
    if states is not None and states.keys() == meters.keys():
        return states
    with Steps(console, "unpruned states", len(meters), parts="samples") as steps:
        states = {}
        for name, meter in meters.items():
            words = f"unpruned states of the samples to {name}"
            steps.begin(words, len(meter.samples))
            states[name] = meter.states(steps.part)
            steps.end(words)
    for name, meter in meters.items():
        bad = (~states[name].isfinite().all(dim=-1)).nonzero().flatten().tolist()
        if bad:
            names = ", ".join(meter.samples[i].name for i in bad[:3])
            raise InputError(f"model: its own state is not a number on {names}; try --dtype float32")
    search.save_states(states)
    return states


def _budget(config: TuneConfig, method: Fixed, probe: Meter, states: Tensor) -> TokenBudget | FlopsBudget:
    if config.keep is not None:
        return TokenBudget(*method, config.keep)
    assert config.flops is not None
    return FlopsBudget(*method, config.flops, probe=probe, states=states, tokens=probe.largest_image())
