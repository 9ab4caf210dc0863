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

Sections: errors | images | textures | splits | augmentation | encoders | device and precision |
features and kNN | command line | evaluation | run folder | a run's epochs | pictures
"""

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import io
import json
import math
import os
import pathlib
import subprocess
import sys
import textwrap
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


sys.version_info >= (3, 10) or sys.exit("error: needs Python 3.10 or newer, from python.org")


class UserError(Exception):
    """Something that the user can mend. The message is one line and names the remedy."""


@contextlib.contextmanager
def blaming(what, remedy):
    """Inside, whatever is raised becomes a UserError: so let there be little inside."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what}: {remedy} ({' '.join(str(error).split())[:100]})") from None


def command(main):
    """Decorate a script's main(argv): what the user can mend becomes one line and exit code 2."""

    @functools.wraps(main)
    def wrapped(argv=None):
        for stream in (sys.stdout, sys.stderr):  # a name that the console has no letters for
            getattr(stream, "reconfigure", dict)(errors="backslashreplace")
        try:
            return main(argv)
        except KeyboardInterrupt as error:
            code, message = 130, f"\nstopped. {error}"
        except torch.cuda.OutOfMemoryError:
            code, message = 2, "error: out of GPU memory: lower --batch-size or --image-size"
        except (UserError, OSError) as error:  # OSError: a full disk, a folder without rights, ...
            code, message = 2, "error: " + " ".join(str(error).split())
            if isinstance(error, OSError):
                message += ": check path, rights and disk; a run that stopped goes on with --resume"
        print(message, file=sys.stderr)
        raise SystemExit(code)

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
DOWNLOAD = "with a network connection try again; without one put this there yourself: "
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


@dataclass
class Images:
    """A set of square images, held whole in memory: N * S * S * 3 bytes."""

    images: torch.Tensor  # (N, 3, S, S) uint8
    labels: torch.Tensor  # (N,) int64, or None
    classes: list  # class names
    mean: tuple  # per channel, for images in [0, 1]
    std: tuple
    names: numpy.ndarray = None  # (N,) of each image its file, or its number in the set

    def __len__(self):
        return len(self.images)

    def take(self, index):
        """The images at `index`, (n,) or a slice, as a set of its own."""
        index = torch.arange(len(self))[index].numpy()  # a tensor of one is a number to numpy
        whole = {"images": self.images, "labels": self.labels, "names": self.names}
        return replace(self, **{n: x if x is None else x[index] for n, x in whole.items()})

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
    Returns Images on the CPU. Raises UserError for an unknown name or split, and for files that are
    missing and cannot be downloaded, or are broken.
    """
    kind, _, path = name.partition(":")
    if kind not in MEAN_STD or (path and kind != "folder") or name == "folder:":
        names = f"folder:{name}" if os.path.isdir(name) else f"{', '.join(MEAN_STD)}:PATH"
        raise UserError(f"unknown data set {name!r}: choose {names}")
    if split not in ("pretrain", "train", "test"):
        raise UserError(f"unknown split {split!r}: choose pretrain, train or test")
    if kind == "textures":
        return render_textures(*((1000, 1) if split == "test" else (5120, 0)))
    if kind in ("folder", "tiny-imagenet"):
        find, side = (list_folder, side) if kind == "folder" else (list_tiny_imagenet, 64)
        files, labels, classes, over = find(pathlib.Path(path or root).expanduser(), split)
        print(f"{split}: {len(files):,} pictures, {3e-9 * len(files) * side**2:.2f} GB{over}")
        images, labels, names = read_pictures(files, labels, side)
    else:
        images, labels, classes = read_arrays(kind, root, split)
        names = numpy.arange(len(images))
    return Images(images, labels, classes, *MEAN_STD[kind], names)


def read_arrays(name, root, split):
    """CIFAR and STL-10, by torchvision -> images (N, 3, S, S) uint8, labels or None, classes."""
    dataset, options = getattr(torchvision.datasets, name.upper()), {"train": split != "test"}
    if name == "stl10":
        options = {"split": {"pretrain": "train+unlabeled"}.get(split, split)}
    # What is there already has its MD5 sums checked only.
    with blaming(f"cannot read or download {name} in {root}", DOWNLOAD + dataset.url):
        data = dataset(root, download=True, **options)
        images, classes = torch.from_numpy(data.data), data.classes
    if name == "stl10":
        labels = None if split == "pretrain" else torch.tensor(data.labels, dtype=torch.int64)
        return images.contiguous(), labels, classes
    return images.permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets), classes


def list_files(folder):
    """All files in `folder` and in the folders in it, in the same order everywhere; none hidden.

    A folder in it may be a link to one elsewhere; a link further down is not followed.
    """
    inside = (f for top in folder.iterdir() for f in (top, *top.rglob("*")) if f.is_file())
    shown = (f for f in inside if "/." not in f"/{f.relative_to(folder).as_posix()}")
    return sorted(shown, key=lambda file: file.parts)


def list_folder(folder, split):
    """One's own pictures -> files, labels or None, class names, what is passed over (in words).

    train/CLASS/ and val/CLASS/ (or test/CLASS/); without class folders in train/ all pictures of
    train/, or of the whole folder where there is no train/: unlabelled. A picture is what has an
    ending that Pillow opens, and a class what has pictures.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: check the path")
    opens = lambda file: Image.registered_extensions().get(file.suffix.lower()) in Image.OPEN
    part = train = folder / "train" if (folder / "train").is_dir() else folder
    below = [f for f in list_files(train) if opens(f) and train not in (folder, f.parent)]
    classes = sorted({file.relative_to(train).parts[0] for file in below})
    if split == "test" and classes:
        part = folder / "val" if (folder / "val").is_dir() else folder / "test"
        if not part.is_dir():
            raise UserError(f"no val or test in {folder}: make val/CLASS/, or use --holdout N")
    found = list_files(part)
    files = [f for f in found if opens(f) and not (classes and f.parent == part)]
    names = [file.relative_to(part).parts[0] for file in files]  # of classes, if there are some
    own = set(names)
    if classes and (new := own - set(classes)):
        raise UserError(f"remove from {part} the classes that {train} has not: {sorted(new)}")
    beside = {*found, *part.glob("[!.]*/"), *folder.glob("[!.]*.*")}.difference(files)
    kinds = [f.suffix.lower() if f.is_file() else f"{f.name}/" for f in beside if f.name not in own]
    over = ", ".join(f"{n} {kind}" for kind, n in sorted(collections.Counter(kinds).items()))
    over = "; passed over: " * bool(over) + over
    if not files:
        raise UserError(f"no pictures in {part}{over}: put some there, or into train/CLASS/")
    return files, [classes.index(name) for name in names] if classes else None, classes, over


