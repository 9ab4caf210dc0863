"""The exercises' checks accept each right answer and reject each wrong one.

An answer is a patch, tests/exercises/answers/NAME/*.patch. It is applied to a copy of the scripts,
and the check of that name is run there. One process serves all answers of an exercise, since to
import torch takes longer than a check: between two of them it forgets what it imported from a copy.
"""

import contextlib
import io
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    not {"CI", "EXERCISES"} & os.environ.keys(), reason="a minute: EXERCISES=1 python -m pytest"
)
ROOT = pathlib.Path(__file__).parent.parent
EXERCISES = ROOT / "tests" / "exercises"
ANSWERS = EXERCISES / "answers"
SCRIPTS = ("common", "ressl", "residual_momentum", "linear_eval", "knn_eval")
TINY = "--subset 96 --holdout 40 --batch-size 16 --epochs 2 --knn-every 2"
# The script that an exercise changes, and what its answer needs on the command line
RUNS = {
    "cosine_momentum": ("ressl", ""),
    "encoder_residual": ("residual_momentum", ""),
    "nnclr": ("ressl", "--infonce-epochs 2"),
    "own_pair": ("ressl", ""),
    "relational_residual": ("residual_momentum", "--residual relation"),
    "solarize": ("ressl", ""),
    "symmetric": ("ressl", ""),
}


def copied(patch, folder):
    """The scripts and the exercises' checks, with the patch applied, in a new folder."""
    (folder / "tests").mkdir(parents=True)
    for name in SCRIPTS:
        shutil.copy(ROOT / f"{name}.py", folder)
    shutil.copy(ROOT / "tests" / "conftest.py", folder / "tests")
    without = shutil.ignore_patterns("answers", "__pycache__")
    shutil.copytree(EXERCISES, folder / "tests" / "exercises", ignore=without)
    # A repository around the folder would make git pass over what the patch names
    alone = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = ["git", "apply", "--verbose", "--ignore-whitespace", str(patch)]
    done = subprocess.run(command, cwd=folder, env=alone, capture_output=True, text=True)
    changed = [
        n for n in SCRIPTS if (ROOT / f"{n}.py").read_text() != (folder / f"{n}.py").read_text()
    ]
    assert done.returncode == 0, f"{patch} no longer applies: {done.stderr}"
    assert changed, f"{patch} changes none of the scripts"
    return folder


# ------------------------------------------------------------------- in the process that checks


class Outcomes:
    """A pytest plugin: the outcome of each test, and the first line of why it failed."""

    def __init__(self):
        self.outcomes = []

    def pytest_collectreport(self, report):
        if report.failed:
            self.outcomes.append(("not collected", str(report.longrepr)))

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            crash = getattr(report.longrepr, "reprcrash", None)
            words = crash.message if crash else str(report.longrepr or "")
            self.outcomes.append((report.outcome, words.partition("\n")[0]))


def check(folder, exercise, run):
    """Run an exercise's check in `folder`, and its script if `run` -> outcomes, final metrics."""
    for name in [*SCRIPTS, "drive", "conftest", f"test_{exercise}"]:
        sys.modules.pop(name, None)
    kept, outcomes, metrics = list(sys.path), Outcomes(), None
    os.chdir(folder)
    arguments = [f"tests/exercises/test_{exercise}.py", f"--rootdir={folder}", "-q"]
    try:
        pytest.main([*arguments, "-p", "no:cacheprovider"], [outcomes])
        if run:
            script, options = RUNS[exercise]
            sys.path.insert(0, str(folder))
            module = __import__(script)
            assert pathlib.Path(module.__file__).parent == folder
            metrics = module.main([*f"{TINY} {options}".split(), "--output", "run"])
    finally:
        sys.path[:] = kept
    return outcomes.outcomes, metrics


def check_all(exercise, folder):
    """Check every copy in `folder`; print a line of JSON."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        results = {
            copy.name: check(copy, exercise, copy.name == "right")
            for copy in sorted(pathlib.Path(folder).iterdir())
        }
    print(said.getvalue(), file=sys.stderr)
    print(json.dumps(results))


# ------------------------------------------------------------------------------------- the tests


def test_every_exercise_has_a_check_and_answers():
    checks = {path.stem.removeprefix("test_") for path in EXERCISES.glob("test_*.py")}
    assert checks == set(RUNS) == {path.name for path in ANSWERS.iterdir() if path.is_dir()}
    for exercise in RUNS:
        patches = {path.stem for path in (ANSWERS / exercise).glob("*.patch")}
        assert "right" in patches
        assert len([name for name in patches if name.startswith("wrong-")]) >= 3


@pytest.mark.parametrize("exercise", RUNS)
def test_check_accepts_the_right_answer_and_rejects_the_wrong_ones(exercise, tmp_path):
    for patch in (ANSWERS / exercise).glob("*.patch"):
        copied(patch, tmp_path / patch.stem)
    command = [sys.executable, __file__, exercise, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    outcomes, metrics = results.pop("right")
    assert {outcome for outcome, _ in outcomes} == {"passed"}, f"right.patch: {outcomes}"
    assert metrics["epoch"] == 2
    assert math.isfinite(metrics["loss"])
    assert metrics["student_knn"] > 0
    assert len(results) == len(list((ANSWERS / exercise).glob("wrong-*.patch")))
    for name, (outcomes, _) in results.items():
        why = [words for outcome, words in outcomes if outcome == "failed"]
        print(f"{name}: {why}")
        assert why, f"{name} is not rejected: {outcomes}"
        # by the check's own words, not by a crash
        assert {outcome for outcome, _ in outcomes} <= {"passed", "failed"}, f"{name}: {outcomes}"
        assert all(words.startswith("AssertionError: ") for words in why), f"{name}: {why}"


if __name__ == "__main__":
    check_all(*sys.argv[1:])
