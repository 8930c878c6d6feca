"""Hard values without gradient: the op's own, or those of an earlier run."""

from collections.abc import Callable, Mapping
from typing import Any

from pyro.poutine import Trace

from ..errors import NonDiffError
from ..ops._op import Call, plain
from .base import AbstractChooser, AbstractHandler, Sites

__all__ = ["given", "ignore", "replay"]


class ignore(AbstractHandler):
    """The hard value, and no gradient to what decides it: the lecture's "ignore it".

    That is what every op does with no handler: this says so, and keeps the handlers outside away.
    What does not decide keeps its gradient: the chosen item of a ``select``.

    Arguments:
        sites: As for :class:`AbstractHandler`.

    Example:
        >>> from pyro_nondiff.handlers import ignore, soften
        >>> from pyro_nondiff.ops import argmax
        >>> with soften(), ignore(sites="hard"):
        ...     argmax("hard", torch.tensor([0.0, 1.0])), argmax("soft", torch.tensor([0.0, 1.0]))
        (tensor([0., 1.]), tensor([0.2689, 0.7311]))

    References:
        | Fast R-CNN (Girshick, 2015), whose pooling has no gradient to the box
        | https://arxiv.org/abs/1504.08083
    """

    hard = True

    def __init__(self, *, sites: Sites = None) -> None:
        super().__init__(sites)

    def _find(self, call: Call) -> Callable[..., Any]:
        return plain(call.op)


class replay(AbstractHandler):
    """The value that an op had in an earlier run: nothing is computed, called or differentiated.

    So a program can be run again without asking the person or the simulator behind an ``external``.
    For sample sites, also those that ``randomize`` makes, there is ``pyro.poutine.replay``.

    Arguments:
        values: A trace, or a mapping from names to values. Ops that it does not name pass.
        sites: As for :class:`AbstractHandler`; a name that ``values`` lacks is an error.

    Example:
        >>> from pyro_nondiff.handlers import replay
        >>> from pyro_nondiff.ops import external
        >>> def program():
        ...     return external("answer", lambda: input("how many? "))
        >>> replay({"answer": torch.tensor(3)})(program)()
        tensor(3)
    """

    def __init__(self, values: Trace | Mapping[str, Any], *, sites: Sites = None) -> None:
        super().__init__(sites)
        if isinstance(values, Trace):
            nodes = values.nodes.items()
            values = {name: site["value"] for name, site in nodes if site["type"] == "sample"}
        self.values = dict(values)

    def _find(self, call: Call) -> Callable[..., Any] | None:
        if call.name in self.values:
            value = self.values[call.name]
            return lambda *args, **kwargs: value.detach()
        if self.sites is None:
            return None
        raise NonDiffError(
            f"replay has no value for op '{call.name}': it knows {sorted(self.values)}. Take the "
            "name out of sites."
        )


class given(AbstractChooser):
    """A random site has a value that was drawn elsewhere, and stays random.

    Unlike ``pyro.poutine.condition``, which makes it an observation: here its law keeps a score,
    and an estimator that needs no draw of its own serves it. So the steps of many episodes,
    gathered by a policy that acted in an environment, become one vectorised site of its program.

    Arguments:
        values: A mapping from names of sample sites to values, drawn from the law that the program
            gives them now.

    Raises:
        NonDiffError: At the end of a program that did not meet one of the names.

    Example:
        >>> from pyro_nondiff.handlers import given
        >>> def program():
        ...     return pyro.sample("action", dist.Categorical(torch.ones(3)).expand([2]))
        >>> given({"action": torch.tensor([2, 0])})(program)()
        tensor([2, 0])
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(list(values))
        self.values = dict(values)

    def _pyro_sample(self, msg: Any) -> None:
        if self.is_for(msg["name"]) and self.gives(msg):
            msg["value"], msg["done"] = self.values[msg["name"]], True
