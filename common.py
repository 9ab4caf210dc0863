"""Data and evaluation helpers that the four scripts share. Nothing here belongs to one method.

    disk -> uint8 images, the whole set on the device -> a batch is an index into it
         -> resized_crop, adjust_*, gaussian_blur: a batch at once, every image with its own numbers
    encoder -> features -> knn_scores
    run folder {checkpoint.pt, log.jsonl, evals.jsonl}

Each random transform is split in two. *Draw* makes the parameters of a whole batch on the host,
from one CPU generator: so the same seed gives the same views on every device. *Apply* is a pure
function of images and parameters, on the device: so it is checked, image by image, against
torchvision's.

Why it is fast. The images lie on the device as bytes, all of them, so a batch is an index, and no
worker process opens, decodes and copies pictures. A view is less than a hundred operations on the
whole batch, however many images are in it: an image's own numbers decide what happens to it, and
a number may be the one that changes nothing. And the host need not wait for the device within an
epoch, since it draws all random numbers itself and a step reads no value back.

Sections: errors | images | augmentation | encoders | precision | features and kNN | run folder |
command line | pictures
"""

import argparse
import concurrent.futures
import contextlib
import functools
import io
import itertools
import json
import math
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time
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


class UserError(Exception):
    """Something that the user can mend. The message is one line and names the remedy."""


@contextlib.contextmanager
def blaming(what, remedy, spared=()):
    """Inside, whatever is raised, but for the kinds in `spared`, becomes a UserError."""
    try:
        yield
    except (UserError, *spared):
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:150]
        raise UserError(f"{what} ({reason}): {remedy}") from None


def command(main):
    """Decorate a script's main(argv): what the user can mend becomes one line and exit code 2."""

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv)
        except UserError as error:
            message = str(error)
        except torch.cuda.OutOfMemoryError:
            sizes = "--batch-size, --image-size, --subset or --arch"
            message = f"out of GPU memory: use a smaller {sizes}"
        except OSError as error:  # a full disk, a folder that may not be written, ...
            place = f" ({error.filename})" if error.filename else ""
            message = f"{error.strerror or error}{place}: check the path, its rights and the disk"
            message += "; a run that stopped goes on with --resume"
        except KeyboardInterrupt as error:
            print(f"\nstopped. {error}", file=sys.stderr)
            raise SystemExit(130) from None
        print("error: " + " ".join(message.split()), file=sys.stderr)
        raise SystemExit(2)

    return wrapped


# ---------------------------------------------------------------------------------------- images

# Mean and standard deviation per channel, as the authors' code has them [code]. CIFAR-10's std is
# the mean over images of each image's own std (the std over all pixels is .2470 .2435 .2616);
# CIFAR-100's is the one over all pixels. The textures' are our own set's, over all pixels, and
# one's own pictures get ImageNet's [ours].
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


@dataclass
class Images:
    """A set of square images, held whole in memory: N * S * S * 3 bytes."""

    images: torch.Tensor  # (N, 3, S, S) uint8
    labels: torch.Tensor  # (N,) int64, or None
    classes: list  # class names
    mean: tuple  # per channel, for images in [0, 1]
    std: tuple

    def __len__(self):
        return len(self.images)

    @property
    def side(self):
        return self.images.shape[-1]

    def take(self, index):
        """The images at `index` (n,), as a set of its own."""
        labels = None if self.labels is None else self.labels[index]
        return replace(self, images=self.images[index], labels=labels)

    def to(self, device):
        """The same set on `device`."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, images=self.images.to(device), labels=labels)


def load_images(name, root, split, side=64):
    """Read one split of a data set.

    name: "textures" (made on the spot); "cifar10", "cifar100", "stl10" or "tiny-imagenet" (read
    from `root`, downloaded if missing); "folder:PATH", or "folder" and PATH in `root` (pictures of
    any size, read at `side` px).
    split: "pretrain" (what a method trains on), "train" (labelled: kNN bank, linear probe), "test".
    "pretrain" is "train", but for STL-10, where unlabelled images follow.
    Returns Images on the CPU. Raises UserError for an unknown name or split, for files that are
    missing and cannot be downloaded, or are broken, and for a set that exceeds the memory.
    """
    kind, _, path = name.partition(":")
    if kind not in MEAN_STD or (path and kind != "folder"):
        names = ", ".join(MEAN_STD)
        raise UserError(f"unknown data set {name!r}: choose {names}:PATH")
    if split not in ("pretrain", "train", "test"):
        raise UserError(f"unknown split {split!r}: choose pretrain, train or test")
    if kind == "textures":
        return render_textures(*((1000, 1) if split == "test" else (5120, 0)))
    if kind == "folder":
        files, labels, classes = list_folder(pathlib.Path(path or root).expanduser(), split)
        images, labels = read_pictures(files, labels, side)
    elif kind == "tiny-imagenet":
        files, labels, classes = list_tiny_imagenet(pathlib.Path(root), split)
        images, labels = read_pictures(files, labels, 64)
    else:
        images, labels, classes = read_arrays(kind, root, split)
    return Images(images, labels, classes, *MEAN_STD[kind])


def reading(name, root, url):
    """Around reading a data set: a failed download or a broken file becomes a UserError."""
    file = url.rpartition("/")[-1]
    remedy = f"with a network connection try again; without one put {file} there, from {url}"
    return blaming(f"cannot read or download {name} in {root}", remedy)


def read_arrays(name, root, split):
    """CIFAR and STL-10, by torchvision -> images (N, 3, S, S) uint8, labels or None, classes."""
    dataset = getattr(torchvision.datasets, name.upper())
    unlabelled = name == "stl10" and split == "pretrain"
    if name == "stl10":
        check_memory(105_000 if unlabelled else 8_000, 96, copies=2)  # torchvision joins two arrays
        options = {"split": "train+unlabeled" if unlabelled else split}
    else:
        options = {"train": split != "test"}
    with reading(name, root, dataset.url):  # what is there already has its MD5 sums checked only
        data = dataset(root, download=True, **options)
        images, classes = torch.from_numpy(data.data), data.classes
    if name != "stl10":
        return images.permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets), classes
    labels = None if unlabelled else torch.tensor(data.labels, dtype=torch.int64)
    return images.contiguous(), labels, classes


def list_pictures(folder):
    """All files in `folder` and folders in it of endings that Pillow opens, sorted; none hidden."""
    kinds, pictures = Image.registered_extensions(), []
    for path in folder.rglob("*"):
        hidden = any(part[0] == "." for part in path.relative_to(folder).parts)
        if kinds.get(path.suffix.lower()) in Image.OPEN and not hidden and path.is_file():
            pictures.append(path)
    return sorted(pictures, key=pathlib.Path.as_posix)  # the same order on Windows


def list_folder(folder, split):
    """One's own pictures -> files, labels or None, class names.

    train/CLASS/ and val/CLASS/ (or test/CLASS/); without class folders in train/ all pictures of
    train/, or of the whole folder where there is no train/: unlabelled.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: check the path")
    part = train = folder / "train" if (folder / "train").is_dir() else folder
    names = lambda part: {p.name for p in part.iterdir() if p.is_dir() and p.name[0] != "."}
    classes = [] if train == folder else sorted(names(train))
    if split == "test" and classes:
        part = folder / "val" if (folder / "val").is_dir() else folder / "test"
        if not part.is_dir():
            raise UserError(f"no val or test in {folder}: make val/CLASS/, or use --holdout N")
        if new := names(part) - set(classes):
            raise UserError(f"{part} has classes that {train} has not: {', '.join(sorted(new))}")
    each = [list_pictures(part / name) for name in classes or ["."]]
    files = [file for files in each for file in files]
    if not files:
        raise UserError(f"no pictures in {part}: put some there, or into train/CLASS/, val/CLASS/")
    labels = [label for label, files in enumerate(each) for _ in files]
    return files, labels if classes else None, classes


