r"""ReSSL: Relational Self-Supervised Learning with Weak Augmentation.

Zheng, You, Wang, Qian, Zhang, Wang, Xu. NeurIPS 2021. arXiv 2107.09282.

Contrastive learning asks two views of one image to match. ReSSL asks for less.
It compares each view with a queue of other images. This gives a relation: how similar
is the view to each image of the queue? Both views should have the same relation.
The teacher sees a weak view (crop and flip), and gives the target. The student sees a
strong view (colours and blur too), and has to predict the target.
The teacher is a slowly moving average of the student. It takes no gradient.

    p_t = softmax(k Q^T / tau_t)          the teacher's relation, the target
    p_s = softmax(q Q^T / tau_s)          the student's relation; tau_t < tau_s
    L   = - sum_i p_t(i) log p_s(i)       i runs over the queue; mean over the batch

    paper          here                         shape     what
    f              encoder                      (B, D)    ResNet-18, without its classifier
    g              projector                    (B, d)    Linear, ReLU, Linear; d = 128
    q              q                            (B, d)    student's g(f(strong view)), length 1
    k              k                            (B, d)    teacher's g(f(weak view)), length 1
    Q              queue                        (K, d)    the last K teacher outputs
    p_t            p_t                          (B, K)    rows sum to 1
    tau_s, tau_t   student_temp, teacher_temp             0.1, 0.04
    m              momentum                               0.99; of the teacher's average

Why is tau_t lower? It makes the target sharper than the student's own relation.
So there is always something to learn: go nearer to what is near, and further from the rest.
At equal temperatures an undecided target asks for nothing, and the loss can stay at ln K.

    python ressl.py                              built-in textures, two CPU cores, 2 minutes
    python ressl.py --data cifar10               one GPU, the paper's 200 epochs

Each epoch prints a line. The loss L cannot be lower than the entropy of p_t. Both are ln K
when all similarities are equal: then nothing is told apart. The queue begins with noise.
Student and teacher begin as copies, so they agree on the noise, and L is low at first.
Then real outputs fill the queue. They are still all alike, so L rises. As they part, it falls.
kNN is an accuracy on labelled images: a test image gets the class of its nearest training
images, by the features f(x). It needs no training. Epoch 0 has random weights.

The extended version (arXiv 2203.08717) is known to us by its abstract [authors]. It adds two
things, whose details are [ours]. --infonce-epochs N begins with N epochs of a contrastive loss.
--predictor adds an MLP h to the student, so that q = h(g(f(x))) can differ from g(f(x)).
Multi-crop (--crops 5) gives the student smaller views too [code].

Sources: [code] the authors' code, [authors] their words, [ours] our choice.
"""

import argparse
import copy
import math
import time

import torch
from torch import nn
from torch.nn import functional as F

import common

# ----------------------------------------------------------------------------------------- model


class Network(nn.Module):
    """Encoder f and projector g: images (B, 3, S, S) -> (B, d)."""

    def __init__(self, encoder, bn_splits=1):
        super().__init__()
        self.encoder = encoder
        self.projector = nn.Sequential(
            nn.Linear(encoder.dim, 2048),
            nn.ReLU(inplace=True),
            nn.Linear(2048, 128),
        )
        self.bn_splits = bn_splits

    def forward(self, images):
        # BatchNorm normalises each group by itself, as it would on several GPUs [code].
        # There is one group unless --bn-splits says otherwise.
        groups = images.chunk(self.bn_splits)
        features = torch.cat([self.encoder(group) for group in groups])
        return self.projector(features)


class Model(nn.Module):
    """Student, teacher and queue."""

    def __init__(self, encoder, queue_size, predictor=False, bn_splits=1):
        super().__init__()
        self.student = Network(encoder, bn_splits)
        # The teacher stays in train mode: its BatchNorm uses the teacher's own batch [code].
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        if predictor:  # extended version [ours]
            self.predictor = nn.Sequential(
                nn.Linear(128, 2048),
                nn.BatchNorm1d(2048),
                nn.ReLU(inplace=True),
                nn.Linear(2048, 128),
            )
        else:
            self.predictor = nn.Identity()
        noise = torch.randn(queue_size, 128)
        self.register_buffer("queue", F.normalize(noise, dim=1))  # (K, d)


