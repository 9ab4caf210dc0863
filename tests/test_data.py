"""Reading data sets, and splitting them. No test here reaches the network."""

import argparse
import functools
import http.server
import shutil
import threading
import urllib.error
import warnings

import fabricated
import numpy
import pytest
import torch
import torchvision
from fabricated import CIFAR
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

import common


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network in the tests")

    for module in (torchvision.datasets.cifar, torchvision.datasets.stl10):
        monkeypatch.setattr(module, "download_and_extract_archive", refuse)


# -------------------------------------------------------------------------------------- textures


@pytest.fixture(scope="module")
def textures():
    return {split: common.load_images("textures", "unused", split) for split in ("train", "test")}


@pytest.mark.parametrize(("split", "count"), [("train", 5120), ("test", 1000)])
def test_textures_are_balanced_uint8_images(textures, split, count):
    data = textures[split]
    assert len(data) == count
    assert data.images.shape[-1] == 32
    assert data.images.shape == (count, 3, 32, 32)
    assert data.images.dtype == torch.uint8
    assert data.images.device.type == "cpu"
    assert data.labels.shape == (count,)
    assert data.labels.dtype == torch.int64
    assert len(data.classes) == len(set(data.classes)) == 10
    assert data.labels.bincount().tolist() == [count // 10] * 10
    first = data.labels[: count // 10].bincount(minlength=10)  # shuffled
    assert first.min() > 0
    assert (data.mean, data.std) == common.MEAN_STD["textures"]


def test_textures_are_the_same_every_time(textures):
    torch.manual_seed(123)  # the global generator has no say
    again = common.load_images("textures", "elsewhere", "pretrain")
    assert torch.equal(again.images, textures["train"].images)
    assert torch.equal(again.labels, textures["train"].labels)


def test_texture_splits_share_no_image(textures):
    rows = torch.cat([textures[split].images.flatten(1) for split in ("train", "test")])
    assert len(numpy.unique(rows.numpy(), axis=0)) == len(rows)  # nor has one an image twice


def test_texture_classes_differ(textures):
    """A linear map of the amplitude spectrum, fitted to train, beats chance by far on test."""

    def features(data):
        grey = data.images.float().mean(1) / 255
        spectrum = torch.fft.rfft2(grey - grey.mean((1, 2), keepdim=True)).abs().flatten(1)
        return torch.cat([(1 + spectrum).log(), torch.ones(len(grey), 1)], dim=1).double()

    x, target = features(textures["train"]), torch.eye(10).double()[textures["train"].labels]
    weights = torch.linalg.solve(x.T @ x + 10 * torch.eye(x.shape[1]), x.T @ target)
    top1, _ = common.top_k(features(textures["test"]) @ weights, textures["test"].labels)
    assert top1 > 45


def test_texture_mean_and_std(textures):
    pixels = textures["train"].images.double().transpose(0, 1).flatten(1) / 255
    mean, std = common.MEAN_STD["textures"]
    assert pixels.mean(1).tolist() == pytest.approx(mean, abs=0.01)
    assert pixels.std(1).tolist() == pytest.approx(std, abs=0.01)


# ----------------------------------------------------------------------------------------- CIFAR


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_is_read_image_by_image(name, tmp_path, monkeypatch):
    content, names = fabricated.cifar(name, tmp_path, monkeypatch)
    for split in ("pretrain", "train", "test"):
        data = common.load_images(name, str(tmp_path), split)
        rows, labels = content[split != "test"]
        assert data.images.shape == (len(rows), 3, 32, 32)
        assert data.images.dtype == torch.uint8
        for image, row in zip(data.images, rows, strict=True):  # the red plane first, row by row
            assert numpy.array_equal(image.numpy(), row.reshape(3, 32, 32))
        assert data.labels.dtype == torch.int64
        assert data.labels.tolist() == labels
        assert list(data.classes) == names
        assert (data.mean, data.std) == common.MEAN_STD[name]


@pytest.mark.parametrize("name", CIFAR)
def test_missing_files_are_downloaded(name, tmp_path, monkeypatch):
    content, _ = fabricated.cifar(name, tmp_path / "server", monkeypatch)

    def download(url, root, **checks):
        assert url == getattr(torchvision.datasets, name.upper()).url
        shutil.copytree(tmp_path / "server", root, dirs_exist_ok=True)

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", download)
    data = common.load_images(name, str(tmp_path / "data"), "train")
    assert data.labels.tolist() == content[True][1]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", CIFAR)
def test_missing_files_name_the_folder(name, split, tmp_path):
    with pytest.raises(common.UserError) as caught:
        common.load_images(name, str(tmp_path / "nowhere"), split)
    assert str(tmp_path / "nowhere") in str(caught.value)
    assert getattr(torchvision.datasets, name.upper()).filename in str(caught.value)


@pytest.mark.parametrize("damage", ["cut short", "changed", "gone"])
@pytest.mark.parametrize("name", CIFAR)
def test_damaged_files_are_refused(name, damage, tmp_path, monkeypatch):
    fabricated.cifar(name, tmp_path, monkeypatch)
    folder, files, _ = CIFAR[name]
    path = tmp_path / folder / next(iter(files))
    raw = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(raw[:100] if damage == "cut short" else raw[:-50] + bytes(50))
    with pytest.raises(common.UserError) as caught:
        common.load_images(name, str(tmp_path), "train")
    assert str(tmp_path) in str(caught.value)


# ---------------------------------------------------------------------------------------- STL-10


def test_stl10_is_read_image_by_image(tmp_path, monkeypatch):
    content, names = fabricated.stl10(tmp_path, monkeypatch)
    for split in ("train", "test"):
        images, labels = content[split]
        data = common.load_images("stl10", str(tmp_path), split)
        assert numpy.array_equal(data.images.numpy(), images)
        assert data.images.is_contiguous()
        assert data.labels.dtype == torch.int64
        assert data.labels.tolist() == labels.tolist()
        assert list(data.classes) == names
        assert (data.mean, data.std) == common.MEAN_STD["stl10"]
    data = common.load_images("stl10", str(tmp_path), "pretrain")
    both = numpy.concatenate([content["train"][0], content["unlabeled"][0]])
    assert numpy.array_equal(data.images.numpy(), both)
    assert data.labels is None


@pytest.mark.parametrize("split", ["pretrain", "train", "test"])
def test_stl10_that_is_missing_or_damaged_is_refused(split, tmp_path, monkeypatch):
    with pytest.raises(common.UserError, match="stl10_binary.tar.gz"):
        common.load_images("stl10", str(tmp_path), split)
    fabricated.stl10(tmp_path, monkeypatch)
    file = {"pretrain": "unlabeled"}.get(split, split) + "_X.bin"
    with open(tmp_path / "stl10_binary" / file, "r+b") as binary:
        binary.truncate(96 * 96)
    with pytest.raises(common.UserError, match="stl10_binary.tar.gz"):
        common.load_images("stl10", str(tmp_path), split)


@pytest.mark.parametrize(
    ("subset", "holdout", "sizes"),
    [(None, 0, (34, 11, 7)), (None, 4, (30, 7, 4)), (5, 0, (5, 5, 7)), (20, 4, (20, 7, 4))],
)
def test_stl10_pretrains_on_unlabelled_images_too(subset, holdout, sizes, tmp_path, monkeypatch):
    content, _ = fabricated.stl10(tmp_path, monkeypatch)
    args = argparse.Namespace(data="stl10", data_dir=str(tmp_path), image_size=64, contents=None)
    args.subset, args.holdout = subset, holdout
    pretrain, train, test = common.load_splits(args, torch.device("cpu"))
    assert (len(pretrain), len(train), len(test)) == sizes
    rows = {part: {x.tobytes() for x in images} for part, (images, _) in content.items()}
    held = lambda data: {x.numpy().tobytes() for x in data.images}
    assert pretrain.labels is None
    assert held(train) <= rows["train"]
    assert held(pretrain) <= rows["train"] | rows["unlabeled"]
    assert not held(test) & (held(pretrain) | held(train))
    if subset is None:
        assert held(train) | rows["unlabeled"] == held(pretrain)
    else:  # shuffled: both kinds among the first
        assert held(pretrain) & rows["unlabeled"]
    assert held(test) <= rows["train" if holdout else "test"]
    for image, label in zip(train.images, train.labels, strict=True):
        at = [numpy.array_equal(image.numpy(), x) for x in content["train"][0]].index(True)
        assert label == content["train"][1][at]
    evaluated = common.load_splits(args, torch.device("cpu"), pretrain=False)
    assert torch.equal(evaluated[0].images, train.images)  # without reading the unlabelled ones
    assert torch.equal(evaluated[1].images, train.images)
    assert torch.equal(evaluated[2].images, test.images)


# --------------------------------------------------------------------------------- Tiny ImageNet


def assert_pictures(data, content):
    """Every picture of `data` is the one that was written, under its label."""
    assert len(data) == len(content)
    assert data.images.dtype == torch.uint8
    assert data.labels.dtype == torch.int64
    for image, label, (picture, expected) in zip(data.images, data.labels, content, strict=True):
        assert numpy.array_equal(image.numpy(), picture)
        assert label == expected


def test_tiny_imagenet_is_read_picture_by_picture(tmp_path):
    content, wnids = fabricated.tiny_imagenet(tmp_path)
    for split in ("pretrain", "train", "test"):
        data = common.load_images("tiny-imagenet", str(tmp_path), split)
        assert_pictures(data, content["test" if split == "test" else "train"])
        assert data.classes == wnids
        assert (data.mean, data.std) == common.MEAN_STD["tiny-imagenet"]
    greys = [bool((image == image[0]).all()) for image, _ in content["train"]]
    assert any(greys)
    assert not all(greys)


@pytest.fixture
def served(tmp_path):
    """A web server on this machine, with the test's folder."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_tiny_imagenet_downloads_and_unpacks_itself_once(tmp_path, served, monkeypatch):
    content, _ = fabricated.tiny_imagenet_archive(tmp_path, served, monkeypatch)
    for _ in range(2):
        data = common.load_images("tiny-imagenet", str(tmp_path / "data"), "test")
        assert_pictures(data, content["test"])
        (tmp_path / "tiny-imagenet-200.zip").unlink(missing_ok=True)  # the address is dead now
    names = {path.name for path in (tmp_path / "data").iterdir()}
    assert names == {"tiny-imagenet-200", "tiny-imagenet-200.zip"}


def test_tiny_imagenet_of_a_wrong_sum_is_refused(tmp_path, served, monkeypatch):
    fabricated.tiny_imagenet_archive(tmp_path, served, monkeypatch)
    monkeypatch.setattr(common, "TINY_IMAGENET_MD5", "0" * 32)
    with pytest.raises(common.UserError, match="tiny-imagenet-200.zip"):
        common.load_images("tiny-imagenet", str(tmp_path / "data"), "train")
    assert not (tmp_path / "data" / "tiny-imagenet-200").exists()


def test_tiny_imagenet_half_unpacked_is_not_the_whole(tmp_path, served, monkeypatch):
    content, _ = fabricated.tiny_imagenet_archive(tmp_path, served, monkeypatch)

    def killed(*_):
        fabricated.tiny_imagenet(tmp_path / "data" / "tiny-imagenet-200.part", train=1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common, "download_and_extract_archive", lambda *_, **__: killed())
        with pytest.raises(KeyboardInterrupt):
            common.load_images("tiny-imagenet", str(tmp_path / "data"), "train")
    data = common.load_images("tiny-imagenet", str(tmp_path / "data"), "train")
    assert_pictures(data, content["train"])


def test_pictures_in_ones_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    content, _ = fabricated.tiny_imagenet(tmp_path)
    assert_pictures(common.load_images("tiny-imagenet", "~", "train"), content["train"])
    content = fabricated.own_pictures(tmp_path / "own", {"cat": (2, 1), "dog": (2, 1)})
    assert_pictures(common.load_images("folder:~/own", "", "train"), content["train"])


def test_tiny_imagenet_without_its_table_says_what_to_do(tmp_path):
    fabricated.tiny_imagenet(tmp_path)
    (tmp_path / "tiny-imagenet-200" / "val" / "val_annotations.txt").unlink()
    with pytest.raises(common.UserError, match="not complete: remove it"):
        common.load_images("tiny-imagenet", str(tmp_path), "test")


def test_tiny_imagenets_address_and_sum_are_the_official_ones():
    assert common.TINY_IMAGENET.endswith("/tiny-imagenet-200.zip")
    assert common.TINY_IMAGENET_MD5 == "90528d7ca1a48142e341f4ef8d21d0de"


# ------------------------------------------------------------------------------ one's own folder


@pytest.mark.parametrize("test", ["val", "test"])
def test_own_pictures_are_read_picture_by_picture(test, tmp_path):
    content = fabricated.own_pictures(tmp_path, {"dog": (5, 2), "cat": (4, 3)}, 64, test)
    for split in ("pretrain", "train", "test"):
        data = common.load_images(f"folder:{tmp_path}", "unused", split)
        assert_pictures(data, content["test" if split == "test" else "train"])
        assert data.classes == ["cat", "dog"]
        assert (data.mean, data.std) == common.MEAN_STD["folder"]


@pytest.mark.parametrize("below", ["", "train"])
def test_a_flat_folder_has_no_labels(below, tmp_path):
    folder = tmp_path / below
    (folder / "more").mkdir(parents=True)
    for name in ("a.png", "b.jpg", "more/c.webp", "notes.txt"):
        Image.new("RGB", (70, 64), (200, 0, 0)).save(folder / name, "PNG")
    if below:  # a train/ without class folders
        (folder / "more" / "c.webp").rename(folder / "c.webp")
        (folder / "more").rmdir()
    data = common.load_images(f"folder:{tmp_path}", "unused", "pretrain")
    assert data.images.shape == (3, 3, 64, 64)
    assert data.labels is None
    args = argparse.Namespace(data="folder", data_dir=str(tmp_path), image_size=32)
    args.subset, args.holdout, args.contents = 2, 0, None
    pretrain, train, test = common.load_splits(args, torch.device("cpu"))
    assert pretrain.images.shape == (2, 3, 32, 32)
    assert train is test is None


@pytest.mark.parametrize("size", [(64, 64), (100, 80), (80, 333), (500, 375), (20, 31), (1, 40)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_pictures_are_resized_by_the_short_side_and_centre_cropped(size, kind, tmp_path):
    """As torchvision does with the whole picture; JPEG's fast decoding differs little."""
    noise = numpy.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=numpy.uint8)
    picture = Image.fromarray(noise).resize(size, Image.BICUBIC)
    picture.save(tmp_path / "x", kind)
    ours = transforms.pil_to_tensor(common.read_picture(tmp_path / "x", 64))
    theirs = transforms.resize(Image.open(tmp_path / "x"), [64])
    theirs = transforms.pil_to_tensor(transforms.center_crop(theirs, [64]))
    assert ours.shape == (3, 64, 64)
    difference = (ours.int() - theirs.int()).abs().float()
    assert difference.max() == 0 if kind == "PNG" else difference.mean() < 1.5


MODES = {
    "grey.png": ("L", 0),
    "two.png": ("1", 0),
    "palette.png": ("P", 60),
    "palette.gif": ("P", 60),
    "alpha.png": ("RGBA", 0),
    "grey-alpha.png": ("LA", 0),
    "cmyk.jpg": ("CMYK", 10),
    "cmyk.tif": ("CMYK", 0),
    "plain.webp": ("RGB", 30),
    "plain.bmp": ("RGB", 0),
    "PLAIN.PPM": ("RGB", 0),
}


@pytest.mark.parametrize("name", MODES)
def test_any_picture_that_pillow_opens(name, tmp_path):
    mode, tolerance = MODES[name]
    ramp = numpy.linspace(0, 255, 64).astype(numpy.uint8)
    colours = numpy.stack(numpy.broadcast_arrays(ramp, ramp[:, None], ramp[::-1]), 2)
    picture = Image.fromarray(colours).convert(mode)
    if (
        name == "palette.png"
    ):  # as many web pictures: an alpha for each colour, of which Pillow warns
        picture.info["transparency"] = bytes([0, 128]) + bytes([255]) * 254
    picture.save(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (image,) = common.load_images(f"folder:{tmp_path}", "", "train").images
    expected = colours if mode in ("RGB", "RGBA", "CMYK", "P") else picture.convert("RGB")
    difference = numpy.abs(image.numpy().transpose(1, 2, 0) - numpy.asarray(expected, dtype=float))
    assert difference.max() <= tolerance


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32"])
@pytest.mark.parametrize("top", [1.0, 4095.0, 65535.0])
def test_deep_grey_pictures_are_stretched_to_their_own_range(dtype, top, tmp_path):
    ramp = numpy.linspace(0, top, 64)[None].repeat(64, 0).astype(dtype)
    Image.fromarray(ramp).save(tmp_path / "deep.tif")
    (image,) = common.load_images(f"folder:{tmp_path}", "", "train").images
    expected = torch.from_numpy((ramp - ramp.min()) / (ramp.max() - ramp.min()) * 255).round()
    assert torch.equal(image.double(), expected.double().expand(3, -1, -1))


def test_pixels_that_are_no_numbers_become_grey(tmp_path):
    ramp = numpy.linspace(-1, 1, 64, dtype="float32")[None].repeat(64, 0)
    ramp[:4] = [[numpy.nan], [numpy.nan], [numpy.inf], [-numpy.inf]]
    Image.fromarray(ramp).save(tmp_path / "deep.tif")
    (image,) = common.load_images(f"folder:{tmp_path}", "", "train").images
    assert image[:, [0, 2, 3]].double().mean((0, 2)).tolist() == [128, 255, 0]
    expected = (127.5 * (1 + torch.from_numpy(ramp[4:]))).round()
    assert (image[:, 4:] - expected).abs().max() <= 1


def test_pictures_are_turned_as_the_camera_was_held(tmp_path):
    pixels = numpy.zeros((64, 64, 3), dtype=numpy.uint8)
    pixels[:32] = 255  # bright above
    picture = Image.fromarray(pixels)
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    picture.save(tmp_path / "x.jpg", exif=exif)
    (image,) = common.load_images(f"folder:{tmp_path}", "", "train").images
    assert image[:, :, 40:].float().mean() > 245  # bright on the right
    assert image[:, :, :24].float().mean() < 10


def test_broken_pictures_are_named_and_left_out(tmp_path, capsys):
    content = fabricated.own_pictures(tmp_path, {"cat": (4, 2), "dog": (3, 2)})
    (tmp_path / "train" / "cat" / "0001.png").write_bytes(b"no picture")
    path = tmp_path / "train" / "dog" / "0002.png"
    path.write_bytes(path.read_bytes()[:500])
    data = common.load_images(f"folder:{tmp_path}", "", "train")
    assert_pictures(data, [content["train"][i] for i in (0, 2, 3, 4, 5)])
    names = ["cat/0000.png", "cat/0002.png", "cat/0003.png", "dog/0000.png", "dog/0001.png"]
    assert data.names.tolist() == [str(tmp_path / "train" / name) for name in names]
    out = capsys.readouterr().out
    assert out.count("left out") == 2
    assert str(tmp_path / "train" / "cat" / "0001.png") in out
    assert str(path) in out
    for path in (tmp_path / "val").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(common.UserError, match="none of 4 pictures"):
        common.load_images(f"folder:{tmp_path}", "", "test")


@pytest.mark.parametrize("error", [PermissionError(13, "no right"), MemoryError()])
def test_what_is_not_the_pictures_fault_stops(error, tmp_path, monkeypatch):
    fabricated.own_pictures(tmp_path, {"cat": (2, 1)})

    def refuse(*_):
        raise error

    monkeypatch.setattr(common, "read_picture", refuse)
    with pytest.raises(type(error)):
        common.load_images(f"folder:{tmp_path}", "", "train")


def test_the_memory_that_a_set_takes_is_told_before_it_is_read(tmp_path, monkeypatch, capsys):
    fabricated.own_pictures(tmp_path, {"cat": (1000, 0)}, side=8)
    monkeypatch.setattr(common.concurrent.futures, "ThreadPoolExecutor", None)
    with pytest.raises(TypeError):
        common.load_images(f"folder:{tmp_path}", "", "train", 1000)
    assert "1,000 pictures: 3.00 GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ([], "no pictures in"),
        (["train/a/x.txt", "val/a/x.txt"], "no pictures in"),
        (["train/a/x.png"], "--holdout"),
        (["train/a/x.png", "val/x.png"], "no pictures in .*val"),
        (["train/a/x.png", "val/b/x.png"], "remove the class b from .*val"),
    ],
)
def test_folders_that_lack_something_say_what(made, says, tmp_path):
    for name in made:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(tmp_path / name, "PNG")
    with pytest.raises(common.UserError, match=says):
        common.load_images(f"folder:{tmp_path}", "", "test")


