"""Run scripts, each in a process of its own, as many at a time as there are cores, and time them.

python .ci/each.py "tutorials/[0-9]*.py"
python .ci/each.py "benchmarks/[a-z]*.py" --smoke
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
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
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in as_completed([pool.submit(run, script, options) for script in scripts]):
            name, passed, report = done.result()
            print(report, flush=True)
            if not passed:
                failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(sorted(failed))}")


def run(script: Path, options: list[str]) -> tuple[str, bool, str]:
    """The script's name, whether it passed, and what it printed, with how long it took."""
    start = time.monotonic()
    command = [sys.executable, str(script), *options]
    try:
        ended = subprocess.run(
            command,
            timeout=LIMIT,
            check=False,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        passed, printed = ended.returncode == 0, ended.stdout
        outcome = "passed" if passed else f"failed with exit code {ended.returncode}"
    except subprocess.TimeoutExpired as error:
        passed, printed = False, (error.stdout or b"").decode()
        outcome = f"took longer than {LIMIT:.0f} s"
    seconds = time.monotonic() - start
    return script.name, passed, f"{printed}{script.name}: {outcome}, {seconds:.1f} s"


if __name__ == "__main__":
    main()