def list_tiny_imagenet(root, split):
    """As list_folder; classes are WordNet's numbers. Downloads and unpacks what is missing."""
    folder, aside = root / "tiny-imagenet-200", root / "tiny-imagenet-200.part"
    if not folder.is_dir():  # unpacked aside, so that half of it is never taken for the whole
        with blaming(f"cannot download tiny-imagenet to {root}", DOWNLOAD + TINY_IMAGENET):
            download_and_extract_archive(TINY_IMAGENET, root, aside, md5=TINY_IMAGENET_MD5)
            (aside / folder.name).rename(folder)
            aside.rmdir()
    with blaming(f"{folder} is not complete", "remove it, and it is unpacked or downloaded anew"):
        files, labels, classes, _ = list_folder(folder, "train")
        if split == "test":  # all in one folder; a line a picture: file, class, box
            lines = (folder / "val" / "val_annotations.txt").read_text().splitlines()
            files = [folder / "val" / "images" / line.split("\t")[0] for line in lines]
            labels = [classes.index(line.split("\t")[1]) for line in lines]
    return files, labels, classes, ""


def read_pictures(files, labels, side):
    """Decode picture files on all cores -> uint8 (N, 3, side, side), labels (N,) int64 or None,
    their files (N,). Broken ones are named and left out. Raises UserError if none is left.
    """
    intact = torch.ones(len(files), dtype=torch.bool)
    images = torch.empty(len(files), 3, side, side, dtype=torch.uint8)
    pixels = images.permute(0, 2, 3, 1).numpy()  # the same memory, as Pillow counts the axes

    def read(i):
        try:
            pixels[i] = numpy.asarray(read_picture(files[i], side))
        except Exception as error:  # Pillow's decoders raise errors of all kinds
            intact[i] = False
            print(f"left out, for it cannot be read: {files[i]} ({error})")

    # A thread a core: Pillow lets go of the interpreter; more would wait for each other.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(tqdm.tqdm(pool.map(read, range(len(files))), "reading", len(files), disable=None))
    if not intact.any():
        raise UserError(f"none of {len(files)} pictures can be read: see above")
    images = images if intact.all() else images[intact]
    labels = None if labels is None else torch.tensor(labels)[intact]
    return images, labels, numpy.array(files, str)[intact.numpy()]


