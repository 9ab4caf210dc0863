"""Your runs side by side: a table on the screen, and a picture of their curves.

    python docs/compare.py runs/ressl-cifar10 runs/ressl-cifar10-2
    python docs/compare.py runs/* --plot curves.png --csv table.csv

A row is a run, or the runs that differ in nothing but the seed: then mean ± standard deviation (of
a sample). Accuracies are in percent, on the run's test images, after the last epoch; *untrained* is
the student with its random weights, *linear* its last linear evaluation (top1; *probe* says by
which schedule, learning rate and epochs, and for how many seeds), *minutes* the time of all epochs,
their kNN included. What rows differ in has a column each or, if that is much, a column for all.

A run that is not over has a row of its own, and says how far it is. One whose --epochs was changed
on --resume says so, and is not averaged with runs that had their length from the start.

--plot needs matplotlib. read_run, group, spread, linear, curve, table and plot serve other scripts
as well.
"""

import csv
import json
import math
import pathlib
import statistics
import sys
import textwrap
from dataclasses import dataclass

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import common

# What a run did before there were these options, which its log lacks
BEFORE = dict(image_size=32, bn_splits=1)
BEFORE_RESSL = dict(crops=1, predictor=False, infonce_epochs=0)
# No settings: the place and the name of a run; --amp, for its precision says what that came to
FREE = ("seed", "data_dir", "output", "device", "resume", "views", "amp", "weight_decay", "stem")
COLUMNS = ("method", "data", "epochs")  # settings with a column in every table
FEW = 3  # of the other settings have a column each; of more, one column says what is unusual

# -------------------------------------------------------------------------------------- the runs


@dataclass
class Run:
    """A run folder."""

    folder: pathlib.Path
    arguments: dict  # with those that its log is too old to have
    about: dict  # the rest of the log's first record: versions, hardware, precision, ...
    epochs: list  # a record each, from epoch 0
    evals: list

    def last(self):
        """The epoch that ends the run: as it was begun, or as far as a longer resume has come."""
        return max(self.arguments["epochs"], len(self.epochs) - 1)

    def finished(self):
        return len(self.epochs) > self.last()

    def stage(self):
        """ "20"; unfinished "7/20"; resumed with more --epochs "30 (begun with 20)"."""
        begun, done = self.arguments["epochs"], len(self.epochs) - 1
        if done > begun:
            return f"{done} (begun with {begun})"
        return f"{begun}" if done == begun else f"{max(done, 0)}/{begun}"

    def at(self, key, epoch=None):
        """The record's `key` at an epoch, by default the final one; None where there is none.

        "lead" is the teacher's kNN minus the student's.
        """
        epoch = self.last() if epoch is None else epoch
        if key == "lead":
            teacher, student = (self.at(f"{name}_knn", epoch) for name in ("teacher", "student"))
            return None if None in (teacher, student) else teacher - student
        return self.epochs[epoch].get(key) if epoch < len(self.epochs) else None

    def settings(self):
        """Name -> text, of all that the runs of a row have in common."""
        settings = {name: value for name, value in self.arguments.items() if name not in FREE}
        settings |= {"epochs": self.stage(), "precision": self.about.get("precision")}
        if settings["data"] == "folder":  # two folders are two data sets
            settings["data"] = f"folder:{self.arguments.get('data_dir')}"
        return {n: f"{v:g}" if isinstance(v, float) else str(v) for n, v in settings.items()}


def read_records(path):
    """The records of a log, in JSON, a line each; none if it is not there.

    Raises UserError: the log is damaged.
    """
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                raise common.UserError(f"{path} is damaged: move it away") from None
    return records


def read_run(folder):
    """A run folder -> Run. Raises UserError if it holds no run, or a log with a hole."""
    log = pathlib.Path(folder) / "log.jsonl"
    first, *epochs = read_records(log) or [{}]
    arguments = first.get("arguments", {}) if isinstance(first, dict) else {}
    if not {"method", "data", "epochs", "seed"} <= set(arguments):
        remedy = "name a run's folder, such as runs/ressl-textures"
        raise common.UserError(f"no log.jsonl with a run's arguments in {folder}: {remedy}")
    if [record.get("epoch") for record in epochs] != list(range(len(epochs))):
        raise common.UserError(f"{log} is not a complete run, epochs are missing: leave it out")
    old = BEFORE_RESSL if arguments["method"] == "ressl" else {}
    before = {**BEFORE, "compile": False, **old}
    about = {name: value for name, value in first.items() if name != "arguments"}
    evals = read_records(log.with_name("evals.jsonl"))
    return Run(log.parent, {**before, **arguments}, about, epochs, evals)


