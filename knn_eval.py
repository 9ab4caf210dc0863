"""Weighted kNN on the features of a frozen encoder: how good they are, with nothing trained.

    python knn_eval.py runs/ressl-cifar10                         student
    python knn_eval.py runs/ressl-cifar10 --branch teacher        or untrained: random weights
    python knn_eval.py runs/ressl-cifar10 --neighbors nn.png      and a picture of what it found
    python knn_eval.py runs/ressl-cifar10 --features out.npz      and the features, for a t-SNE, say

Protocol (Wu et al. 2018, arXiv 1805.01978, section 3.4): pooled features of every training and test
image, without augmentation, scaled to unit length. A test image takes its k = 200 most similar
training images; each votes exp(cosine / 0.1) for its class [others]. Every test image counts.
"""

import math

import numpy
import torch
from PIL import Image, ImageDraw

import common

FRAMES = torch.tensor([[0.85, 0.35, 0.0], [0.0, 0.6, 0.5]])  # orange: wrong, green: right


def written(text, side):
    """A word as a picture, (3, side, side) in [0, 1]."""
    tile = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(tile).text((4, side // 2), text, "black", anchor="lm", font_size=side // 8)
    return torch.tensor(numpy.asarray(tile)).permute(2, 0, 1) / 255


def draw_neighbors(path, features, train, test, rows=10, count=5):
    """Write a picture: for each of the first `rows` classes its name, a query, its nearest images.

    features: for each encoder its bank (N, D) and queries (M, D), of train and test. There is a gap
    between encoders. The frame tells right from wrong.
    """
    first = [(test.labels == label).nonzero()[:1, 0] for label in range(len(test.classes))]
    chosen = torch.cat(first)[:rows]
    query = torch.nn.functional.pad(test.images[chosen].cpu() / 255, (2, 2, 2, 2), value=1.0)
    side = query.shape[-1] * max(1, 108 // query.shape[-1])
    names = [written(test.classes[label], side) for label in test.labels[chosen].tolist()]
    columns = [torch.stack(names), query]
    for bank, queries in features:
        index = torch.cat([index for _, index in common.nearest(bank, queries[chosen], count)])
        right = (train.labels[index] == test.labels[chosen, None]).int().cpu()  # (rows, count)
        tiles = FRAMES[right][..., None, None].repeat(1, 1, 1, *query.shape[-2:])
        tiles[..., 2:-2, 2:-2] = train.images[index].cpu() / 255
        columns += [*tiles.unbind(1), torch.ones_like(query)]
    common.save_picture(path, columns[:-1], enlarge=1)
    print("a row: a test image, its nearest training images, and those by random weights")


@common.command
def main(argv=None):
    """The command line -> {"top1", "top5"} in percent."""
    parser = common.Parser(prog="knn_eval.py", description=__doc__)
    option, whole, real = parser.add_argument, common.whole, common.real
    option("--k", type=whole(1), default=200, help="neighbours")
    option("--temperature", type=real(0.02), default=0.1, help="of the votes")
    option("--neighbors", type=common.png, metavar="FILE.png", help="draw some neighbours")
    option("--features", type=common.npz, metavar="FILE.npz", help="write the features")
    args, encoder, train, test, dtype, protocol = common.open_evaluation(parser, argv)
    extract = lambda net, data: common.extract_features(net, data, dtype, side=args.image_size)
    bank, queries = extract(encoder, train), extract(encoder, test)
    classes, k = len(train.classes), min(args.k, len(train))
    scores = common.knn_scores(bank, train.labels, queries, classes, k, args.temperature)
    scores.masked_fill_(scores == 0, -math.inf)  # a class without a vote
    top1, top5 = common.top_k(scores, test.labels)
    if args.neighbors:
        random = common.load_encoder(args.run, "untrained").to(bank.device)
        both = (bank, queries), (extract(random, train), extract(random, test))
        draw_neighbors(args.neighbors, both, train, test)
    if args.features:
        tensors = dict(train=bank, train_labels=train.labels, test=queries, test_labels=test.labels)
        names = dict(classes=train.classes, train_names=train.names, test_names=test.names)
        numpy.savez(args.features, **{n: x.cpu().numpy() for n, x in tensors.items()}, **names)
        print(f"written: {args.features}")
    protocol |= {"evaluation": "knn", "k": k, "temperature": args.temperature}
    return common.report(args.run, protocol, {"top1": top1, "top5": top5})


if __name__ == "__main__":
    main()