def read_picture(file, side):
    """A picture file of any kind and size -> PIL image, RGB: short side resized, centre cropped."""
    with Image.open(file) as picture:
        picture.draft("RGB", (side, side))  # JPEG: decode at 1/2, 1/4 or 1/8, if that is enough
        ImageOps.exif_transpose(picture, in_place=True)  # as the camera was held
        if picture.mode[0] in "IF":  # more than 8 bits a pixel, in a range of the picture's own
            grey = numpy.nan_to_num(numpy.asarray(picture, "float32"), posinf=0, neginf=0)
            grey = (grey - grey.min()) * (255 / max(grey.max() - grey.min(), 1e-9))
            picture = Image.fromarray(grey.round().astype("uint8"))
        if picture.mode[-1] == "A" or "transparency" in picture.info:
            # On mid-grey, where black and white shapes both show.
            grey = Image.new("RGBA", picture.size, (128, 128, 128))
            picture = Image.alpha_composite(grey, picture.convert("RGBA"))
        picture = picture.convert("RGB")
        return transforms.center_crop(transforms.resize(picture, [side]), [side])


# -------------------------------------------------------------------------------------- textures


# A sine of period 1 with soft steps for flanks, in [-1, 1].
wave = lambda t: torch.tanh(4 * torch.sin(2 * math.pi * t))
# The ten families. u, v: the image's own axes, in periods; r: distance from its centre, in periods;
# a: angle around it, in turns. -> brightness, -1 to 1.
TEXTURES = {
    "stripes": lambda u, v, r, a: wave(u),
    "checks": lambda u, v, r, a: wave(u) * wave(v),
    "dots": lambda u, v, r, a: torch.tanh(4 * ((6.283 * u).sin() + (6.283 * v).sin() - 0.8)),
    "rings": lambda u, v, r, a: wave(r),
    "zigzag": lambda u, v, r, a: wave(u + 1.5 * (v.remainder(1) - 0.5).abs()),
    "bricks": lambda u, v, r, a: (6 * torch.minimum(v % 1, (u + v.floor()) % 2) - 1.2).tanh(),
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
    uniform = lambda low, high: torch.rand(count, 1, 1, generator=generator) * (high - low) + low
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
    return Images(images, labels, list(TEXTURES), *MEAN_STD["textures"], numpy.arange(count))


# ---------------------------------------------------------------------------------------- splits


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
    train, more = load("train"), 100_000 if args.data == "stl10" else 0
    kept = len(train) - args.holdout
    if kept < 1 or (args.subset or 1) > kept + more:
        raise UserError(f"--subset and --holdout do not fit {len(train) + more} images: lower them")
    everything = args.subset is None and not args.holdout
    fixed = lambda: torch.Generator().manual_seed(0)
    order = lambda n: torch.arange(n) if everything else torch.randperm(n, generator=fixed())
    index = order(len(train))
    data = bank = train.take(index[:kept][: args.subset]).to(device)
    if more and pretrain:
        data = load("pretrain")  # the labelled ones come first
        both = torch.cat([index[:kept], torch.arange(len(train), len(data))])
        data = data.take(both[order(len(both))][: args.subset]).to(device)
    if train.labels is None:
        print("no train/CLASS/, so no labels: no kNN and no linear probe")
        return data, None, None
    test = train.take(index[kept:]) if args.holdout else load("test")
    return data if pretrain else None, bank, test.to(device)


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
    draws = [draw.float() if draw.is_floating_point() else draw for draw in draws]
    flat = torch.cat([draw.flatten().float() for draw in draws])  # holds indices up to 2**24
    if images.is_cuda:
        flat = flat.pin_memory()  # so that the copy does not wait for the device
    parts = flat.to(images.device, non_blocking=images.is_cuda).split([x.numel() for x in draws])
    return [part.view_as(draw).to(draw.dtype) for part, draw in zip(parts, draws, strict=True)]


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
    start, length = torch.stack([top, left, height, width]).to(images.dtype).split(2)
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
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)]
            layers += [nn.MaxPool2d(2, ceil_mode=True)]  # ceil: a 14-pixel crop passes too
            layers += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


ARCHITECTURES = ("conv4", "resnet18", "resnet34", "resnet50", "mobilenet_v2", "mobilenet_v3_large")
ARCHITECTURES += ("efficientnet_b0", "shufflenet_v2_x1_0")

STEMS = {"imagenet": 0, "medium": 1, "small": 2}  # how many layers less halve the map


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
    for name, known in ((arch, ARCHITECTURES), (stem, STEMS)):
        if name not in known:
            raise UserError(f"unknown architecture or stem {name!r}: choose {', '.join(known)}")
    if arch == "conv4":
        encoder = Conv4()
    else:
        encoder = getattr(torchvision.models, arch)(weights=None)
        head = "fc" if hasattr(encoder, "fc") else "classifier"
        linear = (m for m in getattr(encoder, head).modules() if isinstance(m, nn.Linear))
        encoder.dim = next(linear).in_features
        setattr(encoder, head, nn.Identity())
        swap_stem(encoder, stem)
    for module in encoder.modules():  # as for training from scratch [ours]
        if isinstance(module, torchvision.ops.StochasticDepth):
            module.p = 0.0
        elif isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
            if bn_splits > 1:  # the same layer, computed in groups
                module.__class__, module.splits = SplitBatchNorm2d, bn_splits
    return encoder


