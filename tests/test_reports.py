"""What users of such software reported elsewhere: no wrong number, crash or remedy in silence."""

import ast
import json
import math
import os
import pathlib
import re
import struct
import subprocess
import sys
import zlib

import fabricated
import numpy
import pytest
import torch
from PIL import Image
from test_commands import SMALL, _in_empty_folder_with_textures_at_hand, fails  # noqa: F401

import common
import knn_eval
import linear_eval
import residual_momentum
import ressl

ROOT = pathlib.Path(__file__).parent.parent
TINY = ["--subset", "48", "--holdout", "30", "--batch-size", "16", "--epochs", "1"]
QUEUE = ["--queue-size", "32"]


# ---------------------------------------------------------------------- a wrong number with no word


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["3.weight", "5.running_var"])
def test_an_encoder_that_is_not_finite_has_no_accuracy(name, value, capsys):
    """An infinite running statistic only makes a channel dead: the features stay finite."""
    ressl.main([*TINY, *QUEUE, "--output", "run"])
    checkpoint = torch.load("run/checkpoint.pt", weights_only=True)
    checkpoint["student_encoder"][name].fill_(value)
    torch.save(checkpoint, "run/checkpoint.pt")
    assert "not finite" in fails(capsys, knn_eval.main, "run", "--amp", "off")
    assert "evaluate another run" in fails(capsys, linear_eval.main, "run", "--amp", "off")
    assert not pathlib.Path("run/evals.jsonl").exists()


def test_scores_that_are_not_numbers_are_refused():
    for value in (math.nan, math.inf):
        scores = torch.rand(20, 7)
        scores[3, 2] = value
        with pytest.raises(common.UserError, match="not finite"):
            common.top_k(scores, torch.zeros(20, dtype=torch.int64))


def test_a_class_without_a_vote_is_never_right(capsys):
    ressl.main([*TINY, *QUEUE, "--output", "run"])
    one = knn_eval.main(["run", "--k", "1"])
    assert one["top5"] == one["top1"] < 60  # one neighbour, one class with a vote
    many = knn_eval.main(["run", "--k", "20"])
    assert many["top5"] > many["top1"]


def test_of_two_classes_there_is_no_top5(capsys):
    fabricated.own_pictures("pictures", {"cat": (20, 10), "dog": (20, 10)}, side=32)
    argv = ["--data", "folder:pictures", "--image-size", "32", "--arch", "conv4", "--epochs", "1"]
    residual_momentum.main([*argv, "--output", "run"])
    for main in (knn_eval.main, lambda argv: linear_eval.main([*argv, "--epochs", "1"])):
        capsys.readouterr()
        assert main(["run"])["top5"] is None
        assert "top5" not in capsys.readouterr().out