def linear(run, **protocol):
    """The record of the student's last linear evaluation after the final epoch, or None.

    Only one on the run's own images counts. protocol: what it must have besides, such as lr=1.0.
    """
    names = ("method", "data", "arch", "subset", "holdout", "image_size", "seed")
    same = {name: run.arguments.get(name) for name in names} | protocol
    same |= {"evaluation": "linear", "branch": "student", "epoch": run.last()}
    evals = [{**BEFORE, **record} for record in run.evals]
    found = [e for e in evals if all(e.get(name) == value for name, value in same.items())]
    return found[-1] if found and run.finished() else None


def group(runs):
    """Runs -> rows: lists of runs by seed, finished and alike but for the seed.

    Of a seed that was run twice, each has a row. Rows are in the order of their first runs.
    """
    rows = []
    for run in runs:
        for row in rows:
            new = all(run.arguments["seed"] != other.arguments["seed"] for other in row)
            if new and run.finished() and run.settings() == row[0].settings():
                row.append(run)
                break
        else:
            rows.append([run])
    return [sorted(row, key=lambda run: run.arguments["seed"]) for row in rows]


def spread(values, digits=1):
    """[59.25] -> "59.2", [1, 2, 3] -> "2.0 ± 1.0": mean and standard deviation (of a sample).

    Without values, or with a None among them: "".
    """
    if not values or None in values:
        return ""
    text = f"{round(statistics.mean(values), digits) + 0.0:.{digits}f}"  # + 0.0: no -0.0
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def curve(runs, key):
    """-> [(epoch, mean, standard deviation)], of the epochs at which all runs have the key."""
    values = {e: [run.at(key, e) for run in runs] for e in range(len(runs[0].epochs))}
    deviation = lambda v: statistics.stdev(v) if len(v) > 1 else 0.0
    return [(e, statistics.mean(v), deviation(v)) for e, v in values.items() if None not in v]


# ------------------------------------------------------------------------------------- the table


def said(settings, names):
    """{"lr": "0.1", "queue_size": "64"} -> "lr 0.1, queue size 64"."""
    return ", ".join(f"{n.replace('_', ' ')} {settings[n]}" for n in names if n in settings)


def seeds(runs):
    return " ".join(str(run.arguments["seed"]) for run in runs)


def described(rows):
    """Rows -> the settings' cells of each; a label of each, for a picture; lines to say above."""
    every, known = [row[0].settings() for row in rows], {}
    for one in every:
        known.setdefault(one["method"], {}).update(one)
    # "?" where a log lacks what others of its method have; another method need not have it
    every = [{name: one.get(name, "?") for name in known[one["method"]]} for one in every]
    names = dict.fromkeys(name for one in every for name in one)
    values = {name: [one[name] for one in every if name in one] for name in names}
    differ = [name for name in values if len(set(values[name])) > 1]
    options = [name for name in differ if name not in COLUMNS]
    usual = {n: statistics.mode(values[n]) for n in options} if len(options) > FEW else {}
    same = {n: values[n][0] for n in values if n not in (*differ, *COLUMNS)}
    above = [f"in common: {said(same, same)}"]
    above += [f"usual settings, where a row has no others: {said(usual, usual)}"] * bool(usual)

    cells, labels, marks = [], [], [(row[0].settings(), seeds(row)) for row in rows]
    for row, one, mark in zip(rows, every, marks, strict=True):
        text = said(one, [name for name in options if one.get(name) != usual.get(name)])
        text = text or "usual settings" * bool(usual)
        folder = str(row[0].folder) * (marks.count(mark) > 1)  # as nothing else tells them apart
        own = {"options": text} if usual else {n.replace("_", " "): one.get(n, "") for n in options}
        cells.append({"run": folder, "method": one["method"], "data": one["data"], **own})
        cells[-1] |= {"seeds": seeds(row), "epochs": one["epochs"]}
        place = ["epochs " * (n == "epochs") + one[n] for n in COLUMNS if n in differ]
        parts = *place, text, f"seed{'s' * (len(row) > 1)} {seeds(row)}", folder
        labels.append(", ".join(part for part in parts if part))
    return cells, labels, above


