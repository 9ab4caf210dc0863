"""ReSSL: Relational Self-Supervised Learning with Weak Augmentation.

Zheng, You, Wang, Qian, Zhang, Wang, Xu. NeurIPS 2021. arXiv 2107.09282.

Contrastive learning asks two views of one image to match. ReSSL asks for less: the *relations* of an
image to a queue of other images shall be the same, whichever view is taken. A weak view goes through a
slowly moving teacher and gives the relation to reach; a strong view goes through the student and must
reproduce it, without ever being told which image it came from.

    L = mean over b of  - sum_i p_t(i) log p_s(i)          i runs over the queue
        p_s = softmax(q Q' / tau_s)    p_t = softmax(k Q' / tau_t)    tau_t < tau_s: a sharper target

    paper          here                          shape           what
    x_s, x_w       strong, weak                  (B, 3, S, S)    two views of the same B images
    f, g           encoder, projector            -> D, -> d      a ResNet without its fc; an MLP
    z_s            q                             (B, d)          student's embedding of strong, unit length
    z_t            k                             (B, d)          teacher's embedding of weak, unit length
    queue          queue                         (K, d)          the teacher's last K embeddings, FIFO
    p_s, p_t       log_p_s, p_t                  (B, K)          relations of q and of k to the queue
    tau_s, tau_t   student_temp, teacher_temp                    0.1, 0.04
    m              momentum                                      teacher = m * teacher + (1 - m) * student

    python ressl.py                                        two CPU cores, no download
    python ressl.py --data cifar10 --epochs 200            one GPU: the paper's run
    python ressl.py --data cifar10 --arch conv4 --epochs 20    a laptop, real data

A run prints one line an epoch: the loss beside ln K, which is the loss of a student that finds every
image of the queue equally related; and the accuracy of a kNN on the features of both networks. The
loss may rise at first, while real embeddings replace the queue's initial noise.

Read on in the order of the paper: views, model, loss, teacher and queue, one step, training.
"""

import copy
import math
import pathlib
import time

import torch
from torch import nn
from torch.nn import functional as F

import common

# One recipe per data set: the defaults of the command line. lr is for a batch of 256. From the
# authors' code [code]; epochs from the authors [authors]; textures and knn_every are ours [ours].
RECIPE = dict(
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
    knn_every=10,
)
RECIPES = {
    "textures": dict(
        RECIPE, arch="conv4", epochs=15, batch_size=64, lr=0.24, queue_size=2048, knn_every=1
    ),
    "cifar10": RECIPE,
    "cifar100": RECIPE,
}

# ----------------------------------------------------------------------------------------- views
# Drawn on the host, sent to the device in one copy, applied there to the whole batch: every image has
# its own random parameters (common.py). Only the order of the colour operations is the batch's.


def weak_view(images, size=None, generator=None):
    """RandomResizedCrop and flip: float (N, 3, S, S) in [0, 1] -> (N, 3, size, size) in [0, 1]."""
    count, side = len(images), images.shape[-1]
    box = common.draw_boxes(count, side, (0.2, 1.0), generator)
    flip = common.draw_uniform(count, 0, 1, generator) < 0.5
    box, flip = common.to_device(images, box, flip)
    return common.resized_crop(images, *box, size or side, flip)


def strong_view(images, size=None, generator=None):
    """The weak view, then ColorJitter(0.4, 0.4, 0.4, 0.1) for 80 % of the images, grey for 20 %, and
    blur for 50 % [code]: float (N, 3, S, S) in [0, 1] -> (N, 3, size, size) in [0, 1]."""
    count, side = len(images), images.shape[-1]
    box = common.draw_boxes(count, side, (0.2, 1.0), generator)
    flip = common.draw_uniform(count, 0, 1, generator) < 0.5
    jittered = common.draw_chosen(count, 0.8, generator)  # indices of the images
    factors, order = common.draw_jitter(len(jittered), 0.4, 0.4, 0.4, 0.1, generator)
    grey = common.draw_chosen(count, 0.2, generator)
    blurred = common.draw_chosen(count, 0.5, generator)
    sigma = common.draw_uniform(len(blurred), 0.1, 2.0, generator)
    box, flip, jittered, factors, grey, blurred, sigma = common.to_device(
        images, box, flip, jittered, factors, grey, blurred, sigma
    )
    view = common.resized_crop(images, *box, size or side, flip)
    view[jittered] = common.color_jitter(view[jittered], factors, order)
    view[grey] = common.rgb_to_grey(view[grey]).expand(-1, 3, -1, -1)
    view[blurred] = common.gaussian_blur(view[blurred], sigma)
    return view


