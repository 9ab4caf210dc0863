"""The pages' results, from the logs in docs/results.

    python docs/results.py

writes what stands in README.md and docs/*.md between <!-- NAME --> and <!-- end -->: tables, and
figures in sentences. Exit code 1, and the lines that differ, if they had said something else than
the logs. tests/test_results.py asks the same, and writes nothing.

A row is a pattern of folder names, one a seed, and the command that made them. The command is held
against the arguments in the logs: a row cannot claim another one. Without a folder it is "not run".
Each folder has its row, but for those in IN_NO_ROW. Folders are in groups, by page or table. A
pattern names no group, but for modified/ and exercises/, whose folders ran changed code, by that
command. What others measured (PAPER, GAIN) is
written here, by hand.
"""

import difflib
import functools
import pathlib
import re
import shlex
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import ceiling
import compare
from compare import spread, table

import common
import residual_momentum
import ressl

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "docs/results"
SCRIPTS = {"ressl.py": ressl, "residual_momentum.py": residual_momentum}
SCRIPTS["docs/ceiling.py"] = ceiling
METHODS = {"ressl": "ReSSL", "residual_momentum": "Residual Momentum", "ceiling": "with labels"}
# What a command leaves open
FREE = (
    "method",
    "seed",
    "data_dir",
    "output",
    "device",
    "contents",
    "resume",
    "views",
    "knn_every",
    "stem",
)
COUNTS = {"textures": 5120, "cifar10": 50_000, "cifar100": 50_000}  # training images
IN_NO_ROW = {"ressl-cifar10-resnet18-300images", "ressl-cifar10-conv4-5epochs-bf16-seed0"}
IN_NO_ROW |= {f"modified/encoder-{name}" for name in ("A", "B", "B16", "D", "D512", "Dw")}

# -------------------------------------------------------------------------------------- the rows

