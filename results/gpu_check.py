"""Does a GPU hold what the code holds on a CPU? Run this first, and send the JSON.

    python results/gpu_check.py                          # on one GPU or more: some minutes, no data
    torchrun --standalone --nproc_per_node 8 results/gpu_check.py      # with processes of your own
    python results/gpu_check.py --device cpu --small     # the same code, small: half a minute
    python results/gpu_check.py --only maps,cap1         # some of the parts, see --help

Each row is held or broken (against what is allowed), measured (nothing is allowed or forbidden), or
skipped. The exit status is 1 if one is broken. Most of the time goes into compilation; no part
begins after --minutes. FineWeb is looked for in $DATA_DIR/fineweb10B only, and takes about three
minutes more: --only fineweb.
"""

import argparse
import collections
import contextlib
import copy
import csv
import dataclasses
import functools
import gc
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import constraints  # noqa: E402
import muon  # noqa: E402
import nanogpt_lipschitz as nano  # noqa: E402
from nanogpt_lipschitz import TILE, Config, finite  # noqa: E402

STEP = 0.05  # how far above the limit a soft cap's matrices are
BEFORE = dict(msign=1.0, soft_cap=1 + STEP, hard_cap=1.5, specnorm=1.5)  # norms that maps are given
SHAPES = ((768, 768), (3072, 768), (768, 3072), (50304, 768))  # of cap1's matrices
SMALL_SHAPES = ((64, 64), (256, 64), (64, 256), (512, 64))
SMALL = dict(width=64, blocks=2, heads=2, hidden=128, vocab=500, seq_len=256, window=256,
             momentum_warmup=30)
LIMIT = 1e-4  # by which a norm may exceed its limit, relative
LOW_LIMIT = 0.012  # the same for a soft cap that computes in bfloat16: see its docstring
MAP_ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # relative, against float64
SOFT_CAP_ERROR = 0.008  # it takes away 3 %, so 0.05 would allow anything
ATTENTION_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.03}
LOSS_ERROR = {torch.float32: 5e-4, torch.bfloat16: 5e-3}  # of ten steps, against float64
SAME_RUN = 1e-3  # losses of a run that was stopped or spread; for weights ten times as much
LOG_LOSS = 6.4728  # the authors' validation loss of cap1 after 125 steps
LOG_ERROR = 0.1
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")


@dataclasses.dataclass
class Run:
    """What every part needs, and the rows of the table."""
    device: torch.device
    small: bool
    folder: Path  # temporary
    launched: dict = dataclasses.field(default_factory=dict)  # what torchrun has said
    part: str = ""
    rows: list = dataclasses.field(default_factory=list)

    def add(self, what, measured, allowed=None, verdict=None):
        """A row. What is measured holds up to and including what is allowed."""
        if verdict is None:
            verdict = "measured"
            if allowed is not None:
                verdict = "held" if measured <= allowed else "broken"  # NaN: broken
        if isinstance(measured, float):
            measured = finite(measured)
        row = dict(part=self.part, what=what, measured=measured, allowed=allowed, verdict=verdict)
        self.rows.append(row)
        print_row(row)

    def skip(self, what, why):
        self.add(what, None, verdict=f"skipped: {why}")

    def compiles(self):
        """Whether torch.compile can make kernels here."""
        if self.device.type == "cuda":
            return nano.can_compile(self.device)
        return bool(shutil.which("g++"))

    def dtypes(self):
        """The precisions that the device knows."""
        known = [torch.float32]
        if self.device.type == "cpu" or muon.fast_dtype(self.device) == torch.bfloat16:
            known.append(torch.bfloat16)
        return known

    def config(self, preset, **changes):
        """The settings of a run on random tokens: as published, or small ones."""
        settings = dict(steps=20, evals=1, batch=2, micro_batch=1, device=self.device.type)
        if changes.pop("small", self.small):
            mix = Config.of(preset).residual_scale / Config.of(preset).blocks
            settings.update(SMALL, residual_scale=mix * SMALL["blocks"])
        settings.update(changes)
        config = Config.of(preset, **settings)
        config.val_tokens = config.seq_len
        config.data = str(self.folder / f"tokens{config.vocab}")
        config.out = config.out or tempfile.mkdtemp(dir=self.folder)
        make_shards(Path(config.data), config.vocab)
        return config


