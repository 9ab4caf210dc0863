r"""ReSSL: Relational Self-Supervised Learning with Weak Augmentation.

Zheng, You, Wang, Qian, Zhang, Wang, Xu. NeurIPS 2021. arXiv 2107.09282.

The network learns features of images without labels. A view is a randomly changed copy of an
image. Contrastive learning asks that two views of an image get the same output. ReSSL asks for
less. It compares each view with a queue of the teacher's latest outputs, nearly all of other
images. This gives a relation: how similar is the view to each entry of the queue?
The teacher is a slowly moving average of the student, without gradient. It sees a weak view
(crop and flip), which still shows what the image shows. So its relation is the target. The
student sees a strong view (colours and blur too), and has to predict the target.

    p_t = softmax(k Q^T / tau_t)          the teacher's relation, the target
    p_s = softmax(q Q^T / tau_s)          the student's relation; tau_t < tau_s
    L   = - sum_i p_t(i) log p_s(i)       i runs over the queue; mean over the batch

    paper          here                         shape     what
    f              encoder                      (B, D)    ResNet-18, D = 512; or conv4, D = 256
    g              projector                    (B, d)    Linear, ReLU, Linear; d = 128
    q              q                            (B, d)    student's g(f(strong view)), norm 1
    k              k                            (B, d)    teacher's g(f(weak view)), norm 1
    Q              queue                        (K, d)    the last K outputs k, norm 1
    p_t, p_s       p_t, softmax of logits       (B, K)    rows sum to 1
    tau_s, tau_t   student_temp, teacher_temp             temperatures, 0.1 and 0.04
    m              momentum                               0.99: old weights kept in a step

A lower temperature makes a softmax sharper: a small difference in similarity becomes a large one
in probability. At equal temperatures q = k has the lowest loss already, and nothing enlarges
small differences. With a lower tau_t the target shows each of them enlarged. So q has to move
towards the entries that are near to k, and away from the others.

    python ressl.py                              built-in textures, conv4: four convolutions
    python ressl.py --data cifar10               ResNet-18, one GPU, the paper's 200 epochs

Each epoch prints a line. The entropy of p_t is largest, ln K, if the relation is flat: no entry
stands out. L is never below the entropy: L = entropy + KL, KL = sum p_t log(p_t / p_s) >= 0.
At first the queue is noise. By chance some of it is nearer than the rest, so p_t is not flat.
Both networks have the same weights, so they find the same noise near, and L is below ln K. Then
real outputs fill it. They are still alike, so L rises towards ln K. As they move apart, L falls.
kNN is an accuracy on test images. The 200 labelled training images with the nearest features
f(x) vote for the class. This trains nothing. Epoch 0 has random weights.

Sources: [code] is the authors' code, [authors] are their words, [ours] is our own choice.

Extensions; a first reading can skip them. The extended version (arXiv 2203.08717) is known to
us by its abstract [authors]; its details are [ours]. --infonce-epochs N begins with N epochs of
InfoNCE, a contrastive loss: pick the own k out of the own k and the queue. --predictor adds an
MLP h that turns the student's output into the teacher's, which is the goal: q = h(g(f(x))). With
--crops 5 the student sees five views, four of them smaller (multi-crop) [code].
"""

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

    def features(self, images):
        """f of the images -> (B, D)."""
        # The encoder's BatchNorm normalises each group by its own mean and variance, as if each
        # were on its own GPU. ReSSL's code has 8 groups. Here it is one group by default [ours].
        groups = images.chunk(self.bn_splits)
        return torch.cat([self.encoder(group) for group in groups])

    def forward(self, images):
        return self.projector(self.features(images))


class Model(nn.Module):
    """Student, teacher and queue."""

    def __init__(self, encoder, queue_size, predictor=False, bn_splits=1):
        super().__init__()
        self.student = Network(encoder, bn_splits)
        # The teacher is in train mode too: its BatchNorm uses the mean and variance of the
        # views that it sees [code]. Only the kNN sets eval mode, and then train mode again.
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
        # A buffer is saved and moved with the model, and not trained.
        self.register_buffer("queue", F.normalize(noise, dim=1))  # (K, d)


