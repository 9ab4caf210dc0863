"""The pages' results, from the logs in docs/results.

    python tests/results.py

writes what stands in README.md and docs/*.md between <!-- NAME --> and <!-- end -->: tables, and
figures in sentences. Exit code 1, and the lines that differ, if they had said something else than
the logs, or if a figure stands outside. tests/test_results.py asks the same, and writes nothing.

A row is a pattern of folder names, one a seed, and the command that made them. The command is held
against the arguments in the logs: a row cannot claim another one. Without a folder it is "not run".
Each folder has its row, but for those in IN_NO_ROW. Folders in docs/results/modified ran changed
code, by that command. What others measured (PAPER, GAIN, ...) is written here, by hand.
"""

import difflib
import functools
import pathlib
import re
import shlex
import statistics
import sys
from dataclasses import dataclass

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import ceiling

import common
import residual_momentum
import ressl

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "docs/results"
SCRIPTS = {
    "ressl.py": ressl,
    "residual_momentum.py": residual_momentum,
    "tests/ceiling.py": ceiling,
}
METHODS = {"ressl": "ReSSL", "residual_momentum": "Residual Momentum", "ceiling": "with labels"}
IMAGES = {"textures": 5120, "cifar10": 50_000, "cifar100": 50_000}
FREE = (
    "method",
    "seed",
    "data_dir",
    "output",
    "device",
    "resume",
    "views",
    "given",
)  # not in a command
# What a run did before there were these options, which its log lacks
BEFORE = dict(image_size=32, bn_splits=1, crops=1, predictor=False, infonce_epochs=0)
IN_NO_ROW = (  # see docs/results/README.md
    "ressl-cifar10-resnet18-300images",
    "ressl-cifar10-conv4-5epochs-bf16-seed0",
    *(f"modified/encoder-{name}" for name in ("A", "B", "B16", "D", "D512", "Dw")),
)

# -------------------------------------------------------------------------------------- the rows