def swap_stem(encoder, stem):
    """Let the first one ("medium") or two ("small") of the layers that halve the map keep it."""
    kinds, layers = (nn.Conv2d, nn.MaxPool2d), encoder.named_modules()
    halving = [x for x in layers if isinstance(x[1], kinds) and x[1].stride in (2, (2, 2))]
    for name, layer in halving[: STEMS[stem]]:
        if isinstance(layer, nn.MaxPool2d):
            setattr(encoder, name, nn.Identity())
        elif layer.kernel_size == (7, 7):
            encoder.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        else:
            layer.stride = (1, 1)


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm as on `splits` devices without synchronisation: in training, each of `splits` equal
    groups of the batch has its own statistics; the running ones follow their mean [code].

    Its parameters and buffers, and what it does in eval mode, are BatchNorm2d's. build_encoder sets
    .splits.
    """

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        means, variances = (b.repeat(self.splits, 1) for b in (self.running_mean, self.running_var))
        groups = zip(x.chunk(self.splits), means, variances, strict=True)  # moves each one's own
        settings = (self.weight, self.bias, True, self.momentum, self.eps)
        y = torch.cat([F.batch_norm(*group, *settings) for group in groups])
        self.running_mean.copy_(means.mean(0))
        self.running_var.copy_(variances.mean(0))
        self.num_batches_tracked.add_(1)
        return y


def load_encoder(checkpoint, branch="student"):
    """The trained encoder of a run, frozen, in eval mode, on the CPU.

    checkpoint: a run folder or its checkpoint.pt. branch: "student", "teacher", or "untrained", the
    random weights that both began with (the same for the same version of PyTorch).
    Feed it images normalised by the run's own mean and std. Raises UserError if it cannot be read.
    """
    saved = read_checkpoint(checkpoint)
    with blaming(f"no {branch} encoder of this project in {checkpoint}", NAME_A_RUN):
        with torch.random.fork_rng([]):
            torch.manual_seed(saved["arguments"]["seed"])
            encoder = build_encoder(saved["arguments"]["arch"], saved["stem"])
        if branch != "untrained":
            encoder.load_state_dict(saved[f"{branch}_encoder"])
    return encoder.eval().requires_grad_(False)


# -------------------------------------------------------------------------- device and precision


def pick_device(name):
    """Device name (auto, cpu, cuda, cuda:1, mps) -> torch.device. UserError if it is not there."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    with blaming(f"no device {name!r} here", "use --device auto or cpu"):
        device = torch.device(name)
        if device.type == "cuda" and device.index:
            torch.cuda.set_device(device)  # so that nothing is put on the first GPU
        torch.ones(1, device=device).item()
    torch.backends.cudnn.benchmark = True  # shapes stay the same: look for the fastest kernels
    return device


