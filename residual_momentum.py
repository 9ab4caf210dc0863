"""Residual Momentum: Self-Supervised Visual Representation Learning via Residual Momentum.

Pham, Niu, Zhang, Madjid, Hong, Kim, Tee, Yoo. IEEE Access 2023. arXiv 2211.09861.

The paper finds that, in methods with a momentum teacher, the teacher represents images better than
the student. Instead of relying on its indirect help, through the other view, pull the student to
the teacher on the *same view*: close the "intra-representation gap" [authors], by one more term.

    L = L_base + lambda L_residual                             over both views
        L_base      InfoNCE(q1, k2) + InfoNCE(q2, k1)          MoCo v3: across views, 2 tau CE
        L_residual  mean over the batch of  1 - cos(q, k)      same view: (q1, k1) and (q2, k2)

    paper          here                         shape          what
    x_1, x_2       x1, x2                       (B, 3, S, S)   two strong views of the same B images
    f              encoder                      -> (B, D)      torchvision's, headless; or conv4
    g              projector                    -> (B, d)      MLP that ends in BatchNorm; d = 256
    h              predictor                    -> (B, d)      MLP; the student's only
    q_1, q_2       q1, q2                       (B, d)         student's: h(g(f(x)))
    k_1, k_2       k1, k2                       (B, d)         teacher's: g(f(x)), no gradient
    tau            temperature                                 0.2
    lambda         residual_weight                             1 [ours]
    m              momentum                                    0.99 to 1, by a cosine

    python residual_momentum.py                                built-in textures, two CPU cores
    python residual_momentum.py --residual-weight 0            the same without the paper's term
    python residual_momentum.py --data cifar10                 one GPU, 200 epochs
    python residual_momentum.py --data cifar10 --arch conv4 --epochs 20     a laptop, real images

Each epoch prints a line: the mean loss; the gap, the mean of 1 - cos(q, k) on the same view; and,
every --knn-every epochs and at the end, the accuracy of a kNN on the features f(x) of student and
teacher.

Settings are marked by their source: [code] MoCo v3's code (the views: ReSSL's), [authors] the
paper's abstracts, [others] a public library, [ours] our choice. We know the paper by its abstracts:
they give the idea and the base method, but not where the gap is taken, nor lambda, nor the recipe.

The code is in the order of ressl.py: views, model, loss, teacher, training; then the command line.
"""

import copy
import functools
import math
import pathlib
import time

import torch
from torch import nn
from torch.nn import functional as F

import common

# The command line's defaults, one recipe a data set; a folder has that of a set of its image size.
# lr is for a batch of 256, and scaled. They are those of ressl.py [ours], so that only the method
# differs, but for fewer epochs of textures; temperature and CIFAR's momentum are [others].
RECIPE = dict(
    common.RUN,
    arch="resnet18",
    epochs=200,
    batch_size=256,
    lr=0.06,
    weight_decay=5e-4,
    momentum=0.99,
    temperature=0.2,
    base="moco",
    residual="cosine",
    residual_weight=1.0,
    knn_every=10,
)
TEXTURES = dict(arch="conv4", epochs=10, batch_size=64, lr=0.24, knn_every=1)
LARGER = dict(image_size=64, momentum=0.996)  # STL-10 and Tiny ImageNet: ressl.py's [ours]
RECIPES = {"textures": {**RECIPE, **TEXTURES}, "cifar10": RECIPE, "cifar100": RECIPE}
RECIPES |= {"stl10": {**RECIPE, **LARGER}, "tiny-imagenet": {**RECIPE, **LARGER}}
SAVE_EVERY = 30  # seconds between checkpoints at least; always one at epoch 0 and at the last

# ----------------------------------------------------------------------------------------- views
# Random numbers are drawn on the host, a set of them for every image, and applied on the device in
# batched operations. Only the order of the colour operations is the same for the whole batch. An
# image that does not draw a colour operation gets the factor that changes nothing.


def weak_view(images, size=None, generator=None):
    """RandomResizedCrop(0.2-1) and flip: float (N, 3, S, S) in [0, 1] -> (N, 3, size, size).

    size: S if None. generator: on the CPU.
    """
    count, side = len(images), images.shape[-1]
    box = common.draw_boxes(count, side, (0.2, 1.0), generator)
    flip = common.draw_chosen(count, 0.5, generator)
    (box,) = common.to_device(images, common.mirror(box, flip))
    return common.resized_crop(images, *box, size or side)