# (pattern, command); and what others have, linear unless it says kNN
PAPER = "90.20", "89.97", "88.89"  # ReSSL, CIFAR-10: linear; a reproduction's linear and kNN
GAIN = "2.82"  # Residual Momentum, CIFAR-100, over MoCo v3
RM_CIFAR100 = "residual_momentum.py --data cifar100"
RM_SMALL = f"{RM_CIFAR100} --arch conv4 --epochs 20 --knn-every 4"
RESNET = [
    (
        "ressl-cifar10-resnet18-seed*",
        "ressl.py --data cifar10",
        "{} [recalled]; {}, kNN {} [others]".format(*PAPER),
    ),
    (
        "ressl-cifar100-resnet18-seed*",
        "ressl.py --data cifar100",
        "63.79 [recalled]; 63.82, kNN 57.48 [others]",
    ),
    ("rm-cifar10-resnet18-seed*", "residual_momentum.py --data cifar10", ""),
    ("rm-cifar100-resnet18-with-seed*", RM_CIFAR100, f"+{GAIN}, recipe not known [authors]"),
    ("rm-cifar100-resnet18-without-seed*", f"{RM_CIFAR100} --residual-weight 0", ""),
]
LAPTOP = "ressl.py --data cifar10 --arch conv4 --epochs 20"
INFONCE = f"{LAPTOP} --infonce-epochs 20"
HOUR = (
    "ressl.py --data cifar10 --arch conv4 --epochs 48 --infonce-epochs 48 --batch-size 64 --lr 0.06"
)
CIFAR100 = "ressl.py --data cifar100 --arch conv4 --epochs 20"
SMALL = [
    ("ressl-cifar10-conv4-20epochs-bf16-seed*", LAPTOP),
    ("ressl-cifar10-conv4-20epochs-seed*", LAPTOP),
    ("ressl-cifar10-conv4-20epochs-infonce-seed*", INFONCE),
    ("ressl-cifar10-conv4-48epochs-infonce-seed*", HOUR),
    ("ressl-cifar10-conv4-100epochs-seed*", "ressl.py --data cifar10 --arch conv4 --epochs 100"),
    ("ceiling-cifar10-conv4-20epochs-seed*", "tests/ceiling.py --data cifar10 --epochs 20"),
    ("ressl-cifar100-conv4-20epochs-seed*", CIFAR100),
    ("ressl-cifar100-conv4-20epochs-temp0.03-seed*", f"{CIFAR100} --teacher-temp 0.03"),
    ("ceiling-cifar100-conv4-20epochs-seed*", "tests/ceiling.py --data cifar100 --epochs 20"),
    ("ressl-textures-seed*", "ressl.py"),
    ("ressl-textures-float32-seed*", "ressl.py --amp off"),
]
RESIDUAL = {  # base, term -> options, name of the runs; a base without the term comes first
    ("MoCo v3", "none"): ("--residual-weight 0", "moco-without"),
    ("MoCo v3", "cosine"): ("", "moco-with"),
    ("MoCo v3", "kd"): ("--residual kd", "moco-kd"),
    ("BYOL", "none"): ("--base byol --residual-weight 0", "byol-without"),
    ("BYOL", "cosine"): ("--base byol", "byol-with"),
}
NOISY = "--batch-size 64 --lr 0.06"  # where the base alone has its highest kNN on held-out images
LAMBDAS = {  # lambda -> options, name of the runs
    "0": ("--residual-weight 0", "premise-b64-lr0.06"),
    "0.3": ("--residual-weight 0.3", "term-lambda0.3"),
    "1": ("", "term-lambda1"),
    "3": ("--residual-weight 3", "term-lambda3"),
}
RESIDUAL_SETS = {  # name of the runs -> command
    "rm-cifar100-conv4-20epochs-b64": f"{RM_SMALL} {NOISY}",
    "rm-cifar100-conv4-20epochs": RM_SMALL,
    "rm-cifar10-conv4-5epochs": "residual_momentum.py --data cifar10 --arch conv4 --epochs 5 "
    "--knn-every 1",
    "rm-textures": "residual_momentum.py",
}
SHORT = "ressl.py --data cifar10 --arch conv4 --epochs 10 --holdout 5000"
ABLATIONS = {  # options -> name of the runs
    "": "base",
    "--batch-size 64 --lr 0.03": "batch64-lr0.03",
    "--teacher-temp 0.02": "temp0.02",
    "--teacher-temp 0.07": "temp0.07",
    "--teacher-temp 0.1": "temp0.1",
    "--infonce-epochs 2": "infonce2",
    "--infonce-epochs 10": "infonce10",
    "--infonce-epochs 2 --teacher-temp 0.1": "infonce2-temp0.1",
    "--infonce-epochs 2 --predictor": "infonce2-predictor",
    "--infonce-epochs 2 --predictor --teacher-temp 0.1": "infonce2-predictor-temp0.1",
    "--infonce-epochs 5": "infonce5",
    "--infonce-epochs 5 --batch-size 64 --lr 0.03": "infonce5-batch64-lr0.03",
    "--infonce-epochs 10 --teacher-view strong": "infonce10-strong",
    "--infonce-epochs 10 --queue-size 16384": "infonce10-queue16384",
    "--infonce-epochs 10 --batch-size 128 --lr 0.06": "infonce10-batch128-lr0.06",
    "--infonce-epochs 10 --batch-size 64 --lr 0.03": "infonce10-batch64-lr0.03",
    "--infonce-epochs 10 --batch-size 64 --lr 0.06": "infonce10-batch64-lr0.06",
    "--infonce-epochs 10 --batch-size 32 --lr 0.015": "infonce10-batch32-lr0.015",
    "--infonce-epochs 10 --lr 0.12": "infonce10-lr0.12",
    "--infonce-epochs 10 --student-temp 0.2": "infonce10-student-temp0.2",
    "--teacher-view strong": "strong",
    "--queue-size 1024": "queue1024",
    "--queue-size 16384": "queue16384",
    "--momentum 0.9": "momentum0.9",
    "--momentum 0.996": "momentum0.996",
    "--bn-splits 8": "bn8",
}
PREMISE_BASE = (  # the base alone, on held-out images: where is the teacher ahead?
    "residual_momentum.py --data cifar100 --arch conv4 --epochs 12 --holdout 5000 --knn-every 2 "
    "--residual-weight 0"
)
PREMISE = {  # label -> options, name of the runs
    "batch 256, lr 0.06": ("", "b256-lr0.06"),
    "batch 256, lr 0.12": ("--lr 0.12", "b256-lr0.12"),
    "batch 256, lr 0.24": ("--lr 0.24", "b256-lr0.24"),
    "batch 64, lr 0.015": ("--batch-size 64 --lr 0.015", "b64-lr0.015"),
    "batch 64, lr 0.03": ("--batch-size 64 --lr 0.03", "b64-lr0.03"),
    "batch 64, lr 0.06": ("--batch-size 64 --lr 0.06", "b64-lr0.06"),
    "batch 64, lr 0.12": ("--batch-size 64 --lr 0.12", "b64-lr0.12"),
    "batch 32, lr 0.03": ("--batch-size 32 --lr 0.03", "b32-lr0.03"),
}
TEMPERATURES = (0.02, 0.04, 0.07, 0.1)
EXTENDED = {  # version -> options, name of the runs
    "ReSSL": ("", "plain"),
    "warm-up alone": ("--infonce-epochs 3", "infonce"),
    "predictor and warm-up": ("--predictor --infonce-epochs 3", "extended"),
}

