"""nanogpt_lipschitz.py: certificate, masks and data against oracles; several processes against one; faults."""

import csv
import dataclasses
import inspect
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

import nanogpt_worker
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

import memory  # noqa: E402

SCRIPT = ROOT / "nanogpt_lipschitz.py"
WORKER = ROOT / "tests" / "nanogpt_worker.py"
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
    return Config.of("tiny_paper", **{**TINY, **changes})


def flags(**changes):
    settings = {"preset": "tiny_paper", **TINY, **changes}
    return [word for k, v in settings.items() for word in (f"--{k}", str(v))]


def run(folder, **changes):
    """A tiny run in this process; returns its folder and summary."""
    summary = nano.main(tiny(out=str(folder / "run"), **changes))
    assert summary == json.loads((folder / "run" / "summary.json").read_text())
    return folder / "run", summary


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def start(*arguments, processes=0, restarts=0, **kwargs):
    """The script, or the worker that runs it, as a user starts it: alone or under torchrun."""
    launch = [sys.executable]
    if processes:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
                   "--max-restarts", str(restarts)]
    environment = {k: v for k, v in os.environ.items() if k != "DATA_DIR"}
    environment["OMP_NUM_THREADS"] = "1"  # more would only get into each other's way
    return subprocess.Popen([*launch, *map(str, arguments)], text=True, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **kwargs)


def end(process, timeout=120):
    """(exit status, output, errors)"""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def spread(folder, processes, fault, *arguments):
    """The script in several processes; as torchrun does, one that fails ends the others.

    Returns (whether all went well, what all of them wrote). A server that has imported torch, and nothing else,
    forks them: so each begins at once.
    """
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nanogpt_worker"])
    words = [str(word) for word in arguments]
    running = [context.Process(target=nanogpt_worker.run, args=(rank, processes, port, fault, str(folder), words))
               for rank in range(processes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(WORKER.parent))  # for the server, which begins with the first process
        for process in running:
            process.start()
    good = True
    while running:
        wait([process.sentinel for process in running])
        ended = [process for process in running if not process.is_alive()]
        running = [process for process in running if process not in ended]
        if any(process.exitcode for process in ended):
            good = False
            for process in running:
                process.terminate()
    return good, "".join((folder / f"output{rank}").read_text() for rank in range(processes))


def one_clear_line(error):
    assert "\n" not in str(error.value) and "; " in str(error.value) and len(str(error.value)) < 500, str(error.value)


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
MIXED = dict(content="1", cap=0.5, logit_scale=4.0, key_offset=True)


def waves(block, T):
    """Queries and keys of attention by position as the model computes them: (H, T, E) each."""
    key_HE = torch.zeros_like(block.query_HE)
    key_HE[:, :len(block.speeds)] = 1
    return [nano.rotate(x_HE[:, None].expand(-1, T, -1), block.speeds) for x_HE in (block.query_HE, key_HE)]


@pytest.mark.parametrize("changes", [dict(), dict(activation="maxmin"), BY_POSITION, MIXED])
def test_certificate_is_the_one_of_shakespeare(changes, monkeypatch):
    """One derivation, two models; the slopes of GeLU's two forms apart."""
    monkeypatch.setattr(shakespeare, "GELU_SLOPE", nano.GELU_SLOPE)
    model = random_model(**changes)
    fields = {f.name for f in dataclasses.fields(shakespeare.Config)}
    twin = {k: v for k, v in vars(model.config).items() if k in fields and k not in ("preset", "dtype")}
    twin = shakespeare.Config(**twin)
    twin = shakespeare.Transformer(twin, "".join(map(chr, range(256)))).double()
    twin.load_state_dict({k.replace("head_XD", "head_VD"): v for k, v in model.state_dict().items()}, strict=False)
    for block, other in zip(model.blocks, twin.blocks):
        if not block.sees_content:
            query_HTE, key_HTE = waves(block, model.config.seq_len)
            other.bias_HT = torch.nn.Parameter((query_HTE * key_HTE[:, :1]).sum(-1))
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


@pytest.mark.parametrize("changes", [dict(), dict(heads=4, activation="maxmin", residual_scale=2.0), BY_POSITION, MIXED])
def test_certificate_survives_attack(changes, monkeypatch):
    """Within the ball of embeddings, with documents that begin in the middle and a window shorter than the text."""
    monkeypatch.setattr(nano, "TILE", 3)
    model = random_model(norm=1.0, window=5, **changes)
    docs_BT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2, 2]])
    bound, R = certificate(model), rms(model.embedding_VD).max().item()
    with sdpa_kernel(SDPBackend.MATH):  # the others have no forward derivative
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


