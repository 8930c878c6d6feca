"""Run every tutorial, each in a process of its own, and say how long it took."""

import subprocess
import sys
import time
from pathlib import Path

LIMIT = 300.0
"""The most seconds that a tutorial may take."""


def main() -> None:
    """Exit with an error if there is no tutorial, or if one fails or takes too long."""
    scripts = sorted(Path("tutorials").glob("[0-9][0-9]_*.py"))
    if not scripts:
        sys.exit("there are no tutorials")
    failed = []
    for script in scripts:
        start = time.monotonic()
        try:
            code = subprocess.run([sys.executable, script], timeout=LIMIT, check=False).returncode
            outcome = "passed" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            outcome = f"took longer than {LIMIT:.0f} s"
        if outcome != "passed":
            failed.append(script.name)
        print(f"{script.name}: {outcome}, {time.monotonic() - start:.1f} s", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
