"""The README's figures are those of the logs, and a changed digit is noticed."""

import dataclasses
import math
import re
import shutil
import statistics

import ceiling
import curves
import pytest
import results
from PIL import Image

import common


@pytest.fixture(scope="module")
def pages():
    return results.read_pages()


def with_text(pages, change, name="README.md"):
    """The pages, one of them changed."""
    return {p: change(text) if p.name == name else text for p, text in pages.items()}


def test_the_pages_agree_with_the_logs(pages):
    assert results.disagreements(pages) == [], "run python tests/results.py"


def test_the_front_page_is_short(pages):
    text = next(text for path, text in pages.items() if path.name == "README.md")
    assert len(text.splitlines()) <= 170
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert max(row.count("|") - 1 for row in rows) <= 6


def test_links_lead_somewhere(pages):
    """Every relative link of every page, and every heading in it."""
    slug = lambda title: re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
    for path, text in pages.items():
        for link in re.findall(r"\]\((?!http)([^)\s]+)\)", text):
            file, _, heading = link.partition("#")
            target = path.parent / file if file else path
            assert target.exists(), (path.name, link)
            if heading:
                titles = re.findall(r"(?m)^#+ (.*)$", target.read_text(encoding="utf-8"))
                assert heading in map(slug, titles), (path.name, link)


@pytest.mark.parametrize("file", curves.PICTURES)
def test_the_pictures_are_those_of_the_logs(file, tmp_path):
    """What they carry as text is; that it is also what they show, is tests/test_compare.py's."""
    curves.draw(file, tmp_path)
    with Image.open(curves.DOCS / file) as kept, Image.open(tmp_path / file) as drawn:
        assert kept.text["curves"] == drawn.text["curves"], "run python tests/curves.py"
        assert kept.size == drawn.size


