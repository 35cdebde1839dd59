"""What the three tutorials share: it is the same text in each, and what it does is tried with the smallest of them."""

import ast
import dataclasses
import functools
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

import mlp_cifar
import nanogpt_lipschitz
import shakespeare
from constraints import exact_norm
from mlp_cifar import Config, UserError
from tiny import TINY, checkpoint, flags, run

ROOT = Path(__file__).parent.parent
SAVEFIG = matplotlib.figure.Figure.savefig  # before the fixtures change it
TUTORIALS = ("mlp_cifar", "shakespeare", "nanogpt_lipschitz")
SECTIONS = ("Settings", "A run, its folder and its checkpoint", "Tools of a training loop", "On the command line")
OWN = {"Config", "Block", "Transformer", "rotate", "build_model", "certificate", "tuned", "describe_blocks",
       "largest_embedding", "load_data", "choose_batch", "build_optimizers", "measure", "evaluate", "report", "sample",
       "main"}
pytestmark = pytest.mark.usefixtures("few_images", "blank_pictures")


# ---- the same text ---------------------------------------------------------------------------------------------------
def source(tutorial):
    return (ROOT / f"{tutorial}.py").read_text()


def shared_text(text):
    """{title: what is shared of the section}: of Settings what is before Config, of the last one run_script."""
    sections = re.findall(r"^(# ==== ([^\n]*) \(the same text.*?)(?=^# ==== |^if __name__|\Z)", text, re.M | re.S)
    shared = {title: whole for whole, title in sections}
    ends = {"Settings": "@dataclasses.dataclass", "On the command line": "\n\n\n"}
    return {title: text.partition(ends[title])[0] if title in ends else text for title, text in shared.items()}


def definitions(text):
    """{name: source} of functions and classes outside of the shared sections."""
    lines, shared = text.splitlines(), "".join(shared_text(text).values())
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            whole = "\n".join(lines[first - 1:node.end_lineno])
            if whole not in shared:
                found[node.name] = whole
    return found


def test_the_shared_sections_are_copies():
    first, *others = [shared_text(source(tutorial)) for tutorial in TUTORIALS]
    assert set(first) == set(SECTIONS) and all(len(text) > 400 for text in first.values())
    for other in others:
        assert other == first


