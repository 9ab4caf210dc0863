r"""Residual Momentum (Res-MoCo): self-supervised learning with a second pull to the teacher.

Pham, Niu, Zhang, Madjid, Hong, Kim, Tee, Yoo. IEEE Access 2023. arXiv 2211.09861.

A student learns from a teacher, a slowly moving average of itself. The teacher takes no
gradient. The paper finds that the teacher represents images better than the student [authors].
Usual methods compare student and teacher across two views of an image: inter-momentum.
The paper adds intra-momentum: it compares them on the *same* view too. The aim is a student
as good as its teacher. The gap is the distance between their outputs, and the term is the gap.

    L         = L_inter + lambda L_intra
    L_inter   = InfoNCE(q_1, k_2) + InfoNCE(q_2, k_1)   across views: the base, MoCo v3 [code]
    L_intra   = gap(q_1, k_1) + gap(q_2, k_2)           same view: the paper's term [figure]
    gap(q, k) = 1 - cos(q, k)                           mean over the batch; from 0 to 2

    paper          here                         shape     what
    f              encoder                      (B, D)    ResNet-18, D = 512; or conv4, D = 256
    g              projector                    (B, d)    MLP that ends in BatchNorm; d = 256
    h              predictor                    (B, d)    MLP, only for the student
    q_1, q_2       q1, q2                       (B, d)    student's h(g(f(view))), length 1
    k_1, k_2       k1, k2                       (B, d)    teacher's g(f(view)), length 1
    tau            temperature                            0.2 [others]
    lambda         residual_weight                        1 [ours]
    m              momentum                               0.99 [others], to 1 by a cosine

InfoNCE asks each query q to find its own key k among the other view's keys of the batch.
The predictor h does the predicting: it makes q from g(f(view)), which need not equal k then.

    python residual_momentum.py                      built-in textures, conv4, two CPU cores
    python residual_momentum.py --residual-weight 0  the base alone

Each epoch prints a line. The loss is a sum over the two views, the gap a mean over them.
kNN is an accuracy on test images, by the features f(x) of student and teacher: the 200 nearest
labelled training images vote for the class. It needs no training. Epoch 0 has random weights.

We know the paper by its abstracts and a drawing by its first author. They give the idea and
the base. They do not give lambda, the recipe, or the place of the predictor. Here q comes from
the predictor in both terms [ours]. The base BYOL (--base byol) and knowledge distillation in
place of the term (--residual kd) are for comparison; a first reading can skip them.

Sources: [code] MoCo v3's code, [authors] the paper's abstracts, [figure] the drawing.
[others] is a public library's settings for CIFAR, and [ours] the choice of this project.
Views, schedule and loop are those of ressl.py.
"""

import copy
import math
import time

import torch
from torch import nn
from torch.nn import functional as F

import common

# ----------------------------------------------------------------------------------------- model


def mlp(inputs, hidden, outputs):
    """Linear, BatchNorm, ReLU, Linear; without bias [code]."""
    return nn.Sequential(
        nn.Linear(inputs, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, outputs, bias=False),
    )


class Network(nn.Module):
    """Encoder f and projector g: images (B, 3, S, S) -> (B, d)."""

    def __init__(self, encoder, bn_splits=1):
        super().__init__()
        self.encoder = encoder
        self.projector = mlp(encoder.dim, 2048, 256)
        self.projector.append(nn.BatchNorm1d(256, affine=False))
        self.bn_splits = bn_splits

    def forward(self, images):
        # BatchNorm normalises each group by its own mean and variance, as in ressl.py.
        # It is one group by default. B is a multiple of their number.
        groups = images.chunk(self.bn_splits)
        features = torch.cat([self.encoder(group) for group in groups])
        return self.projector(features)


class Model(nn.Module):
    """Student and teacher."""

    def __init__(self, encoder, bn_splits=1):
        super().__init__()
        self.student = Network(encoder, bn_splits)
        # The teacher is in train mode too: its BatchNorm uses the teacher's own batch [code].
        # Only the kNN sets eval mode, and it sets train mode again.
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.predictor = mlp(256, 2048, 256)