# -------------------------------------------------------------------------------------- the logs


@dataclass
class Run:
    """A folder of docs/results."""

    name: str
    arguments: dict
    about: dict  # versions, hardware, precision, commit
    epochs: list  # a record each
    evals: list

    def at(self, key, epoch=None):
        """The record's `key` at an epoch, by default the last; None where there is none."""
        epoch = self.arguments["epochs"] if epoch is None else epoch
        return next((r.get(key) for r in self.epochs if r["epoch"] == epoch), None)

    def probe(self):
        """The student's linear evaluation, on the run's own images; None if not done."""
        names = ("method", "data", "arch", "subset", "holdout", "image_size", "seed")
        same = {name: {**BEFORE, **self.arguments}[name] for name in names}
        same |= dict(evaluation="linear", branch="student", epoch=self.arguments["epochs"])
        same |= dict(schedule="cosine", lr=1.0)
        evals = [{**BEFORE, **e} for e in self.evals if "dirty" not in e["commit"]]
        found = [e for e in evals if all(e.get(k) == v for k, v in same.items())]
        return found[-1] if found else None

    def epoch_seconds(self):
        """The median epoch's training, without kNN and checkpoint."""
        args, batch = self.arguments, self.arguments["batch_size"]
        images = args["subset"] or IMAGES[args["data"]] - args["holdout"]
        speeds = [e["images_per_second"] for e in self.epochs if e.get("images_per_second")]
        return images // batch * batch / statistics.median(speeds)

    def machine(self):
        about = self.about
        hardware = about["hardware"].replace(" 1 threads", " 1 thread")
        return f"{hardware}, {about['precision']}, torch {about['torch'].split('+')[0]}"


def read_run(folder):
    """A folder -> Run. Raises ValueError if epochs are missing."""
    first, *epochs = common.read_records(folder / "log.jsonl")
    arguments = first.pop("arguments")
    if [e["epoch"] for e in epochs] != list(range(arguments["epochs"] + 1)):
        raise ValueError(f"{folder} is not a complete run")
    return Run(folder.name, arguments, first, epochs, common.read_records(folder / "evals.jsonl"))


