"""The README's pictures of curves, from the logs in docs/results, drawn by docs/compare.py.

    python tests/curves.py

A picture carries its numbers as text, which tests/test_results.py holds against the logs.
"""

import json
import pathlib
import sys

import results

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "docs"))

import compare

DOCS = results.ROOT / "docs"
RM = "rm-cifar100-conv4-20epochs-moco"
WITHOUT = f"{results.RM_SMALL} --residual-weight 0"
KNN, GAP, _ = compare.QUANTITIES
TERM = {  # label -> runs
    "with the term": (f"{RM}-with-seed*", results.RM_SMALL),
    "without": (f"{RM}-without-seed*", WITHOUT),
}
RESSL = {"ReSSL": ("ressl-cifar10-conv4-20epochs-bf16-seed*", results.LAPTOP)}
PREMISE = {
    label: (f"premise-{name}-seed*", f"{results.PREMISE_BASE} {options}")
    for label, (options, name) in results.PREMISE.items()
}
PICTURES = {  # file -> panels: title, quantity, rows
    "curves.png": [
        ("Residual Momentum, CIFAR-100", KNN, TERM),
        ("Residual Momentum, CIFAR-100", GAP, TERM),
        ("ReSSL, CIFAR-10", KNN, RESSL),
    ],
    "premise.png": [("MoCo v3, CIFAR-100, 5,000 images held out", compare.LEAD, PREMISE)],
}


def read(panels):
    """The panels with their runs in place of patterns and commands."""
    find = lambda row: [compare.read_run(results.RESULTS / run.name) for run in results.find(*row)]
    return [(t, q, {label: find(row) for label, row in rows.items()}) for t, q, rows in panels]


def numbers(panels):
    """What a picture shows, as JSON: a list of panels, {label: {key: [[epoch, mean], ...]}}."""
    points = lambda runs, key: [[e, round(mean, 4)] for e, mean, _ in compare.curve(runs, key)]
    return json.dumps(
        [
            {
                label: {key: points(runs, key) for key in compare.KEYS[q]}
                for label, runs in r.items()
            }
            for _, q, r in panels
        ]
    )


def draw(file, folder=DOCS):
    panels = read(PICTURES[file])
    compare.plot(folder / file, panels, curves=numbers(panels))


if __name__ == "__main__":
    for name in PICTURES:
        draw(name)
