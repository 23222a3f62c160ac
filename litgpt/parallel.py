"""One model over many devices: each rank keeps its part of every weight, and a block is whole only while it computes.

Knows which modules of a GPT belong together and how to give its parts their values; knows no launcher and no loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from litgpt.model import GPT

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(model: GPT, mesh: DeviceMesh, compute: torch.dtype | None = None) -> GPT:
    """Cut every parameter along its first dimension over the ranks of `mesh`, in place (FSDP2).

    A block's weights are gathered before it computes and let go after, in both directions. Embedding, last norm and
    head are gathered together, as the head is used inside the model's forward, and a tied one twice. Weights move to
    the mesh's device one block at a time, so that no device ever holds the whole model; those on the meta device get
    memory for this rank's part only, which `fill` or `init_weights` give its values.

    Args:
        compute: what the blocks' weights are gathered in; None: as they are. Gradients are summed in fp32 always.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    def policy(gathered: torch.dtype | None) -> MixedPrecisionPolicy:
        # the residual stream keeps its precision: what is computed in less is for autocast to say
        return MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)

    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy(compute))
    fully_shard(model, mesh=mesh, mp_policy=policy(None))
    model.register_forward_hook(_let_go)
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=mesh.device_type)
    return model


def sample(mesh: DeviceMesh) -> nn.Parameter:
    """A small parameter that is sharded as a model's are, to try things on."""
    from torch.distributed.tensor import Shard, distribute_tensor

    whole = torch.zeros(64, 64, device=mesh.device_type)
    return nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None))


def _let_go(model: nn.Module, inputs: Any, output: Any) -> None:
    """Without a backward pass to come, embedding and head are not kept whole: the parameters are the parts again."""
    if not torch.is_grad_enabled():
        model.reshard()  # type: ignore[operator]  # fully_shard gave it this


@torch.no_grad()
def fill(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Give a model that may be sharded its values, one whole tensor at a time; each rank keeps its part."""
    named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for name, whole in tensors:
        _keep_part(named[name], whole)


@torch.no_grad()
def init_weights(model: GPT, generator: torch.Generator) -> None:
    """`model.init_weights` for a model that may be sharded: every rank draws all, and keeps its part.

    The values are those that one device would draw.
    """
    for name, module in model.named_modules():
        parts = dict(module.named_parameters(recurse=False))
        wholes = {key: nn.Parameter(torch.empty(part.shape, dtype=part.dtype, device=part.device), part.requires_grad)
                  for key, part in parts.items()}  # fmt: skip
        module._parameters.update(wholes)
        try:
            model.init_module(name, module, generator)
        finally:
            module._parameters.update(parts)
        for key, part in parts.items():
            _keep_part(part, wholes[key])


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all of them, 0-dim, over all ranks where they are sharded; then every rank must ask."""
    norm = torch.nn.utils.get_total_norm(tensors)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # a DTensor has it


def _keep_part(part: Tensor, whole: Tensor) -> None:
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(part, DTensor):
        whole = whole.detach().to(part.to_local())
        part.copy_(distribute_tensor(whole, part.device_mesh, part.placements, src_data_rank=None))
    else:
        part.copy_(whole)
