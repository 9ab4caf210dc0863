r"""Residual Momentum (Res-MoCo): self-supervised learning with a second loss towards the teacher.

Pham, Niu, Zhang, Madjid, Hong, Kim, Tee, Yoo. IEEE Access 2023. arXiv 2211.09861.

A student learns features of images without labels. It learns from a teacher, a slowly moving
average of itself, without gradient. The paper finds that the teacher represents images better
than the student [authors]. A view is a randomly changed copy of an image. Usual methods compare
student and teacher across two views: inter-momentum. To get a student as good as its teacher,
the paper compares them on the same view too: intra-momentum. What remains there is the gap.

Sources: [code] is MoCo v3's code. [authors] are the paper's abstracts, [figure] is a drawing by
its first author. [others] are a public library's settings for CIFAR. [ours] is our own choice.

The new term is added to an existing method, the base. Here that is MoCo v3 (2021). Each output q
of the student (query) has to find its own k (key) among the teacher's outputs k_j for the other
view of every image of the batch. The own k is that of the same image. A predictor turns the
student's output into the teacher's. The teacher's output is the goal, so it needs none.

    L         = L_inter + lambda L_intra
    L_inter   = InfoNCE(q_1, k_2) + InfoNCE(q_2, k_1)   across views: the base [code]
    L_intra   = gap(q_1, k_1) + gap(q_2, k_2)           same view: the paper's term [figure]
    gap(q, k) = 1 - cos(q, k)                           mean over the batch; from 0 to 2
    InfoNCE   = 2 tau * cross-entropy                   of cos(q, k_j) / tau; the own k is right

    paper          here                         shape     what
    f              encoder                      (B, D)    ResNet-18, D = 512; or conv4, D = 256
    g              projector                    (B, d)    MLP that ends in BatchNorm; d = 256
    h              predictor                    (B, d)    MLP: from g(f(view)) to the teacher's k
    q_1, q_2       q1, q2                       (B, d)    student's h(g(f(view))), norm 1
    k_1, k_2       k1, k2                       (B, d)    teacher's g(f(view)), norm 1
    tau            temperature                            0.2 [others]
    lambda         residual_weight                        1 [ours]
    m              momentum                               0.99 [others] to 1: old weights kept

    python residual_momentum.py                      built-in textures, conv4: four convolutions
    python residual_momentum.py --residual-weight 0  the base alone

Each epoch prints a line. The loss is a sum over the two views, the gap a mean over them.
kNN is an accuracy on test images. The 200 labelled training images with the nearest features
f(x) vote for the class. This trains nothing. Epoch 0 has random weights.

We know the paper by its abstracts and the drawing. They do not give lambda, the recipe, or the
place of the predictor. Here q comes from the predictor in both terms [ours]. Views, schedule and
loop are those of ressl.py, but both views are strong. A first reading can skip two options:
--base byol is another base, --residual kd is another second loss.
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
        self.projector.append(nn.BatchNorm1d(256, affine=False))  # no learned scale and shift
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
    """Student and teacher."""

    def __init__(self, encoder, bn_splits=1):
        super().__init__()
        self.student = Network(encoder, bn_splits)
        # The teacher is in train mode too: its BatchNorm uses the mean and variance of the
        # views that it sees [code]. Only the kNN sets eval mode, and then train mode again.
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.predictor = mlp(256, 2048, 256)


# ------------------------------------------------------------------------------------------ loss
# q and k are (B, d). No gradient reaches k. Each loss can be used alone: it makes norm 1 itself.


def info_nce(q, k, temperature):
    """MoCo v3's loss: each q should be more similar to its own k than to the others -> scalar.

    The cross-entropy is - cos(q, k) / tau + log sum_j exp(cos(q, k_j) / tau). Its first term
    pulls q to its k. The second pushes q from all keys k_j, most from the nearest.
    MoCo v3 multiplies both by 2 tau [code]. So the pull is - 2 cos(q, k), whatever tau is.
    Without the factor it would outweigh the gap at a small tau.
    """
    q = F.normalize(q, dim=1)
    k = F.normalize(k.detach(), dim=1)
    logits = q @ k.T / temperature  # (B, B)
    own = torch.arange(len(q), device=q.device)  # the own k of row i is in column i
    return 2 * temperature * F.cross_entropy(logits, own)


def residual_loss(q, k):
    """The paper's term, the gap: 1 - cos of q and k for the same view, mean over B -> scalar."""
    cosines = F.cosine_similarity(q, k.detach(), dim=1)  # (B,)
    return 1 - cosines.mean()


def byol_loss(q, k):
    """The loss of BYOL (2020), |q - k|^2 = 2 - 2 cos at norm 1, mean over B. A base [ours]."""
    return 2 * residual_loss(q, k)


