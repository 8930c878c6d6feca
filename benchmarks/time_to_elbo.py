"""How long until a VAE is as good as Pyro makes it in ten minutes.

A linear VAE with 200 Bernoulli units learns binarised MNIST. Pyro's ``SVI`` with
``TraceGraph_ELBO`` and its decaying average trains for some minutes, at each of some learning
rates; the best ELBO near the end is the level. Then each estimator trains under ``CompiledSVI``
until it is there. See ``README.md`` beside this file.

    python benchmarks/time_to_elbo.py --out results --minutes 10
    python benchmarks/time_to_elbo.py --out results --only "RLOO(2)" REBAR   # adds to the results
    python benchmarks/time_to_elbo.py --smoke
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from _arguments import parsed, parser
from _checks import check_recorded
from _runs import BIASED, PYRO, Run, levels, picture, table, verdict
from _settings import PYRO_AVERAGE
from _timing import Step, cold_compiler, cpu_seconds, quiet_machine
from _vae import VAE, vae_batch
from pyro.infer import ELBO, SVI, TraceGraph_ELBO
from pyro.optim import Adam
from torch import Tensor
from torch.distributions import kl_divergence
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.testing import assert_close
from tqdm.auto import tqdm

from pyro_nondiff.estimators import (
    REBAR,
    REINFORCE,
    RELAX,
    RLOO,
    AbstractEstimator,
    DisARM,
    MovingAverage,
    StraightThrough,
)
from pyro_nondiff.infer import TraceEstimator_ELBO
from pyro_nondiff.infer.compiled import CompiledSVI

ESTIMATORS: dict[str, Callable[[], AbstractEstimator]] = {
    "REINFORCE + MovingAverage": lambda: REINFORCE(baseline=MovingAverage()),
    "RLOO(2)": lambda: RLOO(num_samples=2),
    "RLOO(4)": lambda: RLOO(num_samples=4),
    "DisARM": DisARM,
    "REBAR": REBAR,
    "RELAX": RELAX,
    BIASED: lambda: StraightThrough("gumbel", temperature=0.5),
}
BATCH = 100


# --- the data, and what is asked of them ----------------------------------------------------


@dataclass
class Images:
    """Binary images to learn from, and two sets for evaluations.

    Arguments:
        learnt: All that are learnt from.
        train: Some of them.
        held_out: Others.
        noise: For evaluations, the same each time.
    """

    learnt: Tensor
    train: Tensor
    held_out: Tensor
    noise: Tensor

    def batches(self) -> Iterator[Tensor]:
        """Batches in a random order, without end."""
        while True:
            yield from self.learnt[torch.randperm(len(self.learnt))].split(BATCH)


def load(args: argparse.Namespace) -> tuple[Images, str]:
    """The fixed binarisation of MNIST where it is to be had, random pixels elsewhere."""
    folder = Path(os.environ.get("PYRO_NONDIFF_DATA", ""), "binarized_mnist")
    if folder.exists():
        learnt, held_out = (_read(folder / f"binarized_mnist_{s}.mat") for s in ("train", "valid"))
        source = "binarised MNIST"
    else:
        learnt, held_out = (vae_batch(1000, "cpu")[0] for _ in range(2))
        source = "random pixels"
    noise = torch.rand(args.samples, args.images, 200)
    sets = learnt, learnt[: args.images], held_out[: args.images], noise
    return Images(*(part.to(args.device) for part in sets)), source


def _read(path: Path) -> Tensor:
    from scipy.io import loadmat  # where there are no data it is not needed

    return torch.from_numpy(loadmat(path)["X"].astype(np.float32))


def _divergence(posterior: dist.Bernoulli, vae: VAE) -> Tensor:
    prior = dist.Bernoulli(logits=vae.prior.expand_as(posterior.logits))
    return kl_divergence(posterior, prior).sum(-1)


@torch.no_grad()
def elbo_of(vae: VAE, images: Tensor, noise: Tensor) -> float:
    """The mean ELBO of images: the divergence in closed form, the rest by many samples."""
    posterior = dist.Bernoulli(logits=vae.encoder(images))
    divergence = _divergence(posterior, vae)
    total = -divergence
    for uniform in noise:
        z = (uniform < posterior.probs).float()
        pixels = binary_cross_entropy_with_logits(vae.decoder(z), images, reduction="none")
        total = total - pixels.sum(-1) / len(noise)
    return float(total.mean())


# --- training ---------------------------------------------------------------------------------


def parts(candidate: str, device: str) -> tuple[VAE, ELBO]:
    """A fresh VAE, the same for all, and the objective of a candidate."""
    if candidate == PYRO:
        return VAE("vae", PYRO_AVERAGE, device), TraceGraph_ELBO()
    return VAE("vae", {}, device), TraceEstimator_ELBO(ESTIMATORS[candidate]())


def train(
    candidate: str,
    learning_rate: float,
    images: Images,
    limit: float,
    done: Callable[[Run], bool],
    args: argparse.Namespace,
) -> Run:
    """Trains a candidate until it is done, or out of time; evaluations are not on the clock."""
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    vae, objective = parts(candidate, args.device)
    optimiser = Adam({"lr": learning_rate})
    if candidate == PYRO:
        step: Step = SVI(vae.model, vae.guide, optimiser, loss=objective).step
    else:
        step = CompiledSVI(vae.model, vae.guide, optimiser, objective, backend=args.backend).step
    run = Run(candidate, learning_rate)
    batches = images.batches()
    clock = cpu_seconds if args.device == "cpu" else time.perf_counter
    sync = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None
    spent = 0.0
    with tqdm(total=round(limit), desc=f"{candidate}, {learning_rate:g}", unit="s") as bar:
        while True:
            begin = clock()
            until = min(limit, spent + args.every) - spent
            while clock() - begin < until or run.steps <= 2:
                for _ in range(1 if run.steps < 2 else 10):
                    step(next(batches))
                    run.steps += 1
                sync()
                if run.steps == 2:
                    run.first = spent + clock() - begin
            spent += clock() - begin
            run.seconds.append(spent)
            run.train.append(elbo_of(vae, images.train, images.noise))
            run.held_out.append(elbo_of(vae, images.held_out, images.noise))
            bar.set_postfix(held_out=f"{run.held_out[-1]:.2f}", refresh=False)
            bar.update(min(round(spent), round(limit)) - bar.n)
            if spent >= limit or done(run):
                return run


def train_all(args: argparse.Namespace, images: Images, path: Path) -> list[Run]:
    """All runs that are asked for; those in the file are not made again."""
    runs = [Run(**known) for known in json.loads(path.read_text())] if path.exists() else []
    for candidate in [name for name in (PYRO, *ESTIMATORS) if name in args.only]:
        for rate in args.learning_rates:
            if any((run.candidate, run.learning_rate) == (candidate, rate) for run in runs):
                continue
            if candidate == PYRO:
                limit, done = 60 * args.minutes, lambda run: False
            else:
                limit = 60 * args.minutes * args.limit
                level = levels(runs)
                done = lambda run, level=level: all(  # noqa: E731
                    run.reached(which, value) is not None for which, value in level.items()
                )
            with cold_compiler():
                runs.append(train(candidate, rate, images, limit, done, args))
            path.write_text(json.dumps([asdict(run) for run in runs]))
    return runs


# --- from the command line ----------------------------------------------------------------------


def smoke(args: argparse.Namespace) -> None:
    """Checks what is exact, then makes a run of a few seconds."""
    batch = vae_batch(10, args.device)[0]
    for name in ESTIMATORS:

        def make(name: str = name) -> tuple[Any, Any, ELBO]:
            vae, objective = parts(name, args.device)
            return vae.model, vae.guide, objective

        check_recorded(make, (batch,))
    vae, _ = parts(PYRO, args.device)
    noise = torch.rand(3, len(batch), 200, device=args.device)
    law = dist.Bernoulli(logits=vae.encoder(batch))
    z = (noise < law.probs).float()
    log_p = dist.Bernoulli(logits=vae.decoder(z)).log_prob(batch).sum(-1)
    divergence = _divergence(law, vae)
    assert_close(
        elbo_of(vae, batch, noise), float((log_p - divergence).mean().detach()), rtol=1e-4, atol=0
    )
    args.minutes, args.every, args.images, args.samples = 0.03, 0.5, 20, 2
    args.backend, args.limit, args.learning_rates = "replay", 0.5, [1e-3]
    with tempfile.TemporaryDirectory() as folder:
        args.out = Path(folder)
        measure(args)
        found = sorted(path.name for path in args.out.iterdir())
    if found != ["time_to_elbo.json", "time_to_elbo.png"]:
        raise AssertionError(f"expected a file of runs and a picture, found {found}")


def measure(args: argparse.Namespace) -> None:
    """Trains all, prints tables, and draws."""
    args.out.mkdir(parents=True, exist_ok=True)
    pyro.set_rng_seed(0)
    images, source = load(args)
    print(f"torch {torch.__version__}, pyro {pyro.__version__}, {args.device}, one thread,")
    print(f"{source}, batch {BATCH}, {args.minutes:g} minutes, backend {args.backend}.\n")
    runs = train_all(args, images, args.out / "time_to_elbo.json")
    level = levels(runs)
    print(f"Level: held-out {level['held_out']:.2f}, training {level['train']:.2f}.\n")
    print("\n".join(table(runs)))
    print("\n## Target\n")
    print("\n".join(verdict(runs)))
    picture(runs, args.out / "time_to_elbo.png")


def arguments() -> argparse.Namespace:
    """What is asked for on the command line."""
    made = parser("Time training to a given ELBO.")
    made.add_argument("--out", type=Path, default=Path("results"), help="a folder for the results")
    made.add_argument("--minutes", type=float, default=10, help="of Pyro's training")
    made.add_argument("--limit", type=float, default=0.4, help="of the others, of that time")
    made.add_argument("--every", type=float, default=2, help="seconds between evaluations")
    made.add_argument("--images", type=int, default=1000, help="of each evaluation")
    made.add_argument("--samples", type=int, default=20, help="for each image")
    made.add_argument("--learning-rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    made.add_argument("--only", nargs="+", choices=[PYRO, *ESTIMATORS])
    made.add_argument("--backend", default="inductor", choices=["inductor", "replay", "eager"])
    args = parsed(made)
    args.only = args.only or [PYRO, *ESTIMATORS]
    return args


def main() -> None:
    """Measure, or check."""
    args = arguments()
    with quiet_machine(validation=True):
        smoke(args) if args.smoke else measure(args)


if __name__ == "__main__":
    main()