def test_hidden_folders_are_no_classes_and_hidden_files_no_pictures(tmp_path):
    fabricated.own_pictures(tmp_path, {"cat": (2, 1), ".ipynb_checkpoints": (1, 1)})
    for name in ("._0000.png", ".ipynb_checkpoints/x.png"):  # macOS's, Jupyter's
        path = tmp_path / "train" / "cat" / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64)).save(path)
    (tmp_path / "train" / "cat" / "folder.png").mkdir()
    for split, count in (("train", 2), ("test", 1)):
        data = common.load_images("folder", str(tmp_path), split)
        assert data.classes == ["cat"]
        assert data.labels.tolist() == [0] * count


def test_a_missing_test_set_is_told_before_pictures_are_read(tmp_path, monkeypatch):
    fabricated.own_pictures(tmp_path, {"cat": (2, 0)})
    (tmp_path / "val" / "cat").rmdir()
    (tmp_path / "val").rmdir()
    monkeypatch.setattr(common, "read_pictures", None)
    args = argparse.Namespace(data="folder", data_dir=str(tmp_path), image_size=64)
    args.subset, args.holdout = None, 0
    with pytest.raises(common.UserError, match="--holdout"):
        common.load_splits(args, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "split"),
    [("cifar11", "train"), ("cifar10:x", "test"), ("textures", "validation")],
)
def test_unknown_names_are_refused(name, split, tmp_path):
    with pytest.raises(common.UserError, match="choose .*train|choose .*cifar10"):
        common.load_images(name, str(tmp_path), split)


