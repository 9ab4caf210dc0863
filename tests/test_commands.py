"""The commands a user types: runs, resuming, evaluations, pictures, mistakes."""

import argparse
import contextlib
import functools
import glob
import itertools
import json
import math
import os
import pathlib
import pickle
import re
import shutil
import signal
import subprocess
import sys

import compare
import fabricated
import numpy
import pytest
import torch
import torchvision
from PIL import Image

import common
import knn_eval
import linear_eval
import residual_momentum
import ressl

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = README + "".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs").glob("*.md"))
SMALL = ["--subset", "192", "--holdout", "100", "--batch-size", "64", "--queue-size", "128"]
SMALL += ["--epochs", "3"]
LESS = ["--subset", "48", "--holdout", "20", "--batch-size", "16", "--queue-size", "32"]
LESS += ["--epochs", "3"]  # for half types, which are slow where the processor has none


render_once = functools.lru_cache(common.render_textures)


@pytest.fixture(autouse=True)
def _in_empty_folder_with_textures_at_hand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "render_textures", render_once)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three epochs in float32, and what main returned."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, ressl.main([*SMALL, "--amp", "off", "--output", str(folder)])


def fails(capsys, main, *argv):
    """main(argv) must end with exit code 2 and one line on standard error -> that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in argv])
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same(a, b):
    """Bitwise equality of nested dicts and lists of tensors and plain values."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(folder, other):
    one, two = (common.read_checkpoint(path) for path in (folder, other))
    for checkpoint in (one, two):  # the records have times in them
        del checkpoint["arguments"], checkpoint["records"]
    assert same(one, two)
    keys = ("epoch", "loss", "entropy", "lr", "student_knn", "teacher_knn")
    one, two = ([[r.get(k) for k in keys] for r in records(f)[1:]] for f in (folder, other))
    assert one == two
    assert [r[0] for r in one] == list(range(len(one)))


# ------------------------------------------------------------------------------------- a run


def test_a_run_leaves_its_log_and_returns_the_last_record(finished):
    folder, metrics = finished
    header, *epochs = records(folder)
    assert header["arguments"]["data"] == "textures"
    assert header["arguments"]["lr"] == 0.24 * 64 / 256
    assert {"torch", "torchvision", "commit", "hardware", "precision"} <= header.keys()
    assert [r["epoch"] for r in epochs] == [0, 1, 2, 3]
    assert epochs[-1] == metrics
    assert "loss" not in epochs[0]  # before training
    for record in epochs[1:]:
        assert 0 < record["loss"] < 2 * math.log(128)
        assert record["images_per_second"] > 0
    for record in epochs:
        assert 0 <= record["student_knn"] <= 100
        assert 0 <= record["teacher_knn"] <= 100
        assert {"seconds", "peak_memory"} <= record.keys()
        assert {"loss", "entropy", "lr"} <= record.keys() or record["epoch"] == 0
    assert not list(folder.glob("*.part"))


def test_checkpoint_holds_only_tensors_and_plain_values(finished):
    def plain(value):
        if isinstance(value, dict):
            return all(plain(key) and plain(item) for key, item in value.items())
        if isinstance(value, (list, tuple)):
            return all(map(plain, value))
        return value is None or type(value) in (str, int, float, bool, torch.Tensor)

    checkpoint = torch.load(finished[0] / "checkpoint.pt", weights_only=True)
    assert plain(checkpoint)
    assert checkpoint["mean"] == common.MEAN_STD["textures"][0]


def test_the_readmes_lines_load_the_encoder_into_torchvision():
    argv = ["--arch", "resnet18", "--subset", "32", "--batch-size", "16", "--queue-size", "32"]
    argv += ["--epochs", "1", "--holdout", "16", "--image-size", "16"]
    ressl.main([*argv, "--output", "runs/ressl-cifar10"])
    lines = README.split("\nweights = ")[1].split("```")[0]
    images, features = torch.rand(4, 3, 32, 32), []
    for branch in ("student", "teacher"):
        names = {"torch": torch, "torchvision": torchvision}
        exec("weights = " + lines.replace("student", branch), names)
        ours = common.load_encoder("runs/ressl-cifar10", branch)
        features.append(names["encoder"].eval()(images))
        assert torch.equal(features[-1], ours(images))
        assert not ours.training
        assert not any(p.requires_grad for p in ours.parameters())
    assert not torch.equal(*features)


def test_the_readmes_commands_are_understood():
    """Every `python ressl.py ...` and `python residual_momentum.py ...` of the pages."""
    lines = re.findall(r"python (ressl|residual_momentum)\.py([^`#|;\n]*)", PAGES)
    assert len(lines) > 30
    for script, words in lines:
        module = {"ressl": ressl, "residual_momentum": residual_momentum}[script]
        if "--help" not in words and "--resume" not in words:
            values = {
                " N": " 1",
                "$t": "0.1",
                "temp T": "temp 0.1",
                "$m": "0.5",
                "size B": "size 64",
                "LR": "0.1",
                "LAMBDA": "1",
                "$s": "1",
                "OPTIONS": "",
                "SEED": "1",
            }
            for name, value in values.items():
                words = words.replace(name, value)
            module.parse_arguments(words.split())
    ci = ROOT / ".ci" / "run"  # students' copies have none
    assert not ci.exists() or "grep -m 1 'python -m pytest' README.md" in ci.read_text()


