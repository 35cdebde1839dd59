"""mlp_cifar.py: its certificate against Jacobians and attacks, its data, and its behaviour through the command line."""

import csv
import dataclasses
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from matrices import sigma_limit, singular_values, with_spectrum
from PIL import Image

import mlp_cifar
from constraints import CONSTRAINTS
from mlp_cifar import MLP, Config, Refusal, certificate, certified_radii, largest_jacobian_norm

ROOT = Path(__file__).parent.parent
TINY = dict(data="stand-in", steps=6, batch=64, width=16, evals=2, lowpass=6)


@pytest.fixture(scope="module", autouse=True)
def small_stand_in():
    """The drawings, but few of them: made once for all tests of this process."""
    sets = mlp_cifar.stand_in(train=600, test=200)
    original, mlp_cifar.stand_in = mlp_cifar.stand_in, lambda: sets
    yield sets
    mlp_cifar.stand_in = original


def run(tmp_path, **changes):
    """A tiny run in this process; returns its folder and summary."""
    out = tmp_path / "run"
    mlp_cifar.main(Config(**{**TINY, "out": str(out), **changes}))
    return out, json.loads((out / "summary.json").read_text())


def command(*arguments, **kwargs):
    """The script as a user runs it."""
    return subprocess.run([sys.executable, str(ROOT / "mlp_cifar.py"), *map(str, arguments)], capture_output=True, text=True,
                          timeout=120, **kwargs)


def random_model(width=24, depth=3, lowpass=6, norm=2.0, seed=0, kind="random", activation="relu"):
    config = Config(width=width, depth=depth, lowpass=lowpass, seed=seed, activation=activation)
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


