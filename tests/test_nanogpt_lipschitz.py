"""nanogpt_lipschitz.py: certificate, masks and data against oracles; several processes against one; faults."""

import concurrent.futures
import csv
import dataclasses
import gzip
import json
import math
import os
import pickle
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matrices import singular_values
from test_shakespeare import attack, rms, same
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask

import constraints
import nanogpt_lipschitz as nano
import shakespeare
from nanogpt_lipschitz import Config, Transformer, UserError, certificate

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "results"))

import depth  # noqa: E402
import memory  # noqa: E402
import prepare  # noqa: E402

SCRIPT = ROOT / "nanogpt_lipschitz.py"
TINY = dict(width=16, blocks=2, heads=2, hidden=32, seq_len=24, window=24, batch=4, micro_batch=2, steps=6, evals=2,
            val_tokens=500, length=5)
DRAW = nano.draw


@pytest.fixture(scope="module", autouse=True)
def small_stand_in():
    """The library's source read once, and no pictures, which take most of the time of a tiny run."""
    text = nano.stand_in()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nano, "stand_in", lambda: text)
        patch.setattr(nano, "draw", lambda *a: None)
        yield text


def tiny(**changes):
    return Config.of("tiny", **{**TINY, **changes})


def flags(**changes):
    return [word for k, v in {**TINY, **changes}.items() for word in (f"--{k}", str(v))]


def run(folder, **changes):
    """A tiny run in this process; returns its folder and summary."""
    summary = nano.main(tiny(out=str(folder / "run"), **changes))
    in_json = {key: "inf" if value == math.inf else value for key, value in summary.items()}
    assert in_json == json.loads((folder / "run" / "summary.json").read_text())
    return folder / "run", summary


def environment():
    """One thread for each process: more would only get into each other's way."""
    return {**{k: v for k, v in os.environ.items() if k != "DATA_DIR"}, "OMP_NUM_THREADS": "1"}


def start(*arguments, processes=0, restarts=0, **kwargs):
    """The script, or one of ours that runs it, as a user starts it: alone or under torchrun."""
    launch = [sys.executable]
    if processes:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "--max-restarts", str(restarts)]
    return subprocess.Popen([*launch, *map(str, arguments)], text=True, env=environment(), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **kwargs)


def end(process, timeout=120):
    """(exit status, output, errors)"""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def fork(folder, processes, *arguments):
    """The script in forks of this process, which has torch in it already; as torchrun does, one that fails ends the others.
    Returns (whether all went well, what all of them wrote)."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    running, good = set(), True
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            try:
                sys.stdout = sys.stderr = open(folder / f"output{rank}", "w")
                os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="localhost", MASTER_PORT=port, TORCHELASTIC_RESTART_COUNT="0")
                sys.argv = list(map(str, arguments))
                runpy.run_path(sys.argv[0], run_name="__main__")
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(99)
        running.add(pid)
    while running:
        time.sleep(0.02)
        ended = [os.waitpid(pid, os.WNOHANG) for pid in running]
        running -= {pid for pid, _ in ended}
        if any(status for _, status in ended):
            good = False
            for other in running:
                os.kill(other, signal.SIGTERM)
    return good, "".join((folder / f"output{rank}").read_text() for rank in range(processes))


def one_clear_line(error):
    assert "\n" not in str(error.value) and "; " in str(error.value) and len(str(error.value)) < 500, str(error.value)


class Runs:
    """Code that a pickle runs where it is loaded carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def losses_of(folder):
    return [loss for line in (folder / "log.jsonl").read_text().splitlines() for loss in json.loads(line)["losses"]]


def random_model(seed=0, norm=1.5, **changes):
    """A float64 model whose matrices are random, of the RMS->RMS norm asked for."""
    model = Transformer(tiny(**{**dict(dtype="float64", seed=seed), **changes}))
    generator = torch.Generator().manual_seed(seed)
    for _, W in model.matrices():
        W.data = torch.randn(W.shape, generator=generator, dtype=torch.float64)
        W.data *= norm * (W.shape[0] / W.shape[1]) ** 0.5 / singular_values(W.data).max()
    return model


# ---- certificate -----------------------------------------------------------------------------------------------------
BY_POSITION = dict(nano.POSITION, residual_scale=2.0)


@pytest.mark.parametrize("changes", [dict(), dict(activation="maxmin"), BY_POSITION])
def test_certificate_is_the_one_of_shakespeare(changes, monkeypatch):
    """One derivation, two models; the slopes of GeLU's two forms apart."""
    monkeypatch.setattr(shakespeare, "GELU_SLOPE", nano.GELU_SLOPE)
    model = random_model(**changes)
    fields = {f.name for f in dataclasses.fields(shakespeare.Config)}
    twin = {k: v for k, v in dataclasses.asdict(model.config).items() if k in fields and k not in ("preset", "dtype")}
    twin = shakespeare.Config(**twin, positions="rope" if model.config.logit_scale else "bias")
    twin = shakespeare.Transformer(twin, "".join(map(chr, range(256)))).double()
    twin.load_state_dict({k.replace("head_XD", "head_VD"): v for k, v in model.state_dict().items()}, strict=False)
    for block, other in zip(model.blocks, twin.blocks):
        if model.config.logit_scale == 0:  # logits by position as the model computes them: query at t, key (1, 0) at 0
            T = model.config.seq_len
            key_HE = torch.zeros_like(block.query_HE)
            key_HE[:, :len(block.speeds)] = 1
            query, key = (nano.rotate(x_HE[:, None].expand(-1, T, -1), block.speeds) for x_HE in (block.query_HE, key_HE))
            other.bias_HT = torch.nn.Parameter((query * key[:, :1]).sum(-1))
            torch.testing.assert_close(block.own_share_H(), other.bias_HT.softmax(-1)[:, 0], rtol=1e-5, atol=0)
    a, b = certificate(model, rho=0.01), shakespeare.certificate(twin, rho=0.01)
    assert a["log10"] == min(a["product_log10"], a["ellipsoid_log10"])
    assert a["norms"] == pytest.approx(b["norms"], rel=1e-6)
    for key in ("log10", "product_log10", "ellipsoid_log10", "body_log10", "radius_log10"):
        assert a[key] == pytest.approx(b[key], abs=1e-6), key
    for mine, theirs in zip(a["rows"], b["rows"], strict=True):
        assert mine == pytest.approx({key: theirs[key] for key in mine}, rel=1e-6, abs=1e-6)
    assert certificate(model, free=nano.tuned(model, 3))["log10"] < certificate(model)["log10"]


def test_stand_in_is_the_one_of_shakespeare(small_stand_in):
    assert small_stand_in == shakespeare.stand_in()


@pytest.mark.parametrize("changes", [dict(), dict(heads=4, activation="maxmin", residual_scale=2.0), BY_POSITION])
def test_certificate_survives_attack(changes, monkeypatch):
    """Within the ball of embeddings, with documents that begin in the middle and a window shorter than the text."""
    monkeypatch.setattr(nano, "BLOCK", 3)
    model = random_model(norm=1.0, window=5, **changes)
    docs_BT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2, 2]])
    bound, R = certificate(model), rms(model.embedding_VD).max().item()
    with sdpa_kernel(SDPBackend.MATH):  # (the others have no forward derivative)
        found = attack(lambda x: model.logits(model.body(x, docs_BT.expand(len(x), -1))), R, 10, 16, steps=60)
    assert 1e-3 < found and math.log10(found) <= bound["log10"] + 1e-8


def test_steepest_slope_of_gelu():
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64, requires_grad=True)
    slope, = torch.autograd.grad(F.gelu(x).sum(), x)
    assert nano.GELU_SLOPE - 1e-8 < slope.max().item() <= nano.GELU_SLOPE
    assert slope.min().item() >= 1 - nano.GELU_SLOPE


