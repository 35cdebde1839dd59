"""results/: each script in shortened form, the commands of its README, and its tables."""

import csv
import dataclasses
import functools
import importlib
import json
import math
import os
import pickle
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "results"))

import attention  # noqa: E402
import benchmark  # noqa: E402
import compare  # noqa: E402
import enforcement  # noqa: E402
import frontier  # noqa: E402
import measured  # noqa: E402
import method  # noqa: E402
import mlp_cifar  # noqa: E402
import peers  # noqa: E402
import precision  # noqa: E402
import published  # noqa: E402
import protocol  # noqa: E402
import shakespeare  # noqa: E402
from test_shakespeare import REFERENCE, Payload, tune_little  # noqa: E402
from test_shakespeare import published as published_file  # noqa: E402

PASS_ON = dict(compare=None, enforcement="mlp_cifar", method="mlp_cifar")  # flags that they do not know, to a tutorial
CLIMB = frontier.verify_lipschitz.climb
README = (ROOT / "results" / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README.replace("\\\n", ""), re.S)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines()
            if not line.startswith("#")]
MLP = "--data stand-in --width 16 --lowpass 6 --steps 6 --batch 64".split()
TEXT = ("--data stand-in --width 16 --blocks 2 --heads 2 --hidden 32 --seq_len 24 --steps 4 --batch 4 "
        "--length 10").split()


