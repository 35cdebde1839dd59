"""nanogpt_lipschitz.py: its certificate, masks, data and accounting against oracles, and several processes against one."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matrices import singular_values
from test_mlp_cifar import same
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.flop_counter import FlopCounterMode

import nanogpt_lipschitz as nano
import shakespeare
from nanogpt_lipschitz import Config, Refusal, Transformer, certificate
from verify_lipschitz import climb, rms

ROOT = Path(__file__).parent.parent
TINY = dict(nano.TINY, width=16, blocks=2, heads=2, hidden=32, seq_len=24, window=24, batch=4, micro_batch=2, steps=6, evals=2,
            val_tokens=500)


@pytest.fixture(scope="module", autouse=True)
def small_stand_in():
    """The whole stand-in: processes of their own read it, too."""
    yield nano.stand_in()


def flags(**changes):
    return [x for k, v in {**TINY, **changes}.items() for x in ([f"--{k}"] if v is True else [f"--{k}", str(v)])]


def run(tmp_path, **changes):
    """A tiny run in this process; returns its folder and summary."""
    out = tmp_path / "run"
    nano.main(Config(**{**TINY, "out": str(out), **changes}))
    return out, json.loads((out / "summary.json").read_text())


def environment():
    """One thread for each process: more would only get into each other's way."""
    return {**{k: v for k, v in os.environ.items() if k != "DATA_DIR"}, "OMP_NUM_THREADS": "1"}


def command(*arguments, processes=0, restarts=0, timeout=240, **kwargs):
    """The script as a user runs it, alone or under torchrun."""
    start = [sys.executable]
    if processes:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "--max-restarts", str(restarts)]
    return subprocess.run([*start, str(ROOT / "nanogpt_lipschitz.py"), *map(str, arguments)], capture_output=True, text=True,
                          timeout=timeout, env=environment(), **kwargs)


def records(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def random_model(seed=0, norm=1.5, **changes):
    """A float64 model whose matrices are random, of the RMS->RMS norm asked for."""
    config = Config(**{**TINY, "w_max": "100", **changes})
    model = Transformer(config).initialize(seed).double()
    generator = torch.Generator().manual_seed(seed)
    for _, W in model.matrices():
        W.data = torch.randn(W.shape, generator=generator, dtype=torch.float64)
        W.data *= norm * (W.shape[0] / W.shape[1]) ** 0.5 / singular_values(W.data).max()
    return model


# ---- certificate -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("changes", [dict(), dict(activation="maxmin"), dict(activation="maxmin", positions="bias", logit_scale=0.0,
                                                                             attention_scale=0.0, residual_scale=2.0)])
def test_certificate_is_the_one_of_shakespeare(changes, monkeypatch):
    """Two copies of one derivation, computed in two ways; the slopes of GeLU's two forms apart."""
    monkeypatch.setattr(shakespeare, "GELU_SLOPE", nano.GELU_SLOPE)
    model = random_model(**changes)
    fields = {f.name for f in dataclasses.fields(shakespeare.Config)}
    twin_config = shakespeare.Config(**{k: v for k, v in dataclasses.asdict(model.config).items() if k in fields})
    twin = shakespeare.Transformer(twin_config, "".join(map(chr, range(256)))).double()
    own = {k.replace("head_XD", "head_VD").replace("bias_HW", "bias_HT"): v for k, v in model.state_dict().items()}
    twin.load_state_dict(own)
    a, b = certificate(model, rho=0.01), shakespeare.certificate(twin, rho=0.01)
    assert a["log10"] == pytest.approx(b["log10"], abs=1e-7)
    assert a["simple_log10"] == pytest.approx(b["simple_log10"], abs=1e-7)
    assert a["radius"] == pytest.approx(b["radius"], rel=1e-6)
    assert a["norms"] == pytest.approx(b["norms"], rel=1e-6)
    for mine, theirs in zip(a["rows"], b["rows"]):
        for key in ("radius", "radius_mlp", "value", "pattern", "attention", "mlp", "mlp_derivative"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-6), key


def test_stand_in_is_the_one_of_shakespeare(small_stand_in):
    assert small_stand_in == shakespeare.stand_in()


@pytest.mark.parametrize("changes", [dict(), dict(heads=4, activation="maxmin", residual_scale=2.0), dict(baseline=True, constraint="none"),
                                     dict(activation="maxmin", positions="bias", logit_scale=0.0, attention_scale=0.0)])
