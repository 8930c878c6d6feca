"""The estimators of a Bernoulli VAE by hand, in PyTorch alone, as fast as they can be written.

Each is one function from parameters, what is learnt, and a batch to the loss and all gradients. It
is recorded and compiled whole. Noise is drawn in the order and shapes in which the library draws
it, so that under the same seed both find the same gradient.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from _by_hand import compiled
from _vae import VAE
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, linear, softplus

DECAY = 0.9
TEMPERATURE = 0.5
WIDTH = 32

Grads = list[Tensor]
Estimate = Callable[["Program", Tensor], tuple[Tensor, Grads]]


@dataclass
class Program:
    """The tensors of the VAE, and those that an estimator learns.

    Arguments:
        encoder: Weight and bias of each layer.
        decoder: The same.
        prior: Logits of the prior.
        learnt: What is trained: logarithm of the temperature, eta, and RELAX's network.
        average: Mean of the cost, and weight, of a moving average; changed in place.
    """

    encoder: list[Tensor]
    decoder: list[Tensor]
    prior: Tensor
    learnt: list[Tensor] = field(default_factory=list)
    average: list[Tensor] = field(default_factory=list)

    def tensors(self) -> list[Tensor]:
        """All of them, in order."""
        return [*self.encoder, *self.decoder, self.prior, *self.learnt, *self.average]

    def with_tensors(self, given: list[Tensor]) -> "Program":
        """The same with other tensors in their places."""
        rest = iter(given)
        parts = [self.encoder, self.decoder, [self.prior], self.learnt, self.average]
        encoder, decoder, (prior,), learnt, average = ([next(rest) for _ in p] for p in parts)
        return Program(encoder, decoder, prior, learnt, average)

    def baseline(self) -> Tensor:
        """The moving average, 0 before the first step."""
        mean, weight = self.average
        return mean / weight.clamp(min=1e-12)

    def update(self, cost: Tensor) -> None:
        """Lets the moving average see a cost."""
        mean, weight = self.average
        mean.lerp_(cost.mean(), 1 - DECAY)
        weight.mul_(DECAY).add_(1 - DECAY)

    def log_ratio(self, logits: Tensor, z: Tensor) -> Tensor:
        """``log q - log p`` of bits, hard or soft."""
        constant = softplus(self.prior).sum() - softplus(logits).sum(-1)
        return (z * (logits - self.prior)).sum(-1) + constant


def _network(x: Tensor, layers: list[Tensor]) -> Tensor:
    for i in range(0, len(layers), 2):
        x = linear(x if i == 0 else leaky_relu(x), layers[i], layers[i + 1])
    return x


def _log_likelihood(pixels: Tensor, x: Tensor) -> Tensor:
    return (x * pixels - softplus(pixels)).sum(-1)


def _gradients(
    program: Program, logits: Tensor, g: Tensor, pixels: Tensor, x: Tensor, worlds: int = 1
) -> Grads:
    """From the gradients for the logits of bits and pixels to those of all parameters."""
    encoder = torch.autograd.grad(logits, program.encoder, g)
    decoder = torch.autograd.grad(pixels, program.decoder, (pixels.sigmoid() - x) / worlds)
    return [*encoder, *decoder]


def reinforce(program: Program, x: Tensor) -> tuple[Tensor, Grads]:
    """The score times the cost less its moving average."""
    logits = _network(x, program.encoder)
    eta = logits.detach()
    p = eta.sigmoid()
    z = (torch.rand_like(p) > 1 - p).to(p.dtype)
    pixels = _network(z, program.decoder)
    cost = program.log_ratio(eta, z) - _log_likelihood(pixels.detach(), x)
    g = (cost - program.baseline()).unsqueeze(-1) * (z - p)
    grads = _gradients(program, logits, g, pixels, x)
    program.update(cost)
    return cost.sum(), grads


def rloo(program: Program, x: Tensor) -> tuple[Tensor, Grads]:
    """Two values, each the other's baseline: the probabilities fall out of the score."""
    logits = _network(x, program.encoder)
    eta = logits.detach()
    p = eta.sigmoid()
    z = (torch.rand(2, *p.shape, device=p.device) > 1 - p).to(p.dtype)
    pixels = _network(z, program.decoder)
    cost = program.log_ratio(eta, z) - _log_likelihood(pixels.detach(), x)
    g = 0.5 * (cost[0] - cost[1]).unsqueeze(-1) * (z[0] - z[1])
    return cost.mean(0).sum(), _gradients(program, logits, g, pixels, x, 2)