# ----------------------------------------------------------------------------------------- model


class Network(nn.Module):
    """Encoder f, then projector g: (B, 3, S, S) -> (B, D) -> (B, d). Student and teacher are one each."""

    def __init__(self, encoder, hidden=2048, out=128):
        super().__init__()
        self.encoder = encoder
        self.projector = nn.Sequential(  # without BatchNorm
            nn.Linear(encoder.dim, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out)
        )

    def forward(self, images):
        return self.projector(self.encoder(images))


class Model(nn.Module):
    """Student, teacher and queue: all that a training step changes, optimiser aside."""

    def __init__(self, encoder, queue_size):
        super().__init__()
        self.student = Network(encoder)
        # The teacher starts as a copy, and takes no gradient. It stays in train mode: its BatchNorm
        # uses the statistics of its own batch. Those buffers are not averaged, its weights are.
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, 128), dim=1))  # (K, d) noise
        self.oldest = 0  # the queue's row to overwrite next; on the host, so that no step reads it back

    def get_extra_state(self):  # so that the state_dict has it
        return self.oldest

    def set_extra_state(self, oldest):
        self.oldest = oldest


def embed(network, images, dtype):
    """Unit embeddings (B, d): the network in mixed precision, the rest in float32."""
    with common.autocast(images.device, dtype):
        embeddings = network(images)
    return F.normalize(common.promote(embeddings), dim=1)


# ------------------------------------------------------------------------------------------ loss


def relation_loss(q, k, queue, student_temp, teacher_temp):
    """Cross-entropy between the teacher's and the student's relation to the queue (section 3.2) -> ().

    q (B, d) student, k (B, d) teacher, queue (K, d), all unit length. No gradient reaches k or queue.
    k itself is not in the queue yet: the positive pair is not among the logits.
    """
    with torch.no_grad():
        p_t = F.softmax(k @ queue.T / teacher_temp, dim=1)  # (B, K)
    log_p_s = F.log_softmax(q @ queue.detach().T / student_temp, dim=1)  # (B, K)
    return -(p_t * log_p_s).sum(dim=1).mean()


# ----------------------------------------------------------------------------- teacher and queue


@torch.no_grad()
def update_teacher(model, momentum):
    """teacher = momentum * teacher + (1 - momentum) * student, for every parameter (no buffers)."""
    teacher, student = list(model.teacher.parameters()), list(model.student.parameters())
    torch._foreach_lerp_(teacher, student, 1 - momentum)  # t + (1 - m) * (s - t), all in one call


@torch.no_grad()
def enqueue(model, k):
    """Put k (B, d) in the place of the oldest B embeddings: one slice, since K is a multiple of B."""
    model.queue[model.oldest : model.oldest + len(k)] = k
    model.oldest = (model.oldest + len(k)) % len(model.queue)


# -------------------------------------------------------------------------------------- training


def train_step(model, optimizer, scaler, views, args, dtype=None):
    """One whole step, from the two normalised views (student's, teacher's), (B, 3, S, S) each.

    -> the loss, on the device: nothing here waits for it. scaler: torch.amp.GradScaler, enabled for
    fp16 only. dtype: of mixed precision, or None.
    """
    strong, weak = views
    q = embed(model.student, strong, dtype)  # (B, d)
    with torch.no_grad():
        k = embed(model.teacher, weak, dtype)  # (B, d)
    loss = relation_loss(q, k, model.queue, args.student_temp, args.teacher_temp)
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
    """The two views of a batch, (B, 3, S, S) in [0, 1] both: for the student and for the teacher."""
    teacher_view = weak_view if args.teacher_view == "weak" else strong_view
    return strong_view(images, generator=generator), teacher_view(images, generator=generator)


def train_epoch(epoch, model, optimizer, scaler, data, generator, args, dtype, estimate):
    """One pass over the training images -> (mean loss, last learning rate)."""
    device, size = data.images.device, args.batch_size
    steps = len(data) // size
    warmup = round(min(5, 0.1 * args.epochs) * steps)
    normalize = common.normalizer(data, device)
    total = torch.zeros((), device=device)
    order = torch.randperm(len(data), generator=generator).to(device)
    batches = order[: steps * size].view(steps, size)
    for i in common.progress(epoch, args, steps, device, estimate):
        lr = learning_rate((epoch - 1) * steps + i, args.epochs * steps, warmup, args.lr)
        optimizer.param_groups[0]["lr"] = lr
        images = data.images[batches[i]].float() / 255
        views = [normalize(view) for view in draw_views(images, args, generator)]
        total += train_step(model, optimizer, scaler, views, args, dtype)
    return total.item() / steps, lr  # the one value read back from the device