def parse(command):
    """A command -> its arguments, with all defaults."""
    script, *argv = shlex.split(command)
    return vars(SCRIPTS[script].parse_arguments(argv)[0])


SHOWN = set(IN_NO_ROW)  # the folders that a row or a sentence has asked for, or none has to


def find(pattern, command):
    """The runs of a row, by seed. Raises ValueError where one was not made by the command."""
    claimed = parse(command)
    folders = [log.parent for log in RESULTS.glob(f"{pattern}/log.jsonl")]
    SHOWN.update(folder.relative_to(RESULTS).as_posix() for folder in folders)
    runs = [read_run(folder) for folder in folders]
    for run in runs:
        args = {**BEFORE, **run.arguments}
        wrong = [k for k, v in claimed.items() if k not in FREE and args.get(k) != v]
        wrong += ["seed"] * (f"-seed{args['seed']}-" not in f"{run.name}-")
        wrong += ["commit"] * ("dirty" in run.about["commit"])
        if wrong or args["method"] != claimed["method"]:
            raise ValueError(f"{run.name} was not made by `{command}`: see {wrong}")
    return sorted(runs, key=lambda run: run.arguments["seed"])


# ------------------------------------------------------------------------------------ the tables


def spread(values, digits=1):
    """[59.25] -> "59.2", [1, 2, 3] -> "2.0 ± 1.0": mean and standard deviation (of a sample)."""
    text = f"{round(statistics.mean(values), digits) + 0.0:.{digits}f}"  # + 0.0: no -0.0
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def each(values, digits=1):
    """[1, 2, 3] -> "1.0, 2.0, 3.0"."""
    return ", ".join(f"{value:.{digits}f}" for value in values)


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def code(text):
    return f"`{text}`" if text else ""


def at_end(key, digits=1, epoch=None):
    """A column: the runs' `key` at an epoch, by default the last; empty where they have none."""

    def column(runs):
        values = [run.at(key, epoch) for run in runs]
        return spread(values, digits) if None not in values else ""

    return column


def linear(runs):
    """A column: the probe's three heads; for the ceiling, the layer that was trained along."""
    if runs[0].arguments["method"] == "ceiling":
        return at_end("top1")(runs)
    probes = [probe for run in runs if (probe := run.probe())]
    if not probes:
        return "not run"
    heads = (spread([probe[head] for probe in probes]) for head in HEADS)
    (epochs,) = {probe["epochs"] for probe in probes}
    some = "; seeds " + ", ".join(str(probe["seed"]) for probe in probes)
    return f"{' / '.join(heads)} ({epochs} epochs{some * (len(probes) < len(runs))})"


def average_time(seconds):
    """A column: the seconds(run), averaged over the runs."""
    return lambda runs: duration(statistics.mean(seconds(run) for run in runs))


