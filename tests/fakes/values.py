"""What is in a KV cache, as codecs may find it."""

from __future__ import annotations

from collections.abc import Callable

import torch


def normal(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(count, generator=generator)


def far_from_zero(count: int, generator: torch.Generator) -> torch.Tensor:
    return 300 + torch.randn(count, generator=generator)


def with_outliers(count: int, generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(count, generator=generator)
    return values * torch.where(torch.rand(count, generator=generator) < 0.05, 500.0, 1.0)


def of_few_values(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 3, (count,), generator=generator) * 0.75


def constant(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.full((count,), -1.234)


def zero(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.zeros(count)


def of_every_size(count: int, generator: torch.Generator) -> torch.Tensor:
    """Denormals of float16, too."""
    exponents = torch.randint(-24, 15, (count,), generator=generator)
    return torch.randn(count, generator=generator) * 2.0**exponents


Values = Callable[[int, torch.Generator], torch.Tensor]
VALUES: list[Values] = [
    normal, far_from_zero, with_outliers, of_few_values, constant, zero, of_every_size,
]  # fmt: skip


def fill(values: Values, dtype: torch.dtype, seed: int) -> Callable[[int], torch.Tensor]:
    """Return what ``make_parts`` fills memory with: the same at every call with one seed."""
    generator = torch.Generator().manual_seed(seed)
    # Without zeros that are negative; there is a test about them.
    return lambda count: values(count, generator).to(dtype) + 0
