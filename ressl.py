r"""ReSSL: Relational Self-Supervised Learning with Weak Augmentation.

Zheng, You, Wang, Qian, Zhang, Wang, Xu. NeurIPS 2021. arXiv 2107.09282.

Contrastive learning asks two views of one image to match. ReSSL asks for less: the *relations* of
an image to a queue of other images should be the same, whichever view is taken. A weak view goes
through a slowly moving teacher and gives the target relation; a strong view of the same image goes
through the student, which must reproduce it.

    L = mean over the batch of  - sum_i p_t(i) log p_s(i)              i runs over the queue
        p_s = softmax(z_s Q^T / tau_s),  p_t = softmax(z_w Q^T / tau_t),  tau_t < tau_s

The lower temperature makes the target sharper than what the student says itself, so that there is
always something left to do: bring nearer what is related, and the rest apart. Where embeddings are
all alike both relations are uniform; at equal temperatures, or nearly equal ones, no gradient leads
away from there, and training may stay at L = ln K.

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
    python ressl.py --data cifar10 --arch conv4 --epochs 20 \
        --batch-size 64 --lr 0.06 --infonce-epochs 2           a laptop, real images [ours]
    python ressl.py --infonce-epochs 3                         the extended version's warm-up
    python ressl.py --infonce-epochs 3 --predictor             the extended version
    python ressl.py --crops 5                                  multi-crop: five student views

Each epoch prints a line: the means of the loss and of the entropy of p_t, which is the lowest that
L can be, in nats; the last learning rate; ln K, which both are where relations are uniform; and,
every --knn-every epochs and at the end, the accuracy of a kNN on the features f(x) of student and
teacher. In the first K / B steps the queue holds noise. Student and teacher, which start as copies,
see the same uneven relations to it, so L is below ln K at first. When real embeddings, at first
all similar, have taken its place, relations are flatter, and L has risen; then it falls.

Settings are marked by their source: [code] the authors' code, [authors] their words, [ours] our
choice.

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
# no --lr that is given, by B / 256: the textures' 0.24 is 0.06 for 64 [ours]. LARGER: [code].
TEXTURES = dict(arch="conv4", epochs=15, batch_size=64, lr=0.24, queue_size=2048, knn_every=1)
LARGER = dict(image_size=64, momentum=0.996, queue_size=16384)
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
    """Encoder f, projector g, predictor h: (B, 3, S, S) -> (B, D) -> (B, d) -> (B, d)."""

    def __init__(self, encoder, predictor=False, hidden=2048, out=128):
        super().__init__()
        self.encoder = encoder
        self.projector = nn.Sequential(  # without BatchNorm
            nn.Linear(encoder.dim, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out)
        )
        self.predictor = nn.Identity()
        if predictor:  # with BatchNorm, unlike the projector [ours]
            up, down = nn.Linear(out, hidden), nn.Linear(hidden, out)
            self.predictor = nn.Sequential(up, nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), down)

    def forward(self, images):
        return self.predictor(self.projector(self.encoder(images)))


class Model(nn.Module):
    """Student, teacher and queue."""

    def __init__(self, encoder, queue_size, predictor=False):
        super().__init__()
        self.student = Network(encoder, predictor)
        # The teacher starts as a copy and takes no gradient. It stays in train mode, because only
        # the kNN calls eval(), and undoes it: BatchNorm normalises by the teacher's own batch, and
        # keeps the teacher's own running statistics, for the kNN; only its weight and bias follow
        # the student's, as all parameters do [code].
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.teacher.predictor = nn.Identity()  # the student's only: k is g(f(x))
        noise = torch.randn(queue_size, self.student.projector[-1].out_features)
        self.register_buffer("queue", F.normalize(noise, dim=1))  # (K, d)
        self.oldest = 0  # row of the queue to overwrite next; on the host, so no step reads it back

    def get_extra_state(self):  # what puts `oldest` into the state_dict
        return self.oldest

    def set_extra_state(self, oldest):
        self.oldest = oldest


# ------------------------------------------------------------------------------------------ loss


def relation(z, queue, temperature):
    """Of z (B, d) to queue (K, d), both of unit length -> softmax(z Q^T / tau), (B, K)."""
    return F.softmax(z @ queue.T / temperature, dim=1)


def relation_loss(q, k, queue, student_temp, teacher_temp):
    """Cross-entropy of the student's relation against the teacher's, the target -> scalar.

    q (B, d) student, k (B, d) teacher, queue (K, d), all of unit length. No gradient reaches k or
    queue, wherever they come from. k joins the queue only afterwards: an image is not compared with
    its own k of this step [code].
    """
    with torch.no_grad():
        p_t = relation(k, queue, teacher_temp)  # (B, K)
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
    """teacher = momentum * teacher + (1 - momentum) * student, for every parameter (no buffers).

    The student's predictor has no counterpart.
    """
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

    views: (B, 3, S, S), crops smaller. infonce: InfoNCE in place of the relation loss.
    scaler: torch.amp.GradScaler, enabled for fp16 only. dtype: half precision, or None. Only the
    networks run in it, and return float32 (common.embed): what follows has exponentials and sums.

    -> scalars by name, left on the device, so that no step waits for them. The epoch averages what
    is in it, and logs and prints the means: one more quantity to watch is one more entry.
    """
    *student_views, teacher_view = views
    qs = [common.embed(model.student, view, dtype) for view in student_views]
    qs = [F.normalize(q, dim=1) for q in qs]  # (B, d) each
    with torch.no_grad():
        k = F.normalize(common.embed(model.teacher, teacher_view, dtype), dim=1)  # (B, d)
        p_t = relation(k[:32], model.queue, args.teacher_temp)  # (32, K): enough for the log
        entropy = torch.special.entr(p_t).sum(dim=1).mean()
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
    return {"loss": loss.detach(), "entropy": entropy}


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


