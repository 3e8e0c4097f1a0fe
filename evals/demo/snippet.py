"""A few lines of Python that do what the page did."""

from __future__ import annotations

from vtprune.evals.demo.models import Loaded
from vtprune.evals.settings import Setting
from vtprune.method.texts import Stage

LINES = """\
import vtprune
from vtprune.loading.model import load_model
{opens}
from vtprune.loading.prompts import encode, place, question

model, processor = load_model({source!r})
inputs = place(encode(processor, [question({opened}, {text!r})]), model)
vtprune.wrap(model, {method!r})
ids = model.generate(**inputs, max_new_tokens={tokens}, do_sample=False)
print(processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
print(vtprune.report(model))
"""


PICTURE = "from vtprune.loading.pictures import open_picture"
VIDEO = "from vtprune.loading.videos import open_video"


def snippet(
    loaded: Loaded, setting: Setting, text: str, *, tokens: int, picture: str = "picture.png", video: str = ""
) -> str:
    """Python for one question about a picture, or a video, that lies beside it."""
    source = f"vtprune/assets/{loaded.name}" if loaded.bundled else loaded.source
    keep = () if setting.finds_keep else (("keep", setting.keep),)
    method = source if setting.folder else Stage(setting.method, (*keep, *setting.options)).text
    opens, opened = (VIDEO, f"open_video({video!r})") if video else (PICTURE, f"open_picture({picture!r})")
    lines = LINES.format(source=source, opens=opens, opened=opened, text=text, method=method, tokens=tokens)
    if not loaded.bundled:
        return lines
    # Where the bundled models lie depends on how vtprune was installed.
    found = lines.replace(repr(source), f'str(ASSETS / "{loaded.name}")')
    return found.replace("import vtprune\n", "import vtprune\nfrom vtprune.assets import ASSETS\n", 1)
