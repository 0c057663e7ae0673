"""Small networks of other libraries, with random weights, for `zoo.py --sources`.

They have the real architectures of transformers, segmentation-models-pytorch, MONAI and diffusers with few channels and
layers, and restoration networks of 3x3 layers in the style of SRResNet, EDSR, RRDB and a U-Net.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Size = tuple[int, ...]

_FOUR = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
_STAGES = ["stage2", "stage3", "stage4"]
_HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
_DETR = {"d_model": 16, "num_queries": 6, "encoder_layers": 1, "decoder_layers": 1, **_HEADS}
_DEFORMABLE = {"encoder_n_points": 2, "decoder_n_points": 2, "num_feature_levels": 1}

# Name: class of the network, class of its config, arguments, size of the images.
_TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "resnet": ("ResNetForImageClassification", "ResNetConfig", {"embedding_size": 8, **_FOUR}, 64),
    "resnet_basic": (
        "ResNetForImageClassification", "ResNetConfig", {"embedding_size": 8, "layer_type": "basic", **_FOUR}, 64,
    ),
    "regnet_x": (
        "RegNetForImageClassification", "RegNetConfig",
        {"embedding_size": 8, "groups_width": 4, "layer_type": "x", **_FOUR}, 64,
    ),
    "regnet_y": ("RegNetForImageClassification", "RegNetConfig", {"embedding_size": 8, "groups_width": 4, **_FOUR}, 64),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", _FOUR, 64),
    "convnextv2": ("ConvNextV2ForImageClassification", "ConvNextV2Config", _FOUR, 64),
    "mobilenet_v1": ("MobileNetV1ForImageClassification", "MobileNetV1Config", {"depth_multiplier": 0.25}, 64),
    "mobilenet_v2": ("MobileNetV2ForImageClassification", "MobileNetV2Config", {"depth_multiplier": 0.25}, 64),
    "efficientnet": (
        "EfficientNetForImageClassification", "EfficientNetConfig",
        {"width_coefficient": 0.25, "depth_coefficient": 0.3, "image_size": 64, "hidden_dim": 320}, 64,
    ),
    "poolformer": (
        "PoolFormerForImageClassification", "PoolFormerConfig",
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}, 64,
    ),
    "focalnet": (
        "FocalNetForImageClassification", "FocalNetConfig",
        {"embed_dim": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "image_size": 64}, 64,
    ),
    "bit": (
        "BitForImageClassification", "BitConfig",
        {"embedding_size": 8, "hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 1, 1], "num_groups": 8}, 64,
    ),
    "levit": (
        "LevitForImageClassification", "LevitConfig",
        {"hidden_sizes": [16, 32, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1], "key_dim": [8, 8, 8],
         "image_size": 64}, 64,
    ),
    "mobilevit": (
        "MobileViTForImageClassification", "MobileViTConfig",
        {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32], "image_size": 64}, 64,
    ),
    "mobilevitv2": ("MobileViTV2ForImageClassification", "MobileViTV2Config", {"width_multiplier": 0.25}, 64),
    "swiftformer": (
        "SwiftFormerForImageClassification", "SwiftFormerConfig",
        {"embed_dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "image_size": 64}, 64,
    ),
    "hgnet_v2": (
        "HGNetV2ForImageClassification", "HGNetV2Config",
        {"stem_channels": [3, 8, 8], "stage_in_channels": [8, 16, 16, 16], "stage_mid_channels": [8, 8, 8, 8],
         "stage_out_channels": [16, 16, 16, 16], "stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [2, 2, 2, 2],
         "hidden_sizes": [16, 16, 16, 16], "depths": [1, 1, 1, 1]}, 64,
    ),
    "segformer": (
        "SegformerForSemanticSegmentation", "SegformerConfig",
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2],
         "decoder_hidden_size": 8}, 64,
    ),
    "mobilevit_deeplab": (
        "MobileViTForSemanticSegmentation", "MobileViTConfig",
        {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32], "image_size": 64,
         "aspp_out_channels": 16}, 64,
    ),
    "upernet_convnext": (
        "UperNetForSemanticSegmentation", "UperNetConfig",
        {"backbone_config": ("ConvNextConfig", {**_FOUR, "out_features": ["stage1", *_STAGES]}), "hidden_size": 8,
         "auxiliary_in_channels": 16, "auxiliary_channels": 8, "pool_scales": [1, 2]}, 64,
    ),
    "glpn": (
        "GLPNForDepthEstimation", "GLPNConfig",
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "decoder_hidden_size": 8,
         "num_attention_heads": [1, 1, 2, 2]}, 64,
    ),
    "detr_resnet": (
        "DetrForObjectDetection", "DetrConfig",
        {"backbone_config": ("ResNetConfig", {"embedding_size": 8, **_FOUR, "out_features": ["stage4"]}),
         "use_timm_backbone": False, **_DETR}, 64,
    ),
    "deformable_detr": (
        "DeformableDetrForObjectDetection", "DeformableDetrConfig",
        {"backbone_config": ("ResNetConfig", {"embedding_size": 8, **_FOUR, "out_features": ["stage4"]}),
         "use_timm_backbone": False, **_DETR, **_DEFORMABLE, "decoder_layers": 2, "d_model": 32}, 64,
    ),
    "rt_detr": (
        "RTDetrForObjectDetection", "RTDetrConfig",
        {"backbone_config": ("RTDetrResNetConfig", {
            "embedding_size": 8, "layer_type": "basic", **_FOUR, "out_features": _STAGES}),
         "encoder_hidden_dim": 16, "encoder_in_channels": [8, 16, 16], "decoder_in_channels": [16, 16, 16],
         "decoder_n_points": 2, "num_denoising": 0, **_DETR}, 64,
    ),
    "swin2sr": (
        "Swin2SRForImageSuperResolution", "Swin2SRConfig",
        {"embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "image_size": 16, "num_feat": 8}, 16,
    ),
}  # fmt: skip

_CHANNELS = {"decoder_channels": (32, 16, 16, 8, 8)}
# ARCH/ENCODER: arguments.
_SMP: dict[str, dict[str, Any]] = {
    "unet/tu-mobilenetv3_small_050": _CHANNELS,
    "unet/tu-test_resnet": {"encoder_depth": 3, "decoder_channels": (32, 16, 8)},
    "unetplusplus/tu-mobilenetv3_small_050": _CHANNELS,
    "manet/tu-mobilenetv3_small_050": {**_CHANNELS, "decoder_pab_channels": 16},
    "linknet/tu-mobilenetv3_small_050": {},
    "fpn/tu-mobilenetv3_small_050": {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32},
    "pspnet/tu-mobilenetv3_small_050": {"psp_out_channels": 32},
    "upernet/tu-mobilenetv3_small_050": {"decoder_channels": 32},
    "deeplabv3/mobilenet_v2": {"decoder_channels": 16},
    "deeplabv3plus/mobilenet_v2": {"decoder_channels": 16},
    "pan/mobilenet_v2": {"decoder_channels": 16},
    "segformer/mit_b0": {"decoder_segmentation_channels": 16},
}

_UNET = {"channels": (8, 16, 16), "strides": (2, 2), "num_res_units": 1}
_VOLUME = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
# Name: class in monai.networks.nets, arguments, size of one input.
_MONAI: dict[str, tuple[str, dict[str, Any], Size]] = {
    "unet_2d": ("UNet", {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, **_UNET}, (1, 32, 32)),
    "unet_3d": ("UNet", {**_VOLUME, **_UNET}, (1, 16, 16, 16)),
    "basic_unet_3d": ("BasicUNet", {**_VOLUME, "features": (8, 8, 8, 8, 8, 8)}, (1, 32, 32, 32)),
    "dynunet_3d": (
        "DynUNet",
        {**_VOLUME, "kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2],
         "filters": [4, 8, 8]},
        (1, 16, 16, 16),
    ),
    "segresnet_3d": ("SegResNet", {**_VOLUME, "init_filters": 8, "blocks_down": (1, 1), "blocks_up": (1,)},
                     (1, 16, 16, 16)),
    "attention_unet_2d": (
        "AttentionUnet",
        {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "channels": (8, 8, 16), "strides": (2, 2)},
        (1, 32, 32),
    ),
    "highresnet_3d": (
        "HighResNet",
        {**_VOLUME, "layer_params": (
            {"name": "conv_0", "n_features": 8, "kernel_size": 3},
            {"name": "res_1", "n_features": 8, "kernels": (3, 3), "repeat": 1},
            {"name": "conv_1", "n_features": 8, "kernel_size": 1},
            {"name": "conv_2", "kernel_size": 1})},
        (1, 16, 16, 16),
    ),
    "densenet121_2d": (
        "DenseNet", {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "init_features": 8, "growth_rate": 4,
                     "block_config": (2, 2, 2, 2)}, (1, 64, 64),
    ),
    "resnet18_3d": (
        "ResNet",
        {"block": "basic", "layers": [1, 1, 1, 1], "block_inplanes": [8, 8, 16, 16], "n_input_channels": 1,
         "num_classes": 2}, (1, 16, 16, 16),
    ),
    "autoencoder_2d": (
        "AutoEncoder", {"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "channels": (8, 8), "strides": (2, 2)},
        (1, 32, 32),
    ),
}  # fmt: skip

_BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
_DIFFUSERS: dict[str, tuple[str, dict[str, Any], tuple[Size, ...]]] = {
    "unet2d": (
        "UNet2DModel",
        {**_BLOCKS, "sample_size": 16, "attention_head_dim": 4, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
         "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}, ((3, 16, 16), ()),
    ),
    "unet2d_condition": (
        "UNet2DConditionModel",
        {**_BLOCKS, "sample_size": 16, "attention_head_dim": 4, "cross_attention_dim": 8,
         "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
         "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}, ((4, 16, 16), (), (7, 8)),
    ),
    "autoencoder_kl": (
        "AutoencoderKL",
        {**_BLOCKS, "latent_channels": 4, "down_block_types": ("DownEncoderBlock2D",) * 2,
         "up_block_types": ("UpDecoderBlock2D",) * 2}, ((3, 32, 32),),
    ),
    "vq_model": (
        "VQModel",
        {**_BLOCKS, "latent_channels": 4, "num_vq_embeddings": 16, "down_block_types": ("DownEncoderBlock2D",) * 2,
         "up_block_types": ("UpDecoderBlock2D",) * 2}, ((3, 32, 32),),
    ),
}  # fmt: skip


class _Residual(nn.Module):
    """Blocks that add to their input: SRResNet with batch norm, EDSR without, RRDB with dense connections."""

    def __init__(self, kind: str, width: int = 16, blocks: int = 2) -> None:
        super().__init__()
        self.kind = kind
        self.head = nn.Conv2d(3, width, 9 if kind == "srresnet" else 3, padding="same")
        inner = 3 if kind == "rrdb" else 2
        self.convs = nn.ModuleList(
            nn.Conv2d(width * (j + 1 if kind == "rrdb" else 1), width, 3, padding=1)
            for _ in range(blocks) for j in range(inner)
        )  # fmt: skip
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(blocks * inner)) if kind == "srresnet" else None
        self.inner = inner
        self.up = nn.Conv2d(width, 4 * width, 3, padding=1)
        self.tail = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.head(x)
        for block in range(0, len(self.convs), self.inner):
            features = [x]
            for j in range(self.inner):
                y = self.convs[block + j](torch.cat(features, 1) if self.kind == "rrdb" else features[-1])
                y = y if self.norms is None else self.norms[block + j](y)
                features.append(nn.functional.leaky_relu(y, 0.2))
            x = x + 0.2 * features[-1]
        return self.tail(nn.functional.pixel_shuffle(self.up(x + first), 2))


class _DenoisingUNet(nn.Module):
    """A U-Net for denoising: strided convolutions down, transposed ones up."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.leave = nn.Conv2d(2 * width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x).relu()
        z = self.middle(self.down(y).relu()).relu()
        return x - self.leave(torch.cat([y, self.up(z).relu()], 1))


