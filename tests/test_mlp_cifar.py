"""mlp_cifar.py: its certificate against Jacobians and attacks, its data, and its behaviour through the command line."""

import dataclasses
import io
import json
import math
import os
import pickle
import runpy
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from matplotlib.figure import Figure
from matrices import sigma_limit, singular_values, with_spectrum
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

import mlp_cifar
from constraints import CONSTRAINTS, ellipsoid_layer, ellipsoid_norm
from muon import Muon
from mlp_cifar import MLP, Config, UserError, certificate, certified_radii, follow

ROOT = Path(__file__).parent.parent
FULL_STAND_IN, SAVEFIG = mlp_cifar.stand_in, Figure.savefig
TINY = dict(data="stand-in", steps=6, batch=64, width=16, evals=2, lowpass=6)


@pytest.fixture(scope="module", autouse=True)
def small_stand_in():
    """The drawings, but few of them, and pictures that are not drawn: for all tests of this process."""
    sets, patch = mlp_cifar.stand_in(train=600, test=200), pytest.MonkeyPatch()
    patch.setattr(mlp_cifar, "stand_in", lambda: sets)
    patch.setattr(Figure, "savefig", lambda figure, file, **options: file.write(b"a picture"))  # half the time of a tiny run
    yield sets
    patch.undo()


def run(tmp_path, **changes):
    """A tiny run in this process; returns its folder and summary."""
    out = tmp_path / "run"
    mlp_cifar.main(Config(**{**TINY, "out": str(out), **changes}))
    return out, json.loads((out / "summary.json").read_text())


def command(*arguments, **kwargs):
    """The script as a user runs it."""
    return subprocess.run([sys.executable, str(ROOT / "mlp_cifar.py"), *map(str, arguments)], capture_output=True, text=True,
                          timeout=120, **kwargs)


def random_model(width=24, depth=3, lowpass=6, norm=2.0, seed=0, kind="random", activation="relu", mirror=False):
    config = Config(width=width, depth=depth, lowpass=lowpass, seed=seed, activation=activation, mirror=mirror)
    model = MLP(config, torch.full((3072,), 0.4))
    generator = torch.Generator().manual_seed(seed)
    for W, b in zip(model.weights, model.biases):
        if kind == "random":
            W.data = torch.randn(W.shape, generator=generator)
            W.data *= norm / singular_values(W.data).max()
        elif kind == "orthogonal":
            W.data = with_spectrum(*W.shape, norm * torch.ones(min(W.shape), dtype=torch.float64), seed=seed)
        b.data = 0.3 * torch.randn(b.shape, generator=generator)
    return model


def features(model, x):
    """What the first matrix sees."""
    seen = torch.nn.Module.__new__(MLP)
    torch.nn.Module.__init__(seen)
    seen.mean_P, seen.cosines_FX = model.mean_P, model.cosines_FX
    seen.mirror, seen.weights, seen.biases = False, [torch.eye(3 * len(model.cosines_FX) ** 2)], []
    return seen(x)


def largest_jacobian_norm(model, images):
    """The largest l2->l2 norm of the Jacobian among images: none may exceed a certificate."""
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: model(x[None])[0]))(images.double() / 255)
    return torch.linalg.matrix_norm(jacobian, ord=2).max().item()


# ---- certificate -----------------------------------------------------------------------------------------------------
MODELS = [dict(seed=s, kind=k, depth=d) for s in (0, 1) for k in ("random", "orthogonal") for d in (1, 2, 3, 5)]
MODELS += [dict(seed=s, kind=k, depth=d, activation="maxmin") for s in (0, 1) for k in ("random", "orthogonal") for d in (2, 4)]
MODELS += [dict(kind="random", depth=d, activation=a, mirror=True) for a in ("relu", "maxmin") for d in (1, 3)]