PAPER = "90.20", "89.97", "88.89"  # ReSSL, CIFAR-10: linear; a reproduction's linear and kNN
OTHERS = "{} [recalled]; {}, kNN {} [others]".format(*PAPER)
# MoCo, ResNet-18, CIFAR-10, batches of 128: best kNN and minutes, with a kNN after each epoch.
# github.com/lightly-ai/lightly, docs/source/getting_started/benchmarks.rst at 0243660
LIGHTLY = "lightly's MoCo, 200 epochs: kNN 83.8 % in 128.8 minutes, on another GPU [others]"
GAIN = "2.82"  # Residual Momentum, CIFAR-100, over MoCo v3
RM = "residual_momentum.py --data cifar100"
RESNET = [  # pattern, command, what others have: linear unless it says kNN
    ("ressl-cifar10-resnet18-seed*", "ressl.py --data cifar10", OTHERS),
    (
        "ressl-cifar100-resnet18-seed*",
        "ressl.py --data cifar100",
        "63.79 [recalled]; 63.82, kNN 57.48 [others]",
    ),
    ("rm-cifar10-resnet18-seed*", "residual_momentum.py --data cifar10", ""),
    ("rm-cifar100-resnet18-with-seed*", RM, f"+{GAIN}, recipe not known [authors]"),
    ("rm-cifar100-resnet18-without-seed*", f"{RM} --residual-weight 0", ""),
]
HALF = "ressl-cifar10-resnet18-100epochs-seed*", "ressl.py --data cifar10 --epochs 100", ""
SMALL_RUN = "ressl.py --data cifar10 --arch conv4 --epochs 20"
NOISY = "--batch-size 64 --lr 0.06"  # of MoCo v3 alone the best on held-out images (PREMISE)
LAPTOP = f"{SMALL_RUN} {NOISY} --infonce-epochs 2"  # chosen on held-out images (ABLATIONS)
HOUR = f"{SMALL_RUN} --infonce-epochs 48 {NOISY}".replace("20", "48")
CIFAR100 = SMALL_RUN.replace("cifar10", "cifar100")
CEILING = "docs/ceiling.py --data {} --epochs 20"
SMALL = {  # pattern -> command
    "ressl-cifar10-conv4-20epochs-bf16-seed*": SMALL_RUN,
    "ressl-cifar10-conv4-20epochs-seed*": SMALL_RUN,
    "ressl-cifar10-conv4-20epochs-laptop-seed*": LAPTOP,
    "ressl-cifar10-conv4-20epochs-laptop-plain-seed*": LAPTOP,  # by the code of December 2026
    "ressl-cifar10-conv4-20epochs-infonce-seed*": f"{SMALL_RUN} --infonce-epochs 20",
    "ressl-cifar10-conv4-48epochs-infonce-seed*": HOUR,
    "ressl-cifar10-conv4-100epochs-seed*": SMALL_RUN.replace("20", "100"),
    "ceiling-cifar10-conv4-20epochs-seed*": CEILING.format("cifar10"),
    "ressl-cifar100-conv4-20epochs-seed*": CIFAR100,
    "ressl-cifar100-conv4-20epochs-temp0.03-seed*": f"{CIFAR100} --teacher-temp 0.03",
    "ceiling-cifar100-conv4-20epochs-seed*": CEILING.format("cifar100"),
    "ressl-textures-seed*": "ressl.py",
    "ressl-textures-float32-seed*": "ressl.py --amp off",
    "ressl-textures-plain-seed*": "ressl.py",  # by the code of December 2026
}
RESIDUAL = {  # base, term -> options, name of the runs; a base without the term comes first
    ("MoCo v3", "none"): ("--residual-weight 0", "moco-without"),
    ("MoCo v3", "cosine"): ("", "moco-with"),
    ("MoCo v3", "kd"): ("--residual kd", "moco-kd"),
    ("BYOL", "none"): ("--base byol --residual-weight 0", "byol-without"),
    ("BYOL", "cosine"): ("--base byol", "byol-with"),
}
PROJECTORS = ("MoCo v3", "cosine, between projectors")  # modified code
CONTROLS = {("MoCo v3", "kd, weight 10"): ("--residual kd --residual-weight 10", "moco-kd10")}
CONTROLS |= {PROJECTORS: ("", "moco-projector")}
WHERE = {
    r: x for base in ("MoCo v3", "BYOL") for r, x in (RESIDUAL | CONTROLS).items() if base in r
}
RM_SMALL = f"{RM} --arch conv4 --epochs 20 --knn-every 4"
RESIDUAL_SETS = {  # name of the runs -> command
    "rm-cifar100-conv4-20epochs-b64": f"{RM_SMALL} {NOISY}",
    "rm-cifar100-conv4-20epochs": RM_SMALL,
    "rm-cifar10-conv4-5epochs": "residual_momentum.py --data cifar10 --arch conv4 --epochs 5",
    "rm-cifar10-conv4-20epochs-b64": f"{RM_SMALL} {NOISY}".replace("cifar100", "cifar10"),
    "rm-textures": "residual_momentum.py",
}
MOST, *_ = RESIDUAL_SETS  # the runs that decide about the term
HELD_OUT = f"{RM} --arch conv4 --epochs 12 --holdout 5000 --knn-every 2"
PREMISE = {  # label -> command of the base alone, name of the runs
    f"batch {b}, lr {lr}": (
        f"{HELD_OUT} --residual-weight 0 --batch-size {b} --lr {lr}",
        f"premise-b{b}-lr{lr}",
    )
    for b, lr in [(256, 0.06), (256, 0.12), (256, 0.24), (128, 0.03)]
    + [(64, 0.015), (64, 0.03), (64, 0.06), (64, 0.12), (32, 0.0075), (32, 0.03)]
}
# residual_momentum.teacher_momentum gave `start` at every step
CONSTANT = "modified/premise-b64-lr0.06-constant"
PREMISE["batch 64, lr 0.06, m constant"] = (f"{HELD_OUT} --residual-weight 0 {NOISY}", CONSTANT)
LAMBDAS = {  # lambda -> name of the runs
    "0": "premise-b64-lr0.06",
    "0.3": "term-lambda0.3",
    "1": "term-lambda1",
    "3": "term-lambda3",
}
SHORT = "ressl.py --data cifar10 --arch conv4 --epochs 10 --holdout 5000"
ABLATIONS = {  # options -> name of the runs
    "": "base",
    "--batch-size 64 --lr 0.03": "batch64-lr0.03",
    "--batch-size 64 --lr 0.06": "batch64-lr0.06",
    "--teacher-temp 0.02": "temp0.02",
    "--teacher-temp 0.07": "temp0.07",
    "--teacher-temp 0.1": "temp0.1",
    "--momentum 0.9": "momentum0.9",
    "--momentum 0.996": "momentum0.996",
    "--queue-size 1024": "queue1024",
    "--queue-size 16384": "queue16384",
    "--teacher-view strong": "strong",
    "--bn-splits 8": "bn8",
    "--infonce-epochs 1 --batch-size 64 --lr 0.06": "infonce1-batch64-lr0.06",
    "--infonce-epochs 2": "infonce2",
    "--infonce-epochs 2 --batch-size 64 --lr 0.03": "infonce2-batch64-lr0.03",
    "--infonce-epochs 2 --batch-size 64 --lr 0.06": "infonce2-batch64-lr0.06",
    "--infonce-epochs 2 --batch-size 32 --lr 0.03": "infonce2-batch32-lr0.03",
    "--infonce-epochs 2 --teacher-temp 0.1": "infonce2-temp0.1",
    "--infonce-epochs 2 --predictor": "infonce2-predictor",
    "--infonce-epochs 2 --predictor --teacher-temp 0.1": "infonce2-predictor-temp0.1",
    "--infonce-epochs 5": "infonce5",
    "--infonce-epochs 5 --batch-size 64 --lr 0.03": "infonce5-batch64-lr0.03",
    "--infonce-epochs 10": "infonce10",
    "--infonce-epochs 10 --batch-size 128 --lr 0.06": "infonce10-batch128-lr0.06",
    "--infonce-epochs 10 --batch-size 64 --lr 0.03": "infonce10-batch64-lr0.03",
    "--infonce-epochs 10 --batch-size 64 --lr 0.06": "infonce10-batch64-lr0.06",
    "--infonce-epochs 10 --batch-size 32 --lr 0.015": "infonce10-batch32-lr0.015",
    "--infonce-epochs 10 --lr 0.12": "infonce10-lr0.12",
    "--infonce-epochs 10 --student-temp 0.2": "infonce10-student-temp0.2",
    "--infonce-epochs 10 --teacher-view strong": "infonce10-strong",
}
PLUGGED = f"{CIFAR100} --knn-every 4 {NOISY}"  # ReSSL, with the term in modified code
TRIES = (
    "ressl.py --data cifar10 --arch conv4 --epochs 8 --knn-every 4 --holdout 5000 "
    f"--infonce-epochs 2 {NOISY}"
)
PREDICTORS = {  # form -> name of the runs; all but the first two are modified code
    "none": "none",
    "today's: Linear 128-2048, BatchNorm, ReLU, Linear 2048-128": "today",
    "its learning rate times 10": "lr10",
    "its learning rate constant": "constant-lr",
    "no weight decay on it": "no-weight-decay",
    "hidden 512": "hidden512",
    "no BatchNorm": "no-batchnorm",
    "one linear layer": "linear",
}
TEMPERATURES = (0.02, 0.04, 0.07, 0.1)
EXTENDED = {  # version -> options, name of the runs
    "ReSSL": ("", "plain"),
    "warm-up alone": ("--infonce-epochs 3", "infonce"),
    "predictor and warm-up": ("--predictor --infonce-epochs 3", "extended"),
}
COURSE_CIFAR = (
    "ressl.py --data cifar10 --arch conv4 --subset 10000 --holdout 5000 --epochs 20 "
    "--batch-size 64 --lr 0.03"
)
ORIGINAL = {"the original": ("ressl", "ressl.py")}
WITH_OR_WITHOUT = {
    "without the term": ("rm-without", "residual_momentum.py --residual-weight 0"),
    "the original": ("rm-with", "residual_momentum.py"),
}
RATES = (0.015, 0.06, 0.24)
COURSE = {  # exercise -> label -> name of the runs in docs/results/exercises, command
    "collapse": {
        f"tau_t {t}": ("ressl" if t == 0.04 else f"temp{t}", f"ressl.py --teacher-temp {t}")
        for t in (0.04, 0.02, 0.07, 0.1)
    },
    "teacher": {
        f"m = {m}": ("ressl" if m == 0.99 else f"m{m}", f"ressl.py --momentum {m}")
        for m in (0.99, 0, 1)
    },
    "cosine_momentum": {**ORIGINAL, "m rises": ("cosine_momentum", "ressl.py")},
    "own_pair": {**ORIGINAL, "with the own pair": ("own_pair", "ressl.py")},
    "solarize": {
        "the original": ("cifar", COURSE_CIFAR),
        "a strong view for the teacher": ("cifar-strong", f"{COURSE_CIFAR} --teacher-view strong"),
        "solarised": ("solarize", COURSE_CIFAR),
    },
    "nnclr": {
        "InfoNCE to the end": ("infonce", "ressl.py --infonce-epochs 15"),
        "the nearest as the positive": ("nnclr", "ressl.py --infonce-epochs 15"),
        "ReSSL": ("ressl", "ressl.py"),
    },
    "encoder_residual": {
        **WITH_OR_WITHOUT,
        "on features": ("encoder_residual", WITH_OR_WITHOUT["the original"][1]),
    },
    "relational_residual": {
        "--residual-weight 0": WITH_OR_WITHOUT["without the term"],
        "--residual cosine": WITH_OR_WITHOUT["the original"],
        "--residual relation": ("relational_residual", "residual_momentum.py"),
    },
    "symmetric": {
        **ORIGINAL,
        "symmetric": ("symmetric", "ressl.py"),
        "symmetric, in equal time": ("symmetric-short", "ressl.py --epochs 8"),
    },
}

