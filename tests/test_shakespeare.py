"""shakespeare.py: its certificate against attacks step by step, its data, its behaviour as a user sees it."""

import dataclasses
import hashlib
import io
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matrices import sigma_limit, with_spectrum

import shakespeare
from constraints import CONSTRAINTS
from shakespeare import (Config, Transformer, UserError, attention_terms, certificate, mlp_terms, parse_arguments,
                         sigma)

ROOT = Path(__file__).parent.parent
TINY = dict(data="stand-in", width=16, blocks=2, heads=2, hidden=32, seq_len=24, steps=6, batch=4, evals=2, length=20)
REFERENCE = np.load(Path(__file__).parent / "reference.npz")
DRAW = shakespeare.draw


@pytest.fixture(scope="module", autouse=True)
def small_stand_in():
    """The library's source, but little of it; and no pictures, which take most of the time of a tiny run."""
    text = shakespeare.stand_in(20_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shakespeare, "stand_in", lambda: text)
        patch.setattr(shakespeare, "draw", lambda *a: None)
        yield text


def run(tmp_path, **changes):
    """A tiny run in this process; returns its folder and summary."""
    out = tmp_path / "run"
    summary = shakespeare.main(Config.of("paper", **{**TINY, "out": str(out), **changes}))
    assert summary == json.loads((out / "summary.json").read_text())
    return out, summary


def command(*arguments, **kwargs):
    """The script as a user runs it."""
    return subprocess.run([sys.executable, str(ROOT / "shakespeare.py"), *map(str, arguments)], capture_output=True,
                          text=True, timeout=120, **kwargs)


