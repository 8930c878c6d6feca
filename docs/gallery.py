"""Makes a page of each tutorial, and their gallery, while Sphinx builds the site.

A page is the script's own text, with the picture and the tables that its last full run left in
``tutorials/results``. Nothing is run. What is written goes to ``tutorials`` beside this file, which
git ignores.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbformat.v4 import new_markdown_cell

HERE = Path(__file__).parent
SCRIPTS = HERE.parent / "tutorials"
RESULTS = SCRIPTS / "results"
PAGES = HERE / "tutorials"

GALLERY = """# Tutorials

Each is a script of some hundred lines that runs alone, `python tutorials/01_name.py`, with
`--device cuda`, `--steps` and `--data` among its options. It needs `pip install '.[tutorials]'`,
and real data, in the folder that the environment variable `PYRO_NONDIFF_DATA` names; without it,
it takes data that scikit-learn brings along, or makes some. The tables and pictures here are those
of a full run.

::::{{grid}} 1 2 2 3
:gutter: 3

{cards}
::::

```{{toctree}}
:hidden:

{names}
```
"""

CARD = """:::{{grid-item-card}} {title}
:link: {name}
:link-type: doc
{image}
{summary}
:::
"""


SIGNS = {"<=": "≤", ">=": "≥"}


def write_pages(app: Any) -> None:
    """Write a notebook of each script, without running it, and the gallery."""
    PAGES.mkdir(exist_ok=True)
    scripts = sorted(SCRIPTS.glob("[0-9]*.py"))
    cards = [write_page(script) for script in scripts]
    names = "\n".join(script.stem for script in scripts)
    (PAGES / "index.md").write_text(GALLERY.format(cards="\n".join(cards), names=names))


def write_page(script: Path) -> str:
    """Write a script's page, and return its card."""
    notebook = jupytext.read(script, fmt="py:percent")
    text = notebook.cells[0].source
    picture = RESULTS / f"{script.stem}.png"
    image = ""
    if picture.exists():
        shutil.copy(picture, PAGES)
        notebook.cells.insert(1, new_markdown_cell(f"![What a full run shows]({picture.name})"))
        image = f":img-top: {picture.name}\n"
    found = RESULTS / f"{script.stem}.json"
    if found.exists():
        notebook.cells.append(new_markdown_cell(results(json.loads(found.read_text()))))
    notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "python"}
    nbformat.write(notebook, PAGES / f"{script.stem}.ipynb")
    title, summary = text.removeprefix("# ").split("\n\n")[:2]
    return CARD.format(title=title, name=script.stem, image=image, summary=summary)


def results(found: dict[str, Any]) -> str:
    """What a run found, in Markdown."""
    parts = ["## What a full run found"]
    for table in found["tables"]:
        parts += [f"**{table['title']}**"] if table["title"] else []
        parts.append(as_table(table["head"], table["rows"]))
    if found["claims"]:
        rows = [
            [
                claim["text"],
                f"{claim['found']:.4g}",
                f"{SIGNS[claim['sign']]} {claim['asked']:.4g}",
                "yes" if claim["holds"] else "**no**",
            ]
            for claim in found["claims"]
        ]
        parts.append(as_table(["claim", "found", "asked", "holds"], rows))
    parts.append(
        f"Trained for {found['trained']}; {found['minutes']:.0f} minutes in all on "
        f"{found['hardware']}."
    )
    return "\n\n".join(parts)


def as_table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in [head, *rows]]
    escaped.insert(1, ["---"] * len(head))
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped)


def setup(app: Any) -> dict[str, bool]:
    """Connect the pages to Sphinx."""
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True}
