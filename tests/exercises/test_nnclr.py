"""Exercise nnclr: info_nce's positive is the entry of the queue that is nearest to k."""

import drive
import pytest
import torch
from torch.nn import functional as F

import ressl

TAU = 0.1


def loss_of(positive, negatives):
    """Cross-entropy of the first of the logits: positive (B, 1), negatives (B, n)."""
    return -torch.log_softmax(torch.cat([positive, negatives], dim=1) / TAU, dim=1)[:, 0].mean()


def original(q, k, queue):
    return loss_of((q * k).sum(dim=1, keepdim=True), q @ queue.T)


def nearest(q, k, queue):
    """NNCLR's, an image after another: the nearest entry of k against the other entries."""
    losses = []
    for z, key in zip(q, k, strict=True):
        best = max(range(len(queue)), key=lambda i: float(key @ queue[i]))
        losses.append(-torch.log_softmax(queue @ z / TAU, dim=0)[best])
    return torch.stack(losses).mean()


@pytest.fixture(scope="module", autouse=True)
def batch():
    torch.manual_seed(1)
    q, queue = drive.unit(8, 16), drive.unit(24, 16)
    k = F.normalize(q + 0.3 * torch.randn(8, 16), dim=1)
    assert ((q @ queue.T).argmax(1) != (k @ queue.T).argmax(1)).any()
    if drive.near(ressl.info_nce(q, k, queue, TAU), original(q, k, queue)):
        pytest.skip("exercise not begun: info_nce's positive is the own k")
    return q, k, queue


def test_positive_is_the_entry_nearest_to_k(batch):
    q, k, queue = batch
    student, teacher = q @ queue.T, k @ queue.T
    pick = lambda index: F.cross_entropy(student / TAU, index)
    best = student.gather(1, teacher.argmax(dim=1, keepdim=True))
    own = (q * k).sum(dim=1, keepdim=True)
    mistakes = {
        "the entry nearest to q is taken: the student chooses its own answer": pick(
            student.argmax(1)
        ),
        "the entry farthest from k is taken: the largest cosine is the nearest": pick(
            teacher.argmin(1)
        ),
        "the label is 0 for all: it is where the nearest entry lies": pick(
            torch.zeros(8, dtype=torch.int64)
        ),
        "the nearest entry is counted twice, as positive and in the queue": loss_of(best, student),
        "the own k is still an entry (a negative)": F.cross_entropy(
            torch.cat([own, student], 1) / TAU, 1 + teacher.argmax(1)
        ),
        "the logits are not divided by the temperature": F.cross_entropy(
            student, teacher.argmax(1)
        ),
        "the loss is that of the nearest entry's k.Q, not of q.Q": F.cross_entropy(
            teacher / TAU, teacher.argmax(1)
        ),
    }
    otherwise = "not the cross-entropy of q.Q / tau with the entry nearest to k as the class"
    drive.compare(ressl.info_nce(q, k, queue, TAU), nearest(q, k, queue), mistakes, otherwise)


def test_it_is_ressl_with_a_cold_teacher(batch):
    cold = ressl.relation_loss(*batch, TAU, 1e-4)
    message = "it has to be what relation_loss comes to for tau_t near 0"
    assert drive.near(ressl.info_nce(*batch, TAU), cold), message


def test_only_the_student_gets_a_gradient(batch):
    q, k, queue = (x.clone().requires_grad_() for x in batch)
    ressl.info_nce(q, k, queue, TAU).backward()
    assert k.grad is None or not k.grad.any(), "a gradient reaches k, the teacher's"
    assert queue.grad is None, "a gradient reaches the queue"
    assert q.grad.any(), "no gradient reaches q"


def test_step_looks_for_it_before_k_is_queued(batch):
    model, views = drive.small_model(ressl, 32), torch.randn(2, 8, 3, 32, 32)
    q = F.normalize(model.student(views[0]), dim=1)
    k = F.normalize(model.teacher(views[1]), dim=1)
    new, loss = drive.step(ressl, model, views, drive.arguments(), infonce=True)
    early = torch.cat([model.queue[8:], k])
    right = nearest(q, k, model.queue)
    mistakes = {"k is queued first, so that its nearest entry is itself": nearest(q, k, early)}
    drive.compare(loss, right, mistakes, "the step's loss is not info_nce of the queue before k")
    assert drive.near(new.queue[-8:], k), "the step no longer queues the teacher's k"
    assert drive.same_step(model, new, right), "the student learns by another gradient"


def test_relation_loss_stays(batch):
    q, k, queue = batch
    p_t, log_p_s = (k @ queue.T / 0.04).softmax(1), (q @ queue.T / TAU).log_softmax(1)
    right = -(p_t * log_p_s).sum(1).mean()
    message = "relation_loss has changed: only info_nce is to"
    assert drive.near(ressl.relation_loss(q, k, queue, TAU, 0.04), right), message
