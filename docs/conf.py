"""How Sphinx builds the site."""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pyro_nondiff

# The pictures are drawn by a module beside this one, of numbers that the test-suite has.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

project = "pyro_nondiff"
author = "The pyro_nondiff developers"
project_copyright = author
version = release = pyro_nondiff.__version__

extensions = [
    "gallery",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "pictures",
]
exclude_patterns = ["_build", "jupyter_execute"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
# A tutorial takes minutes or hours: its page shows what its last full run found.
nb_execution_mode = "off"

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"pyro_nondiff {release}"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#b5441c", "color-brand-content": "#b5441c"},
    "dark_css_variables": {"color-brand-primary": "#f29066", "color-brand-content": "#f29066"},
}

napoleon_numpy_docstring = False
autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": True}
# torch's and Pyro's docstrings are written in other formats.
autodoc_inherit_docstrings = False
maximum_signature_line_length = 80

# Docstrings are tested by pytest, each from its own seed. Here, what the pages themselves hold.
doctest_test_doctest_blocks = ""
doctest_global_setup = "import torch\ntorch.manual_seed(0)"

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Links into other projects need the network: only the published site has them.
intersphinx_mapping = (
    {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "pyro": ("https://docs.pyro.ai/en/stable", None),
    }
    if os.environ.get("READTHEDOCS")
    else {}
)
nitpick_ignore_regex = [
    # Documented by other projects, and not to be found without the network.
    (r"py:.*", r"(torch|pyro|numpy)(\..*)?"),
    (r"py:.*", r"(abc|collections|contextlib|dataclasses|types|typing|pathlib)\..*"),
]

ROOMS = [
    "infer",
    "estimators",
    "distributions",
    "ops",
    "handlers",
    "nn",
    "noise",
    "diagnostics",
    "testing",
    "errors",
]


def public_names() -> dict[str, str]:
    """Where each public name is documented, by its own name and by where it is defined."""
    names = {}
    for room in ROOMS:
        module = importlib.import_module(f"pyro_nondiff.{room}")
        for name in module.__all__:
            thing = getattr(module, name)
            documented = names[name] = f"{module.__name__}.{name}"
            if hasattr(thing, "__qualname__"):
                names[f"{thing.__module__}.{thing.__qualname__}"] = documented
    return names


def resolve_public_name(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """Resolve a reference to a public name that does not say which room exports it."""
    if node.get("refdomain") != "py":
        return None
    target, members = node["reftarget"], ""
    while target and target not in PUBLIC:
        target, _, member = target.rpartition(".")
        members = f".{member}{members}"
    if not target:
        return None
    return env.domains["py"].resolve_xref(
        env,
        node["refdoc"],
        app.builder,
        node["reftype"],
        PUBLIC[target] + members,
        node,
        contnode,
    )


def readable_signature(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: Any
) -> tuple[str | None, Any]:
    """Write the default of a dataclass's field that has a factory as Python can parse it."""
    return (signature and signature.replace("<factory>", "...")), returns


def public_bases(app: Any, name: str, obj: Any, options: Any, bases: list[Any]) -> None:
    """Show the bases of a private base instead of it."""
    found: list[Any] = []
    while bases:
        base = bases.pop(0)
        path = f"{base.__module__}.{base.__qualname__}"
        if base.__module__.startswith("pyro_nondiff.") and path not in PUBLIC:
            bases[:0] = base.__bases__
        else:
            found.append(base)
    bases += [
        base
        for base in dict.fromkeys(found)
        if not any(other is not base and issubclass(other, base) for other in found)
    ]


def keep_summary(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Remember a property's docstring, in which Napoleon takes a colon for the end of a type."""
    if what == "property":
        SUMMARIES[name] = list(lines)


def restore_summary(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Undo what Napoleon did to a property: its type is in its annotation."""
    if what == "property":
        lines[:] = SUMMARIES.pop(name)


PUBLIC = public_names()
SUMMARIES: dict[str, list[str]] = {}


def setup(app: Any) -> None:
    """Connect what this file adds to Sphinx."""
    app.connect("autodoc-process-signature", readable_signature)
    app.connect("autodoc-process-bases", public_bases)
    app.connect("autodoc-process-docstring", keep_summary, priority=400)
    app.connect("autodoc-process-docstring", restore_summary, priority=600)
    app.connect("missing-reference", resolve_public_name)