def strong_view(images, size=None, generator=None):
    """The weak view, then ColorJitter(0.4, 0.4, 0.4, 0.1) with probability 0.8, grey with 0.2,
    Gaussian blur with 0.5 [code]: float (N, 3, S, S) in [0, 1] -> (N, 3, size, size) in [0, 1]."""
    view, count = weak_view(images, size, generator), len(images)
    factors, order = common.draw_jitter(count, 0.8, 0.4, 0.4, 0.4, 0.1, generator)
    grey = common.draw_chosen(count, 0.2, generator)
    saturation = torch.where(grey, 0.0, 1.0)  # 0: grey, 1: changes nothing
    blurred = common.draw_chosen(count, 0.5, generator).nonzero()[:, 0]  # indices: half the work
    sigma = common.draw_uniform(len(blurred), 0.1, 2.0, generator)
    factors, saturation, blurred, sigma = common.to_device(
        images, factors, saturation, blurred, sigma
    )
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
        # The teacher starts as a copy and takes no gradient. It stays in train mode: its BatchNorm
        # normalises by the teacher's own batch and keeps the teacher's own running statistics; only
        # its weight and bias follow the student's, as all parameters do [code].
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.teacher.predictor = nn.Identity()


def embed(network, images, dtype):
    """Embeddings (B, d) in float32, of a network that may run in mixed precision."""
    with common.autocast(images.device, dtype):
        return common.promote(network(images))


# ------------------------------------------------------------------------------------------ loss


def info_nce(q, k, temperature):
    """Find each query's key among the batch's: one direction of MoCo v3's loss -> scalar.

    q (B, d) student on one view, k (B, d) teacher on the other; normalised here. The other keys of
    the batch are the negatives. Times 2 tau [code]. No gradient reaches k, wherever it comes from.
    """
    q, k = F.normalize(q, dim=1), F.normalize(k.detach(), dim=1)
    logits = q @ k.T / temperature  # (B, B)
    labels = torch.arange(len(q), device=q.device)  # image i's key is key i
    return 2 * temperature * F.cross_entropy(logits, labels)


def byol_loss(q, k, temperature=None):
    """Squared distance of unit vectors, 2 - 2 cos: one direction of BYOL's loss; no temperature."""
    return 2 - 2 * F.cosine_similarity(q, k.detach(), dim=1).mean()


def residual_loss(student, teacher, temperature=None):
    """The paper's term: mean of 1 - cos(student, teacher), (B, d) on the same view -> scalar.

    No gradient reaches the teacher's. Both are what the base loss compares: the outputs of the
    student's predictor and of the teacher's projector [ours].
    """
    return 1 - F.cosine_similarity(student, teacher.detach(), dim=1).mean()


def kd_loss(student, teacher, temperature):
    """The paper's control, knowledge distillation: cross-entropy between softmaxes [authors], here
    across the d features of the unit vectors divided by tau [ours] -> scalar."""
    student, teacher = F.normalize(student, dim=1), F.normalize(teacher.detach(), dim=1)
    return F.cross_entropy(student / temperature, F.softmax(teacher / temperature, dim=1))


# By their names on the command line. All take (student's, teacher's, temperature), used or not.
BASES = {"moco": info_nce, "byol": byol_loss}
RESIDUALS = {"cosine": residual_loss, "kd": kd_loss}


# --------------------------------------------------------------------------------------- teacher


@torch.no_grad()
def update_teacher(model, momentum):
    """teacher = momentum * teacher + (1 - momentum) * student, for every parameter (no buffers)."""
    student, teacher = (dict(net.named_parameters()) for net in (model.student, model.teacher))
    source = [student[name] for name in teacher]
    torch._foreach_lerp_(list(teacher.values()), source, 1 - momentum)  # t + (1 - m) (s - t)


def teacher_momentum(step, steps, start):
    """From `start` at step 0 to 1 at step `steps`, by a cosine [code]."""
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * step / steps))


# -------------------------------------------------------------------------------------- training


