"""What the site holds: code that runs, and a page and a picture for each tutorial."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
MADE = (DOCS / "_build", DOCS / "tutorials")  # by the build, of what is tested elsewhere
PAGES = [
    path
    for path in sorted(DOCS.rglob("*.*"))
    if path.suffix in (".rst", ".md") and not any(path.is_relative_to(made) for made in MADE)
]
TUTORIALS = sorted((ROOT / "tutorials").glob("[0-9]*.py"))
NOT_RUN = re.compile(r"code-block:: +python|```\{?(?:code-block\} +)?py")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_is_a_doctest(page: Path) -> None:
    assert not NOT_RUN.search(page.read_text()), "write it as doctest or testcode"


@pytest.mark.parametrize("script", TUTORIALS, ids=lambda script: script.stem)
def test_tutorial_has_what_its_page_needs(script: Path) -> None:
    text = script.read_text()
    assert text.startswith("# %% [markdown]\n# # "), "the first cell is the title, in Markdown"
    assert text.split("\n#\n")[1].startswith("# "), "a summary follows the title"
    results = ROOT / "tutorials" / "results"
    assert (results / f"{script.stem}.png").exists(), "publish a full run's picture"
    found = json.loads((results / f"{script.stem}.json").read_text())
    assert found["complete"], "publish a full run, not a short one"
    assert found["tables"]
    assert found["hardware"]


@pytest.mark.parametrize("script", TUTORIALS, ids=lambda script: script.stem)
def test_tutorial_is_short(script: Path) -> None:
    code = script.read_text()
    lines = [line for line in code.splitlines() if line and not line.lstrip().startswith("#")]
    imports = [
        node for node in ast.parse(code).body if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    imported = sum(node.end_lineno - node.lineno + 1 for node in imports)
    assert len(lines) - imported < 150, "what a reader need not see belongs in a helper"
