"""wrap, unwrap, wrapped and report: the only place that knows both adapters and pruners."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vtprune.adapters import adapter_for, core_model, tower_for
from vtprune.adapters.timm import TimmTower
from vtprune.adapters.tower import Tower
from vtprune.assets import calibration_of
from vtprune.cache.names import GENERATION
from vtprune.errors import UntrainedWarning, VTPruneError
from vtprune.hooks.installing import Installed
from vtprune.hooks.levels import check_levels, check_origin
from vtprune.hooks.newlines import POLICIES
from vtprune.hooks.open_clip_tower import OpenClipHooks
from vtprune.hooks.timm_tower import TimmHooks
from vtprune.hooks.tower import TowerWrapping
from vtprune.hooks.weights import (
    SUBMODULE,
    attach,
    detach,
    make_modules,
    read_weights,
    untrained,
    write_weights,
)
from vtprune.hooks.wrapping import Wrapping
from vtprune.method import config
from vtprune.method.growth import Growth
from vtprune.method.kinds import VIDEO
from vtprune.method.order import check_order
from vtprune.method.pruner import Pruner, form_for, forms
from vtprune.method.resolving import folder_of, resolve
from vtprune.method.sharing import Sharing
from vtprune.method.stages import Growing, Trained, acts, encoder_layers, revives
from vtprune.method.states import check_states
from vtprune.report.generation import Generation
from vtprune.report.report import Report

POSITIONS = ("original", "compact")
ATTRIBUTE = "_vtprune"
HOW_TO_TRAIN = "Train it (vtprune train), or wrap the model with the folder that holds trained weights"

M = TypeVar("M")


def wrap(
    model: M,
    pruner: Any,
    *,
    positions: str = "original",
    keep_prompt: int | float | None = None,
    share: str = "size",
    newlines: str = "keep",
    **options: Any,
) -> M:
    """Makes `model` prune its vision tokens, in place, and returns it.

    pruner: a name (with the method's `options`, here or in the text, as "fastv:keep=0.5,layers=(2,5)"; several are
    joined by +, see vtprune/method/texts.py), a Pruner, a list of them in stage order, a config dict, or a folder
    holding vtprune_config.json. positions: "original" keeps the position ids of the unpruned prompt, "compact"
    renumbers them layer by layer: a prompt's tokens without gaps, a later token by what the layer's cache then holds
    of its row. keep_prompt: instead of the method's `keep`, one budget for all images and videos of a prompt, a count
    of their tokens (int) or a fraction (float), which they share by "size" or by "importance" (`share`; see
    vtprune/method/sharing.py). newlines: what becomes of the tokens that end the rows of a picture's crops
    (LLaVA-NeXT, LLaVA-OneVision) where the picture loses tokens before the decoder: "keep", "rows" (those stay whose
    row has a token left), or "drop", as several methods' released code does; they are no vision tokens, and count
    against no budget. Generation without a cache (`use_cache=False`) reads everything anew at each step, so
    methods that choose by the text choose anew too, by what was generated so far. Raises VTPruneError (or a subclass)
    for an unknown method or option, a model without an adapter, and a model that is wrapped already.
    """
    sharing = _sharing(keep_prompt, share)
    return _wrap(model, pruner, options, sharing=sharing, positions=positions, newlines=newlines, level=3)


def _sharing(keep_prompt: int | float | None, share: str) -> Sharing | None:
    if keep_prompt is not None:
        return Sharing(keep_prompt, share)
    if share != "size":
        raise VTPruneError(f"share={share!r} says how a prompt's images share keep_prompt, and there is none")
    return None


def _wrap(
    model: M,
    pruner: Any,
    options: dict[str, Any],
    *,
    sharing: Sharing | None,
    positions: str,
    newlines: str,
    level: int,
) -> M:
    """`wrap`; level: how far up the stack the line stands that a warning names."""
    core: Any = core_model(model)
    if is_wrapped(core):
        current = getattr(core, ATTRIBUTE).name
        raise VTPruneError(f"this model is already wrapped with {current}; call vtprune.unwrap(model) first")
    if positions not in POSITIONS:
        raise VTPruneError(f"positions is 'original' or 'compact', got {positions!r}")
    if newlines not in POLICIES:
        raise VTPruneError(f"newlines is one of {', '.join(map(repr, POLICIES))}, got {newlines!r}")
    given = resolve(pruner, **options)
    growth: Growth | None = None
    if any(isinstance(one, Growing) for one in given):
        if tower_for(model) is not None:
            raise VTPruneError(f"{given[0].name} compares answers, and a vision encoder alone gives none")
        growing = _growing(given, adapter_for(model).source, sharing)
        given, growth = [growing], growing.growth()
        check_origin(growth, core, growing.name)
    tower = tower_for(model)
    if tower is not None:
        own = (
            ("keep_prompt", sharing is None),
            ("positions", positions == "original"),
            ("newlines", newlines == "keep"),
        )
        core.__dict__[ATTRIBUTE] = _wrap_tower(tower, given, [name for name, usual in own if not usual])
        return model
    adapter = adapter_for(model)
    if newlines != "keep" and not adapter.newlines:
        raise VTPruneError(f"newlines={newlines!r}: {adapter.name} has no tokens that end rows; leave it out")
    facts = adapter.facts()
    # What cannot be accounted for is refused now, not when a report is asked for.
    adapter.sizes(core.config)
    unbound = given if growth is None else [growth.method]
    # Stages that do nothing come before no method.
    acting = [index for index, one in enumerate(unbound) if acts(one)]
    if sharing is not None:
        sharing.check(given)
        unbound = [sharing.base(one) for one in given]
    pruners = [one.bind(replace(facts, first=index <= min(acting, default=0))) for index, one in enumerate(unbound)]
    check_order(pruners)
    if any(len(forms(one)) > 1 for one in pruners):
        check_order([form_for(one, VIDEO) for one in pruners])
    check_states(pruners)
    if growth is not None:
        check_levels(growth, pruners[0])
    adapter.check_stages(encoder=any(encoder_layers(one) for one in pruners))
    if positions == "compact" and not adapter.renumbers:
        raise VTPruneError(
            f"positions='compact' is defined for 1-D positions only; {adapter.name} has M-RoPE positions, use "
            "'original'"
        )
    # The released code of a method may renumber; on M-RoPE models the authors' own ports keep or garble positions.
    renumbering = next((one.name for one in pruners if one.renumbers and adapter.renumbers), None)
    compact = positions == "compact" or renumbering is not None
    returning = next((one.name for one in pruners if revives(one)), None)
    if compact and returning:
        asked, instead = "positions='compact'", "use 'original'"
        if positions != "compact":
            asked, instead = f"variant='released' of {renumbering}", "use variant='paper'"
        raise VTPruneError(
            f"{asked} numbers the tokens that are left, and with {returning} those that were left out return; "
            f"{instead}"
        )
    modules = make_modules(pruners, adapter)
    folder = folder_of(pruner)
    if modules and folder is not None:
        read_weights(modules, folder, core)
    elif modules:
        warnings.warn(f"{untrained(pruners)}. {HOW_TO_TRAIN}", UntrainedWarning, stacklevel=level)
    # Not through setattr: nothing of the wrapping may end in the model's state dict or module tree, but for the
    # weights that a method brings, which are trained and moved with it.
    wrapping = Wrapping(
        adapter, pruners, facts, compact=compact, given=given, modules=modules, sharing=sharing, newlines=newlines,
        growth=growth,
    )  # fmt: skip
    core.__dict__[ATTRIBUTE] = wrapping
    attach(core, modules)
    if modules:
        wrapping.override(core, "save_pretrained", _saving(core, core.save_pretrained))
    return model


def _growing(given: list[Pruner], source: str, sharing: Sharing | None) -> Growing:
    """The only method, which grows, with what it goes by: its own, or what the model, of this source, comes with."""
    growing = given[0]
    if not isinstance(growing, Growing) or len(given) > 1:
        names = " and ".join(one.name for one in given)
        raise VTPruneError(
            f"{names} do not go together: a method that runs another one at several levels stands alone"
        )
    if sharing is not None:
        raise VTPruneError(f"{growing.name} finds out how much to keep; leave keep_prompt out")
    own = calibration_of(source)
    return growing if own is None else growing.at(own)


def _wrap_tower(tower: Tower, given: list[Pruner], asked: list[str]) -> TowerWrapping:
    """The hooks of a vision encoder that stands alone; asked: what was given to `wrap` that is a decoder's."""
    if asked:
        raise VTPruneError(f"{asked[0]} is about a decoder's prompt, and {tower.name} models have none; leave it out")
    facts = tower.facts()
    pruners = [one.bind(replace(facts, first=index == 0)) for index, one in enumerate(given)]
    idle = next((one.name for one in pruners if acts(one) and not encoder_layers(one)), None)
    if idle is not None:
        raise VTPruneError(
            f"{idle} acts before or inside a decoder, and {tower.name} models have none; flowcut, turbo, tome, "
            "visionzip, vispruner and mustdrop act inside the encoder, and vtprune.select runs methods that choose by "
            "features alone"
        )
    bringing = next((one.name for one in pruners if isinstance(one, Trained)), None)
    if bringing is not None:
        raise VTPruneError(
            f"{bringing} brings weights that are trained with a decoder behind them, and {tower.name} models have none"
        )
    check_order(pruners)
    kind = TimmHooks if isinstance(tower, TimmTower) else OpenClipHooks
    return TowerWrapping(tower, pruners, facts, given=given, kind=kind)


