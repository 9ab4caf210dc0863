"""Residual Momentum: its losses, its step, and what it shares with ressl.py."""

import argparse
import ast
import copy
import difflib
import json
import math
import pathlib

import numpy
import pytest
import torch

import common
import knn_eval
import linear_eval
import residual_momentum
import ressl

ROOT = pathlib.Path(__file__).parent.parent
ARGS = argparse.Namespace(
    base="moco", residual="cosine", residual_weight=1.0, temperature=0.2, image_size=32
)
SMALL = ["--subset", "48", "--holdout", "30", "--batch-size", "16", "--epochs", "3"]


def with_args(**changes):
    return argparse.Namespace(**{**vars(ARGS), **changes})


def small_model(arch="conv4", bn_splits=1):
    torch.manual_seed(0)
    return residual_momentum.Model(common.build_encoder(arch, "small"), bn_splits)


def sgd(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=0.05, momentum=0.9)


def step(model, views, args=ARGS, scaler=None, momentum=0.9, dtype=None):
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    train_step = residual_momentum.train_step
    return train_step(model, sgd(model), scaler, views, args, momentum, dtype)


def pair(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, dtype=dtype, generator=generator) for _ in range(2)]


def cosines(a, b):
    a, b = (x / numpy.linalg.norm(x, axis=1, keepdims=True) for x in (a.numpy(), b.numpy()))
    return a @ b.T


# ---------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("temperature", [0.1, 0.2, 1.0])
def test_info_nce_equals_the_formula(temperature):
    q, k = pair(6, 10)
    weights = numpy.exp(cosines(q, k) / temperature)
    expected = [-math.log(weights[i, i] / weights[i].sum()) for i in range(6)]
    loss = residual_momentum.info_nce(q, k, temperature)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(2 * temperature * numpy.mean(expected), abs=1e-10)


def test_residual_and_byol_losses_equal_the_formulas():
    student, teacher = pair(6, 10)
    cos = cosines(student, teacher).diagonal()
    residual = residual_momentum.residual_loss(student, teacher)
    assert residual.item() == pytest.approx((1 - cos).mean(), abs=1e-10)
    byol = residual_momentum.byol_loss(student, teacher)
    assert byol.item() == pytest.approx((2 - 2 * cos).mean(), abs=1e-10)
    assert residual_momentum.residual_loss(student, 3 * student).item() == pytest.approx(0)


def test_kd_loss_equals_the_formula():
    student, teacher = pair(6, 10)
    unit = [
        x.numpy() / numpy.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (student, teacher)
    ]
    p_s, p_t = (numpy.exp(x / 0.2) / numpy.exp(x / 0.2).sum(1, keepdims=True) for x in unit)
    expected = (p_t * numpy.log(p_t / p_s)).sum(1).mean()
    loss = residual_momentum.kd_loss(student, teacher, 0.2)
    assert loss.item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("name", ["info_nce", "byol_loss", "residual_loss", "kd_loss"])
def test_no_gradient_reaches_the_teacher(name):
    student, teacher = (x.requires_grad_() for x in pair(4, 8))
    temperature = (0.2,) if name in ("info_nce", "kd_loss") else ()
    getattr(residual_momentum, name)(student, teacher, *temperature).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


# ---------------------------------------------------------------------------------------- a step


@pytest.mark.parametrize("base", ["moco", "byol"])
@pytest.mark.parametrize("residual", ["cosine", "kd"])
def test_swapping_the_views_changes_nothing(base, residual):
    x1, x2 = pair(8, 3, 32, 32, dtype=torch.float32)
    args = with_args(base=base, residual=residual)
    one, two = (step(small_model(), views, args) for views in ((x1, x2), (x2, x1)))
    torch.testing.assert_close(one, two)


def test_loss_is_base_plus_weighted_residual_and_gap_is_that_of_the_same_view():
    views = pair(8, 3, 32, 32, dtype=torch.float32)
    twin = small_model()
    with torch.no_grad():
        q1, q2 = (twin.predictor(twin.student(x)) for x in views)
        k1, k2 = (twin.teacher(x) for x in views)
    base = residual_momentum.info_nce(q1, k2, 0.2) + residual_momentum.info_nce(q2, k1, 0.2)
    residual = residual_momentum.residual_loss(q1, k1) + residual_momentum.residual_loss(q2, k2)
    for weight in (0.0, 0.5, 2.0):
        scalars = step(small_model(), views, with_args(residual_weight=weight))
        assert list(scalars) == ["loss", "gap"]
        torch.testing.assert_close(scalars["loss"], base + weight * residual)
        torch.testing.assert_close(scalars["gap"], residual / 2)


