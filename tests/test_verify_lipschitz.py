"""verify_lipschitz.py: what is valid is held, what was tampered with is reported, the search finds what is there."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import mlp_cifar
import nanogpt_lipschitz
import shakespeare
import verify_lipschitz
from constraints import tune
from matrices import sigma_limit, with_spectrum
from verify_lipschitz import Range, Table, climb, directions

ROOT = Path(__file__).parent.parent
MLP = dict(data="stand-in", steps=30, batch=64, width=16, evals=1, lowpass=6, loss_temperature=5.0)
GPT = dict(data="stand-in", width=16, blocks=2, heads=2, hidden=32, seq_len=24, steps=30, batch=4, evals=1,
           length=1)
NANO = ("--data stand-in --vocab 256 --width 16 --blocks 2 --heads 2 --hidden 32 --seq_len 32 --window 32 --batch 2 "
        "--micro_batch 2 --val_tokens 2000 --steps 4 --evals 1 --residual_scale 1").split()
POSITION = {**GPT, **shakespeare.SMALL, "blocks": 2, "hidden": 32, "residual_scale": 2.0, "steps": 30}


def options(budget=0.01, images=20, windows=1, data=""):
    """What is recomputed does not depend on the search, which is short unless asked for."""
    flags = dict(budget=budget, images=images, windows=windows, data=data)
    return verify_lipschitz.parse_arguments([f"--{name}={value}" for name, value in flags.items()])[1]


@pytest.fixture(scope="module", autouse=True)
def little_work():
    """Little data, no pictures, and certificates tuned for a step or two, in training and here alike."""
    images, text, patch = mlp_cifar.stand_in(600, 200), shakespeare.stand_in(20_000), pytest.MonkeyPatch()
    for script, data in ((mlp_cifar, images), (shakespeare, text), (nanogpt_lipschitz, text)):
        patch.setattr(script, "stand_in", lambda data=data: data)
        patch.setattr(script, "draw", lambda *arguments: None)
        patch.setattr(script, "tune", lambda goal, free, steps: tune(goal, free, min(steps, 2)))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, little_work):
    """A folder with four small finished runs."""
    folder = tmp_path_factory.mktemp("runs")
    mlp_cifar.main(mlp_cifar.Config(**MLP, out=str(folder / "mlp")))
    shakespeare.main(shakespeare.Config(**GPT, out=str(folder / "content")))
    shakespeare.main(shakespeare.Config(**POSITION, out=str(folder / "position")))
    nanogpt_lipschitz.main(nanogpt_lipschitz.parse_arguments([*NANO, "--out", str(folder / "nano")]))
    return folder


def status(folder, **changes):
    """(exit status, verdict, {"where what": verdict of each row})"""
    code = verify_lipschitz.main([str(folder)], options(**changes))
    result = json.loads((folder / "verify.json").read_text())
    return code, result["verdict"], {f"{row['where']} {row['what']}": row["verdict"] for row in result["rows"]}


class Files:
    """A copy of a run, to be changed: summary and config.json, log.jsonl, and state of the checkpoint."""

    def __init__(self, run, out):
        self.out = Path(shutil.copytree(run, out))
        self.summary = json.loads((out / "summary.json").read_text())
        self.config = json.loads((out / "config.json").read_text())
        self.log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        self.state = torch.load(out / "checkpoint.pt", weights_only=True)
        self.settings = self.state["config"]
        self.weights = self.state["model"]

    def write(self):
        (self.out / "summary.json").write_text(json.dumps(self.summary))
        (self.out / "config.json").write_text(json.dumps(self.config))
        (self.out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in self.log))
        torch.save(self.state, self.out / "checkpoint.pt")
        return self.out


# ---- what is valid is held ---------------------------------------------------------------------------
def test_a_run_that_was_stopped_claims_nothing_false(tmp_path, after_step):
    """By Ctrl-C between two evaluations: the last line of its log is of other weights."""
    steps = []

    def stop(optimizer):
        steps.append(optimizer)
        if len(steps) == 2 * 14:  # a step is one of the matrices and one of the biases
            signal.raise_signal(signal.SIGINT)

    after_step(stop)
    with pytest.raises(KeyboardInterrupt, match="saved at step 14"):
        mlp_cifar.main(mlp_cifar.Config(**{**MLP, "steps": 20, "evals": 2}, out=str(tmp_path / "run")))
    code, verdict, rows = status(tmp_path / "run")
    assert (code, verdict) == (2, "nothing claimed") and "checkpoint's log val_loss" not in rows
    assert rows["checkpoint's log last line"].startswith("not checked")


def test_a_log_of_another_step_is_not_passed_over(runs, tmp_path):
    """Its last line could claim anything, if it were of other weights than the checkpoint's."""
    files = Files(runs / "mlp", tmp_path / "run")
    for log in (files.log, files.state["log"]):
        log[-1].update(step=log[-1]["step"] + 1, val_accuracy=0.99)
    code, verdict, rows = status(files.write(), budget=0.1, images=10)
    assert (code, verdict) == (2, "could not be checked in full")
    assert rows["checkpoint's log last line"].startswith("not checked")


