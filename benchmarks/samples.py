"""How the time of a step grows with its number of samples: RLOO(K) on a linear VAE.

Compiled, against Pyro's vectorised particles and by hand; one sample is REINFORCE. The
hand-written gradient is compared with exact enumeration before anything is timed. See
``README.md`` beside this file.

    python benchmarks/samples.py --rounds 11
    python benchmarks/samples.py --samples 2 8 32
    python benchmarks/samples.py --smoke
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from itertools import product

import pyro
import torch
from _arguments import parsed, timing_parser
from _by_hand import Gradients, bernoulli, leave_one_out, step_of
from _checks import check_recorded
from _settings import LEARNING_RATE
from _timing import (
    Step,
    Times,
    cold_compiler,
    cpu_seconds,
    growth,
    measure,
    quiet_machine,
    ratios,
    spread,
)
from _vae import VAE, vae_batch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor
from torch.nn.functional import softplus
from torch.testing import assert_close
from tqdm.auto import tqdm

from pyro_nondiff.estimators import REINFORCE, RLOO, AbstractEstimator
from pyro_nondiff.infer import TraceEstimator_ELBO
from pyro_nondiff.infer.compiled import CompiledSVI

OURS = "RLOO(K), compiled"
PYRO = "Pyro Trace_ELBO, K vectorised particles"
HAND = "RLOO(K), by hand, compiled"
TARGET = 1.7


def estimator(num_samples: int) -> AbstractEstimator:
    """With one sample there are no others to leave it out of."""
    return REINFORCE() if num_samples == 1 else RLOO(num_samples=num_samples)


# --- by hand ------------------------------------------------------------------------------


def estimate(parameters: list[Tensor], x: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    """Loss and gradients.

    Arguments:
        parameters: Weight and bias of the encoder, and of the decoder.
        x: ``(batch, pixels)``.
        z: ``(samples, batch, bits)``.
    """
    weight, bias, decoder, offset = parameters
    samples, size, bits = z.shape
    logits = torch.addmm(bias, x, weight.T)
    rows = z.reshape(samples * size, bits)
    pixels = torch.addmm(offset, rows, decoder.T).reshape(samples, size, -1)
    log_q = (z * logits).sum(-1) - softplus(logits).sum(-1)
    cost = log_q + bits * math.log(2) - bernoulli(pixels, x).sum(-1)
    weigh = leave_one_out(cost.T).T if samples > 1 else cost
    at_logits = (weigh.unsqueeze(-1) * (z - logits.sigmoid())).sum(0)
    at_pixels = ((pixels.sigmoid() - x) / samples).reshape(samples * size, -1)
    encoder = at_logits.T @ x, at_logits.sum(0)
    return cost.mean(0).sum(), *encoder, at_pixels.T @ rows, at_pixels.sum(0)


def by_hand(num_samples: int) -> Gradients:
    """Parameters and a batch to loss and gradients."""

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        *parameters, x = tensors
        probs = torch.addmm(parameters[1], x, parameters[0].T).sigmoid()
        noise = torch.rand(num_samples, *probs.shape, device=x.device)
        return estimate(parameters, x, (noise < probs).to(x.dtype))

    return gradients


def check(pixels: int = 4, bits: int = 3) -> None:
    """Compares expected gradients with the exact ones, over all bits of one sample and of two.

    Raises:
        AssertionError: If one differs.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [(bits, pixels), (bits,), (pixels, bits), (pixels,)]
    parameters = [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]
    x = torch.tensor([[1.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    states = torch.tensor(list(product([0.0, 1.0], repeat=bits)), dtype=torch.float64)
    weight, bias, decoder, offset = parameters
    log_q = bernoulli(x @ weight.T + bias, states).sum(1)
    log_p = bernoulli(states @ decoder.T + offset, x).sum(1) - bits * math.log(2)
    q = log_q.exp()
    exact = torch.autograd.grad((q * (log_q - log_p)).sum(), parameters)
    for samples in (1, 2):
        expected = [torch.zeros_like(gradient) for gradient in exact]
        for rows in product(range(len(states)), repeat=samples):
            with torch.no_grad():
                _, *found = estimate(parameters, x, states[list(rows)].unsqueeze(1))
                for total, gradient in zip(expected, found, strict=True):
                    total += q[list(rows)].prod() * gradient
        assert_close(expected, list(exact))


# --- measuring ------------------------------------------------------------------------------


def steps_of(
    num_samples: int, x: Tensor, args: argparse.Namespace
) -> tuple[dict[str, Step], float]:
    """One step of each candidate, and what the first two of the compiled one took."""
    steps: dict[str, Step] = {}
    device = str(x.device)
    vae = VAE(f"{OURS}.{num_samples}", {}, device)
    objective = TraceEstimator_ELBO(estimator(num_samples))
    optimiser = Adam({"lr": LEARNING_RATE})
    compiled = CompiledSVI(vae.model, vae.guide, optimiser, objective, backend=args.backend)
    steps[OURS] = lambda: compiled.step(x)
    with cold_compiler():
        begin = cpu_seconds()
        for _ in range(2):
            compiled.step(x)
        first = cpu_seconds() - begin
    other = VAE(f"{PYRO}.{num_samples}", {}, device)
    elbo = Trace_ELBO(num_particles=num_samples, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(other.model, other.guide, Adam({"lr": LEARNING_RATE}), loss=elbo)
    steps[PYRO] = lambda: svi.step(x)
    last = VAE(HAND, {}, device)
    parameters = [*last.encoder.parameters(), *last.decoder.parameters()]
    steps[HAND] = step_of(by_hand(num_samples), parameters, [x], [], LEARNING_RATE, args.backend)
    return steps, first


def measure_all(args: argparse.Namespace, x: Tensor) -> tuple[dict[int, Times], dict[int, float]]:
    """All numbers of samples, interleaved in one process."""
    steps: dict[str, Step] = {}
    first: dict[int, float] = {}
    for samples in tqdm(args.samples, desc="compiling"):
        made, first[samples] = steps_of(samples, x, args)
        steps |= {f"{samples} {name}": step for name, step in made.items()}
    found: dict[int, Times] = {samples: {} for samples in args.samples}
    for key, times in measure(steps, args.rounds, args.seconds, args.device).items():
        samples, _, name = key.partition(" ")
        found[int(samples)][name] = times
    return found, first


def table(found: dict[int, Times], first: dict[int, float]) -> Iterator[str]:
    """A row a number of samples."""
    names = [OURS, PYRO, HAND]
    yield f"| K | {', ms | '.join(names)}, ms | Pyro / ours | ours / by hand | first two steps, s |"
    yield "|---|" + "---|" * (len(names) + 3)
    for samples, times in found.items():
        cells = [f"{samples}", *(spread(times[name]) for name in names)]
        cells += [spread(ratios(times, PYRO, OURS)), spread(ratios(times, OURS, HAND))]
        yield f"| {' | '.join(cells)} | {first[samples]:.1f} |"


def targets(found: dict[int, Times]) -> Iterator[str]:
    """What was asked for, and what was found."""
    yield "| target | found | wanted | met |"
    yield "|---|---|---|---|"
    for samples, times in found.items():
        faster = ratios(times, PYRO, OURS)
        met = "yes" if statistics.median(faster) >= TARGET else "no"
        yield f"| K = {samples}: Pyro / ours | {spread(faster)} | at least {TARGET} | {met} |"
    if len(found) > 2:
        *_, middle, last = sorted(found)
        grown = growth(found, OURS)
        met = "yes" if statistics.median(grown) <= 1.2 else "no"
        what = f"time a sample, K = {last} / K = {middle}"
        yield f"| {what} | {spread(grown)} | at most 1.2 | {met} |"


def smoke(args: argparse.Namespace) -> None:
    """Checks what is exact, and times a few small steps without believing it."""
    x = vae_batch(5, args.device)[0]
    for samples in (1, 2, 3):

        def parts(samples: int = samples) -> tuple[Callable, Callable, TraceEstimator_ELBO]:
            vae = VAE("vae", {}, args.device)
            return vae.model, vae.guide, TraceEstimator_ELBO(estimator(samples))

        check_recorded(parts, (x,))
    args.backend, args.samples, args.batch = "replay", [1, 2, 3], 5
    args.rounds, args.seconds = 2, 0.001
    report(args)


def report(args: argparse.Namespace) -> None:
    """Checks, measures, and prints tables in Markdown."""
    check()
    x, source = vae_batch(args.batch, args.device)
    print(f"torch {torch.__version__}, pyro {pyro.__version__}, {args.device}, one thread,")
    print(f"VAE 784-200-784, batch {args.batch}, {source}, backend {args.backend},")
    print(f"{args.rounds} rounds; median (least to greatest).\n")
    sys.stdout.flush()
    found, first = measure_all(args, x)
    print("\n".join(table(found, first)))
    print("\n## Targets\n")
    print("\n".join(targets(found)))


def main() -> None:
    """Measure, or check."""
    parser = timing_parser("Time a step for numbers of samples.")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--backend", default="inductor", choices=["inductor", "replay"])
    args = parsed(parser)
    pyro.set_rng_seed(0)
    with quiet_machine(validation=True):
        smoke(args) if args.smoke else report(args)


if __name__ == "__main__":
    main()