# ---------------------------------------------------------------------------------------- splits

TRAIN, TEST = 200, 30


@pytest.fixture
def splits(monkeypatch):
    """load_splits of a set whose labels number its images -> the numbers of its three sets."""

    def load(name, root, split, side):
        first, count = (1000, TEST) if split == "test" else (0, TRAIN)
        labels = torch.arange(first, first + count)
        images = (labels % 256).to(torch.uint8)[:, None, None, None].repeat(1, 3, 4, 4)
        return common.Images(images, labels, ["a"], (0.5,) * 3, (0.25,) * 3, labels.numpy())

    def numbers(subset=None, holdout=0):
        args = argparse.Namespace(data="fake", data_dir="", subset=subset, holdout=holdout)
        args.image_size, args.contents = 4, None
        sets = common.load_splits(args, torch.device("cpu"))
        for data in sets:  # images and labels stay together
            assert torch.equal(data.images[:, 0, 0, 0], (data.labels % 256).to(torch.uint8))
            assert data.images.shape[-1] == 4
            assert data.names.tolist() == data.labels.tolist()
        return [data.labels.tolist() for data in sets]

    monkeypatch.setattr(common, "load_images", load)
    return numbers


def test_without_options_everything_is_used(splits):
    pretrain, train, test = splits()
    assert sorted(pretrain) == sorted(train) == list(range(TRAIN))
    assert test == list(range(1000, 1000 + TEST))