def test_the_front_pages_commands_work_as_they_stand(tmp_path, monkeypatch, capsys):
    """In their order, on few images; three epochs in place of 200, conv4 in place of ResNet-18, and
    nothing in place of steps and of the kNN between them."""
    fit = ressl.fit_to_data

    def three_epochs(args, count):
        fit(args, count)
        args.epochs = 3

    monkeypatch.setattr(ressl, "fit_to_data", three_epochs)
    build = common.build_encoder
    monkeypatch.setattr(common, "build_encoder", lambda arch, stem: build("conv4", stem))
    load = common.load_images

    def few(name, root, split, side=64):
        if name == "folder":
            return load(name, root, split, side)
        return render_once(32, 1) if split == "test" else render_once(96, 0)

    monkeypatch.setattr(common, "load_images", few)
    monkeypatch.setattr(common, "knn_accuracy", lambda *a: 50.0)
    for method in (ressl, residual_momentum):
        monkeypatch.setattr(method, "train_epoch", lambda *a: {"loss": 1.0, "gap": 0.1, "lr": 0.1})
    fabricated.own_pictures(tmp_path / "own", {"oak": (30, 6), "elm": (20, 4)}, side=32)
    scripts = {"ressl": ressl, "residual_momentum": residual_momentum, "knn_eval": knn_eval}
    scripts |= {"linear_eval": linear_eval, "docs/compare": compare}
    done = []
    for script, words in re.findall(r"python (\S+)\.py([^`&|\n]*)", README):
        run = max(pathlib.Path("runs").glob("ressl-cifar10*"), default="", key=os.path.getmtime)
        words = words.replace("RUN", str(run)).replace("PATH", str(tmp_path / "own")).split()
        words = [w for word in words for w in (sorted(glob.glob(word)) if "*" in word else [word])]
        with contextlib.ExitStack() as stack:
            if "--help" in words:
                stack.enter_context(pytest.raises(SystemExit, match="^0$"))
            scripts[script].main(words)
        done.append(script)
    assert set(done) == set(scripts)
    assert all(pathlib.Path(file).exists() for file in ("term.png", "views.png", "nn.png", "f.npz"))


def test_runs_without_output_get_folders_that_say_what_they_are(capsys):
    argv = ["--subset", "64", "--epochs", "1", "--queue-size", "64"]
    for _ in range(2):
        ressl.main(argv)
    name = "ressl-textures"
    assert sorted(p.name for p in pathlib.Path("runs").iterdir()) == [name, f"{name}-2"]
    out = capsys.readouterr().out
    assert f"python knn_eval.py runs/{name}-2" in out
    assert re.search(r"kNN: [0-9.]+ % \(untrained\) -> [0-9.]+ %", out)
    assert f"python ressl.py --resume runs/{name}-2" in out  # from the start, should it stop


@pytest.mark.parametrize(
    ("side", "stem"),
    [(32, "small"), (40, "small"), (64, "medium"), (96, "medium"), (97, "imagenet")],
)
@pytest.mark.parametrize("module", [ressl, residual_momentum])
def test_stem_for_image_size(module, side, stem):
    args, _ = module.parse_arguments(["--data", "folder:x", "--image-size", str(side)])
    module.fit_to_data(args, 1000)
    assert args.stem == stem


def test_few_images_get_small_batches_and_what_is_given_stays():
    def fitted(count, *argv):
        args, _ = ressl.parse_arguments(["--data", "cifar10", *argv])
        ressl.fit_to_data(args, count)
        return args.batch_size, args.lr, args.queue_size

    assert fitted(50_000) == (256, 0.06, 4096)
    assert fitted(200) == (50, pytest.approx(0.06 * 50 / 256), 200)
    assert fitted(3) == (2, pytest.approx(0.06 * 2 / 256), 3)
    assert fitted(200, "--batch-size", "64", "--lr", "1", "--queue-size", "9") == (64, 1, 9)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(finished, tmp_path):
    ressl.main([*SMALL, "--amp", "off", "--output", "again"])
    assert_same_run(finished[0], tmp_path / "again")
    ressl.main([*SMALL, "--amp", "off", "--output", "other", "--seed", "1"])
    assert records(tmp_path / "other")[-1]["loss"] != finished[1]["loss"]


def test_a_resnet_without_a_gpu_is_warned_of_and_the_laptop_command_named(capsys):
    argv = ["--arch", "resnet18", "--subset", "32", "--holdout", "16", "--batch-size", "16"]
    ressl.main([*argv, "--queue-size", "16", "--epochs", "1", "--image-size", "16"])
    out = capsys.readouterr().out
    assert "no GPU: " in out
    laptop = "--arch conv4 --epochs 20 --batch-size 16 --lr 0.06"  # 64, or less for a small set
    assert f"on a laptop add to your command: {laptop}\n" in out


TINY = {
    "textures": ["--subset", "40", "--holdout", "30"],
    "cifar10": [],
    "cifar100": [],
    "stl10": [],
    "tiny-imagenet": [],
    "folder:pictures": [],
}


