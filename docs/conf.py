"""How Sphinx builds the site."""

import importlib
import os
from typing import Any

import pyro_nondiff

project = "pyro_nondiff"
author = "The pyro_nondiff developers"
project_copyright = author
version = release = pyro_nondiff.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
myst_heading_anchors = 3

html_theme = "furo"
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


PUBLIC = public_names()


def setup(app: Any) -> None:
    """Connect what this file adds to Sphinx."""
    app.connect("autodoc-process-signature", readable_signature)
    app.connect("missing-reference", resolve_public_name)