def steepest_pair(model, seed=0, steps=60):
    """The largest ||f(x) - f(y)|| / ||x - y|| found by ascent on both ends, and the Jacobian norms along the way."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(16, 3072, generator=generator, dtype=torch.float64)
    y = (x + 0.1 * torch.randn(16, 3072, generator=generator, dtype=torch.float64)).requires_grad_()
    x.requires_grad_()
    best = 0.0
    for _ in range(steps):
        ratio = (model(x) - model(y)).norm(dim=1) / (x - y).norm(dim=1)
        best = max(best, ratio.max().item())
        gx, gy = torch.autograd.grad(ratio.sum(), (x, y))
        with torch.no_grad():
            x += 0.3 * gx / gx.norm(dim=1, keepdim=True)
            y += 0.3 * gy / gy.norm(dim=1, keepdim=True)
    return best


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_certificates_hold_and_are_ordered(case):
    model = random_model(**case)
    untuned, tuned = certificate(model), certificate(model, steps=20)
    product = 10 ** untuned["product_log10"]
    assert product == pytest.approx(math.prod(singular_values(W.data).max().item() for W in model.weights), rel=1e-8)
    assert tuned["product_log10"] == untuned["product_log10"] >= untuned["tight_log10"] >= tuned["tight_log10"]
    tight = 10 ** tuned["tight_log10"]
    if case["kind"] == "random" and case["depth"] > 1:
        assert tight < 0.97 * product  # (orthogonal weights reach the product)
    images = torch.randint(0, 256, (64, 3072), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    found = max(largest_jacobian_norm(model, images), steepest_pair(model))
    assert 0.05 * tight < found <= tight
    if case["depth"] == 1 and not case.get("mirror"):
        assert found >= 0.999 * tight


def test_wide_networks_are_certified_untuned():
    wide, narrow = (MLP(Config(width=width, depth=2, lowpass=2)) for width in (1026, 64))
    for model in (wide, narrow):
        model.weights[1].data *= torch.linspace(0.1, 1, model.weights[1].shape[1])
    for model, tunes in ((wide, False), (narrow, True)):
        untuned, tuned = (certificate(model, steps)["tight_log10"] for steps in (0, 3))
        assert (tuned < untuned) == tunes


@pytest.mark.parametrize("activation", ["relu", "maxmin"])
def test_any_free_weights_give_a_true_certificate(activation):
    model = random_model(width=24, depth=4, lowpass=3, activation=activation)
    found = steepest_pair(model)
    for seed in range(10):
        free, generator = {}, torch.Generator().manual_seed(seed)
        follow(model, free)
        free = {name: 3 * torch.randn(value.shape, generator=generator, dtype=torch.float64) for name, value in free.items()}
        S, log = follow(model, free)
        assert found <= ellipsoid_norm(S, log, torch.eye(10).double()).exp()


@pytest.mark.parametrize("activation", ["relu", "maxmin"])
@torch.no_grad()
def test_step_by_step_inequalities_of_the_tight_certificate(activation):
    """Steps 1 to 5 above certificate(), each on differences of activations of real inputs."""
    model = random_model(width=24, lowpass=3, activation=activation).double()
    x, y = torch.rand(2, 500, 3072, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    dx = (x - y).square().sum(1)
    h, g = features(model, x), features(model, y)

    def inside(S, z):  # step 1, and that 2 and 3 keep it up: z^T S^-1 z <= |dx|^2
        return (torch.einsum("bi,ij,bj->b", z, torch.linalg.pinv(S), z) <= dx * (1 + 1e-6)).all()

    S = model.weights[0] @ model.weights[0].T
    for W, b, W_next in zip(model.weights[:-1], model.biases, model.weights[1:]):
        p, q = h @ W.T + b, g @ W.T + b
        z, h, g = p - q, model.activation(p), model.activation(q)
        assert inside(S, z)
        F_NM, A, B = torch.eye(z.shape[1]).double(), W_next / 2, W_next / 2
        if activation == "maxmin":
            (first, second), (P, Q) = F_NM.chunk(2), W_next.chunk(2, 1)
            F_NM, A, B = (first - second) / 2**0.5, (P + Q) @ (first + second) / 2, (P - Q) / 2**0.5
        v = 2 * (h - g) - z  # steps 2 and 3
        if activation == "maxmin":
            v = ((h - g).chunk(2, 1)[0] - (h - g).chunk(2, 1)[1]) / 2**0.5
        assert (v.abs() <= (z @ F_NM.T).abs() + 1e-12).all()
        torch.testing.assert_close((h - g) @ W_next.T, z @ A.T + v @ B.T)
        S, log = ellipsoid_layer(S, 0.0, F_NM, A, B)
        S = S * log.exp()
    bound, to_e = certificate(model), math.log(10)
    ours = torch.linalg.eigvalsh(S).max().log().item() / 2
    assert ours <= bound["product_log10"] * to_e or activation == "maxmin"
    assert bound["tight_log10"] * to_e == pytest.approx(min(ours, bound["product_log10"] * to_e), abs=1e-8)
    for a, c in ((0, 1), (3, 9)):  # step 5: the smaller one of ellipsoid and product
        v = torch.zeros(10, dtype=torch.float64)
        v[a], v[c] = 1, -1
        last = (v @ model.weights[-1]).norm() * math.prod(torch.linalg.matrix_norm(W, ord=2).item() for W in model.weights[:-1])
        expected = min((v @ S @ v).sqrt().item(), last.item())
        assert 10 ** bound["pairs_log10_KK"][a, c].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("activation", ["relu", "maxmin"])
def test_pair_constants_bound_gradients_of_margins(activation):
    model = random_model(norm=3.0, activation=activation)
    bound = certificate(model, steps=10)
    pairs = 10 ** bound["pairs_log10_KK"]
    x = torch.rand(40, 3072, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    logits = model(x)
    for y, j in ((0, 1), (4, 7), (9, 2)):
        gradient, = torch.autograd.grad((logits[:, y] - logits[:, j]).sum(), x, retain_graph=True)
        assert gradient.norm(dim=1).max() <= pairs[y, j]
    assert (pairs <= 2**0.5 * 10 ** bound["product_log10"] * (1 + 1e-8)).all()


def test_certified_radius_survives_attack_and_is_exact_for_a_linear_model():
    model = random_model(depth=1)
    images = torch.randint(0, 256, (50, 3072), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    labels = model(images.double() / 255).argmax(1)
    labels[0] = (labels[0] + 1) % 10
    radius = certified_radii(model, certificate(model)["pairs_log10_KK"], images, labels)
    assert radius[0] < 0 < radius[1:].min()
    # For a linear model the nearest image of another class is known: just inside the radius right, just outside wrong.
    x = images.double() / 255
    logits = model(x)
    W = model.weights[0].double() @ torch.autograd.functional.jacobian(lambda v: features(model, v[None])[0], x[0])
    for i in range(1, 10):
        d = W[labels[i]] - W
        distance = (logits[i, labels[i]] - logits[i]) / d.norm(dim=1).clamp(min=1e-30)
        distance[labels[i]] = math.inf
        j = distance.argmin()
        assert radius[i].item() == pytest.approx(distance[j].item(), rel=1e-6)
        for factor, right in ((0.999, True), (1.001, False)):
            moved = x[i] - factor * radius[i] * d[j] / d[j].norm()
            assert (model(moved[None]).argmax() == labels[i]).item() == right


@pytest.mark.parametrize("steps", [0, 3])
def test_zero_network_has_constant_zero(steps):
    model = random_model()
    model.weights[1].data.zero_()
    bound = certificate(model, steps)
    assert bound["tight_log10"] == -math.inf == bound["product_log10"]
    assert (bound["pairs_log10_KK"] == -math.inf).all()


@pytest.mark.parametrize("where", ["weights.0", "biases.1", "mean_P"])
def test_what_is_not_finite_is_refused(where):
    model = random_model()
    model.state_dict()[where].view(-1)[0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        certificate(model)


@pytest.mark.parametrize("norm, depth, activation", [(0.4, 390, "relu"), (0.1, 1000, "maxmin"), (30.0, 400, "relu")])
def test_deep_networks_leave_the_range_of_float64_and_the_certificate_does_not(norm, depth, activation):
    """0.4^390 and its squares, 0.1^1000 and 30^400: in logarithms, between the exact product and half of it a layer."""
    model = random_model(kind="orthogonal", norm=norm, depth=depth, width=10, lowpass=2, activation=activation)
    bound = certificate(model)
    exact = sum(math.log10(torch.linalg.matrix_norm(W.double(), ord=2).item()) for W in model.weights)
    assert bound["product_log10"] == pytest.approx(exact, rel=1e-6)
    assert bound["product_log10"] - depth * math.log10(2) <= bound["tight_log10"] <= bound["product_log10"]
    assert bound["pairs_log10_KK"][0, 1].isfinite()


def test_exact_ties_are_not_certified():
    model = random_model()
    for parameter in (model.weights[-1], model.biases[-1]):
        parameter.data[1] = parameter.data[0]
    model.biases[-1].data[:2] = model.biases[-1].data.max() + 0.5
    images = torch.randint(0, 256, (200, 3072), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    logits = model(images.double() / 255)
    tied = logits.argmax(1) <= 1  # (some images, not all)
    radius = certified_radii(model, certificate(model)["pairs_log10_KK"], images, logits.argmax(1))
    assert tied.any() and not tied.all() and (radius[tied] <= 0).all() and (radius[~tied] > 0).all()


@pytest.mark.parametrize("lowpass", [6, 32])
def test_mirror_averages_an_image_and_its_mirror_image(lowpass):
    model, plain = (random_model(lowpass=lowpass, mirror=mirror).double() for mirror in (True, False))
    x = torch.rand(5, 32, 32, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model.mean_P = plain.mean_P = x.flipud().flatten(1).mean(0)
    right, left = x.flatten(1), x.flip(2).flatten(1)
    mean = model.mean_P.view(32, 32, 3)
    of_mirror = plain((x - mean).flip(2).flatten(1) + plain.mean_P)
    torch.testing.assert_close(model(right), (plain(right) + of_mirror) / 2)
    model.mean_P = (mean + mean.flip(1)).flatten() / 2
    torch.testing.assert_close(model(right), model(left))
    assert certificate(model)["tight_log10"] == certificate(plain)["tight_log10"]


def test_square_layers_start_as_the_identity_with_maxmin():
    for activation in ("relu", "maxmin"):
        weights = MLP(Config(depth=4, width=16, lowpass=2, w_max="0.5", activation=activation)).weights
        for W in weights:
            limit = torch.full((min(W.shape),), sigma_limit(W, 0.5)).double()
            torch.testing.assert_close(singular_values(W.detach()), limit, rtol=1e-5, atol=0)
        assert torch.equal(weights[1], torch.eye(16) / 2) == (activation == "maxmin")


def test_lowpass_is_an_orthogonal_projection():
    C = MLP(Config(lowpass=12)).cosines_FX
    torch.testing.assert_close(C @ C.T, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-12)
    full = MLP(Config(lowpass=31))
    x = torch.rand(5, 3072, dtype=torch.float64)
    assert (features(full, x).norm(dim=1) <= (x - full.mean_P).norm(dim=1)).all()
    flat = torch.full((1, 3072), 0.7, dtype=torch.float64)  # a constant image has one frequency, and all its energy in it
    assert features(MLP(Config(lowpass=1)), flat).norm().item() == pytest.approx(flat.norm().item(), rel=1e-12)


def test_parity_with_the_reference():
    """Recorded logits of the authors' MLP for given images and weights."""
    reference = np.load(Path(__file__).parent / "reference.npz")
    model = MLP(Config(width=16, lowpass=32, bias=False, center=False))
    for i, W in enumerate(model.weights):
        W.data = torch.from_numpy(reference[f"mlp_weight_{i}"])
    logits = model(torch.from_numpy(reference["mlp_images"]).reshape(4, 3072))
    torch.testing.assert_close(logits, torch.from_numpy(reference["mlp_logits"]), rtol=0, atol=1e-5)


