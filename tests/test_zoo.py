"""Exactness on real architectures: a sample of benchmarks/zoo.py that covers every kind of convolution."""

from __future__ import annotations

import csv
import warnings

import pytest
import timm

from benchmarks import zoo

ARCHITECTURES = [
    # plain, bottleneck, grouped, dilated (drn-like stride), deep stems, anti-aliased
    ("timm", "resnet18"),
    ("timm", "resnext26ts"),
    ("timm", "resnetblur18"),
    ("timm", "resnet26t"),
    ("timm", "seresnext26d_32x4d"),
    ("timm", "densenet121"),
    ("timm", "regnetx_002"),
    ("timm", "hrnet_w18_small"),
    ("timm", "dla34"),
    ("timm", "repvgg_a0"),
    ("timm", "ghostnet_050"),
    # depthwise, 'same' padding, large kernels, mixed kernels, conditional convolutions (skipped)
    ("timm", "mobilenetv3_small_050"),
    ("timm", "tf_efficientnet_lite0"),
    ("timm", "tf_mixnet_s"),
    ("timm", "efficientnet_cc_b0_4e"),
    ("timm", "convnext_atto"),
    ("timm", "repghostnet_050"),
    ("timm", "inception_next_atto"),
    ("timm", "starnet_s1"),
    # weight standardisation
    ("timm", "nf_regnet_b0"),
    ("timm", "resnetv2_50x1_bit"),
    ("timm", "eca_nfnet_l0"),
    ("timm", "dm_nfnet_f0"),
    ("timm", "vit_tiny_r_s16_p8_224"),
    # transformers with patch and positional convolutions
    ("timm", "vit_tiny_patch16_224"),
    ("timm", "coatnet_pico_rw_224"),
    ("timm", "levit_128s"),
    ("timm", "edgenext_xx_small"),
    ("timm", "xcit_nano_12_p16_224"),
    ("timm", "lowformer_b0"),
    # torchvision: classification, asymmetric kernels, segmentation, detection, video, optical flow
    ("torchvision", "squeezenet1_1"),
    ("torchvision", "inception_v3"),
    ("torchvision", "lraspp_mobilenet_v3_large"),
    ("torchvision", "ssdlite320_mobilenet_v3_large"),
    ("torchvision", "r2plus1d_18"),
    ("torchvision", "mc3_18"),
    ("torchvision", "raft_small"),
]


def known(library: str, name: str) -> bool:
    """Return whether this version of the library has the architecture."""
    return library != "timm" or timm.is_model(name)


# These take long, and another one that does not is of the same kind.
SLOW = {
    *("dm_nfnet_f0", "inception_v3", "r2plus1d_18", "mc3_18", "resnext26ts", "resnet26t", "seresnext26d_32x4d"),
    *("densenet121", "hrnet_w18_small", "dla34", "repghostnet_050", "inception_next_atto", "resnetv2_50x1_bit"),
    *("eca_nfnet_l0", "coatnet_pico_rw_224", "levit_128s", "xcit_nano_12_p16_224", "ssdlite320_mobilenet_v3_large"),
    *("tf_efficientnet_lite0", "efficientnet_cc_b0_4e", "repvgg_a0", "resnetblur18", "tf_mixnet_s"),
}


@pytest.mark.parametrize(
    ("library", "name"),
    [pytest.param(*one, marks=[pytest.mark.slow] * (one[1] in SLOW)) for one in ARCHITECTURES if known(*one)],
)
def test_the_whole_basis_is_exact_on_architectures_of_timm_and_torchvision(library: str, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of the libraries
        row = zoo.check(library, name)
    assert row["status"] in ("ok", "ok in float32"), row
    if row["status"] == "ok":
        assert float(row["error64"]) <= zoo.BOUND_64
    assert float(row["error32"]) <= zoo.BOUND_32
    assert row.get("same_top1", True)


@pytest.mark.parametrize(
    "name",
    ["mobilenetv3_small_050", *(pytest.param(n, marks=pytest.mark.slow) for n in ("resnet18", "tf_efficientnet_b0")),
     "regnetx_002"],
)  # fmt: skip
def test_ranks_are_the_same_network_in_both_forms_on_architectures_of_timm(name: str) -> None:
    row = zoo.check("timm", name, ranks=True)
    assert row["status"] == "ok", row
    assert float(row["kept"]) < 1


def test_the_sample_covers_every_class_of_convolution_in_the_table() -> None:
    rows = list(csv.DictReader(zoo.RESULTS.read_text().splitlines()))
    everywhere = {kind for row in rows for kind in row["classes"].split()}
    here = {k for row in rows if (row["library"], row["architecture"]) in ARCHITECTURES for k in row["classes"].split()}
    assert len(rows) > 1400
    assert here == everywhere
