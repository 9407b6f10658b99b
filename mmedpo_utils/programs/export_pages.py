"""The notebooks as HTML pages that need no network: ``mmedpo pages``.

Figures, tables and the browser's views are in the pages themselves, and formulas are MathML, which
browsers draw without a script. What asks a kernel is its sentence.
"""

from __future__ import annotations

import argparse
import base64
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from jinja2 import DictLoader
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbformat import NotebookNode

from ..base.errors import InputError, exit_status
from ..base.files import atomic_write
from ..base.settings import repository_root

# The stock page with everything left out that it would fetch.
PAGE = """{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block jupyter_widgets -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
"""
FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\\$\w])\$(?=\S)([^$\n]+?)(?<=\S)\$(?![$\w])", re.S)
LINK = re.compile(r"\]\((\w+)\.ipynb(#[^)]*)?\)")
DRAWING = re.compile(r"\.\./figures/(\w+\.svg)")
WIDGET = "application/vnd.jupyter.widget-view+json"


def with_mathml(text: str) -> str:
    """Markdown whose formulas, ``$...$`` and ``$$...$$``, are MathML; code stays as it is."""
    parts = re.split(r"(```.*?```|`[^`]*`)", text, flags=re.S)
    for place in range(0, len(parts), 2):
        parts[place] = FORMULA.sub(_mathml, parts[place])
    return "".join(parts)


def _mathml(found: re.Match) -> str:
    block, inline = found.groups()
    return convert(block or inline, display="block" if block else "inline")


def page_of(notebook: NotebookNode, title: str) -> str:
    """An executed notebook, which is changed on the way, as one HTML page."""
    notebook.metadata.pop("widgets", None)
    notebook.metadata["title"] = title
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            text = LINK.sub(r"](\1.html\2)", with_mathml(cell.source))
            # A drawing beside the notebooks would be elsewhere from a page.
            cell.source = DRAWING.sub(_embedded, text)
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET, None)
    loader = DictLoader({"page.html.j2": PAGE})
    exporter = HTMLExporter(extra_loaders=[loader], template_file="page.html.j2")
    body, _ = exporter.from_notebook_node(notebook)
    return body


def _embedded(found: re.Match) -> str:
    drawing = (repository_root() / "figures" / found[1]).read_bytes()
    return f"data:image/svg+xml;base64,{base64.b64encode(drawing).decode()}"


def _notebooks() -> Path:
    return repository_root() / "notebooks"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: write one page a notebook. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--notebooks", type=Path, default=_notebooks(), help="folder of the executed notebooks"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/pages"), help="folder of the pages"
    )
    options = parser.parse_args(arguments)

    def action() -> None:
        paths = sorted(options.notebooks.glob("[0-9]*.ipynb"))
        if not paths:
            raise InputError(
                f"{options.notebooks}: holds no notebook; give the folder of the executed ones"
            )
        for path in paths:
            notebook = nbformat.read(path, 4)
            with atomic_write(options.output / f"{path.stem}.html") as temporary:
                temporary.write_text(page_of(notebook, path.stem), encoding="utf-8")
            print(f"written: {options.output / path.stem}.html")

    return exit_status(action)


if __name__ == "__main__":
    sys.exit(main())
