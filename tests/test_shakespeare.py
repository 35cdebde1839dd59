"""shakespeare.py: its certificate against attacks step by step, its data, its behaviour as a user sees it."""

import copy
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import time
import types
from decimal import Decimal
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matrices import sigma_limit, with_spectrum

import constraints
import shakespeare

sys.path.insert(0, str(Path(__file__).parent.parent / "results"))

import published as results_published  # noqa: F401  test_verify_lipschitz.py takes it from here
from constraints import (CONSTRAINTS, ellipsoid_blocks, ellipsoid_layer, ellipsoid_norm, ellipsoid_pairs,
                         lifted, sigma, tune)
from published import load_published
from shakespeare import Config, Transformer, UserError, certificate, parse_arguments, tuned

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


def tune_little(model, steps=1, free=None, pairs=False):
    return tuned(model, 1, free, pairs)


def run(tmp_path, **changes):
    """A tiny run in this process; returns its folder and summary."""
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shakespeare, "tuned", tune_little)
        summary = shakespeare.main(Config.of("paper", **{**TINY, "out": str(out), **changes}))
    assert summary == json.loads((out / "summary.json").read_text())
    return out, summary


def command(*arguments, stdout=None, encoding="utf-8"):
    """(exit status, stdout, stderr) of the script as a user runs it, on a terminal of some encoding."""
    out = stdout or io.TextIOWrapper(io.BytesIO(), encoding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["shakespeare.py", *map(str, arguments)])
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", io.StringIO())
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "shakespeare.py"), run_name="__main__")
        out.flush()
        text = out.getvalue() if stdout else out.buffer.getvalue().decode(encoding)
        return stop.value.code, text, sys.stderr.getvalue()