def pick_precision(amp, device):
    """--amp auto | bf16 | fp16 | off -> torch.bfloat16, torch.float16 or None (float32)."""
    if device.type == "mps" and amp in ("bf16", "fp16"):
        raise UserError(f"--amp {amp} is not supported on mps: use --amp off")
    if amp == "auto" and device.type == "cuda":  # older cards only emulate bf16
        amp = "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    elif amp == "auto" and device.type == "cpu":
        known = getattr(torch.cpu, "get_capabilities", dict)()
        able = any(map(known.get, ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16")))
        amp = "bf16" if able else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)


def promote(features):
    """Half types -> float32, where sums and exponentials need it; float64 stays float64."""
    return features.float() if features.dtype in (torch.float16, torch.bfloat16) else features


def embed(network, images, dtype):
    """What a network makes of images, in mixed precision (dtype None: off) -> float32.

    Only networks run in half precision: what follows, from unit length to the loss, is computed in
    float32, for exponentials and sums need its digits.
    """
    with torch.autocast(images.device.type, dtype) if dtype else contextlib.nullcontext():
        return promote(network(images))


def memory_format(device):
    """Of networks and their inputs: channels_last, for which convolutions are fast.

    Not on mps, where BatchNorm's gradients are then wrong (pytorch issue 175189).
    """
    return torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last


def normalizer(data, device):
    """-> a function: images (N, 3, S, S) in [0, 1] -> network input, normalised, channels_last."""
    # The two small tensors are made once: made in the step, each would be a copy to the device.
    scale = 1 / torch.tensor(data.std, device=device).view(3, 1, 1)
    shift = -torch.tensor(data.mean, device=device).view(3, 1, 1) * scale
    return lambda x: torch.addcmul(shift, x, scale).contiguous(memory_format=memory_format(device))


# ------------------------------------------------------------------------------ features and kNN


@torch.no_grad()
def extract_features(encoder, data, dtype=None, batch_size=500, side=None):
    """Pooled features of every image of `data`, without augmentation, in eval mode -> (N, D).

    side: resize the images to so many pixels first, if they have not.
    """
    training, features, normalize = encoder.training, [], normalizer(data, data.images.device)
    encoder.eval()
    for images in tqdm.tqdm(data.images.split(batch_size), "features", leave=False, disable=None):
        images = normalize(transforms.resize(images / 255, [side or data.images.shape[-1]]))
        features.append(embed(encoder, images, dtype))
    encoder.train(training)
    return torch.cat(features)


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
    """Top-1 and top-5 accuracy in percent of scores (M, classes), labels (M,).

    A class with a score of -inf is never right. Top-5 is None for five classes or fewer. Raises
    UserError for scores that are not numbers, of which any ranking would come to some accuracy.
    """
    if not (scores < math.inf).all():
        raise UserError("features are not finite: the run diverged, start one with a lower --lr")
    top = scores.topk(min(5, scores.shape[1]))
    hits = (top.indices == labels[:, None]) & (top.values > -math.inf)
    top1, top5 = (100 * hit.sum().item() / len(labels) for hit in (hits[:, 0], hits.any(1)))
    return top1, top5 if scores.shape[1] > 5 else None


def knn_accuracy(encoder, train, test, dtype=None, side=None):
    """Top-1 in percent of the paper's kNN (k 200, temperature 0.1) on `test`, with bank `train`."""
    bank, queries = (extract_features(encoder, x, dtype, side=side) for x in (train, test))
    scores = knn_scores(bank, train.labels, queries, len(train.classes))
    return top_k(scores, test.labels)[0]


# ---------------------------------------------------------------------------------- command line

AMP = ("auto", "bf16", "fp16", "off")
NAME_A_RUN = "name a run's folder, such as runs/ressl-textures, or its checkpoint.pt"


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with each option's default, and the description as it is."""


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a UserError: one line instead of the usage text."""

    def __init__(self, **settings):
        super().__init__(formatter_class=Help, allow_abbrev=False, **settings)

    def error(self, message):
        raise UserError(f"{message} (see python {self.prog} --help)")


def number(kind, low, high=1e300):
    """argparse type: a number of `kind` (int or float) from `low` to `high`."""

    def parse(text):
        if not low <= kind(text) <= high:
            raise ValueError
        return kind(text)

    parse.__name__ = "whole " * (kind is int) + f"number ({low:g} to {high:g})"  # for the message
    return parse


whole, real = functools.partial(number, int), functools.partial(number, float)


def file_path(ending, text):
    """A file to write, with that ending, in a folder that exists."""
    path = pathlib.Path(text)
    if path.suffix != ending or not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"give NAME{ending} in an existing folder, not {text!r}")
    return path


# argparse types
png, npz, csv = (functools.partial(file_path, ending) for ending in (".png", ".npz", ".csv"))


def add_shared_options(option):
    """Options of training and evaluations: which images, where they are, and on what to compute."""
    option("--data-dir", default="data", help="where the data set is, or is downloaded to")
    option("--subset", type=whole(1), help="of the shuffled training images the first N; None: all")
    option("--holdout", type=whole(0), default=0, help="of them the last N, to test on instead")
    option("--image-size", type=whole(16, 4096), default=32, help="side of the encoder's input")
    option("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    option("--amp", choices=AMP, default="auto", help="mixed precision; auto: bf16 where fast")


# What may be another one where a run is resumed; over --epochs its schedule is then stretched.
FREE = ("data_dir", "device", "amp", "knn_every", "output", "resume", "views", "epochs")
BUSY = "where other programs use the cores, start as OMP_NUM_THREADS=1 python ..."


def training_arguments(parser, argv, recipes):
    """The command line -> arguments; the checkpoint to continue, or None.

    It is parsed twice: first for the data set, or the run to resume; then with that set's recipe,
    or that run's arguments, in place of the options' own defaults. args.given: the options that are
    on it, until fit_batch takes them.
    """
    words, method = sys.argv[1:] if argv is None else argv, parser.prog.removesuffix(".py")
    given = {word.partition("=")[0] for word in words}
    first = parser.parse_args([word for word in words if word not in ("-h", "--help")])
    kind, colon, path = first.data.partition(":")
    folder, checkpoint = kind == "folder" and bool(colon) == bool(path), None
    if first.resume:
        checkpoint = read_checkpoint(first.output or "without --output RUN")
        defaults, given = checkpoint["arguments"], {"--batch-size", "--lr", "--queue-size"}
        if defaults["method"] != method:
            raise UserError(f"{first.output} is a run of {defaults['method']}.py: use that")
    else:  # an unknown name is refused where it is read
        small = "--image-size" in given and first.image_size <= 40
        defaults = {} if folder and small else recipes.get(kind, {})  # a small folder's: CIFAR's
    parser.set_defaults(**{"method": method, **defaults})
    args = parser.parse_args(words)
    if folder or args.data == "folder":  # found from wherever it is resumed
        path = pathlib.Path(path or args.data_dir).expanduser().resolve()
        args.data, args.data_dir = "folder", str(path)
    changed = {k: v for k, v in vars(args).items() if v != parser.get_default(k)}
    free = FREE if checkpoint is None or args.epochs >= checkpoint["epoch"] else FREE[:-1]
    if checkpoint and (fixed := changed.keys() - free):
        option, own = f"--{min(fixed).replace('_', '-')}", parser.get_default(min(fixed))
        raise UserError(f"the run has been trained with {option} {own}: leave {option} out")
    args.lr *= 1 if "--lr" in given else args.batch_size / 256
    if args.batch_size % args.bn_splits or args.batch_size < 2 * args.bn_splits:
        raise UserError("choose as --batch-size a multiple of --bn-splits, at least twice as large")
    place = ("data", "data_dir", "device", "output", "resume")
    tail = "".join(f"-{k.replace('_', '-')}-{v}" for k, v in changed.items() if k not in place)
    names = (f"runs/{method}-{args.data}{tail[:150]}" + f"-{i}" * (i > 1) for i in range(1, 10**6))
    args.output = args.output or next(name for name in names if not os.path.exists(name))
    args.given = given
    return args, checkpoint


def fit_batch(args, count):
    """Lower B, and lr with it, to what suits `count` images, unless it is given -> all that is."""
    given, step, batch = vars(args).pop("given"), 2 * args.bn_splits, args.batch_size
    if "--batch-size" not in given and 4 * batch > count >= step:
        args.batch_size = max(step, count // 4 // step * step)
        args.lr *= 1 if "--lr" in given else args.batch_size / batch
        print(f"for {count} images: --batch-size {args.batch_size}, --lr {args.lr:.4g}")
    if args.batch_size > count:
        fit = f"exceeds the {count} training images: lower it, or use more (a smaller --holdout)"
        raise UserError(f"--batch-size {args.batch_size} {fit}")
    return given


# ------------------------------------------------------------------------------------ evaluation


def open_evaluation(parser, argv):
    """-> arguments; frozen encoder, train and test Images, on the device; precision; protocol.

    parser: with an evaluation's own options; the shared ones are added here. What is not given of
    the images is the run's own. Raises UserError without labels.
    """
    option, branches = parser.add_argument, ("student", "teacher", "untrained")
    option("run", help="a run folder, or its checkpoint.pt")
    option("--branch", choices=branches, default="student", help="whose encoder")
    add_shared_options(option)
    checkpoint = read_checkpoint(parser.parse_args(argv).run)
    saved, images = checkpoint["arguments"], ("data", "data_dir", "subset", "holdout", "image_size")
    parser.set_defaults(**{name: saved[name] for name in images if name in saved})
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    dtype = pick_precision(args.amp, device)
    encoder = load_encoder(args.run, args.branch).to(device, memory_format=memory_format(device))
    _, train, test = load_splits(args, device, pretrain=False)
    if train is None:
        raise UserError(f"no labels in {args.data_dir}: make train/CLASS/ and val/CLASS/ there")
    protocol = {name: saved[name] for name in ("method", "arch", "seed")}
    protocol |= {name: getattr(args, name) for name in (*images, "branch")}
    epoch = 0 if args.branch == "untrained" else checkpoint["epoch"]
    protocol |= {"epoch": epoch, "train_images": len(train), "test_images": len(test)}
    return args, encoder, train, test, dtype, protocol | describe(device, dtype)


def report(run, protocol, result):
    """Print an evaluation's result, and append it with its protocol to the run's evals.jsonl."""
    path = pathlib.Path(run if os.path.isdir(run) else os.path.dirname(run), "evals.jsonl")
    write_records(path, [*read_records(path), {**protocol, **result}])
    known = {name.replace("_", " "): value for name, value in result.items() if value is not None}
    print("  ".join(f"{name} {value:.2f} %" for name, value in known.items()))
    print(textwrap.fill(str(protocol), 100))
    return result


# ------------------------------------------------------------------------------------ run folder

SAVE_EVERY = 30  # seconds between checkpoints at least; always one at epoch 0 and at the last


def write_aside(path, data):
    """Write bytes to a file beside `path`, then rename it: `path` never holds half of them."""
    aside = path.with_name(path.name + ".part")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # on the disk before it takes the other's place
    os.replace(aside, path)


def write_records(path, records):
    """Write a log, a line of JSON a record, whole or not at all."""
    write_aside(path, "".join(json.dumps(record) + "\n" for record in records).encode())


def read_records(path):
    """The records of a log; none if it is not there."""
    with blaming(f"{path} is damaged", "move it away"):
        return [dict(json.loads(line)) for line in path.open()] if path.exists() else []


@contextlib.contextmanager
def running(args, checkpoint, data, device, dtype):
    """Around a run: open its folder, say what is trained; in the end, what to type next.

    The log begins with a record of the arguments, versions and hardware. That of a run that is
    resumed is cut back to its checkpoint.
    """
    log, about = pathlib.Path(args.output, "log.jsonl"), describe(device, dtype)
    saved, begun = log.with_name("checkpoint.pt"), len(read_records(log)) > 2  # after epoch 0
    if checkpoint is None and (begun or saved.exists()):
        raise UserError(f"{args.output} holds a run: --resume it, or name another --output")
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{args.method} on {args.data}: {len(data):,} images -> {args.output}")
    print(textwrap.fill(str({**vars(args), **about}), 100))
    done, records = -1, [{"arguments": vars(args), **about}]
    if checkpoint:
        done, records = checkpoint["epoch"], read_records(log) or records
        print(f"continuing after epoch {done}, to epoch {args.epochs} and on its schedule")
    write_records(log, [record for record in records if record.get("epoch", -1) <= done])
    if device.type == "cpu" and args.arch != "conv4":
        laptop = f"python {args.method}.py --data {args.data} --arch conv4 --epochs 20"
        laptop += f' --batch-size 64 --lr 0.06 --data-dir "{args.data_dir}"'
        print(f"no GPU: watch the time to go; on a laptop: {laptop}")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0
    if device.type == "cpu" and torch.get_num_threads() > max(1, os.cpu_count() + 0.7 - load):
        print(f"load {load:.1f} here: {BUSY}")
    name = f'"{args.output}"' if " " in args.output else args.output  # to be pasted
    try:
        yield
    except KeyboardInterrupt:
        how = f"Go on with: python {args.method}.py --output {name} --resume"
        raise KeyboardInterrupt(how if saved.exists() else "Start it again") from None
    knn = {record.get("epoch"): record.get("student_knn") for record in read_records(log)}
    if knn.get(args.epochs) is not None:
        print(f"kNN: {knn.get(0, math.nan):.1f} % (untrained) -> {knn[args.epochs]:.1f} %")
        print(f"next: python knn_eval.py {name} --neighbors neighbors.png")
        print(f"      python linear_eval.py {name}\n      python docs/compare.py {name}")


def describe(device, dtype):
    """What numbers depend on besides the arguments: versions, commit, hardware, precision."""
    git = f'git -C "{pathlib.Path(__file__).parent}" describe --always --dirty'
    failed, commit = subprocess.getstatusoutput(git)
    cpu = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", "CPU")
    cpu = f"{cpu}, {torch.get_num_threads()} threads".replace(" 1 threads", " 1 thread")
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    versions = {module.__name__: module.__version__ for module in (torch, torchvision, numpy)}
    versions |= {"python": sys.version.split()[0], "system": sys.platform}
    versions |= {"commit": None if failed else commit, "hardware": hardware}
    return versions | {"precision": str(dtype or torch.float32).removeprefix("torch.")}


def save_run(args, epoch, data, model, optimizer, scaler, generator):
    """Write the run's checkpoint.pt, a dict of tensors and plain values; never half of it."""
    checkpoint = {"arguments": vars(args), "epoch": epoch, "stem": stem_for(args.image_size)}
    checkpoint |= {"mean": data.mean, "std": data.std, "generator": generator.get_state()}
    parts = {"student_encoder": model.student.encoder, "teacher_encoder": model.teacher.encoder}
    parts |= {"model": model, "optimizer": optimizer, "scaler": scaler}  # a tensor is written once
    checkpoint |= {name: part.state_dict() for name, part in parts.items()}
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_aside(pathlib.Path(args.output, "checkpoint.pt"), buffer.getbuffer())


def restore_run(checkpoint, model, optimizer, scaler, generator):
    """Put everything back where save_run found it -> the epoch to go on with; 0 without one."""
    with blaming("checkpoint.pt is not of this project, or is damaged", NAME_A_RUN):
        if checkpoint:
            model.load_state_dict(checkpoint["model"])
            settings = optimizer.state_dict()["param_groups"]  # this device's, not the saved
            optimizer.load_state_dict({**checkpoint["optimizer"], "param_groups": settings})
            scaler.load_state_dict(checkpoint["scaler"] or scaler.state_dict())  # fp16 has one
            generator.set_state(checkpoint["generator"])
        # Zeros before the first step: the fused one leaves them undefined if fp16 has to skip it.
        # And in this device's memory format.
        for p in optimizer.param_groups[0]["params"]:
            momentum = optimizer.state[p].get("momentum_buffer", 0)
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p) + momentum
    return checkpoint["epoch"] + 1 if checkpoint else 0