# ------------------------------------------------------------------------------------------ loss
# q, k and the queue's rows have length 1. So z @ queue.T holds cosine similarities.


def relation(z, queue, temperature):
    """How similar is z (B, d) to each row of the queue (K, d)? -> (B, K), rows sum to 1."""
    return F.softmax(z @ queue.T / temperature, dim=1)


def prediction_loss(q, p_t, queue, temperature):
    """Cross-entropy from the target p_t (B, K) to the student's relation -> scalar."""
    logits = q @ queue.T / temperature  # (B, K)
    return F.cross_entropy(logits, p_t)


def relation_loss(q, k, queue, student_temp, teacher_temp):
    """The paper's loss, from q (B, d), k (B, d) and queue (K, d) -> scalar.

    No gradient reaches k or the queue.
    """
    queue = queue.detach()
    p_t = relation(k.detach(), queue, teacher_temp)
    return prediction_loss(q, p_t, queue, student_temp)


def info_nce(q, k, queue, temperature):
    """Extended version: q should be more similar to its own k than to the queue -> scalar."""
    queue = queue.detach()
    own = (q * k.detach()).sum(dim=1, keepdim=True)  # (B, 1)
    logits = torch.cat([own, q @ queue.T], dim=1) / temperature  # (B, 1 + K)
    column = torch.zeros(len(q), dtype=torch.int64, device=q.device)  # the own k is in column 0
    return F.cross_entropy(logits, column)


# ----------------------------------------------------------------------------- teacher and queue


@torch.no_grad()
def update_teacher(model, momentum):
    """teacher = momentum * teacher + (1 - momentum) * student, for all parameters.

    Buffers are no parameters: BatchNorm's running statistics stay the teacher's own [code].
    """
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(momentum)
    average(list(model.teacher.parameters()), list(model.student.parameters()), None)


def update_queue(model, k):
    """Add k (B, d) at the end of the queue. The oldest rows leave it."""
    model.queue = torch.cat([model.queue, k])[len(k) :]


# -------------------------------------------------------------------------------------- training


def train_step(model, optimizer, scaler, views, args, dtype=None, infonce=False):
    """Train on one batch -> {"loss": scalar, "entropy": scalar}, on the device.

    views: network inputs (B, 3, S, S). The last is the teacher's. The others are the student's:
        one, or several with --crops.
    scaler: torch.amp.GradScaler. It does something with fp16 only.
    dtype: the networks run in bfloat16 or float16; None: in float32.
    infonce: use InfoNCE instead of the paper's loss (extended version).
    To watch one more quantity, add it to the dict: the log then shows its mean.
    """
    with common.autocast(views[0].device, dtype):
        with torch.no_grad():
            k = common.unit_length(model.teacher(views[-1]))  # (B, d), float32
        qs = [common.unit_length(model.predictor(model.student(view))) for view in views[:-1]]
    p_t = relation(k, model.queue, args.teacher_temp)  # (B, K)
    losses = []
    for q in qs:
        if infonce:
            losses.append(info_nce(q, k, model.queue, args.student_temp))
        else:
            losses.append(prediction_loss(q, p_t, model.queue, args.student_temp))
    loss = sum(losses) / len(losses)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    update_teacher(model, args.momentum)
    update_queue(model, k)  # after the loss: an image is not compared with this k of its own
    entropy = torch.special.entr(p_t).sum(dim=1).mean()  # - sum p_t log p_t
    return {"loss": loss.detach(), "entropy": entropy}


# ----------------------------------------------------------------------------------------- views
# Each image of the batch gets its own random crop, flip, colours and blur. Numbers: [code]


def weak_view(images, size=None, generator=None, scale=(0.2, 1.0)):
    """Crop and flip: float images (N, 3, S, S) in [0, 1] -> (N, 3, size, size).

    size: S if it is None. scale: area of the crop, as a share of the image.
    """
    size = size or images.shape[-1]
    images = common.random_crop(images, size, scale, ratio=(3 / 4, 4 / 3), generator=generator)
    return common.random_flip(images, p=0.5, generator=generator)


