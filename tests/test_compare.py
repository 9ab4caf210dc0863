"""docs/compare.py: rows, means and spreads of real logs; what must not be averaged; the picture."""

import csv
import io
import json
import pathlib
import sys

import compare
import numpy
import pytest
from PIL import Image

import common

RESULTS = pathlib.Path(__file__).parent.parent / "docs/results"
RM = "rm-cifar100-conv4-20epochs-moco"
WITH, WITHOUT = ([f"{RM}-{term}-seed{seed}" for seed in range(3)] for term in ("with", "without"))
TEXTURES = [f"ressl-textures-seed{seed}" for seed in range(3)]  # of before there were some options


def place(name):
    """A folder of docs/results, in whichever group it is; or the folder itself."""
    if pathlib.Path(name).is_absolute():
        return pathlib.Path(name)
    groups = [g for g in RESULTS.iterdir() if g.name not in ("modified", "exercises")]
    return next(group / name for group in groups if (group / name).exists())


def records(name, file="log.jsonl"):
    """As they stand in the file, read without the code under test."""
    lines = (place(name) / file).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def rows(*folders):
    """Names in docs/results, or folders -> the rows of the table."""
    return compare.main([str(place(folder)) for folder in folders])


@pytest.fixture
def copy(tmp_path):
    """copy(source, name, change) -> a copy of a run, its records changed in place by change."""

    def make(source, name, change=lambda log: None, evals=None):
        folder, log = tmp_path / name, records(source)
        change(log)
        folder.mkdir()
        given = (
            evals if evals is not None or "rm-" not in source else records(source, "evals.jsonl")
        )
        for file, lines in (("log.jsonl", log), ("evals.jsonl", given or [])):
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / file).write_text(text, encoding="utf-8")
        return folder

    return make


def option(**values):
    """A change for `copy`: other arguments."""
    return lambda log: log[0]["arguments"].update(values)


# --------------------------------------------------------------------------- means over the seeds


