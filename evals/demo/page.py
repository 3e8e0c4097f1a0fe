"""The page: what is chosen on the left, four ways to look at it on the right."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from vtprune.errors import VTPruneError
from vtprune.evals.demo import link
from vtprune.evals.demo.failures import FEWEST, MOST
from vtprune.evals.demo.handlers import COMPARED, Handlers, frame
from vtprune.evals.demo.models import Models
from vtprune.evals.demo.options import Kind, Option, about, as_trained, changed, choosable_on, options_of
from vtprune.evals.demo.requests import Sentence
from vtprune.loading.prompts import takes_videos
from vtprune.method.facts import ModelFacts
from vtprune.method.texts import parse_options

HERE = Path(__file__).parent
VIEW: dict[str, Any] = {
    "html_template": (HERE / "view.html").read_text(encoding="utf-8"),
    "css_template": (HERE / "view.css").read_text(encoding="utf-8"),
    "js_on_load": (HERE / "view.js").read_text(encoding="utf-8"),
}
TITLE = "vtprune: see what a model still sees"
ABOUT = f"""# {TITLE}
A vision-language model reads a picture, or each frame of a video, as a grid of patches. A pruner lets some of them go:
choose a method and how much it may keep, ask a question, and see what is left, what it costs and whether the answer is
still right."""
# Never in the programs' interface, and never waiting in the queue.
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
LIGHT: dict[str, Any] = {**PRIVATE, "queue": False, "show_progress": "hidden"}


def build(models: Models, examples: Sequence[tuple[str, str]], folder: Path, *, workers: int) -> gr.Blocks:
    """The page for these models; examples: pictures with a question; folder: where downloads are written; workers: how
    many visitors are served at once."""
    handlers = Handlers(models, folder)
    # What computes shares one queue.
    shared = {**PRIVATE, "show_progress": "minimal", "concurrency_id": "model", "concurrency_limit": workers}
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(300, 900)) as page:
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                inputs = _inputs(page, models, examples)
            with gr.Column(scale=3, min_width=320), gr.Tabs():
                with gr.Tab("Ask"):
                    _ask_tab(handlers, inputs, shared)
                with gr.Tab("Compare"):
                    _compare_tab(handlers, inputs, shared)
                with gr.Tab("Curve"):
                    _curve_tab(handlers, inputs, shared)
                with gr.Tab("Failures", visible=any(models[name].bundled for name in models.names)):
                    _failures_tab(handlers, inputs, shared)
        go, answer = gr.Button(visible=False), gr.JSON(visible=False)
        go.click(handlers.answer, inputs, answer, api_name="answer", concurrency_id="model", concurrency_limit=workers)
    return page


def _inputs(page: gr.Blocks, models: Models, examples: Sequence[tuple[str, str]]) -> list[Any]:
    """Picture, question, model, method, keep, options and video, in this order."""
    start = link.read({}, models)
    image = gr.Image(
        examples[0][0],
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        label="Picture",
        height=260,
        elem_id="picture",
    )
    video = gr.Video(
        sources=["upload"],
        label="Video, in place of the picture",
        height=260,
        visible=any(takes_videos(models[name].processor) for name in models.names),
        elem_id="video",
    )
    question = gr.Textbox(
        start.question, label="Question", info="What to ask about the picture; Enter asks.", elem_id="question"
    )
    method = gr.Dropdown(
        _methods(models, start.model),
        value=start.method,
        label="Method",
        info="How patches are chosen, merged or routed.",
        elem_id="method",
    )
    told = gr.Markdown(_about(start.method, start.model, models))
    keep = gr.Slider(
        1,
        100,
        value=start.keep,
        step=1,
        label="Keep, % of the patches",
        info="Counted as the method counts it: some take the mean over the decoder's layers.",
        elem_id="keep",
    )
    model = gr.Dropdown(
        models.names,
        value=start.model,
        label="Model",
        info="Which model answers.",
        visible=len(models.names) > 1,
        elem_id="model",
    )
    with gr.Accordion("Options", open=False):
        options = gr.Textbox(
            "",
            label="All options",
            info="What differs from the method's own settings, as name=value with commas between.",
            elem_id="options",
        )
        # What the controls are of, in one piece: model, method and options that are to be shown one by one. Read from
        # three components they could be of different moments, and those of the earlier one be drawn last. No State, of
        # whose changes gradio tells the browser through the queue alone.
        shown = gr.Textbox("", visible="hidden")
        _controls(models, shown, options=options)
    with gr.Accordion("Other pictures and questions", open=False):
        gr.Examples([list(one) for one in examples], [image, question], label="Examples", cache_examples=False)
    with gr.Accordion("A link to this page as it stands", open=False):
        address = gr.Textbox(label="Link", info="Holds all but the picture.", buttons=["copy"], elem_id="link")

    _as_it_comes(image, video)
    _as_it_comes(model, method, keep)

    def switched(name: str, how: str) -> tuple[Any, ...]:
        if name not in models.names:
            raise Sentence(f"model: this page has {', '.join(models.names)}")
        known = _methods(models, name)
        own = how if how in known and not as_trained(models[name]) else link.default_method(models, name)
        return gr.Dropdown(choices=known, value=own), _about(own, name, models), "", _shown(name, own)

    def opened(request: gr.Request) -> tuple[Any, ...]:
        query = dict(request.query_params)
        found = link.read(query, models)

        def told_by(names: tuple[str, ...], value: Any) -> Any:
            # The page begins with what no link says, and a visitor may have changed that before this is answered.
            return value if any(name in query for name in names) else gr.skip()

        return (
            told_by(("model",), found.model),
            told_by(("model", "method"), gr.Dropdown(choices=_methods(models, found.model), value=found.method)),
            told_by(("keep",), found.keep),
            told_by(("options",), found.options),
            _shown(found.model, found.method, found.options),
            told_by(("question",), found.question),
            told_by(("model", "method"), _about(found.method, found.model, models)),
        )

    model.input(switched, [model, method], [method, told, options, shown], **LIGHT)
    method.change(lambda how, name: _about(how, name, models), [method, model], told, **LIGHT)
    method.input(lambda name, how: ("", _shown(name, how)), [model, method], [options, shown], **LIGHT)
    # What was typed stands in the controls, too.
    options.blur(_shown, [model, method, options], shown, **LIGHT)
    page.load(opened, None, [model, method, keep, options, shown, question, told], **LIGHT)
    held: list[Any] = [model, method, keep, options, question]
    gr.on([one.change for one in held], None, held, address, js=link.WRITE, **LIGHT)
    return [image, question, model, method, keep, options, video]


def _as_it_comes(*components: Any) -> None:
    """Hands what a visitor sends to the handlers as it comes: they refuse what cannot be with a sentence that says
    what would be right, and nothing decodes an upload before the one door for pictures (`picture_of`)."""
    for one in components:
        one.preprocess = _path_of if isinstance(one, gr.Image | gr.Video) else lambda payload: payload


def _path_of(payload: Any) -> str | None:
    """The path of an upload in the temporary folder. A request may name any path: what lies elsewhere, or is no file,
    is nobody's upload."""
    if payload is None or not payload.path:
        return None
    path, folder = os.path.realpath(payload.path), os.path.realpath(get_upload_folder())
    if os.path.commonpath([path, folder]) != folder or not os.path.isfile(path):
        raise Sentence("image: this file is not there, or no longer; choose it again")
    return path


