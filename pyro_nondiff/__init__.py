"""Gradients for Pyro programs that contain things with no derivative.

A program says what is drawn; how the gradient of each draw is estimated is chosen from
outside, one estimator a site or one for all of them. Here a guide learns the posterior
of a coin, whose log-odds are exactly ``log(0.3 / 0.7) + 2 = 1.15``:

Example:
    >>> from pyro.infer import SVI
    >>> from pyro.optim import Adam
    >>> from pyro_nondiff.estimators import RLOO
    >>> from pyro_nondiff.infer import TraceEstimator_ELBO
    >>> def model(x):
    ...     z = pyro.sample("z", dist.Bernoulli(0.3))
    ...     pyro.sample("x", dist.Normal(2 * z - 1, 1.0), obs=x)
    >>> def guide(x):
    ...     logit = pyro.param("logit", torch.tensor(0.0))
    ...     pyro.sample("z", dist.Bernoulli(logits=logit))
    >>> elbo = TraceEstimator_ELBO(RLOO(num_samples=4))
    >>> svi = SVI(model, guide, Adam({"lr": 0.05}), loss=elbo)
    >>> losses = [svi.step(torch.tensor(1.0)) for _ in range(300)]
    >>> round(pyro.param("logit").item(), 2)
    1.15
"""

from . import diagnostics as diagnostics
from . import distributions as distributions
from . import errors as errors
from . import estimators as estimators
from . import handlers as handlers
from . import infer as infer
from . import nn as nn
from . import noise as noise
from . import ops as ops
from . import testing as testing

__version__ = "0.1.0"
