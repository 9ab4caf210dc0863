"""What the four scripts share: data, image operations, encoders, kNN, run folders.

You can read a method without reading this file. It holds nothing that belongs to one method.

All images of a data set lie in memory as bytes, on the GPU if there is one.
So a batch is a row of image numbers, and there are no worker processes.
A random transform works on a whole batch, and each image gets its own random numbers.
They are drawn on the CPU, from one generator, and applied on the device.
So a seed gives the same views on every device.

Sections: errors, data sets, own pictures, textures, splits, augmentation, encoders,
devices, features and kNN, command line, run folder, evaluation, pictures.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import copy
import functools
import io
import itertools
import json
import math
import os
import pathlib
import pickle
import shlex
import subprocess
import sys
import textwrap
import time
import unicodedata
import zipfile
import zlib
from dataclasses import dataclass, replace

import numpy
import torch
import torchvision
import tqdm
from PIL import Image, ImageOps
from torch import nn
from torch.nn import functional as F
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms.v2 import functional as transforms

# ---------------------------------------------------------------------------------------- errors

if sys.version_info < (3, 10):
    sys.exit("error: needs Python 3.10 or newer, from python.org")
if not hasattr(Image.Image, "has_transparency_data"):
    sys.exit("error: needs Pillow 10.1 or newer: python -m pip install --upgrade pillow")


class UserError(Exception):
    """A mistake that the user can mend. The message is one line and says how."""


def command(main):
    """Decorate main(argv): a UserError becomes one line and exit code 2.

    So does an OSError: a full disk, a missing right. Other errors keep their traceback.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        if hasattr(sys.stdout, "reconfigure"):  # a console may lack letters of a file's name
            sys.stdout.reconfigure(errors="backslashreplace")
        code = 2
        try:
            return main(argv)
        except UserError as error:
            message = f"error: {error}"
        except OSError as error:
            message = f"error: {error}: check the path, your rights and the disk"
        except (MemoryError, torch.cuda.OutOfMemoryError):
            message = "error: out of memory: lower --batch-size or --image-size"
        except KeyboardInterrupt:
            code = 130
            message = "stopped: a training run goes on with --resume and its folder"
        print(" ".join(message.split()), file=sys.stderr)
        sys.exit(code)

    return wrapped


# ------------------------------------------------------------------------------------- data sets