def disarm(program: Program, x: Tensor) -> tuple[Tensor, Grads]:
    """An antithetic pair, both of which train the decoder."""
    logits = _network(x, program.encoder)
    eta = logits.detach()
    p = eta.sigmoid()
    u = torch.rand_like(p)
    z = torch.stack([(u > 1 - p).to(p.dtype), (u < p).to(p.dtype)])
    pixels = _network(z, program.decoder)
    cost = program.log_ratio(eta, z) - _log_likelihood(pixels.detach(), x)
    contrast = 0.5 * (cost[0] - cost[1]).unsqueeze(-1) * (z[0] - z[1])
    g = contrast * torch.maximum(p, 1 - p)
    return cost.mean(0).sum(), _gradients(program, logits, g, pixels, x, 2)


def straight_through(program: Program, x: Tensor) -> tuple[Tensor, Grads]:
    """A hard value with the gradient of the relaxed one."""
    logits = _network(x, program.encoder)
    eta = logits.detach()
    perturbed = eta + _logistic(eta)
    z = (perturbed > 0).to(eta.dtype).requires_grad_()
    soft = (perturbed / TEMPERATURE).sigmoid()
    pixels = _network(z, program.decoder)
    residual = pixels.detach().sigmoid() - x
    slope, *decoder = torch.autograd.grad(pixels, [z, *program.decoder], residual)
    z = z.detach()
    slope = slope + eta - program.prior
    g = z - eta.sigmoid() + slope * soft * (1 - soft) / TEMPERATURE
    cost = program.log_ratio(eta, z) - _log_likelihood(pixels.detach(), x)
    return cost.sum(), [*torch.autograd.grad(logits, program.encoder, g), *decoder]


def control_variate(program: Program, x: Tensor) -> tuple[Tensor, Grads]:
    """REBAR, and RELAX where there is a network.

    The slope of the cost at the two soft values is found once and held constant in the training
    of the control variate, which differentiates elementwise functions and the network alone.
    """
    logits = _network(x, program.encoder)
    eta = logits.detach()
    p = eta.sigmoid()
    perturbed = eta + _logistic(eta)
    z = (perturbed > 0).to(eta.dtype)
    score = z - p
    pair, slopes_of_pair = _twins(eta, perturbed, z)
    temperature = program.learnt[0].exp()
    soft = (pair / temperature).sigmoid()
    placed = soft.detach().requires_grad_()

    pixels = _network(placed, [w.detach() for w in program.decoder])
    residual = pixels.detach().sigmoid() - x
    (slope,) = torch.autograd.grad(pixels, placed, residual)
    slope = slope + eta - program.prior
    placed = placed.detach()
    soft_cost = program.log_ratio(eta, placed[1]) - _log_likelihood(pixels[1].detach(), x)

    pixels = _network(z, program.decoder)
    cost = program.log_ratio(eta, z) - _log_likelihood(pixels.detach(), x)

    strength, baseline = program.learnt[1], program.baseline()
    twin = soft_cost + (slope[1] * (soft[1] - placed[1])).sum(-1)
    twin = baseline + strength * (twin - baseline)
    slope = strength * slope
    if len(program.learnt) > 2:
        guess = _guess(soft, program.learnt[2:])
        (own,) = torch.autograd.grad((guess[0] + guess[1]).sum(), soft, create_graph=True)
        twin, slope = twin + guess[1], slope + own
    moved = slope * soft * (1 - soft) / temperature * slopes_of_pair
    g = (cost - twin).unsqueeze(-1) * score + moved[0] - moved[1]
    learnt = torch.autograd.grad(g.square().sum(), program.learnt)
    grads = _gradients(program, logits, g.detach(), pixels, x)
    program.update(cost)
    return cost.sum(), [*grads, *learnt]