def test_true_runs_are_held(runs, capsys):
    assert verify_lipschitz.main([str(runs)], options(budget=0.3, images=60, windows=2)) == 0
    said = capsys.readouterr().out
    assert "  3 of 5: block 2 of 2 ...\n" in said and "  3 of 3: 60 images" in said  # how far it is
    places = dict(mlp={"layer 1", "layer 3", "network", "weights", "test images", "config.json"},
                  nano={"block 2", "network", "stream"}, content={"block 1", "stream", "validation text"},
                  position={"block 1", "weights", "network", "checkpoint's log", "log.jsonl"})
    for name, wheres in places.items():
        result = json.loads((runs / name / "verify.json").read_text())
        rows = result["rows"]
        assert result["verdict"] == "held" and wheres <= {row["where"] for row in rows}
        recomputed = {row["what"].split(" ")[0] for row in rows if row["where"] == "summary.json"}
        summary = json.loads((runs / name / "summary.json").read_text())
        assert recomputed == summary.keys() - set(verify_lipschitz.HISTORY), "all that can be is recomputed"
        assert 0.02 < max(row["tightness"] for row in rows if row["where"] == "network") <= 1
        constant = {f"{row['where']} {row['what']}": 10 ** row["claimed"] for row in rows if row["kind"] == "bound"}
        if name == "content":  # a = 1/4: what is attacked alone is what the certificate mixes into the stream
            for what in ("block 1 attention", "block 2 attention", "block 2 MLP"):
                assert constant[f"{what} + stream"] == pytest.approx(0.75 + 0.25 * constant[what])
        shares = [row for row in rows if row["kind"] == "share"]
        assert (shares or name == "nano") and all(row["claimed"] <= row["found"] for row in shares)


def test_the_table_says_what_it_shows(runs, capsys):
    status(runs / "mlp")
    said = capsys.readouterr().out
    rows = json.loads((runs / "mlp" / "verify.json").read_text())["rows"]
    shown = [row for row in rows if row["verdict"] != "agrees"]
    lines = said.split("  data: ")[1].splitlines()
    for row in shown:
        assert sum(line.startswith(f"  {row['where']:16} {row['what']:28} ") for line in lines) == 1
    assert f"held: {len(rows)} rows, {len(shown)} of them shown" in said and len(shown) < len(rows) - 20
    assert {"right within 36/255", "right within 1", "limit on layer 3"} <= {row["what"] for row in shown}
    assert "20 of 200 attacked" in said and "has to be <= certified" in said and "has to be >= certified" in said


def test_a_published_checkpoint(tmp_path):
    from test_shakespeare import published, results_published
    text, run = tmp_path / "text", tmp_path / "run"
    text.write_text(results_published.VOCABULARY * 200)
    small = published(tmp_path / "small.npz")
    results_published.main([str(small), "--data", str(text), "--out", str(run)])
    assert status(run, data=str(text))[:2] == (0, "held")
    # Theirs keeps no limit on the stored table: a longer vector is told, and nothing is false.
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state["model"]["embedding_VD"] *= 2 / state["model"]["embedding_VD"].square().mean(1).sqrt().max()
    torch.save(state, run / "checkpoint.pt")
    (run / "summary.json").unlink()
    assert status(run, data=str(text))[2]["weights limit on embedding"] == "above its limit"


def test_what_may_differ(runs, tmp_path):
    """A bound and a share that are claimed weaker than they are; and where things were."""
    files = Files(runs / "position", tmp_path / "copy")
    files.summary["lipschitz_log10"] += 0.1
    files.summary["certified_token_accuracy"]["0.001"] = 0.0
    files.config.update(out="elsewhere", device="cuda", temperature=0.5)
    assert status(files.write())[:2] == (0, "held")


@pytest.mark.parametrize("constraint, verdict", [
    ("hammer", "above its limit"), ("mine.py:f", "above its limit"), ("soft_cap", "BROKEN"), ("none", None)])