def unwrap(model: M) -> M:
    """Takes every hook, attribute and override off again and returns the model as it was."""
    core = core_model(model)
    _wrapping(core, "unwrap").remove()
    detach(core)
    del core.__dict__[ATTRIBUTE]
    return model


@contextmanager
def wrapped(
    model: M,
    pruner: Any,
    *,
    positions: str = "original",
    keep_prompt: int | float | None = None,
    share: str = "size",
    newlines: str = "keep",
    **options: Any,
) -> Iterator[M]:
    """`wrap` for the length of a with block; unwraps also when the block raises."""
    sharing = _sharing(keep_prompt, share)
    _wrap(model, pruner, options, sharing=sharing, positions=positions, newlines=newlines, level=4)
    try:
        yield model
    finally:
        # The block may have unwrapped the model itself.
        if is_wrapped(model):
            unwrap(model)


def is_wrapped(model: Any) -> bool:
    """Whether `model` prunes its vision tokens now."""
    return hasattr(core_model(model), ATTRIBUTE)


def methods_of(model: Any) -> list[Pruner]:
    """The pruners that `wrap` was given for a model, [] for one that is not wrapped."""
    return list(_wrapping(core_model(model), "name the methods").given) if is_wrapped(model) else []


def report(source: Any) -> Report:
    """The Report of a wrapped model's last generation or forward, or of the generation that filled a cache.

    With several threads on one model, ask for a cache's own report. Raises VTPruneError if there is none.
    """
    if isinstance(source, Cache):
        generation = getattr(source, GENERATION, None)
        if not isinstance(generation, Generation):
            raise VTPruneError("no wrapped model has filled this cache with a prompt yet")
        return generation.build(source)
    found = _wrapping(core_model(source), "report").report()
    if found is None:
        raise VTPruneError("nothing to report: run forward() or generate() on the wrapped model first")
    return found