def test_certificate_survives_attack(changes):
    """Within the ball of embeddings, with documents that begin in the middle and a window shorter than the text."""
    model = random_model(norm=1.0, **{**dict(window=5), **changes})
    docs_BT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2, 2]])
    bound, R = certificate(model), rms(model.embedding_VD).max().item()
    start = torch.randn(12, 10, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = climb(lambda x: model.logits(model.body(x, docs_BT.expand(len(x), -1))), R * start / rms(start)[..., None], R, steps=60).max().item()
    assert found > 1e-3
    assert math.log10(found) <= bound["log10"] + 1e-8
    assert all(row["logits"] > 0 for row in bound["rows"]) == (model.config.logit_scale > 0)


def test_a_norm_layers_slope():
    """What step 6 says: at most 1 / sqrt(eps), reached at zero, and outputs of RMS at most 1."""
    x = torch.zeros(16, dtype=torch.float64)
    J = torch.autograd.functional.jacobian(nano.rms_norm, x)
    assert singular_values(J).max().item() == pytest.approx(nano.EPSILON**-0.5, rel=1e-9)
    for scale in (1e-4, 1e-3, 1.0, 1e3):
        x = scale * torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert singular_values(torch.autograd.functional.jacobian(nano.rms_norm, x)).max().item() <= nano.EPSILON**-0.5
        assert rms(nano.rms_norm(x)).item() <= 1


def test_steepest_slope_of_gelu():
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64, requires_grad=True)
    slope, = torch.autograd.grad(F.gelu(x).sum(), x)
    assert slope.max().item() <= nano.GELU_SLOPE and slope.max().item() > nano.GELU_SLOPE - 1e-8
    assert slope.min().item() >= 1 - nano.GELU_SLOPE


