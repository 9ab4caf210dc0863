"""tests/full_size.sh runs the rows of results.RESNET, goes on where it stopped, stops on errors.

It is to run for hours on somebody else's GPU, so it has to be right before. Its order is tested
with a stub in Python's place; with CI or EXERCISES set, its --try runs for real, on the CPU.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import compare
import pytest
import results

ROOT = pathlib.Path(__file__).parent.parent
STUB = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in "$FAILING"*) exit 3 ;; esac
case $1 in
*_eval.py) echo "$1" >> "$2/evals.jsonl" ;;
tests/bench.py) echo a table ;;
*) case "$*" in *--resume*) exit 0 ;; esac
   while [ "$1" != --output ]; do shift; done
   mkdir -p "$2" && touch "$2/log.jsonl" "$2/checkpoint.pt" ;;
esac
"""


@pytest.fixture
def copy(tmp_path):
    """The scripts in a folder of their own, and in a repository."""
    folder = tmp_path / "copy"
    (folder / "docs" / "results").mkdir(parents=True)
    (folder / "tests").mkdir()
    for file in [
        *ROOT.glob("*.py"),
        *ROOT.glob("tests/*.py"),
        *ROOT.glob("docs/*.py"),
        ROOT / "tests" / "full_size.sh",
    ]:
        shutil.copy(file, folder / file.relative_to(ROOT))
    shutil.copy(ROOT / ".gitignore", folder)
    author = "-c user.name=test -c user.email=test@localhost -c commit.gpgsign=false"
    for words in ("init -q", "add .", f"{author} commit -q -m all"):
        subprocess.run(["git", *words.split()], cwd=folder, check=True)
    return folder


def start(copy, *argv, **environment):
    return subprocess.Popen(
        ["bash", "tests/full_size.sh", *argv],
        cwd=copy,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # what a Ctrl-C reaches
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run(copy, *argv, code=0, **environment):
    """-> what it prints."""
    process = start(copy, *argv, **environment)
    out = process.communicate()[0]
    assert process.returncode == code, out
    return out


def begun(out):
    """The scripts that were run, of what it prints."""
    return [line.split()[2] for line in out.splitlines() if line.startswith("$ ")]


@pytest.fixture
def calls(copy):
    """-> a function: run it with the stub -> what it prints, and the commands that ran."""
    stub, log = copy.parent / "stub", copy.parent / "calls"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def called(*argv, failing="nothing", code=0):
        log.write_text("")
        out = run(copy, *argv, code=code, PYTHON=str(stub), CALLS=str(log), FAILING=failing)
        return out, log.read_text().splitlines()

    return called


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--data-dir", "my data", "--seed", "3"],
        ["--seed=3", "--device=cpu"],
        ["--device", "cpu"],
    ],
)
def test_the_commands_are_those_of_the_rows(copy, calls, options):
    out, ran = calls(*options)
    seed = "3" if "3" in "".join(options) else "0"
    device = "cpu" if "cpu" in "".join(options) else "auto"
    rows = []
    for pattern, command, _ in results.RESNET:
        name = pattern.replace("*", seed)
        folder = f"runs/full-size/{name}"
        train = " ".join([command, *options, "--output", folder])
        evaluations = (f"{name}_eval.py {folder} --device {device}" for name in ("knn", "linear"))
        rows.append((train, *evaluations))
        kept = {path.name for path in (copy / "docs/results/gpu" / name).iterdir()}
        assert kept == {"log.jsonl", "evals.jsonl"}
    *ran, bench = ran
    assert ran[:3] == list(rows[0])  # the paper's recipe, the most wanted
    assert sorted(zip(ran[::3], ran[1::3], ran[2::3], strict=True)) == sorted(rows)
    data_dir = "my data" if "my data" in options else "data"
    assert bench == f"tests/bench.py --data cifar10 --data-dir {data_dir} --device {device}"
    commit, _, command, _, table = (copy / "docs/results/gpu/bench-gpu.md").read_text().splitlines()
    assert "dirty" not in commit
    assert command == "`python tests/bench.py --data cifar10`:"
    assert table == "a table"
    assert len(list((copy / "docs/results/gpu").iterdir())) == len(rows) + 1
    assert calls(*options)[1] == []
    assert "docs/results.py" in out


@pytest.mark.parametrize(
    "failing",
    [
        "residual_momentum.py --data cifar100 --output",
        "linear_eval.py runs/full-size/rm-cifar100-resnet18-with-seed0",
    ],
)
def test_a_failure_stops_it_and_the_next_call_goes_on(copy, calls, failing):
    out, ran = calls(failing=failing, code=3)
    assert ran[-1].startswith(failing)
    assert f"exit code 3: {copy.parent}/stub {failing}" in out
    kept = copy / "docs" / "results" / "gpu"
    assert [path.name for path in kept.iterdir()] == ["ressl-cifar10-resnet18-seed0"]
    again = calls()[1]
    resumed = "linear" in failing  # then the training had left a checkpoint
    run = "runs/full-size/rm-cifar100-resnet18-with-seed0"
    words = f"--resume {run}" if resumed else f"--data cifar100 --output {run}"
    assert again[0].startswith(f"residual_momentum.py {words}")
    assert ["--resume" in command for command in again] == [resumed] + [False] * (len(again) - 1)
    assert len(again) == 4 * 3 + 1


def test_a_failing_benchmark_leaves_no_table(copy, calls):
    calls(failing="tests/bench.py", code=3)
    assert not (copy / "docs/results/gpu/bench-gpu.md").exists()
    assert len(calls()[1]) == 1


def test_changed_files_are_refused_but_for_a_try(copy, calls):
    with (copy / "ressl.py").open("a") as file:
        file.write("# changed\n")
    out, ran = calls(code=2)
    assert ran == []
    assert out.count("\n") == 1
    assert "git stash" in out
    assert len(calls("--try")[1]) == 3 * len(results.RESNET) + 1
    assert not list((copy / "docs/results").rglob("*.*"))


@pytest.mark.skipif(
    not {"CI", "EXERCISES"} & os.environ.keys(), reason="a minute: EXERCISES=1 python -m pytest"
)
def test_the_try_runs_is_resumed_and_stops(copy):
    argv = ["--try", "--data", "textures", "--arch", "conv4", "--data-dir", "none"]
    tried = copy / "runs" / "full-size-try"
    names = [pattern.replace("*", "0") for pattern, *_ in results.RESNET]

    process = start(copy, *argv)
    while not (tried / names[0] / "checkpoint.pt").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    out = process.communicate()[0]
    assert process.returncode == 130, out
    assert {path.name for path in tried.iterdir()} == {names[0], "results"}

    out = run(copy, *argv)
    assert out.count("continuing after epoch") == 1
    assert begun(out)[-1] == "tests/bench.py"
    for name in names:
        files = [tried / "results" / "gpu" / name / file for file in ("log.jsonl", "evals.jsonl")]
        (first, *log), evals = map(compare.read_records, files)
        assert [record["epoch"] for record in log] == [0, 1]
        assert [record["evaluation"] for record in evals] == ["knn", "linear"]
        assert {record["branch"] for record in evals} == {"student"}
        assert first["arguments"].get("residual_weight", 1) == ("without" not in name)
    assert "ReSSL step, conv4" in (tried / "results" / "gpu" / "bench-gpu.md").read_text()
    assert not list((copy / "docs" / "results").rglob("*.*"))

    assert begun(run(copy, *argv)) == []
    out = run(copy, *argv, "--seed", "1", "--no-such-option", code=2)
    assert begun(out) == ["ressl.py"]
    assert "stopped, exit code 2" in out