def duration(seconds):
    """12.3 -> "12 s", 750 -> "12.5 min", 9000 -> "2.5 h"."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds > 1.6 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def letters(runs):
    """A column: the machines, by their letters in the block `machines`."""
    return ", ".join(sorted({chr(65 + machines().index(run.machine())) for run in runs}))


@functools.cache
def machines():
    found = {read_run(log.parent).machine() for log in RESULTS.glob("*/log.jsonl")}
    return sorted(found, key=lambda name: (name not in FIRST, name))


FIRST = [  # the machines that have their letters: later ones come after them
    f"AMD EPYC, {kind}, torch 2.14.1"
    for kind in ("1 thread, float32", "2 threads, bfloat16", "2 threads, float32")
]
HEADS = ("top1", "step30_top1", "step10_top1")  # of the linear probe
COLUMNS = {
    "seeds": lambda runs: ", ".join(str(run.arguments["seed"]) for run in runs),
    "final loss": at_end("loss", 2),
    "final gap": at_end("gap", 4),
    "untrained": at_end("student_knn", epoch=0),
    "kNN student": at_end("student_knn"),
    "kNN teacher": at_end("teacher_knn"),
    "linear": linear,
    "an epoch": average_time(Run.epoch_seconds),
    "in all": average_time(lambda run: sum(epoch["seconds"] for epoch in run.epochs)),
    "memory": lambda runs: f"{max(run.at('peak_memory') for run in runs) / 1e9:.1f} GB",
    "on": letters,
    "commit": lambda runs: ", ".join(sorted({run.about["commit"] for run in runs})),
}


def cells(runs, without=()):
    """The runs of a row -> its cells in COLUMNS."""
    columns = {name: column for name, column in COLUMNS.items() if name not in without}
    if not runs:
        return ["not run" if name == "kNN student" else "" for name in columns]
    return [column(runs) for column in columns.values()]


def header(*first, without=()):
    return [*first, *(name for name in COLUMNS if name not in without)]


def results_table(rows):
    """Rows (pattern, command), and perhaps what others have."""
    lines = []
    for pattern, command, *others in rows:
        args, words = parse(command), shlex.split(command)[1:]
        options = re.sub(r"--(data|arch|epochs) \S+ ?", "", " ".join(words)).strip()
        line = [METHODS[args["method"]], args["data"], args["arch"], str(args["epochs"])]
        lines.append(
            [*line, code(options), *cells(find(pattern, command), ("final gap",)), *others]
        )
    names = header("method", "data", "encoder", "epochs", "options", without=("final gap",))
    return table(names + ["others have"] * len(others), lines)


def residual_runs(name, base, term):
    options, suffix = RESIDUAL[base, term]
    return find(f"{name}-{suffix}-seed*", f"{RESIDUAL_SETS[name]} {options}")


def residual_table(name, terms=tuple(RESIDUAL)):
    """Residual Momentum by base and term; last, what the term changes, seed by seed."""
    lines, knn = [], {}
    for base, term in terms:
        options, runs = RESIDUAL[base, term][0], residual_runs(name, base, term)
        knn[base, term] = {run.arguments["seed"]: run.at("student_knn") for run in runs}
        pairs = [(y, knn[base, "none"].get(seed)) for seed, y in knn[base, term].items()]
        change = [y - x for y, x in pairs if x is not None]
        signed = re.sub(r"^(?!-)", "+", spread(change)) if change and term != "none" else ""
        lines.append([base, term, code(options), *cells(runs), signed])
    names = header("base", "term", "options") + ["change in student's kNN"]
    return f"`python {RESIDUAL_SETS[name]} OPTIONS --seed SEED`:\n\n{table(names, lines)}"


def ablation_table():
    """Ten epochs of CIFAR-10 with one change each, on held-out training images."""
    less = ("final gap", "untrained", "linear", "an epoch", "in all", "memory")
    lines = []
    for options, name in ABLATIONS.items():
        runs = find(f"ablation-{name}-seed*", f"{SHORT} {options}")
        lines.append([code(options) or "(none)", *cells(runs, less)])
    names = header("options", without=less)
    return f"`python {SHORT} OPTIONS --seed SEED`:\n\n{table(names, lines)}"


def premise_runs(label):
    options, name = PREMISE[label]
    return find(f"premise-{name}-seed*", f"{PREMISE_BASE} {options}")


def leads(run):
    """By epoch, the teacher's kNN minus the student's, where they were evaluated after training."""
    return {
        e["epoch"]: e["teacher_knn"] - e["student_knn"]
        for e in run.epochs[1:]
        if e.get("student_knn") is not None
    }


def premise_table():
    """The base alone by batch and learning rate; the teacher's largest lead over the student."""
    less = ("final loss", "untrained", "linear", "an epoch", "in all", "memory")
    lines = []
    for label in PREMISE:
        (run,) = runs = premise_runs(label)
        epoch, lead = max(leads(run).items(), key=lambda item: item[1])
        ahead = " ".join(str(epoch) for epoch, lead in leads(run).items() if lead > 0)
        lines.append([label, *cells(runs, less), f"{lead:+.1f} (epoch {epoch})", ahead or "none"])
    names = header("batch, learning rate", without=less)
    more = ["teacher's largest lead", "epochs with the teacher ahead"]
    return f"`python {PREMISE_BASE} OPTIONS --seed 0`:\n\n{table([*names, *more], lines)}"