def test_a_constraint_that_passes_its_limit(constraint, verdict, runs, tmp_path, monkeypatch):
    """It is reported, whoever wrote it, and false if a limit was promised. No code of a checkpoint is run."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("open('PWNED', 'w')\ndef f(W, w_max, step_norm=0.0):\n    return W\n")
    files = Files(runs / "mlp", tmp_path / "copy")
    files.settings.update(constraint=constraint, w_max="1.3,3,3")  # the norms are about 1.4
    files.config.update(constraint=constraint, w_max="1.3,3,3")
    files.summary["w_max"] = None if constraint == "none" else {"layer 1": 1.3, "layer 2": 3.0, "layer 3": 3.0}
    code, _, rows = status(files.write())
    assert code == (verdict == "BROKEN") and not Path("PWNED").exists()
    assert rows.get("weights limit on layer 1") == verdict
    assert rows.get("weights limit on layer 2") == (verdict and "held")


@pytest.mark.parametrize("constraint, excess, code", [
    ("soft_cap", 1e-3, 0), ("soft_cap", 0.02, 1), ("hard_cap", 1e-3, 1)])
def test_soft_cap_in_bfloat16_may_pass_its_limit_by_little(constraint, excess, code, runs, tmp_path):
    files = Files(runs / "mlp", tmp_path / "copy")
    limit = files.summary["norms"]["layer 1"] / (1 + excess)
    files.settings.update(constraint=constraint, w_max=f"{limit},3.4,3.4")
    files.config.update(constraint=constraint, w_max=f"{limit},3.4,3.4")
    files.summary["w_max"]["layer 1"] = limit
    found, _, rows = status(files.write())
    assert found == code and rows["weights limit on layer 1"] == ("BROKEN" if code else "above its limit")


def test_a_network_whose_bound_is_0_is_held(tmp_path):
    """After one step the head has moved, and what it reads has not. And there are fewer tokens than are attacked."""
    flags = [*NANO, "--steps", "1", "--val_tokens", "20", "--out", str(tmp_path / "run")]
    nanogpt_lipschitz.main(nanogpt_lipschitz.parse_arguments(flags))
    assert status(tmp_path / "run")[:2] == (0, "held")
    shakespeare.main(shakespeare.Config(**{**GPT, "steps": 1}, final_scale=0.0, out=str(tmp_path / "zero")))
    assert status(tmp_path / "zero")[:2] == (0, "held")
    files = Files(tmp_path / "zero", tmp_path / "copy")
    files.summary["val_accuracy"] = 0.5
    assert status(files.write())[2]["summary.json val_accuracy"] == "BROKEN"


def test_a_gpt_that_was_killed_is_evaluated_as_it_was(tmp_path, after_step, monkeypatch):
    """In the middle of training attention sees less than the whole window."""
    flags = [*NANO, "--seq_len", "256", "--window", "256", "--steps", "8", "--evals", "8", "--dtype", "float32"]
    steps = []

    def kill(optimizer):
        steps.append(optimizer)
        if len(steps) == 2 * 3:  # of the matrices and of the embedding
            raise MemoryError

    after_step(kill)
    with pytest.raises(MemoryError):
        nanogpt_lipschitz.main(nanogpt_lipschitz.parse_arguments([*flags, "--out", str(tmp_path / "run")]))
    config, _, state = nanogpt_lipschitz.load_checkpoint(tmp_path / "run")
    assert state["step"] == 2 and nanogpt_lipschitz.schedule(config, 2)[2] == 128
    code, verdict, rows = status(tmp_path / "run")
    assert (code, verdict) == (2, "nothing claimed") and rows["checkpoint's log val_loss"] == "agrees"
    monkeypatch.setattr(nanogpt_lipschitz, "schedule", lambda config, step: (1.0, 0.95, 256))
    assert status(tmp_path / "run")[2]["checkpoint's log val_loss"] == "BROKEN"


# ---- what was tampered with is reported --------------------------------------------------------------
def put(where, key, value):
    """A tampering: set where[key] to value, or to value(what it was)."""
    def change(files):
        target = getattr(files, where)
        *path, last = [int(name) if name.isdigit() else name for name in key.split("/")]
        for name in path:
            target = target[name]
        target[last] = value(target[last]) if callable(value) else value
    return change


def lowered(files):
    """The claimed bound, lowered to just above what a search finds."""
    verify_lipschitz.main([str(files.out)], options())
    rows = json.loads((files.out / "verify.json").read_text())["rows"]
    found = max(row["found"] for row in rows if row["where"] == "network" and row["norm"].endswith("RMS"))
    found += math.log10(1.001)
    assert found < files.summary["lipschitz_log10"]
    files.summary["lipschitz_log10"] = found


def all_shares(key):
    return lambda files: files.summary.update({key: dict.fromkeys(files.summary[key], 1.0)})


def larger_matrix(key):
    """A weight matrix times 1.2, and a limit in the checkpoint that allows it."""
    def change(files):
        files.weights[key] *= 1.2
        files.settings["w_max"] = "1000"
    return change


def both(key, value):
    """A setting changed in both files that hold it."""
    return lambda files: (files.settings.update({key: value}), files.config.update({key: value}))


def weight(key, f):
    return lambda files: files.weights.update({key: f(files.weights[key])})


def over_the_limit(key, limit):
    """A matrix 2 % above its limit."""
    return weight(key, lambda W: 1.02 * sigma_limit(W, limit) * W / torch.linalg.matrix_norm(W.double(), ord=2))


def each(where, values):
    """{row that has to report it: tampering}, for several entries of one file, all changed in one copy."""
    file = dict(summary="summary.json", settings="config.json")[where]
    return {f"{file} {key.replace('/', ' ', 1)}": put(where, key, value)
            for key, value in values.items()}


TAMPERED = [  # run, what was done, {row that has to report it: tampering}
    *[(name, "bound", {"summary.json lipschitz_log10": lowered}) for name in ("mlp", "content", "position", "nano")],
    ("mlp", "summary", each("summary", {
        "norms/layer 2": lambda x: 0.99 * x, "max_weight_norm": 1.0, "w_max/layer 2": 1.0,
        "lipschitz_product_log10": lambda x: x - 1e-4, "largest_jacobian_l2": lambda x: 0.999 * x,
        "val_accuracy": lambda x: x + 0.005, "val_loss": lambda x: x - 1e-3, "params": 10, "steps": 10, "seed": 3,
        "data": "uoft-cs/cifar10"})),
    ("content", "summary", each("summary", {
        "norms/q": lambda x: 1.01 * x, "w_max/q": 1.0, "val_loss_at_temperature": lambda x: x - 1e-3})),
    ("position", "summary", each("summary", {
        "lipschitz_product_log10": lambda x: x + 1e-4, "val_accuracy": lambda x: x + 0.001,
        "lipschitz_norm": "l2->l2"})),
    ("nano", "summary", each("summary", {"norms/q": lambda x: 1.01 * x, "val_accuracy": lambda x: x + 0.1})),
    ("mlp", "shares", {"summary.json certified_accuracy 72/255": all_shares("certified_accuracy")}),
    ("position", "shares", {"summary.json certified_token_accuracy 0.01": all_shares("certified_token_accuracy")}),
    ("content", "matrix", {"summary.json norms q": larger_matrix("blocks.1.q")}),
    ("position", "matrix", {"summary.json w_max in": larger_matrix("blocks.0.w_in")}),
    ("mlp", "bias", {"summary.json val_accuracy": weight("biases.2", lambda W: W + torch.arange(10) / 5)}),
    ("position", "position bias", {"summary.json val_loss": weight("blocks.0.bias_HT", lambda W: 0 * W)}),
    ("position", "head", {"checkpoint's log norms head": weight("head_VD", lambda W: 0.9 * W)}),
    ("mlp", "over the limit", {"weights limit on layer 2": over_the_limit("weights.1", 3.4)}),
    ("content", "over the limit", {"weights limit on q": over_the_limit("blocks.1.q", 6.0)}),
    ("content", "embedding", {"weights limit on embedding": weight("embedding_VD", lambda W: 1.1 * W)}),
    ("content", "NaN", {"checkpoint head_VD is finite": weight("head_VD", lambda W: W * math.nan)}),
    ("mlp", "NaN in the mean", {"checkpoint mean_P is finite": weight("mean_P", lambda W: W * math.nan)}),
    ("nano", "settings", each("settings", dict(
        heads=4, final_scale=0.5, logit_scale=0.5, attention_scale=0.1, residual_scale=0.5, constraint="none"))),
    ("content", "settings", each("settings", dict(
        heads=4, final_scale=0.5, logit_scale=0.5, attention_scale=0.1, residual_scale=0.5,
        activation="maxmin", constraint="none", positions="bias", loss_temperature=2.0))),
    ("position", "settings", each("settings", dict(
        heads=4, final_scale=0.5, residual_scale=1.0, activation="gelu", constraint="none"))),
    ("mlp", "settings", each("settings", dict(
        activation="maxmin", constraint="hard_cap", lowpass=32, mirror=True, loss_temperature=1.0))),
    ("content", "constraint everywhere", {"summary.json w_max": both("constraint", "none")}),
    ("content", "heads everywhere", {"summary.json val_loss": both("heads", 4)}),
    ("position", "final_scale everywhere", {"summary.json val_loss": both("final_scale", 0.5)}),
    ("mlp", "mirror everywhere", {"summary.json val_loss": both("mirror", True)}),
    ("mlp", "log in the checkpoint", {"checkpoint's log val_accuracy": put("state", "log/0/val_accuracy", 0.99)}),
    ("mlp", "log.jsonl", {"log.jsonl is the checkpoint's log": put("log", "0/val_accuracy", 0.99),
                          "config.json steps": put("config", "steps", 1000)}),
]


@pytest.mark.parametrize("name, what, changes", TAMPERED, ids=[f"{t[0]}: {t[1]}" for t in TAMPERED])
def test_tampered(name, what, changes, runs, tmp_path):
    files = Files(runs / name, tmp_path / "copy")
    for change in changes.values():
        change(files)
    code, verdict, rows = status(files.write())
    assert (code, verdict) == (1, "BROKEN") and {rows[where] for where in changes} == {"BROKEN"}


@pytest.mark.parametrize("claimed, right", [(1.0, True), ("inf", True), (1 - 1e-5, False), ("-inf", False),
                                            (math.nan, False), ("small", False), ([], False), (10**400, False)])
def test_a_claim_of_at_least_one(claimed, right):
    assert verify_lipschitz.agrees(claimed, Range(1.0, 1.0, math.inf)) == right


def test_wrong_summaries_are_broken_in_plain_letters(runs, tmp_path, capsys):
    """All values wrong at once, each in another way: none stops the rest, none reaches a terminal."""
    wrong = ([], {}, [[[1]]], "\ud800\x1b[2J\n", 10**400, -1, 1e308, math.nan, math.inf, True, {"a": {"b": []}})
    files = Files(runs / "position", tmp_path / "copy")
    for i, key in enumerate(files.summary):
        files.summary[key] = wrong[i % len(wrong)]
    files.summary["\x1b[2J \ud800" * 100] = wrong
    assert status(files.write())[:2] == (1, "BROKEN")
    said = capsys.readouterr()
    assert not said.err and said.out.isascii() and "\x1b" not in said.out
    assert "NaN" not in (files.out / "verify.json").read_text().replace('"NaN"', "")  # JSON has no such number


@pytest.mark.parametrize("heads", [4, 8])
def test_the_papers_formula_is_broken_and_ours_is_held(heads):
    """beta |o| |v| (1 + 2 s |q| |k|), with norms of whole matrices: for orthogonal ones beta * 3."""
    model = attention_layer("orthogonal", heads)
    block, table = model.blocks[0], Table(options(budget=1))
    starts, row = verify_lipschitz.split_tokens(block, heads, 12, 1.0), shakespeare.certificate(model)["rows"][0]
    table.attack("attention", "ours", math.log10(row["value"] + row["pattern"]), block.attention, starts, 1.0)
    table.attack("attention", "the paper's", math.log10(block.attention_scale * 3), block.attention, starts, 1.0)
    assert [row["verdict"] for row in table.rows] == ["held", "BROKEN"]


def test_a_certificate_without_heads_is_broken_in_a_run(runs, monkeypatch):
    """The constants of attention as for a single head: the rows of both blocks report it."""
    honest = shakespeare.certificate

    def without_heads(*arguments, **more):
        bound = honest(*arguments, **more)
        for row in bound["rows"]:
            row["alone_log10"] -= math.log10(4)
            row["attention_log10"] -= 0.4
        return bound

    monkeypatch.setattr(shakespeare, "certificate", without_heads)
    rows = status(runs / "content", budget=0.3)[2]
    assert {rows[f"block {i} {what}"] for i in (1, 2) for what in ("attention", "attention + stream")} == {"BROKEN"}


@pytest.mark.parametrize("name", ["position", "nano"])
def test_an_ellipsoid_that_is_a_fifth_too_small_is_broken_in_a_run(name, runs, monkeypatch):
    script = nanogpt_lipschitz if name == "nano" else shakespeare
    honest = script.certificate

    def too_small(*arguments, **more):
        bound = honest(*arguments, **more)
        bound["after"] = [(S, log + 2 * math.log(0.8)) for S, log in bound["after"]]
        return bound

    monkeypatch.setattr(script, "certificate", too_small)
    assert status(runs / name, budget=0.1)[2]["block 1 ellipsoid of the stream"] == "BROKEN"


def test_false_certificates_of_predictions(runs, monkeypatch):
    honest, honest_tokens = mlp_cifar.certified_radii, shakespeare.certified_tokens
    monkeypatch.setattr(mlp_cifar, "certified_radii", lambda *a: 30 * honest(*a))
    monkeypatch.setattr(shakespeare, "certified_tokens",
                        lambda *a: {rho: torch.ones_like(kept_N) for rho, kept_N in honest_tokens(*a).items()})
    search = dict(budget=0.3, images=60, windows=2)
    assert status(runs / "mlp", **search)[2]["test images right within 1"] == "BROKEN"
    assert status(runs / "position", **search)[2]["validation text right within 0.1"] == "BROKEN"


@pytest.mark.parametrize("claimed, verdict", [(0.999, "held"), (1.03, "BROKEN")])
def test_radii_of_a_linear_network_are_exact(claimed, verdict, monkeypatch):
    """One layer: its certified radii are distances, so 3 % more is false. So the attack's radius and norm are right."""
    config = mlp_cifar.Config(**{**MLP, "depth": 1, "constraint": "none"})
    model = mlp_cifar.MLP(config).double().requires_grad_(False)
    images_NP = mlp_cifar.stand_in()[1][0][:60]
    labels_N = model(images_NP.double() / 255).argmax(1)
    radius_N = mlp_cifar.certified_radii(model, mlp_cifar.certificate(model)["pairs_log10_KK"], images_NP, labels_N)
    monkeypatch.setattr(verify_lipschitz, "RADII", {"r": 1.01 * radius_N.sort()[0][30].item()})
    monkeypatch.setattr(mlp_cifar, "certified_radii", lambda *arguments: claimed * radius_N)
    table = Table(options(budget=3, images=60))
    monkeypatch.setattr(Table, "attack", lambda *arguments, **more: None)  # of other bounds
    verify_lipschitz.verify_mlp(table, config, model, (images_NP, labels_N))
    assert [row["verdict"] for row in table.rows] == [verdict] and 0.3 < table.rows[0]["claimed"] < 0.7


