"""Exercise own_pair: in the loss the own pair is one more entry of both relations."""

import drive
import pytest
import torch

import ressl

TEMPS = drive.TAU_S, drive.TAU_T


def relation(own, others, tau, last=False):
    logits = torch.cat([others, own] if last else [own, others], dim=1)
    return torch.log_softmax(logits / tau, dim=1)


def cross_entropy(log_p_t, log_p_s):
    return -(log_p_t.exp() * log_p_s).sum(dim=1).mean()


@pytest.fixture(scope="module", autouse=True)
def batch():
    """q, k and queue; k near q, as a trained network has them."""
    torch.manual_seed(0)
    q, queue = drive.unit(6, 16), drive.unit(24, 16)
    k = torch.nn.functional.normalize(q + 0.2 * torch.randn(6, 16), dim=1)
    original = cross_entropy(
        *(torch.log_softmax(z @ queue.T / t, 1) for z, t in zip((k, q), TEMPS[::-1], strict=True))
    )
    if drive.near(ressl.relation_loss(q, k, queue, *TEMPS), original):
        pytest.skip("exercise not begun: relation_loss compares with the queue only")
    return q, k, queue


def test_relations_are_to_the_own_pair_and_the_queue(batch):
    q, k, queue = batch
    qk, kk = ((z * k).sum(dim=1, keepdim=True) for z in (q, k))
    teacher, student = k @ queue.T, q @ queue.T
    s, t = TEMPS
    p_t, log_p_s = relation(kk, teacher, t), relation(qk, student, s)
    bare = lambda own, others, tau: torch.log_softmax(torch.cat([own, others / tau], 1), 1)
    many = torch.cat([k, queue])
    mistakes = {
        "the teacher's own logit is q.k: its relation is that of k, so it needs k.k": cross_entropy(
            relation(qk, teacher, t), log_p_s
        ),
        "the student's own logit is k.k, in which there is no student: it needs q.k": cross_entropy(
            p_t, relation(kk, student, s)
        ),
        "the own logits are exchanged: k.k is the teacher's, q.k the student's": cross_entropy(
            relation(qk, teacher, t), relation(kk, student, s)
        ),
        "the own entry has another place in p_t than in log_p_s": cross_entropy(
            p_t, relation(qk, student, s, last=True)
        ),
        "the own logits are not divided by the temperatures": cross_entropy(
            bare(kk, teacher, t), bare(qk, student, s)
        ),
        "every image of the batch is an entry, not only the own pair": cross_entropy(
            *(torch.log_softmax(z @ many.T / tau, 1) for z, tau in ((k, t), (q, s)))
        ),
        "the own pair is in the target only": cross_entropy(
            p_t[:, 1:], torch.log_softmax(student / s, 1)
        ),
    }
    loss = ressl.relation_loss(q, k, queue, *TEMPS)
    otherwise = "not the cross-entropy of relations to 1 + K entries, the own pair and the queue"
    drive.compare(loss, cross_entropy(p_t, log_p_s), mistakes, otherwise)


def test_only_the_student_gets_a_gradient(batch):
    q, k, queue = (x.clone().requires_grad_() for x in batch)
    ressl.relation_loss(q, k, queue, *TEMPS).backward()
    assert k.grad is None, "a gradient reaches k, the teacher's: detach it in the student's logit"
    assert queue.grad is None, "a gradient reaches the queue"
    x = batch[0].clone().requires_grad_()
    own = (x * batch[1]).sum(dim=1, keepdim=True)
    log_p_s = relation(own, x @ batch[2].T, TEMPS[0])
    target = relation(torch.ones(6, 1), batch[1] @ batch[2].T, TEMPS[1])
    cross_entropy(target, log_p_s).backward()
    assert drive.near(q.grad, x.grad), "q's gradient is wrong: does q.k take part in it?"


@pytest.fixture
def model_views_q_k():
    model, views = drive.small_model(ressl, 32), torch.randn(2, 8, 3, 32, 32)
    with torch.no_grad():
        q, k = (
            torch.nn.functional.normalize(net(view), dim=1)
            for net, view in zip((model.student, model.teacher), views, strict=True)
        )
    return model, views, q, k


def test_the_logged_entropy_is_still_that_of_the_relation_to_the_queue(model_views_q_k):
    model, views, _, k = model_views_q_k
    entropy = lambda p: torch.special.entr(p).sum(dim=1).mean()
    p_t = torch.softmax(k @ model.queue.T / drive.TAU_T, dim=1)
    _, logged = drive.step(ressl, model, views, drive.arguments(), key="entropy")
    message = "the logged entropy has changed: it stays that of the relation to the queue"
    assert drive.near(logged, entropy(p_t)), message


def test_step_still_queues_k_afterwards(model_views_q_k):
    model, views, q, k = model_views_q_k
    new, loss = drive.step(ressl, model, views, drive.arguments())
    right = ressl.relation_loss(q, k, model.queue, *TEMPS)
    assert drive.near(loss, right), "the step's loss is not relation_loss of the queue before k"
    assert drive.near(new.queue[-8:], k), "the step no longer queues the teacher's k"