# ---- training --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_optimizer_with_every_constraint(optimizer, constraint, tmp_path):
    lr = 0.5 if optimizer == "muon" else 0.02
    out, summary = run(tmp_path, optimizer=optimizer, constraint=constraint, lr=lr, w_max="1.2")
    assert math.isfinite(summary["val_loss"]) and 0 <= summary["val_accuracy"] <= 1
    if constraint in ("soft_cap", "hard_cap", "specnorm", "stiefel") or (optimizer, constraint) == ("muon", "weight_decay"):
        assert summary["max_weight_norm"] <= 1.2 * (1 + 1e-3)
    assert {p.name for p in out.iterdir()} == {"config.json", "log.jsonl", "checkpoint.pt", "curves.png", "summary.json"}


@pytest.mark.parametrize("constraint", ["soft_cap", "hard_cap", "specnorm", "stiefel"])
@pytest.mark.parametrize("lr", [0.9, 0.1])  # at 0.1 the constraint waits, for some layers and steps
def test_limits_hold_at_every_step(lr, constraint, tmp_path):
    """In float64, after each of 40 steps large enough to reach the limit."""
    shares = []

    def look(optimizer, *_):
        if isinstance(optimizer, Muon):
            shares.extend(singular_values(group["params"][0].data).max().item() / sigma_limit(group["params"][0], group["w_max"])
                          for group in optimizer.param_groups)

    hook = register_optimizer_step_post_hook(look)
    try:
        run(tmp_path, steps=40, evals=1, constraint=constraint, lr=lr, w_max="1,1.5,0.7")
    finally:
        hook.remove()
    assert len(shares) == 120 and max(shares) <= 1 + 1e-4 and sum(share > 0.9 for share in shares) > 20


def test_it_learns_and_a_linear_model_does_not(tmp_path, monkeypatch):
    """The stand-in is hard enough: a linear model stays clearly below the MLP."""
    monkeypatch.setattr(mlp_cifar, "stand_in", lambda: FULL_STAND_IN(5000, 1000))
    accuracy = {depth: run(tmp_path / str(depth), steps=100, batch=512, evals=1, width=64, lowpass=12, depth=depth)[1]["val_accuracy"]
                for depth in (1, 3)}
    assert accuracy[1] < 0.4 and accuracy[3] > accuracy[1] + 0.2


