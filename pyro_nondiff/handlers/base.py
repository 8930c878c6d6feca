"""What all handlers have in common: which sites they are for, and how they are put on."""

from abc import ABC
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, ClassVar, Self, TypeAlias

from pyro.poutine.messenger import Messenger
from torch import nn

from ..errors import NonDiffError
from ..ops._op import IN_WORLDS, Answer, Call, Op

__all__ = ["AbstractChooser", "AbstractHandler", "Sites"]

Sites: TypeAlias = str | Collection[str] | Callable[[str], bool] | None
"""Names of sites, or a predicate on them; None for all."""

Rule: TypeAlias = Callable[..., Any]
"""What a handler does with an op: ``rule(handler, name, *args, **kwargs)``."""


class AbstractChooser(Messenger, ABC):
    """A Messenger for some of a program's sites.

    It is a context manager, a decorator, and a wrapper: ``handler(fn)``; a module comes back as a
    module with the same parameters.

    Arguments:
        sites: The sites that it is for: names, a predicate on names, or None for all.

    Raises:
        NonDiffError: At the end of a program that did not meet one of the names.
    """

    def __init__(self, sites: Sites = None) -> None:
        super().__init__()
        self.sites = sites if sites is None or callable(sites) else _as_names(sites)
        self._met: set[str] = set()

    def is_for(self, name: str) -> bool:
        """Whether a site that the program meets is one of ``sites``."""
        self._met.add(name)
        if self.sites is None:
            return True
        return self.sites(name) if callable(self.sites) else name in self.sites

    def gives(self, msg: Any) -> bool:
        """Whether the handler is to give a latent site its value.

        Raises:
            NonDiffError: If an objective inside has given it one.
        """
        if msg["is_observed"] or not self.is_for(msg["name"]):
            return False
        if msg.get(IN_WORLDS):
            raise NonDiffError(
                f"{type(self).__name__} is around an objective, which has drawn site "
                f"'{msg['name']}' already. Put it around the program: "
                f"loss({type(self).__name__}(...)(program), ...)."
            )
        return msg["value"] is None

    def __enter__(self) -> Self:
        self._met = set()
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        if exc_type is not None or not isinstance(self.sites, frozenset):
            return
        if unknown := sorted(self.sites - self._met):
            raise NonDiffError(
                f"{type(self).__name__}: sites has {unknown}, but the program met "
                f"{sorted(self._met)}. Correct the name; for one that not every run meets, give a "
                "predicate: sites=lambda name: ..."
            )

    def __call__(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """The program ``fn`` under this handler."""
        return _Handled(fn, self) if isinstance(fn, nn.Module) else super().__call__(fn)


class AbstractHandler(AbstractChooser):
    """Says how ops are smoothed: it has a rule an op, and the innermost that applies wins.

    With ``sites=None`` an op that the handler has no rule for passes to the next one outside. If
    ``sites`` picks such an op, that is an error.

    Arguments:
        sites: The ops that it is for: names, a predicate on names, or None for all that it has a
            rule for.

    Raises:
        NonDiffError: For an op that ``sites`` picks and the handler has no rule for; at the end of
            a program that did not meet one of the names.
    """

    rules: ClassVar[dict[Op, Rule]] = {}
    hard: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        cls.rules = dict(cls.rules)

    @classmethod
    def rule(cls, op: Op) -> Callable[[Rule], Rule]:
        """Decorates the function that says what the handler does with an op.

        Arguments:
            op: The op. The rule is called as ``rule(handler, name, *args, **kwargs)`` and returns
                the op's value, or :class:`pyro_nondiff.ops.Drawn` for a sample site.
        """

        def learn(rule: Rule) -> Rule:
            cls.rules[op] = rule
            return rule

        return learn

    def _find(self, call: Call) -> Callable[..., Any] | None:
        """What answers for an op, or None to leave it to the next handler outside."""
        if (rule := self.rules.get(call.op)) is not None:
            return partial(rule, self)
        if self.sites is None:
            return None
        raise NonDiffError(
            f"{type(self).__name__} has no rule for op '{call.name}', which is of kind "
            f"{call.op.__name__}: it knows {sorted(op.__name__ for op in self.rules)}. Take the "
            "name out of sites, or use another handler."
        )

    def _pyro_nondiff(self, msg: Any) -> None:
        """Answers for an op, unless a handler further in has."""
        (call,) = msg["args"]
        if not self.is_for(call.name) or msg["value"] is not None:
            return
        if (respond := self._find(call)) is not None:
            msg["value"] = Answer(respond, self.hard)


class _Handled(nn.Module):
    """A module run under a handler, so that its parameters stay visible."""

    def __init__(self, module: nn.Module, handler: AbstractChooser) -> None:
        super().__init__()
        self.module = module
        self._handler = handler

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._handler:
            return self.module(*args, **kwargs)


def _as_names(sites: str | Collection[str]) -> frozenset[str]:
    return frozenset([sites] if isinstance(sites, str) else sites)
