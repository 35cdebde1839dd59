"""mlp_cifar.py: its certificate against Jacobians and attacks, its training, its data, its runs."""

import dataclasses
import json
import math
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mlp_cifar
from constraints import CONSTRAINTS, ellipsoid_layer, ellipsoid_norm
from matrices import randn, sigma_limit, singular_values, with_spectrum
from mlp_cifar import (MLP, Config, UserError, certificate, certified_radii, follow_ellipsoid,
                       steepest_slope)
from muon import Muon
from tiny import (TINY, checkpoint, encode, flags, folder_of_pictures, noise_pictures,
                  parquet_folder, run, same)

ROOT = Path(__file__).parent.parent
DRAW_ALL = mlp_cifar.stand_in  # before the fixtures change them
pytestmark = pytest.mark.usefixtures("few_images", "blank_pictures")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_model(kind="random", norm=2.0, seed=0, **settings):
    config = Config(**{**dict(width=24, lowpass=6, seed=seed), **settings})
    model = MLP(config, torch.full((3072,), 0.4))
    generator = seeded(seed)
    for W, b in zip(model.weights, model.biases):
        if kind == "random":
            W.data = torch.randn(W.shape, generator=generator)
            W.data *= norm / norm_of(W)
        else:
            s = norm * torch.ones(min(W.shape), dtype=torch.float64)
            W.data = with_spectrum(*W.shape, s, seed=seed)
        b.data = 0.3 * torch.randn(b.shape, generator=generator)
    return model


def norm_of(W):
    return singular_values(W.data).max().item()


def random_images(n, seed=5):
    return torch.randint(0, 256, (n, 3072), dtype=torch.uint8, generator=seeded(seed))


def features(model, x_BP):
    """What the first matrix sees, as one sum: colours c, frequencies f of rows and g of columns."""
    x_BYXC = (x_BP - model.mean_P).double().view(-1, 32, 32, 3)
    cosines = model.cosines_FX
    return torch.einsum("fy,gx,byxc->bcfg", cosines, cosines, x_BYXC).flatten(1)


def steepest_pair(model, steps=60):
    """The largest |f(x) - f(y)| / |x - y| found by ascent on both ends."""
    x = torch.rand(16, 3072, generator=seeded(0), dtype=torch.float64, requires_grad=True)
    y = (x.detach() + 0.1 * torch.randn(x.shape, generator=seeded(1))).requires_grad_()
    best = 0.0
    for _ in range(steps):
        ratio = (model(x) - model(y)).norm(dim=1) / (x - y).norm(dim=1)
        best = max(best, ratio.max().item())
        for end, gradient in zip((x, y), torch.autograd.grad(ratio.sum(), (x, y))):
            end.data += 0.3 * gradient / gradient.norm(dim=1, keepdim=True)
    return best


# ---- certificate ---------------------------------------------------------------------------------
MODELS = [dict(seed=seed, kind=kind, depth=depth) for seed in (0, 1)
          for kind in ("random", "orthogonal") for depth in (1, 2, 3, 5)]
MODELS += [dict(case, activation="maxmin") for case in MODELS if case["depth"] in (2, 3)]
MODELS += [dict(kind="random", depth=depth, activation=activation, mirror=True, roll=2)
           for activation in ("relu", "maxmin") for depth in (1, 3)]
both_activations = pytest.mark.parametrize("activation", ["relu", "maxmin"])


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_certificates_hold_and_are_ordered(case):
    model = random_model(**case)
    untuned, tuned = certificate(model), certificate(model, steps=20)
    product = 10 ** untuned["product_log10"]
    assert product == pytest.approx(math.prod(map(norm_of, model.weights)), rel=1e-8)
    norms = [norm_of(W) / sigma_limit(W, 1.0) for W in model.weights]
    assert list(untuned["norms"].values()) == pytest.approx(norms, rel=1e-8)
    assert tuned["product_log10"] == untuned["product_log10"]
    assert untuned["product_log10"] >= untuned["tight_log10"] >= tuned["tight_log10"]
    tight = 10 ** tuned["tight_log10"]
    if case["kind"] == "random" and case["depth"] > 1:
        assert tight < 0.97 * product  # orthogonal weights reach the product
    slope = steepest_slope(model, random_images(64))
    found = max(slope, steepest_pair(model))
    assert 0.05 * tight < found <= tight
    if case["depth"] == 1 and not case.get("mirror"):
        assert slope >= 0.999 * tight  # a linear model is as steep everywhere


