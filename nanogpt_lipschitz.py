"""Tutorial 3: a GPT on web text, within a Lipschitz constant at every step, on any number of GPUs.

WHAT IT SHOWS. The paper's largest experiment (arXiv 2507.13338): 162M weights on FineWeb, no layer
norm, QK norm or softcapping, on processes that own shares of the matrices.

COMMANDS
    python nanogpt_lipschitz.py                                    # minutes on a laptop, no network
    torchrun --standalone --nproc_per_node 8 nanogpt_lipschitz.py --preset cap1   # the paper's run
    python nanogpt_lipschitz.py --sample runs/NAME --prompt "def " --temperature 0.8
    python results/prepare.py SOURCE --data DIR                    # token shards of a text of yours
    With --out DIR a stopped run goes on, on any number of processes, and torchrun's --max-restarts
    revives what was killed (on several nodes with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1).

RESULT (bytes of Python's library; two cores of a CPU, one seed, a minute each). CUDA is unmeasured.
    tiny, the default: 61.7 % right, loss 1.483, bound 10^9.5; tiny_tight: 60.8 %, 1.550, 12.37.

ANCESTRY. The experiment is the authors', its shape modded-nanogpt's (Jordan et al.), the shards are
Karpathy's; none of their code is used. Different on purpose: softmax and limit of the head are over
50257 real tokens, not 50304 rows; embeddings have an RMS of at most 1. tight and tiny_tight are ours.
"""

import argparse
import contextlib
import dataclasses
import datetime
import io
import itertools
import json
import math
import os
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from constraints import (CONSTRAINTS, block_bounds, cap_rows, ellipsoid_blocks, ellipsoid_norm,
                         exact_norm, find_constraint, in_float64, maxmin, power, sigma_per_norm,
                         transformer_bounds, tune)
from muon import Muon, fast_dtype

SCRIPT = "nanogpt_lipschitz"
ROLES = ("q", "k", "v", "o", "in", "out", "head")  # of the matrices: attention, MLP, unembedding
BLOCK = 128  # positions that attention takes or skips together
EPS = 8e-10  # Adam's, for sums over the tokens of a step; the authors': 1e-10 for an eighth of them

# Shapes: B sequences, T tokens in a sequence, D dimension of a token's vector, H heads, E = D / H,
# V tokens in the vocabulary, X something wide, N positions, C a chunk of them, Q blocks of them.


# ==== Config: every field is a flag ===============================================================
def flag(default, text, low=None, high=math.inf):
    """A field: its default, its help, and the range that it is checked against."""
    return dataclasses.field(default=default, metadata=dict(help=text, range=(low, high)))


class UserError(Exception):
    """What the user can mend, in one line: what was given, what is needed, how. Exit status 2."""


@contextlib.contextmanager
def told(what, remedy):
    """Errors of dozens of kinds, of files and libraries, as a UserError."""
    try:
        yield
    except Exception as problem:
        reason = (str(problem).strip() or "no reason given").splitlines()[0][:160]
        raise UserError(f"{what} ({type(problem).__name__}: {reason}); {remedy}") from problem


@dataclasses.dataclass
class Config:
    preset: str = flag("tiny", "named settings, see the end; flags override; brackets show cap1's")
    # data
    data: str = flag("fineweb", "fineweb, stand-in (Python's library), or a folder (train_1.bin, val_0.bin)")
    vocab: int = flag(50257, "different tokens V; the last one begins a document", 2, 2**16)
    val_tokens: int = flag(10_485_760, "validation tokens, the first of the validation shards", 1)
    holdout: bool = flag(False, "for tuning: validate on the end of the training tokens, held out")
    # model
    width: int = flag(768, "dimension D of a token's vector", 1, 2**14)
    blocks: int = flag(12, "blocks, each of attention and an MLP", 1, 1000)
    heads: int = flag(6, "attention heads H, each of dimension D / H", 1, 2**10)
    hidden: int = flag(3072, "neurons of an MLP", 1, 2**17)
    window: int = flag(1792, "tokens that attention sees at the end, in most layers half", 1, 2**20)
    activation: str = flag("gelu", "gelu / 1.1289, or maxmin on pairs")
    logit_scale: float = flag(24.0, "on q.k / (D / H); for the baseline, whose q and k have RMS 1, the largest "
                              "attention logit; 0: attention by position alone, learned", 0)
    attention_scale: float = flag(1 / 3, "factor on the output of attention; 0: 1 / sqrt(H)", 0)
    residual_scale: float = flag(1.0, "2 * blocks * a in x <- (1 - a) x + a block(x)", 0)
    final_scale: float = flag(1.0, "fixed factor on the logits, counted in bounds", 0)
    w_max: str = flag("1", "limit on RMS->RMS norms: one number, or 7: " + ",".join(ROLES))
    baseline: bool = flag(False, "unconstrained, with RMSNorm, QK norm, softcap, whole residuals")
    # training
    constraint: str = flag("soft_cap", ", ".join(CONSTRAINTS) + ", or yours as FILE.py:NAME")
    constrain_every: int = flag(4, "about how many steps a constraint waits that can", 1, 64)
    steps: int = flag(6200, "training steps", 1)
    batch: int = flag(8, "sequences a step, over all processes", 1, 2**20)
    seq_len: int = flag(49_152, "tokens of a sequence; it holds parts of many documents", 1, 2**20)
    micro_batch: int = flag(1, "sequences a process takes at once: memory, not the result", 1)
    lr: float = flag(0.05, "Muon's, in the blocks: RMS->RMS norm of a step; falls to a tenth", 0)
    head_lr: float = flag(0.005, "the same for the head", 0)
    embed_lr: float = flag(0.1, "learning rate of the embedding (Adam)", 0)
    bias_lr: float = flag(0.02, "learning rate of attention by position (Adam)", 0)
    momentum: float = flag(0.95, "Muon's momentum, after a rise from 0.85", 0, 0.9999)
    momentum_warmup: int = flag(300, "steps of that rise", 0)
    # run
    seed: int = flag(0, "of initialisation, order of the data, samples", 0, 2**31 - 1)
    dtype: str = flag("auto", "auto (what is fast), float32, bfloat16, float64 (weights too)")
    device: str = flag("auto", "auto, cpu, cuda, mps; auto: cuda if there is one, a GPU a process")
    evals: int = flag(10, "evaluations on the validation tokens, each with a checkpoint", 1)
    out: str = flag("", "run folder, a stopped run goes on; default: a new one in runs/")
    sample: str = flag("", "a run folder: only sample from it")
    prompt: str = flag("", "text that the sample continues; default: the start of a document")
    length: int = flag(300, "tokens to sample", 1)
    temperature: float = flag(0.8, "of the sample; 0: always the most probable token", 0)

    @classmethod
    def of(cls, preset=None, **given):
        """A preset with changes. `given` is kept: a run that goes on must not contradict it."""
        if preset not in (None, *PRESETS):
            raise UserError(f"--preset {preset}: must be one of {', '.join(PRESETS)}")
        config = cls(**{**PRESETS[preset or "tiny"], **given, "preset": preset or "tiny"})
        config.given = dict(given, preset=preset) if preset else given
        return config

    def limits(self):
        """w_max of each role of matrix. UserError if a setting is out of its range."""
        for f in dataclasses.fields(self):
            value, (low, high) = getattr(self, f.name), f.metadata["range"]
            if not isinstance(value, (int, float) if f.type is float else f.type):
                raise UserError(f"--{f.name} {value!r:.80}: must be of the type {f.type.__name__}")
            if low is not None and not (low <= value <= high and value < math.inf):
                raise UserError(f"--{f.name} {value}: must be a finite number from {low} to {high}")
        dtypes = ("auto", "float32", "bfloat16", "float64")
        for name, wrong, requirement in (
                ("dtype", self.dtype not in dtypes, f"one of {', '.join(dtypes)}"),
                ("activation", self.activation not in ("gelu", "maxmin"), "one of gelu, maxmin"),
                ("heads", self.width % (4 * self.heads), f"a divisor of width / 4 = {self.width / 4}"),
                ("residual_scale", self.residual_scale > 2 * self.blocks, "at most 2 * blocks"),
                ("hidden", self.hidden % 2 and self.activation == "maxmin", "even for maxmin"),
                ("constraint", self.baseline and self.constraint != "none", "none for the baseline")):
            if wrong:
                raise UserError(f"--{name} {getattr(self, name)}: must be {requirement}")
        with told(f"--w_max {self.w_max}: must be a number above 0, or 7", "give, say, 1,1,1,1,1,1,2"):
            limits = [float(w) for w in self.w_max.split(",")]
            if len(limits) not in (1, 7) or not all(0 < w < math.inf for w in limits):
                raise ValueError(f"it is {limits}")
        return dict(zip(ROLES, limits * 7))


