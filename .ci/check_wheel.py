"""Check the installed wheel: what it holds, and that all of it can be imported.

It runs in an environment with the wheel and its requirements only, outside the source tree.
"""

import importlib
import pkgutil
import sys
from importlib.metadata import distribution
from pathlib import Path


def main() -> None:
    """Raise ``SystemExit`` with a message if something is wrong."""
    wheel = distribution("pyro-nondiff")
    files = [str(path) for path in wheel.files or ()]
    top = {name.partition("/")[0] for name in files}
    info = {name for name in top if name.endswith(".dist-info")}
    if top != {"pyro_nondiff"} | info:
        sys.exit(f"the wheel installs more than the package: {sorted(top)}")
    if "pyro_nondiff/py.typed" not in files:
        sys.exit("the wheel lacks py.typed")
    if not any(name.endswith("licenses/LICENSE") for name in files):
        sys.exit("the wheel lacks the licence")
    if strays := [name for name in files if Path(name).stem in {"conftest", "setup"}]:
        sys.exit(f"the wheel holds files of the tests: {strays}")

    package = importlib.import_module("pyro_nondiff")
    if "site-packages" not in package.__path__[0]:
        sys.exit(f"imported from {package.__path__[0]}, not from the installed wheel")
    if package.__version__ != wheel.version:
        sys.exit(f"__version__ is {package.__version__}, the wheel's is {wheel.version}")
    names = [module.name for module in pkgutil.walk_packages(package.__path__, "pyro_nondiff.")]
    for name in names:
        importlib.import_module(name)
    print(f"pyro-nondiff {wheel.version}: the wheel is whole, {len(names)} modules imported")


if __name__ == "__main__":
    main()
