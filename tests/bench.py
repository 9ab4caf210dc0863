"""How fast, against what: one table, whose ratios are taken in this run, in alternating rounds.

    python tests/bench.py                                  textures
    python tests/bench.py --data cifar10 --data-dir DIR    real images: the README's table
    python tests/bench.py --only views step --rounds 9     some sections only

Sections, in the table's order:
    views        strong + weak view: ours, PIL transforms in DataLoader workers, kornia if installed
    training     a whole epoch: ours, the usual pipeline, ours with the usual pipeline's views
    step         a step of each method in the training loop, over its bare arithmetic; its parts
                 are timed alone
    precision    the bare step in each precision and memory format, over float32 contiguous
    operations   tensor operations that a step issues outside the networks
    knn          10,000 against 50,000 features: ours, all similarities in one matrix
    pictures     reading JPEG files of 500 x 375: ours, Pillow's bare decoding, both on all cores
    rate         the step's share of the device's own matrix rate
    epochs       five whole epochs, and what 200 would take (unless asked for, on CUDA only)
    busy         the default run beside 0, 1 and 2 busy processes, on all cores and on one thread
    accuracy     seconds of training until 50 and 60 % kNN on held-out images: the paper's recipe in
                 the usual pipeline, the same here, and the laptop's command (half an hour or more)

The last two run only if they are asked for (--only).

Run it on an idle machine. The figures of a shared machine wander, so trust the ratios, and their
spread: median (lowest to highest of all rounds). "x" says how many times faster ours is; a step's
ratio is its time over the bare step's, the lower the better. On CUDA, float32 convolutions use
TF32, PyTorch's default.
"""

import concurrent.futures
import contextlib
import functools
import itertools
import multiprocessing
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import torchvision.transforms as T
from PIL import Image, ImageFilter
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
sys.path.insert(1, str(pathlib.Path(__file__).parent.parent / "docs"))

import compare

import common
import residual_momentum
import ressl

METHODS = {"ReSSL": ressl, "Residual Momentum": residual_momentum}
BATCH = 256

# ------------------------------------------------------------------------------- rounds and rows


def race(contestants, rounds, device):
    """Run each contestant in turn, once to warm up, then `rounds` times -> {name: [seconds]}."""
    seconds = {name: [] for name in contestants}
    for i in range(rounds + 1):
        for name, work in contestants.items():
            wait(device)
            start = time.perf_counter()
            work()
            wait(device)
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def wait(device):
    """Until the device has done all that was asked of it."""
    torch.zeros(1, device=device).item()


def spread(values, form="{:.2f}"):
    """[...] -> "median (lowest to highest)"."""
    low, middle, high = (form.format(f(values)) for f in (min, statistics.median, max))
    return f"{middle} ({low} to {high})"


def ratios(slow, fast):
    """Round by round: how many times longer the first took."""
    return [a / b for a, b in zip(slow, fast, strict=True)]


def milliseconds(seconds, steps=1):
    return f"{1e3 * statistics.median(seconds) / steps:.1f} ms"


def precision_name(dtype):
    return str(dtype or torch.float32).removeprefix("torch.")


def row(*cells):
    print(f"| {' | '.join(str(cell) for cell in cells)} |", flush=True)


def peak_memory(work, device):
    """Bytes that work() needs at most, above what was in use before; None where unknown."""
    if device.type == "cuda":
        work()  # the libraries' own workspaces are not its
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    status = pathlib.Path("/proc/self/status")
    if not status.exists():  # not Linux
        return None
    kilobytes = lambda name: int(status.read_text().split(f"{name}:")[1].split()[0])
    with contextlib.suppress(OSError):  # the peak starts anew, where that is allowed
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    work()
    return 1024 * (kilobytes("VmHWM") - before)


# ------------------------------------------------------------------------------------- the peers