def test_padding_rows_of_the_head_count_for_nothing():
    """V = 250 in 256 rows: the limit is on the rows of real tokens, over whole runs, and the others stay zero."""
    config = Config(**{**TINY, "vocab": 250, "data": "none", "w_max": "1", "dtype": "float32"})
    team = nano.Team(config)
    model = Transformer(config).initialize(0)
    assert model.head_XD.shape == (256, 16) and model.head_VD.shape == (250, 16)
    trainer = nano.Trainer(config, model, team)
    tokens = nano.Tokens([("random", np.random.default_rng(0).integers(0, 250, 4000).astype(np.uint16))], 250)
    for step in range(30):
        trainer.step(tokens, step % config.steps)
        for role, W in model.matrices():
            W = model.head_VD if role == "head" else W
            assert singular_values(W).max().item() * (W.shape[1] / W.shape[0]) ** 0.5 <= 1 + 4e-4, role
    assert (model.head_XD[250:] == 0).all() and (model.head_XD[:250] != 0).any()
    assert certificate(model)["norms"]["head"] == pytest.approx(singular_values(model.head_VD).max().item() * (16 / 250) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("constraint", ["soft_cap", "hard_cap", "specnorm", "stiefel"])
def test_limits_hold_at_every_step(constraint):
    config = Config(**{**TINY, "constraint": constraint, "w_max": "1.5,1.4,1.3,1.2,1.1,1.0,0.9", "dtype": "float32", "steps": 30})
    team, (train, _, _) = nano.Team(config), nano.load_data(config)
    trainer = nano.Trainer(config, Transformer(config).initialize(0), team)
    for step in range(30):
        trainer.step(train, step)
        for role, W in trainer.model.matrices():
            assert singular_values(W).max().item() * (W.shape[1] / W.shape[0]) ** 0.5 <= nano.limits(config)[role] * (1 + 4e-4), role
        assert rms(trainer.model.embedding_VD).max().item() <= 1 + 1e-6


# ---- model -----------------------------------------------------------------------------------------------------------
def test_parity_with_the_papers_shapes():
    """162 M parameters in the paper's shapes, and a first loss of ln V."""
    config = nano.parse_arguments(["--preset", "cap1"])
    nano.check(config)
    model = nano.meta_model(config)
    shapes = [tuple(p.shape) for p in model.parameters()]
    assert shapes.count((768, 768)) == 48 and shapes.count((3072, 768)) == 12 and shapes.count((768, 3072)) == 12
    assert tuple(model.embedding_VD.shape) == (50257, 768) and tuple(model.head_XD.shape) == (50304, 768)
    assert sum(p.numel() for p in model.parameters()) == 12 * (4 * 768**2 + 2 * 768 * 3072) + (50257 + 50304) * 768
    assert model.mix == 1 / 24 and model.attention_scale == 1 / 3
    assert config.logit_scale / 128 == 24 / 128
    assert nano.parse_arguments(["--preset", "specnorm8"]).logit_scale / 128 == pytest.approx(128**0.5 / 8**2 / 128)
    tight = nano.meta_model(nano.parse_arguments(["--preset", "tight"]))
    biases = sum(block.bias_HW.numel() for block in tight.blocks)
    assert sum(p.numel() for p in tight.parameters()) - biases == sum(p.numel() for p in model.parameters())

    small = Transformer(dataclasses.replace(config, blocks=1, width=32, heads=2, hidden=64, data="x")).initialize(0)
    tokens = torch.randint(50257, (1, 40), generator=torch.Generator().manual_seed(0))
    loss = F.cross_entropy(small(tokens)[0], tokens[0])
    assert loss.item() == pytest.approx(math.log(50257), abs=1e-6)


def brute_force_mask(docs, window):
    return torch.tensor([[[j <= t and t - j < window and row[j] == row[t] for j in range(len(row))] for t in range(len(row))]
                         for row in docs.tolist()])


@pytest.mark.parametrize("window", [1, 64, 128, 129, 200, 384, 1000])
def test_masks(window):
    """Blocks of flex_attention against its own slow builder, both against the definition, documents of all lengths."""
    docs_BT = (torch.rand(3, 512, generator=torch.Generator().manual_seed(window)) < torch.tensor([[0.0], [0.003], [0.2]])).long().cumsum(1)
    dense = nano.dense_mask(docs_BT, window)
    assert torch.equal(dense[:, :150, :150], brute_force_mask(docs_BT[:, :150], window))
    ours = nano.block_mask(docs_BT, window)
    oracle = create_block_mask(ours.mask_mod, 3, 1, 512, 512, device="cpu")
    blocks = dense.view(3, 4, 128, 4, 128).transpose(2, 3)
    some, every = blocks.any(-1).any(-1), blocks.all(-1).all(-1)
    assert (ours.to_dense()[:, 0].bool() | ~some).all()  # every block with something to see is there
    full = torch.zeros_like(some)
    for b in range(3):
        for q in range(4):
            full[b, q, ours.full_kv_indices[b, 0, q, :ours.full_kv_num_blocks[b, 0, q]].long()] = True
    assert not (full & ~every).any()  # and none is called full that is not
    if docs_BT.max() < 20:  # (with documents shorter than a block ranges may overlap where no document does: work, no harm)
        assert torch.equal(ours.to_dense(), oracle.to_dense())


@pytest.mark.parametrize("changes", [dict(), dict(positions="bias", activation="maxmin"),
                                     dict(positions="bias", logit_scale=0.0), dict(baseline=True, constraint="none")])
def test_flex_attention_and_sdpa_are_equal(changes):
    """The GPU's path, in eager mode, and the CPU's (forward only: torch has no backward of flex_attention on a CPU)."""
    model = random_model(seq_len=256, window=150, **changes)
    generator = torch.Generator().manual_seed(0)
    x_BTD = torch.randn(2, 256, 16, generator=generator, dtype=torch.float64)
    docs_BT = (torch.rand(2, 256, generator=generator) < 0.01).long().cumsum(1)
    with torch.no_grad():
        dense = model.body(x_BTD, docs_BT, torch.tensor(150))
        model.flex = True
        assert torch.allclose(model.body(x_BTD, docs_BT, torch.tensor(150)), dense, rtol=1e-9, atol=1e-10)
        docs_BT[:, 100:] += 1
        assert not torch.allclose(model.body(x_BTD, docs_BT, torch.tensor(150)), dense)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_flex_attention_is_equal_and_compiled_once():
    """As on a GPU, but forward only and by the CPU's kernels: blocks of the mask count here. New masks compile nothing anew."""
    torch._dynamo.reset()
    model = Transformer(Config(**{**TINY, "width": 64, "blocks": 1, "seq_len": 256, "window": 256})).initialize(0)
    for _, W in model.matrices():
        torch.nn.init.orthogonal_(W, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    x_BTD = torch.randn(2, 256, 64, generator=generator)
    cases = [((torch.rand(2, 256, generator=generator) < 0.02).long().cumsum(1), torch.tensor(window)) for window in (128, 128, 256)]
    with torch.no_grad():
        dense = [model.body(x_BTD, *case) for case in cases]
        model.flex, model.through = True, torch.compile(model.through, dynamic=False)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for case, expected in zip(cases, dense):
            assert torch.allclose(model.body(x_BTD, *case), expected, atol=1e-5)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


def test_loss_in_chunks_is_the_loss():
    model, generator = random_model(vocab=250), torch.Generator().manual_seed(0)
    x_ND = torch.randn(50, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    y_N = torch.randint(250, (50,), generator=generator)

    def f(x, head, y):
        return F.cross_entropy(model.logits(x, head), y, reduction="sum")

    results = []
    for loss in (f(x_ND, model.head_XD, y_N), nano.HeadLoss.apply(x_ND, model.head_XD, y_N, f, 16)):
        results.append([loss, *torch.autograd.grad(loss / 7, (x_ND, model.head_XD))])
    for a, b in zip(*results):
        assert torch.allclose(a, b, rtol=1e-12)


def test_attention_sees_its_own_document_only():
    model = random_model(window=6)
    x_BTD = torch.randn(1, 20, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    docs_BT = torch.tensor([[0] * 8 + [1] * 12])
    before = model.body(x_BTD, docs_BT)
    x_BTD[0, 7] += 1
    assert (before - model.body(x_BTD, docs_BT)).abs().amax(-1)[0].nonzero().flatten().tolist() == [7]
    x_BTD[0, 10] += 1
    moved = (before - model.body(x_BTD, docs_BT)).abs().amax(-1)[0].nonzero().flatten().tolist()
    assert moved == [7, *range(10, 20)][:len(moved)] and moved[1] == 10


def test_schedule():
    config = nano.parse_arguments(["--preset", "cap1"])
    assert nano.schedule(config, 0) == (1.0, 0.85, 128)
    assert nano.schedule(config, 3719)[0] == 1.0 and nano.schedule(config, 3721)[0] < 1.0
    factor, momentum, window = nano.schedule(config, 6199)
    assert factor == pytest.approx(0.1, abs=1e-3) and momentum == 0.95 and window == 1792
    assert nano.schedule(config, 150)[1] == pytest.approx(0.90)
    assert sorted({nano.schedule(config, s)[2] for s in range(6200)}) == list(range(128, 1793, 128))


# ---- accounting ------------------------------------------------------------------------------------------------------
def test_flops_are_counted():
    """Against torch's own counter, on products the tutorial's formula speaks of (attention counts what is seen, not T x T)."""
    config = Config(**{**TINY, "width": 64, "heads": 4, "hidden": 256, "seq_len": 128, "window": 128, "micro_batch": 1, "batch": 1})
    model, (train, _, _) = Transformer(config).initialize(0), nano.load_data(config)
    trainer = nano.Trainer(config, model, nano.Team(config))
    x_BT, y_BT = train.sequences(0, config, range(1))
    with FlopCounterMode(display=False) as counter:
        loss = nano.HeadLoss.apply(trainer.stream(x_BT, 128), model.head_XD, y_BT.flatten(), trainer.sum_of_losses, 8192)
        loss.backward()
    products = sum(v for k, v in counter.get_flop_counts()["Global"].items() if k in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm))
    matrices = 6 * 128 * sum(W.numel() for _, W in model.matrices())
    seen = sum(min(t + 1, 128) for t in range(128)) / 128, sum(min(t + 1, 64) for t in range(128)) / 128
    assert products >= matrices * 0.99
    assert nano.flops_per_token(config) * 128 == pytest.approx(matrices + 128 * 12 * 64 * (2 * seen[0]))  # both layers are long here


@pytest.mark.parametrize("constraint", ["soft_cap", "specnorm"])
def test_muon_and_constraint_are_below_one_percent_of_the_flops(constraint):
    config = nano.parse_arguments(["--preset", "cap1", "--constraint", constraint])
    per_device = config.seq_len * nano.flops_per_token(config)
    assert nano.update_flops(config) / 8 <= 0.01 * per_device


def test_plan_says_what_fits(capsys):
    nano.main(nano.parse_arguments(["--preset", "cap1", "--plan"]))
    says = capsys.readouterr().out
    assert "162,165,504 parameters" in says and "393,216 tokens a step" in says and says.count(" / ") >= 10


# ---- data ------------------------------------------------------------------------------------------------------------
def shard(path, tokens):
    nano.write_shard(path, np.asarray(tokens, dtype=np.uint16))
    return path


def test_shards_are_read_across_their_ends(tmp_path):
    a, b = shard(tmp_path / "a_train_1.bin", range(100)), shard(tmp_path / "b_train_2.bin", range(100, 150))
    shard(tmp_path / "val.bin", range(200))
    header = np.fromfile(a, dtype=np.int32, count=256)
    assert header[:3].tolist() == [20240520, 1, 100] and a.stat().st_size == 1024 + 200
    config = Config(**{**TINY, "data": str(tmp_path), "vocab": 300})
    train, validation, _ = nano.load_data(config)
    assert len(train) == 150 and train.read(95, 10).tolist() == list(range(95, 105)) and len(validation) == 200
    assert train.read(0, 150).tolist() == list(range(150)) and train.read(100, 1).tolist() == [100]
    x_BT, y_BT = train.sequences(2, config, range(4))
    assert torch.equal(x_BT[:, 1:], y_BT[:, :-1]) and x_BT.shape == (4, 24)
    for step in range(100):  # every step stays inside
        train.sequences(step, config, range(4))
    assert b.name


@pytest.mark.parametrize("break_it, says", [
    (lambda p: p.write_bytes(b"\0" * 2000), "no token shard"), (lambda p: p.write_bytes(b""), "begins with nothing"),
    (lambda p: p.write_bytes(p.read_bytes()[:-100]), "cut off"), (lambda p: p.write_bytes(p.read_bytes()[:-1]), "cut off"),
    (lambda p: p.write_bytes(p.read_bytes()[:500]), "no token shard"), (lambda p: p.write_bytes(p.read_bytes()[:4] + b"\2" + p.read_bytes()[5:]), "version"),
    (lambda p: shard(p, [299] * 300), "token 299"), (lambda p: p.unlink(), "0 files *train*.bin"),
    (lambda p: shard(p, range(10)), "10 tokens to train on")])
def test_bad_shards_are_named(tmp_path, break_it, says, capsys):
    path = shard(tmp_path / "x_train_000001.bin", [7] * 300)
    shard(tmp_path / "x_val_000000.bin", [7] * 300)
    break_it(path)
    with pytest.raises(Refusal) as refusal:
        nano.main(Config(**{**TINY, "data": str(tmp_path), "out": str(tmp_path / "out"), "dtype": "float32"}))
    assert says in str(refusal.value) and ("x_train_000001.bin" in str(refusal.value) or "--data" in str(refusal.value))
    assert not (tmp_path / "out").exists() or says == "token 299"


@pytest.fixture
def bytes_for_tokens(monkeypatch):
    """Bytes in the place of GPT-2's tokens, whose table needs the network; 256 begins a document."""
    monkeypatch.setattr(nano, "encoder", lambda: (lambda texts: [list(t.encode()) for t in texts], 256))


def all_tokens(folder):
    files = sorted(folder.glob("*.bin"), key=lambda p: ("val" not in p.name, p.name))
    return np.concatenate([np.asarray(nano.read_shard(p)) for p in files]).tolist()


def test_prepare_and_go_on_after_a_kill(tmp_path, bytes_for_tokens, monkeypatch, capsys):
    import pandas

    texts = [f"document {i} " + "x" * (i * 37 % 200) for i in range(700)]
    source = tmp_path / "parquet"
    source.mkdir()
    for i in range(2):
        pandas.DataFrame(dict(text=texts[350 * i:350 * (i + 1)], other=0)).to_parquet(source / f"{i}.parquet")
    expected = [t for text in texts for t in [256, *text.encode()]]
    settings = dict(prepare=str(source), val_tokens=1000, shard_tokens=9000)
    nano.main(Config(data=str(tmp_path / "whole"), **settings))
    assert all_tokens(tmp_path / "whole") == expected
    assert 1000 <= len(nano.read_shard(tmp_path / "whole" / "val_000000.bin")) < 1000 + max(map(len, texts)) + 1

    writes = []

    def dies_at_the_fourth(path, data, original=nano.write_atomically):
        writes.append(path)
        if len(writes) == 6:
            raise OSError(28, "No space left on device")
        original(path, data)

    monkeypatch.setattr(nano, "write_atomically", dies_at_the_fourth)
    with pytest.raises(Refusal, match="No space left"):
        nano.main(Config(data=str(tmp_path / "parts"), **settings))
    monkeypatch.undo()
    monkeypatch.setattr(nano, "encoder", lambda: (lambda texts: [list(t.encode()) for t in texts], 256))
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "parts").glob("*.bin")}
    nano.main(Config(data=str(tmp_path / "parts"), **settings))
    assert all_tokens(tmp_path / "parts") == expected
    assert sum(before.get(p.name) == p.stat().st_mtime_ns for p in (tmp_path / "parts").glob("*.bin")) >= 2  # not done again
    with pytest.raises(Refusal, match="is finished"):
        nano.main(Config(data=str(tmp_path / "parts"), **settings))
    with pytest.raises(Refusal, match="holds shards of"):
        nano.main(Config(data=str(tmp_path / "parts"), **{**settings, "val_tokens": 7}))


def test_prepare_a_text_file_and_train_on_it(tmp_path, bytes_for_tokens, small_stand_in, capsys):
    (tmp_path / "text.txt").write_text(small_stand_in[:300_000])
    nano.main(Config(data=str(tmp_path / "shards"), prepare=str(tmp_path / "text.txt"), val_tokens=2000))
    tokens = all_tokens(tmp_path / "shards")
    assert bytes(t for t in tokens if t < 256).decode() == small_stand_in[:300_000] and tokens.count(256) >= 1
    out, summary = run(tmp_path, data=str(tmp_path / "shards"), vocab=257)
    assert summary["data"] == str(tmp_path / "shards") and summary["val_loss"] < math.log(257)


@pytest.mark.parametrize("source, says", [("nothing.txt", "cannot be read"), ("empty", "no parquet"), ("short.txt", "fewer than")])
def test_prepare_refuses(tmp_path, source, says, bytes_for_tokens, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("short")
    path = str(tmp_path / source)
    with pytest.raises(Refusal, match=says):
        nano.main(Config(data=str(tmp_path / "out"), prepare=path))


@pytest.mark.skipif(not (Path(os.environ.get("DATA_DIR", "/nowhere")) / "tiktoken-cache").is_dir(), reason="needs GPT-2's table of tokens")
def test_gpt2_tokens(tmp_path, monkeypatch):
    import tiktoken
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(Path(os.environ["DATA_DIR"]) / "tiktoken-cache"))
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times.\n" * 20)
    nano.main(Config(data=str(tmp_path / "shards"), prepare=str(tmp_path / "text.txt"), val_tokens=100))
    tokens = all_tokens(tmp_path / "shards")
    assert tokens[0] == 50256 and tiktoken.get_encoding("gpt2").decode(tokens[1:]) == (tmp_path / "text.txt").read_text()


# ---- runs ------------------------------------------------------------------------------------------------------------
def test_it_learns_and_reports(tmp_path, capsys):
    out, summary = run(tmp_path, steps=60, width=32, hidden=64, batch=8, micro_batch=8, evals=3)
    losses = [loss for record in records(out) for loss in record["losses"]]
    assert losses[0] == pytest.approx(math.log(256), abs=0.02) and losses[-1] < 3.6 and len(losses) == 60
    assert summary["lipschitz_log10"] == records(out)[-1]["lipschitz_log10"] and (out / "curves.png").stat().st_size > 10_000
    needed = ("script preset params steps val_loss val_accuracy lipschitz_log10 lipschitz_product_log10 lipschitz_norm max_weight_norm w_max "
              "loss_temperature train_seconds ms_per_step data device dtype seed torch").split()
    assert set(needed) <= summary.keys() and summary["spikes"] == 0
    assert "LIPSCHITZ CONSTANT" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [dict(baseline=True, constraint="none"), dict(nano.BIAS, residual_scale=2.0), dict(constraint="stiefel"),
                                     dict(constraint="hammer"), dict(constraint="weight_decay"), dict(constraint="spectral_weight_decay"),
                                     dict(constraint="specnorm", dtype="bfloat16"), dict(constraint="none", loss_temperature=3.0)])
