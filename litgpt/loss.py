"""Linear head + cross entropy without ever holding all logits; sums over counted tokens, so that means are exact.

Knows hidden states, a head and targets; knows no model.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
# Logits held at a time. On the CPU 32 MB: larger blocks go back to the system and cost page faults each time.
CPU_LOGITS, DEVICE_LOGITS = 2**23, 2**27


class Loss(NamedTuple):
    """A sum and the number of tokens it runs over; divide once, over the whole global batch."""

    total: Tensor  # () fp32, nats
    count: Tensor  # type: ignore[assignment]  # () int64; it hides tuple.count, which nobody needs


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, softcap: float | None = None
) -> Loss:
    """Cross entropy of `softcap(hidden @ weight.T + bias)` against `targets`, summed over the counted positions.

    Args:
        hidden: (..., C), the output of the last norm.
        weight: (V, C), the head.
        targets: (...) int64; positions that hold -100 are neither computed nor counted.
        bias: (V,) or None.
        softcap: logits become `softcap * tanh(logits / softcap)`.
    """
    hidden, targets = hidden.reshape(-1, hidden.size(-1)), targets.reshape(-1)
    counted = targets != IGNORE_INDEX
    count = counted.sum()
    if hidden.device.type == "cpu" and count < targets.numel():  # elsewhere the gather would wait for the device
        hidden, targets = hidden[counted], targets[counted]
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    rows = max(16, (CPU_LOGITS if hidden.device.type == "cpu" else DEVICE_LOGITS) // len(weight))
    if _torch_is_faster(hidden, softcap):
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
        total = F.linear_cross_entropy(
            hidden, weight, targets, linear_bias=bias, reduction="sum", ignore_index=IGNORE_INDEX, options=options
        )
    elif torch.is_grad_enabled():
        total = _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, softcap, rows)
    else:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
            total += _rows_loss(F.linear(h, weight, bias), t, softcap, needs_grad=False)[0]
    return Loss(total, count)


def _torch_is_faster(hidden: Tensor, softcap: float | None) -> bool:
    """torch 2.13 brings the same idea; on the CPU it is an eighth faster in fp32, and three times slower in bf16."""
    eager_cpu = hidden.device.type == "cpu" and not torch.compiler.is_compiling()
    plain = softcap is None and len(hidden) > 0 and hidden.dtype == torch.float32 and eager_cpu
    return plain and hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Takes the gradients chunk by chunk in the forward, while the chunk's logits are at hand.

    The price is that the weight's gradient is held between forward and backward; logits (N x V) never are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        at_once: int,
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        # in fp32: a sum over many chunks in bf16 would lose the small terms
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias and bias is not None else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(targets), at_once):
                rows = slice(start, start + at_once)
                h = hidden[rows]  # (R, C)
                loss, d_logits = _rows_loss(
                    F.linear(h, weight, bias), targets[rows], softcap, any(ctx.needs_input_grad)
                )
                total += loss
                if d_logits is None:
                    continue
                if d_bias is not None:
                    d_bias += d_logits.sum(0)
                d_logits = d_logits.to(h.dtype)
                if d_hidden is not None:
                    torch.mm(d_logits, weight, out=d_hidden[rows])
                if d_weight is not None:
                    d_weight = _add_outer(d_weight, d_logits, h)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grads
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            # in place: they are ours, and used once
            None if d_hidden is None else d_hidden.mul_(scale.to(d_hidden.dtype)),
            None if d_weight is None else d_weight.mul_(scale).to(weight_dtype),
            None if d_bias is None else d_bias.mul_(scale).to(bias_dtype),
            *(None,) * 3,
        )


def _add_outer(total: Tensor, d_logits: Tensor, h: Tensor) -> Tensor:
    """`total + d_logits.T @ h`, (V, C), accumulated in `total`'s precision."""
    if total.dtype == h.dtype:
        return total.addmm_(d_logits.T, h)
    return total.add_(torch.mm(d_logits.T, h))


def _rows_loss(
    logits: Tensor, targets: Tensor, softcap: float | None, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Summed loss of a few rows of logits (R, V) and its gradient by the raw logits, both fp32."""
    logits = logits.float()
    bent = torch.tanh(logits / softcap) if softcap else None
    if bent is not None and softcap:
        logits = bent * softcap
    log_p = F.log_softmax(logits, dim=1)
    counted = (targets != IGNORE_INDEX).unsqueeze(1)  # (R, 1)
    picked = targets.clamp(min=0).unsqueeze(1)  # (R, 1)
    loss = -(log_p.gather(1, picked) * counted).sum()
    if not needs_grad:
        return loss, None
    grad = log_p.exp_()  # the softmax, in the log-probabilities' own memory
    grad.scatter_add_(1, picked, torch.full_like(picked, -1, dtype=grad.dtype))
    if bent is not None:
        grad *= 1 - bent * bent
    # on the CPU ignored rows were dropped before; elsewhere one more pass is cheaper than waiting for the device
    return loss, grad if grad.device.type == "cpu" else grad.mul_(counted)