POSITION = dict(activation="maxmin", logit_scale=0.0, attention_scale=0.0, final_scale=40.0)
TINY = dict(data="stand-in", vocab=256, width=128, blocks=4, heads=4, hidden=512, w_max="3",
            seq_len=256, window=256, batch=16, micro_batch=16, steps=300, evals=6, logit_scale=1.0, lr=0.1,
            head_lr=0.1, embed_lr=0.02, momentum_warmup=30)
PRESETS = {
    "tiny": TINY,
    "tiny_tight": {**TINY, **POSITION, "w_max": "1", "hidden": 640, "residual_scale": 4.0},
    # The same shape with norm layers. QK norm keeps q.k / (D / H) within 1, so the logit scale is the largest
    # attention logit: at 1 no token could get more than e^2 times the share of another. modded-nanogpt: 15.4.
    "tiny_baseline": {**TINY, "baseline": True, "constraint": "none", "w_max": "1", "logit_scale": 12.0,
                      "lr": 0.05, "head_lr": 0.05},
    "cap1": {},  # the paper's run with spectral cap at 1: the defaults above are its settings
    "specnorm8": dict(constraint="specnorm", w_max="8", steps=1770, logit_scale=128**0.5 / 64),
    "tight": dict(POSITION, hidden=3840, residual_scale=12.0),
    "baseline": dict(baseline=True, constraint="none"),  # cap1 with norm layers and without limits
}


def parse_arguments(argv=None):
    """The command line as a Config: defaults, then the preset, then the flags given."""
    presets = "".join(f"\n  {name:12} " + " ".join(f"{k}={v}" for k, v in settings.items())
                      for name, settings in PRESETS.items())
    parser = argparse.ArgumentParser(
        description=__doc__.split("RESULT")[0], epilog="presets:" + presets, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    for f in dataclasses.fields(Config):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type)
        parser.add_argument(f"--{f.name}", help=f"{f.metadata['help']} [{f.default}]", **kind)
    return Config.of(**vars(parser.parse_args(argv)))


# ==== Model: attention and MLP, each mixed into the residual stream, and no norm layer ============
GELU_SLOPE = 1.1289041452  # the steepest slope of GeLU, rounded up
GELU_SCALE = 1.1289  # what the paper divides GeLU by: a little less than its slope


