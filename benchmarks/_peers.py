"""The step of a Bernoulli VAE in Storchastic, where it is installed.

Its REBAR, ARM and DisARM find wrong gradients and are left out. It averages costs over images
where the others sum them, which costs the same.
"""

from importlib.util import find_spec
from typing import Any

import torch
from _timing import Step
from _vae import VAE
from torch import Tensor
from torch.distributions import Bernoulli

NAMES = ("REINFORCE", "RLOO(2)", "RELAX", "StraightThrough")


def storchastic_step(name: str, vae: VAE, x: Tensor, lr: float = 1e-3) -> Step | None:
    """A whole step of an estimator with Adam, or None without the library or the estimator.

    Arguments:
        name: Of the estimator, as this library calls it.
        vae: Whose parameters are trained.
        x: A batch.
        lr: Of Adam.
    """
    if name not in NAMES or any(find_spec(each) is None for each in ("storch", "entmax")):
        return None
    import storch

    method = _method(name, len(vae.prior)).to(vae.device)
    encode, decode = (storch.deterministic(net.forward) for net in (vae.encoder, vae.decoder))
    trained = [*vae.encoder.parameters(), *vae.decoder.parameters(), *method.parameters()]
    adam = torch.optim.Adam(trained, lr=lr, fused=True)

    @storch.deterministic
    def cost(logits: Tensor, z: Tensor, pixels: Tensor, images: Tensor) -> Tensor:
        log_q = Bernoulli(logits=logits, validate_args=False).log_prob(z).sum(-1)
        log_prior = Bernoulli(logits=vae.prior, validate_args=False).log_prob(z).sum(-1)
        log_p = Bernoulli(logits=pixels, validate_args=False).log_prob(images).sum(-1)
        return log_q - log_prior - log_p

    def step() -> Tensor:
        adam.zero_grad()
        images = storch.denote_independent(x, 0, "data")
        logits = encode(images)
        # RELAX asks for the gradient of probabilities
        law = Bernoulli(probs=logits.sigmoid()) if name == "RELAX" else Bernoulli(logits=logits)
        z = method(law)
        storch.add_cost(cost(logits, z, decode(z), images), "cost")
        loss: Tensor = storch.backward()
        adam.step()
        return loss.detach()

    return step


def _method(name: str, bits: int) -> Any:
    from storch import method

    if name == "REINFORCE":
        return method.ScoreFunction("z", n_samples=1, baseline_factory="moving_average")
    if name == "RLOO(2)":
        return method.ScoreFunction("z", n_samples=2, baseline_factory="batch_average")
    if name == "RELAX":
        return method.RELAX("z", n_samples=1, in_dim=bits)
    return method.GumbelSoftmax("z", straight_through=True, initial_temperature=0.5)