# Mean and standard deviation of each channel. CIFAR and ImageNet: the authors' code [code].
# A folder gets ImageNet's [ours]. The textures are measured.
# CIFAR-10's std is the mean over the images of each image's own std.
MEAN_STD = {
    "textures": ((0.502, 0.502, 0.502), (0.279, 0.279, 0.279)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "stl10": ((0.4408, 0.4279, 0.3867), (0.2682, 0.2610, 0.2686)),
    "tiny-imagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "folder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
TINY_IMAGENET = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
OFFLINE = "try again with a network connection, or put this there yourself"


@dataclass
class Images:
    """A data set in memory."""

    images: torch.Tensor  # (N, 3, S, S) uint8
    labels: torch.Tensor  # (N,) int64, or None
    classes: list  # class names
    mean: tuple  # of each channel, for images in [0, 1]
    std: tuple
    names: numpy.ndarray = None  # (N,) the file of each image, or its number; or None

    def __len__(self):
        return len(self.images)

    def take(self, index):
        """A data set of the images at `index`, a tensor of image numbers."""
        labels = None if self.labels is None else self.labels[index]
        names = None if self.names is None else self.names[index.numpy()]
        return replace(self, images=self.images[index], labels=labels, names=names)

    def to(self, device):
        """The same data set on another device."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, images=self.images.to(device), labels=labels)


def load_images(name, root, split, side=64):
    """Read one split of a data set -> Images on the CPU.

    name: a key of MEAN_STD, or "folder:PATH".
    root: the folder of the files. CIFAR, STL-10 and Tiny ImageNet are downloaded to it.
    split: "pretrain", "train" or "test". "pretrain" is "train", except for STL-10: there
        the unlabelled images follow.
    side: the pictures of a folder become side x side pixels.
    Raises UserError: an unknown name or split, missing or broken files.
    """
    kind, _, path = name.partition(":")
    if kind not in MEAN_STD or (path and kind != "folder") or name.endswith(":"):
        names = f"folder:{name}" if os.path.isdir(name) else f"{', '.join(MEAN_STD)}:PATH"
        raise UserError(f"unknown data set {name!r}: choose {names}")
    if split not in ("pretrain", "train", "test"):
        raise UserError(f"unknown split {split!r}: choose pretrain, train or test")
    root = pathlib.Path(os.path.expanduser(path or root or ""))
    if kind == "textures":
        images = render_textures(1000, 1) if split == "test" else render_textures(5120, 0)
    elif kind == "folder":
        images = read_pictures(*list_folder(root, split), side)
    elif kind == "tiny-imagenet":
        images = read_pictures(*list_tiny_imagenet(root, split), 64)
    else:
        images = read_arrays(kind, root, split)
    images.mean, images.std = MEAN_STD[kind]
    return images


def read_arrays(name, root, split):
    """Read CIFAR-10, CIFAR-100 or STL-10 with torchvision -> Images."""
    dataset = getattr(torchvision.datasets, name.upper())
    options = {"train": split != "test"}
    if name == "stl10":
        options = {"split": "train+unlabeled" if split == "pretrain" else split}
    try:
        data = dataset(root, download=True, **options)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        place = f"cannot read or download {name} in {root}"
        raise UserError(f"{place}: {OFFLINE}: {dataset.url} ({error})") from None
    images = torch.from_numpy(data.data)
    labels = data.labels if name == "stl10" else data.targets
    if name != "stl10":
        images = images.permute(0, 3, 1, 2)
    labels = torch.as_tensor(labels, dtype=torch.int64)
    if split == "pretrain" and name == "stl10":
        labels = None
    names = numpy.arange(len(images))
    return Images(images.contiguous(), labels, data.classes, None, None, names)


# ---------------------------------------------------------------------------------- own pictures


def find_files(folder):
    """All files in a folder and below it, sorted, without hidden ones.

    An entry of the folder may be a link to another folder. Links further down are not followed.
    Raises OSError: a folder cannot be read.
    """
    files = []
    for top in folder.iterdir():
        for file in (top, *top.rglob("*")):
            if any(name.startswith(".") for name in file.relative_to(folder).parts):
                continue
            if file.is_dir():
                os.listdir(file)  # complains, where rglob passes over an unreadable folder
            elif file.is_file():
                files.append(file)
    return sorted(files)


def is_picture(file):
    """Does the file have an ending that Pillow can open?"""
    kind = Image.registered_extensions().get(file.suffix.lower())
    return kind in Image.OPEN or kind == "MPO"  # which Pillow opens as JPEG


def class_of(file, part):
    """The folder of `part` that the file is in. Its own name: it is in none."""
    return unicodedata.normalize("NFC", file.relative_to(part).parts[0])  # macOS has NFD


def list_folder(folder, split):
    """Find pictures in train/CLASS/ and val/CLASS/ or test/CLASS/ -> files, labels, classes.

    Without classes in train/ the pictures of train/ have no labels: labels is None.
    Without train/ all pictures of the folder are taken, without labels.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: check the path")
    part = folder
    classes = []
    if (folder / "train").is_dir():
        part = folder / "train"
        inside = [file for file in find_files(part) if file.parent != part and is_picture(file)]
        classes = sorted({class_of(file, part) for file in inside})
    if classes and split == "test":
        part = folder / "val"
        if not part.is_dir():
            part = folder / "test"
        if not part.is_dir():
            raise UserError(f"no val or test in {folder}: make val/CLASS/, or use --holdout N")
    files = []
    labels = []
    passed_over = collections.Counter()
    for file in find_files(part):
        name = class_of(file, part)
        if not is_picture(file):
            passed_over[file.suffix.lower()] += 1
        elif not classes:
            files.append(file)
        elif file.parent == part:
            passed_over["without a class"] += 1
        elif name not in classes:
            raise UserError(f"remove the class {name} from {part}: train/ does not have it")
        else:
            files.append(file)
            labels.append(classes.index(name))
    over = ", ".join(f"{count} {ending}" for ending, count in sorted(passed_over.items()))
    print(f"{part}: {len(files):,} pictures; passed over: {over or 'nothing'}")
    if not files:
        place = part / "CLASS" if classes else part
        raise UserError(f"no pictures in {place}: put some there")
    return files, labels if classes else None, classes


def list_tiny_imagenet(root, split):
    """Find Tiny ImageNet's pictures, and download them if need be -> files, labels, classes."""
    folder = root / "tiny-imagenet-200"
    if not folder.is_dir():
        unpacked = root / "tiny-imagenet-200.part"  # renamed when it is complete
        try:
            download_and_extract_archive(TINY_IMAGENET, root, unpacked, md5=TINY_IMAGENET_MD5)
        except (OSError, RuntimeError, zipfile.BadZipFile) as error:
            place = f"cannot download {TINY_IMAGENET} to {root}"
            raise UserError(f"{place}: {OFFLINE} ({error})") from None
        (unpacked / folder.name).rename(folder)
        unpacked.rmdir()
    files, labels, classes = list_folder(folder, "train")
    if split == "test":  # all pictures are in one folder; a table has their classes
        table = folder / "val" / "val_annotations.txt"
        if not table.is_file():
            raise UserError(f"{folder} is not complete: remove it, and start again")
        files = []
        labels = []
        for line in table.read_text().splitlines():
            file, name = line.split("\t")[:2]
            files.append(folder / "val" / "images" / file)
            labels.append(classes.index(name))
    return files, labels, classes


def read_pictures(files, labels, classes, side):
    """Read picture files on all cores -> Images. Broken files are named and left out."""
    print(f"reading {len(files):,} pictures: {3e-9 * len(files) * side**2:.2f} GB of memory")

    def read(file):
        try:
            return transforms.pil_to_tensor(read_picture(file, side))
        except Exception as error:  # Pillow raises many kinds for a broken picture
            if isinstance(error, MemoryError) or getattr(error, "errno", None):
                raise  # not the picture's fault: memory, rights, the disk
            print(f"left out, because it cannot be read: {file} ({error})")
            return None

    images = torch.from_numpy(numpy.empty((len(files), 3, side, side), "uint8"))
    kept = []
    with concurrent.futures.ThreadPoolExecutor() as pool:
        pictures = tqdm.tqdm(pool.map(read, files), "reading", len(files), disable=None)
        for number, picture in enumerate(pictures):
            if picture is not None:
                images[len(kept)] = picture
                kept.append(number)
    if not kept:
        raise UserError(f"none of {len(files)} pictures can be read: see above")
    names = numpy.array([str(files[number]) for number in kept])
    if labels is not None:
        labels = torch.tensor(labels)[kept]
    return Images(images[: len(kept)], labels, classes, None, None, names)


def read_picture(file, side):
    """A picture file of any kind and size -> PIL image, RGB: short side resized, centre cropped."""
    with Image.open(file) as picture:
        picture.draft("RGB", (side, side))  # lets a large JPEG be decoded faster
        picture = ImageOps.exif_transpose(picture)  # as the camera was held
        if picture.mode.startswith(("I", "F")):  # more than 8 bits: the range becomes 0 to 255
            values = numpy.asarray(picture, "float32")
            measured = values[numpy.isfinite(values)]
            low = measured.min(initial=numpy.inf)  # inf: nothing is measured
            high = measured.max(initial=-numpy.inf)
            values = numpy.nan_to_num((values - low) / max(high - low, 1e-9), nan=0.5)
            picture = Image.fromarray((255 * values.clip(0, 1)).round().astype("uint8"))
        if picture.has_transparency_data:  # on mid-grey, where black and white shapes both show
            grey = Image.new("RGBA", picture.size, (128, 128, 128))
            picture = Image.alpha_composite(grey, picture.convert("RGBA"))
        picture = transforms.resize(picture.convert("RGB"), [side])
        return transforms.center_crop(picture, [side])


# -------------------------------------------------------------------------------------- textures


def wave(t):
    """A sine of period 1, from -1 to 1, with steep flanks."""
    return torch.tanh(4 * torch.sin(2 * math.pi * t))


def render_textures(count, seed, side=32):
    """Draw `count` grey textures of ten kinds -> Images. A seed always gives the same ones.

    Each has its own angle, frequency, phase, centre, brightness, contrast and noise.
    They are grey because colour alone would tell images apart.
    """
    generator = torch.Generator().manual_seed(seed)

    def between(low, high):
        return torch.rand(count, 1, 1, generator=generator) * (high - low) + low

    labels = torch.randperm(count, generator=generator) % 10
    axis = (torch.arange(side) + 0.5) / side - 0.5
    x = axis[None, :]
    y = axis[:, None]
    angle = between(0, 2 * math.pi)
    frequency = between(1.5, 3.5)  # periods per image
    u = (x * angle.cos() + y * angle.sin()) * frequency + between(0, 1)
    v = (y * angle.cos() - x * angle.sin()) * frequency + between(0, 1)
    dx = x - between(-0.3, 0.3)  # from the centre of rings and spokes
    dy = y - between(-0.3, 0.3)
    radius = dx.hypot(dy) * frequency + between(0, 1)
    turn = (torch.atan2(dy, dx) + angle) / (2 * math.pi)
    kinds = {
        "stripes": wave(u),
        "checks": wave(u) * wave(v),
        "dots": torch.tanh(4 * (torch.sin(6.283 * u) + torch.sin(6.283 * v) - 0.8)),
        "rings": wave(radius),
        "zigzag": wave(u + 1.5 * (v % 1 - 0.5).abs()),
        "bricks": torch.tanh(6 * torch.minimum(v % 1, (u + v.floor()) % 2) - 1.2),
        "plaid": (wave(u) + wave(v)) / 2,
        "waves": wave(u + 0.35 * torch.sin(4 * v)),
        "spokes": wave(6 * turn),
        "marble": wave(u / 2 + 0.6 * torch.sin(2 * v + 2 * torch.sin(3 * u))),
    }
    pattern = torch.stack(list(kinds.values()))[labels, torch.arange(count)]
    contrast = between(0.25, 0.35) * between(-1, 1).sign()  # dark on light, or light on dark
    grey = 0.5 + between(-0.15, 0.15) + contrast * pattern
    noise = torch.randn(count, 3, side, side, generator=generator) * between(0.02, 0.06)[:, None]
    images = (grey[:, None] + noise).clamp(0, 1)
    images = (images * 255).round().to(torch.uint8)
    return Images(images, labels, list(kinds), *MEAN_STD["textures"], numpy.arange(count))


# ---------------------------------------------------------------------------------------- splits


def shuffled(count):
    """The numbers below `count` in an order that is the same for every run."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def load_splits(args, device, pretrain=True):
    """-> three Images on `device`: to train on, the labelled ones of these, to test on.

    --subset N keeps the first N of the shuffled training images.
    --holdout N tests on the last N of them instead of the test set.
    pretrain: an evaluation does not need STL-10's unlabelled images. It says False.
    Without labels the last two are None.
    """
    source = {"name": args.data, "root": args.data_dir, "side": args.image_size}
    if args.data == "folder" and not args.holdout:
        list_folder(pathlib.Path(args.data_dir), "test")  # complains before all are read
    train = load_images(split="train", **source)
    order = torch.arange(len(train))
    if args.subset or args.holdout:
        order = shuffled(len(train))
    kept = len(train) - args.holdout
    unlabelled = 100_000 if args.data == "stl10" else 0
    if kept < 1 or (args.subset or 1) > kept + unlabelled:
        raise UserError(f"--subset and --holdout do not fit {len(train)} images: lower them")
    data = labelled = train.take(order[:kept][: args.subset]).to(device)
    if args.data == "stl10" and pretrain:
        data = load_images(split="pretrain", **source)
        both = torch.cat([order[:kept], torch.arange(len(train), len(data))])
        if args.subset or args.holdout:
            both = both[shuffled(len(both))]
        data = data.take(both[: args.subset]).to(device)
    if train.labels is None:
        print("no train/CLASS/, so no labels: no kNN and no linear probe")
        check_contents(args, [train])
        return data, None, None
    test = train.take(order[kept:]) if args.holdout else load_images(split="test", **source)
    check_contents(args, [train, test])
    return data, labelled, test.to(device)


def check_contents(args, sets):
    """Keep in args.contents what was read: the number of images, a sum of classes and file names.

    Raises UserError: args.contents is a run's, and this is something else.
    """
    text = ""
    for images in sets:
        labels = None if images.labels is None else images.labels.tolist()
        files = [os.path.basename(str(name)) for name in images.names]
        text += repr((images.classes, labels, files))
    contents = f"{len(sets[0])} images, sum {zlib.crc32(text.encode()):08x}"
    if args.contents not in (None, contents):
        changed = f"the files changed since the run: then {args.contents}, now {contents}"
        raise UserError(f"{changed}: put them back, or evaluate these with --data-dir")
    args.contents = contents


# ---------------------------------------------------------------------------------- augmentation
# Each random_... below draws numbers for every image on the CPU, and applies them.
# Each adjust_... and the like takes the numbers. Tests hold those against torchvision's.


def uniform(shape, low, high, generator=None):
    """Random numbers from `low` to `high`, on the CPU, in float64."""
    return torch.rand(shape, dtype=torch.float64, generator=generator) * (high - low) + low


def per_image(numbers, images):
    """Numbers (N,) -> (N, 1, 1, 1), in the images' type and on their device."""
    return numbers.to(images, non_blocking=True).view(-1, 1, 1, 1)


def choose(images, p, generator=None):
    """Choose each image with probability p -> (N, 1, 1, 1) bool, on the images' device."""
    chosen = uniform(len(images), 0, 1, generator) < p
    return chosen.to(images.device, non_blocking=True).view(-1, 1, 1, 1)


def random_crop(images, size, scale, ratio=(3 / 4, 4 / 3), generator=None):
    """As torchvision's RandomResizedCrop: images (N, 3, S, S) -> (N, 3, size, size).

    scale: lowest and highest area, as a share of the image. ratio: of width to height.
    """
    boxes = draw_boxes(len(images), images.shape[-1], scale, ratio, generator)
    return resized_crop(images, *boxes, size)


def random_flip(images, p, generator=None):
    """As torchvision's RandomHorizontalFlip."""
    return torch.where(choose(images, p, generator), images.flip(-1), images)


def random_color_jitter(images, p, brightness, contrast, saturation, hue, generator=None):
    """As torchvision's ColorJitter, each image with probability p.

    The order of the four operations is drawn once for the batch; in torchvision once an image.
    """
    operations = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    factors = [
        uniform(len(images), 1 - brightness, 1 + brightness, generator),
        uniform(len(images), 1 - contrast, 1 + contrast, generator),
        uniform(len(images), 1 - saturation, 1 + saturation, generator),
        uniform(len(images), -hue, hue, generator),
    ]
    factors = torch.stack(factors).to(images, non_blocking=True)
    chosen = choose(images, p, generator)
    jittered = images
    for i in torch.randperm(4, generator=generator).tolist():
        jittered = operations[i](jittered, factors[i])
    return torch.where(chosen, jittered, images)


def random_grey(images, p, generator=None):
    """As torchvision's RandomGrayscale."""
    return torch.where(choose(images, p, generator), rgb_to_grey(images), images)


def random_blur(images, p, sigma, kernel_size, generator=None):
    """As torchvision's GaussianBlur, each image with probability p.

    sigma: lowest and highest, in pixels. Only the chosen images are blurred, because it is slow.
    """
    chosen = uniform(len(images), 0, 1, generator) < p
    numbers = chosen.nonzero()[:, 0].to(images.device, non_blocking=True)
    sigma = uniform(chosen.sum(), *sigma, generator)
    blurred = gaussian_blur(images[numbers], sigma, kernel_size)
    return images.index_copy(0, numbers, blurred)


def draw_boxes(count, side, scale, ratio=(3 / 4, 4 / 3), generator=None):
    """A box for each image, as RandomResizedCrop draws it -> (4, count).

    Rows: top, left, height, width, in whole pixels.
    The area is uniform in `scale`. The aspect ratio is log-uniform in `ratio`.
    Each image has ten tries. If none fits into the image, the box is the whole image.
    """
    area = uniform((10, count), *scale, generator) * side**2
    aspect = uniform((10, count), math.log(ratio[0]), math.log(ratio[1]), generator).exp()
    height = (area / aspect).sqrt().round()
    width = (area * aspect).sqrt().round()
    fits = (torch.minimum(height, width) >= 1) & (torch.maximum(height, width) <= side)
    height[~fits] = side
    width[~fits] = side
    first = fits.int().argmax(dim=0)  # the first try that fits, or try 0
    images = torch.arange(count)
    height = height[first, images]
    width = width[first, images]
    where = uniform((2, count), 0, 1, generator)
    top = (where[0] * (side - height + 1)).floor()
    left = (where[1] * (side - width + 1)).floor()
    return torch.stack([top, left, height, width])


def resized_crop(images, top, left, height, width, size):
    """Cut out each image's box and resize it: (N, 3, H, W) -> (N, 3, size, size).

    top, left, height, width: (N,), whole pixels.
    Equals torchvision's resized_crop (bilinear, antialias).
    Resizing is linear, first along rows, then along columns. So two matrices an image do it.
    """
    boxes = torch.stack([top, left, height, width]).to(images, non_blocking=True)
    start, length = boxes.view(2, 2, -1, 1, 1)  # of rows and columns
    rows, columns = images.shape[2:]
    weights = resize_weights(start, length, max(rows, columns), size)
    return separable(images, weights[0, ..., :rows], weights[1, ..., :columns])


def resize_weights(start, length, inputs, outputs):
    """Weights (..., outputs, inputs) that resize the pixels from start to start + length.

    Row i holds how much every input pixel counts in output pixel i.
    It is a triangle around that output pixel, and a wider one when shrinking (antialias).
    start, length: (..., 1, 1)
    """
    scale = length / outputs  # input pixels per output pixel
    pixel = torch.arange(0.5, inputs, device=start.device, dtype=start.dtype) - start
    centre = torch.arange(0.5, outputs, device=start.device, dtype=start.dtype)[:, None]
    distance = (pixel - scale * centre).abs() / scale.clamp(min=1)
    weights = (1 - distance).clamp(min=0)
    weights = weights * (pixel > 0) * (pixel < length)
    return weights / weights.sum(dim=-1, keepdim=True)


def separable(images, rows, columns):
    """rows (N, h, H) @ images (N, 3, H, W) @ columns (N, w, W) transposed -> (N, 3, h, w)."""
    return torch.einsum("ncij,nwj,nhi->nchw", images, columns, rows)


def rgb_to_grey(images):
    """Images (N, 3, H, W) -> luminance (N, 1, H, W), with torchvision's weights."""
    red, green, blue = images.split(1, dim=1)
    grey = torch.add(0.2989 * red, green, alpha=0.587)  # adds 0.587 * green in one operation
    return torch.add(grey, blue, alpha=0.114)


def adjust_brightness(images, factor):
    """Pixel times factor (N,), clamped. Images float (N, 3, H, W) in [0, 1]."""
    return (images * per_image(factor, images)).clamp(0, 1)


def adjust_contrast(images, factor):
    """mean + factor (N,) * (pixel - mean), clamped. The mean is the image's luminance."""
    mean = rgb_to_grey(images.mean(dim=(2, 3), keepdim=True))
    return torch.lerp(mean, images, per_image(factor, images)).clamp(0, 1)


def adjust_saturation(images, factor):
    """grey + factor (N,) * (pixel - grey), clamped. Grey is the pixel's luminance."""
    return torch.lerp(rgb_to_grey(images), images, per_image(factor, images)).clamp(0, 1)


def adjust_hue(images, factor):
    """Turn the hue by factor (N,) turns, from -0.5 to 0.5. Value and saturation stay.

    A full turn of the hue counts 6 here: red is at 0, green at 2, blue at 4.
    A channel is high up to 1 from its own hue, and low from 2 on.
    """
    red, green, blue = images.split(1, dim=1)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = torch.maximum(torch.maximum(red, green), blue) - low
    # From 0 at red to 3 at cyan. On blue's side it is negative. A grey pixel has chroma 0.
    hue = 1 + (green + blue - red - low) / chroma.clamp(min=1e-6)
    hue = hue.copysign(green - blue) + 6 * per_image(factor, images)
    opposite = per_image(torch.tensor([3, 5, 1]), images).view(1, 3, 1, 1)  # of each channel's hue
    distance = ((hue - opposite) % 6 - 3).abs()  # from the channel's own hue
    return torch.addcmul(low, chroma, (2 - distance).clamp(0, 1))


def gaussian_blur(images, sigma, kernel_size=13):
    """Blur each image by its own sigma (N,), in pixels. Equals torchvision's gaussian_blur."""
    radius = kernel_size // 2
    shift = torch.arange(-radius, radius + 1, device=sigma.device)
    kernel = torch.softmax(-0.5 * (shift / sigma[:, None]) ** 2, dim=1)  # (N, taps)
    kernel = kernel.to(images, non_blocking=True)
    # taps[i, o, t] is 1 where output pixel o reads input pixel i with tap t of the kernel.
    pixels = torch.eye(images.shape[-1], device=images.device, dtype=images.dtype)
    padded = F.pad(pixels[None], (radius, radius), mode="reflect")[0]
    taps = padded.unfold(1, kernel_size, 1)
    weights = torch.einsum("iot,nt->noi", taps, kernel)
    return separable(images, weights, weights)


# -------------------------------------------------------------------------------------- encoders

# Name: number of features D
ARCHITECTURES = {
    "conv4": 256,
    "resnet18": 512,
    "resnet34": 512,
    "resnet50": 2048,
    "mobilenet_v2": 1280,
    "mobilenet_v3_large": 960,
    "efficientnet_b0": 1280,
    "shufflenet_v2_x1_0": 1024,
}
STEMS = {"imagenet": 0, "medium": 1, "small": 2}  # how many layers keep the map's size


def conv4():
    """A small encoder for laptops, 0.39 M parameters [ours]: (N, 3, S, S) -> (N, 256).

    Four convolutions, each halves the map. BatchNorm comes after the pooling, which is cheaper.
    """
    layers = [nn.Conv2d(3, 32, 4, stride=2, padding=1, bias=False)]
    layers += [nn.BatchNorm2d(32), nn.ReLU(inplace=True)]
    for channels in (32, 64, 128):
        layers += [
            nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False),
            nn.MaxPool2d(2, ceil_mode=True),  # ceil: a crop of 14 pixels passes too
            nn.BatchNorm2d(2 * channels),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def build_encoder(arch, stem):
    """An encoder with random weights: images (N, 3, S, S) -> pooled features (N, D); .dim is D.

    arch: conv4, or one of torchvision's networks without its classifier. Names of parameters stay.
    stem: torchvision's networks halve the map five times. "imagenet" leaves that.
        "medium" skips the first time, "small" the first two.
    """
    if arch == "conv4":
        encoder = conv4()
    else:
        encoder = getattr(torchvision.models, arch)()
        head = "fc" if hasattr(encoder, "fc") else "classifier"
        setattr(encoder, head, nn.Identity())
        swap_stem(encoder, stem)
    encoder.dim = ARCHITECTURES[arch]
    for module in encoder.modules():  # as for training from scratch [ours]
        if isinstance(module, torchvision.ops.StochasticDepth):
            module.p = 0.0
        elif isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return encoder


def swap_stem(encoder, stem):
    """Let the first layers that halve the map keep its size.

    A ResNet's first convolution becomes 3x3 [code]. The other networks follow [ours].
    """
    halving = []
    for name, layer in encoder.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.MaxPool2d)) and layer.stride in (2, (2, 2)):
            halving.append((name, layer))
    for name, layer in halving[: STEMS[stem]]:
        if isinstance(layer, nn.MaxPool2d):
            setattr(encoder, name, nn.Identity())
        elif layer.kernel_size == (7, 7):
            encoder.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        else:
            layer.stride = (1, 1)


