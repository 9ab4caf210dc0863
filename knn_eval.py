"""Weighted kNN on the features of a frozen encoder. Nothing is trained.

    python knn_eval.py runs/ressl-cifar10                         student
    python knn_eval.py runs/ressl-cifar10 --branch teacher        or untrained: random weights
    python knn_eval.py runs/ressl-cifar10 --neighbors nn.png      a picture of what it found
    python knn_eval.py runs/ressl-cifar10 --features out.npz      the features, say for a t-SNE

Protocol (Wu et al. 2018, arXiv 1805.01978, section 3.4): pooled features of all images,
without augmentation, scaled to length 1. A test image takes its k = 200 most similar
training images. Each votes exp(cosine / 0.1) for its class [others].
"""

import io

import numpy
import torch
from PIL import Image, ImageDraw
from torchvision.transforms.v2 import functional as transforms

import common

ORANGE = [0.85, 0.35, 0.0]  # frame of a neighbour of another class
GREEN = [0.0, 0.6, 0.5]  # frame of one of the same class
LIMITS = {"temperature": (0.02, 10**6)}  # exp(1 / 0.01) overflows


def draw_word(text, side):
    """A word as an image (3, side, side) in [0, 1]."""
    picture = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((4, 4), text, "black", font_size=side // 8)
    return torch.tensor(numpy.asarray(picture)).permute(2, 0, 1) / 255


def draw_neighbors(path, features, train, test, count=5):
    """Write a picture. A row: a class name, a test image, its nearest training images.

    features: for each encoder those of train and of test.
    """
    names = []
    rows = []
    for label in test.labels.unique()[:10].tolist():
        query = (test.labels == label).nonzero()[0]  # the first image of the class
        image = test.images[query[0]] / 255
        row = [transforms.pad(image, [2], fill=1.0)]
        side = 3 * row[0].shape[-1]
        names.append(draw_word(test.classes[label], side))
        for bank, queries in features:
            _, found = common.nearest(bank, queries[query], count)
            for i in found[0].tolist():
                frame = GREEN if train.labels[i] == label else ORANGE
                image = train.images[i] / 255
                row.append(transforms.pad(image, [2], fill=frame))
        rows.append(torch.stack(row))
    columns = torch.stack(rows, dim=1)  # (columns, rows, 3, side, side)
    common.save_picture(path, [torch.stack(names), *columns])
    print("a row: a test image, its nearest training images, and those by random weights")


@common.command
def main(argv=None):
    """Run the command line -> {"top1", "top5"} in percent."""
    parser = common.Parser(prog="knn_eval.py", description=__doc__)
    option = parser.add_argument
    option("--k", type=int, default=200, help="neighbours")
    option("--temperature", type=float, default=0.1, help="of the votes; at least 0.02")
    option("--neighbors", metavar="FILE.png", help="draw some neighbours")
    option("--features", metavar="FILE.npz", help="write the features")
    args, encoder, train, test, dtype, protocol = common.open_evaluation(parser, argv, LIMITS)
    bank = common.extract_features(encoder, train, args.image_size, dtype)
    queries = common.extract_features(encoder, test, args.image_size, dtype)
    k = min(args.k, len(train))
    classes = len(train.classes)
    scores = common.knn_scores(bank, train.labels, queries, classes, k, args.temperature)
    top1, top5 = common.top_k(scores, test.labels)
    protocol |= {"evaluation": "knn", "k": k, "temperature": args.temperature}
    result = common.report(args.run, protocol, {"top1": top1, "top5": top5})
    if args.neighbors:
        untrained = common.load_encoder(args.run, "untrained").to(bank.device)
        random_bank = common.extract_features(untrained, train, args.image_size, dtype)
        random_queries = common.extract_features(untrained, test, args.image_size, dtype)
        pairs = [(bank, queries), (random_bank, random_queries)]
        draw_neighbors(args.neighbors, pairs, train, test)
    if args.features:
        buffer = io.BytesIO()
        numpy.savez(
            buffer,
            train=bank.cpu(),
            train_labels=train.labels.cpu(),
            train_names=train.names,
            test=queries.cpu(),
            test_labels=test.labels.cpu(),
            test_names=test.names,
            classes=train.classes,
        )
        common.write_file(args.features, buffer.getvalue())
        print(f"written: {args.features}")
    return result


if __name__ == "__main__":
    main()
