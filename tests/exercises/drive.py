"""What the checks of the exercises share: small models, one step, and an answer to a wrong number.

They drive the scripts from outside only, through public functions, as docs/exercises.md says.
"""

import argparse
import copy

import torch
from torch.nn import functional as F

import common

TAU_S, TAU_T = 0.1, 0.04


def arguments(**changes):
    """What a step or an epoch of either method reads; small."""
    settings = dict(student_temp=TAU_S, teacher_temp=TAU_T, teacher_view="weak", crops=1)
    settings |= dict(temperature=0.2, base="moco", residual="cosine", residual_weight=1.0)
    settings |= dict(momentum=0.9, image_size=32, epochs=1, batch_size=16, lr=0.05)
    return argparse.Namespace(**{**settings, "infonce_epochs": 0, **changes})


def unit(*shape):
    """Random vectors of unit length."""
    return F.normalize(torch.randn(*shape), dim=-1)


def pictures(count, side=32, mean=(0.5,) * 3, std=(0.25,) * 3):
    """Random images, as a data set."""
    images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8)
    return common.Images(images, None, [], mean, std)


def small_model(method, *queue_size):
    """A model whose student has moved away from its teacher, as after some training."""
    torch.manual_seed(0)
    model = method.Model(common.build_encoder("conv4", "small"), *queue_size)
    with torch.no_grad():
        for p in trained(model):
            p.add_(0.3 * p.std() * torch.randn_like(p) if p.numel() > 1 else 0)
    return model


def trained(model):
    """The student's parameters, and the predictor's."""
    return [p for p in model.parameters() if p.requires_grad]


def sgd(model):
    return torch.optim.SGD(trained(model), lr=0.05)


def step(method, model, views, args, *rest, key="loss", **options):
    """A whole train_step on a copy of the model -> that copy, and what it returns as `key`."""
    model = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scalars = method.train_step(model, sgd(model), scaler, views, args, *rest, **options)
    return model, scalars[key].item()


def vector(parameters):
    """Parameters, or those of a network, in one vector."""
    if isinstance(parameters, torch.nn.Module):
        parameters = parameters.parameters()
    return torch.cat([p.detach().flatten() for p in parameters])


def learned(model, loss):
    """Where one step down `loss` takes the student's parameters, in one vector."""
    student = trained(model)
    gradients = torch.autograd.grad(loss, student, retain_graph=True, allow_unused=True)
    pairs = zip(student, gradients, strict=True)
    moved = [p.detach() - 0.05 * (0 if g is None else g) for p, g in pairs]
    return torch.cat([p.flatten() for p in moved])


def near(value, other):
    """Whether two numbers or tensors are the same but for rounding."""
    value, other = (torch.as_tensor(x).detach().float() for x in (value, other))
    return value.shape == other.shape and torch.allclose(value, other, rtol=2e-4, atol=2e-5)


def compare(value, right, mistakes, otherwise):
    """Assert that `value` is `right`; if it is what a known mistake gives, say which one.

    mistakes: what is wrong, in words -> the value that it gives. otherwise: said of any other.
    """
    __tracebackhide__ = True
    if not near(value, right):
        known = [words for words, wrong in mistakes.items() if near(value, wrong)]
        number = f" (yours {float(value):.5f}, expected {float(right):.5f})"
        raise AssertionError((known or [otherwise])[0] + number)


def same_step(model, new, loss):
    """Whether the student of `new` is where one step down `loss` takes that of `model`."""
    start, right = vector(trained(model)), learned(model, loss)
    return (vector(trained(new)) - right).norm() < 0.01 * (right - start).norm()