def test_wide_networks_are_certified_untuned():
    for width, tunes in ((1026, False), (64, True)):
        model = MLP(Config(width=width, depth=2, lowpass=2))
        model.weights[1].data *= torch.linspace(0.1, 1, width)
        assert (certificate(model, 3)["tight_log10"] < certificate(model)["tight_log10"]) == tunes


@both_activations
def test_any_multipliers_give_a_valid_certificate(activation):
    model = random_model(depth=4, lowpass=3, activation=activation)
    found = steepest_pair(model)
    multipliers = {}
    follow_ellipsoid(model, multipliers)
    for seed in range(10):
        for i, (name, value) in enumerate(multipliers.items()):
            multipliers[name] = 3 * randn(*value.shape, seed=100 * seed + i)
        S, log = follow_ellipsoid(model, multipliers)
        assert found <= ellipsoid_norm(S, log, torch.eye(10).double()).exp()


@pytest.mark.parametrize("activation, kind", [
    ("relu", "random"), ("maxmin", "random"), ("maxmin", "orthogonal")])
@torch.no_grad()
def test_step_by_step_inequalities_of_the_tight_certificate(activation, kind):
    """Steps 1 to 5 above follow_ellipsoid, each on differences of activations of real inputs."""
    model = random_model(kind=kind, lowpass=3, activation=activation).double()
    model.weights[0].data *= 3
    x, y = torch.rand(2, 500, 3072, generator=seeded(3), dtype=torch.float64)
    dx = (x - y).square().sum(1)
    h, g = features(model, x), features(model, y)
    assert ((h - g).square().sum(1) <= dx).all()
    S = model.weights[0] @ model.weights[0].T
    for W, b, W_next in zip(model.weights[:-1], model.biases, model.weights[1:]):
        p, q = h @ W.T + b, g @ W.T + b
        z, h, g = p - q, model.activation(p), model.activation(q)
        # Step 1, and that 2 and 3 keep it up: z^T S^-1 z <= |dx|^2.
        assert (torch.einsum("bi,ij,bj->b", z, torch.linalg.pinv(S), z) <= dx * (1 + 1e-6)).all()
        G, A, B = torch.eye(z.shape[1]).double(), W_next / 2, W_next / 2  # steps 2 and 3
        v = 2 * (h - g) - z
        if activation == "maxmin":
            (first, second), (P, Q) = G.chunk(2), W_next.chunk(2, 1)
            G, A, B = (first - second) / 2**0.5, (P + Q) @ (first + second) / 2, (P - Q) / 2**0.5
            above, below = (h - g).chunk(2, 1)
            v = (above - below) / 2**0.5
        assert (v.abs() <= (z @ G.T).abs() + 1e-12).all()
        torch.testing.assert_close((h - g) @ W_next.T, z @ A.T + v @ B.T)
        S, log = ellipsoid_layer(S, 0.0, G, A, B)
        S = S * log.exp()
    bound = certificate(model)
    ours = math.log10(torch.linalg.eigvalsh(S).max().item()) / 2  # step 4
    assert ours <= bound["product_log10"] or activation == "maxmin"
    assert bound["tight_log10"] == pytest.approx(min(ours, bound["product_log10"]), abs=1e-8)
    before_last = math.prod(map(norm_of, model.weights[:-1]))
    for a, c in ((0, 1), (3, 9)):  # step 5: the smaller one of ellipsoid and product
        v = torch.zeros(10, dtype=torch.float64)
        v[a], v[c] = 1, -1
        product = (v @ model.weights[-1]).norm().item() * before_last
        expected = math.log10(min((v @ S @ v).sqrt().item(), product))
        assert bound["pairs_log10_KK"][a, c].item() == pytest.approx(expected, abs=1e-6)


