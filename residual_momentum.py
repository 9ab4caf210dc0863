r"""Residual Momentum (Res-MoCo) for self-supervised visual representation learning.

Pham, Niu, Zhang, Madjid, Hong, Kim, Tee, Yoo. IEEE Access 2023. arXiv 2211.09861.

In methods with a momentum teacher, the paper finds, the teacher represents images better than
the student [authors]. They compare the two across views only: *inter-momentum*, which closes the
inter-gap, from the student's output on one view to the teacher's on the other [figure]. The paper
adds *intra-momentum*: pull the student to the teacher on the *same* view too, and so close the
"intra-representation gap measured by cosine similarity" [authors].

    L = L_inter + lambda L_intra
        L_inter    InfoNCE(q_1, k_2) + InfoNCE(q_2, k_1)    across views: the base, MoCo v3 [code]
        L_intra    gap(q_1, k_1) + gap(q_2, k_2)            on the same view [figure], both [ours]
        gap(q, k)  mean over the batch of 1 - cos(q, k); no gradient to k [figure]

    paper          here                         shape          what
    x_1, x_2       x1, x2                       (B, 3, S, S)   two strong views of the same B images
    f              encoder                      -> (B, D)      torchvision's, headless; or conv4
    g              projector                    -> (B, d)      MLP that ends in BatchNorm; d = 256
    h              predictor                    -> (B, d)      MLP; the student's only
    q_1, q_2       q1, q2                       (B, d)         student's: h(g(f(x))) [ours], below
    k_1, k_2       k1, k2                       (B, d)         teacher's: g(f(x)), no gradient
    tau            temperature                                 0.2 [others]
    lambda         residual_weight                             1 [ours]
    m              momentum, m                                 0.99 [others] to 1, by a cosine

Here q and k have any length: the losses bring them to unit length. Both parts compare the
same outputs, in a drawing that has no predictor [figure]. Here they are what the base compares: so
q comes from the predictor in both [ours].

    python residual_momentum.py                                built-in textures, two CPU cores
    python residual_momentum.py --residual-weight 0            the base, without intra-momentum
    python residual_momentum.py --data cifar10                 one GPU, 200 epochs
    python residual_momentum.py --data cifar10 --arch conv4 --epochs 20 \
        --batch-size 64 --lr 0.06                              a laptop, real images [ours]

Each epoch prints a line: the means of the loss, which sums over the views, and of the intra-gap,
the mean of 1 - cos(q, k) over both; the last learning rate and m; and, every --knn-every epochs and
at the end, the accuracy of a kNN on the features f(x) of student and teacher.

Settings are marked by their source: [code] MoCo v3's code (what is from ReSSL's says so), [authors]
the paper's abstracts, [figure] a drawing by its first author, [others] a public library, [ours] our
choice. We know the paper by its abstracts and that drawing: they give the idea and the base, but
neither lambda nor the recipe, nor whether both views take part, or a base's predictor.

The code comes in this order: views, model, loss, teacher, training; then the command line.
"""

import copy
import math
import pathlib
import time

import torch
from torch import nn
from torch.nn import functional as F

import common

# Where a data set's defaults differ from the options' own, which are CIFAR's (parse_arguments). A
# folder has CIFAR's up to 40 pixels. common.training_arguments applies them, and multiplies lr, but
# no --lr that is given, by B / 256: the textures' 0.24 is 0.06 for 64. As in ressl.py [ours].
TEXTURES = dict(arch="conv4", epochs=10, batch_size=64, lr=0.24, knn_every=1)
LARGER = dict(image_size=64, momentum=0.996)
RECIPES = {"textures": TEXTURES, "cifar10": {}, "cifar100": {}, "stl10": LARGER}
RECIPES |= {"tiny-imagenet": LARGER, "folder": LARGER}

# ----------------------------------------------------------------------------------------- views
# Random numbers are drawn on the host, a set of them for every image, and applied on the device in
# batched operations. Only the order of the colour operations is the same for the whole batch. An
# image that does not draw a colour operation gets the factor that changes nothing. The recipe is
# that of ReSSL's code.