def write_deep_png(path, pixels):
    """pixels (H, W, 2 or 4) uint16 -> a PNG of 16 bits a channel, which Pillow cannot write."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 4: 6}[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    pack = lambda kind, data: (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(pack(*chunk) for chunk in chunks))


@pytest.mark.parametrize("colour", [0, 255])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGBA 16", "LA 16"])
def test_shapes_in_the_alpha_channel_alone_differ(mode, colour, tmp_path):
    """Upright and lying bars of one colour, on nothing: on mid-grey both can be seen."""
    for name in ("upright", "lying"):
        bars = numpy.zeros((64, 64), dtype=bool)
        bars[:, ::8] = True
        bars = bars if name == "upright" else bars.T
        channels = 2 if mode.startswith("LA") else 4
        pixels = numpy.full((64, 64, channels), colour, dtype=numpy.uint8)
        pixels[..., -1] = 255 * bars
        path = tmp_path / f"{name}.png"
        if mode.endswith("16"):
            write_deep_png(path, pixels.astype(numpy.uint16) * 257)
        elif mode == "P":
            picture = Image.fromarray((~bars).astype(numpy.uint8), "P")
            picture.putpalette([colour] * 3 + [0, 255, 0])
            picture.save(path, transparency=1)
        else:
            Image.fromarray(pixels, mode).save(path)
    lying, upright = common.load_images(f"folder:{tmp_path}", "", "train").images.int()
    assert (lying - upright.mT).abs().max() <= 1
    assert upright[0, 0, 0] == colour
    assert upright[0, 0, 4] == 128  # no longer green, nor black
    assert (upright == upright[0]).all()


def test_defaults_fit_a_small_folder_and_say_so(capsys):
    """42 pictures: K and B come down, and so does the learning rate."""
    fabricated.own_pictures("pictures", {"cat": (21, 3), "dog": (21, 3)}, side=64)
    argv = ["--data", "folder:pictures", "--arch", "conv4", "--epochs", "1", "--output"]
    ressl.main([*argv, "run"])
    args = common.read_checkpoint("run")["arguments"]
    assert args["batch_size"] <= 42 // 4
    assert args["queue_size"] == 42
    assert args["lr"] == pytest.approx(0.06 * args["batch_size"] / 256)
    out = capsys.readouterr().out
    assert f"'batch_size': {args['batch_size']}" in out
    ressl.main([*argv, "given", "--batch-size", "16", "--queue-size", "64", "--lr", "0.01"])
    args = common.read_checkpoint("given")["arguments"]
    assert (args["batch_size"], args["queue_size"], args["lr"]) == (16, 64, 0.01)
    before = common.read_checkpoint("run")["arguments"]
    ressl.main(["--resume", "run", "--epochs", "2"])  # nothing is fitted twice
    after = common.read_checkpoint("run")["arguments"]
    assert (before["batch_size"], before["lr"]) == (after["batch_size"], after["lr"])


# ------------------------------------------------------------------ a crash where a name is printed


def test_no_name_ends_a_run(tmp_path):
    """Of the consoles' encodings ASCII has the fewest letters: cp1252 and UTF-8 held as well."""
    fabricated.own_pictures("pictures", {"\u732b": (10, 4), "dog": (10, 4)}, side=32)
    pathlib.Path("pictures/train/\u732b/kap\u00fctt.png").write_bytes(b"no picture")
    name = os.fsdecode("pictures/train/dog/gr\u00fcn.jpg".encode("latin-1"))
    pathlib.Path(name).write_bytes(b"no picture")
    argv = ["--data", "folder:pictures", "--image-size", "32", "--arch", "conv4", "--epochs", "1"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, ROOT / "residual_momentum.py", *argv, "--output", "r\u00fcn"]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"left out") == 2


# ------------------------------------------------------------------------ a remedy that cannot work


def test_remedies_work(capsys, monkeypatch):
    fabricated.own_pictures("pictures", {"cat": (13, 3)}, side=32)
    argv = ["--data", "folder:pictures", "--image-size", "32", "--arch", "conv4", "--epochs", "1"]
    error = fails(capsys, ressl.main, *argv, "--holdout", "12")
    assert "1 training images" in error
    assert "--holdout" in error
    ressl.main([*argv, "--holdout", "5"])
    error = fails(capsys, ressl.main, *argv, "--batch-size", "14")
    assert "exceeds the 13 training images: lower it" in error
    ressl.main([*argv, "--batch-size", "13"])
    assert "choose folder:pictures" in fails(capsys, ressl.main, "--data", "pictures")
    assert "folder:PATH" in fails(capsys, ressl.main, "--data", "folder:")
    for device in ("cuda", "mps"):
        monkeypatch.setattr(torch, "empty", lambda *_, **__: 1 / 0)
        error = fails(capsys, ressl.main, "--device", device)
        assert error.startswith(f"error: no device {device!r} here: use --device auto or cpu")


def test_a_tiny_imagenet_without_its_annotations_is_to_be_removed(tmp_path, capsys):
    fabricated.tiny_imagenet(tmp_path, train=2, val=3)
    folder = tmp_path / "tiny-imagenet-200"
    (folder / "val" / "val_annotations.txt").unlink()
    argv = ["--data", "tiny-imagenet", "--data-dir", tmp_path]
    assert f"{folder} is not complete: remove it" in fails(capsys, ressl.main, *argv)


# ------------------------------------------------------------- what is left out or added in silence