@both_activations
def test_pair_constants_bound_gradients_of_margins(activation):
    model = random_model(norm=3.0, activation=activation)
    bound = certificate(model, steps=10)
    pairs = 10 ** bound["pairs_log10_KK"]
    x = torch.rand(40, 3072, dtype=torch.float64, generator=seeded(1)).requires_grad_()
    logits = model(x)
    for y, j in ((0, 1), (4, 7), (9, 2)):
        gradient, = torch.autograd.grad((logits[:, y] - logits[:, j]).sum(), x, retain_graph=True)
        assert gradient.norm(dim=1).max() <= pairs[y, j]
    assert (pairs <= 2**0.5 * 10 ** bound["product_log10"] * (1 + 1e-8)).all()


def test_certified_radius_of_a_linear_model_is_exact():
    """To the nearest image of another class: just inside the radius right, just outside wrong."""
    model = random_model(depth=1)
    images = random_images(50)
    x = images.double() / 255
    logits = model(x)
    labels = logits.argmax(1)
    labels[0] = (labels[0] + 1) % 10
    radius = certified_radii(model, certificate(model)["pairs_log10_KK"], images, labels)
    assert radius[0] < 0 < radius[1:].min()
    W = torch.autograd.functional.jacobian(lambda v: model(v[None])[0], x[0])
    for i in range(1, 10):
        d = W[labels[i]] - W
        distance = (logits[i, labels[i]] - logits[i]) / d.norm(dim=1).clamp(min=1e-30)
        distance[labels[i]] = math.inf
        j = distance.argmin()
        assert radius[i].item() == pytest.approx(distance[j].item(), rel=1e-6)
        for factor, right in ((0.999, True), (1.001, False)):
            moved = x[i] - factor * radius[i] * d[j] / d[j].norm()
            assert (model(moved[None]).argmax() == labels[i]).item() == right


