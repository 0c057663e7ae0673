"""Refuse networks that cannot be converted."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import InputError, UsageError
from ..kernels.projection import all_finite
from ..network.layers import convolutions
from ..network.state import tensors_of


def check_network(model: nn.Module) -> None:
    """Raise an error unless a network can be converted as a whole.

    Raises:
        UsageError: it is not a module, it is TorchScript, or it is a wrapper, which would keep the old parameters.
        InputError: its modules are nested too deeply.
    """
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    kind = type(model).__name__
    if isinstance(model, wrappers) or kind in ("FullyShardedDataParallel", "OptimizedModule"):
        inner = "_orig_mod" if kind == "OptimizedModule" else "module"
        raise UsageError(f"this network is wrapped in {kind}: pass model.{inner}, and wrap the result")
    if not isinstance(model, nn.Module):
        raise UsageError(f"a network must be a torch.nn.Module, not {kind}")
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError("this network is TorchScript, whose layers cannot be replaced: pass the original network")
    try:
        any(module is None for module in model.modules())
    except RecursionError as error:
        raise InputError(f"the modules of this {kind} are nested too deeply to be visited") from error


def check_weights(model: nn.Module) -> None:
    """Raise InputError if a value is not finite or a convolution's weight is not floating point; name the tensor."""
    for name, conv in convolutions(model).items():
        weight = conv._parameters.get("weight")
        if weight is not None and not (weight.is_floating_point() or weight.is_complex()):
            kind = str(weight.dtype).removeprefix("torch.")
            raise InputError(f"layer {name or '(root)'} has {kind} weights: convert the network before it is quantised")
    check_finite(model)


def check_finite(model: nn.Module) -> None:
    """Raise InputError if a parameter or a running statistic is not finite; the message names the tensor."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in tensors_of(model).items():
        statistics = name.endswith(("running_mean", "running_var"))
        if name not in parameters and not statistics:
            continue  # other buffers may hold -inf on purpose, for example attention masks
        if not is_lazy(tensor) and tensor.is_floating_point() and not all_finite(tensor):
            raise InputError(f"{name} holds NaN or infinite values: this checkpoint is broken, use an earlier one")