def test_a_search_whose_gradient_is_not_finite_did_not_check():
    """The value is half of x; the branch that is not taken has a slope of infinity, times 0."""
    table = Table(options())
    table.attack("map", "norm", 0.0, lambda x: torch.where(x == x, x / 2, (x - x).sqrt()), torch.ones(4, 1, 4))
    assert table.rows[0]["verdict"] == "not checked: overflow"


@pytest.mark.parametrize("activation", ["gelu", "maxmin"])
def test_numbers_that_leave_the_range(activation):
    """Radii of 10^400 and streams whose squares overflow: nothing is called broken, nothing fails."""
    model = attention_layer("orthogonal", 2, blocks=3, activation=activation, residual_scale=3.0, data="stand-in")
    for _, W in model.matrices():
        W.data *= 1e50
    table = Table(options())
    tokens_N = torch.arange(100) % 8
    verify_lipschitz.verify_transformer(table, shakespeare, model.config, model.requires_grad_(False), tokens_N, 1,
                                        torch.float32)
    assert {row["verdict"] for row in table.rows} <= {"held", "not checked: overflow"} and len(table.rows) > 20


# ---- what cannot be checked --------------------------------------------------------------------------
def test_nothing_claimed(runs, tmp_path):
    files = Files(runs / "mlp", tmp_path / "copy").write()
    (files / "summary.json").unlink()
    assert status(files)[:2] == (2, "nothing claimed")


