"""results/norm_free.py and results/promise.py."""

import math
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import constraints
import nanogpt_lipschitz as nano
import shakespeare
from constraints import exact_norm

sys.path.insert(0, str(Path(__file__).parent.parent / "results"))
import capped  # noqa: E402
import norm_free  # noqa: E402
import promise  # noqa: E402

SMALL = dict(width=32, hidden=64, heads=4, seq_len=16, window=16, val_tokens=100, batch=2,
             micro_batch=2, steps=2)


# ---- what a preset promises ----------------------------------------------------------------------
def random_at_limits(model, seed):
    """Random matrices, each with its norm at its limit."""
    limits = model.config.limits()
    generator = torch.Generator().manual_seed(seed)
    for role, W in model.matrices():
        W.data = torch.randn(W.shape, generator=generator, dtype=torch.float64)
        if seed % 2:
            W.data[1:] = W.data[:1]  # rank 1
        W.data *= limits[role] / exact_norm(W)
    model.embedding_VD.data = F.normalize(model.embedding_VD.double(), dim=1)
    model.embedding_VD.data *= model.embedding_VD.shape[1] ** 0.5


@pytest.mark.parametrize("preset, changes", [
    ("tiny_paper", dict()), ("tiny_tight", dict()), ("tiny", dict()),
    ("tiny", dict(content="0,2", w_max="4,3,2,1,2,3,4"))])
def test_no_weights_within_limits_exceed_the_promise(preset, changes):
    promised = promise.promise(nano, preset, **changes)["promised_log10"]
    config = nano.Config.of(preset, width=64, hidden=128, vocab=128, **changes)
    for seed in range(4):
        model = nano.Transformer(config).double()
        random_at_limits(model, seed)
        assert nano.certificate(model)["product_log10"] <= promised


@pytest.mark.parametrize("script, preset", [
    (nano, "tiny"), (nano, "tiny_paper"), (shakespeare, "plain100")])
def test_the_promise_does_not_depend_on_the_width(script, preset):
    """And orthogonal matrices attain it, at the preset's own width."""
    config = script.Config.of(preset)
    vocabulary = ["".join(map(chr, range(65)))] if script is shakespeare else []
    model = script.Transformer(config, *vocabulary).double()
    promise.drive_to_limits(model, config.limits())
    promised = promise.promise(script, preset)["promised_log10"]
    assert script.certificate(model)["product_log10"] == pytest.approx(promised, abs=2e-3)


def test_what_promises_nothing():
    assert promise.promise(nano, "tiny_baseline")["promised_log10"] == "inf"
    for constraint in promise.NO_PROMISE:
        assert promise.promise(nano, "tiny", constraint=constraint)["promised_log10"] == "inf"


# ---- which blocks --------------------------------------------------------------------------------
@pytest.mark.parametrize("content, blocks", [
    ("all", {0, 1, 2, 3}), ("odd", {1, 3}), ("last", {3}), ("none", set()), ("0,2", {0, 2})])
@pytest.mark.parametrize("script", [shakespeare, nano], ids=lambda script: script.SCRIPT)
def test_blocks_by_content(script, content, blocks):
    config = script.Config(preset=script.Config.preset, blocks=4, content=content)
    config.limits()
    assert config.content_blocks() == blocks
    found = {i for i in range(4) if script.Block(config, i).sees_content}
    assert found == blocks


@pytest.mark.parametrize("content", ["some", "4", "-1", "1,,2", "0.5"])
def test_blocks_that_are_not_there(content):
    with pytest.raises(nano.UserError, match="give all, odd, last, none, or as 0,2"):
        nano.Config.of("tiny", content=content).limits()


