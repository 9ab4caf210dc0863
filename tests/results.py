"""The README's results, from the logs in docs/results.

    python tests/results.py

writes the README's tables, which stand between <!-- NAME --> and <!-- end -->. Exit code 1, and the
lines that differ, if the README had said something else than the logs, or if its prose has a figure
that no log proves. tests/test_results.py asks the same, and writes nothing.

A row is a pattern of folder names, one a seed, and the command that made them. The command is held
against the arguments in the logs: a row cannot claim another one. Without a folder it is "not run".
Folders in docs/results/modified ran code that was changed for the purpose, so no command is theirs.
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
README, RESULTS = ROOT / "README.md", ROOT / "docs/results"
SCRIPTS = {
    "ressl.py": ressl,
    "residual_momentum.py": residual_momentum,
    "tests/ceiling.py": ceiling,
}
METHODS = {"ressl": "ReSSL", "residual_momentum": "Residual Momentum", "ceiling": "with labels"}
IMAGES = {"textures": 5120, "cifar10": 50_000, "cifar100": 50_000}
FREE = ("method", "seed", "data_dir", "output", "device", "resume", "views")  # not in a command

# -------------------------------------------------------------------------------------- the rows

RESNET = {  # command -> what others have (linear, unless it says kNN)
    "ressl.py --data cifar10": "90.20 [recalled]; 89.97, kNN 88.89 [others]",
    "ressl.py --data cifar100": "63.79 [recalled]; 63.82, kNN 57.48 [others]",
    "residual_momentum.py --data cifar10": "",
    "residual_momentum.py --data cifar100": "+2.82 over the row below [authors]",
    "residual_momentum.py --data cifar100 --residual-weight 0": "",
}
RESIDUAL = {  # base, term -> options, name of the runs
    ("MoCo v3", "none"): ("--residual-weight 0", "moco-without"),
    ("MoCo v3", "cosine"): ("", "moco-with"),
    ("MoCo v3", "kd"): ("--residual kd", "moco-kd"),
    ("BYOL", "none"): ("--base byol --residual-weight 0", "byol-without"),
    ("BYOL", "cosine"): ("--base byol", "byol-with"),
}
CLAIM = "rm-cifar100-conv4-20epochs"
CLAIM_COMMAND = "residual_momentum.py --data cifar100 --arch conv4 --epochs 20 --knn-every 4"
LAPTOP = "ressl.py --data cifar10 --arch conv4 --epochs 20"
SMALL = [  # pattern, command
    ("ressl-cifar10-conv4-20epochs-bf16-seed?", LAPTOP),
    ("ressl-cifar10-conv4-20epochs-seed?", LAPTOP),
    ("ressl-cifar10-conv4-100epochs-seed?", "ressl.py --data cifar10 --arch conv4 --epochs 100"),
    ("ceiling-cifar10-conv4-20epochs-seed?", "tests/ceiling.py --data cifar10 --epochs 20"),
    ("ressl-cifar100-conv4-20epochs-seed?", "ressl.py --data cifar100 --arch conv4 --epochs 20"),
    (
        "ressl-cifar100-conv4-20epochs-temp0.03-seed?",
        "ressl.py --data cifar100 --arch conv4 --epochs 20 --teacher-temp 0.03",
    ),
    ("ceiling-cifar100-conv4-20epochs-seed?", "tests/ceiling.py --data cifar100 --epochs 20"),
    *(
        (f"{CLAIM}-{runs}-seed?", f"{CLAIM_COMMAND} {options}")
        for options, runs in RESIDUAL.values()
    ),
    ("ressl-textures-seed?", "ressl.py"),
    ("ressl-textures-float32-seed?", "ressl.py --amp off"),
]
SHORT = "ressl.py --data cifar10 --arch conv4 --epochs 10 --holdout 5000"
ABLATIONS = {  # options -> name of the runs
    "": "base",
    "--teacher-temp 0.02": "temp0.02",
    "--teacher-temp 0.07": "temp0.07",
    "--teacher-temp 0.1": "temp0.1",
    "--infonce-epochs 2": "infonce2",
    "--infonce-epochs 10": "infonce10",
    "--infonce-epochs 2 --teacher-temp 0.1": "infonce2-temp0.1",
    "--infonce-epochs 2 --predictor": "infonce2-predictor",
    "--infonce-epochs 2 --predictor --teacher-temp 0.1": "infonce2-predictor-temp0.1",
    "--teacher-view strong": "strong",
    "--queue-size 1024": "queue1024",
    "--queue-size 16384": "queue16384",
    "--momentum 0.9": "momentum0.9",
    "--momentum 0.996": "momentum0.996",
    "--bn-splits 8": "bn8",
    "--batch-size 128 --lr 0.06": "batch128-lr0.06",
}
TEMPERATURES = (0.02, 0.04, 0.07, 0.1)
EXTENDED = {  # version -> options, name of the runs
    "ReSSL": ("", "plain"),
    "warm-up alone": (" --infonce-epochs 3", "infonce"),
    "predictor and warm-up": (" --predictor --infonce-epochs 3", "extended"),
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

    def last(self, key):
        return self.epochs[-1][key]

    def probe(self):
        """The student's linear evaluation after the last epoch, the latest; None if not done."""
        last = self.arguments["epochs"]
        student = dict(evaluation="linear", branch="student", epoch=last)
        found = [e for e in self.evals if student.items() <= e.items()]
        return found[-1] if found else None

    def epoch_seconds(self):
        """The median epoch's training, without kNN and checkpoint."""
        args, batch = self.arguments, self.arguments["batch_size"]
        images = args["subset"] or IMAGES[args["data"]] - args["holdout"]
        speeds = [e["images_per_second"] for e in self.epochs if e["images_per_second"]]
        return images // batch * batch / statistics.median(speeds)

    def machine(self):
        about = self.about
        hardware = about["hardware"].replace(" 1 threads", " 1 thread")
        return f"{hardware}, {about['precision']}, torch {about['torch'].split('+')[0]}"


