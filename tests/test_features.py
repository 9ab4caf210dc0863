"""Encoders, feature extraction, precision and device choice, and the kNN against brute force."""

import copy

import numpy
import pytest
import torch
import torchvision
from torch import nn
from torchvision.transforms.v2 import functional as transforms

import common

CPU = torch.device("cpu")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------- kNN


def brute_force(bank, labels, features, classes, k, temperature):
    """The definition of the weighted kNN, in float64, a query after another."""
    bank, features = (x.double().numpy() for x in (bank, features))
    votes = numpy.zeros((len(features), classes))
    for i, feature in enumerate(features):
        cosine = bank @ feature / numpy.linalg.norm(bank, axis=1) / numpy.linalg.norm(feature)
        for j in numpy.argsort(-cosine)[:k]:
            votes[i, labels[j]] += numpy.exp(cosine[j] / temperature)
    return votes


def clusters(n=300, m=40, classes=7, dim=16, dtype=torch.float32):
    """A bank around one centre a class, its labels, and queries; lengths from 0.1 to 10."""
    generator = seeded()
    labels = torch.randint(classes, (n + m,), generator=generator)
    x = torch.randn(classes, dim, generator=generator)[labels]
    x = x + torch.randn(n + m, dim, generator=generator)
    x = (x * 10 ** (2 * torch.rand(n + m, 1, generator=generator) - 1)).to(dtype)
    return x[:n], labels[:n], x[n:], classes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (20, 0.07), (200, 0.1), (299, 1.0)])
def test_knn_equals_brute_force(dtype, k, temperature):
    data = clusters(dtype=dtype)
    scores = common.knn_scores(*data, k=k, temperature=temperature)
    assert scores.shape == (40, 7)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    numpy.testing.assert_allclose(scores, brute_force(*data, k, temperature), rtol=1e-5)


def test_knn_defaults_are_the_papers():
    data = clusters()
    numpy.testing.assert_allclose(common.knn_scores(*data), brute_force(*data, 200, 0.1), rtol=1e-5)


def test_knn_cuts_k_to_the_bank():
    data = clusters(n=30)
    numpy.testing.assert_allclose(
        common.knn_scores(*data, k=200), brute_force(*data, 30, 0.1), rtol=1e-5
    )


def test_knn_ignores_lengths_and_changes_nothing():
    bank, labels, features, classes = clusters()
    before = bank.clone(), features.clone()
    scores = common.knn_scores(bank, labels, features, classes)
    assert torch.equal(bank, before[0])
    assert torch.equal(features, before[1])
    scaled = common.knn_scores(bank * 3, labels, features / 7, classes)
    torch.testing.assert_close(scaled, scores, rtol=1e-5, atol=0)


def test_knn_gives_empty_classes_no_vote():
    bank, labels, features, _ = clusters()
    scores = common.knn_scores(bank, labels, features, 12)
    assert scores.shape == (40, 12)
    assert (scores[:, 7:] == 0).all()


def test_knn_does_not_depend_on_the_chunks(monkeypatch):
    data = clusters()
    whole = common.knn_scores(*data, k=20)
    split = torch.Tensor.split
    parts = []

    def in_sevens(x, rows, dim=0):
        parts.extend(split(x, min(rows, 7), dim))
        return parts

    monkeypatch.setattr(torch.Tensor, "split", in_sevens)
    similarities, rows = common.nearest(data[0], data[2], 20)
    assert len(parts) == 6  # 40 queries in sevens
    assert similarities.shape == rows.shape == (40, 20)
    parts.clear()
    torch.testing.assert_close(common.knn_scores(*data, k=20), whole, rtol=1e-5, atol=0)