def test_what_is_passed_over_is_told(tmp_path, capsys):
    fabricated.own_pictures(tmp_path, {"cat": (3, 1), "dog": (3, 1)}, side=32)
    for name in ("empty", "notes", "__MACOSX"):
        (tmp_path / "train" / name).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "beside.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "top.png")
    for name in ("notes/a.txt", "__MACOSX/._x.png", "cat/1.heic", "dog/2.HEIC", "dog/.hidden.txt"):
        (tmp_path / "train" / name).write_bytes(b"x")
    data = common.load_images(f"folder:{tmp_path}", "", "train", 32)
    assert data.classes == ["cat", "dog"]
    assert len(data) == 6
    line = capsys.readouterr().out.splitlines()[0]
    over = line.split("passed over: ")[1].split(", ")
    assert sorted(over) == ["1 .txt", "1 without a class", "2 .heic"]
    Image.new("RGB", (8, 8)).save(tmp_path / "val" / "top.png")
    common.load_images(f"folder:{tmp_path}", "", "test", 32)
    assert "passed over: 1 without a class" in capsys.readouterr().out
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    with pytest.raises(common.UserError, match="no pictures in"):
        common.load_images(f"folder:{tmp_path}", "", "train", 32)
    assert "2 .heic" in capsys.readouterr().out


# ------------------------------------------------------------------------------ data that changed


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "class", "flat"])
def test_data_that_changed_since_the_run_is_noticed(change, capsys):
    """The shuffle depends on the count: held-out images would be others, and trained on."""
    pictures = pathlib.Path("grow/train")
    fabricated.own_pictures("grow", {"cat": (24, 3), "dog": (24, 3)}, side=32)
    argv = ["--data", "folder:grow", "--image-size", "32", "--arch", "conv4", "--epochs", "1"]
    argv += ["--batch-size", "16", "--queue-size", "32"]
    argv += ["--holdout", "8"] if change != "flat" else []
    if change == "flat":
        for file in sorted(pictures.glob("*/*")):
            file.rename(f"grow/{file.parent.name}{file.name}")
        for folder in (*pictures.iterdir(), pictures):
            folder.rmdir()
    ressl.main([*argv, "--output", "run"])
    pathlib.Path("grow").rename("moved")
    moved = pathlib.Path("moved/train")
    assert ressl.main(["--resume", "run", "--data-dir", "moved"])  # the same contents
    if change != "flat":
        before = knn_eval.main(["run", "--data-dir", "moved"])
    pathlib.Path("moved").rename("grow")
    files = sorted(path for path in pathlib.Path("grow").rglob("*") if path.is_file())
    if change == "added":
        Image.new("RGB", (32, 32)).save(pictures / "cat" / "new.png")
    elif change == "removed":
        files[0].unlink()
    elif change == "class":
        (pictures / "dog").rename(pictures / "wolf")
    else:
        files[0].rename(files[0].with_name("another.png"))
    lines = [fails(capsys, ressl.main, "--resume", "run")]
    if change != "flat":
        lines.append(fails(capsys, knn_eval.main, "run"))
        lines.append(fails(capsys, linear_eval.main, "run", "--epochs", "1"))
    for line in lines:
        assert "changed since the run" in line
        assert re.search("then (48|54) images", line)
    assert not moved.exists()
    if change != "flat":  # on purpose
        knn_eval.main(["run", "--data-dir", "grow"])
        records = pathlib.Path("run/evals.jsonl").read_text().splitlines()
        contents = [json.loads(line)["contents"] for line in records]
        assert contents[0] != contents[1]
        assert before["top1"] is not None


def test_a_folder_that_cannot_be_read_stops(tmp_path, monkeypatch):
    """Path.rglob passes over it."""
    fabricated.own_pictures(tmp_path, {"cat": (3, 1), "dog": (3, 1)}, side=32)
    closed = tmp_path / "train" / "dog"
    listdir, scandir = os.listdir, os.scandir

    def refuse(real):
        def look(path="."):
            if str(path) == str(closed):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        return look

    monkeypatch.setattr(os, "listdir", refuse(listdir))
    monkeypatch.setattr(os, "scandir", refuse(scandir))
    with pytest.raises(PermissionError):
        common.load_images(f"folder:{tmp_path}", "", "train", 32)


# ----------------------------------------------------------------------------------- a busy machine


@pytest.mark.parametrize(("load", "threads", "told"), [(2.1, 2, 1), (0.3, 2, 0), (9.0, 1, 0)])
def test_a_busy_machine_is_told_before_the_first_epoch(load, threads, told, monkeypatch, capsys):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    ressl.main([*TINY, *QUEUE])
    before = capsys.readouterr().out.split("epoch 0/1")[0]
    assert before.count("OMP_NUM_THREADS=1 python") == told


# ------------------------------------------------------------------------------ words on the screen


