"""Linear probe: a linear classifier on the frozen encoder's pooled features.

    python linear_eval.py runs/ressl-cifar10                     the authors' protocol, 100 epochs
    python linear_eval.py runs/ressl-cifar10 --branch teacher
    python linear_eval.py runs/ressl-cifar10 --epochs 10 --schedule cosine --lr 0.3 1 3

Protocol [code]: the encoder in eval mode, so that its BatchNorm statistics stay too; features as
they are, not normalised; trained on RandomResizedCrop(scale 0.08-1) and flip, batch 256, SGD with
Nesterov momentum 0.9 and no weight decay; tested on whole images, every one, after the last epoch.

Two schedules: step (learning rate 30 or 10, divided by 10 after 60 % and 80 % of the epochs [code])
and cosine (1, as the authors advise [authors]). All these heads are trained side by side on the
same features, which are what costs time. The cosine head's accuracy is the result.
"""

import math
import time

import torch
from torch import nn
from torch.nn import functional as F

import common

BATCH = 256
RATES = {"cosine": [1.0], "step": [30.0, 10.0]}


def learning_rate(schedule, done, peak):
    """`done`: the share of the training that is over, 0 to 1. -> learning rate."""
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak * 0.1 ** ((done >= 0.6) + (done >= 0.8))


def probe_view(images, size, generator):
    """RandomResizedCrop(scale 0.08-1) and flip: (N, 3, S, S) in [0, 1] -> (N, 3, size, size)."""
    count = len(images)
    boxes = common.draw_boxes(count, images.shape[-1], (0.08, 1.0), generator)
    flip = common.draw_chosen(count, 0.5, generator)
    boxes = common.to_device(images, common.mirror(boxes, flip))[0]
    return common.resized_crop(images, *boxes, size)


def train_heads(encoder, train, rates, epochs, seed, dtype, size=None):
    """Train a linear head for every (schedule, lr) of `rates` -> nn.ModuleList in that order."""
    device = train.images.device
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    heads = nn.ModuleList(nn.Linear(encoder.dim, len(train.classes)) for _ in rates).to(device)
    groups = [{"params": head.parameters()} for head in heads]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True)
    normalize = common.normalizer(train, device)
    steps = math.ceil(len(train) / BATCH)
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        total = torch.zeros(len(heads), device=device)
        batches = torch.randperm(len(train), generator=generator).to(device).split(BATCH)
        for i in common.progress(epoch, epochs, steps):
            for group, (schedule, peak) in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = learning_rate(schedule, (epoch - 1 + i / steps) / epochs, peak)
            view = probe_view(
                train.images[batches[i]] / 255, size or train.images.shape[-1], generator
            )
            with torch.no_grad():
                features = common.embed(encoder, normalize(view), dtype)  # once for all heads
            labels = train.labels[batches[i]]
            losses = torch.stack([F.cross_entropy(head(features), labels) for head in heads])
            optimizer.zero_grad()
            losses.sum().backward()  # each head has its own loss: they do not mix
            optimizer.step()
            total += losses.detach()
        losses = (total / steps).tolist()
        text = "  ".join(f"{s}{lr:g} {x:.3f}" for (s, lr), x in zip(rates, losses, strict=True))
        seconds = time.perf_counter() - start
        print(f"epoch {epoch}/{epochs}  loss {text}  seconds {seconds:.4g}", flush=True)
        if not all(math.isfinite(x) for x in losses):
            raise common.UserError(
                f"the probe diverged (losses {text}): use a lower --lr, or evaluate another run"
            )
    return heads


@common.command
def main(argv=None):
    """The command line -> {"top1", "top5", and e.g. "step30_top1", "step30_top5"} in percent."""
    parser = common.Parser(prog="linear_eval.py", description=__doc__)
    option, whole, real = parser.add_argument, common.whole, common.real
    option("--epochs", type=whole(1), default=100, help="passes over the training images")
    option("--schedule", choices=("cosine", "step", "both"), default="both", help="of the heads")
    option("--lr", type=real(1e-8), nargs="+", help="peaks; None: cosine 1, step 30 and 10")
    option("--seed", type=whole(0, 2**63 - 1), default=0, help="of heads, batches and views")
    args, encoder, train, test, dtype, protocol = common.open_evaluation(parser, argv)
    schedules = RATES if args.schedule == "both" else [args.schedule]
    rates = [
        (schedule, lr) for schedule in schedules for lr in dict.fromkeys(args.lr or RATES[schedule])
    ]
    size = args.image_size
    heads = train_heads(encoder, train, rates, args.epochs, args.seed, dtype, size)
    features, result = common.extract_features(encoder, test, dtype, side=size), {}
    for (schedule, lr), head in zip(rates, heads, strict=True):
        prefix = f"{schedule}{lr:.9g}_" if result else ""  # the first, a cosine head, is the result
        with torch.no_grad():
            top1, top5 = common.top_k(head(features), test.labels)
        result |= {f"{prefix}top1": top1, f"{prefix}top5": top5}
    protocol |= {"evaluation": "linear", "schedule": rates[0][0], "lr": rates[0][1]}
    protocol |= {"epochs": args.epochs, "batch_size": BATCH, "probe_seed": args.seed}
    return common.report(args.run, protocol, result)


if __name__ == "__main__":
    main()