# ------------------------------------------------------------------------------------------ loss
# q and k are (B, d). Each loss scales their rows to length 1. No gradient reaches k.


def info_nce(q, k, temperature):
    """MoCo v3's loss: each q should be more similar to its own k than to the others -> scalar.

    MoCo v3 multiplies by 2 tau [code]. For one q, with own key k and all keys k_j of the batch:
        2 tau CE = - 2 cos(q, k) + 2 tau log sum_j exp(cos(q, k_j) / tau).
    Without it the first term, the pull to k, would be - cos(q, k) / tau, and its weight against
    the paper's term would change with tau. With it the weight is 2, as in BYOL's 2 - 2 cos.
    The second term pushes q away from all keys.
    """
    q = F.normalize(q, dim=1)
    k = F.normalize(k.detach(), dim=1)
    logits = q @ k.T / temperature  # (B, B)
    own = torch.arange(len(q), device=q.device)  # the own k of row i is in column i
    return 2 * temperature * F.cross_entropy(logits, own)


def byol_loss(q, k):
    """BYOL's loss: |q - k|^2 = 2 - 2 cos at length 1. Another base [ours]."""
    cosines = F.cosine_similarity(q, k.detach(), dim=1)  # (B,)
    return 2 - 2 * cosines.mean()


def residual_loss(student, teacher):
    """The paper's term: 1 - cos on the same view, mean over the batch -> scalar.

    student, teacher: outputs q and k for that view, (B, d). The value is the gap.
    """
    cosines = F.cosine_similarity(student, teacher.detach(), dim=1)  # (B,)
    return 1 - cosines.mean()


def kd_loss(q, k, temperature):
    """Knowledge distillation, to compare: does any pull on the same view help? -> scalar.

    It compares softmaxes over the d features [figure], of q and k at length 1 [ours].
    The value is KL(teacher || student), about (1 - cos) / (tau^2 d): a tenth of the gap for
    tau 0.2 and d 256. --residual-weight 10 makes up for it.
    """
    q = F.normalize(q, dim=1)
    k = F.normalize(k.detach(), dim=1)
    log_p_s = F.log_softmax(q / temperature, dim=1)
    log_p_t = F.log_softmax(k / temperature, dim=1)
    return F.kl_div(log_p_s, log_p_t, reduction="batchmean", log_target=True)


# --------------------------------------------------------------------------------------- teacher


@torch.no_grad()
def update_teacher(model, momentum):
    """teacher = momentum * teacher + (1 - momentum) * student, for all parameters.

    Buffers are no parameters: BatchNorm's running statistics stay the teacher's own [code].
    """
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(momentum)  # of lists of tensors
    teacher = list(model.teacher.parameters())
    student = list(model.student.parameters())
    average(teacher, student, None)


def teacher_momentum(step, steps, start):
    """From `start` at step 0 to 1 at step `steps`, by a cosine [code]."""
    falling = 0.5 * (1 + math.cos(math.pi * step / steps))  # from 1 to 0
    return 1 - (1 - start) * falling


# -------------------------------------------------------------------------------------- training


def train_step(model, optimizer, scaler, views, args, momentum, dtype=None):
    """Train on one batch -> {"loss": scalar, "gap": scalar}, on the device.

    views: x1 and x2, network inputs (B, 3, S, S), two views of the same images.
    scaler: torch.amp.GradScaler. For fp16 it scales the loss, so that small gradients are not
        rounded to 0. Otherwise it changes nothing.
    momentum: the teacher's m in this step; args.momentum is that of the first.
    dtype: the networks run in bfloat16 or float16; None: in float32.
    To watch one more quantity, add it to the dict: the log then shows its mean.
    For a loss on the features, call model.student.encoder(view) and .projector(features).
    """
    x1, x2 = views
    with common.autocast(x1.device, dtype):  # networks in dtype, all else in float32
        with torch.no_grad():
            k1 = common.unit_length(model.teacher(x1))  # (B, d), float32
            k2 = common.unit_length(model.teacher(x2))
        q1 = common.unit_length(model.predictor(model.student(x1)))
        q2 = common.unit_length(model.predictor(model.student(x2)))
    tau = args.temperature
    if args.base == "moco":
        inter = info_nce(q1, k2, tau) + info_nce(q2, k1, tau)
    else:
        inter = byol_loss(q1, k2) + byol_loss(q2, k1)
    gaps = residual_loss(q1, k1) + residual_loss(q2, k2)
    if args.residual == "cosine":
        intra = gaps
    else:
        intra = kd_loss(q1, k1, tau) + kd_loss(q2, k2, tau)
    loss = inter + args.residual_weight * intra
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    update_teacher(model, momentum)
    return {"loss": loss.detach(), "gap": gaps.detach() / 2}


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


