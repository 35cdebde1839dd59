"""results/gpu_check.py: on a CPU everything holds, each planted fault is found, and it goes through on fake CUDA."""

import json
import sys
import traceback
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

import constraints  # noqa: E402
import gpu_check  # noqa: E402
import memory  # noqa: E402
import muon  # noqa: E402
import nanogpt_lipschitz as nano  # noqa: E402

TINY = dict(gpu_check.SMALL, blocks=1, width=32, hidden=32, vocab=128, seq_len=128, window=128)
PARTS = ["maps", "attention", "losses", "checkpoint", "cap1", "fineweb"]  # (`processes` starts torchrun)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(gpu_check, "SMALL", TINY)
    monkeypatch.setattr(gpu_check, "SMALL_SHAPES", ((64, 64), (96, 32)))
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)  # no compilation


def checked(part, folder):
    """{what: verdict} of a part."""
    run = gpu_check.Run(torch.device("cpu"), True, folder, part=part)
    if part == "processes":
        run.launched = dict(WORLD_SIZE="1")
    gpu_check.PARTS[part](run)
    return {row["what"]: row["verdict"] for row in run.rows}


def test_on_a_cpu_all_holds(tmp_path, capsys):
    out = tmp_path / "folder" / "found.json"
    words = ["--device", "cpu", "--small", "--only", ",".join(PARTS), "--out", str(out)]
    assert gpu_check.main(words) == 0
    found = json.loads(out.read_text())
    assert found["torch"] == torch.__version__ and found["device"] == "cpu" and found["processes"] == 1
    assert {row["part"] for row in found["rows"]} == set(PARTS)
    output = capsys.readouterr().out
    assert all(row["what"] in output for row in found["rows"])
    held = [row for row in found["rows"] if row["verdict"] == "held"]
    assert len(held) > 20 and all(row["measured"] <= row["allowed"] for row in held)


# ---- planted faults --------------------------------------------------------------------------------------------------
def larger_msign(patch):
    msign = muon.msign
    patch.setattr(muon, "msign", lambda W: 1.2 * msign(W))


def no_hard_cap(patch):
    patch.setattr(constraints, "hard_cap", constraints.none)


def one_block_less(patch):
    block_mask = nano.block_mask

    def wrong(docs_BT, blocks):
        mask = block_mask(docs_BT, blocks)
        mask.full_kv_num_blocks[0, 0, -1] -= 1
        return mask

    patch.setattr(nano, "block_mask", wrong)


def another_scale(patch):
    attend = nano.attend

    def wrong(q, k, v, mask, scale):
        return attend(q, k, v, mask, scale * (1.1 if isinstance(mask, nano.BlockMask) else 1))

    patch.setattr(nano, "attend", wrong)


def shorter_steps_in_float32(patch):
    msign = muon.msign
    patch.setattr(muon, "msign", lambda W: msign(W) * (0.9 if W.dtype == torch.float32 else 1))


def lost_momentum(patch):
    patch.setattr(nano.Exchange, "load_states", lambda *rest: None)


def no_constraint(patch):
    patch.setattr(nano, "find_constraint", lambda name: constraints.none)


def nothing_is_trained(patch):
    patch.setattr(muon.Muon, "_update", lambda self, batch, group, idle: 0.0)
    patch.setattr(muon.Muon, "_constrain", lambda self, batch, group, step_norm: None)


def a_divided_soft_cap(patch):
    """In float32. It keeps the limit, but singular values far below the limit shrink as much."""
    soft_cap = constraints.soft_cap

    def divided(W, w_max, step_norm=0.0):
        if W.dtype == torch.float64:
            return soft_cap(W, w_max, step_norm)
        return W * (w_max / (w_max + step_norm))

    patch.setattr(constraints, "soft_cap", divided)


def another_first_loss(patch):
    loss = nano.Transformer.loss
    patch.setattr(nano.Transformer, "loss", lambda model, x_ND, y_N: loss(model, x_ND, y_N) + 0.01 * len(y_N))


def compiles_at_each_step(patch):
    largest_excess = gpu_check.largest_excess

    def counted(optimizer):
        gpu_check.counters["stats"]["unique_graphs"] += 1
        return largest_excess(optimizer)

    patch.setattr(gpu_check, "largest_excess", counted)


