"""shakespeare.py: its certificate against attacks step by step, its data, its behaviour."""

import copy
import hashlib
import io
import itertools
import json
import math
import signal
import sys
import types
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matrices import randn, sigma_limit, with_spectrum
from tiny import checkpoint, same

import constraints
import shakespeare

sys.path.insert(0, str(Path(__file__).parent.parent / "results"))

import published as results_published  # noqa: F401  test_verify_lipschitz.py takes it from here
from constraints import (CONSTRAINTS, ellipsoid_blocks, ellipsoid_layer, ellipsoid_norm,
                         ellipsoid_pairs, root_of, sigma, tune)
from published import load_published
from shakespeare import Config, Transformer, UserError, certificate, parse_arguments, tuned

pytestmark = pytest.mark.usefixtures("little_text", "blank_pictures")
TINY = dict(data="stand-in", width=16, blocks=2, heads=2, hidden=32, seq_len=24, steps=6, batch=4,
            evals=2, length=20)
REFERENCE = np.load(Path(__file__).parent / "reference.npz")


def tune_little(model, steps=1, free=None, pairs=False):
    return tuned(model, 1, free, pairs)


def run(tmp_path, **changes):
    """A tiny run in this process, which leaves its config alone; returns its folder and summary."""
    out = tmp_path / "run"
    config = Config.of("paper", **{**TINY, "out": str(out), **changes})
    before = copy.copy(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shakespeare, "tuned", tune_little)
        summary = shakespeare.main(config)
    assert summary == json.loads((out / "summary.json").read_text()) and config == before
    return out, summary