def _methods(models: Models, name: str) -> list[str]:
    own = as_trained(models[name])
    return [*([own] if own else []), *choosable_on(models[name])]


def _about(method: str, name: str, models: Models) -> str:
    """What the page says below the method."""
    trained = models[name].trained if name in models.names else None
    if trained is not None and method == as_trained(models[name]):
        return f"{about(trained.method)} It keeps what it was trained to keep, whatever is chosen below."
    return about(method) if name in models.names and method in choosable_on(models[name]) else ""


def _shown(name: str, how: str, options: str | None = "") -> str:
    """A model, a method and the text of its options, as one text."""
    return json.dumps([name, how, options or ""])


def _controls(models: Models, shown: Any, *, options: Any) -> None:
    """A control for each option of the method that is chosen, which write into the text of all options; shown: what
    `_shown` makes of these."""

    @gr.render(shown, triggers=[shown.change], queue=False)
    def draw(chosen: str) -> None:
        name, how, linked = json.loads(chosen)
        if how == as_trained(models[name]):
            gr.Markdown("As it was trained: nothing is left to choose, and keep does not count.")
            return
        facts = models[name].facts
        found = options_of(how, facts)
        if not found:
            gr.Markdown("This method has no options.")
        said = _said(linked)
        controls = [_control(option, said.get(option.name, option.value)) for option in found]

        for option, control in zip(found, controls, strict=True):
            write = functools.partial(_moved, how, facts, option.name)
            control.input(write, [options, control], options, **LIGHT)


def _moved(method: str, facts: ModelFacts, name: str, text: str, value: Any) -> str:
    """The text of all options once a control was moved."""
    return changed(method, facts, text or "", name=name, value=value)


def _said(options: str) -> dict[str, Any]:
    """The options of a link by name; what cannot be read is told when it is asked with."""
    try:
        return {
            name: ", ".join(map(str, value)) if isinstance(value, tuple) else value
            for name, value in parse_options(options)
        }
    except VTPruneError:
        return {}