def test_a_large_bank_makes_small_chunks(monkeypatch):
    """Memory is bounded whatever N is: no chunk has more than 2**25 similarities."""
    bank, features = (torch.randn(n, 4, generator=seeded()) for n in (2**18, 300))
    topk = torch.Tensor.topk
    sizes = []
    monkeypatch.setattr(torch.Tensor, "topk", lambda x, k: sizes.append(x.numel()) or topk(x, k))
    _, rows = common.nearest(bank, features, 1)
    assert max(sizes) <= 2**25
    assert sum(sizes) == 300 * 2**18
    expected = [(nn.functional.normalize(bank) @ feature).argmax() for feature in features[::50]]
    assert rows[::50, 0].tolist() == [index.item() for index in expected]


@pytest.mark.parametrize("classes", [3, 5, 10, 100])
def test_top_k_equals_brute_force(classes):
    scores = torch.rand(500, classes, generator=seeded())
    labels = torch.randint(classes, (500,), generator=seeded(1))
    better = (scores > scores.gather(1, labels[:, None])).sum(1)  # classes before the right one
    expected = [100 * (better < k).double().mean().item() for k in (1, 5)]
    top1, top5 = common.top_k(scores, labels)
    assert top1 == pytest.approx(expected[0], rel=1e-5)
    assert top5 == (pytest.approx(expected[1], rel=1e-5) if classes > 5 else None)


def test_a_tie_is_a_mistake():
    """So a class without a vote is never right, and a collapsed encoder has no accuracy."""
    scores = torch.zeros(3, 7)
    scores[0, 3] = 1.0
    scores[1, :5] = 1.0
    assert common.top_k(scores, torch.tensor([3, 0, 6])) == pytest.approx((100 / 3, 200 / 3))


# -------------------------------------------------------------------------------------- encoders

DIMS = {"conv4": 256, "resnet18": 512, "resnet34": 512, "resnet50": 2048, "mobilenet_v2": 1280}
DIMS |= {"mobilenet_v3_large": 960, "efficientnet_b0": 1280, "shufflenet_v2_x1_0": 1024}
THEIRS = [arch for arch in DIMS if arch != "conv4"]
# By encoder, the layers where torchvision's halves its maps: the first convolution, then four more.
STAGES = dict.fromkeys(("resnet18", "resnet34", "resnet50"), "conv1 maxpool layer2 layer3 layer4")
STAGES["mobilenet_v2"] = "features.0 features.2 features.4 features.7 features.14"
STAGES["mobilenet_v3_large"] = "features.0 features.2 features.4 features.7 features.13"
STAGES["efficientnet_b0"] = "features.0 features.2 features.3 features.4 features.6"
STAGES["shufflenet_v2_x1_0"] = "conv1 maxpool stage2 stage3 stage4"
# Sides of the maps after those, for an image of 64 px.
SIDES = {
    "small": [64, 64, 32, 16, 8],
    "medium": [64, 32, 16, 8, 4],
    "imagenet": [32, 16, 8, 4, 2],
}


def swapped(arch, stem):
    """torchvision's model with the stem and the head swapped by hand, as the README shows it."""
    model = getattr(torchvision.models, arch)(weights=None)
    if arch.startswith("resnet") and stem != "imagenet":
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    elif arch == "shufflenet_v2_x1_0" and stem != "imagenet":
        model.conv1[0].stride = (1, 1)
    elif stem != "imagenet":
        model.features[0][0].stride = (1, 1)
    if stem == "small":
        if arch == "mobilenet_v2":
            model.features[2].conv[1][0].stride = (1, 1)
        elif arch == "mobilenet_v3_large":
            model.features[2].block[1][0].stride = (1, 1)
        elif arch == "efficientnet_b0":
            model.features[2][0].block[1][0].stride = (1, 1)
        else:
            model.maxpool = nn.Identity()
    if hasattr(model, "fc"):
        model.fc = nn.Identity()
    else:
        model.classifier = nn.Identity()
    return model


