"""The batched transforms against torchvision's, image by image; the draws against its draws."""

import itertools

import numpy
import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

import common
import ressl

VIEWS = (ressl.weak_view, ressl.strong_view)
ORDERS = list(itertools.permutations(range(4)))
TORCHVISION_JITTER = (
    TF.adjust_brightness,
    TF.adjust_contrast,
    TF.adjust_saturation,
    TF.adjust_hue,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(*shape, seed=0, dtype=torch.float32):
    return torch.rand(shape, generator=seeded(seed), dtype=dtype)


def assert_close(ours, theirs, tolerance):
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def distance(a, b):
    """Kolmogorov-Smirnov: the largest difference between two samples' cumulative distributions."""
    a, b = (numpy.sort(numpy.asarray(sample, dtype=float)) for sample in (a, b))
    at = numpy.union1d(a, b)
    ranks = [numpy.searchsorted(sample, at, side="right") / len(sample) for sample in (a, b)]
    return abs(ranks[0] - ranks[1]).max()


def likely(n):
    """The distance that two samples of n from one distribution exceed once in 1,000 times."""
    return 1.95 * (2 / n) ** 0.5


def assert_share(chosen, p):
    """About a share p of `chosen` (n,) is true: to four standard deviations."""
    share = chosen.double().mean().item()
    assert abs(share - p) < 4 * (p * (1 - p) / len(chosen)) ** 0.5


# ------------------------------------------------------------------------------------------ crop


def crop_one_by_one(images, boxes, size, flip=None):
    """torchvision's resized_crop, then horizontal_flip. boxes: (4, N), top, left, height, width."""
    views = []
    for i, image in enumerate(images):
        box = [int(number) for number in boxes[:, i]]
        view = TF.resized_crop(image, *box, [size, size], antialias=True)
        views.append(TF.horizontal_flip(view) if flip is not None and flip[i] else view)
    return torch.stack(views)


def edge_boxes(height, width):
    """One pixel, two thirds or all of the image high and wide, at every border -> (4, N)."""
    heights, widths = ({1, 2 * side // 3, side} for side in (height, width))
    return torch.tensor(
        [
            (top, left, h, w)
            for h, w in itertools.product(sorted(heights), sorted(widths))
            for top, left in itertools.product({0, height - h}, {0, width - w})
        ]
    ).T.contiguous()


@pytest.mark.parametrize(("side", "size"), [(32, 32), (32, 14), (32, 24), (64, 64), (20, 32)])
def test_crop_equals_torchvision(side, size):
    drawn = common.draw_boxes(40, side, (0.08, 1), generator=seeded())
    boxes = torch.cat([drawn, edge_boxes(side, side)], dim=1).float()
    images = random_images(boxes.shape[1], 3, side, side)
    ours = common.resized_crop(images, *boxes, size)
    assert_close(ours, crop_one_by_one(images, boxes, size), 1e-5)


@pytest.mark.parametrize(("height", "width"), [(20, 36), (36, 20)])
def test_crop_of_images_that_are_not_square(height, width):
    boxes = edge_boxes(height, width).float()
    images = random_images(boxes.shape[1], 3, height, width)
    ours = common.resized_crop(images, *boxes, 24)
    assert_close(ours, crop_one_by_one(images, boxes, 24), 1e-5)


def test_crop_takes_boxes_of_whole_number_type():
    boxes = edge_boxes(32, 32)
    images = random_images(boxes.shape[1], 3, 32, 32)
    ours = common.resized_crop(images, *boxes, 24)
    assert_close(ours, crop_one_by_one(images, boxes, 24), 1e-5)


def test_crop_of_float64_is_exact():
    boxes = common.draw_boxes(20, 32, (0.08, 1), generator=seeded())
    images = random_images(20, 3, 32, 32, dtype=torch.float64)
    ours = common.resized_crop(images, *boxes, 14)
    assert_close(ours, crop_one_by_one(images, boxes, 14), 1e-12)


# ---------------------------------------------------------------------------------------- colour


def nasty_images():
    """Noise, near-grey, dark, bright, ties between channels, plain colours -> (N, 3, 8, 8)."""
    noise = random_images(4, 3, 8, 8)
    # Every colour of these levels: black, white, greys, primaries, cyan, magenta, yellow, all ties.
    palette = torch.tensor(list(itertools.product((0, 0.25, 0.5, 1), repeat=3))).T.view(1, 3, 8, 8)
    corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)))
    plain = torch.cat([corners, torch.full((1, 3), 0.5)])[..., None, None].expand(-1, -1, 8, 8)
    tinted = 0.5 + 1e-6 * noise[:1]
    return torch.cat([noise, palette, plain, tinted, noise[:1] * 0.01, 1 - noise[:1] * 0.01])