def print_row(row):
    numbers = []
    for number in (row["measured"], row["allowed"]):
        if isinstance(number, float):
            number = f"{number:.5g}"
        numbers.append("" if number is None else str(number))
    print(f"  {row['what']:72} {numbers[0]:>12} {numbers[1]:>8}  {row['verdict']}", flush=True)


def label(dtype):
    return str(dtype).removeprefix("torch.")


def make_shards(folder, vocab):
    """Random tokens, small ones more often, and documents of some hundred tokens."""
    if folder.exists():
        return
    folder.mkdir()
    generator = np.random.default_rng(0)
    for kind, count in (("train", 2**21 + 1), ("val", 2**16 + 1)):
        tokens = vocab * generator.random(count) ** 3
        tokens[generator.random(count) < 1 / 300] = vocab - 1
        header = np.zeros(nano.HEADER, np.int32)
        header[:3] = nano.MAGIC, nano.VERSION, count
        nano.write(folder / f"{kind}.bin", header.tobytes() + tokens.astype(np.uint16).tobytes())


# ==== Maps: msign and constraints against float64 on the CPU ======================================
def largest_singular_value(W):
    """In float64 on the CPU, by eigenvalues: none of the project's functions."""
    W = W.detach().cpu().double()
    A = W @ W.T if len(W) <= W.shape[1] else W.T @ W
    return torch.linalg.eigvalsh(A)[-1].sqrt().item()


def distance(x, expected):
    """Relative, in float64 on the CPU."""
    x, expected = x.cpu().double(), expected.cpu().double()
    return ((x - expected).norm() / expected.norm()).item()


def apply_map(name, W):
    """W through a map: to singular values of 1, or to an RMS->RMS norm of at most 1."""
    if name == "msign":
        return muon.msign(W)
    return getattr(constraints, name)(W, 1.0, STEP)


def allowed_excess(name, dtype, device):
    """By how much a norm may be above 1, as the docstrings promise; None where they do not."""
    if name == "msign":
        return muon.MSIGN_MAX[dtype] - 1
    if dtype == torch.bfloat16:
        return None  # guarantees are for weights in float32 and float64
    if name == "soft_cap" and constraints.fast_dtype(device) == torch.bfloat16:
        return LOW_LIMIT
    return LIMIT


def check_maps(run):
    generator = torch.Generator().manual_seed(0)
    shapes = SMALL_SHAPES if run.small else SHAPES
    matrices = []
    for shape in shapes:
        W = torch.randn(shape, generator=generator)
        matrices.append(W / largest_singular_value(W))
    for name, norm in BEFORE.items():
        found = {}  # {dtype: [(norm - 1, distance to float64)]}
        for W in matrices:
            scale = 1.0  # singular value of a norm of 1
            if name != "msign":
                scale = constraints.sigma_per_norm(W)
            W = W * norm * scale
            expected = apply_map(name, W.double())
            for dtype in run.dtypes():
                new = apply_map(name, W.to(run.device, dtype))
                pair = largest_singular_value(new) / scale - 1, distance(new, expected)
                found.setdefault(dtype, []).append(pair)
        for dtype, pairs in found.items():
            add_map(run, name, dtype, f"{len(pairs)} shapes", map(largest, zip(*pairs)))

    for name, norm in BEFORE.items():  # on a CPU one is enough to run this code
        if not run.compiles() or run.device.type == "cpu" and name != "soft_cap":
            run.skip(f"{name} under torch.compile", "only where there is a GPU that compiles")
            continue
        dtypes = [torch.float32]  # of weights
        if name == "msign":
            dtypes = run.dtypes()
        for dtype in dtypes:
            W = (matrices[0] * norm).to(run.device, dtype)
            new = torch.compile(functools.partial(apply_map, name), dynamic=False)(W)
            pair = largest_singular_value(new) - 1, distance(new, apply_map(name, W))
            add_map(run, name, dtype, "torch.compile, against eager", pair)


