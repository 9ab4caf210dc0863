"""Pictures of a run: its views, its relations, its loss, its features.

    python docs/pictures.py runs/ressl-textures
    python docs/pictures.py runs/ressl-textures --output pictures

views.png     images, and the views of them that student and teacher see
loss.png      loss, entropy and ln K by epoch; for Residual Momentum loss and gap
features.png  a map of the test images' features, with random weights and after training
relation.png  ReSSL only: an image and the ten images that it is most related to
teacher.png   Residual Momentum only: kNN of student and teacher by epoch

This needs matplotlib and less than a minute.
"""

import argparse
import math
import pathlib
import sys

import numpy
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import compare

import common
import residual_momentum
import ressl

COUNT = 8  # images in views.png
NEAREST = 10  # images of the queue in relation.png
BLUE, ORANGE = compare.COLOURS[:2]


def new_figure(width, height):
    """-> an empty figure, in inches."""
    matplotlib = compare.load_matplotlib()
    return matplotlib.figure.Figure((width, height), compare.DPI, layout="constrained")


def save(figure, folder, name):
    """Write a figure to a PNG file."""
    path = pathlib.Path(folder, name)
    figure.savefig(path)
    print(f"written: {path}")


def show(axes, image, title=""):
    """Draw an image (3, S, S) in [0, 1], without axes."""
    axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy())
    axes.set_title(title, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


def some_images(data, count):
    """The first images of `count` classes, or any images if there are no classes: in [0, 1]."""
    numbers = torch.linspace(0, len(data) - 1, min(count, len(data))).long()
    if data.labels is not None:
        labels = data.labels.unique()[:count]
        numbers = torch.stack([(data.labels == label).nonzero()[0, 0] for label in labels])
    return data.images[numbers] / 255


# ----------------------------------------------------------------------------------------- views


def draw_views(method, args, data, folder):
    """A column an image: the image, and its views."""
    images = some_images(data, COUNT)
    views = method.draw_views(images, args, torch.Generator().manual_seed(args.seed))
    if method is ressl:
        names = ["student: strong"] * (len(views) - 1)
        names.append(f"teacher: {args.teacher_view}")
    else:
        names = ["view 1: strong", "view 2: strong"]
    rows = [images, *views]
    figure = new_figure(len(images), 1.1 * len(rows))
    places = figure.subplots(len(rows), len(images), squeeze=False)
    for row, name, line in zip(rows, ["image", *names], places, strict=True):
        for axes, image in zip(line, row, strict=True):
            show(axes, image)
        line[0].set_ylabel(name, fontsize=8)
    save(figure, folder, "views.png")


# ------------------------------------------------------------------------------------------ loss


def draw_curve(axes, run, keys):
    """Quantities of the log by epoch."""
    for key, colour in zip(keys, compare.COLOURS, strict=False):
        points = compare.curve([run], key)
        epochs = [epoch for epoch, _, _ in points]
        values = [value for _, value, _ in points]
        axes.plot(epochs, values, color=colour, marker="o", ms=3, label=key.replace("_", " "))
    axes.set_xlabel("epoch")
    axes.grid(color="#DDDDDD", lw=0.6)
    axes.legend(frameon=False)


def draw_loss(method, args, run, folder):
    """Loss and entropy, or loss and gap."""
    if method is ressl:
        figure = new_figure(6, 4)
        axes = figure.subplots()
        axes.axhline(math.log(args.queue_size), color="grey", ls="--", label="ln K")
        draw_curve(axes, run, ["loss", "entropy"])
        axes.set_title("A loss at ln K tells nothing apart")
    else:
        figure = new_figure(9, 4)
        left, right = figure.subplots(1, 2)
        draw_curve(left, run, ["loss"])
        draw_curve(right, run, ["gap"])
        right.set_title("gap: 1 - cos of student and teacher, same view")
    save(figure, folder, "loss.png")


def draw_teacher(run, folder):
    """kNN of student and teacher by epoch."""
    figure = new_figure(6, 4)
    axes = figure.subplots()
    draw_curve(axes, run, ["student_knn", "teacher_knn"])
    axes.set_ylabel("kNN accuracy (%)")
    save(figure, folder, "teacher.png")


# -------------------------------------------------------------------------------------- features


def draw_features(folder_of_run, args, test, folder):
    """The two directions in which the features of the test images differ most (PCA)."""
    figure = new_figure(10, 5)
    places = figure.subplots(1, 2)
    titles = {"untrained": "random weights", "student": "after training"}
    for axes, (branch, title) in zip(places, titles.items(), strict=True):
        encoder = common.load_encoder(folder_of_run, branch)
        features = common.extract_features(encoder, test, args.image_size)
        features = common.unit_length(features)
        torch.manual_seed(0)
        centred = features - features.mean(dim=0)
        _, _, directions = torch.pca_lowrank(centred, q=2, center=False)
        x, y = (centred @ directions).T.numpy()
        for label in test.labels.unique()[:10].tolist():
            of_class = (test.labels == label).numpy()
            axes.scatter(x[of_class], y[of_class], s=6, label=test.classes[label])
        axes.set_title(title)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.legend(
        *places[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=5,
        markerscale=2,
        frameon=False,
    )
    save(figure, folder, "features.png")


# -------------------------------------------------------------------------------------- relation


def build_model(args):
    """The model of a run with its random weights, as ressl.train builds it."""
    torch.manual_seed(args.seed)
    encoder = common.build_encoder(args.arch, args.stem)
    return ressl.Model(encoder, args.queue_size, args.predictor, args.bn_splits)


@torch.no_grad()
def relations(model, args, data, weak, strong):
    """-> p_t and p_s of the images' views to K training images, (n, K) each."""
    normalize = common.normalizer(data)
    model.eval()
    keys = []
    for images in data.images[: args.queue_size].split(500):
        keys.append(common.unit_length(model.teacher(normalize(images / 255))))
    queue = torch.cat(keys)
    k = common.unit_length(model.teacher(normalize(weak)))
    q = common.unit_length(model.predictor(model.student(normalize(strong))))
    p_t = ressl.relation(k, queue, args.teacher_temp)
    p_s = ressl.relation(q, queue, args.student_temp)
    return p_t, p_s


def draw_relation(args, checkpoint, data, shown, folder):
    """Two images. For each, before and after training: its views, then the ten images with the
    largest p_t, with bars for p_t and p_s.

    K training images stand for the queue, whole and by the teacher of that moment.
    """
    images = some_images(shown, 2)
    generator = torch.Generator().manual_seed(args.seed)
    weak = ressl.weak_view(images, args.image_size, generator)
    strong = ressl.strong_view(images, args.image_size, generator)
    before = build_model(args)
    after = build_model(args)
    common.load_weights(after, checkpoint["model"])
    found = {
        "before": relations(before, args, data, weak, strong),
        "after": relations(after, args, data, weak, strong),
    }
    heights = [1, 0.8] * 2 * len(images)
    figure = new_figure(12, 9)
    grid = figure.add_gridspec(len(heights), NEAREST + 2, height_ratios=heights)
    row = 0
    for i in range(len(images)):
        highest = found["after"][0][i].max().item()
        for when, (p_t, p_s) in found.items():
            top = p_t[i].topk(NEAREST).indices
            teacher = figure.add_subplot(grid[row, 0])
            show(teacher, weak[i], "teacher sees")
            teacher.set_ylabel(f"{when} training")
            show(figure.add_subplot(grid[row, 1]), strong[i], "student sees")
            for column, number in enumerate(top.tolist()):
                show(figure.add_subplot(grid[row, column + 2]), data.images[number] / 255)
            axes = figure.add_subplot(grid[row + 1, 2:])
            places = numpy.arange(NEAREST)
            axes.bar(places - 0.2, p_t[i, top].numpy(), 0.4, color=BLUE, label="p_t, the teacher's")
            axes.bar(
                places + 0.2, p_s[i, top].numpy(), 0.4, color=ORANGE, label="p_s, the student's"
            )
            axes.set_xlim(-0.5, NEAREST - 0.5)
            axes.set_ylim(0, 1.1 * highest)
            axes.set_xticks([])
            title = f"largest p_t {p_t[i].max():.4f}; if all were equal {1 / p_t.shape[1]:.4f}"
            axes.set_title(title, fontsize=8)
            row += 2
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    save(figure, folder, "relation.png")


# ---------------------------------------------------------------------------------- command line


@common.command
def main(argv=None):
    """Run the command line."""
    parser = common.Parser(prog="docs/pictures.py", description=__doc__)
    option = parser.add_argument
    option("run", help="a run folder, or its checkpoint.pt")
    option("--output", metavar="FOLDER", help="where the pictures go; None: the run's folder")
    option("--data-dir", help="where the run's images are; None: where they were")
    given = parser.parse_args(argv)
    compare.load_matplotlib()  # or say at once that it is missing
    checkpoint = common.read_checkpoint(given.run)
    run = compare.read_run(common.run_folder(given.run))
    args = argparse.Namespace(**{"contents": None, **checkpoint["arguments"]})
    args.stem = checkpoint["stem"]
    args.data_dir = given.data_dir or args.data_dir
    folder = pathlib.Path(given.output or common.run_folder(given.run))
    folder.mkdir(parents=True, exist_ok=True)
    method = ressl if args.method == "ressl" else residual_momentum
    data, _, test = common.load_splits(args, torch.device("cpu"))
    shown = data if test is None else test
    draw_views(method, args, shown, folder)
    draw_loss(method, args, run, folder)
    if test is not None:
        draw_features(given.run, args, test, folder)
    if method is ressl:
        draw_relation(args, checkpoint, data, shown, folder)
    else:
        draw_teacher(run, folder)


if __name__ == "__main__":
    main()