def state_of(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def random_model(kind="random", seed=0, norm=1.0, vocabulary="abcdefgh", no_bias=False, **changes):
    """A float64 model whose matrices are of one kind, of the RMS->RMS norm asked for."""
    config = Config(**{**dict(width=16, blocks=1, heads=2, hidden=32, seq_len=6, seed=seed), **changes})
    model = Transformer(config, vocabulary)
    generator = torch.Generator().manual_seed(seed)
    for i, (role, W) in enumerate(model.matrices()):
        (m, n), r = W.shape, min(W.shape)
        s = torch.rand(r, generator=generator) if kind == "random" else torch.ones(r)
        if kind == "rank 1":
            s[1:] = 0
        W.data = with_spectrum(m, n, (s / s.max()).double(), 100 * seed + i, torch.float64)
        if kind == "permutation":
            W.data = torch.eye(max(m, n)).double()[torch.randperm(max(m, n), generator=generator)][:m, :n]
        if kind == "identical heads" and role in "qkv":
            W.data = W.data[: m // config.heads].repeat(config.heads, 1)
        if kind == "identical heads" and role == "o":
            W.data = W.data[:, : n // config.heads].repeat(1, config.heads)
        W.data *= norm * sigma_limit(W, 1.0) / sigma(W.data)
    model = model.double()
    for block in model.blocks:
        if hasattr(block, "bias_HT"):
            bias_HT = 2 * torch.randn(block.bias_HT.shape, generator=generator, dtype=torch.float64)
            block.bias_HT.data = bias_HT * (not no_bias)
    return model


def rms(x):
    return x.square().mean(-1).sqrt()


def attack(f, R, T, D, lengths=lambda y, dy: rms(dy)[None], seed=0, restarts=8, steps=30, start=None):
    """The largest of each length (M,) of (y, dy) = (f(x), J_f(x) dx) found with rms(x_t) <= R, rms(dx_t) <= 1.

    lengths gives (M, restarts, T); each restart makes one of them large. Adam on x and dx at once; x is projected
    into the ball, dx normalised token by token (the maximum is at the border).
    """
    generator = torch.Generator().manual_seed(seed)
    x = start
    if start is None:
        x = R * torch.randn(restarts, T, D, generator=generator, dtype=torch.float64)
    x = x.clone().requires_grad_()
    dx = torch.randn(x.shape, generator=generator, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([x, dx], lr=0.1)
    best = torch.zeros(())
    for _ in range(steps):
        inside = x * (R / rms(x).clamp(min=R))[..., None]
        y, dy = torch.func.jvp(f, (inside,), (dx / rms(dx)[..., None],))
        found = lengths(y, dy).amax(-1)
        best = torch.maximum(best, found.detach().amax(1))
        own = found[torch.arange(len(x)) % len(found), torch.arange(len(x))]
        optimizer.zero_grad()
        (-own.clamp(min=1e-300).log().sum()).backward()
        optimizer.step()
    return best


def split_tokens(model, R):
    """Inputs that break a count without heads: each head finds its slice of the value in a token of its own."""
    D, H, T = model.config.width, model.config.heads, model.config.seq_len
    v_HED = model.blocks[0].v.detach().view(H, D // H, D)
    random = torch.randn(8, T, D // H, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.stack([torch.stack([random[b, t] @ v_HED[(t + b) % H] for t in range(T)]) for b in range(8)])
    return x * (R / rms(x))[..., None]


# ---- the certificate, step by step -------------------------------------------------------------------
CONTENT = dict(logit_scale=1.0)
POSITION = dict(logit_scale=0.0, positions="bias")
CASES = [  # attention by content with RoPE, with a bias, with neither; then by position alone
    dict(CONTENT, heads=1, positions="rope", activation="gelu", attention_scale=1 / 3),
    dict(CONTENT, heads=2, positions="rope", activation="gelu", residual_scale=2.0),
    dict(CONTENT, heads=4, positions="rope", activation="maxmin", attention_scale=0.0),
    dict(CONTENT, heads=8, positions="rope", activation="maxmin", residual_scale=0.5),
    dict(CONTENT, heads=2, positions="bias", activation="maxmin", residual_scale=2.0),
    dict(CONTENT, heads=8, positions="bias", activation="gelu", attention_scale=1.0),
    dict(CONTENT, heads=4, positions="bias", activation="gelu", no_bias=True, logit_scale=3.0),
    dict(POSITION, heads=1, activation="gelu", attention_scale=1.0, residual_scale=3.0),
    dict(POSITION, heads=2, activation="maxmin", attention_scale=0.0, residual_scale=4.0),
    dict(POSITION, heads=4, activation="maxmin", attention_scale=1.0),
    dict(POSITION, heads=8, activation="gelu", attention_scale=0.0)]
KINDS = ("orthogonal", "random", "rank 1", "permutation", "identical heads")
# Each case with orthogonal weights, and each with one of the others.
BOTH = [(case, kind) for i, case in enumerate(CASES) for kind in (KINDS[0], KINDS[1 + i % 4])]
D, T = 16, 6


def named(value):
    if isinstance(value, dict):
        return "-".join(f"{v:.2g}" if isinstance(v, float) else str(v) for v in value.values())
    return str(value)


def test_the_attack_is_strong():
    """What it finds where the truth is known: a matrix on each token, and the average of moved tokens over heads."""
    W = torch.randn(D, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = attack(lambda x: x @ W.T, 1.0, T, D, steps=100)
    assert 0.99 * sigma(W) <= found <= sigma(W)
    for heads in (1, 2, 4):  # patterns that each look at one token of their own, orthogonal weights: exactly sqrt(H)
        model = random_model("orthogonal", **dict(POSITION, heads=heads, attention_scale=1.0))
        bias_HT = torch.full((heads, T), -1e4, dtype=torch.float64)
        bias_HT[torch.arange(heads), torch.arange(heads)] = 0
        model.blocks[0].bias_HT.data = bias_HT
        found = attack(model.blocks[0].attention, 1.0, T, D, steps=100)
        certified = certificate(model)["rows"][0]["value"]
        assert certified == pytest.approx(heads**0.5, rel=1e-6) and 0.99 * certified <= found <= certified


# ---- the product: steps 1 to 7 of THE PRODUCT in constraints.py
@pytest.mark.parametrize("case, kind", [(CASES[i], kind) for i in (0, 2, 5, 6, 9) for kind in KINDS[:2]], ids=named)
def test_no_sublayer_exceeds_its_row(case, kind):
    """Steps 3, 4 and 6, and their sums with the stream (step 7), at the radius of each."""
    model = random_model(kind, norm=1.5, **case)
    block, a = model.blocks[0], model.mix
    row = certificate(model)["rows"][0]
    R, R_mlp = 10 ** row["radius_log10"], 10 ** row["radius_mlp_log10"]
    for start in (None, split_tokens(model, R)):
        assert attack(block.attention, R, T, D, start=start) <= row["value"] + row["pattern"] * R**2
        mixed = attack(lambda x: torch.lerp(x, block.attention(x), a), R, T, D, start=start)
        assert mixed <= 10 ** row["attention_log10"]
    assert attack(block.mlp, R_mlp, 1, D) <= row["mlp"]
    gain = attack(block.mlp, R_mlp, 1, D, lengths=lambda y, dy: rms(y)[None])
    assert gain <= row["mlp_gain"] * R_mlp
    still = attack(block.attention, R, T, D, lengths=lambda y, dy: rms(y)[None])
    assert still <= row["value"] * R  # step 5


@torch.no_grad()
def papers_formula(model, block, R):
    """(attention's derivative, its gain) as the paper's code has them: norms of whole matrices, no heads."""
    gain = block.attention_scale * (sigma(block.o) * sigma(block.v)).item()
    return gain * (1 + 2 * model.config.logit_scale * (sigma(block.q) * sigma(block.k)).item() * R * R), gain


@pytest.mark.parametrize("heads", [4, 8])
def test_the_papers_formula_is_exceeded_and_ours_is_not(heads):
    """Orthogonal weights, tokens of RMS 1, output factor 1/3: the formula without heads says 1."""
    model = random_model("orthogonal", heads=heads)
    block, row = model.blocks[0], certificate(model)["rows"][0]
    formula, _ = papers_formula(model, block, 1.0)
    assert formula == pytest.approx(1.0, rel=1e-9)
    starts = (None, split_tokens(model, 1.0))
    found = max(attack(block.attention, 1.0, T, D, steps=100, start=start) for start in starts)
    assert 1.0 < found <= row["value"] + row["pattern"]


def test_one_head_gives_the_papers_formula():
    model = random_model("random", heads=1, norm=2.0)
    row = certificate(model)["rows"][0]
    formula, gain = papers_formula(model, model.blocks[0], 1.3)
    assert row["value"] == pytest.approx(gain, rel=1e-6)
    assert row["value"] + row["pattern"] * 1.3**2 == pytest.approx(formula, rel=1e-6)


def test_slopes_of_the_activations():
    """Step 6: g bounds GeLU's slope, and is not generous; no activation lengthens a vector; MaxMin sorts pairs."""
    z = torch.linspace(-8, 8, 400_001, dtype=torch.float64, requires_grad=True)
    slope, = torch.autograd.grad(F.gelu(z, approximate="tanh").sum(), z)
    g = shakespeare.GELU_SLOPE
    assert g - 1e-8 < slope.max() <= g and slope.min() >= 1 - g
    assert (F.gelu(z, approximate="tanh").abs() <= z.abs()).all()
    x = torch.randn(50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = shakespeare.maxmin(x)
    a, b = x.chunk(2, -1)
    torch.testing.assert_close(y, torch.cat([torch.maximum(a, b), torch.minimum(a, b)], -1))


@torch.no_grad()
def test_radius_is_not_left():
    """Step 7, from the embeddings of real tokens on."""
    for case in CASES:
        model = random_model("orthogonal", norm=1.3, **{**case, "blocks": 3, "residual_scale": 1.0})
        bound = certificate(model)
        tokens = torch.randint(8, (64, T), generator=torch.Generator().manual_seed(0))
        x = F.embedding(tokens, model.embedding_VD)
        for block, row in zip(model.blocks, bound["rows"]):
            assert rms(x).max() <= 10 ** row["radius_log10"]
            x = torch.lerp(x, block.attention(x), model.mix)
            assert rms(x).max() <= 10 ** row["radius_mlp_log10"]
            x = torch.lerp(x, block.mlp(x), model.mix)
        assert rms(x).max() <= 10 ** bound["radius_log10"]


# ---- the ellipsoid: steps 8 to 12 of THE ELLIPSOID in constraints.py
def gauge(z, S, log):
    """The largest |c z| / sqrt(c S c^T) over all directions c: z is in E(exp(log) S) where this is at most 1."""
    C = torch.linalg.cholesky(lifted(S))
    y = torch.linalg.solve_triangular(C, z.flatten(0, -2).T, upper=False)
    return y.norm(dim=0).view(z.shape[:-1]) * math.exp(-log / 2)


def follow(model, free=None):
    """[(S, log)] after each block, as certificate() has them."""
    model = shakespeare.exact_copy(model)
    R = shakespeare.largest_embedding(model)
    return ellipsoid_blocks(shakespeare.describe_blocks(model), R, {} if free is None else free)


def on_the_way(model, free=None):
    """[(kind, ellipsoids behind attention, ellipsoids behind the MLP)] of each block, of kind "token" and "difference";
    and those of changed patterns.
    """
    found, patterns = [], []
    behind_mlp, total, layer, pattern = (getattr(constraints, name) for name in (
        "after_mlp", "ellipsoid_sum", "ellipsoid_layer", "ellipsoid_pattern"))

    def after_mlp(*args):
        found.append((args[-1], [], []))
        return behind_mlp(*args)

    def record(f, place):
        def recorded(*args):
            place().append(f(*args))
            return place()[-1]
        return recorded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constraints, "after_mlp", after_mlp)
        patch.setattr(constraints, "ellipsoid_sum", record(total, lambda: found[-1][1]))
        patch.setattr(constraints, "ellipsoid_layer", record(layer, lambda: found[-1][2]))
        patch.setattr(constraints, "ellipsoid_pattern", record(pattern, lambda: patterns))
        follow(model, free)
    return found, patterns


def mlp_parts(block, spread):
    """(J, A, B) of the MLP and its stream."""
    gelu = block.config.activation == "gelu"
    w_out = block.mix * block.w_out / (shakespeare.GELU_SCALE if gelu else 1)
    return constraints.mlp_slopes(1 - block.mix, block.w_in, w_out, spread if gelu else None)[:3]


def random_free(model, seed=0, size=0.7):
    """Any trainable weights: all must give a valid bound."""
    free, generator = {}, torch.Generator().manual_seed(seed)
    follow(model, free)
    return {name: size * torch.randn(zero.shape, generator=generator).double() for name, zero in free.items()}


@torch.no_grad()
def claims(model, free):
    """A function of (tokens, differences) after each sublayer (2 blocks, B, T, D): found / certified (M, B, T).

    That is of every ellipsoid of these weights after each sublayer, and at the end in random directions, of the norm
    and of pairs.
    """
    differences, tokens = [], []
    for kind, *both in on_the_way(model, free)[0]:
        (tokens if kind == "token" else differences).extend(both)
    S, log = follow(model, free)[-1]
    U = model.config.final_scale * model.head_VD
    c = torch.randn(20, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    along = torch.stack([ellipsoid_norm(S, log, row[None]).exp() for row in c])
    norm = 10 ** certificate(model, free=free)["ellipsoid_log10"]
    pairs = ellipsoid_pairs(S, log, U).exp().fill_diagonal_(math.inf)

    def ratios(y, dy):
        found = [gauge(z, *one) for z, many in zip(dy, differences) for one in many]
        found += [gauge(z, *one) for z, many in zip(y, tokens) for one in many]
        logits = F.linear(dy[-1], U)
        apart = (logits[..., :, None] - logits[..., None, :]).abs()
        found += [(F.linear(dy[-1], c).abs() / along).amax(-1), rms(logits) / norm, (apart / pairs).amax((-2, -1))]
        return torch.stack(found)
    return ratios


def sublayers(model):
    def f(x):
        streams = []
        for block in model.blocks:
            for sublayer in (block.attention, block.mlp):
                x = torch.lerp(x, sublayer(x), model.mix)
                streams.append(x)
        return torch.stack(streams)
    return f


@pytest.mark.parametrize("case, kind", BOTH, ids=named)
def test_every_ellipsoid_survives_attack(case, kind):
    """Untuned, tuned and with random weights: after each sublayer in every direction, and end to end."""
    model = random_model(kind, norm=1.3, blocks=2, **case).requires_grad_(False)
    model.embedding_VD *= 1.6 / rms(model.embedding_VD).max()  # R = 1.6
    bound, free = certificate(model), tuned(model, 6)
    assert certificate(model, free=free)["ellipsoid_log10"] <= bound["ellipsoid_log10"]
    assert bound["log10"] == min(bound["product_log10"], bound["ellipsoid_log10"])
    all_claims = [claims(model, weights) for weights in (None, free, random_free(model))]
    product = 10 ** bound["product_log10"] / model.config.final_scale

    def lengths(y, dy):
        end = rms(F.linear(dy[-1], model.head_VD))[None] / product
        return torch.cat([*(claim(y, dy) for claim in all_claims), end])

    R = 10 ** bound["rows"][0]["radius_log10"]
    found = attack(sublayers(model), R, T, D, lengths, restarts=24, steps=20)
    assert found.max() <= 1 + 1e-9


@torch.no_grad()
def test_a_token_gives_itself_at_least_what_the_last_one_does():
    """Step 1 of shakespeare.py: no position of a causal softmax of a bias by distance has less of itself."""
    for seed in range(20):
        bias_T = 3 * torch.randn(T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        own = [bias_T[:t + 1].softmax(0)[0] for t in range(T)]
        assert min(own) == own[-1] and own[0] == 1


def test_the_first_positions_own_share_is_caught():
    """The certificate with the share of the first position, 1, instead of the last's is broken by the attack."""
    model = random_model("random", blocks=2, **dict(CASES[9], residual_scale=3.0)).requires_grad_(False)
    wrong = copy.deepcopy(model)
    for block in wrong.blocks:
        block.bias_HT.data = block.bias_HT[:, :1]
    right, wrong = claims(model, None), claims(wrong, None)
    found = attack(sublayers(model), 1.0, T, D, lambda y, dy: torch.cat([right(y, dy), wrong(y, dy)]), restarts=16)
    assert found[:len(found) // 2].max() <= 1 < found[len(found) // 2:].max()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("case", [CASES[i] for i in (0, 1, 3, 4, 6)], ids=named)
def test_the_moved_pattern_is_in_its_ellipsoid(case, turned):
    """Steps 1 to 5: how attention changes if only its pattern does, in every direction. Turned: queries and keys
    that meet only if RoPE turns one against the other.
    """
    model = random_model("random", norm=1.5, **case).requires_grad_(False)
    block, R = model.blocks[0], 1.5
    if turned:
        E = D // case["heads"]
        block.q *= (torch.arange(D) % E == E // 2)[:, None]
        block.k *= (torch.arange(D) % E == 0)[:, None]
    model.embedding_VD.data *= R / rms(model.embedding_VD).max()
    parts = []
    for free in (None, random_free(model)):
        (S, log), = on_the_way(model, free)[1]
        parts.append((S, log + math.log(D) * 2 + 2 * (math.log(D) * 2 + 2 * math.log(R * (1 + 1e-9)))))

    def pattern(x):
        """Attention with the values held, so that only the pattern moves."""
        v_BHTE = F.linear(x.detach(), block.v).unflatten(-1, (case["heads"], -1)).transpose(1, 2)
        q, k = (F.linear(x, W).unflatten(-1, (case["heads"], -1)).transpose(1, 2) for W in (block.q, block.k))
        if case["positions"] == "rope":
            q = shakespeare.rotate(q)
            k = shakespeare.rotate(k)
        distance = torch.arange(T)[:, None] - torch.arange(T)
        logits = case["logit_scale"] * case["heads"] / D * q @ k.mT
        if case["positions"] == "bias":
            logits = logits + block.bias_HT[:, distance.clamp(min=0)]
        y_BHTE = logits.masked_fill(distance < 0, -math.inf).softmax(-1) @ v_BHTE
        return block.attention_scale * F.linear(y_BHTE.transpose(1, 2).flatten(-2), block.o)

    x = torch.randn(2, T, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(pattern(x), block.attention(x))
    found = attack(pattern, R, T, D, lambda y, dy: torch.stack([gauge(model.mix * dy, *part) for part in parts]))
    assert max(found) <= 1 and (found[0] > 0.01 or turned)


@torch.no_grad()
@pytest.mark.parametrize("gap", [2.0**-12, 2.0**-20, 0.0])
def test_what_cancels_is_not_certified_away(gap):
    """The first block writes along u alone, the second reads along r: what is left is r u = gap^2, or, of float32
    vectors orthogonal but for rounding, some 1e-9. Rounding in G S G^T must not pass for less. T = 1, and linear.
    """
    model = random_model("random", positions="bias", blocks=2, width=4, heads=1, hidden=4, seq_len=1, logit_scale=0.0,
                         activation="maxmin", attention_scale=1.0, residual_scale=4.0, vocabulary="abcd")
    for p in model.parameters():
        p.zero_()
    generator, (first, second), half = torch.Generator().manual_seed(1739), model.blocks, 2**-0.5
    u, r, w = (F.normalize(torch.randn(4, generator=generator), dim=0) for _ in range(3))
    r = F.normalize(r - u * (u @ r), dim=0)
    if gap:
        u, r = torch.tensor([1, 1 + gap, 0, 0]), torch.tensor([1, gap - 1, 0, 0])
    for W in (model.embedding_VD, model.head_VD, first.v, first.o, second.o):
        W += torch.eye(4)
    first.w_in[0::2], first.w_out[:, 0::2] = half * w, half * u[:, None].double()
    second.v[0] = r
    second.w_in[0, 0] = second.w_in[2, 0] = second.w_out[0, 0] = second.w_out[0, 2] = half
    x = torch.eye(4).double()[:, None]
    J = F.linear(model.blocks(x), model.head_VD)[:, 0].T
    found = torch.linalg.matrix_norm(J, ord=2).item()
    assert 0 < found <= 10 ** certificate(model)["log10"]


@torch.no_grad()
def test_the_tokens_ellipsoid_is_reached():
    """Where attention and its stream only halve, and half of GeLU's inputs are lost: exactly, by large tokens."""
    model = random_model(width=8, hidden=8, heads=1)
    block, R = model.blocks[0], 50.0
    block.o.zero_()
    block.w_in.copy_(shakespeare.GELU_SCALE * torch.eye(8))
    block.w_out.copy_(-torch.eye(8))
    model.embedding_VD.fill_(-R)
    (kind, _, [(X, log_X)]), *_ = on_the_way(model)[0]
    assert kind == "token"
    assert gauge(model.blocks(-R * torch.ones(1, 1, 8).double()), X, log_X).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("activation", ["gelu", "maxmin"])
def test_slopes_and_values_of_the_mlp(activation):
    """The stream with its MLP, its difference and its value, are A z + B v with |v_i| <= |(J z)_i|."""
    model = random_model("random", activation=activation, heads=1, residual_scale=1.4, norm=2.0).requires_grad_(False)
    block, g = model.blocks[0], shakespeare.GELU_SLOPE
    z, dz = 2 * torch.randn(2, 500, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value, moved = torch.func.jvp(lambda x: torch.lerp(x, block.mlp(x), model.mix), (z,), (dz,))
    h = F.linear(z, block.w_in)
    for spread, x, y in ((0.5, z, value), (g - 0.5, dz, moved)):
        J, A, B = mlp_parts(block, spread)
        Jx = F.linear(x, J)
        if activation == "maxmin":
            above = (h[:, :16] - h[:, 16:]).sign()  # of the pair: by it the difference stays or changes its sign
            v = above * Jx
        elif spread == 0.5:
            v = (F.gelu(h, approximate="tanh") - h / 2) / spread
        else:
            slope = torch.func.jvp(lambda t: F.gelu(t, approximate="tanh"), (h,), (torch.ones_like(h),))[1]
            v = (slope - 0.5) * Jx / spread
        assert (v.abs() <= Jx.abs() * (1 + 1e-12)).all()
        torch.testing.assert_close(F.linear(x, A) + F.linear(v, B), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", ["gelu", "maxmin"])
def test_the_stream_and_the_mlp_against_enumeration(activation):
    """Never below the worst swaps, or slopes at the ends of their range, and near them if tuned."""
    model = random_model("random", width=4, hidden=8, heads=1, residual_scale=1.5, activation=activation, norm=1.4)
    block, a, eye = model.requires_grad_(False).blocks[0], model.mix, torch.eye(4).double()
    g, worst = shakespeare.GELU_SLOPE, 0.0
    for bits in itertools.product((0.0, 1.0), repeat=8):
        bits = torch.tensor(bits, dtype=torch.float64)
        if activation == "gelu":
            J = torch.diag(bits * g + (1 - bits) * (1 - g)) / shakespeare.GELU_SCALE
        else:
            stay, swap = torch.diag(1 - bits[:4]), torch.diag(bits[:4])
            J = torch.cat([torch.cat([stay, swap], 1), torch.cat([swap, stay], 1)])
        worst = max(worst, sigma((1 - a) * eye + a * block.w_out @ J @ block.w_in).item())
    parts = mlp_parts(block, g - 0.5)

    def bound(free):
        neurons = free.setdefault("neurons", torch.zeros(len(parts[0])).double())
        share = free.setdefault("share", torch.zeros(()).double())
        return ellipsoid_norm(*ellipsoid_layer(eye, 0.0, *parts, neurons, share), eye)

    untuned = bound({}).exp().item()
    best = bound(tune(bound, {}, 40)).exp().item()
    assert worst <= best <= untuned and best < 1.15 * worst


@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[9], None], ids=["rope", "bias", "position", "product"])
def test_weights_trained_to_break_the_certificate_do_not(case):
    """Gradient ascent on found / certified over the weights themselves, of the ellipsoid and of the product."""
    model = random_model("random", **(case or dict(heads=4, attention_scale=1.0)))
    block = model.blocks[0]
    x, dx = torch.randn(2, 8, T, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model.embedding_VD.data[0] = 1.0  # R = 1, whatever else there is
    weights = [W for _, W in block.matrices()]
    optimizer = torch.optim.Adam([x.requires_grad_(), dx.requires_grad_(), *weights], lr=0.03)
    ratios = []
    for _ in range(100):
        inside = x / rms(x).clamp(min=1)[..., None]
        f = block if case else block.attention
        _, moved = torch.func.jvp(f, (inside,), (dx / rms(dx)[..., None],))
        found = rms(moved).amax()
        if case:
            certified = (ellipsoid_norm(*follow(model)[0], torch.eye(D).double()) - math.log(D) / 2).exp()
            ratios.append(found.item() / certified.item())
        else:  # ascended is the ratio to a form of the product that is quick to differentiate
            certified = sigma(block.o) * sigma(block.v.view(4, 4, D)).norm() * (1 + 2 * sigma(block.q) * sigma(block.k))
            row = certificate(model)["rows"][0]
            ratios.append(found.item() / (row["value"] + row["pattern"]))
        optimizer.zero_grad()
        (certified / found).log().backward()
        optimizer.step()
    assert max(ratios) <= 1 and max(ratios) > 1.2 * ratios[0]


def test_tuning_helps_and_leaves_what_it_is_given():
    for case in (CASES[1], CASES[9]):
        model = random_model("random", norm=1.3, blocks=2, **case)
        free = tuned(model, 20)
        before = copy.deepcopy(free)
        for_pairs = tuned(model, 10, free, pairs=True)
        assert all(torch.equal(free[name], before[name]) for name in free)

        exact = shakespeare.exact_copy(model)

        def mean_pair(free):
            log_VV = ellipsoid_pairs(*follow(exact, free)[-1], exact.head_VD)
            return log_VV[log_VV > -math.inf].mean().item()

        logs = [certificate(model, free=weights)["ellipsoid_log10"] for weights in (None, free, for_pairs)]
        assert logs[1] < logs[0] and mean_pair(for_pairs) < mean_pair(free) < mean_pair(None)


# ---- numbers that leave the range --------------------------------------------------------------------
def test_a_constant_of_10_to_the_330_is_a_number():
    """130 blocks of norm 6, a = 1/2: the product, from its rows, in decimal arithmetic without limit."""
    model = random_model("orthogonal", width=8, hidden=8, blocks=130, heads=2, norm=6.0, residual_scale=130.0)
    bound, half = certificate(model), Decimal(0.5)
    R, L = Decimal(bound["norms"]["embedding"]), Decimal(bound["norms"]["head"])
    for row in bound["rows"]:
        value, pattern, mlp, gain = (Decimal(row[name]) for name in ("value", "pattern", "mlp", "mlp_gain"))
        L *= (half + half * (value + pattern * R * R)) * (half + half * mlp)
        R *= (half + half * value) * (half + half * gain)
    assert bound["product_log10"] == pytest.approx(float(L.log10()), rel=1e-9) and float(L.log10()) > 330
    assert bound["radius_log10"] == pytest.approx(float(R.log10()), rel=1e-9)
    assert 0 < bound["log10"] == bound["ellipsoid_log10"] <= bound["product_log10"] < math.inf
    values = [v for row in bound["rows"] for v in row.values()] + list(bound["norms"].values())
    assert all(map(math.isfinite, values))
    with pytest.raises(OverflowError):
        10 ** bound["product_log10"]
    assert shakespeare.power(bound["log10"]).startswith("10^")


@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[9]], ids=["rope", "bias", "position"])
def test_certificate_of_extremes(case):
    model = random_model(blocks=2, **case)
    tokens = torch.randint(8, (25,), generator=torch.Generator().manual_seed(0))
    for what in ("embedding", "o", "w_in", "blocks", "head"):
        changed = copy.deepcopy(model)
        for name, W in changed.named_parameters():
            if what in name and "bias" not in name:
                W.data.zero_()
        for free in (None, tuned(changed, 2), random_free(changed)):
            bound = certificate(changed, 0.01, free)
            assert not any(map(math.isnan, (bound["log10"], bound["ellipsoid_log10"], bound["radius_log10"])))
            assert (bound["log10"] == -math.inf) == (what == "head" or what == "blocks" and model.mix == 1)
            assert not any(math.isnan(v) for row in bound["rows"] for v in row.values())
        assert not math.isnan(certificate(changed)["ellipsoid_log10"])
        if what == "head":  # all logits tie
            assert not any(stands.any() for stands in shakespeare.certified_tokens(changed, tokens).values())
    for name, W in model.named_parameters():
        good, W.data = W.data, W.data.clone()
        W.data.view(-1)[0] = math.nan
        for what in (certificate, tuned, lambda m: shakespeare.certified_tokens(m, tokens)):
            with pytest.raises(UserError, match="not finite"):
                what(model)
        W.data = good


def test_a_constant_of_zero_is_a_word_in_the_files(tmp_path):
    out, summary = run(tmp_path, final_scale=0.0)
    assert summary["lipschitz_log10"] == "-inf" and set(summary["certified_token_accuracy"].values()) == {0.0}
    lines = (out / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["lipschitz_log10"] for line in lines] == ["-inf"] * 2


# ---- certified tokens --------------------------------------------------------------------------------
def predicted_windows(monkeypatch, model, tokens):
    """What the model says taken as the truth, so that every position is right. Returns (x_BT, predicted_BT)."""
    batches = list(shakespeare.windows(tokens, T))
    right = [(x_BT, model(x_BT, torch.float64).argmax(-1)) for x_BT, _ in batches]
    monkeypatch.setattr(shakespeare, "windows", lambda *a, **k: iter(right))
    return torch.cat([x for x, _ in right]), torch.cat([y for _, y in right])


TOKENS = torch.randint(8, (601,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", [CASES[i] for i in (1, 4, 9)], ids=["rope", "bias", "position"])
def test_certified_tokens_survive_attack(case, monkeypatch):
    """Projected gradient ascent on the embeddings of every token flips no certified prediction; some others it does."""
    model = random_model("random", blocks=2, **case).requires_grad_(False)
    x_BT, predicted = predicted_windows(monkeypatch, model, TOKENS)
    rho, none = 0.03, torch.zeros(x_BT.shape, dtype=torch.bool)
    certified = shakespeare.certified_tokens(model, TOKENS, None, (rho, 1e-9))
    stands = certified[rho].view_as(none)
    assert 0.02 < stands.double().mean() < 0.99 and (certified[1e-9] | ~certified[rho]).all()
    clean, flipped = F.embedding(x_BT, model.embedding_VD), none.clone()
    for target in range(8):  # towards each character at all positions
        d = torch.zeros_like(clean)
        for _ in range(20):
            d.requires_grad_()
            out = F.linear(model.blocks(clean + d), model.head_VD)
            flipped |= out.argmax(-1) != predicted
            margin = out[..., target] - out.gather(-1, predicted[..., None])[..., 0]
            gradient, = torch.autograd.grad(margin.sum(), d)
            d = (d + 0.3 * rho * gradient / rms(gradient)[..., None].clamp(min=1e-30)).detach()
            d = d * (rho / rms(d).clamp(min=rho))[..., None]
    assert not (flipped & stands).any() and flipped.any()


@torch.no_grad()
def test_certified_tokens_by_brute_force():
    """Steps 2 and 3 of shakespeare.py, position by position and pair by pair, from S itself and from the product."""
    # In the second the product without the head is well above 1, in the third the ball is larger by rho: both count.
    for kind, case, rho in (("random", CASES[9], 0.01), ("orthogonal", CASES[2], 0.01), ("random", CASES[6], 0.1)):
        model = random_model(kind, blocks=2, **case)
        model.head_VD *= 3
        (S, log), bound = certificate(model, rho, tuned(model, 20, None, pairs=True))["end"], certificate(model, rho)
        expected = []
        for x_BT, y_BT in shakespeare.windows(TOKENS, T):
            for f_V, y in zip(model(x_BT, torch.float64).flatten(0, 1), y_BT.flatten()):
                stands = True
                for j in set(range(8)) - {y.item()}:
                    u = model.head_VD[y] - model.head_VD[j]
                    product = u.norm() * D**0.5 * 10 ** bound["body_log10"]
                    constant = min((u @ S @ u).sqrt() * math.exp(log / 2), product)
                    stands &= (f_V[y] - f_V[j] > rho * constant).item()
                expected.append(stands)
        certified = shakespeare.certified_tokens(model, TOKENS, None, (rho,))[rho]
        assert certified.tolist() == expected and 0 < sum(expected) < len(expected)


@torch.no_grad()
def test_exact_ties_are_never_certified(monkeypatch):
    """Two identical rows of the head: a position that either wins is a tie, however small rho is."""
    model = random_model("random", blocks=2, **CASES[9])
    model.head_VD[1] = model.head_VD[0]
    _, predicted = predicted_windows(monkeypatch, model, TOKENS)
    stands = shakespeare.certified_tokens(model, TOKENS, None, (1e-12, 1e-300))
    tied = (predicted <= 1).flatten()
    for rho in stands:
        assert tied.any() and not stands[rho][tied].any() and stands[rho][~tied].any()


# ---- model and published checkpoints ----------------------------------------------------------------


ARGS = dict(vocab_size=65, num_heads=4, d_embed=32, num_blocks=2, softmax_scale=1, final_scale=1, residual_scale=1)


def published(path, **replaced):
    """A checkpoint in the authors' format: object arrays of pickled dictionaries, lists of matrices by index."""
    weights = {i: [REFERENCE[f"gpt_weight_{i}"]] for i in range(14)}
    content = dict(args=ARGS, results=dict(val_losses=[0.0]), weights_checkpoint_0=weights)
    content.update(replaced)
    np.savez(path, **{k: np.array(v, dtype=object) for k, v in content.items()})
    return path


def test_parity_with_the_reference_through_its_own_format(tmp_path):
    """Logits recorded from the authors' GPT, from a file in their form, with or without references to absent code."""
    tokens, logits = torch.from_numpy(REFERENCE["gpt_tokens"]), torch.from_numpy(REFERENCE["gpt_logits"])
    _, model = load_published(published(tmp_path / "plain.npz"))
    torch.testing.assert_close(model(tokens), logits, rtol=0, atol=1e-5)
    module = types.ModuleType("modula_that_is_not_there")
    exec("def soft_cap(): pass", module.__dict__)
    module.soft_cap.__module__ = module.__name__
    sys.modules[module.__name__] = module
    try:
        path = published(tmp_path / "refs.npz", args=dict(ARGS, project=dict(default=module.soft_cap)))
    finally:
        del sys.modules[module.__name__]
    _, model = load_published(path)
    torch.testing.assert_close(model(tokens), logits, rtol=0, atol=1e-5)


class Payload:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@torch.no_grad()
def test_attention_is_causal():
    for case in CASES:
        model = random_model(blocks=2, **case)
        x = torch.randint(8, (1, 6), generator=torch.Generator().manual_seed(3))
        y = x.clone()
        y[0, 4] = (y[0, 4] + 1) % 8
        a, b = model(x, torch.float64), model(y, torch.float64)
        assert torch.equal(a[0, :4], b[0, :4]) and not torch.allclose(a[0, 4:], b[0, 4:])


def test_rotation_reflects_pairs_and_products_depend_on_distance_only():
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    many_q, many_k = (shakespeare.rotate(z.expand(1, 1, 9, 8))[0, 0] for z in (q, k))
    torch.testing.assert_close(many_q.norm(dim=-1), q.norm().expand(9))
    products = many_q @ many_k.T
    for distance in range(9):
        along = products.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along))
    assert (products[1:, 0] - products[0, 0]).abs().min() > 1e-3
    angle = 5 / 10000 ** (torch.arange(4).double() / 4)
    reflections = torch.stack([angle.cos(), angle.sin(), angle.sin(), -angle.cos()], -1).view(4, 2, 2)
    pairs = (reflections @ q.view(2, 4).T[:, :, None])[:, :, 0]
    torch.testing.assert_close(many_q[5], pairs.T.flatten())


def test_validation_covers_every_token_once():
    tokens = torch.arange(1003)
    seen = torch.cat([y.flatten() for _, y in shakespeare.windows(tokens, 24, batch=5)])
    assert torch.equal(seen, torch.arange(1, 1003))
    assert all(torch.equal(x + 1, y) for x, y in shakespeare.windows(tokens, 24))


def test_samples_are_reproducible_and_temperature_zero_is_greedy():
    model = random_model(vocabulary="\nabcdefg")

    def draw(**options):
        return shakespeare.sample(model, Config(prompt="ab", length=12, **options), torch.float64)

    assert draw(temperature=1.0) == draw(temperature=1.0) != draw(temperature=1.0, seed=1)
    greedy = draw(temperature=0.0)
    assert greedy == draw(temperature=0.0, seed=1) == draw(temperature=1e-9) and len(greedy) == 2 + 12
    assert draw(temperature=1.0) != greedy


# ---- training ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_optimizer_with_every_constraint(optimizer, constraint, tmp_path, capsys):
    lr = 0.5 if optimizer == "muon" else 0.05
    out, summary = run(tmp_path, optimizer=optimizer, constraint=constraint, lr=lr, w_max="1.2")
    assert math.isfinite(summary["val_loss"]) and 0 <= summary["val_accuracy"] <= 1
    assert summary["norms"]["embedding"] <= 1 + 1e-6
    within = summary["max_weight_norm"] <= 1.2 * (1 + 1e-4)
    assert ("ABOVE ITS LIMIT" in capsys.readouterr().out) == (not within and constraint != "none")
    if constraint in ("soft_cap", "hard_cap", "specnorm", "stiefel"):
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


def test_learning_rates_rise_over_the_warmup_and_fall_to_zero(tmp_path, monkeypatch):
    rates = []

    def record(optimizers, factor):
        set_rates(optimizers, factor)
        rates.append([group["lr"] for optimizer in optimizers for group in optimizer.param_groups])

    set_rates = shakespeare.set_learning_rates
    monkeypatch.setattr(shakespeare, "set_learning_rates", record)
    peaks = torch.tensor([0.5, 0.02, 0.1]).double()
    for warmup, rising in ((0, [1, 1, 1, 1]), (1, [1, 1, 1, 1]), (3, [1 / 3, 2 / 3, 1, 1])):
        rates.clear()
        run(tmp_path / str(warmup), steps=4, warmup=warmup, lr=0.5, positions="bias")
        factors = torch.tensor([1, 3 / 4, 2 / 4, 1 / 4]).double() * torch.tensor(rising).double()
        torch.testing.assert_close(torch.tensor(rates).double(), factors[:, None] * peaks)


def test_adamw_has_betas_and_a_warmup_of_its_own_and_not_a_presets_rate():
    config = Config.of("paper_adamw")
    assert (config.momentum, config.warmup, config.lr) == (0.9, 100, 0.0)
    for preset in ("laptop", "certified", "lipschitz2"):
        with pytest.raises(UserError, match="is the preset's, for Muon.*--lr 0.003"):
            Config.of(preset, optimizer="adamw").limits()
        assert Config.of(preset, optimizer="adamw", lr=0.003).limits()
    assert parse_arguments([]).lr == 0.08 and parse_arguments(["--lr", "0.5"]).lr == 0.5
    assert Config.of("plain100", steps=3).steps == 3 and Config.of("plain100").final_scale == 64


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
    local = tmp_path / "here" / "tinyshakespeare" / "input.txt"
    local.parent.mkdir(parents=True)
    local.write_text(text)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "here"))
    assert shakespeare.load_text("auto") == (text, str(local))
    monkeypatch.delenv("DATA_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cached = tmp_path / "cache" / "tinyshakespeare" / "input.txt"
    monkeypatch.setattr(shakespeare, "TEXT_SHA256", hashlib.sha256(text.encode()).hexdigest())
    answers = [OSError("no network"), b"something else", text.encode()]

    def urlopen(url, timeout):
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr(shakespeare.urllib.request, "urlopen", urlopen)
    for reason in ("no network", "is another text"):
        assert shakespeare.load_text("auto") == (shakespeare.stand_in(), "stand-in") and not cached.exists()
        banner = capsys.readouterr().out
        assert reason in banner and "DATA_DIR" in banner and "STAND-IN" in banner and banner.count("\n") == 2
    for _ in range(2):  # from the network, then from the cache
        assert shakespeare.load_text("auto") == (text, str(cached)) and not answers

    monkeypatch.setenv("XDG_CACHE_HOME", str(local))  # no folder can be there
    answers.append(text.encode())
    assert shakespeare.load_text("auto")[1] == "stand-in" and str(local) in capsys.readouterr().out
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: Path("~").resolve(strict=True))  # fails, as where nobody has a home
    assert shakespeare.load_text("auto")[1] == "stand-in"


def test_holdout_is_the_end_of_the_training_text():
    train, validation, vocabulary, _ = shakespeare.load_data(Config(data="stand-in", seq_len=24))
    less, held, same_vocabulary, name = shakespeare.load_data(Config(data="stand-in", seq_len=24, holdout=True))
    assert torch.equal(torch.cat([less, held]), train) and len(held) == len(train) - int(0.9 * len(train))
    assert vocabulary == same_vocabulary and "held out" in name and len(validation) > 0


WRONG_TEXTS = {  # and what is said of them
    "not utf-8": (b"\xff\xfe\x00" * 9999, "iconv"), "code page": ("caf\u00e9 ".encode("cp1252") * 999, "iconv"),
    "utf-16": ("hello world ".encode("utf-16") * 999, "iconv"), "empty": (b"", "has 0 characters"),
    "only a mark": (b"\xef\xbb\xbf", "has 0 characters"), "short": (b"hello", "give 500 or more"),
    "one character": (b"a" * 9999, "1 different"), "missing": (None, "no such file"), "folder": (None, "no such file"),
    "many characters": ("".join(map(chr, range(0x4E00, 0x9E00))).encode(), "4096 different")}


@pytest.mark.parametrize("kind", WRONG_TEXTS)
def test_wrong_text(kind, tmp_path):
    path, (content, says) = tmp_path / "text", WRONG_TEXTS[kind]
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(content)
    with pytest.raises(UserError, match=says) as error:
        shakespeare.main(Config(**{**TINY, "data": str(path), "out": str(tmp_path / "run")}))
    message = str(error.value)
    assert str(path) in message and "\n" not in message and not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["plain", "mark", "crlf", "4000 characters"])
def test_texts_that_work(kind, tmp_path, monkeypatch):
    """With what is read of them; and a path from the home folder."""
    many = "".join(map(chr, range(0x4E00, 0x4E00 + 4000)))
    text = {"crlf": "ab\r\ncd\r" * 300, "4000 characters": many}.get(kind, "ab\u00e9\n" * 300)
    (tmp_path / "text").write_bytes(text.encode("utf-8-sig" if kind == "mark" else "utf-8"))
    monkeypatch.setenv("HOME", str(tmp_path))
    train, validation, vocabulary, _ = shakespeare.load_data(Config(data="~/text", seq_len=24))
    plain = text.replace("\r\n", "\n").replace("\r", "\n")
    assert "".join(vocabulary[i] for i in torch.cat([train, validation])) == plain
    assert vocabulary == "".join(sorted(set(plain))) and len(train) == int(0.9 * len(plain))


# ---- going on ----------------------------------------------------------------------------------------
def test_killed_and_started_again_is_bit_identical(tmp_path, small_stand_in):
    """The same command again after SIGKILL, and once more when all is done."""
    (tmp_path / "text").write_text(small_stand_in)
    flags = ["--preset", "paper", "--data", tmp_path / "text", "--steps", 60, "--evals", 12, "--batch", 16,
             "--width", 32, "--blocks", 1, "--heads", 2, "--hidden", 64, "--seq_len", 32, "--length", 5]
    shakespeare.main(parse_arguments(list(map(str, [*flags, "--out", tmp_path / "whole"]))))
    again = [*flags, "--out", tmp_path / "killed"]
    process = subprocess.Popen([sys.executable, ROOT / "shakespeare.py", *map(str, again)], stdout=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state_of(tmp_path / "killed")["step"] < 60 and not (tmp_path / "killed" / "summary.json").exists()
    assert command(*again)[::2] == (0, "")
    whole, killed = state_of(tmp_path / "whole"), state_of(tmp_path / "killed")
    assert same(whole["model"], killed["model"]) and same(whole["optimizers"], killed["optimizers"])
    lines = (tmp_path / "killed" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(5, 61, 5))


def test_control_c_saves_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    """Bit-identical to a run without a stop, with AdamW. A finished run says so, and nothing is written."""
    flags = dict(optimizer="adamw", constraint="hard_cap", steps=12, evals=3, positions="bias", lr=0.01)
    whole, summary = run(tmp_path / "a", **flags)
    choose_batch = shakespeare.choose_batch

    def stop_at_6(step, *args):
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return choose_batch(step, *args)

    stopped = tmp_path / "b" / "run"
    with monkeypatch.context() as patch:
        patch.setattr(shakespeare, "choose_batch", stop_at_6)
        with pytest.raises(KeyboardInterrupt, match=f"saved at step 7.* --out {stopped}"):
            run(tmp_path / "b", **flags)
    assert state_of(stopped)["step"] == 7 and not (stopped / "summary.json").exists()
    (stopped / "log.jsonl").write_text('{"step": 4, "cut off')
    assert run(tmp_path / "b", **flags)[1]["val_loss"] == summary["val_loss"]
    assert same(state_of(whole)["model"], state_of(stopped)["model"])
    lines = (stopped / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 8, 12]
    capsys.readouterr()
    before = {p.name: p.read_bytes() for p in stopped.iterdir()}
    assert run(tmp_path / "b", **flags)[1]["val_loss"] == summary["val_loss"]
    assert "finished" in capsys.readouterr().out
    assert before == {p.name: p.read_bytes() for p in stopped.iterdir()}


@pytest.mark.parametrize("changes, says", [
    (dict(steps=7), "--steps 6, not 7"), (dict(final_scale=2), "--final_scale 1.0, not 2.0"),
    (dict(lr=0.3), "--lr 0.0, not 0.3")])
def test_a_setting_that_differs_from_the_run_names_both_values(changes, says, tmp_path):
    out, _ = run(tmp_path)
    before = (out / "checkpoint.pt").read_bytes()
    with pytest.raises(UserError, match=says):
        run(tmp_path, **changes)
    assert before == (out / "checkpoint.pt").read_bytes()


@pytest.mark.parametrize("kind", ["truncated", "code", "other settings", "other data"])
def test_wrong_checkpoints(kind, tmp_path):
    out, _ = run(tmp_path)
    (out / "summary.json").unlink()
    path, state, witness, changes = out / "checkpoint.pt", state_of(out), tmp_path / "witness", {}
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:3000])
    elif kind == "code":
        torch.save(dict(state, model=Payload(os.system, f"touch {witness}")), path)
    elif kind == "other settings":
        torch.save(dict(state, config=dict(state["config"], width=32)), path)
    else:
        (tmp_path / "text").write_text("other words " * 2000)
        changes = dict(data=str(tmp_path / "text"))
    with pytest.raises(UserError, match="another text" if changes else "is no checkpoint of shakespeare.py") as error:
        run(tmp_path, **changes)
    assert "\n" not in str(error.value) and not witness.exists()


def test_constraints_of_ones_own_run_in_training_only(tmp_path):
    witness = tmp_path / "witness"
    function = "def mine(W, w_max, step_norm=0.0):\n    return W\n"
    (tmp_path / "mine.py").write_text(f"open({str(witness)!r}, 'w')\n\n{function}")
    out, _ = run(tmp_path, constraint=f"{tmp_path}/mine.py:mine")
    witness.unlink()
    shakespeare.find_constraint.cache_clear()
    assert len(shakespeare.main(Config(sample=str(out), length=3))) == 3 and not witness.exists()


def test_divergence_stops_and_keeps_the_last_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"step \d+: training has diverged"):
        run(tmp_path, optimizer="adamw", constraint="none", lr=1e30, steps=10, evals=1)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


class NoFloat64(torch.utils._python_dispatch.TorchDispatchMode):
    """As on mps, of which the device meta takes the place: there are no doubles."""

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        result = f(*args, **(kwargs or {}))
        assert not any(isinstance(x, torch.Tensor) and x.is_meta and x.dtype == torch.float64
                       for x in (result if isinstance(result, (tuple, list)) else [result])), f
        return result


@pytest.mark.parametrize("case", [CASES[i] for i in (1, 5, 9)], ids=["rope", "bias", "position"])
def test_a_device_without_float64_can_train(case):
    model = random_model(**case).float().to("meta")
    with NoFloat64():
        logits = model(torch.zeros(2, T, dtype=torch.int64, device="meta"))
        F.cross_entropy(logits.flatten(0, 1), torch.zeros(2 * T, dtype=torch.int64, device="meta")).backward()
        torch.optim.Adam(model.parameters()).step()
        constraints.cap_rows(model.embedding_VD.data)
        with pytest.raises(AssertionError):
            model.head_VD.double()


# ---- bad input: one line, exit status 2, nothing written ---------------------------------------------
@pytest.mark.parametrize("flags, says", [
    (["--w_max", "-1"], "--w_max"), (["--w_max", "nan"], "--w_max"), (["--w_max", "1,2"], "7 of them"),
    (["--steps", "-1"], "--steps"), (["--lr", "nan"], "--lr"), (["--heads", "3"], "must divide"),
    (["--heads", "256", "--preset", "paper"], "even"), (["--logit_scale", "0", "--preset", "paper"], "rope"),
    (["--hidden", "7"], "even"), (["--residual_scale", "9"], "at most"), (["--warmup", "-1"], "--warmup"),
    (["--temperature", "-1"], "--temperature"), (["--data", "/no/such/file"], "no such file"),
    (["--sample", "/no/such/run"], "/no/such/run: has no checkpoint.pt"), (["--optimizer", "adamw"], "for Muon"),
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


def test_a_sample_of_nothing_names_the_runs_that_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is none in runs/"):
        shakespeare.main(Config(sample="runs/nothing"))
    Path("runs/shakespeare_mine").mkdir(parents=True)
    Path("runs/shakespeare_mine/checkpoint.pt").touch()
    with pytest.raises(UserError, match="runs/nothing: .*runs/shakespeare_mine"):
        shakespeare.main(Config(sample="runs/nothing"))


def test_by_command_help_is_complete_and_an_error_is_one_line(tmp_path):
    status, out, _ = command("--help")
    assert status == 0
    for name in [f"--{field.name}" for field in dataclasses.fields(Config)] + list(shakespeare.PRESETS):
        assert name in out
    status, out, err = command("--w_max", "-1", "--out", tmp_path / "run")
    assert status == 2 and err.count("\n") == 1 and "-1" in err and "above 0" in err and not out


SHORT = [f"--{name}={value}" for name, value in TINY.items() if name != "data"]


def test_by_command_any_terminal_shows_any_text_and_path(tmp_path):
    """A code page without the letters of the text, of its path and of the prompt; a notebook, with no terminal."""
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 300))) * 4
    path = tmp_path / "\u6f22.txt"
    path.write_text(text)
    arguments = ["--data", path, *SHORT, "--preset=paper", "--blocks=1", "--steps=1", "--prompt", text[:3], "--out"]
    status, out, err = command(*arguments, tmp_path / "a", encoding="cp1252")
    assert (status, err) == (0, "") and "?" in out
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["data"] == str(path)
    status, out, err = command(*arguments, tmp_path / "b", stdout=io.StringIO())
    assert (status, err) == (0, "") and text[:3] in out