def list_tiny_imagenet(root, split):
    """-> files, labels, class names (WordNet's numbers); downloads and unpacks if it is missing."""
    folder, aside = root / "tiny-imagenet-200", root / "tiny-imagenet-200.part"
    with reading("tiny-imagenet", root, TINY_IMAGENET):
        if not folder.is_dir():  # unpacked aside, so that half of it is never taken for the whole
            settings = dict(extract_root=str(aside), md5=TINY_IMAGENET_MD5)
            download_and_extract_archive(TINY_IMAGENET, str(root), **settings)
            (aside / folder.name).rename(folder)
            shutil.rmtree(aside, ignore_errors=True)
        files, labels, classes = list_folder(folder, "train")
        if split == "test":  # all in one folder; a line a picture: file, class, box
            lines = (folder / "val" / "val_annotations.txt").read_text().splitlines()
            files = [folder / "val" / "images" / line.split("\t")[0] for line in lines]
            labels = [classes.index(line.split("\t")[1]) for line in lines]
    return files, labels, classes


def read_pictures(files, labels, side):
    """Decode picture files on all cores -> uint8 (N, 3, side, side), labels (N,) int64 or None.

    Broken ones are named and left out. Raises UserError if none is left, or if they take more than
    the memory that is available.
    """
    check_memory(len(files), side)
    images = torch.empty(len(files), 3, side, side, dtype=torch.uint8)
    pixels = images.permute(0, 2, 3, 1).numpy()  # the same memory, as Pillow counts the axes
    labels = None if labels is None else torch.tensor(labels)

    def read(i):
        try:
            pixels[i] = numpy.asarray(read_picture(files[i], side))
        except Exception as error:  # Pillow's decoders raise errors of all kinds
            return f"{files[i]} ({error})"

    # A thread a core: Pillow lets go of the interpreter; more would wait for each other.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(read, range(len(files)))
        errors = list(tqdm.tqdm(results, "reading", len(files), leave=False, disable=None))
    if broken := [error for error in errors if error]:
        some = ", ".join(broken[:3]) + ", ..." * (len(broken) > 3)
        if len(broken) == len(files):
            raise UserError(f"none of {len(files)} pictures can be read: {some}")
        print(f"left out {len(broken)} of {len(files):,} pictures that cannot be read: {some}")
        intact = torch.tensor([error is None for error in errors])
        images, labels = images[intact], None if labels is None else labels[intact]
    return images, labels


def read_picture(file, side):
    """A picture file of any kind and size -> PIL image, RGB: short side resized, centre cropped."""
    with Image.open(file) as picture:
        picture.draft("RGB", (side, side))  # JPEG: decode at 1/2, 1/4 or 1/8, if that is enough
        ImageOps.exif_transpose(picture, in_place=True)  # as the camera was held
        if picture.mode[0] in "IF":  # more than 8 bits a pixel, in a range of the picture's own
            grey = numpy.nan_to_num(numpy.asarray(picture, dtype="float32"))
            grey = (grey - grey.min()) * (255 / max(grey.max() - grey.min(), 1e-9))
            picture = Image.fromarray(grey.round().astype("uint8"))
        if picture.mode == "P":  # Pillow warns of palettes with alpha that become RGB at once
            picture = picture.convert("RGBA")
        if picture.mode != "RGB":  # for those that are, it would be a copy
            picture = picture.convert("RGB")
        return transforms.center_crop(transforms.resize(picture, [side]), [side])


def check_memory(count, side, copies=1):
    """UserError if `copies` of `count` images of `side` px exceed the memory that is available."""
    needed, available = copies * count * side**2 * 3, available_memory()
    if needed > available:
        formula = f"{copies} * " * (copies > 1) + f"{count:,} images * {side} * {side} * 3 bytes"
        raise UserError(
            f"{formula} = {needed / 1e9:.1f} GB, but only {available / 1e9:.1f} GB of memory are "
            "available: choose another set; of your own, fewer pictures or a smaller --image-size"
        )


def available_memory():
    """Bytes of main memory, free or in all, as the system tells; infinite where it does not."""
    with contextlib.suppress(OSError, IndexError):  # Linux
        text = pathlib.Path("/proc/meminfo").read_text()
        return 1024 * int(text.split("MemAvailable:")[1].split()[0])
    with contextlib.suppress(AttributeError, ValueError):  # macOS; not Windows
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return math.inf