def load_encoder(checkpoint, branch="student"):
    """The encoder of a run, frozen, in eval mode, on the CPU.

    checkpoint: a run folder or its checkpoint.pt.
    branch: "student", "teacher", or "untrained": the random weights that both began with.
    Its input is normalised by the run's own mean and std.
    Raises UserError: it cannot be read, or is not finite.
    """
    saved = read_checkpoint(checkpoint)
    arguments = saved["arguments"]
    with torch.random.fork_rng([]):
        torch.manual_seed(arguments["seed"])
        encoder = build_encoder(arguments["arch"], saved["stem"])
    state = saved.get(f"{branch}_encoder")
    if state:  # runs of before have no untrained one: their seed gives it
        load_weights(encoder, state)
    if not all(value.isfinite().all() for value in encoder.state_dict().values()):
        raise UserError(f"the {branch} encoder is not finite: evaluate another run")
    return encoder.eval().requires_grad_(False)


def load_weights(network, state):
    """Load a checkpoint's weights into a network. Raises UserError: they do not fit it."""
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"the checkpoint's weights do not fit this code's network: {error}"
        ) from None


# --------------------------------------------------------------------------------------- devices


def pick_device(name):
    """auto, cpu, cuda, cuda:1 or mps -> torch.device. It becomes the current one.

    Raises UserError: it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "mps":
        print("nobody has tried this code on mps: compare a short run with --device cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"no device {name!r} here: use --device auto or cpu ({error})") from None
    if device.type == "cuda" and device.index:
        torch.cuda.set_device(device)  # so that nothing is put on the first GPU
    torch.backends.cudnn.benchmark = True  # looks for the fastest convolutions
    return device


def pick_precision(amp, device):
    """auto, bf16, fp16 or off -> torch.bfloat16, torch.float16, or None for float32.

    auto: bf16 where it is fast; on older GPUs fp16.
    """
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    elif amp == "auto" and device.type == "cpu":
        known = getattr(torch.cpu, "get_capabilities", dict)()
        fast = ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16")
        amp = "bf16" if any(known.get(name) for name in fast) else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)


def autocast(device, dtype):
    """A context that runs networks in `dtype`. None: in float32."""
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def unit_length(z):
    """Scale each row of z (N, d) to length 1. Half precision becomes float32."""
    return F.normalize(full_precision(z), dim=1)


def full_precision(z):
    """bfloat16 and float16 -> float32: sums and exponentials need its digits. float64 stays."""
    return z.to(torch.promote_types(z.dtype, torch.float32))


def memory_format(device):
    """channels_last makes convolutions fast. On mps its gradients are wrong (pytorch 175189)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def normalizer(data):
    """-> a function: images (N, 3, S, S) in [0, 1] -> a network's input."""
    mean = torch.tensor(data.mean, device=data.images.device).view(3, 1, 1)
    std = torch.tensor(data.std, device=data.images.device).view(3, 1, 1)

    def normalize(images):
        return (images - mean) / std

    return normalize