def fabricate(data, monkeypatch):
    """A data set of a few dozen images, in its own files, in the folder data; -> options for it."""
    root = pathlib.Path("data").absolute()
    if data.startswith("cifar"):
        fabricated.cifar(data, root, monkeypatch, count=40)
    elif data == "stl10":
        fabricated.stl10(root, monkeypatch, train=20, test=15, unlabelled=20)
    elif data == "tiny-imagenet":
        fabricated.tiny_imagenet(root, train=10, val=15)
    elif data != "textures":
        fabricated.own_pictures("pictures", {"cat": (20, 10), "dog": (20, 10)}, side=70)
    return ["--data", data, *TINY[data]]


def train_resume_and_evaluate(module, argv, monkeypatch):
    """An epoch, stopped in its second step and resumed; then all evaluations -> last record."""
    queue = ["--queue-size", "32"] if module is ressl else []
    argv = [*argv, *queue, "--batch-size", "16", "--epochs", "1", "--output", "run"]
    step, steps = module.train_step, []

    def stop_once(*arguments):
        steps.append(1)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(module, "train_step", stop_once)
    with pytest.raises(SystemExit):
        module.main(argv)
    metrics = module.main(["--resume", "run"])
    assert math.isfinite(metrics["loss"])
    for branch in ("student", "teacher"):
        knn = knn_eval.main(["run", "--branch", branch])
        assert knn["top1"] == pytest.approx(metrics[f"{branch}_knn"])
    assert 0 <= linear_eval.main(["run", "--epochs", "1"])["top1"] <= 100
    return metrics


@pytest.mark.parametrize("module", [ressl, residual_momentum])
@pytest.mark.parametrize("data", TINY)
def test_every_data_set(data, module, monkeypatch):
    argv = fabricate(data, monkeypatch)
    train_resume_and_evaluate(module, [*argv, "--arch", "conv4"], monkeypatch)
    checkpoint = common.read_checkpoint("run")
    side = 32 if data in ("textures", "cifar10", "cifar100") else 64
    assert checkpoint["arguments"]["image_size"] == side
    assert checkpoint["stem"] == ("small" if side == 32 else "medium")
    momentum = checkpoint["arguments"]["momentum"]
    assert momentum == (0.99 if side == 32 else 0.996)
    if data == "stl10":  # on request at 96 px, as the authors' code
        knn_eval.main(["run", "--image-size", "96"])
        linear_eval.main(["run", "--epochs", "1", "--image-size", "96"])
        lines = pathlib.Path("run/evals.jsonl").read_text().splitlines()
        sizes = [json.loads(line)["image_size"] for line in lines]
        assert sizes == [64, 64, 64, 96, 96]


# Above, every data set runs with both methods, and a ResNet; here every other kind of encoder. The
# rest of all combinations runs no other code, and takes half an hour: ALL_COMBINATIONS=1.
MODULES = {"ressl": ressl, "residual_momentum": residual_momentum}
COMBINATIONS = [
    ("residual_momentum", "mobilenet_v2", "textures"),
    ("ressl", "mobilenet_v3_large", "textures"),
    ("residual_momentum", "efficientnet_b0", "textures"),
    ("ressl", "shufflenet_v2_x1_0", "textures"),
]
if "ALL_COMBINATIONS" in os.environ:
    COMBINATIONS = list(itertools.product(MODULES, common.ARCHITECTURES, TINY))


@pytest.mark.parametrize(("method", "arch", "data"), COMBINATIONS)
def test_combinations(method, arch, data, monkeypatch):
    argv = [*fabricate(data, monkeypatch), "--arch", arch, "--bn-splits", "2"]
    argv += ["--image-size", "16"] if data == "textures" else []
    train_resume_and_evaluate(MODULES[method], argv, monkeypatch)


def test_the_encoder_that_comes_with_the_project_can_be_evaluated(monkeypatch, tmp_path):
    """By a class that has trained nothing yet. The images here are few and random."""
    file = ROOT / "docs" / "encoder" / "checkpoint.pt"
    assert file.stat().st_size < 2_000_000
    arguments = common.read_checkpoint(file)["arguments"]
    assert (arguments["data"], arguments["data_dir"]) == ("cifar10", "data")
    trained = common.load_encoder(file.parent)
    assert trained(torch.rand(2, 3, 32, 32)).shape == (2, trained.dim)
    random = common.load_encoder(file.parent, "untrained").state_dict()
    assert any(not torch.equal(v, random[k]) for k, v in trained.state_dict().items())
    fabricate("cifar10", monkeypatch)
    shutil.copy(file, "checkpoint.pt")
    for branch in ("student", "teacher", "untrained"):
        assert 0 <= knn_eval.main([".", "--branch", branch])["top1"] <= 100
    assert 0 <= linear_eval.main(["checkpoint.pt", "--epochs", "1"])["top1"] <= 100


def test_the_extended_version_with_multi_crop(monkeypatch, capsys):
    argv = [*fabricate("textures", monkeypatch), "--predictor", "--infonce-epochs", "1"]
    train_resume_and_evaluate(ressl, [*argv, "--crops", "5"], monkeypatch)
    assert "ln K = 3.466" in capsys.readouterr().out
    assert any(name.startswith("predictor") for name in common.read_checkpoint("run")["model"])