def load_splits(args, device, pretrain=True):
    """-> the run's three sets on `device`: pretrain (None if it is not asked for), train (labelled:
    kNN bank, linear probe) and test; the last two are None where there are no labels.

    One shuffle of the training images, the same for every run: args.subset takes its first images;
    args.holdout its last, as the test set, so that nothing need be tuned on test images. STL-10's
    100,000 unlabelled images are shuffled among the labelled ones for pre-training.
    """
    load = lambda split: load_images(args.data, args.data_dir, split, args.image_size)
    if args.data == "folder" and not args.holdout:
        list_folder(pathlib.Path(args.data_dir), "test")  # says what is missing before reading all
    shuffle = lambda count: torch.randperm(count, generator=torch.Generator().manual_seed(0))
    train, test = load("train"), None
    kept, more = len(train) - args.holdout, 100_000 if args.data == "stl10" else 0
    if kept < 1 or not 1 <= (args.subset or 1) <= kept + more:
        raise UserError(
            f"--subset {args.subset} and --holdout {args.holdout} do not fit into "
            f"{len(train) + more} training images: make one of them smaller"
        )
    order = shuffle(len(train))
    order, held_out = order[:kept], order[kept:]
    if train.labels is None:
        print("no class folders, so no labels: no kNN and no linear probe")
    else:
        test = (train.take(held_out) if args.holdout else load("test")).to(device)
    everything = args.subset is None and not args.holdout
    bank = (train if everything else train.take(order[: args.subset])).to(device)
    data = bank if pretrain else None
    if more and pretrain:
        data = load("pretrain")
        if not everything:
            index = torch.cat([order, torch.arange(len(train), len(data))])
            data = data.take(index[shuffle(len(index))[: args.subset]])
        data = data.to(device)
    return data, bank if bank.labels is not None else None, test


def wave(t):
    """A sine of period 1 with soft steps for flanks, in [-1, 1]."""
    return torch.tanh(4 * torch.sin(2 * math.pi * t))


# The ten families. u, v: the image's own axes, in periods; r: distance from its centre, in periods;
# a: angle around it, in turns. -> brightness, -1 to 1.
TEXTURES = {
    "stripes": lambda u, v, r, a: wave(u),
    "checks": lambda u, v, r, a: wave(u) * wave(v),
    "dots": lambda u, v, r, a: torch.tanh(4 * ((6.283 * u).sin() + (6.283 * v).sin() - 0.8)),
    "rings": lambda u, v, r, a: wave(r),
    "zigzag": lambda u, v, r, a: wave(u + 1.5 * (v.remainder(1) - 0.5).abs()),
    "bricks": lambda u, v, r, a: torch.tanh(
        6 * torch.minimum(v.remainder(1), 2 * ((u + v.floor()) / 2).remainder(1)) - 1.2
    ),
    "plaid": lambda u, v, r, a: (wave(u) + wave(v)) / 2,
    "waves": lambda u, v, r, a: wave(u + 0.35 * (4 * v).sin()),
    "spokes": lambda u, v, r, a: wave(6 * a),
    "marble": lambda u, v, r, a: wave(u / 2 + 0.6 * (2 * v + 2 * (3 * u).sin()).sin()),
}