def read_run(folder):
    """A folder -> Run. Raises ValueError if the run is not complete."""
    first, *epochs = common.read_records(folder / "log.jsonl")
    arguments = first.pop("arguments")
    if not epochs or epochs[-1]["epoch"] != arguments["epochs"]:
        raise ValueError(f"{folder} is not a complete run")
    return Run(folder.name, arguments, first, epochs, common.read_records(folder / "evals.jsonl"))


def find(pattern):
    """The runs whose folders' names match, by name."""
    return [read_run(log.parent) for log in sorted(RESULTS.glob(f"{pattern}/log.jsonl"))]


def runs_of(pattern, command):
    """The runs of a row, by seed. Raises ValueError where one was not made by the command."""
    script, *argv = shlex.split(command)
    claimed = vars(SCRIPTS[script].parse_arguments(argv)[0])
    runs = find(pattern)
    for run in runs:
        args = {**claimed, **run.arguments}  # an old log lacks newer options: they had no effect
        wrong = [k for k, v in claimed.items() if k not in FREE and args[k] != v]
        if wrong or run.arguments["method"] != claimed["method"]:
            raise ValueError(f"{run.name} was not made by `{command}`: {wrong} differ")
    return sorted(runs, key=lambda run: run.arguments["seed"])


def of(pattern, key, epoch=-1):
    """The last records' `key` of all runs of a pattern, by name, for the claims below."""
    if not (runs := find(pattern)):
        raise ValueError(f"no runs {pattern}")
    return [run.epochs[epoch][key] for run in runs]


# ------------------------------------------------------------------------------------ the tables


def spread(values, digits=1):
    """[59.15] -> "59.2", [1, 2, 3] -> "2.0 ± 1.0": mean and standard deviation (of a sample)."""
    text = f"{round(statistics.mean(values), digits) + 0.0:.{digits}f}"  # + 0.0: no -0.0
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def what(command):
    """A command -> the columns that tell it: method, data, encoder, epochs, options."""
    script, *argv = shlex.split(command)
    args = SCRIPTS[script].parse_arguments(argv)[0]
    rest = re.sub(r"--(data|arch|epochs) \S+ ?", "", " ".join(argv)).strip()
    known = [METHODS[args.method], args.data, args.arch, str(args.epochs)]
    return [*known, f"`{rest}`" if rest else ""]


def mean(key, digits=1, epoch=-1):
    """A column: the spread over seeds of the last record's `key`; empty where that has none."""

    def column(runs):
        values = [run.epochs[epoch].get(key) for run in runs]
        return spread(values, digits) if None not in values else ""

    return column


def linear(runs):
    """A column: the probe's three heads; for the ceiling, the layer that was trained along."""
    if runs[0].arguments["method"] == "ceiling":
        return mean("top1")(runs)
    probes = [run.probe() for run in runs]
    if None in probes:
        return "not run"
    cosine, *step = (spread([p[head] for p in probes]) for head in HEADS)
    epochs = {p["epochs"] for p in probes}
    short = "" if epochs == {100} else f" ({epochs.pop()} epochs)"
    return f"{cosine} / {', '.join(step)}{short}"


def average_time(seconds):
    """A column: the seconds(run), averaged over the runs."""
    return lambda runs: common.duration(statistics.mean(seconds(run) for run in runs))


def letters(runs):
    """A column: the machines, by their letters in the block `machines`."""
    return ", ".join(sorted({chr(65 + machines().index(run.machine())) for run in runs}))


