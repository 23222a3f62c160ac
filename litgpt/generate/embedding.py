"""Vectors for texts, from what the model's head reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt.model import GPT

Pooling = Literal["mean", "last"]


@torch.no_grad()
def embed(model: GPT, rows: Sequence[Sequence[int]], pooling: Pooling = "mean", normalize: bool = True) -> Tensor:
    """(N, n_embd) fp32 on the CPU: a vector for each row of ids, which are read together.

    Args:
        pooling: the mean over all tokens, or the last one's, which has seen all the others.
        normalize: to length 1, so that a product is a cosine.
    """
    device, longest = model.wte.weight.device, max(map(len, rows))
    idx, documents = torch.zeros(len(rows), longest, dtype=torch.int64), torch.full((len(rows), longest), -1)
    for i, row in enumerate(rows):
        idx[i, : len(row)], documents[i, : len(row)] = torch.tensor(row), 0
    ragged = any(len(row) < longest for row in rows)
    hidden = model.hidden(idx.to(device), doc_ids=documents.to(device) if ragged else None).float().cpu()
    states = [states[: len(row)] for states, row in zip(hidden, rows, strict=True)]
    vectors = torch.stack([part.mean(0) if pooling == "mean" else part[-1] for part in states])
    return F.normalize(vectors, dim=-1) if normalize else vectors