def draw_views(images, args, generator):
    """-> two strong views of the same images, as a list."""
    x1 = strong_view(images, args.image_size, generator)
    x2 = strong_view(images, args.image_size, generator)
    return [x1, x2]


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
    totals = {}
    for i in common.progress(epoch, args.epochs, steps):
        step = (epoch - 1) * steps + i  # counted from the run's first
        lr = learning_rate(step, args.epochs * steps, warmup, args.lr)
        optimizer.param_groups[0]["lr"] = lr
        batch = order[i * args.batch_size : (i + 1) * args.batch_size]
        images = data.images[batch] / 255
        views = [normalize(view) for view in draw_views(images, args, generator)]
        momentum = teacher_momentum(step, args.epochs * steps, args.momentum)
        scalars = train_step(model, optimizer, scaler, views, args, momentum, dtype)
        for name, value in scalars.items():
            totals[name] = totals.get(name, 0) + value
    means = {name: total.item() / steps for name, total in totals.items()}
    speed = steps * args.batch_size / (time.perf_counter() - start)
    return {**means, "lr": lr, "m": momentum, "images_per_second": speed}


def train(args, checkpoint, data, bank, test, device, dtype):
    """Train to the last epoch -> its record.

    data: .images to train on, uint8 (N, 3, S, S), on the device.
    bank, test: labelled training and test images of the kNN, or None.
    checkpoint: of the run to go on with, or None.
    """
    torch.manual_seed(args.seed)
    encoder = common.build_encoder(args.arch, args.stem)
    model = Model(encoder, args.bn_splits)
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

LIMITS = {"momentum": (0, 1), "residual_weight": (0, 10**6)}  # others have to be above 0


def parse_arguments(argv):
    """-> arguments, and the checkpoint to resume, or None."""
    parser = common.Parser(prog="residual_momentum.py", description=__doc__)
    option = parser.add_argument
    # None: fit_to_data decides. training_arguments adds what is not the method's own:
    # --data, --image-size, --device, --amp, --seed, --output, --resume, --compile and the like.
    option("--arch", choices=common.ARCHITECTURES, help="encoder; None: resnet18, textures conv4")
    option("--bn-splits", type=int, default=1, help="groups of BatchNorm; 8 in ReSSL's code")
    option("--epochs", type=int, help="passes over the training images; None: 200, textures 10")
    option("--batch-size", type=int, help="B; None: 256, textures 64, less for few images")
    option("--lr", type=float, help="highest; None: 0.06 * B / 256, textures 0.24 * B / 256")
    option("--temperature", type=float, default=0.2, help="tau")
    option("--momentum", type=float, help="m at the start; None: 0.99, from 41 px 0.996")
    option("--base", choices=("moco", "byol"), default="moco", help="inter-momentum")
    option("--residual", choices=("cosine", "kd"), default="cosine", help="intra-momentum")
    option("--residual-weight", type=float, default=1.0, help="lambda; 0: the base alone")
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
        args.epochs = 10 if textures else 200  # [ours]
    if args.knn_every is None:
        args.knn_every = 1 if textures else 10
    if args.batch_size is None:
        args.batch_size = 64 if textures else 256  # [ours], ReSSL's code
        if args.batch_size > count // 4:
            in_group = max(2, count // 4 // args.bn_splits)  # BatchNorm needs two images
            args.batch_size = in_group * args.bn_splits
    if args.lr is None:
        args.lr = (0.24 if textures else 0.06) * args.batch_size / 256  # [ours], ReSSL's
    if args.momentum is None:
        args.momentum = 0.996 if larger else 0.99  # 0.99: [others], 0.996: [ours]


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
