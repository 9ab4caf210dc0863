r"""ReSSL: Relational Self-Supervised Learning with Weak Augmentation.

Zheng, You, Wang, Qian, Zhang, Wang, Xu. NeurIPS 2021. arXiv 2107.09282.

Contrastive learning asks two views of one image to match. ReSSL asks for less.
It compares each view with a queue of other images. This gives a relation: how similar
is the view to each image of the queue? Both views should have the same relation.
The teacher sees a weak view (crop and flip) and gives the target.
The student sees a strong view (colours and blur too) and has to predict the target.
The teacher is a slowly moving average of the student. It takes no gradient.

    p_t = softmax(k Q^T / tau_t)          the teacher's relation, the target
    p_s = softmax(q Q^T / tau_s)          the student's relation; tau_t < tau_s
    L   = - sum_i p_t(i) log p_s(i)       i runs over the queue; mean over the batch

    paper          here                         shape     what
    f              encoder                      (B, D)    ResNet-18, D = 512; or conv4, D = 256
    g              projector                    (B, d)    Linear, ReLU, Linear; d = 128
    q              q                            (B, d)    student's g(f(strong view)), length 1
    k              k                            (B, d)    teacher's g(f(weak view)), length 1
    Q              queue                        (K, d)    the last K teacher outputs
    p_t, p_s       p_t, softmax of logits       (B, K)    rows sum to 1
    tau_s, tau_t   student_temp, teacher_temp             0.1, 0.04
    m              momentum                               0.99; of the teacher's average

Why is tau_t lower? It makes the target sharper than the student's own relation: what is a
little nearer counts much more. So the student has to move nearer to what is near, and away
from the rest. At equal temperatures a flat relation stays flat, and L can stay at ln K.

    python ressl.py                              built-in textures, conv4, two CPU cores
    python ressl.py --data cifar10               ResNet-18, one GPU, the paper's 200 epochs

Each epoch prints a line. L = entropy of p_t + KL(p_t || p_s), so L cannot be lower than the
entropy. L and the entropy are ln K if all similarities are equal: nothing is told apart.
The queue begins with noise. A view is by chance nearer to some of the noise, so p_t is not
flat, and the student, a copy of the teacher, nearly agrees: L is below ln K. Then real outputs
fill the queue. They are still alike for all images, so L rises. As they move apart, L falls.
kNN is an accuracy on test images, by the features f(x) of student and teacher: the 200 nearest
labelled training images vote for the class. It needs no training. Epoch 0 has random weights.

Extensions; a first reading can skip them. The extended version (arXiv 2203.08717) is known to
us by its abstract [authors]; its details are [ours]. --infonce-epochs N begins with N epochs of
a contrastive loss. --predictor adds an MLP h to the student: q = h(g(f(x))), so that h can do
the predicting, and g(f(x)) need not change for it. --crops 5 is multi-crop [code].

Sources: [code] the authors' code, [authors] their words, [ours] the choice of this project.
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

    def forward(self, images):
        # BatchNorm normalises each group by its own mean and variance. The authors' code has
        # 8 groups [code], here it is one by default [ours]. B is a multiple of their number.
        groups = images.chunk(self.bn_splits)
        features = torch.cat([self.encoder(group) for group in groups])
        return self.projector(features)


class Model(nn.Module):
    """Student, teacher and queue."""

    def __init__(self, encoder, queue_size, predictor=False, bn_splits=1):
        super().__init__()
        self.student = Network(encoder, bn_splits)
        # The teacher is in train mode too: its BatchNorm uses the teacher's own batch [code].
        # Only the kNN sets eval mode, and it sets train mode again.
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
    """Cross-entropy between the target p_t (B, K) and the student's relation -> scalar."""
    logits = q @ queue.T / temperature  # (B, K)
    return F.cross_entropy(logits, p_t)  # of logits and probabilities: - sum p_t log p_s, mean