def test_every_kind_of_run(changes, tmp_path):
    out, summary = run(tmp_path, **changes)
    assert math.isfinite(summary["val_loss"]) and summary["baseline"] == changes.get("baseline", False)
    config, model = nano.model_from_checkpoint(nano.load_checkpoint(out))
    assert certificate(model)["log10"] == summary["lipschitz_log10"] and config.constraint == changes.get("constraint", "soft_cap")


def test_micro_batches_do_not_matter(tmp_path):
    losses = []
    for micro_batch in (1, 2, 4):
        out, _ = run(tmp_path / str(micro_batch), micro_batch=micro_batch, dtype="float64", steps=10)
        losses.append([loss for record in records(out) for loss in record["losses"]])
    assert losses[0] == pytest.approx(losses[1], abs=1e-11) and losses[0] == pytest.approx(losses[2], abs=1e-11)


def test_one_two_and_four_processes_are_the_same_run(tmp_path):
    """In float64 to 1e-9 over 50 steps, and in float32 to 1e-5 over the first 5; replicas identical (the run checks it)."""
    losses = {}
    for dtype, steps, worlds in (("float64", 50, (1, 2, 4)), ("float32", 5, (1, 4))):
        for processes in worlds:
            out = tmp_path / f"{dtype}_{processes}"
            settings = dict(dtype=dtype, steps=steps, micro_batch=1, evals=2)
            if processes == 1:
                out, _ = run(tmp_path / dtype, **settings)
            else:
                result = command(*flags(**settings, out=out), processes=processes)
                assert result.returncode == 0, result.stderr[-2000:]
            losses[dtype, processes] = [loss for record in records(out) for loss in record["losses"]]
            assert json.loads((out / "summary.json").read_text())["processes"] == processes
    for processes in (2, 4):
        assert losses["float64", 1] == pytest.approx(losses["float64", processes], abs=1e-9)
    assert losses["float32", 1] == pytest.approx(losses["float32", 4], abs=1e-5)