def test_a_flat_folder_is_for_pre_training_only(monkeypatch, capsys):
    fabricated.own_pictures("pictures", {"cat": (40, 0)})
    argv = ["--data", "folder:pictures/train/cat", "--arch", "conv4", "--batch-size", "16"]
    argv += ["--image-size", "32"]
    metrics = ressl.main([*argv, "--queue-size", "32", "--epochs", "1", "--output", "run"])
    assert math.isfinite(metrics["loss"])
    assert "student_knn" not in metrics
    out = capsys.readouterr().out
    assert "no labels: no kNN" in out
    assert "next:" not in out  # both evaluations need labels
    assert "kNN student" not in out
    assert common.read_checkpoint("run")["arguments"]["momentum"] == 0.99  # CIFAR's
    for main in (knn_eval.main, linear_eval.main):
        error = fails(capsys, main, "run")
        assert "pictures/train/cat" in error
        assert "val/CLASS/" in error
    ressl.main([*argv, "--views", "views.png"])
    assert Image.open("views.png").size[1] == 2 + 8 * 98  # three times 32 px, and 2 between


def test_a_folder_that_moved_is_found_by_data_dir(monkeypatch, capsys):
    """Relative paths are kept absolute; resuming and evaluations take another folder."""
    argv = [*fabricate("folder:pictures", monkeypatch), "--arch", "conv4", "--batch-size", "16"]
    metrics = ressl.main([*argv, "--queue-size", "32", "--epochs", "1", "--output", "run"])
    where = common.read_checkpoint("run")["arguments"]["data_dir"]
    assert where == str(pathlib.Path("pictures").absolute())
    pathlib.Path("pictures").rename("moved")
    assert where in fails(capsys, knn_eval.main, "run")
    knn = knn_eval.main(["run", "--data-dir", "moved"])
    assert knn["top1"] == pytest.approx(metrics["student_knn"])
    again = ["--data", "folder", "--data-dir", "moved"]
    for option in (["--data", "folder:moved"], ["--data-dir", "moved"], again):
        assert ressl.main(["--resume", "run", *option]) == metrics


def test_memory_that_runs_out_in_an_evaluation_is_not_blamed_on_the_checkpoint(
    finished, monkeypatch, capsys
):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(common.Images, "to", full)
    assert "--image-size" in fails(capsys, knn_eval.main, finished[0])


@pytest.mark.parametrize("module", [ressl, residual_momentum])
def test_fp16_skips_a_step_that_overflows_and_goes_on(module, monkeypatch):
    """As on an older CUDA card, and whatever uninitialised memory holds."""
    argv = [x for x in LESS if x not in ("--queue-size", "32")]
    scaler = torch.amp.GradScaler
    large = functools.partial(scaler, init_scale=2.0**40, backoff_factor=2.0**-30)
    monkeypatch.setattr(torch.amp, "GradScaler", large)
    torch.use_deterministic_algorithms(True)  # fills what is not initialised with NaN
    try:
        metrics = module.main([*argv, "--epochs", "1", "--amp", "fp16", "--output", "run"])
    finally:
        torch.use_deterministic_algorithms(False)
    assert math.isfinite(metrics["loss"])
    assert common.read_checkpoint("run")["scaler"]["scale"] == 2**10  # it has skipped one


def test_a_float32_run_is_resumed_in_fp16_and_in_another_memory_format(monkeypatch):
    """Begun on a Mac, gone on with on an older CUDA card."""
    with monkeypatch.context() as patch:
        patch.setattr(common, "memory_format", lambda device: torch.contiguous_format)
        ressl.main([*LESS, "--epochs", "1", "--amp", "off", "--output", "run"])
    assert common.read_checkpoint("run")["scaler"] == {}
    argv = ["--resume", "run", "--epochs", "2", "--amp", "fp16"]
    assert math.isfinite(ressl.main(argv)["loss"])
    assert common.read_checkpoint("run")["scaler"]["scale"] > 0


# ---------------------------------------------------------------------------------- resuming