def relation_loss(q, k, queue, student_temp, teacher_temp):
    """The paper's loss in one piece: q (B, d), k (B, d), queue (K, d) -> scalar.

    train_step has its two parts, because it needs p_t twice. No gradient reaches k or queue.
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
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(momentum)  # of lists of tensors
    teacher = list(model.teacher.parameters())
    student = list(model.student.parameters())
    average(teacher, student, None)


def update_queue(model, k):
    """Add k (B, d) at the end of the queue. The oldest rows leave it."""
    model.queue = torch.cat([model.queue, k])[len(k) :]


# -------------------------------------------------------------------------------------- training


def train_step(model, optimizer, scaler, views, args, dtype=None, infonce=False):
    """Train on one batch -> {"loss": scalar, "entropy": scalar}, on the device.

    views: network inputs (B, 3, S, S). The last is the teacher's. The others are the student's:
        one, or several with --crops.
    scaler: torch.amp.GradScaler. For fp16 it scales the loss, so that small gradients are not
        rounded to 0. Otherwise it changes nothing.
    dtype: the networks run in bfloat16 or float16; None: in float32.
    infonce: use InfoNCE instead of the paper's loss (extended version).
    To watch one more quantity, add it to the dict: the log then shows its mean.
    For a loss on the features, call model.student.encoder(view) and .projector(features).
    """
    with common.autocast(views[0].device, dtype):  # networks in dtype, all else in float32
        with torch.no_grad():
            k = common.unit_length(model.teacher(views[-1]))  # (B, d), float32
        qs = []
        for view in views[:-1]:
            q = model.predictor(model.student(view))
            qs.append(common.unit_length(q))
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
    update_queue(model, k)  # after the loss: no image is compared with its k of this step
    entropy = torch.special.entr(p_t).sum(dim=1).mean()  # - sum p_t log p_t
    return {"loss": loss.detach(), "entropy": entropy}


# ----------------------------------------------------------------------------------------- views
# Each image of the batch gets its own random numbers. All settings are those of ReSSL's code.
# scale: area of the crop as a share of the image. ratio: width to height, log-uniform.
# brightness 0.4: factor from 0.6 to 1.4. hue 0.1: up to a tenth of a turn. sigma: in pixels.


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


# Multi-crop: size of each student's view as a share of the full size, and its scale [code].
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
    """Linear from 0 to the peak in `warmup` steps, then a cosine down to 0 at step `steps`."""
    if step < warmup:
        return peak * step / warmup
    done = (step - warmup) / (steps - warmup)  # from 0 to 1
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def train_epoch(epoch, model, optimizer, scaler, generator, data, args, dtype):
    """Train on all images once -> the means of what train_step returns, lr, images a second."""
    start = time.perf_counter()
    steps = len(data) // args.batch_size  # an incomplete last batch is dropped
    warmup = round(min(5, 0.1 * args.epochs) * steps)  # 5 in ReSSL's code
    normalize = common.normalizer(data)
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

    data: .images to train on, uint8 (N, 3, S, S), on the device.
    bank, test: labelled training and test images of the kNN, or None.
    checkpoint: of the run to go on with, or None.
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
        weight_decay=5e-4,  # as in ReSSL's code
        fused=device.type == "cuda",
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    generator = torch.Generator().manual_seed(args.seed)  # of batches and views
    state = (model, optimizer, scaler, generator)  # all that training changes
    common.restore(checkpoint, *state)  # without a checkpoint the weights stay random
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

LIMITS = {"momentum": (0, 1), "infonce_epochs": (0, 10**6)}  # others have to be above 0


def parse_arguments(argv):
    """-> arguments, and the checkpoint to resume, or None."""
    parser = common.Parser(prog="ressl.py", description=__doc__)
    option = parser.add_argument
    # None: fit_to_data decides. training_arguments adds what is not the method's own:
    # --data, --image-size, --device, --amp, --seed, --output, --resume, --compile and the like.
    option("--arch", choices=common.ARCHITECTURES, help="encoder; None: resnet18, textures conv4")
    option("--bn-splits", type=int, default=1, help="groups of BatchNorm; 8 in ReSSL's code")
    option("--epochs", type=int, help="passes over the training images; None: 200, textures 15")
    option("--batch-size", type=int, help="B; None: 256, textures 64, less for few images")
    option("--lr", type=float, help="highest; None: 0.06 * B / 256, textures 0.24 * B / 256")
    option("--queue-size", type=int, help="K; None: 4096, textures 2048, from 41 px 16384")
    option("--student-temp", type=float, default=0.1, help="tau_s")
    option("--teacher-temp", type=float, default=0.04, help="tau_t, lower than tau_s")
    option("--momentum", type=float, help="m; None: 0.99, from 41 px 0.996")
    option("--teacher-view", choices=("weak", "strong"), default="weak", help="what it sees")
    option("--crops", type=int, choices=range(1, 6), default=1, help="multi-crop: student's views")
    option("--infonce-epochs", type=int, default=0, help="extended: epochs of InfoNCE, at first")
    option("--predictor", action="store_true", help="extended: MLP on the student")
    option("--knn-every", type=int, help="epochs from one kNN to the next; None: 10, textures 1")
    return common.training_arguments(parser, argv, LIMITS)


def fit_to_data(args, count):
    """Choose what is None, for a data set of `count` images."""
    textures = args.data == "textures"
    larger = args.image_size > 40
    # Stem: how early the network halves its maps. On small images later, as in ReSSL's code.
    args.stem = "imagenet" if args.image_size > 96 else "medium" if larger else "small"
    if args.arch is None:
        args.arch = "conv4" if textures else "resnet18"
    if args.epochs is None:
        args.epochs = 15 if textures else 200  # 15: [ours], 200: [authors]
    if args.knn_every is None:
        args.knn_every = 1 if textures else 10
    if args.batch_size is None:
        args.batch_size = 64 if textures else 256  # [ours], ReSSL's code
        if args.batch_size > count // 4:
            in_group = max(2, count // 4 // args.bn_splits)  # BatchNorm needs two images
            args.batch_size = in_group * args.bn_splits
    if args.lr is None:
        args.lr = (0.24 if textures else 0.06) * args.batch_size / 256  # [ours], ReSSL's
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