def test_resume_on_another_number_of_processes(tmp_path):
    """Killed on one process, resumed on two: in float64 the same losses to 1e-9 as a run that was left alone."""
    settings = flags(dtype="float64", steps=30, micro_batch=1, evals=3)
    assert command(*settings, "--out", tmp_path / "whole").returncode == 0
    process = subprocess.Popen([sys.executable, str(ROOT / "nanogpt_lipschitz.py"), *settings, "--out", str(tmp_path / "killed")],
                               env=environment(), stdout=subprocess.DEVNULL)
    kill_when(lambda: (tmp_path / "killed" / "checkpoint.pt").exists(), process)
    result = command("--resume", tmp_path / "killed", processes=2)
    assert result.returncode == 0, result.stderr[-2000:]
    a, b = ([loss for record in records(tmp_path / name) for loss in record["losses"]] for name in ("whole", "killed"))
    assert len(b) == 30 and a == pytest.approx(b, abs=1e-9)
    result = command("--resume", tmp_path / "killed")
    assert result.returncode == 2 and "is finished" in result.stderr


def kill_when(ready, process, pid=None):
    """SIGKILL as soon as ready(), for the process (or another)."""
    end = time.time() + 120
    while not ready() and process.poll() is None:
        assert time.time() < end
        time.sleep(0.02)
    assert process.poll() is None, "it was over before it could be killed"
    os.kill(pid() if pid else process.pid, signal.SIGKILL)
    if pid is None:
        process.wait()