def render_textures(count, seed, side=32):
    """`count` grey procedural textures in ten families, the same for the same seed.

    Every image has its own orientation, frequency, phase, centre, brightness, contrast and noise.
    Grey, because colour would tell images apart by itself, and ReSSL's relations preserve colour.
    Returns Images, (count, 3, side, side).
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):  # one number an image
        return torch.rand(count, 1, 1, generator=generator) * (high - low) + low

    labels = torch.randperm(count, generator=generator) % len(TEXTURES)
    axis = (torch.arange(side) + 0.5) / side - 0.5
    x, y = axis[None, :], axis[:, None]
    angle, frequency = uniform(0, 2 * math.pi), uniform(1.5, 3.5)  # radians, periods per image
    u = (x * angle.cos() + y * angle.sin()) * frequency + uniform(0, 1)
    v = (y * angle.cos() - x * angle.sin()) * frequency + uniform(0, 1)
    x, y = x - uniform(-0.3, 0.3), y - uniform(-0.3, 0.3)
    r, a = x.hypot(y) * frequency + uniform(0, 1), (torch.atan2(y, x) + angle) / (2 * math.pi)
    pattern = torch.empty(count, side, side)
    for label, family in enumerate(TEXTURES.values()):
        own = labels == label
        pattern[own] = family(u[own], v[own], r[own], a[own])
    contrast = uniform(0.25, 0.35) * uniform(-1, 1).sign()
    grey = (0.5 + uniform(-0.15, 0.15) + contrast * pattern).unsqueeze(1)
    noise = torch.randn(count, 3, side, side, generator=generator) * uniform(0.02, 0.06)[:, None]
    images = ((grey + noise).clamp(0, 1) * 255).round().to(torch.uint8)
    return Images(images, labels, list(TEXTURES), *MEAN_STD["textures"])


def memory_format(device):
    """Of networks and their inputs: channels_last, for which convolutions are fast.

    Not on mps, where BatchNorm's gradients are then wrong (pytorch issue 175189).
    """
    mps = torch.device(device).type == "mps"
    return torch.contiguous_format if mps else torch.channels_last


def normalizer(data, device):
    """-> a function: images (N, 3, S, S) in [0, 1] -> network input, normalised, channels_last."""
    # The two small tensors are made once: made in the step, each would be a copy to the device.
    scale = 1 / torch.tensor(data.std, device=device).view(3, 1, 1)
    shift = -torch.tensor(data.mean, device=device).view(3, 1, 1) * scale
    layout = memory_format(device)
    return lambda x: torch.addcmul(shift, x, scale).contiguous(memory_format=layout)


# ---------------------------------------------------------------------------------- augmentation


def draw_uniform(shape, low, high, generator=None):
    """Uniform numbers in [low, high), on the CPU; float64, so that hardly any rounds to `high`."""
    return torch.rand(shape, dtype=torch.float64, generator=generator) * (high - low) + low


def draw_chosen(count, p, generator=None):
    """Choose each of `count` images with probability p -> bool (count,)."""
    return draw_uniform(count, 0, 1, generator) < p


def draw_boxes(count, side, scale, generator=None):
    """Boxes as torchvision's RandomResizedCrop draws them -> (4, count): top, left, height, width.

    Area uniform in `scale` (as a share of side * side), aspect ratio log-uniform in 3/4 to 4/3,
    whole pixels; the first of ten tries that fits into the image, the whole image where none does.
    """
    area = draw_uniform((10, count), *scale, generator) * side**2
    ratio = draw_uniform((10, count), math.log(3 / 4), math.log(4 / 3), generator).exp()
    length = (area * torch.stack([1 / ratio, ratio])).sqrt().round()  # (2, 10, N): height, width
    fits = ((length > 0) & (length <= side)).all(0)
    first = fits.int().argmax(0).expand(2, 1, -1)  # the first of equal maxima; 0 where none fits
    length = torch.where(fits.any(0), length.gather(1, first)[:, 0], side)
    start = (draw_uniform((2, count), 0, 1, generator) * (side - length + 1)).floor()
    return torch.cat([start, length])


def mirror(boxes, flip):
    """Boxes (4, N) -> (4, N): where `flip` (N,) is true backwards, as left + width and -width, so
    that their views are mirrored."""
    top, left, height, width = boxes
    return torch.stack([top, left + width * flip, height, torch.where(flip, -width, width)])


def draw_jitter(count, p, brightness, contrast, saturation, hue, generator=None):
    """As ColorJitter draws, with probability p -> factors (4, count); the order, a list of 0 to 3.

    The first three factors are uniform in 1 - x to 1 + x, the hue in -x to x turns; 1, 1, 1 and 0,
    which change nothing, where the jitter is not drawn. One order serves the whole batch
    (torchvision draws one an image), so that each operation is one call.
    """
    width = torch.tensor([[brightness], [contrast], [saturation], [hue]], dtype=torch.float64)
    neutral = torch.tensor([[1.0], [1.0], [1.0], [0.0]], dtype=torch.float64)
    factors = neutral + width * draw_uniform((4, count), -1, 1, generator)
    factors = torch.where(draw_chosen(count, p, generator), factors, neutral)
    return factors, torch.randperm(4, generator=generator).tolist()


def to_device(images, *draws):
    """Send small CPU tensors to where `images` are, in one copy -> list; floats become float32."""
    flat = torch.cat([draw.flatten().float() for draw in draws])  # holds indices up to 2**24
    if images.is_cuda:
        flat = flat.pin_memory()  # so that the copy does not wait for the device
    flat = flat.to(images.device, non_blocking=images.is_cuda)
    parts = zip(flat.split([draw.numel() for draw in draws]), draws, strict=True)
    return [
        part.view(draw.shape).to(torch.float32 if draw.is_floating_point() else draw.dtype)
        for part, draw in parts
    ]


def resize_weights(start, length, inputs, outputs):
    """Intervals from start to start + length in pixels, (N,) each -> weights (N, outputs, inputs).

    Row i holds the share of every input pixel in output pixel i: a triangle around the output
    pixel's centre, one input pixel to each side, wider when shrinking (antialias), cut at the
    interval's ends. A negative length runs backwards: it mirrors.
    """
    start, length = start[:, None, None], length[:, None, None]
    pixel = torch.arange(0.5, inputs, device=start.device, dtype=start.dtype) - start  # centres
    centre = torch.arange(0.5, outputs, device=start.device, dtype=start.dtype)[:, None]
    scale = length / outputs  # input pixels per output pixel
    outside = pixel * (pixel - length) > 0  # before the start or after the end, either way round
    pixel.masked_fill_(outside, math.inf)
    distance = torch.addcmul(pixel, scale, centre, value=-1).abs_()
    distance.div_(scale.abs().clamp_min_(1))  # in half-widths of the triangle
    weights = distance.sub_(1).clamp_max_(0)  # the triangle upside down: the sum's sign undoes it
    return weights.div_(weights.sum(-1, keepdim=True))


def resized_crop(images, top, left, height, width, size):
    """Cut every image's own box and resize it to size x size.

    images: float (N, 3, H, W); top, left, height, width: whole pixels, (N,), inside the image. A
    box may be given backwards, as left + width and -width: then the view is mirrored. Returns
    (N, 3, size, size). Equals torchvision's resized_crop (bilinear, antialias), and then
    horizontal_flip. Both are linear and separable: so each channel is rows @ image @ columns.T.
    """
    start, length = (torch.stack(pair).to(images.dtype) for pair in ((top, left), (height, width)))
    inputs = max(images.shape[-2:])  # rows and columns in one call: what is outside weighs 0
    weights = resize_weights(start.flatten(), length.flatten(), inputs, size)
    rows, columns = weights.view(2, len(images), size, inputs)
    return separable(images, rows[..., : images.shape[-2]], columns[..., : images.shape[-1]])


def separable(images, rows, columns):
    """rows (N, h, H) @ images (N, 3, H, W) @ columns (N, w, W) transposed -> (N, 3, h, w)."""
    count, channels, height, _ = images.shape
    images = torch.bmm(images.transpose(1, 2).flatten(1, 2), columns.mT)  # (N, H * 3, w)
    images = torch.bmm(rows, images.view(count, height, channels * columns.shape[1]))
    return images.view(count, rows.shape[1], channels, columns.shape[1]).transpose(1, 2)


def per_image(factor, images):
    """(N,) -> (N, 1, 1, 1), of the images' dtype."""
    return factor.to(images.dtype).view(-1, 1, 1, 1)