@pytest.mark.parametrize("name", results.blocks())
def test_a_changed_digit_in_a_block_is_noticed(pages, name):
    pattern = re.compile(f"(?<=<!-- {name} -->).*?(?=<!-- end -->)", re.S)
    path = next(path for path, text in pages.items() if pattern.search(text))
    text = pages[path]
    digits = [i for i in range(*pattern.search(text).span()) if text[i].isdigit()]
    for i in digits[:: max(1, len(digits) // 4)]:
        changed = text[:i] + str((int(text[i]) + 1) % 10) + text[i + 1 :]
        assert results.disagreements({**pages, path: changed})


@pytest.mark.parametrize(
    "figure",
    [
        "kNN was 71.4 % there.",
        "A run took 12 min.",
        "It adds 3 points [authors].",
        "gained 2 percent.",
        "It is 3 times faster",
        "with 7.5x the images and 9 GB",
        "```\nepoch 9/20  kNN student 73.12 %\n```",
        "`73.1 %` is what it got",
        "a loss of 6.78",
        "with a gap of .0123",
        "the gap is at 0.123",  # which begins as a setting does
        "**71** % of them",
        "by 73-percent",
        "5.9-fold",
        "```bash\npython ressl.py  # 12 min\n```",
    ],
)
def test_a_figure_outside_is_noticed(pages, figure):
    for name in ("README.md", "help.md"):
        added = lambda text: text.replace("\n\n## ", f"\n\n{figure}\n\n## ", 1)
        assert results.disagreements(with_text(pages, added, name))


@pytest.mark.parametrize(
    "text", ["<!-- mine -->99 %<!-- end -->", "<!-- hour -->", "<!-- end -->", "<!--x-->"]
)
def test_a_wrong_block_is_noticed(pages, text):
    with pytest.raises(ValueError, match="each block needs"):
        results.disagreements(with_text(pages, lambda page: page + text))


@pytest.mark.parametrize(
    "command",
    [
        "ressl.py --lr 0.1",
        "ressl.py --amp off",
        "ressl.py --predictor --infonce-epochs 3",  # which these logs did not know yet
        "ressl.py --bn-splits 8",
        "ressl.py --data cifar10",
        "residual_momentum.py",
    ],
)
def test_a_row_cannot_claim_another_command(command):
    runs = results.find("ressl-textures-seed*", "ressl.py")
    assert [run.arguments["seed"] for run in runs] == [0, 1, 2]
    with pytest.raises(ValueError, match="was not made by"):
        results.find("ressl-textures-seed*", command)


# What the README says in words: where one of these fails, it has to say something else.


def better(runs, than, key="student_knn"):
    """Seed by seed, whether the student's kNN, or another value at the end, is higher."""
    others = {run.arguments["seed"]: run.at(key) for run in than}
    values = {run.arguments["seed"]: run.at(key) for run in runs}
    return [value > others[seed] for seed, value in values.items() if seed in others]


def test_words_on_the_extended_version():
    for temp in results.TEMPERATURES:
        plain, warm, predictor = (results.extended_runs(temp, v) for v in results.EXTENDED)
        assert all(better(warm, than=plain))
        assert all(better(warm, than=predictor))
        expected = {0.02: {False}, 0.1: {True}}.get(temp, {False, True})
        assert set(better(predictor, than=plain)) == expected
    assert all(run.at("loss") > math.log(2048) - 0.01 for run in plain)  # at 0.1, the last


def ablation(name):
    (options,) = (options for options, known in results.ABLATIONS.items() if known == name)
    return results.find(f"ablation-{name}-seed0", f"{results.SHORT} {options}")


def test_words_on_the_warm_up_on_cifar10():
    names = ("temp0.1", "base", "infonce2-temp0.1", "infonce5", "infonce10")
    order = [ablation(name) for name in names]
    assert all(better(b, than=a) == [True] for a, b in zip(order, order[1:], strict=False))
    (warm,), (half,), (whole,) = ([run.at("student_knn") for run in runs] for runs in order[2:])
    assert half - warm > 3  # "well ahead"
    assert whole - half < 1
    for runs in (order[0], order[2]):
        assert runs[0].at("loss") == pytest.approx(math.log(4096), abs=0.05)


def test_words_on_the_ablations():
    knn = lambda name: ablation(name)[0].at("student_knn")
    falls = lambda *names: all(knn(a) > knn(b) for a, b in zip(names, names[1:], strict=False))
    assert falls("temp0.02", "base", "temp0.07", "temp0.1")
    assert falls("momentum0.9", "base", "momentum0.996")
    assert 4 < knn("base") - knn("strong") < 5
    assert all(abs(knn(n) - knn("base")) < 1 for n in ("queue1024", "queue16384", "bn8"))
    assert falls("infonce2", "base", "infonce2-predictor")
    assert falls("infonce2-temp0.1", "infonce2-predictor-temp0.1", "temp0.1")
    assert better(ablation("batch64-lr0.03"), than=ablation("base")) == [True]
    sizes = ("infonce10", "infonce10-batch128-lr0.06", "infonce10-batch64-lr0.03")
    for larger, smaller in zip(sizes, sizes[1:], strict=False):
        assert better(ablation(smaller), than=ablation(larger)) == [True]
    assert better(ablation("infonce10-batch32-lr0.015"), than=ablation(smaller)) == [False]
    for worse in ("strong", "lr0.12", "student-temp0.2"):
        assert better(ablation(f"infonce10-{worse}"), than=ablation("infonce10")) == [False]


def test_words_on_the_hour():
    every = [run for name in results.ABLATIONS.values() for run in ablation(name)]
    best = max(every, key=lambda run: run.at("student_knn"))
    (hour,) = results.find("ressl-cifar10-conv4-48epochs-infonce-seed0", results.HOUR)
    changed = {key for key, value in hour.arguments.items() if best.arguments[key] != value}
    assert changed <= {"epochs", "infonce_epochs", "holdout", "knn_every", "output"}
    for run in (best, hour):
        assert run.arguments["infonce_epochs"] == run.arguments["epochs"]
    assert sum(epoch["seconds"] for epoch in hour.epochs) < 3600
    for pattern, command in results.SMALL:
        if command.startswith("ressl.py --data cifar10 ") and command != results.HOUR:
            for run in results.find(pattern, command):
                assert run.at("student_knn") < hour.at("student_knn")


def test_words_of_the_front_page():
    shares = {
        "cifar10": (results.LAPTOP, 5, 0.44, 0.5),
        "cifar100": (results.CIFAR100, 8, 0.3, 0.38),
    }
    for data, (command, top_row, low, high) in shares.items():  # nearly half; a third
        runs = results.find(f"ressl-{data}-conv4-20epochs-seed*", command)
        (top,) = results.find(*results.SMALL[top_row])
        first, last = (statistics.mean(run.at("student_knn", e) for run in runs) for e in (0, 20))
        assert low < (last - first) / (top.at("student_knn") - first) < high
    runs = [*results.find("ressl-textures-seed*", "ressl.py")]
    runs += results.find("ressl-textures-console-seed0", "ressl.py")
    assert all(run.at("student_knn") > 86 for run in runs)  # about 90
    assert runs[-1].at("student_knn", 0) == pytest.approx(48, abs=1)


NOISY, *PLACES = results.RESIDUAL_SETS


@pytest.mark.parametrize("place", PLACES)
def test_words_on_the_term(place):
    runs = {row: results.residual_runs(place, *row) for row in results.RESIDUAL}
    for row in runs.values():
        assert all(run.at("student_knn") > run.at("teacher_knn") for run in row)
    for base in ("MoCo v3", "BYOL"):
        assert all(better(runs[base, "none"], runs[base, "cosine"], "gap"))
    assert all(better(runs["BYOL", "cosine"], than=runs["BYOL", "none"]))
    term, without, kd = (runs["MoCo v3", name] for name in ("cosine", "none", "kd"))
    if place == "rm-textures":
        assert set(better(term, than=without)) == {False, True}
        assert all(better(without, kd, "gap"))
        assert all(better(kd, term, "gap"))
        mean = lambda row: statistics.mean(run.at("student_knn") for run in row)
        assert mean(kd) == pytest.approx(mean(without), abs=0.1)
    else:
        seeds = {"rm-cifar10-conv4-5epochs": 1, "rm-cifar100-conv4-20epochs": 3}[place]
        assert better(term, than=without) == [False] * seeds
        assert len(kd) == (place == "rm-cifar100-conv4-20epochs")
        for run in kd:  # "much less": not by a third as much
            assert run.at("student_knn") == pytest.approx(without[0].at("student_knn"), abs=0.1)
            narrowed = [without[0].at("gap") - other.at("gap") for other in (run, term[0])]
            assert 0 < narrowed[0] < narrowed[1] / 3
        byol = [runs["BYOL", name][0].at("student_knn") for name in ("none", "cosine")]
        assert 0 < byol[1] - byol[0] < 1
        knn = ([run.at("student_knn") for run in row] for row in (term, without))
        changes = [x - y for x, y in zip(*knn, strict=True)]
        assert len(changes) == 1 or abs(statistics.mean(changes)) < statistics.stdev(changes)


def test_words_on_the_premise():
    runs = {label: results.premise_runs(label)[0] for label in results.PREMISE}
    leads = {label: results.leads(run) for label, run in runs.items()}
    ahead = {label: [e for e, lead in by.items() if lead > 0] for label, by in leads.items()}
    noisiest = ("batch 64, lr 0.12", "batch 32, lr 0.03")
    assert {label for label in ahead if ahead[label]} <= {*noisiest, "batch 64, lr 0.015"}
    for label in noisiest:
        assert {4, 6} <= set(ahead[label]) <= {2, 4, 6}
        assert max(leads[label].values()) < 1
    assert all(by[12] <= 0.05 for by in leads.values())
    assert all(lead < 0 for label, by in leads.items() if "256" in label for lead in by.values())
    best = max(runs, key=lambda label: runs[label].at("student_knn"))
    assert best == "batch 64, lr 0.06"
    assert all(lead <= 0 for lead in leads[best].values())


def test_words_on_speed():
    cells = [line.split(" | ") for line in results.speed().splitlines() if " step, " in line]
    ratios = {row[0].strip("| "): float(row[3].split()[0]) for row in cells if "bare" in row[2]}
    goals = {"float32": 1.10, "bfloat16": 1.15}
    missed = {name for name, ratio in ratios.items() if ratio > goals[name.split(", ")[-1]]}
    assert missed == {
        "ReSSL step, conv4, float32",
        "ReSSL step, conv4, bfloat16",
        "Residual Momentum step, conv4, bfloat16",
        "Residual Momentum step, resnet18, float32",
    }
    assert len(ratios) == 8


def test_the_table_of_encoders_is_that_of_the_logs():
    lines = (results.RESULTS / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.count(" | ") == 5][1:]
    assert len(rows) == 6
    for name, _, epochs, *_, knn in rows:
        run = results.read_run(results.RESULTS / "modified" / f"encoder-{name.strip('*')}")
        assert run.arguments["epochs"] == int(epochs)
        found = f"{run.at('student_knn'):.2f} / {run.at('teacher_knn'):.2f}"
        assert knn.strip("*") == found


@pytest.fixture
def log(tmp_path, monkeypatch):
    """A log in a copy of docs/results, which the README's figures then come from."""
    shutil.copytree(results.RESULTS, tmp_path / "results")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    for cached in (results.blocks, results.machines):
        monkeypatch.setattr(results, cached.__name__, cached.__wrapped__)
    return tmp_path / "results" / "ressl-textures-seed1" / "log.jsonl"


def test_another_accuracy_in_a_log_is_noticed(log, pages):
    *records, last = common.read_records(log)
    common.write_records(log, [*records, {**last, "student_knn": last["student_knn"] + 3}])
    assert results.disagreements(pages)


def test_a_folder_in_no_row_is_noticed(log, pages):
    shutil.copytree(log.parent, log.parent.with_name("ressl-textures-other-seed1"))
    assert results.disagreements(pages) == ["no row has ressl-textures-other-seed1"]


def test_a_log_with_a_hole_is_refused(log, pages):
    records = common.read_records(log)
    common.write_records(log, records[:5] + records[6:])
    with pytest.raises(ValueError, match="not a complete run"):
        results.disagreements(pages)


@pytest.mark.parametrize(
    "change", [{"commit": "a6b7309-dirty"}, {"seed": 0}, {"lr": 0.07}, {"method": "other"}]
)
def test_a_log_of_other_code_or_settings_is_refused(log, pages, change):
    first, *records = common.read_records(log)
    place = first if "commit" in change else first["arguments"]
    place.update(change)
    common.write_records(log, [first, *records])
    with pytest.raises(ValueError, match="was not made by"):
        results.disagreements(pages)


def test_a_folder_of_another_seed_is_refused(log):
    log.parent.rename(log.parent.with_name("ressl-textures-seed10"))
    with pytest.raises(ValueError, match="see .'seed'"):
        results.find("ressl-textures-seed*", "ressl.py")


def test_only_the_runs_own_probe_counts():
    (run,) = results.find("ressl-cifar10-conv4-20epochs-bf16-seed0", results.LAPTOP)
    probe = run.probe()
    assert probe["top1"] == 62.34
    for change in (
        {"subset": 500},
        {"branch": "teacher"},
        {"epoch": 10},
        {"lr": 3.0},
        {"data": "cifar100"},
        {"commit": "a6b7309-dirty"},
    ):
        run.evals.append({**probe, **change, "top1": 99.0})
    assert run.probe() == probe
    unprobed = dataclasses.replace(run, evals=[])
    assert results.linear([run]) == "62.3 / 57.9 / 59.0 (10 epochs)"
    assert results.linear([run, unprobed]) == "62.3 / 57.9 / 59.0 (10 epochs; seeds 0)"
    run.evals[:] = [e for e in run.evals if e["evaluation"] == "knn"]
    assert run.probe() is None
    assert results.linear([run, unprobed]) == "not run"


def test_the_command_mends_the_pages_and_says_so(tmp_path, capsys, pages):
    (tmp_path / "docs").mkdir()
    for path, text in pages.items():
        text = re.sub(r"<!-- hour -->.*?<!-- end -->", "<!-- hour -->97.3 %<!-- end -->", text)
        (tmp_path / path.relative_to(results.ROOT)).write_text(text, encoding="utf-8")
    assert results.main(tmp_path) == 1
    assert "97.3" in capsys.readouterr().out
    assert list(results.read_pages(tmp_path).values()) == list(pages.values())
    assert results.main(tmp_path) == 0


def test_the_ceiling_learns_and_keeps_a_log(tmp_path, monkeypatch):
    load = common.load_splits
    few = lambda *given: [data.take(slice(0, 800)) for data in load(*given)]
    monkeypatch.setattr(common, "load_splits", few)
    options = ["--data", "textures", "--epochs", "4", "--batch-size", "40"]
    record = ceiling.main([*options, "--output", str(tmp_path / "run")])
    run = results.read_run(tmp_path / "run")
    assert run.epochs[-1] == record
    assert run.arguments["method"] == "ceiling"
    assert record["top1"] > 50  # chance: 10
    assert record["student_knn"] > 50
    assert record["teacher_knn"] is None


def test_spread_is_mean_and_standard_deviation():
    assert results.spread([59.25]) == "59.2"
    assert results.spread([1, 2, 3]) == "2.0 ± 1.0"
    assert results.spread([-0.02, -0.04], 1) == "0.0 ± 0.0"
    assert results.spread([0.04591, 0.0461], 4) == "0.0460 ± 0.0001"
