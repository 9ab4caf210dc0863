"""ReSSL: the loss, the teacher, the queue, the schedule, and the whole step."""

import argparse
import math

import numpy
import pytest
import torch
from torch.nn import functional as F

import common
import ressl

ARGS = argparse.Namespace(
    student_temp=0.1, teacher_temp=0.04, momentum=0.9, teacher_view="weak", crops=1, image_size=32
)

ZEROS = {"loss": torch.zeros(())}


def with_args(**changes):
    return argparse.Namespace(**{**vars(ARGS), **changes})


def unit(*shape, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def small_model(arch="conv4", queue_size=32, predictor=False, bn_splits=1):
    torch.manual_seed(0)
    return ressl.Model(common.build_encoder(arch, "small"), queue_size, predictor, bn_splits)


def sgd(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=0.05, momentum=0.9)


def no_scaler():
    return torch.amp.GradScaler("cpu", enabled=False)


# ------------------------------------------------------------------------------------------ loss


def reference_loss(q, k, queue, student_temp, teacher_temp):
    """The paper's formula, one image and one queue entry after another."""
    total = 0.0
    for z_s, z_t in zip(q.numpy(), k.numpy(), strict=True):
        weights_s = [math.exp(float(numpy.dot(z_s, e)) / student_temp) for e in queue.numpy()]
        weights_t = [math.exp(float(numpy.dot(z_t, e)) / teacher_temp) for e in queue.numpy()]
        for w_s, w_t in zip(weights_s, weights_t, strict=True):
            total -= w_t / sum(weights_t) * math.log(w_s / sum(weights_s))
    return total / len(q)


@pytest.mark.parametrize("temps", [(0.1, 0.04), (0.2, 0.07), (0.04, 0.1)])
def test_relation_loss_equals_the_formula(temps):
    torch.manual_seed(0)
    q, k, queue = unit(5, 8), unit(5, 8), unit(12, 8)
    loss = ressl.relation_loss(q, k, queue, *temps)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(reference_loss(q, k, queue, *temps), abs=1e-10)


def test_relation_loss_of_a_uniform_relation_is_ln_k():
    queue = torch.eye(9, dtype=torch.float64)[:8]
    q = torch.eye(9, dtype=torch.float64)[8:].expand(4, 9)  # equally far from all of the queue
    loss = ressl.relation_loss(q, unit(4, 9), queue, 0.1, 0.04)
    assert loss.item() == pytest.approx(math.log(8), abs=1e-12)


def test_relation_loss_is_least_where_the_relations_agree():
    """At equal temperatures and q = k it is the relation's entropy, with zero gradient in q."""
    k, queue = unit(3, 6), unit(10, 6)
    q = k.clone().requires_grad_()
    ressl.relation_loss(q, k, queue, 0.1, 0.1).backward()
    assert q.grad.abs().max() < 1e-12
    entropy = ressl.relation_loss(k, k, queue, 0.1, 0.1)
    assert ressl.relation_loss(unit(3, 6), k, queue, 0.1, 0.1) > entropy


def test_no_gradient_reaches_the_teacher_or_the_queue():
    q, k, queue = (unit(*shape).requires_grad_() for shape in [(4, 8), (4, 8), (16, 8)])
    ressl.relation_loss(q, k, queue, 0.1, 0.04).backward()
    assert q.grad.abs().sum() > 0
    assert k.grad is None
    assert queue.grad is None


# ----------------------------------------------------------------------------- teacher and queue


def test_teacher_is_the_moving_average_of_parameters_and_only_of_them():
    model = small_model()
    with torch.no_grad():
        for value in [*model.student.parameters(), *model.student.buffers()]:
            value.add_(1)
    before = {name: value.clone() for name, value in model.teacher.state_dict().items()}
    ressl.update_teacher(model, 0.9)
    student = model.student.state_dict()
    for name, value in model.teacher.named_parameters():
        torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * student[name])
        assert not torch.equal(value, before[name])
    for name, value in model.teacher.named_buffers():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_teacher_at_the_ends_of_momentum(momentum):
    model = small_model()
    with torch.no_grad():
        model.student.projector[0].weight.mul_(2)
    before = model.teacher.projector[0].weight.clone()
    ressl.update_teacher(model, momentum)
    kept = before if momentum == 1 else model.student.projector[0].weight
    assert torch.equal(model.teacher.projector[0].weight, kept)