def compile_networks(device, *networks):
    """Compile networks in place. The names of their parameters stay.

    On a GPU the compiled network is one CUDA graph, so the CPU starts it with one call.
    """
    if sys.platform == "win32":
        print("--compile needs Triton, which Windows does not have: going on without")
        return
    print("compiling: the first epoch begins a minute or two later")
    for network in networks:
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        network.compile(mode=mode, dynamic=False)


# ------------------------------------------------------------------------------ features and kNN


@torch.no_grad()
def extract_features(encoder, data, side, dtype=None):
    """Features (N, D) of all images of `data`, in eval mode, without augmentation.

    side: the images are resized to side x side pixels.
    """
    normalize = normalizer(data)
    training = encoder.training
    encoder.eval()
    features = []
    for images in tqdm.tqdm(data.images.split(500), "features", leave=False, disable=None):
        images = transforms.resize(images / 255, [side])
        with autocast(images.device, dtype):
            output = encoder(normalize(images))
        features.append(full_precision(output))
    encoder.train(training)
    return torch.cat(features)


def nearest(train_features, features, k):
    """The k nearest rows of train_features (N, D) to each row of features (M, D).

    -> cosine similarities and row numbers, (M, k) each. k is cut to N.
    """
    bank = unit_length(train_features)
    size = max(1, 2**25 // len(bank))  # the similarities of a part take 128 MiB
    similarities = []
    rows = []
    for part in unit_length(features).split(size):
        best = (part @ bank.T).topk(min(k, len(bank)))
        similarities.append(best.values)
        rows.append(best.indices)
    return torch.cat(similarities), torch.cat(rows)


def knn_scores(train_features, train_labels, features, classes, k=200, temperature=0.1):
    """Votes (M, classes): a neighbour votes exp(similarity / temperature) for its class.

    train_features (N, D), train_labels (N,), features (M, D) of any length; k is cut to N.
    Wu et al. 2018, arXiv 1805.01978, section 3.4.
    """
    similarities, rows = nearest(train_features, features, k)
    votes = torch.exp(similarities / temperature)
    scores = votes.new_zeros(len(votes), classes)
    return scores.scatter_add(1, train_labels[rows], votes)


def top_k(scores, labels):
    """Top-1 and top-5 accuracy in percent of scores (M, classes), labels (M,).

    A tie is a mistake, so a class without a vote is never right.
    Top-5 is None with five classes or fewer. Raises UserError: scores that are not finite.
    """
    if not scores.isfinite().all():
        raise UserError("features are not finite: the run diverged, start one with a lower --lr")
    own = scores.gather(1, labels[:, None])
    rank = (scores >= own).sum(dim=1)  # 1 is the best
    top1 = 100 * (rank <= 1).sum().item() / len(labels)
    top5 = 100 * (rank <= 5).sum().item() / len(labels)
    return top1, top5 if scores.shape[1] > 5 else None


def knn_accuracy(encoder, bank, test, side, dtype=None):
    """Top-1 in percent of the paper's kNN (k 200, temperature 0.1). `bank` has the neighbours."""
    neighbors = extract_features(encoder, bank, side, dtype)
    features = extract_features(encoder, test, side, dtype)
    scores = knn_scores(neighbors, bank.labels, features, len(bank.classes))
    return top_k(scores, test.labels)[0]


def knn_of_both(model, bank, test, side, dtype):
    """-> {"student_knn": top-1 in percent, "teacher_knn": the same}."""
    return {
        "student_knn": knn_accuracy(model.student.encoder, bank, test, side, dtype),
        "teacher_knn": knn_accuracy(model.teacher.encoder, bank, test, side, dtype),
    }


def progress(epoch, epochs, steps):
    """The steps of an epoch, under a bar that tells the time to go until the last epoch's end."""
    done = (epoch - 1) * steps
    whole = {"total": steps * epochs, "initial": done, "leave": False, "disable": None}
    return tqdm.tqdm(range(steps), f"epoch {epoch}/{epochs}", **whole)


# ---------------------------------------------------------------------------------- command line
# What may differ where a run is resumed
MAY_CHANGE = ("resume", "epochs", "device", "amp", "data_dir", "knn_every", "compile")
# Lowest and highest number. A method adds its own. The other numbers have to be above 0.
LIMITS = {"image_size": (16, 4096), "seed": (0, 2**63 - 1), "holdout": (0, 10**9)}
NAME_A_RUN = "name a run's folder, such as runs/ressl-textures, or its checkpoint.pt"


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each option's default, and the description as it is."""


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a UserError: one line instead of the usage text."""

    def __init__(self, **settings):
        super().__init__(formatter_class=Help, allow_abbrev=False, **settings)

    def error(self, message):
        raise UserError(f"{message} (see python {self.prog} --help)")


def add_shared_options(option):
    """Options of training and evaluations."""
    amp = ("auto", "bf16", "fp16", "off")
    option("--data", default="textures", help=f"{', '.join(MEAN_STD)}:PATH")
    option("--data-dir", default="data", help="where the data set is, or is downloaded to")
    option("--subset", type=int, help="use only the first N shuffled training images")
    option("--holdout", type=int, default=0, help="test on the last N training images instead")
    option("--image-size", type=int, help="side of the encoder's input; None: 32, or 64")
    option("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    option("--amp", choices=amp, default="auto", help="mixed precision; auto: bf16 where fast")


def check_arguments(args, limits):
    """Refuse numbers out of range. Complete the data set's arguments."""
    for name, value in vars(args).items():
        low, high = limits.get(name, (1e-9, 1e9))
        for number in value if isinstance(value, list) else [value]:
            if type(number) in (int, float) and not low <= number <= high:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} {number} is out of range: {low:g} to {high:g}")
    kind, colon, path = args.data.partition(":")
    if kind == "folder" and bool(path) == bool(colon):  # absolute: found wherever one resumes
        args.data = "folder"
        args.data_dir = os.path.abspath(os.path.expanduser(path or args.data_dir))
    if args.image_size is None:
        small = ("textures", "cifar10", "cifar100")
        args.image_size = 32 if args.data in small else 64  # [code]