def train_epoch(epoch, model, optimizer, scaler, generator, data, args, dtype):
    """One pass over the training images -> what its steps return, averaged; the last rates."""
    steps, totals = len(data) // args.batch_size, {}
    warmup = round(min(5, 0.1 * args.epochs) * steps)  # 5 epochs in ReSSL's code
    infonce = epoch <= args.infonce_epochs
    normalize = common.normalizer(data, data.images.device)
    for step, images in common.batches(epoch, data, args, generator):  # steps of the whole run
        lr = learning_rate(step, args.epochs * steps, warmup, args.lr)
        optimizer.param_groups[0]["lr"] = lr
        views = [normalize(view) for view in draw_views(images, args, generator)]
        scalars = train_step(model, optimizer, scaler, views, args, dtype, infonce)
        totals = {name: totals.get(name, 0) + value for name, value in scalars.items()}
    # The one time in an epoch that values are read back from the device
    means = {name: total.item() / steps for name, total in totals.items()}
    return {**means, "lr": lr}


def chance(epoch, args):
    """What to hold the loss against: its value where all similarities are equal."""
    if epoch <= args.infonce_epochs:
        return f"InfoNCE (ln(1 + K) {math.log(1 + args.queue_size):.3f})"
    return f"(ln K {math.log(args.queue_size):.3f})"


