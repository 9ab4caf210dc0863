"""Your runs side by side: a table on the screen, and a picture of their curves.

    python docs/compare.py runs/ressl-cifar10 runs/ressl-cifar10-2
    python docs/compare.py runs/* --plot curves.png --csv table.csv

A row is a run, or several runs that differ in nothing but the seed. Then it has the mean ± the
standard deviation (of a sample). Accuracies are in percent. They are those of the run's test
images after the last epoch. The student with its random weights is called *untrained*.
The column *linear* has the top1 of the student's last linear evaluation. The column *probe* says
by which schedule, learning rate and epochs it was made. *minutes* is the time of all epochs with
their kNN. A setting in which rows differ has a column. If there are many such settings, one
column says what is unusual.

A run that is not over has a row of its own, which says how far it is. So has a run that was
resumed with more --epochs: it is not averaged with runs of this length from the start.

--plot needs matplotlib.
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

# What a run did before there were these options. Its log lacks them.
BEFORE = {"image_size": 32, "bn_splits": 1}
BEFORE_RESSL = {"crops": 1, "predictor": False, "infonce_epochs": 0}
# No settings: where a run is, and how it was started. The precision is told besides.
FREE = ("seed", "data_dir", "contents", "output", "device", "resume", "views", "amp")
FREE += ("weight_decay", "stem")  # options of before
COLUMNS = ("method", "data", "epochs")  # settings with a column in every table
FEW = 3  # so many other settings have a column each

# -------------------------------------------------------------------------------------- the runs


@dataclass
class Run:
    """A run folder."""

    folder: pathlib.Path
    arguments: dict  # with those that its log is too old to have
    about: dict  # the rest of the log's first record: versions, hardware, precision
    epochs: list  # a record each, from epoch 0
    evals: list  # a record each

    def last(self):
        """The epoch that ends the run. A longer resume may have moved it."""
        return max(self.arguments["epochs"], len(self.epochs) - 1)

    def finished(self):
        """Is the last epoch over?"""
        return len(self.epochs) > self.last()

    def stage(self):
        """How far the run is: "20", "7/20" or "30 (begun with 20)"."""
        begun = self.arguments["epochs"]
        done = max(len(self.epochs) - 1, 0)
        if done > begun:
            return f"{done} (begun with {begun})"
        if self.finished():
            return f"{done}"
        return f"{done}/{begun}"

    def at(self, key, epoch=None):
        """The record's `key` at an epoch, by default the last. None: it is missing or NaN.

        The key "lead" is the teacher's kNN minus the student's.
        """
        if epoch is None:
            epoch = self.last()
        if key == "lead":
            teacher = self.at("teacher_knn", epoch)
            student = self.at("student_knn", epoch)
            return None if teacher is None or student is None else teacher - student
        if epoch >= len(self.epochs):
            return None
        value = self.epochs[epoch].get(key)
        return None if value is None or math.isnan(value) else value

    def settings(self):
        """What the runs of a row have in common: name -> text."""
        settings = {}
        for name, value in self.arguments.items():
            if name not in FREE:
                settings[name] = f"{value:g}" if isinstance(value, float) else str(value)
        if settings["data"] == "folder":  # its contents are the data set, wherever it lies
            contents = self.arguments.get("contents") or self.arguments.get("data_dir")
            settings["data"] = f"folder:{contents}"
        settings["epochs"] = self.stage()
        settings["precision"] = str(self.about.get("precision"))
        return settings


def read_records(path):
    """The records of a log: a line of JSON each. A missing file has none.

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
    """A run folder -> Run. Raises UserError: it holds no run, or epochs are missing."""
    log = pathlib.Path(folder) / "log.jsonl"
    records = read_records(log)
    about = records[0] if records else {}
    arguments = about.get("arguments", {})
    if not {"method", "data", "epochs", "seed"} <= arguments.keys():
        remedy = "name a run's folder, such as runs/ressl-textures"
        raise common.UserError(f"no log.jsonl with a run's arguments in {folder}: {remedy}")
    epochs = records[1:]
    if [record.get("epoch") for record in epochs] != list(range(len(epochs))):
        raise common.UserError(f"{log} is not a complete run, epochs are missing: leave it out")
    before = {**BEFORE, "compile": False}
    if arguments["method"] == "ressl":
        before.update(BEFORE_RESSL)
    about = {name: value for name, value in about.items() if name != "arguments"}
    evals = read_records(log.with_name("evals.jsonl"))
    return Run(log.parent, {**before, **arguments}, about, epochs, evals)