def rgb_to_grey(images):
    """(N, 3, H, W) -> luminance (N, 1, H, W), torchvision's weights."""
    red, green, blue = images.split(1, dim=1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def adjust_brightness(images, factor):
    """images float (N, 3, H, W) in [0, 1] times factor (N,), clamped."""
    return (images * per_image(factor, images)).clamp_(0, 1)


def adjust_contrast(images, factor):
    """mean + factor * (pixel - mean), clamped; mean: the image's luminance. factor (N,): 0 flat."""
    mean = rgb_to_grey(images.mean((2, 3), keepdim=True))
    return torch.lerp(mean, images, per_image(factor, images)).clamp_(0, 1)


def adjust_saturation(images, factor):
    """grey + factor * (pixel - grey), clamped; grey: the pixel's luminance. factor (N,): 0 grey."""
    return torch.lerp(rgb_to_grey(images), images, per_image(factor, images)).clamp_(0, 1)


def adjust_hue(images, factor):
    """Turn the hue by factor (N,) turns, -0.5 to 0.5; value and saturation stay.

    images: float (N, 3, H, W) in [0, 1]. With the hue in sixths of a turn, 0 at red, red is
    low + chroma * clamp(2 - |hue|, 0, 1); green and blue are the same around 2 and 4, and all
    distances are along a circle of 6.
    """
    red, green, blue = images.split(1, dim=1)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = torch.maximum(torch.maximum(red, green), blue).sub_(low)
    # From 0 at red to 3 at cyan: 1 + (green + blue - red - low) / chroma; negative on blue's side.
    # A grey pixel has any hue: its chroma is 0.
    hue = (green + blue).sub_(red).sub_(low).div_(chroma.clamp_min(1e-6)).add_(1)
    hue = hue.copysign_(green - blue)
    peak = torch.arange(0, 6, 2, device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
    turn = (6 * per_image(factor, images) - peak).remainder_(6).sub_(3)
    # hue + turn is in -6 to 6, and the channel's peak at 3 and -3: the distance from the nearer one
    distance = (hue + turn).abs_().sub_(3).abs_()
    return torch.addcmul(low.add_(chroma, alpha=2), distance.clamp_(1, 2), chroma, value=-1)


def color_jitter(images, factors, order):
    """Brightness, contrast, saturation and hue, by factors (4, N); `order` holds 0 to 3."""
    operations = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    for i in order:
        images = operations[i](images, factors[i])
    return images


@functools.lru_cache
def blur_constants(side, radius, device, dtype):
    """For every shift t of a blur's kernel: -t^2 / 2, (T,); and where it leads, (T, side * side).

    leads[t, i * side + j] is 1 where shift t takes output pixel i to input pixel j, reflected at
    both borders. The side has to exceed the radius.
    """
    shift = torch.arange(-radius, radius + 1)
    source = (side - 1) - ((side - 1) - (torch.arange(side) + shift[:, None]).abs()).abs()
    leads = F.one_hot(source, side).flatten(1)
    return (-0.5 * shift**2).to(device, dtype), leads.to(device, dtype)


def gaussian_blur(images, sigma, kernel_size=13):
    """Blur every image by its own sigma (N,) > 0 in pixels; images float (N, 3, S, S), S > 6.

    Equals torchvision's gaussian_blur with the same, odd kernel_size, at every pixel, reflected
    border too.
    """
    side = images.shape[-1]
    exponent, leads = blur_constants(side, kernel_size // 2, images.device, images.dtype)
    kernel = torch.softmax(exponent * sigma.to(images.dtype)[:, None] ** -2, dim=1)  # sums to 1
    blur = (kernel @ leads).view(-1, side, side)
    return separable(images, blur, blur)


# -------------------------------------------------------------------------------------- encoders


class Conv4(nn.Sequential):
    """The small encoder for laptops: (N, 3, S, S) -> (N, 256). 0.39 M parameters [ours].

    Four convolutions, to 32, 64, 128 and 256 channels; each halves the map, and BatchNorm and ReLU
    come after that: on a CPU what is done on large maps costs the most. Then the map is averaged.
    """

    dim = 256

    def __init__(self):
        layers = [nn.Conv2d(3, 32, 4, stride=2, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(32), nn.ReLU(inplace=True)]
        for inputs, outputs in ((32, 64), (64, 128), (128, 256)):
            layers += [
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                nn.MaxPool2d(2, ceil_mode=True),  # ceil: a 14-pixel crop passes too
                nn.BatchNorm2d(outputs),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


ARCHITECTURES = ("conv4", "resnet18", "resnet34", "resnet50", "mobilenet_v2", "mobilenet_v3_large")
ARCHITECTURES += ("efficientnet_b0", "shufflenet_v2_x1_0")


def stem_for(side):
    """The stem for images of `side` pixels, as in the authors' small-image code [code]."""
    return "small" if side <= 40 else "medium" if side <= 96 else "imagenet"


def build_encoder(arch, stem, bn_splits=1):
    """-> nn.Module, images (N, 3, S, S) -> pooled features (N, D), random weights; .dim is D.

    arch: "conv4", or the name of torchvision's function, whose parameter names the encoder keeps.
    stem: torchvision's networks halve their maps five times, and so does "imagenet"; "medium" skips
    the first time, the first convolution's, and "small" the second too (a max-pool's or another
    convolution's). A ResNet's first convolution becomes 3x3 [code]; the others follow [ours].
    conv4 is made for small images and is the same for every stem.
    bn_splits: groups that BatchNorm splits a batch into. Raises UserError for unknown names.
    """
    if arch not in ARCHITECTURES:
        raise UserError(f"unknown architecture {arch!r}: choose {', '.join(ARCHITECTURES)}")
    if stem not in ("small", "medium", "imagenet"):
        raise UserError(f"unknown stem {stem!r}: choose small, medium or imagenet")
    if arch == "conv4":
        encoder = Conv4()
    else:
        encoder = getattr(torchvision.models, arch)(weights=None)
        head = "fc" if hasattr(encoder, "fc") else "classifier"
        layers = getattr(encoder, head).modules()
        encoder.dim = next(layer.in_features for layer in layers if isinstance(layer, nn.Linear))
        setattr(encoder, head, nn.Identity())
        swap_stem(encoder, stem)
    for module in list(encoder.modules()):  # as for training from scratch [ours]
        if isinstance(module, torchvision.ops.StochasticDepth):
            module.p = 0.0
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                child.momentum = 0.1
                if bn_splits > 1:
                    setattr(module, name, SplitBatchNorm2d(child, bn_splits))
    return encoder


def swap_stem(encoder, stem):
    """Let the first one ("medium") or two ("small") of the layers that halve the map keep it."""
    kinds = (nn.Conv2d, nn.MaxPool2d)
    halving = (m for m in encoder.modules() if isinstance(m, kinds) and m.stride in (2, (2, 2)))
    first, second = next(halving), next(halving)
    if stem != "imagenet":
        first.stride = (1, 1)
        if first.kernel_size == (7, 7):
            encoder.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
    if stem == "small" and isinstance(second, nn.MaxPool2d):
        encoder.maxpool = nn.Identity()
    elif stem == "small":
        second.stride = (1, 1)


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm as on `splits` devices without synchronisation: in training, each of `splits` equal
    groups of the batch has its own statistics; the running ones follow their mean [code].

    Its parameters and buffers, and what it does in eval mode, are BatchNorm2d's.
    """

    def __init__(self, norm, splits):
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.splits = splits

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        groups = x.chunk(self.splits)
        running = [
            buffer.repeat(self.splits, 1) for buffer in (self.running_mean, self.running_var)
        ]
        settings = (self.weight, self.bias, True, self.momentum, self.eps)
        groups = [F.batch_norm(*each, *settings) for each in zip(groups, *running, strict=True)]
        self.running_mean.copy_(running[0].mean(0))  # batch_norm has moved each group's row
        self.running_var.copy_(running[1].mean(0))
        self.num_batches_tracked.add_(1)
        return torch.cat(groups)


def load_encoder(checkpoint, branch="student"):
    """The trained encoder of a run, frozen, in eval mode, on the CPU.

    checkpoint: a run folder, its checkpoint.pt, or the dict in it. branch: "student" or "teacher".
    Feed it images normalised by the run's own mean and std. Raises UserError if it cannot be read.
    """
    if branch not in ("student", "teacher"):
        raise UserError(f"unknown branch {branch!r}: choose student or teacher")
    if not isinstance(checkpoint, dict):
        checkpoint = read_checkpoint(checkpoint)
    with ours("the checkpoint"):
        encoder = build_encoder(checkpoint["arguments"]["arch"], checkpoint["stem"])
        encoder.load_state_dict(checkpoint[f"{branch}_encoder"])
    return encoder.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------- precision


def pick_device(name):
    """Device name (auto, cpu, cuda, cuda:1, mps) -> torch.device. UserError if it is not there."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    with blaming(f"no device {name!r} here", "use --device auto or cpu"):
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("not one of cpu, cuda, mps")
        torch.empty(1, device=device)
    torch.backends.cudnn.benchmark = True  # shapes stay the same: look for the fastest kernels
    return device


def pick_precision(amp, device):
    """--amp auto | bf16 | fp16 | off -> torch.bfloat16, torch.float16 or None (float32)."""
    if amp != "auto":
        if device.type == "mps" and amp != "off":
            raise UserError(f"--amp {amp} is not supported on mps: use --amp off")
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    if device.type == "cuda":  # older cards only emulate bf16
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if device.type == "cpu":
        known = getattr(torch.cpu, "get_capabilities", dict)()
        fast = ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16")
        return torch.bfloat16 if any(known.get(name) for name in fast) else None
    return None


def autocast(device, dtype):
    """Mixed precision for the networks' forward passes; dtype None: off."""
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def promote(features):
    """Half types -> float32, where sums and exponentials need it; float64 stays float64."""
    return features.float() if features.dtype in (torch.float16, torch.bfloat16) else features


# ------------------------------------------------------------------------------ features and kNN


@torch.no_grad()
def extract_features(encoder, data, dtype=None, batch_size=500, side=None):
    """Pooled features of every image of `data`, without augmentation, in eval mode -> (N, D).

    side: resize the images to so many pixels first, if they have not.
    """
    training, device = encoder.training, data.images.device
    encoder.eval()
    normalize = normalizer(data, device)
    features = []
    batches = data.images.split(batch_size)
    for images in tqdm.tqdm(batches, "features", leave=False, disable=None):
        images = normalize(resized(images / 255, side or data.side))
        with autocast(device, dtype):
            features.append(encoder(images))
    encoder.train(training)
    return promote(torch.cat(features))


def resized(images, side):
    """float (N, 3, S, S) -> (N, 3, side, side), antialiased on every device."""
    count, whole = len(images), images.shape[-1]
    if whole == side:
        return images
    box = torch.tensor([0, 0, whole, whole], device=images.device).expand(count, 4).T
    return resized_crop(images, *box, side)


def nearest(train_features, features, k):
    """The k rows of train_features (N, D) most similar to each row of features (M, D).

    Yields (cosine similarities, indices), (m, k) both, most similar first, chunk by chunk of M.
    """
    bank = F.normalize(promote(train_features), dim=1)
    rows = max(1, 2**25 // len(bank))  # a chunk's similarities take 128 MiB, whatever N is
    for chunk in F.normalize(promote(features), dim=1).split(rows):
        yield (chunk @ bank.T).topk(min(k, len(bank)))


def knn_scores(train_features, train_labels, features, classes, k=200, temperature=0.1):
    """Weighted kNN votes (M, classes): a neighbour at cosine s votes exp(s / temperature).

    train_features (N, D), train_labels (N,) int64, features (M, D), normalised here; k is cut to N.
    Wu et al. 2018, arXiv 1805.01978, section 3.4.
    """
    votes = []
    for similarity, index in nearest(train_features, features, k):
        weights = (similarity / temperature).exp()
        empty = weights.new_zeros(len(weights), classes)
        votes.append(empty.scatter_add_(1, train_labels[index], weights))
    return torch.cat(votes)


def top_k(scores, labels):
    """Top-1 and top-5 accuracy in percent of `scores` (M, classes), labels (M,)."""
    hits = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
    return tuple(100 * hit.sum().item() / len(labels) for hit in (hits[:, 0], hits.any(1)))


def knn_accuracy(encoder, train, test, dtype=None, side=None):
    """Top-1 in percent of the paper's kNN (k 200, temperature 0.1) on `test`, with bank `train`."""
    bank, queries = (extract_features(encoder, x, dtype, side=side) for x in (train, test))
    scores = knn_scores(bank, train.labels, queries, len(train.classes))
    return top_k(scores, test.labels)[0]


# ------------------------------------------------------------------------------------ run folder


def write_aside(path, data):
    """Write bytes to a file beside `path`, then rename it: `path` never holds half of them."""
    aside = path.with_name(path.name + ".part")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it takes the other's place
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_records(path, records):
    """Write a log, a line of JSON a record, whole or not at all."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    write_aside(path, text.encode())


def read_records(path):
    """The records of a log; none if it is not there."""
    with blaming(f"{path} is damaged", "move it away"):
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_record(path, record):
    """Add a record to a log."""
    write_records(path, [*read_records(path), record])


def unused(path):
    """`path`, or the first of path-2, path-3, ... that does not exist."""
    tries = itertools.chain([path], (f"{path}-{count}" for count in itertools.count(2)))
    return next(path for path in tries if not os.path.exists(path))


def begin_run(args, data, device, dtype):
    """Check the batch against the data, make a new run's folder (args.output), say what is trained.

    A new run's folder is args.output, if given, else a new one runs/METHOD-DATA, -2, ...; its log
    begins with a record of the arguments, versions and hardware.
    """
    if args.batch_size > len(data):
        limit = f"--batch-size {args.batch_size} exceeds the {len(data)} training images"
        raise UserError(f"{limit}: use --batch-size {len(data)} or less")
    about = describe(device, dtype)
    if not args.resume:
        folder = pathlib.Path(args.output or unused(f"runs/{args.method}-{args.data}"))
        if (folder / "log.jsonl").exists() or (folder / "checkpoint.pt").exists():
            raise UserError(f"{folder} holds a run: --resume it, or name another --output")
        folder.mkdir(parents=True, exist_ok=True)
        args.output = str(folder)
        append_record(folder / "log.jsonl", {"arguments": saved_arguments(args), **about})
    print(
        f"{args.method} on {args.data}: {len(data):,} images of {data.side} px, "
        f"{about['precision']} on {about['hardware']} -> {args.output}"
    )
    hidden = ("method", "data", "data_dir", "device", "amp", "output")
    chosen = {name: v for name, v in saved_arguments(args).items() if name not in hidden}
    print("  ".join(f"{name} {value}" for name, value in chosen.items()))
    if device.type == "cpu" and args.arch != "conv4":
        data = args.data if args.data != "folder" else f'"folder:{args.data_dir}"'
        laptop = f"python {args.method}.py --data {data} --arch conv4 --epochs 20"
        print(f"no GPU: watch the estimate that follows; for a laptop: {laptop}")
    sys.stdout.flush()


@contextlib.contextmanager
def running(args):
    """Around a run: say what to type next, when it is over or stopped by Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        command = f"python {args.method}.py --output {args.output} --resume"
        raise KeyboardInterrupt(f"Go on with: {command}") from None
    print(f"next: python knn_eval.py {args.output}\n      python linear_eval.py {args.output}")


def saved_arguments(args):
    """The arguments that a run keeps."""
    return {name: value for name, value in vars(args).items() if name not in ("resume", "views")}


def resume_run(method, given):
    """The run in given["output"] -> its arguments; its checkpoint, None if killed before the first.

    given: the arguments on the command line; all but the data folder and the device must be the
    run's own. Cuts the log back to the checkpoint. Raises UserError if there is no run of `method`.
    """
    folder = pathlib.Path(given["output"] or "")
    records = read_records(folder / "log.jsonl") if given["output"] else []
    if not records or "arguments" not in records[0]:
        remedy = "name its folder with --output, or leave out --resume to start one"
        raise UserError(f"no run to continue in {given['output'] or 'an unnamed folder'}: {remedy}")
    checkpoint = read_checkpoint(folder) if (folder / "checkpoint.pt").exists() else None
    saved = (checkpoint or records[0])["arguments"]
    if saved.get("method") != method:
        raise UserError(f"{folder} is a run of {saved.get('method')}.py: continue it with that")
    for name, value in given.items():
        free = ("data_dir", "device", "output", "resume", "views")
        if name not in free and saved.get(name) != value:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{folder} has {option} {saved.get(name)}: leave {option} out")
    last = checkpoint["epoch"] if checkpoint else -1
    write_records(folder / "log.jsonl", [r for r in records if r.get("epoch", -1) <= last])
    return {**saved, **given}, checkpoint


def describe(device, dtype):
    """What numbers depend on besides the arguments: versions, commit, hardware, precision."""
    git = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        cpu = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", platform.machine())
        hardware = f"{cpu}, {torch.get_num_threads()} threads"
    versions = {module.__name__: module.__version__ for module in (torch, torchvision, numpy)}
    versions |= {"python": platform.python_version(), "system": platform.system()}
    precision = str(dtype or torch.float32).removeprefix("torch.")
    return {**versions, "commit": commit or None, "hardware": hardware, "precision": precision}


def save_run(args, epoch, data, model, optimizer, scaler, generator):
    """Write the run's checkpoint.pt, a dict of tensors and plain values; never half of it."""
    checkpoint = {
        "arguments": saved_arguments(args),
        "epoch": epoch,
        "stem": stem_for(args.image_size),
        "mean": data.mean,
        "std": data.std,
        "student_encoder": model.student.encoder.state_dict(),
        "teacher_encoder": model.teacher.encoder.state_dict(),
        "model": model.state_dict(),  # shares the encoders' tensors, which are written once
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "generator": generator.get_state(),
    }
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_aside(pathlib.Path(args.output) / "checkpoint.pt", buffer.getbuffer())


def restore_run(checkpoint, model, optimizer, scaler, generator):
    """Put everything back where save_run found it -> the epoch to go on with."""
    with ours("checkpoint.pt"):
        model.load_state_dict(checkpoint["model"])
        settings = optimizer.state_dict()["param_groups"]  # this device's, not the saved
        optimizer.load_state_dict({**checkpoint["optimizer"], "param_groups": settings})
        scaler.load_state_dict(checkpoint["scaler"])
        generator.set_state(checkpoint["generator"])
        return checkpoint["epoch"] + 1


def ours(path):
    """Around using a checkpoint: what a damaged, foreign or hostile one causes becomes a UserError.

    Not what speaks for itself, such as a full GPU or disk.
    """
    what = f"{path} is not a checkpoint of this project, or is damaged"
    remedy = "name a run folder or its checkpoint.pt"
    return blaming(what, remedy, spared=(OSError, torch.cuda.OutOfMemoryError))


def read_checkpoint(path):
    """A run folder or its checkpoint.pt -> its dict, on the CPU.

    Only tensors and plain values are unpickled, so a malicious file can run nothing. Raises
    UserError if it is missing or not ours.
    """
    path = pathlib.Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no checkpoint {path}: name a run's folder, such as runs/ressl-textures")
    with ours(path):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        arguments, epoch = dict(checkpoint["arguments"]), int(checkpoint["epoch"])
        return {**checkpoint, "arguments": arguments, "epoch": epoch}


# ---------------------------------------------------------------------------------- command line

AMP = ("auto", "bf16", "fp16", "off")
RUN = dict(data_dir="data", subset=None, holdout=0, image_size=32, bn_splits=1)  # defaults of all
RUN |= dict(seed=0, device="auto", amp="auto")


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a UserError: one line instead of the usage text."""

    def __init__(self, **settings):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=layout, allow_abbrev=False, **settings)

    def error(self, message):
        raise UserError(f"{message} (see python {self.prog} --help)")


def number(kind, low, high=math.inf):
    """argparse type: a finite number of `kind` (int or float) from `low` to `high`."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high and math.isfinite(kind(text)):
                return kind(text)
        limits = f"of at least {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
        whole = "whole " if kind is int else ""
        raise argparse.ArgumentTypeError(f"give a {whole}number {limits}, not {text!r}")

    return parse


def picture_path(text):
    """argparse type: a PNG file to write, in a folder that exists."""
    path = pathlib.Path(text)
    if path.suffix.lower() != ".png" or not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"give NAME.png in an existing folder, not {text!r}")
    return path


def add_option(parser, recipes, name, kind, text, **settings):
    """Add --name, whose help tells CIFAR's default, and the other data sets' where they differ."""
    usual = recipes["cifar10"][name]
    others = [f"; {data} {r[name]}" for data, r in recipes.items() if r[name] != usual]
    text += f" (default: {usual}{''.join(others)})"
    parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text, **settings)


def training_arguments(parser, argv, recipes, method):
    """The command line, completed by the data set's recipe -> arguments, None.

    With --resume, completed by the saved arguments -> arguments, the checkpoint to continue.
    """
    given = {k: value for k, value in vars(parser.parse_args(argv)).items() if value is not None}
    given = {"output": None, "resume": False, **given}
    kind, _, path = given.get("data", "textures").partition(":")
    if kind == "folder" and (path or given["data"] == kind):  # found from wherever it is resumed
        path = pathlib.Path(path or given.get("data_dir", RUN["data_dir"]))
        given |= {"data": kind, "data_dir": str(path.expanduser().resolve())}
    if given["resume"]:
        saved, checkpoint = resume_run(method, given)
        return argparse.Namespace(**{**recipes["cifar10"], "views": None, **saved}), checkpoint
    data = recipe = given.setdefault("data", "textures")
    if data == "folder":  # the recipe is that of images of the same size
        recipe = "cifar10" if given.setdefault("image_size", 64) <= 40 else "tiny-imagenet"
    if recipe not in recipes:
        raise UserError(f"unknown data set {data!r}: choose {', '.join(recipes)}, folder:PATH")
    arguments = {"method": method, "views": None, **recipes[recipe], **given}
    if "lr" not in given:
        arguments["lr"] *= arguments["batch_size"] / 256
    batch, splits = arguments["batch_size"], arguments["bn_splits"]
    if batch % splits or batch < 2 * splits:
        raise UserError(
            f"--bn-splits {splits} cannot split --batch-size {batch} into equal groups of at least "
            f"2: use --batch-size {max(2, round(batch / splits)) * splits}"
        )
    return argparse.Namespace(**arguments), None


def evaluation_parser(prog, description):
    """The options that both evaluations have."""
    parser = Parser(prog=prog, description=description)
    option = parser.add_argument
    option("run", help="a run folder, or its checkpoint.pt")
    option("--branch", choices=("student", "teacher"), default="student")
    option("--data-dir", help="where the data set is (default: as the run)")
    option("--subset", type=number(int, 1), help="training images (default: the run's)")
    option("--holdout", type=number(int, 0), help="of them to test on (default: the run's)")
    option("--image-size", type=number(int, 16), help="the encoder's input (default: the run's)")
    option("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    option("--amp", choices=AMP, default="auto", help="mixed precision")
    return parser


def open_evaluation(args):
    """-> frozen encoder, train and test Images, all on the device; precision; protocol (a dict).

    Sets args.image_size, where it is not given, to the run's. Raises UserError without labels.
    """
    device = pick_device(args.device)
    dtype = pick_precision(args.amp, device)
    checkpoint = read_checkpoint(args.run)
    encoder = load_encoder(checkpoint, args.branch)
    encoder.to(device, memory_format=memory_format(device))
    with ours(args.run):
        saved = {**RUN, **checkpoint["arguments"], "epoch": checkpoint["epoch"]}
        chosen = ("subset", "holdout", "image_size")
        for name in ("data_dir", *chosen):
            if getattr(args, name) is not None:
                saved[name] = getattr(args, name)
        args.image_size = saved["image_size"]
        _, train, test = load_splits(argparse.Namespace(**saved), device, pretrain=False)
        known = ("method", "data", "data_dir", "arch", "epoch", "seed", *chosen)
        protocol = {name: saved[name] for name in known} | {"branch": args.branch}
    if train is None:
        need = "an evaluation needs labels: make train/CLASS/ and val/CLASS/ of some pictures"
        raise UserError(f"no labels in {saved['data_dir']}, and {need}")
    protocol |= {"train_images": len(train), "test_images": len(test), **describe(device, dtype)}
    return encoder, train, test, dtype, protocol


def report(run, protocol, result):
    """Print an evaluation's protocol and numbers, and append them to the run's evals.jsonl."""
    print(", ".join(f"{name} {value}" for name, value in protocol.items()))
    print("  ".join(f"{name.replace('_', ' ')} {value:.2f} %" for name, value in result.items()))
    folder = pathlib.Path(run)
    folder = folder if folder.is_dir() else folder.parent
    append_record(folder / "evals.jsonl", {**protocol, **result})


def progress(epoch, epochs, steps, device, estimate):
    """Yield the steps of an epoch under a progress bar; with `estimate`, tell the run's length."""
    bar = tqdm.tqdm(range(steps), f"epoch {epoch}/{epochs}", leave=False, disable=None)
    start = None
    for step in bar:
        if estimate and step == 1:  # the first step, slower than the others, is over
            torch.zeros(1, device=device).item()  # waits for the device, twice in a run
            start = time.perf_counter()
        elif start and (step == 10 or time.perf_counter() - start > 5):
            torch.zeros(1, device=device).item()
            seconds = (time.perf_counter() - start) / (step - 1) * steps * epochs
            tqdm.tqdm.write(f"{epochs} epochs of training will take about {duration(seconds)}")
            start = None
        yield step


def duration(seconds):
    """12.3 -> "12 s", 750 -> "12.5 min", 9000 -> "2.5 h"."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds > 1.6 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def peak_memory(device):
    """Bytes at most in use so far: on the GPU, or by the process; None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(ImportError):  # Windows
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if platform.system() == "Darwin" else peak * 1024


def save_picture(path, columns, enlarge=3):
    """Write columns of images, float (n, 3, S, S) in [0, 1], side by side to a PNG file.

    They are drawn as large as the first column's.
    """
    side = columns[0].shape[-1]
    columns = [resized(column.cpu(), side) for column in columns]
    images = torch.stack(columns, dim=1).flatten(0, 1)
    images = images.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    torchvision.utils.save_image(images, path, nrow=len(columns), padding=2, pad_value=1)
    print(f"written: {path}")