def state_of(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def random_model(kind="random", seed=0, norm=1.0, vocabulary="abcdefgh", **changes):
    """A float64 model with random or orthogonal matrices of the RMS->RMS norm asked for."""
    config = Config(**{**dict(width=16, blocks=1, heads=2, hidden=32, seq_len=6, seed=seed), **changes})
    model = Transformer(config, vocabulary)
    generator = torch.Generator().manual_seed(seed)
    for i, (_, W) in enumerate(model.matrices()):
        r = min(W.shape)
        s = torch.ones(r) if kind == "orthogonal" else torch.rand(r, generator=generator)
        W.data = with_spectrum(*W.shape, norm * sigma_limit(W, 1.0) * (s / s.max()).double(), seed=100 * seed + i)
    model = model.double()
    for block in model.blocks:
        if hasattr(block, "bias_HT"):
            block.bias_HT.data = torch.randn(block.bias_HT.shape, generator=generator, dtype=torch.float64)
    return model


def rms(x):
    return x.square().mean(-1).sqrt()


def attack(f, R, T, D, seed=0, restarts=8, steps=100, start=None):
    """The largest max_t rms((J_f(x) dx)_t) found over x in the ball of radius R and rms(dx_t) <= 1 at every token.

    Adam on both at once; x is projected into the ball, dx normalised token by token (the maximum is at the border).
    """
    generator = torch.Generator().manual_seed(seed)
    x = start if start is not None else R * torch.randn(restarts, T, D, generator=generator, dtype=torch.float64)
    x = x.clone().requires_grad_()
    dx = torch.randn(x.shape, generator=generator, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([x, dx], lr=0.05)
    best = 0.0
    for _ in range(steps):
        inside = x * (R / rms(x).clamp(min=R))[..., None]
        _, moved = torch.func.jvp(f, (inside,), (dx / rms(dx)[..., None],))
        found = rms(moved).amax(-1)
        best = max(best, found.max().item())
        optimizer.zero_grad()
        (-found.log().sum()).backward()
        optimizer.step()
    return best


def split_tokens(model, R):
    """Inputs that break a count without heads: each head finds its slice of the value in a token of its own."""
    D, H, T = model.config.width, model.config.heads, model.config.seq_len
    v_HED = model.blocks[0].v.detach().view(H, D // H, D)
    x = torch.zeros(8, T, D, dtype=torch.float64)
    for b in range(8):
        for t in range(T):
            x[b, t] = v_HED[(t + b) % H].T @ torch.randn(D // H, generator=torch.Generator().manual_seed(b * T + t), dtype=torch.float64)
    return x * (R / rms(x))[..., None]


# ---- the certificate, step by step -------------------------------------------------------------------
ARCHITECTURES = [dict(heads=H, positions=p, activation=act, residual_scale=r, attention_scale=beta)
                 for H, p, act, r, beta in ((1, "rope", "gelu", 1.0, 1 / 3), (2, "rope", "gelu", 2.0, 1 / 3), (4, "rope", "maxmin", 1.0, 0.0),
                                            (8, "bias", "gelu", 1.0, 1.0), (4, "bias", "maxmin", 1.0, 0.0), (8, "rope", "maxmin", 0.5, 0.0))]


def test_the_attack_is_strong():
    """What it finds where the truth is known: a matrix on each token, and the average of moved tokens over heads."""
    W = torch.randn(16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = attack(lambda x: x @ W.T, 1.0, 6, 16)
    assert 0.99 * sigma(W) <= found <= sigma(W)
    for heads in (1, 2, 4):  # patterns that each look at one token of their own, orthogonal weights: exactly sqrt(H)
        model = random_model("orthogonal", heads=heads, positions="bias", logit_scale=0.0, attention_scale=1.0)
        bias_HT = torch.full((heads, 6), -1e4, dtype=torch.float64)
        bias_HT[torch.arange(heads), torch.arange(heads)] = 0
        model.blocks[0].bias_HT.data = bias_HT
        found = attack(lambda x: model.blocks[0].attention(x), 1.0, 6, 16)
        certified = attention_terms(model, model.blocks[0], 1.0)["value"]
        assert certified == pytest.approx(heads**0.5, rel=1e-6) and 0.99 * certified <= found <= certified


@pytest.mark.parametrize("kind", ["random", "orthogonal"])
@pytest.mark.parametrize("case", ARCHITECTURES, ids=str)
def test_certificate_survives_attack(case, kind):
    """End to end and each sublayer alone, from the embeddings' ball."""
    model = random_model(kind, norm=1.5, logit_scale=1.0, **case)
    model.embedding_VD.data /= rms(model.embedding_VD.data).max()
    bound = certificate(model, search=10)
    block, row = model.blocks[0], bound["rows"][0]
    R, T, D = row["radius"], 6, 16
    found = attack(model.body, R, T, D, steps=30)
    assert found <= 10 ** bound["body_log10"]
    attention = attack(lambda x: block.attention(x), R, T, D, steps=30)
    attention = max(attention, attack(lambda x: block.attention(x), R, T, D, steps=30, start=split_tokens(model, R)))
    certified = row["value"] + row["pattern"] * R**2
    assert attention <= certified
    mlp = attack(lambda x: block.mlp(x), row["radius_mlp"], 1, D, steps=30)
    assert mlp <= row["mlp_derivative"]
    together = attack(lambda x: torch.lerp(x, block.mlp(x), model.mix), row["radius_mlp"], 1, D, steps=30)
    assert together <= row["mlp"] <= (1 - model.mix) + model.mix * row["mlp_derivative"] + 1e-12
    assert bound["log10"] <= bound["simple_log10"] + 1e-9


@torch.no_grad()
def papers_formula(model, block, R):
    """(attention's derivative, its gain) as the paper's code has them: norms of whole matrices, no heads."""
    gain = block.attention_scale * (sigma(block.o) * sigma(block.v)).item()
    return gain * (1 + 2 * model.config.logit_scale * (sigma(block.q) * sigma(block.k)).item() * R * R), gain


@pytest.mark.parametrize("heads", [4, 8])
def test_the_papers_formula_is_exceeded_and_ours_is_not(heads):
    """Orthogonal weights, tokens of RMS 1, output factor 1/3: the formula without heads says 1."""
    model = random_model("orthogonal", heads=heads)
    block = model.blocks[0]
    formula, _ = papers_formula(model, block, 1.0)
    assert formula == pytest.approx(1.0, rel=1e-6)
    found = max(attack(lambda x: block.attention(x), 1.0, 6, 16, start=s) for s in (None, split_tokens(model, 1.0)))
    terms = attention_terms(model, block, 1.0, search=10)
    assert 1.0 < found <= terms["value"] + terms["pattern"]


def test_one_head_gives_the_papers_formula():
    model = random_model("random", heads=1, norm=2.0)
    terms = attention_terms(model, model.blocks[0], 1.3)
    formula, gain = papers_formula(model, model.blocks[0], 1.3)
    assert terms["value_simple"] == pytest.approx(gain, rel=1e-6)
    assert terms["value_simple"] + terms["pattern_simple"] * 1.3**2 == pytest.approx(formula, rel=1e-6)
    assert terms["value"] <= terms["value_simple"] and terms["pattern"] <= terms["pattern_simple"] * (1 + 1e-8)


def test_weights_trained_to_break_the_certificate_do_not():
    """Gradient ascent on found / certified over the weights themselves."""
    model = random_model("random", heads=4, attention_scale=1.0)
    block = model.blocks[0]
    generator = torch.Generator().manual_seed(0)
    x, dx = torch.randn(2, 8, 6, 16, generator=generator, dtype=torch.float64)
    dx.requires_grad_()
    x.requires_grad_()
    optimizer = torch.optim.Adam([x, dx, block.q, block.k, block.v, block.o], lr=0.03)
    ratios = []
    for _ in range(150):
        inside = x / rms(x).clamp(min=1)[..., None]
        _, moved = torch.func.jvp(lambda v: block.attention(v), (inside,), (dx / rms(dx)[..., None],))
        found = rms(moved).amax()
        terms = attention_terms(model, block, 1.0)
        ratios.append(found.item() / (terms["value"] + terms["pattern"]))
        # what is ascended is the ratio to a differentiable stand-in of the bound
        simple = sigma(block.o) * sigma(block.v.view(4, 4, 16)).norm() * (1 + 2 * sigma(block.q) * sigma(block.k))
        optimizer.zero_grad()
        (-(found / simple).log()).backward()
        optimizer.step()
    assert max(ratios) <= 1 and max(ratios) > 1.5 * ratios[0]


@torch.no_grad()
def test_inequalities_of_attention():
    """Steps 1 to 4 above certificate(), at random points and moves."""
    generator = torch.Generator().manual_seed(2)
    P = torch.rand(200, 7, generator=generator, dtype=torch.float64).pow(4)
    P = P / P.sum(1, keepdim=True)
    e = torch.randn(200, 7, generator=generator, dtype=torch.float64).sign()
    dP = P * (e - (P * e).sum(1, keepdim=True))
    assert dP.abs().sum(1).max() <= 1 + 1e-12 and dP.abs().sum(1).max() > 0.9  # step 1, moves of 1 in each logit
    H, E, D, s, r = 4, 4, 16, 0.3, 2.0
    q, k = torch.randn(2, H, E, D, generator=generator, dtype=torch.float64)
    x, y, dx, dy = (F.normalize(v, dim=-1) for v in
                    torch.randn(4, 500, D, generator=generator, dtype=torch.float64))
    x, y = r * x, r * y
    dlogit = s * torch.einsum("hed,nd,hec,nc->nh", q, dx, k, y) + s * torch.einsum("hed,nd,hec,nc->nh", q, x, k, dy)
    q_n, dq_n = torch.einsum("hed,nd->nhe", q, x).norm(dim=-1), torch.einsum("hed,nd->nhe", q, dx).norm(dim=-1)
    e_nh = s * (dq_n * sigma(k) * r + q_n * sigma(k))
    assert (dlogit.abs() <= e_nh).all()  # step 2
    t = torch.rand(H, generator=generator, dtype=torch.float64) + 0.1
    shared = sigma((q * (t * sigma(k))[:, None, None]).reshape(H * E, D))
    assert ((t * e_nh).norm(dim=1) <= 2 * s * r * shared).all()  # step 4
    C, u = torch.randn(H, D, D, generator=generator, dtype=torch.float64), torch.randn(500, H, D, generator=generator, dtype=torch.float64)
    left = torch.einsum("hij,nhj->ni", C, u).norm(dim=1)
    right = sigma(torch.cat(list(C / t[:, None, None]), 1)) * (t * u.norm(dim=-1)).norm(dim=1)
    assert (left <= right).all()  # step 3


def test_slopes_of_the_activations():
    """Step 7: g bounds GeLU's slope, and is not generous; MaxMin keeps lengths; no activation lengthens a vector."""
    z = torch.linspace(-8, 8, 400_001, dtype=torch.float64, requires_grad=True)
    slope, = torch.autograd.grad(F.gelu(z, approximate="tanh").sum(), z)
    g = shakespeare.GELU_SLOPE
    assert g - 1e-8 < slope.max() <= g and slope.min() >= 1 - g
    assert (F.gelu(z, approximate="tanh").abs() <= z.abs()).all()
    x = torch.randn(50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = shakespeare.maxmin(x)
    a, b = x.chunk(2, -1)
    torch.testing.assert_close(y, torch.cat([torch.maximum(a, b), torch.minimum(a, b)], -1))


@pytest.mark.parametrize("activation", ["gelu", "maxmin"])
def test_the_stream_and_the_mlp_together(activation):
    """Step 8, exactly: for MaxMin the worst pattern of swaps by enumeration, for GeLU slopes at the ends of their range."""
    model = random_model("random", width=4, hidden=8, heads=1, residual_scale=1.5, activation=activation, norm=1.4)
    block, a = model.blocks[0], model.mix
    terms = mlp_terms(model, block)
    g, worst = shakespeare.GELU_SLOPE, 0.0
    for code in range(2**8):
        bits = torch.tensor([(code >> i) & 1 for i in range(8)], dtype=torch.float64)
        if activation == "gelu":
            J = torch.diag(bits * g + (1 - bits) * (1 - g)) / shakespeare.GELU_SCALE
        else:
            J = torch.zeros(8, 8, dtype=torch.float64)
            for i in range(4):
                swap = bits[i]
                J[i, i] = J[i + 4, i + 4] = 1 - swap
                J[i, i + 4] = J[i + 4, i] = swap
        worst = max(worst, sigma((1 - a) * torch.eye(4, dtype=torch.float64) + a * block.w_out @ J @ block.w_in).item())
    assert 0.7 * terms["mlp"] < worst <= terms["mlp"]


@torch.no_grad()
def test_radius_is_not_left():
    for case in ARCHITECTURES:
        model = random_model("orthogonal", blocks=3, norm=1.3, **{**case, "residual_scale": 1.0})
        bound = certificate(model)
        tokens = torch.randint(8, (64, 6), generator=torch.Generator().manual_seed(0))
        x = F.embedding(tokens, model.embedding_VD)
        for block, row in zip(model.blocks, bound["rows"]):
            assert rms(x).max() <= row["radius"]
            x = torch.lerp(x, block.attention(x), model.mix)
            assert rms(x).max() <= row["radius_mlp"]
            x = torch.lerp(x, block.mlp(x), model.mix)
        assert rms(x).max() <= bound["radius"]


def test_certificate_of_extremes():
    model = random_model()
    model.head_VD.data.zero_()
    assert certificate(model)["log10"] == -math.inf
    model.blocks[0].o.data.zero_()
    assert math.isfinite(certificate(model, search=3)["body_log10"])
    model.blocks[0].v.data.fill_(math.nan)
    with pytest.raises(UserError, match="not finite"):
        certificate(model)


def test_certified_tokens_survive_attack():
    """Projected gradient ascent on the embeddings of every token flips no certified prediction; some others it does."""
    model = random_model("random", blocks=2, positions="bias", logit_scale=0.2, attention_scale=0.0, activation="maxmin")
    tokens = torch.randint(8, (601,), generator=torch.Generator().manual_seed(1))
    rho = 0.03
    share = shakespeare.certified_token_accuracy(model, tokens, (rho, 1e-9))
    x_BT, _ = next(shakespeare.windows(tokens, 6, batch=100))
    clean = F.embedding(x_BT, model.embedding_VD).detach()
    predicted = model(x_BT, torch.float64).argmax(-1)
    # Take what the model says as the truth, so that every position is right, and see which can be moved.
    L = 10 ** certificate(model, rho, search=5)["body_log10"]
    logits = model(x_BT, torch.float64)
    margins = logits.gather(-1, predicted[..., None]) - logits
    apart = (model.head_VD[predicted][..., None, :] - model.head_VD).norm(dim=-1)
    stands = (margins > rho * 4 * L * apart).logical_or(torch.arange(8) == predicted[..., None]).all(-1)
    assert 0.05 < stands.double().mean() < 0.99 and 0 <= share[rho] <= share[1e-9] <= 1
    flipped = torch.zeros_like(stands)
    for target in range(8):  # towards each class at all positions
        d = torch.zeros_like(clean)
        for _ in range(40):
            d.requires_grad_()
            out = F.linear(model.body(clean + d), model.head_VD)
            flipped |= out.argmax(-1) != predicted
            gradient, = torch.autograd.grad((out[..., target] - out.gather(-1, predicted[..., None])[..., 0]).sum(), d)
            d = (d + 0.3 * rho * gradient / rms(gradient)[..., None].clamp(min=1e-30)).detach()
            d = d * (rho / rms(d).clamp(min=rho))[..., None]
    assert not (flipped & stands).any() and flipped.any()


def test_no_margin_exceeds_the_radius(monkeypatch):
    """So where rho L_body is the radius or more, certified token accuracy is 0 without looking at a single margin."""
    tokens = torch.randint(8, (601,), generator=torch.Generator().manual_seed(1))
    for seed, kind in enumerate(("random", "orthogonal") * 3):
        model = random_model(kind, seed=seed)
        with torch.no_grad():  # rows of the head along what they are applied to, to come near
            x_BT, _ = next(shakespeare.windows(tokens, model.config.seq_len, batch=100))
            model.head_VD[0] = model.body(F.embedding(x_BT, model.embedding_VD))[0, 0]
            model.head_VD[1] = -model.head_VD[0]
        radius, largest = certificate(model)["radius"], shakespeare.token_margins(model, tokens).max().item()
        assert 0 < largest <= radius
        rho = radius / 10 ** certificate(model, 0.0)["body_log10"]
        exact = shakespeare.certified_token_accuracy(model, tokens, (rho, 1e-6 * rho))[rho]  # (the second has margins looked at)
        with monkeypatch.context() as patch:
            patch.setattr(shakespeare, "token_margins", None)
            assert shakespeare.certified_token_accuracy(model, tokens, (2 * rho,))[2 * rho] == 0.0 == exact


# ---- model and published checkpoints ----------------------------------------------------------------
def published(path, **replaced):
    """A checkpoint in the authors' format: object arrays of pickled dictionaries, lists of matrices by index."""
    args = dict(vocab_size=65, num_heads=4, d_embed=32, num_blocks=2, softmax_scale=1, final_scale=1, residual_scale=1)
    weights = {i: [REFERENCE[f"gpt_weight_{i}"]] for i in range(14)}
    content = dict(args=args, results=dict(val_losses=[0.0]), weights_checkpoint_0=weights, **{})
    content.update(replaced)
    np.savez(path, **{k: np.array(v, dtype=object) for k, v in content.items()})
    return path


def test_parity_with_the_reference_through_its_own_format(tmp_path):
    """Logits recorded from the authors' GPT, from a file in their form, with or without references to absent code."""
    tokens, logits = torch.from_numpy(REFERENCE["gpt_tokens"]), torch.from_numpy(REFERENCE["gpt_logits"])
    _, model = shakespeare.load_published(published(tmp_path / "plain.npz"))
    torch.testing.assert_close(model(tokens), logits, rtol=0, atol=1e-5)
    module = types.ModuleType("modula_that_is_not_there")
    exec("def soft_cap(): pass", module.__dict__)
    module.soft_cap.__module__ = module.__name__
    sys.modules[module.__name__] = module
    try:
        path = published(tmp_path / "refs.npz", args=dict(vocab_size=65, num_heads=4, d_embed=32, num_blocks=2, softmax_scale=1,
                         final_scale=1, residual_scale=1, project=dict(default=module.soft_cap)))
    finally:
        del sys.modules[module.__name__]
    _, model = shakespeare.load_published(path)
    torch.testing.assert_close(model(tokens), logits, rtol=0, atol=1e-5)


class Payload:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("call", [os.system, eval, exec, subprocess.call, np.load, getattr], ids=lambda f: f.__name__)
def test_a_malicious_file_is_refused_and_runs_nothing(call, tmp_path):
    witness = tmp_path / "witness"
    code = f"touch {witness}" if call is os.system else [["touch", str(witness)]] if call is subprocess.call else \
        f"open({str(witness)!r}, 'w')"
    payload = Payload(call, *code) if isinstance(code, list) else Payload(call, code)
    if call in (os.system, eval, exec, subprocess.call):  # the payload works where nobody looks
        pickle.loads(pickle.dumps(payload))
        assert witness.exists()
        witness.unlink()
    path = published(tmp_path / "bad.npz", args=dict(num_heads=payload))
    with pytest.raises(UserError, match="nothing in it was run"):
        shakespeare.load_published(path)
    assert not witness.exists()


@pytest.mark.parametrize("kind", ["text", "truncated", "shapes", "missing", "vocabulary", "bomb"])
def test_wrong_published_files(kind, tmp_path, monkeypatch):
    path = published(tmp_path / "x.npz")
    if kind == "text":
        path.write_text("hello")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:3000])
    elif kind == "shapes":
        published(path, weights_checkpoint_0={i: [np.ones((3, 4))] for i in range(14)})
    elif kind == "missing":
        published(path, weights_checkpoint_0={0: [REFERENCE["gpt_weight_0"]]})
    elif kind == "bomb":
        with monkeypatch.context() as patch, shakespeare.zipfile.ZipFile(path, "w") as archive:
            archive.writestr("args.npy", b"")
            archive.filelist[0].file_size = 2**31 + 1
    with pytest.raises(UserError, match="2 GB" if kind == "bomb" else "x.npz"):
        shakespeare.main(Config.of(data="stand-in", load=str(path), out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()  # (vocabulary: the stand-in has another than the play)


def test_load_evaluates_certifies_and_samples(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shakespeare, "draw", DRAW)
    (tmp_path / "play.txt").write_text((shakespeare.VOCABULARY * 200)[:12_000])
    path, out = published(tmp_path / "x.npz"), tmp_path / "run"
    summary = shakespeare.main(Config.of(data=str(tmp_path / "play.txt"), load=str(path), out=str(out), length=10))
    assert summary["steps"] == 0 and math.isfinite(summary["lipschitz_log10"]) and summary["w_max"] is None
    assert "LIPSCHITZ" in capsys.readouterr().out and (out / "curves.png").exists()
    shakespeare.main(Config.of(sample=str(path), prompt="ROMEO:", length=30))
    text = capsys.readouterr().out
    assert text.startswith("ROMEO:") and len(text) == 6 + 30 + 1
    with pytest.raises(UserError, match="--width 7: .* has 32"):  # what is loaded keeps its settings
        shakespeare.main(Config.of(sample=str(path), width=7, heads=1))


@torch.no_grad()
def test_causal_and_rotation_keeps_norms():
    for case in ARCHITECTURES:
        model = random_model(**case)
        x = torch.randint(8, (1, 6), generator=torch.Generator().manual_seed(3))
        y = x.clone()
        y[0, 4] = (y[0, 4] + 1) % 8
        a, b = model(x, torch.float64), model(y, torch.float64)
        assert torch.equal(a[0, :4], b[0, :4]) and not torch.allclose(a[0, 4:], b[0, 4:])
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(shakespeare.rotate(x).norm(dim=-1), x.norm(dim=-1))


def test_validation_covers_every_token_once():
    tokens = torch.arange(1003)
    seen = torch.cat([y.flatten() for _, y in shakespeare.windows(tokens, 24, batch=5)])
    assert torch.equal(seen, torch.arange(1, 1003))
    assert all(torch.equal(x + 1, y) for x, y in shakespeare.windows(tokens, 24))


def test_a_printed_bound_is_rounded_up():
    for exponent in (-0.1426675, 2.0, 3.64055, 5.99999, 15.8100001, 400.0):
        text = shakespeare.power(exponent)
        shown = float(text[3:]) if text.startswith("10^") else math.log10(float(text))
        assert exponent - 1e-12 <= shown <= exponent + (0.1001 if exponent > 6 else 1e-3)
    assert shakespeare.power(15.26) == "10^15.3"
    assert shakespeare.power(-math.inf) == "10^-inf" and shakespeare.power(math.inf) == "10^inf"
    assert json.dumps([shakespeare.in_json(x) for x in (-math.inf, math.inf, 1.5)]) == '["-inf", "inf", 1.5]'


def test_samples_are_reproducible_and_temperature_zero_is_greedy(capsys):
    model = random_model(vocabulary="\nabcdefg")

    def draw(**options):
        shakespeare.sample(model, Config(prompt="ab", length=12, **options), torch.float64)
        return capsys.readouterr().out

    assert draw(temperature=1.0) == draw(temperature=1.0) != draw(temperature=1.0, seed=1)
    greedy = draw(temperature=0.0)
    assert greedy == draw(temperature=0.0, seed=1) == draw(temperature=5.0, top_k=1) and len(greedy) == 2 + 12 + 1
    assert draw(temperature=1.0, top_k=8) == draw(temperature=1.0) != draw(temperature=1.0, top_k=2)


# ---- training ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_optimizer_with_every_constraint(optimizer, constraint, tmp_path, monkeypatch):
    monkeypatch.setattr(shakespeare, "certificate", lambda *a, **k: certificate(*a))  # (no search, to save time)
    lr = 0.5 if optimizer == "muon" else 0.05
    out, summary = run(tmp_path, optimizer=optimizer, constraint=constraint, lr=lr, w_max="1.2")
    assert math.isfinite(summary["val_loss"]) and 0 <= summary["val_accuracy"] <= 1
    assert summary["norms"]["embedding"] <= 1 + 1e-6
    held = constraint in ("soft_cap", "hard_cap", "specnorm", "stiefel")
    if held or (optimizer, constraint) == ("muon", "weight_decay"):
        assert summary["max_weight_norm"] <= 1.2 * (1 + 1e-3)
    assert {p.name for p in out.iterdir()} == {"config.json", "log.jsonl", "checkpoint.pt", "summary.json"}


@pytest.mark.parametrize("constraint", ["soft_cap", "hard_cap", "specnorm", "stiefel"])
def test_limits_hold_at_every_step(constraint, tmp_path):
    """In float64, after each of 30 steps large enough to reach the limits; no embedding exceeds RMS 1."""
    w_max = dict(zip(shakespeare.ROLES, (1, 1, 1.5, 1, 0.7, 0.7, 2)))
    flags = dict(steps=30, evals=30, constraint=constraint, lr=0.3, w_max=",".join(map(str, w_max.values())))
    out, summary = run(tmp_path, **flags)
    assert summary["w_max"] == w_max
    norms = [record["norms"] for record in state_of(out)["log"]]
    assert len(norms) == 30 and all(norm["embedding"] <= 1 + 1e-6 for norm in norms)
    shares = [norm[role] / w_max[role] for norm in norms for role in w_max]
    assert max(shares) <= 1 + 1e-3 and sum(share > 0.9 for share in shares) > 20


def test_it_learns_and_main_leaves_things_as_they_are(tmp_path, small_stand_in, monkeypatch):
    """Below the entropy of single characters after a few steps."""
    monkeypatch.setattr(shakespeare, "draw", DRAW)
    config = Config.of("paper", data="stand-in", steps=80, evals=1, batch=32, width=64, blocks=1, heads=2, hidden=128,
                       seq_len=32, length=30, out=str(tmp_path / "run"))
    before, backend = dataclasses.asdict(config), matplotlib.get_backend()
    summary = shakespeare.main(config)
    assert before == dataclasses.asdict(config) and backend == matplotlib.get_backend()
    assert (tmp_path / "run" / "curves.png").stat().st_size > 5000
    tokens = shakespeare.encode(small_stand_in, "".join(sorted(set(small_stand_in))))
    p = torch.bincount(tokens).double() / len(tokens)
    assert summary["val_loss"] < -(p * p.clamp(min=1e-30).log()).sum().item() - 0.5


# ---- data --------------------------------------------------------------------------------------------
def test_data_comes_from_data_dir_then_cache_then_network_then_stand_in(tmp_path, monkeypatch, capsys):
    text = "To be, or not to be\n" * 1000
    (tmp_path / "here" / "tinyshakespeare").mkdir(parents=True)
    (tmp_path / "here" / "tinyshakespeare" / "input.txt").write_text(text)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "here"))
    assert shakespeare.load_text(Config())[0] == text
    monkeypatch.delenv("DATA_DIR")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # cannot be written to
    monkeypatch.setattr(shakespeare, "TEXT_SHA256", hashlib.sha256(text.encode()).hexdigest())
    monkeypatch.setattr(shakespeare.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(text.encode()))
    assert shakespeare.load_text(Config()) == (text, "tinyshakespeare")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert shakespeare.load_text(Config()) == (text, "tinyshakespeare")

    def dead(url, timeout):
        raise OSError("no network")
    monkeypatch.setattr(shakespeare.urllib.request, "urlopen", dead)
    assert shakespeare.load_text(Config()) == (text, "tinyshakespeare")  # now cached
    cached = tmp_path / "cache" / "tinyshakespeare" / "input.txt"
    cached.write_text("damaged")
    assert shakespeare.load_text(Config())[1] == "stand-in" and "STAND-IN" in capsys.readouterr().out
    monkeypatch.setattr(shakespeare.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"something else"))
    assert shakespeare.load_text(Config())[1] == "stand-in" and cached.read_text() == "damaged"


def test_holdout_is_the_end_of_the_training_text():
    train, validation, vocabulary, _ = shakespeare.load_data(Config(data="stand-in", seq_len=24))
    less, held, same_vocabulary, name = shakespeare.load_data(Config(data="stand-in", seq_len=24, holdout=True))
    assert torch.equal(torch.cat([less, held]), train) and len(held) == len(train) - int(0.9 * len(train))
    assert vocabulary == same_vocabulary and "held out" in name and len(validation) > 0


@pytest.mark.parametrize("kind", ["not utf-8", "empty", "short", "one character", "folder"])
def test_wrong_text(kind, tmp_path):
    path = tmp_path / "text"
    contents = {"not utf-8": b"\xff\xfe\x00" * 9999, "empty": b"", "short": b"hello", "one character": b"a" * 9999}
    path.mkdir() if kind == "folder" else path.write_bytes(contents[kind])
    with pytest.raises(UserError) as error:
        shakespeare.main(Config(**{**TINY, "data": str(path), "out": str(tmp_path / "run")}))
    assert str(path) in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "run").exists()


# ---- going on ----------------------------------------------------------------------------------------
def test_killed_and_started_again_is_bit_identical(tmp_path, small_stand_in):
    """The same command again after SIGKILL, and once more when all is done."""
    (tmp_path / "text").write_text(small_stand_in)
    flags = ["--preset", "paper", "--data", tmp_path / "text", "--steps", 60, "--evals", 12, "--batch", 16, "--width", 32,
             "--blocks", 1, "--heads", 2, "--hidden", 64, "--seq_len", 32, "--length", 5]
    shakespeare.main(parse_arguments(list(map(str, [*flags, "--out", tmp_path / "whole"]))))
    again = [*flags, "--out", tmp_path / "killed"]
    process = subprocess.Popen([sys.executable, ROOT / "shakespeare.py", *map(str, again)], stdout=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state_of(tmp_path / "killed")["step"] < 60 and not (tmp_path / "killed" / "summary.json").exists()
    done = command(*again)
    assert done.returncode == 0, done.stderr
    whole, killed = state_of(tmp_path / "whole"), state_of(tmp_path / "killed")
    assert same(whole["model"], killed["model"]) and same(whole["optimizers"], killed["optimizers"])
    lines = (tmp_path / "killed" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(5, 61, 5))


def test_stopped_and_gone_on_with_adamw_is_bit_identical(tmp_path, monkeypatch, capsys):
    flags = dict(optimizer="adamw", steps=12, evals=3, positions="bias", lr=0.01)
    whole, summary = run(tmp_path / "a", **flags)
    batch_of = shakespeare.batch_of

    def stop_at_6(tokens_N, step, config):
        if step == 6:
            raise KeyboardInterrupt
        return batch_of(tokens_N, step, config)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shakespeare, "batch_of", stop_at_6)
        run(tmp_path / "b", **flags)
    stopped = tmp_path / "b" / "run"
    (stopped / "log.jsonl").write_text('{"step": 4, "cut off')
    assert shakespeare.main(Config.of(out=str(stopped)))["val_loss"] == summary["val_loss"]  # its own settings
    assert same(state_of(whole)["model"], state_of(stopped)["model"])
    assert [json.loads(line)["step"] for line in (stopped / "log.jsonl").read_text().splitlines()] == [4, 8, 12]
    capsys.readouterr()
    before = {p.name: p.read_bytes() for p in stopped.iterdir()}
    assert shakespeare.main(Config.of(out=str(stopped)))["val_loss"] == summary["val_loss"]
    assert "finished" in capsys.readouterr().out
    assert before == {p.name: p.read_bytes() for p in stopped.iterdir()}


@pytest.mark.parametrize("flags, says", [
    (["--steps", "7"], "--steps 7: .* has 6"), (["--preset", "laptop"], "--preset laptop: .* has paper"),
    (["--lr", "0.3"], "--lr 0.3: .* has 0.0"), (["--load", "x.npz"], "--load x.npz")])
def test_a_flag_that_differs_from_the_run_names_both_values(flags, says, tmp_path):
    out, _ = run(tmp_path)
    before = (out / "checkpoint.pt").read_bytes()
    with pytest.raises(UserError, match=says):
        shakespeare.main(parse_arguments(["--out", str(out), *flags]))
    assert before == (out / "checkpoint.pt").read_bytes()


def test_runs_started_at_once_get_different_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: shakespeare.new_folder(Config.of("laptop")), range(8)))
    assert len(folders) == 8 and Path("runs/shakespeare_laptop_seed0") in folders


