"""Images for calibration: all images in a folder, with the network's own pre-processing; broken files are named."""

from __future__ import annotations

import gc
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import harmconvert as hc
from harmconvert.data import (
    DataRequest,
    Variety,
    calibration_images,
    convert_mode,
    describe_preprocessing,
    evaluation_transform,
    padded_crop_transform,
    preprocessing,
    training_transform,
    uniform_output_warning,
)
from harmconvert.errors import InputError, UsageError
from harmconvert.samples import mnist5k, mnist5k_held_back

from .pictures import tiff
from .seams import replace_everywhere


@pytest.fixture
def network() -> nn.Module:
    return timm.create_model("resnet18", pretrained=False)


def picture(path: Path, seed: int, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a folder of twelve images, flat and nested, in several formats and modes, and a text file."""
    names = ["a.png", "b.jpg", "deep/c.PNG", "deep/er/d.jpeg", "e.bmp", "f.webp"]
    for number, name in enumerate(names * 2):
        path = tmp_path / name
        picture(path.with_stem(f"{path.stem}{number}"), number, mode=["RGB", "L", "RGB"][number % 3])
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_images_are_found_at_any_depth_of_a_folder(folder: Path, network: nn.Module) -> None:
    images = calibration_images(str(folder), network, 100, 5, overrides={"input_size": (3, 32, 32)})
    assert len(images) == 12
    assert [len(batch) for batch in images.batches] == [5, 5, 2]
    assert images.unreadable == ()


def test_images_are_chosen_by_the_seed(folder: Path, network: nn.Module) -> None:
    def chosen(seed: int) -> torch.Tensor:
        return torch.cat(calibration_images(str(folder), network, 4, 4, seed=seed).batches)

    assert torch.equal(chosen(0), chosen(0))
    assert not torch.equal(chosen(0), chosen(1))


def test_pixels_are_scaled_by_the_preprocessing_of_the_network(tmp_path: Path, network: nn.Module) -> None:
    Image.new("RGB", (300, 300), (255, 0, 51)).save(tmp_path / "flat.png")
    (batch,) = calibration_images(str(tmp_path), network).batches
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert batch.shape == (1, 3, 224, 224)
    assert torch.allclose(batch[0, :, 100, 100], (torch.tensor([1.0, 0.0, 0.2]) - mean) / std, atol=1e-5)
    overrides = {"mean": (0.5,), "std": (0.25,), "input_size": (3, 64, 48)}
    (batch,) = calibration_images(str(tmp_path), network, overrides=overrides).batches
    assert batch.shape == (1, 3, 64, 48)
    assert torch.allclose(batch[0, :, 10, 10], torch.tensor([2.0, -2.0, -1.2]), atol=1e-5)


def test_a_network_with_one_channel_gets_grey_images(tmp_path: Path) -> None:
    Image.new("RGB", (28, 28), (255, 255, 255)).save(tmp_path / "white.png")
    network = hc.open_source("sample:resnet_mnist5k").model
    (batch,) = calibration_images(str(tmp_path), network).batches
    assert batch.shape == (1, 1, 28, 28)
    assert batch.min() == pytest.approx((1 - 0.1307) / 0.3081, rel=1e-5)


def test_unreadable_images_are_skipped_and_named(folder: Path, network: nn.Module) -> None:
    (folder / "broken.jpg").write_bytes(b"not a picture")
    (folder / "cut.png").write_bytes((folder / "a0.png").read_bytes()[:200])
    images = calibration_images(str(folder), network, 100)
    assert len(images) == 12
    assert sorted(Path(name).name for name in images.unreadable) == ["broken.jpg", "cut.png"]


def test_too_many_unreadable_images_are_an_error(tmp_path: Path, network: nn.Module) -> None:
    for number in range(6):
        (tmp_path / f"{number}.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"4 images of .* cannot be read \(.*: repair or remove these images$"):
        calibration_images(str(tmp_path), network, 20)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("no/such/folder", "there is no folder no/such/folder: give a folder of images"),
        ("sample:cats", "there is no sample data set 'sample:cats'"),
        ("torch/cifar10", "torch/cifar10 needs a folder: name it with data_dir=DIR"),
    ],
)
def test_unknown_data_sets_are_refused(data: str, message: str, network: nn.Module) -> None:
    with pytest.raises(UsageError, match=message):
        calibration_images(data, network)


def test_sixteen_bit_images_in_linked_folders_are_read(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    pixels = np.linspace(0, 65535, 28 * 28).reshape(28, 28).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "real" / "x-ray.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "link").symlink_to(tmp_path / "real")
    network = nn.Conv2d(1, 1, 3)
    overrides = {"input_size": (1, 28, 28), "mean": (0.0,), "std": (1.0,), "crop_pct": 1.0}
    (batch,) = calibration_images(str(tmp_path / "set"), network, overrides=overrides).batches
    assert torch.allclose(batch[0, 0], torch.from_numpy(pixels / 65535).float(), atol=1 / 255)


def test_timms_defaults_for_three_channels_are_reduced_to_one() -> None:
    config = preprocessing(nn.Conv2d(1, 1, 3), {"input_size": (1, 16, 16)})
    assert config["mean"] == (pytest.approx(0.449),)


def test_a_file_is_refused_as_a_folder(folder: Path, network: nn.Module) -> None:
    with pytest.raises(UsageError, match="is a file: give the folder"):
        calibration_images(str(folder / "a0.png"), network)


def test_a_folder_without_images_is_refused(tmp_path: Path, network: nn.Module) -> None:
    with pytest.raises(InputError, match="has no image"):
        calibration_images(str(tmp_path), network)


def test_a_data_set_that_timm_does_not_have_is_refused(tmp_path: Path, network: nn.Module) -> None:
    with pytest.raises(UsageError, match="timm cannot open torch/nonsense"):
        calibration_images(DataRequest("torch/nonsense", str(tmp_path)), network)


def test_a_stream_is_read_in_its_own_order(monkeypatch: pytest.MonkeyPatch, network: nn.Module) -> None:
    class Reader:
        """A reader with the interface of timm's readers of streams."""

        def __iter__(self):
            for value in range(0, 250, 10):
                yield Image.new("RGB", (40, 40), (value, 0, 0)), 0

        def __len__(self) -> int:
            return 25

    stream = timm.data.IterableImageDataset(None, reader=Reader())
    replace_everywhere(monkeypatch, timm.data.create_dataset, lambda *_, **__: stream)
    overrides = {"input_size": (3, 16, 16), "mean": (0.0,), "std": (1.0,)}
    images = calibration_images("wds/some", network, 5, overrides=overrides)
    assert [round(float(x[0, 0, 0] * 255)) for x in images.batches[0]] == [0, 10, 20, 30, 40]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # timm leaves the archive open
def test_broken_images_of_an_archive_are_skipped_and_deep_ones_scaled(tmp_path: Path, network: nn.Module) -> None:
    folder = tmp_path / "in" / "cats"
    folder.mkdir(parents=True)
    Image.fromarray(np.full((20, 20), 65535, dtype=np.uint16)).save(folder / "deep.png")
    (folder / "broken.png").write_bytes(b"no picture")
    with tarfile.open(tmp_path / "pictures.tar", "w") as archive:
        archive.add(tmp_path / "in", arcname=".")
    overrides = {"input_size": (3, 16, 16), "mean": (0.0,), "std": (1.0,)}
    images = calibration_images(str(tmp_path / "pictures.tar"), network, 8, overrides=overrides)
    assert len(images) == len(images.unreadable) == 1
    assert images.batches[0].min() == 1
    gc.collect()  # so that the warning appears in this test and in no other


def test_a_timm_data_set_on_disk_is_read(tmp_path: Path, network: nn.Module) -> None:
    for number in range(4):
        picture(tmp_path / "validation" / "cats" / f"{number}.png", number)
    images = calibration_images(DataRequest("torch/image_folder", str(tmp_path), "validation"), network, 3)
    assert len(images) == 3


def test_the_training_digits_exclude_the_held_back_ones() -> None:
    images, labels = mnist5k()
    held, _ = mnist5k_held_back()
    assert len(images) == len(labels) == 4000
    seen = {image.tobytes() for image in images.numpy()}
    back = ((held[:, 0] * 0.3081 + 0.1307) * 255).round().to(torch.uint8)
    assert not seen & {image.tobytes() for image in back.numpy()}


def test_photographs_give_the_requested_number_of_crops(network: nn.Module) -> None:
    images = calibration_images("sample:photographs", network, 5, 2, overrides={"input_size": (3, 32, 32)})
    assert [len(batch) for batch in images.batches] == [2, 2, 1]
    assert len({image.numpy().tobytes() for batch in images.batches for image in batch}) == 5


def test_a_network_without_an_input_size_asks_for_it() -> None:
    with pytest.raises(UsageError, match="give input_size=C,H,W"):
        preprocessing(nn.Conv2d(3, 3, 3), {})
    assert preprocessing(nn.Conv2d(3, 3, 3), {"input_size": (3, 50, 60)})["input_size"] == (3, 50, 60)


def test_networks_with_inputs_other_than_images_are_refused() -> None:
    with pytest.raises(UsageError, match="inputs of 4 axes, not images"):
        preprocessing(nn.Conv2d(3, 3, 3), {"input_size": (3, 16, 112, 112)})
    with pytest.raises(UsageError, match="reads 4 channels, images have 1 or 3"):
        calibration_images("sample:photographs", nn.Conv2d(4, 3, 3), overrides={"input_size": (4, 32, 32)})
    with pytest.raises(UsageError, match="mean has 2 numbers for 3 channels"):
        preprocessing(nn.Conv2d(3, 3, 3), {"input_size": (3, 32, 32), "mean": (0.5, 0.5)})


def test_the_preprocessing_of_torchvision_weights_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    network = hc.open_source("torchvision:resnet18.IMAGENET1K_V1", pretrained=False).model
    config = preprocessing(network, {})
    assert config["input_size"] == (3, 224, 224)
    assert config["mean"] == (0.485, 0.456, 0.406)
    assert config["crop_pct"] == pytest.approx(224 / 256)
    assert config["interpolation"] == "bilinear"


# --- pre-processing that nobody says ---


def test_a_network_of_unknown_preprocessing_does_not_get_that_of_imagenet(folder: Path) -> None:
    network, size = nn.Conv2d(3, 2, 3), {"input_size": (3, 16, 16)}
    for given in ({}, {"mean": (0.5,)}, {"std": (0.5,)}):
        with pytest.raises(UsageError, match=r"does not declare its preprocessing.*mean and std, or"):
            calibration_images(str(folder), network, 1, overrides=size | given)
    for function in (training_transform, lambda config: padded_crop_transform(config, 4, 0, 0)):
        with pytest.raises(UsageError, match="does not declare its preprocessing"):
            function(preprocessing(network, size))


def test_with_unknown_preprocessing_only_the_given_steps_are_applied(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    given = {"input_size": (1, 16, 16), "mean": (0.1,), "std": (0.3,)}
    ((image,),) = calibration_images(str(tmp_path), nn.Conv2d(1, 2, 3), 1, overrides=given).batches
    assert torch.allclose(image[0], (torch.from_numpy(pixels) / 255 - 0.1) / 0.3, atol=1e-6), "nothing is cropped"


def test_preprocessing_is_chosen_by_name(tmp_path: Path) -> None:
    picture(tmp_path / "wide.png", 0, size=(64, 16))
    wide, network = Image.open(tmp_path / "wide.png"), nn.Conv2d(3, 2, 3)
    none = preprocessing(network, {"input_size": (3, 16, 16), "preprocess": "none"})
    squashed = torch.from_numpy(np.array(wide.resize((16, 16), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    assert torch.allclose(evaluation_transform(none)(wide), squashed, atol=1e-6), "whole, values from 0 to 1"
    imagenet = preprocessing(network, {"input_size": (3, 16, 16), "preprocess": "imagenet"})
    assert (
        describe_preprocessing(imagenet)
        == "3x16x16, mean 0.485,0.456,0.406, std 0.229,0.224,0.225, bicubic, crop 0.875"
    )
    declared = timm.create_model("resnet18", pretrained=False)
    assert preprocessing(declared, {"preprocess": "none"})["mean"] == (0, 0, 0), "the user knows better"


PREPARE = """
import numpy as np, torch
def halves(image):
    return torch.from_numpy(np.array(image.resize((8, 8)))).float()[None] / 510
def large(image):
    return torch.zeros(1, 9, 9)
def fails(image):
    return image.no_such_thing
def number(image):
    return 3
"""


def test_a_user_function_preprocesses_images(tmp_path: Path) -> None:
    (tmp_path / "prepare.py").write_text(PREPARE)
    picture(tmp_path / "a.png", 0, size=(20, 20))

    def config(function: str) -> dict[str, object]:
        way = f"{tmp_path}/prepare.py:{function}"
        return preprocessing(nn.Conv2d(1, 2, 3), {"input_size": (1, 8, 8), "preprocess": way})

    assert describe_preprocessing(config("halves")) == f"1x8x8, by {tmp_path}/prepare.py:halves"
    given = {"input_size": (1, 8, 8), "preprocess": f"{tmp_path}/prepare.py:halves"}
    ((image,),) = calibration_images(str(tmp_path), nn.Conv2d(1, 2, 3), overrides=given).batches
    assert 0.2 < image.max() <= 0.5
    for transform in (
        training_transform(config("halves"), hflip=0.5),
        training_transform(config("halves"), no_aug=True),
        padded_crop_transform(config("halves"), 2, 0.5, 0),
    ):
        assert transform(Image.new("L", (20, 20), 255)).shape == (1, 8, 8)
    for function, message in (
        ("large", "returns a tensor of 1x9x9, but the network's input size is 1x8x8"),
        ("fails", "prepare.py:fails fails: AttributeError: "),
        ("number", "returns a int: it should return a tensor of floats"),
    ):
        with pytest.raises(InputError, match=message):
            evaluation_transform(config(function))
    with pytest.raises(UsageError, match="has no function 'nothing'"):
        evaluation_transform(config("nothing"))
    with pytest.raises(UsageError, match="unknown preprocessing 'imagnet': use imagenet, none or FILE"):
        preprocessing(nn.Conv2d(1, 2, 3), {"input_size": (1, 8, 8), "preprocess": "imagnet"})
    with pytest.raises(UsageError, match="does the whole preprocessing: leave out mean or the function"):
        preprocessing(nn.Conv2d(1, 2, 3), {"input_size": (1, 8, 8), "preprocess": "a.py:f", "mean": (1.0,)})


def test_a_function_that_a_checkpoint_names_is_not_run_without_permission() -> None:
    network = nn.Conv2d(1, 2, 3)
    network.pretrained_cfg = {"input_size": (1, 8, 8), "function": "evil.py:run"}
    with pytest.raises(
        UsageError, match=r"preprocessed by user code \(evil.py:run\), which is not run without permission"
    ):
        preprocessing(network, {})
    assert preprocessing(network, {"trust_code": True})["function"] == "evil.py:run"
    assert "function" not in preprocessing(network, {"mean": (0.5,), "std": (0.5,)})


def test_a_timm_network_with_one_channel_gets_grey_images(folder: Path) -> None:
    network = timm.create_model("resnet18", pretrained=False, in_chans=1)
    (batch,) = calibration_images(str(folder), network, 2, overrides={"crop_pct": 1.0}).batches
    assert batch.shape == (2, 1, 224, 224)
    assert preprocessing(network, {})["mean"] == (pytest.approx(0.449),)


# --- pictures of any mode ---


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16", "F"])
@pytest.mark.parametrize("wanted", ["L", "RGB"])
def test_pictures_of_every_mode_are_converted_to_the_channels_of_the_network(mode: str, wanted: str) -> None:
    picture = Image.new("L", (4, 4), 255).convert({"I;16": "I"}.get(mode, mode))
    if mode.startswith("I") or mode == "F":
        deep = np.full((4, 4), 1.0 if mode == "F" else 65535)
        picture = Image.fromarray(deep.astype({"I": np.int32, "I;16": np.uint16, "F": np.float32}[mode]))
    found = convert_mode(picture, wanted)
    assert found.mode == wanted
    assert np.asarray(found).min() >= 254, "white stays white"


def test_transparency_is_dropped_as_in_timm_and_without_a_warning(tmp_path: Path) -> None:
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "p.png", transparency=b"\0\0")
    with Image.open(tmp_path / "p.png") as image:
        assert convert_mode(image, "RGB").getpixel((0, 0)) == (10, 20, 30)


def test_float_pictures_are_scaled_by_their_range() -> None:
    def grey(value: float) -> int:
        return int(convert_mode(Image.fromarray(np.full((2, 2), value, dtype=np.float32)), "L").getpixel((0, 0)))

    assert [grey(value) for value in (0.5, 1.0, 51.0, 200.0, 65535.0)] == [128, 255, 51, 200, 255]
    with pytest.raises(ValueError, match="has values up to 1e"):
        grey(1e6)


@pytest.mark.parametrize(
    ("channels", "extra", "photometric", "bits"),
    [(13, (0,) * 12, 1, 16), (4, (0,) * 3, 1, 16), (4, (0,), 2, 8), (2, (0,), 1, 8), (6, (0, 0, 0), 2, 8)],
)
def test_satellite_images_are_refused_and_named(
    tmp_path: Path, network: nn.Module, channels: int, extra: tuple[int, ...], photometric: int, bits: int
) -> None:
    tiff(tmp_path / "scene.tif", channels, extra, photometric, bits)
    with pytest.raises(InputError, match=rf"scene.tif is a TIFF with {channels} channels.*load it in Python"):
        calibration_images(str(tmp_path), network, 4)


def test_grey_and_colour_tiffs_are_read(tmp_path: Path, network: nn.Module) -> None:
    for number, (channels, extra, photometric) in enumerate([(1, (), 1), (3, (), 2), (4, (2,), 2), (4, (), 5)]):
        tiff(tmp_path / f"{number}.tif", channels, extra, photometric)
    images = calibration_images(str(tmp_path), network, 4, overrides={"input_size": (3, 8, 8)})
    assert (len(images), images.unreadable) == (4, ())


# --- outputs that hardly vary ---


def test_a_remark_says_when_outputs_hardly_vary() -> None:
    digits, _ = mnist5k_held_back()
    network, digits = hc.open_source("sample:resnet_mnist5k").model, digits[::25]
    assert uniform_output_warning(network, [digits]) is None
    assert "the network gives 100% of 40 images the same class" in (
        uniform_output_warning(network, [digits * 1e-3]) or ""
    )
    assert uniform_output_warning(network, [digits[:4] * 1e-3]) is None, "too few to tell"
    one_class = Variety()
    one_class.add(torch.eye(3)[torch.zeros(40, dtype=torch.long)], torch.zeros(40, dtype=torch.long))
    assert one_class.warning() is None, "as the labels say"
    maps = nn.Conv2d(1, 2, 3)
    assert uniform_output_warning(maps, [torch.randn(20, 1, 9, 9)]) is None
    constant = nn.Sequential(maps, nn.Conv2d(2, 2, 1))
    nn.init.constant_(constant[1].weight, 1e-4)
    assert "outputs that vary by only" in (uniform_output_warning(constant, [torch.randn(20, 1, 9, 9)]) or "")