def save_config(source: Any, folder: str | Path) -> Path:
    """Writes the pruners of `source` (a wrapped model, or whatever `wrap` takes) to vtprune_config.json.

    Returns the file's path. Raises VTPruneError for anything else, and for a folder that cannot be written.
    """
    if isinstance(source, torch.nn.Module):
        wrapping = _wrapping(core_model(source), "save the config")
        if isinstance(wrapping, Wrapping):
            _tell_unsaved(wrapping)
        given = wrapping.given
    else:
        given = resolve(source)
    return config.save_config(given[0] if len(given) == 1 else given, folder)


def _tell_unsaved(wrapping: Wrapping) -> None:
    """Warns of what was given to `wrap` and is in no config."""
    sharing, newlines = wrapping.sharing, wrapping.newlines
    if sharing is not None:
        text = f"a config holds no keep_prompt: give keep_prompt={sharing.keep!r}, share={sharing.by!r} to wrap again"
        warnings.warn(text, UserWarning, stacklevel=3)
    if newlines != "keep":
        warnings.warn(
            f"a config holds no newlines: give newlines={newlines!r} to wrap again", UserWarning, stacklevel=3
        )


def save(model: Any, folder: str | Path) -> Path:
    """Writes the pruners of a wrapped model, and the weights that they brought to it, to `folder` and returns it.

    `wrap(model, folder)` brings both to another copy of the same base model. Raises VTPruneError for a model that is
    not wrapped, and for a folder that cannot be written; what stood there before is then still whole.
    """
    core = core_model(model)
    modules = _wrapping(core, "save").modules
    if modules:
        write_weights(modules, Path(folder), core)
    save_config(model, folder)
    return Path(folder)


def _saving(core: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    """`save_pretrained` of a model to which methods brought weights: the base without them, as it can be loaded, and
    beside it what `save` writes, as `wrap` can load it."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments.get("state_dict")
        weights = core.state_dict() if given is None else given
        base = {name: weight for name, weight in weights.items() if not name.startswith(f"{SUBMODULE}.")}
        bound.arguments["state_dict"] = base
        answer = original(*bound.args, **bound.kwargs)
        if bound.arguments.get("is_main_process", True):
            save(core, bound.arguments["save_directory"])
        return answer

    return save_pretrained


def load_weights(model: Any, folder: str | Path) -> None:
    """Reads what `save` wrote into the methods of a wrapped model; raises VTPruneError where it does not fit."""
    core = core_model(model)
    read_weights(_wrapping(core, "load weights").modules, Path(folder), core)


def auxiliary_loss(model: Any) -> Tensor | None:
    """What methods add to the loss of this thread's last forward, or None; a forward with labels has added it to its
    own loss."""
    return _with_decoder(core_model(model), "ask for a loss").loss


def mark_answers(model: Any, labels: Tensor) -> None:
    """Tells the methods of a wrapped model which tokens of this thread's next forward are answers: those whose label
    (B, L) is not -100. For training loops that compute the loss themselves; `labels` given to the forward do the same.
    """
    _with_decoder(core_model(model), "mark answers").mark_answers(labels)


def _wrapping(core: Any, verb: str) -> Installed:
    wrapping = getattr(core, ATTRIBUTE, None)
    if not isinstance(wrapping, Installed):
        raise VTPruneError(f"cannot {verb}: this model is not wrapped (call vtprune.wrap(model, ...) first)")
    return wrapping


def _with_decoder(core: Any, verb: str) -> Wrapping:
    wrapping = _wrapping(core, verb)
    if not isinstance(wrapping, Wrapping):
        raise VTPruneError(f"cannot {verb}: this model is a vision encoder alone")
    return wrapping