# -------------------------------------------------------------------------------------- the logs

# The code of these was changed, and their commits say so: by an answer, by a patch beside them
CHANGED = tuple(f"exercises/{x.stem[5:]}" for x in ROOT.glob("tests/exercises/test_*.py"))
CHANGED += tuple(f"modified/{x.stem}-" for x in RESULTS.glob("modified/*.patch"))
SHOWN = set(IN_NO_ROW)  # the folders that a row or a sentence has asked for, or none has to


def parse(command):
    """A command -> its arguments, with all defaults."""
    script, *argv = shlex.split(command)
    args = SCRIPTS[script].parse_arguments(argv)[0]
    if script != "docs/ceiling.py":
        SCRIPTS[script].fit_to_data(args, COUNTS[args.data] - args.holdout)
    return vars(args)


def name_of(log):
    """A log -> its folder's name, with the group where it ran changed code."""
    group, name = log.parent.relative_to(RESULTS).parts
    return f"{group}/{name}" if group in ("modified", "exercises") else name


def find(pattern, command):
    """The runs of a row, by seed. Raises ValueError where one was not made by the command."""
    claimed, runs = parse(command), []
    logs = RESULTS.glob(f"{pattern}/log.jsonl" if "/" in pattern else f"*/{pattern}/log.jsonl")
    for log in logs:
        run, name = compare.read_run(log.parent), name_of(log)
        if "/" in name and "/" not in pattern:
            continue
        args, answer = run.arguments, name.startswith(CHANGED)
        free = (*FREE, "residual") if name.startswith("exercises/relational") else FREE
        wrong = [k for k, v in claimed.items() if k not in free and args.get(k) != v]
        wrong += ["seed"] * (f"-seed{args['seed']}-" not in f"{name}-")
        wrong += ["epochs"] * (not run.finished())
        wrong += ["method"] * (args["method"] != claimed["method"])
        dirty = any("dirty" in record["commit"] for record in [run.about, *run.evals])
        wrong += ["commit"] * (dirty != answer)
        if wrong:
            raise ValueError(f"{name} was not made by `{command}`: see {wrong}")
        SHOWN.add(name)
        runs.append(run)
    return sorted(runs, key=lambda run: run.arguments["seed"])