def strong_view(images, size=None, generator=None, scale=(0.2, 1.0)):
    """The weak view, then colours, grey and blur: -> (N, 3, size, size) in [0, 1]."""
    images = weak_view(images, size, generator, scale)
    images = common.random_color_jitter(
        images,
        p=0.8,
        brightness=0.4,
        contrast=0.4,
        saturation=0.4,
        hue=0.1,
        generator=generator,
    )
    images = common.random_grey(images, p=0.2, generator=generator)
    return common.random_blur(images, p=0.5, sigma=(0.1, 2.0), kernel_size=13, generator=generator)


# The student's views with --crops: size as a share of the full size, and scale [code].
CROPS = [
    (1, (0.2, 1.0)),
    (6 / 7, (0.172, 0.86)),
    (5 / 7, (0.143, 0.715)),
    (4 / 7, (0.114, 0.571)),
    (3 / 7, (0.086, 0.429)),
]


def draw_views(images, args, generator):
    """-> the student's views, then the teacher's, as a list."""
    views = []
    for share, scale in CROPS[: args.crops]:
        size = round(share * args.image_size)
        views.append(strong_view(images, size, generator, scale))
    teacher_view = weak_view if args.teacher_view == "weak" else strong_view
    views.append(teacher_view(images, args.image_size, generator))
    return views


# ----------------------------------------------------------------------------- schedule and loop


def learning_rate(step, steps, warmup, peak):
    """Linear from 0 to the peak in `warmup` steps, then a cosine down to 0."""
    if step < warmup:
        return peak * step / warmup
    done = (step - warmup) / (steps - warmup)  # from 0 to 1
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def train_epoch(epoch, model, optimizer, scaler, generator, data, args, dtype):
    """Train on all images once -> the epoch's record: means of what train_step returns."""
    start = time.perf_counter()
    steps = len(data) // args.batch_size  # an incomplete last batch is dropped
    warmup = round(min(5, 0.1 * args.epochs) * steps)  # 5 epochs [code]
    normalize = common.normalizer(data, data.images.device)
    order = torch.randperm(len(data), generator=generator).to(data.images.device)
    infonce = epoch <= args.infonce_epochs
    totals = {}
    for i in common.progress(epoch, args.epochs, steps):
        step = (epoch - 1) * steps + i  # counted from the run's first
        lr = learning_rate(step, args.epochs * steps, warmup, args.lr)
        optimizer.param_groups[0]["lr"] = lr
        batch = order[i * args.batch_size : (i + 1) * args.batch_size]
        images = data.images[batch] / 255
        views = [normalize(view) for view in draw_views(images, args, generator)]
        scalars = train_step(model, optimizer, scaler, views, args, dtype, infonce)
        for name, value in scalars.items():
            totals[name] = totals.get(name, 0) + value
    means = {name: total.item() / steps for name, total in totals.items()}
    speed = steps * args.batch_size / (time.perf_counter() - start)
    return {**means, "lr": lr, "images_per_second": speed}


def train(args, checkpoint, data, bank, test, device, dtype):
    """Train to the last epoch -> its record.

    data: Images to train on: .images uint8 (N, 3, S, S), on the device.
    bank, test: labelled Images for the kNN, or None. checkpoint: to go on from, or None.
    """
    torch.manual_seed(args.seed)
    encoder = common.build_encoder(args.arch, args.stem)
    model = Model(encoder, args.queue_size, args.predictor, args.bn_splits)
    model.to(device, memory_format=common.memory_format(device))
    if args.compile:
        common.compile_networks(device, model.student, model.teacher)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        trained,
        lr=args.lr,
        momentum=0.9,
        weight_decay=5e-4,  # [code]
        fused=device.type == "cuda",
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    generator = torch.Generator().manual_seed(args.seed)  # of batches and views
    state = (model, optimizer, scaler, generator)  # all that training changes
    common.restore(checkpoint, *state)
    run = common.Run(args, checkpoint, data, device, dtype)
    print(f"ln K = {math.log(args.queue_size):.3f}: the loss when all similarities are equal")
    for epoch in range(run.next_epoch, args.epochs + 1):
        start = time.perf_counter()
        record = {"epoch": epoch}
        if epoch > 0:  # epoch 0 only measures the random weights
            record |= train_epoch(epoch, *state, data, args, dtype)
        if bank is not None and (epoch % args.knn_every == 0 or epoch == args.epochs):
            record |= common.knn_of_both(model, bank, test, args.image_size, dtype)
        record["seconds"] = time.perf_counter() - start
        run.log(record, model)
        run.save(*state)
    return run.finish()