def weak_view(images, size=None, generator=None, scale=(0.2, 1.0)):
    """RandomResizedCrop(0.2-1) and flip: float (N, 3, S, S) in [0, 1] -> (N, 3, size, size).

    size: S if None. generator: on the CPU. scale: the crop's area, as a share of the image's.
    """
    count, side = len(images), images.shape[-1]
    boxes = common.draw_boxes(count, side, scale, generator)  # (4, N)
    flip = common.draw_chosen(count, 0.5, generator)  # (N,): these run from right to left
    boxes = common.to_device(images, common.mirror(boxes, flip))[0]
    return common.resized_crop(images, *boxes, size or side)


def strong_view(images, size=None, generator=None, scale=(0.2, 1.0)):
    """The weak view, then ColorJitter(0.4, 0.4, 0.4, 0.1) with probability 0.8, grey with 0.2,
    Gaussian blur with 0.5: float (N, 3, S, S) in [0, 1] -> (N, 3, size, size) in [0, 1]."""
    view, count = weak_view(images, size, generator, scale), len(images)
    factors, order = common.draw_jitter(count, 0.8, 0.4, 0.4, 0.4, 0.1, generator)
    grey = common.draw_chosen(count, 0.2, generator)
    saturation = torch.where(grey, 0.0, 1.0)  # 0: grey, 1: changes nothing
    blurred = common.draw_chosen(count, 0.5, generator).nonzero()[:, 0]  # indices: half the work
    sigma = common.draw_uniform(len(blurred), 0.1, 2.0, generator)
    draws = common.to_device(images, factors, saturation, blurred, sigma)
    factors, saturation, blurred, sigma = draws
    view = common.color_jitter(view, factors, order)
    view = common.adjust_saturation(view, saturation)
    view[blurred] = common.gaussian_blur(view[blurred], sigma)
    return view


# ----------------------------------------------------------------------------------------- model


def mlp(inputs, hidden, outputs):
    """Linear, BatchNorm, ReLU, Linear; no bias [code]."""
    first, second = nn.Linear(inputs, hidden, bias=False), nn.Linear(hidden, outputs, bias=False)
    return nn.Sequential(first, nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), second)


class Network(nn.Module):
    """Encoder f, projector g, predictor h: (B, 3, S, S) -> (B, D) -> (B, d) -> (B, d)."""

    def __init__(self, encoder, hidden=2048, out=256):
        super().__init__()
        self.encoder = encoder
        self.projector = mlp(encoder.dim, hidden, out).append(nn.BatchNorm1d(out, affine=False))
        self.predictor = mlp(out, hidden, out)

    def forward(self, images):
        return self.predictor(self.projector(self.encoder(images)))


class Model(nn.Module):
    """Student and teacher."""

    def __init__(self, encoder):
        super().__init__()
        self.student = Network(encoder)
        # The teacher starts as a copy and takes no gradient. It stays in train mode, because only
        # the kNN calls eval(), and undoes it: BatchNorm normalises by the teacher's own batch, and
        # keeps the teacher's own running statistics, for the kNN; only its weight and bias follow
        # the student's, as all parameters do [code].
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.teacher.predictor = nn.Identity()  # the student's only: k is g(f(x))


# ------------------------------------------------------------------------------------------ loss


def info_nce(q, k, temperature):
    """Find each query's key among the batch's: one direction of MoCo v3's loss -> scalar.

    q (B, d) student on one view, k (B, d) teacher on the other; brought to unit length here. The
    other keys of the batch are the negatives. No gradient reaches k, wherever it comes from.

    Times 2 tau [code]: 2 tau CE = - 2 cos(q, k) + 2 tau log sum_j exp(cos(q, k_j) / tau). So the
    pull to the own key does not depend on tau, and is that of BYOL's 2 - 2 cos.
    """
    q, k = F.normalize(q, dim=1), F.normalize(k.detach(), dim=1)
    logits = q @ k.T / temperature  # (B, B)
    labels = torch.arange(len(q), device=q.device)  # image i's key is key i
    return 2 * temperature * F.cross_entropy(logits, labels)


def byol_loss(q, k, temperature=None):
    """2 - 2 cos, distance squared of unit vectors: one direction of BYOL's; [ours] as a base."""
    return 2 - 2 * F.cosine_similarity(q, k.detach(), dim=1).mean()


def residual_loss(student, teacher, temperature=None):
    """Intra-momentum, the paper's term: mean of 1 - cos(student, teacher), (B, d) on the same view
    -> scalar, the intra-gap. No gradient reaches the teacher's, wherever it comes from."""
    return 1 - F.cosine_similarity(student, teacher.detach(), dim=1).mean()


