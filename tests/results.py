"""The README's results, from the logs in docs/results.

    python tests/results.py

writes the README's tables (what stands between <!-- NAME --> and <!-- end -->) and docs/curves.png.
Exit code 1, and the lines that differ, if the README had said something else than the logs; or if
its prose has a figure that no log proves. tests/test_results.py asks the same, and writes nothing.

A row is a pattern of folder names, one a seed, and the command that made them. The command is held
against the arguments in the logs: a row cannot claim another one. Without a folder it is "not run".
Folders in docs/results/modified ran code that was changed for the purpose, so no command is theirs.
"""

import difflib
import functools
import json
import math
import pathlib
import re
import shlex
import statistics
import sys
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import ceiling

import common
import residual_momentum
import ressl

ROOT = pathlib.Path(__file__).parent.parent
README, RESULTS, CURVES = ROOT / "README.md", ROOT / "docs/results", ROOT / "docs/curves.png"
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
    "--infonce-epochs 2 --teacher-temp 0.02": "infonce2-temp0.02",
    "--infonce-epochs 2 --teacher-temp 0.1": "infonce2-temp0.1",
    "--infonce-epochs 2 --predictor": "infonce2-predictor",
    "--infonce-epochs 2 --predictor --teacher-temp 0.1": "infonce2-predictor-temp0.1",
    "--predictor": "predictor",
    "--teacher-view strong": "strong",
    "--queue-size 1024": "queue1024",
    "--queue-size 16384": "queue16384",
    "--momentum 0.9": "momentum0.9",
    "--momentum 0.996": "momentum0.996",
    "--bn-splits 8": "bn8",
    "--lr 0.12": "lr0.12",
    "--batch-size 128": "batch128",
    "--batch-size 128 --lr 0.06": "batch128-lr0.06",
}
RESIDUAL = {  # base, term -> options, name of the runs
    ("MoCo v3", "none"): ("--residual-weight 0", "moco-without"),
    ("MoCo v3", "cosine"): ("", "moco-with"),
    ("MoCo v3", "kd"): ("--residual kd", "moco-kd"),
    ("BYOL", "none"): ("--base byol --residual-weight 0", "byol-without"),
    ("BYOL", "cosine"): ("--base byol", "byol-with"),
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
        return f"{about['hardware']}, {about['precision']}, torch {about['torch'].split('+')[0]}"


def read_run(folder):
    """A folder -> Run. Raises ValueError if the run is not complete."""
    first, *epochs = common.read_records(folder / "log.jsonl")
    arguments = first.pop("arguments")
    if not epochs or epochs[-1]["epoch"] != arguments["epochs"]:
        raise ValueError(f"{folder} is not a complete run")
    return Run(folder.name, arguments, first, epochs, common.read_records(folder / "evals.jsonl"))


def runs_of(pattern, command):
    """The runs of a row, by seed. Raises ValueError where one was not made by the command."""
    script, *argv = shlex.split(command)
    claimed = vars(SCRIPTS[script].parse_arguments(argv)[0])
    runs = [read_run(log.parent) for log in RESULTS.glob(f"{pattern}/log.jsonl")]
    for run in runs:
        args = {**claimed, **run.arguments}  # an old log lacks newer options: they had no effect
        wrong = [k for k, v in claimed.items() if k not in FREE and args[k] != v]
        if wrong or run.arguments["method"] != claimed["method"]:
            raise ValueError(f"{run.name} was not made by `{command}`: {wrong} differ")
    return sorted(runs, key=lambda run: run.arguments["seed"])


def of(pattern, key, epoch=-1):
    """The last records' `key` of all runs of a pattern, by name, for the claims below."""
    logs = sorted(RESULTS.glob(f"{pattern}/log.jsonl"))
    if not logs:
        raise ValueError(f"no runs {pattern}")
    return [read_run(log.parent).epochs[epoch][key] for log in logs]


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


def measured(runs, machines):
    """The columns of numbers; machines: a list of them, which grows."""
    if not runs:
        return ["", "not run", *[""] * 7]
    probes = [run.probe() for run in runs if run.probe()]
    heads = [spread([p[key] for p in probes]) for key in HEADS] if probes else []
    linear = f"{heads[0]} / {heads[1]}, {heads[2]}" if heads else "not run"
    if probes and probes[0]["epochs"] != 100:
        linear += f" ({probes[0]['epochs']} epochs)"
    for run in runs:
        if run.machine() not in machines:
            machines.append(run.machine())
    unique = lambda texts: ", ".join(sorted(set(texts)))
    return [
        ", ".join(str(run.arguments["seed"]) for run in runs),
        spread([run.last("student_knn") for run in runs]),
        spread([run.last("teacher_knn") for run in runs]) if has_teacher(runs) else "",
        spread([run.last("top1") for run in runs]) if not has_teacher(runs) else linear,
        common.duration(statistics.mean(run.epoch_seconds() for run in runs)),
        common.duration(statistics.mean(sum(e["seconds"] for e in run.epochs) for run in runs)),
        f"{max(run.last('peak_memory') for run in runs) / 1e9:.1f} GB",
        unique(chr(ord("A") + machines.index(run.machine())) for run in runs),
        unique(run.about["commit"] for run in runs),
    ]


HEADS = ("top1", "step30_top1", "step10_top1")  # of the linear probe: cosine, step, step
WHAT = ["method", "data", "encoder", "epochs", "options"]
MEASURED = ["seeds", "kNN student", "kNN teacher", "linear", "an epoch", "in all", "memory"]
MEASURED += ["on", "commit"]


def has_teacher(runs):
    return runs[0].last("teacher_knn") is not None


def results_table(rows, published=None):
    """Rows (pattern, command) -> the table, and what its machines are."""
    machines, lines = [], []
    for pattern, command in rows:
        line = [*what(command), *measured(runs_of(pattern, command), machines)]
        lines.append(line + ([published[command]] if published else []))
    header = [*WHAT, *MEASURED] + (["others have"] if published else [])
    names = [f"{chr(ord('A') + i)}: {machine}." for i, machine in enumerate(machines)]
    return table(header, lines) + ("\n\n" + " ".join(names) if names else "")


def resnet_rows():
    """No such run has been made yet; it will be found under these names."""
    for command in RESNET:
        args = SCRIPTS[command.split()[0]].parse_arguments(shlex.split(command)[1:])[0]
        without = "-without" if getattr(args, "residual_weight", 1) == 0 else ""
        yield f"{args.method}-{args.data}-resnet18{without}-seed?", command


def residual_table(name, command, terms=tuple(RESIDUAL)):
    """Residual Momentum with and without its term; `change` pairs the seeds."""
    lines, without = [], {}
    for base, term in terms:
        options, suffix = RESIDUAL[base, term]
        runs = runs_of(f"{name}-{suffix}-seed?", f"{command} {options}")
        line = [base, term, f"`{options}`" if options else ""]
        if not runs:
            lines.append([*line, "", "not run", "", "", ""])
            continue
        knn = {run.arguments["seed"]: run.last("student_knn") for run in runs}
        without[base] = knn if term == "none" else without.get(base, {})
        change = [knn[seed] - without[base][seed] for seed in knn if seed in without[base]]
        lines.append(
            [
                *line,
                ", ".join(map(str, knn)),
                spread([run.last("gap") for run in runs], 4),
                spread(list(knn.values())),
                spread([run.last("teacher_knn") for run in runs]),
                signed(spread(change)) if change and term != "none" else "",
            ]
        )
    header = ["base", "term", "options", "seeds", "final gap", "kNN student", "kNN teacher"]
    return table([*header, "student, by the term"], lines)


def signed(text):
    return text if text.startswith("-") else "+" + text


def ablation_table():
    """Ten epochs of CIFAR-10 with one change each, on held-out training images."""
    lines = []
    for options, name in ABLATIONS.items():
        runs = runs_of(f"ablation-{name}-seed?", f"{SHORT} {options}")
        line = [f"`{options}`" if options else "(none)", "", "not run", "", ""]
        if runs:
            line[1:] = [", ".join(str(run.arguments["seed"]) for run in runs)]
            for key, digits in (("student_knn", 1), ("teacher_knn", 1), ("loss", 2)):
                line.append(spread([run.last(key) for run in runs], digits))
        lines.append(line)
    return table(["options", "seeds", "kNN student", "kNN teacher", "final loss"], lines)


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
        "resnet18": results_table(resnet_rows(), RESNET),
        "conv4": results_table(SMALL),
        "residual_cifar100": residual_table(
            "rm-cifar100-conv4-20epochs",
            "residual_momentum.py --data cifar100 --arch conv4 --epochs 20 --knn-every 4",
        ),
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
    said.append(f"random weights have {spread(of('rm-textures-moco-with-seed?', *untrained))}:")
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


# -------------------------------------------------------------------------------------- curves

ORANGE, BLUE = (213, 94, 0), (0, 114, 178)  # told apart by colour-blind readers too
RM, RESSL = "rm-cifar10-conv4-5epochs-moco-{}-seed?", "ressl-cifar10-conv4-20epochs-bf16-seed?"
PANELS = {  # title -> {label: (colour, dashed, runs, key)}
    "Residual Momentum, CIFAR-10: kNN (%)": {
        "student, with the term": (BLUE, False, RM.format("with"), "student_knn"),
        "teacher, with the term": (BLUE, True, RM.format("with"), "teacher_knn"),
        "student, without": (ORANGE, False, RM.format("without"), "student_knn"),
        "teacher, without": (ORANGE, True, RM.format("without"), "teacher_knn"),
    },
    "Residual Momentum, CIFAR-10: gap": {
        "with the term": (BLUE, False, RM.format("with"), "gap"),
        "without": (ORANGE, False, RM.format("without"), "gap"),
    },
    "ReSSL, CIFAR-10: kNN (%)": {
        "student": (BLUE, False, RESSL, "student_knn"),
        "teacher": (BLUE, True, RESSL, "teacher_knn"),
    },
}
WIDTH, HEIGHT, EDGE = 800, 960, 90  # of a panel and its margin, in pixels; then halved


def curve(pattern, key):
    """The mean over seeds -> [[epoch, value], ...]."""
    runs = [read_run(log.parent) for log in sorted(RESULTS.glob(f"{pattern}/log.jsonl"))]
    found = [[run.epochs[i][key] for run in runs] for i in range(len(runs[0].epochs))]
    means = [statistics.mean(v) if None not in v else None for v in found]
    return [[epoch, round(mean, 4)] for epoch, mean in enumerate(means) if mean is not None]


def curves():
    """Title -> label -> points: what docs/curves.png shows, and carries as text."""
    return {
        title: {label: curve(*line[2:]) for label, line in lines.items()}
        for title, lines in PANELS.items()
    }


def draw_curves(path):
    data = curves()
    picture = Image.new("RGB", (WIDTH * len(data), HEIGHT), "white")
    for i, (title, lines) in enumerate(data.items()):
        panel = Image.new("RGB", (WIDTH, HEIGHT), "white")
        draw_panel(ImageDraw.Draw(panel), title, lines)
        picture.paste(panel, (WIDTH * i, 0))
    info = PngImagePlugin.PngInfo()
    info.add_text("curves", json.dumps(data))
    half = picture.resize((picture.width // 2, HEIGHT // 2), Image.Resampling.LANCZOS)
    half.save(path, pnginfo=info)


def ticks(low, high):
    """Three to seven round numbers around low and high, evenly spaced."""
    power = 10 ** math.floor(math.log10(high - low))
    step = next(s * power for s in (0.2, 0.5, 1, 2) if (high - low) / (s * power) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [step * i for i in range(first, last + 1)]


def draw_panel(draw, title, lines):
    """A pair of axes with their lines, and below what each is."""
    font, floor = ImageFont.load_default(22), HEIGHT - EDGE - 34 * 4
    dots = [dot for line in lines.values() for dot in line]
    xs = ticks(0, max(x for x, _ in dots))
    ys = ticks(min(y for _, y in dots), max(y for _, y in dots))
    share = lambda value, marks: (value - marks[0]) / (marks[-1] - marks[0])
    place = lambda x, y: (
        EDGE + share(x, xs) * (WIDTH - 1.5 * EDGE),
        floor - share(y, ys) * (floor - EDGE),
    )
    draw.text((EDGE, EDGE / 4), title, "black", ImageFont.load_default(28))
    for y in ys:
        draw.line([place(xs[0], y), place(xs[-1], y)], (215, 215, 215), 2)
        left, height = place(xs[0], y)
        draw.text((left - 10, height), f"{y:g}", "black", font, anchor="rm")
    for x in xs:
        left, height = place(x, ys[0])
        draw.text((left, height + 10), f"{x:g}", "black", font, anchor="ma")
    draw.text((WIDTH - EDGE / 2, floor + 40), "epoch", "black", font, anchor="ra")
    for i, (label, line) in enumerate(lines.items()):
        colour, dashed = PANELS[title][label][:2]
        draw_line(draw, [place(x, y) for x, y in line], colour, dashed)
        y = floor + 60 + 34 * i
        draw_line(draw, [(EDGE, y), (EDGE + 80, y)], colour, dashed)
        draw.text((EDGE + 100, y), label, "black", font, anchor="lm")


def draw_line(draw, dots, colour, dashed):
    """Through all dots; dashed: as short strokes of 12 pixels, 8 apart."""
    for (x0, y0), (x1, y1) in zip(dots, dots[1:], strict=False):
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        stroke, step = (12, 20) if dashed else (length, math.ceil(length))
        for start in range(0, math.ceil(length), step):
            ends = start / length, min(1, (start + stroke) / length)
            draw.line([(x0 + (x1 - x0) * s, y0 + (y1 - y0) * s) for s in ends], colour, 4)


def main():
    text = README.read_text()
    wrong = disagreements(text)
    README.write_text(rendered(text))
    draw_curves(CURVES)
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