def every_pair(images, values):
    """Every image with every value -> images (N * V, 3, H, W), values (N * V,)."""
    return images.repeat_interleave(len(values), 0), values.repeat(len(images))


@pytest.mark.parametrize(
    ("name", "low", "high", "tolerance"),
    [
        ("adjust_brightness", 0, 2, 1e-5),
        ("adjust_contrast", 0, 2, 1e-5),
        ("adjust_saturation", 0, 2, 1e-5),
        ("adjust_hue", -0.5, 0.5, 1e-4),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adjustments_equal_torchvision(name, low, high, tolerance, dtype):
    images, factor = every_pair(nasty_images(), torch.linspace(low, high, 13))  # both ends, middle
    images, factor = images.to(dtype), factor.to(dtype)
    ours = getattr(common, name)(images, factor)
    theirs = [getattr(TF, name)(image, f.item()) for image, f in zip(images, factor, strict=True)]
    assert_close(ours, torch.stack(theirs), tolerance)


def test_grey_equals_torchvision():
    images = nasty_images()
    assert_close(common.rgb_to_grey(images), TF.rgb_to_grayscale(images), 1e-6)


def draw_jitter(count, p, brightness, contrast, saturation, hue, generator):
    """What random_color_jitter draws -> factors (4, count), order: read from its calls."""
    calls = []

    def record(i):
        return lambda images, factor: calls.append((i, factor)) or images + 1

    with pytest.MonkeyPatch.context() as patch:
        for i, name in enumerate(("brightness", "contrast", "saturation", "hue")):
            patch.setattr(common, f"adjust_{name}", record(i))
        images = torch.zeros(count, 3, 1, 1, dtype=torch.float64)
        limits = (brightness, contrast, saturation, hue)
        images = common.random_color_jitter(images, p, *limits, generator)
    factors = torch.stack([factor for _, factor in sorted(calls, key=lambda call: call[0])])
    unchanged = torch.tensor([[1.0], [1], [1], [0]], dtype=torch.float64)
    factors = torch.where(images[:, 0].flatten() > 0, factors, unchanged)
    assert images.unique().tolist() in ([0, 4], [0], [4])
    return factors, [i for i, _ in calls]


def test_color_jitter_equals_torchvision_in_every_order():
    images = random_images(3, 3, 8, 8)
    limits = (0.4, 0.4, 0.4, 0.1)
    orders = set()
    for seed in range(150):
        factors, order = draw_jitter(3, 0.8, *limits, seeded(seed))
        if tuple(order) in orders:
            continue
        orders.add(tuple(order))
        ours = common.random_color_jitter(images, 0.8, *limits, seeded(seed))
        theirs = images.clone()
        for i, j in itertools.product(order, range(len(images))):
            theirs[j] = TORCHVISION_JITTER[i](theirs[j], factors[i, j].item())
        assert_close(ours, theirs, 1e-4)
    assert orders == set(ORDERS)


# ------------------------------------------------------------------------------------------ blur


@pytest.mark.parametrize("side", [14, 32, 64])
def test_blur_equals_torchvision_at_every_pixel(side):
    sigma = torch.tensor([0.1, 0.15, 0.3, 0.5, 0.9, 1.3, 1.7, 2.0])
    images = random_images(len(sigma), 3, side, side)
    images[:, 0] = 0
    images[:, 0, :: side - 1, :: side - 1] = 1  # a point in every corner
    theirs = [TF.gaussian_blur(x, 13, s.item()) for x, s in zip(images, sigma, strict=True)]
    assert_close(common.gaussian_blur(images, sigma), torch.stack(theirs), 1e-5)


@pytest.mark.parametrize("kernel_size", [3, 9, 13])
def test_blur_of_any_kernel_equals_torchvision(kernel_size):
    images = random_images(4, 3, 16, 16)
    ours = common.random_blur(images.clone(), 1, (1.5, 1.5), kernel_size)
    assert_close(ours, TF.gaussian_blur(images, kernel_size, 1.5), 1e-5)


@pytest.mark.parametrize(
    "apply",
    [
        lambda images, factor: common.adjust_brightness(images, factor),
        lambda images, factor: common.adjust_contrast(images, factor),
        lambda images, factor: common.adjust_saturation(images, factor),
        lambda images, factor: common.adjust_hue(images, factor),
        lambda images, factor: common.random_color_jitter(images, 1, 0.4, 0.4, 0.4, 0.1),
        lambda images, factor: common.random_grey(images, 1),
        lambda images, factor: common.random_flip(images, 1),
        lambda images, factor: common.random_crop(images, 16, (0.2, 1)),
        lambda images, factor: common.gaussian_blur(images, factor),
        lambda images, factor: common.rgb_to_grey(images),
        lambda images, factor: common.resized_crop(images, *factor.new_full((4, 4), 5), 16),
    ],
)
def test_inputs_are_not_modified(apply):
    images, factor = random_images(4, 3, 16, 16), torch.tensor([0.1, 0.4, 0.2, 0.3])
    before = images.clone(), factor.clone()
    apply(images, factor)
    assert torch.equal(images, before[0])
    assert torch.equal(factor, before[1])


# ----------------------------------------------------------------------------------------- draws


def torchvision_boxes(count, side, scale, ratio=(3 / 4, 4 / 3)):
    """(4, count) boxes of torchvision's RandomResizedCrop."""
    image = torch.empty(3, side, side)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        boxes = [RandomResizedCrop.get_params(image, scale, ratio) for _ in range(count)]
    return torch.tensor(boxes).T


def statistics(boxes, side):
    """What the distribution of boxes (4, N) is compared by."""
    top, left, height, width = boxes.double()
    return {
        "area": height * width,
        "aspect": width / height,
        "top": top,
        "left": left,
        "below": side - top - height,
        "right": side - left - width,
        "top to left": top - left,  # equal where both come from one number
        "top for its height": top / (side - height + 1),
    }


@pytest.mark.parametrize(("scale", "ratio"), [((0.2, 1), (3 / 4, 4 / 3)), ((0.08, 1), (0.5, 3))])
def test_boxes_are_distributed_as_torchvision_draws_them(scale, ratio):
    count, side = 20_000, 32
    ours = statistics(common.draw_boxes(count, side, scale, ratio, seeded()), side)
    theirs = statistics(torchvision_boxes(count, side, scale, ratio), side)
    distances = {name: distance(ours[name], theirs[name]) for name in ours}
    assert max(distances.values()) < likely(count), distances


@pytest.mark.parametrize("side", [14, 32, 64])
def test_boxes_are_whole_and_inside(side):
    boxes = common.draw_boxes(2000, side, (0.08, 1), generator=seeded())
    assert boxes.shape == (4, 2000)
    assert torch.equal(boxes, boxes.round())
    top, left, height, width = boxes
    assert min(top.min(), left.min()) == 0
    assert min(height.min(), width.min()) >= 1
    assert (top + height).max() == (left + width).max() == side


@pytest.mark.parametrize("scale", [(1.5, 2.0), (1.07, 1.1), (1e-6, 2e-6)])
def test_a_box_that_never_fits_is_the_whole_image(scale):
    """Too large, too large in one direction, less than half a pixel."""
    boxes = common.draw_boxes(50, 32, scale, generator=seeded())
    assert torch.equal(boxes, torch.tensor([[0.0], [0], [32], [32]]).expand(4, 50).to(boxes))


def test_boxes_of_a_batch_differ():
    assert len(common.draw_boxes(100, 32, (0.2, 1), generator=seeded()).unique(dim=1).T) > 90


@pytest.mark.parametrize("p", [0, 0.2, 0.5, 0.8, 1])
def test_chosen_are_a_share_p_of_the_images(p):
    chosen = common.choose(torch.empty(20_000, 3, 2, 2), p, seeded())
    assert chosen.shape == (20_000, 1, 1, 1)
    assert chosen.dtype == torch.bool
    if p in (0, 1):
        assert chosen.sum() == p * 20_000
    else:
        assert_share(chosen, p)
        assert_share(chosen[:2000], p)  # and everywhere alike


@pytest.mark.parametrize("p", [0.2, 0.8])
@pytest.mark.parametrize(
    ("apply", "theirs"),
    [
        (common.random_flip, TF.horizontal_flip),
        (common.random_grey, lambda images: TF.rgb_to_grayscale(images, 3)),
    ],
)
def test_flip_and_grey_are_torchvisions_or_nothing(apply, theirs, p):
    images = random_images(2000, 3, 4, 4)
    ours = apply(images, p, seeded())
    kept = ((ours - images).abs() < 1e-6).all((1, 2, 3))
    assert_close(ours[~kept], theirs(images[~kept]), 1e-6)
    assert_share(~kept, p)


def test_jitter_factors_are_uniform_in_their_ranges():
    n = 20_000
    factors, _ = draw_jitter(n, 1, 0.4, 0.3, 0.2, 0.1, seeded())
    assert factors.shape == (4, n)
    uniform = numpy.random.default_rng(0).random(n)
    for own, low, high in zip(factors, (0.6, 0.7, 0.8, -0.1), (1.4, 1.3, 1.2, 0.1), strict=True):
        assert own.min() >= low
        assert own.max() <= high
        assert distance((own - low) / (high - low), uniform) < likely(n)
    assert torch.corrcoef(factors).fill_diagonal_(0).abs().max() < 4 / n**0.5  # independent


def test_jitter_that_is_not_drawn_changes_nothing():
    factors, order = draw_jitter(20_000, 0.8, 0.4, 0.3, 0.2, 0.1, seeded())
    kept = (factors == torch.tensor([[1.0], [1], [1], [0]])).all(0)
    assert_share(~kept, 0.8)
    assert ((factors == 1).any(0) == kept).all()  # all four operations, or none
    images = nasty_images()
    for i in order:
        name = ("brightness", "contrast", "saturation", "hue")[i]
        factor = factors[i, kept][: len(images)]
        assert_close(getattr(common, f"adjust_{name}")(images, factor), images, 1e-6)


def test_jitter_order_is_any_permutation():
    generator = seeded()
    drawn = {tuple(draw_jitter(2, 0.8, 0.4, 0.4, 0.4, 0.1, generator)[1]) for _ in range(400)}
    assert drawn == set(ORDERS)


# ----------------------------------------------------------------------------------------- views


def constant(count, *color, side=32):
    return torch.tensor(color).view(1, 3, 1, 1).repeat(count, 1, side, side)


def ramps(count, side=32):
    """Identical images whose red is the column and whose green is the row, both in (0, 1)."""
    column = ((torch.arange(side) + 0.5) / side).expand(side, side)
    return torch.stack([column, column.T, column]).repeat(count, 1, 1, 1)


def seen_boxes(views, side=32):
    """Where weak views of ramps were cut -> boxes (4, N), and which are mirrored (N,)."""
    middle = views.shape[-1] // 2
    row, column = views[:, 0, middle], views[:, 1, :, middle]
    slopes = [line[:, middle] - line[:, middle - 1] for line in (column, row)]
    flip = slopes[1] < 0
    height, width = (slope.abs() * views.shape[-1] * side for slope in slopes)
    # Halfway between the two middle pixels lies the middle of the box.
    centres = [(line[:, middle] + line[:, middle - 1]) / 2 * side for line in (column, row)]
    return torch.stack([centres[0] - height / 2, centres[1] - width / 2, height, width]), flip


def strong_reference(images, size, generator):
    """strong_view by torchvision's functions, image by image, with the same draws."""
    count, side = len(images), images.shape[-1]
    boxes = common.draw_boxes(count, side, (0.2, 1.0), generator=generator)
    flip = common.choose(images, 0.5, generator).flatten()
    views = list(crop_one_by_one(images, boxes, size or side, flip))
    factors, order = draw_jitter(count, 0.8, 0.4, 0.4, 0.4, 0.1, generator)
    for i, operation in itertools.product(range(count), order):
        if factors[:, i].tolist() != [1, 1, 1, 0]:
            views[i] = TORCHVISION_JITTER[operation](views[i], factors[operation, i].item())
    for i in common.choose(images, 0.2, generator).flatten().nonzero()[:, 0]:
        views[i] = TF.rgb_to_grayscale(views[i], num_output_channels=3)
    blurred = common.choose(images, 0.5, generator).flatten().nonzero()[:, 0]
    sigmas = common.uniform(len(blurred), 0.1, 2.0, generator).tolist()
    for i, sigma in zip(blurred, sigmas, strict=True):
        views[i] = TF.gaussian_blur(views[i], 13, sigma)
    return torch.stack(views)


@pytest.mark.parametrize(("side", "size", "seed"), [(32, None, 0), (32, None, 1), (32, 14, 2)])
def test_strong_view_equals_torchvision(side, size, seed):
    images = random_images(40, 3, side, side)
    ours = ressl.strong_view(images, size, seeded(seed))
    assert_close(ours, strong_reference(images, size, seeded(seed)), 1e-4)


@pytest.mark.parametrize("size", [None, 24])
def test_weak_view_equals_torchvision(size):
    images = random_images(40, 3, 32, 32)
    generator = seeded(3)
    boxes = common.draw_boxes(40, 32, (0.2, 1.0), generator=generator)
    flip = common.choose(images, 0.5, generator).flatten()
    theirs = crop_one_by_one(images, boxes, size or 32, flip)
    assert_close(ressl.weak_view(images, size, seeded(3)), theirs, 1e-5)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("side", "size"), [(32, None), (32, 14), (64, None), (64, 24), (20, 32)])
def test_views_have_their_size_and_stay_in_range(view, dtype, side, size):
    images = random_images(60, 3, side, side, dtype=dtype).round()  # extremes only
    before = images.clone()
    out = view(images, size=size, generator=seeded())
    assert out.shape == (60, 3, size or side, size or side)
    assert out.dtype == dtype
    assert out.min() >= -1e-6
    assert out.max() <= 1 + 1e-6
    assert torch.equal(images, before)  # the input is not modified


@pytest.mark.parametrize("view", VIEWS)
def test_views_depend_on_the_seed_alone(view):
    images = random_images(20, 3, 32, 32)
    once = view(images, generator=seeded(1))
    torch.rand(1)  # the global generator moves on, which changes nothing
    assert torch.equal(once, view(images, generator=seeded(1)))
    assert not torch.equal(once, view(images, generator=seeded(2)))
    generator = seeded(1)
    assert torch.equal(once, view(images, generator=generator))
    assert not torch.equal(once, view(images, generator=generator))  # the next draw is another


@pytest.mark.parametrize("view", VIEWS)
def test_a_batch_of_one(view):
    image, generator = random_images(1, 3, 32, 32), seeded()
    views = torch.cat(
        [view(image, generator=generator) for _ in range(40)]
    )  # any operation or none
    assert views.isfinite().all()
    assert len(views.flatten(1).unique(dim=0)) > 35


@pytest.mark.parametrize("view", VIEWS)
def test_identical_images_get_different_views(view):
    views = view(random_images(1, 3, 32, 32).repeat(100, 1, 1, 1), generator=seeded())
    assert len(views.flatten(1).unique(dim=0)) > 95


def test_every_image_has_its_own_crop_and_flip():
    """Read back from what was seen: boxes and flips of identical images, against torchvision's."""
    count = 5000
    boxes, flip = seen_boxes(ressl.weak_view(ramps(count), generator=seeded()))
    torch.testing.assert_close(boxes, boxes.round(), rtol=0, atol=2e-3)  # found to a pixel
    ours = statistics(boxes.round(), 32)
    theirs = statistics(torchvision_boxes(count, 32, (0.2, 1)), 32)
    distances = {name: distance(ours[name], theirs[name]) for name in ours}
    assert max(distances.values()) < likely(count), distances
    assert_share(flip, 0.5)
    assert_share(flip[boxes[3] < 25], 0.5)  # whatever the box is


def test_every_image_has_its_own_colours():
    """On plain colour the crop, the flip and the blur change nothing."""
    images = constant(4000, 0.6, 0.4, 0.3)
    views = ressl.strong_view(images, generator=seeded())
    colours = views.mean((2, 3))
    torch.testing.assert_close(views, colours[..., None, None].expand_as(views), rtol=0, atol=1e-5)
    grey = (colours.amax(1) - colours.amin(1)) < 1e-5
    assert_share(grey, 0.2)
    kept = ((colours - images[:, :, 0, 0]).abs() < 1e-5).all(1)
    assert_share(kept[~grey], 0.2)
    luminance = TF.rgb_to_grayscale(images)[:, 0, 0, 0]
    assert_share(
        (colours[:, 0] - luminance).abs()[grey] < 1e-5, 0.2
    )  # whether it turns grey or not
    jittered = colours[~grey & ~kept]
    assert len(jittered.unique(dim=0)) > 0.99 * len(jittered)


def test_strong_view_flips_half_and_never_upside_down():
    images = ramps(2000)[:, :2].mean(1, keepdim=True).expand(-1, 3, -1, -1)  # grey, both directions
    views = ressl.strong_view(0.3 + 0.4 * images, generator=seeded())
    right, left = views[..., -8:].mean((1, 2, 3)), views[..., :8].mean((1, 2, 3))
    assert_share(right > left, 0.5)
    assert (views[:, :, -8:].mean((1, 2, 3)) > views[:, :, :8].mean((1, 2, 3))).all()


def test_half_of_the_images_are_blurred_each_by_its_own_sigma(monkeypatch):
    seen = []
    monkeypatch.setattr(
        common, "gaussian_blur", lambda images, sigma, size: seen.append(sigma) or images * 0 - 1
    )
    n = 4000
    views = ressl.strong_view(random_images(n, 3, 8, 8), generator=seeded())
    sigma = torch.cat(seen)
    assert torch.equal((views == -1).all((1, 2, 3)).sum(), torch.tensor(len(sigma)))
    assert_share((views == -1).all((1, 2, 3)), 0.5)
    assert sigma.min() >= 0.1
    assert sigma.max() <= 2
    uniform = numpy.random.default_rng(0).random(len(sigma))
    assert distance((sigma - 0.1) / 1.9, uniform) < likely(len(sigma))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_views_of_other_precisions_stay_in_them_and_near_float32(dtype):
    """600 images: an index of that size would not survive in bf16."""
    images = torch.rand(600, 3, 16, 16)
    images[:100] = 0.5  # grey: no hue to divide by
    plain, other = (
        ressl.strong_view(x, generator=torch.Generator().manual_seed(0))
        for x in (images, images.to(dtype))
    )
    assert other.dtype == dtype
    assert (other - plain).abs().mean() < 0.01


def test_parameters_may_be_of_any_dtype():
    """Integer boxes and float64 factors, with float32 or float64 images."""
    box = common.draw_boxes(4, 16, (0.2, 1.0)).long()
    factor = torch.tensor([0.5, 0.8, 1.0, 1.3], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        images = torch.rand(4, 3, 16, 16, dtype=dtype)
        assert common.resized_crop(images, *box, 8).dtype == dtype
        for name in ("brightness", "contrast", "saturation", "hue"):
            assert getattr(common, f"adjust_{name}")(images, factor).dtype == dtype
        assert common.gaussian_blur(images, factor).dtype == dtype