@pytest.mark.parametrize("section", SECTIONS)
def test_one_character_of_a_copy_counts(section):
    text = source("mlp_cifar")
    shared = shared_text(text)[section]
    for place in (len("# ==== "), len(shared) // 2, len(shared.rstrip()) - 1):
        changed = text.replace(shared, f"{shared[:place]}~{shared[place + 1:]}")
        assert changed != text and shared_text(changed).get(section) != shared


def test_what_has_one_name_is_one_text():
    """But for what each tutorial does in its own way."""
    texts = {tutorial: definitions(source(tutorial)) for tutorial in TUTORIALS}
    for a, b in combinations(TUTORIALS, 2):
        own = OWN | {"stand_in"} if a == "mlp_cifar" else OWN  # of images; of a text
        for name in (texts[a].keys() & texts[b].keys()) - own:
            assert texts[a][name] == texts[b][name], (name, a, b)
    assert "stand_in" in texts["shakespeare"].keys() & texts["nanogpt_lipschitz"].keys()


# ---- settings --------------------------------------------------------------------------------------------------------
def test_numbers_of_python_and_numpy_are_settings(tmp_path):
    for w_max, limits in ((2, [2, 2, 2]), ([3, 4.5, np.float64(5)], [3, 4.5, 5])):
        assert list(Config(w_max=w_max).limits().values()) == limits
    assert Config(w_max=np.float32(2.5)) == Config(w_max="2.5")
    config = Config.of("certified", lr=np.float32(0.5), width=np.int64(32), mirror=np.bool_(True), steps=7.0)
    assert json.loads(json.dumps(vars(config))) == vars(Config.of("certified", lr=0.5, width=32, mirror=True, steps=7))
    with pytest.raises(UserError, match="--preset best: must be one of default, paper"):
        Config.of("best")
    with pytest.raises(UserError, match="--width 1.5 .*int"):
        Config(width=1.5)


def test_flags_and_their_help(capsys):
    parse = mlp_cifar.parse_arguments
    assert parse("--w-max 1,2,3 --preset paper --bias".split()) == Config.of("paper", w_max="1,2,3", bias=True)
    assert parse("--adamw_wd=0.1 --no-bias".split()) == Config(adamw_wd=0.1, bias=False)
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and all(preset in text for preset in mlp_cifar.PRESETS)
    for field in dataclasses.fields(Config):
        assert f"--{field.name}" in text and f"[{field.default}]" in text
    assert "hidden width (neurons) [256]" in text


@pytest.mark.parametrize("flags, says", [
    ("--w_max -1", "--w_max"), ("--w_max 0", "above 0"), ("--w_max nan", "--w_max"), ("--w_max inf", "--w_max"),
    ("--w_max 1,2", "or 3 of them"), ("--w_max six", "six"), ("--steps 0", "at least 1"), ("--steps 1.5", "--steps"),
    ("--lr nan", "--lr"), ("--lr -0.1", "at least 0"), ("--batch 0", "--batch"), ("--evals 0", "--evals"),
    ("--seed -1", "--seed"), ("--margin -1", "--margin"), ("--adamw_wd inf", "--adamw_wd"),
    ("--momentum 1", "momentum"), ("--constrain_every 1000", "every"), ("--constraint clip", "soft_cap"),
    ("--constraint nobody.py:f", "nobody.py"), ("--optimizer sgd", "muon, adamw"),
    ("--dtype float8", "bfloat16"), ("--preset best", "paper_adamw"),
    ("--device tpu", "--device"), ("--device cuda:77", "--device"), ("--lowpass 33", "32"),
    ("--roll 32", "31"), ("--step 10", "--step"),
    ("--width 7 --activation maxmin", "even"), ("--depht 3", "--depht"), ("--data /no/such/folder", "/no/such/folder"),
    ("--holdout 600", "2 classes")])
def test_wrong_flags_are_one_line_and_leave_nothing(flags, says, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["mlp_cifar.py", "--data", "stand-in", *flags.split(), "--out", str(out)])
    try:
        status = mlp_cifar.run_script()
    except SystemExit as stop:  # argparse's own, behind its usage
        status = stop.code
    said = capsys.readouterr().err.rstrip("\n").rpartition("mlp_cifar.py: ")
    assert status == 2 and says in said[2] and "\n" not in said[2] and not out.exists()
    assert not said[0] or said[0].startswith("usage: ")


def test_a_refusal_by_the_script_itself(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "mlp_cifar.py", "--w_max", "-1", "--out", tmp_path / "run"],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("mlp_cifar.py: --w_max -1")


# ---- a run and its folder --------------------------------------------------------------------------------------------
def contents(out):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}


def stopped(out, **changes):
    """A run folder as a kill after the last evaluation leaves it."""
    run(out, **changes)
    (out / "summary.json").unlink()
    return out


def test_other_settings_are_refused_by_the_first_that_differs(tmp_path, capsys):
    out = stopped(tmp_path / "run")
    before = contents(out)
    for changes, says in ((dict(lr=0.3), "--lr 0.0, not 0.3"), (dict(w_max=2, seed=1), "--w_max 3.4, not 2"),
                          (dict(preset="paper"), "--preset default, not paper")):
        with pytest.raises(UserError, match=says):
            run(out, **changes)
    assert contents(out) == before
    summary = mlp_cifar.main(Config(**TINY, out=str(out), device="cpu"))  # where it computes is no such setting
    assert summary == json.loads((out / "summary.json").read_text()) and summary["steps"] == 6
    before = contents(out)
    assert mlp_cifar.main(Config(**TINY, out=str(out))) == summary and contents(out) == before
    assert "is finished" in capsys.readouterr().out


def test_each_run_without_out_has_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        mlp_cifar.main(Config(**TINY))
    assert {path.name for path in Path("runs").iterdir()} == {"mlp_cifar_default_seed0", "mlp_cifar_default_seed0_2"}

    def one(_):
        try:
            return mlp_cifar.make_folder(Config())
        except FileExistsError:  # one that finds it taken in the same moment says so
            return None

    with ThreadPoolExecutor(8) as pool:
        folders = [folder for folder in pool.map(one, range(60)) if folder]
    assert len(set(folders)) == len(folders) > 8
    with pytest.raises(OSError):
        run(folders[0] / "config.json")
    assert json.loads((folders[0] / "config.json").read_text()) == vars(Config())


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    out, real = tmp_path / "run", Path.write_bytes

    def full(path, data):
        if (out / "checkpoint.pt").exists():
            real(path, data[:100])
            raise OSError(28, "No space left on device")
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            run(out)
    assert checkpoint(out)["step"] == 3 and not list(out.glob("*.part"))
    run(out)
    assert checkpoint(out)["step"] == 6