def forgotten_gradients(patch):
    """In the second of the two runs: as if one process of two computed what the other does."""
    train, sequences = gpu_check.train, nano.Tokens.sequences

    def faulty(config):
        seen = train(config)
        patch.setattr(nano.Tokens, "sequences", lambda tokens, step, rows, config: sequences(
            tokens, step, [row // 2 * 2 for row in rows], config))
        return seen

    patch.setattr(gpu_check, "train", faulty)


@pytest.mark.parametrize("part, fault, what", [
    ("maps", larger_msign, "msign"), ("maps", a_divided_soft_cap, "soft_cap"),
    ("cap1", nothing_is_trained, "by the first"),
    ("maps", no_hard_cap, "hard_cap"), ("attention", one_block_less, "block_mask"),
    ("attention", another_scale, "by position"), ("losses", shorter_steps_in_float32, "float32"),
    ("checkpoint", lost_momentum, "gone on"), ("cap1", no_constraint, "after each of"),
    ("specnorm8", no_constraint, "eigenvalues"),
    ("baseline", another_first_loss, "first loss"), ("baseline", compiles_at_each_step, "step 3"),
    ("processes", forgotten_gradients, "losses")])
def test_a_fault_is_found(part, fault, what, monkeypatch, tmp_path):
    fault(monkeypatch)
    assert "broken" in [verdict for name, verdict in checked(part, tmp_path).items() if what in name]


@pytest.mark.parametrize("loss, verdict", [(6.48, "held"), (6.7, "broken")])
def test_the_authors_log(loss, verdict, monkeypatch, tmp_path):
    """The first 125 steps with the schedule of all 6200."""
    def train(config):
        assert config.steps == 125 and nano.schedule(config, 124) == nano.schedule(nano.Config.of("cap1"), 124)
        return gpu_check.Training(log=[dict(val_loss=loss, tokens_per_second=1.0)])

    (tmp_path / "fineweb10B").mkdir()
    for name in ("fineweb_train_000001.bin", "fineweb_val_000000.bin"):
        (tmp_path / "fineweb10B" / name).touch()
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    monkeypatch.setattr(gpu_check, "train", train)
    monkeypatch.setattr(gpu_check.Run, "compiles", lambda run: True)
    run = gpu_check.Run(torch.device("cpu"), False, tmp_path)
    gpu_check.check_fineweb(run)
    assert run.rows[0]["verdict"] == verdict


def test_an_exception_is_a_row_and_the_other_parts_go_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(muon, "msign", lambda W: 1 / 0)
    out = tmp_path / "found.json"
    assert gpu_check.main(["--device", "cpu", "--only", "maps,fineweb", "--out", str(out)]) == 1
    rows = json.loads(out.read_text())["rows"]
    assert [row["verdict"].split(":")[0] for row in rows] == ["broken", "skipped"]
    assert rows[0]["what"] == "ZeroDivisionError: division by zero" and "1 broken, 1 skipped" in capsys.readouterr().out


def test_an_old_gpu_is_a_sentence(monkeypatch, tmp_path, capsys):
    cuda = torch.device("cuda")
    monkeypatch.setattr(nano.importlib.util, "find_spec", lambda name: name == "triton")
    for name, fact in dict(get_device_capability=(8, 0), get_device_name="a card", device_count=1,
                           is_bf16_supported=False).items():
        monkeypatch.setattr(torch.cuda, name, lambda *rest, fact=fact, **kwargs: fact)
    assert nano.can_compile(cuda) and not nano.can_compile(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *rest: (7, 5))
    run = gpu_check.Run(cuda, False, tmp_path)
    assert gpu_check.describe(run)["compiles"] is False and run.dtypes() == [torch.float32]
    assert "below compute capability 8" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *rest: (8, 0))
    monkeypatch.setattr(nano.importlib.util, "find_spec", lambda name: None)
    assert not nano.can_compile(cuda)


# ---- fake CUDA tensors -----------------------------------------------------------------------------------------------
def go_through():
    """Maps, attention and a training of 3 steps on fake CUDA tensors; the numbers mean nothing."""
    class Numbers(memory.Watch):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "_local_scalar_dense" not in str(func):
                return func(*args, **(kwargs or {}))
            if args[0].dtype.is_floating_point:
                return 0.5
            return any("check_finite" in frame.name for frame in traceback.extract_stack())

    gpu_check.SMALL = dict(TINY, steps=3)
    gpu_check.SMALL_SHAPES = gpu_check.SHAPES
    gpu_check.mark_time = lambda device: 0.0
    constraints.fast_dtype = nano.fast_dtype = muon.fast_dtype = lambda device: torch.bfloat16
    nano.can_compile = lambda device: device.type == "cuda"
    nano.save = lambda *rest, **state: None
    torch.compile, torch.nn.Module.compile = lambda f, **kwargs: f, lambda module, **kwargs: None
    torch.cuda.set_device = torch.cuda.reset_peak_memory_stats = lambda *device: None
    torch.Tensor.pin_memory = lambda x: x
    torch.nn.Module.to = memory.move
    torch.nn.Module.double = lambda module: memory.move(module, torch.double)
    with gpu_check.tempfile.TemporaryDirectory() as folder, memory.FakeTensorMode(allow_non_fake_inputs=True):
        run = gpu_check.Run(torch.device("cuda", 0), True, Path(folder))
        with Numbers():
            for run.part in ("maps", "attention", "cap1"):
                gpu_check.PARTS[run.part](run)
    print("DONE", len(run.rows), sum(row["verdict"] == "broken" for row in run.rows))


@pytest.mark.skipif(not memory.possible(), reason="needs g++, Linux, and a CPU build of torch")
def test_on_fake_cuda_tensors():
    result = memory.with_stub([sys.executable, __file__])
    assert "DONE" in result.stdout, result.stderr[-3000:]


if __name__ == "__main__":
    go_through()
