"""Exercise cosine_momentum: in ressl.py the teacher's m rises to 1 by a cosine."""

import math

import drive
import pytest
import torch

import ressl

START, EPOCHS, STEPS = 0.8, 4, 3  # steps an epoch


class Watched(torch.optim.SGD):
    """Notes the teacher before each of its steps, and the student after it."""

    def __init__(self, model):
        super().__init__(drive.trained(model), lr=0.05)
        self.model, self.before, self.after = model, [], []

    def step(self, closure=None):
        self.before.append(drive.vector(self.model.teacher))
        super().step(closure)
        self.after.append(drive.vector(self.model.student))


def momenta(epochs, start=START):
    """The m that train_epoch really used, in each step of these epochs: from the weights alone."""
    model, args = drive.small_model(ressl, 32), drive.arguments(momentum=start, batch_size=8)
    args.epochs = EPOCHS
    optimizer, generator = Watched(model), torch.Generator().manual_seed(0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    data = drive.pictures(STEPS * args.batch_size, 16)
    args.image_size = 16
    for epoch in epochs:
        logged = ressl.train_epoch(epoch, model, optimizer, scaler, generator, data, args, None)
    teachers = [*optimizer.before, drive.vector(model.teacher)]
    used = []
    for old, new, student in zip(teachers, teachers[1:], optimizer.after, strict=False):
        used.append(((new - student) @ (old - student) / (old - student).square().sum()).item())
    return used, args, logged


def cosine(step, steps=EPOCHS * STEPS, start=START):
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * step / steps))


@pytest.fixture(scope="module")
def run():
    used, args, logged = momenta(range(1, EPOCHS + 1))
    if used == pytest.approx([START] * len(used), abs=1e-3):
        pytest.skip("exercise not begun: the teacher's momentum is the same in every step")
    return used, args, logged


def test_momentum_rises_by_a_cosine_over_the_whole_run(run):
    used, args, _ = run
    steps, right = len(used), [cosine(i) for i in range(EPOCHS * STEPS)]
    shown = "m in the first steps: " + ", ".join(f"{m:.4f}" for m in used[:5])
    shown += "; expected " + ", ".join(f"{m:.4f}" for m in right[:5])
    if used == pytest.approx(right, abs=1e-3):
        return
    epochs = [used[i : i + STEPS] for i in range(0, steps, STEPS)]
    if all(max(epoch) - min(epoch) < 1e-3 for epoch in epochs):
        why = "m changes once an epoch: it has to follow the step, not the epoch"
    elif epochs[0] == pytest.approx(epochs[1], abs=1e-3):
        why = "m starts anew in every epoch: the cosine runs over all steps of all epochs"
    elif used[0] > used[-1]:
        why = "m falls: it begins at --momentum, and ends at 1"
    elif args.momentum != START:
        why = "args.momentum is overwritten, so that each step starts from the last one's m"
    elif used == pytest.approx([START + (1 - START) * i / steps for i in range(steps)], abs=1e-3):
        why = "m rises along a straight line: it has to be half a cosine"
    elif used == pytest.approx([cosine(i + 1) for i in range(steps)], abs=1e-3):
        why = "m is one step ahead: the first step has --momentum itself"
    elif used == pytest.approx([cosine(i, steps - 1) for i in range(steps)], abs=1e-3):
        why = "m is 1 in the last step: it gets there only after it"
    else:
        why = "m is not 1 - (1 - start) (1 + cos(pi step / steps)) / 2"
    raise AssertionError(f"{why}. {shown}")


def test_arguments_stay_what_the_user_gave(run):
    assert run[1].momentum == START, "args.momentum is overwritten: the checkpoint saves it"


def test_m_is_logged(run):
    used, _, logged = run
    message = f"an epoch returns {list(logged)}: log m beside lr"
    assert logged.get("m") is not None, message
    last, mean = used[-1], sum(used[-STEPS:]) / STEPS
    message = f"the logged m is {float(logged['m']):.4f}, and the last step's {last:.4f}"
    assert min(abs(float(logged["m"]) - m) for m in (last, mean)) < 1e-3, message


def test_a_step_without_m_takes_that_of_the_arguments(run):
    model, views = drive.small_model(ressl, 32), torch.randn(2, 8, 3, 32, 32)
    message = (
        "train_step cannot be called as before: give its new argument a default, and put it last"
    )
    try:
        new, _ = drive.step(ressl, model, views, drive.arguments(momentum=START))
    except (TypeError, AttributeError):
        raise AssertionError(message) from None
    old, student = drive.vector(model.teacher), drive.vector(new.student)
    m = (drive.vector(new.teacher) - student) @ (old - student) / (old - student).square().sum()
    message = f"train_step without m has m = {m:.4f}: its default has to mean args.momentum"
    assert abs(m - START) < 1e-3, message


def test_a_resumed_run_goes_on_where_it_was(run):
    """The third epoch alone, on a fresh model, as after --resume."""
    used, _, _ = momenta([3])
    right = [cosine(i) for i in range(2 * STEPS, 3 * STEPS)]
    shown = [", ".join(f"{m:.4f}" for m in ms) for ms in (used, right)]
    message = "after --resume into epoch 3 m is {}, not {}: compute it from `step`".format(*shown)
    assert used == pytest.approx(right, abs=1e-3), message


def test_momentum_1_keeps_the_teacher_as_it_is(run):
    used, _, _ = momenta([1], start=1.0)
    assert used == pytest.approx([1.0] * STEPS, abs=1e-4), "with --momentum 1 the teacher moves"