def test_lines_are_not_longer_than_a_screen(capsys):
    ressl.main([*TINY, *QUEUE, "--output", "run", "--infonce-epochs", "1"])
    out = capsys.readouterr().out
    settings = out.split("epoch 0/1")[0]
    assert max(map(len, settings.splitlines())) <= 100
    knn_eval.main(["run"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("top1 ")
    assert max(map(len, lines)) <= 100


def test_pictures_of_views_come_from_all_of_a_sorted_folder(monkeypatch, capsys):
    columns = []
    monkeypatch.setattr(common, "save_picture", lambda path, c: columns.extend(c))
    data = common.render_textures(80, 0)
    for module in (ressl, residual_momentum):
        args, _ = module.parse_arguments([])
        columns.clear()
        common.save_views(args, data, module.draw_views)
        numbers = [0, 11, 22, 33, 45, 56, 67, 79]  # from the first to the last of 80
        assert torch.equal(columns[0], data.images[numbers] / 255)
        assert "left: images" in capsys.readouterr().out
        columns.clear()
        common.save_views(args, data.take(torch.arange(5)), module.draw_views)
        assert len(columns[0]) == 5
        columns.clear()
        common.save_views(args, data.take(torch.arange(9)), module.draw_views)
        assert len(columns[0]) == 8


# ------------------------------------------------------------------------- a Python that is too old


def test_python_3_10_understands_the_sources_and_the_readme_says_so():
    later = "tomllib StrEnum batched chdir walk file_digest exp2 cbrt UTC Self ExceptionGroup"
    for script in ("common", "ressl", "residual_momentum", "knn_eval", "linear_eval"):
        source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
        tree = ast.parse(source, feature_version=(3, 10))
        names = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        names |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        assert not names & set(later.split())
    assert "if sys.version_info < (3, 10):" in (ROOT / "common.py").read_text()
    first = (ROOT / "README.md").read_text(encoding="utf-8").split("```bash")[0]
    assert re.search(r"Python 3\.10 or newer", first)


def test_an_older_python_is_told_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 9, 6))
    source = (ROOT / "common.py").read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="error: needs Python 3.10 or newer"):
        exec(compile(source, "common.py", "exec"), {"__name__": "common", "__file__": "common.py"})


# -------------------------------------------------------------------------------------- siblings


def test_linked_class_folders_are_classes(tmp_path):
    fabricated.own_pictures(tmp_path / "a", {"cat": (3, 1), "dog": (4, 1)}, side=32)
    (tmp_path / "b" / "train").mkdir(parents=True)
    for name in ("cat", "dog"):
        (tmp_path / "b" / "train" / name).symlink_to(tmp_path / "a" / "train" / name)
    (tmp_path / "a" / "train" / "dog" / "loop").symlink_to(tmp_path / "a" / "train")
    data = common.load_images(f"folder:{tmp_path / 'b'}", "", "train", 32)
    assert data.labels.tolist() == [0] * 3 + [1] * 4


@pytest.mark.parametrize("log", [None, "", "5\n"])
def test_a_run_without_a_sound_log_is_resumed_and_its_log_made_whole(log):
    """The checkpoint holds the records."""
    ressl.main([*TINY, *QUEUE, "--output", "run"])
    path = pathlib.Path("run/log.jsonl")
    before = path.read_text()
    path.write_text(log) if log is not None else path.unlink()
    ressl.main(["--resume", "run", "--epochs", "2"])
    assert path.read_text().startswith(before)
    assert len(path.read_text().splitlines()) == 4


def test_a_log_without_its_checkpoint_is_not_overwritten(capsys):
    ressl.main([*TINY, *QUEUE, "--output", "run"])
    pathlib.Path("run/checkpoint.pt").unlink()
    assert "holds a run" in fails(capsys, ressl.main, *TINY, *QUEUE, "--output", "run")


def test_an_evaluation_that_cannot_be_kept_is_printed(capsys):
    ressl.main([*TINY, *QUEUE, "--output", "run"])
    pathlib.Path("run/evals.jsonl").mkdir()  # cannot be written
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        knn_eval.main(["run"])
    assert caught.value.code == 2
    assert capsys.readouterr().out.splitlines()[0].startswith("top1 ")


