"""verify_lipschitz.py: what is true is held, what was tampered with is reported, the search finds what is there."""

import dataclasses
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import mlp_cifar
import nanogpt_lipschitz
import shakespeare
import verify_lipschitz
from matrices import sigma_limit, with_spectrum
from verify_lipschitz import Config, Table, UserError, climb, rms

ROOT = Path(__file__).parent.parent
FAST = Config(budget=0.01, images=20, windows=4)  # what is recomputed does not depend on the search
MLP = dict(data="stand-in", steps=30, batch=64, width=16, evals=1, lowpass=6, loss_temperature=5.0)
GPT = dict(data="stand-in", width=16, blocks=2, heads=2, hidden=32, seq_len=24, steps=30, batch=4, evals=1,
           length=1)
NANO = ("--data stand-in --vocab 256 --width 16 --blocks 2 --heads 2 --hidden 32 --seq_len 32 --window 32 --batch 2 "
        "--micro_batch 2 --val_tokens 2000 --steps 4 --evals 1 --residual_scale 1").split()
POSITION = {**GPT, **shakespeare.SMALL, "blocks": 2, "hidden": 32, "residual_scale": 2.0, "steps": 30}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with four small finished runs, on little data, which stay in place for the module."""
    sets, text, patch = mlp_cifar.stand_in(600, 200), shakespeare.stand_in(20_000), pytest.MonkeyPatch()
    patch.setattr(nanogpt_lipschitz, "stand_in", lambda: text)
    patch.setattr(mlp_cifar, "stand_in", lambda: sets)
    patch.setattr(shakespeare, "stand_in", lambda: text)
    for script in (shakespeare, nanogpt_lipschitz):
        patch.setattr(script, "draw", lambda *arguments: None)
    folder = tmp_path_factory.mktemp("runs")
    mlp_cifar.main(mlp_cifar.Config(**MLP, out=str(folder / "mlp")))
    shakespeare.main(shakespeare.Config(**GPT, out=str(folder / "content")))
    shakespeare.main(shakespeare.Config(**POSITION, out=str(folder / "position")))
    nanogpt_lipschitz.main(nanogpt_lipschitz.parse_arguments([*NANO, "--out", str(folder / "nano")]))
    yield folder
    patch.undo()


def status(folder, config=FAST):
    """(exit status, verdict, {"where what": verdict of each row})"""
    code = verify_lipschitz.main([str(folder)], config)
    result = json.loads((folder / "verify.json").read_text())
    return code, result["verdict"], {f"{row['where']} {row['what']}": row["verdict"] for row in result["rows"]}


class Files:
    """A copy of a run, to be changed: summary and config.json, and state of the checkpoint."""

    def __init__(self, run, out):
        shutil.copytree(run, out)
        self.out = out
        self.summary, self.config = (json.loads((out / f"{name}.json").read_text()) for name in ("summary", "config"))
        self.log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        self.state = torch.load(out / "checkpoint.pt", weights_only=True)
        self.settings, self.weights = self.state["config"], self.state["model"]

    def write(self):
        for name, content in dict(summary=self.summary, config=self.config).items():
            (self.out / f"{name}.json").write_text(json.dumps(content))
        (self.out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in self.log))
        torch.save(self.state, self.out / "checkpoint.pt")
        return self.out


# ---- what is true is held ----------------------------------------------------------------------------
def test_true_runs_are_held(runs, capsys):
    assert verify_lipschitz.main([str(runs)], Config(budget=0.3, images=60, windows=8)) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "4 held"
    assert "searching block 1 of 2 ..." in said and "evaluating" in said  # (what it does while it takes long)
    assert "  max-token RMS->max-token RMS, embeddings to logits, inside the ball\n" in said  # whole, though longer than its column
    for name, wheres in (("mlp", {"layer 1", "layer 3", "network", "weights", "test images", "config.json"}),
                         ("nano", {"block 2", "network", "stream"}),
                         ("content", {"block 1", "block 2", "network", "stream", "validation text"}),
                         ("position", {"block 1", "weights", "network", "checkpoint's log", "log.jsonl"})):
        result = json.loads((runs / name / "verify.json").read_text())
        rows = result["rows"]
        assert result["verdict"] == "held" and wheres <= {row["where"] for row in rows}
        recomputed = {row["what"].split(" ")[0] for row in rows if row["where"] == "summary.json"}
        summary = json.loads((runs / name / "summary.json").read_text())
        assert recomputed == summary.keys() - verify_lipschitz.HISTORY, "all that can be is recomputed"
        whole = [row for row in rows if row["where"] == "network"]
        assert 0.02 < max(row["tightness"] for row in whole) <= 1
        shares = [row for row in rows if row["kind"] == "share"]
        assert (shares or name == "nano") and all(row["claimed"] <= row["found"] for row in shares)


def test_a_published_checkpoint(tmp_path):
    from test_shakespeare import published, results_published
    (tmp_path / "text").write_text(results_published.VOCABULARY * 200)
    results_published.main([str(published(tmp_path / "small.npz")), "--data", str(tmp_path / "text"), "--out", str(tmp_path / "run")])
    assert verify_lipschitz.main([str(tmp_path / "run")], dataclasses.replace(FAST, data=str(tmp_path / "text"))) == 0
    assert json.loads((tmp_path / "run" / "verify.json").read_text())["verdict"] == "held"


@pytest.mark.parametrize("change", ["weaker bound", "weaker share", "places"])
def test_what_may_differ(change, runs, tmp_path):
    files = Files(runs / "position", tmp_path / "copy")
    if change == "weaker bound":
        files.summary["lipschitz_log10"] += 0.1
    elif change == "weaker share":
        files.summary["certified_token_accuracy"]["0.001"] = 0.0
    else:
        files.config.update(out="elsewhere", device="cuda", temperature=0.5)
    assert status(files.write())[:2] == (0, "held")


# ---- what was tampered with is reported --------------------------------------------------------------
def put(where, key, value):
    """A tampering: set where[key] to value, or to value(what it was)."""
    def change(files):
        target, path = getattr(files, where), [key] if where == "weights" else key.split("/")
        path = [int(name) if name.isdigit() else name for name in path]
        for name in path[:-1]:
            target = target[name]
        target[path[-1]] = value(target[path[-1]]) if callable(value) else value
    return change


def lowered(key, row):
    """A bound lowered to just above what the default search finds."""
    def change(files):
        found = max(r["found"] for r in files.rows if r["where"] == "network" and r["norm"].endswith(row))
        found += math.log10(1.001)
        assert found < files.summary["lipschitz_log10"]
        files.summary[key] = found
    return change


def all_shares(key):
    def change(files):
        files.summary[key] = dict.fromkeys(files.summary[key], 1.0)
    return change


def larger_matrix(key):
    """A weight matrix times 1.2, and a limit in the checkpoint that allows it."""
    def change(files):
        files.weights[key] *= 1.2
        files.settings["w_max"] = "1000"
    return change


def both(key, value, summary=None):
    """A setting changed in both files that hold it; and the summary's bound, if asked for."""
    def change(files):
        files.settings[key] = files.config[key] = value
        files.summary.update(summary or {})
    return change


