"""Linear probe: a linear classifier on the features of a frozen encoder.

    python linear_eval.py runs/ressl-cifar10                     the authors' protocol, 100 epochs
    python linear_eval.py runs/ressl-cifar10 --branch teacher
    python linear_eval.py runs/ressl-cifar10 --epochs 10 --schedule cosine --lr 0.3 1 3

Protocol [code]: the encoder stays in eval mode. Features are not normalised.
Training images get RandomResizedCrop(scale 0.08-1) and a flip. Batches have 256 images.
SGD has Nesterov momentum 0.9 and no weight decay. Test images are whole.
They are tested once, after the last epoch.

Two schedules: cosine, learning rate 1 [authors]; step, learning rates 30 and 10 [code].
Each schedule with each rate is a head. All heads are trained at once on the same features,
because the features cost the time. The first head's accuracy is the result. By default it is
the cosine head's.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

import common

BATCH_SIZE = 256
RATES = {"cosine": [1.0], "step": [30.0, 10.0]}


def learning_rate(schedule, done, peak):
    """done: the share of the training that is over. step: a tenth from 0.6, again from 0.8."""
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    if done < 0.6:
        return peak
    return peak / 10 if done < 0.8 else peak / 100


def probe_view(images, size, generator):
    """Crop and flip: float images (N, 3, S, S) in [0, 1] -> (N, 3, size, size)."""
    images = common.random_crop(images, size, scale=(0.08, 1.0), generator=generator)
    return common.random_flip(images, p=0.5, generator=generator)


def train_heads(encoder, train, rates, args, dtype):
    """Train a linear head for each (schedule, learning rate) of `rates` -> list of heads."""
    device = train.images.device
    generator = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    classes = len(train.classes)
    heads = [nn.Linear(encoder.dim, classes).to(device) for _ in rates]
    groups = [{"params": head.parameters()} for head in heads]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True)
    normalize = common.normalizer(train)
    steps = math.ceil(len(train) / BATCH_SIZE)
    for epoch in range(1, args.epochs + 1):
        total = torch.zeros(len(heads), device=device)
        order = torch.randperm(len(train), generator=generator).to(device)
        for i in common.progress(epoch, args.epochs, steps):
            done = (epoch - 1 + i / steps) / args.epochs
            for group, (schedule, peak) in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = learning_rate(schedule, done, peak)
            batch = order[i * BATCH_SIZE : (i + 1) * BATCH_SIZE]
            images = train.images[batch] / 255
            view = normalize(probe_view(images, args.image_size, generator))
            with torch.no_grad(), common.autocast(device, dtype):
                features = encoder(view)
            features = common.full_precision(features)
            losses = []
            for head in heads:
                losses.append(F.cross_entropy(head(features), train.labels[batch]))
            optimizer.zero_grad()
            sum(losses).backward()  # each head has its own loss, so they do not mix
            optimizer.step()
            total += torch.stack(losses).detach()
        means = (total / steps).tolist()
        words = "  ".join(f"{mean:.3f}" for mean in means)
        print(f"epoch {epoch}/{args.epochs}  loss of each head {words}", flush=True)
        if not all(math.isfinite(mean) for mean in means):
            raise common.UserError("the probe diverged: use a lower --lr, or evaluate another run")
    return heads


@common.command
def main(argv=None):
    """Run the command line -> {"top1", "top5"} in percent, and the other heads' by name."""
    parser = common.Parser(prog="linear_eval.py", description=__doc__)
    option = parser.add_argument
    option("--epochs", type=int, default=100, help="passes over the training images")
    option("--schedule", nargs="+", choices=RATES, default=list(RATES), help="of the heads")
    option("--lr", type=float, nargs="+", help="peaks; None: cosine 1, step 30 and 10")
    option("--seed", type=int, default=0, help="of heads, batches and views")
    args, encoder, train, test, dtype, protocol = common.open_evaluation(parser, argv, {})
    rates = []
    for schedule in args.schedule:
        for peak in args.lr or RATES[schedule]:
            rates.append((schedule, peak))
    print(f"heads (schedule, learning rate): {rates}")
    heads = train_heads(encoder, train, rates, args, dtype)
    features = common.extract_features(encoder, test, args.image_size, dtype)
    result = {}
    for (schedule, peak), head in zip(rates, heads, strict=True):
        prefix = f"{schedule}{peak:.9g}_" if result else ""  # the first head is the result
        with torch.no_grad():
            top1, top5 = common.top_k(head(features), test.labels)
        result |= {f"{prefix}top1": top1, f"{prefix}top5": top5}
    protocol |= {"evaluation": "linear", "batch_size": BATCH_SIZE}
    protocol |= {"epochs": args.epochs, "probe_seed": args.seed}
    protocol["schedule"], protocol["lr"] = rates[0]
    return common.report(args.run, protocol, result)


if __name__ == "__main__":
    main()