@pytest.mark.parametrize("stem", SIDES)
@pytest.mark.parametrize("arch", DIMS)
def test_encoder_gives_pooled_features(arch, stem):
    encoder = common.build_encoder(arch, stem)
    assert encoder.dim == DIMS[arch]
    sides = []
    for name in STAGES.get(arch, "").split():
        layer = encoder.get_submodule(name)
        layer.register_forward_hook(lambda *call: sides.append(call[-1].shape[-1]))
    with torch.no_grad():
        assert encoder.eval()(torch.rand(1, 3, 64, 64)).shape == (1, DIMS[arch])
    assert sides == ([] if arch == "conv4" else SIDES[stem])


def test_all_architectures_are_tested():
    assert list(common.ARCHITECTURES) == list(DIMS)


@pytest.mark.parametrize("arch", DIMS)
def test_encoders_are_made_for_training_from_scratch(arch):
    """BatchNorm momentum 0.1; and no stochastic depth or dropout: the same features twice."""
    encoder = common.build_encoder(arch, "small")
    norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.1}
    images = torch.rand(2, 3, 32, 32, generator=seeded())
    assert encoder.training
    with torch.no_grad():
        assert torch.equal(encoder(images), encoder(images))


@pytest.mark.parametrize("arch", THEIRS)
@pytest.mark.parametrize("stem", SIDES)
def test_encoders_load_into_torchvisions(arch, stem):
    encoder, theirs = common.build_encoder(arch, stem), swapped(arch, stem)
    images = torch.rand(4, 3, 32, 32, generator=seeded())
    encoder(images)  # moves the BatchNorm statistics, so that they count below
    theirs.load_state_dict(encoder.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(images), encoder.eval()(images))


@pytest.mark.parametrize("arch", DIMS)
def test_encoders_start_at_random_weights(arch):
    first, second = (common.build_encoder(arch, "small").state_dict() for _ in range(2))
    name = next(iter(first))
    assert not torch.equal(first[name], second[name])


def test_a_resnets_swapped_convolution_starts_as_torchvisions_do():
    """He initialisation by the outputs, 64 channels of 3 x 3."""
    weight = common.build_encoder("resnet18", "small").conv1.weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)


@pytest.mark.parametrize("side", [14, 18, 24, 27, 32, 64])
def test_conv4_takes_any_crop(side):
    encoder = common.build_encoder("conv4", "small")
    assert encoder(torch.rand(2, 3, side, side)).shape == (2, 256)


def test_conv4_halves_its_maps_before_batch_norm():
    encoder, sides = common.build_encoder("conv4", "small"), []
    for layer in encoder:
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(lambda *call: sides.append(call[-1].shape[-1]))
    encoder(torch.rand(2, 3, 32, 32))
    assert sides == [16, 8, 4, 2]


def test_conv4_has_390_thousand_parameters():
    count = sum(p.numel() for p in common.build_encoder("conv4", "small").parameters())
    assert round(count / 1e6, 2) == 0.39


@pytest.mark.parametrize(
    ("arch", "stem"),
    [("resnet19", "small"), ("resnext50_32x4d", "small"), ("", "small"), ("resnet18", "tiny")],
)
def test_unknown_encoders_are_refused(arch, stem):
    """On the command line by argparse; here by Python, because a programmer wrote it."""
    with pytest.raises((KeyError, AttributeError)):
        common.build_encoder(arch, stem)


# -------------------------------------------------------------------------------------- features


def small_set(count=11, side=8):
    images = torch.randint(256, (count, 3, side, side), generator=seeded()).to(torch.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    return common.Images(
        images, torch.arange(count) % 2, ["even", "odd"], mean, std, numpy.arange(count)
    )


def normalised(data):
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (data.mean, data.std))
    return (data.images / 255 - mean) / std


@pytest.mark.parametrize("count", [1, 11, 500, 1003])  # the last batch may be a partial one
def test_features_have_a_row_for_every_image(count):
    data = small_set(count)
    features = common.extract_features(nn.Flatten(), data, 8)
    expected = normalised(data).flatten(1)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


