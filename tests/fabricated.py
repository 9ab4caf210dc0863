"""Small data sets in the real sets' file layouts, with content that the tests know."""

import hashlib
import pathlib
import pickle
import zipfile

import numpy
import torchvision
from PIL import Image

import common

# ----------------------------------------------------------------------------------------- CIFAR

# The official archives' layout: file -> whether it is of the training split.
CIFAR = {
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


def cifar(name, root, monkeypatch, count=7):
    """Write small files in the official format, and tell torchvision their MD5 sums.

    -> {True: training, False: test: (rows (n, 3072) uint8, labels)}, class names.
    """
    folder, files, (label_key, meta_file, names_key, classes) = CIFAR[name]
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
        rows = rng.integers(0, 256, (count, 3072), dtype=numpy.uint8)
        labels = rng.integers(0, classes, count).tolist()
        sums[train].append([file, write(file, {"data": rows, label_key: labels})])
        content[train][0].append(rows)
        content[train][1].extend(labels)
    names = [f"class {i}" for i in range(classes)]
    meta = {"filename": meta_file, "key": names_key, "md5": write(meta_file, {names_key: names})}
    monkeypatch.setattr(dataset, "train_list", sums[True])
    monkeypatch.setattr(dataset, "test_list", sums[False])
    monkeypatch.setattr(dataset, "meta", meta)
    return {k: (numpy.concatenate(rows), labels) for k, (rows, labels) in content.items()}, names


# ---------------------------------------------------------------------------------------- STL-10


def stl10(root, monkeypatch, train=11, test=7, unlabelled=23):
    """Write STL-10's binaries: images column by column, labels from 1.

    -> {"train", "test", "unlabeled": (images (n, 3, 96, 96) uint8, labels from 0 or None)}.
    """
    dataset, rng, content = torchvision.datasets.STL10, numpy.random.default_rng(0), {}
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    lists = {"train": [], "test": [], "unlabeled": []}
    names = [f"kind {i}" for i in range(10)]
    (folder / dataset.class_names_file).write_text("\n".join(names))
    for part, count in (("train", train), ("test", test), ("unlabeled", unlabelled)):
        images = rng.integers(0, 256, (count, 3, 96, 96), dtype=numpy.uint8)
        labels = None if part == "unlabeled" else rng.integers(0, 10, count).astype(numpy.uint8)
        content[part] = images, labels
        files = {f"{part}_X.bin": images.transpose(0, 1, 3, 2).tobytes()}
        if labels is not None:
            files[f"{part}_y.bin"] = (labels + 1).astype(numpy.uint8).tobytes()
        for file, raw in files.items():
            (folder / file).write_bytes(raw)
            lists[part].append([file, hashlib.md5(raw).hexdigest()])
    monkeypatch.setattr(dataset, "train_list", lists["train"] + lists["unlabeled"])
    monkeypatch.setattr(dataset, "test_list", lists["test"])
    return content, names


# --------------------------------------------------------------------------------- Tiny ImageNet


def blocks(rng, side, grey=False):
    """A picture of 8 x 8 blocks of one colour each, which JPEG keeps nearly as it is."""
    colours = rng.integers(0, 256, (side // 8, side // 8, 1 if grey else 3), dtype=numpy.uint8)
    picture = colours.repeat(8, 0).repeat(8, 1)
    return Image.fromarray(picture[..., 0] if grey else picture)


def save_jpeg(picture, path):
    """-> what a reader of the file should see, (3, H, W) uint8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, "JPEG", quality=95, subsampling=0)
    return numpy.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)


def tiny_imagenet(root, classes=4, train=3, val=9):
    """Write the tree of the archive, every fifth picture grey.

    -> {"train", "test": [(picture (3, 64, 64), label)]}, class names.
    """
    folder, rng = root / "tiny-imagenet-200", numpy.random.default_rng(0)
    wnids = sorted(f"n{number:08d}" for number in rng.choice(10**8, classes, replace=False))
    content, lines = {"train": [], "test": []}, []
    for label, wnid in enumerate(wnids):
        for i in range(train):
            picture = blocks(rng, 64, grey=len(content["train"]) % 5 == 0)
            path = folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG"
            content["train"].append((save_jpeg(picture, path), label))
        boxes = "".join(f"{wnid}_{i}.JPEG\t0\t10\t63\t63\n" for i in range(train))
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(boxes)
    for i in range(val):
        label = int(rng.integers(classes))
        path = folder / "val" / "images" / f"val_{i}.JPEG"
        content["test"].append((save_jpeg(blocks(rng, 64, grey=i % 5 == 0), path), label))
        lines.append(f"val_{i}.JPEG\t{wnids[label]}\t0\t32\t44\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("\n".join(wnids))
    (folder / "test" / "images").mkdir(parents=True)  # the official test set has no labels
    save_jpeg(blocks(rng, 64), folder / "test" / "images" / "test_0.JPEG")
    return content, wnids


def tiny_imagenet_archive(root, address, monkeypatch, **counts):
    """The same in an archive in `root`, which is served at `address`; its MD5 sum is expected."""
    content, wnids = tiny_imagenet(root / "made", **counts)
    archive = root / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((root / "made").rglob("*")):
            file.write(path, path.relative_to(root / "made"))
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(common, "TINY_IMAGENET", f"{address}/{archive.name}")
    monkeypatch.setattr(common, "TINY_IMAGENET_MD5", md5)
    return content, wnids


# ------------------------------------------------------------------------------ one's own folder


def own_pictures(root, counts, side=64, test="val"):
    """Write PNG files in train/CLASS/ and val/CLASS/; counts: {class: (train, test)}.

    -> {"train", "test": [(picture (3, side, side), label)]}, in the order of the file names.
    """
    rng, content = numpy.random.default_rng(0), {"train": [], "test": []}
    for label, (name, both) in enumerate(sorted(counts.items())):
        for split, part, count in zip(("train", "test"), ("train", test), both, strict=True):
            folder = pathlib.Path(root) / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                picture = rng.integers(0, 256, (side, side, 3), dtype=numpy.uint8)
                Image.fromarray(picture).save(folder / f"{i:04d}.png")
                content[split].append((picture.transpose(2, 0, 1), label))
    return content