@pytest.mark.parametrize("size", [1, 4, 5, 6])  # K need not be a multiple of B, nor larger
def test_queue_is_first_in_first_out(size):
    model = small_model(queue_size=size)
    held = model.queue[:, 0].tolist()
    for i in range(5):
        ressl.update_queue(model, torch.full((2, 128), float(i)))
        held = [*held, i, i][-size:]
        assert model.queue[:, 0].tolist() == held
        assert model.queue.shape == (size, 128)


def test_queue_starts_as_unit_noise_and_is_saved():
    model = small_model()
    torch.testing.assert_close(model.queue.norm(dim=1), torch.ones(32))
    assert model.queue.std() > 0.05
    ressl.update_queue(model, unit(8, 128, dtype=torch.float32))
    other = small_model()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.queue, model.queue)


# ---------------------------------------------------------------------------------------- a step


def test_step_trains_the_student_only_and_queues_the_teacher_afterwards():
    model = small_model()
    strong, weak = torch.randn(8, 3, 32, 32), torch.randn(8, 3, 32, 32)
    queue = model.queue.clone()
    twin = small_model()  # the same weights
    q = F.normalize(twin.student(strong), dim=1)
    k = F.normalize(twin.teacher(weak), dim=1)
    scalars = ressl.train_step(model, sgd(model), no_scaler(), (strong, weak), ARGS)
    loss = scalars["loss"]
    # The loss is that of the queue before k has entered it: the positive pair is no logit.
    torch.testing.assert_close(loss, ressl.relation_loss(q, k, queue, 0.1, 0.04).detach())
    # So is the entropy, the teacher's at its own temperature: - sum_i p_t(i) log p_t(i).
    log_p = (k.detach().double() @ queue.double().T / 0.04).log_softmax(dim=1)
    entropy = -(log_p.exp() * log_p).sum(dim=1).mean()
    torch.testing.assert_close(scalars["entropy"].double(), entropy, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.queue[-8:], k.detach())
    assert torch.equal(model.queue[:-8], queue[8:])  # the oldest have left
    assert not loss.requires_grad
    assert all(p.grad is None for p in model.teacher.parameters())
    new, old = model.student.state_dict(), twin.student.state_dict()
    for name, value in model.teacher.named_parameters():
        torch.testing.assert_close(value, 0.9 * old[name] + 0.1 * new[name])
    # The teacher's BatchNorm followed the teacher's own view, not the student's.
    mean = model.teacher.encoder[1].running_mean
    torch.testing.assert_close(mean, twin.teacher.encoder[1].running_mean)
    assert not torch.allclose(mean, model.student.encoder[1].running_mean)


def test_steps_lower_the_loss_on_a_fixed_batch():
    model = small_model()
    optimizer, views = sgd(model), (torch.randn(16, 3, 32, 32), torch.randn(16, 3, 32, 32))
    kept = model.queue.clone()
    losses = []
    for _ in range(15):
        losses.append(ressl.train_step(model, optimizer, no_scaler(), views, ARGS)["loss"].item())
        model.queue.copy_(kept)
    assert losses[-1] < losses[0] - 0.1


def test_student_gets_the_strong_view_and_teacher_the_weak(monkeypatch):
    monkeypatch.setattr(ressl, "strong_view", lambda images, *_: images + 1)
    monkeypatch.setattr(ressl, "weak_view", lambda images, *_: images + 2)
    images = torch.zeros(2, 3, 4, 4)
    student, teacher = ressl.draw_views(images, ARGS, None)
    assert (student.unique().item(), teacher.unique().item()) == (1, 2)
    args = with_args(teacher_view="strong")
    assert ressl.draw_views(images, args, None)[1].unique().item() == 1


EXTENDED = dict(predictor=True, bn_splits=2)