def over_the_limit(key, limit):
    def change(files):
        W = files.weights[key]
        W *= 1.01 * sigma_limit(W, limit) / torch.linalg.matrix_norm(W.double(), ord=2)
    return change


def each(where, values):
    """{row that has to report it: tampering}, for several entries of one file, all changed in one copy."""
    file = dict(summary="summary.json", settings="config.json")[where]
    return {f"{file} {key.replace('/', ' ')}": put(where, key, value) for key, value in values.items()}


TAMPERED = [  # run, what was done, {row that has to report it: tampering}
    ("mlp", "bound", {"summary.json lipschitz_log10": lowered("lipschitz_log10", "RMS->RMS")}),
    ("content", "bound", {"summary.json lipschitz_log10": lowered("lipschitz_log10", "RMS")}),
    ("position", "bound", {"summary.json lipschitz_log10": lowered("lipschitz_log10", "RMS")}),
    ("nano", "bound", {"summary.json lipschitz_log10": lowered("lipschitz_log10", "RMS")}),
    *[("mlp", f"bound is {value}", each("summary", dict(lipschitz_log10=value))) for value in ("-inf", math.nan, "small")],
    ("mlp", "summary", each("summary", {
        "norms/1": lambda x: 0.99 * x, "max_weight_norm": 1.0, "w_max": [1.0, 1.0, 1.0],
        "lipschitz_product_log10": lambda x: x - 1e-4, "largest_jacobian_l2": lambda x: 0.999 * x,
        "val_accuracy": lambda x: x + 0.005, "val_loss": lambda x: x - 1e-3, "params": 10, "steps": 10, "seed": 3,
        "data": "uoft-cs/cifar10"})),
    ("content", "summary", each("summary", {
        "norms/q": lambda x: 1.01 * x, "w_max/q": 1.0, "val_loss_at_temperature": lambda x: x - 1e-3})),
    ("position", "summary", each("summary", {
        "lipschitz_product_log10": lambda x: x + 1e-4, "val_accuracy": lambda x: x + 0.001, "lipschitz_norm": "l2->l2"})),
    ("nano", "summary", each("summary", {"norms/q": lambda x: 1.01 * x, "val_accuracy": lambda x: x + 0.1})),
    ("mlp", "shares", {"summary.json certified_accuracy 72/255": all_shares("certified_accuracy")}),
    ("position", "shares", {"summary.json certified_token_accuracy 0.01": all_shares("certified_token_accuracy")}),
    ("mlp", "matrix", {"config.json w_max": larger_matrix("weights.1")}),
    ("content", "matrix", {"summary.json norms q": larger_matrix("blocks.1.q")}),
    ("position", "matrix", {"summary.json w_max in": larger_matrix("blocks.0.w_in")}),
    ("nano", "matrix", {"summary.json w_max v": larger_matrix("blocks.1.v")}),
    ("mlp", "bias", {"summary.json val_accuracy": put("weights", "biases.2", lambda W: W + torch.arange(10) / 5)}),
    ("position", "position bias", {"summary.json val_loss": put("weights", "blocks.0.bias_HT", lambda W: 0 * W)}),
    ("position", "head", {"checkpoint's log norms head": put("weights", "head_VD", lambda W: 0.9 * W)}),
    ("mlp", "over the limit", {"weights limit on 1": over_the_limit("weights.1", 3.4)}),
    ("content", "over the limit", {"weights limit on q": over_the_limit("blocks.1.q", 6.0)}),
    ("content", "embedding", {"weights limit on embedding": put("weights", "embedding_VD", lambda W: 1.1 * W)}),
    ("content", "NaN", {"head_VD is not finite": put("weights", "head_VD", lambda W: W * math.nan)}),
    ("mlp", "NaN in the mean", {"mean_P is not finite": put("weights", "mean_P", lambda W: W * math.nan)}),
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
    ("position", "final_scale everywhere",
     {"summary.json val_loss": both("final_scale", 0.5, dict(lipschitz_log10=0.0))}),
    ("mlp", "mirror everywhere", {"summary.json val_loss": both("mirror", True)}),
    ("mlp", "log in the checkpoint", {"checkpoint's log val_accuracy": put("state", "log/0/val_accuracy", 0.99)}),
    ("mlp", "log.jsonl", {"log.jsonl is the checkpoint's log": put("log", "0/val_accuracy", 0.99)}),
    ("mlp", "config.json", {"config.json steps": put("config", "steps", 1000)}),
]


