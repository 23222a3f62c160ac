"""What the CPU does in steps of its own: equal to PyTorch's kernels, gradients included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt import cpu
from litgpt.model import GPT
from tests.makers.configs import NAMES, shrunk

LENGTHS = [[5, 300, 1], [129, 128, 49]]  # around the size of a block of queries


def by_torch(q: Tensor, k: Tensor, v: Tensor, documents: list[list[int]], scale: float) -> Tensor:
    rows = []
    for row, lengths in enumerate(documents):
        parts = zip(*(t[row : row + 1].split(lengths, dim=2) for t in (q, k, v)), strict=True)
        rows.append(
            torch.cat(
                [F.scaled_dot_product_attention(*part, is_causal=True, scale=scale, enable_gqa=True) for part in parts],
                dim=2,
            )
        )
    return torch.cat(rows)


def made(heads: int, groups: int, size: int, value_size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v as a model hands them over: heads and positions transposed."""
    drawn = torch.Generator().manual_seed(0)
    sizes = ((heads, size), (groups, size), (groups, value_size))
    tensors = (torch.randn(2, 306, h, s, generator=drawn).to(dtype).transpose(1, 2) for h, s in sizes)
    return tuple(t.requires_grad_() for t in tensors)


@pytest.mark.parametrize(("heads", "groups", "value_size"), [(4, 4, 8), (6, 2, 8), (4, 1, 8), (4, 4, 12)])
def test_attention_in_documents_equals_torch(heads: int, groups: int, value_size: int) -> None:
    inputs = made(heads, groups, 8, value_size, torch.float64)
    weights = torch.randn(2, heads, 306, value_size, dtype=torch.float64)
    mine, theirs = (f(*inputs, LENGTHS, 0.3) for f in (cpu.attend_documents, by_torch))
    torch.testing.assert_close(mine, theirs)
    gradients = (torch.autograd.grad((y * weights).sum(), inputs) for y in (mine, theirs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_attention_in_bf16_is_as_near_to_the_truth_as_torch_is() -> None:
    inputs = made(6, 2, 8, 8, torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    truth = torch.autograd.grad(by_torch(*exact, LENGTHS, 0.3).square().sum(), exact)

    def error(attend: object) -> list[float]:
        found = torch.autograd.grad(attend(*inputs, LENGTHS, 0.3).square().sum(), inputs)  # type: ignore[operator]
        return [float((f - t).norm() / t.norm()) for f, t in zip(found, truth, strict=True)]

    for mine, theirs in zip(error(cpu.attend_documents), error(by_torch), strict=True):
        assert mine < 2 * theirs + 1e-3


@pytest.mark.parametrize("name", NAMES[::14])
def test_padding_changes_neither_loss_nor_gradients(name: str) -> None:
    config = shrunk(name)
    model = GPT(config)
    model.init_weights(torch.Generator().manual_seed(0))
    ids = torch.randint(0, config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    docs = torch.tensor([[0] * 5 + [1] * 4 + [-1] * 3, [0] * 12])
    places = torch.tensor([[*range(5), *range(4), 0, 0, 0], [*range(12)]])
    targets = ids.masked_fill(docs < 0, -100)

    def result(*columns: Tensor) -> tuple[Tensor, list[Tensor]]:
        idx, positions, documents, labels = columns
        total = model(idx, positions, doc_ids=documents, targets=labels).total
        trained = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(total, trained, allow_unused=True)
        return total.detach(), [g for g in grads if g is not None]

    packed, gradients = result(ids, places, docs, targets)
    parts = [
        result(*(t[row : row + 1, a:b] for t in (ids, places, docs, targets)))
        for row, a, b in ((0, 0, 5), (0, 5, 9), (1, 0, 12))
    ]
    torch.testing.assert_close(packed, sum(total for total, _ in parts), rtol=1e-5, atol=1e-5)
    for gradient, *pieces in zip(gradients, *(g for _, g in parts), strict=True):
        torch.testing.assert_close(gradient, sum(pieces), rtol=1e-4, atol=1e-4)


def test_rows_that_fill_the_context_go_in_together_without_their_padding() -> None:
    config = shrunk(NAMES[0])
    model, length = GPT(config), config.block_size
    ids = torch.zeros(3, length, dtype=torch.long)
    docs = torch.zeros_like(ids)
    docs[0, -1] = -1
    assert model(ids, torch.arange(length), doc_ids=docs, targets=ids).count == 3 * length - 1