def test_a_row_is_the_mean_and_deviation_over_seeds(capsys):
    found = rows(*WITHOUT[::-1], *WITH)
    assert [row["kNN student"] for row in found] == ["31.5 ± 0.2", "30.8 ± 0.7"]  # as the README
    assert [row["linear"] for row in found] == ["36.3 ± 0.4", "35.7 ± 0.6"]
    for row, names in zip(found, (WITHOUT, WITH), strict=True):
        logs = [records(name) for name in names]
        time = [sum(record["seconds"] for record in log[1:]) / 60 for log in logs]
        expected = {
            "untrained": [log[1]["student_knn"] for log in logs],
            "kNN student": [log[-1]["student_knn"] for log in logs],
            "kNN teacher": [log[-1]["teacher_knn"] for log in logs],
            "minutes": time,
        }
        for column, values in expected.items():
            assert row[column] == f"{numpy.mean(values):.1f} ± {numpy.std(values, ddof=1):.1f}"
    known = {"method": "residual_momentum", "data": "cifar100", "seeds": "0 1 2", "epochs": "20"}
    assert all(row.items() >= known.items() for row in found)
    assert [row["residual weight"] for row in found] == ["0", "1"]
    assert "residual" not in found[0]  # in which they do not differ
    assert "run" not in found[0]
    screen = capsys.readouterr().out
    assert "in common: image size 32" in screen
    assert "base moco, residual cosine" in screen
    assert screen.count("residual weight") == 1
    assert screen.count("31.5 ± 0.2") == 1
    lines = [line for line in screen.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1  # even columns


def test_spread_and_table():
    assert compare.spread([59.25]) == "59.2"
    assert compare.spread([1, 2, 3]) == "2.0 ± 1.0"
    assert compare.spread([-0.02, -0.04], 1) == "0.0 ± 0.0"
    assert compare.spread([0.04591, 0.0461], 4) == "0.0460 ± 0.0001"
    assert compare.spread([]) == compare.spread([1, None]) == ""
    cells = ["a", "b"], [["1", "22222"]]
    assert compare.table(*cells) == "| a | b |\n| --- | --- |\n| 1 | 22222 |\n"
    even = "| a   | b     |\n| --- | ----- |\n| 1   | 22222 |\n"
    assert compare.table(*cells, padded=True) == even


def test_a_curve_has_the_epochs_that_all_runs_have():
    runs = [compare.read_run(place(name)) for name in WITH]
    points = numpy.array([[r["student_knn"] for r in records(name)[1:][::4]] for name in WITH])
    epochs, means, deviations = zip(*compare.curve(runs, "student_knn"), strict=True)
    assert epochs == (0, 4, 8, 12, 16, 20)
    numpy.testing.assert_allclose(means, points.mean(0))
    numpy.testing.assert_allclose(deviations, points.std(0, ddof=1))
    assert compare.curve(runs, "gap")[0][0] == 1  # null before training
    assert {deviation for *_, deviation in compare.curve(runs[:1], "loss")} == {0.0}
    assert compare.curve(runs, "entropy") == []
    del runs[1].epochs[8]["student_knn"]
    assert [point[0] for point in compare.curve(runs, "student_knn")] == [0, 4, 12, 16, 20]


# ------------------------------------------------------------------------- what is not one row


@pytest.mark.parametrize(
    ("change", "column", "values"),
    [
        (option(lr=0.03), "lr", ["0.06", "0.03"]),
        (option(knn_every=2), "knn every", ["4", "2"]),
        (option(subset=500), "subset", ["None", "500"]),
        (option(data="cifar10"), "data", ["cifar100", "cifar10"]),
        (option(data="folder", data_dir="/my"), "data", ["cifar100", "folder:/my"]),
        (option(sharpness=3), "sharpness", ["?", "3"]),  # a new option, which is not in BEFORE
        (lambda log: log[0].update(precision="bfloat16"), "precision", ["float32", "bfloat16"]),
    ],
)
def test_a_run_with_another_setting_has_its_own_row(copy, change, column, values):
    found = rows(WITH[0], WITH[1], copy(WITH[2], "other", change))
    assert [row[column] for row in found] == values
    assert [row["seeds"] for row in found] == ["0 1", "2"]


def test_two_folders_of_pictures_are_two_data_sets(copy):
    folders = [
        copy(WITH[i], f"run{i}", option(data="folder", data_dir=path))
        for i, path in enumerate(["/a", "/a", "/b"])
    ]
    found = rows(*folders)
    assert [(row["data"], row["seeds"]) for row in found] == [
        ("folder:/a", "0 1"),
        ("folder:/b", "2"),
    ]


def test_a_folders_contents_are_the_data_set_wherever_it_lies(copy):
    """Two seeds that saw other pictures are not averaged; a folder that moved is no other."""
    given = [("/a", "48 images, sum 1"), ("/b", "48 images, sum 1"), ("/a", "51 images, sum 2")]
    folders = []
    for i, (path, contents) in enumerate(given):
        change = option(data="folder", data_dir=path, contents=contents)
        folders.append(copy(WITH[i], f"run{i}", change))
    found = rows(*folders)
    assert [(row["data"], row["seeds"]) for row in found] == [
        ("folder:48 images, sum 1", "0 1"),
        ("folder:51 images, sum 2", "2"),
    ]
    known = copy(WITH[1], "known", option(contents="50000 images, sum 3"))  # CIFAR's is one
    (row,) = rows(WITH[0], known)
    assert row["seeds"] == "0 1"


@pytest.mark.parametrize(
    "change",
    [
        option(data_dir="elsewhere", device="cuda", output="x", amp="bf16"),
        option(image_size=32, bn_splits=1, crops=1, predictor=False, infonce_epochs=0, lr=0.060),
        lambda log: log[0]["arguments"].pop("weight_decay"),  # of which no option is left
        lambda log: log[0].update(commit="fffffff", numpy="3"),
        lambda log: [record.update(entropy=1.0, m=0.99) for record in log[1:]],
    ],
)
def test_what_is_no_other_setting(copy, change):
    (row,) = rows(*TEXTURES[:2], copy(TEXTURES[2], "same", change))
    assert row["seeds"] == "0 1 2"


def test_an_old_log_has_the_options_of_today(copy):
    found = rows(TEXTURES[0], copy(TEXTURES[1], "new", option(image_size=40, crops=5)))
    assert [(row["image size"], row["crops"]) for row in found] == [("32", "1"), ("40", "5")]
    assert "crops" not in compare.read_run(place(WITH[0])).arguments  # no option of that method


def cut(log):
    del log[9:]  # after epoch 7


def test_an_unfinished_run_is_never_averaged(copy):
    parts = [copy(WITH[i], f"part{i}", cut) for i in (1, 2)]
    found = rows(WITH[0], *parts)
    assert [row["epochs"] for row in found] == ["20", "7/20", "7/20"]
    at_four = f"{records(WITH[1])[5]['student_knn']:.1f} (epoch 4)"
    assert found[1]["kNN student"] == at_four  # the last that was evaluated
    assert [row["linear"] for row in found[1:]] == ["", ""]  # those probes were of epoch 20
    begun = copy(WITH[1], "begun", lambda log: log.__delitem__(slice(1, None)))
    assert [row["epochs"] for row in rows(WITH[0], begun)] == ["20", "0/20"]


def longer(epochs, begun):
    """A change for `copy`: 20 epochs become more; the first record tells with how many it began."""

    def change(log):
        log[0]["arguments"]["epochs"] = begun
        log += [{**log[-1], "epoch": epoch} for epoch in range(21, epochs + 1)]

    return change


def test_a_stretched_run_is_marked_and_not_with_straight_ones(copy):
    stretched = copy(WITH[1], "stretched", longer(24, 20))
    found = rows(WITH[0], stretched, copy(WITH[2], "straight", longer(24, 24)))
    assert [row["epochs"] for row in found] == ["20", "24 (begun with 20)", "24"]
    assert [row["linear"] for row in found[1:]] == ["", ""]  # those probes were of epoch 20
    alike, other = (copy(WITH[2], f"from{begun}", longer(24, begun)) for begun in (20, 10))
    assert [row["seeds"] for row in rows(stretched, alike, other)] == ["1 2", "2"]


def test_a_seed_that_was_run_twice_is_not_averaged(copy):
    again = copy(WITH[1], "again")
    found = rows(WITH[0], again, WITH[1])
    assert [row["seeds"] for row in found] == ["0 1", "1"]
    found = rows(WITH[1], again, place(WITH[1]) / ".", again / ".." / "again")
    assert len(found) == 2  # one folder once
    assert found[0]["run"] == str(place(WITH[1]))
    _, labels, _ = compare.described([[compare.read_run(f)] for f in (again, place(WITH[1]))])
    assert labels == [f"seed 1, {again}", f"seed 1, {place(WITH[1])}"]


# --------------------------------------------------------------------------- settings in words


def test_of_many_settings_a_row_says_those_that_most_have_not(capsys):
    names = "base", "batch64-lr0.03", "infonce2-predictor-temp0.1", "strong", "queue1024"
    found = rows(*(f"ablation-{name}-seed0" for name in names))
    assert [row["options"] for row in found] == [
        "usual settings",
        "batch size 64, lr 0.03",
        "predictor True, infonce epochs 2, teacher temp 0.1",
        "teacher view strong",
        "queue size 1024",
    ]
    usual = "predictor False, infonce epochs 0, batch size 256, lr 0.06, queue size 4096"
    screen = " ".join(capsys.readouterr().out.split())
    assert f"usual settings, where a row has no others: {usual}, teacher temp 0.04" in screen


def test_options_of_one_method_alone_are_no_difference(capsys):
    found = rows(WITH[0], "ressl-cifar100-conv4-20epochs-seed0")
    assert [(row["method"], row["knn every"]) for row in found] == [
        ("residual_momentum", "4"),
        ("ressl", "10"),
    ]
    assert not {"queue size", "temperature", "base"} & set(found[0])
    assert "queue size 4096" in capsys.readouterr().out


def test_labels_say_what_sets_a_row_apart(copy):
    short = copy(WITH[0], "short", cut)
    folders = [*(place(name) for name in WITH + WITHOUT), short, place(TEXTURES[0])]
    grouped = compare.group([compare.read_run(folder) for folder in folders])
    assert compare.described(grouped[:2])[1] == [
        "residual weight 1, seeds 0 1 2",
        "residual weight 0, seeds 0 1 2",
    ]
    assert compare.described([grouped[0], grouped[2]])[1] == [
        "epochs 20, seeds 0 1 2",
        "epochs 7/20, seed 0",
    ]
    assert compare.described(grouped[::3])[1][1].startswith("ressl, textures, epochs 15, ")
    assert compare.described(grouped[:1])[1] == ["seeds 0 1 2"]


# ------------------------------------------------------------------------------------ evaluations


def test_only_the_last_probe_of_the_final_student_on_its_own_images_counts(copy):
    first = records(WITH[0], "evals.jsonl")
    probe = next(e for e in first if e["evaluation"] == "linear" and e["branch"] == "student")
    changes = [
        {"evaluation": "knn"},
        {"branch": "teacher"},
        {"epoch": 10},
        {"subset": 500},
        {"holdout": 5000},
        {"image_size": 64},
        {"seed": 7},
    ]
    wrong = [{**probe, **change, "top1": 99.0} for change in changes]
    old = {name: value for name, value in probe.items() if name != "image_size"}
    run = compare.read_run(copy(WITH[0], "run", evals=[{**probe, "top1": 1.0}, old, *wrong]))
    assert compare.linear(run) == {**old, "image_size": 32, "bn_splits": 1}
    assert compare.linear(run, schedule="cosine", lr=1.0)["top1"] == probe["top1"]
    assert compare.linear(run, schedule="step") is None
    run.evals[:] = wrong
    assert compare.linear(run) is None


@pytest.mark.parametrize("contents", [None, "48 images, sum 1"])
def test_a_probe_on_another_folder_is_not_the_runs_own(copy, contents):
    first = records(WITH[0], "evals.jsonl")
    probe = next(e for e in first if e["evaluation"] == "linear" and e["branch"] == "student")
    own = {"data": "folder", "data_dir": "/own", "contents": contents}
    other = {"data": "folder", "data_dir": "/other", "contents": contents and "9 images, sum 2"}
    change = option(**own)
    evals = [{**probe, **own, "top1": 70.0}, {**probe, **other, "top1": 12.5}]
    (row,) = rows(copy(WITH[0], "both", change, evals=evals))
    assert row["linear"] == "70.0"
    (row,) = rows(copy(WITH[0], "one", change, evals=evals[1:]))
    assert "linear" not in row
    if contents:  # the same pictures in another place
        moved = [{**evals[0], "data_dir": "/moved"}]
        (row,) = rows(copy(WITH[0], "moved", change, evals=moved))
        assert row["linear"] == "70.0"


def test_a_value_that_is_no_number_is_missing(copy, tmp_path):
    def spoil(log):
        log[-1]["student_knn"] = log[5]["loss"] = float("nan")

    spoilt = copy(WITH[1], "spoilt", spoil)
    found = compare.main([str(place(WITH[0])), str(spoilt), "--plot", str(tmp_path / "x.png")])
    assert "kNN student" not in found[0]
    assert "±" in found[0]["kNN teacher"]
    assert (tmp_path / "x.png").exists()


def test_the_row_says_how_many_seeds_were_probed_and_how(copy):
    bare = copy(WITH[1], "bare", evals=[])
    (row,) = rows(WITH[0], bare)
    assert (row["linear"], row["probe"]) == ("35.6", "cosine, lr 1.0, 10 epochs; 1 of 2 seeds")
    longer = [{**e, "epochs": 100} for e in records(WITH[2], "evals.jsonl")]
    (row,) = rows(WITH[0], copy(WITH[2], "longer", evals=longer))
    assert row["linear"] == "not averaged"
    assert "10 epochs; cosine, lr 1.0, 100 epochs" in row["probe"]
    (row,) = rows(bare)
    assert not {"linear", "probe"} & set(row)  # columns that would be empty


def test_records_may_lack_keys(copy):
    def bare(log):
        for record in log[1:]:
            for name in ("teacher_knn", "gap", "seconds", "peak_memory"):
                record.pop(name)

    (row,) = rows(copy(WITH[0], "bare", bare), WITH[1])
    assert row["kNN student"] == "30.4 ± 0.5"
    assert not {"kNN teacher", "minutes"} & set(row)
    (row,) = rows("ceiling-cifar10-conv4-20epochs-seed0")
    assert "kNN teacher" not in row


# ------------------------------------------------------------------------------- what is written


def test_the_csv_file_is_the_table(tmp_path):
    path = tmp_path / "table.csv"
    names = [*WITH, WITHOUT[0], TEXTURES[0]]
    found = compare.main([*(str(place(name)) for name in names), "--csv", str(path)])
    with open(path, newline="", encoding="ascii") as file:
        lines = list(csv.DictReader(file))
    assert float(lines[0]["kNN student sd"]) == 0.7
    assert lines[1]["kNN student sd"] == ""
    for line, row in zip(lines, found, strict=True):
        deviations = {name: line.pop(f"{name} sd") for name in row if f"{name} sd" in line}
        for name, deviation in deviations.items():
            line[name] += f" ± {deviation}" if deviation else ""
        assert line == row


def test_nothing_is_written_unless_told(copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = copy(WITH[0], "run")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    rows(folder)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("encoding", "sign"), [("ascii", "?"), ("cp1252", "±"), ("utf-8", "±")])
def test_any_console_can_show_it(monkeypatch, encoding, sign):
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", console)
    with pytest.raises(SystemExit, match="0"):
        compare.main(["--help"])
    rows(*WITH)
    console.flush()
    assert f"30.8 {sign} 0.7" in console.buffer.getvalue().decode(encoding)


# ------------------------------------------------------------------------------------ the picture


def rgb(colour, alpha=1.0):
    """ "#0072B2" -> its (red, green, blue), as strong as alpha on white."""
    values = numpy.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return 255 - alpha * (255 - values)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved from here on."""
    figure, saved = compare.load_matplotlib().figure.Figure, []
    save = figure.savefig
    spy = lambda self, *args, **settings: (saved.append(self), save(self, *args, **settings))
    monkeypatch.setattr(figure, "savefig", spy)
    return saved


def test_the_picture_shows_the_curves(tmp_path, monkeypatch, figures):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)  # which opens windows
    path = tmp_path / "curves.png"
    compare.main([*(str(place(name)) for name in WITHOUT + WITH), "--plot", str(path)])
    assert "matplotlib.pyplot" not in sys.modules
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width == compare.WIDTH
        assert 400 < picture.height < 600
        pixels = numpy.asarray(picture.convert("RGB"), dtype=int)
    for colour in map(rgb, compare.COLOURS[:2]):
        assert (abs(pixels - colour).sum(axis=2) < 12).sum() > 1000
    band = rgb(compare.COLOURS[1], 0.15)
    assert (abs(pixels - band).sum(axis=2) < 4).sum() > 500
    (figure,) = figures
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[:2] == ["residual weight 0, seeds 0 1 2", "residual weight 1, seeds 0 1 2"]
    assert texts[2:] == ["student", "teacher", "band: ± one standard deviation"]
    knn, gap, loss = figure.axes
    assert [axes.get_ylabel() for axes in figure.axes] == list(compare.QUANTITIES)
    assert "(%)" in knn.get_ylabel()
    assert {axes.get_xlabel() for axes in figure.axes} == {"epoch"}
    runs = [compare.read_run(place(name)) for name in WITHOUT]
    for line, key, style in zip(
        knn.lines[:2], ("student_knn", "teacher_knn"), ("-", "--"), strict=True
    ):
        assert line.get_linestyle() == style
        assert line.get_color() == compare.COLOURS[0]
        expected = [point[:2] for point in compare.curve(runs, key)]
        numpy.testing.assert_allclose(line.get_xydata(), expected)
    assert [len(axes.lines) for axes in (knn, gap, loss)] == [4, 2, 2]


def test_plot_draws_given_panels_with_given_labels(tmp_path, figures):
    runs = {"with": [compare.read_run(place(name)) for name in WITH]}
    other = {f"run {i}": runs["with"][:1] for i in range(8)} | {"a label " * 30: runs["with"][:1]}
    panels = [("CIFAR-100", "kNN accuracy (%)", other), ("Gap", list(compare.QUANTITIES)[1], runs)]
    compare.plot(tmp_path / "page.png", [*panels, ("CIFAR-100", "loss (mean of the epoch)", other)])
    (figure,) = figures
    assert [axes.get_title() for axes in figure.axes] == ["CIFAR-100", "Gap", "CIFAR-100"]
    looks = [(line.get_color(), line.get_marker()) for line in figure.axes[2].lines]
    assert len(set(looks)) == len(looks) == 9  # more than there are colours
    assert looks == [(line.get_color(), line.get_marker()) for line in figure.axes[0].lines[::2]]
    box = figure.legends[0].get_window_extent()
    assert 0 < box.x0 < box.x1 < compare.WIDTH
    assert box.y0 > 0
    compare.plot(tmp_path / "page.png", panels[1:], curves="[1, 2]")
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.text["curves"] == "[1, 2]"
        assert picture.width == compare.WIDTH


def test_without_matplotlib_only_the_picture_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert rows(*WITH)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        compare.main([str(place(WITH[0])), "--plot", str(tmp_path / "x.png")])
    out, err = capsys.readouterr()
    remedy = "python -m pip install --upgrade matplotlib"
    assert err == f"error: --plot needs matplotlib: {remedy}\n"
    assert (out, list(tmp_path.iterdir())) == ("", [])


def test_an_old_matplotlib_is_told_in_a_line(monkeypatch):
    monkeypatch.setattr(compare.load_matplotlib(), "__version_info__", (3, 6, 3))
    with pytest.raises(common.UserError, match="--plot needs matplotlib 3.7 or newer"):
        compare.load_matplotlib()


@pytest.mark.parametrize("name", ["lr $1^2", "$a_{b$", "x^2_y", "$$", r"a\frac"])
def test_a_name_is_drawn_as_it_is(name, tmp_path, figures):
    runs = {name: [compare.read_run(place(WITH[0]))]}
    compare.plot(tmp_path / "x.png", [("", "kNN accuracy (%)", runs)])
    (figure,) = figures
    text = figure.legends[0].get_texts()[0].get_text()
    assert text.replace(r"\$", "$") == name


# --------------------------------------------------------------------------------------- mistakes


def damaged(text):
    """-> what writes a run folder with this log."""

    def write(tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run/log.jsonl").write_text(text)
        return [str(tmp_path / "run")]

    return write


HEAD = json.dumps(records(WITH[0])[0])
GOOD = str(place(WITH[0]))


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (lambda tmp: [], "required: RUN (see python docs/compare.py --help)"),
        (lambda tmp: [str(tmp / "no")], "name a run's folder, such as runs/ressl-textures"),
        (lambda tmp: [GOOD, str(RESULTS)], "name a run's folder"),
        (damaged(""), "name a run's folder"),
        (damaged("[1]\n"), "is damaged"),
        (damaged('{"arguments": {"x": 1}}\n'), "name a run's folder"),
        (damaged("{\n"), "is damaged"),
        (damaged(f'{HEAD}\n{{"epoch": 0}}\n{{"epoch": 2}}\n'), "leave it out"),
        (lambda tmp: [GOOD, "--plot", str(tmp / "no/x.png")], "give NAME.png in an existing"),
        (lambda tmp: [GOOD, "--plot", str(tmp / "x.pdf")], "give NAME.png in an existing"),
        (lambda tmp: [GOOD, "--csv", str(tmp / "no/x.csv")], "give NAME.csv in an existing"),
        (lambda tmp: [GOOD, "--csv", f"{GOOD}/log.jsonl"], "give NAME.csv in an existing"),
    ],
)
def test_a_mistake_is_one_line_with_its_remedy(tmp_path, capsys, arguments, remedy):
    with pytest.raises(SystemExit, match="2"):
        compare.main(arguments(tmp_path))
    out, err = capsys.readouterr()
    assert out == ""  # before any work
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert remedy in err


def test_a_run_without_epochs_cannot_be_drawn(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        compare.main([*damaged(HEAD)(tmp_path), "--plot", str(tmp_path / "x.png")])
    assert "nothing to draw" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()