@pytest.mark.parametrize("where", ["weights.0", "biases.1", "mean_P"])
def test_what_is_not_finite_is_refused(where):
    model = random_model()
    model.state_dict()[where].view(-1)[0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        certificate(model)


@pytest.mark.parametrize("norm, depth, activation", [
    (0.4, 390, "relu"), (0.1, 1000, "maxmin"), (30.0, 400, "relu")])
def test_deep_networks_leave_the_range_of_float64_and_the_certificate_does_not(
        norm, depth, activation):
    """In logarithms, between the exact product and half of it a layer."""
    model = random_model(kind="orthogonal", norm=norm, depth=depth, width=10, lowpass=2,
                         activation=activation)
    bound = certificate(model)
    product = bound["product_log10"]
    exact = sum(math.log10(norm_of(W)) for W in model.weights)
    assert product == pytest.approx(exact, rel=1e-6)
    assert product - depth * math.log10(2) <= bound["tight_log10"] <= product
    assert bound["pairs_log10_KK"][0, 1].isfinite()


def test_exact_ties_are_not_certified():
    model = random_model()
    for parameter in (model.weights[-1], model.biases[-1]):
        parameter.data[1] = parameter.data[0]
    model.biases[-1].data[:2] = model.biases[-1].data.max() + 0.5
    images = random_images(200, seed=2)
    labels = model(images.double() / 255).argmax(1)
    tied = labels <= 1
    radius = certified_radii(model, certificate(model)["pairs_log10_KK"], images, labels)
    assert 0 < tied.sum() < 200 and (radius[tied] <= 0).all() and (radius[~tied] > 0).all()


# ---- model ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("lowpass", [6, 32])
def test_mirror_averages_an_image_and_its_mirror_image(lowpass):
    model = random_model(lowpass=lowpass, mirror=True).double()
    plain = random_model(lowpass=lowpass).double()
    x = torch.rand(5, 32, 32, 3, dtype=torch.float64, generator=seeded(0))
    model.mean_P = plain.mean_P = x.flipud().flatten(1).mean(0)
    right, left = x.flatten(1), x.flip(2).flatten(1)
    mean = model.mean_P.view(32, 32, 3)
    of_mirror = plain((x - mean).flip(2).flatten(1) + plain.mean_P)
    torch.testing.assert_close(model(right), (plain(right) + of_mirror) / 2)
    model.mean_P = (mean + mean.flip(1)).flatten() / 2
    torch.testing.assert_close(model(right), model(left))
    assert certificate(model)["tight_log10"] == certificate(plain)["tight_log10"]


def test_roll_averages_five_views_and_ten_with_the_mirror_image():
    plain = random_model(lowpass=6).double()
    rolled = random_model(lowpass=6, roll=2).double()
    both = random_model(lowpass=6, roll=2, mirror=True).double()
    x = torch.rand(5, 32, 32, 3, dtype=torch.float64, generator=seeded(0))
    for model in (plain, rolled, both):
        model.mean_P = torch.zeros(3072).double()

    def average(*images):
        return sum(plain(image.flatten(1)) for image in images) / len(images)

    moves = [(0, 0), (2, 2), (2, -2), (-2, 2), (-2, -2)]
    views = [x.roll(move, (1, 2)) for move in moves]
    mirrored = [x.flip(2).roll(move, (1, 2)) for move in moves]
    torch.testing.assert_close(rolled(x.flatten(1)), average(*views))
    torch.testing.assert_close(both(x.flatten(1)), average(*views, *mirrored))
    assert certificate(both)["tight_log10"] == certificate(plain)["tight_log10"]


@both_activations
def test_square_layers_start_as_the_identity_with_maxmin(activation):
    config = Config(depth=4, width=16, lowpass=2, w_max="0.5", activation=activation)
    weights = MLP(config).weights
    for W in weights:
        limit = torch.full((min(W.shape),), sigma_limit(W, 0.5)).double()
        torch.testing.assert_close(singular_values(W.detach()), limit, rtol=1e-5, atol=0)
    assert torch.equal(weights[1], torch.eye(16) / 2) == (activation == "maxmin")


def test_lowpass_is_a_cosine_transform_with_orthonormal_rows():
    model = random_model(lowpass=12, depth=1)
    C = model.cosines_FX
    torch.testing.assert_close(C @ C.T, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-12)
    changes_of_sign = (C[:, 1:] * C[:, :-1] < 0).sum(1)
    assert (changes_of_sign == torch.arange(12)).all()  # its frequency
    x = torch.rand(5, 3072, dtype=torch.float64)
    seen = features(model, x)
    assert (seen.norm(dim=1) <= (x - model.mean_P).norm(dim=1)).all()
    expected = seen @ model.weights[0].double().T + model.biases[0]
    torch.testing.assert_close(model(x), expected)


def test_parity_with_the_reference():
    """Recorded logits of the authors' MLP for given images and weights."""
    reference = np.load(Path(__file__).parent / "reference.npz")
    model = MLP(Config(width=16, lowpass=32, bias=False, center=False))
    for i, W in enumerate(model.weights):
        W.data = torch.from_numpy(reference[f"mlp_weight_{i}"])
    images, logits = (torch.from_numpy(reference[name]) for name in ("mlp_images", "mlp_logits"))
    torch.testing.assert_close(model(images.reshape(4, 3072)), logits, rtol=0, atol=1e-5)


# ---- training ------------------------------------------------------------------------------------
@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_optimizer_with_every_constraint(optimizer, constraint, tmp_path, capsys):
    lr = 0.5 if optimizer == "muon" else 0.02
    settings = dict(optimizer=optimizer, constraint=constraint, lr=lr, w_max="1.2")
    out, summary = run(tmp_path / "run", **settings)
    assert math.isfinite(summary["val_loss"]) and 0 <= summary["val_accuracy"] <= 1
    decays_to_its_limit = (optimizer, constraint) == ("muon", "weight_decay")
    if constraint in ("soft_cap", "hard_cap", "specnorm", "stiefel") or decays_to_its_limit:
        assert summary["max_weight_norm"] <= 1.2 * (1 + 1e-3)
    assert summary["w_max"] == (None if constraint == "none" else {f"layer {i}": 1.2 for i in (1, 2, 3)})
    assert {path.name for path in out.iterdir()} == {
        "config.json", "log.jsonl", "checkpoint.pt", "curves.png", "summary.json"}
    beyond = constraint != "none" and summary["max_weight_norm"] > 1.2 * (1 + 1e-4)
    assert ("ABOVE ITS LIMIT" in capsys.readouterr().out) == beyond


@pytest.mark.parametrize("constraint", ["soft_cap", "hard_cap", "specnorm", "stiefel"])
@pytest.mark.parametrize("lr", [0.9, 0.1])  # at 0.1 the constraint waits for some steps
def test_limits_hold_at_every_step(lr, constraint, tmp_path, after_step):
    """In float64, after each of 40 steps large enough to reach the limit."""
    shares = []

    def measure(optimizer):
        if isinstance(optimizer, Muon):
            for group in optimizer.param_groups:
                W, = group["params"]
                shares.append(norm_of(W) / sigma_limit(W, group["w_max"]))

    after_step(measure)
    run(tmp_path / "run", steps=40, evals=1, constraint=constraint, lr=lr, w_max="1,1.5,0.7")
    assert len(shares) == 120 and max(shares) <= 1 + 1e-4
    assert sum(share > 0.9 for share in shares) > 20


def test_each_setting_changes_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(mlp_cifar, "report", lambda *arguments: None)
    changes = dict(
        holdout=100, augment=True, depth=2, width=18, activation="maxmin", bias=False, center=False,
        lowpass=5, mirror=True, roll=3, w_max="0.5", optimizer="adamw", constraint="none",
        constrain_every=1, steps=7, batch=32, lr=0.1, momentum=0.5, adamw_wd=0.5,
        loss_temperature=2.0, margin=1.0, seed=1, dtype="bfloat16")
    others = {"preset", "data", "label", "device", "evals", "out"}
    assert changes.keys() | others == {field.name for field in dataclasses.fields(Config)}

    def weights(name, **settings):
        settings = {**TINY, "dtype": "float32", "lr": 0.5, "evals": 1, **settings}
        mlp_cifar.main(Config(**settings, out=str(tmp_path / name)))
        return checkpoint(tmp_path / name)["model"]

    before = {optimizer: weights(optimizer, optimizer=optimizer) for optimizer in ("muon", "adamw")}
    for name, value in changes.items():
        optimizer = "adamw" if name == "adamw_wd" else "muon"
        after = weights(f"with {name}", **{"optimizer": optimizer, name: value})
        assert not same(after, before[optimizer]), name


def test_loss_of_a_batch(few_images, tmp_path):
    """The cross-entropy of temperature * logits, with the margin taken from the right class's."""
    (images, labels), _ = few_images
    config = Config(**TINY)
    index = mlp_cifar.choose_batch(0, 600, config)
    model = MLP(config, images.double().mean(0).float() / 255)
    logits = 3 * model(images[index] / 255).double()
    right = torch.arange(64), labels[index]
    logits[right] -= 1.5
    out, _ = run(tmp_path / "run", steps=1, evals=1, dtype="float32", loss_temperature=3.0,
                 margin=1.5)
    expected = (logits.logsumexp(1) - logits[right]).mean().item()
    assert checkpoint(out)["log"][0]["train_loss"] == pytest.approx(expected, rel=1e-5)


def test_learning_rates_fall_to_0(tmp_path, after_step):
    rates = []  # of Muon, which shares the rate among three layers, and of the biases
    after_step(lambda optimizer: rates.append(optimizer.param_groups[0]["lr"]))
    run(tmp_path / "run", steps=4, evals=1, lr=0.6)
    expected = [0.2, 0.01, 0.15, 0.0075, 0.1, 0.005, 0.05, 0.0025]
    assert rates[:8] == pytest.approx(expected)


def test_it_learns_and_a_linear_model_does_not(tmp_path, monkeypatch):
    """Chance is 10 %. An image and its negative are as likely, and of one class."""
    sets = DRAW_ALL(3000, 1000)
    monkeypatch.setattr(mlp_cifar, "stand_in", lambda: sets)
    settings = dict(steps=100, batch=512, evals=1, width=64, lowpass=12)
    _, linear = run(tmp_path / "linear", depth=1, **settings)
    _, mlp = run(tmp_path / "mlp", depth=3, **settings)
    assert linear["val_accuracy"] < 0.2 and mlp["val_accuracy"] > 0.3


def test_augmentation_flips_and_shifts_only(few_images):
    x = few_images[0][0][:200]
    moved = mlp_cifar.augment(x, 0, Config())
    assert torch.equal(moved, mlp_cifar.augment(x, 0, Config()))
    assert not torch.equal(moved, mlp_cifar.augment(x, 1, Config()))
    before, after = x.view(200, 32, 32, 3), moved.view(200, 32, 32, 3)
    kinds = set()
    for i in range(200):
        inner = after[i, 2:-2, 2:-2]
        kinds |= {(flip, dx, dy) for flip, source in enumerate((before[i], before[i].flip(1)))
                  for dx in range(-2, 3) for dy in range(-2, 3)
                  if torch.equal(inner, source[2 + dy:30 + dy, 2 + dx:30 + dx])}
        assert len(kinds) > 0
    assert len(kinds) == 50


def test_an_epoch_is_a_random_order_of_all_images():
    config = Config(batch=10)
    order = torch.cat([mlp_cifar.choose_batch(step, 43, config) for step in range(8)])
    first, second = order.chunk(2)
    for epoch in (first, second):
        assert len(epoch.unique()) == 40 and set(epoch.tolist()) <= set(range(43))
    assert not torch.equal(first, second) and not torch.equal(first.sort()[0], second.sort()[0])
    assert len(mlp_cifar.choose_batch(5, 7, config)) == 7  # a batch larger than the set is the set


def test_a_constraint_of_ones_own_that_leaves_zeros(tmp_path):
    """A constant of 0 is a word in the files, as its logarithm is infinite."""
    file = tmp_path / "mine.py"
    file.write_text("def mine(W, w_max, step_norm=0.0):\n    return 0 * W\n")
    out, summary = run(tmp_path / "run", constraint=f"{file}:mine")
    lines = (out / "log.jsonl").read_text().splitlines()
    for record in (summary, *(json.loads(line, parse_constant=pytest.fail) for line in lines)):
        assert record["lipschitz_log10"] == "-inf"
    assert len(lines) == 2 and summary["lipschitz_product_log10"] == "-inf"
    assert summary["max_weight_norm"] == summary["largest_jacobian_l2"] == 0


# ---- data ----------------------------------------------------------------------------------------
def load(data, label=""):
    """(images (N, 32, 32, 3), labels) to train."""
    (images, labels), _ = mlp_cifar.load_images(str(data), label)
    return images.view(-1, 32, 32, 3).numpy(), labels


def test_a_folder_of_parquet(tmp_path, monkeypatch):
    data = folder_of_pictures(tmp_path / "\u00fcml\u00e4ut and blank" / "data")
    _, summary = run(tmp_path / "run", data=str(data), batch=512)
    assert summary["data"] == str(data)
    monkeypatch.setenv("HOME", str(data.parent))
    monkeypatch.chdir(data.parent)
    for path in (data, "~/data", "data"):
        images, labels = load(path)
        assert np.array_equal(images, np.stack(noise_pictures(40)))  # PNG: no loss
        assert torch.equal(labels, torch.arange(40) % 10) and images.dtype == np.uint8


def test_a_folder_of_files(tmp_path):
    for split in ("train", "test"):
        for i, name in enumerate(("cat", "dog", "[elk]")):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), (i, i, i)).save(tmp_path / split / name / "a b.png")
    images, labels = load(tmp_path)
    colours = dict(zip(labels.tolist(), images[:, 0, 0, 0].tolist(), strict=True))
    assert colours == {0: 2, 1: 0, 2: 1}  # in the alphabet's order


