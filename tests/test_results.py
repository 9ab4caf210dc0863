"""The pages' figures are those of the logs, links lead somewhere, and what is said holds.

What a reader would miss: a figure, a table or a picture that is not the logs' (any changed digit is
noticed); a row that claims another command; a run that is incomplete, of changed code, or in no
table; a result typed by hand; a sentence that draws from the tables what they do not show.
"""

import json
import math
import re
import shutil
import statistics

import bench
import ceiling
import compare
import curves
import pytest
import results
import torch
from PIL import Image

import common


@pytest.fixture(scope="module")
def pages():
    return results.read_pages()


def test_the_pages_agree_with_the_logs(pages):
    assert results.disagreements(pages) == [], "run python docs/results.py"


def test_the_front_page_is_short(pages):
    text = next(text for path, text in pages.items() if path.name == "README.md")
    assert len(text.splitlines()) <= 170
    assert max(line.count("|") for line in text.splitlines() if line.startswith("|")) <= 7


def test_files_that_the_pages_name_are_there(pages):
    """In code, such as `docs/results/speed/bench.md`; a * stands for any letters."""
    root = results.ROOT
    named = set()
    for text in pages.values():
        named |= set(re.findall(r"`((?:docs|tests)/[^`\s]*)`", text))
    assert len(named) > 10
    for name in named:
        assert list(root.glob(name.rstrip("/").replace("NAME", "*"))), name


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
        assert kept.text["numbers"] == drawn.text["numbers"], "run python docs/curves.py"
        assert kept.size == drawn.size


@pytest.mark.parametrize("name", results.blocks())
def test_a_changed_digit_in_a_block_is_noticed(pages, name):
    pattern = re.compile(f"(?<=<!-- {name} -->).*?(?=<!-- end -->)", re.S)
    path = next(path for path, text in pages.items() if pattern.search(text))
    text = pages[path]
    digits = [i for i in range(*pattern.search(text).span()) if text[i].isdigit()]
    for i in (digits[0], digits[-1]):
        changed = text[:i] + str((int(text[i]) + 1) % 10) + text[i + 1 :]
        assert results.disagreements({**pages, path: changed})


@pytest.mark.parametrize("figure", ["71.4 % there", "**71.4** % of", "4.2x faster", "3.1 points"])
def test_a_result_outside_of_a_block_is_noticed(figure):
    assert results.unproven(f"It was {figure} in the end.")
    assert not results.unproven(f"<!-- a -->{figure}<!-- end --> or `{figure}`")


@pytest.mark.parametrize("text", ["<!-- mine -->99 %<!-- end -->", "<!-- hour -->", "<!--x-->"])
def test_a_wrong_block_is_noticed(pages, text):
    path, *_ = pages
    with pytest.raises(ValueError, match="each block needs"):
        results.disagreements({**pages, path: pages[path] + text})


@pytest.mark.parametrize("options", ["--lr 0.1", "--predictor", "--bn-splits 8", "--data cifar10"])
def test_a_row_cannot_claim_another_command(options):
    runs = results.find("ressl-textures-seed*", "ressl.py")
    assert [run.arguments["seed"] for run in runs] == [0, 1, 2]
    for command in (f"ressl.py {options}", "residual_momentum.py"):
        with pytest.raises(ValueError, match="was not made by"):
            results.find("ressl-textures-seed*", command)


def write_records(log, records):
    log.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.fixture
def log(tmp_path, monkeypatch):
    """A log in a copy of docs/results, which the pages' figures then come from."""
    shutil.copytree(results.RESULTS, tmp_path / "results")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(results, "blocks", results.blocks.__wrapped__)
    return tmp_path / "results" / "ressl" / "ressl-textures-seed1" / "log.jsonl"


def test_another_accuracy_or_folder_is_noticed(log, pages):
    shutil.copytree(log.parent, log.parent.with_name("ressl-textures-other-seed1"))
    assert results.disagreements(pages) == ["no row has ressl-textures-other-seed1"]
    *records, last = compare.read_records(log)
    write_records(log, [*records, {**last, "student_knn": last["student_knn"] + 3}])
    assert len(results.disagreements(pages)) > 1


@pytest.mark.parametrize(
    "change", [{"commit": "a6b7309-dirty"}, {"seed": 0}, {"lr": 0.07}, {"method": "other"}, {}]
)
def test_a_log_of_other_code_or_settings_is_refused(log, change):
    first, *records = compare.read_records(log)
    place = first if "commit" in change else first["arguments"]
    place.update(change)
    write_records(log, [first, *(records if change else records[:-1])])  # {}: cut short
    with pytest.raises(ValueError, match="was not made by"):
        results.find("ressl-textures-seed*", "ressl.py")


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
    few = lambda *given: [data.take(torch.arange(800)) for data in load(*given)]
    monkeypatch.setattr(common, "load_splits", few)
    options = ["--data", "textures", "--epochs", "4", "--batch-size", "40"]
    record = ceiling.main([*options, "--output", str(tmp_path / "run")])
    assert compare.read_records(tmp_path / "run" / "log.jsonl")[-1] == record
    assert record["top1"] > 50  # chance: 10
    assert record["student_knn"] > 50
    assert record["teacher_knn"] is None


