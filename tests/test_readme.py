"""Every command of the README: its flags are understood, and it runs, shortened here or in full form in the test named below."""

import re
import shlex
from pathlib import Path

import pytest

import mlp_cifar
import nanogpt_lipschitz
import shakespeare
import verify_lipschitz

ROOT = Path(__file__).parent.parent
SCRIPTS = dict(mlp_cifar=mlp_cifar, shakespeare=shakespeare, nanogpt_lipschitz=nanogpt_lipschitz, verify_lipschitz=verify_lipschitz)
LINES = [line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
         for line in block.replace("&&", "\n").splitlines()]
COMMANDS = [(re.search(r"(\w+)\.py", line)[1], line.split(".py", 1)[1].strip()) for line in LINES
            if re.search(r"\w+\.py", line) and "results/" not in line]  # (those: test_results.py)
SHORT = dict(
    mlp_cifar="--data stand-in --width 16 --lowpass 6 --steps 2 --evals 1",
    shakespeare="--data stand-in --width 16 --blocks 2 --heads 2 --hidden 32 --seq_len 24 --steps 4 --batch 4 --evals 1 --length 10",
    nanogpt_lipschitz="--data stand-in --vocab 256 --width 16 --blocks 2 --heads 2 --hidden 32 --seq_len 32 --window 32 --batch 2 "
                      "--micro_batch 2 --val_tokens 2000 --steps 4 --evals 1 --residual_scale 1")
ELSEWHERE = {  # what a shortened run here would not be: run as it is by another test
    "--help": ("test_verify_lipschitz", "--help"),
    "--sample": ("test_shakespeare", "--sample"), "mine.py": ("test_mlp_cifar", "half_cap")}


@pytest.fixture(scope="module", autouse=True)
def small_data():
    """Stand-ins drawn once, and little of them."""
    text, images, with_patches = shakespeare.stand_in(20_000), mlp_cifar.stand_in(600, 200), pytest.MonkeyPatch()
    with_patches.setattr(shakespeare, "stand_in", lambda: text)
    with_patches.setattr(mlp_cifar, "stand_in", lambda: images)
    yield
    with_patches.undo()


def test_there_are_commands_of_each_script():
    assert len(COMMANDS) > 15 and {script for script, _ in COMMANDS} == set(SCRIPTS)


@pytest.mark.parametrize("script, flags", COMMANDS, ids=[f"{script} {flags}" for script, flags in COMMANDS])
def test_command(script, flags, tmp_path, monkeypatch, capsys):
    module = SCRIPTS[script]
    if flags == "--help":
        with pytest.raises(SystemExit) as stop:
            module.parse_arguments(["--help"])
        assert stop.value.code == 0 and "--" in capsys.readouterr().out
        return
    options = module.parse_arguments(shlex.split(flags))
    other = next((place for flag, place in ELSEWHERE.items() if flag in flags), None)
    if script == "verify_lipschitz":
        other = "test_verify_lipschitz", "verify_lipschitz.main"
    if other:
        assert options and other[1] in (ROOT / "tests" / f"{other[0]}.py").read_text()
        return
    monkeypatch.chdir(tmp_path)
    module.main(module.parse_arguments([*shlex.split(flags), *SHORT[script].split()]))
    preset = options.preset
    assert (tmp_path / f"runs/{script}_{preset}_seed0/summary.json").exists() and preset in capsys.readouterr().out


def test_the_example_in_python(capsys):
    """As it stands, and then through steps that push all one way."""
    import torch

    code = next(code for code in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "Muon(" in code)
    scope = {}
    exec(code, scope)
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    for _ in range(60):
        (-scope["model"](x).square().mean()).backward()  # (grows without end if it is let)
        scope["optimizer"].step()
        scope["model"].zero_grad()
    norms = [scope["exact_norm"](W).item() for W in scope["matrices"]]
    assert len(norms) == 2 and 1.5 < max(norms) <= 2 * (1 + 4e-4) and capsys.readouterr().out.startswith("[")


def test_from_python(tmp_path, monkeypatch, capsys):
    code = next(code for code in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "Config.of" in code)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("steps=100", "steps=2, width=16, lowpass=6"), {})
    accuracy, bound = map(float, capsys.readouterr().out.splitlines()[-1].split())
    assert 0 < accuracy < 1 and -3 < bound < 3


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 250 and len(text.encode()) <= 16 * 1024
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("http") or (ROOT / link).exists(), link