@pytest.fixture(scope="module", autouse=True)
def small_data(few_images, little_text):
    """Little data, certificates that are tuned in few steps, and no picture of each run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shakespeare, "tuned", tune_little)
        patch.setattr(mlp_cifar, "draw", lambda path, *rest: path.write_bytes(b"a picture"))
        patch.setattr(shakespeare, "draw", lambda path, *rest: path.write_bytes(b"a picture"))
        yield


# ==== compare.py ==================================================================================
def few_pairs(monkeypatch, name):
    pairs = {"none": dict(muon=(0.2, (1,)), adamw=(1e30, (1,))),
             "soft_cap": dict(muon=((0.2, 0.3), (1.5, 4)), adamw=(0.001, (1.5,)))}
    monkeypatch.setitem(compare.STUDIES[name], "pairs", pairs)


def test_compare(tmp_path, monkeypatch, capsys):
    few_pairs(monkeypatch, "mlp_cifar")
    out = tmp_path / "all"
    command = ["mlp_cifar", *MLP, "--seeds", "2", "--out", str(out)]
    compare.main([*command, "--minutes", "0"])
    assert "10 of 10 runs are to come" in capsys.readouterr().out and not list(out.glob("*_seed*"))
    (out / "muon_none_1_lr0.2_seed0").mkdir()  # what a run interrupted at its start leaves
    compare.main(command)
    text = capsys.readouterr().out
    with open(out / "compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 and sum(row["accuracy"] == "" for row in rows) == text.count("diverged") == 2
    summary_file, = out.glob("muon_soft_cap_4_*_seed1/summary.json")
    summary = json.loads(summary_file.read_text())
    row = next(row for row in rows if row["w_max"] == "4" and row["seed"] == "1")
    assert float(row["accuracy"]) == summary["val_accuracy"] and set(summary["w_max"].values()) == {4.0}
    assert float(row["certified"]) == summary["certified_accuracy"]["36/255"]
    assert float(row["bound_log10"]) == summary["lipschitz_product_log10"]
    table = text[text.index("| constraint |"):]
    assert "±" in table and "2 seed(s)" in text and (out / "compare.png").stat().st_size > 5000
    times = {path: path.stat().st_mtime_ns for path in out.glob("*/summary.json")}
    compare.main(command)  # nothing is done twice
    assert times == {path: path.stat().st_mtime_ns for path in out.glob("*/summary.json")}
    assert table in capsys.readouterr().out
    for wrong, says in (([*command, "--batch", "32"], "holds a comparison with --batch 64, not 32"),
                        ([*command[:-1], str(summary_file.parent)], "holds no comparison; give another --out")):
        with pytest.raises(SystemExit) as stop:
            compare.main(wrong)
        assert stop.value.code == 2 and says in capsys.readouterr().err


def test_compare_transformers(tmp_path, monkeypatch, capsys):
    few_pairs(monkeypatch, "shakespeare")
    del compare.STUDIES["shakespeare"]["pairs"]["soft_cap"]
    out = tmp_path / "all"
    compare.main(["shakespeare", *TEXT, "--out", str(out)])
    text = capsys.readouterr().out
    assert "heads counted" in text and text.count("diverged") == 1
    assert (out / "compare.png").exists()
    for optimizer, momentum, warmup in (("muon", 0.95, 0), ("adamw", 0.9, 20)):
        file, = out.glob(f"{optimizer}_none_1_*_seed0/config.json")
        config = json.loads(file.read_text())
        assert (config["optimizer"], config["momentum"], config["warmup"]) == (optimizer, momentum, warmup)


def test_compare_searches_rates_on_data_held_out(tmp_path, monkeypatch, capsys):
    few_pairs(monkeypatch, "mlp_cifar")
    monkeypatch.setitem(compare.STUDIES["mlp_cifar"], "holdout", 100)
    compare.main(["mlp_cifar", *MLP, "--search", "--out", str(tmp_path)])
    with open(tmp_path / "rates.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    searches = compare.rates_of(compare.STUDIES["mlp_cifar"])
    for point in searches:
        search = [row for row in rows if tuple(row.values())[:3] == (
            point["optimizer"], point["constraint"], str(point["w_max"]))]
        rates = {float(row["lr"]): float(row["accuracy"] or 0) for row in search}
        best = max(rates.values())
        assert point["lr"] in rates
        assert any({rate / 2, 2 * rate} <= rates.keys() for rate in rates if rates[rate] == best)
    assert sorted({(row["optimizer"], row["constraint"], row["w_max"]) for row in rows}) == [
        ("adamw", "none", "1"), ("adamw", "soft_cap", "1.5"), ("muon", "none", "1"),
        ("muon", "soft_cap", "1.5"), ("muon", "soft_cap", "4")]
    file, = tmp_path.glob("muon_none_1_lr0.2_seed0/config.json")
    assert json.loads(file.read_text())["holdout"] == 100
    said = capsys.readouterr().out
    assert said.count("best learning rate") + said.count("diverged at all rates tried") == len(searches)


def test_a_search_of_rates_ends_inside_its_grid():
    def rows_of(rates, optimizer):
        return [dict(optimizer=optimizer, constraint="none", w_max=1, seed=0, lr=lr, **accuracy)
                for lr, accuracy in rates.items()]

    peak_at_4 = {2.0**i: dict(accuracy=1 / (1 + abs(i - 2))) for i in range(-3, 9)}
    found = rows_of({1.0: peak_at_4[1.0]}, "muon") + rows_of({1.0: {}}, "adamw")  # the second diverges at each rate
    while points := compare.rates_beside(found):
        for point in points:
            accuracy = peak_at_4[point["lr"]] if point["optimizer"] == "muon" else {}
            found.append(dict(point, **accuracy))
    assert sorted(row["lr"] for row in found if row["optimizer"] == "muon") == [0.5, 1, 2, 4, 8]
    assert sorted(row["lr"] for row in found if row["optimizer"] == "adamw") == [0.5, 1, 2]
    assert compare.beside_the_best({1.0: 0.5, 2.0: 0.6, 4.0: 0.6}) == [8.0]  # equal ones are both gone beyond


def test_a_pair_may_have_a_rate_for_each_strength():
    study = dict(pairs={"specnorm": dict(muon=(0.1, (1, 2, 4)), adamw=((0.01, 0.02), (1, 2)))})
    rates = [(point["optimizer"], point["w_max"], point["lr"]) for point in compare.points_of(study, 1)]
    assert rates == [("muon", 1, 0.1), ("muon", 2, 0.1), ("muon", 4, 0.1), ("adamw", 1, 0.01), ("adamw", 2, 0.02)]
    searched = [(point["optimizer"], point["w_max"], point["lr"]) for point in compare.rates_of(study)]
    assert searched == [("muon", 2, 0.1), ("adamw", 1, 0.01), ("adamw", 2, 0.02)]


def test_compare_starts_with_what_it_is_run_for():
    for study in compare.STUDIES.values():
        assert list(study["pairs"])[:3] == ["soft_cap", "hard_cap", "hammer"] and len(study["pairs"]) == 8


@pytest.mark.parametrize("flags", [["--w_max", "3"], ["--seed", "1"], ["--lr", "0.1"], ["--nothing", "1"]])
def test_compare_refuses(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        compare.main(["mlp_cifar", *MLP, "--out", str(tmp_path / "all"), *flags])
    assert stop.value.code == 2 and flags[0] in capsys.readouterr().err and not (tmp_path / "all").exists()


def test_accuracy_at_equal_bounds():
    runs = [dict(bound_log10=b, accuracy=a) for b, a in ((1.0, 0.3), (2.0, 0.5), (3.0, 0.4))]
    within = [compare.accuracy_within(runs, bound) for bound in (0.9, 1.0, 1.5, 2.0, 2.5, 9.0)]
    np.testing.assert_allclose(within, [np.nan, 0.3, 0.4, 0.5, 0.5, 0.5])
    assert compare.spread([0.5, 0.52, np.nan]) == "51.0 ± 1.4" and compare.spread([np.nan]) == "-"


# ==== The other scripts ===========================================================================
def test_enforcement(capsys):
    enforcement.main(MLP)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["soft_cap", "hard_cap", "specnorm", "stiefel"]
    for line in lines:
        assert "over 6 steps" in line and 0.2 < float(line.split()[5]) < 1 + 1e-4


def test_enforcement_sees_what_is_too_large(capsys, monkeypatch, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("def nothing(W, w_max, step_norm=0.0):\n    return 3 * W\n")
    enforcement.main([*MLP, "--constraint", f"{mine}:nothing"])
    assert float(capsys.readouterr().out.split("limit ")[1].split()[0]) > 1


def test_method(tmp_path, capsys):
    method.main([*MLP, "--out", str(tmp_path)])
    text = capsys.readouterr().out
    assert text.count("largest") == 9 and "adamw none" in text and "muon stiefel: largest 3.5" in text
    assert (tmp_path / "method.png").stat().st_size > 5000


def test_attention(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attention, "SEEDS", (0, 1))
    monkeypatch.setattr(attention, "RUNS", (attention.RUNS[0], attention.RUNS[2]))
    attention.main([*TEXT, "--out", str(tmp_path)])
    capped, promise, free = capsys.readouterr().out.splitlines()
    assert "adamw, no constraint" in free
    bounds = []
    for line in (capped, free):
        bounds.append(float(line.split("bound ")[1].split()[0]))
        assert 0 < float(line.split("training ")[1].split()[0]) < bounds[-1]
    assert bounds[0] <= float(promise.split("limit ")[1])
    assert (tmp_path / "attention.png").stat().st_size > 5000


def test_frontier(tmp_path, capsys, monkeypatch):
    runs, table = [tmp_path / "position", tmp_path / "paper"], str(tmp_path / "frontier.csv")
    for run, preset in zip(runs, ("plain100", "paper")):
        shakespeare.main(shakespeare.parse_arguments([*TEXT, "--preset", preset, "--out", str(run)]))
    monkeypatch.setattr(frontier.verify_lipschitz, "climb", functools.partial(few_steps, steps=6))
    options = ["--csv", table, "--out", str(tmp_path / "frontier.png")]
    frontier.main([*map(str, runs), *options])
    frontier.main([str(runs[0]), *options])  # (takes the place of its first row)
    with open(table, newline="") as file:
        rows = {row["architecture"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {"attention by position", "the paper's"}
    for run, row in zip(runs, [rows["attention by position"], rows["the paper's"]]):
        summary = json.loads((run / "summary.json").read_text())
        found, certified, product = (float(row[f"{name}_log10"]) for name in ("found", "certified", "product"))
        assert found <= certified == summary["lipschitz_log10"] <= product
        assert float(row["accuracy_percent"]) == pytest.approx(100 * summary["val_accuracy"], abs=0.051)
        again = shakespeare.parse_arguments([*shlex.split(row["flags"])])
        stored = json.loads((run / "config.json").read_text())
        assert all(getattr(again, key) == stored[key] for key in stored if key not in ("data", "out"))
    assert "2 runs drawn" in capsys.readouterr().out and (tmp_path / "frontier.png").stat().st_size > 5000


def few_steps(f, x_STD, radius, asked, steps):
    return CLIMB(f, x_STD, radius, steps)


def test_precision_and_protocol(tmp_path, capsys, monkeypatch):
    folders = [str(tmp_path / "mlp"), str(tmp_path / "text")]
    mlp_cifar.main(mlp_cifar.parse_arguments([*MLP, "--out", folders[0]]))
    summary = shakespeare.main(shakespeare.parse_arguments([*TEXT, "--out", folders[1]]))
    capsys.readouterr()
    precision.main([*folders, "--csv", str(tmp_path / "precision.csv")])
    assert capsys.readouterr().out.count("float8 e4m3") == 2
    with open(tmp_path / "precision.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["format"] for row in rows] == 2 * ["full", "bfloat16", "float8 e4m3", "int8", "6 bits"]
    losses = [float(row["loss"]) for row in rows]
    assert len(set(losses)) == 10 and np.ptp(losses[:4]) < 0.1 and np.ptp(losses[5:9]) < 0.1
    with pytest.raises(mlp_cifar.UserError, match="is no run folder"):
        precision.main([str(tmp_path)])
    (tmp_path / "other").write_text("ab" * 5000)
    for script in (precision, protocol, frontier):  # another text than the run's
        with pytest.raises(shakespeare.UserError, match="other characters than the run's"):
            script.main([folders[1], "--data", str(tmp_path / "other")])
    train, (images_NP, labels_N), name = mlp_cifar.load_data(mlp_cifar.Config(data="stand-in"))
    monkeypatch.setattr(mlp_cifar, "load_data", lambda config: (train, (images_NP, labels_N + 2), name))
    with pytest.raises(mlp_cifar.UserError, match="more classes than the run's"):
        precision.main(folders[:1])
    protocol.main(folders[1:])
    whole, paper = (float(share) for share in re.findall(r"([\d.]+) %", capsys.readouterr().out))
    assert whole == pytest.approx(100 * summary["val_accuracy"], abs=0.01) and 0 <= paper <= 100


def test_the_papers_formula():
    """One head, norms 1, a = 1/2: (1/2 + 1/2 (1/3) (1 + 2)) (1/2 + 1/2) = 1. Four heads: no difference."""
    for heads in (1, 4):
        config = shakespeare.Config(width=16, blocks=1, heads=heads, hidden=32, activation="maxmin")
        model = shakespeare.Transformer(config, published.VOCABULARY)
        assert protocol.paper_formula(model) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("call", [os.system, eval, exec, subprocess.call, np.load, getattr], ids=lambda f: f.__name__)
def test_a_malicious_file_is_refused_and_runs_nothing(call, tmp_path):
    witness = tmp_path / "witness"
    arguments = {os.system: f"touch {witness}", subprocess.call: ["touch", str(witness)]}
    payload = Payload(call, arguments.get(call, f"open({str(witness)!r}, 'w')"))
    if call in (os.system, eval, exec, subprocess.call):  # the payload works where nobody looks
        pickle.loads(pickle.dumps(payload))
        assert witness.exists()
        witness.unlink()
    path = published_file(tmp_path / "bad.npz", args=dict(num_heads=payload))
    with pytest.raises(shakespeare.UserError, match="nothing in it was run"):
        published.load_published(path)
    assert not witness.exists()


@pytest.mark.parametrize("kind", ["text", "truncated", "shapes", "missing", "not finite", "vocabulary"])
def test_wrong_published_files(kind, tmp_path):
    path = published_file(tmp_path / "x.npz")
    (tmp_path / "play.txt").write_text((published.VOCABULARY * 200)[:12_000])
    weights = {i: [REFERENCE[f"gpt_weight_{i}"]] for i in range(14)}
    data, says = tmp_path / "play.txt", "x.npz: is no checkpoint in the published form"
    if kind == "text":
        path.write_text("hello")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:3000])
    elif kind == "shapes":
        published_file(path, weights_checkpoint_0={i: [np.ones((3, 4))] for i in range(14)})
    elif kind == "missing":
        published_file(path, weights_checkpoint_0={0: weights[0]})
    elif kind == "not finite":
        published_file(path, weights_checkpoint_0={**weights, 13: [weights[13][0] * math.nan]})
        says = "head_VD of the model is not finite"
    else:
        data, says = "stand-in", "other characters"
    with pytest.raises(shakespeare.UserError, match=says):
        published.main([str(path), "--data", str(data), "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_published_file_becomes_a_run_folder(tmp_path, capsys):
    (tmp_path / "play.txt").write_text((published.VOCABULARY * 200)[:12_000])
    out = tmp_path / "run"
    arguments = [str(published_file(tmp_path / "x.npz")), "--data", str(tmp_path / "play.txt"), "--out", str(out)]
    summary = published.main(arguments)
    assert summary["preset"] == "published" and math.isfinite(summary["lipschitz_log10"]) and summary["w_max"] is None
    assert "Lipschitz constant" in capsys.readouterr().out and (out / "curves.png").exists()
    with pytest.raises(OSError):  # an old run is not overwritten
        published.main(arguments)
    text = shakespeare.main(shakespeare.Config(sample=str(out), prompt="ROMEO:", length=30))
    assert text.startswith("ROMEO:") and len(text) == 6 + 30 and capsys.readouterr().out == text + "\n"
    stored = shakespeare.Config(**json.loads((out / "config.json").read_text()))
    assert shakespeare.main(dataclasses.replace(stored, out=str(out))) == summary


def test_benchmark(monkeypatch, capsys):
    """Each function is called once, but for the slowest."""
    def call_once(functions, **how):
        for name, f in functions.items():
            if not any(word in name for word in ("orthogonal", "torch.optim.Muon", "SVD", "bfloat16")):
                f()
        return dict.fromkeys(functions, 1.0)

    monkeypatch.setattr(benchmark, "in_turns", call_once)
    monkeypatch.setitem(shakespeare.PRESETS, "paper", dict(width=16, hidden=32, heads=2, seq_len=24))
    benchmark.main(["mlp", "shakespeare", "constraint"])
    text = capsys.readouterr().out
    for words in ("Muon + soft cap", "exact SVD clipping", "soft cap waiting", "characters a second"):
        assert words in text
    with pytest.raises(SystemExit):
        benchmark.main(["everything"])


def test_benchmark_takes_turns():
    calls = []
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    ms = benchmark.in_turns(functions, turns=2, seconds=0, least=3)
    assert set(ms) == {"a", "b"} and "".join(calls) == "ab" + 2 * "aaabbb" and min(ms.values()) > 0


# ==== peers.py ====================================================================================
PEERS = "--data stand-in --width 16 --lowpass 6 --batch 64 --minutes 0.01 --seeds 1".split()


def test_peers(tmp_path, capsys, monkeypatch):
    certificate = mlp_cifar.certificate
    monkeypatch.setattr(mlp_cifar, "certificate", lambda model, steps: certificate(model))  # takes seconds
    table = str(tmp_path / "peers.csv")
    names = [name for name in peers.PEERS if peers.bjorck_norm or name != "SpectralLinear"]
    peers.main([*PEERS, "--layers", ";".join(names), "--csv", table])
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layers"] for row in rows] == names
    assert [row["layers"] for row in rows if row["batch"] == "8"] == ["AOL, Adam, small batches", "AOL, SGD"]
    for row in rows:
        assert 100 >= float(row["accuracy"]) >= float(row["certified_36"]) >= float(row["certified_108"]) >= 0
        assert int(row["steps"]) > 0 and "--width 16" in row["flags"] and "stand-in" in row["flags"]
    before = Path(table).read_text()
    peers.main([*PEERS, "--layers", ";".join(names), "--csv", table])  # nothing is done twice
    assert Path(table).read_text() == before
    assert capsys.readouterr().out.count("\n| ") >= 2 * (1 + len(names))  # each time a table
    train = peers.train
    search = [*PEERS, "--layers", "AOL, Adam", "--search", "--holdout", "100", "--csv", table + ".rates"]
    monkeypatch.setattr(peers, "train", lambda config, *rest: dict(
        train(config, *rest), certified_36=100 - abs(config.lr / peers.PEERS["AOL, Adam"] - 0.5)))  # best at half
    for times in ((1, 0.5, 2, 0.25), ()):  # none is tried twice
        peers.main(search)
        rates = re.findall(r"lr ([\d.]+)", capsys.readouterr().out)
        assert [float(rate) for rate in rates] == [factor * peers.PEERS["AOL, Adam"] for factor in times]
    with open(table + ".rates", newline="") as file:
        assert ["--holdout 100" in row["flags"] for row in csv.DictReader(file)] == [True] * 4
    assert Path(table).read_text() == before


def test_rates_of_peers_are_inside_their_grids():
    """Each is the best of those tried on images held out, and has a worse one on either side. The table has them."""
    with open(ROOT / "results" / "peers_rates.csv", newline="") as file:
        tried = list(csv.DictReader(file))
    for name, rate in peers.PEERS.items():
        shares = {float(row["lr"]): float(row["certified_36"] or 0) for row in tried if row["layers"] == name}
        assert shares[rate] == max(shares.values()) and not compare.beside_the_best(shares), name
    with open(ROOT / "results" / "peers.csv", newline="") as file:
        for row in csv.DictReader(file):
            assert float(row["lr"]) == peers.PEERS[row["layers"]]


def test_sgd_is_as_its_authors_have_it():
    config = mlp_cifar.Config.of("certified", width=16, depth=2, lowpass=4, lr=0.3)
    _, (optimizer,), _ = peers.build(config, "AOL, SGD", torch.zeros(4, 3072, dtype=torch.uint8), 10)
    assert isinstance(optimizer, torch.optim.SGD)
    for group in optimizer.param_groups:
        assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 5e-4)
        assert group["peak_lr"] == 0.3


@pytest.mark.parametrize("flags", [["--lr", "1"], ["--seed", "3"], ["--optimizer", "adamw"], ["--layers", "x"]])
def test_peers_refuse(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        peers.main([*MLP, *flags])
    assert stop.value.code == 2 and flags[0] in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(5, 3), (4, 4), (2, 7)])
def test_aol_has_norm_1(shape):
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-3, 1, 1e3):
        W = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        assert torch.linalg.matrix_norm(peers.Aol()(W), 2) <= 1 + 1e-12
    orthogonal = torch.nn.init.orthogonal_(torch.empty(6, 3, dtype=torch.float64))
    torch.testing.assert_close(peers.Aol()(orthogonal), orthogonal)


def test_peers_have_the_same_margin_in_the_loss():
    """Networks with every norm at its limit, in the peer's own norm, have logits of the same size."""
    config = mlp_cifar.Config.of("certified", width=16, depth=3, lowpass=4)
    images_NP = torch.zeros(4, 3072, dtype=torch.uint8)
    _, _, ours = peers.build(config, "soft cap", images_NP, 10)
    _, _, theirs = peers.build(config, "AOL, Adam", images_NP, 10)
    # RMS->RMS norms of 1 are sigmas of sqrt(fan_out / fan_in), from 48 frequencies to 10 logits.
    assert (ours, theirs) == (30, pytest.approx(30 * (10 / 48) ** 0.5))


