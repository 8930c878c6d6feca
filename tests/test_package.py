"""The package as a whole: what an import does, the public names, and the rules of the house.

After a change of the public names, write the list of them again with::

    python -m tests.test_package
"""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from string import Template

import pytest

import pyro_nondiff

PACKAGE = Path(pyro_nondiff.__file__).parent
PUBLIC_API = Path(__file__).with_name("public_api.txt")
SOURCES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400

# What each room may import from the others: imports go one way.
_BASE = {"errors", "noise"}
_ENGINE = _BASE | {"distributions", "estimators", "ops"}
ALLOWED_IMPORTS = {
    "errors": set(),
    "noise": {"errors"},
    "distributions": _BASE,
    "estimators": _BASE | {"distributions"},
    "ops": _BASE,
    "infer": _ENGINE,
    "handlers": _BASE | {"distributions", "ops"},
    "nn": _BASE | {"distributions", "ops", "handlers"},
    "diagnostics": _ENGINE | {"infer"},
    "testing": _ENGINE | {"infer"},
}

IMPORT_IS_PURE = Template("""
import logging, random, sys, warnings
import numpy, pyro, pyro.distributions, pyro.infer.autoguide, pyro.optim, pyro.poutine, torch
import torch.distributions
from pyro.poutine.runtime import _PYRO_STACK

def patchable():
    names = [name for name in sys.modules if name.split(".")[0] in ("torch", "pyro")]
    for name in names:
        for key, value in list(vars(sys.modules[name] or object).items()):
            # A sub-module that is imported becomes an attribute of its package: no patch.
            if key.startswith("__") or isinstance(value, type(sys)):
                continue
            yield f"{name}.{key}", value
            if isinstance(value, type) and value.__module__ == name:
                for attribute, member in list(vars(value).items()):
                    if callable(member) or not attribute.startswith("_"):
                        yield f"{name}.{key}.{attribute}", member

def state():
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad mode": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "validation": torch.distributions.Distribution._validate_args,
        "settings": pyro.settings.get(),
        "stack": list(_PYRO_STACK),
        "params": dict(pyro.get_param_store()),
        "torch generator": torch.get_rng_state().tolist(),
        "numpy generator": numpy.random.get_state()[1].tolist(),
        "python generator": random.getstate(),
        "warning filters": list(warnings.filters),
        "log handlers": list(logging.getLogger().handlers),
    }

before, attributes = state(), dict(patchable())
for module in $modules:
    __import__(module)
$then
after, now = state(), dict(patchable())
changed = [name for name in before if before[name] != after[name]]
changed += [name for name in attributes if now.get(name) is not attributes[name]]
if changed:
    sys.exit(f"importing the package changed: {changed}")
""")

RANDOM_ORDER = Template("""
import random, sys
import pyro, torch

modules = $modules
random.Random(0).shuffle(modules)
for module in modules:
    for name in [name for name in sys.modules if name.split(".")[0] == "pyro_nondiff"]:
        del sys.modules[name]
    try:
        __import__(module)
    except ImportError as error:
        sys.exit(f"cannot import {module} first: {error}")
""")


def modules() -> list[str]:
    """The dotted names of all modules of the package."""
    walk = pkgutil.walk_packages(pyro_nondiff.__path__, "pyro_nondiff.")
    return ["pyro_nondiff", *(module.name for module in walk)]


def rooms() -> list[str]:
    """The names of the package's direct children."""
    return [name.split(".")[1] for name in modules() if name.count(".") == 1]


def public_api() -> str:
    """The public names, one a line: what the package and each of its rooms export."""
    lines = []
    for name in ["pyro_nondiff", *(f"pyro_nondiff.{room}" for room in rooms())]:
        module = importlib.import_module(name)
        lines += [f"{name}.{public}" for public in getattr(module, "__all__", ())]
    return "".join(f"{line}\n" for line in sorted(lines))


def documented(thing: object) -> bool:
    """Whether a public object has a docstring, and so has, or inherits one, each public method."""
    if not isinstance(thing, type):
        return bool(getattr(thing, "__doc__", None))
    names = [n for n in vars(thing) if not n.startswith("_") and callable(getattr(thing, n))]
    methods_documented = all(inspect.getdoc(getattr(thing, name)) for name in names)
    return bool(vars(thing).get("__doc__")) and methods_documented


def run_python(script: str) -> None:
    """Run a script in an interpreter of its own, and fail with what it printed."""
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=PACKAGE.parent,
    )
    assert result.returncode == 0, result.stderr