def read_checkpoint(path):
    """A run folder or its checkpoint.pt -> its dict, on the CPU.

    Only tensors and plain values are unpickled, so a malicious file can run nothing. Raises
    UserError if it is missing or not ours.
    """
    path = pathlib.Path(path, "checkpoint.pt") if os.path.isdir(path) else pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint {path}: {NAME_A_RUN}")
    with blaming(f"{path} is not a checkpoint of this project, or is damaged", NAME_A_RUN):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["arguments"]["method"], checkpoint["stem"], checkpoint["generator"]
        return {**checkpoint, "epoch": int(checkpoint["epoch"])}


# -------------------------------------------------------------------------------- a run's epochs


def batches(epoch, data, args, generator):
    """An epoch's shuffled batches, under a progress bar; the last, incomplete one is dropped.

    Yields the step, counted from the run's first, and images (B, 3, S, S) in [0, 1]. A batch is an
    index into the images, which lie on the device.
    """
    steps, size = len(data) // args.batch_size, args.batch_size
    order = torch.randperm(len(data), generator=generator).to(data.images.device)
    for i in progress(epoch, args.epochs, steps):
        yield (epoch - 1) * steps + i, data.images[order[i * size :][:size]] / 255  # from bytes


def progress(epoch, epochs, steps):
    """The steps of an epoch, under a bar that tells the time to go until the last one's end."""
    whole = {"total": steps * epochs, "initial": (epoch - 1) * steps}
    return tqdm.tqdm(range(steps), f"epoch {epoch}/{epochs}", leave=False, disable=None, **whole)