# ---- certificate -----------------------------------------------------------------------------------------------------
MODELS = [dict(seed=s, kind=k, depth=d) for s in (0, 1) for k in ("random", "orthogonal") for d in (1, 2, 3, 5)]
MODELS += [dict(seed=s, kind=k, depth=d, activation="maxmin") for s in (0, 1) for k in ("random", "orthogonal") for d in (2, 4)]


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
    bound = certificate(model)
    assert bound["product"] == pytest.approx(math.prod(singular_values(W.data).max().item() for W in model.weights), rel=1e-8)
    assert bound["tight"] <= bound["product"]
    if case["kind"] == "random" and case["depth"] > 1 and "activation" not in case:
        assert bound["tight"] < 0.98 * bound["product"]  # (orthogonal weights reach the product)
    images = torch.randint(0, 256, (64, 3072), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    found = max(largest_jacobian_norm(model, images), steepest_pair(model))
    assert 0.05 * bound["tight"] < found <= bound["tight"]
    if case["depth"] == 1:
        assert found >= 0.999 * bound["tight"]


@torch.no_grad()
def test_step_by_step_inequalities_of_the_tight_certificate():
    """Steps 1 to 5 above certificate(), each on differences of activations of real inputs."""
    model = random_model(width=24, lowpass=3).double()
    generator = torch.Generator().manual_seed(3)
    x, y = torch.rand(2, 500, 27, generator=generator, dtype=torch.float64)
    dx = (x - y).square().sum(1)
    S = model.weights[0] @ model.weights[0].T
    h, g = x, y
    for W, b, W_next in zip(model.weights[:-1], model.biases, model.weights[1:]):
        p, q = h @ W.T + b, g @ W.T + b
        z = p - q
        assert (torch.einsum("bi,ij,bj->b", z, torch.linalg.pinv(S), z) <= dx * (1 + 1e-6)).all()  # step 1
        h, g = p.relu(), q.relu()
        d = h - g
        assert (d * (z - d) >= -1e-12).all()  # step 2
        sigma = torch.linalg.matrix_norm(S, ord=2)
        lam = 2 / sigma
        M = lam * torch.eye(len(S), dtype=torch.float64) - lam**2 * S / 4
        assert (torch.einsum("bi,ij,bj->b", d, M, d) <= dx * (1 + 1e-9)).all()  # step 3
        assert torch.linalg.eigvalsh(M).min() == pytest.approx(1 / sigma.item(), rel=1e-6)  # step 4
        S = W_next @ torch.linalg.inv(M) @ W_next.T  # step 5
    assert certificate(model)["tight"] ** 2 == pytest.approx(torch.linalg.eigvalsh(S).max().item(), rel=1e-6)  # step 6
    for a, c in ((0, 1), (3, 9)):  # step 7
        v = torch.zeros(10, dtype=torch.float64)
        v[a], v[c] = 1, -1
        assert certificate(model)["pairs_KK"][a, c].item() ** 2 == pytest.approx((v @ S @ v).item(), rel=1e-6)


@pytest.mark.parametrize("activation", ["relu", "maxmin"])
def test_pair_constants_bound_gradients_of_margins(activation):
    model = random_model(norm=3.0, activation=activation)
    pairs = certificate(model)["pairs_KK"]
    x = torch.rand(40, 3072, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    logits = model(x)
    for y, j in ((0, 1), (4, 7), (9, 2)):
        gradient, = torch.autograd.grad((logits[:, y] - logits[:, j]).sum(), x, retain_graph=True)
        assert gradient.norm(dim=1).max() <= pairs[y, j]
    assert (pairs <= 2**0.5 * certificate(model)["tight"] * (1 + 1e-9)).all()


def test_certified_radius_survives_attack_and_is_exact_for_a_linear_model():
    model = random_model(depth=1)
    images = torch.randint(0, 256, (50, 3072), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    labels = model(images.double() / 255).argmax(1)
    labels[0] = (labels[0] + 1) % 10
    radius = certified_radii(model, certificate(model)["pairs_KK"], images, labels)
    assert radius[0] < 0 < radius[1:].min()
    # For a linear model the nearest image of another class is known: just inside the radius right, just outside wrong.
    x = images.double() / 255
    logits = model(x)
    W = model.weights[0].double() @ torch.autograd.functional.jacobian(
        lambda v: MLP(Config(depth=1, lowpass=6, bias=False, center=False), None).features(v[None])[0], x[0])
    for i in range(1, 10):
        d = W[labels[i]] - W
        distance = (logits[i, labels[i]] - logits[i]) / d.norm(dim=1).clamp(min=1e-30)
        distance[labels[i]] = math.inf
        j = distance.argmin()
        assert radius[i].item() == pytest.approx(distance[j].item(), rel=1e-6)
        for factor, right in ((0.999, True), (1.001, False)):
            moved = x[i] - factor * radius[i] * d[j] / d[j].norm()
            assert (model(moved[None]).argmax() == labels[i]).item() == right


def test_zero_network_has_constant_zero():
    model = random_model()
    model.weights[1].data.zero_()
    assert certificate(model)["tight"] == 0 == certificate(model)["product"]
    model.weights[0].data.fill_(math.nan)
    with pytest.raises(Refusal, match="not finite"):
        certificate(model)


def test_lowpass_is_an_orthogonal_projection():
    C = mlp_cifar.cosines(12)
    torch.testing.assert_close(C @ C.T, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-12)
    full = MLP(Config(lowpass=31), None)
    x = torch.rand(5, 3072, dtype=torch.float64)
    assert (full.features(x).norm(dim=1) <= (x - full.mean_P).norm(dim=1)).all()
    flat = torch.full((1, 3072), 0.7, dtype=torch.float64)  # a constant image has one frequency, and all its energy in it
    assert MLP(Config(lowpass=1), None).features(flat).norm().item() == pytest.approx(flat.norm().item(), rel=1e-12)


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
def test_limits_hold_at_every_step(lr, constraint, small_stand_in):
    """In float64, after each of 40 steps large enough to reach the limit."""
    config = Config(**{**TINY, "steps": 40, "constraint": constraint, "lr": lr, "w_max": "1,1.5,0.7"})
    model = MLP(config)
    optimizers = mlp_cifar.make_optimizers(config, model)
    (images, labels), _ = small_stand_in
    reached = 0
    for step in range(config.steps):
        i = mlp_cifar.batch_indices(step, config, len(labels))
        mlp_cifar.train_step(config, model, optimizers, images[i], labels[i], step, torch.float32)
        for W, w_max in zip(model.weights, mlp_cifar.limits(config)):
            share = singular_values(W.data).max().item() / sigma_limit(W, w_max)
            assert share <= 1 + 1e-4
            reached += share > 0.9
    assert reached > 20


def test_it_learns_and_a_linear_model_does_not(tmp_path):
    """The stand-in is hard enough: a linear model stays clearly below the MLP (all 20,000 drawings, through the shell)."""
    accuracy = {}
    for depth in (1, 3):
        out = tmp_path / str(depth)
        done = command("--data", "stand-in", "--steps", 150, "--evals", 1, "--width", 64, "--depth", depth, "--out", out)
        assert done.returncode == 0, done.stderr
        accuracy[depth] = json.loads((out / "summary.json").read_text())["val_accuracy"]
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


def test_random_labels_have_nothing_to_do_with_the_true_ones(tmp_path, monkeypatch, small_stand_in):
    seen, real = [], mlp_cifar.train_step
    monkeypatch.setattr(mlp_cifar, "train_step", lambda *a: seen.append(a[4]) or real(*a))
    run(tmp_path, random_labels=True)
    (_, labels), _ = small_stand_in
    true = [labels[mlp_cifar.batch_indices(step, Config(**TINY), len(labels))] for step in range(TINY["steps"])]
    assert 0.02 < (torch.stack(seen) == torch.stack(true)).double().mean() < 0.25


# ---- through the command line ----------------------------------------------------------------------------------------
def test_help_is_quick_and_complete():
    start = time.perf_counter()
    done = command("--help")
    assert done.returncode == 0 and time.perf_counter() - start < 2
    for field in dataclasses.fields(Config):
        assert f"--{field.name}" in done.stdout
    for preset in mlp_cifar.PRESETS:
        assert preset in done.stdout


def folder_of_pictures(path, n=40, columns=("img", "label"), labels=None, splits=("train", "test")):
    """A small data set in the Hub's layout, as parquet."""
    import datasets
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(n)]
    labels = [i % 10 for i in range(n)] if labels is None else labels
    path.mkdir()
    for split in splits:
        table = datasets.Dataset.from_dict({columns[0]: pictures, columns[1]: labels}).cast_column(columns[0], datasets.Image())
        table.to_parquet(str(path / f"{split}-00000-of-00001.parquet"))
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
    environment = {k: v for k, v in os.environ.items() if k != "DATA_DIR"}
    environment.update(HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "empty"))
    start = time.perf_counter()
    done = command("--steps", 2, "--width", 8, "--evals", 1, "--out", tmp_path / "run", env=environment)
    assert done.returncode == 0, done.stderr
    assert "STAND-IN" in done.stdout and "data: stand-in" in done.stdout and time.perf_counter() - start < 60
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["data"] == "stand-in"
    done = command("--data", "uoft-cs/cifar10", "--out", tmp_path / "never", env=environment)
    assert done.returncode == 2 and "uoft-cs/cifar10" in done.stderr and not (tmp_path / "never").exists()


def state_of(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_killed_and_resumed_is_bit_identical(tmp_path, optimizer):
    flags = ["--data", "stand-in", "--steps", 60, "--evals", 12, "--width", 48, "--optimizer", optimizer, "--augment"]
    assert command(*flags, "--out", tmp_path / "whole").returncode == 0
    process = subprocess.Popen([sys.executable, ROOT / "mlp_cifar.py", *map(str, flags), "--out", tmp_path / "killed"],
                               stdout=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.05)  # somewhere in the steps after the first checkpoint
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open(tmp_path / "killed" / "log.jsonl", "a") as log:
        log.write('{"step": 5')  # a line cut off by the kill
    assert state_of(tmp_path / "killed")["step"] < 60 and not (tmp_path / "killed" / "summary.json").exists()
    done = command("--resume", tmp_path / "killed")
    assert done.returncode == 0, done.stderr
    whole, killed = state_of(tmp_path / "whole"), state_of(tmp_path / "killed")
    assert same(whole["model"], killed["model"]) and same(whole["optimizers"], killed["optimizers"])
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(5, 61, 5))
    again = command("--resume", tmp_path / "killed")
    assert again.returncode == 2 and "finished" in again.stderr


# ---- bad input: one line, exit status 2, nothing damaged ---------------------------------------------------------------
@pytest.mark.parametrize("flags, says", [
    (["--w_max", "-1"], "--w_max"), (["--w_max", "0"], "--w_max"), (["--w_max", "nan"], "--w_max"), (["--w_max", "inf"], "--w_max"),
    (["--w_max", "1,2"], "3 of them"), (["--w_max", "six"], "--w_max"), (["--steps", "0"], "--steps"), (["--steps", "1.5"], "--steps"),
    (["--constrain_every", "0"], "from 1 to 64"), (["--lr", "nan"], "--lr"), (["--lr", "-0.1"], "--lr"), (["--batch", "0"], "--batch"),
    (["--constraint", "clip"], "soft_cap"), (["--step", "10"], "--step"),
    (["--optimizer", "sgd"], "muon"), (["--dtype", "float8"], "bfloat16"), (["--preset", "best"], "paper_adamw"),
    (["--device", "tpu"], "--device"), (["--device", "cuda:77"], "--device"), (["--momentum", "1"], "--momentum"),
    (["--lowpass", "33"], "--lowpass"), (["--loss_temperature", "0"], "--loss_temperature"), (["--seed", "-1"], "--seed"), (["--seed", "100000000000000"], "--seed"),
    (["--data", "/no/such/folder"], "/no/such/folder"), (["--resume", "/no/such/run"], "no such checkpoint"),
    (["--steps", "2000", "--resume", "/no/such/run"], "--out, --steps with --resume"), (["--width", "1000000000"], "65536"),
    (["--depht", "3"], "--depht"), (["--width", "7", "--activation", "maxmin"], "even"), (["--margin", "-1"], "--margin"), (["--bias_lr", "inf"], "--bias_lr"), (["--evals", "0"], "--evals")])
def test_wrong_flags(flags, says, tmp_path, capsys):
    out = tmp_path / "run"
    try:  # in this process, as main() does it, to save 27 starts of python
        config = mlp_cifar.parse_arguments(["--data", "stand-in", *flags, *([] if flags[0] == "--resume" else ["--out", str(out)])])
        with pytest.raises(Refusal) as refusal:
            mlp_cifar.main(config)
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


@pytest.mark.parametrize("kind", ["empty parquet", "corrupt parquet", "no columns", "labels", "no labels", "text", "file", "one split",
                                  "small pictures", "empty folder"])
def test_wrong_data(kind, tmp_path):
    data = tmp_path / "data"
    if kind == "no columns":
        folder_of_pictures(data, columns=("photo", "class"))
    elif kind == "labels":
        folder_of_pictures(data, labels=[10] * 40)
    elif kind == "no labels":
        folder_of_pictures(data, labels=["cat"] * 40)
    elif kind == "one split":
        folder_of_pictures(data, splits=("train",))
    elif kind == "small pictures":
        import datasets
        data.mkdir()
        for split in ("train", "test"):
            datasets.Dataset.from_dict({"img": [Image.new("RGB", (16, 16))], "label": [0]}).cast_column(
                "img", datasets.Image()).to_parquet(str(data / f"{split}-00000-of-00001.parquet"))
    elif kind == "file":
        data.write_text("hello")
    else:
        data.mkdir()
        content = {"empty parquet": b"", "corrupt parquet": b"PAR1" + bytes(100) + b"PAR1", "text": b"hello", "empty folder": None}[kind]
        for split in ("train", "test"):
            if content is not None:
                (data / f"{split}.{'txt' if kind == 'text' else 'parquet'}").write_bytes(content)
    with pytest.raises(Refusal) as refusal:
        mlp_cifar.main(Config(**{**TINY, "data": str(data), "out": str(tmp_path / "run")}))
    assert str(data) in str(refusal.value) and "\n" not in str(refusal.value) and not (tmp_path / "run").exists()


class Payload:
    def __reduce__(self):
        return os.system, (f"touch {Payload.witness}",)


@pytest.mark.parametrize("kind", ["truncated", "hostile", "text", "foreign", "other script", "other shape", "no file", "other data"])
def test_wrong_checkpoints(kind, tmp_path):
    out, _ = run(tmp_path)
    (out / "summary.json").unlink()
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
    elif kind == "no file":
        path.unlink()
    files = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(Refusal) as refusal:
        mlp_cifar.main(Config(resume=str(out)))
    assert "\n" not in str(refusal.value) and not Payload.witness.exists()
    assert files == {p.name: p.read_bytes() for p in out.iterdir()}


def test_runs_are_never_overwritten(tmp_path, monkeypatch):
    out, _ = run(tmp_path)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    for target in (out, out / "summary.json"):
        with pytest.raises(Refusal, match="exists"):
            mlp_cifar.main(Config(**{**TINY, "out": str(target)}))
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        mlp_cifar.main(Config(**TINY))
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"mlp_cifar_default_seed0", "mlp_cifar_default_seed0_2"}


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    out = tmp_path / "run"
    real = os.fsync

    def full(descriptor):
        if (out / "checkpoint.pt").exists():
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        mlp_cifar.main(Config(**{**TINY, "out": str(out)}))
    assert state_of(out)["step"] == 3 and not list(out.glob("*.part"))
    monkeypatch.setattr(os, "fsync", real)
    mlp_cifar.main(Config(resume=str(out)))
    assert state_of(out)["step"] == 6