def room_of(path: Path) -> str:
    """The room that a source file is in; empty for the package's own ``__init__``."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported_rooms(path: Path, source: str) -> Iterator[tuple[str, int]]:
    """The rooms that a file imports from, with the line, wherever in the file that stands."""
    package = ["pyro_nondiff", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names = [".".join([*base, *filter(None, [node.module]), a.name]) for a in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "pyro_nondiff" and len(parts) > 1:
                yield parts[1], node.lineno


def wrong_imports(path: Path, source: str) -> list[str]:
    """The imports of a file that go against the direction of the rooms."""
    room = room_of(path)
    if not room:
        return []
    if room not in ALLOWED_IMPORTS:
        return [f"{path.name}: the room {room} has no entry in ALLOWED_IMPORTS"]
    allowed = ALLOWED_IMPORTS[room] | {room}
    return [
        f"{path.relative_to(PACKAGE)}:{line}: {room} imports {other}"
        for other, line in imported_rooms(path, source)
        if other in ALLOWED_IMPORTS and other not in allowed
    ]


def faults(path: Path, source: str) -> list[str]:
    """What a file of the package holds that it should not."""
    where = path.relative_to(PACKAGE)
    found = []
    if len(source.splitlines()) > MAX_LINES:
        found.append(f"{where}: more than {MAX_LINES} lines")
    for number, line in enumerate(source.splitlines(), 1):
        if re.search(r"\b(TODO|FIXME|XXX)\b", line):
            found.append(f"{where}:{number}: a note to oneself")
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            found.append(f"{where}:{node.lineno}: an assert")
        if isinstance(node, ast.Name) and node.id == "print":
            found.append(f"{where}:{node.lineno}: a print")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = (n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom))
            found += [f"{where}:{n.lineno}: an import inside a function" for n in inner]
    return found


def test_import_changes_nothing() -> None:
    run_python(IMPORT_IS_PURE.substitute(modules=modules(), then=""))


@pytest.mark.parametrize(
    "statement",
    [
        "torch.rand(1)",
        "random.random()",
        "torch.set_default_dtype(torch.float64)",
        "torch.distributions.Distribution.set_default_validate_args(False)",
        "pyro.settings.set(validate_infer=False)",
        "warnings.simplefilter('ignore')",
        "torch.distributions.Normal.rsample = None",
        "torch.is_tensor = bool",
    ],
)
def test_import_check_finds_a_change(statement: str) -> None:
    with pytest.raises(AssertionError, match="importing the package changed"):
        run_python(IMPORT_IS_PURE.substitute(modules=["pyro_nondiff"], then=statement))


def test_every_module_can_be_imported_first() -> None:
    run_python(RANDOM_ORDER.substitute(modules=modules()))


def test_public_api_is_as_written_down() -> None:
    assert public_api() == PUBLIC_API.read_text(), "see the docstring of this file"


@pytest.mark.parametrize("room", rooms())
def test_room_says_what_is_public(room: str) -> None:
    module = importlib.import_module(f"pyro_nondiff.{room}")
    assert len(module.__all__) == len(set(module.__all__))
    assert [name for name in module.__all__ if not documented(getattr(module, name))] == []


class Parent:
    """Has a method with a docstring."""

    def method(self) -> None:
        """Do nothing."""


class Overrides(Parent):
    """Has a method whose docstring is inherited."""

    def method(self) -> None:
        pass


class Adds(Parent):
    """Has a method without a docstring."""

    def other(self) -> None:
        pass


class Bare(Parent):
    pass


def test_docstring_check_finds_what_has_none() -> None:
    assert documented(Overrides)
    assert not documented(Adds)
    assert not documented(Bare)
    assert not documented(lambda: None)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_source_keeps_the_rules(path: Path) -> None:
    source = path.read_text()
    assert faults(path, source) + wrong_imports(path, source) == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("x = 0\n" * 401, "more than 400 lines"),
        ("# TODO: later\n", "a note to oneself"),
        ("assert True\n", "an assert"),
        ("print(1)\n", "a print"),
        ("def f():\n    import os\n", "an import inside a function"),
    ],
)
def test_source_check_finds_a_fault(source: str, fault: str) -> None:
    found = faults(PACKAGE / "noise.py", source)
    assert [text for text in found if fault in text]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("noise.py", "from pyro_nondiff import infer"),
        ("noise.py", "from .infer import config"),
        ("estimators/base.py", "from ..infer.config import x"),
        ("estimators/base.py", "import pyro_nondiff.infer"),
        ("estimators/base.py", "from .. import infer"),
        ("distributions/_laws.py", "if TYPE_CHECKING:\n    from ..estimators import Ask"),
        ("unheard_of.py", ""),
    ],
)
def test_direction_check_finds_a_wrong_import(path: str, source: str) -> None:
    assert len(wrong_imports(PACKAGE / path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("__init__.py", "from . import infer"),
        ("infer/elbo.py", "from ..estimators.base import Ask\nfrom .worlds import x\nimport torch"),
        ("testing/exact.py", "from pyro_nondiff.infer import x\nfrom pyro_nondiff import noise"),
    ],
)
def test_direction_check_passes_right_imports(path: str, source: str) -> None:
    assert wrong_imports(PACKAGE / path, source) == []


if __name__ == "__main__":
    PUBLIC_API.write_text(public_api())