@pytest.mark.parametrize("name, what, changes", TAMPERED, ids=[f"{t[0]}: {t[1]}" for t in TAMPERED])
def test_tampered(name, what, changes, runs, tmp_path):
    files = Files(runs / name, tmp_path / "copy")
    if what == "bound":
        if not (runs / name / "verify.json").exists():
            verify_lipschitz.main([str(runs / name)], Config())
        files.rows = json.loads((runs / name / "verify.json").read_text())["rows"]
    for change in changes.values():
        change(files)
    code, verdict, rows = status(files.write())
    assert (code, verdict) == (1, "BROKEN") and {rows[where] for where in changes} == {"BROKEN"}


def test_a_summary_of_another_run(runs, tmp_path):
    files = Files(runs / "content", tmp_path / "copy")
    files.summary = json.loads((runs / "position" / "summary.json").read_text())
    assert status(files.write())[:2] == (1, "BROKEN")


@pytest.mark.parametrize("heads", [4, 8])
def test_the_papers_formula_is_broken_and_ours_is_held(heads):
    """beta |o| |v| (1 + 2 s |q| |k|), with norms of whole matrices: for orthogonal ones beta * 3."""
    model = attention_layer("orthogonal", heads)
    block, table = model.blocks[0], Table(Config())
    starts, row = verify_lipschitz.split_tokens(block, heads, 12, 1.0), shakespeare.certificate(model)["rows"][0]
    table.attack("attention", "ours", math.log10(row["value"] + row["pattern"]), block.attention, starts, 1.0)
    table.attack("attention", "the paper's", math.log10(block.attention_scale * 3), block.attention, starts, 1.0)
    assert [row["verdict"] for row in table.rows] == ["held", "BROKEN"]


