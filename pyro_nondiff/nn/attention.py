"""Attention whose choice is an op, so that a handler around the program makes it soft or hard."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ..errors import NonDiffError
from ..ops import select

__all__ = ["AbstractAttention", "AdditiveAttention", "DotProductAttention"]

_NEVER = -1e4
"""The score of what must not be chosen: its softmax is 0, and half precision holds it."""


class AbstractAttention(nn.Module, ABC):
    r"""Chooses one of some values for each query, by a score for each pair of query and key.

    .. math:: c_i = \sum_j z_{ij} v_j, \qquad z_i = \mathrm{argmax}_j \, s(q_i, k_j)

    The choice is the op :func:`pyro_nondiff.ops.select`, by the name that a call gives it. With no
    handler it is hard and teaches the scores nothing; ``soften()`` makes it soft attention,
    ``randomize()`` hard attention that is trained by the estimator of the site of that name.

    A subclass says what :meth:`pair_scores` are.
    """

    @abstractmethod
    def pair_scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """The score of each pair, with no regard to what may be chosen.

        Arguments:
            queries: Shape ``(..., queries, size)``.
            keys: Shape ``(..., keys, size)``.

        Returns:
            Shape ``(..., queries, keys)``.
        """

    def scores(self, queries: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """As :meth:`pair_scores`, and very low for a pair that the mask forbids.

        Arguments:
            queries: Shape ``(..., queries, size)``.
            keys: Shape ``(..., keys, size)``.
            mask: True for what may be chosen. It broadcasts with the scores: for padded sequences
                of keys it has shape ``(batch, 1, keys)``. A query that may choose nothing has the
                same score for all keys.

        Returns:
            Shape ``(..., queries, keys)``.

        Raises:
            NonDiffError: For a mask that is not boolean or does not fit.
        """
        found = self.pair_scores(queries, keys)
        if mask is None:
            return found
        if mask.dtype != torch.bool:
            raise NonDiffError(
                f"{type(self).__name__}: mask must be boolean, True for what may be chosen, found "
                f"{mask.dtype}. Compare first: mask != 0."
            )
        try:
            return found.masked_fill(~mask, _NEVER)
        except RuntimeError as error:
            raise NonDiffError(
                f"{type(self).__name__}: a mask of shape {tuple(mask.shape)} does not broadcast "
                f"with scores of shape {tuple(found.shape)}. For padded keys give it shape "
                "(batch, 1, keys)."
            ) from error

    def forward(
        self,
        name: str,
        queries: Tensor,
        keys: Tensor,
        values: Tensor | None = None,
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The value that each query chooses, or their sum by weights.

        Arguments:
            name: The name of the op :func:`pyro_nondiff.ops.select`, unique in the program. Under
                ``randomize`` it is a sample site with the batch shape ``(..., queries)``: declare
                a plate for each of these dimensions.
            queries: Shape ``(..., queries, size)``.
            keys: Shape ``(..., keys, size)``.
            values: Shape ``(..., keys, value_size)``; the keys if None.
            mask: As for :meth:`scores`.

        Returns:
            Shape ``(..., queries, value_size)``.
        """
        values = keys if values is None else values
        scores = self.scores(queries, keys, mask)
        found: Tensor = select(name, scores, values.unsqueeze(-3), event_dim=1)
        return found


class AdditiveAttention(AbstractAttention):
    r"""Attention with a small network for the score of a pair.

    .. math:: s(q, k) = v^\top \tanh(W_q q + W_k k + b)

    Arguments:
        query_size: The size of a query.
        key_size: The size of a key.
        hidden_size: The size of the network's hidden layer.

    Example:
        >>> from pyro_nondiff.handlers import soften
        >>> from pyro_nondiff.nn import AdditiveAttention
        >>> attention = AdditiveAttention(query_size=4, key_size=6, hidden_size=8)
        >>> states, memory = torch.randn(2, 5, 4), torch.randn(2, 3, 6)
        >>> mask = torch.tensor([[True, True, True], [True, True, False]])
        >>> with soften():
        ...     attention("source", states, memory, mask=mask[:, None]).shape
        torch.Size([2, 5, 6])

    References:
        | Neural Machine Translation by Jointly Learning to Align and Translate
          (Bahdanau et al., 2015)
        | https://arxiv.org/abs/1409.0473
    """

    def __init__(self, query_size: int, key_size: int, hidden_size: int) -> None:
        super().__init__()
        self.query = nn.Linear(query_size, hidden_size)
        self.key = nn.Linear(key_size, hidden_size, bias=False)
        self.score = nn.Linear(hidden_size, 1, bias=False)

    def pair_scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        pairs = self.query(queries).unsqueeze(-2) + self.key(keys).unsqueeze(-3)
        scores: Tensor = self.score(pairs.tanh()).squeeze(-1)
        return scores


class DotProductAttention(AbstractAttention):
    r"""Attention with the scaled product of query and key as score; nothing is learnt in it.

    .. math:: s(q, k) = q^\top k / \sqrt{\mathrm{size}}

    Example:
        >>> from pyro_nondiff.nn import DotProductAttention
        >>> keys = torch.eye(3)
        >>> DotProductAttention()("item", keys[[2, 0]], keys, torch.tensor([[1.0], [2.0], [3.0]]))
        tensor([[3.],
                [1.]])

    References:
        | Attention Is All You Need (Vaswani et al., 2017)
        | https://arxiv.org/abs/1706.03762
    """

    def pair_scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        products: Tensor = queries @ keys.transpose(-1, -2)
        return products / math.sqrt(keys.shape[-1])
