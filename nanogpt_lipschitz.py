"""Tutorial 3: a GPT on web text, held to a Lipschitz constant at every step, by torchrun on any number of GPUs.

WHAT IT SHOWS. The paper's largest experiment (arXiv 2507.13338, the NanoGPT section): 162M parameters
trained on FineWeb without layer norm, QK norm or softcapping, because every weight matrix is kept within a
norm. New against shakespeare.py: several processes, each of which owns a share of the matrices,
orthogonalises and constrains those and sends them to the others; documents and sliding windows in attention.

COMMANDS
    python nanogpt_lipschitz.py                                                    # minutes on a laptop, no network
    torchrun --standalone --nproc_per_node 8 nanogpt_lipschitz.py --preset cap1    # the paper's run, on FineWeb
    torchrun --standalone --nproc_per_node 2 nanogpt_lipschitz.py --micro_batch 8  # the small run, two processes
    torchrun --standalone --nproc_per_node 8 --max-restarts 3 nanogpt_lipschitz.py --preset cap1 --out DIR
                                    # DIR holds a stopped run: it goes on, on any number of processes. On several
                                    # nodes restarts need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment
    python nanogpt_lipschitz.py --sample runs/NAME --prompt "def " --temperature 0.8
    python nanogpt_lipschitz.py --prepare SOURCE --data DIR                        # token shards of a text of yours

RESULT (two cores of a CPU, torch 2.13, one seed; results/README.md has more). RESULT_LINE
    The CUDA path is tested as far as a CPU allows, and unmeasured.

DIFFERENCES FROM THE AUTHORS' RUN, on purpose. The softmax and the head's limit are over the 50257 real tokens,
not over 50304 rows (the first loss is ln 50257 = 10.825). msign never exceeds 1, and the constraint waits some
steps where it is certain that the limit holds. Embeddings are kept at an RMS of at most 1. The presets tight and
tiny_tight are ours. In validation, sequences are as long as in training.

ANCESTRY. The shape of the experiment is the authors', which is modded-nanogpt's (Jordan et al.); the format of
token shards is Karpathy's. None of their code is used.
"""

import argparse
import copy
import dataclasses
import datetime
import io
import itertools
import json
import math
import os
import re
import sys
import sysconfig
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from tqdm import tqdm

from constraints import cap_rows, exact_norm, find_constraint, sigma_per_norm, singular_values
from muon import Muon, fast_dtype

SCRIPT = "nanogpt_lipschitz"
ROLES = ("q", "k", "v", "o", "in", "out", "head")  # of the matrices: attention, MLP, unembedding
BLOCK = 128  # positions that attention takes or skips together
DENSE = 8192  # positions of which a T x T mask is still made

# Shapes: B sequences, T tokens in a sequence, D dimension of a token's vector, H heads, E = D / H, V tokens
# in the vocabulary, X something wide, N positions, C a chunk of them, Q blocks of 128 positions.


# ==== Config: every field is a flag ===============================================================
def flag(default, text, low=None, high=math.inf, choices=None):
    """A field: its default, its help, and the range or the choices that it is checked against."""
    return dataclasses.field(default=default, metadata=dict(help=text, range=(low, high), choices=choices))


class UserError(Exception):
    """What the user can mend, in one line: what was given, what is needed, how. Exit status 2."""