def test_pictures_become_rgb_of_32_by_32(tmp_path):
    red = Image.new("RGB", (32, 32), (255, 0, 0))
    pictures = [(red, [255, 0, 0]), (red.quantize(), [255, 0, 0]),
                (Image.new("1", (32, 32), 1), [255] * 3), (Image.new("L", (28, 28), 9), [9] * 3),
                (Image.new("RGB", (64, 64), (1, 2, 3)), [1, 2, 3])]
    files = [encode(picture) for picture, _ in pictures]
    images, _ = load(parquet_folder(tmp_path / "data", ("image", "labels"), files))
    for image, (_, colour) in zip(images, pictures, strict=True):
        assert (image == colour).all()


def test_images_held_out_are_not_trained_on(few_images):
    (images, labels), _ = few_images
    config = Config(data="stand-in", holdout=100)
    (train, _), (test, test_labels), name = mlp_cifar.load_data(config)
    assert "100" in name and len(train) == 500 and len(test) == 100
    both = {row.tobytes() for row in torch.cat([train, test]).numpy()}
    assert both == {row.tobytes() for row in images.numpy()}
    for image, label in zip(test[:5], test_labels):
        assert label == labels[(images == image).all(1)]
    config.seed = 3
    assert torch.equal(test, mlp_cifar.load_data(config)[1][0])