def test_peers_start_with_singular_values_of_1():
    """Else a layer's gradient would be larger by as much as its matrix is smaller than what it stands for."""
    config = mlp_cifar.Config.of("certified", width=16, depth=3, lowpass=4)
    model, _, _ = peers.build(config, "AOL, Adam", torch.zeros(4, 3072, dtype=torch.uint8), 10)
    for layer in model.weights.parametrizations.values():
        values = torch.linalg.svdvals(layer.original)
        torch.testing.assert_close(values, torch.ones_like(values))


# ==== The README and the tables ===================================================================
def help_of(script, capsys):
    """What --help prints; of scripts that pass flags on to a tutorial, that of the tutorial too."""
    module = importlib.import_module(script)
    start = getattr(module, "parse_arguments", None) or module.main
    with pytest.raises(SystemExit) as stop:
        start(["--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_of_command(command, capsys):
    words = shlex.split(command)
    assert words[0] == "python" and (ROOT / words[1]).exists()
    script = Path(words[1]).stem
    text = help_of(script, capsys)
    if script in PASS_ON:
        text += help_of(PASS_ON[script] or words[2], capsys)
    for flag in (word for word in words if word.startswith("--")):
        assert re.search(rf"{flag}\b", text), flag
    if script in ("mlp_cifar", "shakespeare", "nanogpt_lipschitz"):
        importlib.import_module(script).parse_arguments(words[2:])  # the preset exists, numbers are numbers


def test_the_baseline_has_the_rates_that_were_searched():
    """The best row of its search, and none of its rates is the end of a grid."""
    preset = importlib.import_module("nanogpt_lipschitz").PRESETS["tiny_baseline"]
    with open(ROOT / "results" / "norm_free_searches.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["network"] == "tiny_baseline" and "--lr" in row["changed"]
                and row["shape"] == "tiny" and "offset" not in row["changed"]]
    settings = [dict(re.findall(r"--(\w+) ([\d.]+)", row["changed"])) for row in rows]
    best = settings[min(range(len(rows)), key=lambda i: float(rows[i]["held_out_loss"]))]
    for name in ("lr", "embed_lr", "head_lr"):
        assert float(best[name]) == preset[name]
        assert min(float(s[name]) for s in settings) < preset[name] < max(float(s[name]) for s in settings)


def test_each_script_has_a_command():
    scripts = {path.name for path in (ROOT / "results").glob("*.py")}
    assert scripts == {Path(shlex.split(command)[1]).name for command in COMMANDS if "results/" in command}


def check_norm_free(path):
    norm_free = importlib.import_module("norm_free")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for shape, steps in {(row["shape"], int(row["steps"])) for row in rows}:
        lines = norm_free.table(rows, shape, steps)
        assert len(lines) > 2
        for line in lines:
            assert line in README


def check_presets_mlp(path):
    """Of several seeds mean and standard deviation are in the row of that run, else the figures."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for name in dict.fromkeys(row["run"] for row in rows):
        runs = [row for row in rows if row["run"] == name]
        lines = "\n".join(line for line in README.splitlines() if line.startswith(f"| `{name}`"))
        for column in list(runs[0])[list(runs[0]).index("accuracy_percent"):]:
            values = [float(row[column]) for row in runs if row[column]]
            if len(values) < 3 or column == "seconds":
                assert not values or re.search(rf"\b{runs[0][column]}\b", README), (name, column)
                continue
            if column == "tight_bound" and name in ("tight", "certified"):
                continue  # the product, for these
            if column in ("certified_72_percent", "certified_108_percent", "certified_1_percent"):
                if name not in ("tight", "certified"):
                    continue  # not in the table
            mean, deviation = statistics.mean(values), statistics.stdev(values)
            cells = {f"{mean:.{digits}f} ± {deviation:.{digits}f}" for digits in range(4)}
            assert any(f"{cell} " in lines or f"{cell}*" in lines for cell in cells), (name, column, cells)


def check_peers(path):
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["layers"] for row in rows} == peers.PEERS.keys() - {"AOL, Adam, small batches"}  # the worse Adam
    assert "\n".join(peers.table(rows)) in README


def read_comparison(path):
    """The rows of compare.py, with numbers where it has numbers. What diverged has no figures."""
    rows = []
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            words = {key: row.pop(key) for key in ("optimizer", "constraint")}
            seed = int(row.pop("seed"))
            rows.append(dict(words, seed=seed, **{key: float(value) for key, value in row.items() if value}))
    return rows


def check_comparison(path):
    study = compare.STUDIES[path.stem.removeprefix("comparison_")]
    rows = read_comparison(path)
    seeds = 1 + max(row["seed"] for row in rows)
    of_study = [tuple(point.values()) for point in compare.points_of(study, seeds)]
    assert sorted(of_study) == sorted(tuple(row[key] for key in compare.SET_HERE) for row in rows)
    assert "\n".join(compare.table(study, rows)) in README


def test_rates_of_the_comparison_are_inside_their_grids():
    """Each is the best of those tried on training data held out, and has a worse one on either side."""
    with open(ROOT / "results" / "learning_rates.csv", newline="") as file:
        tried = list(csv.DictReader(file))
    for name, study in compare.STUDIES.items():
        for point in compare.rates_of(study):
            kind = (name, point["optimizer"], point["constraint"], f"{point['w_max']:g}")
            search = [row for row in tried if tuple(row.values())[:4] == kind]
            rates = {float(row["lr"]): float(row["accuracy"] or 0) for row in search}
            assert rates[point["lr"]] == max(rates.values()) and not compare.beside_the_best(rates), kind
            assert f"{point['lr']:g}: {100 * max(rates.values()):.1f} %" in README


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.csv")), ids=lambda path: path.name)
def test_table(path):
    """Every figure of a CSV file is in the README, but for logarithms; of several seeds the means."""
    if path.name == "norm_free.csv":
        return check_norm_free(path)
    if path.name == "presets_mlp_cifar.csv":
        return check_presets_mlp(path)
    if path.name == "peers.csv":
        return check_peers(path)
    if path.name.startswith("comparison_"):
        return check_comparison(path)
    if path.name in ("measured.csv", "norm_free_searches.csv", "peers_rates.csv", "learning_rates.csv"):
        return None  # see below; lists that no table repeats
    known = set(re.findall(r"\d[\d.e]*", README.replace(",", " ")))
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows and all(None not in row and None not in row.values() for row in rows)
    for row in rows:
        for column, value in row.items():
            if re.fullmatch(r"[\d.]+", value) and "log10" not in column and column != "seeds":
                assert value in known, (column, value)


# ==== measured.py =================================================================================
def git(folder, *words):
    settings = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    return subprocess.run(["git", *settings, *words], cwd=folder, check=True, capture_output=True,
                          text=True).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_measured_names_what_changed(tmp_path):
    source = '"""Doc."""\nLIMIT = 2\n\n\ndef f(x):\n    """Doc."""\n    return x\n\n\ndef g(x):\n    return x\n'
    code = tmp_path / "code.py"
    code.write_text(source)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    commit = git(tmp_path, "rev-parse", "--short", "HEAD")
    code.write_text(source.replace("Doc.", "Other doc.").replace("return x", "return x  # comment"))
    assert measured.changed(commit, "code.py", tmp_path) == []
    code.write_text(source.replace("LIMIT = 2", "LIMIT = 3").replace("def g(x):\n    return x", "def h(x):\n    return x"))
    assert measured.changed(commit, "code.py", tmp_path) == ["LIMIT", "h", "g"]


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_replay_compares_a_commit_with_the_code_as_it_is(tmp_path, capsys):
    """Comments change nothing; another constant shows in weights and loss; a commit may not run."""
    source = """import argparse, json, pathlib, torch
parser = argparse.ArgumentParser()
for name in ("--data", "--out"):
    parser.add_argument(name)
options = parser.parse_args()
folder = pathlib.Path(options.out)
folder.mkdir()
W = torch.full((2,), 3.0)
torch.save({"model": {"W": W, "b": torch.zeros(1)}}, folder / "checkpoint.pt")
(folder / "summary.json").write_text(json.dumps({"val_loss": W[0].item(), "lipschitz_log10": 1.0}))
"""
    code = tmp_path / "code.py"
    code.write_text(source)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    rows = [{"table": "t.csv", "commits": git(tmp_path, "rev-parse", "--short", "HEAD")}]

    def replayed():
        measured.replay(rows, ["t.csv"], tmp_path, {"t.csv": ["code.py"]})
        return capsys.readouterr().out.splitlines()[1]

    code.write_text("# a comment\n" + source)
    assert replayed() == "    weights, loss and bound have the same bits: code.py"
    code.write_text(source.replace("3.0", "3.5"))
    assert replayed() == "    weights W; val_loss 3.0 then, 3.5 now: code.py"
    bounds = [({}, {"lipschitz_log10": bound}) for bound in (1.0, 1.5)]
    assert measured.difference(*bounds) == "lipschitz_log10 1.0 then, 1.5 now"
    failed = "does not run: no such flag"
    assert measured.difference(failed, ({}, {})) == "that commit does not run: no such flag"


def test_every_replay_is_of_a_table_and_runs():
    """A replay whose flags the code no longer has would only say so after half an hour."""
    with open(ROOT / "results" / "measured.csv", newline="") as file:
        tables = {row["table"] for row in csv.DictReader(file)}
    assert set(measured.REPLAYS) <= tables
    for command in sorted({command for commands in measured.REPLAYS.values() for command in commands}):
        script, *flags = command.split()
        importlib.import_module(Path(script).stem).parse_arguments(flags)


def test_every_table_and_picture_is_measured():
    with open(ROOT / "results" / "measured.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    files = {path.name for pattern in ("*.csv", "*.png") for path in (ROOT / "results").glob(pattern)}
    assert {row["table"] for row in rows} == files - {"measured.csv"}
    for row in rows:
        assert all(re.fullmatch("[0-9a-f]{7}", commit) for commit in row["commits"].split())
        assert all((ROOT / name).exists() for name in row["rests_on"].split())


def test_lines_of_tables_end_alike():
    """A table that a script writes anew differs from the old one in its figures only."""
    for path in (ROOT / "results").glob("*.csv"):
        assert b"\r" not in path.read_bytes(), path.name