def kd_loss(student, teacher, temperature):
    """Knowledge distillation, the paper's control: would any pull on the same view do? -> scalar.

    Mean of a KL between softmaxes of (B, d) [figure]: over the d features, as if they were classes,
    of the unit vectors divided by tau, from the teacher's to the student's [ours]. With a small gap
    it is about (1 - cos) / (tau^2 d), a tenth of residual_loss: --residual-weight 10 makes up.
    """
    student, teacher = F.normalize(student, dim=1), F.normalize(teacher.detach(), dim=1)
    log_p_s, log_p_t = (F.log_softmax(x / temperature, dim=1) for x in (student, teacher))
    return F.kl_div(log_p_s, log_p_t, reduction="batchmean", log_target=True)


# By their names on the command line. All take (student's, teacher's, temperature), used or not.
BASES = {"moco": info_nce, "byol": byol_loss}
RESIDUALS = {"cosine": residual_loss, "kd": kd_loss}


# --------------------------------------------------------------------------------------- teacher


@torch.no_grad()
def update_teacher(model, momentum):
    """teacher = momentum * teacher + (1 - momentum) * student, for every parameter (no buffers).

    The student's predictor has no counterpart.
    """
    student, teacher = (dict(net.named_parameters()) for net in (model.student, model.teacher))
    source = [student[name] for name in teacher]
    torch._foreach_lerp_(list(teacher.values()), source, 1 - momentum)  # t + (1 - m) (s - t)


def teacher_momentum(step, steps, start):
    """From `start` at step 0 to 1 at step `steps`, by a cosine [code]."""
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * step / steps))


# -------------------------------------------------------------------------------------- training


def train_step(model, optimizer, scaler, views, args, momentum, dtype=None):
    """One whole step on two network inputs x1, x2 (B, 3, S, S), the views.

    momentum: the teacher's m, now.
    scaler: torch.amp.GradScaler, enabled for fp16 only. dtype: half precision, or None. Only the
    networks run in it, and return float32 (common.embed): what follows has exponentials and sums.

    -> scalars by name, left on the device, so that no step waits for them. The epoch averages what
    is in it, and logs and prints the means: one more quantity to watch is one more entry.
    """
    q1, q2 = (common.embed(model.student, view, dtype) for view in views)  # (B, d)
    with torch.no_grad():
        k1, k2 = (common.embed(model.teacher, view, dtype) for view in views)  # (B, d)
        gap = (residual_loss(q1, k1) + residual_loss(q2, k2)) / 2  # for the log, whatever the loss
    inter, intra, tau = BASES[args.base], RESIDUALS[args.residual], args.temperature
    loss = inter(q1, k2, tau) + inter(q2, k1, tau)  # across views: a sum, where gap is a mean
    if args.residual_weight > 0:
        loss = loss + args.residual_weight * (intra(q1, k1, tau) + intra(q2, k2, tau))
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    update_teacher(model, momentum)
    return {"loss": loss.detach(), "gap": gap}


def learning_rate(step, steps, warmup, peak):
    """Linear from 0 at step 0 to `peak` at step `warmup`, then a cosine to 0 at step `steps`."""
    if step < warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def draw_views(images, args, generator):
    """Two strong views of images (B, 3, S, S), both in [0, 1]."""
    size = args.image_size
    return strong_view(images, size, generator), strong_view(images, size, generator)


def train_epoch(epoch, model, optimizer, scaler, generator, data, args, dtype):
    """One pass over the training images -> what its steps return, averaged; the last rates."""
    steps, totals = len(data) // args.batch_size, {}
    warmup = round(min(5, 0.1 * args.epochs) * steps)  # 5 epochs in ReSSL's code
    normalize = common.normalizer(data, data.images.device)
    for step, images in common.batches(epoch, data, args, generator):  # steps of the whole run
        lr = learning_rate(step, args.epochs * steps, warmup, args.lr)
        optimizer.param_groups[0]["lr"] = lr
        views = [normalize(view) for view in draw_views(images, args, generator)]
        m = teacher_momentum(step, args.epochs * steps, args.momentum)
        scalars = train_step(model, optimizer, scaler, views, args, m, dtype)
        totals = {name: totals.get(name, 0) + value for name, value in scalars.items()}
    # The one time in an epoch that values are read back from the device
    means = {name: (total / steps).item() for name, total in totals.items()}
    return {**means, "lr": lr, "m": m}


