"""ReSSL: Relational Self-Supervised Learning with Weak Augmentation.

Zheng, You, Wang, Qian, Zhang, Wang, Xu. NeurIPS 2021. arXiv 2107.09282.

Contrastive learning asks two views of one image to match. ReSSL asks for less: the *relations* of
an image to a queue of other images should be the same, whichever view is taken. A weak view goes
through a slowly moving teacher and gives the target relation; a strong view of the same image goes
through the student, which must reproduce it.

    L = mean over the batch of  - sum_i p_t(i) log p_s(i)              i runs over the queue
        p_s = softmax(z_s Q^T / tau_s),  p_t = softmax(z_w Q^T / tau_t),  tau_t < tau_s (sharper)

The extended version (Weak Augmentation Guided Relational Self-Supervised Learning, arXiv
2203.08717) gives the student a predictor h, z_s = h(g(f(x_s))) (--predictor), and begins with some
epochs of InfoNCE, own k against the queue, in place of L (--infonce-epochs N). It is known to us by
its abstract [authors], without code: what both are in detail is [ours].

    paper          here                         shape          what
    x_s, x_w       strong, weak                 (B, 3, S, S)   two views of the same B images
    f              encoder                      -> (B, D)      torchvision's, headless; or conv4
    g              projector                    -> (B, d)      Linear, ReLU, Linear; d = 128
    h              predictor                    -> (B, d)      student's, with --predictor only
    z_s            q                            (B, d)         student's, of strong, unit length
    z_w            k                            (B, d)         teacher's, of weak, unit length
    Q              queue                        (K, d)         the last K k, a FIFO; noise at first
    p_s, p_t       log_p_s, p_t                 (B, K)         relations to the queue
    tau_s, tau_t   student_temp, teacher_temp                  0.1, 0.04
    m              momentum                                    teacher = m teacher + (1 - m) student

    python ressl.py                                            built-in textures, two CPU cores
    python ressl.py --data cifar10                             one GPU: the paper's 200 epochs
    python ressl.py --data cifar10 --arch conv4 --epochs 20    a laptop, real images
    python ressl.py --infonce-epochs 3                         the extended version's warm-up
    python ressl.py --infonce-epochs 3 --predictor             the extended version
    python ressl.py --crops 5                                  multi-crop: five student views

Each epoch prints a line: the mean loss, beside ln K, which is the loss where p_s is uniform; and,
every --knn-every epochs and at the end, the accuracy of a kNN on the features f(x) of student and
teacher. The first K / B steps compare with the queue's noise, so the loss may rise at first.

Settings are marked by their source: [code] the authors' code, [authors] their words, [ours] our
choice.

The code follows the paper: views, model, loss, teacher and queue, training; then the command line.
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
# lr is for a batch of 256, and scaled. From the authors' code [code], epochs from the authors
# [authors]; bn_splits 1 (the authors: 8), knn_every and the textures' recipe are ours [ours].
RECIPE = dict(
    common.RUN,
    arch="resnet18",
    epochs=200,
    batch_size=256,
    lr=0.06,
    weight_decay=5e-4,
    momentum=0.99,
    queue_size=4096,
    student_temp=0.1,
    teacher_temp=0.04,
    teacher_view="weak",
    crops=1,
    predictor=False,
    infonce_epochs=0,
    knn_every=10,
)
TEXTURES = dict(arch="conv4", epochs=15, batch_size=64, lr=0.24, queue_size=2048, knn_every=1)
LARGER = dict(image_size=64, momentum=0.996, queue_size=16384)  # STL-10 and Tiny ImageNet [code]
RECIPES = {"textures": {**RECIPE, **TEXTURES}, "cifar10": RECIPE, "cifar100": RECIPE}
RECIPES |= {"stl10": {**RECIPE, **LARGER}, "tiny-imagenet": {**RECIPE, **LARGER}}
SAVE_EVERY = 30  # seconds between checkpoints at least; always one at epoch 0 and at the last

# ----------------------------------------------------------------------------------------- views
# Random numbers are drawn on the host, a set of them for every image, and applied on the device in
# batched operations. Only the order of the colour operations is the same for the whole batch. An
# image that does not draw a colour operation gets the factor that changes nothing.


def weak_view(images, size=None, generator=None, scale=(0.2, 1.0)):
    """RandomResizedCrop(0.2-1) and flip: float (N, 3, S, S) in [0, 1] -> (N, 3, size, size).

    size: S if None. generator: on the CPU. scale: the crop's area, as a share of the image's.
    """
    count, side = len(images), images.shape[-1]
    box = common.draw_boxes(count, side, scale, generator)
    flip = common.draw_chosen(count, 0.5, generator)
    (box,) = common.to_device(images, common.mirror(box, flip))
    return common.resized_crop(images, *box, size or side)


def strong_view(images, size=None, generator=None, scale=(0.2, 1.0)):
    """The weak view, then ColorJitter(0.4, 0.4, 0.4, 0.1) with probability 0.8, grey with 0.2,
    Gaussian blur with 0.5 [code]: float (N, 3, S, S) in [0, 1] -> (N, 3, size, size) in [0, 1]."""
    view, count = weak_view(images, size, generator, scale), len(images)
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


# The student's crops with --crops 5: size, as a share of the full one, and scale [code].
CROPS = (
    (1, (0.2, 1.0)),
    (6 / 7, (0.172, 0.86)),
    (5 / 7, (0.143, 0.715)),
    (4 / 7, (0.114, 0.571)),
    (3 / 7, (0.086, 0.429)),
)

# ----------------------------------------------------------------------------------------- model


class Network(nn.Module):
    """Encoder f, projector g, perhaps predictor h: (B, 3, S, S) -> (B, D) -> (B, d) -> (B, d)."""

    def __init__(self, encoder, predictor=False, hidden=2048, out=128):
        super().__init__()
        self.encoder = encoder
        self.projector = nn.Sequential(  # without BatchNorm
            nn.Linear(encoder.dim, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out)
        )
        self.predictor = nn.Identity()
        if predictor:  # with BatchNorm, unlike the projector [ours]
            self.predictor = nn.Sequential(
                nn.Linear(out, hidden),
                nn.BatchNorm1d(hidden),
                nn.ReLU(inplace=True),
                nn.Linear(hidden, out),
            )

    def forward(self, images):
        return self.predictor(self.projector(self.encoder(images)))


class Model(nn.Module):
    """Student, teacher and queue."""

    def __init__(self, encoder, queue_size, predictor=False):
        super().__init__()
        self.student = Network(encoder, predictor)
        # The teacher starts as a copy and takes no gradient. It stays in train mode: its BatchNorm
        # normalises by the teacher's own batch and keeps the teacher's own running statistics; only
        # its weight and bias follow the student's, as all parameters do [code].
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.teacher.predictor = nn.Identity()  # the student's only: k and the queue are g(f(x))
        noise = torch.randn(queue_size, self.student.projector[-1].out_features)
        self.register_buffer("queue", F.normalize(noise, dim=1))  # (K, d)
        self.oldest = 0  # row of the queue to overwrite next; on the host, so no step reads it back

    def get_extra_state(self):  # what puts `oldest` into the state_dict
        return self.oldest

    def set_extra_state(self, oldest):
        self.oldest = oldest


def embed(network, images, dtype):
    """Embeddings (B, d) in float32, of a network that may run in mixed precision."""
    with common.autocast(images.device, dtype):
        return common.promote(network(images))


# ------------------------------------------------------------------------------------------ loss


def relation_loss(q, k, queue, student_temp, teacher_temp):
    """Cross-entropy of the student's relation against the teacher's, the target -> scalar.

    q (B, d) student, k (B, d) teacher, queue (K, d), all of unit length. No gradient reaches k or
    queue, wherever they come from. k joins the queue only afterwards: an image is not compared with
    its own k of this step [code].
    """
    with torch.no_grad():
        p_t = F.softmax(k @ queue.T / teacher_temp, dim=1)  # (B, K)
    log_p_s = F.log_softmax(q @ queue.detach().T / student_temp, dim=1)  # (B, K)
    return -(p_t * log_p_s).sum(dim=1).mean()


def info_nce(q, k, queue, temperature):
    """Find each q's own k among it and the queue: the extended version's first epochs -> scalar.

    q (B, d), k (B, d), queue (K, d), all of unit length; no gradient reaches k or queue. Where all
    similarities are equal it is ln(1 + K).
    """
    positive = (q * k.detach()).sum(dim=1, keepdim=True)  # (B, 1)
    logits = torch.cat([positive, q @ queue.detach().T], dim=1) / temperature  # (B, 1 + K)
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))


# ----------------------------------------------------------------------------- teacher and queue


@torch.no_grad()
def update_teacher(model, momentum):
    """teacher = momentum * teacher + (1 - momentum) * student, for every parameter (no buffers)."""
    student, teacher = (dict(net.named_parameters()) for net in (model.student, model.teacher))
    source = [student[name] for name in teacher]
    torch._foreach_lerp_(list(teacher.values()), source, 1 - momentum)  # t + (1 - m) (s - t)


@torch.no_grad()
def enqueue(model, k):
    """Overwrite the B oldest rows with k (B, d): one slice, since K is a multiple of B."""
    model.queue[model.oldest : model.oldest + len(k)] = k
    model.oldest = (model.oldest + len(k)) % len(model.queue)


# -------------------------------------------------------------------------------------- training


def train_step(model, optimizer, scaler, views, args, dtype=None, infonce=False):
    """One whole step on network inputs: the student's views (one, or --crops), then the teacher's.

    -> the loss, left on the device, so that no step waits for it. views: (B, 3, S, S), crops
    smaller. scaler: torch.amp.GradScaler, enabled for fp16 only. dtype: that of mixed precision, or
    None. infonce: InfoNCE in place of the relation loss.
    """
    *strong, weak = views  # with --teacher-view strong, the last is strong too
    qs = [F.normalize(embed(model.student, view, dtype), dim=1) for view in strong]  # (B, d) each
    with torch.no_grad():
        k = F.normalize(embed(model.teacher, weak, dtype), dim=1)  # (B, d)
    if infonce:
        losses = [info_nce(q, k, model.queue, args.student_temp) for q in qs]
    else:
        temps = args.student_temp, args.teacher_temp
        losses = [relation_loss(q, k, model.queue, *temps) for q in qs]
    loss = torch.stack(losses).mean()  # over the crops, of which there is one by default
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    update_teacher(model, args.momentum)
    enqueue(model, k)
    return loss.detach()


def learning_rate(step, steps, warmup, peak):
    """Linear from 0 at step 0 to `peak` at step `warmup`, then a cosine to 0 at step `steps`."""
    if step < warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def draw_views(images, args, generator):
    """The student's views, then the teacher's, of images (B, 3, S, S), all in [0, 1]."""
    size, crops = args.image_size, CROPS[: args.crops]
    strong = [strong_view(images, round(size * share), generator, scale) for share, scale in crops]
    teacher_view = weak_view if args.teacher_view == "weak" else strong_view
    return *strong, teacher_view(images, size, generator)


def train_epoch(epoch, model, optimizer, scaler, generator, data, args, dtype, estimate):
    """One pass over the training images -> (mean loss, last learning rate)."""
    device = data.images.device
    steps = len(data) // args.batch_size
    warmup = round(min(5, 0.1 * args.epochs) * steps)  # 5 epochs [code], a tenth of a short run
    infonce = epoch <= args.infonce_epochs
    normalize = common.normalizer(data, device)
    total = torch.zeros((), device=device)
    order = torch.randperm(len(data), generator=generator).to(device)
    batches = order[: steps * args.batch_size].view(steps, -1)  # an incomplete batch is dropped
    for i in common.progress(epoch, args.epochs, steps, device, estimate):
        step = (epoch - 1) * steps + i
        lr = learning_rate(step, args.epochs * steps, warmup, args.lr)
        optimizer.param_groups[0]["lr"] = lr
        images = data.images[batches[i]] / 255  # uint8 -> float32
        views = [normalize(view) for view in draw_views(images, args, generator)]
        total += train_step(model, optimizer, scaler, views, args, dtype, infonce)
    return total.item() / steps, lr  # the one time that a value is read back from the device


def train(args, checkpoint, splits, device, dtype):
    """Train from epoch 0 (random weights), or after the checkpoint, to the last -> last record."""
    data, bank, test = splits  # bank: the labelled images that the kNN searches, or None
    log = pathlib.Path(args.output) / "log.jsonl"
    torch.manual_seed(args.seed)
    encoder = common.build_encoder(args.arch, common.stem_for(args.image_size), args.bn_splits)
    model = Model(encoder, args.queue_size, args.predictor)
    model.to(device, memory_format=common.memory_format(device))
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=args.lr,
        momentum=0.9,
        weight_decay=args.weight_decay,  # on all parameters [code]
        fused=device.type == "cuda",
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    generator = torch.Generator().manual_seed(args.seed)
    state = (model, optimizer, scaler, generator)  # all that a step changes, and a resume restores
    first = common.restore_run(checkpoint, *state) if checkpoint else 0
    record = common.read_records(log)[-1]
    saved = -math.inf
    for epoch in range(first, args.epochs + 1):
        start, loss, lr, speed = time.perf_counter(), None, None, None
        if epoch > 0:
            estimate = epoch == max(first, 1)
            loss, lr = train_epoch(epoch, *state, data, args, dtype, estimate)
            speed = len(data) // args.batch_size * args.batch_size / (time.perf_counter() - start)
            if not math.isfinite(loss) or not all(p.isfinite().all() for p in model.parameters()):
                raise common.UserError(
                    f"training diverged in epoch {epoch} (mean loss {loss}), the last checkpoint "
                    "is kept: start another run with a lower --lr, or with --amp off"
                )
        record = {"epoch": epoch, "loss": loss, "lr": lr}
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
        name = "InfoNCE" if record["epoch"] <= args.infonce_epochs else "loss"
        line += f"  {name} {record['loss']:.3f} (ln K {math.log(args.queue_size):.3f})"
    if record["student_knn"] is not None:
        line += f"  kNN student {record['student_knn']:.2f} % teacher {record['teacher_knn']:.2f} %"
    if record["images_per_second"]:
        line += f"  {record['images_per_second']:,.0f} images/s"
    return f"{line}  {common.duration(record['seconds'])}"


# ---------------------------------------------------------------------------------- command line


def parse_arguments(argv):
    """-> arguments, and the checkpoint to resume from or None."""
    whole, real = functools.partial(common.number, int), functools.partial(common.number, float)
    parser = common.Parser(prog="ressl.py", description=__doc__)
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
    option("queue_size", whole(1), "K, a multiple of B")
    option("student_temp", real(0.01), "tau_s")
    option("teacher_temp", real(0.01), "tau_t, below tau_s: a sharper target")
    option("momentum", real(0, 1), "m, constant: teacher = m teacher + (1 - m) student")
    option("teacher_view", str, "what the teacher sees", choices=("weak", "strong"))
    option("crops", whole(1, 5), "the student's views, each smaller than the one before")
    option("infonce_epochs", whole(0), "extended version: InfoNCE in the first epochs")
    parser.add_argument(
        "--predictor",
        action="store_true",
        default=None,  # not given: the recipe's, or the resumed run's
        help="extended version: MLP on the student",
    )
    option("knn_every", whole(1), "epochs between kNN evaluations; epoch 0 and the last have one")
    option("seed", whole(0, 2**63 - 1), "seed of weights, batches and views")
    option("device", str, "auto, cpu, cuda, cuda:N, mps")
    option("amp", str, "mixed precision; auto: bf16 where it is fast", choices=common.AMP)
    parser.add_argument("--output", help="run folder (default: a new one under runs/)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output")
    parser.add_argument(
        "--views", type=common.picture_path, metavar="FILE.png", help="only draw views"
    )
    args, checkpoint = common.training_arguments(parser, argv, RECIPES, "ressl")
    if args.queue_size % args.batch_size:
        rows = max(1, round(args.queue_size / args.batch_size)) * args.batch_size
        raise common.UserError(
            f"--queue-size {args.queue_size} is not a multiple of --batch-size {args.batch_size}: "
            f"use --queue-size {rows}"
        )
    return args, checkpoint


def draw_picture(args, data):
    """Write a picture: eight images, each beside three draws of its views, the teacher's first."""
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
