"""The README's figures are those of the logs, and a changed digit is noticed."""

import json
import re
import shutil

import ceiling
import curves
import pytest
import results
from PIL import Image

import common


@pytest.fixture(scope="module")
def readme():
    return results.README.read_text(encoding="utf-8")


def test_the_readme_agrees_with_the_logs(readme):
    assert results.disagreements(readme) == [], "run python tests/results.py"


def test_the_curves_are_those_of_the_logs():
    with Image.open(curves.CURVES) as picture:
        assert json.loads(picture.text["curves"]) == curves.curves()


def test_the_curves_are_drawn(tmp_path):
    curves.draw(tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (400 * len(curves.PANELS), 480)
        colours = {colour for _, colour in picture.getcolors(1 << 20)}
        assert {curves.BLUE, curves.ORANGE, (255, 255, 255)} <= colours
        assert json.loads(picture.text["curves"]) == curves.curves()


@pytest.mark.parametrize("name", results.blocks())
def test_a_changed_digit_in_a_block_is_noticed(readme, name):
    block = re.search(f"(?<=<!-- {name} -->).*?(?=<!-- end -->)", readme, re.S)
    digits = [i for i in range(*block.span()) if readme[i].isdigit()]
    for i in digits[:: max(1, len(digits) // 4)]:
        changed = readme[:i] + str((int(readme[i]) + 1) % 10) + readme[i + 1 :]
        assert results.disagreements(changed)


def test_a_changed_digit_in_a_sentence_is_noticed(readme):
    for claim in results.claims():
        found = re.search(r"\s+".join(map(re.escape, claim.split())), readme)
        assert found, claim
        i = next(i for i in range(*found.span()) if readme[i] in "123456789")
        changed = readme[:i] + "0" + readme[i + 1 :]
        assert results.disagreements(changed), claim


@pytest.mark.parametrize(
    "figure",
    ["kNN reached 71.4 % there.", "A run took 12 min.", "It adds 3 points.", "gained 2 %."],
)
def test_a_figure_without_a_log_is_noticed(readme, figure):
    assert results.disagreements(readme.replace("## Data\n", f"{figure}\n\n## Data\n"))


def test_others_figures_need_no_log(readme):
    quoted = "The paper has 71.4 % [recalled].\n\n## Data\n"
    assert results.disagreements(readme.replace("## Data\n", quoted)) == []


def test_a_row_cannot_claim_another_command():
    runs = results.runs_of("ressl-textures-seed?", "ressl.py")
    assert [run.arguments["seed"] for run in runs] == [0, 1, 2]
    for command in ("ressl.py --lr 0.1", "ressl.py --amp off", "residual_momentum.py"):
        with pytest.raises(ValueError, match="was not made by"):
            results.runs_of("ressl-textures-seed?", command)


def test_a_changed_or_unfinished_log_is_noticed(tmp_path, monkeypatch, readme):
    folder = tmp_path / "results"
    for cached in (results.blocks, results.claims, results.machines):
        monkeypatch.setattr(results, cached.__name__, cached.__wrapped__)
    shutil.copytree(results.RESULTS, folder)
    monkeypatch.setattr(results, "RESULTS", folder)
    assert results.disagreements(readme) == []
    log = folder / "ressl-textures-seed1" / "log.jsonl"
    records = common.read_records(log)
    changed = {**records[-1], "student_knn": records[-1]["student_knn"] + 3}
    common.write_records(log, [*records[:-1], changed])
    assert results.disagreements(readme)
    common.write_records(log, records[:-1])
    with pytest.raises(ValueError, match="not a complete run"):
        results.disagreements(readme)


def test_the_command_mends_the_readme_and_says_so(tmp_path, monkeypatch, capsys, readme):
    copy = tmp_path / "README.md"
    copy.write_text(readme.replace("| not run |", "| 97.3 |", 1), encoding="utf-8")
    monkeypatch.setattr(results, "README", copy)
    assert results.main() == 1
    assert "97.3" in capsys.readouterr().out
    assert copy.read_text(encoding="utf-8") == readme
    assert results.main() == 0


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
    assert results.spread([59.15]) == "59.1"
    assert results.spread([1, 2, 3]) == "2.0 ± 1.0"
    assert results.spread([-0.02, -0.04], 1) == "0.0 ± 0.0"
    assert results.spread([0.04591, 0.0461], 4) == "0.0460 ± 0.0001"


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (16.2, 31.7, [15, 20, 25, 30, 35]), (0.03, 0.76, None)],
)
def test_ticks_are_round_and_hold_the_values(low, high, marks):
    found = curves.ticks(low, high)
    assert found[0] <= low < high <= found[-1]
    assert 3 <= len(found) <= 8
    assert marks is None or found == pytest.approx(marks)