@functools.cache
def machines():
    return sorted({run.machine() for run in find("*")})


HEADS = ("top1", "step30_top1", "step10_top1")  # of the linear probe
COLUMNS = {
    "seeds": lambda runs: ", ".join(str(run.arguments["seed"]) for run in runs),
    "untrained": mean("student_knn", epoch=0),
    "kNN student": mean("student_knn"),
    "kNN teacher": mean("teacher_knn"),
    "linear": linear,
    "final loss": mean("loss", 2),
    "final gap": mean("gap", 4),
    "an epoch": average_time(Run.epoch_seconds),
    "in all": average_time(lambda run: sum(epoch["seconds"] for epoch in run.epochs)),
    "memory": lambda runs: f"{max(run.last('peak_memory') for run in runs) / 1e9:.1f} GB",
    "on": letters,
    "commit": lambda runs: ", ".join(sorted({run.about["commit"] for run in runs})),
}


def cells(runs, columns):
    """The runs of a row -> its cells."""
    if not runs:
        return ["not run" if name == "kNN student" else "" for name in columns]
    return [COLUMNS[name](runs) for name in columns]


def results_table(rows, published=None):
    """Rows (pattern, command) -> the table with everything."""
    columns, lines = [name for name in COLUMNS if not name.startswith("final")], []
    for pattern, command in rows:
        line = [*what(command), *cells(runs_of(pattern, command), columns)]
        lines.append(line + ([published[command]] if published else []))
    header = ["method", "data", "encoder", "epochs", "options", *columns]
    return table(header + (["others have"] if published else []), lines)


def resnet_rows():
    """No such run has been made yet; it will be found under these names."""
    for command in RESNET:
        args = SCRIPTS[command.split()[0]].parse_arguments(shlex.split(command)[1:])[0]
        without = "-without" if getattr(args, "residual_weight", 1) == 0 else ""
        yield f"{args.method}-{args.data}-resnet18{without}-seed?", command


def residual_table(name, command, terms=tuple(RESIDUAL)):
    """Residual Momentum by base and term; last, what the term changes, seed by seed."""
    columns = ["seeds", "final gap", "untrained", "kNN student", "kNN teacher", "on", "commit"]
    lines, knn = [], {}
    for base, term in terms:
        options, suffix = RESIDUAL[base, term]
        runs = runs_of(f"{name}-{suffix}-seed?", f"{command} {options}")
        line = [base, term, f"`{options}`" if options else "", *cells(runs, columns)]
        knn[term] = {run.arguments["seed"]: run.last("student_knn") for run in runs}
        change = [knn[term][seed] - knn["none"][seed] for seed in knn[term] if seed in knn["none"]]
        lines.append([*line, signed(spread(change)) if change and term != "none" else ""])
    return table(["base", "term", "options", *columns, "student, by the term"], lines)


def signed(text):
    return text if text.startswith("-") else "+" + text


def ablation_table():
    """Ten epochs of CIFAR-10 with one change each, on held-out training images."""
    columns = ["seeds", "kNN student", "kNN teacher", "final loss", "on", "commit"]
    lines = []
    for options, name in ABLATIONS.items():
        runs = runs_of(f"ablation-{name}-seed?", f"{SHORT} {options}")
        lines.append([f"`{options}`" if options else "(none)", *cells(runs, columns)])
    return table(["options", *columns], lines)


def extended_table():
    """The extended version on the textures, by teacher temperature: kNN and loss."""
    lines = []
    for temp in TEMPERATURES:
        lines.append([str(temp)])
        for options, name in EXTENDED.values():
            command = f"ressl.py --teacher-temp {temp} --knn-every 5{options}"
            runs = runs_of(f"ressl-textures-temp{temp}-seed?-{name}", command)
            knn, loss = ([run.last(key) for run in runs] for key in ("student_knn", "loss"))
            lines[-1].append(f"{spread(knn)} (loss {statistics.mean(loss):.2f})")
    return table(["tau_t", *EXTENDED], lines)


def console():
    """What a run prints, from its log."""
    run = read_run(RESULTS / "ressl-textures-seed0")
    args = ressl.parse_arguments([])[0]
    lines = [ressl.epoch_line(record, args) for record in run.epochs]
    return "\n".join(["```", *lines[:4], "...", lines[-1], "```"])


def speed():
    """The tables of docs/results/bench-cpu.md as one, but for the third, a repetition."""
    tables = re.findall(r"(?:^\|.*\n)+", (RESULTS / "bench-cpu.md").read_text(), re.M)
    more = [tables[i].splitlines(keepends=True)[2:] for i in (1, 3)]
    return tables[0] + "".join(line for lines in more for line in lines)


# ------------------------------------------------------------------------------------ the README


