"""Reading data sets, and splitting them. No test here reaches the network."""

import argparse
import hashlib
import pickle
import shutil
import urllib.error

import numpy
import pytest
import torch
import torchvision

import common


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network in the tests")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", refuse)


# -------------------------------------------------------------------------------------- textures


@pytest.fixture(scope="module")
def textures():
    return {split: common.load_images("textures", "unused", split) for split in ("train", "test")}


@pytest.mark.parametrize(("split", "count"), [("train", 5120), ("test", 1000)])
def test_textures_are_balanced_uint8_images(textures, split, count):
    data = textures[split]
    assert len(data) == count
    assert data.side == 32
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

# The official archives' layout: file -> whether it is of the training split.
LAYOUT = {
    "cifar10": (
        "cifar-10-batches-py",
        {**{f"data_batch_{i}": True for i in range(1, 6)}, "test_batch": False},
        ("labels", "batches.meta", "label_names", 10),
    ),
    "cifar100": (
        "cifar-100-python",
        {"train": True, "test": False},
        ("fine_labels", "meta", "fine_label_names", 100),
    ),
}


def fabricate(name, root, monkeypatch):
    """Write small files in the official format, and tell torchvision their MD5 sums.

    -> {True: training, False: test: (rows (n, 3072) uint8, labels)}, class names.
    """
    folder, files, (label_key, meta_file, names_key, classes) = LAYOUT[name]
    dataset = getattr(torchvision.datasets, name.upper())
    assert folder == dataset.base_folder
    (root / folder).mkdir(parents=True)
    rng = numpy.random.default_rng(0)
    content = {True: ([], []), False: ([], [])}
    sums = {True: [], False: []}

    def write(file, entry):
        raw = pickle.dumps(entry, protocol=2)
        (root / folder / file).write_bytes(raw)
        return hashlib.md5(raw).hexdigest()

    for file, train in files.items():
        rows = rng.integers(0, 256, (7, 3072), dtype=numpy.uint8)
        labels = rng.integers(0, classes, 7).tolist()
        sums[train].append([file, write(file, {"data": rows, label_key: labels})])
        content[train][0].append(rows)
        content[train][1].extend(labels)
    names = [f"class {i}" for i in range(classes)]
    meta = {"filename": meta_file, "key": names_key, "md5": write(meta_file, {names_key: names})}
    monkeypatch.setattr(dataset, "train_list", sums[True])
    monkeypatch.setattr(dataset, "test_list", sums[False])
    monkeypatch.setattr(dataset, "meta", meta)
    return {k: (numpy.concatenate(rows), labels) for k, (rows, labels) in content.items()}, names


@pytest.mark.parametrize("name", LAYOUT)
def test_cifar_is_read_image_by_image(name, tmp_path, monkeypatch):
    content, names = fabricate(name, tmp_path, monkeypatch)
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


@pytest.mark.parametrize("name", LAYOUT)
def test_missing_files_are_downloaded(name, tmp_path, monkeypatch):
    content, _ = fabricate(name, tmp_path / "server", monkeypatch)

    def download(url, root, **checks):
        assert url == getattr(torchvision.datasets, name.upper()).url
        shutil.copytree(tmp_path / "server", root, dirs_exist_ok=True)

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", download)
    data = common.load_images(name, str(tmp_path / "data"), "train")
    assert data.labels.tolist() == content[True][1]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", LAYOUT)
def test_missing_files_name_the_folder(name, split, tmp_path):
    with pytest.raises(common.UserError) as caught:
        common.load_images(name, str(tmp_path / "nowhere"), split)
    assert str(tmp_path / "nowhere") in str(caught.value)
    assert getattr(torchvision.datasets, name.upper()).filename in str(caught.value)


@pytest.mark.parametrize("damage", ["cut short", "changed", "gone"])
@pytest.mark.parametrize("name", LAYOUT)
def test_damaged_files_are_refused(name, damage, tmp_path, monkeypatch):
    fabricate(name, tmp_path, monkeypatch)
    folder, files, _ = LAYOUT[name]
    path = tmp_path / folder / next(iter(files))
    raw = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(raw[:100] if damage == "cut short" else raw[:-50] + bytes(50))
    with pytest.raises(common.UserError) as caught:
        common.load_images(name, str(tmp_path), "train")
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(("name", "split"), [("cifar11", "train"), ("textures", "validation")])
def test_unknown_names_are_refused(name, split, tmp_path):
    with pytest.raises(common.UserError, match="choose .*train|choose .*cifar10"):
        common.load_images(name, str(tmp_path), split)


# ---------------------------------------------------------------------------------------- splits

TRAIN, TEST = 200, 30


@pytest.fixture
def splits(monkeypatch):
    """load_splits of a set whose labels number its images -> the numbers of its three sets."""

    def load(name, root, split):
        first, count = (1000, TEST) if split == "test" else (0, TRAIN)
        labels = torch.arange(first, first + count)
        images = (labels % 256).to(torch.uint8)[:, None, None, None].repeat(1, 3, 4, 4)
        return common.Images(images, labels, ["a"], (0.5,) * 3, (0.25,) * 3)

    def numbers(subset=None, holdout=0):
        args = argparse.Namespace(data="fake", data_dir="", subset=subset, holdout=holdout)
        sets = common.load_splits(args, torch.device("cpu"))
        for data in sets:  # images and labels stay together
            assert torch.equal(data.images[:, 0, 0, 0], (data.labels % 256).to(torch.uint8))
            assert data.side == 4
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