class UsualViews(torch.utils.data.Dataset):
    """What users run today: each image through PIL transforms, twice, in worker processes."""

    def __init__(self, data, *last):
        self.images = data.images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        weak = [
            T.RandomResizedCrop(data.images.shape[-1], scale=(0.2, 1)),
            T.RandomHorizontalFlip(),
        ]
        strong = [
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            T.RandomGrayscale(0.2),
            T.RandomApply([self.blur], p=0.5),
        ]
        self.weak = T.Compose([*weak, T.ToTensor(), *last])
        self.strong = T.Compose([*weak, *strong, T.ToTensor(), *last])

    @staticmethod
    def blur(image):
        sigma = torch.empty(1).uniform_(0.1, 2).item()
        return image.filter(ImageFilter.GaussianBlur(sigma))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = Image.fromarray(self.images[index])
        return self.strong(image), self.weak(image)


def cores():
    """Of this process; the machine's where that is not known."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def usual_loader(data, *last, persistent=True):
    """A DataLoader of such views with one worker a core, which may stay from epoch to epoch."""
    return torch.utils.data.DataLoader(
        UsualViews(data, *last),
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=cores(),
        persistent_workers=persistent,
        pin_memory=data.images.is_cuda,
    )


def usual_epoch(method, args, model, optimizer, data, dtype):
    """-> a function that runs one epoch as users' scripts do, with .item() in every step."""
    loader, device = usual_loader(data, T.Normalize(data.mean, data.std)), data.images.device
    memory_format = torch.channels_last if dtype else torch.contiguous_format
    scaler = make_scaler(device, dtype)

    def run(first=0):
        steps = len(data) // args.batch_size
        for step, batch in enumerate(loader, first):
            warmup = round(min(5, 0.1 * args.epochs) * steps)
            lr = ressl.learning_rate(step, args.epochs * steps, warmup, args.lr)
            optimizer.param_groups[0]["lr"] = lr
            views = [view.to(device, non_blocking=True) for view in batch]
            views = [view.contiguous(memory_format=memory_format) for view in views]
            method.train_step(model, optimizer, scaler, views, args, dtype)["loss"].item()

    return run


def kornia_views(side, **settings):
    """kornia's batched transforms, of the same operations: -> strong, weak; None if not there.

    settings: of its crop, whose default cuts image by image; "resample" warps the batch at once.
    """
    try:
        import kornia.augmentation as K
    except ImportError:
        return None

    def crop():
        return [
            K.RandomResizedCrop((side, side), scale=(0.2, 1.0), **settings),
            K.RandomHorizontalFlip(),
        ]

    jitter = K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8)
    blur = K.RandomGaussianBlur((13, 13), (0.1, 2.0), p=0.5)
    strong = torch.nn.Sequential(*crop(), jitter, K.RandomGrayscale(p=0.2), blur)
    return strong, torch.nn.Sequential(*crop())


def plain_knn(bank, labels, features, classes, k=200, temperature=0.1):
    """common.knn_scores, with all similarities in one matrix."""
    similarity = F.normalize(features, dim=1) @ F.normalize(bank, dim=1).T
    nearest, index = similarity.topk(k)
    votes = torch.zeros(len(features), classes, device=bank.device)
    return votes.scatter_add_(1, labels[index], (nearest / temperature).exp())


# -------------------------------------------------------------------------------- what is timed


def build(method, arch, data, memory_format=torch.channels_last, args=None):
    """-> arguments, model and optimiser of a method, as its train() makes them."""
    argv = ["--data", "cifar10", "--batch-size", str(BATCH), "--epochs", "1", "--lr", "0.01"]
    if args is None:
        args = method.parse_arguments(argv)[0]
        args.image_size = data.images.shape[-1]
        method.fit_to_data(args, 50_000)
    torch.manual_seed(0)
    encoder = common.build_encoder(arch, args.stem)
    model = method.Model(encoder, args.queue_size) if method is ressl else method.Model(encoder)
    device = data.images.device
    model.to(device, memory_format=memory_format)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=args.lr,
        momentum=0.9,
        weight_decay=5e-4,
        fused=device.type == "cuda",
        foreach=True if device.type == "meta" else None,  # its default: one tensor after another
    )
    return args, model, optimizer


def make_scaler(device, dtype):
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def epoch_of(method, args, model, optimizer, data, dtype):
    """-> a function that runs one epoch in the method's own loop."""
    generator = torch.Generator().manual_seed(0)
    state = (model, optimizer, make_scaler(data.images.device, dtype), generator)
    return lambda: method.train_epoch(1, *state, data, args, dtype)