def test_missing(runs, tmp_path):
    """A null is no claim; nor is a value or a file that is not there. Of one too many nothing is known."""
    files = Files(runs / "content", tmp_path / "copy")
    files.summary["lipschitz_log10"] = None
    del files.summary["norms"]["q"]
    files.summary["certified_token_accuracy"]["0.5"] = 1.0
    (files.write() / "config.json").unlink()
    code, verdict, rows = status(files.out)
    assert (code, verdict) == (2, "could not be checked in full")
    for row in ("lipschitz_log10", "norms q", "certified_token_accuracy 0.5"):
        assert rows[f"summary.json {row}"].startswith("not ")
    assert rows["config.json the file"] == "not claimed"


@pytest.mark.parametrize("name", ["mlp", "content"])
def test_data_that_are_not_here(name, runs, tmp_path):
    """Bounds are checked all the same; accuracy is not, and a false bound is still found."""
    files = Files(runs / name, tmp_path / "copy")
    files.state["data"] = files.summary["data"] = files.settings["data"] = str(tmp_path / "nowhere")
    files.config["data"] = files.settings["data"]
    files.summary["val_accuracy"] = 0.9
    code, verdict, rows = status(files.write())
    assert code == 2
    assert rows["checkpoint data of the run"].startswith("not checked: its data are not here; if they moved")
    assert rows["summary.json val_accuracy"] == "not checked: it was not recomputed"
    assert rows["summary.json lipschitz_log10"] == "agrees"
    files.summary["lipschitz_log10"] -= 1
    assert status(files.write())[0] == 1
    assert verify_lipschitz.main([str(files.out)], options(data="nowhere")) == 2


