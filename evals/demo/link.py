"""A link that holds what was chosen on the page: model, method, keep, options and question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vtprune.evals.demo.asking import LONGEST_QUESTION
from vtprune.evals.demo.models import Models
from vtprune.evals.demo.options import LONGEST, as_trained, choosable_on

# What the page begins with.
METHOD, KEEP, QUESTION = "flowcut", 25.0, "what is written on the yellow square?"
# The same names in the page's own JavaScript.
NAMES = ("model", "method", "keep", "options", "question")

# Writes the address of the page anew, and answers with it.
WRITE = """(...values) => {
  const query = new URLSearchParams();
  %s.forEach((name, place) => { if (values[place] !== "" && values[place] != null) query.set(name, values[place]); });
  const address = `${location.origin}${location.pathname}?${query}`;
  history.replaceState(null, "", address);
  return address;
}""" % list(NAMES)  # noqa: UP031


@dataclass(frozen=True)
class Choice:
    """What the page stands at."""

    model: str
    method: str
    keep: float
    options: str
    question: str


def read(query: Mapping[str, str], models: Models) -> Choice:
    """What a link says; whatever in it cannot be is left at what the page begins with."""
    model = query.get("model", "")
    model = model if model in models.names else models.names[0]
    known = [*choosable_on(models[model]), as_trained(models[model])]
    method = query.get("method", "")
    method = method if method and method in known else default_method(models, model)
    try:
        keep = float(query.get("keep", KEEP))
    except ValueError:
        keep = KEEP
    keep = keep if 1 <= keep <= 100 else KEEP
    question = query.get("question", QUESTION)[:LONGEST_QUESTION]
    return Choice(model, method, keep, options=query.get("options", "")[:LONGEST], question=question)


def default_method(models: Models, model: str) -> str:
    """What a model was trained with, else METHOD."""
    return as_trained(models[model]) or METHOD