def test_a_run_folder_that_cannot_be_made_is_one_line_and_exit_status_two(tmp_path):
    (tmp_path / "file").write_text("")
    done = command("--data", "stand-in", "--steps", 1, "--evals", 1, "--width", 8, "--out", tmp_path / "file" / "run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_divergence_stops_and_keeps_the_last_checkpoint(tmp_path):
    with pytest.raises(Refusal, match=r"step \d+: training has diverged") as refusal:
        run(tmp_path, optimizer="adamw", constraint="none", lr=1e30, steps=30, evals=30)
    assert "layer" in str(refusal.value) or "logits" in str(refusal.value)
    last_good = tmp_path / "run" / "checkpoint.pt"
    assert not last_good.exists() or all(W.isfinite().all() for W in state_of(tmp_path / "run")["model"].values())


# ---- a constraint of one's own, and all pairs ------------------------------------------------------------------------
def test_a_constraint_of_ones_own_by_command_and_in_python(tmp_path):
    example = (ROOT / "README.md").read_text().split("In a file `mine.py`:")[1].split("```")[1].removeprefix("python\n")
    (tmp_path / "mine.py").write_text(example + "\ndef tighter(W, w_max, step_norm=0.0):\n    return half_cap(W, 0.5 * w_max)\n")
    name = f"{tmp_path}/mine.py:tighter"
    flags = ["--data", "stand-in", "--width", 16, "--lowpass", 6, "--w_max", 1, "--constraint", name]
    done = command(*flags, "--steps", 4, "--evals", 4, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["max_weight_norm"] <= 0.5 * (1 + 1e-4)
    (tmp_path / "run" / "summary.json").unlink()  # as if it had been stopped
    refused = command("--resume", tmp_path / "run")
    assert refused.returncode == 2 and f"--constraint {name}" in refused.stderr  # its code is not run unasked
    assert command("--resume", tmp_path / "run", "--constraint", name).returncode == 0
    CONSTRAINTS["mine"] = lambda W, w_max, step_norm=0.0: W / W.norm(dim=(-2, -1), keepdim=True).clamp(min=1)
    try:
        run(tmp_path / "python", constraint="mine")
    finally:
        del CONSTRAINTS["mine"]


def test_compare_all_pairs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mlp_cifar, "PAIRS", {("muon", "none"): (0.2, (1,)), ("muon", "soft_cap"): (0.2, (1.5, 4)),
                                             ("adamw", "soft_cap"): (0.001, (1.5,)), ("adamw", "none"): (1e30, (1,))})
    out, settings = tmp_path / "all", dict(TINY, compare=True, seeds=2, evals=1)
    mlp_cifar.main(Config(**settings, out=str(out), minutes=0.0))
    assert "10 of 10 runs are still to come" in capsys.readouterr().out and not list(out.glob("*_seed*"))
    (out / "muon_none_1_seed0").mkdir()  # what an interrupted run leaves
    (out / "muon_none_1_seed0" / "config.json").write_text("{")
    mlp_cifar.main(Config(**settings, out=str(out)))
    text = capsys.readouterr().out
    with open(out / "compare.csv") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 10 and sum(row["val_accuracy"] == "" for row in rows) == 2 and text.count("diverged") == 2
    summary = json.loads((out / "muon_soft_cap_4_seed1" / "summary.json").read_text())
    row = next(row for row in rows if (row["constraint"], row["w_max"], row["seed"]) == ("soft_cap", "4", "1"))
    assert float(row["val_accuracy"]) == summary["val_accuracy"] and float(row["certified"]) == summary["certified_accuracy"]["36/255"]
    table = text[text.index("accuracy (%) at"):]
    assert "2 seed(s)" in table and "±" in table and (out / "compare.png").stat().st_size > 5000
    times = {p: p.stat().st_mtime_ns for p in out.glob("*/summary.json")}
    mlp_cifar.main(Config(**settings, out=str(out)))  # nothing is done twice
    assert times == {p: p.stat().st_mtime_ns for p in out.glob("*/summary.json")} and table in capsys.readouterr().out
    with pytest.raises(Refusal, match="other settings"):
        mlp_cifar.main(Config(**{**settings, "steps": 7}, out=str(out)))
    with pytest.raises(Refusal, match="no comparison"):
        mlp_cifar.main(Config(**settings, out=str(out / "muon_none_1_seed0")))


def test_accuracy_at_equal_bounds():
    rows = [dict(lipschitz_product_log10=b, val_accuracy=a) for b, a in ((1.0, 0.3), (2.0, 0.5), (3.0, 0.4), (None, 0.9))] + [{}]
    within = [mlp_cifar.accuracy_within(rows, b) for b in (0.9, 1.0, 1.5, 2.0, 2.5, 9.0)]
    np.testing.assert_allclose(within, [math.nan, 0.3, 0.4, 0.5, 0.5, 0.5])
    assert math.isnan(mlp_cifar.accuracy_within([], 1.0))


@pytest.mark.parametrize("arguments", [["--compare", "--w_max", "3"], ["--compare", "--seed", "1"], ["--compare", "--resume", "runs/x"],
                                       ["--compare", "--seeds", "0"], ["--constraint", "nobody.py:f"]])
def test_compare_refuses(arguments, tmp_path):
    refused = command("--data", "stand-in", "--out", tmp_path / "run", *arguments)
    assert refused.returncode == 2 and arguments[-2] in refused.stderr and not (tmp_path / "run").exists()