def test_augmentation_flips_and_shifts_only(small_stand_in):
    (images, _), _ = small_stand_in
    x = images[:200]
    a = mlp_cifar.augmented(x, 0, Config())
    assert torch.equal(a, mlp_cifar.augmented(x, 0, Config())) and not torch.equal(a, mlp_cifar.augmented(x, 1, Config()))
    before, after = x.view(200, 32, 32, 3), a.view(200, 32, 32, 3)
    for i in range(200):
        inner = after[i, 2:-2, 2:-2]
        assert any(torch.equal(inner, source[2 + dy:30 + dy, 2 + dx:30 + dx]) for source in (before[i], before[i].flip(1))
                   for dx in range(-2, 3) for dy in range(-2, 3))


# ---- through the command line ----------------------------------------------------------------------------------------
def test_help_is_quick_and_complete():
    start = time.perf_counter()
    done = command("--help")
    assert done.returncode == 0 and time.perf_counter() - start < 20  # (seconds on a busy machine)
    for field in dataclasses.fields(Config):
        assert f"--{field.name}" in done.stdout
    for preset in mlp_cifar.PRESETS:
        assert preset in done.stdout


def folder_of_pictures(path, n=40, columns=("img", "label"), labels=None, splits=("train", "test"), size=(32, 32, 3), kind="PNG"):
    """A small data set in the Hub's layout, as parquet, as any program writes it (without the Hub's metadata)."""
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8)) for _ in range(n)]
    return parquet(path, columns, [encoded(picture, kind) for picture in pictures],
                   [i % 10 for i in range(n)] if labels is None else labels, splits)


def encoded(picture, kind="PNG"):
    picture.save(buffer := io.BytesIO(), format=kind)
    return buffer.getvalue()


def parquet(path, columns, files, labels, splits=("train", "test"), **more):
    path.mkdir(parents=True)
    table = pa.table({columns[0]: [dict(bytes=file, path=None) for file in files], columns[1]: labels, **more})
    for split in splits:
        pq.write_table(table, path / f"{split}-00000-of-00001.parquet")
    return path


def test_a_folder_of_pictures(tmp_path):
    data = folder_of_pictures(tmp_path / "data")
    _, summary = run(tmp_path, data=str(data), batch=512)  # a batch larger than the set is the set
    assert summary["data"] == str(data)
    (images, labels), _, _ = mlp_cifar.load_data(Config(data=str(data)))
    assert torch.equal(labels, torch.arange(40) % 10) and images.dtype == torch.uint8
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)  # PNG inside: no loss
    assert np.array_equal(images[0].view(32, 32, 3).numpy(), picture)


def test_data_dir_comes_first_and_no_network_means_stand_in(tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    data = folder_of_pictures(tmp_path / "here" / "cifar10")
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "here"))
    assert mlp_cifar.load_data(Config())[2] == str(data)
    script = """
import mlp_cifar, sys
small = mlp_cifar.stand_in(600, 200)
mlp_cifar.stand_in = lambda: small
mlp_cifar.main(mlp_cifar.Config.of(steps=2, width=8, evals=1, out=sys.argv[1]))
"""
    environment = {k: v for k, v in os.environ.items() if k != "DATA_DIR"}
    with socket.socket() as hole:  # accepts what is sent and never answers, as a dead network does
        hole.bind(("127.0.0.1", 0))
        hole.listen(20)
        environment.update(HF_ENDPOINT=f"http://127.0.0.1:{hole.getsockname()[1]}", HF_HOME=str(tmp_path / "empty"))
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", script, tmp_path / "run"], cwd=ROOT, env=environment,
                              capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "STAND-IN" in done.stdout and "data: stand-in" in done.stdout and time.perf_counter() - start < 60
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["data"] == "stand-in"
    assert "CIFAR-10 is not here (see DATA_DIR): --data uoft-cs/cifar10: cannot be used" in done.stdout


