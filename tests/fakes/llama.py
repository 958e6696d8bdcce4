"""A tiny Llama in plain PyTorch: what an engine would compute, with any matrix disturbed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch

HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 128, 256, 4, 4, 2, 32, 512

# By matrix, the RMS of its output when its input has RMS 1: so that attention reads a few keys
# only, and no layer is lost beside the others.
_GAINS = {
    "q": 1.5, "k": 1.5, "v": 1.0, "o": 2.0, "gate": 1.5, "up": 1.5, "down": 1.5,
}  # fmt: skip

Weights = dict[str, torch.Tensor]
Round = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class Computed:
    """keys, values: one a layer, ``[tokens, heads, channels]``. logits: after the last token."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    logits: torch.Tensor


def random_weights(seed: int = 1) -> Weights:
    """Return float32 matrices ``[out, in]``, and the weights of the norms."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, gain: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * gain / math.sqrt(columns)

    shapes = {
        "q": (HEADS * HEAD_DIM, HIDDEN), "k": (KV_HEADS * HEAD_DIM, HIDDEN),
        "v": (KV_HEADS * HEAD_DIM, HIDDEN), "o": (HIDDEN, HEADS * HEAD_DIM),
        "gate": (MLP, HIDDEN), "up": (MLP, HIDDEN), "down": (HIDDEN, MLP),
    }  # fmt: skip
    weights = {"embed": torch.randn(VOCAB, HIDDEN, generator=generator) * 4.0}
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            weights[f"{layer}.{name}"] = matrix(*shape, _GAINS[name])
        for norm in ("attn_norm", "mlp_norm"):
            weights[f"{layer}.{norm}"] = 1 + 0.1 * torch.randn(HIDDEN, generator=generator)
    weights["norm"] = 1 + 0.1 * torch.randn(HIDDEN, generator=generator)
    weights["head"] = matrix(VOCAB, HIDDEN, 3.0)
    return weights


def compute(
    weights: Weights,
    tokens: Sequence[int],
    dtype: torch.dtype = torch.float32,
    rope_scale: float = 1.0,
    rounds_often: bool = True,
) -> Computed:
    """Return what the model computes in a type.

    rope_scale: positions are divided by it.
    rounds_often: after each operation, as separate kernels do; else only what matrices and layers
        hand on, as fused ones do: what two releases may differ by.
    """
    with torch.no_grad():
        return _Pass(weights, dtype, rope_scale, rounds_often).run(torch.tensor(list(tokens)))


class _Pass:
    def __init__(
        self, weights: Weights, dtype: torch.dtype, rope_scale: float, rounds_often: bool
    ) -> None:
        self._weights = {name: weight.to(dtype).float() for name, weight in weights.items()}
        self._rope_scale = rope_scale
        self._hand_on: Round = lambda x: x.to(dtype).float()
        self._inside: Round = self._hand_on if rounds_often else lambda x: x

    def run(self, tokens: torch.Tensor) -> Computed:
        hidden = self._weights["embed"][tokens]
        keys, values = [], []
        for layer in range(LAYERS):
            key, value, added = self._attend(layer, hidden)
            keys.append(key)
            values.append(value)
            hidden = self._hand_on(hidden + added)
            hidden = self._hand_on(hidden + self._mlp(layer, hidden))
        last = self._norm("norm", hidden)[-1]
        return Computed(keys, values, self._hand_on(self._weights["head"] @ last))

    def _attend(
        self, layer: int, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        normed = self._norm(f"{layer}.attn_norm", hidden)
        query, key, value = (
            self._times(f"{layer}.{name}", normed).view(len(hidden), -1, HEAD_DIM)
            for name in ("q", "k", "v")
        )
        query, key = self._rotate(query), self._rotate(key)
        shared = HEADS // KV_HEADS
        scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(shared, 1))
        masked = scores / math.sqrt(HEAD_DIM)
        masked = masked + torch.full_like(masked, -torch.inf).triu(1)
        mixed = torch.einsum(
            "hqk,khd->qhd",
            self._inside(masked.softmax(-1)),
            value.repeat_interleave(shared, 1),
        )
        return key, value, self._times(f"{layer}.o", self._hand_on(mixed).flatten(1))

    def _mlp(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        normed = self._norm(f"{layer}.mlp_norm", hidden)
        gate = self._inside(torch.nn.functional.silu(self._times(f"{layer}.gate", normed)))
        product = self._hand_on(gate * self._times(f"{layer}.up", normed))
        return self._times(f"{layer}.down", product)

    def _norm(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        scaled = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self._hand_on(self._inside(scaled) * self._weights[name])

    def _times(self, name: str, values: torch.Tensor) -> torch.Tensor:
        return self._hand_on(values @ self._weights[name].T)

    def _rotate(self, heads: torch.Tensor) -> torch.Tensor:
        half = HEAD_DIM // 2
        frequencies = 10_000.0 ** (-torch.arange(half) / half)
        angles = torch.arange(len(heads))[:, None] / self._rope_scale * frequencies
        cosine, sine = angles.cos()[:, None], angles.sin()[:, None]
        one, other = heads[..., :half], heads[..., half:]
        return self._hand_on(
            torch.cat([one * cosine - other * sine, other * cosine + one * sine], -1)
        )
