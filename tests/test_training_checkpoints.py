"""Files of weights as training scripts write them: each layout is read, and the record says which weights were used."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from harmconvert.errors import InputError
from harmconvert.network import weights_sha256
from harmconvert.storage import load_weights

from .commands import fails, ok
from .networks import seeded

State = dict[str, Tensor]


class Net(nn.Module):
    """A small classifier with the parts of an ordinary CNN: a backbone with batch norms, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def under(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


OPTIMIZER = {
    "state": {0: {"step": torch.tensor(9.0), "exp_avg": torch.zeros(4, 3, 3, 3)}},
    "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0]}],
}
SCHEDULER = {"base_lrs": [0.1], "last_epoch": 3, "_last_lr": [0.01]}
METRIC = torch.tensor(0.75)
LIGHTNING: dict[str, Any] = {
    "epoch": 3,
    "global_step": 99,
    "pytorch-lightning_version": "2.5.0",
    "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 3}}}},
    "callbacks": {
        "ModelCheckpoint{'monitor': 'val'}": {"best_model_score": METRIC, "best_k_models": {"a.ckpt": METRIC}},
    },
    "optimizer_states": [OPTIMIZER],
    "lr_schedulers": [SCHEDULER],
    "hparams_name": "kwargs",
    "hyper_parameters": argparse.Namespace(lr=0.1, width=[1, 2]),
    "MixedPrecision": {"scale": 65536.0, "_growth_tracker": 0},
}
TORCHMETRICS = {"val_accuracy.tp": torch.zeros(5), "criterion.weight": torch.ones(5), "std": torch.ones(3)}

# Each layout gets the weights that must be loaded and older ones that must not, and returns the content of the file.
# Beside it: the key and the prefix of the record.
Layout = tuple[Callable[[State, State], Any], str, str]
LAYOUTS: dict[str, Layout] = {
    "torch.save of the state dict": (lambda new, old: new, "", ""),
    "timm's train.py": (
        lambda new, old: {
            "epoch": 3, "arch": "net", "state_dict": old, "optimizer": OPTIMIZER, "version": 2, "metric": 71.2,
            "args": argparse.Namespace(model="net"), "amp_scaler": {"scale": 1.0}, "state_dict_ema": new,
        },
        "state_dict_ema", "",
    ),
    "timm's train.py without a moving average": (
        lambda new, old: {"epoch": 3, "state_dict": new, "state_dict_ema": None, "optimizer": OPTIMIZER},
        "state_dict", "",
    ),
    "timm's train.py, compiled and distributed": (
        lambda new, old: {"state_dict": under("module._orig_mod.", new)}, "state_dict", "module._orig_mod.",
    ),
    "compiled after it was distributed": (
        lambda new, old: {"state_dict": under("_orig_mod.module.", new)}, "state_dict", "_orig_mod.module.",
    ),
    "the ImageNet example of PyTorch": (
        lambda new, old: {
            "epoch": 90, "arch": "resnet18", "state_dict": OrderedDict(under("module.", new)), "best_acc1": METRIC,
            "optimizer": OPTIMIZER, "scheduler": SCHEDULER,
        },
        "state_dict", "module.",
    ),
    "torchvision's references": (
        lambda new, old: {
            "model": old, "optimizer": OPTIMIZER, "lr_scheduler": SCHEDULER, "epoch": 3,
            "args": argparse.Namespace(lr=0.5), "model_ema": {"n_averaged": torch.tensor(7), **under("module.", new)},
        },
        "model_ema", "module.",
    ),
    "torch's AveragedModel of a distributed network": (
        lambda new, old: {"n_averaged": torch.tensor(7), **under("module.module.", new)}, "", "module.module.",
    ),
    "Lightning": (
        lambda new, old: {**LIGHTNING, "state_dict": {**under("model.", new), **TORCHMETRICS}}, "state_dict", "model.",
    ),
    "Lightning, compiled": (
        lambda new, old: {**LIGHTNING, "state_dict": under("model._orig_mod.", new)}, "state_dict", "model._orig_mod.",
    ),
    "Lightning with a backbone and a projection": (
        lambda new, old: {
            **LIGHTNING, "state_dict": {**under("backbone.", new), "projector.weight": torch.zeros(8, 5)},
        },
        "state_dict", "backbone.",
    ),
    "Lightning with a moving average beside the network": (
        lambda new, old: {
            **LIGHTNING, "state_dict": {**under("model.", old), **under("ema_model.module.", new), **TORCHMETRICS},
        },
        "state_dict", "ema_model.module.",
    ),
    "Lightning's WeightAveraging": (
        lambda new, old: {**LIGHTNING, "state_dict": under("model.", new), "current_model_state": under("model.", old)},
        "state_dict", "model.",
    ),
    "Lightning with a callback that keeps a moving average": (
        lambda new, old: {
            **LIGHTNING, "state_dict": under("net.", old),
            "callbacks": {"EMA": {"decay": 0.999, "ema_state_dict": under("net.", new)}},
        },
        "callbacks.EMA.ema_state_dict", "net.",
    ),
    "MMEngine": (
        lambda new, old: {
            "meta": {"epoch": 3, "mmengine_version": "0.10", "seed": np.int64(3)}, "state_dict": old,
            "message_hub": argparse.Namespace(), "optimizer": OPTIMIZER, "param_schedulers": [SCHEDULER],
            "ema_state_dict": {"steps": torch.tensor(9), **under("module.", new)},
        },
        "ema_state_dict", "module.",
    ),
    "MMPretrain, backbone only": (
        lambda new, old: {
            "meta": {}, "state_dict": {**under("backbone.", new), "neck.fc.weight": torch.zeros(2, 2)},
        },
        "state_dict", "backbone.",
    ),
    "BasicSR": (lambda new, old: {"params": old, "params_ema": new}, "params_ema", ""),
    "BasicSR without a moving average": (lambda new, old: {"params": new}, "params", ""),
    "KAIR, a network of residual dense blocks": (lambda new, old: under("model.", new), "", "model."),
    "a GAN": (
        lambda new, old: {
            "generator": new, "discriminator": {"0.weight": torch.zeros(2, 3)}, "g_optim": OPTIMIZER,
            "d_optim": OPTIMIZER,
        },
        "generator", "",
    ),
    "StyleGAN": (
        lambda new, old: {"g": old, "d": {"weight": torch.zeros(2)}, "g_ema": new, "g_optim": OPTIMIZER}, "g_ema", "",
    ),
    "ema-pytorch": (
        lambda new, old: {
            "step": 9, "model": old, "opt": OPTIMIZER, "scaler": None,
            "ema": {
                "initted": torch.tensor(True), "step": torch.tensor(9), **under("online_model.", old),
                **under("ema_model.", new),
            },
        },
        "ema", "ema_model.",
    ),
    "DINO": (
        lambda new, old: {
            "student": {**under("module.backbone.", old), "module.head.last.weight": torch.zeros(2)},
            "teacher": {**under("backbone.", new), "head.last.weight": torch.zeros(2)}, "optimizer": OPTIMIZER,
            "fp16_scaler": None, "dino_loss": {"center": torch.zeros(1, 9)}, "args": argparse.Namespace(),
        },
        "teacher", "backbone.",
    ),
    "nnU-Net": (
        lambda new, old: {
            "network_weights": new, "optimizer_state": OPTIMIZER, "grad_scaler_state": None, "_best_ema": 0.9,
            "logging": {"mean_fg_dice": [0.5]}, "init_args": {"plans": {}}, "current_epoch": 3,
        },
        "network_weights", "",
    ),
    "Composer": (
        lambda new, old: {
            "state": {"model": under("module.", new), "optimizers": {"SGD": OPTIMIZER}, "schedulers": {}},
            "rng": [{"python": (3, (1, 2), None)}],
        },
        "state.model", "module.",
    ),
    "DeepSpeed": (
        lambda new, old: {
            "module": new, "buffer_names": ["features.1.running_mean"], "optimizer": None, "global_steps": 9,
            "param_shapes": [OrderedDict((name, tensor.shape) for name, tensor in new.items())],
        },
        "module", "",
    ),
    "VISSL": (
        lambda new, old: {
            "phase_idx": 9,
            "classy_state_dict": {"base_model": {"model": {"trunk": under("_feature_blocks.", new), "heads": {}}}},
        },
        "classy_state_dict.base_model.model.trunk", "_feature_blocks.",
    ),
    "catalyst": (
        lambda new, old: {"model_state_dict": new, "optimizer_state_dict": OPTIMIZER, "criterion_state_dict": {}},
        "model_state_dict", "",
    ),
    "ignite": (
        lambda new, old: {"trainer": {"epoch_length": 9}, "model": old, "ema_model": new, "optimizer": OPTIMIZER},
        "ema_model", "",
    ),
    "fastai": (lambda new, old: {"model": new, "opt": OPTIMIZER}, "model", ""),
    "a network with its moving average as plain lists": (
        lambda new, old: {"model": new, "ema": {"decay": 0.99, "shadow_params": [torch.zeros(2)]}}, "model", "",
    ),
    "the best and the last weights": (
        lambda new, old: {"state_dict": new, "best_state_dict": old, "epoch": 3}, "state_dict", "",
    ),
    "sharded training (FSDP)": (
        lambda new, old: {"model": under("_fsdp_wrapped_module.", new)}, "model", "_fsdp_wrapped_module.",
    ),
    "a network counted by thop": (
        lambda new, old: {**new, "total_ops": torch.zeros(1), "features.0.total_params": torch.zeros(1)}, "", "",
    ),
    **{
        f"a network of {key}": (lambda new, old, key=key: {key: new, "epoch": 1}, key, "")
        for key in ("net", "network", "module", "params", "model_state", "weights", "state")
    },
    **{
        f"names under {prefix}": (lambda new, old, prefix=prefix: under(prefix, new), "", prefix)
        for prefix in ("net.", "network.", "ema_model.", "model.module.", "module.model.", "student.", "my_model.net.")
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def weights() -> tuple[State, State]:
    new, old = (seeded(Net, seed=seed).state_dict() for seed in (1, 2))
    return dict(new), dict(old)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_weights_in_files_of_training_scripts_are_loaded(
    layout: str, weights: tuple[State, State], tmp_path: Path
) -> None:
    arrange, key, prefix = LAYOUTS[layout]
    torch.save(arrange(*deepcopy(weights)), tmp_path / "net.ckpt")
    record = load_weights(network := seeded(Net), tmp_path / "net.ckpt")
    assert weights_sha256(network) == weights_sha256(seeded(Net, seed=1))
    expected = {"file": "net.ckpt", "key": key, "prefix": prefix}
    assert {name: text for name, text in record.items() if name != "left_out"} == {
        k: v for k, v in expected.items() if v
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_keep_the_precision_of_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    state = seeded(Net, dtype, seed=1).state_dict()
    torch.save({"state_dict": under("module.", state)}, tmp_path / "net.pth")
    load_weights(network := seeded(Net), tmp_path / "net.pth")
    assert weights_sha256(network) == weights_sha256(seeded(Net, dtype, seed=1))


# --- a classifier of another size ---


@pytest.mark.parametrize("prefix", ["", "module.", "model._orig_mod."])
def test_the_message_for_weights_of_another_number_of_classes_names_the_number(prefix: str, tmp_path: Path) -> None:
    other = seeded(Net)
    other.head = nn.Linear(6, 9)
    torch.save({"state_dict": under(prefix, other.state_dict())}, tmp_path / "net.pth")
    message = (
        r"does not fit this Net: other shape: head.weight \(9, 6\) instead of \(5, 6\), head.bias \(9,\) instead of "
        r"\(5,\); the weights are for 9 classes: build the network with as many \(arguments={'num_classes': 9}\)"
    )
    with pytest.raises(InputError, match=message):
        load_weights(seeded(Net), tmp_path / "net.pth")


@pytest.mark.parametrize(("boxes", "message"), [(8, "the weights are for 2 classes"), (9, r"other shape: [^;]*$")])
def test_the_number_of_classes_of_a_detector_is_that_of_its_scores(boxes: int, message: str, tmp_path: Path) -> None:
    """A detector has four box coordinates for each class."""
    make = lambda scores, boxes: nn.ModuleDict({"box": nn.Linear(6, boxes), "score": nn.Linear(6, scores)})  # noqa: E731
    torch.save(make(2, boxes).state_dict(), tmp_path / "net.pth")
    with pytest.raises(InputError, match=message):
        load_weights(make(91, 364), tmp_path / "net.pth")


def test_no_number_of_classes_is_named_if_the_network_differs_elsewhere(tmp_path: Path) -> None:
    wider = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3))
    for name, part in (("head", nn.Linear(7, 9)), ("features", wider)):
        other = seeded(Net)
        setattr(other, name, part)
        torch.save(other.state_dict(), tmp_path / "net.pth")
        with pytest.raises(InputError, match=r"does not fit this Net: other shape: [^;]*$"):
            load_weights(seeded(Net), tmp_path / "net.pth")


def test_a_command_names_the_option_for_the_number_of_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": timm.create_model("test_resnet", num_classes=7).state_dict()}, "net.pth")
    command = ["inspect", "test_resnet", "--checkpoint", "net.pth"]
    fails(3, "the weights are for 7 classes: build the network with as many (--model-kwargs num_classes=7)", *command)
    assert "weights: net.pth, state_dict" in ok(*command, "--model-kwargs", "num_classes=7").stderr