def residual_runs(name, base, term):
    options, suffix = WHERE[base, term]
    place = "modified/" if (base, term) == PROJECTORS else ""
    return find(f"{place}{name}-{suffix}-seed*", f"{RESIDUAL_SETS[name]} {options}")


def premise_runs(label):
    command, name = PREMISE[label]
    return find(f"{name}-seed*", command)


def lambda_runs(weight):
    return find(f"{LAMBDAS[weight]}-seed*", f"{HELD_OUT} {NOISY} --residual-weight {weight}")


def predictor_runs(form, temp):
    name = PREDICTORS[form]
    place, option = "modified/" * (name not in ("none", "today")), "--predictor" * (name != "none")
    command = f"{TRIES} --teacher-temp {temp} {option}"
    return find(f"{place}predictor-{name}-temp{temp}-seed*", command)


def plugged_runs(term):
    place = "modified/" * (term == "with")
    return find(f"{place}ressl-cifar100-conv4-20epochs-b64-{term}-seed*", PLUGGED)


def ablation_runs(options):
    return find(f"ablation-{ABLATIONS[options]}-seed*", f"{SHORT} {options}")


def extended_runs(temp, version):
    options, name = EXTENDED[version]
    return find(
        f"ressl-textures-temp{temp}-seed*-{name}", f"ressl.py --teacher-temp {temp} {options}"
    )


# ------------------------------------------------------------------------------------ the tables


def at_end(key, digits=1, epoch=None):
    """A column: the runs' `key` at an epoch, by default the last; empty where they have none."""
    return lambda runs: spread([run.at(key, epoch) for run in runs], digits)


def linear(runs, best=False):
    """A column: the probe's three heads, or the best; for the ceiling, the layer trained along."""
    if runs[0].arguments["method"] == "ceiling":
        return at_end("top1")(runs)
    probes = [probe for run in runs if (probe := compare.linear(run, schedule="cosine", lr=1.0))]
    if not probes:
        return "not run"
    values = [[probe[head] for probe in probes] for head in HEADS]
    told = " / ".join(map(spread, [max(values, key=statistics.mean)] if best else values))
    (epochs,) = {probe["epochs"] for probe in probes}
    notes = [] if best else [f"{epochs} epochs"]
    if len(probes) < len(runs):
        notes += ["seeds " + ", ".join(str(probe["seed"]) for probe in probes)]
    return told + f" ({'; '.join(notes)})" * bool(notes)


def machine(run):
    """What a run was on; all but GPUs' with torch 2.14.1 on a processor of one kind."""
    about = {**run.about, "torch": run.about["torch"].split("+")[0]}
    text = "{hardware}, {precision}, torch {torch}".format(**about)
    text = text.removeprefix("AMD EPYC, ").removesuffix(", torch 2.14.1")
    return text.replace("1 threads", "1 thread").replace("bfloat16", "bf16")


def minutes(runs):
    return f"{statistics.mean(sum(e['seconds'] for e in run.epochs) for run in runs) / 60:.1f}"


HEADS = ("top1", "step30_top1", "step10_top1")  # of a probe's record
COLUMNS = {
    "seeds": lambda runs: ", ".join(str(run.arguments["seed"]) for run in runs),
    "final loss": at_end("loss", 2),
    "final entropy": at_end("entropy", 2),
    "final gap": at_end("gap", 4),
    "untrained": at_end("student_knn", epoch=0),
    "kNN student": at_end("student_knn"),
    "kNN teacher": at_end("teacher_knn"),
    "linear": linear,
    "linear, best head": functools.partial(linear, best=True),
    "minutes": minutes,
    "on": lambda runs: "; ".join(sorted({machine(run) for run in runs})),
}
BRIEF = ("seeds", "kNN student", "kNN teacher", "on")


def rows_table(first, rows, columns, last=()):
    """first: names of the first cells; rows: (first cells, runs, last cells)."""
    lines = []
    for cells, runs, *more in rows:
        none = ["not run" if name == "kNN student" else "" for name in columns]
        lines.append([*cells, *([COLUMNS[n](runs) for n in columns] if runs else none), *more])
    return table([*first, *columns, *last], lines)


def code(text):
    return f"`{text}`" if text else ""