class Payload:
    def __reduce__(self):
        return os.system, (f"touch {Payload.witness}",)


@pytest.mark.parametrize("kind", ["truncated", "hostile", "foreign", "other script", "other shape", "other data"])
def test_what_is_no_checkpoint_of_the_script_is_one_line(kind, tmp_path):
    out = stopped(tmp_path / "run")
    path, state = out / "checkpoint.pt", checkpoint(out)
    Payload.witness = tmp_path / "witness"
    wrong = {"hostile": dict(state, model=Payload()), "foreign": [1, 2, 3],
             "other script": dict(state, config=dict(state["config"], heads=4)),
             "other shape": dict(state, config=dict(state["config"], width=17)),
             "other data": dict(state, images=12345)}
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    else:
        torch.save(wrong[kind], path)
    before = contents(out)
    with pytest.raises(UserError) as refusal:
        run(out)
    assert "\n" not in str(refusal.value) and not Payload.witness.exists() and contents(out) == before


def test_main_leaves_its_caller_alone_and_draws_its_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", SAVEFIG)
    backend, environment = matplotlib.get_backend(), dict(os.environ)
    config = Config(**TINY, out=str(tmp_path / "run"))
    before = dict(vars(config))
    assert mlp_cifar.main(config)["preset"] == "default" and vars(config) == before
    assert matplotlib.get_backend() == backend and dict(os.environ) == environment
    with Image.open(tmp_path / "run" / "curves.png") as picture:
        assert picture.size == (1540, 462) and len(set(np.asarray(picture.convert("L")).flat)) > 20


def test_it_runs_where_the_output_is_no_terminal(tmp_path, monkeypatch):
    """As in a notebook, by %run."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "argv", ["mlp_cifar.py", *flags(tmp_path / "run")])
    assert mlp_cifar.run_script() == 0 and "Lipschitz constant" in sys.stdout.getvalue()


def test_a_long_run_gives_signs_of_life(monkeypatch, capsys):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(mlp_cifar.time, "perf_counter", lambda: next(clock))
    assert list(mlp_cifar.count_steps(10, 18)) == list(range(10, 18))
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["step    12/18  about 36 s left", "step    15/18  about 14 s left"]


def test_a_second_ctrl_c_interrupts_at_once(request):
    before = signal.default_int_handler  # a process in the background may ignore the signal
    request.addfinalizer(functools.partial(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, before)))
    with pytest.raises(KeyboardInterrupt), mlp_cifar.catch_ctrl_c() as stops:
        signal.raise_signal(signal.SIGINT)
        assert len(stops) == 1
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_infinite_numbers_are_words():
    assert [mlp_cifar.finite(x) for x in (math.inf, -math.inf, 1.5)] == ["inf", "-inf", 1.5]


@pytest.mark.parametrize("constraint, w_max, norm", [
    ("weight_decay", "0.05", 1), ("spectral_weight_decay", "0.01", 1), ("none", "0.5", 1),
    ("soft_cap", "0.5", 0.5), ("hard_cap", "3", 1), ("stiefel", "3", 3)])
def test_what_norm_matrices_start_with(constraint, w_max, norm):
    """To a decay w_max is the inverse of its strength and no limit: weights start as without one."""
    settings = dict(constraint=constraint, w_max=w_max, width=16)
    small = dict(settings, heads=2, hidden=16)
    for model in (mlp_cifar.MLP(Config(**settings)), shakespeare.Transformer(shakespeare.Config(**small), "ab"),
                  nanogpt_lipschitz.Transformer(nanogpt_lipschitz.Config(**small, vocab=4))):
        norms = [exact_norm(W).item() for _, W in model.matrices()]
        started = [each for each in norms if each > 0]  # others fade in
        assert started and started == pytest.approx([norm] * len(started), rel=1e-4)