def state_of(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_run_goes_on_after_a_kill_bit_identically(tmp_path, optimizer):
    """Muon's is a process that is killed; AdamW's is stopped by Ctrl-C in this one."""
    data = folder_of_pictures(tmp_path / "data", 200)
    flags = ["--data", data, "--batch", 64, "--steps", 60, "--evals", 12, "--width", 48, "--optimizer", optimizer, "--augment"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def main(*more):
        return mlp_cifar.main(mlp_cifar.parse_arguments([*map(str, flags), *map(str, more)]))

    main("--out", whole)
    if optimizer == "muon":
        process = subprocess.Popen([sys.executable, ROOT / "mlp_cifar.py", *map(str, flags), "--out", killed], stdout=subprocess.DEVNULL)
        while not (killed / "checkpoint.pt").exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.05)  # somewhere in the steps after the first checkpoint
        process.send_signal(signal.SIGKILL)
        process.wait()
    else:
        count = []

        def stop(*_):
            count.append(1)
            if len(count) == 27:
                raise KeyboardInterrupt

        hook = register_optimizer_step_post_hook(stop)
        try:
            with pytest.raises(KeyboardInterrupt):
                main("--out", killed)
        finally:
            hook.remove()
    (killed / "log.jsonl").write_text('{"step": 5')  # cut off by the kill: it is written anew
    assert state_of(killed)["step"] < 60 and not (killed / "summary.json").exists()
    main("--out", killed)
    a, b = state_of(whole), state_of(killed)
    assert same(a["model"], b["model"]) and same(a["optimizers"], b["optimizers"])
    steps = [json.loads(line)["step"] for line in (killed / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(5, 61, 5))
    before = {path.name: path.stat().st_mtime_ns for path in killed.iterdir()}
    assert mlp_cifar.main(Config.of(out=str(killed))) == json.loads((killed / "summary.json").read_text())
    assert before == {path.name: path.stat().st_mtime_ns for path in killed.iterdir()}


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    data = folder_of_pictures(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mlp_cifar.py", "--data", str(data), "--steps", "100000", "--evals", "10000", "--width", "8"])

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1.5)
    try:
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(ROOT / "mlp_cifar.py"), run_name="__main__")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert exit_.value.code == 130 and "goes on by --out FOLDER" in capsys.readouterr().err
    assert (tmp_path / "runs/mlp_cifar_default_seed0").exists()


def stopped(tmp_path, **changes):
    """A run folder as a kill after the last evaluation leaves it."""
    out, _ = run(tmp_path, **changes)
    (out / "summary.json").unlink()
    return out


def test_going_on_keeps_the_runs_own_settings(tmp_path):
    """From Python and by flags: only what is given is compared, and a contradiction names both values."""
    out = stopped(tmp_path)
    for wrong, says in ((dict(steps=7), "--steps 7: .* has 6"), (dict(lr=0.3), "--lr 0.3: .* has 0.0"), (dict(seed=1), "--seed 1: .* has 0")):
        with pytest.raises(UserError, match=says):
            mlp_cifar.main(Config.of(out=str(out), **wrong))
    with pytest.raises(UserError, match="--preset paper: .* has default"):
        mlp_cifar.main(mlp_cifar.parse_arguments(["--preset", "paper", "--out", str(out)]))
    with pytest.raises(UserError, match="--width 256: .* has 16"):
        mlp_cifar.main(Config(data="stand-in", out=str(out)))  # (made directly: all of it counts as given)
    summary = mlp_cifar.main(Config.of(out=str(out), device="cpu"))
    assert summary["steps"] == 6 and summary == json.loads((out / "summary.json").read_text())


def test_two_runs_never_share_a_folder(tmp_path, monkeypatch):
    """Each is stopped once it has its folder. One that finds it taken in the same moment says so (exit status 2)."""
    from concurrent.futures import ThreadPoolExecutor

    class Started(Exception):
        pass

    def started(path, data):  # config.json
        folders.append(path.parent)
        raise Started

    def one(_):
        with pytest.raises((Started, FileExistsError)):
            mlp_cifar.main(Config(**TINY))

    folders = []
    monkeypatch.setattr(mlp_cifar, "write", started)
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(60)))
    assert len(set(folders)) == len(folders) > 8 and "mlp_cifar_default_seed0" in {p.name for p in folders}