def train_step(model, optimizer, scaler, views, args, momentum, dtype=None):
    """One whole step on two network inputs (B, 3, S, S), the views; momentum: the teacher's.

    -> loss and gap, left on the device, so that no step waits. scaler: torch.amp.GradScaler,
    enabled for fp16 only. dtype: that of mixed precision, or None.
    """
    x1, x2 = views
    q1, q2 = embed(model.student, x1, dtype), embed(model.student, x2, dtype)  # (B, d)
    with torch.no_grad():
        k1, k2 = embed(model.teacher, x1, dtype), embed(model.teacher, x2, dtype)  # (B, d)
        gap = (residual_loss(q1, k1) + residual_loss(q2, k2)) / 2  # for the log, whatever the loss
    base, residual, tau = BASES[args.base], RESIDUALS[args.residual], args.temperature
    loss = base(q1, k2, tau) + base(q2, k1, tau)  # across views
    if args.residual_weight > 0:
        loss = loss + args.residual_weight * (residual(q1, k1, tau) + residual(q2, k2, tau))
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    update_teacher(model, momentum)
    return torch.stack([loss.detach(), gap])


def learning_rate(step, steps, warmup, peak):
    """Linear from 0 at step 0 to `peak` at step `warmup`, then a cosine to 0 at step `steps`."""
    if step < warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def draw_views(images, args, generator):
    """Two strong views of images (B, 3, S, S), both in [0, 1]."""
    size = args.image_size
    return strong_view(images, size, generator), strong_view(images, size, generator)


def train_epoch(epoch, model, optimizer, scaler, generator, data, args, dtype, estimate):
    """One pass over the training images -> (mean loss, mean gap, last learning rate)."""
    device = data.images.device
    steps = len(data) // args.batch_size
    warmup = round(min(5, 0.1 * args.epochs) * steps)  # 5 epochs, a tenth of a short run
    normalize = common.normalizer(data, device)
    total = torch.zeros(2, device=device)
    order = torch.randperm(len(data), generator=generator).to(device)
    batches = order[: steps * args.batch_size].view(steps, -1)  # an incomplete batch is dropped
    for i in common.progress(epoch, args.epochs, steps, device, estimate):
        step = (epoch - 1) * steps + i
        lr = learning_rate(step, args.epochs * steps, warmup, args.lr)
        optimizer.param_groups[0]["lr"] = lr
        images = data.images[batches[i]] / 255  # uint8 -> float32
        views = [normalize(view) for view in draw_views(images, args, generator)]
        momentum = teacher_momentum(step, args.epochs * steps, args.momentum)
        total += train_step(model, optimizer, scaler, views, args, momentum, dtype)
    return *(total / steps).tolist(), lr  # the one time that a value is read back from the device


def train(args, checkpoint, splits, device, dtype):
    """Train from epoch 0 (random weights), or after the checkpoint, to the last -> last record."""
    data, bank, test = splits  # bank: the labelled images that the kNN searches, or None
    log = pathlib.Path(args.output) / "log.jsonl"
    torch.manual_seed(args.seed)
    encoder = common.build_encoder(args.arch, common.stem_for(args.image_size), args.bn_splits)
    model = Model(encoder)
    model.to(device, memory_format=common.memory_format(device))
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=args.lr,
        momentum=0.9,
        weight_decay=args.weight_decay,  # on all parameters, as in ressl.py
        fused=device.type == "cuda",
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    generator = torch.Generator().manual_seed(args.seed)
    state = (model, optimizer, scaler, generator)  # all that a step changes, and a resume restores
    first = common.restore_run(checkpoint, *state) if checkpoint else 0
    record = common.read_records(log)[-1]
    saved = -math.inf
    for epoch in range(first, args.epochs + 1):
        start, loss, gap, lr, speed = time.perf_counter(), None, None, None, None
        if epoch > 0:
            estimate = epoch == max(first, 1)
            loss, gap, lr = train_epoch(epoch, *state, data, args, dtype, estimate)
            speed = len(data) // args.batch_size * args.batch_size / (time.perf_counter() - start)
            if not math.isfinite(loss) or not all(p.isfinite().all() for p in model.parameters()):
                raise common.UserError(
                    f"training diverged in epoch {epoch} (mean loss {loss}), the last checkpoint "
                    "is kept: start another run with a lower --lr, or with --amp off"
                )
        record = {"epoch": epoch, "loss": loss, "gap": gap, "lr": lr}
        record |= {"student_knn": None, "teacher_knn": None}
        if bank is not None and (epoch % args.knn_every == 0 or epoch == args.epochs):
            for name, network in (("student", model.student), ("teacher", model.teacher)):
                knn = common.knn_accuracy(network.encoder, bank, test, dtype, args.image_size)
                record[f"{name}_knn"] = knn
        record["images_per_second"] = speed
        record["seconds"] = time.perf_counter() - start
        record["peak_memory"] = common.peak_memory(device)
        common.append_record(log, record)
        print(epoch_line(record, args), flush=True)
        if epoch in (0, args.epochs) or time.perf_counter() - saved > SAVE_EVERY:
            common.save_run(args, epoch, data, *state)
            saved = time.perf_counter()
    return record