def documents(shape, shares):
    """Numbers of documents, of which so large a share of tokens begins one."""
    generator = torch.Generator().manual_seed(shape[1])
    return (torch.rand(shape, generator=generator) < torch.tensor(shares)).long().cumsum(1)


def brute_force_mask(docs, blocks):
    return torch.tensor([[[j <= t and t // 128 - j // 128 < blocks and row[j] == row[t] for j in range(len(row))]
                          for t in range(len(row))] for row in docs.tolist()])


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_masks(blocks):
    """Blocks of flex_attention against its own slow builder, both against the definition, documents of all lengths."""
    docs_BT = documents((3, 512), [[0.0], [0.003], [0.2]])
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
    assert not (full & ~every).any()  # and none is called whole that is not
    oracle = create_block_mask(lambda b, h, t, j: dense[b, t, j], 3, 1, 512, 512, device="cpu")
    assert torch.equal(ours.to_dense()[:2], oracle.to_dense()[:2])  # documents shorter than a block: work, no harm


def test_the_picture_of_block_mask():
    """In its comment, of documents A and B and a window of 3 blocks."""
    docs_BT = (torch.arange(5 * 128)[None] >= 2 * 128 + 50).long()
    mask = nano.block_mask(docs_BT, 3)
    drawn = [["."] * 5 for _ in range(5)]
    lists = dict(s=(mask.kv_num_blocks, mask.kv_indices), w=(mask.full_kv_num_blocks, mask.full_kv_indices))
    for letter, (count, index) in lists.items():
        for q in range(5):
            for k in index[0, 0, q, :count[0, 0, q]].tolist():
                drawn[q][k] = letter
    picture = inspect.getsource(nano.block_mask).split("document    A  A  AB B  B")[1].splitlines()[1:6]
    for line, letters in zip(picture, drawn):
        assert line.ljust(40)[22:36:3].replace(" ", ".") == "".join(letters)


@pytest.mark.parametrize("changes", [dict(), BY_POSITION, dict(baseline=True, constraint="none")])
def test_flex_attention_and_sdpa_are_equal(changes):
    """The GPU's path, in eager mode, and the CPU's; forward only: torch has no backward of flex_attention on a CPU."""
    model = random_model(seq_len=384, window=384, **changes)
    x_BTD = torch.randn(2, 384, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    docs_BT = documents((2, 384), [[0.01], [0.01]])
    with torch.no_grad():
        dense = model.body(x_BTD, docs_BT, 384)  # in eager mode blocks do not count: the next test is of windows
        model.flex = True
        assert torch.allclose(model.body(x_BTD, docs_BT, 384), dense, rtol=1e-9, atol=1e-10)
        assert not torch.allclose(model.body(x_BTD, docs_BT.flip(1), 384), dense)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_flex_attention_is_equal_and_compiled_once():
    """As on a GPU, but forward only and by the CPU's kernels. Other blocks, windows, documents compile nothing anew."""
    torch._dynamo.reset()
    model = Transformer(tiny(width=64, blocks=3, seq_len=256, window=256, dtype="float32"))
    generator = torch.Generator().manual_seed(0)
    for _, W in model.matrices():
        torch.nn.init.orthogonal_(W, generator=generator)
    x_BTD = torch.randn(2, 256, 64, generator=generator)
    cases = [((torch.rand(2, 256, generator=generator) < 0.02).long().cumsum(1), window) for window in (128, 128, 256)]
    with torch.no_grad():
        dense = [model.body(x_BTD, *case) for case in cases]
        model.flex = True
        for block in model.blocks:
            block.compile(dynamic=False)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for case, expected in zip(cases, dense):
            assert torch.allclose(model.body(x_BTD, *case), expected, rtol=1e-4, atol=1e-5)
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
    assert len(configs) == 2 and all(config.baseline for config in configs)
    for config in configs:
        assert 1 / (1 + (config.window - 1) * math.exp(-2 * config.logit_scale)) > 0.99


def test_attention_by_position_is_a_sum_of_waves():
    """The logits of a head depend on the distance alone, and start with their peak, of 12, h step tokens ago."""
    block = Transformer(tiny(**BY_POSITION, seq_len=200, window=200, width=64)).blocks[1]
    T, n = 200, 16
    q_HTE, k_HTE = (x_HTE.double() for x_HTE in waves(block, T))
    logits_HTT = q_HTE @ k_HTE.mT
    angle_TE = torch.arange(T)[:, None] * block.speeds.double()
    query_HE = block.query_HE.detach().double()
    table_HT = query_HE[:, :n] @ angle_TE.cos().T + query_HE[:, n:] @ angle_TE.sin().T
    for t in (0, 50, 199):
        assert torch.allclose(logits_HTT[:, t, :t + 1].flip(1), table_HT[:, :t + 1], atol=1e-3)  # angles of float32
    assert table_HT.argmax(1).tolist() == [0, 2] and torch.allclose(table_HT.amax(1), torch.tensor(12.0).double())
    assert (table_HT.amax(1) - table_HT[:, 40:].amax(1)).min() > 6
    assert 2 * math.pi / block.speeds.min() > 200 and 3 < 2 * math.pi / block.speeds.max() < 4


@pytest.mark.parametrize("changes", [dict(), dict(key_offset=True), dict(key_offset=True, baseline=True, constraint="none")])
def test_attention_sees_its_own_document_only(changes):
    model = random_model(**changes)
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
        block.forward = lambda x, mask, first: seen.append(int(mask[0, -1].sum())) or x
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
    assert sorted(set(windows)) == list(range(128, 1793, 128))
    assert windows.index(1792) / 6200 == pytest.approx(0.963, abs=1e-3)
    for window in (1, 128, 129, 190, 200, 300, 640):  # in the end all blocks that the model sees when it is used
        config = tiny(window=window)
        assert nano.schedule(config, config.steps)[2] == 128 * math.ceil(window / 128)


@pytest.mark.parametrize("changes", [dict(), BY_POSITION, MIXED])
def test_groups_of_parameters(changes):
    """Each weight in one group, of its owner; limits and learning rates by role; momentum is Muon's alone."""
    config = tiny(**changes, vocab=250, w_max="1,2,3,4,5,6,7", lr=0.3, head_lr=0.2, embed_lr=0.1, bias_lr=0.4)
    model = Transformer(config)
    found = {}
    for rank in range(3):
        exchange = nano.Exchange(model, rank, 3)
        optimizers = nano.build_optimizers(model, config, exchange, constraints.soft_cap, torch.float32)
        nano.set_learning_rates(optimizers, 0.5)
        nano.set_momentum(optimizers, 0.9)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    assert exchange.names[p] not in found and exchange.owner[p] == rank
                    found[exchange.names[p]] = group["lr"], group.get("momentum"), group.get("w_max")
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert found["blocks.0.w_in"] == (0.15, 0.9, 5) and found["blocks.1.o"] == (0.15, 0.9, 4)
    assert found["head_XD"] == (0.1, 0.9, pytest.approx(7 * (250 / 256) ** 0.5))
    assert found["embedding_VD"] == (0.05, None, None)
    assert found.get("blocks.0.query_HE") == ((0.2, None, None) if changes else None)


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
    """Words of a name, not letters in it, in order; other files in the folder change nothing. `~` is a home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ["x_train_000002.bin", "x_train_000001.bin", "x_val_000000.bin", "medieval-train-3.bin", "trains.bin",
             "interval.bin", "TRAIN_4.txt"]
    for i, name in enumerate(names):
        shard(tmp_path / name, [i] * 200)
    train, validation, _ = nano.load_data(tiny(data="~"))
    assert [tokens[0] for _, tokens in train.shards] == [3, 1, 0]
    assert [tokens[0] for _, tokens in validation.shards] == [2]
    (tmp_path / "fineweb10B").mkdir()
    for i, name in enumerate(["val_000000", "train_000001", "train_000002", "train_000003"]):
        shard(tmp_path / "fineweb10B" / f"fineweb_{name}.bin", [i] * 200)
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    for batch, read in ((4, [1]), (100_000, [1, 2])):  # as many as the run needs
        train, _, _ = nano.load_data(tiny(data="fineweb", steps=50, batch=batch))
        assert [tokens[0] for _, tokens in train.shards] == read


def test_held_out_tokens_are_of_the_training_text(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint16)
    for name, part in (("train_0", tokens[:3000]), ("train_1", tokens[3000:4000]), ("val_0", tokens[4000:])):
        shard(tmp_path / f"{name}.bin", part)
    tokens = torch.from_numpy(tokens[:4000].astype(np.int64))
    for val_tokens, held in ((50, 51), (10**6, 100)):
        config = tiny(data=str(tmp_path), holdout=True, val_tokens=val_tokens, seq_len=16)
        train, validation, name = nano.load_data(config)
        assert torch.equal(train.read(0, 10**6), tokens[:-held])
        assert torch.equal(validation.read(0, 10**6), tokens[-held:]) and "held out" in name
    train, validation, _ = nano.load_data(tiny(data="stand-in", holdout=True, seq_len=16))
    whole = nano.load_data(tiny(data="stand-in", seq_len=16))[0].read(0, 10**8)
    assert torch.equal(torch.cat([train.read(0, 10**8), validation.read(0, 10**8)]), whole)


def sparse(path, count, size):
    """A shard whose header says `count` tokens, of a size that takes no room on the disk."""
    shard(path, [])
    path.write_bytes(np.array([20240520, 1, count], np.int32).tobytes() + path.read_bytes()[12:])
    os.truncate(path, size)


@pytest.mark.parametrize("break_it, says", [
    (lambda p: p.write_bytes(b"\0" * 2000), "no whole shard"), (lambda p: p.write_bytes(b""), "no whole shard"),
    (lambda p: p.write_bytes(p.read_bytes()[:-1]), "no whole shard"),
    (lambda p: p.write_bytes(p.read_bytes()[:8]), "no whole shard"),
    (lambda p: p.write_bytes(p.read_bytes() + p.read_bytes()[1024:]), "no whole shard"),  # as many uint32
    (lambda p: shard(p, []), "no whole shard"), (lambda p: sparse(p, -256, 512), "no whole shard"),
    (lambda p: (p.unlink(), p.mkdir()), "no whole shard"),
    (lambda p: shard(p, [299] * 300), "holds token 299"),
    (lambda p: shard(p, [7] * 100 + [299] * 200), "holds token 299"),
    (lambda p: shard(p.with_name("x_val_000000.bin"), [7] * 290 + [299] * 10), "holds token 299"),
    (lambda p: p.unlink(), "0 files *.bin"), (lambda p: p.rename(p.with_suffix(".txt")), "results/prepare.py TEXT"),
    (lambda p: shard(p, range(10)), "10 tokens in 1 files *.bin with the word train"),
    (lambda p: shard(p.with_name("x_val_000000.bin"), [7]), "1 tokens in 1 files *.bin with the word val")])
def test_bad_shards_are_named(tmp_path, break_it, says):
    """In one line, before a run folder is made, but for a token that only a later step meets."""
    path = shard(tmp_path / "x_train_000001.bin", [7] * 300)
    shard(tmp_path / "x_val_000000.bin", [7] * 300)
    break_it(path)
    with pytest.raises(UserError) as error:
        run(tmp_path, data=str(tmp_path))
    one_clear_line(error)
    assert says in str(error.value) and ("_00000" in str(error.value) or "--data" in str(error.value))
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_shards_of_any_length_are_only_mapped(tmp_path):
    """Of 4 GB of zeros, a header and no blocks on the disk, what is asked for is read; one sequence is enough."""
    sparse(tmp_path / "x_train_1.bin", 2**31 - 1, 2**32 + 1022)
    shard(tmp_path / "x_val_1.bin", [7] * 2)
    _, summary = run(tmp_path, data=str(tmp_path))
    assert math.isfinite(summary["val_loss"])
    shard(tmp_path / "x_train_1.bin", [7] * 25)
    run(tmp_path / "short", data=str(tmp_path))


# ---- runs ------------------------------------------------------------------------------------------------------------
def test_it_learns_and_reports(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(nano, "draw", DRAW)
    settings = dict(steps=60, width=32, hidden=64, batch=8, micro_batch=8, evals=3)
    out, summary = run(tmp_path, **settings)
    losses = losses_of(out)
    assert losses[0] == pytest.approx(math.log(256), abs=0.02) and losses[-1] < 3.6 and len(losses) == 60
    log = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert summary["lipschitz_log10"] < log["lipschitz_log10"] < summary["lipschitz_product_log10"]  # tuned and not
    needed = ("script preset params steps val_loss val_accuracy lipschitz_log10 lipschitz_product_log10 lipschitz_norm "
              "max_weight_norm w_max loss_temperature train_seconds ms_per_step data device dtype seed torch "
              "tokens_per_second memory_gib activations norms baseline processes").split()
    assert set(needed) <= summary.keys() and (out / "curves.png").stat().st_size > 10_000
    text = capsys.readouterr().out
    assert "Tuning the certificate" in text and "certificate: the smaller" in text and f"--sample {out}" in text
    assert nano.main(tiny(out=str(out), **settings)) == summary and "is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--lr 0.1, not 0.7"):
        nano.main(tiny(out=str(out), **settings, lr=0.7))


def test_compilation_and_evaluations_are_not_timed(tmp_path, monkeypatch):
    """Ten steps of 100 s, the others of 1 s, evaluations of 1000 s: 1000 ms a step in both lines of the log."""
    now, steps = [0.0], []
    evaluate = nano.evaluate

    def step(exchange):
        steps.append(exchange)
        now[0] += 100 if len(steps) <= 10 else 1

    def slow_evaluate(*arguments):
        now[0] += 1000
        return evaluate(*arguments)

    monkeypatch.setattr(nano.Exchange, "share_weights", step)
    monkeypatch.setattr(nano, "evaluate", slow_evaluate)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    out, summary = run(tmp_path, steps=40, evals=2)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [record["ms_per_step"] for record in log] == [1000, 1000]
    assert summary["train_seconds"] == 40 and summary["tokens_per_second"] == 4 * 24


@pytest.mark.parametrize("changes", [
    dict(baseline=True, constraint="none"), BY_POSITION, dict(constraint="stiefel"), dict(constraint="hammer"),
    dict(constraint="weight_decay"), dict(constraint="spectral_weight_decay"),
    dict(constraint="specnorm", dtype="bfloat16"), dict(constraint="none", final_scale=3.0)])
def test_every_kind_of_run(changes, tmp_path):
    out, summary = run(tmp_path, **changes)
    config, model, state = nano.load_checkpoint(out)
    assert math.isfinite(summary["val_loss"]) and summary["baseline"] == config.baseline == ("baseline" in changes)
    assert (summary["lipschitz_log10"] == "inf") == config.baseline
    assert certificate(model, free=nano.tuned(model))["log10"] == float(summary["lipschitz_log10"])
    assert state["step"] == 6 and len(state["log"]) == 2


def test_validation_is_of_the_tokens_asked_for():
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
        exchange.all_reduce = lambda x, op=None: parts.append(x) or x
        nano.evaluate(model, validation, 24, torch.float64, exchange)
    assert sum(parts[::2])[0].item() == pytest.approx(total, rel=1e-12) and sum(parts[::2])[2].item() == 130


@pytest.mark.parametrize("batch", [1, 8])
def test_a_token_seen_once_moves_as_far_whatever_the_batch(batch, tmp_path, monkeypatch):
    """At a head so small that its gradients are 1e-9: Adam's eps, on sums, is below; on means it would not be."""
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


def test_sampling(tmp_path, capsys, monkeypatch):
    """The same for a seed; 0 is greedy, as is the best token alone; the prompt stands in front."""
    out, _ = run(tmp_path)
    capsys.readouterr()
    texts = []
    for changes in (dict(), dict(), dict(temperature=0.0), dict(temperature=1e-9), dict(seed=1)):
        texts.append(nano.main(Config.of(sample=str(out), prompt="def f", length=40, **changes)))
        assert capsys.readouterr().out == texts[-1] + "\n"
    assert texts[0] == texts[1] != texts[4] and texts[2] == texts[3]
    assert all(text.startswith("def f") and 5 < len(text) <= 45 for text in texts)
    bytes_of_two_characters = iter("é☃".encode())
    monkeypatch.setattr(torch, "multinomial", lambda *a, **k: torch.tensor(next(bytes_of_two_characters)))
    assert nano.main(Config.of(sample=str(out), prompt="def f", length=5)) == "def fé☃"


def test_the_last_evaluation_sees_the_whole_window(tmp_path, monkeypatch):
    """Though no step of so short a run does: verify_lipschitz.py and sampling see it all."""
    windows, evaluate = [], nano.evaluate

    def noted(model, validation, window, *rest):
        windows.append(window)
        return evaluate(model, validation, window, *rest)

    monkeypatch.setattr(nano, "evaluate", noted)
    run(tmp_path, steps=4, evals=2, seq_len=640, window=640, batch=2)
    assert nano.schedule(tiny(steps=4, window=640), 3)[2] < windows[-1] == 640


def test_owners_share_the_work(monkeypatch):
    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda W, generator: W)
    monkeypatch.setattr(torch, "randn", lambda *shape, generator: torch.zeros(shape))
    model = Transformer(nano.parse_arguments(["--preset", "cap1"]))
    for world_size in (1, 2, 3, 8):
        owner = nano.Exchange(model, 0, world_size).owner
        assert set(owner.values()) == set(range(world_size)) and len(owner) == len(list(model.parameters()))
        load = [0] * world_size
        for _, W in model.matrices():
            load[owner[W]] += W.numel() * min(W.shape)
        assert max(load) <= max(1.1 * sum(load) / world_size, 50304 * 768 * 768)


# ---- several processes -----------------------------------------------------------------------------------------------
def test_one_two_and_four_processes_are_the_same_run(tmp_path):
    """In float64 to 1e-9 over 50 steps; all replicas have the same bits at both evaluations."""
    settings = dict(dtype="float64", steps=50, micro_batch=1, evals=2)
    alone, _ = run(tmp_path, **settings)
    for processes in (2, 4):
        folder = tmp_path / str(processes)
        good, output = spread(folder, processes, "note", *flags(**settings, out=folder / "run"))
        assert good and output.count("from step 0") == 1, output[-2000:]
        assert losses_of(folder / "run") == pytest.approx(losses_of(alone), abs=1e-9)
        assert json.loads((folder / "run" / "summary.json").read_text())["processes"] == processes
        hashes = [(folder / f"rank{rank}").read_text() for rank in range(processes)]
        assert len(set(hashes)) == 1 and len(hashes[0].split()) == 2


def test_ctrl_c_stops_all_processes_and_the_run_goes_on(tmp_path):
    """It reaches one of two. Both stop at the next look, and save; the same command goes on, on one or on two
    processes: in float64 the same weights to 1e-9 as of a run that was left alone, and on one process the same bits."""
    settings = dict(dtype="float64", steps=20, micro_batch=1, evals=2)
    whole, _ = run(tmp_path / "whole", **settings)
    out = tmp_path / "stopped"
    words = flags(**settings, out=out)
    good, output = spread(tmp_path / "first", 2, "ctrl-c", *words)
    assert not good and output.count(f"saved at step 10; to resume, repeat the command with --out {out}") == 1
    assert checkpoint(out)["step"] == 10 and not (out / "summary.json").exists() and "Traceback" not in output
    shutil.copytree(out, tmp_path / "other")
    good, output = spread(tmp_path / "second", 2, "none", *words)
    assert good and "from step 10" in output, output[-2000:]
    nano.main(tiny(**settings, out=str(tmp_path / "other")))
    for folder in (out, tmp_path / "other"):
        a, b = checkpoint(whole), checkpoint(folder)
        assert all(torch.allclose(a["model"][name], W, rtol=0, atol=1e-9) for name, W in b["model"].items())
        assert losses_of(folder) == pytest.approx(losses_of(whole), abs=1e-9) and b["step"] == 20


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    """Stopped by Ctrl-C between two evaluations. Not of a constraint that waits: it then runs at other steps."""
    settings = dict(steps=30, micro_batch=1, evals=2, constrain_every=1)
    whole, _ = run(tmp_path / "whole", **settings)
    steps, share_weights = [], nano.Exchange.share_weights

    def interrupted(exchange):
        steps.append(exchange)
        if len(steps) == 17:
            os.kill(os.getpid(), signal.SIGINT)
        return share_weights(exchange)

    monkeypatch.setattr(nano.Exchange, "share_weights", interrupted)
    with pytest.raises(KeyboardInterrupt, match="saved at step 17; to resume"):
        run(tmp_path / "stopped", **settings)
    out, _ = run(tmp_path / "stopped", **settings)
    a, b = checkpoint(whole), checkpoint(out)
    assert same(a["model"], b["model"]) and same(a["optimizers"], b["optimizers"]) and len(steps) == 30


def test_a_killed_worker_is_restarted_by_torchrun_and_nothing_is_lost(tmp_path):
    """SIGKILL of one of two workers between two checkpoints; torchrun starts both again: bit-identical weights."""
    settings = flags(steps=9, micro_batch=1, evals=3, dtype="float32")
    killed = start(WORKER, "kill", tmp_path, *settings, "--out", tmp_path / "killed", processes=2, restarts=1)
    good, output = spread(tmp_path / "spread", 2, "none", *settings, "--out", tmp_path / "whole")
    assert good, output[-4000:]
    status, output, errors = end(killed)
    assert status == 0 and "from step 3" in output, errors[-4000:]
    a, b = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "killed")
    assert a["step"] == b["step"] == 9 and same(a["model"], b["model"]) and same(a["optimizers"], b["optimizers"])


