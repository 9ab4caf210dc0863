"""The README's curves, from the logs in docs/results.

    python tests/curves.py

draws docs/curves.png: by epoch, kNN of student and teacher, and the gap; means over the seeds. The
picture carries its numbers as text, which tests/test_results.py holds against the logs.
"""

import json
import math
import statistics

import results
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

CURVES = results.ROOT / "docs/curves.png"
ORANGE, BLUE = (213, 94, 0), (0, 114, 178)  # told apart by colour-blind readers too
RM = "rm-cifar100-conv4-20epochs-moco"
WITH = (f"{RM}-with-seed*", results.RM_SMALL)
WITHOUT = (f"{RM}-without-seed*", f"{results.RM_SMALL} --residual-weight 0")
RESSL = ("ressl-cifar10-conv4-20epochs-bf16-seed*", results.LAPTOP)
PANELS = {  # title -> {label: (colour, dashed, runs, key)}
    "Residual Momentum, CIFAR-100: kNN (%)": {
        "student, with the term": (BLUE, False, WITH, "student_knn"),
        "teacher, with the term": (BLUE, True, WITH, "teacher_knn"),
        "student, without": (ORANGE, False, WITHOUT, "student_knn"),
        "teacher, without": (ORANGE, True, WITHOUT, "teacher_knn"),
    },
    "Residual Momentum, CIFAR-100: gap": {
        "with the term": (BLUE, False, WITH, "gap"),
        "without": (ORANGE, False, WITHOUT, "gap"),
    },
    "ReSSL, CIFAR-10: kNN (%)": {
        "student": (BLUE, False, RESSL, "student_knn"),
        "teacher": (BLUE, True, RESSL, "teacher_knn"),
    },
}
WIDTH, HEIGHT, EDGE = 800, 960, 90  # of a panel and its margin, in pixels; then halved


def curve(row, key):
    """The mean over seeds -> [[epoch, value], ...], where there is one. row: pattern, command."""
    runs = results.find(*row)
    values = {epoch: [run.at(key, epoch) for run in runs] for epoch in range(len(runs[0].epochs))}
    return [[e, round(statistics.mean(v), 4)] for e, v in values.items() if None not in v]


def curves():
    """Title -> label -> points: what docs/curves.png shows, and carries as text."""
    return {
        title: {label: curve(*line[2:]) for label, line in lines.items()}
        for title, lines in PANELS.items()
    }


def draw(path):
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


if __name__ == "__main__":
    draw(CURVES)