# ------------------------------------------------------------------------------------------ loss
# Rows of q, k and queue have norm 1. So q @ queue.T holds cosine similarities.


def relation(x, queue, temperature):
    """How similar is each row of x (q or k) to each row of the queue? -> (B, K), rows sum to 1."""
    return F.softmax(x @ queue.T / temperature, dim=1)


def prediction_loss(q, p_t, queue, temperature):
    """Cross-entropy between the target p_t (B, K) and the student's relation -> scalar."""
    logits = q @ queue.T / temperature  # (B, K)
    # cross_entropy also takes probabilities as target: - sum_i p_t(i) log p_s(i), mean over B.
    return F.cross_entropy(logits, p_t)


def relation_loss(q, k, queue, student_temp, teacher_temp):
    """The paper's loss in one piece -> scalar. No gradient reaches k or queue.

    train_step has its two parts instead, because it needs p_t for the entropy too.
    """
    queue = queue.detach()
    p_t = relation(k.detach(), queue, teacher_temp)
    return prediction_loss(q, p_t, queue, student_temp)


def info_nce(q, k, queue, temperature):
    """Extended version: cross-entropy over 1 + K classes, the own k is the right one -> scalar."""
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
    # PyTorch's moving average: it changes the first list of tensors in place, all at once. This
    # one does not need the third argument, which is the number of earlier updates.
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(momentum)
    teacher = list(model.teacher.parameters())
    student = list(model.student.parameters())
    average(teacher, student, None)


def update_queue(model, k):
    """Add k (B, d) at the end of the queue. The oldest rows leave it."""
    model.queue = torch.cat([model.queue, k])[len(k) :]


# -------------------------------------------------------------------------------------- training


def train_step(model, optimizer, scaler, views, args, dtype=None, infonce=False):
    """Train on one batch -> {"loss": scalar, "entropy": scalar}, tensors without gradient.

    views: inputs (B, 3, S, S), the student's (several with --crops), then the teacher's.
    scaler: torch.amp.GradScaler. For fp16 it scales the loss, so that small gradients are not
        rounded to 0. Otherwise it changes nothing.
    dtype: bfloat16 or float16 for the networks. None means float32.
    infonce: use InfoNCE instead of the paper's loss (extended version).
    To watch one more scalar x, add x.detach() to the dict. The log then has its mean.
    For a loss on the features, write these two lines instead of z = model.student(view):
        features = model.student.features(view)  # (B, D)
        z = model.student.projector(features)
    """
    with common.autocast(views[0].device, dtype):  # runs convolutions and Linears in dtype
        with torch.no_grad():
            k = common.unit_length(model.teacher(views[-1]))  # (B, d), float32, rows of norm 1
        qs = []
        for view in views[:-1]:
            z = model.student(view)
            qs.append(common.unit_length(model.predictor(z)))
    p_t = relation(k, model.queue, args.teacher_temp)  # (B, K), without gradient, as k and queue
    losses = []
    for q in qs:
        if infonce:
            losses.append(info_nce(q, k, model.queue, args.student_temp))
        else:
            losses.append(prediction_loss(q, p_t, model.queue, args.student_temp))
    loss = sum(losses) / len(losses)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)  # optimizer.step(), left out if an fp16 gradient overflowed
    scaler.update()  # adapts its factor for the next step
    update_teacher(model, args.momentum)
    # After the loss: k has similarity 1 with itself. It would take nearly all of p_t, and leave
    # nothing to learn about other images. An older k of the image may be there, less similar.
    update_queue(model, k)
    entropy = torch.special.entr(p_t).sum(dim=1).mean()  # - sum p_t log p_t
    return {"loss": loss.detach(), "entropy": entropy}