def test_an_error_on_one_rank_ends_all(tmp_path):
    """An exception, a full disk, a bad token of one rank, a damaged checkpoint, a wrong flag: all gone within a
    minute, with one line. (A killed process: the test above.)"""
    data = tmp_path / "data"
    data.mkdir()
    tokens = np.full(24 * 40, 7)
    tokens[24 * 11 + 3] = 299  # in the last sequence of the third step, which is of rank 1
    shard(data / "train.bin", tokens), shard(data / "val.bin", tokens[:100])
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "checkpoint.pt").write_bytes(b"damaged")
    cases = {
        "exception": (["--out", tmp_path / "exception"], "ValueError: a fault of one rank"),
        "disk": (["--out", tmp_path / "disk"], "[Errno 28] No space left on device"),
        "token": (["--out", tmp_path / "token", "--data", data], f"{data / 'train.bin'}: holds token 299"),
        "checkpoint": (["--out", damaged], f"{damaged / 'checkpoint.pt'}: is no checkpoint"),
        "flag": (["--batch", 3], "--batch 3: must be a multiple of 2 process(es)"),
    }
    settings = flags(micro_batch=1, steps=20)
    ended, seconds = {}, {}
    for kind in cases:
        began = time.time()
        ended[kind] = spread(tmp_path / f"{kind}_spread", 2, kind, *settings, *cases[kind][0])
        seconds[kind] = time.time() - began
    for kind, (good, errors) in ended.items():
        assert not good and cases[kind][1] in errors, (kind, errors[-3000:])
        own = [line for line in errors.splitlines() if line.startswith("nanogpt_lipschitz.py: ")]
        assert len(own) == (kind != "exception"), (kind, own)
        assert errors.count("ValueError: ") == (kind == "exception"), (kind, errors)
        assert "RuntimeError" not in errors and "Connection" not in errors, (kind, errors)  # of whoever lost a partner
    assert max(seconds.values()) < 60
    assert not list(tmp_path.rglob("*.part"))