def largest(values):
    """The largest, or NaN if one is: Python's max may drop it."""
    return torch.tensor(list(values), dtype=torch.float64).max().item()


def largest_difference(losses, others):
    return largest(abs(a - b) for a, b in zip(losses, others, strict=True))


def add_map(run, name, dtype, how, pair):
    """Two rows: of the norm, and of the distance to what is expected."""
    excess, error = pair
    allowed = allowed_excess(name, dtype, run.device)
    allowed_error = MAP_ERROR[dtype]
    if allowed == LOW_LIMIT:  # it computes in bfloat16, but only what it takes away, a few percent
        allowed_error = MAP_ERROR[torch.bfloat16]
    if name == "soft_cap" and allowed_error == MAP_ERROR[torch.bfloat16]:
        allowed_error = SOFT_CAP_ERROR
    name = f"{name}, {label(dtype)}, {how}"
    run.add(f"{name}: largest norm - 1", excess, allowed)
    run.add(f"{name}: distance", error, allowed_error)


# ==== Attention: flex_attention against a dense mask in float64 on the CPU ========================
def positions(mask):
    """(B, T, T): what flex_attention sees, by the lists of a BlockMask and by its function."""
    device = mask.kv_indices.device
    B, _, Q, _ = mask.kv_indices.shape
    t = torch.arange(Q * TILE, device=device)
    b = torch.arange(B, device=device)[:, None, None]
    tiles = []
    lists = ((mask.kv_num_blocks, mask.kv_indices),
             (mask.full_kv_num_blocks, mask.full_kv_indices))
    for count_B1Q, index_B1QQ in lists:
        listed_BQQ = torch.arange(Q, device=device) < count_B1Q[:, 0, :, None]
        tile_BQQ = torch.zeros_like(listed_BQQ).scatter(2, index_B1QQ[:, 0].long(), listed_BQQ)
        tiles.append(tile_BQQ.repeat_interleave(TILE, 1).repeat_interleave(TILE, 2))
    some_BTT, whole_BTT = tiles
    return some_BTT & mask.mask_mod(b, 0, t[:, None], t) | whole_BTT


def attention_and_gradients(attention, parameters, x_BTD, mask, weights_BTD):
    """[output, gradients of a weighted sum of it], those of the input first."""
    x_BTD = x_BTD.detach().requires_grad_()
    y_BTD = attention(x_BTD, mask)
    loss = (y_BTD * weights_BTD.to(y_BTD)).sum()
    return [y_BTD.detach(), *torch.autograd.grad(loss, [x_BTD, *parameters])]


def random_block(config):
    """A block with random matrices, and without an MLP."""
    generator = torch.Generator().manual_seed(0)
    block = nano.Block(config, 3)
    del block.w_in, block.w_out
    for _, W in block.matrices():
        torch.nn.init.orthogonal_(W, generator=generator)
    return block


