"""Refuse networks that cannot be converted as they are."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import InputError, UsageError
from ..kernels.projection import all_finite
from ..network.layers import convolutions
from ..network.state import tensors_of


def check_network(model: nn.Module) -> None:
    """Raise UsageError for wrappers, which would go on holding the old parameters after surgery."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    kind = type(model).__name__
    if isinstance(model, wrappers) or kind in ("FullyShardedDataParallel", "OptimizedModule"):
        inner = "_orig_mod" if kind == "OptimizedModule" else "module"
        raise UsageError(f"this network is wrapped in {kind}: pass model.{inner}, and wrap what comes back")
    if not isinstance(model, nn.Module):
        raise UsageError(f"a network must be a torch.nn.Module, not {kind}")
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError("this network is TorchScript, whose layers are fixed: pass the one that it was made from")
    try:
        any(module is None for module in model.modules())
    except RecursionError as error:
        raise InputError(f"the modules of this {kind} are nested too deeply to go through") from error


def check_weights(model: nn.Module) -> None:
    """Raise InputError, naming the layer, where weights are not finite, or a convolution's not floating point."""
    for name, conv in convolutions(model).items():
        weight = conv._parameters.get("weight")
        if weight is not None and not (weight.is_floating_point() or weight.is_complex()):
            kind = str(weight.dtype).removeprefix("torch.")
            raise InputError(f"layer {name or '(root)'} has {kind} weights: convert the network before it is quantised")
    check_finite(model)


def check_finite(model: nn.Module) -> None:
    """Raise InputError, naming the tensor, where parameters or running statistics are not finite."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in tensors_of(model).items():
        statistics = name.endswith(("running_mean", "running_var"))
        if name not in parameters and not statistics:
            continue  # buffers may hold -inf on purpose, such as attention masks
        if not is_lazy(tensor) and tensor.is_floating_point() and not all_finite(tensor):
            raise InputError(
                f"{name} holds NaN or infinite values: this checkpoint is broken; use one from before that"
            )