# ---- CUDA without a GPU: steps of main on fake tensors, see results/memory.py ----------------------------------------
SMALL = ["--preset", "cap1", "--blocks", "2", "--residual_scale", "1", "--seq_len", "8192"]
FULL = ("cap1",)  # at full size, as half a minute is enough
FAKE = {**{name: case for name, case in zip(memory.PRESETS, memory.CASES) if name in FULL}, "two micro-batches": [[*SMALL, "--batch", "2"], 0, 1, 99, False],
        **{name: [[*SMALL, "--batch", "1", "--constraint", name], 0, 1, 99, False]
           for name in ("spectral_weight_decay", "specnorm", "stiefel", "soft_cap", "hard_cap")},
        **{f"rank {rank}": [SMALL, rank, 8, 1, False] for rank in (0, 3, 7)}}
# Waits for the device that stay: {steps: why}. Each takes a function of constraints.py, and what it waits for.
SVD = "by_svd"  # whether some matrix needs an SVD instead: one look a step and shape of matrices
EIGH = "hard_cap linalg.eigh"  # the host reads its error code
FIRST = [{SVD, EIGH}, set(), set()]  # a hard cap in a run's first step, and each 64th, as nothing is known of weights
WAITS = {
    "cap1": FIRST, "soft_cap": FIRST, "two micro-batches": FIRST,
    "stiefel": [{SVD}] * 3,  # msign is checked at every step
    "hard_cap": [{SVD, EIGH}, set(), {SVD, EIGH}]}  # it waits a step or more where it can


