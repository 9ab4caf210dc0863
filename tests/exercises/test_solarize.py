"""Exercise solarize: strong_view inverts the bright pixels of a fifth of the images.

White images tell everything: crop, flip, contrast, hue, grey and blur leave them as they are, and
brightness leaves at least 0.6. So what is below 0.5 has been inverted. Of images of 0.3 nothing is.
"""

import drive
import pytest
import torch

import common
import ressl

COUNT, SIDE = 2000, 16


def views(value=1.0, seed=0, count=COUNT, teacher_view="weak"):
    """What student and teacher see of images that are all of one brightness."""
    images = torch.full((count, 3, SIDE, SIDE), value)
    args = drive.arguments(image_size=SIDE, teacher_view=teacher_view)
    return ressl.draw_views(images, args, torch.Generator().manual_seed(seed))


def inverted(view):
    """Which of the white images have a dark pixel -> bool (N,)."""
    return view.amin((1, 2, 3)) < 0.5


def seen_in_training():
    """What train_epoch gives to train_step of white images, with its normalisation undone."""
    seen, zero = [], {"loss": torch.zeros(())}
    data = drive.pictures(200, SIDE, (0.0,) * 3, (0.1,) * 3)
    data = common.Images(torch.full_like(data.images, 255), None, [], data.mean, data.std)
    args = drive.arguments(image_size=SIDE, batch_size=100)
    optimizer, generator = torch.optim.SGD([torch.zeros(1)], lr=1.0), torch.Generator()
    generator.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ressl, "train_step", lambda *a, **b: seen.append(a[3]) or zero)
        ressl.train_epoch(1, None, optimizer, None, generator, data, args, None)
    return [torch.cat(view) / 10 for view in zip(*seen, strict=True)]


@pytest.fixture(scope="module", autouse=True)
def student():
    view, teacher = views()
    several = [*seen_in_training(), *(views(seed=i, count=9)[0] for i in range(40))]
    if min(x.min() for x in (view, teacher, *several)) > 0.55:
        words = f"of {COUNT} white images strong_view of ressl.py inverts none"
        pytest.skip(f"exercise not begun: {words}")
    return view


def test_it_comes_before_the_normalisation():
    seen = seen_in_training()
    late = "pixels are inverted after the normalisation, where they are no longer in [0, 1]"
    assert min(view.min() for view in seen) > -0.01, late


def test_an_image_is_inverted_in_all_pixels_and_channels(student):
    message = "a white image came out in several colours: the coin is one an image, not one a pixel"
    assert student.std((1, 2, 3)).max() < 1e-3, message


def test_each_image_has_its_own_coin_of_a_fifth(student):
    shares = [inverted(views(seed=i, count=64)[0]).float().mean().item() for i in range(40)]
    assert any(shares), "strong_view inverts no white image"
    message = "one coin decides for the whole batch: each image needs its own"
    assert set(shares) != {0, 1}, message
    share = inverted(student).float().mean().item()
    assert abs(share - 0.2) < 0.04, f"{share:.1%} of the images are inverted, not a fifth"


def test_dark_pixels_stay():
    message = "pixels below 0.5 are inverted too: that is a negative, not a solarisation"
    assert views(0.3)[0].max() < 0.43, message


def test_it_comes_after_the_colour_jitter(student):
    dark = student[inverted(student)].amin((1, 2, 3))
    message = "inverted white is black in every image: it is done before the brightness, not after"
    assert not len(dark) or (dark > 0.05).any(), message


def test_it_comes_after_the_blur(monkeypatch):
    seen, blur = [], common.gaussian_blur
    monkeypatch.setattr(common, "gaussian_blur", lambda x, *rest: seen.append(x) or blur(x, *rest))
    views()
    message = "what is blurred has been inverted already: it comes after the blur"
    assert not seen or seen[0].min() > 0.5, message


def test_its_coin_is_not_that_of_another_operation():
    """Of colours that stay above 0.5: those inverted are grey as often as the others."""
    images = torch.tensor([1.0, 0.9, 0.95]).view(3, 1, 1).expand(COUNT, 3, SIDE, SIDE)
    args = drive.arguments(image_size=SIDE)
    view, _ = ressl.draw_views(images.clone(), args, torch.Generator().manual_seed(0))
    dark = view.amax((1, 2, 3)) <= 0.5
    grey = view.mean((2, 3)).std(1) < 1e-3
    share = grey[dark].float().mean().item() if dark.any() else 0.2
    assert 0.05 < share < 0.6, f"{share:.0%} of the inverted images are grey: it needs its own coin"


def test_the_teachers_weak_view_is_left_alone():
    message = "the weak view is solarised too: only the strong one is to be"
    assert views()[1].min() > 0.99, message


def test_coins_come_from_the_generator():
    both = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        both.append(views(count=64)[0])
    message = "the same generator gives other views: draw the coins from `generator`"
    assert torch.equal(*both), message


def test_strong_views_of_one_image_have_coins_of_their_own():
    student, teacher = map(inverted, views(teacher_view="strong"))
    missing = "with --teacher-view strong the teacher's view is not solarised"
    assert teacher.any() or not student.any(), missing
    assert (student != teacher).any() or not student.any(), (
        "student's and teacher's strong view share their coins"
    )