def on_own_images(run, record):
    """Was an evaluation made on the images that the run was tested on?"""
    for name in ("data", "subset", "holdout", "image_size"):
        if record.get(name) != run.arguments.get(name):
            return False
    if record.get("contents") and run.arguments.get("contents"):
        return record["contents"] == run.arguments["contents"]
    if run.arguments["data"] == "folder":
        return record.get("data_dir") == run.arguments.get("data_dir")
    return True


def linear(run, **protocol):
    """The record of the student's last linear evaluation after the last epoch, or None.

    Only one on the run's own images counts. protocol: what it must have besides, such as lr=1.0.
    """
    wanted = {name: run.arguments.get(name) for name in ("method", "arch", "seed")}
    wanted.update(evaluation="linear", branch="student", epoch=run.last(), **protocol)
    found = None
    for record in run.evals:
        record = {**BEFORE, **record}
        same = all(record.get(name) == value for name, value in wanted.items())
        if same and run.finished() and on_own_images(run, record):
            found = record
    return found


def belongs(run, row):
    """Can a run be averaged with those of a row?"""
    seeds = [other.arguments["seed"] for other in row]
    if run.arguments["seed"] in seeds or not run.finished():
        return False
    return run.settings() == row[0].settings()


def group(runs):
    """Runs -> rows: lists of runs that are finished and alike but for the seed, by seed.

    If a seed was run twice, each run has a row. Rows are in the order of their first runs.
    """
    rows = []
    for run in runs:
        fitting = [row for row in rows if belongs(run, row)]
        if fitting:
            fitting[0].append(run)
        else:
            rows.append([run])
    return [sorted(row, key=lambda run: run.arguments["seed"]) for row in rows]


def spread(values, digits=1):
    """[59.25] -> "59.2", [1, 2, 3] -> "2.0 ± 1.0": mean and standard deviation (of a sample).

    The text is empty if there are no values, or one is None.
    """
    if not values or None in values:
        return ""
    mean = round(statistics.mean(values), digits) + 0.0  # -0.0 becomes 0.0
    text = f"{mean:.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text


def curve(runs, key):
    """-> [(epoch, mean, standard deviation)], for the epochs at which all runs have the key."""
    points = []
    for epoch in range(len(runs[0].epochs)):
        values = [run.at(key, epoch) for run in runs]
        if None not in values:
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            points.append((epoch, statistics.mean(values), deviation))
    return points


# ------------------------------------------------------------------------------------- the table


def said(settings):
    """{"lr": "0.1", "queue_size": "64"} -> "lr 0.1, queue size 64"."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())


def seeds(runs):
    """The seeds of a row, as text."""
    return " ".join(str(run.arguments["seed"]) for run in runs)


def complete(settings):
    """Settings of rows -> the same, with "?" for what others of the method have."""
    names = {}  # of each method, in order
    for one in settings:
        names.setdefault(one["method"], {}).update(one)
    completed = []
    for one in settings:
        completed.append({name: one.get(name, "?") for name in names[one["method"]]})
    return completed


def values_of(settings):
    """Settings of rows -> name: the values of all rows that have it."""
    values = {}
    for one in settings:
        for name, value in one.items():
            values.setdefault(name, []).append(value)
    return values


def described(rows):
    """Rows -> the settings' cells of each; a label of each, for a picture; lines to say above."""
    settings = complete([row[0].settings() for row in rows])
    values = values_of(settings)
    differ = [name for name in values if len(set(values[name])) > 1]
    options = [name for name in differ if name not in COLUMNS]
    usual = {}
    if len(options) > FEW:
        usual = {name: statistics.mode(values[name]) for name in options}
    same = {}
    for name in values:
        if name not in differ and name not in COLUMNS:
            same[name] = values[name][0]
    above = [f"in common: {said(same)}"]
    if usual:
        above.append(f"usual settings, where a row has no others: {said(usual)}")
    looks = [(row[0].settings(), seeds(row)) for row in rows]
    cells = []
    labels = []
    for row, one, look in zip(rows, settings, looks, strict=True):
        own = {}  # what sets the row apart
        for name in options:
            if name in one and one[name] != usual.get(name):
                own[name] = one[name]
        folder = ""
        if looks.count(look) > 1:  # nothing else tells them apart
            folder = str(row[0].folder)
        cell = {"run": folder, "method": one["method"], "data": one["data"]}
        if usual:
            cell["options"] = said(own) or "usual settings"
        else:
            cell.update({name.replace("_", " "): one.get(name, "") for name in options})
        cell.update(seeds=seeds(row), epochs=one["epochs"])
        cells.append(cell)
        labels.append(label_of(one, differ, cell.get("options", said(own)), cell))
    return cells, labels, above