def lambda_runs(weight):
    options, name = LAMBDAS[weight]
    command = PREMISE_BASE.replace(" --residual-weight 0", "")
    return find(f"{name}-seed*", f"{command} {NOISY} {options}")


def lambda_table():
    """The term by its weight, on held-out images."""
    less = ("final loss", "untrained", "linear", "an epoch", "in all", "memory")
    lines = [[weight, *cells(lambda_runs(weight), less)] for weight in LAMBDAS]
    command = PREMISE_BASE.replace("--residual-weight 0", f"{NOISY} --residual-weight LAMBDA")
    return f"`python {command} --seed SEED`:\n\n{table(['lambda', *header(without=less)], lines)}"


def extended_runs(temp, version):
    options, name = EXTENDED[version]
    command = f"ressl.py --teacher-temp {temp} --knn-every 5 {options}"
    return find(f"ressl-textures-temp{temp}-seed*-{name}", command)


def extended_table():
    """The extended version on the textures, by teacher temperature: kNN and loss."""
    runs = {(t, v): extended_runs(t, v) for t in TEMPERATURES for v in EXTENDED}
    cell = lambda runs: f"{at_end('student_knn')(runs)} (loss {each([mean_loss(runs)], 2)})"
    mean_loss = lambda runs: statistics.mean(run.at("loss") for run in runs)
    lines = [[str(t), *(cell(runs[t, v]) for v in EXTENDED)] for t in TEMPERATURES]
    every = [run for found in runs.values() for run in found]
    seeds = " ".join(map(str, sorted({run.arguments["seed"] for run in every})))
    loops = [f"for t in {' '.join(map(str, TEMPERATURES))}; do for seed in {seeds}; do"]
    for options, _ in EXTENDED.values():
        line = f"    python ressl.py --teacher-temp $t --seed $seed --knn-every 5 {options}"
        loops.append(line.rstrip())
    apart = max(abs(run.at("student_knn") - run.at("teacher_knn")) for run in every)
    (untrained,) = {at_end("student_knn", epoch=0)(found) for found in runs.values()}
    return "\n".join(
        [
            table(["tau_t", *EXTENDED], lines),
            f"Untrained: {untrained}. The teacher's kNN is at most {apart:.1f} points from the "
            f"student's. On {letters(every)}, commits {COLUMNS['commit'](every)}. The columns:\n",
            *["```bash", *loops, "done; done", "```"],
        ]
    )


def console():
    """What a run prints, from its log."""
    run = find("ressl-textures-console-seed0", "ressl.py")[0]
    args = ressl.parse_arguments([])[0]
    note = ressl.chance(1, args)
    known = [{k: v for k, v in record.items() if v is not None} for record in run.epochs]
    lines = [common.epoch_line(record, args.epochs, note) for record in known]
    return "\n".join(["```", *lines[:3], "...", lines[-1], "```"])


def speed():
    """docs/results/bench-cpu.md, without its title."""
    return (RESULTS / "bench-cpu.md").read_text(encoding="utf-8").split("\n\n", 1)[1]


# ------------------------------------------------------------------------------------- the pages