def end_epoch(args, epoch, start, scalars, splits, dtype, state, note=""):
    """Evaluate, log, print and save what an epoch has made; stop a run that has diverged.

    start: its time.perf_counter(). scalars: what is to be told of its training, by name; none for
    epoch 0. note: printed behind them.
    """
    (data, bank, test), model, log = splits, state[0], pathlib.Path(args.output, "log.jsonl")
    speed = len(data) // args.batch_size * args.batch_size / (time.perf_counter() - start)
    finite = all(p.isfinite().all() for p in model.parameters())
    if not finite or not all(map(math.isfinite, scalars.values())):
        raise UserError(f"training diverged in epoch {epoch} (a checkpoint is kept): lower --lr")
    record = {"epoch": epoch, **scalars}
    if bank is not None and (epoch % args.knn_every == 0 or epoch == args.epochs):
        for name in ("student", "teacher"):
            encoder = getattr(model, name).encoder
            record[f"{name}_knn"] = knn_accuracy(encoder, bank, test, dtype, args.image_size)
    record |= {"images_per_second": speed} if scalars else {}
    seconds, records = time.perf_counter() - start, read_records(log)
    record |= {"seconds": seconds, "peak_memory": peak_memory(data.images.device)}
    write_records(log, [*records, record])
    age = time.time() - os.path.getmtime(log.with_name("checkpoint.pt")) if epoch else math.inf
    if age > SAVE_EVERY or epoch == args.epochs:
        save_run(args, epoch, data, *state)
    print(epoch_line(record, args.epochs, note), flush=True)
    speeds = [each["images_per_second"] for each in records if each.get("images_per_second")]
    cpu = data.images.device.type == "cpu"  # a GPU's first epoch is slow in any case
    if cpu and speeds and 3 * speed < max(speeds) <= 3 * min(speeds):  # for the first time
        print(f"this epoch had less than a third of the fastest one's speed: {BUSY}")