def test_main_leaves_its_caller_alone_and_draws_its_picture(tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.setattr(Figure, "savefig", SAVEFIG)
    backend, environment = matplotlib.get_backend(), dict(os.environ)
    config = Config(**TINY, out=str(tmp_path / "run"))
    before = dataclasses.asdict(config)
    assert mlp_cifar.main(config)["preset"] == "default" and dataclasses.asdict(config) == before
    assert matplotlib.get_backend() == backend and dict(os.environ) == environment
    with Image.open(tmp_path / "run" / "curves.png") as picture:
        assert picture.size == (1210, 770) and len(set(np.asarray(picture.convert("L")).flat)) > 20
    with pytest.raises(UserError, match="--preset best: must be one of default, paper"):
        Config.of("best")


# ---- bad input: one line, exit status 2, nothing damaged ---------------------------------------------------------------
@pytest.mark.parametrize("flags, says", [
    ("--w_max -1", "--w_max"), ("--w_max 0", "--w_max"), ("--w_max nan", "--w_max"), ("--w_max inf", "--w_max"),
    ("--w_max 1,2", "3 with commas"), ("--w_max six", "--w_max"), ("--steps 0", "--steps"), ("--steps 1.5", "--steps"),
    ("--constrain_every 0", "from 1 to 64"), ("--lr nan", "--lr"), ("--lr -0.1", "--lr"), ("--batch 0", "--batch"),
    ("--constraint clip", "soft_cap"), ("--constraint nobody.py:f", "nobody.py"), ("--step 10", "--step"),
    ("--optimizer sgd", "muon"), ("--dtype float8", "bfloat16"), ("--preset best", "paper_adamw"), ("--device tpu", "--device"),
    ("--device cuda:77", "--device"), ("--momentum 1", "--momentum"), ("--lowpass 33", "--lowpass"),
    ("--loss_temperature 0", "--loss_temperature"), ("--seed -1", "--seed"), ("--seed 100000000000000", "--seed"),
    ("--data /no/such/folder", "/no/such/folder"), ("--width 1000000000", "65536"), ("--depht 3", "--depht"),
    ("--width 7 --activation maxmin", "even"), ("--margin -1", "--margin"), ("--adamw_wd inf", "--adamw_wd"), ("--evals 0", "--evals")])
def test_wrong_flags(flags, says, tmp_path, capsys):
    out = tmp_path / "run"
    try:  # in this process, as main() does it, to save 27 starts of python
        with pytest.raises(UserError) as refusal:
            mlp_cifar.main(mlp_cifar.parse_arguments(["--data", "stand-in", *flags.split(), "--out", str(out)]))
        message = str(refusal.value)
        assert "\n" not in message
    except SystemExit as exit_:
        assert exit_.code == 2
        message = capsys.readouterr().err
    assert says in message and not out.exists()


def test_a_refusal_is_one_line_and_exit_status_two(tmp_path):
    done = command("--w_max", "-1", "--out", tmp_path / "run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert "-1" in done.stderr and "above 0" in done.stderr


PIXEL = encoded(Image.new("RGB", (1, 1)))


def png_that_lies(width, height):
    """The head of a grey PNG of any size, with next to nothing behind it."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


WRONG_DATA = {  # columns, files and labels of both splits; what the line says
    "no such columns": (("photo", "class"), [PIXEL] * 3, [0, 1, 2], "photo"),
    "label missing": (("img", "label"), [PIXEL] * 3, [0, 1, None], "train, row 2: .*None"),
    "label below 0": (("img", "label"), [PIXEL] * 3, [0, -1, 1], "train, row 1: .*-1"),
    "label no whole number": (("img", "label"), [PIXEL] * 3, [0.0, 1.0, 1.5], "train, row 0: .*0.0"),
    "label a word": (("img", "label"), [PIXEL] * 3, ["cat", "dog", "cat"], "train, row 0: .*cat"),
    "absurdly many classes": (("img", "label"), [PIXEL] * 3, [0, 10**15, 1], "train, row 1: .*999"),
    "one class": (("img", "label"), [PIXEL] * 3, [0, 0, 0], "2 classes"),
    "no rows": (("img", "label"), [], [], "train, row 0"),
    "no picture": (("img", "label"), [PIXEL, b"hello", PIXEL], [0, 1, 2], "train, row 1: .*image"),
    "picture missing": (("img", "label"), [PIXEL, None, PIXEL], [0, 1, 2], "train, row 1"),
    "floats": (("img", "label"), [encoded(Image.new("F", (4, 4)), "TIFF")] * 2, [0, 1], "32 bits"),
    "30,000 x 30,000": (("img", "label"), [PIXEL, png_that_lies(30_000, 30_000)], [0, 1], "train, row 1: .*Decompression"),
    "cut off": (("img", "label"), [PIXEL, png_that_lies(3000, 3000)], [0, 1], "train, row 1"),
    "a file elsewhere": (("img", "label"), [dict(bytes=None, path="/etc/passwd")] * 2, [0, 1], "train, row 0"),
}


@pytest.mark.parametrize("kind", [*WRONG_DATA, "empty parquet", "corrupt parquet", "text", "file", "one split", "empty folder",
                                  "no such column of labels", "many columns"])
def test_wrong_data_are_one_line_and_leave_nothing(kind, tmp_path):
    data, says, label = tmp_path / "data", "needed are train and test", ""
    if kind in WRONG_DATA:
        columns, files, labels, says = WRONG_DATA[kind]
        parquet(data, columns, [], [])
        table = pa.table({columns[0]: [file if isinstance(file, dict) else dict(bytes=file, path="") for file in files], columns[1]: labels})
        for split in ("train", "test"):
            pq.write_table(table, data / f"{split}-00000-of-00001.parquet")
    elif kind == "one split":
        folder_of_pictures(data, splits=("train",))
    elif kind == "no such column of labels":
        folder_of_pictures(data)
        label, says = "species", "species"
    elif kind == "many columns":
        data.mkdir()
        pq.write_table(pa.table([pa.array([1])] * 2000, names=[f"c{i}" for i in range(2000)]), data / "train.parquet")
    elif kind == "file":
        data.write_text("hello")
    else:
        data.mkdir()
        content = {"empty parquet": b"", "corrupt parquet": b"PAR1" + bytes(100) + b"PAR1", "text": b"hello", "empty folder": None}[kind]
        for split in ("train", "test"):
            if content is not None:
                (data / f"{split}.{'txt' if kind == 'text' else 'parquet'}").write_bytes(content)
    with pytest.raises(UserError, match=says) as refusal:
        mlp_cifar.main(Config(**{**TINY, "data": str(data), "label": label, "out": str(tmp_path / "run")}))
    message = str(refusal.value)
    assert str(data) in message and "\n" not in message and len(message) < 700 and not (tmp_path / "run").exists()


# ---- what people bring -------------------------------------------------------------------------------------------------
def pixels_of(data, label=""):
    (images, _), _ = mlp_cifar.load_images(str(data), label)
    return images.view(-1, 32, 32, 3)


def test_pictures_become_what_they_show(tmp_path, capsys):
    red = np.zeros((32, 32, 4), np.uint8)
    red[:16] = (255, 0, 0, 255)  # the lower half is transparent, and black below
    palette = Image.fromarray(red).convert("P")
    pictures = {
        "16 bits": (Image.fromarray(np.full((32, 32), 40_000, np.uint16)), [156] * 3, [156] * 3),
        "grey": (Image.new("L", (32, 32), 77), [77] * 3, [77] * 3),
        "grey with alpha": (Image.new("LA", (32, 32), (77, 0)), [255] * 3, [255] * 3),
        "alpha": (Image.fromarray(red), [255, 0, 0], [255] * 3),
        "palette": (palette.convert("RGB").quantize(), [255, 0, 0], [0] * 3),
        "two colours": (Image.new("1", (32, 32), 1), [255] * 3, [255] * 3),
        "28 x 28 grey": (Image.new("L", (28, 28), 9), [9] * 3, [9] * 3),
        "64 x 64": (Image.new("RGB", (64, 64), (1, 2, 3)), [1, 2, 3], [1, 2, 3]),
        "1 x 1": (Image.new("RGB", (1, 1), (4, 5, 6)), [4, 5, 6], [4, 5, 6]),
        "32 x 1": (Image.new("L", (32, 1), 7), [7] * 3, [7] * 3)}
    data = parquet(tmp_path / "data", ("image", "labels"), [encoded(picture) for picture, *_ in pictures.values()], list(range(10)))
    for seen, (_, above, below) in zip(pixels_of(data), pictures.values(), strict=True):
        assert seen[3, 3].tolist() == above and seen[30, 30].tolist() == below
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "(1, 1) to (64, 64)" in said and "resized to 32 x 32" in said
    jpeg = folder_of_pictures(tmp_path / "jpeg", 3, labels=[0, 1, 2], size=(32, 32), kind="JPEG")
    assert pixels_of(jpeg).shape == (3, 32, 32, 3) and not capsys.readouterr().out


@pytest.mark.parametrize("name", ["[x]", "a b", "ümläut", "{1}*?"])
def test_any_path_will_do(name, tmp_path, monkeypatch):
    data = folder_of_pictures(tmp_path / name / "data")
    assert len(pixels_of(data)) == 40
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(pixels_of(f"~/{name}/data")) == 40
    monkeypatch.chdir(tmp_path / name)
    assert len(pixels_of("data")) == 40


def test_no_cache_is_written(tmp_path, monkeypatch):
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/nowhere")  # where nobody can write
    assert len(pixels_of(folder_of_pictures(tmp_path / "data"))) == 40


def test_a_folder_of_files(tmp_path):
    for split in ("train", "test"):
        for i, name in enumerate(("cat", "dog", "[elk]")):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), (i, i, i)).save(tmp_path / split / name / "a b.png")
    (images, labels), _ = mlp_cifar.load_images(str(tmp_path))
    assert sorted(zip(labels.tolist(), images[:, 0].tolist())) == [(0, 2), (1, 0), (2, 1)]  # in the alphabet's order


@pytest.mark.parametrize("column, label, classes", [("fine_label", "", 100), ("labels", "", 3), ("species", "species", 12)])
def test_as_many_classes_as_there_are(column, label, classes, tmp_path):
    """CIFAR-100's columns and others: in the model, the files of a run and what verify_lipschitz.py attacks."""
    import verify_lipschitz
    files = [encoded(Image.effect_noise((32, 32), 50 + i)) for i in range(classes)]
    data = parquet(tmp_path / "data", ("img", column), files, list(range(classes)), coarse_label=[0] * classes)
    out, summary = run(tmp_path, data=str(data), label=label, steps=4)
    state = state_of(out)
    assert state["classes"] == classes == len(state["model"]["weights.2"])
    bound = certificate(mlp_cifar.load_checkpoint(out)[1])
    assert bound["pairs_log10_KK"].shape == (classes, classes)
    assert state["log"][-1]["lipschitz_log10"] - bound["tight_log10"] == pytest.approx(math.log10(3072 / classes) / 2)
    assert summary["params"] == sum(W.numel() for name, W in state["model"].items() if name != "mean_P")
    assert verify_lipschitz.main(*verify_lipschitz.parse_arguments([str(out), "--budget", "0.05", "--images", "8"])) == 0
    (out / "summary.json").unlink()
    with pytest.raises(UserError, match="classes"):
        mlp_cifar.main(Config.of(data="stand-in", out=str(out)))


def python_2_batch(images, labels):
    """A file of the official archive: Python 2 wrote its pickles."""
    def text(b):
        return b"T" + struct.pack("<i", len(b)) + b
    array = (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\nt" + text(b"b") + b"tR(I1\n(I%d\nI3072\nt" % len(images)
             + b"cnumpy\ndtype\n(" + text(b"u1") + b"I0\nI1\ntR(I3\n" + text(b"|") + b"NNNI-1\nI-1\nI0\ntbI00\n" + text(images.tobytes()) + b"tb")
    numbers = b"(l" + b"".join(b"I%d\na" % y for y in labels)
    return b"\x80\x02}(" + text(b"data") + array + text(labels_name(max(labels))) + numbers + text(b"filenames") + b"(l" + b"u."


def labels_name(largest):
    return b"labels" if largest < 10 else b"fine_labels"


@pytest.mark.parametrize("kind", ["cifar-10-batches-py", "cifar-100-python"])
def test_the_official_archives(kind, tmp_path):
    classes = 10 if kind == "cifar-10-batches-py" else 100
    images = np.random.default_rng(0).integers(0, 256, (classes, 3072), dtype=np.uint8)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"] if classes == 10 else ["train", "test", "meta"]
    for name in names:
        (tmp_path / name).write_bytes(python_2_batch(images, range(classes)))
    (train, labels), (test, _) = mlp_cifar.load_images(str(tmp_path))
    assert len(train) == (50 if classes == 10 else 100) and labels[:classes].tolist() == list(range(classes)) and len(test) == classes
    assert np.array_equal(train[3].view(32, 32, 3).permute(2, 0, 1).flatten().numpy(), images[3])  # colours come first there


@pytest.mark.parametrize("kind", ["code", "an array larger than its file", "no labels", "no array", "cut off", "text", "more labels"])
def test_wrong_official_archives(kind, tmp_path):
    Payload.witness = tmp_path / "witness"
    images, labels = np.zeros((4, 3072), np.uint8), [0, 1, 2, 3]
    content = pickle.dumps({
        "code": {b"data": images, b"labels": Payload()}, "no labels": {b"data": images}, "no array": {b"data": "x", b"labels": labels},
        "more labels": {b"data": images, b"labels": labels * 2}}.get(kind, {b"data": images, b"labels": labels}), protocol=4)
    if kind == "an array larger than its file":
        content = (b"\x80\x04}(C\x04datacnumpy\nndarray\n(I30000000\nI3072\nt\x85Rcnumpy\ndtype\n(X\x02\x00\x00\x00u1tR0"
                   b"C\x06labels](K\x00K\x01eu.")
    content = {"cut off": content[:1000], "text": b"hello"}.get(kind, content)
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as refusal:
        mlp_cifar.load_images(str(tmp_path))
    assert "\n" not in str(refusal.value) and not Payload.witness.exists()


class Payload:
    def __reduce__(self):
        return os.system, (f"touch {Payload.witness}",)


@pytest.mark.parametrize("kind", ["truncated", "hostile", "text", "foreign", "other script", "other shape", "no dictionary key", "wrong types", "other data"])
def test_wrong_checkpoints(kind, tmp_path):
    out = stopped(tmp_path)
    path, before = out / "checkpoint.pt", (out / "checkpoint.pt").read_bytes()
    state = state_of(out)
    Payload.witness = tmp_path / "witness"
    if kind == "truncated":
        path.write_bytes(before[: len(before) // 2])
    elif kind == "hostile":
        torch.save(dict(state, model=Payload()), path)
    elif kind == "text":
        path.write_text("hello")
    elif kind == "foreign":
        torch.save([1, 2, 3], path)
    elif kind == "other script":
        torch.save(dict(state, script="shakespeare"), path)
    elif kind == "other shape":
        torch.save(dict(state, config=dict(state["config"], width=17)), path)
    elif kind == "other data":
        torch.save(dict(state, images=12345), path)
    elif kind == "no dictionary key":
        torch.save({k: v for k, v in state.items() if k != "script"}, path)
    elif kind == "wrong types":
        torch.save(dict(state, config=dict(state["config"], width="wide")), path)
    files = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(UserError) as refusal:
        mlp_cifar.main(Config.of(out=str(out), data="stand-in"))
    assert "\n" not in str(refusal.value) and not Payload.witness.exists()
    assert files == {p.name: p.read_bytes() for p in out.iterdir()}


BAD = (None, "x", [], ["a"], {}, -1, 10**30, math.nan, 1.5)


def test_no_field_of_a_checkpoint_can_be_of_a_wrong_kind(tmp_path):
    """Each value that is no setting is refused in one line, and the folder stays as it is."""
    out = stopped(tmp_path)
    state, path, allowed = state_of(out), out / "checkpoint.pt", 0
    numbers = {f.name for f in dataclasses.fields(Config) if f.type is float} | {"batch"}
    wrong = [dict(state, **{key: bad}) for key in state for bad in BAD if not (key == "data" and bad == "x")]
    wrong += [{k: v for k, v in state.items() if k != key} for key in state]
    for f in dataclasses.fields(Config):
        wrong += [dict(state, config=dict(state["config"], **{f.name: bad})) for bad in BAD
                  if not (bad == "x" and f.name in ("preset", "label", "out", "data", "device"))
                  and not (f.name in numbers and isinstance(bad, (int, float)) and 0 < bad < math.inf)]
    for bad in BAD:  # inside of the log, the momentum and the weights
        wrong.append(dict(state, log=[dict(record, norms=bad) for record in state["log"]]))
        wrong.append(dict(state, log=[dict(record, step=bad) for record in state["log"]]))
        wrong.append(dict(state, optimizers=[bad] * 2))
        wrong.append(dict(state, optimizers=[dict(saved, state=bad) for saved in state["optimizers"]]))
        wrong.append(dict(state, model={**state["model"], "weights.0": bad}))
    wrong.append(dict(state, model={**state["model"], "weights.0": torch.zeros(1).expand(65536, 65536)}))
    before = (out / "config.json").read_bytes()
    for changed in wrong:
        torch.save(changed, path)
        with pytest.raises(UserError) as refusal:
            mlp_cifar.main(Config.of(out=str(out), data="stand-in"))
        assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 500
        assert {p.name for p in out.iterdir()} == {"config.json", "checkpoint.pt", "curves.png", "log.jsonl"}
    assert before == (out / "config.json").read_bytes()


def test_finished_runs_are_never_overwritten(tmp_path, monkeypatch):
    out, summary = run(tmp_path)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert run(tmp_path)[1] == summary  # says that it is finished
    with pytest.raises(OSError):
        mlp_cifar.main(Config(**TINY, out=str(out / "summary.json")))
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        mlp_cifar.main(Config(**TINY))
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"mlp_cifar_default_seed0", "mlp_cifar_default_seed0_2"}


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    out, real = tmp_path / "run", Path.write_bytes

    def full(path, data):
        if (out / "checkpoint.pt").exists():
            real(path, data[:100])
            raise OSError(28, "No space left on device")
        real(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        mlp_cifar.main(Config(**TINY, out=str(out)))
    assert state_of(out)["step"] == 3 and not list(out.glob("*.part"))
    monkeypatch.undo()
    mlp_cifar.main(Config(**TINY, out=str(out)))
    assert state_of(out)["step"] == 6


def test_a_run_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    data = folder_of_pictures(tmp_path / "data")
    with pytest.raises(OSError, match="Not a directory"):  # (as UserError: one line, exit status 2)
        mlp_cifar.main(Config.of(data=str(data), steps=1, evals=1, width=8, out=str(tmp_path / "file" / "run")))


def test_divergence_stops_and_keeps_the_last_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"step \d+: training has diverged") as refusal:
        run(tmp_path, optimizer="adamw", constraint="none", lr=1e30, steps=30, evals=30)
    assert "--lr" in str(refusal.value)
    last_good = tmp_path / "run" / "checkpoint.pt"
    assert not last_good.exists() or all(W.isfinite().all() for W in state_of(tmp_path / "run")["model"].values())


# ---- a constraint of one's own ------------------------------------------------------------------------
def test_a_constraint_of_ones_own_by_command_and_in_python(tmp_path):
    example = (ROOT / "README.md").read_text().split("In a file `mine.py`:")[1].split("```")[1].removeprefix("python\n")
    (tmp_path / "mine.py").write_text(example + "\ndef tighter(W, w_max, step_norm=0.0):\n    return half_cap(W, 0.5 * w_max)\n")
    name = f"{tmp_path}/mine.py:tighter"
    flags = ["--data", folder_of_pictures(tmp_path / "data"), "--width", 16, "--lowpass", 6, "--w_max", 1, "--constraint", name]
    done = command(*flags, "--steps", 4, "--evals", 4, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["max_weight_norm"] <= 0.5 * (1 + 1e-4)
    (tmp_path / "run" / "summary.json").unlink()  # as if it had been stopped
    with pytest.raises(UserError, match="say that you trust it: --constraint .*mine.py:tighter"):  # its code is not run unasked
        mlp_cifar.main(Config.of(out=str(tmp_path / "run")))
    mlp_cifar.main(Config.of(out=str(tmp_path / "run"), constraint=name))
    CONSTRAINTS["mine"] = lambda W, w_max, step_norm=0.0: W / W.norm(dim=(-2, -1), keepdim=True).clamp(min=1)
    try:
        run(tmp_path / "python", constraint="mine")
    finally:
        del CONSTRAINTS["mine"]


def test_a_run_without_a_checkpoint_is_not_replaced_by_another(tmp_path, monkeypatch):
    """Killed early it has settings only: the same command begins again, another is refused."""
    def killed(*arguments):
        raise KeyboardInterrupt

    out = str(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(mlp_cifar, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            mlp_cifar.main(Config(**TINY, out=out))
    with pytest.raises(mlp_cifar.UserError, match="other settings"):
        mlp_cifar.main(Config(**{**TINY, "seed": 5}, out=out))
    assert mlp_cifar.main(Config(**TINY, out=out))["seed"] == 0