def choose_table():
    """The front page's: a machine, a command, and what it gives."""
    (laptop,) = find("ressl-cifar10-conv4-20epochs-bf16-seed0", LAPTOP)
    (hour,) = find("ressl-cifar10-conv4-48epochs-infonce-seed0", HOUR)
    textures = find("ressl-textures-seed*", "ressl.py")
    rows = [("built-in textures, two CPU cores", "ressl.py", textures)]
    rows += [
        ("a laptop, CIFAR-10", LAPTOP, [laptop]),
        ("an hour on a laptop (InfoNCE)", HOUR, [hour]),
    ]
    lines = [
        [
            what,
            code(f"python {command}"),
            COLUMNS["in all"](runs),
            f"{at_end('student_knn')(runs)} %",
        ]
        for what, command, runs in rows
    ]
    others = "{} % linear [recalled]; {} %, kNN {} % [others]".format(*PAPER)
    gpu = [
        "a GPU, the paper's recipe",
        code("python ressl.py --data cifar10"),
        "",
        "not run here yet",
    ]
    lines = [[*line, ""] for line in lines] + [[*gpu, others]]
    machine = lambda run: run.machine().split(", torch")[0]
    where = f"Run on: {machine(laptop)} (the hour: {machine(hour)})."
    return table(["you have", "command", "time", "kNN", "others have"], lines) + f"\n{where}"


def front_table():
    """The front page's results: a row each for what its sentences say."""
    moco = "rm-cifar100-conv4-20epochs"
    rows = {
        ("CIFAR-10", "ReSSL"): find("ressl-cifar10-conv4-20epochs-seed*", LAPTOP),
        ("CIFAR-10", "with labels"): find("ceiling-cifar10-conv4-20epochs-seed*", SMALL[5][1]),
        ("CIFAR-100", "ReSSL"): find("ressl-cifar100-conv4-20epochs-seed*", CIFAR100),
        ("CIFAR-100", "with labels"): find("ceiling-cifar100-conv4-20epochs-seed*", SMALL[8][1]),
        ("CIFAR-100", "MoCo v3"): residual_runs(moco, "MoCo v3", "none"),
        ("CIFAR-100", "MoCo v3 with the term"): residual_runs(moco, "MoCo v3", "cosine"),
    }
    untrained = at_end("student_knn", epoch=0)
    best = lambda runs: linear(runs).split(" / ")[0]
    lines = [
        [*row, COLUMNS["seeds"](runs), untrained(runs), at_end("student_knn")(runs), best(runs)]
        for row, runs in rows.items()
    ]
    return table(["data", "method", "seeds", "kNN untrained", "kNN (%)", "linear (%)"], lines)


def figures():
    """Name -> text within a sentence."""
    (relation,) = find("ressl-cifar10-conv4-20epochs-seed0", LAPTOP)
    (infonce,) = find("ressl-cifar10-conv4-20epochs-infonce-seed0", INFONCE)
    (hour,) = find("ressl-cifar10-conv4-48epochs-infonce-seed0", HOUR)
    short = "ressl.py --data cifar10 --arch conv4 --epochs 5 --knn-every 5"
    split, whole = (
        find(f"ressl-cifar10-conv4-5epochs-bn{n}-seed*", f"{short} --bn-splits {n}") for n in (8, 1)
    )
    (alone,) = find(
        "ressl-textures-temp0.1-seed0-predictor",
        "ressl.py --teacher-temp 0.1 --knn-every 5 --predictor",
    )
    plus = find("modified/ressl-textures-plus-residual-seed*", "ressl.py")
    plain = find("ressl-textures-seed*", "ressl.py")
    knn = lambda runs: [run.at("student_knn") for run in runs]
    return {
        "multicrop": "69.9 -> 74.7 %",
        "gain": f"+{GAIN} points on CIFAR-100",
        "infonce": f"{infonce.at('student_knn'):.1f} % where ReSSL has "
        f"{relation.at('student_knn'):.1f} %",
        "hour": f"{hour.at('student_knn'):.1f} % in {COLUMNS['in all']([hour])} on "
        f"{hour.machine()}",
        "splits": f"kNN {each(knn(split))} % with 8 groups, {each(knn(whole))} % without "
        f"(seeds {COLUMNS['seeds'](whole)}; `python {short}`)",
        "predictor": f"{alone.at('student_knn'):.1f} %, with a loss of {alone.at('loss'):.2f}",
        "plus": f"{each(knn(plus))} % kNN (student; mean {statistics.mean(knn(plus)):.1f}) where "
        f"ReSSL alone has {each(knn(plain))} (mean {statistics.mean(knn(plain)):.1f})",
    }