def start(argv, code="import common, ressl, sys; common.SAVE_EVERY = 0; ressl.main(sys.argv[1:])"):
    """ressl.py in a process of its own, with a checkpoint every epoch."""
    return subprocess.Popen(
        [sys.executable, "-u", "-c", code, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        # Tests that a shell started in the background ignore Ctrl-C, and so would this process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(process.stderr.read())


def test_killed_and_resumed_equals_never_killed(finished, tmp_path):
    """By SIGKILL in epoch 1, and by Ctrl-C in epoch 3: bit for bit the same in the end."""
    argv = [*SMALL, "--amp", "off", "--output", "run"]
    for line, how in (("epoch 1/3", signal.SIGKILL), ("epoch 2/3", signal.SIGINT)):
        process = start(argv)
        wait_for(process, line)
        process.send_signal(how)
        _, error = process.communicate(timeout=60)
        argv = ["--resume", "run"]
    assert process.returncode == 130
    assert "--resume" in error
    assert "Traceback" not in error
    ressl.main(argv)
    assert_same_run(finished[0], tmp_path / "run")


def test_stopped_in_bf16_at_any_step_and_resumed_equals_never_stopped(monkeypatch, tmp_path):
    argv = [*LESS, "--amp", "bf16"]
    ressl.main([*argv, "--output", "whole"])
    step, steps = ressl.train_step, []

    def stop_sometimes(*arguments):
        steps.append(1)
        if len(steps) in (2, 7):
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(ressl, "train_step", stop_sometimes)
    monkeypatch.setattr(common, "SAVE_EVERY", 0)
    argv += ["--output", "stopped"]
    for _ in range(2):
        with pytest.raises(SystemExit) as caught:
            ressl.main(argv)
        assert caught.value.code == 130
        argv = ["--resume", "stopped"]
    ressl.main(argv)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_ctrl_c_while_a_checkpoint_is_written_is_ctrl_c(tmp_path):
    """At any moment of the writing: exit code 130, a whole checkpoint, and no rest of another."""
    code = (
        "import common, ressl, signal, sys\n"
        "save = common.Run.save\n"
        "def save_again(*a):\n"
        "    signal.signal(signal.SIGALRM, signal.default_int_handler)\n"
        "    save(*a)\n"
        "    signal.setitimer(signal.ITIMER_REAL, wait)\n"
        "    while True: save(*a)\n"
        "common.Run.save = save_again\n"
        "for wait in (0.05, 0.1, 0.17):\n"
        "    try:\n"
        "        ressl.main([*sys.argv[1:], f'run{wait}'])\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 130\n"
    )
    process = start([*LESS, "--output"], code=code)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 0, error
    assert error.count("--resume") == 3
    for wait in (0.05, 0.1, 0.17):
        assert common.read_checkpoint(f"run{wait}")["epoch"] == 0


def test_a_run_killed_before_its_first_checkpoint_starts_again(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    assert "no checkpoint run" in fails(capsys, ressl.main, "--resume", "run")
    ressl.main([*SMALL, "--amp", "off", "--output", "run"])
    assert_same_run(finished[0], folder)


def test_resuming_a_finished_run_changes_nothing(finished):
    folder, metrics = finished
    before = [(folder / name).read_bytes() for name in ("log.jsonl", "checkpoint.pt")]
    assert ressl.main(["--resume", str(folder)]) == metrics
    assert before == [(folder / name).read_bytes() for name in ("log.jsonl", "checkpoint.pt")]


def test_a_file_is_on_the_disk_before_it_takes_the_others_place(tmp_path, monkeypatch):
    calls, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(os.fstat(file).st_size))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    common.write_file(str(tmp_path / "file"), b"content")
    assert calls == [len(b"content"), "replace"]
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_checkpoint_is_never_half_written(finished, tmp_path, monkeypatch, capsys):
    """The disk is full while the second checkpoint is written: the first one is still there."""
    monkeypatch.setattr(common, "SAVE_EVERY", 0)
    saves = []

    def full_disk(file):
        if os.fstat(file).st_size > 100_000:  # a checkpoint, no log
            saves.append(file)
            if len(saves) == 2:
                os.ftruncate(file, 50_000)
                raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    error = fails(capsys, ressl.main, *SMALL, "--amp", "off", "--output", "run")
    assert "No space left" in error
    assert common.read_checkpoint("run")["epoch"] == 0
    ressl.main(["--resume", "run"])
    assert_same_run(finished[0], tmp_path / "run")


def test_divergence_ends_the_run_and_keeps_the_last_good_checkpoint(monkeypatch, capsys):
    monkeypatch.setattr(common, "SAVE_EVERY", 0)
    step, steps = ressl.train_step, []

    def diverge(*arguments):
        steps.append(1)
        scalars = step(*arguments)
        return {**scalars, "loss": scalars["loss"] * (math.nan if len(steps) > 5 else 1)}

    monkeypatch.setattr(ressl, "train_step", diverge)
    error = fails(capsys, ressl.main, *SMALL, "--output", "run")
    assert "diverged in epoch 2" in error
    assert "--lr" in error
    assert common.read_checkpoint("run")["epoch"] == 1
    monkeypatch.setattr(ressl, "train_step", step)
    error = fails(capsys, ressl.main, *SMALL, "--output", "hot", "--lr", "1e8", "--amp", "off")
    assert "diverged" in error
    assert common.read_checkpoint("hot")["epoch"] == 0


# ------------------------------------------------------------------------------- evaluations


def test_knn_eval_agrees_with_the_run_and_keeps_its_protocol(finished, capsys):
    folder, metrics = finished
    for branch in ("student", "teacher"):
        result = knn_eval.main([str(folder), "--branch", branch, "--amp", "off"])
        assert result["top1"] == pytest.approx(metrics[f"{branch}_knn"])
        assert result["top1"] <= result["top5"] <= 100
        record = json.loads((folder / "evals.jsonl").read_text().splitlines()[-1])
        assert record["branch"] == branch
        assert (record["k"], record["temperature"]) == (192, 0.1)  # 200 is cut to the bank
        assert (record["train_images"], record["test_images"]) == (192, 100)
        assert record["top1"] == result["top1"]
    assert f"top1 {result['top1']:.2f} %" in capsys.readouterr().out
    path = str(folder / "checkpoint.pt")
    assert knn_eval.main([path, "--branch", "teacher", "--amp", "off"]) == result


def test_evaluations_take_subset_and_holdout_of_the_run_unless_told(tmp_path):
    ressl.main([*SMALL, "--epochs", "1", "--output", "run"])
    count = lambda: [
        (r["train_images"], r["test_images"])
        for r in map(json.loads, pathlib.Path("run/evals.jsonl").read_text().splitlines())
    ]
    knn_eval.main(["run"])
    knn_eval.main(["run", "--subset", "500", "--holdout", "0"])
    assert count() == [(192, 100), (500, 1000)]


def test_linear_eval_learns_and_names_its_heads(finished):
    result = linear_eval.main([str(finished[0]), "--epochs", "15", "--subset", "1000"])
    heads = ["", "step30_", "step10_"]
    assert list(result) == [f"{head}{top}" for head in heads for top in ("top1", "top5")]
    assert result["top1"] > 15  # chance is 10
    record = json.loads((finished[0] / "evals.jsonl").read_text().splitlines()[-1])
    assert record["evaluation"] == "linear"
    assert record["test_images"] == 100
    assert record["step10_top1"] == result["step10_top1"]
    assert (record["seed"], record["probe_seed"]) == (0, 0)
    one = linear_eval.main([str(finished[0]), "--epochs", "1", "--schedule", "step", "--lr", "3"])
    assert list(one) == ["top1", "top5"]


def test_linear_heads_side_by_side_equal_one_alone(finished):
    encoder = common.load_encoder(finished[0])
    train = common.render_textures(300, 2)
    args = argparse.Namespace(epochs=2, seed=0, image_size=32)
    both = linear_eval.train_heads(encoder, train, [("cosine", 1.0), ("step", 9.0)], args, None)
    alone = linear_eval.train_heads(encoder, train, [("cosine", 1.0)], args, None)
    torch.testing.assert_close(both[0].weight, alone[0].weight)


def test_linear_learning_rates():
    rate = linear_eval.learning_rate
    assert [rate("step", done, 30) for done in (0, 0.59, 0.6, 0.79, 0.8, 1)] == pytest.approx(
        [30, 30, 3, 3, 0.3, 0.3]
    )
    assert [rate("cosine", done, 1) for done in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])


def test_the_probe_does_not_move_the_encoder(finished, monkeypatch):
    """The mistake of popular repositories: BatchNorm statistics that follow the probe's data."""
    encoders, train_heads = [], linear_eval.train_heads
    spy = lambda encoder, *rest: encoders.append(encoder) or train_heads(encoder, *rest)
    monkeypatch.setattr(linear_eval, "train_heads", spy)
    linear_eval.main([str(finished[0]), "--epochs", "2", "--branch", "teacher"])
    saved = torch.load(finished[0] / "checkpoint.pt", weights_only=True)["teacher_encoder"]
    assert same(dict(encoders[0].state_dict()), dict(saved))


def test_pictures(finished):
    read = lambda path: torchvision.transforms.functional.pil_to_tensor(Image.open(path))
    ressl.main(["--views", "views.png"])
    assert read("views.png").shape == (3, 2 + 8 * 98, 2 + 7 * 98)
    assert not pathlib.Path("runs").exists()
    knn_eval.main([str(finished[0]), "--neighbors", "nn.png"])
    picture = read("nn.png")
    assert picture.shape == (3, 2 + 10 * 110, 2 + 12 * 110)
    wrong, right = (
        (picture == (255 * torch.tensor(colour)).round().view(3, 1, 1)).all(0).any()
        for colour in (knn_eval.ORANGE, knn_eval.GREEN)
    )
    assert right
    assert wrong
    found, by_chance = (picture[:, 2:, 2 + 110 * i :][:, :, : 5 * 110] for i in (2, 7))
    assert not torch.equal(found, by_chance)  # the trained encoder's and that of random weights


def test_neighbors_are_framed_by_their_class(monkeypatch):
    columns = []
    monkeypatch.setattr(common, "save_picture", lambda path, c: columns.extend(c))
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).repeat(1, 3, 8, 8) * 60
    data = common.Images(images, torch.tensor([0, 1, 0, 1]), ["a", "b"], (), (), numpy.arange(4))
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.1, 0.9], [0.0, 1.0]])
    pairs = (bank, bank[[0, 3]]), (bank.flip(0), bank[[0, 3]])
    knn_eval.draw_neighbors("x.png", pairs, data, data.take(torch.tensor([0, 3])), count=2)
    names, query, *nearest = columns
    assert names.shape == (2, 3, 36, 36)
    assert names[0].ne(names[1]).any()
    assert query[:, 0, 6, 6].tolist() == pytest.approx([0, 180 / 255])
    neighbours = ([0, 3], [1, 2], [3, 0], [2, 1])  # trained: two; then those by random weights
    for column, found in zip(nearest, neighbours, strict=True):
        for row, i in enumerate(found):
            assert column[row, :, 2:-2, 2:-2].eq(images[i] / 255).all()
            frame = knn_eval.GREEN if i % 2 == row else knn_eval.ORANGE
            assert column[row, :, 0, 0].tolist() == pytest.approx(frame)
            assert column[row, :, -1, -1].tolist() == pytest.approx(frame)