def test_data_dir_comes_first_and_no_network_means_stand_in(tmp_path, monkeypatch):
    data = folder_of_pictures(tmp_path / "here" / "cifar10")
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "here"))
    assert mlp_cifar.load_data(Config())[2] == str(data)
    monkeypatch.delenv("DATA_DIR")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    script = ("import mlp_cifar, sys; small = mlp_cifar.stand_in(600, 200); "
              "mlp_cifar.stand_in = lambda: small; "
              "mlp_cifar.main(mlp_cifar.Config.of(steps=2, width=8, evals=1, out=sys.argv[1]))")
    with socket.socket() as hole:  # accepts what is sent and never answers, as a dead network does
        hole.bind(("127.0.0.1", 0))
        hole.listen(20)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hole.getsockname()[1]}")
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", script, tmp_path / "run"], cwd=ROOT,
                              capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "STAND-IN" in done.stdout and "data: stand-in" in done.stdout
    assert time.perf_counter() - start < 60
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["data"] == "stand-in"


@pytest.mark.parametrize("column, label, classes", [
    ("fine_label", "", 100), ("labels", "", 3), ("sort", "sort", 12)])
def test_as_many_classes_as_there_are(column, label, classes, tmp_path):
    """CIFAR-100's columns and others: in the model, the files and what verify_lipschitz attacks."""
    import verify_lipschitz
    data = folder_of_pictures(tmp_path / "data", classes, list(range(classes)), ("img", column))
    out, summary = run(tmp_path / "run", data=str(data), label=label, steps=4)
    state = checkpoint(out)
    assert state["classes"] == classes == len(state["model"]["weights.2"])
    bound = certificate(mlp_cifar.load_checkpoint(out)[1])
    assert bound["pairs_log10_KK"].shape == (classes, classes)
    in_rms = bound["tight_log10"] + math.log10(3072 / classes) / 2
    assert state["log"][-1]["lipschitz_log10"] == pytest.approx(in_rms)
    sizes = {name: W.numel() for name, W in state["model"].items()}
    assert summary["params"] == sum(sizes.values()) - sizes["mean_P"]
    arguments = [str(out), "--budget=0.05", "--images=8"]
    assert verify_lipschitz.main(*verify_lipschitz.parse_arguments(arguments)) == 0