def short(wait):
    """function: line -> function, or function linalg.eigh."""
    function, line = wait.split(": ", 1)
    return f"{function} linalg.eigh" if "linalg.eigh" in line else function


@pytest.mark.skipif(not memory.possible(), reason="needs g++, Linux, and a CPU build of torch")
def test_on_fake_cuda():
    """One test, as all cases are of one process."""
    found = dict(zip(FAKE, memory.on_fake_cuda(list(FAKE.values()))))
    for name in FAKE:
        if "rank" not in name:
            steps_wait_only_where_they_are_logged(name, found[name])
    peak_memory_is_what_results_say([found[name] for name in FULL])
    ranks_make_the_same_collectives_in_the_same_order(found)


def steps_wait_only_where_they_are_logged(name, found):
    """Backward included, compiled at full size for two presets: one copy to the GPU for each micro-batch, no
    tensor of the CPU in a graph, and nothing that looks at a result before the check for divergence in the last step,
    but what WAITS lists."""
    assert found["end"] == "Logged" and len(found["steps"]) == 4, name
    for step, expected in zip(found["steps"], WAITS.get(name, [set()] * 3)):
        assert {short(wait) for wait in step["waits"]} == expected, name
        if step is not found["steps"][0]:
            assert step["copies"] == ["aten._to_copy.default"] * (2 if "two" in name else 1), name