def results_table(rows):
    """Rows (pattern, command), and perhaps what others have."""
    names = ("seeds", "final loss", "untrained", "kNN student", "kNN teacher", "linear", "minutes")
    lines = []
    for pattern, command, *others in rows:
        args, words = parse(command), " ".join(shlex.split(command)[1:])
        options = code(re.sub(r"--(data|arch|epochs) \S+ ?", "", words).strip())
        first = METHODS[args["method"]], args["data"], args["arch"], str(args["epochs"]), options
        lines.append((first, find(pattern, command), *others))
    first = ("method", "data", "encoder", "epochs", "options")
    return rows_table(first, lines, (*names, "on"), ["others have"] * (len(rows[0]) > 2))


def changes(runs, base):
    """By how much the student's kNN is higher at the end, seed by seed."""
    knn = {run.arguments["seed"]: run.at("student_knn") for run in base}
    pairs = [(run.at("student_knn"), knn.get(run.arguments["seed"])) for run in runs]
    return [y - x for y, x in pairs if x is not None]


def change(runs, base):
    """A cell: the change in the student's kNN, and in how many of several seeds it is higher."""
    found = changes(runs, base)
    up = f" ({sum(x > 0 for x in found)} of {len(found)})" * (len(found) > 1)
    return re.sub(r"^(?=\d)", "+", spread(found)) + up


def interval(values):
    """Where the mean lies, by Student's t with 95 % confidence, of five values."""
    assert len(values) == 5
    mean, half = statistics.mean(values), 2.776 * statistics.stdev(values) / 5**0.5
    return f"{mean - half:+.1f} to {mean + half:+.1f}"


def residual_table(name, terms=tuple(RESIDUAL)):
    """Residual Momentum by base and term; last, what the term changes, seed by seed."""
    lines, found = [], []
    for base, term in terms:
        runs, alone = (residual_runs(name, base, t) for t in (term, "none"))
        first = base, term, code(WHERE[base, term][0])
        lines.append((first, runs, change(runs, alone) if term != "none" else ""))
        found += runs
    columns = ("seeds", "final gap", "kNN student", "kNN teacher", "linear, best head")
    made = rows_table(("base", "term", "options"), lines, columns, ["change (higher in)"])
    seeds = {run.arguments["seed"]: run for run in found}  # each once: with its first weights
    untrained = at_end("student_knn", epoch=0)([*seeds.values()])
    told = f"Untrained: {untrained}. {minutes(found)} minutes a run, on {COLUMNS['on'](found)}."
    return f"`python {RESIDUAL_SETS[name]} OPTIONS --seed SEED`:\n\n{made}\n{told}"


def ablation_table():
    """Ten epochs of CIFAR-10 with one change each, on held-out training images."""
    rows = [((code(options) or "(none)",), ablation_runs(options)) for options in ABLATIONS]
    made = rows_table(("options",), rows, ("final loss", *BRIEF))
    return f"`python {SHORT} OPTIONS --seed SEED`:\n\n{made}"


def leads(run):
    """By epoch, the teacher's kNN minus the student's, where they were evaluated after training."""
    return {e: lead for e in range(1, run.last() + 1) if (lead := run.at("lead", e)) is not None}


def premise_table():
    """The base alone by batch and learning rate; the teacher's largest lead over the student."""
    rows = []
    for label in PREMISE:
        runs = premise_runs(label)
        epoch, lead = max(leads(runs[0]).items(), key=lambda item: item[1])
        ahead = " ".join(str(epoch) for epoch, lead in leads(runs[0]).items() if lead > 0)
        rows.append(((label,), runs, f"{lead:+.1f} (epoch {epoch})", ahead or "none"))
    last = ("teacher's largest lead", "epochs with the teacher ahead")
    made = rows_table(("batch, learning rate",), rows, ("final gap", *BRIEF), last)
    options = "--residual-weight 0 --batch-size B --lr LR --seed 0"
    return f"`python {HELD_OUT} {options}`:\n\n{made}"


def lambda_table():
    """The term by its weight, on held-out images."""
    made = rows_table(("lambda",), [((w,), lambda_runs(w)) for w in LAMBDAS], ("final gap", *BRIEF))
    return f"`python {HELD_OUT} {NOISY} --residual-weight LAMBDA --seed SEED`:\n\n{made}"


def predictor_table(temps=(0.04, 0.1)):
    """Forms of the predictor, by teacher temperature: kNN of student and teacher, and loss."""
    knn = lambda runs: " / ".join(at_end(f"{name}_knn")(runs) for name in ("student", "teacher"))
    cell = lambda runs: f"{knn(runs)} (loss {at_end('loss', 2)(runs)})" if runs else "not run"
    runs = {(form, t): predictor_runs(form, t) for form in PREDICTORS for t in temps}
    lines = [[form, *(cell(runs[form, t]) for t in temps)] for form in PREDICTORS]
    made = table(["predictor", *(f"tau_t {temp}" for temp in temps)], lines)
    on = COLUMNS["on"]([run for found in runs.values() for run in found])
    return f"`python {TRIES} --teacher-temp T --predictor`, seed 0, on {on}:\n\n{made}"