@pytest.mark.parametrize(
    ("arch", "options", "crops"),
    [(arch, {}, 1) for arch in common.ARCHITECTURES] + [("conv4", EXTENDED, 5)],
)
def test_views_and_step_run_on_the_meta_device(arch, options, crops):
    """It raises where a tensor stayed on the CPU, or a value would have to come back."""
    images = torch.empty(16, 3, 32, 32, device="meta")
    data = common.Images(images, None, [], (0.5,) * 3, (0.2,) * 3)
    model = small_model(arch, **options).to("meta", memory_format=torch.channels_last)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9, foreach=True)
    normalize = common.normalizer(data)
    generator = torch.Generator().manual_seed(0)
    for infonce in (False, True):
        views = ressl.draw_views(images, with_args(crops=crops), generator)
        views = [normalize(view) for view in views]
        scalars = ressl.train_step(model, optimizer, no_scaler(), views, ARGS, None, infonce)
    assert all(value.is_meta and value.ndim == 0 for value in scalars.values())
    assert model.queue.is_meta
    with pytest.raises((RuntimeError, NotImplementedError)):
        scalars["loss"].item()


def test_step_in_bf16_keeps_loss_embeddings_and_weights_in_float32():
    model, views = small_model(), [torch.randn(8, 3, 32, 32) for _ in range(2)]
    with common.autocast(torch.device("cpu"), torch.bfloat16):
        half = model.student(views[0])
    assert half.dtype == torch.bfloat16
    q, plain = common.unit_length(half), common.unit_length(model.student(views[0]))
    assert q.dtype == torch.float32
    assert 1e-5 < (q - plain).abs().max() < 0.05  # the network did run in bf16
    scalars = ressl.train_step(model, sgd(model), no_scaler(), views, ARGS, torch.bfloat16)
    assert {value.dtype for value in scalars.values()} == {torch.float32}
    assert scalars["loss"].dtype == model.queue.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in model.parameters())


class FakeScaler:
    """What GradScaler does on a GPU: scales the loss, unscales the gradients, may skip the step."""

    def __init__(self, overflow=False):
        self.calls, self.overflow = [], overflow

    def scale(self, loss):
        self.calls.append("scale")
        return loss * 1024

    def step(self, optimizer):
        self.calls.append("step")
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad /= 1024
        if not self.overflow:
            optimizer.step()

    def update(self):
        self.calls.append("update")


def test_gradient_scaler_is_used_and_changes_nothing():
    views = [torch.randn(8, 3, 32, 32) for _ in range(2)]
    plain, scaled, skipped = small_model(), small_model(), small_model()
    start = small_model().student.state_dict()
    ressl.train_step(plain, sgd(plain), no_scaler(), views, ARGS)
    scaler = FakeScaler()
    ressl.train_step(scaled, sgd(scaled), scaler, views, ARGS)
    ressl.train_step(skipped, sgd(skipped), FakeScaler(overflow=True), views, ARGS)
    assert scaler.calls == ["scale", "step", "update"]
    for name, value in plain.student.named_parameters():
        torch.testing.assert_close(scaled.student.state_dict()[name], value)
        assert torch.equal(skipped.student.state_dict()[name], start[name])


# --------------------------------------------------------------- the extended version, multi-crop


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_info_nce_equals_the_formula(temperature):
    torch.manual_seed(0)
    q, k, queue = unit(5, 8), unit(5, 8), unit(12, 8)
    total = 0.0
    for z_s, z_t in zip(q.numpy(), k.numpy(), strict=True):
        own = math.exp(numpy.dot(z_s, z_t) / temperature)
        others = [math.exp(numpy.dot(z_s, e) / temperature) for e in queue.numpy()]
        total -= math.log(own / (own + sum(others)))
    loss = ressl.info_nce(q, k, queue, temperature)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(total / 5, abs=1e-10)


def test_info_nce_of_equal_similarities_is_ln_k_plus_1_and_reaches_q_only():
    q, k, queue = (x.requires_grad_() for x in torch.eye(18, dtype=torch.float64).split([4, 4, 10]))
    loss = ressl.info_nce(q, k, queue, 0.1)  # all at right angles
    assert loss.item() == pytest.approx(math.log(11))
    q, k, queue = (unit(*shape).requires_grad_() for shape in [(4, 8), (4, 8), (16, 8)])
    ressl.info_nce(q, k, queue, 0.1).backward()
    assert q.grad.abs().sum() > 0
    assert k.grad is None
    assert queue.grad is None


