"""How far the student's distribution is from the teacher's, over the vocabulary or a part of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST_REST = 1e-7  # of the probability, so that its logarithm is finite


def divergence(kind: str, teacher: Tensor, student: Tensor) -> Tensor:
    """(tokens,) in nats, from log-probabilities (tokens, outcomes).

    kind: kl is KL(teacher || student); reverse-kl is KL(student || teacher); js is the Jensen-Shannon divergence, the
        mean of the divergences of both from their mean (arXiv 2306.13649, equation 1, with beta = 1/2).
    """
    if kind == "kl":
        return _kl(teacher, student)
    if kind == "reverse-kl":
        return _kl(student, teacher)
    mean = torch.logaddexp(teacher, student) - math.log(2)
    return (_kl(teacher, mean) + _kl(student, mean)) / 2


def with_rest(some: Tensor) -> Tensor:
    """(tokens, k) log-probabilities -> (tokens, k + 1): the last is what the others leave, kept away from log(0)."""
    rest = (1 - some.exp().sum(-1, keepdim=True)).clamp(min=LEAST_REST)
    return torch.cat([some, rest.log()], dim=-1)


def _kl(first: Tensor, second: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vecdot(first.exp(), first - second)
    return found
