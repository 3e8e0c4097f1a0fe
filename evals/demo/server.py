"""The server: gradio with a queue of bounded length, a folder that is emptied, a health address and a clean stop."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from vtprune.assets import EXAMPLE_IMAGE, SHAPES_EVAL
from vtprune.console.output import is_quiet
from vtprune.errors import InputError
from vtprune.evals.demo import link
from vtprune.evals.demo.models import Models, load_models
from vtprune.files import write_bytes
from vtprune.shapes.dataset import read_eval_rows

# One question of each kind of the drawn benchmark.
EXAMPLES = 6


@dataclass(frozen=True)
class Options:
    """Where and how the page is served. queue: visitors that may wait; workers: those that are answered at once."""

    models: tuple[str, ...] = ()
    device: str | None = None
    dtype: str = "auto"
    host: str = "127.0.0.1"
    port: int = 7860
    queue: int = 32
    workers: int = 2
    share: bool = False


def examples(folder: Path, models: Models) -> list[tuple[str, str]]:
    """Pictures with a question each: the example, and drawings where a model is served that knows them."""
    found = [(str(EXAMPLE_IMAGE), link.QUESTION)]
    if not any(models[name].bundled for name in models.names):
        return found
    seen: set[str] = set()
    for row in read_eval_rows(SHAPES_EVAL):
        if row.category not in seen and len(seen) < EXAMPLES:
            seen.add(row.category)
            path = folder / f"{row.id}.png"
            write_bytes(path, row.image)
            found.append((str(path), row.question))
    return found


@contextmanager
def served(options: Options) -> Iterator[str]:
    """The page's address, as long as the block runs; then the server stops and its folder is gone.

    Raises InputError for models that cannot be loaded, and for a port that is taken.
    """
    with tempfile.TemporaryDirectory(prefix="vtprune-demo-") as place:
        folder = Path(place)
        # Gradio reads these when it is imported, and when a page is built.
        os.environ.update(GRADIO_TEMP_DIR=str(folder / "uploads"), GRADIO_ANALYTICS_ENABLED="False")

        from vtprune.evals.demo.page import build
        from vtprune.evals.demo.requests import MOST_BYTES

        models = load_models(options.models, device=options.device, dtype=options.dtype)
        page = build(models, examples(folder, models), folder, workers=options.workers)
        page.queue(max_size=options.queue)
        try:
            _, local, shared = page.launch(
                server_name=options.host,
                server_port=options.port,
                share=options.share,
                prevent_thread_lock=True,
                quiet=True,
                show_error=True,
                max_file_size=MOST_BYTES,
                ssr_mode=False,
                footer_links=["api", "settings"],
                app_kwargs={"routes": [APIRoute("/health", _health(models))]},
                theme=_theme(),
                # Words of a table are broken between letters on no screen.
                css=".prose td, .prose th { word-break: normal; overflow-wrap: normal; }",
            )
        except OSError as error:
            raise InputError(
                f"port: {options.port} on {options.host} cannot be had; give another --port, or the address of this "
                "machine as --host"
            ) from error
        try:
            yield shared or local
        finally:
            models.closing.set()
            page.close(verbose=False)


def _theme() -> Any:
    """Fonts that every machine has, and help that can be read on its ground, light or dark."""
    import gradio as gr

    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return theme.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")


def _health(models: Models) -> Callable[[], Response]:
    def health() -> Response:
        return JSONResponse({"status": "ok", "models": models.names, "answering": models.busy})

    return health


def serve(options: Options, tell: Callable[[str], Any] = print) -> None:
    """Serves until the process is told to stop (an interrupt or a termination), and logs a line a request."""
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("vtprune.demo").setLevel(logging.WARNING if is_quiet() else logging.INFO)
    stop = threading.Event()

    def leave(*_: Any) -> None:
        # While models are loaded nobody waits for the event.
        stop.set()
        if not ready:
            raise KeyboardInterrupt

    ready = False
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    with contextlib.suppress(KeyboardInterrupt), served(options) as address:
        ready = True
        tell(f"the demo is at {address}; stop it with Ctrl-C")
        stop.wait()
    tell("stopped")