def test_predictor_is_the_students_only_and_is_trained():
    model = small_model(predictor=True)
    linear = [m for m in model.predictor if isinstance(m, torch.nn.Linear)]
    assert [tuple(m.weight.shape) for m in linear] == [(2048, 128), (128, 2048)]
    assert sum(isinstance(m, torch.nn.BatchNorm1d) for m in model.predictor) == 1
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"student", "predictor"}
    assert {name.split(".")[0] for name in model.teacher.state_dict()} == {"encoder", "projector"}
    twin, views = small_model(predictor=True), [torch.randn(8, 3, 32, 32) for _ in range(2)]
    projected = twin.student.projector(twin.student.encoder(views[0]))
    q = F.normalize(twin.predictor(projected), dim=1)
    k = F.normalize(twin.teacher.projector(twin.teacher.encoder(views[1])), dim=1)
    loss = ressl.train_step(model, sgd(model), no_scaler(), views, ARGS)["loss"]
    torch.testing.assert_close(loss, ressl.relation_loss(q, k, twin.queue, 0.1, 0.04).detach())
    torch.testing.assert_close(model.queue[-8:], k)  # the teacher's projector output
    for p, before in zip(linear, twin.predictor[::3], strict=True):
        assert not torch.equal(p.weight, before.weight)


def test_without_the_predictor_nothing_changes():
    plain, extended = small_model(), small_model(predictor=True)
    assert not list(plain.predictor.parameters())
    for name, value in plain.student.state_dict().items():
        assert torch.equal(value, extended.student.state_dict()[name])


def test_step_of_the_warm_up_is_that_of_info_nce():
    views = [torch.randn(8, 3, 32, 32) for _ in range(2)]
    model, twin = small_model(), small_model()
    q, k = F.normalize(twin.student(views[0]), dim=1), F.normalize(twin.teacher(views[1]), dim=1)
    loss = ressl.train_step(model, sgd(model), no_scaler(), views, ARGS, infonce=True)["loss"]
    torch.testing.assert_close(loss, ressl.info_nce(q, k, twin.queue, 0.1).detach())
    torch.testing.assert_close(model.queue[-8:], k)