def label_of(settings, differ, options, cell):
    """A row's name in a picture, such as "lr 0.1, seeds 0 1"."""
    parts = []
    for name in COLUMNS:
        if name in differ:
            parts.append(f"epochs {settings[name]}" if name == "epochs" else settings[name])
    several = "seeds" if " " in cell["seeds"] else "seed"
    parts += [options, f"{several} {cell['seeds']}", cell["run"]]
    return ", ".join(part for part in parts if part)


def final(runs, key):
    """A cell: the key after the last epoch. An unfinished run has its latest, with the epoch."""
    if all(run.finished() for run in runs):
        return spread([run.at(key) for run in runs])
    points = curve(runs, key)
    if not points:
        return ""
    epoch, mean, _ = points[-1]
    return f"{mean:.1f} (epoch {epoch})"


def minutes(run):
    """The time of all epochs. None: a record lacks it."""
    seconds = [record.get("seconds") for record in run.epochs]
    return None if None in seconds else sum(seconds) / 60


def measured(runs):
    """The cells of a row that are measured. Probes by different protocols are not averaged."""
    probes = [linear(run) for run in runs]
    probes = [probe for probe in probes if probe]
    protocols = set()
    for probe in probes:
        protocols.add("{schedule}, lr {lr}, {epochs} epochs".format(**probe))
    how = sorted(protocols)
    if probes and len(runs) > 1:
        how.append(f"{len(probes)} of {len(runs)} seeds")
    top1 = spread([probe["top1"] for probe in probes])
    return {
        "untrained": spread([run.at("student_knn", 0) for run in runs]),
        "kNN student": final(runs, "student_knn"),
        "kNN teacher": final(runs, "teacher_knn"),
        "linear": top1 if len(protocols) < 2 else "not averaged",
        "probe": "; ".join(how),
        "minutes": spread([minutes(run) for run in runs]),
    }


def table(header, rows, padded=False):
    """Cells -> a Markdown table. padded: columns get an even width, for a screen."""
    lines = [header, ["---"] * len(header), *rows]
    if padded:
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines[1] = ["-" * width for width in widths]
        for i, line in enumerate(lines):
            lines[i] = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def write_csv(path, lines):
    """Write the table's rows, a dict each. A standard deviation has a column, "NAME sd"."""
    spreads = {name for line in lines for name, cell in line.items() if " ± " in cell}
    rows = []
    for line in lines:
        row = {}
        for name, cell in line.items():
            row[name], _, deviation = cell.partition(" ± ")
            if name in spreads:
                row[f"{name} sd"] = deviation
        rows.append(row)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


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
WIDTH = 1200  # pixels
DPI = 120  # pixels an inch


def load_matplotlib():
    """-> the package, imported only to draw: no run needs it. Raises UserError without it."""
    remedy = "python -m pip install --upgrade matplotlib"
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure
    except ImportError:
        raise common.UserError(f"--plot needs matplotlib: {remedy}") from None
    if matplotlib.__version_info__ < (3, 7):  # the first with legends outside of the axes
        raise common.UserError(f"--plot needs matplotlib 3.7 or newer: {remedy}")
    return matplotlib