def test_the_table_of_encoders_is_that_of_the_logs():
    lines = (results.RESULTS / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.count(" | ") == 5][1:]
    assert len(rows) == 6
    for name, _, epochs, *_, knn in rows:
        folder = results.RESULTS / "modified" / f"encoder-{name.strip('*')}"
        run = results.compare.read_run(folder)
        found = f"{run.at('student_knn', int(epochs)):.2f} / {run.at('teacher_knn'):.2f}"
        assert knn.strip("*") == found


# What the pages conclude: where one of these fails, a sentence has to say something else.


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


def test_words_on_forms_of_the_predictor():
    none, *forms = (results.predictor_runs(form, 0.04)[0] for form in results.PREDICTORS)
    assert all(run.at("student_knn") < none.at("student_knn") - 5 for run in forms)


def test_words_on_the_residual_predictor():
    for temp in (0.01, 0.02):
        (none,) = results.find(
            f"predictor-none-float32-temp{temp}-seed0", f"{results.TRIES} --teacher-temp {temp}"
        )
        (residual,) = results.find(
            f"modified/predictor-residual-no-batchnorm-temp{temp}-seed0",
            f"{results.TRIES} --teacher-temp {temp} --predictor",
        )
        for who in ("student_knn", "teacher_knn"):
            assert abs(none.at(who) - residual.at(who)) < 0.5  # "level"


def test_words_on_the_ablations():
    names = {name: options for options, name in results.ABLATIONS.items()}
    run = lambda name: results.ablation_runs(names[name])[0]
    knn = lambda name: run(name).at("student_knn")
    falls = lambda *names: all(knn(a) > knn(b) for a, b in zip(names, names[1:], strict=False))
    assert falls("temp0.02", "base", "temp0.07", "temp0.1")
    assert falls("momentum0.9", "base", "momentum0.996")
    assert 4 < knn("base") - knn("strong") < 5
    assert all(abs(knn(n) - knn("base")) < 1 for n in ("queue1024", "queue16384", "bn8"))
    assert falls("infonce2", "base", "infonce2-predictor")
    assert falls("infonce2-temp0.1", "infonce2-predictor-temp0.1", "temp0.1")
    assert all(knn(n) - knn("base") > 4 for n in ("batch64-lr0.03", "batch64-lr0.06"))
    laptop = knn("infonce2-batch64-lr0.06")  # the laptop's command, but for the epochs
    assert abs(knn("infonce1-batch64-lr0.06") - laptop) < 0.2  # "level"
    assert laptop - knn("batch64-lr0.06") == pytest.approx(3, abs=0.1)
    others = ("infonce2-batch64-lr0.03", "infonce2-batch32-lr0.03", "infonce5-batch64-lr0.03")
    assert all(abs(knn(n) - laptop) < 1 for n in others)
    assert falls("infonce10-batch64-lr0.03", "infonce10-batch128-lr0.06", "infonce10")
    assert falls("infonce10-batch64-lr0.03", "infonce10-batch32-lr0.015")
    assert all(
        falls("infonce10", f"infonce10-{n}") for n in ("strong", "lr0.12", "student-temp0.2")
    )
    assert falls("infonce10", "infonce5", "infonce2-temp0.1", "base")
    assert knn("infonce5") - knn("infonce2-temp0.1") > 3  # "well ahead"
    assert knn("infonce10") - knn("infonce5") < 1
    for name in ("temp0.1", "infonce2-temp0.1"):
        assert run(name).at("loss") == pytest.approx(math.log(4096), abs=0.05)
    best = max(names, key=knn)  # whose settings are the hour's
    (hour,) = results.find("ressl-cifar10-conv4-48epochs-infonce-seed0", results.HOUR)
    changed = {k for k, v in hour.arguments.items() if run(best).arguments[k] != v}
    assert changed <= {"epochs", "infonce_epochs", "holdout", "knn_every", "output"}


def way(runs, top):
    """The share of the way from random weights to training with labels, by kNN."""
    first, last = (statistics.mean(run.at("student_knn", e) for run in runs) for e in (0, 20))
    return (last - first) / (top.at("student_knn") - first)


