"""Whether the hand-written gradients are right: nothing is compared with a wrong reference.

On a VAE of 6 pixels and 5 bits the exact gradient is a sum over 32 states. All is in double
precision.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product

import torch
from _checks import require
from _hand_vae import TEMPERATURE, Program, eager, program_of
from _vae import VAE
from torch import Tensor
from torch.nn.functional import softplus

from pyro_nondiff.estimators import AbstractEstimator
from pyro_nondiff.infer import TraceEstimator_ELBO

SIZES = (6, 7, 5)
BATCH = 3
COPIES = 1000
DRAWS = 60
BOUND = 5.0
"""Standard errors of a mean. By chance one coordinate in 200,000 exceeds them."""
SAME = 1e-8


def check_references(make: dict[str, Callable[[], AbstractEstimator]], device: str) -> list[str]:
    """Checks all references, and returns a line on each.

    Arguments:
        make: The library's estimators, by the same names.
        device: Where to run.

    Raises:
        AssertionError: If one is wrong.
    """
    lines = []
    with _double():
        for name in make:
            vae = VAE(f"check {name}", {}, device, SIZES, site=f"check of {name}")
            x = torch.rand(BATCH, SIZES[0], device=device).round()
            apart = _distance_to_ours(name, vae, x, make[name]())
            require(
                apart < SAME, f"{name}: ours and the hand-written gradient differ by {apart:.1e}"
            )
            worst = _worst_z(name, vae, x)
            if name == "StraightThrough":  # biased: the test must see that
                require(worst > BOUND, f"{name}: the bias is not seen, |z| = {worst:.1f}")
                defined = _distance_to_definition(vae, x)
                require(defined < SAME, f"{name}: {defined:.1e} from its definition")
                found = f"as defined to {defined:.0e}; its bias is seen, |z| {worst:.0f}"
            else:
                require(worst < BOUND, f"{name}: the mean gradient is wrong, |z| = {worst:.1f}")
                found = f"mean gradient against 32 states: largest |z| {worst:.1f}"
            lines.append(f"{name}: ours with the same noise to {apart:.0e}; {found}")
    return lines


@contextmanager
def _double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def _parameters(vae: VAE) -> list[Tensor]:
    return [*vae.encoder.parameters(), *vae.decoder.parameters()]


def _distance_to_ours(name: str, vae: VAE, x: Tensor, estimator: AbstractEstimator) -> float:
    """The largest relative difference over three steps in which averages move."""
    elbo = TraceEstimator_ELBO(estimator)
    elbo.loss_and_grads(vae.model, vae.guide, x)  # makes what is learnt
    program = program_of(name, vae)
    learnt = list(elbo.states.parameters())
    with torch.no_grad():
        for mine, theirs in zip(program.learnt, learnt, strict=True):
            mine.copy_(theirs)
        for buffer in elbo.states.buffers():
            buffer.zero_()
    worst = 0.0
    for seed in range(3):
        parameters = [*_parameters(vae), *learnt]
        for parameter in parameters:
            parameter.grad = None
        torch.manual_seed(seed)
        loss = elbo.loss_and_grads(vae.model, vae.guide, x)
        torch.manual_seed(seed)
        hand_loss, grads = eager(name, program, x)
        pairs = [(loss, hand_loss), *((p.grad, g) for p, g in zip(parameters, grads, strict=True))]
        worst = max(worst, *(float((a - b).norm() / a.norm()) for a, b in pairs))
    return worst


def _exact(program: Program, x: Tensor) -> list[Tensor]:
    """The gradient of the loss, summed over all states of the bits."""
    bits = len(program.prior)
    z = torch.tensor(list(product([0.0, 1.0], repeat=bits)), device=x.device).unsqueeze(1)
    logits, pixels = _layers(x, program.encoder), _layers(z, program.decoder)
    log_q, log_prior = ((z * at - softplus(at)).sum(-1) for at in (logits, program.prior))
    log_p = log_prior + (x * pixels - softplus(pixels)).sum(-1)
    loss = (log_q.exp() * (log_q - log_p)).sum()
    return list(torch.autograd.grad(loss, [*program.encoder, *program.decoder]))


def _layers(x: Tensor, layers: list[Tensor]) -> Tensor:
    """The network, written once more."""
    for i in range(0, len(layers), 2):
        x = x if i == 0 else torch.where(x > 0, x, 0.01 * x)
        x = x @ layers[i].T + layers[i + 1]
    return x


def _worst_z(name: str, vae: VAE, x: Tensor) -> float:
    """How far the mean gradient of many draws is from the exact one, in standard errors."""
    program = program_of(name, vae)
    with torch.no_grad():
        for number, value in zip(program.learnt[:2], (-1.0, 0.7), strict=False):
            number.fill_(value)  # none that an error would hide behind
    wide = x.repeat(COPIES, 1)
    torch.manual_seed(0)
    draws = []
    for _ in range(DRAWS):
        for buffer, value in zip(program.average, (3.0, 1.0), strict=False):
            buffer.fill_(value)
        _, grads = eager(name, program, wide)
        count = len(program.encoder) + len(program.decoder)
        draws.append(torch.cat([g.flatten() for g in grads[:count]]) / COPIES)
    found = torch.stack(draws)
    error = found.std(0) / DRAWS**0.5
    exact = torch.cat([g.flatten() for g in _exact(program, x)])
    return float(((found.mean(0) - exact).abs() / (error + 1e-9)).max())


def _distance_to_definition(vae: VAE, x: Tensor) -> float:
    """From the gradient of ``hard + soft - soft.detach()``, by automatic differentiation."""
    program = program_of("StraightThrough", vae)
    torch.manual_seed(1)
    _, grads = eager("StraightThrough", program, x)
    torch.manual_seed(1)
    logits = vae.encoder(x)
    perturbed = logits + torch.rand_like(logits).logit()
    soft = (perturbed / TEMPERATURE).sigmoid()
    z = (perturbed > 0).to(soft.dtype) + (soft - soft.detach())
    pixels = vae.decoder(z)
    log_q, log_prior = (z * at - softplus(at) for at in (logits, vae.prior))
    log_p = log_prior.sum(-1) + (x * pixels - softplus(pixels)).sum(-1)
    wanted = torch.autograd.grad((log_q.sum(-1) - log_p).sum(), _parameters(vae))
    return max(float((a - b).norm() / a.norm()) for a, b in zip(wanted, grads, strict=True))