def test_false_certificates_of_predictions(runs, monkeypatch):
    honest, honest_tokens = mlp_cifar.certified_radii, verify_lipschitz.shakespeare.certified_tokens
    monkeypatch.setattr(mlp_cifar, "certified_radii", lambda *a: 30 * honest(*a))
    monkeypatch.setattr(verify_lipschitz.shakespeare, "certified_tokens",
                        lambda *a: {rho: torch.ones_like(kept_N) for rho, kept_N in honest_tokens(*a).items()})
    search = Config(budget=0.3, images=60, windows=8)
    assert status(runs / "mlp", search)[2]["test images predictions right within 1"] == "BROKEN"
    assert status(runs / "position", search)[2]["validation text predictions right within 0.1"] == "BROKEN"


@pytest.mark.parametrize("activation", ["gelu", "maxmin"])
def test_numbers_that_leave_the_range(activation):
    """Radii of 10^400 and streams whose squares overflow: nothing is called broken, nothing fails."""
    model = attention_layer("orthogonal", 2, blocks=8, activation=activation, residual_scale=8.0, data="stand-in")
    for _, W in model.matrices():
        W.data *= 1e25
    table = Table(FAST)
    verify_lipschitz.verify_transformer(table, verify_lipschitz.shakespeare, model.config,
                                        model.requires_grad_(False), "stand-in")
    assert {row["verdict"] for row in table.rows} <= {"held", "not checked: overflow"} and len(table.rows) > 40


# ---- what cannot be checked --------------------------------------------------------------------------
def test_nothing_claimed(runs, tmp_path):
    files = Files(runs / "mlp", tmp_path / "copy").write()
    (files / "summary.json").unlink()
    assert status(files)[:2] == (2, "nothing claimed")


@pytest.mark.parametrize("what", ["null", "absent", "more", "config.json"])
def test_missing(what, runs, tmp_path):
    """A null is no claim; nor is a value or a file that is not there."""
    files, row = Files(runs / "content", tmp_path / "copy"), "config.json the file"
    if what == "null":
        files.summary["lipschitz_log10"], row = None, "summary.json lipschitz_log10"
    elif what == "absent":
        del files.summary["norms"]["q"]
        row = "summary.json norms q"
    elif what == "more":
        files.summary["certified_token_accuracy"]["0.5"], row = 1.0, "summary.json certified_token_accuracy 0.5"
    files.write()
    if what == "config.json":
        (files.out / what).unlink()
    code, verdict, rows = status(files.out)
    assert (code, verdict) == (2, "could not be checked in full") and rows[row].startswith("not ")


@pytest.mark.parametrize("name", ["mlp", "content"])
def test_data_that_are_not_here(name, runs, tmp_path):
    """Bounds are checked all the same; accuracy is not, and a false bound is still found."""
    files = Files(runs / name, tmp_path / "copy")
    files.state["data"] = files.summary["data"] = files.settings["data"] = str(tmp_path / "nowhere")
    files.summary["val_accuracy"] = 0.9
    code, verdict, rows = status(files.write())
    assert code == 2 and rows["checkpoint data of the run"] == "not checked: its data are not here"
    assert rows["summary.json val_accuracy"] == "not checked: nothing recomputes it"
    assert rows["summary.json lipschitz_log10"] == "agrees"
    files.summary["lipschitz_log10"] -= 1
    assert status(files.write())[0] == 1
    assert verify_lipschitz.main([str(files.out)], dataclasses.replace(FAST, data="nowhere")) == 2