def final(runs, key):
    """A cell: the key after the final epoch; of an unfinished run the latest, and its epoch."""
    if all(run.finished() for run in runs):
        return spread([run.at(key) for run in runs])
    points = curve(runs, key)
    return f"{points[-1][1]:.1f} (epoch {points[-1][0]})" if points else ""


def measured(runs):
    """The cells of a row that are measured. Probes by different protocols are not averaged."""
    probes = [probe for run in runs if (probe := linear(run))]
    protocol = lambda probe: "{schedule}, lr {lr}, {epochs} epochs".format(**probe)
    how = sorted({protocol(probe) for probe in probes})
    count = [f"{len(probes)} of {len(runs)} seeds"] * (len(runs) > 1 and len(probes) > 0)
    seconds = [[record.get("seconds") for record in run.epochs] for run in runs]
    return {
        "untrained": spread([run.at("student_knn", 0) for run in runs]),
        "kNN student": final(runs, "student_knn"),
        "kNN teacher": final(runs, "teacher_knn"),
        "linear": spread([p["top1"] for p in probes]) if len(how) < 2 else "not averaged",
        "probe": "; ".join([*how, *count]),
        "minutes": spread([None if None in times else sum(times) / 60 for times in seconds]),
    }


def table(header, rows, padded=False):
    """Cells -> Markdown; padded: with columns of even width, for a screen."""
    lines = [header, ["---"] * len(header), *rows]
    if padded:
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines[1] = ["-" * width for width in widths]
        lines = [[c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def write_csv(path, lines):
    """The table's rows (dicts); a mean and its deviation ("NAME sd") in columns of numbers."""
    parts = [name for name in lines[0] if any(" ± " in line[name] for line in lines)]
    split = lambda name, cell: cell.partition(" ± ")[::2] if name in parts else [cell]
    names = {name: f"{name} ± {name} sd" if name in parts else name for name in lines[0]}
    rows = [[x for item in line.items() for x in split(*item)] for line in [names, *lines]]
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


# ----------------------------------------------------------------------------------- the picture

QUANTITIES = {  # axis label -> keys of the log, and the styles of their lines
    "kNN accuracy (%)": {"student_knn": "-", "teacher_knn": "--"},
    "gap, student to teacher (1 - cos)": {"gap": "-"},
    "loss (mean of the epoch)": {"loss": "-"},
}
LEAD = "teacher's kNN minus student's (points)"  # for the project's own pages
KEYS = {**QUANTITIES, LEAD: {"lead": "-"}}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "os^Dvx*"  # the next for each round of the colours, which the colour-blind tell apart
WIDTH, DPI = 1200, 120  # pixels, and pixels an inch


def load_matplotlib():
    """-> the package, imported only to draw: no run needs it. Raises UserError without it."""
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure
    except ImportError:
        remedy = "python -m pip install matplotlib"
        raise common.UserError(f"--plot needs matplotlib: {remedy}") from None
    return matplotlib


def plot(path, panels, **text):
    """Draw panels side by side, and a legend below them, to a PNG file 1200 px wide.

    panels: list of (title, a key of KEYS, {label: runs}). A label has its colour in all
    panels; its lines are means over its runs, in bands of one standard deviation.
    text: what the file carries besides, as PNG text.
    """
    matplotlib = load_matplotlib()
    names = {label: None for _, _, rows in panels for label in rows}
    looks = {
        name: dict(color=COLOURS[i % 7], marker=MARKERS[i // 7 % 7], ms=3.5, lw=1.6)
        for i, name in enumerate(names)
    }
    if any("teacher_knn" in KEYS[quantity] for _, quantity, _ in panels):
        looks |= {"student": dict(color="grey"), "teacher": dict(color="grey", ls="--")}
    if any(len(runs) > 1 for _, _, rows in panels for runs in rows.values()):
        looks["band: ± one standard deviation"] = dict(color="grey", alpha=0.3, lw=8)
    texts = {name: textwrap.fill(name, 130) for name in looks}
    line = matplotlib.lines.Line2D
    handles = [line([], [], label=texts[name], **look) for name, look in looks.items()]
    columns = min(len(looks), max(1, WIDTH // (8 * max(map(len, looks)) + 60)))  # 8 px a letter
    size = WIDTH / DPI, 3.7 + 0.19 * math.ceil(len(looks) / columns)
    figure = matplotlib.figure.Figure(size, DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)
    matplotlib.backends.backend_agg.FigureCanvasAgg(figure)  # needs no window
    places = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, quantity, rows) in zip(places, panels, strict=True):
        axes.set(title=title, xlabel="epoch", ylabel=quantity)
        axes.xaxis.get_major_locator().set_params(integer=True, steps=[1, 2, 5, 10])
        axes.grid(color="#DDDDDD", lw=0.6)
        for label, runs in rows.items():
            draw_lines(axes, runs, quantity, looks[label])
    place = dict(loc="outside lower center", ncols=columns)
    figure.legend(handles=handles, frameon=False, fontsize=9, **place)
    figure.savefig(path, metadata=text)


def draw_lines(axes, runs, quantity, look):
    """The curves of a row's runs in their bands."""
    for key, style in KEYS[quantity].items():
        if points := curve(runs, key):
            epochs, means, deviations = zip(*points, strict=True)
            low, high = ([m + s * d for _, m, d in points] for s in (-1, 1))
            axes.fill_between(epochs, low, high, color=look["color"], alpha=0.15, lw=0)
            axes.plot(epochs, means, ls=style, markevery=math.ceil(len(points) / 25), **look)


def panels(rows, labels):
    """-> panels for plot: what the rows' logs have of QUANTITIES."""
    named = dict(zip(labels, rows, strict=True))
    has = lambda keys: any(curve(row, key) for row in rows for key in keys)
    return [("", quantity, named) for quantity, keys in QUANTITIES.items() if has(keys)]


# ------------------------------------------------------------------------------ the command line


def check_file(name, ending):
    """Refuse a file that cannot be written, before the work that it is for."""
    path = pathlib.Path(name)
    if path.suffix != ending or not path.parent.is_dir() or path.is_dir():
        raise common.UserError(f"cannot write {name}: give NAME{ending} in an existing folder")


@common.command
def main(argv=None):
    """The command line -> the table's rows, a dict each."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not, and shows every sign
        sys.stdout.reconfigure(errors="replace")
    parser = common.Parser(prog="docs/compare.py", description=__doc__)
    option = parser.add_argument
    option("runs", nargs="+", metavar="RUN", type=pathlib.Path, help="a run's folder")
    option("--plot", metavar="FILE.png", help="draw the curves")
    option("--csv", metavar="FILE.csv", help="write the table")
    args = parser.parse_args(argv)
    if args.csv:
        check_file(args.csv, ".csv")
    if args.plot:
        check_file(args.plot, ".png")
        load_matplotlib()  # or say at once that it is missing
    folders = {folder.resolve(): folder for folder in args.runs}  # each once
    rows = group([read_run(folder) for folder in folders.values()])
    cells, labels, above = described(rows)
    lines = [{**first, **measured(row)} for first, row in zip(cells, rows, strict=True)]
    lines = [{name: line[name] for name in line if any(x[name] for x in lines)} for line in lines]
    for line in above:
        print(textwrap.fill(line, 100, subsequent_indent="    "))
    print("\n" + table(list(lines[0]), [list(line.values()) for line in lines], padded=True))
    if args.csv:
        write_csv(args.csv, lines)
        print(f"written: {args.csv}")
    if args.plot:
        drawn = panels(rows, labels)
        if not drawn:
            raise common.UserError("nothing to draw: no epoch of these runs is over, wait for one")
        plot(args.plot, drawn)
        print(f"written: {args.plot}")
    return lines


if __name__ == "__main__":
    main()