def train(args, checkpoint, splits, device, dtype):
    """Train from random weights, or on from the checkpoint, to the last epoch -> its record."""
    torch.manual_seed(args.seed)
    encoder = common.build_encoder(args.arch, common.stem_for(args.image_size), args.bn_splits)
    model = Model(encoder)
    model.to(device, memory_format=common.memory_format(device))
    trained = [p for p in model.parameters() if p.requires_grad]
    settings = dict(lr=args.lr, momentum=0.9, weight_decay=5e-4)  # on all, as in ReSSL's
    optimizer = torch.optim.SGD(trained, **settings, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    generator = torch.Generator().manual_seed(args.seed)
    state = (model, optimizer, scaler, generator)  # all that a step changes, and a resume restores
    begin = common.restore_run(checkpoint, *state)  # the epoch to go on with
    for epoch in range(begin, args.epochs + 1):  # 0: random weights, evaluated only
        start = time.perf_counter()
        means = train_epoch(epoch, *state, splits[0], args, dtype) if epoch > 0 else {}
        common.end_epoch(args, epoch, start, means, splits, dtype, state)
    return common.read_records(pathlib.Path(args.output, "log.jsonl"))[-1]


# ---------------------------------------------------------------------------------- command line


def parse_arguments(argv):
    """-> arguments, and the checkpoint to resume from or None."""
    parser = common.Parser(prog="residual_momentum.py", description=__doc__)
    option, whole, real = parser.add_argument, common.whole, common.real
    option("--data", default="textures", help=f"{', '.join(RECIPES)}:PATH")
    common.add_shared_options(option)
    # Defaults are those of ressl.py [ours]; tau and m a public library's for CIFAR [others]
    option("--arch", choices=common.ARCHITECTURES, default="resnet18", help="encoder f")
    option("--bn-splits", type=whole(1), default=1, help="groups of BatchNorm; 8 in ReSSL's code")
    option("--epochs", type=whole(1), default=200, help="passes over the training images")
    option("--batch-size", type=whole(2), default=256, help="B; what is left over is dropped")
    option("--lr", type=real(1e-8), default=0.06, help="peak; the default is times B / 256")
    option("--temperature", type=real(0.01), default=0.2, help="tau")
    option("--momentum", type=real(0, 1), default=0.99, help="the teacher's m, at the start")
    option("--base", choices=BASES, default="moco", help="inter-momentum: MoCo v3 or BYOL")
    option("--residual", choices=RESIDUALS, default="cosine", help="intra-momentum; kd: a control")
    option("--residual-weight", type=real(0), default=1.0, help="lambda; 0: the base alone")
    option("--output", help="run folder; None: a new one under runs/")
    option("--resume", action="store_true", help="continue the run in --output")
    option("--knn-every", type=whole(1), default=10, help="epochs; also at epoch 0 and the last")
    option("--views", type=common.png, metavar="FILE.png", help="only draw views")
    option("--seed", type=whole(0, 2**63 - 1), default=0, help="of weights, batches and views")
    return common.training_arguments(parser, argv, RECIPES)


def draw_picture(args, data):
    """Write a picture: eight images, each beside three draws of its views."""
    images, columns = data.images[:: -(-len(data) // 8)] / 255, []  # from all of a sorted folder
    for seed in range(3):
        columns += draw_views(images, args, torch.Generator().manual_seed(args.seed + seed))[::-1]
    common.save_picture(args.views, [images, *columns])
    print("left: images; then three draws of their views")


@common.command
def main(argv=None):
    """The command line -> the log's last record: loss, student_knn, ...; with --views None."""
    args, checkpoint = parse_arguments(argv)
    device = common.pick_device(args.device)
    dtype = common.pick_precision(args.amp, device)
    data, bank, test = common.load_splits(args, device)  # bank: the labelled images of the kNN
    if args.views:
        return draw_picture(args, data if test is None else test)
    common.fit_batch(args, len(data))
    with common.running(args, checkpoint, data, device, dtype):
        return train(args, checkpoint, (data, bank, test), device, dtype)


if __name__ == "__main__":
    main()