def check_attention(run):
    generator = torch.Generator().manual_seed(0)
    T = 2 * TILE if run.small else 8 * TILE
    starts_BT = torch.rand(2, T, generator=generator) < torch.tensor([[0.0], [1 / 100]])
    docs_BT = starts_BT.long().cumsum(1)
    wrong = 0
    for blocks in (1, 2, 5):
        mask = nano.block_mask(docs_BT.to(run.device), blocks)
        wrong += (positions(mask).cpu() != nano.dense_mask(docs_BT, blocks)).sum().item()
    run.add("block_mask: positions that differ from dense_mask, of 3 windows", wrong, 0)

    on_cpu = run.device.type == "cpu"
    build_mask = nano.block_mask if on_cpu or run.compiles() else nano.dense_mask
    windows = (1, 2, 5)
    if on_cpu:  # flex_attention, not compiled, has no backward pass, and does not see the lists
        windows = (5,)
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        run.skip("gradients of flex_attention, its windows", "torch has none on a CPU")
    for preset, kind in (("cap1", "by content"), ("tight", "by position")):
        config = run.config(preset, seq_len=T)
        block = random_block(config)
        exact = copy.deepcopy(block).double()
        block.to(run.device)
        for dtype in run.dtypes():
            torch._dynamo.reset()
            before = counters["stats"]["unique_graphs"]
            graphs = []
            errors = []
            attention = block.attention
            if run.compiles() and not on_cpu:
                attention = torch.compile(block.attention, dynamic=False)
            for blocks in windows:
                x_BTD = torch.randn(2, T, config.width, generator=generator)
                weights_BTD = torch.randn(x_BTD.shape, generator=generator)
                expected = attention_and_gradients(
                    exact.attention, list(exact.parameters()), x_BTD.double(),
                    nano.dense_mask(docs_BT, blocks), weights_BTD)
                x_BTD = x_BTD.to(run.device, dtype)
                mask = build_mask(docs_BT.to(run.device), blocks)
                if on_cpu:
                    with torch.no_grad():
                        found = [attention(x_BTD, mask)]
                else:
                    found = attention_and_gradients(attention, list(block.parameters()), x_BTD,
                                                    mask, weights_BTD)
                graphs.append(counters["stats"]["unique_graphs"])
                errors += map(distance, found, expected)
            name = f"{kind}, {label(dtype)}"
            run.add(f"{name}: distance to a dense mask in float64", largest(errors),
                    ATTENTION_ERROR[dtype])
            if not on_cpu:
                add_graphs(run, f"{name}: graphs compiled for other windows", graphs, before)


def add_graphs(run, what, graphs, before):
    """A row: how many graphs were compiled from the first of these counts to the last."""
    if graphs[-1] == before:
        run.skip(what, "nothing is compiled here")
    else:
        run.add(what, graphs[-1] - graphs[0], 0)


# ==== Training ====================================================================================
@dataclasses.dataclass
class Training:
    """What was seen in a run of nanogpt_lipschitz.main."""
    model: torch.nn.Module = None
    optimizer: torch.optim.Optimizer = None  # Muon
    log: list = None
    losses: list = None
    excess: list = dataclasses.field(default_factory=list)  # after each step: norm by limit
    graphs_before: int = 0  # compiled, of all that this process has compiled
    graphs: list = dataclasses.field(default_factory=list)  # after each step
    marks: list = dataclasses.field(default_factory=list)  # of time, around what is measured


@torch.no_grad()
def largest_excess(optimizer):
    """The largest norm of a matrix by its limit, bounded from above to a relative 2e-6."""
    found = []
    for group in optimizer.param_groups:
        by_shape = {}
        for W in group["params"]:
            by_shape.setdefault(W.shape, []).append(W)
        for matrices in by_shape.values():
            norms = constraints.norm_bound(constraints.in_float64(torch.stack(matrices)), squarings=20)
            found.append(norms.max() / group["w_max"])
    return torch.stack(found).max()


def train(config):
    """nanogpt_lipschitz.main, watched, without certificate, table and picture. None on rank > 0."""
    torch._dynamo.reset()
    seen = Training(graphs_before=counters["stats"]["unique_graphs"])

    def after_step(optimizer, *rest):
        if isinstance(optimizer, muon.Muon):
            start = mark_time(optimizer.param_groups[0]["params"][0].device)
            seen.optimizer = optimizer
            seen.excess.append(largest_excess(optimizer))
            seen.graphs.append(counters["stats"]["unique_graphs"])
            seen.marks.append((start, mark_time(seen.excess[-1].device)))

    def report(config, model, out, log, *rest):
        seen.model = model
        seen.log = log
        seen.losses = [loss for record in log for loss in record["losses"]]
        return seen

    def certificate(model):
        return dict(log10=math.inf, product_log10=math.inf, norms=dict(not_measured=0.0),
                    max_weight_norm=0.0)

    hook = register_optimizer_step_post_hook(after_step)
    quiet = contextlib.redirect_stdout(io.StringIO())
    try:
        with quiet, mock.patch.multiple(nano, report=report, certificate=certificate):
            return nano.main(config)
    finally:
        hook.remove()


