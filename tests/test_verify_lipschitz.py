"""verify_lipschitz.py: does the search find what is there, are true certificates held, are false ones caught?"""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import mlp_cifar
import shakespeare
import verify_lipschitz
from matrices import sigma_limit, with_spectrum
from verify_lipschitz import Config, Table, climb, rms

ROOT = Path(__file__).parent.parent
QUICK = Config(budget=0.3, images=60, windows=8)
MLP = dict(data="stand-in", steps=30, batch=64, width=16, evals=1, lowpass=6, loss_temperature=5.0)
GPT = dict(data="stand-in", width=16, blocks=2, heads=2, hidden=32, seq_len=24, steps=30, batch=4, evals=1, length=5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with three small finished runs, on little data; the small data stay in place for the module."""
    sets, text = mlp_cifar.stand_in(train=600, test=200), shakespeare.stand_in(20_000)
    originals = mlp_cifar.stand_in, shakespeare.stand_in
    mlp_cifar.stand_in, shakespeare.stand_in = lambda: sets, lambda: text
    folder = tmp_path_factory.mktemp("runs")
    mlp_cifar.main(mlp_cifar.Config(**MLP, out=str(folder / "mlp")))
    shakespeare.main(shakespeare.Config(**GPT, out=str(folder / "content")))
    shakespeare.main(shakespeare.Config(**{**GPT, **shakespeare.SMALL, "blocks": 2, "residual_scale": 2.0, "hidden": 32, "steps": 30},
                                        out=str(folder / "position")))
    yield folder
    mlp_cifar.stand_in, shakespeare.stand_in = originals


def copy_of(run, tmp_path, change=None, claim=None):
    """A run folder with a changed state of its checkpoint, or another claim in summary.json."""
    out = tmp_path / "copy"
    out.mkdir()
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    if change:
        change(state)
    torch.save(state, out / "checkpoint.pt")
    if claim is not None:
        (out / "summary.json").write_text(json.dumps(dict(lipschitz_log10=claim)))
    return out


def command(*arguments, **kwargs):
    return subprocess.run([sys.executable, str(ROOT / "verify_lipschitz.py"), *map(str, arguments)], capture_output=True,
                          text=True, timeout=200, **kwargs)


def attention_layer(kind, heads, positions="rope", seed=0, **changes):
    """A float64 model of one block with orthogonal matrices (or random ones)."""
    config = shakespeare.Config(**{**dict(width=16, blocks=1, heads=heads, hidden=32, seq_len=12, positions=positions), **changes})
    model = shakespeare.Transformer(config, "abcdefgh")
    for i, (_, W) in enumerate(model.matrices()):
        r = min(W.shape)
        s = torch.ones(r) if kind == "orthogonal" else torch.linspace(0.2, 1, r)
        W.data = with_spectrum(*W.shape, sigma_limit(W, 1.0) * s.double(), seed=100 * seed + i)
    return model.double()


# ---- the search ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("D", [16, 64, 256])
def test_search_finds_the_constant_of_linear_maps(D, layers):
    generator = torch.Generator().manual_seed(D)
    W = [torch.randn(D, D, generator=generator, dtype=torch.float64) for _ in range(layers)]
    true = torch.linalg.matrix_norm(torch.linalg.multi_dot(W[::-1]) if layers > 1 else W[0], ord=2).item()
    found = climb(lambda x: x @ W[0].T @ W[-1].T if layers > 1 else x @ W[0].T, torch.randn(8, 1, D, generator=generator), steps=120)
    assert 0.999 * true <= found.max() <= true * (1 + verify_lipschitz.TOLERANCE)


@pytest.mark.parametrize("heads, positions", [(1, "rope"), (2, "rope"), (4, "rope"), (8, "rope"), (4, "bias")])
def test_search_of_attention_is_near_what_twenty_times_the_budget_finds(heads, positions):
    model = attention_layer("orthogonal", heads, positions)
    block, T = model.blocks[0], 12

    def start(seed):
        x = torch.randn(8, T, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return torch.cat([x / rms(x)[..., None], verify_lipschitz.split_tokens(block, heads, T, 1.0)])

    def attention(x):
        return block.attention(x)

    found = climb(attention, start(0), 1.0, steps=120).max()
    much = max(climb(attention, start(seed), 1.0, steps=600, seed=seed).max() for seed in range(4))  # 20 times the budget
    terms = shakespeare.attention_terms(model, block, 1.0, search=10)
    assert 0.9 * much <= found and max(much, found) <= terms["value"] + terms["pattern"]


def test_search_stays_in_the_ball_and_finds_a_steep_place_far_away():
    """A map that is steep only where a coordinate is large: inside the ball it is found, and nothing beyond it is used."""
    def f(x):
        return F.softplus(100 * (x - 1.5)) / 100  # slope 0 at rest, 1 above 1.5

    x = torch.randn(16, 1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert climb(f, x, radius=0.5, steps=150).max() < 1e-3  # no coordinate can exceed 0.5 * sqrt(4) = 1
    assert 0.9 < climb(f, x, radius=2.0, steps=150).max() <= 1 + verify_lipschitz.TOLERANCE


def test_the_quotient_of_one_linear_function():
    """With `aim`, l2 -> |.|: the length of the row."""
    W = torch.randn(10, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    aim = F.one_hot(torch.arange(10), 10).double()
    found = climb(lambda x: F.linear(x, W), torch.zeros(10, 1, 30), steps=10, aim_SO=aim)
    torch.testing.assert_close(found, W.norm(dim=1), rtol=1e-8, atol=0)


# ---- what is true is held --------------------------------------------------------------------------------------------
def test_true_certificates_are_held(runs, capsys):
    assert verify_lipschitz.main([str(runs)], QUICK) == 0
    printed = capsys.readouterr().out
    assert "3 verified: 3 held, 0 broken" in printed
    for name, wheres in (("mlp", {"layer 1", "layer 3", "network", "test images"}),
                         ("content", {"block 1", "block 2", "block 2 q", "head", "network", "stream", "validation text"}),
                         ("position", {"block 1", "block 2 o", "head", "network"})):
        result = json.loads((runs / name / "verify.json").read_text())
        assert result["held"] and wheres <= {row["where"] for row in result["rows"]}
        whole = [row for row in result["rows"] if row["where"] == "network"]
        assert 0.02 < max(row["tightness"] for row in whole) <= 1
        for point in result["curve"]:
            assert point["certified"] <= point["attacked"]
        assert (runs / name / "verify.png").stat().st_size > 10_000
    assert not any("attention logits" in row["what"] for row in result["rows"])  # no content, no such claim


def test_a_published_checkpoint(tmp_path, runs, monkeypatch):
    from test_shakespeare import published
    published(tmp_path / "small.npz")
    text = shakespeare.VOCABULARY * 200
    (tmp_path / "text").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert verify_lipschitz.main([str(tmp_path / "small.npz")], Config(budget=0.2, windows=4, data=str(tmp_path / "text"))) == 0
    assert json.loads((tmp_path / "runs/verify_small/verify.json").read_text())["held"]


# ---- what is false is caught -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["mlp", "position", "content"])
def test_a_claim_below_what_is_found_is_caught(name, runs, tmp_path, capsys):
    verify_lipschitz.main([str(runs / name)], QUICK)
    rows = json.loads((runs / name / "verify.json").read_text())["rows"]
    found = max(row["found_log10"] for row in rows if row["where"] == "network" and row["norm"].endswith("RMS->RMS"))
    capsys.readouterr()
    out = copy_of(runs / name, tmp_path, claim=found + math.log10(0.9))
    assert verify_lipschitz.main([str(out)], QUICK) == 1
    assert "BROKEN: network (as printed in summary.json)" in capsys.readouterr().out
    assert not json.loads((out / "verify.json").read_text())["held"]


@pytest.mark.parametrize("name, key, where", [("mlp", "weights.1", "layer 2"), ("content", "blocks.1.q", "block 2 q"),
                                              ("position", "head_VD", "head")])
def test_a_weight_above_its_limit_is_caught(name, key, where, runs, tmp_path, capsys):
    def change(state):
        W = state["model"][key]
        limit = 3.4 if name == "mlp" else 6.0 if name == "content" else 1.0
        W *= 1.01 * sigma_limit(W, limit) / torch.linalg.matrix_norm(W.double(), ord=2)

    assert verify_lipschitz.main([str(copy_of(runs / name, tmp_path, change))], QUICK) == 1
    assert f"BROKEN: {where} (limit on the weights)" in capsys.readouterr().out


def test_a_stored_embedding_above_one_is_caught(runs, tmp_path, capsys):
    out = copy_of(runs / "content", tmp_path, lambda state: state["model"]["embedding_VD"][3].mul_(1.1 / rms(state["model"]["embedding_VD"][3])))
    assert verify_lipschitz.main([str(out)], QUICK) == 1
    assert "BROKEN: embedding" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["mlp", "content"])
def test_weights_that_are_not_finite_are_caught(name, runs, tmp_path, capsys):
    def change(state):
        list(state["model"].values())[-1].view(-1)[0] = math.nan

    assert verify_lipschitz.main([str(copy_of(runs / name, tmp_path, change))], QUICK) == 1
    assert "is not finite" in capsys.readouterr().out


@pytest.mark.parametrize("heads", [4, 8])
def test_the_papers_formula_is_caught_and_ours_is_held(heads):
    model = attention_layer("orthogonal", heads)
    block, table = model.blocks[0], Table()
    found = climb(lambda x: block.attention(x), verify_lipschitz.split_tokens(block, heads, 12, 1.0), 1.0).max().item()
    terms = shakespeare.attention_terms(model, block, 1.0, search=10)
    table.add("attention", "ours", terms["value"] + terms["pattern"], found, "")
    assert not table.broken()
    table.add("attention", "the paper's code", verify_lipschitz.reference_terms(model, block, 1.0)[0], found, "")
    assert [row["what"] for row in table.broken()] == ["the paper's code"]


def test_false_certificates_of_predictions_are_caught(runs, monkeypatch, capsys):
    honest_mlp, honest_tokens = mlp_cifar.certified_radii, shakespeare.token_margins
    monkeypatch.setattr(mlp_cifar, "certified_radii", lambda *a: 30 * honest_mlp(*a))
    monkeypatch.setattr(shakespeare, "token_margins", lambda *a: 1e6 * honest_tokens(*a))
    assert verify_lipschitz.main([str(runs / "mlp"), str(runs / "position")], QUICK) == 1
    printed = capsys.readouterr().out
    assert "BROKEN: test images (share of predictions right" in printed and "BROKEN: validation text (share of predictions right" in printed


# ---- what cannot be checked ------------------------------------------------------------------------------------------
class Payload:
    def __reduce__(self):
        return os.system, ("touch PWNED",)


@pytest.mark.parametrize("kind", ["missing", "truncated", "foreign", "hostile", "config", "summary"])
def test_what_cannot_be_checked(kind, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = copy_of(runs / "mlp", tmp_path)
    path = out / "checkpoint.pt"
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif kind == "foreign":
        torch.save(dict(script="other"), path)
    elif kind == "hostile":
        torch.save(dict(script="mlp_cifar", config=Payload()), path)
    elif kind == "config":
        torch.save({**torch.load(path, weights_only=True), "config": dict(width=8)}, path)
    else:
        (out / "summary.json").write_text("{")
    assert verify_lipschitz.main([str(out)], QUICK) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and str(out) in said and "could not be checked" in said
    assert not Path("PWNED").exists() and not (out / "verify.json").exists()


def test_the_command_line(runs, tmp_path):
    began = time.time()
    helped = command("--help")
    assert helped.returncode == 0 and time.time() - began < 20 and "--budget" in helped.stdout
    wrong = command("--budget", "0")
    assert wrong.returncode == 2 and "--budget 0.0: must be" in wrong.stderr
    missing = command(tmp_path / "nowhere")
    assert missing.returncode == 2 and "Traceback" not in missing.stderr and "cannot be used as a checkpoint" in missing.stderr


def test_without_runs_two_small_ones_are_trained_and_verified(tmp_path, monkeypatch, runs):
    monkeypatch.chdir(tmp_path)
    assert verify_lipschitz.main([], QUICK) == 0
    assert sorted(p.parent.name for p in Path("runs").glob("*/verify.json")) == ["verify_mlp_cifar", "verify_shakespeare"]
    assert len(verify_lipschitz.find_runs([])) == 2
