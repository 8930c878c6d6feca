"""Run scripts, each in a process of its own, and say how long each took.

python .ci/each.py "tutorials/[0-9]*.py"
python .ci/each.py "benchmarks/[a-z]*.py" --smoke
"""

import subprocess
import sys
import time
from pathlib import Path

LIMIT = 300.0
"""The most seconds that a script may take."""


def main() -> None:
    """Exit with an error if there is no script, or if one fails or takes too long."""
    pattern, *options = sys.argv[1:]
    scripts = sorted(Path().glob(pattern))
    if not scripts:
        sys.exit(f"there is no {pattern}")
    failed = []
    for script in scripts:
        start = time.monotonic()
        command = [sys.executable, str(script), *options]
        try:
            code = subprocess.run(command, timeout=LIMIT, check=False).returncode
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