def test_data_that_moved(runs, tmp_path):
    """--data says that these are the run's own: then a difference counts."""
    (tmp_path / "moved").write_text(shakespeare.stand_in())
    moved = dataclasses.replace(FAST, data=str(tmp_path / "moved"))
    files = Files(runs / "content", tmp_path / "copy")
    files.state["data"] = files.summary["data"] = files.settings["data"] = str(tmp_path / "nowhere")
    assert status(files.write(), moved)[:2] == (0, "held")
    files.summary["val_accuracy"] += 0.01
    assert status(files.write(), moved)[:2] == (1, "BROKEN")


class Payload:
    def __reduce__(self):
        return os.system, ("touch PWNED",)


@pytest.mark.parametrize("kind", ["missing", "truncated", "foreign", "hostile", "config", "summary"])
def test_what_cannot_be_read(kind, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = Files(runs / "mlp", tmp_path / "copy").write()
    (out / "verify.json").unlink(missing_ok=True)
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
        torch.save({**torch.load(path, weights_only=True), "config": "none"}, path)
    else:
        (out / "summary.json").write_text("{")
    assert verify_lipschitz.main([str(out)], FAST) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and str(out) in said and "could not be checked" in said
    assert not Path("PWNED").exists() and not (out / "verify.json").exists()


def zipped(path):
    """The same checkpoint, compressed."""
    with zipfile.ZipFile(path) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in parts.items():
            new.writestr(name, data)


def large(path):
    with open(path, "wb") as file:
        file.truncate(2**31)  # (no disk space: all zeros)


WRONG = ([], {}, [[[1]]], "\ud800\x1b[2J\n", 10**400, -1, 1e308, math.nan, math.inf, True, None, {"a": {"b": []}})
HOSTILE = {  # what is done to the files of a run
    **{f"{name} {kind}": lambda out, name=name, content=content: (out / name).write_bytes(content)
       for name in ("summary.json", "config.json", "log.jsonl")
       for kind, content in dict(text=b"{", encoding=b"\xff\xfe{}", nested=b"[" * 100_000, nulls=b"{}\n\0\0\0\0").items()},
    **{f"{name} of 2 GB": lambda out, name=name: large(out / name) for name in ("summary.json", "log.jsonl", "checkpoint.pt")},
    "checkpoint.pt is a pipe": lambda out: ((out / "checkpoint.pt").unlink(), os.mkfifo(out / "checkpoint.pt")),
    "checkpoint.pt is a folder": lambda out: ((out / "checkpoint.pt").unlink(), (out / "checkpoint.pt").mkdir()),
    "checkpoint.pt is compressed": lambda out: zipped(out / "checkpoint.pt"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_one_line(kind, runs, tmp_path, capsys):
    out = Files(runs / "mlp", tmp_path / "copy").write()
    HOSTILE[kind](out)
    assert verify_lipschitz.main([str(out)], FAST) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "could not be checked" in said and len(said) < 700
    assert kind.split(" ")[0] in said or "checkpoint" in kind


@pytest.mark.parametrize("name", ["mlp", "position"])
def test_hostile_values_are_broken_or_one_line(name, runs, tmp_path, capsys, monkeypatch):
    """Each part of a checkpoint and each setting, in some wrong way; before the searches, which are left out."""
    def stop(*arguments):
        raise UserError("so far, so good")

    monkeypatch.setattr(verify_lipschitz, "verify_mlp", stop)
    monkeypatch.setattr(verify_lipschitz, "verify_transformer", stop)
    files, values = Files(runs / name, tmp_path / "copy"), itertools.cycle([*WRONG, torch.ones(1).expand(10**5, 10**5)])
    files.state["optimizers"] = []  # (not looked at)
    targets = [files.state, files.settings, files.weights, files.state["log"][-1], files.settings]
    for i, target in enumerate(targets):
        for key in list(target):
            before, target[key] = target[key], next(values) if i < 4 else 10**9  # (no model of that size is built)
            torch.save(files.state, files.out / "checkpoint.pt")
            assert verify_lipschitz.main([str(files.out)], FAST) in (1, 2), key
            said = capsys.readouterr()
            assert len(said.err.splitlines()) <= 1 and "\x1b" not in said.out + said.err, key
            target[key] = before


def test_weights_that_are_larger_than_their_file(runs, tmp_path, capsys):
    """A view of one number as 9 million: the model that it fits is not built."""
    files = Files(runs / "mlp", tmp_path / "copy")
    files.settings["width"], files.weights["weights.1"] = 3000, torch.ones(1).expand(3000, 3000)
    torch.save(files.state, files.out / "checkpoint.pt")
    files.config["width"] = 3000
    (files.out / "config.json").write_text(json.dumps(files.config))
    assert verify_lipschitz.main([str(files.out)], FAST) == 2
    assert "its weights are more than the file holds" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["summary", "config"])
def test_hostile_summaries_are_broken_or_not_checked(name, runs, tmp_path, capsys):
    """All values wrong at once, each in another way."""
    files = Files(runs / "position", tmp_path / "copy")
    target = getattr(files, name)
    for i, key in enumerate(target):
        target[key] = WRONG[i % len(WRONG)]
    target["\x1b[2J \ud800" * 100] = WRONG
    code, verdict, rows = status(files.write())
    said = capsys.readouterr()
    assert (code, verdict) == (1, "BROKEN") and not said.err and "\x1b" not in said.out
    said.out.encode()  # (no half characters)


def test_no_code_that_a_checkpoint_names_is_run(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("open('PWNED', 'w')\ndef f(W, w_max, step_norm=0.0):\n    return W\n")
    files = Files(runs / "mlp", tmp_path / "copy")
    files.settings["constraint"] = files.config["constraint"] = "mine.py:f"
    assert status(files.write())[0] == 0 and not Path("PWNED").exists()


def test_the_command_line(tmp_path, capsys):
    def command(*arguments):
        return subprocess.run([sys.executable, str(ROOT / "verify_lipschitz.py"), *map(str, arguments)],
                              capture_output=True, text=True, timeout=200, cwd=tmp_path)

    nothing = command()
    assert nothing.returncode == 2 and "Traceback" not in nothing.stderr and "runs/checkpoint.pt" in nothing.stderr
    for arguments, text in ((["--help"], "exit status:\n    0  held"), (["--budget", "0"], "--budget 0.0: must be from"),
                            (["--budget", "nan"], "--budget nan: must be from")):
        with pytest.raises(SystemExit) as stop, pytest.MonkeyPatch().context() as patch:
            patch.setattr(sys, "stderr", sys.stdout)
            verify_lipschitz.parse_arguments(arguments)
        assert stop.value.code == (0 if arguments == ["--help"] else 2) and text in capsys.readouterr().out
    assert verify_lipschitz.parse_arguments(["a", "--budget", "20"]) == (["a"], Config(budget=20.0))


def test_own_shares_of_nanogpt_are_given():
    """Its attention by position, as computed: no token gives itself less, in windows shorter than a sequence."""
    config = nanogpt_lipschitz.Config.of("tiny", width=16, blocks=1, heads=2, hidden=32, seq_len=64, window=32, vocab=256,
                                         logit_scale=0.0, attention_scale=1.0)
    block = nanogpt_lipschitz.Transformer(config).double().blocks[0]
    block.v.data = block.o.data = torch.eye(16).double()  # so a token's output is the average of tokens, head by head
    x_TTD = torch.eye(64).double()[:, :, None].expand(64, 64, 16)  # in row t only token t is not 0
    own_TH = block.attention(x_TTD)[torch.arange(64), torch.arange(64)][:, ::8]
    share_H = block.own_share_H()
    assert (share_H <= own_TH * (1 + 1e-9)).all() and torch.allclose(share_H, own_TH[-1])


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


@pytest.mark.parametrize("rho", [0.1, 3.0])
def test_a_certificate_at_a_radius_is_of_the_larger_ball(rho):
    """Embeddings of RMS 1 that may move by rho: the product starts at 1 + rho, and attacks in that ball do not exceed it."""
    model = attention_layer("orthogonal", 2)
    bound = shakespeare.certificate(model, rho)
    row, block = bound["rows"][0], model.blocks[0]
    assert row["radius_log10"] >= math.log10(1 + rho)
    starts = verify_lipschitz.split_tokens(block, 2, 12, 1 + rho)
    found = climb(lambda x: torch.lerp(x, block.attention(x), model.mix), starts, 1 + rho, steps=60).max().item()
    assert found <= 10 ** row["attention_log10"]


def test_a_factor_on_the_logits_is_in_all_bounds_and_certifies_nothing():
    found = []
    for scale in (1.0, 8.0):
        model = attention_layer("orthogonal", 2, "bias", logit_scale=0.0, final_scale=scale)
        bound = shakespeare.certificate(model)
        tokens_N = torch.randint(8, (400,), generator=torch.Generator().manual_seed(0))
        shares = [kept_N.sum().item() for kept_N in shakespeare.certified_tokens(model, tokens_N).values()]
        found.append((bound["product_log10"] - math.log10(scale), bound["ellipsoid_log10"] - math.log10(scale), shares))
    assert found[0][:2] == pytest.approx(found[1][:2], abs=1e-8) and found[0][2] == found[1][2] and found[0][2][0] > 0


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


@pytest.mark.parametrize("heads, positions", [(1, "rope"), (8, "rope"), (4, "bias")])
def test_search_of_attention_is_near_what_five_times_the_budget_finds(heads, positions):
    model = attention_layer("orthogonal", heads, positions)
    block = model.blocks[0]

    def start(seed):
        split = verify_lipschitz.split_tokens(block, heads, 12, 1.0)
        return torch.cat([verify_lipschitz.directions(8, 12, 16, seed=seed), split])

    found = climb(block.attention, start(0), 1.0, steps=120).max()
    much = max(climb(block.attention, start(seed), 1.0, steps=300, seed=seed).max() for seed in (1, 2))
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
                                             radius / 2, steps=20)  # (RMS of 4 coordinates)
        assert kept_N.tolist() == stands


def test_a_prediction_that_falls_is_not_made_up_for_by_another():
    """Of two predictions the wrong one was certified: as many are certified as stand."""
    table, W_KD = Table(FAST), torch.tensor([[1.0, 0], [0, 0]]).double()
    table.attack_predictions("images", "", {1.0: torch.tensor([True, False])}, lambda x: x @ W_KD.T,
                             torch.tensor([[0.1, 0], [5, 0]]).double(), torch.zeros(2, dtype=torch.int64), 1, 2000)
    assert (table.rows[0]["claimed"], table.rows[0]["found"], table.verdict()) == (0.5, 0.5, "BROKEN")


def test_ranges_of_an_evaluation():
    """What other machines may find lies inside: the same logits with other rounding errors of that size."""
    generator = torch.Generator().manual_seed(0)
    W, x = torch.randn(10, 300, generator=generator), torch.randn(2000, 300, generator=generator)
    y = torch.randint(10, (2000,), generator=generator)
    ranges = verify_lipschitz.evaluation(lambda x, dtype: x.to(dtype) @ W.to(dtype).T, [(x, y)], hot=3.0)
    for seed in range(5):
        order = torch.randperm(300, generator=generator)
        z = x[:, order] @ W[:, order].T
        for name, claim in dict(val_loss=F.cross_entropy(z, y), val_loss_at_temperature=F.cross_entropy(3 * z, y),
                                val_accuracy=(z.argmax(1) == y).double().mean()).items():
            assert verify_lipschitz.holds(claim.item(), *ranges[name][1:])
    assert ranges["val_loss"][2] - ranges["val_loss"][1] < 1e-3
    assert ranges["val_accuracy"][2] - ranges["val_accuracy"][1] <= 1 / 2000 + 1e-9
    assert rms(x).shape == (2000,)