def test_what_is_printed_can_be_pasted(monkeypatch, capsys):
    ressl.main([*TINY, *QUEUE, "--output", "my run"])
    said = "next: python knn_eval.py 'my run' --neighbors neighbors.png\n"
    out = capsys.readouterr().out
    assert said in out
    for script in ("linear_eval.py", "docs/compare.py"):
        assert f"      python {script} 'my run'\n" in out

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "knn_accuracy", stop)  # before the first checkpoint
    with pytest.raises(SystemExit):
        ressl.main([*TINY, *QUEUE, "--output", "early"])
    assert "stopped" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--epochs", "--lr", "--queue-size", "--image-size"])
def test_numbers_beyond_all_bounds(option, capsys):
    assert option in fails(capsys, ressl.main, option, "1" + "0" * 400)


def test_heads_of_nearly_the_same_rate_are_told_apart():
    ressl.main([*TINY, *QUEUE, "--output", "run"])
    argv = ["run", "--epochs", "1", "--schedule", "cosine", "--lr", "1", "1.0000001", "2", "2"]
    result = linear_eval.main(argv)
    assert [name for name in result if "top1" in name] == [
        "top1",
        "cosine1.0000001_top1",
        "cosine2_top1",
    ]


def test_a_picture_with_an_infinite_pixel_is_not_flat(tmp_path):
    pixels = numpy.linspace(0, 1, 64, dtype=numpy.float32)[None].repeat(64, 0)
    pixels[0, 0] = numpy.inf
    Image.fromarray(pixels).save(tmp_path / "x.tif")
    (image,) = common.load_images(f"folder:{tmp_path}", "", "train").images
    assert image[0, 1, -1] - image[0, 1, 0].int() > 250


# ------------------------------------------------------------------------------------ whose commit


def test_the_commit_is_the_files_own_or_none(tmp_path):
    """Not that of the homework repository around them; and a folder's name runs no command."""
    folder = tmp_path / "x$(touch PWNED)"
    folder.mkdir()
    (folder / "common.py").write_bytes((ROOT / "common.py").read_bytes())
    for command in ("init -q", "commit -q --allow-empty -m x"):
        identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
        subprocess.run(["git", *identity, *command.split()], cwd=tmp_path, check=True)
    code = "import common; print(common.git_commit())"
    run = lambda: subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True)
    assert run().stdout.strip() == b"None"
    assert not list(tmp_path.rglob("PWNED"))
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    assert re.fullmatch(rb"[0-9a-f]{7,}-dirty", run().stdout.strip())


def test_two_equal_commands_at_once_get_two_folders(monkeypatch):
    """The second begins while the first has made its folder, and nothing in it."""
    folders = [common.new_folder("ressl-textures") for _ in range(3)]
    assert folders == [f"runs/ressl-textures{tail}" for tail in ("", "-2", "-3")]


def test_a_run_of_before_is_evaluated_and_not_resumed(capsys):
    """Its checkpoint had neither records nor untrained weights."""
    ressl.main([*TINY, *QUEUE, "--output", "run"])
    checkpoint = torch.load("run/checkpoint.pt", weights_only=True)
    untrained = checkpoint.pop("untrained_encoder")
    del checkpoint["records"], checkpoint["arguments"]["compile"], checkpoint["arguments"]["stem"]
    torch.save(checkpoint, "run/checkpoint.pt")
    for branch in ("student", "teacher", "untrained"):
        knn_eval.main(["run", "--branch", branch])
    again = common.load_encoder("run", "untrained").state_dict()
    assert all(torch.equal(again[name], value) for name, value in untrained.items())
    assert "older version" in fails(capsys, ressl.main, "--resume", "run")


def test_memory_and_rights_are_not_the_pictures_fault(tmp_path, monkeypatch):
    fabricated.own_pictures(tmp_path, {"cat": (3, 1)}, side=32)
    for error in (MemoryError(), PermissionError(13, "Permission denied")):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(common, "read_picture", fail)
        with pytest.raises(type(error)):
            common.load_images(f"folder:{tmp_path}", "", "train", 32)


@pytest.mark.parametrize("error", [RuntimeError("DefaultCPUAllocator: no memory"), MemoryError()])
def test_memory_that_runs_out_is_no_damaged_checkpoint(error, monkeypatch, capsys):
    ressl.main([*TINY, *QUEUE, "--output", "run"])

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    if isinstance(error, MemoryError):
        assert "error: out of memory" in fails(capsys, knn_eval.main, "run")
    else:
        with pytest.raises(RuntimeError, match="no memory"):
            knn_eval.main(["run"])