def view_maker(method, args, data):
    """-> a function that does what train_epoch does with the first batch before the step."""
    normalize = common.normalizer(data)
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(BATCH, device=data.images.device)

    def make():
        views = method.draw_views(data.images[index] / 255, args, generator)
        return [normalize(view) for view in views]

    return make


def bare_step(method, model, views, dtype):
    """Only the networks: each view's teacher forward, student forward and backward."""
    students, teachers = (views[:1], views[1:]) if method is ressl else (views, views)
    with common.autocast(views[0].device, dtype):
        with torch.no_grad():
            for view in teachers:
                common.full_precision(model.teacher(view))
        q = [common.full_precision(model.predictor(model.student(view))) for view in students]
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad(q, trained, [x.detach() for x in q])


def make_parts(method, args, model, optimizer, data):
    """What a step does besides the networks -> {name: function}."""
    device = data.images.device
    width = model.student(torch.zeros(2, *data.images.shape[1:], device=device)).shape[1]
    q = [torch.randn(BATCH, width, device=device, requires_grad=True) for _ in range(2)]
    k = [torch.randn(BATCH, width, device=device) for _ in range(2)]

    def ressl_loss():
        unit_q, unit_k = common.unit_length(q[0]), common.unit_length(k[0])
        p_t = ressl.relation(unit_k, model.queue, args.teacher_temp)
        ressl.prediction_loss(unit_q, p_t, model.queue, args.student_temp).backward()
        torch.special.entr(p_t).sum(dim=1).mean()

    def residual_momentum_loss():
        unit_q, unit_k = ([common.unit_length(x) for x in z] for z in (q, k))
        tau = args.temperature
        base = [residual_momentum.info_nce(unit_q[i], unit_k[1 - i], tau) for i in (0, 1)]
        same = [residual_momentum.residual_loss(unit_q[i], unit_k[i]) for i in (0, 1)]
        (sum(base) + sum(same)).backward()

    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    parts = {
        "views": view_maker(method, args, data),
        "loss": ressl_loss if method is ressl else residual_momentum_loss,
        "optimiser": optimizer.step,
        "EMA": lambda: method.update_teacher(model, 0.99),
    }
    if method is ressl:
        parts["queue"] = lambda: ressl.update_queue(model, k[0])
    return parts


# --------------------------------------------------------------------------------------- sections