def training_arguments(parser, argv, limits):
    """Parse a method's command line -> arguments, and the checkpoint to resume, or None.

    parser: with the method's own options. Those of every run are added here.
    limits: lowest and highest number of the method's own options.
    """
    option = parser.add_argument
    on_off = argparse.BooleanOptionalAction
    add_shared_options(option)
    option("--compile", action=on_off, default=False, help="compile the networks, for a GPU")
    option("--output", help="run folder; None: a new one under runs/")
    option("--resume", metavar="RUN", help="continue the run in this folder, with its arguments")
    option("--views", metavar="FILE.png", help="only draw views")
    option("--seed", type=int, default=0, help="of weights, batches and views")
    parser.set_defaults(method=parser.prog.removesuffix(".py"), contents=None)
    args = parser.parse_args(argv)
    if args.output:
        args.output = os.path.expanduser(args.output)
    limits = {**LIMITS, **limits}
    if args.resume:
        return resume_arguments(parser, argv, limits, args)
    check_arguments(args, limits)
    for file in ("log.jsonl", "checkpoint.pt"):
        if args.output and pathlib.Path(args.output, file).exists():
            raise UserError(f"{args.output} holds a run: --resume it, or name another --output")
    return args, None


def resume_arguments(parser, argv, limits, given):
    """The run's own arguments, and its checkpoint. Only those in MAY_CHANGE can differ."""
    checkpoint = read_checkpoint(given.resume)
    saved = checkpoint["arguments"]
    if saved["method"] != given.method:
        raise UserError(f"{given.resume} is a run of {saved['method']}.py: use that")
    if "records" not in checkpoint:
        raise UserError(f"{given.resume} is of an older version: evaluate it, or train anew")
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    check_arguments(args, limits)
    for name, value in vars(args).items():
        if value != saved.get(name, value) and name not in MAY_CHANGE:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"the run has {flag} {saved[name]}: leave {flag} out")
    if args.epochs < checkpoint["epoch"]:
        raise UserError(f"{checkpoint['epoch']} epochs are done: give at least as many --epochs")
    args.output = str(run_folder(args.resume))  # it may have moved
    return args, checkpoint