# ----------------------------------------------------------------------------------------- views
# Each image of the batch gets its own random numbers. All settings are those of ReSSL's code.
# scale: area of the crop as a share of the image. ratio: width to height; its logarithm is
# uniform, so 3:4 is as likely as 4:3. brightness 0.4: factor from 0.6 to 1.4. hue 0.1: up to a
# tenth of the colour circle. sigma: in pixels.


def weak_view(images, size=None, generator=None, scale=(0.2, 1.0)):
    """Crop and flip: float images (N, 3, S, S) in [0, 1] -> (N, 3, size, size).

    size: S if it is None.
    """
    size = size or images.shape[-1]
    images = common.random_crop(
        images,
        size,
        scale,
        ratio=(3 / 4, 4 / 3),
        generator=generator,
    )
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
    return common.random_blur(
        images,
        p=0.5,
        sigma=(0.1, 2.0),
        kernel_size=13,
        generator=generator,
    )


# Multi-crop, a row for each view of the student: size, as a share of S, and scale [code].
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
    draw = weak_view if args.teacher_view == "weak" else strong_view
    views.append(draw(images, args.image_size, generator))
    return views


# ----------------------------------------------------------------------------- schedule and loop


def learning_rate(step, steps, warmup, peak):
    """Linear from 0 to the peak in `warmup` steps, then a cosine down to 0 at step `steps`."""
    if step < warmup:
        return peak * step / warmup
    done = (step - warmup) / (steps - warmup)  # from 0 to 1
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def train_epoch(epoch, model, optimizer, scaler, generator, data, args, dtype):
    """Train on all images once -> the means of what train_step returns, and the last step's lr."""
    start = time.perf_counter()
    steps = len(data) // args.batch_size  # an incomplete last batch is dropped
    total_steps = args.epochs * steps
    warmup_epochs = min(5, 0.1 * args.epochs)  # 5 in ReSSL's code
    warmup = round(warmup_epochs * steps)
    normalize = common.normalizer(data)  # subtracts the mean colour, divides by the deviation
    order = torch.randperm(len(data), generator=generator).to(data.images.device)
    infonce = epoch <= args.infonce_epochs  # epochs are counted from 1
    totals = {}
    for i in common.progress(epoch, args.epochs, steps):  # range(steps) with a progress bar
        step = (epoch - 1) * steps + i  # counted from the run's first
        lr = learning_rate(step, total_steps, warmup, args.lr)
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
    """Train to the last epoch -> its record, a dict of numbers.

    data: the images to train on. data.images is uint8 (N, 3, S, S) and on the device.
    bank: the labelled training images, which vote in the kNN. test: its test images.
        Without labels both are None.
    checkpoint: a dict to go on with a run, or None.
    """
    torch.manual_seed(args.seed)
    encoder = common.build_encoder(args.arch, args.stem)
    model = Model(encoder, args.queue_size, args.predictor, args.bn_splits)
    model.to(device, memory_format=common.memory_format(device))  # for speed only
    if args.compile:
        common.compile_networks(device, model.student, model.teacher)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        trained,
        lr=args.lr,
        momentum=0.9,
        weight_decay=5e-4,  # as in ReSSL's code
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    generator = torch.Generator().manual_seed(args.seed)  # of batches and views
    if checkpoint:
        common.restore(checkpoint, model, optimizer, scaler, generator)
    run = common.Run(args, checkpoint, data, device, dtype)  # its folder and its log
    print(f"ln K = {math.log(args.queue_size):.3f}: the loss when all similarities are equal")
    for epoch in range(run.next_epoch, args.epochs + 1):
        start = time.perf_counter()
        record = {"epoch": epoch}
        if epoch > 0:  # epoch 0 only measures the random weights
            means = train_epoch(epoch, model, optimizer, scaler, generator, data, args, dtype)
            record.update(means)
        evaluate = epoch % args.knn_every == 0 or epoch == args.epochs
        if bank is not None and evaluate:
            record.update(common.knn_of_both(model, bank, test, args.image_size, dtype))
        record["seconds"] = time.perf_counter() - start
        run.log(record, model)  # stops if a number of the record or a weight is not finite
        # checkpoint.pt: arguments, records, the encoders for use alone, and these four.
        run.save(model, optimizer, scaler, generator)
    return run.finish()