@functools.cache
def blocks():
    """Name -> text of every block of the pages."""
    tables = {
        "machines": "  \n".join(f"{chr(65 + i)}: {name}" for i, name in enumerate(machines())),
        "resnet18": results_table(RESNET),
        "conv4": results_table(SMALL),
        "residual_cifar100": residual_table("rm-cifar100-conv4-20epochs"),
        "residual_cifar10": residual_table(
            "rm-cifar10-conv4-5epochs", [row for row in RESIDUAL if row[1] != "kd"]
        ),
        "residual_textures": residual_table("rm-textures"),
        "ablations": ablation_table(),
        "premise": premise_table(),
        "lambda": lambda_table(),
        "residual_noisy": residual_table("rm-cifar100-conv4-20epochs-b64"),
        "extended": extended_table(),
        "console": console(),
        "choose": choose_table(),
        "front": front_table(),
        "speed": speed(),
    }
    return {**figures(), **{name: f"\n{text.rstrip()}\n" for name, text in tables.items()}}


BLOCK = re.compile(r"<!-- (\w+) -->(.*?)<!-- end -->", re.S)
UNITS = r"%|percent|points?|s|seconds|min|minutes|h|hours|ms|[MG]i?B|images/s|times"
FIGURE = rf"(?<![\w.])(?:\d*\.\d+|\d[\d,.]*(?:x|-?fold|[ -]?(?:{UNITS}))(?!\w))"
NOT_MEASURED = (  # sizes, settings and goals
    "Python 3.10 or newer",
    "from about 48 to about 90 %",  # tests/test_results.py holds it to the runs
    "macOS's own is 3.9",
    "0.4 M parameters",
    "2048 / 0.99",
    "4096 / 0.99",
    "16384 / 0.996",
    "(2.6 GB for STL-10, 0.25 for Tiny ImageNet)",
    "2.9 GB for STL-10",
    "momentum is 0.1",
    "(ln 2048 = 7.62, ln 4096 = 8.32)",
    "at 0.02",
    "at 0.04",
    "and 0.07",
    "at 0.1",
    "student's 0.1",
    "+0.7 on ImageNet [authors]",
    "2.8 times the pixels",
    "1.10 in float32 and 1.15 in bf16",
    "(batch 64, learning rate 0.06)",
    "(0.4914, 0.4822, 0.4465) and std (0.2023, 0.1994, 0.2010)",
    "(0.5071, 0.4867, 0.4408) and (0.2675, 0.2565, 0.2761)",
    "(.2023 .1994 .2010)",
    ".2470 .2435 .2616",
)


def read_pages(root=ROOT):
    """Path -> text, of the front page and those behind it."""
    files = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    return {file: file.read_text(encoding="utf-8") for file in files}


def unproven(text):
    """The figures of a page outside blocks and commands -> list."""
    text = BLOCK.sub("", text)
    fences = r"```(?:bash|python).*?```"
    text = re.sub(fences, lambda m: " ".join(re.findall("#.*", m[0])), text, flags=re.S)
    text = re.sub(r"\(http\S*\)|\d{4}\.\d{5}|[*_]{2}", "", text)
    text = " ".join(text.split())
    for known in NOT_MEASURED:
        text = re.sub(re.escape(known) + r"(?!\d)", "", text)
    return [text[max(0, m.start() - 30) : m.end() + 10] for m in re.finditer(FIGURE, text)]


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
        figures = unproven(pages[path]) if path.name != "exercises.md" else []  # budgets, settings
        lines += [f"{path.name}: no log proves: {figure}" for figure in figures]
    logs = {log.parent.relative_to(RESULTS).as_posix() for log in RESULTS.rglob("log.jsonl")}
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