def kd_loss(q, k, temperature):
    """Knowledge distillation: another loss on the same view, to compare with the gap -> scalar.

    It compares softmaxes over the d numbers of an output [figure], of q and k at norm 1 [ours].
    The value is KL = sum p_t log(p_t / p_s), here a tenth of a small gap: about
    (1 - cos) / (tau^2 d). --residual-weight 10 makes up for it.
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
    # PyTorch's moving average: it changes the first list of tensors in place, all at once. This
    # one does not need the third argument, which is the number of earlier updates.
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(momentum)
    teacher = list(model.teacher.parameters())
    student = list(model.student.parameters())
    average(teacher, student, None)


def teacher_momentum(step, steps, start):
    """From `start` at step 0 to 1 at step `steps`, by a cosine [code]."""
    rising = 0.5 * (1 - math.cos(math.pi * step / steps))  # from 0 to 1
    return start + (1 - start) * rising


# -------------------------------------------------------------------------------------- training


def train_step(model, optimizer, scaler, views, args, momentum, dtype=None):
    """Train on one batch -> {"loss": scalar, "gap": scalar}, tensors without gradient.

    views: x1 and x2, two views of the same images, (B, 3, S, S).
    scaler: torch.amp.GradScaler. For fp16 it scales the loss, so that small gradients are not
        rounded to 0. Otherwise it changes nothing.
    momentum: the teacher's m in this step; args.momentum is its value at step 0.
    dtype: bfloat16 or float16 for the networks. None means float32.
    To watch one more scalar x, add x.detach() to the dict. The log then has its mean.
    For a loss on the features, write these two lines instead of z = model.student(view):
        features = model.student.features(view)  # (B, D)
        z = model.student.projector(features)
    """
    x1, x2 = views
    with common.autocast(views[0].device, dtype):  # runs convolutions and Linears in dtype
        with torch.no_grad():
            k1 = common.unit_length(model.teacher(x1))  # (B, d), float32, rows of norm 1
            k2 = common.unit_length(model.teacher(x2))
        z1 = model.student(x1)
        z2 = model.student(x2)
        q1 = common.unit_length(model.predictor(z1))
        q2 = common.unit_length(model.predictor(z2))
    tau = args.temperature
    if args.base == "moco":
        inter = info_nce(q1, k2, tau) + info_nce(q2, k1, tau)
    else:
        inter = byol_loss(q1, k2) + byol_loss(q2, k1)
    gaps = residual_loss(q1, k1) + residual_loss(q2, k2)  # logged whatever the term is
    if args.residual == "cosine":
        intra = gaps
    else:
        intra = kd_loss(q1, k1, tau) + kd_loss(q2, k2, tau)
    loss = inter + args.residual_weight * intra
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)  # optimizer.step(), left out if an fp16 gradient overflowed
    scaler.update()  # adapts its factor for the next step
    update_teacher(model, momentum)
    return {"loss": loss.detach(), "gap": gaps.detach() / 2}


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
    """Train on all images once -> the means of what train_step returns, and the last step's lr."""
    start = time.perf_counter()
    steps = len(data) // args.batch_size  # an incomplete last batch is dropped
    total_steps = args.epochs * steps
    warmup_epochs = min(5, 0.1 * args.epochs)  # 5 in ReSSL's code
    warmup = round(warmup_epochs * steps)
    normalize = common.normalizer(data)  # subtracts the mean colour, divides by the deviation
    order = torch.randperm(len(data), generator=generator).to(data.images.device)
    totals = {}
    for i in common.progress(epoch, args.epochs, steps):  # range(steps) with a progress bar
        step = (epoch - 1) * steps + i  # counted from the run's first
        lr = learning_rate(step, total_steps, warmup, args.lr)
        optimizer.param_groups[0]["lr"] = lr
        batch = order[i * args.batch_size : (i + 1) * args.batch_size]
        images = data.images[batch] / 255
        views = [normalize(view) for view in draw_views(images, args, generator)]
        momentum = teacher_momentum(step, total_steps, args.momentum)
        scalars = train_step(model, optimizer, scaler, views, args, momentum, dtype)
        for name, value in scalars.items():
            totals[name] = totals.get(name, 0) + value
    means = {name: total.item() / steps for name, total in totals.items()}
    speed = steps * args.batch_size / (time.perf_counter() - start)
    return {**means, "lr": lr, "m": momentum, "images_per_second": speed}


def train(args, checkpoint, data, bank, test, device, dtype):
    """Train to the last epoch -> its record, a dict of numbers.

    data: the images to train on. data.images is uint8 (N, 3, S, S) and on the device.
    bank: the labelled training images, which vote in the kNN. test: its test images.
        Without labels both are None.
    checkpoint: a dict to go on with a run, or None.
    """
    torch.manual_seed(args.seed)
    encoder = common.build_encoder(args.arch, args.stem)
    model = Model(encoder, args.bn_splits)
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
LIMITS = {"momentum": (0, 1), "residual_weight": (0, 10**6)}


def parse_arguments(argv):
    """-> arguments, and the checkpoint to resume, or None."""
    parser = common.Parser(prog="residual_momentum.py", description=__doc__)
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
    option("--epochs", type=int, help="passes over the training images; None: 200, textures 10")
    option("--batch-size", type=int, help="B; None: 256, textures 64, less for few images")
    option("--lr", type=float, help="highest; None: 0.06 * B / 256, textures 0.24 * B / 256")
    option("--temperature", type=float, default=0.2, help="tau")
    option("--momentum", type=float, help="m at the start; None: 0.99, above 40 px 0.996")
    option("--base", choices=("moco", "byol"), default="moco", help="inter-momentum")
    option("--residual", choices=("cosine", "kd"), default="cosine", help="intra-momentum")
    option("--residual-weight", type=float, default=1.0, help="lambda; 0: the base alone")
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
        args.epochs = 10 if textures else 200  # [ours]
    if args.knn_every is None:
        args.knn_every = 1 if textures else 10
    if args.batch_size is None:
        usual = 64 if textures else 256  # 64: [ours], 256: ReSSL's code
        args.batch_size = max(2, min(usual, count // 4))  # BatchNorm needs two images
    if args.lr is None:
        peak = 0.24 if textures else 0.06  # 0.24: [ours], 0.06: ReSSL's code
        args.lr = peak * args.batch_size / 256
    if args.momentum is None:
        args.momentum = 0.996 if larger else 0.99  # 0.99: [others], 0.996: [ours]


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
