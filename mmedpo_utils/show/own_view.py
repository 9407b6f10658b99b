"""Your own film and your own question: what MedKLIP and the Med-LVLM make of them, on this
machine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import ipywidgets as widgets
import torch
from IPython.display import display
from PIL import Image

from ..base.errors import InputError
from ..base.images import open_image
from ..lvlm import MedLVLM
from ..medklip import MedKLIP
from .answer_view import ShownQuestion, answer_view
from .attention_view import medklip_view

PROMISE = (
    "The film is read by the kernel of this notebook. No copy of it is written, and no other "
    "machine is asked. A notebook that you save with its outputs may hold the film."
)


class OwnView(widgets.VBox):
    """The form of `own_view`; where no kernel runs, a sentence stands in its place."""

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        text = "Your own film: run this cell in a live notebook to choose a film and ask about it."
        bundle = super()._repr_mimebundle_(**options) or {}
        return bundle | {"text/plain": text, "text/html": f"<p>{text}</p>"}


def own_view(
    models: Mapping[str, MedLVLM],
    medklip: MedKLIP,
    max_new_tokens: int,
) -> OwnView:
    """Choose a film (PNG, JPEG, DICOM and others), type a question, and see what both networks
    answer and where they look.

    Args:
        models: one or two Med-LVLMs by name, as for `answer_view`.
        max_new_tokens: the longest answer, in tokens.
    """
    path = widgets.Text(description="path", placeholder="film.png, or upload one")
    upload = widgets.FileUpload(description="upload", multiple=False)
    question = widgets.Text("Is there a nodule?", description="question")
    ask = widgets.Button(description="ask")
    shown = widgets.Output()

    def look(_: Any) -> None:
        shown.clear_output(wait=True)
        with shown:
            try:
                film, name = _opened(path.value.strip(), upload.value)
                if not question.value.strip():
                    raise InputError("no question: type one")
            except InputError as error:
                print(error)  # as text: a file's name is never read as HTML
                return
            with torch.inference_mode():
                output = medklip(medklip.preprocess([film]))
            display(medklip_view([film], output, [name]).live())
            asked = [ShownQuestion(film, name, question.value)]
            display(answer_view(models, asked, max_new_tokens).live())

    ask.on_click(look)
    form = widgets.HBox([path, upload, question, ask], layout={"flex_flow": "row wrap"})
    return OwnView([widgets.HTML(PROMISE), form, shown])


def _opened(path: str, uploaded: tuple[Mapping[str, Any], ...]) -> tuple[Image.Image, str]:
    """The film and its name; a path that is given comes before an upload."""
    if path:
        return open_image(path), PurePath(path).name
    if not uploaded:
        raise InputError("no film: give the path of an image file, or upload one")
    name = PurePath(str(uploaded[0]["name"])).name
    # The ending alone is kept of the name: it tells a DICOM file without a preamble.
    ending = ".dcm" if name.lower().endswith((".dcm", ".dicom")) else ""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"film{ending}"
        file.write_bytes(bytes(uploaded[0]["content"]))
        try:
            return open_image(file), name
        except InputError as error:
            raise InputError(str(error).replace(str(file), name)) from error