def mark_time(device):
    """Now, by the device's clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(start, end):
    if isinstance(start, float):
        return 1000 * (end - start)
    end.synchronize()
    return start.elapsed_time(end)


def fit_memory(run, config):
    """(config, GiB that a step should take): its sequences are halved until they fit."""
    if run.device.type == "cpu" or run.small:
        return config, None
    with open(ROOT / "results" / "memory.csv", newline="") as file:
        rows = {row.pop("preset"): row for row in csv.DictReader(file)}
    row = {name: float(gib) for name, gib in rows[config.preset].items()}
    of_tokens = row["peak"] - row["weights"] - row["states"]  # of one of 8 processes
    fixed = 2.25 * row["weights"]  # with the states of all
    memory = torch.cuda.get_device_properties(run.device).total_memory / 2**30
    published = config.seq_len
    if not run.compiles():
        config.seq_len = 2048  # with a mask of T x T
    while config.seq_len > 2048 and fixed + of_tokens * config.seq_len / published > 0.85 * memory:
        config.seq_len //= 2
    return config, fixed + of_tokens * config.seq_len / published


def check_training(run, preset):
    changes = {}
    if preset == "specnorm8":
        changes = dict(w_max="1")  # these few steps would not reach a norm of 8
    config, expected_gib = fit_memory(run, run.config(preset, **changes))
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seen = train(config)
    run.add(f"sequences of {config.seq_len} tokens: distance of the first loss to ln V",
            abs(seen.losses[0] - math.log(config.vocab)), 1e-3)
    run.add(f"loss after {config.steps} steps by the first", seen.losses[-1] / seen.losses[0], 0.995)
    if not config.baseline:
        allowed = LIMIT
        if config.constraint == "soft_cap":
            allowed = allowed_excess("soft_cap", torch.float32, run.device)
        excess = torch.stack(seen.excess).max().item() - 1
        run.add(f"largest norm by limit - 1, after each of {len(seen.excess)} steps", excess,
                allowed)
        run.add("the same after the last, by eigenvalues on the CPU", last_excess(seen.model),
                allowed)
    add_graphs(run, "graphs compiled after step 3", seen.graphs[2:], seen.graphs_before)

    tokens = config.batch * config.seq_len
    late = seen.marks[len(seen.marks) // 2:]  # of the steps that main has timed
    watching_ms = sum(milliseconds(*marks) for marks in late) / len(late)
    ms = 1000 * tokens / seen.log[-1]["tokens_per_second"] - watching_ms
    run.add("tokens per second", 1000 * tokens / ms)
    if not config.baseline:
        constraint = constraints.find_constraint(config.constraint)
        ms_of_constraint = muon_ms(seen.optimizer, constraint) - muon_ms(seen.optimizer, None)
        run.add("share of the constraint in a step of so few sequences", ms_of_constraint / ms)
    if run.device.type == "cuda":
        peak_gib = seen.log[-1]["memory_gib"]
        run.add("peak memory, GiB", peak_gib)
        if expected_gib:
            run.add("the same by that of results/memory.py", peak_gib / expected_gib)


def last_excess(model):
    """The largest norm by its limit of the last block's matrices and the head, - 1."""
    limits = model.config.limits()
    found = []
    for role, W in [*model.blocks[-1].matrices(), ("head", model.head_VD)]:
        norm = largest_singular_value(W) / constraints.sigma_per_norm(W)
        found.append(norm / limits[role] - 1)
    return largest(found)


def muon_ms(optimizer, constraint):
    """Milliseconds of a step on copies of the weights, with this constraint."""
    groups = []
    for group in optimizer.param_groups:
        copies = [torch.nn.Parameter(W.detach().clone()) for W in group["params"]]
        for W in copies:
            W.grad = torch.randn_like(W)
        groups.append(dict(group, params=copies, constraint=constraint))
    twin = muon.Muon(groups)
    for _ in range(4):
        twin.step()
    start = mark_time(copies[0].device)
    for _ in range(8):
        twin.step()
    return milliseconds(start, mark_time(copies[0].device)) / 8