def train(args, checkpoint, splits, device, dtype):
    """Train to the last epoch, from the checkpoint's or from 0 (random weights) -> the last record."""
    data, bank, test = splits
    log = pathlib.Path(args.output) / "log.jsonl"
    torch.manual_seed(args.seed)
    model = Model(common.build_encoder(args.arch, common.stem_for(data.side)), args.queue_size)
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.student.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    generator = torch.Generator().manual_seed(args.seed)
    state = (model, optimizer, scaler, generator)
    first = common.restore_run(checkpoint, *state) if checkpoint else 0
    record, saved = common.read_records(log)[-1], 0
    for epoch in range(first, args.epochs + 1):
        start, loss, lr, speed = time.perf_counter(), None, None, None
        if epoch > 0:
            estimate = epoch == max(first, 1)
            loss, lr = train_epoch(epoch, model, optimizer, scaler, data, generator, args, dtype, estimate)
            common.check_finite(loss, model)
            speed = len(data) // args.batch_size * args.batch_size / (time.perf_counter() - start)
        record = {"epoch": epoch, "loss": loss, "lr": lr, "student_knn": None, "teacher_knn": None}
        if epoch % args.knn_every == 0 or epoch == args.epochs:
            for name, network in (("student", model.student), ("teacher", model.teacher)):
                record[f"{name}_knn"] = common.knn_accuracy(network.encoder, bank, test, dtype)
        record["images_per_second"] = speed
        record["seconds"] = time.perf_counter() - start
        record["peak_memory"] = common.peak_memory(device)
        common.append_record(log, record)
        print(epoch_line(record, args), flush=True)
        if epoch in (0, args.epochs) or time.perf_counter() - saved > 30:
            common.save_run(args, epoch, data, *state)
            saved = time.perf_counter()
    return record


def epoch_line(record, args):
    """What a run prints of an epoch."""
    line = f"epoch {record['epoch']:3d}/{args.epochs}"
    if record["loss"] is not None:
        line += f"  loss {record['loss']:.3f} (ln K {math.log(args.queue_size):.3f})"
    if record["student_knn"] is not None:
        line += f"  kNN student {record['student_knn']:.2f} % teacher {record['teacher_knn']:.2f} %"
    if record["images_per_second"]:
        line += f"  {record['images_per_second']:,.0f} images/s"
    return f"{line}  {common.duration(record['seconds'])}"


# ---------------------------------------------------------------------------------- command line


def parse_arguments(argv):
    """-> (arguments, checkpoint to resume from or None)."""
    parser, option = common.training_parser("ressl.py", __doc__, RECIPES)
    option("queue_size", common.whole(1), "K, a multiple of the batch size")
    option("student_temp", common.number(0.01), "tau_s")
    option("teacher_temp", common.number(0.01), "tau_t, below tau_s: a sharper target")
    option("momentum", common.number(0, 1), "m, of the teacher")
    option("teacher_view", str, "view that the teacher sees", choices=("weak", "strong"))
    args, checkpoint = common.training_arguments(parser, argv, RECIPES, "ressl")
    if args.queue_size % args.batch_size:
        rows = max(1, round(args.queue_size / args.batch_size)) * args.batch_size
        raise common.UserError(
            f"--queue-size {args.queue_size} is not a multiple of --batch-size {args.batch_size}: "
            f"use --queue-size {rows}"
        )
    return args, checkpoint


@common.command
def main(argv=None):
    """The command line -> the last record of the log: loss, student_knn, teacher_knn and the rest."""
    args, checkpoint = parse_arguments(argv)
    device = common.pick_device(args.device)
    dtype = common.pick_precision(args.amp, device)
    splits = common.load_splits(args, device)
    if args.views:
        images = splits[2].images[:8].float() / 255
        columns = [draw_views(images, args, torch.Generator().manual_seed(i))[::-1] for i in range(3)]
        return common.save_picture(args.views, [images, *sum(columns, ())])
    common.begin_run(args, splits, device, dtype)
    with common.resumable(args):
        record = train(args, checkpoint, splits, device, dtype)
    common.print_next(args)
    return record


if __name__ == "__main__":
    main()
