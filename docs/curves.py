"""The pages' pictures, from the logs in docs/results: curves by docs/compare.py, and two of dots.

    python docs/curves.py

A picture carries its numbers as text, which tests/test_results.py holds against the logs.
"""

import functools
import json
import re

import results
from results import compare

DOCS = results.ROOT / "docs"
KNN, GAP, _ = compare.QUANTITIES


def write_curves(panels, path):
    """Curves by epoch; panels: title, quantity, {label: runs}."""
    points = lambda runs, key: [[e, round(mean, 4)] for e, mean, _ in compare.curve(runs, key)]
    lines = lambda runs, quantity: {key: points(runs, key) for key in compare.KEYS[quantity]}
    numbers = [{name: lines(runs, q) for name, runs in rows.items()} for _, q, rows in panels]
    compare.plot(path, panels, numbers=json.dumps(numbers))


def curves():
    term, without = (
        results.residual_runs(results.MOST, "MoCo v3", term) for term in ("cosine", "none")
    )
    rows, bf16 = (
        {"with the term": term, "without": without},
        "ressl-cifar10-conv4-20epochs-bf16-seed*",
    )
    ressl = {"ReSSL": results.find(bf16, results.SMALL[bf16])}
    name = "Residual Momentum, CIFAR-100"
    return [(name, KNN, rows), (name, GAP, rows), ("ReSSL, CIFAR-10", KNN, ressl)]


def premise():
    rows = {label: results.premise_runs(label) for label in results.PREMISE}
    few = [label for label in rows if int(re.search(r"\d+", label)[0]) <= 64]
    panel = lambda title, labels: (title, compare.LEAD, {label: rows[label] for label in labels})
    return [
        panel("MoCo v3, CIFAR-100: batches of 256 and 128", [x for x in rows if x not in few]),
        panel("batches of 64 and 32", few),
    ]


def write_dots(draw, size, numbers, path):
    """One panel that draw(axes, numbers) fills."""
    figure = compare.load_matplotlib().figure.Figure(size, compare.DPI, layout="constrained")
    axes = figure.subplots()
    axes.grid(color="#DDDDDD", lw=0.6)
    axes.set_axisbelow(True)
    draw(axes, numbers)
    figure.savefig(path, metadata={"numbers": json.dumps(numbers)})


def draw_ablations(axes, numbers):
    """A line an option, a dot its kNN; the lowest line is the last option."""
    names, values = [*numbers][::-1], [*numbers.values()][::-1]
    warm = ["infonce" in name for name in names]
    colours = [compare.COLOURS[1 if w else 0] for w in warm]
    axes.hlines(range(len(names)), numbers["(none)"], values, color=colours, lw=1.2)
    axes.scatter(values, range(len(names)), color=colours, s=30)
    axes.axvline(numbers["(none)"], color="grey", lw=1)
    axes.set_yticks(range(len(names)), names, fontsize=8, family="monospace")
    for y, value in enumerate(values):
        place = dict(xytext=(6, 0), textcoords="offset points", va="center", fontsize=8)
        axes.annotate(f"{value:.1f}", (max(value, numbers["(none)"]), y), **place)
    axes.set(
        xlabel="student's kNN (%); orange: begins with InfoNCE",
        ylim=(-0.7, len(names) - 0.3),
        xlim=(39, 62),
    )
    axes.set_title("ReSSL, CIFAR-10, 10 epochs, 5,000 images held out", fontsize=11)


def draw_temperatures(axes, numbers):
    """A line a version, over tau_t: mean and standard deviation over the seeds."""
    for i, (version, points) in enumerate(numbers.items()):
        x, means, deviations = zip(*points, strict=True)
        look = dict(color=compare.COLOURS[i], marker=compare.MARKERS[i], capsize=3)
        axes.errorbar(x, means, deviations, label=version, **look)
    axes.set(
        xlabel="teacher's temperature tau_t (the student's is 0.1)",
        title="ReSSL, textures, 15 epochs",
    )
    axes.set(ylabel="student's kNN (%)", xticks=results.TEMPERATURES)
    axes.legend(frameon=False, loc="lower left")


def ablations():
    knn = {options: results.ablation_runs(options)[0] for options in results.ABLATIONS}
    return {options or "(none)": run.at("student_knn") for options, run in knn.items()}


def temperatures():
    """-> {version: [(tau_t, mean, standard deviation)]}"""
    knn = lambda t, version: [r.at("student_knn") for r in results.extended_runs(t, version)]
    point = lambda values: (results.statistics.mean(values), results.statistics.stdev(values))
    versions, temps = results.EXTENDED, results.TEMPERATURES
    return {v: [[t, *(round(x, 2) for x in point(knn(t, v)))] for t in temps] for v in versions}


PICTURES = {  # file -> what is shown; how it is written
    "curves.png": (curves, write_curves),
    "premise.png": (premise, write_curves),
    "ablations.png": (ablations, functools.partial(write_dots, draw_ablations, (10, 6.2))),
    "temperatures.png": (temperatures, functools.partial(write_dots, draw_temperatures, (7, 3.6))),
}


def draw(file, folder=DOCS):
    read, write = PICTURES[file]
    write(read(), folder / file)


if __name__ == "__main__":
    for name in PICTURES:
        draw(name)