# ---------------------------------------------------------------------------------- command line

LIMITS = {"momentum": (0, 1), "infonce_epochs": (0, 10**6)}  # lowest and highest


def parse_arguments(argv):
    """-> arguments, and the checkpoint to resume, or None."""
    parser = common.Parser(prog="ressl.py", description=__doc__)
    option = parser.add_argument
    # None: fit_to_data decides. The other defaults are [code], except for --bn-splits [ours].
    common.add_shared_options(option)
    option("--arch", choices=common.ARCHITECTURES, help="encoder; None: resnet18, textures conv4")
    option("--bn-splits", type=int, default=1, help="groups of BatchNorm; 8 in the authors' code")
    option("--epochs", type=int, help="passes over the training images; None: 200, textures 15")
    option("--batch-size", type=int, help="B; None: 256, textures 64, less for few images")
    option("--lr", type=float, help="highest; None: 0.06 * B / 256, textures 0.24 * B / 256")
    option("--queue-size", type=int, help="K; None: 4096, textures 2048, larger images 16384")
    option("--student-temp", type=float, default=0.1, help="tau_s")
    option("--teacher-temp", type=float, default=0.04, help="tau_t, lower than tau_s")
    option("--momentum", type=float, help="m; None: 0.99, larger images 0.996")
    option("--teacher-view", choices=("weak", "strong"), default="weak", help="what it sees")
    option("--crops", type=int, choices=range(1, 6), default=1, help="multi-crop: student's views")
    option("--infonce-epochs", type=int, default=0, help="extended: epochs of InfoNCE, at first")
    option("--predictor", action="store_true", help="extended: MLP on the student")
    on_off = argparse.BooleanOptionalAction
    option("--compile", action=on_off, default=False, help="compile the networks, for a GPU")
    option("--knn-every", type=int, help="epochs from one kNN to the next; None: 10, textures 1")
    option("--output", help="run folder; None: a new one under runs/")
    option("--resume", metavar="RUN", help="continue the run in this folder, with its arguments")
    option("--views", metavar="FILE.png", help="only draw views")
    option("--seed", type=int, default=0, help="of weights, batches and views")
    return common.training_arguments(parser, argv, LIMITS)


def fit_to_data(args, count):
    """Choose what is None, for a data set of `count` images."""
    textures = args.data == "textures"
    larger = args.image_size > 40
    # The first layers keep the size of a small image [code].
    args.stem = "imagenet" if args.image_size > 96 else "medium" if larger else "small"
    if args.arch is None:
        args.arch = "conv4" if textures else "resnet18"
    if args.epochs is None:
        args.epochs = 15 if textures else 200  # [ours], [authors]
    if args.knn_every is None:
        args.knn_every = 1 if textures else 10
    if args.batch_size is None:
        args.batch_size = 64 if textures else 256  # [ours], [code]
        if args.batch_size > count // 4:
            groups = max(2, count // 4 // args.bn_splits)
            args.batch_size = groups * args.bn_splits
    if args.lr is None:
        args.lr = (0.24 if textures else 0.06) * args.batch_size / 256  # [ours], [code]
    if args.queue_size is None:
        args.queue_size = min(count, 2048 if textures else 16384 if larger else 4096)
    if args.momentum is None:
        args.momentum = 0.996 if larger else 0.99  # [code]


@common.command
def main(argv=None):
    """Run the command line -> the last epoch's record; with --views None."""
    args, checkpoint = parse_arguments(argv)
    device = common.pick_device(args.device)
    dtype = common.pick_precision(args.amp, device)
    data, bank, test = common.load_splits(args, device)
    if args.views:
        return common.save_views(args, test or data, draw_views)
    fit_to_data(args, len(data))
    return train(args, checkpoint, data, bank, test, device, dtype)


if __name__ == "__main__":
    main()