def some(bench, batches):
    """The first images, so many whole batches of them unless --images says how many images."""
    batches = bench.images // BATCH if bench.images else batches
    return bench.data.take(torch.arange(min(batches, len(bench.data) // BATCH) * BATCH))


def is_light(bench, arch):
    """Whether a step of this encoder takes well below a second."""
    return arch == "conv4" or bench.device.type == "cuda"


def views(bench):
    """Strong + weak view of the same bytes, float32 batches of 256, drawing included."""
    data, device = some(bench, 8 * cores()), bench.device
    generator = torch.Generator().manual_seed(0)
    batches = data.images.split(BATCH)

    def our_views():
        for batch in batches:
            images = batch / 255
            ressl.strong_view(images, generator=generator)
            ressl.weak_view(images, generator=generator)

    def usual_views(loader):
        for batch in loader:
            [view.to(device, non_blocking=True) for view in batch]

    def kornias_views(transforms):
        for batch in batches:
            images = batch / 255
            [view(images) for view in transforms]

    contestants = {"ours": our_views}
    for persistent in (False, True):  # False: DataLoader's default, new workers for every epoch
        loader = usual_loader(data, persistent=persistent)
        name = f"PIL, {cores()} {'persistent' if persistent else 'new'} workers"
        contestants[name] = functools.partial(usual_views, loader)
    for name, settings in (("kornia", {}), ("kornia, resample", {"cropping_mode": "resample"})):
        transforms = kornia_views(data.images.shape[-1], **settings)
        if transforms:
            contestants[name] = functools.partial(kornias_views, transforms)
    faster(bench, "strong + weak view", len(data), contestants, bench.rounds)


def faster(bench, what, images, contestants, rounds):
    """Race them; a row for each peer: images a second, and how many times faster "ours" is."""
    seconds = race(contestants, rounds, bench.device)
    for peer in list(contestants)[1:]:
        ours, theirs = (f"{images / statistics.median(seconds[n]):,.0f}" for n in ("ours", peer))
        gain = spread(ratios(seconds[peer], seconds["ours"]), "{:.2f}x")
        row(f"{what}, images/s", ours, f"{peer}: {theirs}", gain)


def training(bench, arch):
    """A whole ReSSL epoch: our loop, PIL workers in float32, PIL workers in our precision."""
    batches = 10 * cores() if is_light(bench, arch) else 2
    data, contestants = some(bench, batches), {}
    args, model, optimizer = build(ressl, arch, data)
    contestants["ours"] = epoch_of(ressl, args, model, optimizer, data, bench.dtype)
    _, model, optimizer = build(ressl, arch, data, torch.contiguous_format)
    contestants["usual pipeline, float32"] = usual_epoch(ressl, args, model, optimizer, data, None)
    if bench.dtype:
        name = f"the same in {precision_name(bench.dtype)}, channels_last"
        _, model, optimizer = build(ressl, arch, data)
        contestants[name] = usual_epoch(ressl, args, model, optimizer, data, bench.dtype)
    faster(bench, f"ReSSL epoch, {arch}", len(data), contestants, max(1, bench.rounds // 2))


def step(bench, arch):
    """A step inside the training loop against the networks' arithmetic; where the rest goes."""
    for name, method in METHODS.items():
        for dtype in dict.fromkeys((None, bench.dtype)):
            many = 40 if bench.device.type == "cuda" else 8
            data = some(bench, many if is_light(bench, arch) else 1)
            steps = len(data) // BATCH
            args, model, optimizer = build(method, arch, data)
            ready = view_maker(method, args, data)()
            parts = {"bare": functools.partial(bare_step, method, model, ready, dtype)}
            parts |= make_parts(method, args, model, optimizer, data)
            contestants = {"whole": epoch_of(method, args, model, optimizer, data, dtype)}
            contestants |= {part: repeated(work, steps) for part, work in parts.items()}
            seconds = race(contestants, bench.rounds, bench.device)
            times = {part: milliseconds(seconds[part], steps) for part in contestants}
            where = ", ".join(f"{part} {times[part]}" for part in list(parts)[1:])
            row(
                f"{name} step, {arch}, {precision_name(dtype)}",
                f"{times['whole']} ({where})",
                f"bare: {times['bare']}",
                spread(ratios(seconds["whole"], seconds["bare"])),
            )


def repeated(work, times):
    """-> a function that calls work() so many times."""
    return lambda: [work() for _ in range(times)]


def precision(bench, arch):
    """Images/s of ReSSL's bare step in each precision and memory format."""
    dtypes = [None, torch.bfloat16] + [torch.float16] * (bench.device.type == "cuda")
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    count, many = BATCH if is_light(bench, arch) else 64, 20 if bench.device.type == "cuda" else 1
    contestants = {}
    for dtype, (label, memory_format) in itertools.product(dtypes, formats.items()):
        _, model, _ = build(ressl, arch, bench.data, memory_format)
        view = torch.rand(count, *bench.data.images.shape[1:], device=bench.device)
        ready = [view.contiguous(memory_format=memory_format)] * 2
        work = functools.partial(bare_step, ressl, model, ready, dtype)
        contestants[f"{precision_name(dtype)} {label}"] = repeated(work, many)
    seconds = race(contestants, bench.rounds, bench.device)
    base, *others = contestants
    for label in others:
        fast, slow = (f"{many * count / statistics.median(seconds[n]):,.0f}" for n in (label, base))
        gain = spread(ratios(seconds[base], seconds[label]), "{:.2f}x")
        row(
            f"bare step, {arch}, batch {count}, images/s",
            f"{label}: {fast}",
            f"{base}: {slow}",
            gain,
        )


class CountOperations(TorchDispatchMode):
    """Counts the operations on meta tensors; not those that only allocate or change a shape."""

    count = 0

    # Called with every operation, before it runs, and has to run it.
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (list, tuple)) else [result]
        on_device = any(isinstance(x, torch.Tensor) and x.is_meta for x in (*outputs, *args))
        # Arguments that the result shares memory with: written to (add_), or not (view, split).
        aliases = [a.alias_info for a in function._schema.arguments if a.alias_info]
        reshapes = any(not alias.is_write for alias in aliases)
        on_device |= bool(aliases) and not reshapes  # _foreach_add_(lists): no tensor among args
        free = "empty" in function._schema.name or "_unsafe_view" in function._schema.name
        self.count += on_device and not reshapes and not free
        return result


def count_operations(work):
    """The operations that work() issues on the meta device."""
    with CountOperations() as counter:
        work()
    return counter.count


def step_operations(method, arch="conv4"):
    """Tensor operations of a step outside the networks, by part -> {name: number}, "step": all.

    On a GPU each is at least one kernel launch, but for the optimiser: counted as _foreach_ calls,
    it is fused there. On the meta device, so the same on every machine.
    """
    meta = torch.device("meta")
    images = torch.empty(BATCH, 3, 32, 32, dtype=torch.uint8, device=meta)
    data = common.Images(images, None, [], (0.5,) * 3, (0.2,) * 3)
    args, model, optimizer = build(method, arch, data)
    parts = make_parts(method, args, model, optimizer, data)
    for part in parts.values():  # the first time makes what is then kept
        part()
    counts = {name: count_operations(part) for name, part in parts.items()}
    ready = parts["views"]()
    momentum = () if method is ressl else (args.momentum,)
    scaler = make_scaler(torch.device("cpu"), None)

    def whole():
        scalars = method.train_step(model, optimizer, scaler, ready, args, *momentum)
        return [0 + value for value in scalars.values()]  # summed over the epoch

    networks = count_operations(lambda: bare_step(method, model, ready, None))
    return {"step": counts["views"] + count_operations(whole) - networks, **counts}


def operations(bench):
    """Tensor operations of a step outside the networks."""
    for name, method in METHODS.items():
        counts = step_operations(method)
        total = counts.pop("step")
        where = ", ".join(f"{part} {number}" for part, number in counts.items())
        row(f"{name} step, tensor operations outside the networks", total, where, "")


KNNS = {"ours": common.knn_scores, "one matrix": plain_knn}


def knn_work(name, size, device):
    """-> a function that classifies size / 5 random features against `size`, in 512 dimensions."""
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(n, 512, generator=generator).to(device) for n in (size, size // 5))
    labels = torch.randint(10, (size,), generator=generator).to(device)
    return lambda: KNNS[name](bank, labels, queries, 10)


def knn_memory(*arguments):
    """The peak memory of knn_work(*arguments): to be called in a process that did nothing else."""
    return peak_memory(knn_work(*arguments), arguments[-1])


def knn(bench):
    """kNN of 10,000 test features against a bank of 50,000, in 512 dimensions."""
    size, device = bench.knn_size, bench.device
    contestants = {name: knn_work(name, size, device) for name in KNNS}
    seconds = race(contestants, max(1, bench.rounds // 2), device)
    cells = {}
    for name in KNNS:
        fresh = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, fresh) as process:
            memory = process.submit(knn_memory, name, size, device).result()
        cells[name] = f"{1e3 * statistics.median(seconds[name]):,.0f} ms"
        cells[name] += f", {memory / 2**20:,.0f} MiB" if memory is not None else ""
    row(
        f"kNN, {size // 5:,} against {size:,}",
        cells["ours"],
        f"one matrix: {cells['one matrix']}",
        spread(ratios(seconds["one matrix"], seconds["ours"]), "{:.2f}x"),
    )


def make_pictures(folder, count=50):
    """Write JPEGs of 500 x 375, of coarse noise, whose files are about as large as photographs'."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        coarse = torch.rand(1, 3, 75, 100, generator=generator)
        image = F.interpolate(coarse, (375, 500), mode="bicubic").clamp(0, 1)[0]
        pixels = (255 * image).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=92)


def bare_decoding(files):
    """What reading pictures costs at least: decoding, without resizing or keeping them."""

    def read(file):
        with Image.open(file) as picture:
            picture.load()

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(read, files))


def pictures(bench):
    """Reading JPEG files at 64 px, against decoding them in full, which ours spares in part."""
    with tempfile.TemporaryDirectory() as folder:
        make_pictures(pathlib.Path(folder))
        files = sorted(pathlib.Path(folder).iterdir()) * 20
        works = {
            "ours": lambda: common.read_pictures(files, None, [], 64),
            "bare": lambda: bare_decoding(files),
        }
        seconds = race(works, bench.rounds, torch.device("cpu"))
    rates = {name: f"{len(files) / statistics.median(s):,.0f}" for name, s in seconds.items()}
    row(
        "reading JPEGs of 500 x 375 at 64 px, pictures/s",
        rates["ours"],
        f"Pillow's bare decoding: {rates['bare']}",
        spread(ratios(seconds["bare"], seconds["ours"]), "{:.2f}x"),
    )


def rate_share(bench, arch):
    """Arithmetic of a ReSSL step a second, as a share of a large matrix product's."""
    side = 8192 if bench.device.type == "cuda" else 2048
    dtype = bench.dtype or torch.float32
    a, b = (torch.randn(side, side, device=bench.device).to(dtype) for _ in range(2))
    args, model, _ = build(ressl, arch, bench.data)
    ready = view_maker(ressl, args, bench.data)()
    bare = functools.partial(bare_step, ressl, model, ready, bench.dtype)
    with FlopCounterMode(display=False) as counter:
        bare()
    flops = {"bare": counter.get_total_flops(), "product": 2 * side**3}
    many = 20 if bench.device.type == "cuda" else 1
    works = {"bare": repeated(bare, many), "product": repeated(lambda: a @ b, many)}
    seconds = race(works, bench.rounds, bench.device)
    rates = {name: [many * flops[name] / s / 1e12 for s in seconds[name]] for name in flops}
    row(
        f"arithmetic of the bare step, {arch}, {precision_name(bench.dtype)}",
        f"{statistics.median(rates['bare']):.3g} TFLOP/s",
        f"matrix product: {statistics.median(rates['product']):.3g} TFLOP/s",
        spread(ratios(rates["bare"], rates["product"])),
    )


def epochs(bench, arch):
    """Five whole epochs of ReSSL in a run's own loop; 200 epochs extrapolated, and labelled so."""
    data = some(bench, len(bench.data) // BATCH)
    args, model, optimizer = build(ressl, arch, data)
    work, memory = epoch_of(ressl, args, model, optimizer, data, bench.dtype), ""
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)  # not that of the sections before
    seconds = race({"ours": work}, 5, bench.device)["ours"]
    if bench.device.type == "cuda":
        memory = f"peak memory {torch.cuda.max_memory_allocated(bench.device) / 2**30:.1f} GiB"
    full = statistics.mean(seconds) * 200 * 50_000 / len(data)
    row(
        f"5 epochs of ReSSL, {arch}, {len(data):,} images, images/s",
        f"{len(data) / statistics.median(seconds):,.0f}",
        f"200 epochs of 50,000, training only, EXTRAPOLATED: {full / 60:.1f} min",
        memory,
    )


def busy(bench):
    """Images a second of the default run (textures), beside programs that keep a core busy each.

    Every run is a process of its own, since OMP_NUM_THREADS is read when it starts.
    """
    epochs = str(max(1, bench.rounds // 2))
    argv = ["--epochs", epochs, "--knn-every", "999", "--device", "cpu", "--amp", bench.amp]
    few = str(bench.images)
    argv += ["--subset", few, "--holdout", few] if bench.images else []
    for count in range(3):
        work = [sys.executable, "-c", "while True: pass"]
        programs, rates = [subprocess.Popen(work) for _ in range(count)], {}
        try:
            for threads in (cores(), 1):
                with tempfile.TemporaryDirectory() as folder:
                    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
                    script = pathlib.Path(ressl.__file__)
                    command = [sys.executable, script, *argv, "--output", f"{folder}/run"]
                    subprocess.run(command, env=environment, check=True, capture_output=True)
                    log = compare.read_records(pathlib.Path(folder, "run", "log.jsonl"))
                rates[threads] = statistics.median(r["images_per_second"] for r in log[2:])
        finally:
            for program in programs:
                program.kill()
        row(
            f"default run beside {count} busy processes, images/s",
            f"{cores()} threads: {rates[cores()]:,.0f}",
            f"1 thread: {rates[1]:,.0f}",
            f"{rates[cores()] / rates[1]:.2f}x",
        )


RECIPES = {  # name -> options, whether in the usual pipeline; the last is the README's for a laptop
    "paper's recipe, usual pipeline, float32": ([], True),
    "paper's recipe, here": ([], False),
    "laptop's recipe, here": (
        ["--batch-size", "64", "--lr", "0.06", "--infonce-epochs", "2"],
        False,
    ),
}


def accuracy(bench, goals=(50, 60), epochs=20):
    """Seconds of training until the student's kNN on held-out images reaches the goals.

    ReSSL with conv4 on --data, with a schedule of so many epochs and a tenth of the images held
    out; evaluated after every epoch, which is not counted.
    """
    for name, (options, usual) in RECIPES.items():
        argv = ["--data", bench.data_name, "--data-dir", bench.data_dir, "--arch", "conv4"]
        argv += ["--epochs", str(epochs), "--holdout", str(len(bench.data) // 10), *options]
        args, _ = ressl.parse_arguments(argv + ["--subset", str(bench.images)] * bool(bench.images))
        data, bank, test = common.load_splits(args, bench.device)
        ressl.fit_to_data(args, len(data))
        dtype, when, seconds, knn = None if usual else bench.dtype, {}, 0.0, 0.0
        args, model, optimizer = build(ressl, "conv4", data, args=args)
        epoch_work = usual_epoch(ressl, args, model, optimizer, data, dtype) if usual else None
        state = (model, optimizer, make_scaler(bench.device, dtype), torch.Generator())
        for epoch in range(1, args.epochs + 1):
            start = time.perf_counter()
            if usual:
                epoch_work((epoch - 1) * (len(data) // args.batch_size))
            else:
                ressl.train_epoch(epoch, *state, data, args, dtype)
            wait(bench.device)
            seconds += time.perf_counter() - start
            knn = common.knn_accuracy(model.student.encoder, bank, test, args.image_size, dtype)
            when |= {goal: (seconds, epoch) for goal in goals if knn >= goal and goal not in when}
            if len(when) == len(goals):
                break
        cells = [
            f"{goal} %: {when[goal][0]:,.0f} s, {when[goal][1]} epochs"
            if goal in when
            else f"{goal} %: no"
            for goal in goals
        ]
        row(
            f"training until kNN, {name}",
            *cells,
            f"{knn:.1f} % after {epoch} epochs, {seconds:,.0f} s",
        )


# By name: the function, and whether it is run for every encoder.
SECTIONS = dict(
    views=(views, False),
    training=(training, True),
    step=(step, True),
    precision=(precision, True),
    operations=(operations, False),
    knn=(knn, False),
    pictures=(pictures, False),
    rate=(rate_share, True),
    epochs=(epochs, True),
    busy=(busy, False),
    accuracy=(accuracy, False),
)
BY_HAND = ("epochs", "busy", "accuracy")


@common.command
def main(argv=None):
    parser = common.Parser(prog="tests/bench.py", description=__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help="sections to run")
    add("--data", default="textures", help="data set")
    add("--data-dir", default="data", help="where it is, or is downloaded to")
    add("--arch", nargs="+", choices=common.ARCHITECTURES, default=["conv4", "resnet18"])
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="our precision")
    add("--rounds", type=int, default=7, help="rounds of each race")
    add("--images", type=int, help="images an epoch")
    add("--knn-size", type=int, default=50_000, help="features in the kNN's bank")
    bench = parser.parse_args(argv)
    bench.device = common.pick_device(bench.device)
    bench.dtype = common.pick_precision(bench.amp, bench.device)
    bench.data_name = bench.data
    data = common.load_images(bench.data, bench.data_dir, "train")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    bench.data = data.take(order).to(bench.device)
    about = common.describe(bench.device, bench.dtype)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    side = data.images.shape[-1]
    print(f"{len(data):,} images of {side} px, batch {BATCH}, {bench.rounds} rounds\n")
    row("what", "ours", "against", "ratio: median (range)")
    row("---", "---", "---", "---")
    chosen = bench.only or [name for name in SECTIONS if name not in BY_HAND]
    if not bench.only and bench.device.type == "cuda":
        chosen.append("epochs")
    for name in chosen:
        section, each_encoder = SECTIONS[name]
        for arch in bench.arch if each_encoder else [None]:
            section(bench, arch) if each_encoder else section(bench)


if __name__ == "__main__":
    main()
