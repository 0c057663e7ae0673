"""Networks of transformers, segmentation-models-pytorch and diffusers: opened, converted, loaded again, exported.

`make test` installs segmentation-models-pytorch only. The tests of the other two libraries are skipped without them.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import harmconvert as hc
from harmconvert.errors import InputError, OutsideError, UsageError
from harmconvert.network import default_input, tensors_in, weights_sha256
from harmconvert.pipeline import convert_to_file
from harmconvert.sources import check_rebuilds, open_source, rebuild
from harmconvert.storage import Source

from .commands import fails, ok
from .networks import random_input

LIBRARIES = {"transformers": "transformers", "smp": "segmentation_models_pytorch", "diffusers": "diffusers"}
Make = Callable[[Any], nn.Module]


def _upernet(tf: Any) -> nn.Module:
    sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
    backbone = tf.ConvNextConfig(**sizes, out_features=["stage1", "stage2", "stage3", "stage4"])
    config = tf.UperNetConfig(
        backbone_config=backbone, hidden_size=8, auxiliary_in_channels=8, auxiliary_channels=4, pool_scales=[1, 2]
    )
    return tf.UperNetForSemanticSegmentation(config)


def _rtdetr(tf: Any) -> nn.Module:
    backbone = tf.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = tf.RTDetrConfig(
        backbone_config=backbone, encoder_hidden_dim=8, encoder_in_channels=[8, 8, 8], encoder_layers=1,
        encoder_ffn_dim=8, encoder_attention_heads=2, d_model=8, num_queries=6, decoder_in_channels=[8, 8, 8],
        decoder_ffn_dim=8, decoder_layers=1, decoder_attention_heads=2, decoder_n_points=2, num_denoising=0,
    )  # fmt: skip
    return tf.RTDetrForObjectDetection(config)


def _detr(tf: Any) -> nn.Module:
    backbone = tf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage4"], layer_type="basic"
    )
    config = tf.DetrConfig(
        backbone_config=backbone, use_timm_backbone=False, num_queries=6, d_model=16, encoder_layers=1,
        decoder_layers=1, encoder_ffn_dim=8, decoder_ffn_dim=8, encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    return tf.DetrForObjectDetection(config)


def _segformer(tf: Any) -> nn.Module:
    config = tf.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], num_attention_heads=[1, 2],
        patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2], decoder_hidden_size=8,
    )  # fmt: skip
    return tf.SegformerForSemanticSegmentation(config)


def _resnet(tf: Any) -> nn.Module:
    config = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    return tf.ResNetForImageClassification(config)


def _regnet(tf: Any) -> nn.Module:
    config = tf.RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4)
    return tf.RegNetForImageClassification(config)


def _convnext(tf: Any) -> nn.Module:
    config = tf.ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], image_size=32)
    return tf.ConvNextForImageClassification(config)


def _mobilenet(tf: Any) -> nn.Module:
    config = tf.MobileNetV2Config(depth_multiplier=0.1, min_depth=4, depth_divisible_by=4, image_size=32)
    return tf.MobileNetV2ForImageClassification(config)


def _unet(diffusers: Any) -> nn.Module:
    return diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def _text_unet(diffusers: Any) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=8, attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def _autoencoder(diffusers: Any) -> nn.Module:
    return diffusers.AutoencoderKL(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def _smp_unet(smp: Any) -> nn.Module:
    return smp.Unet("tu-test_resnet", encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 8), classes=3)


# Library, function that makes the network, size of the images (None: the network declares it).
NETWORKS: dict[str, tuple[str, Make, tuple[int, ...] | None]] = {
    "ResNet": ("transformers", _resnet, (3, 32, 32)),
    "RegNet": ("transformers", _regnet, (3, 32, 32)),
    "ConvNext": ("transformers", _convnext, None),
    "MobileNetV2": ("transformers", _mobilenet, None),
    "SegFormer": ("transformers", _segformer, (3, 32, 32)),
    "UperNet": ("transformers", _upernet, (3, 64, 64)),
    "DETR": ("transformers", _detr, (3, 64, 64)),
    "RT-DETR": ("transformers", _rtdetr, (3, 64, 64)),
    "Unet": ("smp", _smp_unet, (3, 32, 32)),
    "UNet2DModel": ("diffusers", _unet, None),
    "UNet2DConditionModel": ("diffusers", _text_unet, None),
    "AutoencoderKL": ("diffusers", _autoencoder, None),
}
SLOW = {"RegNet", "MobileNetV2", "UperNet", "DETR", "RT-DETR", "UNet2DConditionModel", "AutoencoderKL"}
EACH = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in NETWORKS]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Ignore the warnings and the log of the libraries."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[str, Path, nn.Module]]:
    """Return a function that writes the folder of a network with random weights: source string, path, network."""
    written: dict[str, tuple[str, Path, nn.Module]] = {}

    def write(name: str) -> tuple[str, Path, nn.Module]:
        if name not in written:
            scheme, make, _ = NETWORKS[name]
            library = pytest.importorskip(LIBRARIES[scheme])
            torch.manual_seed(7)
            network: Any = make(library).eval()
            path = tmp_path_factory.mktemp("networks") / name
            network.save_pretrained(path)
            written[name] = (f"{scheme}:{path}", path, network)
        return written[name]

    return write


def outputs(network: nn.Module, x: Any) -> list[Tensor]:
    with torch.no_grad():
        result = network(*x) if isinstance(x, tuple) else network(x)
    return [tensor for tensor in tensors_in(result) if tensor.is_floating_point()]


@pytest.mark.parametrize("name", EACH)
def test_a_network_in_a_folder_is_converted_verified_and_loaded_without_the_folder(
    name: str, folder_of: Any, tmp_path: Path
) -> None:
    source, path, network = folder_of(name)
    size = NETWORKS[name][2]
    opened = open_source(source)
    assert weights_sha256(opened.model) == weights_sha256(network)
    done = convert_to_file(source, tmp_path / "net.safetensors", "full", input_sizes=[size] if size else [])
    assert done.verification is not None
    assert done.verification.ok
    moved = path.rename(path.with_name("gone"))
    try:
        again = hc.load(tmp_path / "net.safetensors", form="dense").eval()
    finally:
        moved.rename(path)
    assert type(again) is type(network)
    x = default_input(opened.model, batch=2) if size is None else random_input((2, *size))
    for actual, expected in zip(outputs(again, x), outputs(network, x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EACH)
def test_a_network_of_a_folder_is_inspected_and_exported(name: str, folder_of: Any, tmp_path: Path) -> None:
    source, _, network = folder_of(name)
    size = NETWORKS[name][2]
    inspection = hc.inspect(open_source(source).model, torch.zeros(1, *size) if size else None)
    assert inspection.layers
    hc.export(source, tmp_path / "dense.safetensors", input_sizes=[size] if size else [])
    again = open_source(source, weights=tmp_path / "dense.safetensors")
    assert weights_sha256(again.model) == weights_sha256(network)


# RT-DETR sorts candidates by their scores. Where scores are nearly equal, runtimes sort them differently.
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "Unet")) for n in NETWORKS if n != "RT-DETR"]
)
def test_a_network_of_a_folder_is_exported_as_onnx(name: str, folder_of: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    source, _, _ = folder_of(name)
    size = NETWORKS[name][2]
    exported = hc.export(source, tmp_path / "net.onnx", "onnx", input_sizes=[size] if size else [])
    assert exported.check is not None
    assert exported.check.difference <= 1e-4


def test_every_floating_tensor_of_an_output_is_compared(folder_of: Any) -> None:
    """A detector whose boxes differ, and whose logits are the same, is not the same network."""
    source, _, network = folder_of("DETR")
    changed: Any = open_source(source).model
    x = random_input((2, 3, 64, 64))
    assert hc.verify(network, changed, inputs=x).ok
    with torch.no_grad():
        changed.bbox_predictor.layers[-1].bias += 0.01
    assert not hc.verify(network, changed, inputs=x).ok


# --- what a folder declares ---


@pytest.mark.parametrize(
    ("processor", "settings", "declared"),
    [
        ("ConvNext", {"size": {"shortest_edge": 224}}, ((3, 224, 224), 0.5, 0.5, "bicubic", 0.875)),
        ("ConvNext", {"size": {"shortest_edge": 384}}, ((3, 384, 384), 0.5, 0.5, "bicubic", 1.0)),
        ("MobileNetV2", {}, ((3, 224, 224), 0.5, 0.5, "bilinear", 0.875)),
        ("EfficientNet", {"size": {"height": 48, "width": 32}}, ((3, 48, 32), 0.5, 0.25, "bicubic", 1.0)),
        ("Segformer", {}, ((3, 512, 512), 0.485, 0.229, "bilinear", 1.0)),
        ("MobileViT", {"do_flip_channel_order": True}, ((3, 256, 256), None, None, "bicubic", 256 / 224)),
    ],
)
def test_size_and_preprocessing_are_those_of_the_image_processor(
    processor: str, settings: dict[str, Any], declared: tuple[Any, ...], folder_of: Any, tmp_path: Path
) -> None:
    _, path, _ = folder_of("ResNet")
    shutil.copytree(path, tmp_path / "net")
    transformers: Any = pytest.importorskip("transformers")
    getattr(transformers, f"{processor}ImageProcessor")(**settings).save_pretrained(tmp_path / "net")
    config: Any = open_source(f"transformers:{tmp_path / 'net'}").model.pretrained_cfg
    first = [None if key not in config else pytest.approx(config[key][0], abs=1e-6) for key in ("mean", "std")]
    assert (config["input_size"], *first, config["interpolation"], pytest.approx(config["crop_pct"])) == declared


def test_images_of_diffusion_networks_have_values_from_minus_one_to_one(folder_of: Any) -> None:
    model: Any = open_source(folder_of("AutoencoderKL")[0]).model
    assert model.pretrained_cfg == {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    inputs = default_input(open_source(folder_of("UNet2DConditionModel")[0]).model, batch=2)
    assert [tuple(x.shape) for x in inputs] == [(2, 4, 8, 8), (2,), (2, 77, 8)]


# --- weights in other files ---


def test_weights_in_several_files_and_in_half_precision_are_read(folder_of: Any, tmp_path: Path) -> None:
    _, _, network = folder_of("SegFormer")
    half: Any = deepcopy(network).half()
    half.save_pretrained(tmp_path / "net", max_shard_size="4KB")
    assert (tmp_path / "net" / "model.safetensors.index.json").exists()
    assert weights_sha256(open_source(f"transformers:{tmp_path / 'net'}").model) == weights_sha256(half)


def test_a_pickle_in_a_folder_is_not_run(folder_of: Any, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    _, path, network = folder_of("Unet")
    shutil.copytree(path, tmp_path / "net")
    (tmp_path / "net" / "model.safetensors").unlink()
    torch.save(network.state_dict(), tmp_path / "net" / "pytorch_model.bin")
    assert weights_sha256(open_source(f"smp:{tmp_path / 'net'}").model) == weights_sha256(network)
    torch.save({**network.state_dict(), "more": Attack()}, tmp_path / "net" / "pytorch_model.bin")
    with pytest.raises(InputError, match="would run code: refused"):
        open_source(f"smp:{tmp_path / 'net'}")
    assert not (tmp_path / "ran").exists()


def test_a_network_with_another_number_of_classes_takes_weights_of_a_file(folder_of: Any, tmp_path: Path) -> None:
    source, _, _ = folder_of("ResNet")
    with pytest.raises(InputError, match=r"the weights are for 5 classes: .*num_classes"):
        open_source(source, arguments={"num_classes": 3})
    trained = open_source(source, arguments={"num_classes": 3}, pretrained=False)
    torch.save({"model": trained.model.state_dict()}, tmp_path / "net.pth")
    again = open_source(source, arguments={"num_classes": 3}, weights=tmp_path / "net.pth")
    assert weights_sha256(again.model) == weights_sha256(trained.model)
    assert again.source.weights == {"file": "net.pth", "key": "model"}
    hc.save(hc.convert(again.model), tmp_path / "a.safetensors", source=again.source)
    loaded: Any = hc.load(tmp_path / "a.safetensors")
    assert loaded.config.num_labels == 3
    other = open_source(source, arguments={"num_classes": 7}, pretrained=False)
    check_rebuilds(replace(again.source, classes=7), other.model)
    with pytest.raises(UsageError, match="the config of ResNetForImageClassification has no entry 'widht'"):
        open_source(source, arguments={"widht": 3}, pretrained=False)


def test_a_network_of_smp_is_named_by_its_architecture_and_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smp: Any = pytest.importorskip("segmentation_models_pytorch")
    monkeypatch.chdir(tmp_path)
    trained = smp.Linknet("tu-test_resnet", encoder_weights=None, encoder_depth=3, classes=2).eval()
    torch.save({"state_dict": {f"model.{key}": value for key, value in trained.state_dict().items()}}, "net.ckpt")
    source = "smp:linknet/tu-test_resnet"
    options = ["--input-size", "3,32,32", "--model-kwargs", "encoder_depth=3"]
    fails(3, f"{source} has no pretrained weights", "convert", source)
    fails(3, "the weights are for 2 classes", "convert", source, "--checkpoint", "net.ckpt", *options)
    options += ["--model-kwargs", "num_classes=2"]
    ok("convert", source, "--checkpoint", "net.ckpt", *options, "--lambda", "full")
    again = open_source("linknet-tu-test_resnet-harmonic-full.safetensors", form="dense")
    assert (str(again.source), dict(again.source.arguments)) == (source, {"encoder_depth": 3, "num_classes": 2})
    x = random_input((1, 3, 32, 32))
    torch.testing.assert_close(outputs(again.model, x), outputs(trained, x), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match=r"smp:fpn/resnet19 cannot be made: .*Wrong encoder name"):
        open_source("smp:fpn/resnet19", pretrained=False)


# --- refusals ---


@pytest.mark.parametrize("scheme", LIBRARIES)
def test_without_the_library_the_message_names_the_extra(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, LIBRARIES[scheme], None)
    with pytest.raises(OutsideError, match=rf"{LIBRARIES[scheme]}: pip install 'harmconvert\[{scheme}\]'"):
        open_source(f"{scheme}:name")


def test_code_in_a_folder_is_not_run(folder_of: Any, tmp_path: Path) -> None:
    _, path, _ = folder_of("ResNet")
    shutil.copytree(path, tmp_path / "net")
    (tmp_path / "net" / "evil.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    config = json.loads((path / "config.json").read_text())
    code = {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Net"}, "attn_implementation": "evil/kernel"}
    (tmp_path / "net" / "config.json").write_text(json.dumps(config | code))
    opened: Any = open_source(f"transformers:{tmp_path / 'net'}")
    assert opened.model.config._attn_implementation == "eager"
    assert not {*code} & {*opened.source.arguments["config"]}
    (tmp_path / "net" / "config.json").write_text(json.dumps(config | {"architectures": ["Net"]}))
    with pytest.raises(InputError, match="has no network 'Net': another version may have it"):
        open_source(f"transformers:{tmp_path / 'net'}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("scheme", "arguments", "message"),
    [
        ("transformers", {}, "refused"),
        ("transformers", {"config": 3, "architecture": "ResNetModel"}, "refused"),
        ("transformers", {"config": {"auto_map": {}}, "architecture": "ResNetModel"}, "refused"),
        ("transformers", {"config": {"sub": [{"_name_or_path": "x"}]}, "architecture": "ResNetModel"}, "refused"),
        ("transformers", {"config": {}, "architecture": "pipeline"}, "has no network 'pipeline'"),
        ("transformers", {"config": {}, "architecture": "AutoModel"}, "has no network 'AutoModel'"),
        ("diffusers", {"config": {}, "architecture": "DDPMPipeline"}, "has no network 'DDPMPipeline'"),
        ("diffusers", {"architecture": "UNet2DModel"}, "refused"),
        ("smp", {"encoder_weights": "imagenet"}, "refused"),
        ("smp", {"config": {"encoder_weights": "imagenet"}, "architecture": "Unet"}, "refused"),
    ],
)
def test_a_recorded_network_of_a_library_cannot_ask_for_more_than_structure(
    scheme: str, arguments: dict[str, Any], message: str
) -> None:
    if message != "refused":
        pytest.importorskip(LIBRARIES[scheme])
    with pytest.raises(InputError, match=message):
        rebuild(Source(scheme, "unet/resnet18", arguments))


def test_a_recorded_network_that_is_too_large_is_refused() -> None:
    pytest.importorskip("segmentation_models_pytorch")
    source = Source("smp", "unet/resnet18", {"classes": 10**8})
    with pytest.raises(InputError, match="far more than the file holds: refused"):
        rebuild(source, limit=1 << 30)


def test_messages_for_folders_that_hold_no_network_of_the_library(folder_of: Any, tmp_path: Path) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    with pytest.raises(InputError, match=r"no such folder: \./nowhere does not exist"):
        open_source("smp:./nowhere")
    with pytest.raises(InputError, match=r"is no network of smp: it has no config\.json"):
        open_source(f"smp:{tmp_path}")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config\.json is unreadable: it holds a list; get the file again"):
        open_source(f"smp:{tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"names no class of a network \(_model_class\): give it with arguments="):
        open_source(f"smp:{tmp_path}")
    shutil.copy(folder_of("Unet")[1] / "config.json", tmp_path)
    with pytest.raises(InputError, match=r"has no weights: neither model\.safetensors nor pytorch_model\.bin"):
        open_source(f"smp:{tmp_path}")


def test_the_message_for_a_pipeline_names_its_networks(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    parts = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline", **parts}))
    with pytest.raises(InputError, match=rf"is a pipeline: name .* networks, such as diffusers:{tmp_path}/unet$"):
        open_source(f"diffusers:{tmp_path}")