def epoch_line(record, epochs, note=""):
    """What is printed of an epoch: the note, and what is logged but for its seconds and memory."""
    left = record["seconds"] * (epochs - record["epoch"]) / 60
    hidden = ("epoch", "seconds", "peak_memory")
    words = [f"{name} {value:.5g}" for name, value in record.items() if name not in hidden]
    words = [note, *words, f"{left:.1f} min to go"] if record["epoch"] else words
    return "  ".join([f"epoch {record['epoch']}/{epochs}", *filter(None, words)])


def peak_memory(device):
    """Bytes at most in use so far: on the GPU, or by the process; None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(ImportError):  # Windows
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most * (1 if sys.platform == "darwin" else 1024)


# -------------------------------------------------------------------------------------- pictures


def save_picture(path, columns, enlarge=3):
    """Write columns of images, float (n, 3, S, S) in [0, 1], side by side to a PNG file.

    They are drawn as large as the first column's.
    """
    side, nearest = enlarge * columns[0].shape[-1], transforms.InterpolationMode.NEAREST
    columns = [transforms.resize(column.cpu(), [side], nearest) for column in columns]
    images = torch.stack(columns, dim=1).flatten(0, 1)
    torchvision.utils.save_image(images, path, nrow=len(columns), padding=2, pad_value=1)
    print(f"written: {path}")