# ---- caps ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("size, key_offset", [(1e-3, False), (1.0, True), (30.0, False)])
@pytest.mark.parametrize("script", [shakespeare, nano], ids=lambda script: script.SCRIPT)
def test_attention_with_a_cap_is_its_formula(script, size, key_offset):
    """Queries, keys and values of each head, one by one, scaled down where their RMS is above it.

    With key_offset the later heads have the key of the token before.
    """
    H, E, T, cap = 3, 8, 5, 0.7
    config = script.Config(width=H * E, heads=H, blocks=1, hidden=8, seq_len=T, cap=cap,
                           logit_scale=3.0, attention_scale=0.5, key_offset=key_offset,
                           preset=script.Config.preset)
    block = script.Block(config, 0).double()
    generator = torch.Generator().manual_seed(0)
    for _, W in block.matrices():
        W.data = torch.randn(W.shape, generator=generator, dtype=torch.float64) / 2
    x_BTD = size * torch.randn(3, T, H * E, generator=generator, dtype=torch.float64)

    def project(W):
        z_BTHE = (x_BTD @ W.T).view(3, T, H, E)
        rms = z_BTHE.square().mean(-1, keepdim=True).sqrt()
        return torch.where(rms > cap, z_BTHE * cap / rms, z_BTHE).transpose(1, 2)

    q, k, v = project(block.q), project(block.k), project(block.v)
    if key_offset:
        k = torch.stack([k[:, 0], *(k[:, h, [0, 0, 1, 2, 3]] for h in (1, 2))], 1)
    speeds = [] if script is shakespeare else [nano.rope_speeds(q)]
    logits = 3.0 / E * script.rotate(q, *speeds) @ script.rotate(k, *speeds).mT
    assert logits.abs().max() <= 3.0 * cap**2 * (1 + 1e-6)
    sees = torch.ones(T, T, dtype=torch.bool).tril()
    y = logits.masked_fill(~sees, -math.inf).softmax(-1) @ v
    expected = 0.5 * y.transpose(1, 2).reshape(x_BTD.shape) @ block.o.T
    torch.testing.assert_close(block.attention(x_BTD), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("constraint", ["soft_cap", "stiefel"])
@pytest.mark.parametrize("script", [shakespeare, nano], ids=lambda script: script.SCRIPT)
def test_a_head_with_offset_keys_starts_by_finding_the_present_token(script, constraint, heads):
    """Of all tokens x_j of length 1 the present one has the largest q x . k x_j; not in the others."""
    E = 8
    config = script.Config(width=heads * E, heads=heads, blocks=1, hidden=8, key_offset=True,
                           constraint=constraint, w_max="2,3,1,1,1,1,1", preset=script.Config.preset)
    vocabulary = ["abc"] if script is shakespeare else []
    block = script.Transformer(config, *vocabulary).blocks[0]
    norms = (2, 3) if constraint == "stiefel" else (1, 1)
    assert (exact_norm(block.q).item(), exact_norm(block.k).item()) == pytest.approx(norms, rel=1e-5)
    plain = heads // 2
    for head, (q_ED, k_ED) in enumerate(zip(block.q.view(heads, E, -1), block.k.view(heads, E, -1))):
        alike_EE = q_ED @ k_ED.T / (norms[0] * norms[1])
        if head < plain:
            assert alike_EE.diagonal().abs().max() < 1e-5
        else:
            torch.testing.assert_close(alike_EE, torch.eye(E), atol=1e-5, rtol=0)


@pytest.mark.parametrize("heads", [1, 3])
def test_ellipsoids_of_a_cap_where_they_are_known(heads):
    """Identical heads may do the same: each term is `heads` times that of one, steps f, g and h."""
    E, D, s, cap = 3, 5, 0.3, 0.7
    generator = torch.Generator().manual_seed(0)
    q, k, v, root = (torch.randn(rows, D, generator=generator).double() for rows in (E, E, E, D))
    o = torch.randn(D, E, generator=generator).double()
    q_HED, k_HED, v_HED, o_HDE = (W.expand(heads, *W.shape) for W in (s * q, k, v, o))
    block = constraints.BlockBounds(
        value=0.0, pattern=0.0, mlp=0.0, mlp_gain=0.0, a=0.5, o_HDE=o_HDE, v_HED=v_HED, C_HDD=o_HDE @ v_HED,
        mlp_differences=None, mlp_tokens=None, q_HED=q_HED, k_HED=k_HED, rotates=True, longest=cap, s=s)

    def sigma(W):
        return torch.linalg.svdvals(W)[0].item()

    S = root @ root.T
    eye = torch.eye(D).double()
    e = cap * s * (sigma(q @ root) + sigma(k @ root))
    found = constraints.ellipsoid_norm(*constraints.capped_pattern(S, block), eye).exp()
    assert found.item() == pytest.approx(heads * sigma(o) * cap * e, rel=1e-5)
    for S_h in constraints.capped_values(S, block):
        found = constraints.ellipsoid_norm(S_h, 0.0, eye).exp()
        assert found.item() == pytest.approx(sigma(o) * sigma(v @ root), rel=1e-5)


def test_the_product_of_a_cap():
    """Step 5 of THE PRODUCT, by an SVD, for RMS->RMS."""
    config = nano.Config.of("tiny", width=16, heads=2, hidden=8, vocab=20, cap=0.7, content="1")
    model = nano.Transformer(config).double()
    generator = torch.Generator().manual_seed(0)
    for _, W in model.matrices():
        W.data = torch.randn(W.shape, generator=generator, dtype=torch.float64)
    block = model.blocks[1]
    row = nano.certificate(model)["rows"][1]
    keys = torch.linalg.svdvals(block.k.unflatten(0, (2, -1)))[:, 0].norm()
    reach = torch.linalg.svdvals(block.q)[0] + keys
    o = config.attention_scale * torch.linalg.svdvals(block.o)[0]
    expected = o * config.logit_scale * config.cap**2 * reach
    assert row["pattern"] == pytest.approx(expected.item(), rel=1e-8)
    assert 10 ** row["alone_log10"] == pytest.approx(row["value"] + row["pattern"], rel=1e-9)


# ---- rivals --------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, squash", [("DyT", torch.tanh), ("Derf", torch.erf)])
def test_a_rival_has_squash_layers_in_the_place_of_norms(kind, squash):
    config = nano.Config.of("tiny_baseline", **SMALL)
    with norm_free.rival(kind):
        model = nano.Transformer(config)
        assert [role for role, _ in model.matrices()] == [
            role for role, _ in nano.Transformer(config).matrices()]
        layers = [m for m in model.modules() if isinstance(m, norm_free.Squash)]
        assert len(layers) == 2 * config.blocks + 1
        x_BTD = torch.randn(2, 16, 32)
        torch.testing.assert_close(layers[0](x_BTD), squash(norm_free.ALPHA[kind] * x_BTD))
        for block in model.blocks:
            block.o.data.zero_()
            block.w_out.data.zero_()
        # Blocks that do nothing leave the last layer alone, and no RMSNorm on the stream.
        torch.testing.assert_close(model.body(x_BTD), squash(norm_free.ALPHA[kind] * x_BTD))
        scaled = model.body(10 * x_BTD)
        assert not torch.allclose(scaled, model.body(x_BTD), rtol=0.1)
    assert nano.Block is not type(model.blocks[0])  # all is as it was


@pytest.mark.parametrize("name", [
    "norm layers, odd, offset", "Derf, odd, offset", "tiny", "tiny by position"])
def test_rows_train(name, tmp_path, monkeypatch):
    monkeypatch.setattr(nano, "tuned", lambda model: None)  # takes seconds
    small = {key: value for key, value in SMALL.items() if key != "steps"}
    row = norm_free.train(name, "tiny", 2, 0, tmp_path / "run", **small)
    assert 0 < row["val_loss"] < 6 and row["largest_entry"] > 0
    bounded = norm_free.ROWS[name][0] != "tiny_baseline"
    assert math.isfinite(float(row["lipschitz_log10"])) == bounded
    assert (row["largest_logit"] == 0) == ("position" in name)


def test_the_largest_logit():
    """Of a model whose queries and keys are known: x itself, of RMS 1, turned by RoPE."""
    config = nano.Config.of("tiny", **{**SMALL, "blocks": 1}, content="0", cap=0.0, logit_scale=3.0,
                            w_max="9")
    model = nano.Transformer(config)
    for W in (model.blocks[0].q, model.blocks[0].k):
        W.data.copy_(torch.eye(32))
    rms = model.embedding_VD.data.unflatten(1, (4, -1)).square().mean(2).amax().item()
    found = norm_free.largest_logit(config, model)  # of a token with itself, which RoPE leaves
    tokens = nano.load_data(config)[1].read(0, 16 * 16)
    largest = model.embedding_VD[tokens].unflatten(1, (4, -1)).square().mean(2).max()
    assert found == pytest.approx(3.0 * largest.item(), rel=1e-5)
    assert found <= 3.0 * rms * (1 + 1e-6)


@pytest.mark.parametrize("token, expected", [(254, 37.5), (255, 0.0)])
def test_the_largest_logit_is_of_tokens_that_are_seen(token, expected):
    """Token 7 has only a key and the others only a query, along what RoPE leaves. 255 begins a
    document, in which token 7 is not seen."""
    config = nano.Config.of("tiny", **{**SMALL, "blocks": 1}, content="0", cap=0.0, logit_scale=3.0,
                            key_offset=False)
    model = nano.Transformer(config)
    model.blocks[0].q.data.zero_()[3, 3] = 1
    model.blocks[0].k.data.zero_()[3, 2] = 1
    model.embedding_VD.data.zero_()[7, 2] = 100
    model.embedding_VD.data[token, 3] = 1
    tokens = torch.tensor([7] + [token] * 15)
    validation = mock.MagicMock(read=lambda start, count: tokens)
    validation.__len__.return_value = 16
    with mock.patch.object(nano, "load_data", return_value=(None, validation, "")):
        assert norm_free.largest_logit(config, model) == pytest.approx(expected)


def test_rivals_keep_to_documents():
    config = nano.Config.of("tiny_baseline", **SMALL, key_offset=True)
    with norm_free.rival("DyT"):
        model = nano.Transformer(config).double()
        for _, W in model.matrices():
            torch.nn.init.normal_(W)
        x_BTD = torch.randn(1, 16, 32).double()
        docs_BT = torch.tensor([[0] * 8 + [1] * 8])
        before = model.body(x_BTD, docs_BT)
        x_BTD[0, 7] += 1
        changed = (before - model.body(x_BTD, docs_BT)).abs().amax(-1)[0].nonzero().flatten()
    assert changed.tolist() == [7]


@pytest.mark.parametrize("flags", [
    ["--rows", "DyT"], ["--shape", "english"], ["--data", "x"], ["--alpha", "1"]])
def test_flags_that_do_not_fit(flags, capsys):
    with pytest.raises(SystemExit) as status:
        norm_free.main(flags)
    assert status.value.code == 2 and "error: --" in capsys.readouterr().err


@pytest.mark.parametrize("optimum", [(0.1, 0.025, 0.4, 0.02), (0.05, 0.0125, 0.1, 0.01), (0.05, 0.8, 0.1, 0.02)])
def test_the_search_ends_where_both_neighbours_of_each_rate_are_worse(optimum, tmp_path):
    """Of a loss that is known. A second minimum is where the search starts, at the rates of the row."""
    start = (0.05, 0.0125, 0.1, 0.02)

    def train(name, shape, steps, seed, out, holdout, **rates):
        assert holdout and seed == 0

        def distance(point):
            return sum(abs(math.log2(rates[rate] / value)) for rate, value in zip(norm_free.RATES, point))

        diverged = rates["embed_lr"] > 0.5
        return dict(val_loss="diverged" if diverged else min(1 + distance(optimum), 4.6 + 2 * distance(start)))

    row = {"row": ("tiny_baseline", dict(zip(norm_free.RATES, start)))}
    with mock.patch.object(norm_free, "train", train), mock.patch.object(norm_free, "ROWS", row):
        losses = norm_free.search("row", "tiny", 3, tmp_path)
    assert min(losses, key=losses.get) == pytest.approx(optimum)
    assert {values for values in norm_free.beside(optimum)} <= losses.keys()


def test_a_row_that_diverged_is_in_the_table():
    rows = [dict(shape="tiny", row="tiny", steps=3, seed=seed, val_loss=loss, val_accuracy=0.5,
                 lipschitz_log10=1.0, largest_entry=1.0, largest_logit=1.0)
            for seed, loss in enumerate((1.2, "diverged", "diverged"))]
    assert "| tiny | 3 | 2 diverged | | | | |" in norm_free.table(rows, "tiny", 3)


def test_the_figure(tmp_path):
    rows = [dict(shape="tiny", row=name, steps=300, seed=seed, val_loss=(1.3, 1.4)[seed],
                 lipschitz_log10=bound)
            for name, bound in (("norm layers", math.inf), ("tiny", 3.0)) for seed in range(2)]
    with mock.patch("matplotlib.figure.Figure.savefig", autospec=True) as savefig:
        norm_free.draw(rows, "tiny", 300, tmp_path / "figure.png")
    panel = savefig.call_args[0][0].axes[0]
    points, line = panel.lines
    assert list(line.get_ydata()) == pytest.approx([1.35, 1.35])
    assert list(points.get_xdata()) == [3.0, 3.0] and list(points.get_ydata()) == [1.3, 1.4]


def test_rivals_train_their_layers(tmp_path):
    small = {key: value for key, value in SMALL.items() if key != "steps"}
    norm_free.train("Derf, odd, offset", "tiny", 3, 0, tmp_path / "run", **small)
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    assert saved["blocks.0.squash.0.alpha"] != 0.5
    assert saved["squash.gain_D"].std() > 0


def test_capped_counts_what_the_cap_scales_down(tmp_path, capsys):
    """By hand in the first block, whose queries are one product away from the embeddings."""
    cap = 0.9  # near the middle of their RMS, so that the shares are neither 0 nor 1
    config = nano.Config.of("tiny", **SMALL, out=str(tmp_path / "run"), content="0", cap=cap, evals=1)
    nano.main(config)
    capsys.readouterr()
    capped.main([str(tmp_path / "run")])
    shown = capsys.readouterr().out
    _, model, _ = nano.load_checkpoint(tmp_path / "run")
    _, validation, _ = nano.load_data(config)
    T = config.seq_len
    starts = [i * T % (len(validation) - T + 1) for i in range(16)]
    x_NTD = torch.cat([model.embed(validation.read(start, T)[None], torch.float32)[0] for start in starts])
    for name, W in (("queries", model.blocks[0].q), ("keys", model.blocks[0].k), ("values", model.blocks[0].v)):
        rms = (x_NTD @ W.T).unflatten(-1, (config.heads, -1)).square().mean(-1).sqrt()
        share = (rms > cap).double().mean().item()
        assert 0 < share < 1 and f"| 0 | {name} | {share:.1%} |" in shown
    with pytest.raises(SystemExit):
        nano.main(nano.Config.of("tiny_tight", **SMALL, out=str(tmp_path / "other"), evals=1))
        capped.main([str(tmp_path / "other")])
    assert "without --cap" in capsys.readouterr().err
