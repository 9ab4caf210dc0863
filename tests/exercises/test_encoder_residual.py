"""Exercise encoder_residual: the residual term compares the encoders' features f(x)."""

import copy

import drive
import pytest
import torch
from torch.nn import functional as F

import residual_momentum

TAU = 0.2


def gap(student, teacher):
    return 1 - F.cosine_similarity(student, teacher.detach(), dim=1).mean()


def parts(network, views, predictor):
    """Features, projections, outputs of both views."""
    features = [network.encoder(view) for view in views]
    projected = [network.projector(f) for f in features]
    return features, projected, [predictor(g) for g in projected]


def info_nce(q, k):
    logits = F.normalize(q, dim=1) @ F.normalize(k.detach(), dim=1).T / TAU
    return 2 * TAU * F.cross_entropy(logits, torch.arange(len(q)))


@pytest.fixture(scope="module", autouse=True)
def run():
    """The model, both networks' parts, the views, and the base loss."""
    model = drive.small_model(residual_momentum)
    first, noise = torch.randn(2, 8, 3, 32, 32)
    views = first, 0.5 * first + 0.5 * noise
    reference = copy.deepcopy(model)
    student = parts(reference.student, views, reference.predictor)
    teacher = parts(reference.teacher, views, torch.nn.Identity())
    (q1, q2), (k1, k2) = student[2], teacher[2]
    base = info_nce(q1, k2) + info_nce(q2, k1)
    _, loss = drive.step(residual_momentum, model, views, drive.arguments(), 0.9)
    if drive.near(loss, base + gap(q1, k1) + gap(q2, k2)):
        pytest.skip("exercise not begun: the term compares the outputs q and k")
    return model, reference, student, teacher, views, base


def step(run, key="loss", **changes):
    return drive.step(residual_momentum, run[0], run[4], drive.arguments(**changes), 0.9, key=key)


def test_term_compares_the_features_of_the_same_view(run):
    _, _, student, teacher, _, base = run
    (f1, f2), (g1, g2), (q1, q2) = student
    (t1, t2), (k1, k2), _ = teacher
    right = 0.5 * (gap(f1, t1) + gap(f2, t2))
    mistakes = {
        "the term compares features across the views: it is about one and the same": 0.5
        * (gap(f1, t2) + gap(f2, t1)),
        "the term compares the projectors' outputs, not the encoders'": 0.5
        * (gap(g1, k1) + gap(g2, k2)),
        "--residual-weight is not applied": 2 * right,
        "the term is 0: it compares the student with itself": 0,
        "the term is added to the old one: it has to take its place": right
        + 0.5 * (gap(q1, k1) + gap(q2, k2)),
        "the term is there for the first view only": 0.5 * gap(f1, t1),
        "the mean over the two views is taken: it is their sum": 0.5 * right,
        "the base is of the features: it stays on q and k": right
        + info_nce(f1, t2)
        + info_nce(f2, t1)
        - base,
        "the base changed, the predictor is left out: q is predictor(projector(f))": right
        + info_nce(g1, k2)
        + info_nce(g2, k1)
        - base,
    }
    _, loss = step(run, residual_weight=0.5)
    otherwise = "the loss is not base + lambda (gap of f(x_1) + gap of f(x_2))"
    mistakes = {words: base + term for words, term in mistakes.items()}
    drive.compare(loss, base + right, mistakes, otherwise)


def test_student_learns_by_it(run):
    _, reference, student, teacher, _, base = run
    (f1, f2), (t1, t2) = student[0], teacher[0]
    new, _ = step(run, residual_weight=0.5)
    alone = drive.same_step(reference, new, base)
    assert not alone, "the term has no gradient: are the student's features detached?"
    loss = base + 0.5 * (gap(f1, t1) + gap(f2, t2))
    assert drive.same_step(reference, new, loss), "the student learns by another gradient"


def test_the_logged_gap_stays_that_of_the_outputs(run):
    _, _, student, teacher, _, _ = run
    (q1, q2), (k1, k2) = student[2], teacher[2]
    (f1, f2), (t1, t2) = student[0], teacher[0]
    _, logged = step(run, key="gap")
    mistakes = {
        "the logged gap is that of the features: it stays that of q and k": (
            gap(f1, t1),
            gap(f2, t2),
        ),
        "the logged gap is across the views: it is of one and the same": (gap(q1, k2), gap(q2, k1)),
    }
    mistakes = {words: sum(both) / 2 for words, both in mistakes.items()}
    otherwise = "the logged gap is not (gap of q1 and k1 + gap of q2 and k2) / 2"
    drive.compare(logged, (gap(q1, k1) + gap(q2, k2)) / 2, mistakes, otherwise)


def test_without_the_term_the_base_is_as_it_was(run):
    _, loss = step(run, residual_weight=0.0)
    message = "with --residual-weight 0 the loss has to be the base's, of q and k"
    assert drive.near(loss, run[-1]), message


def test_other_terms_go_the_same_way(run):
    """--residual kd, on features."""
    _, _, student, teacher, _, base = run
    kd = sum(
        residual_momentum.kd_loss(f, t, TAU) for f, t in zip(student[0], teacher[0], strict=True)
    )
    _, loss = step(run, residual="kd")
    assert drive.near(loss, base + kd), "--residual kd does not compare features"


def test_each_encoder_runs_once_a_view(run):
    before = run[0].student.encoder[1].num_batches_tracked
    new, _ = step(run)
    for name in ("student", "teacher"):
        passes = int(getattr(new, name).encoder[1].num_batches_tracked - before)
        message = f"the {name}'s encoder runs {passes} times a step: go on from its features"
        assert passes == 2, message