_RESTORATION: dict[str, Callable[[], nn.Module]] = {
    **{kind: partial(_Residual, kind) for kind in ("srresnet", "edsr", "rrdb")},
    "unet": _DenoisingUNet,
}

NAMES = [
    *(("restoration", name) for name in _RESTORATION), *(("monai", name) for name in _MONAI),
    *(("diffusers", name) for name in _DIFFUSERS), *(("transformers", name) for name in _TRANSFORMERS),
    *(("smp", name) for name in _SMP),
]  # fmt: skip


def import_libraries() -> None:
    """Import the libraries with the classes of all networks."""
    import diffusers
    import monai.networks.nets
    import segmentation_models_pytorch
    import transformers

    for name in {part for network, config, _, _ in _TRANSFORMERS.values() for part in (network, config)}:
        getattr(transformers, name)
    for name in {network for network, _, _ in _DIFFUSERS.values()}:
        getattr(diffusers, name)
    assert monai.networks.nets
    assert segmentation_models_pytorch


def _with_config(value: Any, transformers: Any) -> Any:
    """Return a value of a config; a class and its arguments become a config."""
    return getattr(transformers, value[0])(**value[1]) if isinstance(value, tuple) and len(value) == 2 else value


def small_network(library: str, name: str) -> tuple[nn.Module, tuple[Size, ...]]:
    """Return a network with random weights, and the size of each of its inputs of one example."""
    if library == "restoration":
        return _RESTORATION[name](), ((3, 32, 32),)
    if library == "transformers":
        import transformers

        network, config, arguments, side = _TRANSFORMERS[name]
        values = {key: _with_config(value, transformers) for key, value in arguments.items()}
        made = getattr(transformers, config)(**values, num_labels=5)
        return getattr(transformers, network)._from_config(made, attn_implementation="eager"), ((3, side, side),)
    if library == "smp":
        import segmentation_models_pytorch as smp

        architecture, encoder = name.split("/")
        side = 128 if architecture == "pan" else 64  # its pyramid halves the last map three times
        network = smp.create_model(architecture, encoder, encoder_weights=None, classes=3, **_SMP[name])
        return network, ((3, side, side),)
    if library == "monai":
        import monai.networks.nets

        network, arguments, size = _MONAI[name]
        return getattr(monai.networks.nets, network)(**arguments), (size,)
    import diffusers

    network, arguments, sizes = _DIFFUSERS[name]
    return getattr(diffusers, network)(**arguments), sizes