def test_words_of_the_front_page():
    small = lambda pattern: results.find(pattern, results.SMALL[pattern])
    for data, low, high in (("cifar10", 0.44, 0.5), ("cifar100", 0.3, 0.38)):  # half; a third
        runs = small(f"ressl-{data}-conv4-20epochs-seed*")
        (top,) = small(f"ceiling-{data}-conv4-20epochs-seed*")
        assert low < way(runs, top) < high
        if data == "cifar10":
            laptop = small("ressl-cifar10-conv4-20epochs-laptop-seed*")
            assert way(laptop, top) == pytest.approx(0.6, abs=0.03)  # three fifths
    runs = [*small("ressl-textures-seed*")]
    runs += results.find("ressl-textures-plain-seed0", "ressl.py")
    runs += results.find("ressl-textures-plain-seed*", "ressl.py")
    assert all(run.at("student_knn") > 80 for run in runs)  # "more than 80"
    shown = results.find("ressl-textures-plain-seed0", "ressl.py")[0]
    assert shown.at("student_knn", 0) == pytest.approx(48, abs=1)


def pairs(place, base):
    """(without the term, with it), a pair a seed."""
    rows = [results.residual_runs(place, base, term) for term in ("none", "cosine")]
    return [*zip(*rows, strict=True)]


def test_words_on_the_term():
    found = {
        (p, base): pairs(p, base) for p in results.RESIDUAL_SETS for base in ("MoCo v3", "BYOL")
    }
    every = [pair for runs in found.values() for pair in runs]
    assert all(term.at("gap") < alone.at("gap") for alone, term in every)
    ahead = lambda pair, epoch=None: (
        pair[1].at("student_knn", epoch) > pair[0].at("student_knn", epoch)
    )
    large = [found["rm-cifar100-conv4-20epochs", base] for base in ("MoCo v3", "BYOL")]
    assert [ahead(pair, 4) for pair in large[0]] == [True] * 3
    assert [ahead(pair) for pair in large[0]] == [False] * 3
    (byol,) = large[1]
    assert all(ahead(byol, epoch) for epoch in (4, 8, 12, 16, 20))
    (kd,) = results.residual_runs("rm-cifar100-conv4-20epochs", "MoCo v3", "kd")
    assert kd.at("student_knn") == pytest.approx(large[0][0][0].at("student_knn"), abs=0.1)
    cifar10 = [found["rm-cifar10-conv4-5epochs", base] for base in ("MoCo v3", "BYOL")]
    assert [[ahead(pair) for pair in row] for row in cifar10] == [[False], [True]]
    noisy = found["rm-cifar10-conv4-20epochs-b64", "MoCo v3"]
    assert sorted(ahead(pair, 4) for pair in noisy) == [False, True, True]
    assert all(ahead(pair, epoch) for pair in noisy for epoch in (8, 12, 16, 20))
    for alone, term in noisy:
        assert 0.5 < term.at("student_knn") - alone.at("student_knn") < 1  # "half a point to one"
        assert 0 < alone.at("lead", 8) < 0.5
        assert alone.at("lead") < 0
    assert {ahead(pair) for pair in found["rm-textures", "MoCo v3"]} == {False, True}
    for alone, term in found["rm-textures", "BYOL"]:
        assert ahead((alone, term))
        assert alone.at("student_knn") < 65  # MoCo v3: 88
        assert alone.at("lead") < -5
    most = max(every, key=lambda pair: pair[1].at("student_knn") - pair[0].at("student_knn"))
    assert most in found["rm-textures", "BYOL"]


def test_words_on_the_term_where_steps_are_noisy():
    probed = 0
    for alone, run in pairs(results.MOST, "MoCo v3"):
        change = [run.at("student_knn", e) - alone.at("student_knn", e) for e in (4, 8, 12, 16, 20)]
        assert min(change) > 0
        assert 0.9 < change[-1] < 2.6  # "one to two and a half"
        assert 0 < alone.at("lead", 8) < 1
        assert all(abs(alone.at("lead", e)) < 0.5 for e in (12, 16, 20))
        assert abs(run.at("lead")) < 0.5
        probes = [results.compare.linear(x, schedule="cosine", lr=1.0) for x in (run, alone)]
        if None not in probes:
            probed += 1
            assert all(probes[0][head] > probes[1][head] for head in results.HEADS)
    assert probed == 3