def _logistic(like: Tensor) -> Tensor:
    half_eps = torch.finfo(like.dtype).eps / 2
    return torch.rand_like(like).clamp(half_eps, 1 - half_eps).logit()


def _twins(eta: Tensor, perturbed: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The perturbed logits and their twins given the bits, and the slopes of both in the logits."""
    sign = 2 * z - 1
    inner = _logistic(eta) + softplus(sign * eta)
    twin = sign * softplus(inner)
    slope = inner.sigmoid() * (sign * eta).sigmoid()
    return torch.stack([perturbed, twin]), torch.stack([torch.ones_like(slope), slope])


def _guess(soft: Tensor, layers: list[Tensor]) -> Tensor:
    hidden = linear(soft, layers[0], layers[1]).tanh()
    return linear(hidden, layers[2], layers[3]).squeeze(-1)


ESTIMATES: dict[str, Estimate] = {
    "REINFORCE": reinforce,
    "RLOO(2)": rloo,
    "DisARM": disarm,
    "REBAR": control_variate,
    "RELAX": control_variate,
    "StraightThrough": straight_through,
}


def program_of(name: str, vae: VAE) -> Program:
    """The tensors of a VAE, and new ones for what an estimator learns."""
    place: dict[str, Any] = {"device": vae.device}
    learnt: list[Tensor] = []
    if name in ("REBAR", "RELAX"):
        learnt = [
            nn.Parameter(torch.tensor(math.log(TEMPERATURE), **place)),
            nn.Parameter(torch.tensor(1.0, **place)),
        ]
    if name == "RELAX":
        for layer in (nn.Linear(len(vae.prior), WIDTH), nn.Linear(WIDTH, 1)):
            learnt += layer.to(**place).parameters()
    average = [torch.zeros((), **place) for _ in range(2)]
    return Program(
        list(vae.encoder.parameters()),
        list(vae.decoder.parameters()),
        vae.prior,
        learnt,
        average if name == "REINFORCE" or learnt else [],
    )


def eager(name: str, program: Program, x: Tensor) -> tuple[Tensor, Grads]:
    """The loss and the gradients, for the encoder, the decoder, and what is learnt."""
    return ESTIMATES[name](program, x)


class HandStep:
    """A whole step: the recorded gradient function, compiled, and one fused Adam.

    Arguments:
        name: Of the estimator.
        vae: Whose parameters are trained.
        x: A batch, for its shape.
        options: Of inductor; None replays the recorded operations one by one.
        lr: Of Adam.
    """

    def __init__(
        self, name: str, vae: VAE, x: Tensor, options: dict[str, Any] | None, lr: float = 1e-3
    ) -> None:
        program = program_of(name, vae)
        self.tensors = program.tensors()
        self.parameters = [*program.encoder, *program.decoder, *program.learnt]
        self.adam = torch.optim.Adam(self.parameters, lr=lr, fused=True)
        self.run = _recorded(name, program, x, options)

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            loss, *grads = self.run(*self.tensors, x)
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter.grad = grad
        self.adam.step()
        return loss


def _recorded(
    name: str, program: Program, x: Tensor, options: dict[str, Any] | None
) -> Callable[..., Any]:
    tensors = program.tensors()

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        *rest, batch = given
        for old, new in zip(tensors, rest, strict=True):
            new.requires_grad_(old.requires_grad)
        with torch.enable_grad():
            loss, grads = eager(name, program.with_tensors(rest), batch)
        return (loss.detach(), *(g.detach() for g in grads))

    return compiled(function, [*(t.detach() for t in tensors), x], options)