def residual_predictor_table(temps=(0.01, 0.02)):
    """A residual predictor against none: kNN of student and teacher, and entropy of p_t."""
    lines, every = [], []
    forms = {
        "none": ("predictor-none-float32", ""),
        "residual: q = z + h(z), h without BatchNorm": (
            "modified/predictor-residual-no-batchnorm",
            "--predictor",
        ),
    }
    for form, (name, option) in forms.items():
        cells = [form]
        for temp in temps:
            runs = find(f"{name}-temp{temp}-seed0", f"{TRIES} --teacher-temp {temp} {option}")
            knn = " / ".join(at_end(f"{who}_knn")(runs) for who in ("student", "teacher"))
            cells.append(f"{knn} (entropy {at_end('entropy', 1)(runs)})")
            every += runs
        lines.append(cells)
    made = table(["predictor", *(f"tau_t {temp}" for temp in temps)], lines)
    on = COLUMNS["on"](every)
    return f"`python {TRIES} --teacher-temp T --predictor`, seed 0, on {on}:\n\n{made}"


def plugged_table():
    """ReSSL without the term, and with it by two lines of its code."""
    alone, term = (plugged_runs(name) for name in ("without", "with"))
    rows = [(("ReSSL",), alone, ""), (("ReSSL, with the term",), term, change(term, alone))]
    columns = ("seeds", "kNN student", "kNN teacher", "minutes", "on")
    made = rows_table(("run",), rows, columns, ["change (higher in)"])
    return f"`python {PLUGGED} --seed SEED`:\n\n{made}"


def extended_table():
    """The extended version on the textures, by teacher temperature: kNN and loss."""
    runs = {(t, v): extended_runs(t, v) for t in TEMPERATURES for v in EXTENDED}
    loss = lambda runs: statistics.mean(run.at("loss") for run in runs)
    cell = lambda runs: f"{at_end('student_knn')(runs)} (loss {loss(runs):.2f})"
    made = table(
        ["tau_t", *EXTENDED],
        [[str(t), *(cell(runs[t, v]) for v in EXTENDED)] for t in TEMPERATURES],
    )
    apart = max(abs(run.at("lead")) for found in runs.values() for run in found)
    (untrained,) = {at_end("student_knn", epoch=0)(found) for found in runs.values()}
    (where,) = {COLUMNS["on"](found) for found in runs.values()}
    (seeds,) = {COLUMNS["seeds"](found) for found in runs.values()}
    told = f"Untrained: {untrained}. The teacher's kNN is at most {apart:.1f} points from the"
    return f"{made}\n{told} student's. Seeds {seeds}; on {where}."


def course_table(exercise):
    """What an exercise's runs came to; the first row is what the others are compared with."""
    runs = {label: find(f"exercises/{n}-seed*", c) for label, (n, c) in COURSE[exercise].items()}
    middle = "final gap" if "residual" in exercise else "final entropy"
    columns = ("seeds", "final loss", middle, "untrained", "kNN student", "kNN teacher", "minutes")
    base, *others = runs.items()
    rows = [((base[0],), base[1], "")]
    rows += [((label,), found, change(found, base[1])) for label, found in others]
    return rows_table(("run",), rows, columns, ["change in student's kNN"])


def course_premise():
    """The teacher's lead by batch and learning rate, after epochs 3, 6, 9 and the last."""
    lines = []
    for b in (16, 64, 256):
        line = [f"B {b}"]
        for lr in RATES:
            options = f"--residual-weight 0 --holdout 1000 --batch-size {b} --lr {lr}"
            runs = find(f"exercises/premise-b{b}-lr{lr}-seed0", f"residual_momentum.py {options}")
            told = [f"{lead:+.1f}" for run in runs for lead in leads(run).values()]
            line.append(
                f"{', '.join(told)} (kNN {at_end('student_knn')(runs)})" if runs else "not run"
            )
        lines.append(line)
    return table(["after epochs 3, 6, 9, 10", *(f"LR {lr}" for lr in RATES)], lines)


def console():
    """What a run prints, from its log."""
    run = find("ressl-textures-plain-seed0", "ressl.py")[0]
    lines = [common.epoch_line(record, run.arguments["epochs"]) for record in run.epochs]
    return "\n".join(["```", *lines[:3], "...", lines[-1], "```"])


def choose_table():
    """The front page's: a machine, a command, and what it gives."""
    rows = {
        "built-in textures, two CPU cores": ("ressl-textures-seed*", "ressl.py"),
        "a laptop, CIFAR-10": ("ressl-cifar10-conv4-20epochs-laptop-seed*", LAPTOP),
        "an hour on a laptop (InfoNCE)": ("ressl-cifar10-conv4-48epochs-infonce-seed0", HOUR),
    }
    found = {what: find(*row) for what, row in rows.items()}
    lines = [
        [what, code(f"python {row[1]}"), minutes(runs), f"{at_end('student_knn')(runs)} %", ""]
        for (what, row), runs in zip(rows.items(), found.values(), strict=True)
    ]
    others = "{} % linear [recalled]; {} %, kNN {} % [others]".format(*PAPER)
    gpu = {
        " (H200), half the paper's epochs": (HALF, LIGHTLY),
        ", the paper's recipe": (RESNET[0], others),
    }
    for what, ((pattern, command, _), beside) in gpu.items():
        runs = find(pattern, command)
        cells = [minutes(runs), f"{at_end('student_knn')(runs)} %"] if runs else ["", "not run yet"]
        lines.append([f"a GPU{what}", code(f"python {command}"), *cells, beside])
    _, laptop, hour = (machine(runs[0]) for runs in found.values())
    (one,) = find(*HALF[:2])
    where = f"On an AMD EPYC: {laptop} (the hour: {hour}). The GPU: {machine(one)}, one seed; no"
    where += " other card is measured."
    return table(["you have", "command", "minutes", "kNN", "others have"], lines) + f"\n{where}"