def check_losses(run):
    """A small model, on the device and on the CPU in float64."""
    exact = train(run.config("cap1", small=True, steps=10, device="cpu", dtype="float64"))
    for dtype in run.dtypes():
        name = label(dtype)
        seen = train(run.config("cap1", small=True, steps=10, dtype=name))
        difference = largest_difference(seen.losses, exact.losses)
        run.add(f"{name}: largest difference of 10 losses to float64 on the CPU", difference,
                LOSS_ERROR[dtype])
    if run.device.type == "cpu":
        run.skip("certificate", "this is the CPU")
        return
    here = nano.certificate(seen.model)["log10"]
    there = nano.certificate(copy.deepcopy(seen.model).cpu())["log10"]
    run.add("certificate: difference of its logarithm to the CPU's", abs(here - there), 1e-6)


class Stopped(Exception):
    """A run was ended by its first checkpoint."""


def check_checkpoint(run):
    """A small run that ends with its first checkpoint and goes on, and one that does not."""
    save = nano.save

    def save_and_stop(*arguments, **state):
        save(*arguments, **state)
        raise Stopped

    settings = dict(small=True, steps=12, evals=2, dtype="float32")
    whole = train(run.config("cap1", **settings))
    config = run.config("cap1", **settings)
    with contextlib.suppress(Stopped), mock.patch.object(nano, "save", save_and_stop):
        train(config)
    allowed = SAME_RUN
    if run.device.type == "cpu":
        allowed = 0.0  # the same bits
    compare(run, "stopped and gone on", train(config), whole, allowed)


def compare(run, kind, a, b, allowed):
    difference = largest_difference(a.losses, b.losses)
    run.add(f"{kind}: largest difference of {len(a.losses)} losses", difference, allowed)
    others = b.model.state_dict()
    distances = [distance(W, others[name]) for name, W in a.model.state_dict().items()]
    run.add(f"{kind}: largest relative distance of a weight", largest(distances), 10 * allowed)


# ==== Several processes ===========================================================================
def spread_config(run, count):
    return run.config("cap1", small=True, steps=10, batch=2 * count, dtype="float32")


def check_processes(run):
    """Under torchrun the same run by one process and by all. Else torchrun starts this on all GPUs.

    The other ranks go straight to `train` (in main) and wait there.
    """
    if run.launched:
        count = int(run.launched["WORLD_SIZE"])
        alone = train(spread_config(run, count))
        with mock.patch.dict(os.environ, run.launched):
            spread = train(spread_config(run, count))
        compare(run, f"{count} processes and one", spread, alone, SAME_RUN)
        return
    count = 2
    if run.device.type == "cuda":
        count = torch.cuda.device_count()
    if count < 2:
        run.skip("the same run by several processes", "there is one GPU")
        return
    out = run.folder / "processes.json"
    environment = dict(os.environ)
    if run.device.type == "cpu":
        environment["OMP_NUM_THREADS"] = "1"
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
         str(count), __file__, "--only", "processes", "--device", run.device.type, "--out",
         str(out)], capture_output=True, text=True, timeout=300, env=environment)
    if not out.exists():
        raise RuntimeError((result.stderr.strip() or "torchrun said nothing").splitlines()[-1])
    for row in json.loads(out.read_text())["rows"]:
        run.add(row["what"], row["measured"], row["allowed"], row["verdict"])


# ==== FineWeb =====================================================================================
def check_fineweb(run):
    """The first 125 of cap1's 6200 steps, against the authors' log."""
    what = f"cap1: distance of the validation loss after 125 steps to {LOG_LOSS}"
    folder = Path(os.environ.get("DATA_DIR", "nowhere"), "fineweb10B")
    names = ("fineweb_train_000001.bin", "fineweb_val_000000.bin")
    if run.small or not run.compiles() or not all((folder / name).is_file() for name in names):
        run.skip(what, "needs a GPU that compiles, and FineWeb in $DATA_DIR/fineweb10B")
        return
    whole = Config.of("cap1")
    schedule = nano.schedule

    def schedule_of_all_steps(config, step):
        return schedule(whole, step)

    config = Config.of("cap1", steps=125, evals=1, out=tempfile.mkdtemp(dir=run.folder))
    with mock.patch.object(nano, "schedule", schedule_of_all_steps):
        seen = train(config)
    run.add(what, abs(seen.log[-1]["val_loss"] - LOG_LOSS), LOG_ERROR)
    run.add("tokens per second", seen.log[-1]["tokens_per_second"])