def epoch_line(record, args):
    """The line that is printed for an epoch."""
    line = f"epoch {record['epoch']:3d}/{args.epochs}"
    if record["loss"] is not None:
        line += f"  loss {record['loss']:.3f} gap {record['gap']:.4f}"
    if record["student_knn"] is not None:
        line += f"  kNN student {record['student_knn']:.2f} % teacher {record['teacher_knn']:.2f} %"
    if record["images_per_second"]:
        line += f"  {record['images_per_second']:,.0f} images/s"
    return f"{line}  {common.duration(record['seconds'])}"


# ---------------------------------------------------------------------------------- command line


def parse_arguments(argv):
    """-> arguments, and the checkpoint to resume from or None."""
    whole, real = functools.partial(common.number, int), functools.partial(common.number, float)
    parser = common.Parser(prog="residual_momentum.py", description=__doc__)
    option = functools.partial(common.add_option, parser, RECIPES)
    parser.add_argument(
        "--data", help=f"{', '.join(RECIPES)}, folder:PATH (default: textures, made on the spot)"
    )
    option("data_dir", str, "where the data set is, or is downloaded to")
    option("subset", whole(1), "use the first N of the shuffled training images (None: all)")
    option(
        "holdout", whole(0), "test on the last N of the shuffled training images (0: the test set)"
    )
    option("arch", str, "encoder f", choices=common.ARCHITECTURES)
    option("image_size", whole(16), "side of the networks' input; a folder's: 64 unless given")
    option("bn_splits", whole(1), "groups of the batch with BatchNorm statistics of their own")
    option("epochs", whole(1), "passes over the training images")
    option("batch_size", whole(2), "B; an epoch's last, incomplete batch is dropped")
    option("lr", real(1e-8), "peak learning rate as given; only the default is scaled, by B / 256")
    option("temperature", real(0.01), "tau")
    option("momentum", real(0, 1), "m at the start: teacher = m teacher + (1 - m) student")
    option("base", str, "L_base", choices=tuple(BASES))
    option("residual", str, "L_residual; kd: the paper's control", choices=tuple(RESIDUALS))
    option("residual_weight", real(0), "lambda; 0: the base method alone")
    option("knn_every", whole(1), "epochs between kNN evaluations; epoch 0 and the last have one")
    option("seed", whole(0, 2**63 - 1), "seed of weights, batches and views")
    option("device", str, "auto, cpu, cuda, cuda:N, mps")
    option("amp", str, "mixed precision; auto: bf16 where it is fast", choices=common.AMP)
    parser.add_argument("--output", help="run folder (default: a new one under runs/)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output")
    parser.add_argument(
        "--views", type=common.picture_path, metavar="FILE.png", help="only draw views"
    )
    return common.training_arguments(parser, argv, RECIPES, "residual_momentum")


def draw_picture(args, data):
    """Write a picture: eight images, each beside three draws of its views."""
    images, columns = data.images[:8] / 255, []
    for seed in range(3):
        columns += draw_views(images, args, torch.Generator().manual_seed(args.seed + seed))[::-1]
    common.save_picture(args.views, [images, *columns])


@common.command
def main(argv=None):
    """The command line -> the log's last record: loss, student_knn, ...; with --views None."""
    args, checkpoint = parse_arguments(argv)
    device = common.pick_device(args.device)
    dtype = common.pick_precision(args.amp, device)
    splits = common.load_splits(args, device)
    if args.views:
        return draw_picture(args, splits[2] or splits[0])
    common.begin_run(args, splits[0], device, dtype)
    with common.running(args):
        return train(args, checkpoint, splits, device, dtype)


if __name__ == "__main__":
    main()