def front_table():
    """The front page's results: a row each for what its sentences say."""
    small = lambda pattern: find(pattern, SMALL[pattern])
    moco = [residual_runs(MOST, "MoCo v3", term) for term in ("none", "cosine")]
    rows = [("CIFAR-10", "ReSSL", small("ressl-cifar10-conv4-20epochs-seed*"))]
    laptop = small("ressl-cifar10-conv4-20epochs-laptop-seed*")
    rows += [("CIFAR-10", "ReSSL, a laptop's recipe", laptop)]
    rows += [("CIFAR-10", "with labels", small("ceiling-cifar10-conv4-20epochs-seed*"))]
    rows += [("CIFAR-100", "ReSSL", small("ressl-cifar100-conv4-20epochs-seed*"))]
    rows += [("CIFAR-100", "with labels", small("ceiling-cifar100-conv4-20epochs-seed*"))]
    rows += [("CIFAR-100", "MoCo v3", moco[0]), ("CIFAR-100", "MoCo v3 with the term", moco[1])]
    rows += [("CIFAR-10", "ReSSL, ResNet-18, 100 epochs", find(*HALF[:2]))]
    cells = [COLUMNS[name] for name in ("seeds", "untrained", "kNN student")]
    lines = [
        [data, method, *(cell(runs) for cell in cells), linear(runs, best=True)]
        for data, method, runs in rows
    ]
    return table(["data", "method", "seeds", "kNN untrained", "kNN (%)", "linear (%)"], lines)


def goal():
    """Seconds of training until 50 % kNN, as the benchmark had them."""
    text = (RESULTS / "speed/bench-cpu.md").read_text(encoding="utf-8")
    usual, here, laptop = re.findall(r"until kNN, .* 50 %: (\d+) s", text)
    told = f"kNN is at 50 % after {laptop} s of the laptop's recipe, {here} s of the paper's"
    return f"{told} settings, and {usual} s of these in the usual pipeline of PIL workers"


def on_gpu():
    """Sentences: a run of half the paper's epochs on a GPU; and a profile of some steps."""
    (run,) = find(*HALF[:2])
    rates = [epoch["images_per_second"] for epoch in run.epochs if epoch["epoch"] > 1]
    step = lambda rate: f"{1000 * run.arguments['batch_size'] / rate:.1f}"
    middle, memory = statistics.median(rates), max(e["peak_memory"] for e in run.epochs) / 2**30
    told = f"100 epochs in {minutes([run])} minutes with their kNN, at {step(max(rates))} to"
    told += f" {step(min(rates))} ms a step (median {step(middle)}: {middle:,.0f} images/s), in"
    told += f" {memory:.1f} GiB. In a profile of 20 steps on the textures"
    text = (RESULTS / "gpu/profile-gpu.md").read_text(encoding="utf-8")
    parts = []
    for method, name in list(METHODS.items())[:2]:
        whole = re.findall(rf"(?m)^{method} (\S+) ms a step", text)
        total = re.search(rf"(?s){method} device busy.*?Self CUDA time total: (\S+)ms", text)[1]
        parts.append(f"a step of {name} took {min(whole)} to {max(whole)} ms")
        parts[-1] += f" and kept the GPU busy for {float(total) / 20:.1f}"
    return f"{told} {'; '.join(parts)}"