def test_features_are_written_with_what_they_are_of(finished, tmp_path):
    pictures = tmp_path / "pictures"
    fabricated.own_pictures(pictures, {"oak": (30, 6), "elm": (20, 4)}, side=32)
    (pictures / "train" / "elm" / "0007.png").write_bytes(b"broken")
    small = ["--epochs", "1", "--batch-size", "10", "--arch", "conv4", "--image-size", "32"]
    ressl.main(["--data", f"folder:{pictures}", *small, "--output", "own"])
    knn_eval.main(["own", "--features", "own.npz"])
    with numpy.load("own.npz") as kept:
        own = dict(kept)
    assert own["classes"].tolist() == ["elm", "oak"]
    for part, count in (("train", 49), ("test", 10)):
        assert own[part].shape == (count, 256)
        classes = [pathlib.Path(name).parent.name for name in own[f"{part}_names"]]
        assert classes == [own["classes"][label] for label in own[f"{part}_labels"]]
    file = own["test_names"][3]
    image = torch.tensor(numpy.asarray(Image.open(file))).permute(2, 0, 1)[None] / 255
    encoder = common.load_encoder("own")
    normalize = common.normalizer(common.load_images(f"folder:{pictures}", "", "test", 32))
    features = encoder(normalize(image))
    assert torch.from_numpy(own["test"][3]).allclose(features[0], atol=2e-2)  # of half precision
    knn_eval.main([str(finished[0]), "--features", "part.npz", "--subset", "40", "--holdout", "30"])
    train = common.load_images("textures", "", "train")
    assert train.take(torch.tensor([7])).names.tolist() == [7]  # one image is still a set
    with numpy.load("part.npz") as part:  # numbers in the set, of the training images both
        for name, count in (("train", 40), ("test", 30)):
            assert part[f"{name}_labels"].tolist() == train.labels[part[f"{name}_names"]].tolist()
            assert len(set(part[f"{name}_names"])) == count