PIXEL = encode(Image.new("RGB", (1, 1)))
NOISE = [encode(picture) for picture in noise_pictures(3)]
WRONG_DATA = {  # {kind: (what is said, files, labels and more of parquet_folder)}
    "label missing": ("README", [PIXEL] * 3, [0, 1, None], {}),
    "label below 0": ("below 0", [PIXEL] * 3, [0, -1, 1], {}),
    "2 classes": ("2 classes", [PIXEL] * 3, [0, 0, 0], {}),
    "labels from 1 on": ("label 0", NOISE, [1, 2, 3], {}),
    "a class without images": ("label 1", NOISE, [0, 2, 2], {}),
    "no rows": ("README", [], [], {}),
    "no picture": ("README", [PIXEL, b"hello", PIXEL], [0, 1, 2], {}),
    "other columns": ("README", NOISE, [0, 1, 2], dict(columns=("photo", "class"))),
    "other label": ("species", NOISE, [0, 1, 2], {}),
    "one split": ("README", NOISE, [0, 1, 2], dict(splits=("train",)))}


@pytest.mark.parametrize("kind", [*WRONG_DATA, "empty folder", "file"])
def test_wrong_data_are_one_line_and_leave_nothing(kind, tmp_path):
    data, label, says = tmp_path / "data", "", "README"
    if kind in WRONG_DATA:
        says, files, labels, more = WRONG_DATA[kind]
        columns = more.pop("columns", ("img", "label"))
        parquet_folder(data, columns, files, labels, **more)
    elif kind == "empty folder":
        data.mkdir()
    else:
        data.write_text("hello")
    if kind == "other label":
        label = "species"
    with pytest.raises(UserError, match=says) as refusal:
        run(tmp_path / "run", data=str(data), label=label)
    message = str(refusal.value)
    assert str(data) in message and "\n" not in message and len(message) < 700
    assert not (tmp_path / "run").exists()