def train(args, checkpoint, splits, device, dtype):
    """Train from random weights, or on from the checkpoint, to the last epoch -> its record."""
    torch.manual_seed(args.seed)
    encoder = common.build_encoder(args.arch, common.stem_for(args.image_size), args.bn_splits)
    model = Model(encoder, args.queue_size, args.predictor)
    model.to(device, memory_format=common.memory_format(device))
    trained = [p for p in model.parameters() if p.requires_grad]
    settings = dict(lr=args.lr, momentum=0.9, weight_decay=5e-4)  # on all, as in [code]
    optimizer = torch.optim.SGD(trained, **settings, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    generator = torch.Generator().manual_seed(args.seed)
    state = (model, optimizer, scaler, generator)  # all that a step changes, and a resume restores
    begin = common.restore_run(checkpoint, *state)  # the epoch to go on with
    for epoch in range(begin, args.epochs + 1):  # 0: random weights, evaluated only
        start = time.perf_counter()
        means = train_epoch(epoch, *state, splits[0], args, dtype) if epoch > 0 else {}
        common.end_epoch(args, epoch, start, means, splits, dtype, state, chance(epoch, args))
    return common.read_records(pathlib.Path(args.output, "log.jsonl"))[-1]


# ---------------------------------------------------------------------------------- command line


def parse_arguments(argv):
    """-> arguments, and the checkpoint to resume from or None."""
    parser = common.Parser(prog="ressl.py", description=__doc__)
    option, whole, real = parser.add_argument, common.whole, common.real
    option("--data", default="textures", help=f"{', '.join(RECIPES)}:PATH")
    common.add_shared_options(option)
    # Defaults: the authors' code [code]; epochs their word [authors]; plain BatchNorm [ours]
    option("--arch", choices=common.ARCHITECTURES, default="resnet18", help="encoder f")
    option("--bn-splits", type=whole(1), default=1, help="groups of BatchNorm; 8 in ReSSL's code")
    option("--epochs", type=whole(1), default=200, help="passes over the training images")
    option("--batch-size", type=whole(2), default=256, help="B; what is left over is dropped")
    option("--lr", type=real(1e-8), default=0.06, help="peak; the default is times B / 256")
    option("--queue-size", type=whole(1, 10**7), default=4096, help="K, a multiple of B")
    option("--student-temp", type=real(0.01), default=0.1, help="tau_s")
    option("--teacher-temp", type=real(0.01), default=0.04, help="tau_t, sharper: below tau_s")
    option("--momentum", type=real(0, 1), default=0.99, help="the teacher's m, constant")
    option("--teacher-view", choices=("weak", "strong"), default="weak", help="what it sees")
    option("--crops", type=whole(1, 5), default=1, help="multi-crop: the student's views")
    option("--infonce-epochs", type=whole(0), default=0, help="extended: with InfoNCE, at first")
    option("--predictor", action="store_true", help="extended: MLP on the student")
    option("--output", help="run folder; None: a new one under runs/")
    option("--resume", action="store_true", help="continue the run in --output")
    option("--knn-every", type=whole(1), default=10, help="epochs; also at epoch 0 and the last")
    option("--views", type=common.png, metavar="FILE.png", help="only draw views")
    option("--seed", type=whole(0, 2**63 - 1), default=0, help="of weights, batches and views")
    return common.training_arguments(parser, argv, RECIPES)


def fit_to_data(args, count):
    """Let B and K suit `count` images, unless they are given; say what K means where it does not.

    K has to be a multiple of B, since the queue is overwritten a batch at a time.
    """
    given, batch = common.fit_batch(args, count), args.batch_size
    fitted = max(1, min(args.queue_size, count) // batch) * batch
    if "--queue-size" not in given and fitted != args.queue_size:
        args.queue_size = fitted
        print(f"for {count} images in batches of {batch}: --queue-size {fitted}")
    if args.queue_size % batch:
        raise common.UserError(f"K is not a multiple of the batch: use --queue-size {fitted}")
    if args.queue_size > count:
        print(f"K = {args.queue_size} exceeds {count} images: the queue holds them more than once")
    if count // batch * args.epochs < args.queue_size // batch:
        print(
            f"K / B = {args.queue_size // batch} steps, more than this run has: noise stays in it"
        )


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
    fit_to_data(args, len(data))
    with common.running(args, checkpoint, data, device, dtype):
        return train(args, checkpoint, (data, bank, test), device, dtype)


if __name__ == "__main__":
    main()