# ------------------------------------------------------------------------------------ run folder

SAVE_EVERY = 30  # seconds from one checkpoint to the next, at least


class Run:
    """A run's folder. checkpoint.pt holds all; log.jsonl is its records, a line each."""

    def __init__(self, args, checkpoint, data, device, dtype):
        """Make the folder, or go on in it. Say what is trained.

        Raises UserError: the batches do not fit the images or BatchNorm's groups.
        """
        if args.batch_size > len(data):
            exceeds = f"--batch-size {args.batch_size} exceeds the {len(data)} training images"
            raise UserError(f"{exceeds}: lower it, or --holdout")
        if args.batch_size % args.bn_splits or args.batch_size < 2 * args.bn_splits:
            raise UserError("--batch-size has to be a multiple of --bn-splits, at least twice it")
        self.args = args
        self.data = data
        self.device = device
        self.saved_at = -math.inf
        about = describe(device, dtype)
        if checkpoint:
            self.records = checkpoint["records"]
            self.untrained = checkpoint["untrained_encoder"]
            then = f"continuing after epoch {checkpoint['epoch']}, to epoch {args.epochs}"
        else:
            if args.output is None:
                args.output = new_folder(f"{args.method}-{args.data}")
            os.makedirs(args.output, exist_ok=True)
            self.records = [{"arguments": dict(vars(args)), **about}]
            self.untrained = None
            then = f"if it stops: python {args.method}.py --resume {shlex.quote(args.output)}"
        self.next_epoch = len(self.records) - 1  # the first record is no epoch's
        print(f"{args.method} on {args.data}: {len(data):,} images -> {args.output}")
        print(textwrap.fill(str({**vars(args), **about}), 100))
        print(then)
        give_hints(args, device)

    def log(self, record, model):
        """Write an epoch's record to the log, and print it. Raises UserError: it diverged."""
        numbers = torch.tensor(list(record.values()))
        if not all(x.isfinite().all() for x in (numbers, *model.parameters())):
            raise UserError(
                f"training diverged in epoch {record['epoch']} (a checkpoint is kept): lower --lr"
            )
        self.records.append({**record, "peak_memory": peak_memory(self.device)})
        lines = [json.dumps(each) + "\n" for each in self.records]
        write_file(f"{self.args.output}/log.jsonl", "".join(lines).encode())
        print(epoch_line(record, self.args.epochs), flush=True)

    def save(self, model, optimizer, scaler, generator):
        """Write checkpoint.pt at epoch 0 and the last, and otherwise every 30 seconds."""
        epoch = self.records[-1]["epoch"]
        age = time.monotonic() - self.saved_at
        if 0 < epoch < self.args.epochs and age < SAVE_EVERY:
            return
        if self.untrained is None:
            self.untrained = copy.deepcopy(model.student.encoder.state_dict())
        checkpoint = {
            "arguments": dict(vars(self.args)),
            "epoch": epoch,
            "records": self.records,
            "stem": self.args.stem,
            "mean": self.data.mean,
            "std": self.data.std,
            "student_encoder": model.student.encoder.state_dict(),
            "teacher_encoder": model.teacher.encoder.state_dict(),
            "untrained_encoder": self.untrained,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "generator": generator.get_state(),
        }
        buffer = io.BytesIO()  # Ctrl-C while torch.save writes to a file is no KeyboardInterrupt
        torch.save(checkpoint, buffer)
        write_file(f"{self.args.output}/checkpoint.pt", buffer.getbuffer())
        self.saved_at = time.monotonic()

    def finish(self):
        """Say what the run reached, and what to type next -> its last record."""
        first = self.records[1].get("student_knn")
        last = self.records[-1].get("student_knn")
        name = shlex.quote(self.args.output)
        if last is not None:
            print(f"kNN: {first:.1f} % (untrained) -> {last:.1f} %")
            print(f"next: python knn_eval.py {name} --neighbors neighbors.png")
            print(f"      python linear_eval.py {name}")
            print(f"      python docs/compare.py {name}")
        return self.records[-1]