@pytest.mark.parametrize("name", ["position", "nano"])
def test_a_stand_in_of_another_python_is_other_data(name, runs, tmp_path):
    files = Files(runs / name, tmp_path / "copy")
    files.state["data"] = files.summary["data"] = "stand-in, Python 3.0.0"
    code, _, rows = status(files.write())
    assert code == 2
    assert rows["checkpoint data of the run"].startswith("not checked: its data are not here; if they moved")
    script = shakespeare if name == "position" else nanogpt_lipschitz
    (files.out / "summary.json").unlink()
    config = dataclasses.replace(script.load_checkpoint(files.out)[0], out=str(files.out))
    with pytest.raises(script.UserError, match="stand-in, Python 3.0.0"):
        script.main(config)


def test_data_that_moved(runs, tmp_path):
    """--data says that these are the run's own: then a difference counts."""
    (tmp_path / "moved").write_text(shakespeare.stand_in())
    files = Files(runs / "content", tmp_path / "copy")
    files.state["data"] = files.summary["data"] = files.settings["data"] = str(tmp_path / "nowhere")
    assert status(files.write(), data=str(tmp_path / "moved"))[:2] == (0, "held")
    files.summary["val_accuracy"] += 0.01
    assert status(files.write(), data=str(tmp_path / "moved"))[:2] == (1, "BROKEN")


class Payload:
    def __reduce__(self):
        return os.system, ("touch PWNED",)