@pytest.mark.parametrize("constraint", ["soft_cap", "hard_cap", "specnorm", "stiefel"])
def test_limits_hold_at_every_step(constraint, monkeypatch, tmp_path):
    """After each step, each role within its limit: of the head the rows of real tokens, V = 250 in 256 rows."""
    config = tiny(constraint=constraint, w_max="1.5,1.4,1.3,1.2,1.1,1.0,0.9", dtype="float32", steps=20, vocab=250,
                  out=str(tmp_path / "x"))
    steps = []

    def look(exchange):
        steps.append(exchange)
        for W, name in exchange.names.items():
            role = name.split(".")[-1].removeprefix("w_").removesuffix("_XD")
            if role in nano.ROLES:
                W = W[:250] if role == "head" else W
                norm = singular_values(W).max().item() * (W.shape[1] / W.shape[0]) ** 0.5
                assert norm <= config.limits()[role] * (1 + 4e-4), (role, len(steps))
            else:
                assert rms(W).max().item() <= 1 + 1e-6
        head_XD = next(p for p, name in exchange.names.items() if name == "head_XD")
        assert (head_XD[250:] == 0).all() and head_XD.shape == (256, 16)

    monkeypatch.setattr(nano.Exchange, "share_weights", look)
    nano.main(config)
    assert len(steps) == 20


# ---- model -----------------------------------------------------------------------------------------------------------
def test_parity_with_the_papers_shapes(monkeypatch):
    """162 M parameters in the paper's shapes, the factors of its code, and a first loss of ln V."""
    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda W, generator: W)
    monkeypatch.setattr(torch, "randn", lambda *shape, generator: torch.zeros(shape))
    config = nano.parse_arguments(["--preset", "cap1"])
    model = Transformer(config)
    shapes = [tuple(p.shape) for p in model.parameters()]
    assert shapes.count((768, 768)) == 48 and shapes.count((3072, 768)) == 12 and shapes.count((768, 3072)) == 12
    assert tuple(model.embedding_VD.shape) == (50257, 768) and tuple(model.head_XD.shape) == (50304, 768)
    assert sum(p.numel() for p in model.parameters()) == 162_165_504
    assert model.mix == 1 / 24 and model.blocks[0].attention_scale == 1 / 3 and config.logit_scale / 128 == 24 / 128
    assert config.batch * config.seq_len == 393_216 and config.val_tokens == 10_485_760
    assert nano.parse_arguments(["--preset", "specnorm8"]).logit_scale / 128 == pytest.approx(128**0.5 / 8**2 / 128)
    tight = Transformer(nano.parse_arguments(["--preset", "tight"]))
    queries = sum(block.query_HE.numel() for block in tight.blocks)
    assert sum(p.numel() for p in tight.parameters()) - queries == 162_165_504 and queries == 12 * 768
    monkeypatch.undo()

    small = Transformer(dataclasses.replace(config, blocks=1, width=32, heads=2, hidden=64))
    tokens = torch.randint(50257, (1, 40), generator=torch.Generator().manual_seed(0))
    loss = small.loss(small.body(*small.embed(tokens, torch.float32))[0], tokens[0])
    assert loss.item() / 40 == pytest.approx(math.log(50257), abs=1e-6)