# ==== Main ========================================================================================
PARTS = dict(maps=check_maps, attention=check_attention, losses=check_losses,
             checkpoint=check_checkpoint, cap1=functools.partial(check_training, preset="cap1"),
             specnorm8=functools.partial(check_training, preset="specnorm8"),
             tight=functools.partial(check_training, preset="tight"),
             baseline=functools.partial(check_training, preset="baseline"),
             fineweb=check_fineweb, processes=check_processes)  # the last: the others join there


def describe(run):
    """Of the machine, for the JSON; and in a sentence what it cannot do."""
    facts = dict(device="cpu", capability=None, driver=None, torch=torch.__version__,
                 cuda=torch.version.cuda, threads=torch.get_num_threads(), small=run.small,
                 processes=int(run.launched.get("WORLD_SIZE", "1")), compiles=run.compiles())
    if run.device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(run.device)
        facts["capability"] = list(torch.cuda.get_device_capability(run.device))
        facts["gpus"] = torch.cuda.device_count()
        with contextlib.suppress(OSError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            facts["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
        if not run.compiles():
            print("This GPU is below compute capability 8, or Triton is missing: so all is checked "
                  "without torch.compile, and attention with a mask of T x T.")
    print(", ".join(f"{name} {fact}" for name, fact in facts.items()), flush=True)
    return facts


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--small", action="store_true", help="small shapes; a CPU has no others")
    parser.add_argument("--only", default=",".join(PARTS), metavar="PART[,PART]",
                        help=f"some of {', '.join(PARTS)} [all]")
    parser.add_argument("--minutes", type=float, default=5, help="begin no part after so long [5]")
    parser.add_argument("--out", default="runs/gpu_check.json", help="[runs/gpu_check.json]")
    options = parser.parse_args(argv)
    chosen = options.only.split(",")
    for name in chosen:
        if name not in PARTS:
            parser.error(f"--only {name}: must be some of {', '.join(PARTS)}")
    options.only = [name for name in PARTS if name in chosen]
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU; try cpu")
    options.small = options.small or options.device == "cpu"
    return options


def main(argv=None):
    """Make the table and the JSON. Returns the exit status."""
    options = parse_arguments(argv)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(torch.device(options.device), options.small, Path(folder))
        if os.environ.get("RANK", "0") != "0":
            if "processes" in options.only:
                train(spread_config(run, int(os.environ["WORLD_SIZE"])))
            return 0
        # Rank 0 goes through the other parts alone; the rest wait for it in the part `processes`.
        if os.environ.get("WORLD_SIZE", "1") != "1":
            run.launched = {key: os.environ[key] for key in TORCHRUN if key in os.environ}
        for key in run.launched:
            del os.environ[key]
        facts = describe(run)
        print(f"  {'':72} {'measured':>12} {'allowed':>8}  verdict")
        for run.part in options.only:
            print(run.part, flush=True)
            try:
                late = time.monotonic() - began > 60 * options.minutes
                waited_for = run.launched and run.part == "processes"
                if late and not waited_for:
                    run.skip("all of it", f"{options.minutes:g} minutes are over, see --minutes")
                else:
                    PARTS[run.part](run)
            except Exception as problem:
                line = (str(problem).strip() or "no message").splitlines()[0][:160]
                run.add(f"{type(problem).__name__}: {line}", None, verdict="broken")
            out = Path(options.out)
            out.parent.mkdir(parents=True, exist_ok=True)
            nano.write(out, json.dumps(dict(facts, rows=run.rows), indent=1))
            if run.device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
    broken = [row for row in run.rows if row["verdict"] == "broken"]
    counts = collections.Counter(row["verdict"].split(":")[0] for row in run.rows)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
    print(f"{counts}; {time.monotonic() - began:.0f} s; {out}")
    if run.device.type == "cuda":
        print("Please send that file in an issue.")
    for row in broken:
        print_row(row)
    return min(len(broken), 1)


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # as the tutorial does: a softmax has many such numbers
    status = main()
    if dist.is_initialized():  # as in nanogpt_lipschitz.py: leave at once
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