def _control(option: Option, value: Any) -> Any:
    """The control of one option at a value, for a visitor to change."""
    common: dict[str, Any] = {"label": option.name.replace("_", " "), "info": option.help, "interactive": True}
    if option.kind is Kind.SLIDER:
        return gr.Slider(option.low, option.high, value=_within(option, value), step=option.step, **common)
    if option.kind is Kind.SWITCH:
        return gr.Checkbox(bool(value), **common)
    if option.kind is Kind.CHOICE:
        named = [("automatic" if one is None else str(one), one) for one in option.choices]
        return gr.Dropdown(named, value=value if value in option.choices else option.value, **common)
    if option.kind is Kind.NUMBER:
        # A number that is not given would show as 0.
        shown = "" if value is None else f"{value:g}" if isinstance(value, int | float) else str(value)
        return gr.Textbox(shown, placeholder="automatic", **common)
    return gr.Textbox(str(value or ""), **common)


def _within(option: Option, value: Any) -> float:
    """Where a slider stands."""
    known = isinstance(value, int | float) and option.low <= value <= option.high
    return float(value if known else option.value)


def _buttons(name: str, elem: str) -> tuple[Any, Any]:
    """What starts and what cancels."""
    with gr.Row():
        return (
            gr.Button(name, variant="primary", elem_id=f"{elem}-go"),
            gr.Button("Cancel", variant="stop", elem_id=f"{elem}-cancel"),
        )


def _cancels(button: Any, event: Any, status: Any) -> None:
    button.click(lambda: "Cancelled.", None, status, cancels=[event], **LIGHT)


def _ask_tab(handlers: Handlers, inputs: list[Any], shared: dict[str, Any]) -> None:
    go, halt = _buttons("Ask", "ask")
    status = gr.Markdown("", elem_id="ask-status")
    with gr.Row():
        plain = gr.Textbox(label="Unpruned answer", interactive=False, elem_id="unpruned")
        pruned = gr.Textbox(label="Pruned answer", interactive=False, elem_id="pruned")
    view = gr.HTML(None, elem_id="view", **VIEW)
    numbers = gr.Markdown(elem_id="numbers")
    with gr.Row():
        png = gr.DownloadButton("Download the picture (PNG)", interactive=False, elem_id="png")
        data = gr.DownloadButton("Download everything (JSON)", interactive=False, elem_id="json")
    with gr.Accordion("The same in Python", open=False):
        code = gr.Code(show_label=False, language="python", interactive=False, elem_id="code")
    outputs = [status, plain, pruned, view, numbers, png, data, code]
    _cancels(halt, gr.on([go.click, inputs[1].submit], handlers.ask, inputs, outputs, **shared), status)


def _compare_tab(handlers: Handlers, inputs: list[Any], shared: dict[str, Any]) -> None:
    image, question, model, _, keep, _, video = inputs
    methods = gr.Dropdown(
        list(dict.fromkeys(one for name in handlers.models.names for one in choosable_on(handlers.models[name]))),
        value=["flowcut", "pyramid_drop", "grid"],
        multiselect=True,
        max_choices=COMPARED,
        label="Methods",
        info=f"Up to {COMPARED} side by side, each with its own settings, at the keep that is chosen above.",
        elem_id="methods",
    )
    _as_it_comes(methods)
    go, halt = _buttons("Compare", "compare")
    numbers = gr.Markdown("", elem_id="compare-numbers")
    views = []
    with gr.Row():
        for place in range(COMPARED):
            # Columns stand below each other where a screen is narrow.
            with gr.Column(min_width=220):
                views.append(gr.HTML(None, elem_id=f"view-{place}", **VIEW))
    given = [image, question, model, methods, keep, video]
    _cancels(halt, go.click(handlers.compare, given, [numbers, *views], **shared), numbers)


def _curve_tab(handlers: Handlers, inputs: list[Any], shared: dict[str, Any]) -> None:
    gr.Markdown(
        "The answer and how sure the model is of it, the mean probability of its tokens, from all patches to few; "
        "beside it what it then thinks of the unpruned answer."
    )
    go, halt = _buttons("Draw", "curve")
    plot = gr.LinePlot(
        frame([]),
        x="keep %",
        y="confidence",
        color="of",
        x_lim=[0, 100],
        y_lim=[0, 1],
        label="Confidence against keep",
        buttons=["export"],
        elem_id="curve",
    )
    points = gr.Markdown(elem_id="points")
    _cancels(halt, go.click(handlers.curve, inputs, [plot, points], **shared), points)


def _failures_tab(handlers: Handlers, inputs: list[Any], shared: dict[str, Any]) -> None:
    count = gr.Slider(
        FEWEST,
        MOST,
        value=60,
        step=10,
        label="Questions",
        info="How many of the drawn benchmark's are asked, unpruned and under the method.",
        elem_id="count",
    )
    go, halt = _buttons("Find failures", "failures")
    found = gr.Markdown("", elem_id="failures-status")
    gallery = gr.Gallery(
        label="Right without pruning, wrong with it", columns=3, object_fit="contain", elem_id="gallery"
    )
    given = [*inputs[2:6], count]
    _cancels(halt, go.click(handlers.failures, given, [found, gallery], **shared), found)