@dataclasses.dataclass
class Config:
    preset: str = flag("tiny", "named settings, see the end of this help; other flags override")
    # data
    data: str = flag("fineweb", "fineweb (published GPT-2 tokens, downloaded), stand-in (bytes of Python's "
                     "library), or a folder of shards *.bin with the word train or val in their names")
    shards: int = flag(0, "training shards to read; 0: all, of fineweb as many as the run needs", 0)
    shuffle: bool = flag(False, "sequences in random order; web text is shuffled already")
    vocab: int = flag(50257, "different tokens V; the last one begins a document", 2, 2**16)
    val_tokens: int = flag(10_485_760, "validation tokens, from the start of the validation shards", 1)
    # model
    width: int = flag(768, "dimension D of a token's vector", 1, 2**14)
    blocks: int = flag(12, "blocks, each of attention and an MLP", 1, 1000)
    heads: int = flag(6, "attention heads H, each of dimension D / H", 1, 2**10)
    hidden: int = flag(3072, "neurons of an MLP", 1, 2**17)
    window: int = flag(1792, "tokens that attention sees at the end, in whole blocks of 128; it grows to "
                       "there from 128; in all but 4 layers half of it", 1, 2**20)
    activation: str = flag("gelu", "gelu / 1.1289, or maxmin on pairs", choices=("gelu", "maxmin"))
    logit_scale: float = flag(24.0, "on the attention logits q.k / (D / H), with RoPE; 0: attention by "
                              "position alone, learned, which costs no Lipschitz constant", 0)
    attention_scale: float = flag(1 / 3, "factor on the output of attention; 0: 1 / sqrt(H)", 0)
    residual_scale: float = flag(1.0, "2 * blocks * a in x <- (1 - a) x + a block(x)", 0)
    final_scale: float = flag(1.0, "fixed factor on the logits, counted in bounds", 0)
    w_max: str = flag("1", "limit on RMS->RMS norms: one number, or 7: " + ",".join(ROLES))
    baseline: bool = flag(False, "the unconstrained peer: RMSNorm, QK norm, softcap, x + block(norm(x))")
    # training
    constraint: str = flag("soft_cap", "none, weight_decay, spectral_weight_decay, specnorm, stiefel, "
                           "hammer, soft_cap, hard_cap (constraints.py), or yours as FILE.py:NAME")
    constrain_every: int = flag(4, "about how many steps a constraint waits that can", 1, 64)
    steps: int = flag(6200, "training steps", 1)
    batch: int = flag(8, "sequences a step, over all processes", 1, 2**20)
    seq_len: int = flag(49_152, "tokens of a sequence; it holds parts of many documents", 1, 2**20)
    micro_batch: int = flag(1, "sequences a process takes at once; memory, not the result", 1)
    lr: float = flag(0.05, "Muon's learning rate in the blocks: the RMS->RMS norm of a step", 0)
    head_lr: float = flag(0.005, "the same for the head", 0)
    embed_lr: float = flag(0.1, "learning rate of the embedding (Adam)", 0)
    bias_lr: float = flag(0.1, "learning rate of attention by position (Adam)", 0)
    momentum: float = flag(0.95, "Muon's momentum, after a rise from 0.85", 0, 0.9999)
    momentum_warmup: int = flag(300, "steps of that rise", 0)
    cooldown: float = flag(0.4, "last part of the steps, in which learning rates fall linearly ...", 0, 1)
    final_lr: float = flag(0.1, "... to this share of what they were", 0)
    loss_temperature: float = flag(1.0, "factor on the logits in the loss, not in bounds", 1e-30)
    # run
    seed: int = flag(0, "of initialisation, order of the data, samples", 0, 2**31 - 1)
    dtype: str = flag("auto", "of forward and backward; weights are float32 (float64: those too); auto: "
                      "what is fast", choices=("auto", "float32", "bfloat16", "float64"))
    device: str = flag("auto", "auto, cpu, cuda or mps; auto: cuda if there is one, a GPU a process")
    compile: bool = flag(True, "torch.compile on CUDA; without it sequences of at most 8192 tokens")
    evals: int = flag(10, "evaluations on the validation tokens, each with a checkpoint", 1)
    out: str = flag("", "run folder, a stopped run goes on; default: a new one in runs/")
    # instead of training
    prepare: str = flag("", "make shards in --data DIR of: a text file, a folder of .txt, .jsonl, .parquet "
                        "(column text), or a data set on the Hub (NAME or NAME:CONFIGURATION)")
    shard_tokens: int = flag(100_000_000, "tokens of a shard that --prepare writes", 1, 2**31 - 1)
    sample: str = flag("", "a run folder: only sample from it")
    prompt: str = flag("", "text that the sample continues; default: the start of a document")
    length: int = flag(300, "tokens to sample", 1)
    temperature: float = flag(0.8, "of the sample; 0: always the most probable token", 0)
    top_k: int = flag(0, "sample from so many most probable tokens; 0: from all", 0)

    @classmethod
    def of(cls, preset=None, **given):
        """A preset with changes. `given` is kept: a run that is loaded must not contradict it."""
        name = preset or "tiny"
        if name not in PRESETS:
            raise UserError(f"--preset {name}: must be one of {', '.join(PRESETS)}")
        settings = {**PRESETS[name], **given, "preset": name}
        if settings.get("baseline"):
            settings.setdefault("constraint", "none")
        config = cls(**settings)
        config.given = given if preset is None else dict(given, preset=preset)
        return config

    def limits(self):
        """w_max of each role of matrix. UserError if a setting is out of its range."""
        for f in dataclasses.fields(self):
            value, (low, high), choices = getattr(self, f.name), f.metadata["range"], f.metadata["choices"]
            if choices and value not in choices:
                raise UserError(f"--{f.name} {value}: must be one of {', '.join(choices)}")
            if low is not None and not (low <= value <= high and value < math.inf):
                raise UserError(f"--{f.name} {value}: must be a finite number from {low} to {high}")
        content, unconstrained = self.logit_scale > 0, self.constraint == "none"
        for name, ok, requirement in (
                ("heads", self.width % self.heads == 0, f"a divisor of the width, {self.width}"),
                ("heads", self.width // self.heads % 4 == 0, "such that width / heads is divisible by 4"),
                ("residual_scale", self.residual_scale <= 2 * self.blocks, "at most 2 * blocks"),
                ("hidden", self.hidden % 2 == 0 or self.activation == "gelu", "even for maxmin"),
                ("micro_batch", self.batch % self.micro_batch == 0, f"a divisor of the batch, {self.batch}"),
                ("constraint", unconstrained or not self.baseline, "none for the baseline"),
                ("logit_scale", content or not self.baseline, "above 0 for the baseline"),
                ("loss_temperature", self.loss_temperature == 1 or not self.baseline, "1 for the baseline"),
                ("data", not self.prepare or self.data != PRESETS[self.preset].get("data", "fineweb"),
                 "a folder to write the shards of --prepare to")):
            if not ok:
                raise UserError(f"--{name} {getattr(self, name)}: must be {requirement}")
        try:
            find_constraint(self.constraint)
        except ValueError as problem:
            raise UserError(f"--constraint {self.constraint}: {problem}") from problem
        limits = self.w_max.split(",") * (1 if "," in self.w_max else 7)
        try:
            if len(limits) == 7 and all(0 < float(w) < math.inf for w in limits):
                return {role: float(w) for role, w in zip(ROLES, limits)}
        except ValueError:
            pass
        raise UserError(f"--w_max {self.w_max}: must be a finite number above 0, or 7 of them: 1,1,1,1,1,1,2")


BY_POSITION = dict(activation="maxmin", logit_scale=0.0, attention_scale=0.0, w_max="1", final_scale=40.0)
TINY = dict(data="stand-in", shuffle=True, vocab=256, width=128, blocks=4, heads=4, hidden=512, seq_len=256,
            window=256, batch=16, micro_batch=16, steps=300, w_max="3", logit_scale=1.0, lr=0.1, head_lr=0.1,
            embed_lr=0.02, momentum_warmup=30, evals=6)
PRESETS = {
    "tiny": TINY,
    "tiny_tight": {**TINY, **BY_POSITION, "hidden": 640, "residual_scale": 4.0},
    "cap1": {},  # the paper's run with spectral cap at 1: the defaults above are its settings
    "specnorm8": dict(constraint="specnorm", w_max="8", steps=1770, logit_scale=128**0.5 / 64),
    "tight": dict(BY_POSITION, hidden=3840, residual_scale=12.0),
    "baseline": dict(baseline=True, constraint="none"),  # cap1 with norms and without limits
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
SOFTCAP = 15.0  # of the baseline's logits


def maxmin(z):
    """(max, min) of pairs of neurons, i of the first half and i of the second (Anil et al. 2019)."""
    a, b = z.chunk(2, -1)
    excess = (a - b).relu()  # (maximum and minimum take twice the time backward)
    return torch.cat([b + excess, a - excess], -1)


def rms_norm(x):
    return F.rms_norm(x, (x.shape[-1],), eps=1e-6)


def rotate(x_BHTE, speeds=None):
    """RoPE: turn the pair (i, i + E/2) of a head at position t by t * speeds[i] radians, in float32 at least.

    Default: modded-nanogpt's half-truncated form, E/4 pairs at 1 to 1/1024 radians a token; others rest.
    """
    T, E = x_BHTE.shape[-2:]
    wide = torch.promote_types(x_BHTE.dtype, torch.float32)
    if speeds is None:
        speeds = torch.cat([1024 ** -torch.linspace(0, 1, E // 4), torch.zeros(E // 4)])
    t = torch.arange(T, device=x_BHTE.device, dtype=wide)
    angle_TE = t[:, None] * speeds.to(t)
    cos, sin = angle_TE.cos(), angle_TE.sin()
    first, second = x_BHTE.to(wide).chunk(2, -1)
    return torch.cat([cos * first + sin * second, cos * second - sin * first], -1).to(x_BHTE.dtype)


def dense_mask(docs_BT, blocks):
    """(B, T, T): position t sees j <= t of its own document, in its own and the blocks - 1 blocks before."""
    t = torch.arange(docs_BT.shape[1], device=docs_BT.device)
    near_TT = (t[:, None] >= t) & (t[:, None] // BLOCK - t // BLOCK < blocks)
    return near_TT & (docs_BT[:, :, None] == docs_BT[:, None, :])


def block_mask(docs_BT, blocks):
    """The same for flex_attention, made of blocks without ever looking at T x T positions.

    Numbers of documents rise along a sequence, so a block of queries and one of keys can have a document in
    common only if their ranges overlap. Blocks with something to see and something not to see are masked
    entry by entry, but not for the window: it ends between blocks, and so a new one compiles nothing anew.
    """
    B, T = docs_BT.shape
    low_BQ, high_BQ = docs_BT.view(B, -1, BLOCK)[..., 0], docs_BT.view(B, -1, BLOCK)[..., -1]
    q = torch.arange(T // BLOCK, device=docs_BT.device)
    back_QQ = q[:, None] - q
    some_BQQ = ((back_QQ >= 0) & (back_QQ < blocks) & (low_BQ[:, :, None] <= high_BQ[:, None, :])
                & (low_BQ[:, None, :] <= high_BQ[:, :, None]))
    whole_BQQ = some_BQQ & (back_QQ > 0) & (low_BQ[:, None, :] == high_BQ[:, :, None])
    lists = []
    for x_BQQ in (some_BQQ & ~whole_BQQ, whole_BQQ):  # how many blocks of keys, and which: those first
        order_BQQ = torch.argsort(x_BQQ.int(), dim=-1, descending=True, stable=True)
        lists += [x_BQQ.sum(-1, dtype=torch.int32)[:, None], order_BQQ.int()[:, None]]

    def sees(b, h, t, j):
        return (t >= j) & (docs_BT[b, t] == docs_BT[b, j])

    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(T, T))


class Block(torch.nn.Module):
    """x <- (1 - a) x + a attention(x), then x <- (1 - a) x + a mlp(x), with a = mix. No biases.

    The baseline: x <- x + attention(norm(x)), then x <- x + mlp(norm(x)).
    """

    def __init__(self, config, index):
        super().__init__()
        self.config = config
        self.mix = config.residual_scale / (2 * config.blocks)
        self.attention_scale = config.attention_scale or config.heads**-0.5
        D, Parameter = config.width, torch.nn.Parameter
        if config.logit_scale > 0:  # else attention does not look at content
            self.q = Parameter(torch.zeros(D, D))
            self.k = Parameter(torch.zeros(D, D))
        self.v = Parameter(torch.zeros(D, D))
        self.o = Parameter(torch.zeros(D, D))
        self.w_in = Parameter(torch.zeros(config.hidden, D))
        self.w_out = Parameter(torch.zeros(D, config.hidden))
        if config.logit_scale == 0:
            # Waves such that head h of block i starts with a logit of about -2 |x| / step, x the distance
            # from c = h step tokens ago, and ends near -16: as |x| = 2/pi integral (1 - cos(s x)) / s^2 ds.
            step, waves = 2 ** min(index, 5), D // config.heads // 2
            ratio = math.log(4 * max(config.window, 2)) / max(1, waves - 1)
            self.speeds_E = 2 * torch.exp(-ratio * torch.arange(waves))  # (half as many as E)
            size_E = 4 / math.pi * ratio * step * self.speeds_E / ((step * self.speeds_E) ** 2 + 1 / 64)
            phase_HE = step * torch.arange(config.heads)[:, None] * self.speeds_E
            self.query_HE = Parameter(torch.cat([size_E * phase_HE.cos(), size_E * phase_HE.sin()], -1))

    def matrices(self):
        """[(role, matrix)]"""
        named = self.named_parameters()
        return [(name.removeprefix("w_"), W) for name, W in named if name != "query_HE"]

    def attention(self, x_BTD, mask=None):
        """beta sum_h o_h sum_j softmax_j(s q_t^h . k_j^h) v_j^h over all j that t sees, for each t.

        mask: of dense_mask or block_mask; None: all before, one document.
        """
        B, T, D = x_BTD.shape
        H, dtype, content = self.config.heads, x_BTD.dtype, self.config.logit_scale > 0
        matrices = [self.q, self.k, self.v] if content else [self.v]
        parts_BTX = F.linear(x_BTD, torch.cat([W.to(dtype) for W in matrices]))
        *qk, v_BHTE = (part.view(B, T, H, D // H).transpose(1, 2) for part in parts_BTX.split(D, -1))
        if content:
            s = self.config.logit_scale / (D // H)
            q_BHTE, k_BHTE = (rms_norm(x) for x in qk) if self.config.baseline else qk
            q_BHTE, k_BHTE = rotate(q_BHTE), rotate(k_BHTE)
        else:
            # Query and key are the same for all tokens, then turned by position: the logit is a learned
            # sum of waves in the distance, sum_i a_i cos(speed_i (t - j)) + b_i sin(speed_i (t - j)). (Not a
            # table by distance: its gradient would be 2e9 atomic additions a step of cap1's size.)
            s, key_E = 1.0, torch.cat([torch.ones_like(self.speeds_E), torch.zeros_like(self.speeds_E)])
            q_BHTE = rotate(self.query_HE[:, None].expand(H, T, -1), self.speeds_E).to(dtype).expand(B, -1, -1, -1)
            k_BHTE = rotate(key_E.expand(H, T, -1), self.speeds_E).to(dtype).expand(B, -1, -1, -1)
        if isinstance(mask, BlockMask):
            # (torch 2.13, compiled for a CPU, is wrong if v is a view into a longer tensor: make all whole)
            q_BHTE, k_BHTE, v_BHTE = (x.contiguous() for x in (q_BHTE, k_BHTE, v_BHTE))
            y_BHTE = flex_attention(q_BHTE, k_BHTE, v_BHTE, block_mask=mask, scale=s)
        else:
            causal, mask = mask is None, mask if mask is None else mask[:, None]
            y_BHTE = F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, mask, is_causal=causal, scale=s)
        y_BTD = y_BHTE.transpose(1, 2).reshape(B, T, D)
        return F.linear(y_BTD, (self.attention_scale * self.o).to(dtype))

    def mlp(self, x_BTD):
        """w_out maxmin(w_in x), or w_out gelu(w_in x) / 1.1289."""
        h_BTX, w_out = F.linear(x_BTD, self.w_in.to(x_BTD.dtype)), self.w_out
        if self.config.activation == "gelu":
            h_BTX, w_out = F.gelu(h_BTX), w_out / GELU_SCALE
        else:
            h_BTX = maxmin(h_BTX)
        return F.linear(h_BTX, w_out.to(x_BTD.dtype))

    def forward(self, x_BTD, mask=None):
        if self.config.baseline:
            x_BTD = x_BTD + self.attention(rms_norm(x_BTD), mask)
            return x_BTD + self.mlp(rms_norm(x_BTD))
        x_BTD = torch.lerp(x_BTD, self.attention(x_BTD, mask), self.mix)
        return torch.lerp(x_BTD, self.mlp(x_BTD), self.mix)


class Transformer(torch.nn.Module):
    """Embedding (V vectors of RMS at most 1), blocks, head: logits = final_scale * head x.

    Starts with orthogonal matrices; o, w_out and the head at 0, and so with a loss of ln V.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.mix = config.residual_scale / (2 * config.blocks)
        self.flex = False  # flex_attention, which CUDA can compile, in the place of a T x T mask
        generator = torch.Generator().manual_seed(config.seed)
        embedding_VD = torch.randn(config.vocab, config.width, generator=generator)
        self.embedding_VD = torch.nn.Parameter(embedding_VD if config.baseline else cap_rows(embedding_VD))
        self.blocks = torch.nn.ModuleList(Block(config, i) for i in range(config.blocks))
        padded = math.ceil(config.vocab / 128) * 128  # (a round size is faster; rows from V on stay 0)
        self.head_XD = torch.nn.Parameter(torch.zeros(padded, config.width))
        limits, stiefel = config.limits(), config.constraint == "stiefel"
        for role, W in self.matrices():
            # Where blocks make up half of the stream, zeros would lose the signal; stiefel allows none.
            if role != "head" and (role not in ("o", "out") or stiefel or self.mix >= 0.4):
                torch.nn.init.orthogonal_(W, generator=generator)
                W.data.mul_(sigma_per_norm(W) * (limits[role] if stiefel else min(1.0, limits[role])))
        if config.dtype == "float64":
            self.double()

    @property
    def head_VD(self):
        """Of the head, the rows of real tokens."""
        return self.head_XD[:self.config.vocab]

    def matrices(self):
        """[(role, matrix)] of all that the constraint holds."""
        pairs = [pair for block in self.blocks for pair in block.matrices()]
        return pairs + [("head", self.head_XD)]

    def body(self, x_BTD, docs_BT=None, window=None):
        """Embedded tokens to the end of the stream. docs_BT: number of each token's document (None: one)."""
        if docs_BT is None:
            docs_BT = torch.zeros(x_BTD.shape[:2], dtype=torch.int64, device=x_BTD.device)
        seen, n = math.ceil((window or self.config.window) / BLOCK), len(self.blocks)
        make = block_mask if self.flex else dense_mask
        far, near = make(docs_BT, seen), make(docs_BT, max(1, seen // 2))
        for i, block in enumerate(self.blocks):  # (of 12 blocks 0, 4, 7 and 11 see far)
            x_BTD = block(x_BTD, far if i in (0, n // 3, n - 1 - n // 3, n - 1) else near)
        return rms_norm(x_BTD) if self.config.baseline else x_BTD

    def embed(self, tokens_BT, dtype):
        """(x_BTD, docs_BT)"""
        x_BTD = F.embedding(tokens_BT, self.embedding_VD).to(dtype)
        return x_BTD, (tokens_BT == self.config.vocab - 1).cumsum(1)

    def logits(self, x_ND, head_XD=None):
        """(..., V), in float32 at least, from the end of the stream."""
        head_XD = self.head_XD if head_XD is None else head_XD
        z_NX = F.linear(x_ND, (self.config.final_scale * head_XD).to(x_ND.dtype))[..., :self.config.vocab]
        z_NX = z_NX.to(torch.promote_types(z_NX.dtype, torch.float32))
        return SOFTCAP * torch.tanh(z_NX / SOFTCAP) if self.config.baseline else z_NX

    def loss(self, x_ND, head_XD, y_N):
        """Sum of the cross-entropies at the loss temperature. (Taken to the head: smaller than logits.)"""
        logits_NV = self.logits(x_ND, self.config.loss_temperature * head_XD)
        return F.cross_entropy(logits_NV, y_N, reduction="sum")

    def forward(self, tokens_BT, dtype=torch.float32):
        """Logits (B, T, V)."""
        return self.logits(self.body(*self.embed(tokens_BT, dtype)))


def head_gradients(model, loss_of, x_ND, y_N, chunk=8192):
    """(loss, its gradient by x_ND); that by the head is added to head_XD.grad.

    In chunks of tokens: 48k x 50k logits and their gradient would be 20 GB.
    """
    total, parts, head_XD = 0.0, [], model.head_XD
    for x_CD, y_C in zip(x_ND.detach().split(chunk), y_N.split(chunk)):
        x_CD.requires_grad_()
        loss = loss_of(x_CD, head_XD, y_C)
        dx_CD, dhead_XD = torch.autograd.grad(loss, (x_CD, head_XD))
        head_XD.grad = dhead_XD if head_XD.grad is None else head_XD.grad.add_(dhead_XD)
        total, parts = total + loss.detach(), [*parts, dx_CD]
    return total, torch.cat(parts)


# ==== Certificate: how far logits can move if all embeddings move, from the weights alone =========
# The derivation is that of shakespeare.py, where each inequality is proved and attacked; a test holds the
# two together. In short, within the ball rms(x_t) <= R, with C_h = o_h v_h, r = R sqrt(D), for any t_h > 0:
#   1. Head h moves by C_h (an average of moved tokens) and C_h (a moved pattern of tokens), the latter of
#      length e_h r if logits move by e_h. Heads add up to sigma([C_h / t_h]) sqrt(sum t_h^2 |.|^2).
#   2. e_h <= s (|dq_h| + |q_h|/r) sigma(k_h) r, where all q_h come from one vector and share its energy.
#   3. Derivative <= value + pattern R^2; of each line the least counts, Q = q with rows of h times t_h sigma(k_h):
#          value    beta sigma([C_h/t_h]) |t|, beta sigma(o) |sigma(v_h)|, beta sum sigma(C_h)
#          pattern  beta 2 s D sigma([C_h/t_h]) sigma(Q), beta 2 s D sigma(o) sigma(Q of t_h = sigma(v_h))
#   4. The output of attention is at most value * R, the MLP's at most its gain times R. So R goes on, and the
#      constant is multiplied by the factors of attention and MLP, each with the stream.
# Documents and windows take tokens out of an average and do not move: they change nothing above. Logits by
# position do not move: no pattern. Norm layers are not what bounds are made of: none for the baseline.
def sigma(W):
    """Largest singular value, float64, of a matrix or each of a stack."""
    G = W @ W.mT if W.shape[-2] <= W.shape[-1] else W.mT @ W
    return torch.linalg.eigvalsh(G)[..., -1].clamp(min=0).sqrt()


@torch.no_grad()
def certificate(model, rho=0.0):
    """Certified constants from embedded tokens to logits (max-token RMS both), float64, rounded up.

    rho: how far (RMS) the embeddings may be from those of the table.
    Returns a dict: rows (radii, terms, factors of each block), body_log10 (to the end of the stream), log10
    (to the logits), product_log10 (the product of the factors, at present the same), radius (of the stream
    at the end), norms ({role: largest RMS->RMS norm}).
    """
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError("the model has weights that are not finite: there is nothing to certify")
    a, up, norms = model.mix, 1 + 1e-9, {}
    for role, W in [pair for block in model.blocks for pair in block.matrices()] + [("head", model.head_VD)]:
        norms[role] = max(norms.get(role, 0.0), exact_norm(W).item())
    norms["embedding"] = model.embedding_VD.detach().double().square().mean(1).sqrt().max().item()
    R, body, rows = norms["embedding"] * up + rho, 0.0, []
    if model.config.baseline:
        return dict(rows=rows, body_log10=math.inf, log10=math.inf, product_log10=math.inf, radius=math.inf,
                    norms=norms)
    for block in model.blocks:
        block = copy.deepcopy(block).cpu().double()
        row = dict(radius=R, **attention_terms(block), **mlp_terms(block))
        row["attention"] = (1 - a) + a * (row["value"] + row["pattern"] * R * R)
        row["radius_mlp"] = R * ((1 - a) + a * row["value"]) * up
        R = row["radius_mlp"] * ((1 - a) + a * row["mlp_gain"]) * up
        body += log10(row["attention"] * up) + log10(row["mlp"] * up)
        rows.append(row)
    end = body + log10(norms["head"] * model.config.final_scale)
    return dict(rows=rows, body_log10=body, log10=end, product_log10=end, radius=R, norms=norms)


def log10(x):
    return math.log10(x) if x > 0 else -math.inf


def attention_terms(block):
    """value and pattern of step 3. (Of float64 weights.)"""
    H, D = block.config.heads, block.config.width
    v_HED, o_HDE = block.v.view(H, D // H, D), block.o.view(D, H, D // H).transpose(0, 1)
    C_HDD = o_HDE @ v_HED
    CC_HDD, v_H, C_H, o = C_HDD @ C_HDD.mT, sigma(v_HED), sigma(C_HDD), sigma(block.o)
    tiny = 1e-9 * (1 + v_H.max())
    starts = [v_H + tiny, (C_H + tiny).sqrt(), torch.ones_like(C_H)]
    bracket = [torch.linalg.eigvalsh((CC_HDD / t_H[:, None, None].square()).sum(0))[-1].clamp(min=0).sqrt()
               for t_H in starts]
    value = min([b * t_H.norm() for b, t_H in zip(bracket, starts)] + [o * v_H.norm(), C_H.sum()])
    pattern = torch.zeros(())
    if block.config.logit_scale > 0:
        q_HED, k_H = block.q.view(H, D // H, D), sigma(block.k.view(H, D // H, D))
        Q = [sigma(((t_H * k_H)[:, None, None] * q_HED).reshape(D, D)) for t_H in (*starts, v_H)]
        pattern = 2 * block.config.logit_scale * H * min(b * q for b, q in zip([*bracket, o], Q))
    beta = block.attention_scale * (1 + 1e-9)
    return dict(value=beta * value.item(), pattern=beta * pattern.item())


def mlp_terms(block):
    """mlp_derivative and mlp_gain, and mlp, the factor with the stream (steps 7 and 8 of shakespeare.py)."""
    a, w_in, w_out = block.mix, block.w_in, block.w_out
    norms = (sigma(w_in) * sigma(w_out)).item()
    stream = (1 - a) * torch.eye(len(w_out), dtype=w_out.dtype)
    if block.config.activation == "gelu":
        derivative, gain = GELU_SLOPE / GELU_SCALE * norms, norms / GELU_SCALE
        middle = sigma(stream + a / (2 * GELU_SCALE) * w_out @ w_in)
        together = middle + a * (GELU_SLOPE - 0.5) / GELU_SCALE * norms
    else:
        derivative = gain = norms
        (in_1, in_2), (out_1, out_2) = w_in.chunk(2, 0), w_out.chunk(2, 1)
        middle = sigma(stream + a * (out_1 + out_2) @ (in_1 + in_2) / 2)
        together = middle + a * sigma(out_1 - out_2) * sigma(in_1 - in_2) / 2
    return dict(mlp_derivative=derivative, mlp_gain=gain, mlp=min((1 - a) + a * derivative, together.item()))


# ==== Data: token shards, 256 int32 of header (magic, version, count, 0 ...), then uint16 tokens ===
MAGIC, VERSION, HEADER = 20240520, 1, 256
FINEWEB = "kjj0/fineweb10B-gpt2"  # on the Hub


class Tokens:
    """Shards as one long text, of which only what is asked for is read (memory-mapped)."""

    def __init__(self, parts, vocab):
        """parts: [(name, uint16 array)]"""
        self.parts, self.vocab = parts, vocab
        self.ends = np.cumsum([len(tokens) for _, tokens in parts])

    def __len__(self):
        return int(self.ends[-1])

    def read(self, start, count):
        """int64 tensor of `count` tokens, or what is left."""
        pieces, i = [np.zeros(0, np.int64)], int(np.searchsorted(self.ends, start, side="right"))
        while count > 0 and i < len(self.parts):
            name, tokens = self.parts[i]
            offset = start - int(self.ends[i]) + len(tokens)
            piece = tokens[offset:offset + count].astype(np.int64)
            if piece.max() >= self.vocab:
                raise UserError(f"{name}: holds token {piece.max()}, and --vocab is {self.vocab}; give the "
                                "vocabulary it was made with, or make it again with --prepare")
            pieces.append(piece)
            start, count, i = start + len(piece), count - len(piece), i + 1
        return torch.from_numpy(np.concatenate(pieces))

    def sequences(self, step, rows, config):
        """(B, T + 1): sequences `rows` of the batch at a step, one after the other in the text, or shuffled."""
        whole = (len(self) - 1) // config.seq_len
        places = [step * config.batch + row for row in rows]
        if config.shuffle:  # (each time round in another order)
            places = [torch.randperm(whole, generator=torch.Generator().manual_seed(
                config.seed * 1_000_003 + place // whole))[place % whole].item() for place in places]
        T = config.seq_len
        return torch.stack([self.read(place % whole * T, T + 1) for place in places])


def read_shard(path):
    """uint16 tokens of a shard, memory-mapped; a UserError that names what is wrong with it."""
    need = f"needed is {HEADER} int32 ({MAGIC}, {VERSION}, count, ...), then count uint16; see --prepare"
    try:
        size, header = path.stat().st_size, np.fromfile(path, dtype=np.int32, count=HEADER)
    except OSError as problem:
        raise UserError(f"{path}: cannot be read ({problem}); {need}") from problem
    if len(header) < HEADER or header[0] != MAGIC or header[1] != VERSION:
        raise UserError(f"{path}: begins with {header[:2].tolist()}, so it is no token shard; {need}")
    if size != 4 * HEADER + 2 * int(header[2]) or header[2] <= 0:
        raise UserError(f"{path}: speaks of {header[2]} tokens and has {size - 4 * HEADER} bytes of them "
                        f"(cut off while it was copied?); {need}")
    return np.memmap(path, dtype=np.uint16, mode="r", offset=4 * HEADER, shape=(int(header[2]),))


def load_data(config):
    """(train, validation, name): two Tokens."""
    name = config.data
    if name == "stand-in":
        text = np.frombuffer(stand_in().encode(), dtype=np.uint8).astype(np.uint16)
        n = int(0.9 * len(text))
        shards = dict(train=[(name, text[:n])], val=[(name, text[n:])])
    else:
        files = fineweb(config) if name == "fineweb" else sorted(Path(name).glob("*.bin"))
        words = {path: re.split(r"[^a-z]+", path.stem.lower()) for path in files}
        shards = {kind: [p for p in files if kind in words[p]] for kind in ("train", "val")}
        shards["train"] = shards["train"][:config.shards or None]
        if not all(shards.values()) or len(shards["train"]) < config.shards:
            raise UserError(f"--data {name}: has {len(shards['train'])} files *.bin with the word train in "
                            f"their names and {len(shards['val'])} with val; needed is one of each at least, "
                            "or what --shards says; --prepare makes them")
        shards = {kind: [(str(p), read_shard(p)) for p in paths] for kind, paths in shards.items()}
    train, validation = Tokens(shards["train"], config.vocab), Tokens(shards["val"], config.vocab)
    for what, tokens in (("train on", train), ("validate on", validation)):
        if len(tokens) < 2 * (config.seq_len + 1):
            raise UserError(f"--data {name}: has {len(tokens)} tokens to {what}; needed are at least "
                            f"{2 * (config.seq_len + 1)} for sequences of {config.seq_len}")
    return train, validation, name


def fineweb(config):
    """Paths of the published shards that a run reads, of $DATA_DIR/fineweb10B or the Hub (cached)."""
    shards = config.shards or min(103, math.ceil(config.steps * config.batch * config.seq_len / 1e8))
    names = [f"fineweb_train_{i + 1:06d}.bin" for i in range(shards)] + ["fineweb_val_000000.bin"]
    local = Path(os.environ.get("DATA_DIR", "nowhere")) / "fineweb10B"
    if all((local / name).is_file() for name in names):
        return [local / name for name in names]
    try:
        from huggingface_hub import hf_hub_download  # takes a second, so only where it is needed
        return [Path(hf_hub_download(FINEWEB, name, repo_type="dataset")) for name in names]
    except Exception as problem:  # no network, no such file, disk full: the library has one for each
        raise UserError(f"--data fineweb: cannot be had from the Hub ({one_line(problem)}); give a folder of "
                        "shards with --data DIR, or take --preset tiny, which needs no network") from problem


def stand_in(characters=1_115_394):
    """Text that is on every machine: the source of Python's standard library, ASCII only."""
    other = bytes(set(range(256)) - {ord("\n"), *range(ord(" "), ord("~") + 1)})
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(path.read_bytes().translate(None, other) for path in paths)
    return text[:characters].decode()


def gpt2():
    """GPT-2's tokens, of tiktoken."""
    try:
        import tiktoken
        return tiktoken.get_encoding("gpt2")
    except Exception as problem:  # (it downloads its table at first use, and may fail in every way)
        raise UserError(f"GPT-2's tokens cannot be had ({one_line(problem)}); needed are pip install tiktoken "
                        "and the network once, or TIKTOKEN_CACHE_DIR with a copy of its cache") from problem


def documents(source):
    """The texts of a source, one after the other; None for a row that has none."""
    path, kinds = Path(source), (".txt", ".jsonl", ".parquet")
    if not path.exists() and not path.is_absolute() and path.suffix not in kinds:
        import datasets
        name, _, configuration = source.partition(":")
        rows = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
        yield from (row["text"] for row in rows)
        return
    files = sorted(p for p in path.rglob("*") if p.suffix in kinds) if path.is_dir() else [path]
    if not files:
        raise UserError(f"--prepare {source}: has no {', '.join(kinds)}; needed is one at least")
    for file in files:
        if file.suffix == ".parquet":
            import pyarrow.parquet
            for rows in pyarrow.parquet.ParquetFile(file).iter_batches(256, columns=["text"]):
                yield from rows.column(0).to_pylist()
            continue
        with open(file, encoding="utf-8-sig") as lines:  # (which takes off a byte-order mark)
            if file.suffix == ".jsonl":
                yield from (json.loads(line)["text"] for line in lines if line.strip())
                continue
            held, marked = "", False
            for line in lines:
                *ended, held = (held + line).split("<|endoftext|>")
                yield from ended
                marked = marked or bool(ended)
                if not marked and not line.strip() and len(held) > 2**14:
                    yield held
                    held = ""
            yield held


def prepare(config):
    """Token shards of a text, in the folder --data: val_000000.bin, then train_000001.bin and on.

    The first val_tokens, of a small text the first tenth, are for validation. Shards are read as one text,
    so they may end anywhere.
    """
    folder, encoding = Path(config.data), gpt2()
    if list(folder.glob("*.bin")):
        raise UserError(f"--data {folder}: has shards already; give another folder, or remove them")
    folder.mkdir(parents=True, exist_ok=True)
    pieces, held, empty, shards, source = [], 0, 0, 0, documents(config.prepare)

    def write_shard(count):  # of the first tokens held
        nonlocal pieces, held, shards
        tokens_N = np.concatenate(pieces)
        header = np.array([MAGIC, VERSION, count] + [0] * (HEADER - 3), dtype=np.int32)
        path = folder / (f"train_{shards:06d}.bin" if shards else "val_000000.bin")
        write(path, header.tobytes() + tokens_N[:count].tobytes())
        pieces, held, shards = [tokens_N[count:]], held - count, shards + 1
        print(f"{path}: {count:,} tokens", flush=True)

    try:
        while texts := list(itertools.islice(source, 256)):
            known = [text for text in texts if text]
            empty += len(texts) - len(known)
            for ids in encoding.encode_ordinary_batch(known, num_threads=os.cpu_count()):
                pieces.append(np.array([encoding.eot_token, *ids], dtype=np.uint16))
                held += len(ids) + 1
            while held >= config.shard_tokens + (0 if shards else config.val_tokens):
                write_shard(config.shard_tokens if shards else config.val_tokens)
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as problem:  # the libraries raise dozens of kinds
        raise UserError(f"--prepare {config.prepare}: cannot be read ({one_line(problem)}); give a text file, a "
                        "folder or the name of a data set on the Hub, with texts named text") from problem
    if held + shards < 20:
        raise UserError(f"--prepare {config.prepare}: has {held} tokens; give a longer text")
    if not shards:
        write_shard(min(config.val_tokens, held // 10))
    if held:
        write_shard(held)
    print(f"{folder}: {shards} shards; {empty} rows had no text")


# ==== Distribution: who owns what, and how gradients and weights travel ===========================
class Exchange:
    """Every parameter has one owner among the ranks: gradients go to it, new weights come from it.

    A gradient is summed to its owner alone, while the backward pass still runs. The owner updates and
    constrains, and sends the weights to all. No matrix is orthogonalised twice, and replicas are
    bit-identical, because each weight is calculated once.
    """

    def __init__(self, model, rank, world_size):
        # Largest work first, each to the rank that has least: FLOPs of msign, or 100 a number.
        work = {p: 100 * p.numel() for p in model.parameters()}
        work.update({W: 10 * W.numel() * min(W.shape) for _, W in model.matrices()})
        self.owned = [[] for _ in range(world_size)]
        for p in sorted(work, key=work.get, reverse=True):
            min(self.owned, key=lambda mine: sum(work[q] for q in mine)).append(p)
        self.owner = {p: owner for owner, mine in enumerate(self.owned) for p in mine}
        self.mine, self.names = self.owned[rank], {p: name for name, p in model.named_parameters()}
        self.world_size, self.last_micro_step, self.pending = world_size, False, []
        if world_size > 1:
            for p in model.parameters():
                p.register_post_accumulate_grad_hook(self.send_gradient)

    def send_gradient(self, p):
        """Called by the backward pass as soon as p.grad is complete: in the same order on all ranks."""
        if self.world_size > 1 and self.last_micro_step:
            self.pending.append(dist.reduce(p.grad, self.owner[p], async_op=True))

    def receive_gradients(self):
        for work in self.pending:
            work.wait()
        self.pending = []

    def share_weights(self):
        """From each owner all of its weights to all, in one message."""
        if self.world_size == 1:
            return
        flats = [torch.cat([p.data.flatten() for p in mine]) if mine else None for mine in self.owned]
        works = [dist.broadcast(flat, owner, async_op=True) for owner, flat in enumerate(flats) if flat is not None]
        for work in works:
            work.wait()
        for mine, flat in zip(self.owned, flats):
            if mine:
                for p, part in zip(mine, flat.split([p.numel() for p in mine])):
                    p.data.copy_(part.view_as(p))

    def gather_states(self, optimizers):
        """On rank 0 {parameter's name: its optimizer's state} of all ranks; elsewhere of what it owns."""
        own = {self.names[p]: {key: value.cpu() for key, value in state.items()}
               for optimizer in optimizers for p, state in optimizer.state.items()}
        if self.world_size == 1:
            return own
        parts = [None] * self.world_size if 0 == dist.get_rank() else None
        dist.gather_object(own, parts)
        return {name: state for part in parts or [own] for name, state in part.items()}

    def load_states(self, optimizers, states):
        for optimizer in optimizers:
            names = [self.names[p] for group in optimizer.param_groups for p in group["params"]]
            saved = {i: states[name] for i, name in enumerate(names)}
            optimizer.load_state_dict(dict(optimizer.state_dict(), state=saved))


# ==== Run folders: one rule for starting and going on =============================================
def reconcile(own, config, source, free=()):
    """`own`, the settings of a loaded model, with the flags that may differ; others are an error."""
    for name, value in getattr(config, "given", dataclasses.asdict(config)).items():
        if name in ("data", "micro_batch", "compile", "prompt", "length", "temperature", "top_k", *free):
            setattr(own, name, value)
        elif name not in ("out", "device") and value != getattr(own, name):
            raise UserError(f"--{name} {value}: {source} has {getattr(own, name)}; leave the flag out, "
                            "or start a new run with another --out")
    own.out, own.device = config.out, config.device
    return own


def go_on(config):
    """(config, checkpoint, summary) of the run in config.out, if there is one: its own settings."""
    if not config.out or not (Path(config.out) / "checkpoint.pt").exists():
        return config, None, None
    own, _, state = load_checkpoint(config.out)
    own = reconcile(own, config, f"the run in {config.out}")
    if ":" in own.constraint and config.constraint != own.constraint:  # (nobody's code runs unasked)
        raise UserError(f"--out {config.out}: was trained with code of yours; say that you trust it: "
                        f"--constraint {own.constraint}")
    summary = Path(config.out) / "summary.json"
    return own, state, json.loads(summary.read_text()) if summary.exists() else None


def new_folder(config):
    """The folder of a run that starts: config.out, or the first free runs/SCRIPT_PRESET_seedN."""
    if config.out:
        Path(config.out).mkdir(parents=True, exist_ok=True)
        return Path(config.out)
    name, number = f"runs/{SCRIPT}_{config.preset}_seed{config.seed}", 1
    while True:
        try:
            out = Path(name if number == 1 else f"{name}_{number}")
            out.mkdir(parents=True)  # (fails if it is there: two runs never share one)
            return out
        except FileExistsError:
            number += 1


def one_line(problem):
    reason = (str(problem).strip() or "no reason given").splitlines()[0][:160]
    return f"{type(problem).__name__}: {reason}"


def load_checkpoint(folder):
    """(config, model, all that main saved). Only tensors, numbers and text are read, no code."""
    path = Path(folder) / "checkpoint.pt" if Path(folder).is_dir() else Path(folder)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["script"] != SCRIPT:
            raise ValueError(f"it is of {state['script']}.py")
        config = Config(**state["config"])
        model = Transformer(dataclasses.replace(config, constraint="none"))  # (a name in a file runs no code)
        model.load_state_dict(state["model"])
    except Exception as problem:  # truncated, no checkpoint at all, or with code in it
        raise UserError(f"{path}: cannot be used as a checkpoint of {SCRIPT}.py ({one_line(problem)}); "
                        "give a run folder of this script, or another --out") from problem
    return config, model, state


def write(path, data):
    """Text or bytes, all of it or none: what is written beside takes the place of the old file."""
    if isinstance(data, str):  # (JSON has no infinity: the logarithms of 0 and of no bound are words)
        data = data.replace("-Infinity", '"-inf"').replace("Infinity", '"inf"').encode()
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


# ==== Main ========================================================================================
def schedule(config, step):
    """(factor on learning rates, momentum, tokens that attention sees) at a step."""
    done = step / config.steps
    left = min(1.0, (1 - done) / config.cooldown) if config.cooldown else 1.0
    warm = min(1.0, step / config.momentum_warmup) if config.momentum_warmup else 1.0
    blocks = max(1, math.ceil(done * (config.window / BLOCK - 0.5)))  # (the authors': the last at 96 %)
    return left + (1 - left) * config.final_lr, 0.85 + warm * (config.momentum - 0.85), blocks * BLOCK


@torch.no_grad()
def evaluate(model, validation, window, dtype, rank=0, world_size=1):
    """(mean cross-entropy of the logits, the same at the loss temperature, accuracy) of val_tokens."""
    config, device, sums = model.config, model.head_XD.device, torch.zeros(4, dtype=torch.float64)
    T, N = config.seq_len, min(config.val_tokens, len(validation) - 1)
    for start in range(rank * T, N, world_size * T):
        tokens = validation.read(start, min(T, N - start) + 1)
        x_T, y_T = (F.pad(part, (0, T + 1 - len(tokens)), value=pad)  # (the last is filled up, and not counted)
                    for part, pad in ((tokens[:-1], 0), (tokens[1:], -100)))
        stream_ND, y_N = model.body(*model.embed(x_T.to(device)[None], dtype), window)[0], y_T.to(device)
        for x_CD, y_C in zip(stream_ND.split(8192), y_N.split(8192)):
            z_CV, counted_C = model.logits(x_CD), y_C >= 0
            losses = [F.cross_entropy(factor * z_CV, y_C, reduction="sum")
                      for factor in (1.0, config.loss_temperature)]
            right = (z_CV.argmax(1) == y_C).sum()
            sums += torch.tensor([*(loss.item() for loss in losses), right.item(), counted_C.sum().item()])
    if world_size > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    return tuple((sums[:3] / sums[3]).tolist())


@torch.no_grad()
def largest_entries(model, validation, dtype=torch.float32):
    """After each block, the largest entry of the stream of the first validation tokens."""
    entries, T = [], min(512, model.config.seq_len)
    dtype = torch.promote_types(dtype, model.head_XD.dtype)
    x_BTD, docs_BT = model.embed(validation.read(0, T)[None].to(model.head_XD.device), dtype)
    mask = dense_mask(docs_BT, T)
    for block in model.blocks:
        x_BTD = Block.forward(block, x_BTD, mask)  # (not what is compiled, for another length)
        entries.append(x_BTD.abs().max().item())
    return entries


def main(config):
    """Train, go on, sample or prepare; certify; report. Returns the summary (on rank 0)."""
    config.limits()  # (complains before anything is loaded)
    if config.prepare:
        return prepare(config)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and world_size > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.zeros(1, device=name).device
    except Exception as problem:
        raise UserError(f"--device {config.device}: cannot be used here ({one_line(problem)}); try cpu, or "
                        "fewer processes than GPUs") from problem
    dtype = fast_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
    if config.sample:
        own, model, _ = load_checkpoint(config.sample)
        config = reconcile(own, config, config.sample, ("sample", "seed", "dtype"))
        return sample(model.to(device), config, dtype)

    # ---- processes: rank 0 reads the run folder, every rank its data
    begun = go_on(config) if rank == 0 else None
    if world_size > 1:
        store, _, _ = next(dist.rendezvous("env://", timeout=datetime.timedelta(hours=2)))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
            # On one node torchrun keeps its store over a restart, with the addresses of dead processes.
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world_size,
                                timeout=datetime.timedelta(minutes=5), device_id=device if cuda else None)
        message = [begun]
        dist.broadcast_object_list(message)
        begun = message[0]
    config, state, summary = begun
    if summary:
        if rank == 0:
            print(f"The run in {config.out} is finished; start another with another --out.")
        return summary
    if config.batch % (world_size * config.micro_batch):
        raise UserError(f"--batch {config.batch}: must be a multiple of processes x --micro_batch, "
                        f"{world_size} x {config.micro_batch}")
    flex = device.type == "cuda" and config.compile and dtype != torch.float64 and config.seq_len % BLOCK == 0
    if not flex and config.seq_len > DENSE:
        raise UserError(f"--seq_len {config.seq_len}: must be at most {DENSE} without flex_attention, which needs "
                        "CUDA, --compile, another --dtype than float64, and a multiple of 128 tokens")
    train, validation, data_name = load_data(config)  # (may download for long: who waits, waits at the store)
    if state and state["tokens"] != len(train):
        raise UserError(f"--data {data_name}: has {len(train)} tokens to train on, and the run in {config.out} "
                        f"was trained on {state['tokens']} ({state['data']}); give the same")
    if world_size > 1:
        store.set(f"has data {rank}", "")
        store.wait([f"has data {other}" for other in range(world_size)])

    # ---- build
    limits, constraint = config.limits(), find_constraint(config.constraint)
    model = Transformer(config).to(device)
    model.flex = flex
    exchange, loss_of = Exchange(model, rank, world_size), model.loss
    if device.type == "cuda" and config.compile:
        loss_of = torch.compile(model.loss, dynamic=False)
        for block in model.blocks:  # (and not the whole: their gradients travel one after the other)
            block.compile(dynamic=False)
    groups = {}
    for role, W in model.matrices():
        if exchange.owner[W] == rank:
            # (the limit on the head is one on the rows of real tokens)
            real = (config.vocab / len(W)) ** 0.5 if role == "head" else 1.0
            lr = config.head_lr if role == "head" else config.lr
            groups.setdefault((lr, limits[role] * real), []).append(W)
    optimizers = []
    if groups:
        optimizers.append(Muon(
            [dict(params=matrices, w_max=w, peak_lr=lr) for (lr, w), matrices in groups.items()], momentum=0.85,
            constraint=constraint, every=config.constrain_every, dtype=None if dtype == torch.float64 else dtype))
    adam = [(model.embedding_VD, config.embed_lr)]
    adam += [(block.query_HE, config.bias_lr) for block in model.blocks if config.logit_scale == 0]
    adam = [dict(params=[p], peak_lr=lr) for p, lr in adam if exchange.owner[p] == rank]
    if adam:
        # Gradients are of the sum over all tokens of a step, and not of the mean, so that eps means the same at
        # every batch, to a token seen once. The authors': 1e-10 on sums over an eighth of the step.
        optimizers.append(torch.optim.Adam(adam, betas=(0.8, 0.95), eps=8e-10, fused=device.type == "cuda"))
    start, seconds, timed, log, out = 0, 0.0, 0, [], config.out
    if state:
        start, seconds, timed, log = state["step"], state["seconds"], state["timed"], state["log"]
        model.load_state_dict(state["model"])
        exchange.load_states(optimizers, state["optimizers"])
    state = begun = message = None  # (frees memory)
    if rank == 0:
        out = new_folder(config)
        write(out / "config.json", json.dumps(dataclasses.asdict(config), indent=1))
        print(f"device {device} x {world_size}, computing in {dtype} with {model.head_XD.dtype} weights, data: "
              f"{data_name} ({len(train):,} tokens to train, {len(validation):,} to validate), "
              f"{sum(p.numel() for p in model.parameters()):,} parameters, run folder {out}, from step {start}",
              flush=True)

    # ---- train
    evals, tokens = min(config.evals, config.steps), config.batch * config.seq_len
    eval_steps = {math.ceil(config.steps * (i + 1) / evals) for i in range(evals)}
    bar = tqdm(total=config.steps, initial=start, disable=rank > 0 or not sys.stderr.isatty(), leave=False)
    micro_steps = config.batch // (world_size * config.micro_batch)
    losses, began, since = [], time.perf_counter(), start
    for step in range(start, config.steps):
        factor, momentum, window = schedule(config, step)
        loss = 0.0
        for micro in range(micro_steps):
            first = (micro * world_size + rank) * config.micro_batch
            window_BT = train.sequences(step, range(first, first + config.micro_batch), config)
            if device.type == "cuda":
                window_BT = window_BT.pin_memory().to(device, non_blocking=True)
            window_BT = window_BT.to(device)
            x_ND = model.body(*model.embed(window_BT[:, :-1], dtype), window).flatten(0, 1)
            part, dx_ND = head_gradients(model, loss_of, x_ND, window_BT[:, 1:].flatten())
            loss = loss + part
            exchange.last_micro_step = micro == micro_steps - 1
            exchange.send_gradient(model.head_XD)
            x_ND.backward(dx_ND)
        exchange.receive_gradients()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
                if isinstance(optimizer, Muon):
                    group["momentum"] = momentum
            optimizer.step()
        model.zero_grad()
        if exchange.owner[model.embedding_VD] == rank and not config.baseline:
            model.embedding_VD.data.copy_(cap_rows(model.embedding_VD.data))
        exchange.share_weights()
        losses.append(loss / tokens)

        done = step + 1
        if done % 10 and done not in eval_steps:  # (not at each step: a GPU would wait for it)
            continue
        recent = torch.stack(losses[-10:])
        if world_size > 1:
            dist.all_reduce(recent)
        if not recent.isfinite().all():
            bad = [name for name, p in model.named_parameters() if not p.isfinite().all()] or ["the loss"]
            raise UserError(f"step {done}: training has diverged, {bad[0]} is not finite; the last good "
                            f"checkpoint is in {out}, if any; try a smaller --lr or --embed_lr")
        bar.update(done - bar.n)
        if done == start + 10 and done not in eval_steps:  # (those were slow: compilation)
            began, since = time.perf_counter(), done
        if done in eval_steps:
            seconds, timed = seconds + time.perf_counter() - began, timed + done - since
            val_loss, hot_loss, accuracy = evaluate(model, validation, window, dtype, rank, world_size)
            all_losses = torch.stack(losses)
            if world_size > 1:
                dist.all_reduce(all_losses)
            for optimizer in optimizers:
                if isinstance(optimizer, Muon):
                    optimizer.forget()  # (as loading does: so the run that goes on does the same)
            states = exchange.gather_states(optimizers)
            if rank == 0:
                bound, entries = certificate(model), largest_entries(model, validation)
                largest = max(norm for role, norm in bound["norms"].items() if role != "embedding")
                ms = 1000 * seconds / timed
                log.append(dict(
                    step=done, train_loss=all_losses.mean().item(), val_loss=val_loss,
                    val_loss_at_temperature=hot_loss, val_accuracy=accuracy, norms=bound["norms"],
                    max_weight_norm=largest, lipschitz_log10=bound["log10"], activations=entries,
                    ms_per_step=ms, tokens_per_second=1000 * tokens / ms, losses=all_losses.tolist()))
                if device.type == "cuda":
                    log[-1]["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
                buffer = io.BytesIO()
                torch.save(dict(
                    script=SCRIPT, config=dataclasses.asdict(config), step=done, seconds=seconds, timed=timed,
                    log=log, data=data_name, tokens=len(train), model=model.state_dict(), optimizers=states), buffer)
                write(out / "checkpoint.pt", buffer.getvalue())
                write(out / "log.jsonl", "".join(json.dumps(record) + "\n" for record in log))
                bar.write(
                    f"step {done:5d}/{config.steps}  train loss {log[-1]['train_loss']:.3f}  validation loss "
                    f"{hot_loss:.3f}  accuracy {100 * accuracy:5.2f} %  largest norm {largest:.3f}  activation "
                    f"{max(entries):.2f}  bound (max-token RMS) {power(bound['log10'])}  {ms:.0f} ms/step  "
                    f"{1000 * tokens / ms:,.0f} tokens/s  {ms / 1000 * (config.steps - done):.0f} s left",
                    file=sys.stdout)
                sys.stdout.flush()
            losses, began, since = [], time.perf_counter(), done
    bar.close()
    return report(config, model, out, log, data_name, dtype, world_size) if rank == 0 else None


def power(exponent):
    """10^exponent, to read, also where it overflows; rounded up, as it is a bound."""
    return f"{10**exponent * 1.0005:.4g}" if abs(exponent) < 6 else f"10^{exponent + 0.05:.1f}"


def report(config, model, out, log, data_name, dtype, world_size):
    """summary.json, the table, the picture and a sample of a finished run. Returns the summary."""
    last, bound = log[-1], certificate(model)
    losses = [loss for record in log for loss in record["losses"]]
    spikes = sum(loss > 0.5 + sorted(losses[max(0, i - 100):i])[min(i, 100) // 2]
                 for i, loss in enumerate(losses) if i >= 10)
    kept = ("val_loss", "val_loss_at_temperature", "val_accuracy", "max_weight_norm", "norms", "ms_per_step",
            "tokens_per_second")
    summary = dict(
        script=SCRIPT, preset=config.preset, params=sum(p.numel() for p in model.parameters()),
        steps=config.steps, **{key: last[key] for key in kept}, lipschitz_log10=bound["log10"],
        lipschitz_product_log10=bound["product_log10"],
        lipschitz_norm="max-token RMS->max-token RMS, embeddings to logits, inside the ball",
        w_max=config.limits() if config.constraint != "none" else None, baseline=config.baseline,
        loss_temperature=config.loss_temperature, largest_activation=max(last["activations"]), spikes=spikes,
        train_seconds=last["ms_per_step"] * config.steps / 1000, memory_gib=last.get("memory_gib"),
        processes=world_size, data=data_name, device=str(model.head_XD.device),
        dtype=str(dtype).removeprefix("torch."), seed=config.seed, torch=torch.__version__)
    write(out / "summary.json", json.dumps(summary, indent=1))
    kind = "baseline with norms" if config.baseline else f"Muon + {config.constraint}, w_max {config.w_max}"
    print(f"\n{config.preset}: {kind}, {config.steps} steps, seed {config.seed}, {world_size} process(es), data: "
          f"{data_name}\n  accuracy {100 * last['val_accuracy']:.2f} %, cross-entropy of the logits "
          f"{last['val_loss']:.3f}, at the loss temperature {config.loss_temperature:g} "
          f"{last['val_loss_at_temperature']:.3f}\n  steps with a loss more than 0.5 above the median of the 100 "
          f"before: {spikes}")
    print("  largest norm (RMS->RMS)", *(f"  {role} {n:.4g}" for role, n in bound["norms"].items()))
    print(f"  certificate, max-token RMS, inside the ball of radius R; a = {model.mix:.3g}\n"
          "    block        R   attention         MLP   largest entry seen after it")
    for i, row in enumerate(bound["rows"]):
        print(f"    {i + 1:5d} {row['radius']:8.3g} {row['attention']:11.4g} {row['mlp']:11.4g} "
              f"{last['activations'][i]:13.4g}")
    print(f"    LIPSCHITZ CONSTANT {power(bound['log10'])}   (embeddings to logits)")
    if data_name == "stand-in":
        print("  data: stand-in, the bytes of Python's own library. These figures compare with nothing.")
    draw(config, model, out, log, bound)
    print(f"\nA sample at temperature {config.temperature:g}:\n{'-' * 80}")
    plain = copy.deepcopy(model)  # (which is not compiled)
    plain.flex = False
    try:
        sample(plain, config, dtype)
    except UserError as problem:
        print(problem)
    print(f"{'-' * 80}\nPicture, log and checkpoint are in {out}. Attack its claims: python verify_lipschitz.py {out}")
    return summary


def draw(config, model, out, log, bound):
    """curves.png: losses, norms and their limits, singular values, activations."""
    from matplotlib.figure import Figure  # (not pyplot: whoever calls main keeps their backend)

    figure, steps = Figure(figsize=(11, 7), layout="constrained"), [record["step"] for record in log]
    figure.suptitle(f"{SCRIPT}, {config.preset}: {config.constraint}, w_max {config.w_max}")
    (a, b), (c, d) = figure.subplots(2, 2)
    losses = [loss for record in log for loss in record["losses"]]
    a.plot(range(1, len(losses) + 1), losses, lw=0.7, label="training")
    a.plot(steps, [record["val_loss_at_temperature"] for record in log], "o-", label="validation")
    a.set(title="loss (at the loss temperature)", xlabel="step", ylabel="nats a token")
    a.legend()
    for role in bound["norms"]:
        b.plot(steps, [record["norms"][role] for record in log], "o-", label=role)
    b.set(title="weight norms, largest of each role", xlabel="step", ylabel="RMS->RMS norm", ylim=(0, None))
    b.legend()
    for role, W in model.blocks[-1].matrices():
        s = singular_values(W)
        c.plot(np.linspace(0, 1, len(s)), s, label=role)
    c.set(title="singular values of the last block", xlabel="rank, as a share", ylabel="RMS->RMS", ylim=(0, None))
    c.legend()
    places = range(1, config.blocks + 1)
    d.semilogy(places, log[-1]["activations"], "o-", label="largest entry seen")
    if bound["rows"]:
        radii = [row["radius"] for row in bound["rows"][1:]] + [bound["radius"]]
        d.semilogy(places, radii, "o:", label="bound on the RMS")
    d.set(title=f"activations after each block (constant {power(bound['log10'])})", xlabel="block")
    d.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write(out / "curves.png", buffer.getvalue())


@torch.no_grad()
def sample(model, config, dtype):
    """Print the prompt and `length` tokens more; each sees up to 1024 tokens before it."""
    generator, encoding = torch.Generator().manual_seed(config.seed), None
    tokens = list(config.prompt.encode()) or [ord("\n")]
    if config.vocab != 256:  # (bytes)
        encoding = gpt2()
        tokens = [config.vocab - 1, *encoding.encode_ordinary(config.prompt)]
    print(config.prompt, end="")
    for _ in range(config.length):
        window_BT = torch.tensor([tokens[-min(config.seq_len, 1024):]], device=model.head_XD.device)
        logits_V = model(window_BT, dtype)[0, -1].cpu().double() * config.loss_temperature
        if config.top_k:
            least = logits_V.topk(min(config.top_k, len(logits_V))).values[-1]
            logits_V = logits_V.masked_fill(logits_V < least, -math.inf)
        if config.temperature > 0:
            p_V = (logits_V / config.temperature).softmax(0)
            tokens.append(torch.multinomial(p_V, 1, generator=generator).item())
        else:
            tokens.append(logits_V.argmax().item())
        piece = encoding.decode_bytes(tokens[-1:]) if encoding else bytes(tokens[-1:])
        print(piece.decode(errors="replace"), end="", flush=True)
    print()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # (a terminal may lack characters of the text)
    RANK, MANY = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1") != "1"
    try:
        main(parse_arguments())
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit()
    except KeyboardInterrupt:
        print(f"\n{SCRIPT}.py: interrupted; with --out RUN_FOLDER it goes on", file=sys.stderr)
        status = 130
    except Exception as problem:
        # torchrun ends all processes as soon as one has ended. So whoever may only have lost the others, or
        # found what rank 0 found as well, waits for that before it speaks: one error, one message.
        told, status = isinstance(problem, (UserError, OSError)), 2
        if MANY and (RANK != "0" or not told):
            time.sleep(5)
        get_error_handler().record_exception(problem)  # (for torchrun's own report)
        if told:
            where = f"rank {RANK}: " if RANK != "0" else ""
            print(f"{SCRIPT}.py: {where}{problem}", file=sys.stderr)
        else:
            traceback.print_exc()
            status = 1
    # Not sys.exit, which would wait for messages to and from the others, and so for ever.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
