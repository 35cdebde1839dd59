"""Every command of the README: its flags are understood, and it runs, shortened here or in full in another test."""

import re
import shlex
from pathlib import Path

import pytest

import mlp_cifar
import nanogpt_lipschitz
import shakespeare
import verify_lipschitz

ROOT = Path(__file__).parent.parent
SCRIPTS = dict(mlp_cifar=mlp_cifar, shakespeare=shakespeare, nanogpt_lipschitz=nanogpt_lipschitz,
               verify_lipschitz=verify_lipschitz)
README = (ROOT / "README.md").read_text()
LINES = [line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", README, re.S)
         for line in block.replace("&&", "\n").splitlines()]
COMMANDS = [(re.search(r"(\w+)\.py", line)[1], line.split(".py", 1)[1].strip()) for line in LINES
            if re.search(r"\w+\.py", line) and "results/" not in line]  # (those: test_results.py)
SHORT = dict(
    mlp_cifar="--data stand-in --width 16 --lowpass 6 --steps 2 --evals 1",
    shakespeare="--data stand-in --width 16 --blocks 2 --heads 2 --hidden 32 --seq_len 24 --steps 4 --batch 4 "
                "--evals 1 --length 10",
    nanogpt_lipschitz="--data stand-in --vocab 256 --width 16 --blocks 2 --heads 2 --hidden 32 --seq_len 32 "
                      "--window 32 --batch 2 --micro_batch 2 --val_tokens 2000 --steps 4 --evals 1 --residual_scale 1")
ELSEWHERE = {  # what a shortened run here would not be: run as it is by another test
    "--help": ("test_verify_lipschitz", "--help"),
    "--sample": ("test_shakespeare", "--sample")}
pytestmark = pytest.mark.usefixtures("few_images", "little_text", "blank_pictures")


def python_code(word):
    """The first example in Python with that word."""
    return next(code for code in re.findall(r"```python\n(.*?)```", README, re.S) if word in code)


def anchors(markdown):
    """Those that GitHub gives to the headings of a text."""
    headings = re.findall(r"^#+ (.*)", markdown, re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


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
    if "mine.py" in flags:
        (tmp_path / "mine.py").write_text(python_code("half_cap"))
    module.main(module.parse_arguments([*shlex.split(flags), *SHORT[script].split()]))
    preset = options.preset
    folder = options.out or f"runs/{script}_{preset}_seed{options.seed}"
    assert (tmp_path / folder / "summary.json").exists() and preset in capsys.readouterr().out


def test_the_example_in_python(capsys):
    """As it stands, and then through steps that push all one way."""
    import torch

    scope = {}
    exec(python_code("Muon("), scope)
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    for _ in range(60):
        (-scope["model"](x).square().mean()).backward()  # (grows without end if it is let)
        for optimizer in scope["optimizers"]:
            optimizer.step()
            optimizer.zero_grad()
    norms = [scope["exact_norm"](W).item() for W in scope["matrices"]]
    assert len(norms) == 2 and 1.5 < max(norms) <= 2 * (1 + 4e-4) and capsys.readouterr().out.startswith("[")


def test_from_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(python_code("Config.of").replace("steps=100", "steps=2, width=16, lowpass=6"), {})
    accuracy, bound = map(float, capsys.readouterr().out.splitlines()[-1].split())
    assert 0 < accuracy < 1 and -3 < bound < 3


@pytest.mark.parametrize("name", ["README.md", "results/README.md"])
def test_links(name):
    """Each leads to a file that is there, and to a heading that is in it."""
    text = (ROOT / name).read_text()
    assert len(re.findall(r"\]\(", text)) > 5
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            file = ROOT / name if not path else (ROOT / name).parent / path
            assert file.exists() and (not anchor or anchor in anchors(file.read_text())), target