@pytest.mark.parametrize(("warm", "expected"), [(0, []), (2, [1, 2]), (9, [1, 2, 3])])
def test_warm_up_lasts_the_first_epochs(warm, expected, monkeypatch):
    seen = []
    monkeypatch.setattr(ressl, "train_step", lambda *a: seen.append(a[-1]) or ZEROS)
    data = common.load_images("textures", None, "test").take(torch.arange(100))
    args = with_args(epochs=3, batch_size=50, lr=0.1, infonce_epochs=warm)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    generator = torch.Generator().manual_seed(0)
    for epoch in (1, 2, 3):
        ressl.train_epoch(epoch, None, optimizer, None, generator, data, args, None)
    assert [i // 2 + 1 for i, infonce in enumerate(seen) if infonce] == sorted(2 * expected)


@pytest.mark.parametrize(
    ("size", "sides"), [(32, [32, 27, 23, 18, 14]), (64, [64, 55, 46, 37, 27]), (16, [16, 14])]
)
def test_multi_crop_draws_five_sizes_and_scales(size, sides, monkeypatch):
    scales, draw = [], common.draw_boxes
    monkeypatch.setattr(common, "draw_boxes", lambda *a: scales.append(a[2]) or draw(*a))
    images, generator = torch.rand(4, 3, 32, 32), torch.Generator().manual_seed(0)
    args = with_args(crops=len(sides), image_size=size)
    *strong, weak = ressl.draw_views(images, args, generator)
    assert [view.shape[-1] for view in strong] == sides
    assert weak.shape == (4, 3, size, size)
    lows, highs = [0.2, 0.172, 0.143, 0.114, 0.086], [1, 0.86, 0.715, 0.571, 0.429]
    expected = list(zip(lows, highs, strict=True))[: len(sides)]
    assert scales == [*expected, (0.2, 1)]  # the teacher's view comes last


def test_multi_crop_averages_the_losses_against_one_teacher():
    model, twin = small_model(), small_model()
    strong, weak = [torch.randn(8, 3, s, s) for s in (32, 27, 14)], torch.randn(8, 3, 32, 32)
    k = F.normalize(twin.teacher(weak), dim=1)
    losses = [
        ressl.relation_loss(F.normalize(twin.student(x), dim=1), k, twin.queue, 0.1, 0.04)
        for x in strong
    ]
    loss = ressl.train_step(model, sgd(model), no_scaler(), (*strong, weak), ARGS)["loss"]
    torch.testing.assert_close(loss, sum(losses).detach() / 3)
    torch.testing.assert_close(model.queue[-8:], k)  # one k an image
    assert torch.equal(model.queue[:-8], twin.queue[8:])


@pytest.mark.parametrize("arch", ["conv4", "resnet18", "shufflenet_v2_x1_0"])
def test_batch_norm_normalises_each_group_by_itself(arch):
    """In student and teacher; the weights have the names of those without groups."""
    plain, split = small_model(arch), small_model(arch, bn_splits=2)
    split.load_state_dict(plain.state_dict())
    images = torch.randn(8, 3, 32, 32) * torch.linspace(0.5, 2, 8).view(8, 1, 1, 1)
    for name in ("student", "teacher"):
        whole = getattr(plain, name)(images)
        groups = getattr(split, name)(images)
        expected = torch.cat([getattr(plain, name)(half) for half in images.split(4)])
        torch.testing.assert_close(groups, expected, rtol=1e-4, atol=1e-5)
        assert (groups - whole).abs().max() > 1e-3


# ------------------------------------------------------------------------------------- schedule


def test_learning_rate_end_points():
    rate = lambda step: ressl.learning_rate(step, steps=1000, warmup=100, peak=0.06)
    assert rate(0) == 0
    assert rate(50) == pytest.approx(0.03)
    assert rate(100) == pytest.approx(0.06)
    assert rate(550) == pytest.approx(0.03)
    assert rate(1000) == pytest.approx(0, abs=1e-12)
    assert all(rate(i) < rate(i + 1) for i in range(100))
    assert all(rate(i) > rate(i + 1) for i in range(100, 999))


@pytest.mark.parametrize(("epochs", "warmup"), [(200, 5), (50, 5), (20, 2), (5, 0.5)])
def test_warm_up_is_five_epochs_or_a_tenth_of_the_run(monkeypatch, epochs, warmup):
    seen = []
    monkeypatch.setattr(ressl, "train_step", lambda *_: ZEROS)
    monkeypatch.setattr(ressl, "draw_views", lambda images, *_: (images, images))
    rate = ressl.learning_rate
    monkeypatch.setattr(ressl, "learning_rate", lambda *a: seen.append(a) or rate(*a))
    data = common.load_images("textures", None, "test")
    args = argparse.Namespace(epochs=epochs, batch_size=50, lr=0.1, infonce_epochs=0)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    generator = torch.Generator().manual_seed(0)
    ressl.train_epoch(epochs, None, optimizer, None, generator, data, args, None)
    steps = 1000 // 50
    assert [step for step, *_ in seen] == list(range((epochs - 1) * steps, epochs * steps))
    assert {tuple(rest) for _, *rest in seen} == {(epochs * steps, round(warmup * steps), 0.1)}
    last = rate(epochs * steps - 1, epochs * steps, round(warmup * steps), 0.1)
    assert optimizer.param_groups[0]["lr"] == last


# -------------------------------------------------------------------------------------- compiled


def test_compiled_networks_take_the_same_steps_and_keep_their_names(monkeypatch, capsys):
    """By a backend that needs no compiler: the kernels differ, the graphs do not."""
    compile_one = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **_: compile_one(f, backend="aot_eager", dynamic=False)
    )
    eager, compiled = small_model(), small_model()
    common.compile_networks(torch.device("cpu"), compiled.student, compiled.teacher)
    assert "compiling" in capsys.readouterr().out
    assert list(compiled.state_dict()) == list(eager.state_dict())
    views = [torch.randn(16, 3, 32, 32) for _ in range(2)]
    losses = []
    for model in (eager, compiled):
        optimizer = sgd(model)
        step = lambda model=model, optimizer=optimizer: ressl.train_step(
            model, optimizer, no_scaler(), views, ARGS
        )
        losses.append(torch.stack([step()["loss"] for _ in range(10)]))
    torch.testing.assert_close(*losses, rtol=0, atol=1e-4)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-3, atol=1e-4)