def figures():
    """Name -> text within a sentence."""
    first = lambda pattern: find(pattern.replace("*", "0"), SMALL[pattern])[0]
    each = lambda runs: ", ".join(f"{run.at('student_knn'):.1f}" for run in runs)
    mean = lambda runs: f"{statistics.mean(run.at('student_knn') for run in runs):.1f}"
    relation = first("ressl-cifar10-conv4-20epochs-seed*")
    infonce = first("ressl-cifar10-conv4-20epochs-infonce-seed*")
    hour = first("ressl-cifar10-conv4-48epochs-infonce-seed*")
    short = SMALL_RUN.replace("20", "5")
    split, whole = (
        find(f"ressl-cifar10-conv4-5epochs-bn{n}-seed*", f"{short} --bn-splits {n}") for n in (8, 1)
    )
    alone_01 = find(
        "ressl-textures-temp0.1-seed0-predictor", "ressl.py --teacher-temp 0.1 --predictor"
    )
    term, without = (residual_runs(MOST, "MoCo v3", name) for name in ("cosine", "none"))
    points = lambda place, base="MoCo v3": re.sub(
        r"\((.*)\)",
        r"points (higher in \1 seeds)",
        change(*(residual_runs(place, base, name) for name in ("cosine", "none"))),
    )
    plus = find("modified/ressl-textures-plus-residual-seed*", "ressl.py")
    plain = find("ressl-textures-seed*", "ressl.py")
    return {
        "multicrop": "69.9 -> 74.7 %",
        "gain": f"+{GAIN} points on CIFAR-100",
        "goal": goal(),
        "gpu": on_gpu(),
        "lightly": LIGHTLY,
        "infonce": f"{each([infonce])} % where ReSSL has {each([relation])} %",
        "hour": f"{each([hour])} % in {minutes([hour])} minutes on {machine(hour)}",
        "splits": f"kNN {each(split)} % with 8 groups, {each(whole)} % without (seeds 0, 1; "
        f"`python {short}`)",
        "noisy": points(MOST),
        "noisy_byol": points(MOST, "BYOL"),
        "noisy_cifar10": points("rm-cifar10-conv4-20epochs-b64"),
        "large": points("rm-cifar100-conv4-20epochs"),
        "each": " ".join(f"{x:+.2f}" for x in changes(term, without)),
        "interval": interval(changes(term, without)),
        "predictor": f"{each(alone_01)} %, with a loss of {alone_01[0].at('loss'):.2f}",
        "plus": f"{each(plus)} % kNN (student; mean {mean(plus)}) where ReSSL alone has "
        f"{each(plain)} (mean {mean(plain)})",
    }


# ------------------------------------------------------------------------------------- the pages


@functools.cache
def blocks():
    """Name -> text of every block of the pages."""
    without_kd = [row for row in RESIDUAL if row[1] != "kd"]
    tables = {
        "resnet18": results_table([RESNET[0], HALF, *RESNET[1:]]),
        "conv4": results_table([*SMALL.items()]),
        "residual_cifar100": residual_table("rm-cifar100-conv4-20epochs"),
        "residual_cifar10": residual_table("rm-cifar10-conv4-5epochs", without_kd),
        "residual_cifar10_noisy": residual_table("rm-cifar10-conv4-20epochs-b64", [*RESIDUAL][:2]),
        "residual_textures": residual_table("rm-textures"),
        "ablations": ablation_table(),
        "premise": premise_table(),
        "lambda": lambda_table(),
        "predictors": predictor_table(),
        "residual_predictors": residual_predictor_table(),
        "residual_noisy": residual_table(MOST, WHERE),
        "plugged": plugged_table(),
        "extended": extended_table(),
        "console": console(),
        "choose": choose_table(),
        "front": front_table(),
        "speed": "\n".join(
            file.read_text(encoding="utf-8").split("\n\n", 1)[1]
            for file in sorted(RESULTS.glob("*/bench-?pu.md"))
        ),
    }
    tables |= {exercise: course_table(exercise) for exercise in COURSE}
    tables["premise_textures"] = course_premise()
    return {**figures(), **{name: f"\n{text.rstrip()}\n" for name, text in tables.items()}}


BLOCK = re.compile(r"<!-- (\w+) -->(.*?)<!-- end -->", re.S)


def read_pages(root=ROOT):
    """Path -> text, of the front page and those behind it."""
    files = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    return {file: file.read_text(encoding="utf-8") for file in files}


def unproven(text):
    """What looks like a measured accuracy or ratio outside of blocks and code -> list."""
    text = re.sub(r"```.*?```|`[^`]*`|[*_]{2}", "", BLOCK.sub("", text), flags=re.S)
    return re.findall(r"\S* ?\d+\.\d+ ?(?:%|percent|points|x\b|times)", " ".join(text.split()))


def rendered(pages):
    """The pages with every block as the logs have it. Raises ValueError if one is missing."""
    proven, marks = blocks(), "".join(pages.values()).count("<!--")
    names = [name for text in pages.values() for name, _ in BLOCK.findall(text)]
    if set(names) != set(proven) or marks != 2 * len(names):
        different = set(names) ^ set(proven)
        raise ValueError(f"each block needs <!-- NAME --> and <!-- end -->; {different}")
    fill = lambda m: f"<!-- {m[1]} -->{proven[m[1]]}<!-- end -->"
    return {path: BLOCK.sub(fill, text) for path, text in pages.items()}


def disagreements(pages):
    """What the pages say and the logs do not -> list of lines."""
    lines = []
    for path, text in rendered(pages).items():
        both = (pages[path].splitlines(), text.splitlines())
        lines += difflib.unified_diff(*both, path.name, "logs", lineterm="", n=0)
        lines += [f"{path.name}: no log proves: {figure}" for figure in unproven(pages[path])]
    logs = {name_of(log) for log in RESULTS.rglob("log.jsonl")}
    return lines + [f"no row has {name}" for name in sorted(logs - SHOWN)]


def main(root=ROOT):
    pages = read_pages(root)
    wrong = disagreements(pages)
    for path, text in rendered(pages).items():
        path.write_text(text, encoding="utf-8")
    for line in wrong:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
