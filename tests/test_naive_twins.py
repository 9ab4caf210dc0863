"""Both methods beside second implementations, written for this test from the equations alone.

The twins know one image, one entry of the queue and one parameter at a time, in float64. They share
with ours the networks' forward pass, the first weights and the views, and nothing else; after each
of 20 steps losses, weights, BatchNorm's statistics, teacher and queue have to agree.
"""

import argparse
import copy
import math

import pytest
import torch

import common
import residual_momentum
import ressl

STEPS, WARMUP, PEAK, BATCH, QUEUE, DECAY = 20, 4, 0.02, 8, 24, 5e-4


def unit(vector):
    return vector / (vector @ vector).sqrt()


def cross_entropy_of_softmax(target, similarities, temperature):
    """- sum_i target_i log softmax(similarities / temperature)_i, an entry after another."""
    total = sum((s / temperature).exp() for s in similarities)
    pairs = zip(target, similarities, strict=True)
    return -sum(t * ((s / temperature).exp() / total).log() for t, s in pairs)


def softmax(similarities, temperature):
    weights = [math.exp(s / temperature) for s in similarities]
    return [w / sum(weights) for w in weights]


class Twin:
    """What both methods have: SGD with momentum and weight decay, and the moving average."""

    def __init__(self, model, args):
        model = copy.deepcopy(model)
        self.student, self.teacher, self.predictor = model.student, model.teacher, model.predictor
        self.args, self.velocity, self.steps = args, {}, 0

    def learning_rate(self):
        if self.steps < WARMUP:
            return PEAK * self.steps / WARMUP
        done = (self.steps - WARMUP) / (STEPS - WARMUP)
        return PEAK * (1 + math.cos(math.pi * done)) / 2

    def step(self, views):
        loss = self.loss(views)
        parameters = dict(self.student.named_parameters())
        parameters |= {f"h.{name}": p for name, p in self.predictor.named_parameters()}
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        momentum, rate = self.momentum(), self.learning_rate()
        with torch.no_grad():
            for (name, p), gradient in zip(parameters.items(), gradients, strict=True):
                gradient = gradient + DECAY * p
                self.velocity[name] = 0.9 * self.velocity.get(name, 0) + gradient
                p -= rate * self.velocity[name]
            for name, p in self.teacher.named_parameters():
                p.copy_(momentum * p + (1 - momentum) * parameters[name])
        self.steps += 1
        return loss.item()


class NaiveReSSL(Twin):
    def __init__(self, model, args):
        super().__init__(model, args)
        self.queue = list(model.queue.clone())  # the oldest first

    def momentum(self):
        return self.args.momentum

    def loss(self, views):
        *crops, weak = views
        teacher = [unit(z) for z in self.teacher(weak).detach()]
        losses = []
        for view in crops:
            for z_s, z_w in zip(self.predictor(self.student(view)), teacher, strict=True):
                others = [unit(z_s) @ entry for entry in self.queue]
                if self.steps < self.args.infonce_steps:
                    similarities = [unit(z_s) @ z_w, *others]
                    target, tau = [1.0] + [0.0] * len(others), self.args.student_temp
                else:
                    relation = [(z_w @ entry).item() for entry in self.queue]
                    target, tau = softmax(relation, self.args.teacher_temp), self.args.student_temp
                    similarities = others
                losses.append(cross_entropy_of_softmax(target, similarities, tau))
        self.queue = self.queue[len(teacher) :] + teacher
        return sum(losses) / len(losses)


class NaiveResidualMomentum(Twin):
    def momentum(self):
        start = self.args.momentum
        return 1 - (1 - start) * (1 + math.cos(math.pi * self.steps / STEPS)) / 2

    def loss(self, views):
        students = [[unit(z) for z in self.predictor(self.student(view))] for view in views]
        teachers = [[unit(z) for z in self.teacher(view).detach()] for view in views]
        total, tau = 0.0, self.args.temperature
        for view in (0, 1):
            for i, q in enumerate(students[view]):
                keys = teachers[1 - view]  # across the views
                if self.args.base == "moco":
                    target = [float(j == i) for j in range(len(keys))]
                    similarities = [q @ key for key in keys]
                    base = 2 * tau * cross_entropy_of_softmax(target, similarities, tau)
                else:
                    base = ((q - keys[i]) ** 2).sum()
                residual = 1 - q @ teachers[view][i]  # in the same view
                total = total + (base + self.args.residual_weight * residual) / len(keys)
        return total


def race(module, model, twin, args, crops, before_step=tuple):
    """20 steps of both, on the same views; everything has to agree after each."""
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=PEAK,
        momentum=0.9,
        weight_decay=DECAY,
    )
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(STEPS):
        views = [torch.randn(BATCH, 3, side, side, dtype=torch.float64) for side in crops]
        optimizer.param_groups[0]["lr"] = module.learning_rate(step, STEPS, WARMUP, PEAK)
        ours = module.train_step(model, optimizer, scaler, views, args, *before_step(step))
        assert ours["loss"].item() == pytest.approx(twin.step(views), abs=1e-10)
        for network in ("student", "teacher", "predictor"):
            state = getattr(twin, network).state_dict()
            for name, value in getattr(model, network).state_dict().items():
                torch.testing.assert_close(value, state[name], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("predictor", "infonce_steps", "crops"),
    [(False, 0, [16, 16]), (True, 6, [16, 14, 16])],
)
def test_ressl(predictor, infonce_steps, crops):
    torch.manual_seed(0)
    model = ressl.Model(common.build_encoder("conv4", "small"), QUEUE, predictor).double()
    args = argparse.Namespace(student_temp=0.1, teacher_temp=0.04, momentum=0.9)
    args.infonce_steps = infonce_steps
    twin = NaiveReSSL(model, args)
    race(ressl, model, twin, args, crops, lambda step: (None, step < infonce_steps))
    torch.testing.assert_close(model.queue, torch.stack(twin.queue), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("base", "weight"), [("moco", 1.0), ("byol", 0.5)])
def test_residual_momentum(base, weight):
    torch.manual_seed(0)
    model = residual_momentum.Model(common.build_encoder("conv4", "small")).double()
    args = argparse.Namespace(base=base, residual="cosine", residual_weight=weight)
    args.temperature, args.momentum = 0.2, 0.9
    twin = NaiveResidualMomentum(model, args)
    momentum = lambda step: (residual_momentum.teacher_momentum(step, STEPS, 0.9),)
    race(residual_momentum, model, twin, args, [16, 16], momentum)