# ---- a run and its folder ------------------------------------------------------------------------
@pytest.mark.parametrize("optimizer, every, end", [
    ("muon", 4, "a kill"), ("adamw", 4, "Ctrl-C"),
    # Saving makes Muon look at norms again, so a constraint that waits would come at other steps.
    ("muon", 1, "Ctrl-C")])
def test_the_same_command_goes_on_bit_identically(
        optimizer, every, end, tmp_path, monkeypatch, capsys, after_step):
    settings = dict(steps=60, evals=12, width=48, optimizer=optimizer, constrain_every=every)
    whole, _ = run(tmp_path / "whole", augment=True, **settings)
    out, steps = tmp_path / "run", []

    def stop(_):
        steps.append(1)
        if len(steps) == 2 * 27:  # a step is one of the matrices and one of the biases
            if end == "a kill":
                raise SystemExit  # which no code of the script catches
            signal.raise_signal(signal.SIGINT)

    after_step(stop)
    monkeypatch.setattr(sys, "argv", ["mlp_cifar.py", "--augment", *flags(out, **settings)])
    if end == "a kill":
        with pytest.raises(SystemExit):
            mlp_cifar.run_script()
        (out / "log.jsonl").write_text('{"step": 5')  # cut off: it is written anew
    else:
        assert mlp_cifar.run_script() == 130
        said = capsys.readouterr().err
        assert "saved at step 27; " in said and f"--out {out}" in said
    saved = 25 if end == "a kill" else 27
    assert checkpoint(out)["step"] == saved and not (out / "summary.json").exists()
    assert mlp_cifar.run_script() == 0
    a, b = checkpoint(whole), checkpoint(out)
    assert same(a["model"], b["model"]) and same(a["optimizers"], b["optimizers"])
    lines = (out / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(5, 61, 5))


def test_divergence_stops_and_keeps_the_last_checkpoint(tmp_path, after_step):
    count, out = [], tmp_path / "run"

    def spoil(optimizer):
        count.append(1)
        if len(count) == 2 * 4:  # in the 4th step; step 3 has been saved
            optimizer.param_groups[0]["params"][0].data.view(-1)[0] = math.nan

    after_step(spoil)
    says = "step 6: training has diverged, .* is not finite; try a smaller --lr"
    with pytest.raises(UserError, match=says):
        run(out)
    state = checkpoint(out)
    assert state["step"] == 3 and all(W.isfinite().all() for W in state["model"].values())