def epoch_line(record, epochs):
    """What is printed of an epoch: its record, and the time to go in place of its seconds."""
    words = [f"epoch {record['epoch']}/{epochs}"]
    for name, value in record.items():
        if name not in ("epoch", "seconds", "peak_memory"):
            words.append(f"{name} {value:.5g}")
    if record["epoch"] > 0:
        left = record["seconds"] * (epochs - record["epoch"]) / 60
        words.append(f"{left:.1f} min to go")
    return "  ".join(words)


def new_folder(name):
    """Make runs/NAME, or runs/NAME-2 and so on if there is one -> its path.

    Making and choosing are one step, so two runs never share a folder.
    """
    for number in itertools.count(1):
        folder = f"runs/{name}-{number}" if number > 1 else f"runs/{name}"
        try:
            os.makedirs(folder)
            return folder
        except FileExistsError:
            continue


def describe(device, dtype):
    """What the numbers depend on besides the arguments: versions, commit, hardware, precision."""
    hardware = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", "CPU")
    threads = torch.get_num_threads()
    hardware += f", {threads} thread{'s' if threads > 1 else ''}"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    return {
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "python": sys.version.split()[0],
        "system": sys.platform,
        "commit": git_commit(),
        "hardware": hardware,
        "precision": str(dtype or torch.float32).removeprefix("torch."),
    }