@functools.cache
def blocks():
    """Name -> text of every block of the README."""
    return {
        "machines": "  ".join(f"{chr(65 + i)}: {name}." for i, name in enumerate(machines())),
        "resnet18": results_table(resnet_rows(), RESNET),
        "conv4": results_table(SMALL),
        "residual_cifar100": residual_table(CLAIM, CLAIM_COMMAND),
        "residual_cifar10": residual_table(
            "rm-cifar10-conv4-5epochs",
            "residual_momentum.py --data cifar10 --arch conv4 --epochs 5 --knn-every 1",
            [row for row in RESIDUAL if row[1] != "kd"],
        ),
        "residual_textures": residual_table("rm-textures", "residual_momentum.py"),
        "ablations": ablation_table(),
        "extended": extended_table(),
        "console": console(),
        "speed": speed().rstrip(),
    }


@functools.cache
def claims():
    """The figures in the README's prose: each must be there, word for word but for line breaks."""
    said = []
    laptop = read_run(RESULTS / "ressl-cifar10-conv4-20epochs-bf16-seed0")
    minutes = sum(e["seconds"] for e in laptop.epochs) / 60
    start, end = (laptop.epochs[i]["student_knn"] for i in (0, -1))
    said.append(
        f"({minutes:.1f} minutes on two CPU cores with bf16: kNN {end:.1f} %, "
        f"linear {laptop.probe()['top1']:.1f} %, from {start:.1f} % with random weights)"
    )
    eight, one = (of(f"ressl-cifar10-conv4-5epochs-bn{n}-seed?", "student_knn") for n in (8, 1))
    both = "{:.2f} and {:.2f} %".format
    said.append(f"kNN {both(*eight)} with 8 groups, {both(*one)} without")
    temps, untrained = "ressl-textures-temp*-seed?-*", ("student_knn", 0)
    said.append(
        f"random weights have {spread(of('ressl-textures-temp0.04-seed?-plain', *untrained))};"
    )
    apart = zip(of(temps, "student_knn"), of(temps, "teacher_knn"), strict=True)
    said.append(f"at most {max(abs(a - b) for a, b in apart):.1f} points from the student's")
    alone = read_run(RESULTS / "ressl-textures-temp0.1-seed0-predictor")
    said.append(
        f"it ends at {alone.last('student_knn'):.1f} %, near the collapse "
        f"(loss {alone.last('loss'):.2f})"
    )
    plus, plain = (
        of(pattern, "student_knn")
        for pattern in ("modified/ressl-textures-plus-residual-seed?", "ressl-textures-seed?")
    )
    three = "{:.1f}, {:.1f} and {:.1f}".format
    said.append(
        f"gave {three(*plus)} % kNN (student; mean {statistics.mean(plus):.1f}) where ReSSL alone "
        f"has {three(*plain)} (mean {statistics.mean(plain):.1f})"
    )
    return said


FIGURE = r"(?<![\d.,])(?:\d\d\.\d+|\d[\d,.]* ?(?:%|points|min|minutes|s|seconds|ms|MiB)(?!\w))"
OTHERS = r"\[(?:recalled|others|code|authors)\]"  # a sentence with such a mark is not ours


def unproven(text):
    """The figures in the README outside blocks, code, claims and what is others' -> list."""
    skipped = r"<!-- \w+ -->.*?<!-- end -->|```.*?```|`[^`]*`|\(http\S*\)"
    text = re.sub(skipped, "", text, flags=re.S)
    text = " ".join(text.split())
    for claim in claims():
        text = text.replace(claim, "")
    sentences = re.split(r"(?<=[.:;|])\s", text)
    return [
        f"{figure} in: {sentence}"
        for sentence in sentences
        if not re.search(OTHERS, sentence)
        for figure in re.findall(FIGURE, sentence)
    ]


def rendered(text):
    """The README with every block as the logs have it. Raises ValueError if one is missing."""
    for name, block in blocks().items():
        begin = f"<!-- {name} -->\n"
        if text.count(begin) != 1:
            raise ValueError(f"the README needs one block <!-- {name} --> ... <!-- end -->")
        head, tail = text.split(begin)
        text = f"{head}{begin}{block}\n<!-- end -->{tail.split('<!-- end -->', 1)[1]}"
    return text


def disagreements(text):
    """What the README says and the logs do not -> list of lines."""
    both = (text.splitlines(), rendered(text).splitlines())
    lines = difflib.unified_diff(*both, "README", "logs", lineterm="", n=0)
    flat = " ".join(text.split())
    missing = [f"not in the README: {claim}" for claim in claims() if claim not in flat]
    return [*lines, *missing, *(f"no log proves {figure}" for figure in unproven(text))]


def main():
    text = README.read_text(encoding="utf-8")
    wrong = disagreements(text)
    README.write_text(rendered(text), encoding="utf-8")
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