def test_untrained_are_the_weights_that_the_run_began_with(finished):
    state = torch.random.get_rng_state()
    random = common.load_encoder(finished[0], "untrained")
    assert torch.random.get_rng_state().equal(state)
    student = common.load_encoder(finished[0])
    assert not same(dict(random.state_dict()), dict(student.state_dict()))
    result = knn_eval.main([str(finished[0]), "--branch", "untrained", "--amp", "off"])
    assert result["top1"] == records(finished[0])[1]["student_knn"]
    kept = compare.read_records(finished[0] / "evals.jsonl")[-1]
    assert (kept["branch"], kept["epoch"]) == ("untrained", 0)


# ---------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--data", "imagenet"], "unknown data set 'imagenet'"),
        (["--arch", "resnet19"], "resnet19"),
        (["--device", "gpu"], "--device auto"),
        (["--device", "meta"], "--device auto"),
        (["--amp", "fp8"], "--amp"),
        (["--epochs", "0"], "--epochs"),
        (["--epochs", "-3"], "--epochs"),
        (["--epochs", "1.5"], "--epochs"),
        (["--batch-size", "1"], "--batch-size"),
        (["--batch-size", "1000", "--subset", "100"], "exceeds the 100 training images"),
        (["--batch-size", "64", "--subset", "32"], "exceeds the 32 training images"),
        (["--lr", "nan"], "--lr"),
        (["--lr", "inf"], "--lr"),
        (["--lr", "0"], "--lr"),
        (["--lr", "-1"], "--lr"),
        (["--student-temp", "0"], "--student-temp"),
        (["--momentum", "1.5"], "--momentum"),
        (["--seed", "-1"], "--seed"),
        (["--seed", "99999999999999999999"], "--seed"),
        (["--subset", "0"], "--subset"),
        (["--subset", "6000"], "do not fit"),
        (["--holdout", "5120"], "do not fit"),
        (["--queue-size", "0"], "--queue-size"),
        (["--data", "folder:"], "unknown data set 'folder:'"),
        (["--data", "folder:nowhere"], "nowhere: check the path"),
        (["--image-size", "8"], "--image-size"),
        (["--crops", "6"], "--crops"),
        (["--infonce-epochs", "-1"], "--infonce-epochs"),
        (["--bn-splits", "0"], "--bn-splits"),
        (["--bn-splits", "6"], "a multiple of --bn-splits"),
        (["--bn-splits", "64"], "at least twice"),
        (["--views", "views.pgn"], "views.pgn"),
        (["--views", "no/views.png"], "no/views.png"),
        (["--resume"], "--resume"),
        (["--resume", "nothing"], "no checkpoint nothing"),
        (["--lrr", "1"], "--lrr"),
        (["--output", "/proc/nothing/run"], "/proc/nothing"),
    ],
)
def test_wrong_input_gets_one_clear_line(capsys, argv, says):
    assert says in fails(capsys, ressl.main, *argv)
    assert not list(pathlib.Path().iterdir())


def test_a_folder_that_holds_a_run_is_refused(finished, capsys):
    folder = finished[0]
    before = (folder / "checkpoint.pt").read_bytes()
    assert "--resume" in fails(capsys, ressl.main, *SMALL, "--output", folder)
    for option, value, own in (
        ("--lr", "0.5", "0.06"),
        ("--crops", "2", "1"),
        ("--seed", "7", "0"),
    ):
        error = fails(capsys, ressl.main, "--resume", folder, option, value)
        assert f"{option} {own}: leave {option} out" in error
    error = fails(capsys, ressl.main, "--resume", folder, "--epochs", "2")
    assert "3 epochs are done" in error
    assert (folder / "checkpoint.pt").read_bytes() == before


def test_a_resumed_run_may_have_more_epochs(finished, tmp_path, capsys):
    """Its schedule is from there on that of the longer run; what is named again may be the same."""
    shutil.copytree(finished[0], "run")
    argv = ["--resume", "run", "--epochs", "5", "--lr", "0.06", "--knn-every", "9"]
    metrics = ressl.main(argv)
    assert "after epoch 3, to epoch 5" in capsys.readouterr().out
    header, *epochs = records(tmp_path / "run")
    assert header["arguments"]["epochs"] == 3  # as it was begun: so it is no run of five epochs
    assert common.read_checkpoint("run")["arguments"]["epochs"] == 5
    assert [r["epoch"] for r in epochs] == [0, 1, 2, 3, 4, 5]
    expected = [ressl.learning_rate(3 * last - 1, 15, 2, 0.06) for last in (4, 5)]
    assert [r["lr"] for r in epochs[4:]] == pytest.approx(expected)
    assert "student_knn" not in epochs[4]
    assert epochs[-1] == metrics
    assert ressl.main(["--resume", "run"]) == metrics


