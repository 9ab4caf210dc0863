"""Weighted kNN on the features of a frozen encoder: how good they are, with nothing trained.

    python knn_eval.py runs/ressl-cifar10                       student
    python knn_eval.py runs/ressl-cifar10 --branch teacher
    python knn_eval.py runs/ressl-cifar10 --neighbors nn.png    and a picture of what it found

Protocol (Wu et al. 2018, arXiv 1805.01978, section 3.4): pooled features of every training and test
image, without augmentation, scaled to unit length. A test image takes its k = 200 most similar
training images; each votes exp(cosine / 0.1) for its class [others]. Every test image counts.
"""

import math

import torch

import common

RIGHT, WRONG = (0.0, 0.6, 0.5), (0.85, 0.35, 0.0)  # told apart by colour-blind readers too


def framed(images, colour, width=2):
    """images (n, 3, S, S) in [0, 1], with a frame -> (n, 3, S + 2 * width, S + 2 * width)."""
    side = images.shape[-1] + 2 * width
    canvas = torch.tensor(colour).view(3, 1, 1).repeat(len(images), 1, side, side)
    canvas[:, :, width:-width, width:-width] = images
    return canvas


def draw_neighbors(path, bank, queries, train, test, rows=10, count=10):
    """Write a picture: for each of the first `rows` classes a query and its nearest images.

    bank (N, D), queries (M, D): features of train and test. The frame tells right from wrong.
    """
    first = [(test.labels == label).nonzero()[:1, 0] for label in range(len(test.classes))]
    chosen = torch.cat(first)[:rows]
    index = torch.cat([index for _, index in common.nearest(bank, queries[chosen], count)])
    right = (train.labels[index] == test.labels[chosen, None]).cpu()
    picture = lambda data, i: data.images[i].cpu().float() / 255
    columns = [framed(picture(test, chosen), (1.0, 1.0, 1.0))]
    for column in range(index.shape[1]):
        images = picture(train, index[:, column])
        hit = right[:, column].view(-1, 1, 1, 1)
        columns.append(torch.where(hit, framed(images, RIGHT), framed(images, WRONG)))
    common.save_picture(path, columns)
    print("left: test images; then their nearest training images: green right class, orange wrong")


@common.command
def main(argv=None):
    """The command line -> {"top1", "top5"} in percent."""
    parser = common.Parser(prog="knn_eval.py", description=__doc__)
    option, whole, real = parser.add_argument, common.whole, common.real
    option("run", help="a run folder, or its checkpoint.pt")
    option("--branch", choices=("student", "teacher"), default="student", help="whose encoder")
    common.add_shared_options(option)
    option("--k", type=whole(1), default=200, help="neighbours")
    option("--temperature", type=real(0.02), default=0.1, help="of the votes")
    option("--neighbors", type=common.picture_path, metavar="FILE.png", help="draw some neighbours")
    args, encoder, train, test, dtype, protocol = common.open_evaluation(parser, argv)
    side = args.image_size
    bank, queries = (common.extract_features(encoder, x, dtype, side=side) for x in (train, test))
    classes, k = len(train.classes), min(args.k, len(train))
    scores = common.knn_scores(bank, train.labels, queries, classes, k, args.temperature)
    scores.masked_fill_(scores == 0, -math.inf)  # a class without a vote
    top1, top5 = common.top_k(scores, test.labels)
    protocol |= {"evaluation": "knn", "k": k, "temperature": args.temperature}
    if args.neighbors:
        draw_neighbors(args.neighbors, bank, queries, train, test)
    return common.report(args.run, protocol, {"top1": top1, "top5": top5})


if __name__ == "__main__":
    main()