def random_model(kind="random", seed=0, norm=1.0, vocabulary="abcdefgh", no_bias=False, **changes):
    """A float64 model whose matrices are of one kind, of the RMS->RMS norm asked for."""
    settings = dict(width=16, blocks=1, heads=2, hidden=32, seq_len=6, seed=seed)
    config = Config(**{**settings, **changes})
    model = Transformer(config, vocabulary)
    generator = torch.Generator().manual_seed(seed)
    for i, (role, W) in enumerate(model.matrices()):
        (m, n), r = W.shape, min(W.shape)
        s = torch.rand(r, generator=generator) if kind == "random" else torch.ones(r)
        if kind == "rank 1":
            s[1:] = 0
        W.data = with_spectrum(m, n, (s / s.max()).double(), 100 * seed + i, torch.float64)
        if kind == "permutation":
            order = torch.randperm(max(m, n), generator=generator)
            W.data = torch.eye(max(m, n)).double()[order][:m, :n]
        if kind == "identical heads" and role in "qkv":
            W.data = W.data[: m // config.heads].repeat(config.heads, 1)
        if kind == "identical heads" and role == "o":
            W.data = W.data[:, : n // config.heads].repeat(1, config.heads)
        W.data *= norm * sigma_limit(W, 1.0) / sigma(W.data)
    model = model.double()
    for block in model.blocks:
        if hasattr(block, "bias_HT"):
            bias_HT = torch.randn(block.bias_HT.shape, generator=generator, dtype=torch.float64)
            block.bias_HT.data = 2 * bias_HT * (not no_bias)
    return model


def rms(x):
    return x.square().mean(-1).sqrt()


def lengths_of_differences(y, dy):
    return rms(dy)[None]


def lengths_of_values(y, dy):
    return rms(y)[None]


def attack(f, R, T, D, lengths=lengths_of_differences, restarts=8, steps=30, start=None):
    """The largest of each length (M,) of (f(x), J_f(x) dx) with rms(x_t) <= R, rms(dx_t) <= 1.

    lengths gives (M, restarts, T); each restart makes one of them large. Adam on x and dx at once;
    x is projected into the ball, dx normalised token by token (the maximum is at the border).
    """
    generator = torch.Generator().manual_seed(0)
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
    """What breaks a count without heads: each finds its slice of the value in its own token."""
    D, H, T = model.config.width, model.config.heads, model.config.seq_len
    v_HED = model.blocks[0].v.detach().view(H, D // H, D)
    head_BT = (torch.arange(8)[:, None] + torch.arange(T)) % H
    x = torch.einsum("bte,bted->btd", randn(8, T, D // H), v_HED[head_BT])
    return x * (R / rms(x))[..., None]


# ---- the certificate, step by step ---------------------------------------------------------------
CONTENT = dict(content="all", logit_scale=1.0)
POSITION = dict(content="none")
CAPPED = dict(CONTENT, cap=0.5, logit_scale=6.0)
CASES = [  # attention by content with RoPE, with a bias, with neither; by position; with a cap; mixed
    dict(CONTENT, heads=1, positions="rope", activation="gelu", attention_scale=1 / 3),
    dict(CONTENT, heads=2, positions="rope", activation="gelu", residual_scale=2.0),
    dict(CONTENT, heads=4, positions="rope", activation="maxmin", attention_scale=0.0,
         key_offset=True),
    dict(CONTENT, heads=8, positions="rope", activation="maxmin", residual_scale=0.5),
    dict(CONTENT, heads=2, positions="bias", activation="maxmin", residual_scale=2.0),
    dict(CONTENT, heads=8, positions="bias", activation="gelu", attention_scale=1.0,
         key_offset=True),
    dict(CONTENT, heads=4, positions="bias", activation="gelu", no_bias=True, logit_scale=3.0),
    dict(POSITION, heads=1, activation="gelu", attention_scale=1.0, residual_scale=3.0),
    dict(POSITION, heads=2, activation="maxmin", attention_scale=0.0, residual_scale=4.0),
    dict(POSITION, heads=4, activation="maxmin", attention_scale=1.0),
    dict(POSITION, heads=8, activation="gelu", attention_scale=0.0),
    dict(CAPPED, heads=1, positions="rope", activation="gelu", attention_scale=1.0,
         key_offset=True),
    dict(CAPPED, heads=4, positions="rope", activation="maxmin", residual_scale=2.0,
         key_offset=True),
    dict(CAPPED, heads=2, positions="bias", activation="gelu", cap=3.0),
    dict(content="0", heads=4, activation="maxmin", attention_scale=1.0),
    dict(content="1", heads=2, activation="gelu", residual_scale=2.0),
    dict(CAPPED, content="1", heads=4, activation="gelu", residual_scale=2.0),
    dict(CAPPED, content="0", heads=2, activation="maxmin", attention_scale=1.0)]
KINDS = ("orthogonal", "random", "rank 1", "permutation", "identical heads")
# Each case with orthogonal weights, and every third with one of the others.
BOTH = [(case, KINDS[0]) for case in CASES] + [(case, KINDS[1 + i % 4]) for i, case in enumerate(CASES[::3])]
THREE = {"rope": CASES[1], "bias": CASES[4], "position": CASES[9], "capped": CASES[12]}
three_cases = pytest.mark.parametrize("case", THREE.values(), ids=THREE)
D, T = 16, 6


def named(value):
    if isinstance(value, dict):
        return "-".join(f"{v:.2g}" if isinstance(v, float) else str(v) for v in value.values())
    return str(value)


def test_the_attack_is_strong():
    """A matrix on each token; patterns of heads that each look at one token, which give sqrt(H)."""
    W = randn(D, D)
    found = attack(lambda x: x @ W.T, 1.0, T, D, steps=100)
    assert 0.99 * sigma(W) <= found <= sigma(W)
    for heads in (1, 2, 4):
        model = random_model("orthogonal", **dict(POSITION, heads=heads, attention_scale=1.0))
        bias_HT = torch.full((heads, T), -1e4, dtype=torch.float64)
        bias_HT[torch.arange(heads), torch.arange(heads)] = 0
        model.blocks[0].bias_HT.data = bias_HT
        found = attack(model.blocks[0].attention, 1.0, T, D, steps=100)
        certified = certificate(model)["rows"][0]["value"]
        assert certified == pytest.approx(heads**0.5, rel=1e-6)
        assert 0.99 * certified <= found <= certified


# ---- the product: steps 1 to 7 of THE PRODUCT in constraints.py
ROWS = [(CASES[i], KINDS[n % 2]) for n, i in enumerate((0, 2, 5, 6, 9, 12, 13))]


@pytest.mark.parametrize("case, kind", ROWS, ids=named)
def test_no_sublayer_exceeds_its_row(case, kind):
    """Steps 3 to 6, and their sums with the stream (step 7), at the radius of each."""
    model = random_model(kind, norm=1.5, **case)
    block, row = model.blocks[0], certificate(model)["rows"][0]
    R, R_mlp = 10 ** row["radius_log10"], 10 ** row["radius_mlp_log10"]

    def mixed(x):
        return torch.lerp(x, block.attention(x), model.mix)

    for start in (None, split_tokens(model, R)):
        found = attack(block.attention, R, T, D, start=start)
        assert found <= 10 ** row["alone_log10"]
        assert attack(mixed, R, T, D, start=start) <= 10 ** row["attention_log10"]
    assert attack(block.attention, R, T, D, lengths_of_values) <= row["value"] * R
    assert attack(block.mlp, R_mlp, 1, D) <= row["mlp"]
    assert attack(block.mlp, R_mlp, 1, D, lengths_of_values) <= row["mlp_gain"] * R_mlp


@pytest.mark.parametrize("heads", [1, 4, 8])
def test_the_papers_formula_is_exceeded_and_ours_is_not(heads):
    """beta |o| |v| (1 + 2 s |q| |k|), norms of whole matrices. With one head ours is the same."""
    kind = "random" if heads == 1 else "orthogonal"
    model = random_model(kind, heads=heads).requires_grad_(False)
    block, row = model.blocks[0], certificate(model)["rows"][0]
    gain = (block.attention_scale * sigma(block.o) * sigma(block.v)).item()
    formula = gain * (1 + 2 * (sigma(block.q) * sigma(block.k)).item())
    if heads == 1:
        assert row["value"] == pytest.approx(gain, rel=1e-6)
        assert row["value"] + row["pattern"] == pytest.approx(formula, rel=1e-6)
        return
    found = attack(block.attention, 1.0, T, D, steps=100, start=split_tokens(model, 1.0))
    assert formula < found <= row["value"] + row["pattern"]


def test_slopes_of_the_activations():
    """Step 6: g bounds GeLU's slope, and is not generous; no activation lengthens a vector."""
    z = torch.linspace(-8, 8, 400_001, dtype=torch.float64, requires_grad=True)
    gelu = F.gelu(z, approximate="tanh")
    slope, = torch.autograd.grad(gelu.sum(), z)
    g = shakespeare.GELU_SLOPE
    assert g - 1e-8 < slope.max() <= g and slope.min() >= 1 - g
    assert (gelu.abs() <= z.abs()).all()
    x = randn(50, 8)
    a, b = x.chunk(2, -1)
    pairs_in_order = torch.cat([torch.maximum(a, b), torch.minimum(a, b)], -1)
    torch.testing.assert_close(shakespeare.maxmin(x), pairs_in_order)


@torch.no_grad()
def test_radius_is_not_left():
    """Step 7, from the embeddings of real tokens on."""
    for case in CASES:
        settings = {**case, "blocks": 3, "residual_scale": 1.0}
        model = random_model("orthogonal", norm=1.3, **settings)
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
    """The largest |c z| / sqrt(c S c^T) over all c: where it is at most 1, z is in E(e^log S)."""
    y = torch.linalg.solve_triangular(root_of(S), z.flatten(0, -2).T, upper=False)
    return y.norm(dim=0).view(z.shape[:-1]) * math.exp(-log / 2)


def follow(model, free=None):
    """[(S, log)] after each block, as certificate() has them."""
    model = shakespeare.exact_copy(model)
    R = shakespeare.largest_embedding(model)
    return ellipsoid_blocks(shakespeare.describe_blocks(model), R, {} if free is None else free)


def on_the_way(model, free=None):
    """[(kind, ellipsoids behind attention, ellipsoids behind the MLP)] of each block, for tokens
    and for differences; and the ellipsoids of changed patterns.
    """
    found, patterns = [], []
    behind_mlp = constraints.after_mlp

    def after_mlp(*args):
        found.append((args[-1], [], []))
        return behind_mlp(*args)

    def recorded(name, place):
        real = getattr(constraints, name)

        def function(*args):
            place().append(real(*args))
            return place()[-1]
        patch.setattr(constraints, name, function)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constraints, "after_mlp", after_mlp)
        recorded("ellipsoid_sum", lambda: found[-1][1])
        recorded("ellipsoid_layer", lambda: found[-1][2])
        recorded("ellipsoid_pattern", lambda: patterns)
        follow(model, free)
    return found, patterns


def mlp_parts(block, spread):
    """(J, A, B) of the MLP and its stream."""
    w_out = block.mix * block.w_out
    if block.config.activation == "maxmin":
        return constraints.mlp_slopes(1 - block.mix, block.w_in, w_out, None)[:3]
    w_out = w_out / shakespeare.GELU_SCALE
    return constraints.mlp_slopes(1 - block.mix, block.w_in, w_out, spread)[:3]


def random_free(model, size=0.7):
    """Any trainable weights: all must give a valid bound."""
    free, generator = {}, torch.Generator().manual_seed(0)
    follow(model, free)
    for name, zero in free.items():
        free[name] = size * torch.randn(zero.shape, generator=generator).double()
    return free


@torch.no_grad()
def claims(model, free):
    """A function of (tokens, differences) after each sublayer (2 blocks, B, T, D), which returns
    found / certified (M, B, T): of every ellipsoid of these weights after each sublayer, and at
    the end of random directions, of the norm and of pairs.
    """
    differences, tokens = [], []
    for kind, *both in on_the_way(model, free)[0]:
        (tokens if kind == "token" else differences).extend(both)
    S, log = follow(model, free)[-1]
    U = model.config.final_scale * model.head_VD
    c = randn(20, D, seed=5)
    along = torch.stack([ellipsoid_norm(S, log, row[None]).exp() for row in c])
    norm = 10 ** certificate(model, free=free)["ellipsoid_log10"]
    pairs = ellipsoid_pairs(S, log, U).exp().fill_diagonal_(math.inf)

    def ratios(y, dy):
        found = [gauge(z, *one) for z, many in zip(dy, differences) for one in many]
        found += [gauge(z, *one) for z, many in zip(y, tokens) for one in many]
        found.append((F.linear(dy[-1], c).abs() / along).amax(-1))
        logits = F.linear(dy[-1], U)
        found.append(rms(logits) / norm)
        apart = (logits[..., :, None] - logits[..., None, :]).abs()
        found.append((apart / pairs).amax((-2, -1)))
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
    """Untuned, tuned and with random weights: after each sublayer, and end to end."""
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
    found = attack(sublayers(model), R, T, D, lengths, restarts=12, steps=20)
    assert found.max() <= 1 + 1e-9


@torch.no_grad()
def test_a_token_gives_itself_at_least_what_the_last_one_does():
    """Step 1 of shakespeare.py, on the softmax of a bias by distance."""
    for seed in range(20):
        bias_T = 3 * randn(T, seed=seed)
        own = [bias_T[:t + 1].softmax(0)[0] for t in range(T)]
        assert min(own) == own[-1] and own[0] == 1


PATTERNS = [(CASES[i], kind) for i in (0, 1, 3, 4, 6) for kind in ("random", "turned")]
PATTERNS += [(CASES[i], kind) for i, kind in enumerate(KINDS[2:] + KINDS[:1], start=2)]


@pytest.mark.parametrize("case, kind", PATTERNS, ids=named)
def test_the_moved_pattern_is_in_its_ellipsoid(case, kind):
    """Steps 1 to 5: how attention changes if only its pattern does, in every direction. Turned:
    queries and keys that meet only if RoPE turns one against the other.
    """
    turned = kind == "turned"
    model = random_model("random" if turned else kind, norm=1.5, **case).requires_grad_(False)
    block, R, heads = model.blocks[0], 1.5, case["heads"]
    if turned:
        place = torch.arange(D) % (D // heads)
        block.q *= (place == D // heads // 2)[:, None]
        block.k *= (place == 0)[:, None]
    model.embedding_VD.data *= R / rms(model.embedding_VD).max()
    log_token = math.log(D) + 2 * math.log(R * (1 + 1e-9))
    parts = []
    for free in (None, random_free(model)):
        (S, log), = on_the_way(model, free)[1]
        parts.append((S, log + 2 * math.log(D) + 2 * (math.log(D) + log_token)))

    def split(x, W):
        return F.linear(x, W).unflatten(-1, (heads, -1)).transpose(1, 2)

    def pattern(x):
        """Attention with the values held, so that only the pattern moves."""
        q, k, v = split(x, block.q), split(x, block.k), split(x.detach(), block.v)
        if case.get("key_offset"):
            before = [0, *range(T - 1)]
            k = torch.cat([k[:, :heads // 2], k[:, heads // 2:, before]], 1)
        if case["positions"] == "rope":
            q, k = shakespeare.rotate(q), shakespeare.rotate(k)
        distance = torch.arange(T)[:, None] - torch.arange(T)
        logits = case["logit_scale"] * heads / D * q @ k.mT
        if case["positions"] == "bias":
            logits = logits + block.bias_HT[:, distance.clamp(min=0)]
        y = logits.masked_fill(distance < 0, -math.inf).softmax(-1) @ v
        return block.attention_scale * F.linear(y.transpose(1, 2).flatten(-2), block.o)

    def lengths(y, dy):
        return torch.stack([gauge(model.mix * dy, *part) for part in parts])

    x = randn(2, T, D)
    torch.testing.assert_close(pattern(x), block.attention(x))
    found = attack(pattern, R, T, D, lengths)
    assert max(found) <= 1 and (found[0] > 0.01 or kind != "random")


@torch.no_grad()
@pytest.mark.parametrize("gap", [2.0**-12, 2.0**-20, 0.0])
def test_what_cancels_is_not_certified_away(gap):
    """The first block writes along u alone, the second reads along r: what is left is r u = gap^2,
    or, of float32 vectors orthogonal but for rounding, some 1e-9. Rounding in G S G^T must not
    pass for less. T = 1, and linear.
    """
    model = random_model(**POSITION, blocks=2, width=4, heads=1, hidden=4, seq_len=1,
                         activation="maxmin", attention_scale=1.0, residual_scale=4.0,
                         vocabulary="abcd")
    for p in model.parameters():
        p.zero_()
    generator, (first, second), half = torch.Generator().manual_seed(1739), model.blocks, 2**-0.5
    u, r, w = (F.normalize(torch.randn(4, generator=generator), dim=0) for _ in range(3))
    r = F.normalize(r - u * (u @ r), dim=0)
    if gap:
        u, r = torch.tensor([1, 1 + gap, 0, 0]), torch.tensor([1, gap - 1, 0, 0])
    for W in (model.embedding_VD, model.head_VD, first.v, first.o, second.o):
        W += torch.eye(4)
    first.w_in[0::2] = half * w
    first.w_out[:, 0::2] = half * u[:, None].double()
    second.v[0] = r
    second.w_in[0, 0] = second.w_in[2, 0] = second.w_out[0, 0] = second.w_out[0, 2] = half
    J = F.linear(model.blocks(torch.eye(4).double()[:, None]), model.head_VD)[:, 0].T
    found = torch.linalg.matrix_norm(J, ord=2).item()
    assert 0 < found <= 10 ** certificate(model)["log10"]


@torch.no_grad()
def test_the_tokens_ellipsoid_is_reached():
    """By large tokens, where attention and its stream halve, and half of GeLU's inputs are lost."""
    model = random_model(width=8, hidden=8, heads=1, blocks=2, residual_scale=2.0)
    block, R = model.blocks[0], 50.0
    block.o.zero_()
    block.w_in.copy_(shakespeare.GELU_SCALE * torch.eye(8))
    block.w_out.copy_(-torch.eye(8))
    model.embedding_VD.fill_(-R)
    (kind, _, [ellipsoid]), *_ = on_the_way(model)[0]
    reached = gauge(block(-R * torch.ones(1, 1, 8).double()), *ellipsoid)
    assert kind == "token" and 1 - 1e-4 < reached.item() <= 1  # all that is rounded is rounded up


@pytest.mark.parametrize("activation", ["gelu", "maxmin"])
def test_slopes_and_values_of_the_mlp(activation):
    """The stream with its MLP, of values and differences, is A z + B v with |v_i| <= |(J z)_i|."""
    settings = dict(activation=activation, heads=1, residual_scale=1.4, norm=2.0)
    model = random_model("random", **settings).requires_grad_(False)
    block, g = model.blocks[0], shakespeare.GELU_SLOPE

    def f(x):
        return torch.lerp(x, block.mlp(x), model.mix)

    def gelu(h):
        return F.gelu(h, approximate="tanh")

    z, dz = 2 * randn(2, 500, D)
    value, moved = torch.func.jvp(f, (z,), (dz,))
    h = F.linear(z, block.w_in)
    _, slope = torch.func.jvp(gelu, (h,), (torch.ones_like(h),))
    for spread, x, y in ((0.5, z, value), (g - 0.5, dz, moved)):
        J, A, B = mlp_parts(block, spread)
        Jx = F.linear(x, J)
        if activation == "maxmin":
            v = (h[:, :16] - h[:, 16:]).sign() * Jx  # the difference stays or changes its sign
        elif spread == 0.5:
            v = (gelu(h) - h / 2) / spread
        else:
            v = (slope - 0.5) * Jx / spread
        assert (v.abs() <= Jx.abs() * (1 + 1e-12)).all()
        torch.testing.assert_close(F.linear(x, A) + F.linear(v, B), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", ["gelu", "maxmin"])
def test_the_stream_and_the_mlp_against_enumeration(activation):
    """Never below the worst swaps, or slopes at the ends of their range, and near them if tuned."""
    model = random_model("random", width=4, hidden=8, heads=1, residual_scale=1.5,
                         activation=activation, norm=1.4).requires_grad_(False)
    block, a, eye = model.blocks[0], model.mix, torch.eye(4).double()
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


@pytest.mark.parametrize("case", [*THREE.values(), None], ids=[*THREE, "product"])
def test_weights_trained_to_break_the_certificate_do_not(case):
    """Ascent on found / certified over the weights, of the ellipsoid and of the product."""
    model = random_model("random", **(case or dict(heads=4, attention_scale=1.0)))
    block = model.blocks[0]
    x, dx = randn(2, 8, T, D)
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
            log = ellipsoid_norm(*follow(model)[0], torch.eye(D).double()) - math.log(D) / 2
            certified = log.exp()
            ratios.append(found.item() / certified.item())
        else:  # ascended is the ratio to a form of the product that is quick to differentiate
            value = sigma(block.o) * sigma(block.v.view(4, 4, D)).norm()
            certified = value * (1 + 2 * sigma(block.q) * sigma(block.k))
            row = certificate(model)["rows"][0]
            ratios.append(found.item() / (row["value"] + row["pattern"]))
        optimizer.zero_grad()
        (certified / found).log().backward()
        optimizer.step()
    assert max(ratios) <= 1 and max(ratios) > 1.2 * ratios[0]


@pytest.mark.parametrize("case", [THREE["rope"], THREE["position"]], ids=["rope", "position"])
def test_tuning_helps_and_leaves_what_it_is_given(case):
    model = shakespeare.exact_copy(random_model("random", norm=1.3, blocks=2, **case))
    free = tuned(model, 20)
    before = copy.deepcopy(free)
    for_pairs = tuned(model, 10, free, pairs=True)
    assert all(torch.equal(free[name], before[name]) for name in free)

    def mean_pair(free):
        log_VV = ellipsoid_pairs(*follow(model, free)[-1], model.head_VD)
        return log_VV[log_VV > -math.inf].mean().item()

    best = certificate(model, free=free)["ellipsoid_log10"]
    assert best < certificate(model)["ellipsoid_log10"]
    assert mean_pair(for_pairs) < mean_pair(free) < mean_pair(None)


@pytest.mark.parametrize("case", CASES[11:13], ids=named)
def test_with_caps_no_ball_is_needed(case):
    """Step 5: tokens of any length."""
    model = random_model("random", blocks=2, norm=1.5, **case)
    certified = certificate(model)["log10"]

    def logits(x):
        return F.linear(model.blocks(x), model.config.final_scale * model.head_VD)

    for R in (1.0, 30.0):
        assert math.log10(attack(logits, R, T, D, steps=20)) <= certified


def test_a_cap_of_content_blocks_costs_less_than_a_ball():
    """The promise of results/norm_free.py: orthogonal weights of norm 4, four blocks."""
    settings = dict(blocks=4, heads=4, norm=4.0, residual_scale=1.0, attention_scale=1 / 3)
    bounds = {}
    for content in ("all", "2", "none"):
        for cap in (0.0, 1.0):
            scale = 8.0 if cap else 1.0
            model = random_model("orthogonal", content=content, cap=cap, logit_scale=scale, **settings)
            bounds[content, cap] = certificate(model)["log10"]
    assert bounds["none", 0.0] == bounds["none", 1.0] < bounds["2", 1.0]
    assert bounds["2", 1.0] < bounds["2", 0.0] - 1 and bounds["all", 1.0] < bounds["all", 0.0] - 4


# ---- numbers that leave the range ----------------------------------------------------------------
def test_a_constant_of_10_to_the_330_is_a_number():
    """130 blocks of norm 6, a = 1/2: the product, from its rows, in decimals without limit."""
    model = random_model("orthogonal", width=8, hidden=8, blocks=130, heads=2, norm=6.0,
                         residual_scale=130.0)
    bound, half = certificate(model), Decimal(0.5)
    R, L = Decimal(bound["norms"]["embedding"]), Decimal(bound["norms"]["head"])
    for row in bound["rows"]:
        assert all(map(math.isfinite, row.values()))
        names = ("value", "pattern", "mlp", "mlp_gain")
        value, pattern, mlp, gain = (Decimal(row[name]) for name in names)
        L *= (half + half * (value + pattern * R * R)) * (half + half * mlp)
        R *= (half + half * value) * (half + half * gain)
    assert bound["product_log10"] == pytest.approx(float(L.log10()), rel=1e-9)
    assert bound["radius_log10"] == pytest.approx(float(R.log10()), rel=1e-9)
    assert 0 < bound["log10"] == bound["ellipsoid_log10"] <= bound["product_log10"]
    assert 330 < bound["product_log10"] < math.inf
    assert shakespeare.power(bound["log10"]).startswith("10^")


@three_cases
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
            numbers = [bound["log10"], bound["ellipsoid_log10"], bound["radius_log10"]]
            numbers += [value for row in bound["rows"] for value in row.values()]
            assert not any(map(math.isnan, numbers))
            constant = what == "head" or what == "blocks" and model.mix == 1
            assert (bound["log10"] == -math.inf) == constant
        assert not math.isnan(certificate(changed)["ellipsoid_log10"])
        if what == "head":  # all logits tie
            certified = shakespeare.certified_tokens(changed, tokens)
            assert not any(stands.any() for stands in certified.values())
    for name, W in model.named_parameters():
        good, W.data = W.data, W.data.clone()
        W.data.view(-1)[0] = math.nan
        for what in (certificate, tuned, lambda m: shakespeare.certified_tokens(m, tokens)):
            with pytest.raises(UserError, match="not finite"):
                what(model)
        W.data = good


def test_a_constant_of_zero_is_a_word_in_the_files(tmp_path):
    out, summary = run(tmp_path, final_scale=0.0)
    lines = (out / "log.jsonl").read_text().splitlines()
    for record in (summary, *map(json.loads, lines)):
        assert record["lipschitz_log10"] == "-inf"
    assert len(lines) == 2 and set(summary["certified_token_accuracy"].values()) == {0.0}


# ---- certified tokens ----------------------------------------------------------------------------
def predicted_windows(monkeypatch, model, tokens):
    """(x_BT, predicted_BT). What the model says is taken as the truth, so that all is right."""
    batches = list(shakespeare.windows(tokens, T))
    right = [(x_BT, model(x_BT, torch.float64).argmax(-1)) for x_BT, _ in batches]
    monkeypatch.setattr(shakespeare, "windows", lambda *a, **k: iter(right))
    return torch.cat([x for x, _ in right]), torch.cat([y for _, y in right])


TOKENS = torch.randint(8, (601,), generator=torch.Generator().manual_seed(1))


@three_cases
def test_certified_tokens_survive_attack(case, monkeypatch):
    """Gradient ascent on all embeddings flips no certified prediction; some others it does."""
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
@pytest.mark.parametrize("kind, case, rho", [
    ("random", CASES[9], 0.01),
    ("orthogonal", CASES[2], 0.01),  # the product without the head is well above 1
    ("random", CASES[6], 0.1)], ids=named)  # the ball is larger by rho
def test_certified_tokens_by_brute_force(kind, case, rho):
    """Steps 2 and 3 of shakespeare.py, pair by pair, from S itself and from the product."""
    model = random_model(kind, blocks=2, **case)
    model.head_VD *= 3
    S, log = certificate(model, rho, tuned(model, 20, None, pairs=True))["after"][-1]
    body = 10 ** certificate(model, rho)["body_log10"]
    expected = []
    for x_BT, y_BT in shakespeare.windows(TOKENS, T):
        for f_V, y in zip(model(x_BT, torch.float64).flatten(0, 1), y_BT.flatten()):
            stands = True
            for j in set(range(8)) - {y.item()}:
                u = model.head_VD[y] - model.head_VD[j]
                ellipsoid = (u @ S @ u).sqrt() * math.exp(log / 2)
                product = u.norm() * D**0.5 * body
                stands &= (f_V[y] - f_V[j] > rho * min(ellipsoid, product)).item()
            expected.append(stands)
    certified = shakespeare.certified_tokens(model, TOKENS, None, (rho,))[rho]
    assert certified.tolist() == expected and 0 < sum(expected) < len(expected)


@torch.no_grad()
def test_exact_ties_are_never_certified(monkeypatch):
    """Two rows of the head are the same: where one wins is a tie, however small rho is."""
    model = random_model("random", blocks=2, **CASES[9])
    model.head_VD[1] = model.head_VD[0]
    _, predicted = predicted_windows(monkeypatch, model, TOKENS)
    stands = shakespeare.certified_tokens(model, TOKENS, None, (1e-12, 1e-300))
    tied = (predicted <= 1).flatten()
    for rho in stands:
        assert tied.any() and not stands[rho][tied].any() and stands[rho][~tied].any()


# ---- model and published checkpoints -------------------------------------------------------------
ARGS = dict(vocab_size=65, num_heads=4, d_embed=32, num_blocks=2, softmax_scale=1, final_scale=1,
            residual_scale=1)


def published(path, **replaced):
    """A checkpoint in the authors' format: pickled dictionaries, lists of matrices by index."""
    weights = {i: [REFERENCE[f"gpt_weight_{i}"]] for i in range(14)}
    content = dict(args=ARGS, results=dict(val_losses=[0.0]), weights_checkpoint_0=weights)
    content.update(replaced)
    np.savez(path, **{key: np.array(value, dtype=object) for key, value in content.items()})
    return path


def test_parity_with_the_reference_through_its_own_format(tmp_path):
    """Logits recorded from the authors' GPT; also of a file that refers to code that is absent."""
    module = types.ModuleType("modula_that_is_not_there")
    exec("def soft_cap(): pass", module.__dict__)
    module.soft_cap.__module__ = module.__name__
    sys.modules[module.__name__] = module
    try:
        args = dict(ARGS, project=dict(default=module.soft_cap))
        paths = published(tmp_path / "plain.npz"), published(tmp_path / "refs.npz", args=args)
    finally:
        del sys.modules[module.__name__]
    tokens, logits = (torch.from_numpy(REFERENCE[name]) for name in ("gpt_tokens", "gpt_logits"))
    for path in paths:
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


def test_validation_covers_every_token_once():
    tokens = torch.arange(1003)
    seen = torch.cat([y.flatten() for _, y in shakespeare.windows(tokens, 24, batch=5)])
    assert torch.equal(seen, torch.arange(1, 1003))
    assert all(torch.equal(x + 1, y) for x, y in shakespeare.windows(tokens, 24))


def test_samples_are_reproducible_and_temperature_zero_is_greedy():
    model = random_model(vocabulary="\nabcdefg")

    def draw(**options):
        config = Config(prompt="ab", length=12, **options)
        return shakespeare.sample(model, config, torch.float64)

    assert draw(temperature=1.0) == draw(temperature=1.0) != draw(temperature=1.0, seed=1)
    greedy = draw(temperature=0.0)
    assert greedy == draw(temperature=0.0, seed=1) == draw(temperature=1e-9) != draw()
    assert len(greedy) == 2 + 12


class NoFloat64(torch.utils._python_dispatch.TorchDispatchMode):
    """As on mps, of which the device meta takes the place: there are no doubles."""

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        result = f(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            assert not (isinstance(x, torch.Tensor) and x.is_meta and x.dtype == torch.float64), f
        return result


@three_cases
def test_a_device_without_float64_can_train(case):
    model = random_model(**case).float().to("meta")
    tokens = torch.zeros(2, T, dtype=torch.int64, device="meta")
    with NoFloat64():
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        torch.optim.Adam(model.parameters()).step()
        constraints.cap_rows(model.embedding_VD.data)
        with pytest.raises(AssertionError):
            model.head_VD.double()


# ---- training ------------------------------------------------------------------------------------
@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_optimizer_with_every_constraint(optimizer, constraint, tmp_path, capsys):
    lr = 0.5 if optimizer == "muon" else 0.05
    out, summary = run(tmp_path, optimizer=optimizer, constraint=constraint, lr=lr, w_max="1.2")
    assert math.isfinite(summary["val_loss"]) and 0 <= summary["val_accuracy"] <= 1
    beyond = constraint != "none" and summary["max_weight_norm"] > 1.2 * (1 + 1e-4)
    assert ("ABOVE ITS LIMIT" in capsys.readouterr().out) == beyond
    if constraint in ("soft_cap", "hard_cap", "specnorm", "stiefel"):
        assert summary["max_weight_norm"] <= 1.2 * (1 + 1e-3)
    assert {path.name for path in out.iterdir()} == {
        "config.json", "log.jsonl", "checkpoint.pt", "curves.png", "summary.json"}


@pytest.mark.parametrize("constraint", ["soft_cap", "hard_cap", "specnorm", "stiefel"])
def test_limits_hold_at_every_step(constraint, tmp_path):
    """In float64, each role's after each of 30 large steps; no embedding exceeds RMS 1."""
    w_max = dict(zip(shakespeare.ROLES, (1, 1, 1.5, 1, 0.7, 0.7, 2)))
    limits = ",".join(map(str, w_max.values()))
    out, summary = run(tmp_path, steps=30, evals=30, constraint=constraint, lr=0.3, w_max=limits)
    assert summary["w_max"] == w_max
    norms = [record["norms"] for record in checkpoint(out)["log"]]
    assert len(norms) == 30 and all(norm["embedding"] <= 1 + 1e-6 for norm in norms)
    shares = [norm[role] / w_max[role] for norm in norms for role in w_max]
    assert max(shares) <= 1 + 1e-3 and sum(share > 0.9 for share in shares) > 20


def test_loss_of_a_batch(tmp_path, little_text):
    """The cross-entropy of temperature * logits, with the margin taken from the right one's."""
    settings = {**TINY, "steps": 1, "evals": 1, "dtype": "float32", "loss_temperature": 3.0, "margin": 1.5}
    out, _ = run(tmp_path, **settings)
    config = Config.of("paper", **settings)
    train, _, vocabulary, _ = shakespeare.load_data(config)
    x, y = shakespeare.choose_batch(0, train, config)
    logits = 3 * Transformer(config, vocabulary)(x).detach().double().flatten(0, 1)
    right = torch.arange(len(logits)), y.flatten()
    logits[right] -= 1.5
    expected = (logits.logsumexp(1) - logits[right]).mean().item()
    assert checkpoint(out)["log"][0]["train_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("at_once", [1, 3])
def test_gradients_of_parts_add_up_to_that_of_the_batch(at_once, tmp_path, monkeypatch, after_step):
    """At the first step, when the weights are the same. 3 does not divide the batch of 4."""
    gradients = []

    def note(optimizer):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients.extend(p.grad.clone() for p in parameters if p.dtype == torch.float32)  # (float64: a certificate's)

    after_step(note)
    settings = dict(steps=1, evals=1, dtype="float32", loss_temperature=3.0)
    whole = run(tmp_path / "whole", **settings)[0]
    of_batch = gradients[:]
    gradients.clear()
    monkeypatch.setattr(shakespeare, "AT_ONCE", at_once)
    parts = run(tmp_path / "parts", **settings)[0]
    assert sum(gradient.norm() > 0 for gradient in of_batch) > 4  # (others begin behind a matrix of zeros)
    for expected, found in zip(of_batch, gradients, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    loss, again = (checkpoint(out)["log"][0]["train_loss"] for out in (whole, parts))
    assert loss == pytest.approx(again, rel=1e-6)


def test_lipschitz2_is_plain100_with_a_50th_of_the_logits(tmp_path):
    """A loss temperature makes up for any scale: the same training, and another constant."""
    summaries = []
    for preset in ("plain100", "lipschitz2"):
        settings = {**shakespeare.PRESETS[preset], **TINY, "dtype": "float32"}
        summaries.append(run(tmp_path / preset, **settings)[1])
    plain, small = summaries
    assert plain["val_loss"] == plain["val_loss_at_temperature"]
    assert small["val_loss_at_temperature"] == pytest.approx(plain["val_loss"], rel=1e-4)
    assert small["lipschitz_log10"] == pytest.approx(plain["lipschitz_log10"] - math.log10(50), abs=1e-3)
    for rho, share in plain["certified_token_accuracy"].items():
        assert small["certified_token_accuracy"][rho] == pytest.approx(share, abs=2e-3)
    assert any(0 < share < 1 for share in plain["certified_token_accuracy"].values())


@pytest.mark.parametrize("warmup, factors", [
    (0, [1, 3 / 4, 2 / 4, 1 / 4]), (3, [1 / 3, 2 / 4, 2 / 4, 1 / 4])])
def test_learning_rates_rise_and_fall_to_zero(warmup, factors, tmp_path, after_step):
    rates = []
    after_step(lambda optimizer: rates.extend(group["lr"] for group in optimizer.param_groups))
    run(tmp_path, steps=4, warmup=warmup, lr=0.5, positions="bias")
    peaks = (0.5, 0.02, 0.1)  # of the matrices, the embedding and the biases
    expected = [factor * peak for factor in factors for peak in peaks]
    assert rates[:12] == pytest.approx(expected)  # what follows is the tuning of the certificate


def test_it_learns(tmp_path, little_text):
    """Below the entropy of single characters after a few steps."""
    _, summary = run(tmp_path, steps=80, evals=1, batch=32, width=64, blocks=1, hidden=128,
                     seq_len=32)
    counts = torch.tensor([little_text.count(c) for c in set(little_text)])
    p = counts.double() / counts.sum()
    assert summary["val_loss"] < -(p * p.log()).sum().item() - 0.5


# ---- data ----------------------------------------------------------------------------------------
def test_data_comes_from_data_dir_then_cache_then_network_then_stand_in(
        tmp_path, monkeypatch, capsys):
    text = "To be, or not to be\n" * 1000
    local = tmp_path / "here" / "tinyshakespeare" / "input.txt"
    cached = tmp_path / "cache" / "torch" / "hub" / "tinyshakespeare" / "input.txt"
    local.parent.mkdir(parents=True)
    local.write_text(text)
    answers = [OSError("no network"), b"something else", text.encode()]

    def urlopen(url, timeout):
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr(shakespeare.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(shakespeare, "TEXT_SHA256", hashlib.sha256(text.encode()).hexdigest())
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "here"))
    assert shakespeare.load_text("auto") == (text, str(local))
    monkeypatch.delenv("DATA_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for reason in ("no network", "is another text"):
        assert shakespeare.load_text("auto") == (shakespeare.stand_in(), shakespeare.STAND_IN)
        banner = capsys.readouterr().out
        assert reason in banner and "DATA_DIR" in banner and "STAND-IN" in banner
        assert not cached.exists()
    for _ in range(2):  # from the network, then from the cache
        assert shakespeare.load_text("auto") == (text, str(cached)) and not answers

    monkeypatch.setenv("XDG_CACHE_HOME", str(local))  # no folder can be there
    answers.append(text.encode())
    assert shakespeare.load_text("auto")[1] == shakespeare.STAND_IN and str(local) in capsys.readouterr().out


def test_holdout_is_the_end_of_the_training_text():
    config = Config(data="stand-in", seq_len=24)
    train, validation, vocabulary, _ = shakespeare.load_data(config)
    config.holdout = True
    less, held, same_vocabulary, name = shakespeare.load_data(config)
    assert torch.equal(torch.cat([less, held]), train)
    assert len(held) == len(train) - int(0.9 * len(train)) and len(validation) > 0
    assert vocabulary == same_vocabulary and "held out" in name


WRONG_TEXTS = {  # and what is said of them
    "a code page": ("caf\u00e9 ".encode("cp1252") * 999, "iconv"),
    "utf-16": ("hello world ".encode("utf-16") * 999, "iconv"),
    "only a mark": (b"\xef\xbb\xbf", "has 0 characters"),
    "short": (b"hello", "give 500 or more"),
    "one character": (b"a" * 9999, "1 different"),
    "many characters": ("".join(map(chr, range(0x4E00, 0x9E00))).encode(), "4096 different"),
    "missing": (None, "No such file")}


@pytest.mark.parametrize("kind", WRONG_TEXTS)
def test_wrong_text(kind, tmp_path):
    path, (content, says) = tmp_path / "text", WRONG_TEXTS[kind]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=says) as error:
        run(tmp_path, data=str(path))
    message = str(error.value)
    assert str(path) in message and "\n" not in message and not (tmp_path / "run").exists()


@pytest.mark.parametrize("line, encoding", [
    ("ab\u00e9\n", "utf-8"), ("ab\u00e9\n", "utf-8-sig"), ("ab\r\ncd\r", "utf-8")])
def test_texts_that_work(line, encoding, tmp_path, monkeypatch):
    """By a path from the home folder: plain, with a mark in front, with other ends of lines."""
    text = line * 300
    (tmp_path / "text").write_bytes(text.encode(encoding))
    monkeypatch.setenv("HOME", str(tmp_path))
    data = shakespeare.load_data(Config(data="~/text", seq_len=24))
    train, validation, vocabulary, _ = data
    plain = text.replace("\r\n", "\n").replace("\r", "\n")
    assert "".join(vocabulary[i] for i in torch.cat([train, validation])) == plain
    assert vocabulary == "".join(sorted(set(plain))) and len(train) == int(0.9 * len(plain))


# ---- going on -----------------------------------------------------------------------------------
@pytest.mark.parametrize("end", ["a kill", "Ctrl-C"])
def test_the_same_command_goes_on_bit_identically(end, tmp_path, monkeypatch):
    """After a kill with Muon, after Ctrl-C with AdamW and a position bias."""
    settings = dict(steps=12, evals=3, lr=0.5, w_max="1.2")
    if end == "Ctrl-C":
        settings.update(optimizer="adamw", constraint="hard_cap", positions="bias", lr=0.01)
    whole, _ = run(tmp_path / "whole", **settings)
    choose_batch, out = shakespeare.choose_batch, tmp_path / "stopped" / "run"

    def stop_at_6(step, *arguments):
        if step == 6 and end == "a kill":
            raise SystemExit  # which no code of the script catches
        if step == 6:
            signal.raise_signal(signal.SIGINT)
        return choose_batch(step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(shakespeare, "choose_batch", stop_at_6)
        with pytest.raises((SystemExit, KeyboardInterrupt)) as stop:
            run(tmp_path / "stopped", **settings)
    if end == "Ctrl-C":
        assert str(stop.value).startswith("saved at step 7") and f"--out {out}" in str(stop.value)
    saved = {"a kill": 4, "Ctrl-C": 7}[end]
    assert checkpoint(out)["step"] == saved and not (out / "summary.json").exists()
    (out / "log.jsonl").write_text('{"step": 4, "cut off')
    run(tmp_path / "stopped", **settings)
    a, b = checkpoint(whole), checkpoint(out)
    assert same(a["model"], b["model"]) and same(a["optimizers"], b["optimizers"])
    lines = (out / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 8, 12]


def test_a_run_does_not_go_on_with_another_text(tmp_path):
    out, _ = run(tmp_path)
    (out / "summary.json").unlink()
    (tmp_path / "text").write_text("other words " * 2000)
    with pytest.raises(UserError, match="another text"):
        run(tmp_path, data=str(tmp_path / "text"))


def test_sampling_runs_no_constraint_of_a_checkpoint(tmp_path):
    out, _ = run(tmp_path)
    witness, state = tmp_path / "witness", checkpoint(out)
    (tmp_path / "mine.py").write_text(f"open({str(witness)!r}, 'w')\n")
    state["config"]["constraint"] = f"{tmp_path}/mine.py:mine"
    torch.save(state, out / "checkpoint.pt")
    assert len(shakespeare.main(Config(sample=str(out), length=3))) == 3 and not witness.exists()


def test_divergence_stops_and_keeps_the_last_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"step \d+: training has diverged"):
        run(tmp_path, optimizer="adamw", constraint="none", lr=1e30, steps=10, evals=1)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


# ---- on the command line -------------------------------------------------------------------------
@pytest.mark.parametrize("flags, says", [
    ("--w_max 0", "above 0"), ("--w_max 1,2", "7 of them"), ("--heads 3", "must divide"),
    ("--heads 256 --preset paper", "even"), ("--content 3 --preset paper", "--content 3"),
    ("--hidden 7", "even"), ("--residual_scale 9", "at most"), ("--optimizer adamw", "for Muon"),
    ("--activation relu", "maxmin"), ("--constraint clip", "soft_cap"),
    ("--constrain_every 100", "every is 100"), ("--momentum 1", "momentum is 1.0"),
    ("--data /no/such/file", "No such file"), ("--prompt \u2603", "does not know"),
    ("--sample /no/such/run", "/no/such/run/checkpoint.pt: is no checkpoint")])
def test_wrong_flags_are_one_line_and_leave_nothing(flags, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says) as error:
        shakespeare.main(parse_arguments(["--data=stand-in", "--out=run", *flags.split()]))
    assert "\n" not in str(error.value) and not Path("run").exists()


def test_any_terminal_shows_any_text_and_path(tmp_path, monkeypatch):
    """A code page without the letters of the text, of its path and of the prompt."""
    path, screen = tmp_path / "\u6f22.txt", io.TextIOWrapper(io.BytesIO(), "cp1252")
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 300))) * 4
    path.write_text(text)
    settings = dict(TINY, data=path, preset="paper", steps=1, prompt=text[:3], out=tmp_path / "run")
    flags = [f"--{name}={value}" for name, value in settings.items()]
    monkeypatch.setattr(sys, "argv", ["shakespeare.py", *flags])
    monkeypatch.setattr(sys, "stdout", screen)
    assert shakespeare.run_script() == 0
    screen.flush()
    assert "???" in screen.buffer.getvalue().decode("cp1252")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["data"] == str(path)