def git_commit():
    """The commit of this file. None: there is no git, or its repository does not have the file."""
    options = {"cwd": pathlib.Path(__file__).parent, "capture_output": True, "check": True}
    try:
        subprocess.run(["git", "ls-files", "--error-unmatch", "common.py"], **options)
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], **options)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.decode().strip()


def give_hints(args, device):
    """On a CPU: a quicker command, and a word if other programs are busy."""
    if device.type != "cpu":
        return
    if args.arch != "conv4":
        options = f"--arch conv4 --epochs 20 --batch-size {min(64, args.batch_size)} --lr 0.06"
        print(f"no GPU: watch the time to go; on a laptop add to your command: {options}")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0
    if torch.get_num_threads() > max(1, os.cpu_count() + 0.7 - load):
        print(f"load {load:.1f}: other programs use the cores; try OMP_NUM_THREADS=1 python ...")


def peak_memory(device):
    """Most bytes in use so far: on the GPU, or by the process. None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def write_file(path, content):
    """Write bytes. An older file is replaced only when the new one is complete and on the disk."""
    with open(path + ".part", "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".part", path)


def restore(checkpoint, model, optimizer, scaler, generator):
    """Put everything back as it was saved. Raises UserError: the weights do not fit."""
    load_weights(model, checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    if checkpoint["scaler"]:  # only fp16 has one
        scaler.load_state_dict(checkpoint["scaler"])
    generator.set_state(checkpoint["generator"])


def run_folder(path):
    """A run folder or its checkpoint.pt -> the folder."""
    path = pathlib.Path(path)
    return path if path.is_dir() else path.parent


def read_checkpoint(path):
    """A run folder or its checkpoint.pt -> its dict, on the CPU. Runs no code from the file.

    Raises UserError: it is missing, damaged, or no checkpoint of this project.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
    if not path.is_file():
        raise UserError(f"no checkpoint {path}: {NAME_A_RUN}")
    checkpoint = None
    if zipfile.is_zipfile(path):
        with contextlib.suppress(pickle.UnpicklingError):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    needed = {"arguments", "epoch", "stem", "model", "student_encoder", "teacher_encoder"}
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        raise UserError(f"{path} is damaged, or no checkpoint of this project: {NAME_A_RUN}")
    return checkpoint


# ------------------------------------------------------------------------------------ evaluation


def open_evaluation(parser, argv, limits):
    """Parse an evaluation's command line, and read what it needs.

    parser: with the evaluation's own options. The shared ones are added here.
    limits: lowest and highest number of the evaluation's own options.
    -> arguments; frozen encoder; train and test Images, on the device; precision; protocol.
    The images are those of the run, except for what is given. Raises UserError: no labels.
    """
    option = parser.add_argument
    branches = ("student", "teacher", "untrained")
    option("run", help="a run folder, or its checkpoint.pt")
    option("--branch", choices=branches, default="student", help="whose encoder")
    add_shared_options(option)
    given = parser.parse_args(argv)
    checkpoint = read_checkpoint(given.run)
    saved = checkpoint["arguments"]
    same = ("data", "data_dir", "subset", "holdout", "image_size")
    parser.set_defaults(**{name: saved[name] for name in same}, contents=saved.get("contents"))
    args = parser.parse_args(argv)
    if given.data_dir != "data" or given.data != "textures" or args.holdout != saved["holdout"]:
        args.contents = None  # other images are meant
    check_arguments(args, {**LIMITS, **limits})
    device = pick_device(args.device)
    dtype = pick_precision(args.amp, device)
    encoder = load_encoder(args.run, args.branch).to(device, memory_format=memory_format(device))
    _, train, test = load_splits(args, device, pretrain=False)
    if train is None:
        raise UserError(f"no labels in {args.data_dir}: make train/CLASS/ and val/CLASS/ there")
    protocol = {name: saved[name] for name in ("method", "arch", "seed")}
    protocol |= {name: getattr(args, name) for name in (*same, "branch", "contents")}
    protocol["epoch"] = 0 if args.branch == "untrained" else checkpoint["epoch"]
    protocol["train_images"] = len(train)
    protocol["test_images"] = len(test)
    return args, encoder, train, test, dtype, protocol | describe(device, dtype)


def report(run, protocol, result):
    """Print an evaluation's result. Add it, with its protocol, to the run's evals.jsonl."""
    words = [f"{name.replace('_', ' ')} {x:.2f} %" for name, x in result.items() if x is not None]
    print("  ".join(words), flush=True)
    print(textwrap.fill(str(protocol), 100))
    with open(run_folder(run) / "evals.jsonl", "a") as file:
        file.write(json.dumps({**protocol, **result}) + "\n")
    return result


# -------------------------------------------------------------------------------------- pictures


def save_picture(path, columns):
    """Write columns of images, float (n, 3, S, S) in [0, 1], side by side to a PNG file.

    All are drawn three times as large as the smallest.
    """
    side = 3 * min(column.shape[-1] for column in columns)
    nearest = transforms.InterpolationMode.NEAREST
    columns = [transforms.resize(column.cpu(), [side], nearest) for column in columns]
    images = torch.stack(columns, dim=1).flatten(0, 1)
    try:
        torchvision.utils.save_image(images, path, nrow=len(columns), pad_value=1)
    except ValueError as error:  # its ending is no picture's
        raise UserError(f"cannot write {path}: {error}") from None
    print(f"written: {path}")


def save_views(args, data, draw_views):
    """Write a picture to args.views: eight images, each beside three draws of its views."""
    numbers = torch.linspace(0, len(data) - 1, min(8, len(data))).long()  # from the whole set
    images = data.images[numbers] / 255
    columns = [images]
    for seed in range(3):
        generator = torch.Generator().manual_seed(args.seed + seed)
        columns += draw_views(images, args, generator)
    save_picture(args.views, columns)
    print("left: images; then three draws of their views")