@pytest.mark.parametrize("base", ["moco", "byol"])
def test_weight_zero_equals_the_step_without_the_terms_line(base):
    """Bit for bit, over several steps."""
    source = pathlib.Path(residual_momentum.__file__).read_text()
    line = "    loss = inter + args.residual_weight * intra\n"
    assert source.count(line) == 1
    without = {"__name__": "without"}
    exec(source.replace(line, "    loss = inter\n"), without)
    args, models = with_args(base=base, residual_weight=0.0), (small_model(), small_model())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizers = [sgd(model) for model in models]
    for i in range(3):
        views = pair(8, 3, 32, 32, dtype=torch.float32, seed=i)
        residual_momentum.train_step(models[0], optimizers[0], scaler, views, args, 0.9)
        without["train_step"](models[1], optimizers[1], scaler, views, args, 0.9)
    one, two = (model.state_dict() for model in models)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_term_closes_the_gap():
    views, gaps = pair(16, 3, 32, 32, dtype=torch.float32), {}
    for weight in (0.0, 5.0):
        model = small_model()
        optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", enabled=False)
        for _ in range(10):
            scalars = residual_momentum.train_step(
                model, optimizer, scaler, views, with_args(residual_weight=weight), 0.99
            )
        gaps[weight] = scalars["gap"].item()
    assert gaps[5.0] < gaps[0.0]


def test_teacher_follows_encoder_and_projector_and_has_no_predictor():
    model, views = small_model(), pair(8, 3, 32, 32, dtype=torch.float32)
    before = {name: value.clone() for name, value in model.teacher.named_parameters()}
    step(model, views, momentum=0.75)
    student = dict(model.student.named_parameters())
    assert {name.split(".")[0] for name in student} == {"encoder", "projector"}
    assert {name.split(".")[0] for name in before} == {"encoder", "projector"}
    for name, value in model.teacher.named_parameters():
        torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * student[name])
        assert value.grad is None


def test_networks_have_the_shapes_of_moco_v3():
    model, images = small_model(), torch.randn(4, 3, 32, 32)
    network = model.student
    shapes = lambda mlp: [tuple(m.weight.shape) for m in mlp if isinstance(m, torch.nn.Linear)]
    assert shapes(network.projector) == [(2048, 256), (256, 2048)]
    assert shapes(model.predictor) == [(2048, 256), (256, 2048)]
    assert not any(m.bias is not None for m in model.modules() if type(m) is torch.nn.Linear)
    assert not network.projector[-1].affine
    z = network.projector(network.encoder(images))
    torch.testing.assert_close(z.mean(0), torch.zeros(256), atol=1e-4, rtol=0)
    assert network(images).shape == (4, 256)


def test_teacher_momentum_end_points():
    rate = lambda step: residual_momentum.teacher_momentum(step, 1000, 0.99)
    assert rate(0) == pytest.approx(0.99)
    assert rate(500) == pytest.approx(0.995)
    assert rate(1000) == 1
    assert all(rate(i) < rate(i + 1) for i in range(1000))


@pytest.mark.parametrize("arch", ["conv4", "resnet18"])
def test_the_encoders_batch_norm_normalises_each_group_by_itself(arch):
    """The projector's normalises the whole batch, as that of ressl.py would."""
    plain, split = small_model(arch), small_model(arch, bn_splits=2)
    split.load_state_dict(plain.state_dict())
    images = torch.randn(8, 3, 32, 32) * torch.linspace(0.5, 2, 8).view(8, 1, 1, 1)
    for name in ("student", "teacher"):
        network = getattr(plain, name)
        whole = network(images)
        groups = getattr(split, name)(images)
        features = torch.cat([network.encoder(half) for half in images.split(4)])
        torch.testing.assert_close(groups, network.projector(features), rtol=1e-3, atol=1e-4)
        assert (groups - whole).abs().max() > 1e-3


@pytest.mark.parametrize("args", [ARGS, with_args(base="byol", residual="kd")])
def test_views_and_step_run_on_the_meta_device(args):
    """It raises where a tensor stayed on the CPU, or a value would have to come back."""
    images = torch.empty(16, 3, 32, 32, device="meta")
    data = common.Images(images, None, [], (0.5,) * 3, (0.2,) * 3)
    model = small_model("resnet18").to("meta", memory_format=torch.channels_last)
    normalize = common.normalizer(data)
    generator = torch.Generator().manual_seed(0)
    views = residual_momentum.draw_views(images, args, generator)
    scalars = step(model, [normalize(view) for view in views], args)
    assert all(value.is_meta and value.ndim == 0 for value in scalars.values())