def looks_of(labels):
    """Colour and marker of each label."""
    looks = {}
    for i, label in enumerate(labels):
        marker = MARKERS[i // len(COLOURS) % len(MARKERS)]
        looks[label] = {"color": COLOURS[i % len(COLOURS)], "marker": marker}
        looks[label].update(ms=3.5, lw=1.6)  # sizes of marker and line
    return looks


def legend_of(panels, looks):
    """What the legend explains: text -> look."""
    legend = {}
    for label, look in looks.items():
        literal = label.replace("$", r"\$")  # no formula
        legend[textwrap.fill(literal, 130)] = look
    if any("teacher_knn" in KEYS[quantity] for _, quantity, _ in panels):
        legend["student"] = {"color": "grey"}
        legend["teacher"] = {"color": "grey", "ls": "--"}
    rows = [runs for _, _, rows in panels for runs in rows.values()]
    if any(len(runs) > 1 for runs in rows):
        legend["band: ± one standard deviation"] = {"color": "grey", "alpha": 0.3, "lw": 8}
    return legend


def plot(path, panels, **text):
    """Draw panels side by side, and a legend below them, to a PNG file 1200 px wide.

    panels: list of (title, a key of KEYS, {label: runs}). A label has its colour in all
    panels. Its lines are means over its runs, in bands of one standard deviation.
    text: what the file carries besides, as PNG text.
    """
    matplotlib = load_matplotlib()
    labels = {label: None for _, _, rows in panels for label in rows}  # each once, in order
    looks = looks_of(labels)
    legend = legend_of(panels, looks)
    longest = max(len(line) for name in legend for line in name.splitlines())
    columns = WIDTH // (8 * longest + 60)  # 8 px a letter
    columns = max(1, min(columns, len(legend)))
    height = 3.7 + 0.19 * math.ceil(len(legend) / columns)
    figure = matplotlib.figure.Figure((WIDTH / DPI, height), DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)
    matplotlib.backends.backend_agg.FigureCanvasAgg(figure)  # needs no window
    places = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, quantity, rows) in zip(places, panels, strict=True):
        axes.set(title=title, xlabel="epoch", ylabel=quantity)
        axes.xaxis.get_major_locator().set_params(integer=True, steps=[1, 2, 5, 10])
        axes.grid(color="#DDDDDD", lw=0.6)
        for label, runs in rows.items():
            draw_lines(axes, runs, quantity, looks[label])
    handles = []
    for name, look in legend.items():
        handles.append(matplotlib.lines.Line2D([], [], label=name, **look))
    figure.legend(
        handles=handles,
        frameon=False,
        fontsize=9,
        loc="outside lower center",
        ncols=columns,
    )
    figure.savefig(path, metadata=text)


def draw_lines(axes, runs, quantity, look):
    """The curves of a row's runs, in their bands."""
    for key, style in KEYS[quantity].items():
        points = curve(runs, key)
        epochs = [epoch for epoch, _, _ in points]
        means = [mean for _, mean, _ in points]
        low = [mean - deviation for _, mean, deviation in points]
        high = [mean + deviation for _, mean, deviation in points]
        if points:
            every = math.ceil(len(points) / 25)  # at most 25 markers
            axes.fill_between(epochs, low, high, color=look["color"], alpha=0.15, lw=0)
            axes.plot(epochs, means, ls=style, markevery=every, **look)


def panels(rows, labels):
    """-> panels for plot: what the rows' logs have of QUANTITIES."""
    named = dict(zip(labels, rows, strict=True))
    found = []
    for quantity, keys in QUANTITIES.items():
        if any(curve(row, key) for row in rows for key in keys):
            found.append(("", quantity, named))
    return found


# ------------------------------------------------------------------------------ the command line


def check_file(name, ending):
    """Refuse a file that cannot be written, before the work that it is for."""
    path = pathlib.Path(name)
    if path.suffix != ending or not path.parent.is_dir() or path.is_dir():
        raise common.UserError(f"cannot write {name}: give NAME{ending} in an existing folder")


def without_empty_columns(lines):
    """Rows, a dict each -> the same, without the columns that are empty in all of them."""
    names = [name for name in lines[0] if any(line[name] for line in lines)]
    return [{name: line[name] for name in names} for line in lines]


@common.command
def main(argv=None):
    """Run the command line -> the table's rows, a dict each."""
    if hasattr(sys.stdout, "reconfigure"):  # a console may lack the sign ±
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
    lines = [{**cell, **measured(row)} for cell, row in zip(cells, rows, strict=True)]
    lines = without_empty_columns(lines)
    for line in above:
        print(textwrap.fill(line, 100, subsequent_indent="    "))
    print()
    print(table(list(lines[0]), [list(line.values()) for line in lines], padded=True))
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