UNREADABLE = {  # what is done to a checkpoint
    "missing": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "of another script": lambda path: torch.save(dict(script="other", config={}, log=[]), path),
    "code": lambda path: torch.save(dict(script="mlp_cifar", config=Payload()), path),
    "without settings": lambda path: torch.save({**torch.load(path, weights_only=True), "config": "none"}, path),
    "summary.json": lambda path: path.with_name("summary.json").write_text("{"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_is_one_line(kind, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = Files(runs / "mlp", tmp_path / "copy").write()
    (out / "verify.json").unlink(missing_ok=True)
    UNREADABLE[kind](out / "checkpoint.pt")
    assert verify_lipschitz.main([str(out)], options()) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and f"{out}: could not be checked" in said
    assert kind != "summary.json" or kind in said
    assert not Path("PWNED").exists() and not (out / "verify.json").exists()


def test_the_command_line(tmp_path, capsys):
    command = [sys.executable, str(ROOT / "verify_lipschitz.py")]
    nothing = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert nothing.returncode == 2 and "Traceback" not in nothing.stderr and "runs/checkpoint.pt" in nothing.stderr
    with pytest.raises(SystemExit) as stop:
        verify_lipschitz.parse_arguments(["--help"])
    assert stop.value.code == 0 and "exit status:\n    0  held" in capsys.readouterr().out
    names, given = verify_lipschitz.parse_arguments(["a", "--budget", "20"])
    assert (names, given.budget, given.images) == (["a"], 20.0, 300)
    assert verify_lipschitz.parse_arguments([])[0] == ["runs"]


# ---- the search --------------------------------------------------------------------------------------
def attention_layer(kind, heads, positions="rope", seed=0, **changes):
    """A float64 model of one block with orthogonal matrices (or random ones)."""
    config = shakespeare.Config(**{**dict(width=16, blocks=1, heads=heads, hidden=32, seq_len=12,
                                          positions=positions), **changes})
    model = shakespeare.Transformer(config, "abcdefgh")
    for i, (_, W) in enumerate(model.matrices()):
        r = min(W.shape)
        s = torch.ones(r) if kind == "orthogonal" else torch.linspace(0.2, 1, r)
        W.data = with_spectrum(*W.shape, sigma_limit(W, 1.0) * s.double(), seed=100 * seed + i)
    model.embedding_VD.data = verify_lipschitz.unit(model.embedding_VD.data)
    return model.double()


def test_the_bound_of_a_capped_attention_is_nearly_attained():
    """A third less would be broken, though the ball is so large that most of it is flat."""
    model = attention_layer("orthogonal", 4, cap=1.0, logit_scale=8.0)
    for W in (model.blocks[0].q, model.blocks[0].k):
        W.data *= 4
    bound = shakespeare.certificate(model)
    starts = verify_lipschitz.directions(8, 12, 16, seed=0)
    table = Table(options(budget=1))
    within = 2 / verify_lipschitz.exact_norm(model.blocks[0].k).item()
    verify_lipschitz.attack_sublayer(table, "block 1", "attention", model.blocks[0].attention, model.mix, starts,
                                     100.0, bound["rows"][0]["alone_log10"], math.inf, within)
    alone = table.rows[0]
    assert alone["verdict"] == "held" and 2 / 3 < alone["tightness"] <= 1


@pytest.mark.parametrize("rho", [0.1, 3.0])
def test_a_certificate_at_a_radius_is_of_the_larger_ball(rho):
    """Embeddings of RMS 1 that may move by rho: the product starts at 1 + rho, and attacks there do not exceed it."""
    model = attention_layer("orthogonal", 2)
    row, block = shakespeare.certificate(model, rho)["rows"][0], model.blocks[0]
    assert row["radius_log10"] >= math.log10(1 + rho)
    starts = verify_lipschitz.split_tokens(block, 2, 12, 1 + rho)
    found = climb(lambda x: torch.lerp(x, block.attention(x), model.mix), starts, 1 + rho, steps=60).max().item()
    assert found <= 10 ** row["attention_log10"]


def test_a_factor_on_the_logits_is_in_all_bounds_and_certifies_nothing():
    found = []
    for scale in (1.0, 8.0):
        model = attention_layer("orthogonal", 2, "bias", content="none", final_scale=scale)
        bound = shakespeare.certificate(model)
        tokens_N = torch.randint(8, (400,), generator=torch.Generator().manual_seed(0))
        shares = [kept_N.sum().item() for kept_N in shakespeare.certified_tokens(model, tokens_N).values()]
        found.append((bound["product_log10"] - math.log10(scale), bound["ellipsoid_log10"] - math.log10(scale), shares))
    assert found[0][:2] == pytest.approx(found[1][:2], abs=1e-8) and found[0][2] == found[1][2] and found[0][2][0] > 0


def test_own_shares_of_nanogpt_are_given():
    """Its attention by position, as computed: no token gives itself less, in windows shorter than a sequence."""
    config = nanogpt_lipschitz.Config.of("tiny_paper", width=16, blocks=1, heads=2, hidden=32, seq_len=64, window=32,
                                         vocab=256, content="none", attention_scale=1.0)
    block = nanogpt_lipschitz.Transformer(config).double().blocks[0]
    block.v.data = block.o.data = torch.eye(16).double()  # so a token's output is the average of tokens, head by head
    x_TTD = torch.eye(64).double()[:, :, None].expand(64, 64, 16)  # in row t only token t is not 0
    own_TH = block.attention(x_TTD)[torch.arange(64), torch.arange(64)][:, ::8]
    share_H = block.own_share_H()
    assert (share_H <= own_TH * (1 + 1e-9)).all() and torch.allclose(share_H, own_TH[-1])


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("D", [16, 64, 256])
def test_search_finds_the_constant_of_linear_maps(D, layers):
    generator = torch.Generator().manual_seed(D)
    W = torch.eye(D, dtype=torch.float64)
    for _ in range(layers):
        W = torch.randn(D, D, generator=generator, dtype=torch.float64) @ W
    true = torch.linalg.matrix_norm(W, ord=2).item()
    found = climb(lambda x: x @ W.T, torch.randn(8, 1, D, generator=generator), steps=120).max()
    assert 0.999 * true <= found <= true * (1 + verify_lipschitz.TOLERANCE)


@pytest.mark.parametrize("share, verdict", [(1.0, "held"), (1 - 1e-6, "BROKEN")])
def test_a_bound_that_is_a_millionth_too_small_is_broken(share, verdict):
    table = Table(options(budget=1))
    W = 2 * torch.eye(8).double()
    table.attack("map", "norm", math.log10(2 * share), lambda x: x @ W.T, directions(8, 3, 8, seed=0))
    assert table.rows[0]["verdict"] == verdict


@pytest.mark.parametrize("heads, positions", [(1, "rope"), (8, "rope"), (4, "bias")])
def test_search_of_attention_is_near_what_more_of_it_finds(heads, positions):
    model = attention_layer("orthogonal", heads, positions)
    block = model.blocks[0]

    def start(seed):
        split = verify_lipschitz.split_tokens(block, heads, 12, 1.0)
        return torch.cat([directions(8, 12, 16, seed=seed), split])

    found = climb(block.attention, start(0), 1.0, steps=120).max()
    much = climb(block.attention, start(1), 1.0, steps=300, seed=1).max()
    row = shakespeare.certificate(model)["rows"][0]
    assert 0.9 * much <= found and max(much, found) <= row["value"] + row["pattern"]


def test_search_stays_in_the_ball_and_finds_a_steep_place_far_away():
    """A map that is steep only where a coordinate is large: inside the ball it is found, beyond it not used."""
    def f(x):
        return F.softplus(100 * (x - 1.5)) / 100  # slope 0 at rest, 1 above 1.5

    x = torch.randn(16, 1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert climb(f, x, radius=0.5, steps=150).max() < 1e-3  # no coordinate can exceed 0.5 * sqrt(4) = 1
    assert 0.9 < climb(f, x, radius=2.0, steps=150).max() <= 1 + verify_lipschitz.TOLERANCE


def test_attack_on_predictions_of_a_linear_map():
    """Two classes: the margin of an input is its distance from the edge, and the attack goes straight there."""
    W_KD = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]]).double()
    x_ND = torch.tensor([[0.1, 0, 0, 0], [0.3, 0, 0, 0], [-0.1, 0, 0, 0]]).double()
    for radius, stands in ((0.0, [True, True, False]), (0.099, [True, True, False]), (0.101, [False, True, False]),
                           (0.31, [False, False, False])):
        kept_N = verify_lipschitz.withstands(lambda x: x @ W_KD.T, x_ND, torch.zeros(3, dtype=torch.int64),
                                             radius / 2, steps=20)  # RMS of 4 coordinates
        assert kept_N.tolist() == stands


def test_a_prediction_that_falls_is_not_made_up_for_by_another():
    """Of two predictions the wrong one was certified: as many are certified as stand."""
    table = Table(options())
    table.predictions("images", "1", torch.tensor([True, False, True]), torch.tensor([False, True]), "")
    assert (table.rows[0]["claimed"], table.rows[0]["found"], table.verdict()) == (0.5, 0.5, "BROKEN")


def test_ranges_of_an_evaluation():
    """What other machines may find lies inside: the same logits with other rounding errors of that size."""
    generator = torch.Generator().manual_seed(0)
    W, x = torch.randn(10, 300, generator=generator), torch.randn(2000, 300, generator=generator)
    y = torch.randint(10, (2000,), generator=generator)
    ranges = verify_lipschitz.evaluate(lambda x, dtype: x.to(dtype) @ W.to(dtype).T, [(x, y)], dict(loss=1.0, hot=3.0))
    for seed in range(5):
        order = torch.randperm(300, generator=generator)
        z = x[:, order] @ W[:, order].T
        for name, claim in dict(loss=F.cross_entropy(z, y), hot=F.cross_entropy(3 * z, y),
                                val_accuracy=(z.argmax(1) == y).double().mean()).items():
            assert verify_lipschitz.agrees(claim.item(), ranges[name])
    assert ranges["loss"].high - ranges["loss"].low < 1e-3
    assert ranges["val_accuracy"].high - ranges["val_accuracy"].low <= 1 / 2000 + 1e-9