def test_features_of_resized_images():
    data = small_set(side=48)
    features = common.extract_features(nn.Flatten(), data, 32)
    data.images = transforms.resize(data.images.double() / 255, [32, 32]) * 255
    torch.testing.assert_close(features, normalised(data).float().flatten(1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_extraction_leaves_the_encoder_as_it_was(training, dtype):
    data, encoder = small_set(), common.build_encoder("conv4", "small").train(training)
    before = copy.deepcopy(encoder.state_dict())
    seen = []
    encoder[0].register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    features = common.extract_features(encoder, data, 8, dtype)
    assert all(module.training == training for module in encoder.modules())
    for name, value in encoder.state_dict().items():  # BatchNorm's statistics among them
        assert torch.equal(value, before[name]), name
    assert all(p.requires_grad and p.grad is None for p in encoder.parameters())
    assert seen == [dtype or torch.float32]
    assert features.dtype == torch.float32
    assert not features.requires_grad
    tolerance = 1e-5 if dtype is None else 0.05
    with torch.no_grad():  # in eval mode, whatever the mode was
        expected = encoder.eval()(normalised(data))
    torch.testing.assert_close(features, expected, rtol=tolerance, atol=tolerance)


def test_knn_accuracy_counts_every_image():
    """Pixels as features: three of eleven test images are in the bank under another label."""
    bank = small_set()
    test = bank.take(torch.arange(11))
    test.labels = test.labels.clone()
    test.labels[[0, 5, 10]] = 1 - test.labels[[0, 5, 10]]
    bank = bank.take(torch.arange(11).repeat(200))  # 200 copies of its own image are the nearest
    assert common.knn_accuracy(nn.Flatten(), bank, test, 8) == pytest.approx(100 * 8 / 11)


# ----------------------------------------------------------------------------- precision, device


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_becomes_float32(dtype, expected):
    x = torch.tensor([[1.5, -2.0]], dtype=dtype)
    assert common.full_precision(x).dtype == expected
    assert common.full_precision(x).tolist() == [[1.5, -2.0]]
    assert common.unit_length(x).dtype == expected
    torch.testing.assert_close(common.unit_length(x).tolist(), [[0.6, -0.8]])


@pytest.mark.parametrize(
    ("amp", "dtype"), [("off", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_precision_as_asked(amp, dtype, device):
    assert common.pick_precision(amp, torch.device(device)) == dtype


@pytest.mark.parametrize(
    ("able", "dtype"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "avx512_f": True}, None),
        ({}, None),
    ],
)
def test_automatic_precision_on_a_cpu(able, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert common.pick_precision("auto", CPU) == dtype


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_automatic_precision_on_a_gpu(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert common.pick_precision("auto", torch.device("cuda")) == dtype


def test_precision_on_mps():
    mps = torch.device("mps")
    assert common.pick_precision("auto", mps) is None
    assert common.pick_precision("off", mps) is None


def test_memory_format():
    for device in ("cpu", "cuda", "meta"):
        assert common.memory_format(torch.device(device)) == torch.channels_last
    assert common.memory_format(torch.device("mps")) == torch.contiguous_format


def test_devices_that_exist():
    assert common.pick_device("cpu") == CPU
    assert common.pick_device("auto").type in ("cpu", "cuda")


def test_mps_is_taken_only_where_it_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert common.pick_device("auto") == CPU


def test_only_the_gpu_that_is_named_is_used(monkeypatch):
    chosen, ones = [], torch.ones
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))
    for name in ("cpu", "cuda", "cuda:0", "cuda:1"):
        common.pick_device(name)
    assert chosen == [torch.device("cuda:1")]


@pytest.mark.parametrize("name", ["nonsense", "", "cuda:99", "cpu:x", "meta"])
def test_devices_that_do_not_exist_are_refused(name):
    with pytest.raises(common.UserError, match="cpu") as caught:
        common.pick_device(name)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)
