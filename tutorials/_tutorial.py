"""What the tutorials share: arguments, the runs that are kept, tables, a picture, and claims.

A tutorial trains for minutes or hours. Each finished run is kept in its output folder, so that one
that was stopped goes on where it was; ``--fresh`` forgets them. At the end a table, a picture and
the claims are written there, and with ``--publish`` into ``tutorials/results``, from which the docs
are built.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
from matplotlib.figure import Figure

PUBLISHED = Path(__file__).with_name("results")
HOLDS: dict[str, Callable[[float, float], bool]] = {
    "<=": lambda found, asked: found <= asked,
    ">=": lambda found, asked: found >= asked,
}

smoke_test = "CI" in os.environ


class Tutorial:
    """One run of a tutorial script.

    Arguments:
        file: The script's ``__file__``.
        description: What it does, for ``--help``.
        steps: How long a run trains, in the tutorial's own unit, which ``unit`` names.
        smoke: As ``steps``, where the environment has ``CI``: enough to pass through all the code.
        unit: What ``steps`` counts.
        seeds: How many seeds each run has. One in smoke mode.
        needs_data: Whether the claims are about real data. Without it they are not asserted then.
    """

    def __init__(
        self,
        file: str,
        description: str,
        *,
        steps: int,
        smoke: int,
        unit: str = "steps",
        seeds: int = 3,
        needs_data: bool = True,
    ) -> None:
        self.name = Path(file).stem
        self.unit = unit
        self.args = args = _arguments(self.name, description, smoke if smoke_test else steps, seeds)
        has_data = args.data is not None or not needs_data
        self.complete = not smoke_test and args.steps >= steps and has_data
        self.steps, self.seeds, self.device = args.steps, args.seeds, torch.device(args.device)
        self.folder = args.output / self.name
        self.results: dict[str, list[dict[str, Any]]] = {}
        self.tables: list[dict[str, Any]] = []
        self.claims: list[dict[str, Any]] = []
        self.figure: Figure | None = None

    def run(
        self,
        name: str,
        train: Callable[..., dict[str, Any]],
        *arguments: Any,
        seeds: int | None = None,
    ) -> list[Any]:
        """What ``train(*arguments, seed=seed)`` returns, for each seed; kept, and read if it was.

        With ``seeds``, only for so many of them.

        Each run starts from its seed, an empty param store, and a module's params of its own. A
        result may hold numbers, lists and tensors.
        """
        self.results[name] = [
            self._run(name, train, arguments, seed) for seed in self.seeds[:seeds]
        ]
        return self.results[name]

    def median(self, name: str, key: str) -> float:
        """The median over the seeds of one number of a run."""
        return statistics.median(result[key] for result in self.results[name])

    def spread(self, name: str, key: str, digits: int = 2) -> str:
        """The median of one number of a run, with its lowest and highest value over the seeds."""
        values = [result[key] for result in self.results[name]]
        median = f"{self.median(name, key):.{digits}f}"
        if len(values) == 1:
            return median if len(self.seeds) == 1 else f"{median} (one seed)"
        return f"{median} ({min(values):.{digits}f} to {max(values):.{digits}f})"

    def table(self, head: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> None:
        """Print a table, and keep it for the docs."""
        cells = [[str(cell) for cell in row] for row in rows]
        self.tables.append({"title": title, "head": list(head), "rows": cells})
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        lines = [
            " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            for row in [list(head), ["-" * width for width in widths], *cells]
        ]
        print("\n".join(["", *([title] if title else []), *lines]))

    def claim(self, text: str, found: float, sign: str, asked: float) -> None:
        """State what this tutorial is to show: ``found`` is ``"<="`` or ``">="`` what is asked."""
        holds = HOLDS[sign](found, asked)
        self.claims.append(
            {"text": text, "found": found, "sign": sign, "asked": asked, "holds": holds}
        )

    def picture(self, figure: Figure) -> None:
        """Show this as the tutorial's picture."""
        self.figure = figure

    def finish(self) -> None:
        """Write what was found, and fail if a claim does not hold after a full run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write(self.folder / "results.json", self.folder / "picture.png")
        if self.args.publish:
            PUBLISHED.mkdir(exist_ok=True)
            self._write(PUBLISHED / f"{self.name}.json", PUBLISHED / f"{self.name}.png")
        print()
        for claim in self.claims:
            verdict = "holds" if claim["holds"] else "DOES NOT HOLD"
            asked = f"{claim['sign']} {claim['asked']:.4g}"
            print(f"{claim['text']}: {claim['found']:.4g}, asked {asked}: {verdict}")
        print(f"written to {self.folder}")
        if self.complete:
            failed = [claim["text"] for claim in self.claims if not claim["holds"]]
            assert not failed, f"not reached: {'; '.join(failed)}"

    def _run(
        self, name: str, train: Callable[..., dict[str, Any]], arguments: Any, seed: int
    ) -> dict[str, Any]:
        path = self.folder / f"{name}, seed {seed}, {self.steps} {self.unit}.pt".replace("/", "_")
        if path.exists() and not (self.args.fresh or smoke_test):
            print(f"{name}, seed {seed}: read from {path}")
            return torch.load(path, weights_only=True)
        print(f"{name}, seed {seed}", flush=True)
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        begin = time.perf_counter()
        with pyro.settings.context(module_local_params=True):
            result = train(*arguments, seed=seed)
        result["seconds"] = time.perf_counter() - begin
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(result, path)
        return result

    def _write(self, results: Path, picture: Path) -> None:
        content = {
            "hardware": hardware(self.device),
            "trained": f"{self.steps:,} {self.unit}, seeds {', '.join(map(str, self.seeds))}",
            "minutes": sum(run["seconds"] for runs in self.results.values() for run in runs) / 60,
            "complete": self.complete,
            "tables": self.tables,
            "claims": self.claims,
        }
        results.write_text(json.dumps(content, indent=1) + "\n")
        if self.figure is not None:
            self.figure.savefig(picture, dpi=110)


def hardware(device: torch.device) -> str:
    """What the figures were measured on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    model, information = platform.machine(), Path("/proc/cpuinfo")
    if information.exists():
        named = [line for line in information.read_text().splitlines() if "model name" in line]
        model = named[0].split(":")[1].strip() if named else model
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' * (threads > 1)} of {model}, torch {torch.__version__}"


def _arguments(name: str, description: str, steps: int, seeds: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--steps", type=int, default=steps, help=f"how long to train: {steps}")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=list(range(1 if smoke_test else seeds))
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("PYRO_NONDIFF_DATA") or None,
        help="the folder with the real data: PYRO_NONDIFF_DATA, where it is set",
    )
    parser.add_argument("--output", type=Path, default=Path("tutorial_output"))
    parser.add_argument("--fresh", action="store_true", help="forget the runs that were kept")
    parser.add_argument("--publish", action="store_true", help="write the results for the docs too")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, found {args.steps}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    if args.data is not None and not args.data.is_dir():
        parser.error(f"--data: there is no folder {args.data}")
    return args