def test_a_killed_worker_is_restarted_by_torchrun_and_nothing_is_lost(tmp_path):
    """SIGKILL of one of two workers in the middle of steps; torchrun starts both again: bit-identical weights."""
    settings = flags(steps=240, micro_batch=1, evals=20, dtype="float32")
    assert command(*settings, "--out", tmp_path / "whole", processes=2).returncode == 0
    out = tmp_path / "killed"
    with open(tmp_path / "stderr", "w") as stderr:
        process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts",
                                    "2", str(ROOT / "nanogpt_lipschitz.py"), *settings, "--out", str(out)], env=environment(),
                                   stdout=subprocess.DEVNULL, stderr=stderr)
        kill_when(lambda: (out / "checkpoint.pt").exists(), process, lambda: worker_of(process.pid))
        assert process.wait(timeout=200) == 0, (tmp_path / "stderr").read_text()[-9000:]
    a, b = (nano.load_checkpoint(tmp_path / name) for name in ("whole", "killed"))
    assert a["step"] == b["step"] == 240
    assert same(a["model"], b["model"]) and same(a["optimizer"], b["optimizer"])


def worker_of(pid):
    """Process id of a child, the one with rank 1."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) == pid and b"RANK=1" in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except OSError:
            pass
    raise AssertionError("no such worker")


def test_owners_share_the_work():
    model = nano.meta_model(nano.parse_arguments(["--preset", "cap1"]))
    for world in (1, 2, 3, 8):
        owner = nano.owners(model, world)
        assert set(owner.values()) == set(range(world)) and len(owner) == len(list(model.parameters()))
        load = [sum(W.numel() * min(W.shape) for _, W in model.matrices() if owner[W] == rank) for rank in range(world)]
        assert max(load) <= max(1.1 * sum(load) / world, 50304 * 768 * 768)


# ---- bad input -------------------------------------------------------------------------------------------------------
def test_help_is_quick_and_complete():
    began = time.perf_counter()
    result = command("--help")
    assert result.returncode == 0 and time.perf_counter() - began < 2
    assert all("--" + f.name in result.stdout for f in dataclasses.fields(Config))
    assert all(name in result.stdout for name in nano.PRESETS)


@pytest.mark.parametrize("wrong, says", [
    (["--preset", "huge"], "must be one of"), (["--heads", "3"], "divisor"), (["--width", "20", "--heads", "2"], "multiple of 4"),
    (["--steps", "0"], "from 1"), (["--micro_batch", "3"], "divisor"), (["--w_max", "1,2"], "7 of them"), (["--w_max", "nan"], "finite"),
    (["--resume", "x", "--lr", "1"], "keeps its own settings"), (["--resume", "nowhere"], "no such checkpoint"), (["--prepare", "x"], "needs --data"),
    (["--baseline", "--constraint", "hard_cap"], "unconstrained"), (["--residual_scale", "99"], "at most 2 * blocks"), (["--vocab", "70000"], "65536"),
    (["--device", "tpu9"], "cannot be used here"), (["--data", "/nowhere"], "0 files"), (["--seed", "-1"], "2^31")])
def test_wrong_flags(wrong, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((Refusal, SystemExit)) as refusal:
        nano.main(nano.parse_arguments(wrong))
    assert says in str(refusal.value) + capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_refusal_is_one_line_and_status_2(tmp_path):
    result = command("--heads", 3, cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "--heads 3: must be a divisor" in result.stderr


def test_processes_that_do_not_divide_the_batch(tmp_path):
    result = command(*flags(batch=6, micro_batch=2, out=tmp_path / "x"), processes=2)
    assert result.returncode != 0 and "must divide a process's share of the batch" in result.stderr
    assert not (tmp_path / "x").exists()


def test_runs_are_never_overwritten_and_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    out, _ = run(tmp_path)
    with pytest.raises(Refusal, match="not empty"):
        run(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = (out / "checkpoint.pt").read_bytes()
    state = nano.load_checkpoint(out)
    with pytest.raises(OSError):
        nano.save_checkpoint(out, Config(**TINY), nano.model_from_checkpoint(state)[1], state["optimizer"], dict(step=9, seconds=0.0), "x", 1)
    assert (out / "checkpoint.pt").read_bytes() == before and not list(out.glob("*.part"))


@pytest.mark.parametrize("break_it", [lambda p: p.write_bytes(p.read_bytes()[:3000]), lambda p: p.write_bytes(b"x"), lambda p: torch.save(dict(script="other"), p),
                                      lambda p: torch.save(dict(script="nanogpt_lipschitz", config=dict(width=16), model={}), p)])
def test_wrong_checkpoints(break_it, tmp_path):
    out, _ = run(tmp_path)
    (out / "summary.json").unlink()
    break_it(out / "checkpoint.pt")
    with pytest.raises(Refusal):
        nano.main(Config(**{**TINY, "resume": str(out)}))


def test_divergence_stops_and_names_the_matrix(tmp_path):
    with pytest.raises(Refusal, match="diverged, as .* is not finite"):
        run(tmp_path, embed_lr=1e30, lr=1e30, constraint="none", steps=20, dtype="float32")