def test_step_in_bf16_keeps_losses_and_weights_in_float32():
    model, views = small_model(), pair(8, 3, 32, 32, dtype=torch.float32)
    plain = step(small_model(), views)
    mixed = step(model, views, dtype=torch.bfloat16)
    assert {value.dtype for value in mixed.values()} == {torch.float32}
    assert 0 < max((mixed[name] - plain[name]).abs() for name in plain) < 0.1
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_two_independent_strong_views():
    images = torch.rand(32, 3, 32, 32)
    x1, x2 = residual_momentum.draw_views(images, ARGS, torch.Generator().manual_seed(0))
    one = torch.Generator().manual_seed(0)
    assert torch.equal(x1, residual_momentum.strong_view(images, generator=one))
    assert torch.equal(x2, residual_momentum.strong_view(images, generator=one))
    assert (x1 - x2).abs().mean() > 0.05


# -------------------------------------------------------------------------------------- commands


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_run_resume_and_evaluate(tmp_path, monkeypatch):
    """Stopped twice and resumed, a run ends bit for bit as one never stopped."""
    monkeypatch.chdir(tmp_path)
    metrics = residual_momentum.main([*SMALL, "--output", "whole"])
    train_step, steps = residual_momentum.train_step, []

    def stop_sometimes(*arguments):
        steps.append(1)
        if len(steps) in (2, 7):
            raise KeyboardInterrupt
        return train_step(*arguments)

    monkeypatch.setattr(residual_momentum, "train_step", stop_sometimes)
    monkeypatch.setattr(common, "SAVE_EVERY", 0)
    argv = [*SMALL, "--output", "stopped"]
    for _ in range(2):
        with pytest.raises(SystemExit):
            residual_momentum.main(argv)
        argv = ["--resume", "stopped"]
    residual_momentum.main(argv)
    one, two = (common.read_checkpoint(name)["model"] for name in ("whole", "stopped"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    logs = [read_log(tmp_path / name)[1:] for name in ("whole", "stopped")]
    keys = ("epoch", "loss", "gap", "student_knn", "teacher_knn")
    one, two = ([[record.get(key) for key in keys] for record in log] for log in logs)
    assert one == two
    assert [record["epoch"] for record in logs[0]] == [0, 1, 2, 3]
    assert all(0 < record["gap"] < 2 for record in logs[0][1:])
    for branch in ("student", "teacher"):
        result = knn_eval.main(["whole", "--branch", branch])
        assert result["top1"] == pytest.approx(metrics[f"{branch}_knn"])
    assert 0 <= linear_eval.main(["whole", "--epochs", "1"])["top1"] <= 100


@pytest.mark.parametrize("option", ["--residual-weight", "--temperature", "--momentum"])
@pytest.mark.parametrize("value", ["-1", "nan", "inf", "x"])
def test_wrong_numbers(option, value, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        residual_momentum.main([option, value])
    assert caught.value.code == 2
    assert option in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_other_methods_run_is_not_resumed(tmp_path, capsys):
    ressl.main([*SMALL, "--queue-size", "64", "--epochs", "1", "--output", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as caught:
        residual_momentum.main(["--resume", str(tmp_path / "run")])
    assert caught.value.code == 2
    assert "ressl.py" in capsys.readouterr().err


# -------------------------------------------------------------------------------- the two files


def test_both_methods_have_the_same_rooms_in_the_same_order():
    names = []
    for name in ("ressl.py", "residual_momentum.py"):
        body = ast.parse((ROOT / name).read_text()).body
        names.append([node.name for node in body if hasattr(node, "name")])
    own = {
        "relation",
        "prediction_loss",
        "relation_loss",
        "update_queue",
        "mlp",
        "byol_loss",
        "residual_loss",
        "kd_loss",
    }
    own.add("teacher_momentum")
    first, second = ([name for name in each if name not in own] for each in names)
    assert first == second
    assert set(names[0]) ^ set(names[1]) == own


def test_the_diff_of_the_two_methods_is_short():
    """As the command diff counts them; difflib finds a few lines more."""
    ours, theirs = (
        (ROOT / n).read_text().splitlines() for n in ("ressl.py", "residual_momentum.py")
    )
    changed = [line for line in difflib.ndiff(ours, theirs) if line[0] in "+-"]
    assert len(changed) <= 310  # 286; an exercise may add some


def test_the_views_are_the_same_in_both_methods():
    images = torch.rand(8, 3, 32, 32)
    for name in ("weak_view", "strong_view"):
        views = [
            getattr(module, name)(images, 24, torch.Generator().manual_seed(3))
            for module in (ressl, residual_momentum)
        ]
        assert torch.equal(*views)


@pytest.mark.parametrize("module", [ressl, residual_momentum])
def test_what_a_run_hands_to_its_steps(module, tmp_path, monkeypatch):
    """The recipe reaches the step: optimiser, precision, memory format, normalisation, momentum."""
    calls, step = [], module.train_step

    def spy(*arguments):
        calls.append(arguments)
        return step(*arguments)

    monkeypatch.setattr(module, "train_step", spy)
    saved = []
    save = torch.save
    monkeypatch.setattr(
        torch, "save", lambda run, file: saved.append(run["epoch"]) or save(run, file)
    )
    argv = [*SMALL, "--amp", "bf16", "--knn-every", "2", "--output", str(tmp_path / "run")]
    module.main(argv + ["--queue-size", "128"] * (module is ressl))
    header, *epochs = read_log(tmp_path / "run")
    assert header["precision"] == "bfloat16"
    evaluated = [r["epoch"] for r in epochs if "student_knn" in r]
    assert evaluated == [r["epoch"] for r in epochs if "teacher_knn" in r] == [0, 2, 3]
    assert saved == [0, 3]  # no more than one in 30 seconds, but the first and the last
    assert len(calls) == 9
    for model, optimizer, scaler, views, _args, *_ in calls:
        (group,) = optimizer.param_groups
        assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 5e-4, False)
        assert {id(p) for p in group["params"]} == {
            id(p) for p in model.parameters() if p.requires_grad
        }
        assert not scaler.is_enabled()
        assert model.student.training
        assert model.teacher.training
        with torch.no_grad():
            maps = model.student.encoder[0](views[0])  # whatever the views' own format is
        assert maps.is_contiguous(memory_format=torch.channels_last)
        assert all(abs(view.mean()) < 0.5 and 0.5 < view.std() < 1.5 for view in views)
    dtype = 5 if module is ressl else 6
    assert {arguments[dtype] for arguments in calls} == {torch.bfloat16}
    if module is residual_momentum:
        expected = [residual_momentum.teacher_momentum(i, 9, 0.99) for i in range(9)]
        assert [arguments[5] for arguments in calls] == expected


def test_the_readmes_two_lines_add_the_term_to_ressl():
    """Put where the README says into ressl.py's source, they add 1 - cos to its step's loss."""
    text = (ROOT / "docs/residual-momentum.md").read_text(encoding="utf-8")
    lines = text.split("## The term in another method")[1].split("```python\n")[1]
    beside_k, after_loss = lines.split("```")[0].split("    ...\n")
    source = pathlib.Path(ressl.__file__).read_text(encoding="utf-8")
    for line, addition in (
        ("            k = common.unit_length(", beside_k),
        ("    loss = ", after_loss),
    ):
        before, found, after = source.partition(f"\n{line}")
        assert found
        assert f"\n{line}" not in after
        rest, _, last = after.partition("\n")
        source = f"{before}{found}{rest}\n{addition}{last}"
    changed = {"residual_loss": residual_momentum.residual_loss, "__name__": "changed"}
    exec(compile(source, "changed", "exec"), changed)

    args, _ = ressl.parse_arguments(["--momentum", "0.9"])
    ressl.fit_to_data(args, 5120)
    torch.manual_seed(0)
    views = [torch.randn(8, 3, 32, 32) for _ in range(2)]
    model = ressl.Model(common.build_encoder("conv4", "small"), 16)
    with torch.no_grad():
        q, k = model.student(views[0]), model.teacher(views[0])
    cos = cosines(q, k).diagonal()
    losses = []
    for step in (ressl.train_step, changed["train_step"]):
        trained = copy.deepcopy(model)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        losses.append(step(trained, sgd(trained), scaler, views, args)["loss"].item())
    assert losses[1] - losses[0] == pytest.approx((1 - cos).mean(), abs=1e-5)


# -------------------------------------------------------------------------------------- compiled


@pytest.fixture
def _no_compiler(monkeypatch):
    """torch.compile by a backend that needs none: the kernels differ, the graphs do not."""
    compile_one = torch.compile
    aot_eager = lambda f, **_: compile_one(f, backend="aot_eager", dynamic=False)
    monkeypatch.setattr(torch, "compile", aot_eager)


@pytest.mark.usefixtures("_no_compiler")
def test_compiled_networks_take_the_same_steps():
    eager, compiled = small_model(), small_model()
    common.compile_networks(torch.device("cpu"), compiled.student, compiled.teacher)
    assert list(compiled.state_dict()) == list(eager.state_dict())
    views = [torch.randn(16, 3, 32, 32) for _ in range(2)]
    losses = [torch.stack([step(m, views)["loss"] for _ in range(10)]) for m in (eager, compiled)]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("_no_compiler")
def test_a_compiled_run_goes_on_without_compiling(tmp_path):
    """Its checkpoints are those of any run."""
    argv = [*SMALL[:-1], "1", "--amp", "off", "--output"]
    losses = []
    for name, option in (("plain", []), ("compiled", ["--compile"])):
        run = str(tmp_path / name)
        residual_momentum.main([*argv, run, *option])
        metrics = residual_momentum.main(["--resume", run, "--epochs", "2", "--no-compile"])
        losses.append(metrics["loss"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)
