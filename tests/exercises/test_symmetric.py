"""Exercise symmetric: in train_step student and teacher see both views, and exchange them."""

import drive
import pytest
import torch
from torch.nn import functional as F

import ressl

TEMPS = drive.TAU_S, drive.TAU_T


def embeddings(network, views):
    return [F.normalize(network(view), dim=1) for view in views]


def loss_of(q, k, queue):
    p_t = (k.detach() @ queue.T / TEMPS[1]).softmax(dim=1)
    return -(p_t * (q @ queue.T / TEMPS[0]).log_softmax(dim=1)).sum(dim=1).mean()


@pytest.fixture(scope="module", autouse=True)
def run():
    """The model before the step, both networks' embeddings; the model after it, its loss; views."""
    model, (strong, weak) = drive.small_model(ressl, 32), torch.randn(2, 8, 3, 32, 32)
    weak = 0.7 * strong + 0.3 * weak
    qs, ks = (embeddings(net, (strong, weak)) for net in (model.student, model.teacher))
    new, loss = drive.step(ressl, model, (strong, weak), drive.arguments())
    if drive.near(loss, loss_of(qs[0], ks[1], model.queue)):
        pytest.skip("exercise not begun: the student does not see the teacher's view")
    return model, qs, ks, new, loss, torch.cat([strong, weak])


def test_loss_is_the_mean_of_both_directions(run):
    model, (q_s, q_w), (k_s, k_w), _, loss = run[:5]
    queue, mixed = (
        model.queue,
        [embeddings(net, [run[5]])[0] for net in (model.student, model.teacher)],
    )
    (q_s2, q_w2), (k_s2, k_w2) = (z.chunk(2) for z in mixed)
    first, second = loss_of(q_s, k_w, queue), loss_of(q_w, k_s, queue)
    late = torch.cat([queue[8:], k_w])
    one_batch = "both views go through {} as one batch: BatchNorm mixes them, give one at a time"
    mistakes = {
        one_batch.format("the student"): (loss_of(q_s2, k_w, queue) + loss_of(q_w2, k_s, queue))
        / 2,
        one_batch.format("both networks"): (loss_of(q_s2, k_w2, queue) + loss_of(q_w2, k_s2, queue))
        / 2,
        "the two directions are added: take their mean, so that the learning rate suits": first
        + second,
        "only the second direction is left": second,
        "the second direction compares with the teacher's k of the same (weak) view": (
            first + loss_of(q_w, k_w, queue)
        )
        / 2,
        "the second direction compares the strong view with itself": (
            first + loss_of(q_s, k_s, queue)
        )
        / 2,
        "student and teacher see the same view in both directions: exchange them": (
            loss_of(q_s, k_s, queue) + loss_of(q_w, k_w, queue)
        )
        / 2,
        "k has entered the queue before the losses: an image finds its own k in there": (
            loss_of(q_s, k_w, late) + loss_of(q_w, k_s, late)
        )
        / 2,
    }
    otherwise = "not the mean of L(q of strong, k of weak) and L(q of weak, k of strong)"
    drive.compare(loss, (first + second) / 2, mistakes, otherwise)


def test_student_learns_by_both_directions(run):
    model, (q_s, q_w), (k_s, k_w), new = run[:4]
    first, second = loss_of(q_s, k_w, model.queue), loss_of(q_w, k_s, model.queue)
    half = drive.same_step(model, new, (first + second.detach()) / 2)
    assert not half, "no gradient comes from the second direction: its q is under no_grad"
    message = "the gradient is not that of the mean of both directions"
    assert drive.same_step(model, new, (first + second) / 2), message


def test_only_k_of_the_weak_view_is_queued(run):
    model, _, (k_s, k_w), new = run[:4]
    assert len(new.queue) == 32, f"the queue has {len(new.queue)} entries in place of 32"
    twice = drive.near(new.queue[:16], model.queue[16:])
    assert not twice, "16 embeddings of 8 images are queued: the queue forgets faster"
    assert not drive.near(new.queue[-8:], k_s), "k of the strong view is queued, not of the weak"
    message = "the queue does not get the teacher's k of the weak view"
    assert drive.near(new.queue[-8:], k_w), message
    assert drive.near(new.queue[:-8], model.queue[8:]), "older entries of the queue have changed"


def test_teacher_follows_once(run):
    model, _, _, new = run[:4]
    right = 0.9 * drive.vector(model.teacher) + 0.1 * drive.vector(new.student)
    assert drive.near(drive.vector(new.teacher), right), "the teacher has to move once a step"
