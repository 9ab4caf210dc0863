"""The benchmark: that it counts what it says, races the same operations, and runs."""

import argparse
import concurrent.futures
import re

import bench
import pytest
import torch

import common
import residual_momentum
import ressl


def on_meta(*shape):
    return torch.empty(shape, device="meta")


@pytest.mark.parametrize(
    ("work", "number"),
    [
        (lambda x: x + 1, 1),
        (lambda x: x.add_(1).mul_(2), 2),
        (lambda x: (x.T, x[:2], x.view(-1), x.split(2), x.expand(3, 4, 4), x.detach()), 0),
        (lambda x: torch.empty_like(x), 0),
        (lambda x: x @ x, 1),
        (lambda x: torch._foreach_mul_([x, x], 2), 1),
        (lambda x: torch._foreach_add([x, x], 1), 1),
        (lambda x: torch.rand(4).add(1).to("meta"), 1),  # what the host does is not counted
        (lambda x: x[:2].copy_(x[2:]), 1),
        (lambda x: x.sum().requires_grad_().exp().backward(), 4),  # sum, exp; ones, gradient
    ],
)
def test_operations_are_counted(work, number):
    x = on_meta(4, 4)
    assert bench.count_operations(lambda: work(x)) == number


def test_a_step_issues_few_operations_outside_the_networks():
    """On a GPU each is a kernel launch at least. 171 and 350 with torch 2.14."""
    counts = bench.step_operations(ressl)
    assert counts["step"] <= 173
    assert counts["views"] <= 122
    assert bench.step_operations(residual_momentum)["step"] <= 352


def test_the_plain_knn_is_ours():
    torch.manual_seed(0)
    bank, labels, queries = torch.randn(300, 8), torch.randint(5, (300,)), torch.randn(70, 8)
    plain = bench.plain_knn(bank, labels, queries, 5)
    torch.testing.assert_close(common.knn_scores(bank, labels, queries, 5), plain)


def test_the_usual_views_are_of_the_same_distribution():
    data = common.load_images("textures", None, "test").take(torch.arange(512))
    ours = ressl.strong_view(data.images / 255), ressl.weak_view(data.images / 255)
    theirs = [torch.cat(views) for views in zip(*bench.usual_loader(data), strict=True)]
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        for statistic in (torch.mean, torch.std):
            torch.testing.assert_close(statistic(a), statistic(b), rtol=0.05, atol=0)
        smooth = [(x[..., 1:] - x[..., :-1]).abs().mean() for x in (a, b)]  # crop, flip and blur
        torch.testing.assert_close(*smooth, rtol=0.05, atol=0)


def test_it_prints_a_table(capsys, monkeypatch):
    monkeypatch.setattr(bench, "BATCH", 16)  # where bf16 is emulated, 256 images take minutes
    thread = lambda count, context: concurrent.futures.ThreadPoolExecutor(count)  # for a process
    monkeypatch.setattr(bench.concurrent.futures, "ProcessPoolExecutor", thread)
    small = ["--rounds", "1", "--images", "16", "--knn-size", "1000", "--arch", "conv4"]
    small += ["--device", "cpu", "--only"]
    bench.main([*small, *(set(bench.SECTIONS) - {"rate", "busy", "accuracy"}), "--amp", "bf16"])
    bench.main([*small, "rate", "--amp", "off"])
    lines = capsys.readouterr().out.splitlines()
    cells = [line.split(" | ") for line in lines if line.startswith("| ")]
    cells = [row for row in cells if row[0] not in ("| what", "| ---")]
    assert all(len(row) == 4 for row in cells)
    assert any(row[0].startswith("| reading JPEGs") for row in cells)
    assert "EXTRAPOLATED" in next(row[2] for row in cells if row[0].startswith("| 5 epochs"))
    ratios = [row[3].split(" (")[0].rstrip("x") for row in cells if "(" in row[3]]
    # views, training by two, two methods' steps in two precisions, formats, kNN, pictures, rate
    assert len(ratios) >= 1 + 2 + 4 + 3 + 1 + 1 + 1
    assert all(float(ratio) > 0 for ratio in ratios)


def test_seconds_until_an_accuracy(capsys, monkeypatch):
    monkeypatch.setattr(bench, "BATCH", 16)
    options = dict(device=torch.device("cpu"), dtype=None, images=64, data_name="textures")
    options |= dict(data_dir="", data=common.load_images("textures", None, "test"))
    bench.accuracy(argparse.Namespace(**options), goals=(5, 101), epochs=2)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "| train" in line]
    assert [row[0].removeprefix("| training until kNN, ") for row in rows] == list(bench.RECIPES)
    for row in rows:
        assert re.fullmatch(r"5 %: \d+ s, \d+ epochs", row[1])
        assert row[2] == "101 %: no"
        assert "% after 2 epochs" in row[3]


def test_the_default_run_beside_busy_processes(capsys, monkeypatch):
    run = lambda command, **_: ressl.main(command[2:])
    program = argparse.Namespace(kill=lambda: None)
    processes = argparse.Namespace(run=run, Popen=lambda _: program)
    monkeypatch.setattr(bench, "subprocess", processes)
    bench.busy(argparse.Namespace(rounds=4, images=64, amp="off"))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| default")]
    assert len(rows) == 3
    assert all(re.search(r"threads: [\d,]+ \| 1 thread: [\d,]+ \| \d", row) for row in rows)