@pytest.mark.parametrize("kind", ["truncated", "hostile", "other script", "other shape", "other data"])
def test_wrong_checkpoints(kind, tmp_path):
    out, _ = run(tmp_path)
    (out / "summary.json").unlink()
    path, before = out / "checkpoint.pt", (out / "checkpoint.pt").read_bytes()
    state, witness, data = state_of(out), tmp_path / "witness", "auto"
    if kind == "truncated":
        path.write_bytes(before[: len(before) // 2])
    elif kind == "hostile":
        torch.save(dict(state, model=Payload(os.system, f"touch {witness}")), path)
    elif kind == "other script":
        torch.save(dict(state, script="mlp_cifar"), path)
    elif kind == "other shape":
        torch.save(dict(state, config=dict(state["config"], width=32)), path)
    else:
        data = str(tmp_path / "text")
        (tmp_path / "text").write_text("other words " * 2000)
    with pytest.raises(UserError) as error:
        shakespeare.main(Config.of(out=str(out), data=data))
    assert "\n" not in str(error.value) and not witness.exists()
    assert str(out if kind != "other data" else data) in str(error.value)


def test_code_of_ones_own_runs_only_if_asked_for(tmp_path):
    witness = tmp_path / "witness"
    (tmp_path / "mine.py").write_text(f"open({str(witness)!r}, 'w')\n\ndef mine(W, w_max, step_norm=0.0):\n    return W\n")
    name = f"{tmp_path}/mine.py:mine"
    out, _ = run(tmp_path, constraint=name)
    (out / "summary.json").unlink()
    witness.unlink()
    shakespeare.find_constraint.cache_clear()
    with pytest.raises(UserError, match="trust it: --constraint"):
        shakespeare.main(Config.of(out=str(out)))
    shakespeare.main(Config.of(sample=str(out), length=3))
    assert not witness.exists()
    assert shakespeare.main(Config.of(out=str(out), constraint=name))["steps"] == 6 and witness.exists()


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    replace, written = os.replace, []

    def full(source, target):
        written.append(Path(target).name)
        if written.count("checkpoint.pt") == 2:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        run(tmp_path)
    assert state_of(tmp_path / "run")["step"] == 3 and not list((tmp_path / "run").glob("*.part"))


def test_divergence_stops_and_keeps_the_last_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"step \d+: training has diverged"):
        run(tmp_path, optimizer="adamw", constraint="none", lr=1e30, steps=10, evals=1)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


# ---- bad input: one line, exit status 2, nothing written ---------------------------------------------
@pytest.mark.parametrize("flags, says", [
    (["--w_max", "-1"], "--w_max"), (["--w_max", "nan"], "--w_max"), (["--w_max", "1,2"], "7 of them"),
    (["--steps", "-1"], "--steps"), (["--lr", "nan"], "--lr"), (["--heads", "3"], "divisor"),
    (["--heads", "256", "--preset", "paper"], "even"), (["--logit_scale", "0", "--preset", "paper"], "rope"),
    (["--hidden", "7"], "even"), (["--residual_scale", "9"], "at most"), (["--width", "1000000000"], "16384"),
    (["--loss_temperature", "0"], "--loss_temperature"), (["--temperature", "-1"], "--temperature"),
    (["--seed", "-1"], "--seed"), (["--data", "/no/such/file"], "/no/such/file"), (["--top_k", "-1"], "--top_k"),
    (["--sample", "/no/such/run"], "/no/such/run"), (["--load", "/no/such.npz"], "no checkpoint in the published form"),
    (["--preset", "best"], "lipschitz2"), (["--device", "tpu"], "--device"), (["--prompt", "\u2603"], "does not know"),
    (["--constraint", "clip"], "soft_cap"), (["--depth", "2"], "--depth"), (["--activation", "relu"], "maxmin")])
def test_wrong_flags(flags, says, tmp_path, capsys):
    out = tmp_path / "run"
    try:
        with pytest.raises(UserError) as error:
            shakespeare.main(parse_arguments(["--data", "stand-in", "--out", str(out), *flags]))
        message = str(error.value)
        assert "\n" not in message
    except SystemExit as exit_:
        assert exit_.code == 2
        message = capsys.readouterr().err
    assert says in message and not out.exists()


def test_by_command_help_is_complete_and_an_error_is_one_line(tmp_path):
    done = command("--help")
    assert done.returncode == 0
    for name in [f"--{field.name}" for field in dataclasses.fields(Config)] + list(shakespeare.PRESETS):
        assert name in done.stdout
    wrong = command("--w_max", "-1", "--out", tmp_path / "run")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "-1" in wrong.stderr and "above 0" in wrong.stderr


def test_flags_come_before_presets_and_a_presets_rate_is_for_its_own_optimizer():
    assert parse_arguments([]).lr == 0.08 and parse_arguments(["--lr", "0.5"]).lr == 0.5
    assert parse_arguments(["--optimizer", "adamw"]).lr == 0.0 and parse_arguments(["--optimizer", "muon"]).lr == 0.08
    assert Config.of("plain100", steps=3).steps == 3 and Config.of("plain100").final_scale == 120