def rotate(x_BHTE, speeds=None):
    """RoPE: at t turn the pair (i, i + E/2) by t speeds[i] radians, in float32 at least."""
    (T, E), low, device = x_BHTE.shape[-2:], x_BHTE.dtype, x_BHTE.device
    x_BHTE = x_BHTE.to(torch.promote_types(low, torch.float32))
    if speeds is None:  # modded-nanogpt's: 1 to 1/1024 for half of the pairs, 0 for the others
        i = torch.arange(E // 2, device=device, dtype=x_BHTE.dtype)
        speeds = torch.where(i < E // 4, 1024 ** (-i / max(1, E // 4 - 1)), 0)
    angle_TE = torch.arange(T, device=device, dtype=x_BHTE.dtype)[:, None] * speeds
    cos, sin, (first, second) = angle_TE.cos(), angle_TE.sin(), x_BHTE.chunk(2, -1)
    return torch.cat([cos * first + sin * second, cos * second - sin * first], -1).to(low)


def dense_mask(docs_BT, blocks):
    """(B, T, T): t sees j <= t of its own document, in its own block and the blocks - 1 before."""
    t = torch.arange(docs_BT.shape[1], device=docs_BT.device)
    near_TT = (t[:, None] >= t) & (t[:, None] // BLOCK - t // BLOCK < blocks)
    return near_TT & (docs_BT[:, :, None] == docs_BT[:, None])


def block_mask(docs_BT, blocks):
    """The same for flex_attention, without ever looking at T x T positions."""
    # Numbers of documents rise, so blocks have one in common only if their ranges overlap. `sees`
    # decides within blocks. It knows no window: so a new one compiles nothing anew.
    B, T = docs_BT.shape
    low_BQ, high_BQ = docs_BT.view(B, -1, BLOCK)[..., 0], docs_BT.view(B, -1, BLOCK)[..., -1]
    q = torch.arange(T // BLOCK, device=docs_BT.device)
    back_QQ = q[:, None] - q
    some_BQQ = (back_QQ >= 0) & (back_QQ < blocks) & (low_BQ[:, :, None] <= high_BQ[:, None])
    whole_BQQ = some_BQQ & (back_QQ > 0) & (low_BQ[:, None] == high_BQ[:, :, None])
    lists = []
    for x_BQQ in (some_BQQ & ~whole_BQQ, whole_BQQ):  # how many blocks of keys, and which
        order_BQQ = torch.argsort(x_BQQ.int(), dim=-1, descending=True, stable=True)
        lists += [x_BQQ.sum(-1, dtype=torch.int32)[:, None], order_BQQ.int()[:, None]]

    def sees(b, h, t, j):
        return (t >= j) & (docs_BT[b, t] == docs_BT[b, j])

    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(T, T))


class Block(torch.nn.Module):
    """x <- (1 - a) x + a attention(x), then x <- (1 - a) x + a mlp(x), with a = mix. No biases."""

    def __init__(self, config, index):
        super().__init__()
        self.config = config
        self.mix = config.residual_scale / (2 * config.blocks)
        self.attention_scale = config.attention_scale or config.heads**-0.5
        D, Parameter = config.width, torch.nn.Parameter
        if config.logit_scale > 0:
            self.q = Parameter(torch.zeros(D, D))
            self.k = Parameter(torch.zeros(D, D))
        self.v = Parameter(torch.zeros(D, D))
        self.o = Parameter(torch.zeros(D, D))
        self.w_in = Parameter(torch.zeros(config.hidden, D))
        self.w_out = Parameter(torch.zeros(D, config.hidden))
        if config.logit_scale == 0:
            # Attention by position: logits of a head are a sum of waves in the distance x = t - j,
            # sum_i a_i cos(speed_i x) + b_i sin(speed_i x), at first with its peak at x = h step.
            n, step = D // config.heads // 2, 2 ** min(index, 5)
            speeds = 2 * (4 * config.window) ** (-torch.arange(n) / n)
            phase_HE = step * torch.arange(config.heads)[:, None] * speeds
            self.register_buffer("speeds", speeds, persistent=False)
            self.query_HE = Parameter(12 / n * torch.cat([phase_HE.cos(), phase_HE.sin()], -1))

    def own_share_H(self):
        """The least that a head by position gives a token of itself: where it sees T tokens."""
        angle_TE = torch.arange(self.config.seq_len)[:, None] * self.speeds.double().cpu()
        wave_TE = torch.cat([angle_TE.cos(), angle_TE.sin()], -1)
        return (in_float64(self.query_HE).cpu() @ wave_TE.T).softmax(-1)[:, 0].to(in_float64(self.query_HE))

    def matrices(self):
        named = self.named_parameters()
        return [(name.removeprefix("w_"), W) for name, W in named if name != "query_HE"]

    def attention(self, x_BTD, mask=None):
        """beta sum_h o_h sum_j softmax_j(s q_t^h . k_j^h) v_j^h over all j that t sees."""
        B, T, D = x_BTD.shape
        H, dtype, content = self.config.heads, x_BTD.dtype, self.config.logit_scale > 0
        matrices = [self.q, self.k, self.v] if content else [self.v]
        parts_BTX = F.linear(x_BTD, torch.cat([W.to(dtype) for W in matrices]))
        *qk, v_BHTE = (part.view(B, T, H, -1).transpose(1, 2) for part in parts_BTX.split(D, -1))
        if content:
            scale = self.config.logit_scale / (D // H)
            qk = [rotate(F.rms_norm(x, x.shape[-1:]) if self.config.baseline else x) for x in qk]
        else:
            # Query (a, b) and key (1, 0) are the same for all tokens, turned by position. (Not a
            # table by distance: its gradient would be 2e9 atomic additions in a step of cap1.)
            scale, key_HE = 1.0, torch.zeros_like(self.query_HE)
            key_HE[:, :len(self.speeds)].fill_(1)  # (= 1 would be a copy from the CPU)
            qk = [rotate(x_HE[:, None].expand(H, T, -1), self.speeds).to(dtype).expand(B, H, T, -1)
                  for x_HE in (self.query_HE, key_HE)]
        if isinstance(mask, BlockMask):
            # (torch 2.13, compiled for a CPU, is wrong if v is a view into a longer tensor)
            y_BHTE = flex_attention(*(x.contiguous() for x in (*qk, v_BHTE)), block_mask=mask, scale=scale)
        else:
            causal, mask = mask is None, mask if mask is None else mask[:, None]
            y_BHTE = F.scaled_dot_product_attention(*qk, v_BHTE, mask, is_causal=causal, scale=scale)
        y_BTD = y_BHTE.transpose(1, 2).reshape(B, T, D)
        return F.linear(y_BTD, (self.attention_scale * self.o).to(dtype))

    def mlp(self, x_BTD):
        """w_out maxmin(w_in x), or w_out gelu(w_in x) / 1.1289."""
        gelu, h_BTX = self.config.activation == "gelu", F.linear(x_BTD, self.w_in.to(x_BTD.dtype))
        h_BTX = F.gelu(h_BTX) if gelu else maxmin(h_BTX)
        w_out = self.w_out / GELU_SCALE if gelu else self.w_out
        return F.linear(h_BTX, w_out.to(x_BTD.dtype))

    def forward(self, x_BTD, mask=None):
        if self.config.baseline:
            x_BTD = x_BTD + self.attention(F.rms_norm(x_BTD, x_BTD.shape[-1:]), mask)
            return x_BTD + self.mlp(F.rms_norm(x_BTD, x_BTD.shape[-1:]))
        x_BTD = torch.lerp(x_BTD, self.attention(x_BTD, mask), self.mix)
        return torch.lerp(x_BTD, self.mlp(x_BTD), self.mix)


class Transformer(torch.nn.Module):
    """Embedding, blocks, head. Starts with o, w_out and head at 0: the first loss is ln V."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.mix = config.residual_scale / (2 * config.blocks)
        self.flex = False  # flex_attention, which CUDA can compile, in the place of a T x T mask
        generator = torch.Generator().manual_seed(config.seed)
        table_VD = torch.randn(config.vocab, config.width, generator=generator)
        self.embedding_VD = torch.nn.Parameter(table_VD if config.baseline else cap_rows(table_VD))
        self.blocks = torch.nn.ModuleList(Block(config, i) for i in range(config.blocks))
        rows = math.ceil(config.vocab / 128) * 128  # (a round number is faster; others stay 0)
        self.head_XD = torch.nn.Parameter(torch.zeros(rows, config.width))
        limits, stiefel = config.limits(), config.constraint == "stiefel"
        for role, W in self.matrices():
            # If blocks are half of the stream, zeros would lose the signal; stiefel allows none.
            if role != "head" and (role not in ("o", "out") or stiefel or self.mix >= 0.4):
                torch.nn.init.orthogonal_(W, generator=generator)
                W.data.mul_(sigma_per_norm(W) * (limits[role] if stiefel else min(1.0, limits[role])))
        if config.dtype == "float64":
            self.double()

    @property
    def head_VD(self):
        return self.head_XD[:self.config.vocab]  # the rows of real tokens

    def matrices(self):
        """[(role, matrix)] of all that the constraint holds."""
        pairs = [pair for block in self.blocks for pair in block.matrices()]
        return pairs + [("head", self.head_XD)]

    def embed(self, tokens_BT, dtype):
        """(x_BTD, docs_BT): embedded tokens, and the number of each token's document."""
        docs_BT = (tokens_BT == self.config.vocab - 1).cumsum(1)
        return F.embedding(tokens_BT, self.embedding_VD).to(dtype), docs_BT

    def body(self, x_BTD, docs_BT=None, window=None, seen=None):
        """The end of the stream. docs_BT None: one document; seen: list for the largest entries."""
        docs_BT = x_BTD.new_zeros(x_BTD.shape[:2], dtype=torch.int64) if docs_BT is None else docs_BT
        blocks, n = math.ceil((window or self.config.window) / BLOCK), len(self.blocks)
        make = block_mask if self.flex else dense_mask
        far, near = make(docs_BT, blocks), make(docs_BT, max(1, blocks // 2))
        for i, block in enumerate(self.blocks):  # (of 12 blocks 0, 4, 7 and 11 see far)
            x_BTD = block(x_BTD, far if i in (0, n // 3, n - 1 - n // 3, n - 1) else near)
            if seen is not None:
                seen.append(x_BTD.detach().abs().max().float())
        return F.rms_norm(x_BTD, x_BTD.shape[-1:]) if self.config.baseline else x_BTD

    def logits(self, x_ND):
        """(..., V) of the end of the stream, in float32 at least; the baseline's within 15."""
        head_XD = (self.config.final_scale * self.head_XD).to(x_ND.dtype)
        z_NV = F.linear(x_ND, head_XD)[..., :self.config.vocab]
        z_NV = z_NV.to(torch.promote_types(z_NV.dtype, torch.float32))
        return 15 * torch.tanh(z_NV / 15) if self.config.baseline else z_NV

    def loss(self, x_ND, y_N):
        """Sum of the cross-entropies, over the real tokens alone."""
        return F.cross_entropy(self.logits(x_ND), y_N, reduction="sum")

    def forward(self, tokens_BT, dtype=torch.float32):
        return self.logits(self.body(*self.embed(tokens_BT, dtype)))


# ==== Certificate: how far logits can move if all embeddings move, from the weights alone =========
# constraints.py derives it, for up to seq_len tokens. Documents and windows only take tokens out of an
# average. Logits by position do not move. Norm layers: no bound.
@torch.no_grad()
def certificate(model, rho=0.0, free=None):
    """transformer_bounds (constraints.py), embeddings to logits, and norms: {role: largest RMS->RMS norm}.

    rho: how far (RMS) embeddings may be from the table's. free: what `tuned` found; None: untuned.
    """
    norms = {}
    for role, W in [*model.matrices()[:-1], ("head", model.head_VD)]:
        norms[role] = max(norms.get(role, 0.0), exact_norm(W).item())
    norms["embedding"] = R = in_float64(model.embedding_VD).square().mean(1).sqrt().max().item()
    if model.config.baseline:
        keys = ("log10", "product_log10", "ellipsoid_log10", "body_log10", "radius_log10")
        return dict(dict.fromkeys(keys, math.inf), norms=norms, rows=[])
    U = model.config.final_scale * in_float64(model.head_VD)
    return dict(transformer_bounds(layers(model), R + rho, U, free), norms=norms)


def layers(model):
    """Of each block what transformer_bounds takes."""
    config = model.config
    gelu = (GELU_SLOPE, GELU_SCALE) if config.activation == "gelu" else None
    return [block_bounds(
        {role: in_float64(W) for role, W in block.matrices()}, config.heads, block.mix, block.attention_scale,
        None if config.logit_scale > 0 else block.own_share_H(), config.logit_scale, True, gelu)
        for block in model.blocks]


@torch.enable_grad()
def tuned(model, steps=30):
    """What is free, for the least bound; None, untuned, at widths for which that takes minutes."""
    if model.config.baseline or model.config.width > 256:
        return None
    R, blocks = in_float64(model.embedding_VD).square().mean(1).max().sqrt().item(), layers(model)
    U = model.config.final_scale * in_float64(model.head_VD)
    return tune(lambda free: ellipsoid_norm(*ellipsoid_blocks(blocks, R, free)[-1], U), {}, steps)


# ==== Data: token shards, 256 int32 of header (magic, version, count, 0 ...), then uint16 tokens ==
MAGIC, VERSION, HEADER = 20240520, 1, 256


@dataclasses.dataclass
class Tokens:
    """Shards, [(name, uint16 array)], as one long text, of which only what is asked for is read."""
    shards: list
    vocab: int

    def __len__(self):
        return sum(len(tokens) for _, tokens in self.shards)

    def read(self, start, count):
        """int64 tensor of `count` tokens, or of what is left."""
        pieces = []
        for name, tokens in self.shards:
            piece = tokens[max(0, start):max(0, start + count)].astype(np.int64)
            if piece.size and piece.max() >= self.vocab:
                raise UserError(f"{name}: holds token {piece.max()}; give --vocab (GPT-2: 50257)")
            pieces.append(piece)
            start -= len(tokens)
        return torch.from_numpy(np.concatenate(pieces))

    def sequences(self, step, rows, config):
        """(B, T + 1): sequences `rows` of a step, one after the other in the text."""
        T, whole, windows = config.seq_len, (len(self) - 1) // config.seq_len, []
        for row in rows:
            epoch, place = divmod(step * config.batch + row, whole)
            if config.data == "stand-in":  # (web text is shuffled already)
                generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
                place = torch.randperm(whole, generator=generator)[place].item()
            windows.append(self.read(place * T, T + 1))
        return torch.stack(windows)


def read_shard(path):
    """(name, uint16 tokens) of a shard, memory-mapped."""
    with told(f"{path}: is no whole shard", f"one begins {MAGIC}, {VERSION}, count; see results/prepare.py"):
        header, size = np.fromfile(path, dtype=np.int32, count=HEADER).tolist(), path.stat().st_size
        if header[:2] != [MAGIC, VERSION] or not size == 4 * HEADER + 2 * header[2] > 4 * HEADER:
            raise ValueError(f"it begins with {header[:3]} and has {size} bytes")
        return str(path), np.memmap(path, np.uint16, "r", 4 * HEADER, (header[2],))


def load_data(config):
    """(train, validation, name): two Tokens."""
    name = config.data
    if name == "stand-in":
        text = np.frombuffer(stand_in().encode(), dtype=np.uint8).astype(np.uint16)
        n = int(0.9 * len(text))
        train, validation = [(name, text[:n])], [(name, text[n:])]
    else:
        files = fineweb(config) if name == "fineweb" else sorted(Path(name).glob("*.bin"))
        words = {path: path.stem.replace("-", "_").split("_") for path in files}
        train, validation = ([read_shard(path) for path in files if kind in words[path]]
                             for kind in ("train", "val"))
    if config.holdout and train:  # a tenth of the last training shard, at most val_tokens
        last_name, last = train.pop()
        cut = max(len(last) * 9 // 10, len(last) - config.val_tokens - 1)
        train.append((last_name, last[:cut]))
        validation = [(last_name, last[cut:])]
        name += ", validated on training text held out"
    train, validation = Tokens(train, config.vocab), Tokens(validation, config.vocab)
    for kind, tokens, needed, first in (("train", train, config.seq_len + 1, config.seq_len + 1),
                                        ("val", validation, 2, config.val_tokens + 1)):
        if len(tokens) < needed:
            raise UserError(f"--data {name}: has {len(tokens)} tokens in {len(tokens.shards)} files *.bin "
                            f"with the word {kind} in their names; give at least {needed} tokens")
        tokens.read(0, first)  # (those beyond the vocabulary are found now, not after an hour)
    return train, validation, name


def fineweb(config):
    """Paths of the published shards that a run reads, from $DATA_DIR/fineweb10B or the Hub."""
    shards = min(103, math.ceil(config.steps * config.batch * config.seq_len / 1e8))
    names = [f"fineweb_train_{i + 1:06d}.bin" for i in range(shards)] + ["fineweb_val_000000.bin"]
    local = [Path(os.environ.get("DATA_DIR", "nowhere")) / "fineweb10B" / name for name in names]
    if all(path.is_file() for path in local):
        return local
    with told("--data fineweb: cannot be had from the Hub", "give a folder, or take --preset tiny"):
        from huggingface_hub import hf_hub_download  # takes a second, so only where it is needed
        return [Path(hf_hub_download("kjj0/fineweb10B-gpt2", n, repo_type="dataset")) for n in names]


def stand_in(characters=1_115_394):
    """Text that is on every machine: the source of Python's standard library, ASCII only."""
    other = bytes(set(range(256)) - {ord("\n"), *range(ord(" "), ord("~") + 1)})
    files = (path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))
    return b"".join(text.translate(None, other) for text in files)[:characters].decode()


def gpt2():
    with told("GPT-2's tokens cannot be had", "they need tiktoken, and once the network"):
        import tiktoken
        return tiktoken.get_encoding("gpt2")


# ==== Distribution: who owns what, and how gradients and weights travel ===========================
class Exchange:
    """Every parameter has an owner. Gradients are summed to it while backward still runs, it alone
    updates and constrains, and new weights come from it. So replicas have the same bits."""

    def __init__(self, model, rank=0, world_size=1):
        # Largest work first (FLOPs of msign, or 100 a number), each to the rank that has least.
        work = {p: 100 * p.numel() for p in model.parameters()}
        work.update({W: 10 * W.numel() * min(W.shape) for _, W in model.matrices()})
        load, self.owner = [0] * world_size, {}
        for p in sorted(work, key=work.get, reverse=True):
            self.owner[p] = load.index(min(load))
            load[self.owner[p]] += work[p]
        self.names = {p: name for name, p in model.named_parameters()}
        self.rank, self.world_size, self.last_micro_step, self.pending = rank, world_size, False, []
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(self.send_gradient)

    def send_gradient(self, p):
        """Called by the backward pass when p.grad is complete: in the same order on all ranks."""
        if self.world_size > 1 and self.last_micro_step:
            self.pending.append(dist.reduce(p.grad, self.owner[p], async_op=True))

    def share_weights(self):
        if self.world_size > 1:
            for work in [dist.broadcast(p.data, i, async_op=True) for p, i in self.owner.items()]:
                work.wait()

    def sum(self, x, op=dist.ReduceOp.SUM):
        if self.world_size > 1:
            dist.all_reduce(x, op)
        return x

    def gather_states(self, optimizers):
        """On rank 0 {parameter's name: its optimizer's state}, of all ranks."""
        for optimizer in optimizers:
            optimizer.state_dict()  # (here Muon forgets norms, as in loading: both go on alike)
        own = {self.names[p]: {key: value.cpu() for key, value in state.items()}
               for optimizer in optimizers for p, state in optimizer.state.items()}
        parts = [own] * self.world_size
        if self.world_size > 1:
            dist.gather_object(own, parts if self.rank == 0 else None)
        return {name: state for part in parts for name, state in part.items()}


# ==== Run folders: one rule for starting and going on =============================================
def go_on(config):
    """(config, checkpoint, summary) of the run in config.out, if there is one: its own settings."""
    folder = Path(config.out)
    if not config.out or not (folder / "checkpoint.pt").exists():
        return config, None, None
    own, model, state = load_checkpoint(folder)
    for name, value in getattr(config, "given", dataclasses.asdict(config)).items():
        if name in ("out", "data", "micro_batch", "device", "prompt", "length", "temperature"):
            setattr(own, name, value)
        elif value != getattr(own, name):
            raise UserError(f"--{name} {value}: the run in {folder} has {getattr(own, name)}; leave "
                            "the flag out to go on with it, or give another --out")
    if ":" in own.constraint and config.constraint != own.constraint:  # (no code runs unasked)
        raise UserError(f"--out {folder}: has code; say that you trust it: --constraint {own.constraint}")
    with told(f"{folder}: cannot be used as a checkpoint", "give another run folder"):
        fits = [[type(state[key]) for key in ("step", "tokens", "data")] == [int, int, str]]
        fits.append(0 < state["step"] == state["log"][-1]["step"] <= own.steps)
        for name, p in model.named_parameters():
            kept = {key: x.shape for key, x in state["optimizers"][name].items()}
            fits.append(kept in (dict(momentum=p.shape), dict(step=(), exp_avg=p.shape, exp_avg_sq=p.shape)))
        for record in state["log"]:
            numbers = [record[key] for key in ("train_loss", "val_loss", "val_accuracy", "ms_per_step")]
            numbers += [*record["losses"], *record["activations"], *record["norms"].values()]
            fits.append({type(x) for x in numbers} == {float})
        if not all(fits):
            raise ValueError("its step, data, optimizers or log are not those of such a run")
        summary = folder / "summary.json"
        return own, state, json.loads(summary.read_text()) if summary.exists() else None


def load_checkpoint(folder):
    """(config, model, all that main saved). Only tensors, numbers and text are read, no code."""
    path = Path(folder) / "checkpoint.pt" if Path(folder).is_dir() else Path(folder)
    with told(f"{path}: cannot be used as a checkpoint of {SCRIPT}.py", "give another run folder"):
        if any(file.compress_type for file in zipfile.ZipFile(path).infolist()):
            raise ValueError("it is compressed")  # (and could fill any memory)
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["script"] != SCRIPT:
            raise ValueError(f"it is of {state['script']}.py")
        config = Config(**state["config"])
        config.limits()
        least = 8 * config.width * (config.vocab + config.blocks * (config.width + config.hidden))
        if path.stat().st_size < least:
            raise ValueError("its settings are those of a larger model")
        model = Transformer(config)
        model.load_state_dict(state["model"])
        return config, model, state


def write(path, data):
    """Text or bytes, all of it or none: what is written beside takes the place of the old file."""
    if isinstance(data, str):  # (JSON has no infinity: logarithms of 0 and of no bound are words)
        data = data.replace("-Infinity", '"-inf"').replace("Infinity", '"inf"').encode()
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


# ==== Main ========================================================================================
def schedule(config, step):
    """(factor on learning rates, momentum, tokens that attention sees) at a step."""
    done = step / config.steps
    left = min(1.0, (1 - done) / 0.4)
    warm = min(1.0, step / config.momentum_warmup) if config.momentum_warmup else 1.0
    blocks = max(1, math.ceil(done * (config.window / BLOCK - 0.5)))  # (all at 96 %, as theirs)
    return 0.1 + 0.9 * left, 0.85 + warm * (config.momentum - 0.85), blocks * BLOCK


@torch.no_grad()
def evaluate(model, validation, window, dtype, exchange):
    """(cross-entropy, accuracy, largest entry of the stream after each block) of val_tokens."""
    config, device = model.config, model.head_XD.device
    T, N = config.seq_len, min(config.val_tokens, len(validation) - 1)
    sums, largest = torch.zeros(3, dtype=torch.float64), torch.zeros(config.blocks)
    for start in range(exchange.rank * T, N, exchange.world_size * T):
        tokens_N, seen = validation.read(start, min(T, N - start) + 1), []
        fill = (0, T + 1 - len(tokens_N))  # (of the last sequence, and not counted)
        x_N, y_N = F.pad(tokens_N[:-1], fill).to(device), F.pad(tokens_N[1:], fill, value=-100).to(device)
        stream_ND = model.body(*model.embed(x_N[None], dtype), window, seen)[0]
        largest = largest.maximum(torch.stack(seen).cpu())
        for x_CD, y_C in zip(stream_ND.split(8192), y_N.split(8192)):
            z_CV, counted = model.logits(x_CD), (y_C >= 0).sum()
            loss = F.cross_entropy(z_CV, y_C, reduction="sum")
            sums += torch.stack([loss, (z_CV.argmax(1) == y_C).sum(), counted]).cpu()
    loss, right, count = exchange.sum(sums.to(device)).tolist()
    return loss / count, right / count, exchange.sum(largest.to(device), dist.ReduceOp.MAX).tolist()


def main(config):
    """Train, go on or sample; certify; report. Returns the summary (on rank 0)."""
    config.limits()  # (complains before anything is loaded)
    with told("RANK, WORLD_SIZE, MASTER_ADDR: cannot be used", "unset them, or leave them to torchrun"):
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if not 0 <= rank < world_size:
            raise ValueError(f"there is no RANK {rank} in a WORLD_SIZE of {world_size}")
        if world_size > 1:
            store, _, _ = next(dist.rendezvous("env://", timeout=datetime.timedelta(minutes=5)))
    local = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    names = dict(auto=local if torch.cuda.is_available() else "cpu", cuda=local)
    with told(f"--device {config.device}: cannot be used here", "try cpu, or fewer processes than GPUs"):
        device = torch.zeros(1, device=names.get(config.device, config.device)).device
    cuda = device.type == "cuda"
    if config.sample:
        model = load_checkpoint(config.sample)[1].to(device)
        with told(f"--sample {config.sample}: cannot be sampled from", "give another run"):
            return sample(model, config)

    # ---- load: rank 0 the run that goes on, each rank its data
    begun = [go_on(config) if rank == 0 else None]
    if world_size > 1:
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
            # On one node torchrun keeps its store over a restart, with addresses of dead processes.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if cuda else "gloo", store=store, rank=rank, world_size=world_size,
            device_id=device if cuda else None, timeout=datetime.timedelta(minutes=5))
        dist.broadcast_object_list(begun)
    config, state, summary = begun.pop()
    if summary:
        if rank == 0:
            print(f"The run in {config.out} is finished; start another with another --out.")
        return summary
    if config.batch % (world_size * config.micro_batch):
        raise UserError(f"--batch {config.batch}: must be a multiple of {world_size} process(es) x "
                        f"--micro_batch {config.micro_batch}; change one of them")
    with told(f"--constraint {config.constraint}: cannot be used", "see --help"):
        constraint = find_constraint(config.constraint)
    dtype = getattr(torch, config.dtype, None) or fast_dtype(device)
    flex = cuda and dtype != torch.float64 and config.seq_len % BLOCK == 0
    if not flex and config.seq_len > 8192:
        raise UserError(f"--seq_len {config.seq_len}: must be at most 8192, or on CUDA a multiple of 128 "
                        "with another --dtype than float64; give one, or --preset tiny")
    train, validation, data_name = load_data(config)
    if state and state["tokens"] != len(train):
        raise UserError(f"--data {data_name}: has {len(train)} tokens, not {state['tokens']}; give the same")
    if world_size > 1:  # (a download may take long: whoever waits, waits at the store)
        store.set(f"has data {rank}", "")
        store.wait([f"has data {i}" for i in range(world_size)], datetime.timedelta(hours=2))

    # ---- build
    model = Transformer(config).to(device)
    model.flex, loss_of, exchange = flex, model.loss, Exchange(model, rank, world_size)
    if cuda:  # (block by block: the gradients of one travel while the next is computed)
        loss_of = torch.compile(model.loss, dynamic=False)
        for block in model.blocks:
            block.compile(dynamic=False)
    groups, optimizers, adam = {}, [], [(model.embedding_VD, config.embed_lr)]
    for role, W in model.matrices():
        if exchange.owner[W] == rank:  # (the limit on the head is one on the rows of real tokens)
            real, lr = (config.vocab / len(W), config.head_lr) if role == "head" else (1, config.lr)
            groups.setdefault((lr, config.limits()[role] * real**0.5), []).append(W)
    if groups:
        optimizers.append(Muon(
            [dict(params=params, peak_lr=lr, w_max=w) for (lr, w), params in groups.items()],
            constraint=constraint, every=config.constrain_every, dtype=dtype))
    adam += [(block.query_HE, config.bias_lr) for block in model.blocks if config.logit_scale == 0]
    if adam := [dict(params=[p], peak_lr=lr) for p, lr in adam if exchange.owner[p] == rank]:
        optimizers.append(torch.optim.Adam(adam, betas=(0.8, 0.95), eps=EPS, fused=cuda))
    start, log = (state["step"], state["log"]) if state else (0, [])
    if state:
        model.load_state_dict(state["model"])
        for optimizer in optimizers:
            names = [exchange.names[p] for group in optimizer.param_groups for p in group["params"]]
            saved = {i: state["optimizers"][name] for i, name in enumerate(names)}
            optimizer.load_state_dict(dict(optimizer.state_dict(), state=saved))
    if rank == 0:
        stem, numbers = f"runs/{SCRIPT}_{config.preset}_seed{config.seed}", itertools.count(2)
        out = Path(config.out or stem)
        while out.exists() and not config.out:
            out = Path(f"{stem}_{next(numbers)}")
        out.mkdir(parents=True, exist_ok=bool(config.out))  # (so two runs never share a folder)
        print(f"device {device} x {world_size}, computing in {dtype}, data: {data_name} ({len(train):,} to "
              f"train on, {len(validation):,} to validate), run folder {out}, from step {start}", flush=True)

    # ---- train
    losses, began, since, state = [], time.perf_counter(), start, None
    tokens, evals = config.batch * config.seq_len, config.evals
    for step in range(start, config.steps):
        factor, momentum, window = schedule(config, step)
        loss, share = 0.0, config.micro_batch
        for first in range(rank * share, config.batch, world_size * share):
            tokens_BT = train.sequences(step, range(first, first + share), config)
            tokens_BT = (tokens_BT.pin_memory() if cuda else tokens_BT).to(device, non_blocking=True)
            x_ND = model.body(*model.embed(tokens_BT[:, :-1], dtype), window).flatten(0, 1)
            chunks = zip(x_ND.split(8192), tokens_BT[:, 1:].flatten().split(8192))
            part = sum(loss_of(x_CD, y_C) for x_CD, y_C in chunks)
            exchange.last_micro_step = first + world_size * share >= config.batch
            part.backward()
            loss = loss + part.detach()
        while exchange.pending:
            exchange.pending.pop().wait()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group.update(lr=group["peak_lr"] * factor, momentum=momentum)  # (Adam has none)
            optimizer.step()
        model.zero_grad()
        if exchange.owner[model.embedding_VD] == rank and not config.baseline:
            model.embedding_VD.data.copy_(cap_rows(model.embedding_VD.data))
        exchange.share_weights()
        losses.append(loss / tokens)

        done = step + 1
        evaluates = evals * done // config.steps > evals * step // config.steps
        if done % 10 and not evaluates:  # (not at each step: a GPU would wait for it)
            continue
        recent = exchange.sum(torch.stack(losses[-10:]))
        named = [("the loss", recent), *model.named_parameters()]
        if bad := [name for name, x in named if not x.isfinite().all()]:
            raise UserError(f"step {done}: diverged, {bad[-1]} is not finite; try a smaller --lr")
        if not evaluates:
            if done == start + 10:  # (these were slow: compilation)
                began, since = time.perf_counter(), done
            continue
        ms = 1000 * (time.perf_counter() - began) / (done - since)
        val_loss, accuracy, entries = evaluate(model, validation, window, dtype, exchange)
        all_losses = exchange.sum(torch.stack(losses)).tolist()
        states = exchange.gather_states(optimizers)
        if rank == 0:
            bound = certificate(model)
            log.append(dict(
                step=done, train_loss=sum(all_losses) / len(all_losses), val_loss=val_loss,
                val_accuracy=accuracy, norms=bound["norms"],
                max_weight_norm=max(bound["norms"][role] for role in ROLES if role in bound["norms"]),
                lipschitz_log10=bound["log10"], lipschitz_product_log10=bound["product_log10"],
                activations=entries, ms_per_step=ms, tokens_per_second=1000 * tokens / ms,
                memory_gib=torch.cuda.max_memory_allocated() / 2**30 if cuda else None, losses=all_losses))
            buffer = io.BytesIO()
            torch.save(dict(
                script=SCRIPT, config=dataclasses.asdict(config), step=done, log=log, data=data_name,
                tokens=len(train), model=model.state_dict(), optimizers=states), buffer)
            write(out / "checkpoint.pt", buffer.getvalue())
            write(out / "config.json", json.dumps(dataclasses.asdict(config), indent=1))
            write(out / "log.jsonl", "".join(json.dumps(record) + "\n" for record in log))
            print(f"step {done:5d}/{config.steps}  train loss {log[-1]['train_loss']:.3f}  validation "
                  f"loss {val_loss:.3f}  accuracy {100 * accuracy:5.2f} %  largest norm "
                  f"{log[-1]['max_weight_norm']:.3f}  largest entry {max(entries):.2f}  untuned bound "
                  f"{power(bound['log10'])}  {ms:.0f} ms/step  {tokens / ms:,.1f}k tokens/s  "
                  f"{ms / 1000 * (config.steps - done):.0f} s left", flush=True)
        losses, began, since = [], time.perf_counter(), done
    return report(config, model, out, log, data_name, dtype, world_size) if rank == 0 else None


def report(config, model, out, log, data_name, dtype, world_size):
    """summary.json, what came out and a picture of a finished run. Returns the summary."""
    last, bound = log[-1], certificate(model, free=tuned(model))
    summary = {key: value for key, value in last.items() if key not in ("step", "losses")}
    summary.update((key, getattr(config, key)) for key in ("preset", "steps", "baseline", "seed"))
    summary.update(
        script=SCRIPT, loss_temperature=1.0, processes=world_size, data=data_name,
        params=sum(p.numel() for p in model.parameters()), device=str(model.head_XD.device),
        lipschitz_norm="max-token RMS->max-token RMS, embeddings to logits, inside the ball",
        w_max=config.limits() if config.constraint != "none" else None, torch=torch.__version__,
        lipschitz_log10=bound["log10"], dtype=str(dtype).removeprefix("torch."),
        train_seconds=sum(record["ms_per_step"] * len(record["losses"]) for record in log) / 1000)
    write(out / "summary.json", json.dumps(summary, indent=1))
    print(f"\n{config.preset}: Muon + {config.constraint}, w_max {config.w_max}, seed {config.seed}\n"
          f"  accuracy {100 * last['val_accuracy']:.2f} %, cross-entropy {last['val_loss']:.3f}\n"
          "  largest norm (RMS->RMS)", *(f"  {role} {n:.4g}" for role, n in bound["norms"].items()))
    print(f"  LIPSCHITZ CONSTANT {power(bound['log10'])} (embeddings to logits, max-token RMS; product "
          f"{power(bound['product_log10'])}, ellipsoid {power(bound['ellipsoid_log10'])})")
    draw(config, out, log)
    print(f"Picture, log, checkpoint: {out}. Sample: python {SCRIPT}.py --sample {out}\n"
          f"Attack its claims: python verify_lipschitz.py {out}")
    return summary


def draw(config, out, log):
    """curves.png: losses, norms and largest entries."""
    from matplotlib.figure import Figure  # (not pyplot: whoever calls main keeps their backend)
    figure, steps = Figure(figsize=(14, 4.5), layout="constrained"), [record["step"] for record in log]
    curves = {("loss, nats a token", "train", "validation"): [(r["train_loss"], r["val_loss"]) for r in log],
              ("largest norm (RMS->RMS)", *log[0]["norms"]): [[*r["norms"].values()] for r in log],
              ("largest entry after block", *range(config.blocks)): [r["activations"] for r in log]}
    for panel, ((title, *names), values) in zip(figure.subplots(1, 3), curves.items()):
        panel.plot(steps, values, "o-", label=names)
        panel.set(title=f"{config.preset}: {title}", xlabel="step")
        panel.legend()
    figure.savefig(out / "curves.png", dpi=110)


@torch.no_grad()
def sample(model, config):
    """Print the prompt and `length` tokens more; each sees up to 1024 tokens before it."""
    generator, decode = torch.Generator().manual_seed(config.seed), bytes
    device, tokens = model.head_XD.device, list(config.prompt.encode() or b"\n")
    dtype = getattr(torch, model.config.dtype, None) or fast_dtype(device)
    if model.config.vocab != 256:  # (else tokens are bytes)
        encoding = gpt2()
        decode, tokens = encoding.decode_bytes, [encoding.eot_token, *encoding.encode_ordinary(config.prompt)]
    print(config.prompt, end="")
    for _ in range(config.length):
        window_BT = torch.tensor([tokens[-min(model.config.seq_len, 1024):]], device=device)
        logits_V = model(window_BT, dtype)[0, -1].cpu().double()
        z_V = (logits_V - logits_V.max()) / (config.temperature or 1e-30)
        tokens.append(torch.multinomial(z_V.softmax(0), 1, generator=generator).item())
        print(decode(tokens[-1:]).decode(errors="replace"), end="", flush=True)
    print()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # (a terminal may lack characters of the text)
    torch.set_flush_denormal(True)  # (a softmax has many such numbers, which are slow on a CPU)
    rank, status = os.environ.get("RANK"), 0
    try:
        main(parse_arguments())
        if dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt:
        status = 130
        print(f"\n{SCRIPT}.py: interrupted; with a checkpoint it goes on by --out FOLDER", file=sys.stderr)
    except Exception as problem:
        status = 2 if isinstance(problem, (UserError, OSError)) else 1
        if rank and (rank != "0" or status == 1):
            time.sleep(5)  # (so that torchrun ends whoever only lost the others, or found the same)
        if status == 1:
            sys.excepthook(*sys.exc_info())
        print(f"{SCRIPT}.py: {f'rank {rank}: ' if rank else ''}{problem}", file=sys.stderr)
    sys.stdout.flush()
    os._exit(status)  # (sys.exit may wait for others for ever, and gloo's threads abort one in 20)
