"""Methods with options drawn at random, alone and in lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import vtprune
from tests.fuzz.architectures import Architecture
from vtprune.method.pruner import Pruner
from vtprune.method.registry import create

Options = dict[str, Any]

# Methods by where they act, in the order in which tokens meet them: in the encoder, before the decoder, inside it, in
# the cache that it leaves.
ENCODER = ("flowcut", "visionzip", "vispruner", "turbo", "tome", "mustdrop", "vscan", "iared2")
INPUT = (
    "random", "grid", "pool", "fopru", "holov", "divprune", "cdpruner", "prumerge", "vflowopt", "gemfilter", "covipal",
)  # fmt: skip
DECODER = (
    "fastv", "dart", "pyramid_drop", "sparsevlm", "vtw", "lazyllm", "spatten", "yopo", "pmod", "gamma_mod",
    "mue", "random_ltd",
)  # fmt: skip
CACHE = ("d2o",)
PLACES = (ENCODER, INPUT, DECODER, CACHE)
# Their own weights, or the gates that they bring, change what is computed even where everything is kept.
TRAINED = ("pmod", "gamma_mod", "covipal", "iared2")
# What needs the whole grid cannot come second.
WHOLE_GRID = ("grid", "pool", "fopru")
# Nothing else may act inside the decoder, or on its cache, beside these.
ALONE_INSIDE = ("lazyllm", "yopo", "pmod", "gamma_mod", "mue", "random_ltd")


def draw_pruners(rng: Random, shape: Architecture) -> list[Pruner]:
    """One method, or two or three that may follow each other."""
    if rng.random() < 0.05:
        name = rng.choice([name for place in PLACES for name in place if name not in TRAINED])
        return [create(name, keep=1.0)]
    if rng.random() < 0.02:
        return [vtprune.NoPruning()]
    names = _names(rng, encoder=isinstance(shape.feature, int))
    return [_create(rng, shape, name, share) for name, share in zip(names, _shares(rng, names), strict=True)]


def _names(rng: Random, *, encoder: bool) -> list[str]:
    """Methods that may follow each other; whether the model takes those that act in its encoder."""
    places = [place for place in PLACES if encoder or place is not ENCODER]
    count = rng.choices([1, 2, 3], [64, 30, 6])[0]
    if count == 1:
        return [rng.choice([name for place in places for name in place])]
    names: list[str] = []
    for order in sorted(rng.sample(range(len(places)), count)):
        fits = [name for name in places[order] if not names or name not in WHOLE_GRID]
        if places[order] is CACHE and names[-1] in ALONE_INSIDE:
            continue
        names.append(rng.choice(fits))
    return names


def _shares(rng: Random, names: list[str]) -> Iterator[int | float | None]:
    """What each method is to keep: counts, fractions or, where it is alone, its own setting; less and less."""
    several = len(names) > 1
    share = rng.uniform(0.55, 0.9) if several else rng.uniform(0.08, 0.95)
    for name in names:
        if not several and rng.random() < 0.1:
            yield None
        elif not several and rng.random() < 0.35 and not _spreads(name):
            yield rng.randint(1, 20)
        else:
            yield round(max(share, 0.35) if _spreads(name) and not several else share, 3)
        share *= rng.uniform(0.5, 0.8)


def _spreads(name: str) -> bool:
    """Whether what it keeps is a mean over layers, which may be out of reach."""
    return name in DECODER or name in ("vflowopt", "mustdrop", "vscan")


def _create(rng: Random, shape: Architecture, name: str, keep: int | float | None) -> Pruner:
    return create(name, **{"keep": keep, **draw_options(rng, shape, name, keep)})


def draw_options(rng: Random, shape: Architecture, name: str, keep: int | float | None) -> Options:
    """Options of a method, beside what it is to keep."""
    return OPTIONS[name](rng, shape, keep) if name in OPTIONS else {}


def _start(rng: Random, shape: Architecture, keep: int | float | None) -> int:
    """A layer before which a drop leaves room for `keep`."""
    share = keep if isinstance(keep, float) else 0.5
    return rng.randint(1, max(1, min(shape.depth - 1, int(shape.depth * share * 0.6))))


def _layers(rng: Random, shape: Architecture, keep: int | float | None, most: int = 3) -> tuple[int, ...]:
    """Rising layers before which tokens drop."""
    start = _start(rng, shape, keep)
    later = range(start + 1, shape.depth)
    return (start, *sorted(rng.sample(later, min(len(later), rng.randint(0, most - 1)))))


def _staged(rng: Random, shape: Architecture, keep: int | float | None, several: tuple[str, ...]) -> Options:
    """A schedule and layers; `several`: the schedules that take more than one layer."""
    if keep is None or rng.random() < 0.4:
        return {}
    schedule = rng.choice(["constant", "linear", "shifted_cosine", "steps", "entropy", *several])
    layers = _layers(rng, shape, keep, 3 if schedule in ("steps", "entropy", *several) else 1)
    return {"schedule": schedule, "layers": layers if rng.random() < 0.8 else None}


def _released(rng: Random) -> str:
    return "released" if rng.random() < 0.25 else "paper"


def _fastv(rng: Random, shape: Architecture, keep: int | float | None) -> Options:
    return _staged(rng, shape, keep, ()) if keep is not None else {"ratio": round(rng.uniform(0.1, 0.9), 2)}


def _dart(rng: Random, shape: Architecture, keep: int | float | None) -> Options:
    options = _fastv(rng, shape, keep)
    if options.get("schedule") == "entropy":
        options["schedule"] = "steps"
    return {**options, "pivots": rng.randint(1, 5), "text_pivots": rng.randint(0, 5), "variant": _released(rng)}


def _pyramid_drop(rng: Random, shape: Architecture, keep: int | float | None) -> Options:
    return {**_staged(rng, shape, keep, ()), "variant": _released(rng)}


def _sparsevlm(rng: Random, shape: Architecture, keep: int | float | None) -> Options:
    # 14 heads that the rotary embedding leaves apart are chosen in version 2; it works with fewer as well.
    options = {**_staged(rng, shape, keep, ("published",)), "variant": _released(rng)}
    options["version"] = rng.choice([1, 1, 2])
    options["recycle"] = rng.choice([None, True, False])
    if options["version"] == 1 and options.get("schedule", "published") in ("published", "steps"):
        options["adaptive_rank"] = rng.random() < 0.3
        options["scale"] = round(rng.uniform(0.5, 4), 1) if options["adaptive_rank"] else None
    return options


def _lazyllm(rng: Random, shape: Architecture, keep: int | float | None) -> Options:
    return _staged(rng, shape, keep, ()) if keep is not None else {"ratio": round(rng.uniform(0.1, 0.6), 2)}


def _vtw(rng: Random, shape: Architecture, keep: int | float | None) -> Options:
    return {"layer": rng.randrange(1, shape.depth)} if keep is None else {}


def _spatten(rng: Random, shape: Architecture, keep: int | float | None) -> Options:
    options: Options = {"accumulate": rng.random() < 0.7}
    if keep is None:
        others: list[Options] = [{}, {"last": round(rng.uniform(0.1, 0.9), 2)}, {"schedule": "gpt2_medium"}]
        return {**options, **rng.choice(others)}
    staged = _staged(rng, shape, keep, ())
    return options if staged.get("schedule") == "entropy" else {**options, **staged}


def _yopo(rng: Random, shape: Architecture, keep: int | float | None) -> Options:
    # Fewer channels are no mask of whole tokens.
    return {**_vtw(rng, shape, keep), "mlp": 1}


def _pmod(rng: Random, shape: Architecture, keep: int | float | None) -> Options:
    options: Options = {"variant": rng.choice(["paper", "released"]), "norm": rng.choice(["tanh", "sigmoid"])}
    if keep is not None and rng.random() < 0.5:
        options["schedule"] = rng.choice(["shifted_cosine", "linear", "constant"])
        options["layers"] = (_start(rng, shape, keep),)
    elif keep is None:
        options["decay"] = rng.choice(["cosine", "linear"])
    options["reads_skipped"] = rng.random() < 0.3
    return options


def _mue(rng: Random, shape: Architecture, keep: int | float | None) -> Options:
    return {"theta": round(rng.uniform(0.5, 1), 2)} if keep is None else {}


def _random_ltd(rng: Random, shape: Architecture, keep: int | float | None) -> Options:
    options: Options = {"at_test": rng.random() < 0.9, "seed": rng.randrange(100)}
    if keep is None:
        options["skip"] = round(rng.uniform(0.1, 0.9), 2)
    return options


def _gamma_mod(rng: Random, shape: Architecture, keep: int | float | None) -> Options:
    options: Options = {"variant": _released(rng)}
    if options["variant"] == "released":
        options["threshold"] = None if keep is not None else round(rng.uniform(0.2, 0.6), 2)
    elif keep is None:
        options["skip"] = round(rng.uniform(0.2, 0.8), 2)
        options["layers"] = tuple(sorted(rng.sample(range(1, shape.depth), rng.randint(1, 4))))
    return options


def _flowcut(rng: Random, shape: Architecture, keep: int | float | None) -> Options:
    return {"stages": rng.choice([None, 1, 2]), "variant": _released(rng)}


def _visionzip(rng: Random, shape: Architecture, keep: int | float | None) -> Options:
    return {
        "contextual": rng.choice([None, round(rng.uniform(0, 0.6), 2)]), "cls": rng.random() < 0.6,
        "merge": rng.random() < 0.8, "variant": _released(rng),
    }  # fmt: skip


def _turbo(rng: Random, shape: Architecture, keep: int | float | None) -> Options:
    options: Options = {"merge": rng.random() < 0.8, "alpha": round(rng.uniform(0, 6), 1)}
    if keep is None:
        options["r"] = rng.randint(1, 4)
    return options


def _tome(rng: Random, shape: Architecture, keep: int | float | None) -> Options:
    options: Options = {"proportional": rng.random() < 0.7}
    if keep is None:
        options["r"] = rng.choice([rng.randint(1, 4), (3, 1)])
        options["inflect"] = rng.choice([-1.0, 0.0, 0.5]) if isinstance(options["r"], int) else 0.0
    return options


def _mustdrop(rng: Random, shape: Architecture, keep: int | float | None) -> Options:
    options: Options = {
        "merge": rng.random() < 0.6, "merge_threshold": round(rng.uniform(0.1, 0.9), 2),
        "key_share": round(rng.uniform(0, 0.4), 2), "cut_cache": rng.random() < 0.7, "variant": _released(rng),
    }  # fmt: skip
    if rng.random() < 0.4:
        options["layers"] = _layers(rng, shape, keep)
    if keep is None:
        options["global_threshold"] = options["individual_threshold"] = round(rng.uniform(0.01, 0.2), 3)
    return options


def _vscan(rng: Random, shape: Architecture, keep: int | float | None) -> Options:
    return {
        "left": round(rng.uniform(0.1, 1), 2), "local": round(rng.uniform(0, 1), 2),
        "window": rng.choice([None, 1, 2, 3]), "merge": rng.random() < 0.8, "variant": _released(rng),
    }  # fmt: skip


def _vflowopt(rng: Random, shape: Architecture, keep: int | float | None) -> Options:
    options: Options = {"recycle": rng.random() < 0.7, "variant": _released(rng)}
    options["alpha"] = round(rng.uniform(-0.5, 2), 1)
    if rng.random() < 0.5:
        options["cell"] = round(rng.uniform(1.5, 4), 1)
    if rng.random() < 0.4 and shape.depth > 6:
        options["layers"] = (rng.randint(1, 3), rng.randint(4, shape.depth - 1))
    return options


def _holov(rng: Random, shape: Architecture, keep: int | float | None) -> Options:
    variant = _released(rng)
    tau = 1.0 if variant == "released" else rng.choice([1.0, 0.5])
    return {"alpha": rng.choice([None, 0.5, 2.0]), "tau": tau, "variant": variant}


def _gemfilter(rng: Random, shape: Architecture, keep: int | float | None) -> Options:
    layer = rng.choice([None, rng.randrange(shape.depth)])
    return {"layer": layer, "pooling": rng.choice(["sequence", "grid"]), "variant": _released(rng)}


def _covipal(rng: Random, shape: Architecture, keep: int | float | None) -> Options:
    return {"width": 16, "heads": 2, "blocks": rng.randint(1, 2), "stage": rng.choice(["task", "guide"])}


def _d2o(rng: Random, shape: Architecture, keep: int | float | None) -> Options:
    options: Options = {"merge": rng.random() < 0.6, "variant": _released(rng)}
    options["text"] = not isinstance(keep, int) and rng.random() < 0.2
    return options


OPTIONS: dict[str, Callable[[Random, Architecture, int | float | None], Options]] = {
    "random": lambda rng, shape, keep: {"seed": rng.randrange(100)},
    "fopru": lambda rng, shape, keep: {"strategy": rng.choice(["rank", "rank", "row"]), "softmax": rng.random() < 0.7},
    "divprune": lambda rng, shape, keep: {"variant": _released(rng)},
    "cdpruner": lambda rng, shape, keep: {"variant": _released(rng)},
    "fastv": _fastv,
    "dart": _dart,
    "pyramid_drop": _pyramid_drop,
    "sparsevlm": _sparsevlm,
    "lazyllm": _lazyllm,
    "spatten": _spatten,
    "yopo": _yopo,
    "vtw": _vtw,
    "pmod": _pmod,
    "gamma_mod": _gamma_mod,
    "mue": _mue,
    "random_ltd": _random_ltd,
    "flowcut": _flowcut,
    "visionzip": _visionzip,
    "vispruner": lambda rng, shape, keep: {
        "important_ratio": rng.choice([0.5, 1.0, round(rng.random(), 2)]),
        "variant": _released(rng),
    },
    "prumerge": lambda rng, shape, keep: {"plus": rng.random() < 0.5, "merge": rng.random() < 0.8},
    "turbo": _turbo,
    "tome": _tome,
    "mustdrop": _mustdrop,
    "vscan": _vscan,
    "vflowopt": _vflowopt,
    "holov": _holov,
    "gemfilter": _gemfilter,
    "covipal": _covipal,
    "d2o": _d2o,
}