def peak_memory_is_what_results_say(found):
    with open(memory.TABLE) as f:
        table = [row for row in csv.DictReader(f) if row["preset"] in FULL]
    for row, now in zip(table, memory.rows(FULL, found), strict=True):
        assert row["preset"] == now["preset"]
        for key in list(now)[1:]:
            assert float(row[key]) == pytest.approx(now[key], rel=0.1), (row["preset"], key)


def ranks_make_the_same_collectives_in_the_same_order(found):
    """Of the first step: each gradient to its owner, each weight from it. Else sums would be of different matrices."""
    calls = [found[f"rank {rank}"]["steps"][0]["calls"] for rank in (0, 3, 7)]
    assert calls[0] == calls[1] == calls[2] and len(calls[0]) == 28
    calls = found["cap1"]["steps"][1]["calls"]
    assert [call[0] for call in calls] == ["reduce"] * 74 + ["broadcast"] * 74
    assert {call[2] for call in calls} == set(range(8))


# ---- bad input -------------------------------------------------------------------------------------------------------
def test_help_is_complete(capsys):
    with pytest.raises(SystemExit) as stop:
        nano.parse_arguments(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(name in text for name in nano.PRESETS)
    assert all("--" + f.name in text for f in dataclasses.fields(Config))


@pytest.mark.parametrize("wrong, says", [
    (["--preset", "huge"], "must be one of"), (["--heads", "3"], "must divide"), (["--steps", "0"], "at least 1"),
    (["--micro_batch", "3"], "x --micro_batch 3;"), (["--batch", "3"], "--batch 3: must be a multiple"),
    (["--w_max", "1,2"], "or 7"), (["--w_max", "nan"], "a number above 0"), (["--lr", "nan"], "finite"),
    (["--activation", "relu"], "must be one of"), (["--hidden", "33", "--activation", "maxmin"], "even for maxmin"),
    (["--baseline"], "none for the baseline"), (["--residual_scale", "99"], "at most 2 * blocks"),
    (["--constrain_every", "100"], "every is 100"), (["--momentum", "2"], "momentum is 2.0"),
    (["--device", "tpu9"], "cannot be used here"), (["--data", "/nowhere"], "results/prepare.py"),
    (["--constraint", "huge"], "--constraint huge"), (["--sample", "nowhere"], "is no checkpoint"),
    (["--preset", "cap1"], "--seq_len 49152: above 8192 it needs a GPU")])
def test_wrong_flags(wrong, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        nano.main(nano.parse_arguments(wrong))
    assert says in str(error.value) and "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("variables", [dict(), dict(RANK="0")])
def test_several_processes_need_torchrun(variables, monkeypatch):
    for name, value in dict(variables, WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="expected.*start the script by torchrun") as error:
        nano.main(tiny())
    one_clear_line(error)


def test_endings(tmp_path):
    """One line and status 2; nothing is left of a start that failed; Ctrl-C saves and says how to go on."""
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
    assert status == 2 and errors.count("\n") == 1 and "--heads 3: 4 * heads must divide the width" in errors
    status, _, errors = end(failed)
    assert status == 2 and errors.count("\n") == 1 and "holds token 299" in errors
    assert not (tmp_path / "failed").exists()
    status, _, errors = end(stopped)
    folder = Path("runs/nanogpt_lipschitz_tiny_paper_seed0")
    assert status == 130 and errors.splitlines()[-1].endswith(f"to resume, repeat the command with --out {folder}")
    step = checkpoint(tmp_path / folder)["step"]
    assert f"saved at step {step}; " in errors and (tmp_path / folder / "config.json").exists()


def test_damaged_checkpoints_are_named(tmp_path):
    out, _ = run(tmp_path, blocks=1)
    state = checkpoint(out)
    config = tiny(out=str(out), blocks=1)
    wrong = [[1], dict(script="other"), dict(state, model=dict()), b"damaged",
             dict(state, config={**state["config"], "unknown": 1})]
    for content in wrong:
        if content == b"damaged":
            (out / "checkpoint.pt").write_bytes(content)
        else:
            torch.save(content, out / "checkpoint.pt")
        with pytest.raises(UserError, match="is no checkpoint of nanogpt_lipschitz.py") as error:
            nano.main(config)
        one_clear_line(error)


def test_another_text_than_the_runs_is_refused(tmp_path):
    shard(tmp_path / "train.bin", [7] * 300), shard(tmp_path / "val.bin", [7] * 300)
    out, _ = run(tmp_path, data=str(tmp_path))
    (out / "summary.json").unlink()
    with pytest.raises(UserError, match="tokens to train, but the run began with 300"):
        nano.main(tiny(out=str(out)))


def test_divergence_stops_and_names_the_matrix(tmp_path):
    with pytest.raises(UserError, match="diverged, .* is not finite"):
        run(tmp_path, embed_lr=1e30, lr=1e30, constraint="none", steps=20, dtype="float32")
