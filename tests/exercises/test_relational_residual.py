"""Exercise relational_residual: a third residual term, `--residual relation`."""

import drive
import pytest
import torch
from torch.nn import functional as F

import residual_momentum

TAU = 0.2


def log_relation(z, keys, diagonal=False, axis=1, tau=TAU):
    """log softmax over the other images -> (B, B - 1); or over all of them, (B, B)."""
    logits, count = z @ keys.T / tau, len(z)
    if not diagonal:
        others = ~torch.eye(count, dtype=torch.bool)
        if axis == 0:
            return (logits.T[others].view(count, -1)).log_softmax(1)
        logits = logits[others].view(count, -1)
    return logits.log_softmax(axis)


def kl(log_p_t, log_p_s):
    return (log_p_t.exp() * (log_p_t - log_p_s)).sum() / len(log_p_t)


def right(student, teacher):
    q, k = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    return kl(log_relation(k, k), log_relation(q, k))


@pytest.fixture(scope="module", autouse=True)
def term():
    if not hasattr(residual_momentum, "relation_residual"):
        pytest.skip("exercise not begun: there is no function relation_residual")
    return residual_momentum.relation_residual


@pytest.fixture(scope="module")
def batch():
    """Student's and teacher's outputs, of any length."""
    torch.manual_seed(0)
    teacher = torch.randn(6, 8)
    return 3 * (teacher + 0.7 * torch.randn(6, 8)), teacher


def test_value(term, batch):
    student, teacher = batch
    q, k = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    log_p_t, log_p_s = log_relation(k, k), log_relation(q, k)
    mistakes = {
        "an image is compared with itself too: leave the diagonal out": kl(
            log_relation(k, k, True), log_relation(q, k, True)
        ),
        "the softmax runs along the wrong axis: a row is one image's relation": kl(
            log_relation(k, k, axis=0), log_relation(q, k, axis=0)
        ),
        "the outputs are not brought to unit length": kl(
            log_relation(teacher, teacher), log_relation(student, teacher)
        ),
        "the student is the target: KL(teacher's || student's) is asked for": kl(log_p_s, log_p_t),
        "the student's relation is to the students, not to the teacher's k": kl(
            log_p_t, log_relation(q, q)
        ),
        "it is the mean over all entries: sum over them, then the mean over the images": kl(
            log_p_t, log_p_s
        )
        / len(q),
        "it is summed over the images: take their mean": kl(log_p_t, log_p_s) * len(q),
        "it is a cross-entropy: subtract the teacher's entropy, so that 0 is the least": -(
            log_p_t.exp() * log_p_s
        ).sum()
        / len(q),
        "the similarities are not divided by tau": kl(
            log_relation(k, k, tau=1), log_relation(q, k, tau=1)
        ),
    }
    value = term(student, teacher, TAU)
    why = "-inf on the diagonal becomes 0 * inf (use -1e9), or F.kl_div lacks log_target=True"
    assert torch.isfinite(value), f"it is nan: {why}"
    mistakes["an image is compared with itself too (wrong axis as well)"] = kl(
        log_relation(k, k, True, 0).T, log_relation(q, k, True, 0).T
    )
    mistakes["the diagonal's place is divided among all entries"] = (
        kl(log_p_t, log_p_s) * (len(q) - 1) / len(q)
    )
    otherwise = "not the mean of KL(p_t || p_s), both relations to the teacher's other k"
    drive.compare(value, kl(log_p_t, log_p_s), mistakes, otherwise)


def test_it_is_0_where_student_and_teacher_agree(term, batch):
    _, teacher = batch
    assert drive.near(term(2 * teacher, teacher, TAU), 0), "it is not 0 where q and k agree"


def test_only_the_student_gets_a_gradient(term, batch):
    student, teacher = (x.clone().requires_grad_() for x in batch)
    term(student, teacher, TAU).backward()
    assert teacher.grad is None, "a gradient reaches the teacher's outputs: detach them"
    x = batch[0].clone().requires_grad_()
    right(x, batch[1]).backward()
    assert drive.near(student.grad, x.grad), "the student's gradient is not that of the KL"


def test_step_takes_it_in_the_same_view(term):
    model, views = drive.small_model(residual_momentum), torch.randn(2, 8, 3, 32, 32)
    args = drive.arguments(residual="relation", residual_weight=0.5)
    _, loss = drive.step(residual_momentum, model, views, args, 0.9)
    q1, q2 = (model.predictor(model.student(view)) for view in views)
    k1, k2 = (model.teacher(view) for view in views)
    base = residual_momentum.info_nce(q1, k2, TAU) + residual_momentum.info_nce(q2, k1, TAU)
    expected = base + 0.5 * (right(q1, k1) + right(q2, k2))
    message = "the step's loss is not base + lambda (term of view 1 + term of view 2)"
    assert drive.near(loss, expected), message


def test_the_other_terms_stay():
    model, views = drive.small_model(residual_momentum), torch.randn(2, 8, 3, 32, 32)
    q1, q2 = (model.predictor(model.student(view)) for view in views)
    k1, k2 = (model.teacher(view) for view in views)
    base = residual_momentum.info_nce(q1, k2, TAU) + residual_momentum.info_nce(q2, k1, TAU)
    log_p = lambda z: F.log_softmax(F.normalize(z, dim=1) / TAU, dim=1)
    terms = {
        "cosine": lambda q, k: 1 - F.cosine_similarity(q, k, dim=1).mean(),
        "kd": lambda q, k: kl(log_p(k), log_p(q)),
    }
    for name, term in terms.items():
        _, loss = drive.step(residual_momentum, model, views, drive.arguments(residual=name), 0.9)
        message = f"--residual {name} has changed"
        assert drive.near(loss, base + term(q1, k1) + term(q2, k2)), message


def test_the_command_line_knows_all_three():
    for name in ("cosine", "kd", "relation"):
        try:
            args, _ = residual_momentum.parse_arguments(["--residual", name])
        except Exception as error:
            raise AssertionError(f"--residual {name} is refused: {error}") from None
        assert args.residual == name
