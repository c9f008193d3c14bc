"""The frozen base in shards over the processes (FSDP2), for a model that one GPU cannot hold beside its activations.

The adapter is small: it stays whole on every process, and DDP averages its gradients. So a checkpoint, a save and the
exchange with the reference are the same as without shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate import accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from clear_adapters.attached import AttachedModel
from clear_adapters.errors import ClearValueError


def shard_layers(attached: AttachedModel, layers: Iterable[nn.Module]) -> None:
    """Spreads the base's weights of some layers over all processes, for good; the group has to exist.

    Args:
        attached: the model; what the adapter adds stays whole, and DDP, which will wrap its module, is told to leave the
            shards alone.
        layers: each is gathered while it computes, forward and backward.

    Raises:
        ClearValueError: there is one process only.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() < 2:
        raise ClearValueError(
            "loop.shard=True spreads the base over processes, and this is one: use torchrun"
        )
    whole = {p for _, p in attached.named_parameters()}
    for layer in layers:
        # Told, since a layer that stands in no other sharded module would stay gathered after its forward.
        fully_shard(layer, ignored_params=whole & set(layer.parameters()), reshard_after_forward=True)
    # What detaching puts back would keep the whole weights in memory beside the shards.
    attached.adopt_base()
    shards = [name for name, p in attached.module.named_parameters() if isinstance(p, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(attached.module, shards)


@contextmanager
def ddp_takes_shards() -> Iterator[None]:
    """Lets accelerate put DDP around a module with shards inside a `with`.

    It refuses every such module on GPUs (1.15), without a switch, though DDP leaves alone what `shard_layers` told it to.
    """
    check = accelerator.model_has_dtensor
    accelerator.model_has_dtensor = lambda model: False
    try:
        yield
    finally:
        accelerator.model_has_dtensor = check


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """All shards whole inside a `with`.

    Rollouts take as many forwards as their texts are long, which differs among processes: a gather in each forward would
    wait for processes that have finished. Costs the memory of the whole base meanwhile.
    """
    layers = [m for m in module.modules() if isinstance(m, FSDPModule)]
    for layer in layers:
        layer.set_reshard_after_forward(False)
        layer.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.reshard()
            layer.set_reshard_after_forward(True)