# ---------------------------------------------------------------------------------- command line

# The lowest and the highest value that is allowed. All other numbers have to be above 0.
LIMITS = {"momentum": (0, 1), "infonce_epochs": (0, 10**6)}


def parse_arguments(argv):
    """-> arguments, and the checkpoint to resume, or None."""
    parser = common.Parser(prog="ressl.py", description=__doc__)
    option = parser.add_argument
    # "None: ..." in a help text is what fit_to_data chooses if the option is not given.
    # training_arguments adds what is not the method's own: --data, --image-size, --device,
    # --amp, --seed, --output, --resume, --views, --compile and the like.
    option(
        "--arch",
        choices=common.ARCHITECTURES,
        help="encoder; None: conv4 for textures, else resnet18",
    )
    option("--bn-splits", type=int, default=1, help="groups of BatchNorm; 8 in ReSSL's code")
    option("--epochs", type=int, help="passes over the training images; None: 200, textures 15")
    option("--batch-size", type=int, help="B; None: 256, textures 64, less for few images")
    option("--lr", type=float, help="highest; None: 0.06 * B / 256, textures 0.24 * B / 256")
    option("--queue-size", type=int, help="K; None: 4096, textures 2048, above 40 px 16384")
    option("--student-temp", type=float, default=0.1, help="tau_s")
    option("--teacher-temp", type=float, default=0.04, help="tau_t, lower than tau_s")
    option("--momentum", type=float, help="m; None: 0.99, above 40 px 0.996")
    option("--teacher-view", choices=("weak", "strong"), default="weak", help="what it sees")
    option("--crops", type=int, choices=range(1, 6), default=1, help="multi-crop: student's views")
    option("--infonce-epochs", type=int, default=0, help="extended: epochs of InfoNCE, at first")
    option("--predictor", action="store_true", help="extended: MLP on the student")
    option("--knn-every", type=int, help="epochs from one kNN to the next; None: 10, textures 1")
    return common.training_arguments(parser, argv, LIMITS)


def fit_to_data(args, count):
    """Choose the arguments that were not given, for a data set of `count` images."""
    textures = args.data == "textures"
    larger = args.image_size > 40
    # Stem: the first layers. For small images they keep the resolution, as in ReSSL's code.
    if args.image_size > 96:
        args.stem = "imagenet"
    else:
        args.stem = "medium" if larger else "small"
    if args.arch is None:
        args.arch = "conv4" if textures else "resnet18"
    if args.epochs is None:
        args.epochs = 15 if textures else 200  # 15: [ours], 200: [authors]
    if args.knn_every is None:
        args.knn_every = 1 if textures else 10
    if args.batch_size is None:
        usual = 64 if textures else 256  # 64: [ours], 256: ReSSL's code
        args.batch_size = max(2, min(usual, count // 4))  # BatchNorm needs two images
    if args.lr is None:
        peak = 0.24 if textures else 0.06  # 0.24: [ours], 0.06: ReSSL's code
        args.lr = peak * args.batch_size / 256
    if args.queue_size is None:
        usual = 16384 if larger else 4096
        args.queue_size = min(count, 2048 if textures else usual)
    if args.momentum is None:
        args.momentum = 0.996 if larger else 0.99  # [code]


@common.command
def main(argv=None):
    """Run the command line -> the last epoch's record.

    @common.command prints a user's mistake as one line, without a traceback.
    """
    args, checkpoint = parse_arguments(argv)
    device = common.pick_device(args.device)
    dtype = common.pick_precision(args.amp, device)
    data, bank, test = common.load_splits(args, device)
    if args.views:
        return common.save_views(args, data, draw_views)  # a picture of views, no training
    fit_to_data(args, len(data))
    return train(args, checkpoint, data, bank, test, device, dtype)


if __name__ == "__main__":
    main()