def test_a_fault_in_a_students_edit_shows_its_traceback(monkeypatch):
    monkeypatch.setattr(ressl, "train_step", lambda *_: {}["loss"])
    with pytest.raises(KeyError):
        ressl.main([*TINY, *QUEUE])


def test_a_missing_value_of_a_float_picture_does_not_flatten_the_rest(tmp_path):
    pixels = numpy.linspace(280, 300, 64, dtype=numpy.float32)[None].repeat(64, 0)
    pixels[0, 0] = numpy.nan
    Image.fromarray(pixels).save(tmp_path / "x.tif")
    (image,) = common.load_images(f"folder:{tmp_path}", "", "train").images
    assert image[0, 1, -1] - image[0, 1, 0].int() > 250
    assert abs(image[0, 0, 0].int() - 127) <= 1  # the middle


# ------------------------------------------------------------------------ where things are started


def test_an_exercises_check_can_be_started_anywhere(tmp_path):
    check = ROOT / "tests" / "exercises" / "test_own_pair.py"
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore"]
    for folder, name in ((check.parent, check.name), (tmp_path, check)):
        command = [sys.executable, "-m", "pytest", *options, name]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        assert "exercise not begun" in done.stdout


def test_an_old_pillow_is_told_in_a_line(monkeypatch):
    monkeypatch.delattr(Image.Image, "has_transparency_data")
    source = (ROOT / "common.py").read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="error: needs Pillow 10.1 or newer"):
        exec(compile(source, "common.py", "exec"), {"__name__": "common", "__file__": "common.py"})


def test_a_tilde_is_the_home_folder_and_an_unknown_one_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    ressl.main([*TINY, *QUEUE, "--output=~/run"])
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    assert not pathlib.Path("~").exists()
    assert "no folder" in fails(capsys, ressl.main, "--data", "folder:~nobody-of-that-name")


def test_a_set_that_does_not_fit_the_memory_is_told_in_a_line(monkeypatch, capsys):
    fabricated.own_pictures("pictures", {"cat": (20, 10)}, side=32)

    def fail(*_):
        raise MemoryError("Unable to allocate 938 GiB")

    monkeypatch.setattr(common.numpy, "empty", fail)
    error = fails(capsys, ressl.main, "--data", "folder:pictures", "--image-size", "4096")
    assert "out of memory" in error
    assert "--image-size" in error


def test_names_that_differ_in_unicodes_form_alone_are_one_class(tmp_path):
    """macOS writes a letter and its accent as two, Linux and Windows as one."""
    for part, name in (("train", "caf\u00e9"), ("val", "cafe\u0301")):
        folder = tmp_path / part / name
        folder.mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(folder / "x.png")
    data = common.load_images(f"folder:{tmp_path}", "", "test", 32)
    assert data.labels.tolist() == [0]


def test_pictures_of_a_flat_val_are_told_where_they_belong(tmp_path):
    fabricated.own_pictures(tmp_path, {"cat": (2, 0)}, side=32)
    (tmp_path / "val").mkdir(exist_ok=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "val" / "x.png")
    with pytest.raises(common.UserError, match="no pictures in .*val.CLASS: put some there"):
        common.load_images(f"folder:{tmp_path}", "", "test", 32)


def test_pictures_of_several_frames_give_their_first(tmp_path):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    for name in ("x.gif", "x.tif", "x.mpo", "x.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    data = common.load_images(f"folder:{tmp_path}", "", "train", 32)
    assert len(data) == 4
    assert (data.images[:, 0].float().mean(dim=(1, 2)) > 240).all()
    assert (data.images[:, 2].float().mean(dim=(1, 2)) < 15).all()


def test_features_that_cannot_be_written_leave_the_old_file(monkeypatch, capsys):
    ressl.main([*TINY, *QUEUE, "--output", "run"])
    knn_eval.main(["run", "--features", "f.npz"])
    before = pathlib.Path("f.npz").read_bytes()

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    assert "No space left" in fails(capsys, knn_eval.main, "run", "--features", "f.npz")
    assert pathlib.Path("f.npz").read_bytes() == before
    assert len(pathlib.Path("run/evals.jsonl").read_text().splitlines()) == 2  # the numbers stay