def test_words_on_the_controls():
    alone = results.residual_runs(results.MOST, "MoCo v3", "none")
    kd = results.residual_runs(results.MOST, "MoCo v3", "kd")
    found = results.changes(kd, alone)
    assert {x > 0 for x in found} == {False, True}
    assert max(map(abs, found)) < 1
    projector = results.residual_runs(results.MOST, *results.PROJECTORS)
    assert all(-3 < x < -1.5 for x in results.changes(projector, alone))
    assert all(better(projector, alone, "gap"))
    byol = pairs(results.MOST, "BYOL")
    assert len(kd) == len(projector) == len(byol) == 3
    found = results.changes(*reversed([*zip(*byol, strict=True)]))
    assert all(3 < x < 4 for x in found)
    moco = pairs(results.MOST, "MoCo v3")[: len(byol)]
    for i, low, high in ((0, 2.5, 3.5), (1, 1, 2)):  # without the term, with it
        knn = [[pair[i].at("student_knn") for pair in base] for base in (moco, byol)]
        assert low < statistics.mean(knn[0]) - statistics.mean(knn[1]) < high


def test_words_on_the_term_in_ressl():
    ends = []
    for alone, run in zip(*map(results.plugged_runs, ("without", "with")), strict=True):
        assert all(r.at("lead", e) > 0 for r in (alone, run) for e in (4, 8, 12, 16, 20))
        change = [run.at("student_knn", e) - alone.at("student_knn", e) for e in (4, 8, 20)]
        assert all(0 < x <= 1.5 for x in change[:2])
        ends.append(change[2])
    assert {end > 0 for end in ends} == {False, True}
    assert max(map(abs, ends)) < 1
    assert abs(statistics.mean(ends)) < statistics.stdev(ends)  # "cannot tell that from nothing"


def test_words_on_the_premise():
    runs = {label: results.premise_runs(label)[0] for label in results.PREMISE}
    leads = {label: results.leads(run) for label, run in runs.items()}
    ahead = {label: [e for e, lead in by.items() if lead > 0] for label, by in leads.items()}
    assert all(lead < 0 for label, by in leads.items() if "256" in label for lead in by.values())
    middle = [*leads["batch 128, lr 0.03"].values()]
    assert sorted(lead < 0 for lead in middle) == [False] + [True] * 5
    assert max(middle) == pytest.approx(0, abs=0.01)
    noisiest = ("batch 64, lr 0.12", "batch 32, lr 0.03")
    for label in (*noisiest, "batch 32, lr 0.0075"):
        assert len(ahead[label]) in (2, 3)
        assert max(leads[label].values()) < 1
    assert len(ahead["batch 64, lr 0.06, m constant"]) == 1
    assert all(by[12] <= 0.05 for by in leads.values())
    knn = {x: run.at("student_knn") for x, run in runs.items() if "constant" not in x}
    best = max(knn, key=knn.get)
    assert best == "batch 64, lr 0.06"
    assert all(0 < knn[best] - knn[label] < 1 for label in noisiest)
    assert all(lead <= 0 for lead in leads[best].values())


def test_words_on_the_gpu():
    """About half of a median step of the run the GPU waits; most of a profiled one."""
    told = results.on_gpu()
    (middle,) = re.findall(r"median (\d+\.\d):", told)
    profiled = re.findall(r"took (\S+) to \S+ ms and kept the GPU busy for (\d+\.\d)", told)
    assert float(profiled[0][1]) / float(middle) == pytest.approx(0.5, abs=0.05)
    assert all(float(busy) < float(whole) / 2 for whole, busy in profiled)
    assert len(profiled) == 2


def test_words_on_speed():
    speed = (results.RESULTS / "speed/bench-cpu.md").read_text(encoding="utf-8")
    cells = [line.split(" | ") for line in speed.splitlines() if " step, " in line]
    ratios = {row[0].strip("| "): float(row[3].split()[0]) for row in cells if "bare" in row[2]}
    goals = {"float32": 1.10, "bfloat16": 1.15}
    missed = {name for name, ratio in ratios.items() if ratio > goals[name.split(", ")[-1]]}
    ended = re.findall(r"\| (\d+\.\d) % after (\d+) epochs, ([\d,]+) s", speed)
    usual, here, laptop = [(float(knn), int(e), int(s.replace(",", ""))) for knn, e, s in ended]
    *_, (options, usual_pipeline) = bench.RECIPES.values()  # the row of the laptop's command
    assert " ".join([results.SMALL_RUN, *options]) == results.LAPTOP
    assert not usual_pipeline
    assert laptop[0] >= 60
    assert laptop[2] < here[2]
    assert [(round(knn), e) for knn, e, _ in (usual, here)] == [(56, 20)] * 2
    assert laptop[2] / laptop[1] > here[2] / here[1]  # "an epoch takes longer"
    assert len(ratios) == 8
    assert missed == {
        "ReSSL step, conv4, float32",
        "ReSSL step, conv4, bfloat16",
        "Residual Momentum step, conv4, bfloat16",
        "Residual Momentum step, resnet18, float32",
    }