def test_another_methods_run_is_not_resumed(finished, tmp_path, capsys):
    checkpoint = common.read_checkpoint(finished[0])
    checkpoint["arguments"]["method"] = "residual_momentum"
    (tmp_path / "log.jsonl").write_bytes((finished[0] / "log.jsonl").read_bytes())
    torch.save(checkpoint, "checkpoint.pt")
    assert "residual_momentum.py" in fails(capsys, ressl.main, "--resume", tmp_path)


KINDS = ["truncated", "text", "empty", "pickle", "malicious", "foreign", "no epoch", "weights"]


class Malicious:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("hacked"),)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("main", [knn_eval.main, linear_eval.main, ressl.main])
def test_broken_and_hostile_checkpoints_are_refused(finished, capsys, kind, main):
    path = pathlib.Path("run/checkpoint.pt")
    path.parent.mkdir()
    (path.parent / "log.jsonl").write_bytes((finished[0] / "log.jsonl").read_bytes())
    good = (finished[0] / "checkpoint.pt").read_bytes()
    if kind == "truncated":
        path.write_bytes(good[: len(good) // 2])
    elif kind == "malicious":
        torch.save({"arguments": Malicious()}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Malicious()))
    elif kind == "foreign":
        torch.save({"state_dict": {"conv1.weight": torch.zeros(3)}}, path)
    elif kind == "no epoch":
        torch.save({"arguments": {"method": "ressl"}}, path)
    elif kind == "weights":
        checkpoint = common.read_checkpoint(finished[0])
        checkpoint["student_encoder"]["0.weight"] = torch.zeros(3)
        checkpoint["model"]["student.encoder.0.weight"] = torch.zeros(3)
        torch.save(checkpoint, path)
    else:
        path.write_bytes(b"hello" if kind == "text" else b"")
    argv = ["--resume", "run"] if main is ressl.main else ["run"]
    before = path.read_bytes()
    assert "checkpoint" in fails(capsys, main, *argv)
    assert not pathlib.Path("hacked").exists()
    assert path.read_bytes() == before


@pytest.mark.parametrize("main", [knn_eval.main, linear_eval.main])
@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["nowhere"], "no checkpoint nowhere"),
        ([], "run"),
        (["{run}", "--branch", "both"], "--branch"),
        (["{run}", "--device", "gpu"], "--device"),
        (["{run}", "--subset", "9999"], "do not fit"),
    ],
)
def test_wrong_input_of_the_evaluations(finished, capsys, main, argv, says):
    argv = [word.format(run=finished[0]) for word in argv]
    assert says in fails(capsys, main, *argv)


@pytest.mark.parametrize("option", ["--k", "--temperature"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "x"])
def test_wrong_numbers_of_knn_eval(finished, capsys, option, value):
    assert option in fails(capsys, knn_eval.main, finished[0], option, value)


def test_out_of_gpu_memory_names_the_remedy(monkeypatch, capsys):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ressl, "train_step", full)
    assert "--batch-size" in fails(capsys, ressl.main, *SMALL)


def test_help_touches_no_data_network_or_gpu(tmp_path):
    scripts = ["ressl.py", "residual_momentum.py", "knn_eval.py", "linear_eval.py"]
    code = (
        "import runpy, socket, sys, torch\n"
        "socket.socket = None\n"
        f"for script in {scripts}:\n"
        "    sys.argv = [script, '--help']\n"
        "    try:\n"
        f"        runpy.run_path({str(ROOT)!r} + '/' + script, run_name='__main__')\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("auto, cpu, cuda, cuda:N, mps") == 4
    assert not list(tmp_path.iterdir())


def test_help_tells_the_data_sets_own_defaults(capsys):
    with pytest.raises(SystemExit):
        ressl.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "passes over the training images; None: 200, textures 15" in out
    for data, epochs in (("textures", 15), ("cifar10", 200)):
        args, _ = ressl.parse_arguments(["--data", data])
        ressl.fit_to_data(args, 5120)
        assert args.epochs == epochs


# --------------------------------------------------------------------------------- real data


@pytest.mark.skipif(not (ROOT / "../shared/data/cifar10").is_dir(), reason="no CIFAR-10 here")
def test_real_cifar10_end_to_end(tmp_path):
    restore = ROOT / "../shared/data/restore.py"
    subprocess.run([sys.executable, restore, "data", "cifar10"], check=True, capture_output=True)
    official = torchvision.datasets.CIFAR10("data", train=False)
    ours = common.load_images("cifar10", "data", "test")
    image = torchvision.transforms.functional.pil_to_tensor(official[7][0])
    assert torch.equal(ours.images[7], image)
    assert ours.labels[7] == official[7][1]
    argv = ["--data", "cifar10", "--arch", "conv4", "--subset", "512", "--holdout", "300"]
    metrics = ressl.main([*argv, "--epochs", "2", "--output", "run"])
    assert metrics["student_knn"] > 12
    assert knn_eval.main(["run"])["top1"] > 12
