"""The ceiling: the same encoder, trained with labels by the same schedule, on the same crops.

    python docs/ceiling.py --data cifar10 --epochs 20 --output runs/ceiling-cifar10
    python docs/ceiling.py --data cifar100 --epochs 20 --output runs/ceiling-cifar100

ReSSL's weak view (crop and flip), its SGD, learning rate and weight decay, and cross-entropy with
the labels in place of its loss. The log is as the methods' are: student_knn is the kNN on the
encoder's features, top1 the test accuracy of the linear layer trained along; there is no teacher.
"""

import json
import pathlib
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import common
import ressl


def parse_arguments(argv):
    """-> arguments, None (no checkpoint: a run is short, and is not resumed)."""
    parser = common.Parser(prog="docs/ceiling.py", description=__doc__)
    option = parser.add_argument
    option("--data", choices=("textures", "cifar10", "cifar100"), default="cifar10", help="of it")
    option("--arch", choices=common.ARCHITECTURES, default="conv4", help="encoder")
    option("--epochs", type=int, default=20, help="passes over the training images")
    option("--batch-size", type=int, default=256, help="B")
    option("--lr", type=float, default=0.06, help="peak")
    option("--seed", type=int, default=0, help="of weights, batches and crops")
    option("--data-dir", default="data", help="where the data set is")
    option("--output", default="runs/ceiling", help="run folder")
    fixed = {"subset": None, "holdout": 0, "image_size": 32, "bn_splits": 1, "weight_decay": 5e-4}
    parser.set_defaults(method="ceiling", device="auto", amp="auto", contents=None, **fixed)
    args = parser.parse_args(argv)
    common.check_arguments(args, common.LIMITS)
    return args, None


def train_epoch(epoch, network, optimizer, generator, data, args, dtype):
    """One pass over the training images -> mean loss."""
    steps = len(data) // args.batch_size
    warmup = round(min(5, 0.1 * args.epochs) * steps)
    normalize = common.normalizer(data)
    total = torch.zeros((), device=data.images.device)
    order = torch.randperm(len(data), generator=generator).to(data.images.device)
    batches = order[: steps * args.batch_size].view(steps, -1)
    for i in common.progress(epoch, args.epochs, steps):
        step = (epoch - 1) * steps + i
        lr = ressl.learning_rate(step, args.epochs * steps, warmup, args.lr)
        optimizer.param_groups[0]["lr"] = lr
        images = ressl.weak_view(data.images[batches[i]] / 255, generator=generator)
        with common.autocast(images.device, dtype):
            logits = network(normalize(images))
        logits = common.full_precision(logits)
        loss = F.cross_entropy(logits, data.labels[batches[i]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
    return total.item() / steps


@common.command
def main(argv=None):
    """The command line -> the log's last record: loss, student_knn, top1."""
    args, _ = parse_arguments(argv)
    device = common.pick_device(args.device)
    dtype = common.pick_precision(args.amp, device)
    dtype = None if dtype == torch.float16 else dtype  # which would need a gradient scaler
    data, bank, test = common.load_splits(args, device)
    log = pathlib.Path(args.output, "log.jsonl")
    log.parent.mkdir(parents=True, exist_ok=True)
    about = {"arguments": vars(args), **common.describe(device, dtype)}
    records = [about]
    torch.manual_seed(args.seed)
    encoder = common.build_encoder(args.arch, "small")
    network = nn.Sequential(encoder, nn.Linear(encoder.dim, len(data.classes)))
    network.to(device, memory_format=common.memory_format(device))
    decay = {"momentum": 0.9, "weight_decay": args.weight_decay}
    optimizer = torch.optim.SGD(network.parameters(), lr=args.lr, **decay)
    generator = torch.Generator().manual_seed(args.seed)
    for epoch in range(args.epochs + 1):
        start, loss, speed = time.perf_counter(), None, None
        if epoch > 0:
            loss = train_epoch(epoch, network, optimizer, generator, data, args, dtype)
            speed = len(data) // args.batch_size * args.batch_size / (time.perf_counter() - start)
        record = {"epoch": epoch, "loss": loss, "student_knn": None, "teacher_knn": None}
        if epoch in (0, args.epochs):
            record["student_knn"] = common.knn_accuracy(encoder, bank, test, args.image_size, dtype)
            features = common.extract_features(encoder, test, args.image_size, dtype)
            record["top1"] = common.top_k(network[1](features), test.labels)[0]
        record |= {"images_per_second": speed, "seconds": time.perf_counter() - start}
        record["peak_memory"] = common.peak_memory(device)
        records.append(record)
        log.write_text("".join(json.dumps(each) + "\n" for each in records))
        print("  ".join(f"{k} {v:.4g}" for k, v in record.items() if v is not None), flush=True)
    return record


if __name__ == "__main__":
    main()