def test_subset_is_the_start_of_one_shuffle(splits):
    pretrain, train, test = splits(subset=60)
    assert pretrain == train
    assert len(set(train)) == 60
    assert train != sorted(train)
    assert test == list(range(1000, 1000 + TEST))
    torch.manual_seed(5)  # whatever the run's seed is
    assert splits(subset=90)[1][:60] == train


def test_holdout_is_the_end_of_the_same_shuffle(splits):
    shuffle = splits(subset=TRAIN - 1, holdout=1)
    shuffle = shuffle[1] + shuffle[2]
    assert sorted(shuffle) == list(range(TRAIN))
    for subset in (None, 60):
        pretrain, train, test = splits(subset=subset, holdout=50)
        assert pretrain == train == shuffle[: subset or TRAIN - 50]  # never the test images
        assert test == shuffle[-50:]


@pytest.mark.parametrize(
    ("subset", "holdout"), [(TRAIN + 1, 0), (151, 50), (None, TRAIN), (None, TRAIN + 1)]
)
def test_too_large_splits_are_refused(splits, subset, holdout):
    with pytest.raises(common.UserError, match="--subset"):
        splits(subset, holdout)


def test_splits_that_just_fit(splits):
    assert len(splits(TRAIN)[1]) == TRAIN
    assert [len(part) for part in splits(150, 50)] == [150, 150, 50]


def test_training_and_labelled_images_are_one_copy_on_the_device():
    args = argparse.Namespace(data="textures", data_dir="", image_size=32, contents=None)
    args.subset, args.holdout = None, 500
    pretrain, train, _ = common.load_splits(args, torch.device("meta"))
    assert pretrain.images is train.images