def brute_force_mask(docs, blocks):
    return torch.tensor([[[j <= t and t // 128 - j // 128 < blocks and row[j] == row[t] for j in range(len(row))]
                          for t in range(len(row))] for row in docs.tolist()])


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_masks(blocks):
    """Blocks of flex_attention against its own slow builder, both against the definition, documents of all lengths."""
    docs_BT = (torch.rand(3, 512, generator=torch.Generator().manual_seed(blocks)) < torch.tensor([[0.0], [0.003], [0.2]])).long().cumsum(1)
    dense = nano.dense_mask(docs_BT, blocks)
    assert torch.equal(dense[:, :300, :300], brute_force_mask(docs_BT[:, :300], blocks))
    ours = nano.block_mask(docs_BT, blocks)
    tiles = dense.view(3, 4, 128, 4, 128).transpose(2, 3)
    some, every = tiles.any(-1).any(-1), tiles.all(-1).all(-1)
    assert (ours.to_dense()[:, 0].bool() | ~some).all()  # every block with something to see is there
    full = torch.zeros_like(some)
    for b in range(3):
        for q in range(4):
            full[b, q, ours.full_kv_indices[b, 0, q, :ours.full_kv_num_blocks[b, 0, q]].long()] = True
    assert not (full & ~every).any()  # and none is called full that is not
    oracle = create_block_mask(lambda b, h, t, j: dense[b, t, j], 3, 1, 512, 512, device="cpu")
    assert torch.equal(ours.to_dense()[:2], oracle.to_dense()[:2])  # (documents shorter than a block: work, no harm)


@pytest.mark.parametrize("changes", [dict(), BY_POSITION, dict(baseline=True, constraint="none")])
def test_flex_attention_and_sdpa_are_equal(changes):
    """The GPU's path, in eager mode, and the CPU's (forward only: torch has no backward of flex_attention on a CPU)."""
    model = random_model(seq_len=384, window=384, **changes)
    generator = torch.Generator().manual_seed(0)
    x_BTD = torch.randn(2, 384, 16, generator=generator, dtype=torch.float64)
    docs_BT = (torch.rand(2, 384, generator=generator) < 0.01).long().cumsum(1)
    with torch.no_grad():
        dense = model.body(x_BTD, docs_BT, 384)  # (in eager mode blocks do not count: see the next test for windows)
        model.flex = True
        assert torch.allclose(model.body(x_BTD, docs_BT, 384), dense, rtol=1e-9, atol=1e-10)
        assert not torch.allclose(model.body(x_BTD, docs_BT.flip(1), 384), dense)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_flex_attention_is_equal_and_compiled_once():
    """As on a GPU, but forward only and by the CPU's kernels. Other blocks, windows, documents compile nothing anew."""
    torch._dynamo.reset()
    model = Transformer(tiny(width=64, blocks=3, seq_len=256, window=256, dtype="float32"))
    for _, W in model.matrices():
        torch.nn.init.orthogonal_(W, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    x_BTD = torch.randn(2, 256, 64, generator=generator)
    cases = [((torch.rand(2, 256, generator=generator) < 0.02).long().cumsum(1), window) for window in (128, 128, 256)]
    with torch.no_grad():
        dense = [model.body(x_BTD, *case) for case in cases]
        model.flex = True
        for block in model.blocks:
            block.compile(dynamic=False)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for case, expected in zip(cases, dense):
            assert torch.allclose(model.body(x_BTD, *case), expected, atol=1e-5)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


@pytest.mark.parametrize("logit_scale", [1.0, 12.0, 24.0])
def test_the_largest_attention_probability_with_qk_norm(logit_scale):
    """Queries and keys of RMS 1 have logits within +- logit_scale. One of T tokens gets the most where its key is
    along the query and all other keys are against it: 1 / (1 + (T - 1) exp(-2 logit_scale))."""
    T, D = 100, 16
    model = random_model(baseline=True, constraint="none", width=D, heads=1, logit_scale=logit_scale)
    block = model.blocks[0].double()
    eye = torch.eye(D, dtype=torch.float64)
    for W, value in ((block.q, -eye), (block.k, eye), (block.v, eye), (block.o, eye)):
        W.data.copy_(value)
    x_TD = torch.zeros(T, D, dtype=torch.float64)
    x_TD[:, D // 4] = -7.0  # RoPE does not turn this coordinate; QK norm makes the length count for nothing
    x_TD[0] *= -1
    with torch.no_grad():
        y_BTD = block.attention(x_TD[None]) / block.attention_scale / 7
        share = (1 + y_BTD[0, -1, D // 4].item()) / 2  # of the first token, as seen by the last one
        attacked = torch.randn(50, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        attacked[:, 1:] *= 1e-9  # the output is then the first token's share of it
        others = block.attention(attacked)[:, -1].norm(dim=-1) / (block.attention_scale * attacked[:, 0].norm(dim=-1))
    largest = 1 / (1 + (T - 1) * math.exp(-2 * logit_scale))
    assert math.isclose(share, largest, rel_tol=1e-9) and others.max() <= largest * (1 + 1e-6)


def test_every_baseline_can_look_at_one_token():
    configs = [Config.of(preset) for preset, settings in nano.PRESETS.items() if settings.get("baseline")]
    preset, changes, _ = depth.METHODS["norms"]
    configs.append(Config.of(preset, **changes))
    assert len(configs) == 3 and all(config.baseline for config in configs)
    for config in configs:
        assert 1 / (1 + (config.window - 1) * math.exp(-2 * config.logit_scale)) > 0.99


def test_held_out_tokens_are_of_the_training_text(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint16)
    for name, part in (("train_0", tokens[:3000]), ("train_1", tokens[3000:4000]), ("val_0", tokens[4000:])):
        header = np.array([20240520, 1, len(part)] + [0] * 253, np.int32)
        (tmp_path / f"{name}.bin").write_bytes(header.tobytes() + part.tobytes())
    for val_tokens, held in ((50, 51), (10**6, 100)):
        train, validation, name = nano.load_data(tiny(data=str(tmp_path), holdout=True, val_tokens=val_tokens, seq_len=16))
        assert torch.equal(train.read(0, 10**6), torch.from_numpy(tokens[:4000 - held].astype(np.int64)))
        assert torch.equal(validation.read(0, 10**6), torch.from_numpy(tokens[4000 - held:4000].astype(np.int64)))
        assert "held out" in name
    train, validation, _ = nano.load_data(tiny(data="stand-in", holdout=True, seq_len=16))
    whole = nano.load_data(tiny(data="stand-in", seq_len=16))[0].read(0, 10**8)
    assert torch.equal(torch.cat([train.read(0, 10**8), validation.read(0, 10**8)]), whole)


def test_attention_by_position_is_a_sum_of_waves():
    """The logits of a head depend on the distance alone, and start with their peak h step tokens ago."""
    block = Transformer(tiny(**BY_POSITION, seq_len=200, window=200, width=64)).blocks[1]
    T, E, n = 200, 32, 16
    q = nano.rotate(block.query_HE.detach().double()[:, None].expand(2, T, E), block.speeds)
    k = nano.rotate(torch.cat([torch.ones(2, n), torch.zeros(2, n)], 1).double()[:, None].expand(2, T, E), block.speeds)
    logits_HTT, distance_T = q @ k.mT, torch.arange(T)
    table_HT = torch.einsum("hi,ti->ht", block.query_HE.detach().double()[:, :n], (distance_T[:, None] * block.speeds.double()).cos())
    table_HT += torch.einsum("hi,ti->ht", block.query_HE.detach().double()[:, n:], (distance_T[:, None] * block.speeds.double()).sin())
    for t in (0, 50, 199):
        assert torch.allclose(logits_HTT[:, t, :t + 1].flip(1), table_HT[:, :t + 1], atol=1e-3)  # (angles of float32)
    assert table_HT.argmax(1).tolist() == [0, 2]
    assert (table_HT.amax(1) - table_HT[:, 40:].amax(1)).min() > 6


def test_attention_sees_its_own_document_only():
    model = random_model()
    x_BTD = torch.randn(1, 20, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    docs_BT = torch.tensor([[0] * 8 + [1] * 12])
    before = model.body(x_BTD, docs_BT)
    for place, moved in ((7, [7]), (10, [7, *range(10, 20)])):
        x_BTD[0, place] += 1
        assert (before - model.body(x_BTD, docs_BT)).abs().amax(-1)[0].nonzero().flatten().tolist() == moved
    _, docs_BT = model.embed(torch.tensor([[5, 255, 7, 8, 255]]), torch.float64)  # the last token begins a document
    assert docs_BT.tolist() == [[0, 1, 1, 1, 2]]


def test_long_layers_are_the_authors():
    """Of 12 blocks 0, 4, 7 and 11 see the whole window, the others half of it; at least one block of positions."""
    seen, model = [], Transformer(tiny(blocks=12, residual_scale=1.0))
    for block in model.blocks:
        block.forward = lambda x, mask: seen.append(int(mask[0, -1].sum())) or x
    model.body(torch.zeros(1, 1024, 16), window=512)
    assert [i for i, n in enumerate(seen) if n == 512] == [0, 4, 7, 11] and set(seen) == {256, 512}
    seen.clear()
    model.body(torch.zeros(1, 1024, 16), window=128)
    assert set(seen) == {128}


def test_schedule():
    """The authors': windows in whole blocks, 1792 from 96 % of the steps; factors fall over the last 40 %."""
    config = nano.parse_arguments(["--preset", "cap1"])
    assert nano.schedule(config, 0) == (1.0, 0.85, 128)
    assert nano.schedule(config, 3719)[0] == 1.0 and nano.schedule(config, 3721)[0] < 1.0
    factor, momentum, window = nano.schedule(config, 6199)
    assert factor == pytest.approx(0.1, abs=1e-3) and momentum == 0.95 and window == 1792
    assert nano.schedule(config, 150)[1] == pytest.approx(0.90)
    windows = [nano.schedule(config, s)[2] for s in range(6200)]
    assert sorted(set(windows)) == list(range(128, 1793, 128)) and windows.index(1792) / 6200 == pytest.approx(0.963, abs=1e-3)


# ---- data ------------------------------------------------------------------------------------------------------------
def shard(path, tokens):
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype=np.uint16).tobytes())
    return path


def test_shards_are_read_across_their_ends_and_consecutively(tmp_path):
    shard(tmp_path / "a_train_1.bin", range(100)), shard(tmp_path / "b_train_2.bin", range(100, 150))
    shard(tmp_path / "val.bin", range(200))
    config = tiny(data=str(tmp_path), vocab=300)
    train, validation, _ = nano.load_data(config)
    assert len(train) == 150 and train.read(95, 10).tolist() == list(range(95, 105)) and len(validation) == 200
    assert train.read(0, 150).tolist() == list(range(150)) and train.read(100, 1).tolist() == [100]
    assert train.read(145, 10).tolist() == list(range(145, 150))
    for step in range(5):  # sequences of 24 tokens one after the other, round and round; each with the token behind
        for row, x in enumerate(train.sequences(step, range(4), config)):
            place = (4 * step + row) % 6 * 24
            assert x.tolist() == list(range(place, place + 25))
    shuffled = dataclasses.replace(config, data="stand-in")
    starts = [train.sequences(i // 4, [i % 4], shuffled)[0, 0].item() for i in range(12)]
    assert sorted(starts[:6]) == sorted(starts[6:]) == list(range(0, 144, 24)) and starts[:6] != starts[6:]


def test_the_shards_asked_for_are_those_read(tmp_path, monkeypatch):
    """Words of a name, not letters in it, in order; other files in the folder change nothing."""
    for i, name in enumerate(["x_train_000002.bin", "x_train_000001.bin", "x_val_000000.bin", "medieval_train_3.bin", "trains.bin",
                              "interval.bin", "TRAIN_4.txt"]):
        shard(tmp_path / name, [i] * 200)
    train, validation, _ = nano.load_data(tiny(data=str(tmp_path)))
    assert [tokens[0] for _, tokens in train.shards] == [3, 1, 0] and [tokens[0] for _, tokens in validation.shards] == [2]
    (tmp_path / "fineweb10B").mkdir()
    for i, name in enumerate(["val_000000", "train_000001", "train_000002", "train_000003"]):
        shard(tmp_path / "fineweb10B" / f"fineweb_{name}.bin", [i] * 200)
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    for batch, read in ((4, [1]), (100_000, [1, 2])):  # as many as the run needs
        train, _, _ = nano.load_data(tiny(data="fineweb", steps=50, batch=batch))
        assert [tokens[0] for _, tokens in train.shards] == read


def sparse(path, count, size):
    """A shard whose header says `count` tokens, of a size that takes no room on the disk."""
    shard(path, [])
    path.write_bytes(np.array([20240520, 1, count], np.int32).tobytes() + path.read_bytes()[12:])
    os.truncate(path, size)


@pytest.mark.parametrize("break_it, says", [
    (lambda p: p.write_bytes(b"\0" * 2000), "no whole shard"), (lambda p: p.write_bytes(b""), "no whole shard"),
    (lambda p: p.write_bytes(p.read_bytes()[:-100]), "no whole shard"), (lambda p: p.write_bytes(p.read_bytes()[:-1]), "no whole shard"),
    (lambda p: p.write_bytes(p.read_bytes()[:500]), "no whole shard"), (lambda p: p.write_bytes(p.read_bytes()[:8]), "no whole shard"),
    (lambda p: p.write_bytes(p.read_bytes()[:4] + b"\2" + p.read_bytes()[5:]), "no whole shard"),
    (lambda p: p.write_bytes(p.read_bytes() + p.read_bytes()[1024:]), "no whole shard"),  # (as many uint32)
    (lambda p: p.write_bytes(pickle.dumps(Runs(p.with_name("ran")))), "no whole shard"), (lambda p: shard(p, []), "no whole shard"),
    (lambda p: sparse(p, -256, 512), "no whole shard"), (lambda p: sparse(p, 2**31 - 1, 2 * 10**12 + 1024), "no whole shard"),
    (lambda p: (p.unlink(), p.mkdir()), "no whole shard"), (lambda p: (p.unlink(), p.symlink_to("nowhere")), "no whole shard"),
    (lambda p: shard(p, [299] * 300), "holds token 299"), (lambda p: shard(p, [7] * 100 + [299] * 200), "holds token 299"),
    (lambda p: shard(p.with_name("x_val_000000.bin"), [7] * 290 + [299] * 10), "holds token 299"),
    (lambda p: p.unlink(), "0 files *.bin"), (lambda p: shard(p, range(10)), "10 tokens in 1 files *.bin with the word train"),
    (lambda p: shard(p.with_name("x_val_000000.bin"), [7]), "1 tokens in 1 files *.bin with the word val")])
def test_bad_shards_are_named(tmp_path, break_it, says):
    """In one line, before a run folder is made, but for a token that only a later step meets; no code is run."""
    path = shard(tmp_path / "x_train_000001.bin", [7] * 300)
    shard(tmp_path / "x_val_000000.bin", [7] * 300)
    break_it(path)
    with pytest.raises(UserError) as error:
        run(tmp_path, data=str(tmp_path))
    one_clear_line(error)
    assert says in str(error.value) and ("_00000" in str(error.value) or "--data" in str(error.value))
    assert not (tmp_path / "run" / "config.json").exists() and not (tmp_path / "ran").exists()


def test_shards_of_any_length_are_only_mapped(tmp_path):
    """Of 4 GB of zeros, a header and no blocks on the disk, only what is asked for is read; a shard of one sequence trains."""
    sparse(tmp_path / "x_train_1.bin", 2**31 - 1, 2**32 + 1022)
    shard(tmp_path / "x_val_1.bin", [7] * 2)
    _, summary = run(tmp_path, data=str(tmp_path))
    assert math.isfinite(summary["val_loss"])
    shard(tmp_path / "x_train_1.bin", [7] * 25)
    run(tmp_path / "short", data=str(tmp_path))


class Bytes:
    """Bytes in the place of GPT-2's tokens, whose table needs the network; 256 begins a document."""
    eot_token = 256

    def encode_ordinary_batch(self, texts, num_threads):
        return [list(text.encode()) for text in texts]

    def encode_ordinary(self, text):
        return list(text.encode())

    def decode_bytes(self, tokens):
        return bytes(t for t in tokens if t < 256)


def all_tokens(folder):
    files = sorted(folder.glob("*.bin"), key=lambda p: ("val" not in p.name, p.name))
    return np.concatenate([nano.read_shard(p)[1] for p in files]).tolist()


def test_prepare_parquet_and_json(tmp_path, monkeypatch, capsys):
    """Rows without text are skipped and counted; shards of the size asked for; nothing is written over."""
    import pandas

    monkeypatch.setattr(nano, "gpt2", Bytes)
    monkeypatch.setattr(prepare, "SHARD", 9000)
    texts = [f"document {i} " + "x" * (i * 37 % 200) for i in range(700)]
    (tmp_path / "source").mkdir()
    pandas.DataFrame(dict(text=[*texts[:300], None, None], other=0)).to_parquet(tmp_path / "source" / "a.parquet")
    (tmp_path / "source" / "b.jsonl").write_text("".join(json.dumps(dict(text=t)) + "\n" for t in [*texts[300:], None, ""]))
    (tmp_path / "source" / "other.csv").write_text("text\nnot this\n")
    settings = str(tmp_path / "source"), str(tmp_path / "shards"), 1000
    prepare.prepare(*settings)
    assert all_tokens(tmp_path / "shards") == [t for text in texts for t in [256, *text.encode()]]
    sizes = [len(nano.read_shard(p)[1]) for p in sorted((tmp_path / "shards").glob("*.bin"))]
    assert sizes[-1] == 1000 and set(sizes[:-2]) == {9000} and sizes[-2] < 10_000 and "4 rows without text" in capsys.readouterr().out
    with pytest.raises(UserError, match="has shards already"):
        prepare.prepare(*settings)


def test_prepare_text_files(tmp_path, monkeypatch, small_stand_in, capsys):
    """Documents end at marks, or at blank lines; byte-order marks are none of the text; a tenth validates."""
    monkeypatch.setattr(nano, "gpt2", Bytes)
    text = small_stand_in[:300_000]
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    prepare.prepare(str(tmp_path / "text.txt"), str(tmp_path / "shards"), 500)
    tokens = all_tokens(tmp_path / "shards")
    assert bytes(t for t in tokens if t < 256).decode() == text and 5 < tokens.count(256) < 30
    ends = [i for i, t in enumerate(tokens) if t == 256][1:]
    assert all(bytes(tokens[i - 2:i]) == b"\n\n" for i in ends)
    assert len(nano.read_shard(tmp_path / "shards" / "val_000000.bin")[1]) == 500  # (at most a tenth)
    _, summary = run(tmp_path, data=str(tmp_path / "shards"), vocab=257)
    assert summary["data"] == str(tmp_path / "shards") and summary["val_loss"] < math.log(257)

    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "a.txt").write_text("one<|endoftext|>two\n\n" + "2" * 20_000 + "\n\nthree")
    (tmp_path / "folder" / "deep" / "b.txt").write_text("four")
    (tmp_path / "folder" / "a_folder.txt").mkdir()
    prepare.prepare(str(tmp_path / "folder"), str(tmp_path / "more"), 10**7)
    assert len(nano.read_shard(tmp_path / "more" / "val_000000.bin")[1]) == len(all_tokens(tmp_path / "more")) // 10
    texts = bytes(0 if t == 256 else t for t in all_tokens(tmp_path / "more")).decode().split("\0")
    assert texts == ["", "one", "two\n\n" + "2" * 20_000 + "\n\nthree", "four"]


UTF16 = "hello world, é\n" * 50


@pytest.mark.parametrize("name, content, says", [
    ("nothing.txt", None, "cannot be read"), ("empty.txt", b"", "has 0 tokens"), ("short.txt", b"short", "has 6 tokens"),
    ("wrong.jsonl", b'{"txt": "no such column"}\n', "KeyError: 'text'"), ("row.jsonl", b'{"text": "good"}\n{"text": 5}\n', "cannot be read"),
    ("list.jsonl", b'[{"text": "a"}]\n', "cannot be read"), ("pretty.json", b'[\n{\n"text": "a"}]', "an object a line|JSON lines"),
    ("broken.jsonl", b'{"text": "a"', "cannot be read"), ("deep.jsonl", b"[" * 100_000, "cannot be read"),
    ("latin.txt", "é".encode("latin1") * 50, "iconv"), ("utf16.txt", UTF16.encode("utf-16"), "iconv"),
    ("utf16_without_a_mark.txt", "hello world\n".encode("utf-16-le") * 50, "NUL"), ("utf32.txt", UTF16.encode("utf-32"), "iconv"),
    ("packed.txt", gzip.compress(b"hello world\n" * 100), "unpacked"), ("text.jsonl", UTF16.encode("utf-16"), "iconv"),
    ("code.parquet", pickle.dumps(Path), "cannot be read"), ("late.txt", b"hello world\n" * 10_000 + b"\xff", "UnicodeDecodeError")])
def test_prepare_refuses(tmp_path, name, content, says, monkeypatch):
    """In one line that names the file, alone and in a folder of good ones; nothing is left."""
    monkeypatch.setattr(nano, "gpt2", Bytes)
    monkeypatch.setattr(prepare, "SHARD", 9000)
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / name
    sources = [path] if content is None or "tokens" in says else [path, path.parent]
    if content is not None:
        path.write_bytes(content)
    if sources[1:]:
        (tmp_path / "folder" / "a_good_one.txt").write_text("good\n\n" * 9000)
    for source in sources:
        with pytest.raises(UserError, match=says) as error:
            prepare.prepare(str(source), str(tmp_path / "out"), 1000)
        one_clear_line(error)
        assert name in str(error.value) and not list(tmp_path.rglob("*.bin"))


@pytest.mark.parametrize("column", [dict(txt=["a"] * 50), dict(text=[1] * 50), dict(text=[b"a"] * 50), dict(text=[["a"]] * 50), dict(text=[None] * 50)])
def test_prepare_refuses_columns(tmp_path, column, monkeypatch):
    import pandas

    monkeypatch.setattr(nano, "gpt2", Bytes)
    pandas.DataFrame(column).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match="cannot be read|has 0 tokens") as error:
        prepare.prepare(str(tmp_path / "x.parquet"), str(tmp_path / "out"), 500)
    one_clear_line(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["a" * 20_000, "word " * 4000, "\n" * 20_000, "\r\n" * 9000, "é" * 9000, "<|endoftext|>a" * 3000, "line\n" * 4000])
def test_any_text_of_20_kb_trains(text, tmp_path, monkeypatch, capsys):
    """Of one character repeated, of one line, of blank lines, of marks: no token is lost, and both kinds of shard come out."""
    monkeypatch.setattr(nano, "gpt2", Bytes)
    (tmp_path / "br[a]cket").mkdir()
    (tmp_path / "br[a]cket" / "a b.txt").write_bytes(text.encode())
    prepare.prepare(str(tmp_path / "br[a]cket"), str(tmp_path / "shards"), 500)
    assert "2 shards; 0 rows" in capsys.readouterr().out
    kept = bytes(t for t in all_tokens(tmp_path / "shards") if t < 256).decode()
    assert kept == text.replace("\r\n", "\n").replace("<|endoftext|>", "")
    run(tmp_path, data=str(tmp_path / "shards"), vocab=257, steps=1, evals=1)


def test_long_texts_without_blank_lines_are_cut(tmp_path):
    """Else one line of gigabytes would have to fit into memory, many times over."""
    (tmp_path / "x.txt").write_text("0123456789" * 100_000)
    texts = list(prepare.documents(str(tmp_path / "x.txt")))
    assert "".join(texts) == "0123456789" * 100_000 and max(map(len, texts)) < 300_000
    (tmp_path / "x.txt").write_text("first<|endoftext|>" + "\n\n".join(["0123456789" * 10_000] * 2) + "<|endoftext|>last")
    assert [len(text) for text in prepare.documents(str(tmp_path / "x.txt"))] == [5, 200_002, 4]


@pytest.mark.skipif(not (Path(os.environ.get("DATA_DIR", "/nowhere")) / "tiktoken-cache").is_dir(), reason="needs GPT-2's table of tokens")
def test_gpt2_tokens(tmp_path, monkeypatch, capsys):
    import tiktoken
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(Path(os.environ["DATA_DIR"]) / "tiktoken-cache"))
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times.\n" * 50)
    prepare.main([str(tmp_path / "text.txt"), "--data", str(tmp_path / "shards")])
    tokens = all_tokens(tmp_path / "shards")
    assert tokens[0] == 50256 and tiktoken.get_encoding("gpt2").decode(tokens[1:]) == (tmp_path / "text.txt").read_text()
    out, _ = run(tmp_path, data=str(tmp_path / "shards"), vocab=50257, steps=2)
    capsys.readouterr()
    nano.main(Config.of(sample=str(out), prompt="It was", length=3))
    assert capsys.readouterr().out.startswith("It was")


# ---- runs ------------------------------------------------------------------------------------------------------------
def test_it_learns_and_reports(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(nano, "draw", DRAW)
    out, summary = run(tmp_path, steps=60, width=32, hidden=64, batch=8, micro_batch=8, evals=3)
    losses = losses_of(out)
    assert losses[0] == pytest.approx(math.log(256), abs=0.02) and losses[-1] < 3.6 and len(losses) == 60
    log = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert summary["lipschitz_log10"] < log["lipschitz_log10"] < summary["lipschitz_product_log10"]  # tuned and not
    needed = ("script preset params steps val_loss val_accuracy lipschitz_log10 lipschitz_product_log10 lipschitz_norm max_weight_norm w_max "
              "loss_temperature train_seconds ms_per_step data device dtype seed torch").split()
    assert set(needed) <= summary.keys() and (out / "curves.png").stat().st_size > 10_000
    text = capsys.readouterr().out
    assert "LIPSCHITZ CONSTANT" in text and f"--sample {out}" in text
    assert nano.main(Config.of(out=str(out))) == summary and "is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="--lr 0.7: the run in .* has 0.1"):
        nano.main(tiny(out=str(out), steps=60, width=32, hidden=64, batch=8, evals=3, lr=0.7))


def test_the_summary_is_written_before_the_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(nano, "draw", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 6


@pytest.mark.parametrize("changes", [dict(baseline=True, constraint="none"), BY_POSITION, dict(constraint="stiefel"), dict(constraint="hammer"),
                                     dict(constraint="weight_decay"), dict(constraint="spectral_weight_decay"),
                                     dict(constraint="specnorm", dtype="bfloat16"), dict(constraint="none", final_scale=3.0)])
def test_every_kind_of_run(changes, tmp_path):
    out, summary = run(tmp_path, **changes)
    config, model, state = nano.load_checkpoint(out)
    assert math.isfinite(summary["val_loss"]) and summary["baseline"] == config.baseline == changes.get("baseline", False)
    if config.baseline:
        assert summary["lipschitz_log10"] == math.inf
    assert certificate(model, free=nano.tuned(model))["log10"] == summary["lipschitz_log10"]
    assert state["step"] == 6 and len(state["log"]) == 2


def test_validation_is_of_the_tokens_asked_for(tmp_path):
    """Whole sequences and a rest, by one and by three ranks, against the loss written out."""
    model = random_model()
    tokens = np.random.default_rng(0).integers(0, 250, 400).astype(np.uint16)
    model.config.val_tokens = 130  # five sequences of 24 and a rest of 10
    validation, total, right = nano.Tokens([("x", tokens)], 256), 0.0, 0
    with torch.no_grad():
        for first in range(0, 130, 24):
            text = torch.from_numpy(tokens[first:min(first + 24, 130) + 1].astype(np.int64))
            z = model(text[None, :-1], torch.float64)[0]
            total += F.cross_entropy(z, text[1:], reduction="sum").item()
            right += (z.argmax(1) == text[1:]).sum().item()
    loss, accuracy, entries = nano.evaluate(model, validation, 24, torch.float64, nano.Exchange(model))
    assert loss == pytest.approx(total / 130, rel=1e-12) and accuracy == right / 130 and len(entries) == 2
    parts = []
    for rank in range(3):
        exchange = nano.Exchange(model, rank, 3)
        exchange.sum = lambda x, op=None: parts.append(x) or x
        nano.evaluate(model, validation, 24, torch.float64, exchange)
    assert sum(parts[::2])[0].item() == pytest.approx(total, rel=1e-12) and sum(parts[::2])[2].item() == 130


@pytest.mark.parametrize("batch", [1, 8])
def test_a_token_seen_once_moves_as_far_whatever_the_batch(batch, tmp_path, monkeypatch):
    """At a head so small that its gradients are 1e-9: Adam's eps, on sums, is below them; on means it would not be."""
    tokens = np.random.default_rng(0).integers(0, 200, 24 * 64)
    tokens[5::24 * batch] = 240  # once in each step
    shard(tmp_path / "train.bin", tokens), shard(tmp_path / "val.bin", tokens[:60])
    rows = []
    monkeypatch.setattr(nano.Exchange, "share_weights", lambda exchange: rows.extend(
        p[240].clone() for p, name in exchange.names.items() if name == "embedding_VD"))
    run(tmp_path, data=str(tmp_path), batch=batch, micro_batch=1, steps=4, dtype="float32", head_lr=1e-6, embed_lr=0.01)
    assert rms(rows[3].detach() - rows[2].detach()).item() > 0.003


def test_micro_batches_do_not_matter(tmp_path):
    losses = []
    for micro_batch in (1, 2, 4):
        out, _ = run(tmp_path / str(micro_batch), micro_batch=micro_batch, dtype="float64", steps=10)
        losses.append(losses_of(out))
    assert losses[0] == pytest.approx(losses[1], abs=1e-11) and losses[0] == pytest.approx(losses[2], abs=1e-11)


def test_sampling(tmp_path, capsys):
    """The same for a seed; 0 is greedy, as is the best token alone; the prompt stands in front."""
    out, _ = run(tmp_path)
    capsys.readouterr()
    texts = []
    for changes in (dict(), dict(), dict(temperature=0.0), dict(temperature=1e-9), dict(seed=1)):
        nano.main(Config.of(sample=str(out), prompt="def f", length=40, **changes))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[4] and texts[2] == texts[3] and all(text.startswith("def f") for text in texts)


def test_owners_share_the_work(monkeypatch):
    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda W, generator: W)
    monkeypatch.setattr(torch, "randn", lambda *shape, generator: torch.zeros(shape))
    model = Transformer(nano.parse_arguments(["--preset", "cap1"]))
    for world_size in (1, 2, 3, 8):
        owner = nano.Exchange(model, 0, world_size).owner
        assert set(owner.values()) == set(range(world_size)) and len(owner) == len(list(model.parameters()))
        load = [sum(W.numel() * min(W.shape) for _, W in model.matrices() if owner[W] == rank) for rank in range(world_size)]
        assert max(load) <= max(1.1 * sum(load) / world_size, 50304 * 768 * 768)


# ---- several processes -----------------------------------------------------------------------------------------------
WORKER = """
import hashlib, os, pathlib, runpy, sys
fault, folder, script = sys.argv[1:4]
sys.path.insert(0, os.path.dirname(script))
rank, restarts = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
import muon
step, count, write_bytes = muon.Muon.step, [0], pathlib.Path.write_bytes

def faulty_step(self):
    count[0] += 1
    if rank == "1" and restarts == "0" and count[0] == 5:
        if fault == "kill":
            os.kill(os.getpid(), 9)
        if fault == "exception":
            raise ValueError("a fault of one rank")
    return step(self)

def full_disk(path, data):
    if "checkpoint" in path.name:
        raise OSError(28, "No space left on device", str(path))
    return write_bytes(path, data)

muon.Muon.step = faulty_step
if fault == "disk":
    pathlib.Path.write_bytes = full_disk
sys.argv = sys.argv[3:]
if fault != "none":
    runpy.run_path(script, run_name="__main__")
else:
    import nanogpt_lipschitz as nano
    evaluate = nano.evaluate

    def noted(model, *arguments):
        bits = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
        with open(pathlib.Path(folder) / f"rank{rank}", "a") as f:
            f.write(hashlib.sha256(bits).hexdigest() + chr(10))
        return evaluate(model, *arguments)

    nano.evaluate = noted
    nano.main(nano.parse_arguments())
    os._exit(0)  # as the script does
"""


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    path = tmp_path_factory.mktemp("worker") / "worker.py"
    path.write_text(WORKER)
    return path


def test_one_two_and_four_processes_are_the_same_run(tmp_path, worker):
    """In float64 to 1e-9 over 50 steps; all replicas have the same bits at each of 5 evaluations."""
    settings = dict(dtype="float64", steps=50, micro_batch=1, evals=5)
    alone, _ = run(tmp_path, **settings)
    for processes in (2, 4):
        folder = tmp_path / str(processes)
        good, output = fork(folder, processes, worker, "none", folder, SCRIPT, *flags(**settings, out=folder / "run"))
        assert good, output[-2000:]
        assert losses_of(folder / "run") == pytest.approx(losses_of(alone), abs=1e-9)
        assert json.loads((folder / "run" / "summary.json").read_text())["processes"] == processes
        hashes = [(folder / f"rank{rank}").read_text() for rank in range(processes)]
        assert len(set(hashes)) == 1 and len(hashes[0].split()) == 5


def test_a_run_goes_on_on_another_number_of_processes(tmp_path, monkeypatch):
    """Stopped on one process, continued on two: in float64 the same losses to 1e-9 as a run that was left alone."""
    settings = dict(dtype="float64", steps=30, micro_batch=1, evals=3)
    whole, _ = run(tmp_path / "whole", **settings)
    state = torch.load(whole / "checkpoint.pt", weights_only=True)
    write, out = nano.write, tmp_path / "stopped" / "run"

    def stop_at_the_second_checkpoint(path, data):
        write(path, data)
        if path.name == "log.jsonl" and len(data.splitlines()) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(nano, "write", stop_at_the_second_checkpoint)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", **settings)
    monkeypatch.undo()
    shutil.copytree(out, tmp_path / "other" / "run")
    good, output = fork(tmp_path / "forks", 2, SCRIPT, "--out", out)
    assert good, output[-2000:]
    assert len(losses_of(out)) == 30 and losses_of(out) == pytest.approx(losses_of(whole), abs=1e-9)
    nano.main(Config.of(out=str(tmp_path / "other" / "run")))  # on one process again: the same bits
    again = torch.load(tmp_path / "other" / "run" / "checkpoint.pt", weights_only=True)
    assert same(state["model"], again["model"]) and same(state["optimizers"], again["optimizers"])


def test_a_killed_worker_is_restarted_by_torchrun_and_nothing_is_lost(tmp_path, worker):
    """SIGKILL of one of two workers between two checkpoints; torchrun starts both again: bit-identical weights."""
    settings = flags(steps=9, micro_batch=1, evals=3, dtype="float32")
    killed = start(worker, "kill", tmp_path, SCRIPT, *settings, "--out", tmp_path / "killed", processes=2, restarts=1)
    good, output = fork(tmp_path / "forks", 2, SCRIPT, *settings, "--out", tmp_path / "whole")
    assert good, output[-4000:]
    status, output, errors = end(killed)
    assert status == 0 and "from step 3" in output, errors[-4000:]
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "killed"))
    assert a["step"] == b["step"] == 9 and same(a["model"], b["model"]) and same(a["optimizers"], b["optimizers"])


def test_an_error_on_one_rank_ends_all(tmp_path, worker):
    """A killed process, an exception, a full disk, a bad token of one rank, a damaged checkpoint: all gone within a minute."""
    data = tmp_path / "data"
    data.mkdir()
    tokens = np.full(24 * 40, 7)
    tokens[24 * 11 + 3] = 299  # in the last sequence of the third step, which is of rank 1
    shard(data / "train.bin", tokens), shard(data / "val.bin", tokens[:100])
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "checkpoint.pt").write_bytes(b"damaged")
    cases = {
        "kill": (["--out", tmp_path / "kill"], "Signal 9 (SIGKILL)"),
        "exception": (["--out", tmp_path / "exception"], "nanogpt_lipschitz.py: rank 1: a fault of one rank"),
        "disk": (["--out", tmp_path / "disk"], "nanogpt_lipschitz.py: rank 0: [Errno 28] No space left on device"),
        "token": (["--out", tmp_path / "token", "--data", data], "rank 1: " + str(data / "train.bin") + ": holds token 299"),
        "checkpoint": (["--out", damaged], "rank 0: " + str(damaged / "checkpoint.pt") + ": cannot be used"),
    }
    began, settings = time.time(), flags(micro_batch=1, steps=20)
    running = {kind: start(worker, kind, tmp_path, SCRIPT, *settings, *cases[kind][0], processes=2) for kind in ("kill", "exception")}
    ended = {kind: fork(tmp_path / f"{kind}_forks", 2, worker, kind, tmp_path, SCRIPT, *settings, *cases[kind][0])
             for kind in ("disk", "token", "checkpoint")}
    for kind, process in running.items():
        status, _, errors = end(process, timeout=90)
        ended[kind] = status == 0, errors
    for kind, (good, errors) in ended.items():
        assert not good and cases[kind][1] in errors, (kind, errors[-3000:])
        own = [line for line in errors.splitlines() if line.startswith("nanogpt_lipschitz.py: ")]
        assert len(own) == (kind != "kill"), (kind, own)
    assert time.time() - began < 60
    assert not list(tmp_path.rglob("*.part"))


# ---- CUDA without a GPU: steps of main on fake tensors, see results/memory.py ------------------------------------------
SMALL = ["--preset", "cap1", "--blocks", "2", "--residual_scale", "1", "--seq_len", "8192"]
FAKE = {**dict(zip(memory.PRESETS, memory.CASES)), "two micro-batches": [[*SMALL, "--batch", "2"], 0, 1, 99, False],
        **{name: [[*SMALL, "--batch", "1", "--constraint", name], 0, 1, 99, False] for name in constraints.CONSTRAINTS},
        **{f"rank {rank}": [SMALL, rank, 8, 1] for rank in (0, 3, 7)}}
# Waits for the device that stay: {steps: why}. Each takes the lines of constraints.py that are allowed.
SVD = "by_svd: if where.any():"  # whether some matrix needs an SVD instead: one look a step and shape of matrices
EIGH = "hard_cap: eigenvalue, V = torch.linalg.eigh(torch.where(finite[..., None, None], A, eye))"  # the host reads its error code
WAITS = {
    "cap1": [{SVD, EIGH}, set(), set()], "tight": [{SVD, EIGH}, set(), set()],  # of a run's first step, and each 64th: a hard cap, as
    "soft_cap": [{SVD, EIGH}, set(), set()],  # nothing is known of weights then
    "two micro-batches": [{SVD, EIGH}, set(), set()],
    "stiefel": [{SVD}] * 3,  # msign is checked at every step
    "hard_cap": [{SVD, EIGH}, set(), {SVD, EIGH}]}  # it waits a step or more where it can; nothing else is an eigendecomposition


@pytest.fixture(scope="module", autouse=True)
def begun(request):
    """Half a minute on another core: it begins with the first test of this file, if one of its tests is to run."""
    wanted = any("on_fake_cuda" in item.fixturenames for item in request.session.items)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        yield pool.submit(memory.on_fake_cuda, list(FAKE.values())) if wanted and memory.possible() else None


@pytest.fixture(scope="module")
def on_fake_cuda(begun):
    if begun is None:
        pytest.skip("needs g++, Linux, and a CPU build of torch")
    return dict(zip(FAKE, begun.result()))


@pytest.mark.parametrize("name", [name for name in FAKE if "rank" not in name])
def test_steps_on_cuda_wait_only_where_they_are_logged(name, on_fake_cuda):
    """Backward included, compiled at full size for the four presets: one copy to the GPU for each micro-batch, no tensor of the CPU
    in a graph, and nothing that looks at a result before the check for divergence in the last step, but what WAITS lists."""
    found = on_fake_cuda[name]
    assert found["end"] == "Logged" and len(found["steps"]) == 4
    for step, expected in zip(found["steps"], WAITS.get(name, [set()] * 3)):
        assert set(step["waits"]) == expected
        assert step is found["steps"][0] or step["copies"] == ["aten._to_copy.default"] * (2 if "two" in name else 1), step["copies"]


def test_peak_memory_is_what_results_say(on_fake_cuda):
    with open(memory.TABLE) as f:
        table = list(csv.DictReader(f))
    for row, now in zip(table, memory.rows([on_fake_cuda[name] for name in memory.PRESETS]), strict=True):
        assert row["preset"] == now["preset"]
        for key in list(now)[1:]:
            assert float(row[key]) == pytest.approx(now[key], rel=0.1), (row["preset"], key)


def test_eight_ranks_make_the_same_collectives_in_the_same_order(on_fake_cuda):
    """Of the first step: each gradient to its owner, each weight from it. Else sums would be of different matrices."""
    calls = [on_fake_cuda[f"rank {rank}"]["steps"][0]["calls"] for rank in (0, 3, 7)]
    assert calls[0] == calls[1] == calls[2] and len(calls[0]) == 28
    calls = on_fake_cuda["cap1"]["steps"][1]["calls"]
    assert [call[0] for call in calls] == ["reduce"] * 74 + ["broadcast"] * 74 and {call[2] for call in calls} == set(range(8))


# ---- bad input -------------------------------------------------------------------------------------------------------
def test_help_is_complete(capsys):
    with pytest.raises(SystemExit) as stop:
        nano.parse_arguments(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all("--" + f.name in text for f in dataclasses.fields(Config)) and all(name in text for name in nano.PRESETS)


@pytest.mark.parametrize("wrong, says", [
    (["--preset", "huge"], "must be one of"), (["--heads", "3"], "divisor"), (["--width", "20", "--heads", "2"], "divisor of width / 4"),
    (["--steps", "0"], "from 1"), (["--micro_batch", "3"], "x --micro_batch 3;"), (["--w_max", "1,2"], "or 7"), (["--w_max", "nan"], "a number above 0"),
    (["--lr", "nan"], "finite"), (["--activation", "relu"], "must be one of"),
    (["--baseline"], "none for the baseline"), (["--residual_scale", "99"], "at most 2 * blocks"),
    (["--vocab", "70000"], "65536"), (["--device", "tpu9"], "cannot be used here"), (["--data", "/nowhere"], "0 files"), (["--seed", "-1"], "from 0"),
    (["--constraint", "huge"], "must be one of"), (["--sample", "nowhere"], "cannot be used as a checkpoint"),
    (["--preset", "cap1"], "--seq_len 49152: must be at most 8192"), (["--preset", "cap1", "--dtype", "float64"], "another --dtype"),
    (["--batch", "3"], "--batch 3: must be a multiple")])
def test_wrong_flags(wrong, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        nano.main(nano.parse_arguments(wrong))
    assert says in str(error.value) and "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("variables, says", [
    (dict(WORLD_SIZE="2"), "RANK expected"), (dict(WORLD_SIZE="2", RANK="0"), "MASTER_ADDR expected"), (dict(WORLD_SIZE="abc"), "'abc'"),
    (dict(RANK="2", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1"), "no RANK 2 in a WORLD_SIZE of 2"), (dict(RANK="-1"), "no RANK -1"),
    (dict(RANK="3"), "no RANK 3 in a WORLD_SIZE of 1"), (dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="x", MASTER_PORT="abc"), "'abc'")])
def test_wrong_environments(variables, says, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says) as error:
        nano.main(tiny())
    one_clear_line(error)
    assert "torchrun" in str(error.value) and not list(tmp_path.iterdir())


def test_wrong_types_from_python():
    for name, value in dict(steps="10", lr="0.1", steps_=None, width=16.0, data=5, baseline="yes").items():
        with pytest.raises(UserError, match="must be of the type"):
            nano.main(tiny(**{name.rstrip("_"): value}))


def test_endings(tmp_path, small_stand_in):
    """One line and status 2; nothing is left of a start that failed; Ctrl-C says how to go on."""
    data, endless = tmp_path / "data", flags(steps=10**6, evals=10**5)
    data.mkdir()
    shard(data / "train.bin", [299] * 150 + [7] * 150), shard(data / "val.bin", [7] * 30)
    settings = dict(cwd=tmp_path)
    wrong = start(SCRIPT, "--heads", 3, **settings)
    failed = start(SCRIPT, *flags(), "--data", data, "--out", tmp_path / "failed", **settings)
    stopped = start(SCRIPT, *endless, **settings)
    while "train loss" not in stopped.stdout.readline():
        pass
    stopped.send_signal(signal.SIGINT)
    status, _, errors = end(wrong)
    assert status == 2 and errors.count("\n") == 1 and "--heads 3: must be a divisor" in errors
    status, _, errors = end(failed)
    assert status == 2 and errors.count("\n") == 1 and "holds token 299" in errors and not (tmp_path / "failed").exists()
    status, _, errors = end(stopped)
    folder = Path("runs/nanogpt_lipschitz_tiny_seed0")
    assert status == 130 and errors.splitlines()[-1] == "nanogpt_lipschitz.py: interrupted; with a checkpoint it goes on by --out FOLDER"
    assert (tmp_path / folder / "checkpoint.pt").exists() and (tmp_path / folder / "config.json").exists()


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    nano.write(tmp_path / "x", b"before")

    def full(path, data):
        path.write_text("part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError):
        nano.write(tmp_path / "x", b"after")
    assert (tmp_path / "x").read_bytes() == b"before" and list(tmp_path.iterdir()) == [tmp_path / "x"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run and all that its checkpoint holds."""
    out, _ = run(tmp_path_factory.mktemp("finished"), blocks=1)
    return out, torch.load(out / "checkpoint.pt", weights_only=True)


def stored(folder, state):
    """A run folder whose checkpoint holds `state`."""
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "checkpoint.pt")
    return Config.of(out=str(folder))


WRONG = [None, "x", "", [], [1], {}, {"x": 1}, -1, 0, 10**30, 1e300, math.nan, -math.inf, b"x", torch.zeros(2)]


@pytest.mark.parametrize("key", ["script", "config", "step", "log", "data", "tokens", "model", "optimizers"])
def test_a_checkpoint_with_wrong_fields_is_refused(key, finished, tmp_path):
    """Or does no harm: `data` is only shown, `tokens` only compared."""
    harmless = dict(data=str, tokens=int).get(key, torch.nn.Module)
    states = [dict(finished[1], **{key: value}) for value in WRONG if not isinstance(value, harmless)]
    for state in [*states, {k: v for k, v in finished[1].items() if k != key}]:
        with pytest.raises(UserError, match="cannot be used as a checkpoint") as error:
            nano.go_on(stored(tmp_path / "run", state))
        one_clear_line(error)


@pytest.mark.parametrize("field", dataclasses.fields(Config), ids=lambda f: f.name)
def test_a_checkpoint_with_wrong_settings_is_refused(field, finished, tmp_path):
    """Refused, or it is a setting of the right type within its range, for the weights that are there."""
    for value in WRONG:
        try:
            own, state, _ = nano.go_on(stored(tmp_path / "run", dict(finished[1], config={**finished[1]["config"], field.name: value})))
        except UserError as error:
            assert "\n" not in str(error) and "; " in str(error), str(error)
        else:
            assert isinstance(getattr(own, field.name), (int, float) if field.type is float else field.type), value
            own.limits()


@pytest.mark.parametrize("place", ["train_loss", "val_loss", "val_accuracy", "ms_per_step", "losses", "norms", "activations", "step"])
def test_a_checkpoint_with_a_wrong_log_is_refused(place, finished, tmp_path):
    for value in WRONG[:2] + WRONG[4:5] + WRONG[6:10] + [b"x"]:
        log = [dict(record) for record in finished[1]["log"]]
        log[-1][place] = value
        with pytest.raises(UserError, match="cannot be used as a checkpoint") as error:
            nano.go_on(stored(tmp_path / "run", dict(finished[1], log=log)))
        one_clear_line(error)


def compressed(path):
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(path.with_name("new"), "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    path.with_name("new").replace(path)


@pytest.mark.parametrize("break_it", [
    lambda p, s: p.write_bytes(p.read_bytes()[:3000]), lambda p, s: p.write_bytes(b"x"), lambda p, s: p.write_bytes(b""),
    lambda p, s: torch.save(dict(script="other"), p), lambda p, s: torch.save([1], p), lambda p, s: torch.save(dict(s, config=dict(width=16)), p),
    lambda p, s: torch.save(dict(s, x=Runs(p.with_name("ran"))), p), lambda p, s: p.write_bytes(pickle.dumps(Runs(p.with_name("ran")))),
    lambda p, s: compressed(p), lambda p, s: torch.save(dict(s, config={**s["config"], "width": 2**14, "blocks": 1000}), p),
    lambda p, s: torch.save(dict(s, config={**s["config"], "unknown": 1}), p),
    lambda p, s: torch.save(dict(s, model={k: W[..., :1] for k, W in s["model"].items()}), p),
    lambda p, s: torch.save(dict(s, config={**s["config"], "vocab": 2**16, "width": 2**14, "heads": 2**10}, model={
        k: torch.zeros(1).expand(2**16, 2**14) for k in s["model"]}), p),  # (4 GB each, of one number)
    lambda p, s: torch.save(dict(s, optimizers={k: dict(momentum=torch.zeros(3)) for k in s["optimizers"]}), p),
    lambda p, s: torch.save(dict(s, step=s["step"] + 1), p)])
def test_wrong_checkpoints(break_it, finished, tmp_path):
    """One line, no code run, and little memory: what is stored must have the size that the settings claim."""
    config = stored(tmp_path / "run", finished[1])
    break_it(tmp_path / "run" / "checkpoint.pt", finished[1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="cannot be used as a checkpoint") as error:
        nano.main(config)
    one_clear_line(error)
    assert not (tmp_path / "run" / "ran").exists() and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 2**20


def test_a_damaged_summary_is_named(finished, tmp_path):
    config = stored(tmp_path / "run", finished[1])
    for text in ("\0\0", "{", "[" * 100_000):
        (tmp_path / "run" / "summary.json").write_text(text)
        with pytest.raises(UserError, match="cannot be used as a checkpoint"):
            nano.main(config)


def test_divergence_stops_and_names_the_matrix(tmp_path):
    with pytest.raises(UserError, match="diverged, .* is not finite"):
        run(tmp_path, embed_lr=1e30, lr=1e30, constraint="none", steps=20, dtype="float32")


def test_code_of_a_checkpoint_is_not_run_unasked(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def half(W, w_max, step_norm=0.0):\n    return W / 2\n")
    mine = str(tmp_path / "mine.py") + ":half"
    out, _ = run(tmp_path, constraint=mine)
    (out / "summary.json").unlink()
    with pytest.raises(UserError, match="say that you trust it"):
        nano.main(Config.of(out=str(out)))
    nano.main(Config.of(out=str(out), constraint=mine))
