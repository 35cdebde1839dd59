"""Tutorial 3: a GPT on web text, held to a Lipschitz constant at every step, by torchrun on 8 GPUs or on anything else.

WHAT IT SHOWS. The paper's headline experiment (arXiv 2507.13338, the NanoGPT section): 162M parameters trained on FineWeb
without layer norm, QK norm or softcapping, because every weight matrix is kept within a norm. What is new in this file
against shakespeare.py: several processes, each of which owns a share of the matrices, orthogonalises and constrains those
and sends them to the others; documents and sliding windows in attention; and bounds like 10^264, as logarithms.

COMMANDS
    python nanogpt_lipschitz.py                                                      # minutes on a laptop, no network
    torchrun --standalone --nproc_per_node 8 nanogpt_lipschitz.py --preset cap1      # the paper's run, FineWeb downloaded
    torchrun --standalone --nproc_per_node 2 nanogpt_lipschitz.py --micro_batch 8    # the small run on two processes
    python nanogpt_lipschitz.py --prepare FILE_OR_FOLDER_OR_HUB_NAME --data DIR      # tokens of a text of yours
    python nanogpt_lipschitz.py --preset cap1 --plan                                 # parameters, FLOPs, memory; no training
    python nanogpt_lipschitz.py --resume runs/NAME                                   # on any number of processes

RESULT (two cores of a CPU, torch 2.13, one seed; README.md has more). tiny, the default: 58.2 % of the bytes of Python's
    library right, loss 1.610, at a bound of 10^11.6; tiny_tight: 58.0 %, 1.657, at 25.2; a minute and a half each. The CUDA path is
    written, tested as far as a CPU allows (tests/test_nanogpt_lipschitz.py), and unmeasured.

ANCESTRY. The shape of the experiment is the authors', which is modded-nanogpt's (Jordan et al.); data by Karpathy's
token-shard format. None of their code is used.
"""

import argparse
import ctypes
import dataclasses
import datetime
import io
import json
import math
import os
import sys
import sysconfig
import time
from pathlib import Path

SCRIPT = "nanogpt_lipschitz"

# ======================================================================================================================
# CONFIG: every field is a flag of the same name
# ======================================================================================================================


def option(default, text, **kwargs):
    return dataclasses.field(default=default, metadata=dict(help=text, **kwargs))


@dataclasses.dataclass
class Config:
    preset: str = option("tiny", "named settings, see the end of this help; other flags override them")
    # data
    data: str = option("fineweb", "fineweb (published GPT-2 tokens, downloaded), stand-in (bytes of Python's library), or a "
                                  "folder of token shards (*train*.bin, *val*.bin)")
    shards: int = option(0, "training shards of fineweb to download, 100M tokens each; 0: as many as the run reads")
    vocab: int = option(50257, "different tokens, V; the last one begins a document (stand-in: 256 bytes, 0 begins one)")
    val_tokens: int = option(10_485_760, "validation tokens, from the start of the validation shards")
    # model
    width: int = option(768, "dimension D of a token's vector")
    blocks: int = option(12, "blocks; each is attention, then MLP")
    heads: int = option(6, "attention heads H, each of dimension D / H")
    hidden: int = option(3072, "neurons of an MLP")
    window: int = option(1792, "tokens that attention sees at the end; grows to there in steps of 128; half in most layers")
    activation: str = option("gelu", "gelu (divided by 1.1289) or maxmin", choices=("gelu", "maxmin"))
    positions: str = option("rope", "rope, or bias: a learned bias by distance, which costs no Lipschitz constant",
                            choices=("rope", "bias"))
    logit_scale: float = option(24.0, "attention logits are logit_scale * q.k / (D / H); 0 leaves only the bias")
    attention_scale: float = option(1 / 3, "factor on the output of attention; 0: 1 / sqrt(H)")
    residual_scale: float = option(1.0, "x <- (1 - a) x + a block(x) with a = residual_scale / (2 * blocks)")
    final_scale: float = option(1.0, "fixed factor on the logits, part of the network and of its bound")
    w_max: str = option("1", "limit on the RMS->RMS norm of each matrix: one number, or 7 as q,k,v,o,in,out,head")
    baseline: bool = option(False, "the unconstrained peer: RMSNorm, QK norm, softcapped logits, x + block(norm(x))")
    # training
    constraint: str = option("soft_cap", "map that holds each weight matrix within w_max: none, weight_decay, "
                             "spectral_weight_decay, specnorm, stiefel, hammer, soft_cap, hard_cap (table in "
                             "constraints.py), or one of yours as FILE.py:NAME")
    constrain_every: int = option(4, "let specnorm, soft_cap, hard_cap wait about so many steps, where it is certain that "
                                  "the limit holds meanwhile (Muon only; 1: after each step)")
    steps: int = option(6200, "training steps")
    batch: int = option(8, "sequences a step, over all processes")
    seq_len: int = option(49_152, "tokens of a sequence; it holds parts of many documents")
    micro_batch: int = option(1, "sequences a process takes at once; changes memory, not the result")
    lr: float = option(0.05, "Muon's learning rate for the matrices in the blocks: the RMS->RMS norm of a step")
    head_lr: float = option(0.005, "the same for the head")
    embed_lr: float = option(0.1, "Adam's learning rate for the embedding")
    bias_lr: float = option(0.1, "Adam's learning rate for the position bias")
    momentum: float = option(0.95, "Muon's momentum, after a rise from 0.85")
    momentum_warmup: int = option(300, "steps of that rise")
    cooldown: float = option(0.4, "last part of the steps, in which learning rates fall linearly ...")
    final_lr: float = option(0.1, "... to this share of what they were")
    loss_temperature: float = option(1.0, "the loss sees temperature * logits; bounds and val_loss are of the logits")
    # run
    seed: int = option(0, "seed of initialisation")
    dtype: str = option("auto", "of forward and backward pass; weights stay float32 (float64: those too). auto: bfloat16 if "
                                "native", choices=("auto", "float32", "bfloat16", "float64"))
    device: str = option("auto", "auto, cpu, cuda, mps; auto: cuda if there is one, a GPU for each process")
    compile: str = option("auto", "torch.compile, which flex_attention needs; auto: on cuda", choices=("auto", "on", "off"))
    evals: int = option(10, "evaluations and checkpoints during a run")
    out: str = option("", "run folder; default runs/nanogpt_lipschitz_PRESET_seedN")
    resume: str = option("", "run folder to go on with; its own settings are used")
    # instead of training
    plan: bool = option(False, "print parameters, FLOPs and memory of the run, and stop")
    prepare: str = option("", "make token shards in --data DIR of: a text file, a folder of parquet with a column `text`, or "
                              "a Hub data set (NAME or NAME:CONFIGURATION)")
    shard_tokens: int = option(100_000_000, "tokens of a shard that --prepare writes")


BIAS = dict(activation="maxmin", positions="bias", logit_scale=0.0, attention_scale=0.0)
TINY = dict(data="stand-in", vocab=256, width=128, blocks=4, heads=4, hidden=512, seq_len=256, window=256, batch=16,
            micro_batch=16, steps=300, w_max="3", logit_scale=1.0, lr=0.1, head_lr=0.1, embed_lr=0.02, momentum_warmup=30, evals=6)
PRESETS = {
    "tiny": TINY,
    "tiny_tight": dict(TINY, **BIAS, hidden=640, residual_scale=4.0, w_max="1", final_scale=40.0),
    "cap1": {},  # the paper's run with spectral cap at 1; Config's defaults are its settings
    "specnorm8": dict(constraint="specnorm", w_max="8", steps=1770, logit_scale=128**0.5 / 64),
    "tight": dict(BIAS, hidden=3840, residual_scale=12.0, w_max="1", final_scale=40.0),
}
ROLES = ("q", "k", "v", "o", "in", "out", "head")
FINEWEB = "kjj0/fineweb10B-gpt2"  # on the Hub
MODES = ("plan", "prepare")


class Refusal(Exception):
    """Something that the user can mend: one line, exit status 2."""


def parse_arguments(argv=None):
    """The command line as a Config: defaults, then the preset, then the flags given."""
    presets = "\n".join(f"  {k:11} " + " ".join(f"{a}={b}" for a, b in v.items()) for k, v in PRESETS.items())
    parser = argparse.ArgumentParser(description=__doc__.split("RESULT")[0], epilog="presets:\n" + presets, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(Config):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type)
        if "choices" in f.metadata:
            kind["choices"] = f.metadata["choices"]
        parser.add_argument("--" + f.name, default=argparse.SUPPRESS, **kind,
                            help=f.metadata["help"].replace("%", "%%") + f" [{f.default}]")
    given = vars(parser.parse_args(argv))
    preset = given.get("preset", "tiny")
    if preset not in PRESETS:
        parser.error(f"--preset {preset}: must be one of {', '.join(PRESETS)}")
    for name in ("resume", "prepare"):
        if given.get(name) == "":
            parser.error(f"--{name}: is empty; give a path")
    others = given.keys() - {"resume", "data", "device", "compile", "micro_batch", "constraint"}
    if "resume" in given and others:
        parser.error(f"{', '.join('--' + name for name in sorted(others))} with --resume: a run keeps its own settings")
    if "prepare" in given and "data" not in given:
        parser.error("--prepare: needs --data DIR, the folder to write the shards to")
    settings = {**PRESETS[preset], **given}
    if settings.get("baseline"):
        settings.setdefault("constraint", "none")
    return Config(**settings)


def check(config):
    """Refuse what cannot be meant, before anything is loaded or written."""
    def need(ok, name, requirement):
        if not ok:
            raise Refusal(f"--{name} {getattr(config, name)}: must be {requirement}")

    for name, largest in (("width", 2**14), ("blocks", 1000), ("heads", 2**10), ("hidden", 2**17), ("seq_len", 2**20),
                          ("window", 2**20), ("steps", 2**40), ("batch", 2**20), ("micro_batch", 2**20), ("evals", 2**20),
                          ("val_tokens", 2**40), ("shard_tokens", 2**31), ("constrain_every", 64)):
        need(1 <= getattr(config, name) <= largest, name, f"a whole number from 1 to {largest}")
    for name in ("lr", "head_lr", "embed_lr", "bias_lr", "logit_scale", "attention_scale", "residual_scale", "final_scale",
                 "momentum_warmup", "final_lr", "shards"):
        need(0 <= getattr(config, name) < math.inf, name, "a finite number of at least 0")
    need(0 < config.loss_temperature < math.inf, "loss_temperature", "a finite number above 0")
    need(2 <= config.vocab <= 2**16, "vocab", "a whole number from 2 to 65536, as tokens are stored in 16 bits")
    need(config.width % config.heads == 0, "heads", f"a divisor of the width, {config.width}")
    need(config.positions == "bias" or config.width // config.heads % 4 == 0, "heads", "such that width / heads is a "
         "multiple of 4, for rope")
    need(config.positions == "bias" or config.logit_scale > 0, "logit_scale", "above 0 for rope, which needs q and k")
    need(config.residual_scale <= 2 * config.blocks, "residual_scale", f"at most 2 * blocks, {2 * config.blocks}")
    need(config.activation == "gelu" or config.hidden % 2 == 0, "hidden", "even for maxmin, which works on pairs")
    need(0 <= config.momentum < 1, "momentum", "at least 0 and below 1")
    need(0 <= config.cooldown <= 1, "cooldown", "from 0 to 1")
    need(0 <= config.seed < 2**31, "seed", "a whole number from 0 to 2^31 - 1")
    need(config.batch % config.micro_batch == 0, "micro_batch", f"a divisor of the batch, {config.batch}")
    need(not config.baseline or config.constraint == "none", "constraint", "none for the baseline, which is unconstrained")
    need(not config.baseline or config.positions == "rope", "positions", "rope for the baseline")
    need(not config.baseline or config.loss_temperature == 1, "loss_temperature", "1 for the baseline, whose logits are softcapped")
    limits(config)
    config.evals = min(config.evals, config.steps)


def limits(config):
    """w_max of each role of matrix, from the flag: {role: RMS->RMS norm}."""
    try:
        w = [float(v) for v in config.w_max.split(",")]
    except ValueError:
        w = []
    if len(w) not in (1, 7) or not all(0 < v < math.inf for v in w):
        raise Refusal(f"--w_max {config.w_max}: must be a finite number above 0, or 7 of them with commas ({','.join(ROLES)})")
    return dict(zip(ROLES, w * 7 if len(w) == 1 else w))


if __name__ == "__main__":
    CONFIG = parse_arguments()  # before the imports that take seconds, so that --help answers at once

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.nn.attention.flex_attention import BlockMask, flex_attention  # noqa: E402

from constraints import cap_rows, find_constraint, sigma_per_norm, singular_values  # noqa: E402
from muon import Muon, fast_dtype, msign  # noqa: E402

# Shapes: B sequences, T tokens in a sequence, D dimension of a token's vector, H heads, E = D / H, V tokens in the
# vocabulary, X something wide, N positions, Q blocks of 128 positions.


# ======================================================================================================================
# DATA: token shards, 256 int32 of header (magic, version, count), then uint16 tokens
# ======================================================================================================================
MAGIC, VERSION, HEADER = 20240520, 1, 256


class Tokens:
    """Shards as one long text, read where needed (memory-mapped). `source` is for messages."""

    def __init__(self, parts, vocab):
        """parts: [(name, uint16 array)]"""
        self.parts, self.vocab = parts, vocab
        self.ends = np.cumsum([len(tokens) for _, tokens in parts])

    def __len__(self):
        return int(self.ends[-1])

    def read(self, start, count):
        """int64 tensor (count,)."""
        pieces, i = [], int(np.searchsorted(self.ends, start, side="right"))
        while count > 0:
            name, tokens = self.parts[i]
            offset = start - int(self.ends[i]) + len(tokens)
            piece = np.asarray(tokens[offset:offset + count]).astype(np.int64)
            if piece.max() >= self.vocab:
                raise Refusal(f"{name}: holds token {piece.max()}, and --vocab is {self.vocab}; give the vocabulary that it was "
                              "made with, or make it again with --prepare")
            pieces.append(piece)
            start, count, i = start + len(piece), count - len(piece), i + 1
        return torch.from_numpy(np.concatenate(pieces))

    def sequences(self, step, config, rows):
        """(x_BT, y_BT) of the batch's sequences `rows` at a step. Sequence i reads on from i / batch of the text."""
        T, usable = config.seq_len, len(self) - config.seq_len
        starts = [(i * (len(self) // config.batch) + step * T) % usable for i in rows]
        window = torch.stack([self.read(start, T + 1) for start in starts])
        return window[:, :-1], window[:, 1:]


def read_shard(path):
    """uint16 tokens of a shard, memory-mapped; a Refusal that names what is wrong with it."""
    need = f"needed is {HEADER} int32 ({MAGIC}, {VERSION}, count, ...) and then count uint16; --prepare makes such files"
    try:
        size = path.stat().st_size
        header = np.fromfile(path, dtype=np.int32, count=HEADER)
    except OSError as problem:
        raise Refusal(f"{path}: cannot be read ({problem}); {need}") from problem
    if len(header) < HEADER or header[0] != MAGIC:
        raise Refusal(f"{path}: begins with {header[0] if len(header) else 'nothing'}, so it is no token shard; {need}")
    if header[1] != VERSION:
        raise Refusal(f"{path}: is of version {header[1]}; {need}")
    if size != 4 * HEADER + 2 * int(header[2]) or header[2] <= 0:
        raise Refusal(f"{path}: speaks of {header[2]} tokens and has {size - 4 * HEADER} bytes of them, {2 * int(header[2])} were "
                      f"right (cut off while it was copied?); {need}")
    return np.memmap(path, dtype=np.uint16, mode="r", offset=4 * HEADER, shape=(int(header[2]),))


def load_data(config):
    """(train, validation, name): two Tokens."""
    if config.data == "stand-in":
        text = np.frombuffer(stand_in().encode("ascii"), dtype=np.uint8).astype(np.uint16)
        cut = int(0.9 * len(text))
        train, validation, name = [("stand-in", text[:cut])], [("stand-in", text[cut:])], "stand-in"
    else:
        folder, name = (download(config), "fineweb") if config.data == "fineweb" else (Path(config.data), config.data)
        files = sorted(folder.glob("*.bin"))
        train = [(str(p), read_shard(p)) for p in files if "train" in p.name]
        validation = [(str(p), read_shard(p)) for p in files if "val" in p.name]
        if not train or not validation:
            raise Refusal(f"--data {config.data}: has {len(train)} files *train*.bin and {len(validation)} *val*.bin; needed is one "
                          "of each at least; --prepare makes them")
    train, validation = Tokens(train, config.vocab), Tokens(validation, config.vocab)
    for what, tokens in (("train on", train), ("validate on", validation)):
        if len(tokens) < 2 * (config.seq_len + 1):
            raise Refusal(f"--data {name}: has {len(tokens)} tokens to {what}; needed are {2 * (config.seq_len + 1)} for sequences "
                          f"of {config.seq_len}; give more, or a smaller --seq_len")
    return train, validation, name


def download(config):
    """Folder with the published shards that a run reads, from $DATA_DIR/fineweb10B or the Hub (cached, with progress)."""
    tokens = config.steps * config.batch * config.seq_len
    names = ["fineweb_val_000000.bin"] + [f"fineweb_train_{i + 1:06d}.bin"
                                          for i in range(config.shards or min(103, math.ceil(tokens / 1e8)))]
    local = Path(os.environ.get("DATA_DIR", "")) / "fineweb10B"
    if os.environ.get("DATA_DIR") and all((local / name).is_file() for name in names):
        return local
    try:
        from huggingface_hub import hf_hub_download
        paths = [Path(hf_hub_download(FINEWEB, name, repo_type="dataset")) for name in names]
    except Exception as problem:  # no network, no such file, disk full: the library has an exception for each
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise Refusal(f"--data fineweb: cannot be had from the Hub ({reason[:200]}); give a folder of shards with --data DIR, "
                      "make one with --prepare, or take --preset tiny, which needs no network") from problem
    return paths[0].parent


def stand_in(characters=1_115_394):
    """Python source that is on every machine: modules of the standard library by name, ASCII only (as in shakespeare.py)."""
    parts, total = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        part = path.read_bytes().decode("ascii", errors="ignore").replace("\r\n", "\n")
        parts.append("".join(c for c in part if c == "\n" or " " <= c <= "~"))
        total += len(parts[-1])
        if total >= characters:
            break
    return "".join(parts)[:characters]


# ---- making shards ---------------------------------------------------------------------------------------------------
def documents_of(source, skip):
    """Yield the texts of a source from document number `skip` on, without holding them all."""
    import datasets

    datasets.disable_progress_bars()
    path = Path(source)
    if path.is_file() and path.suffix != ".parquet":
        with open(path, encoding="utf-8", newline="") as f:
            for _ in range(skip):
                f.readlines(2**16)
            while lines := f.readlines(2**16):  # a long text in pieces, so that it need not fit into memory
                yield "".join(lines)
        return
    if path.is_absolute() or path.suffix in (".txt", ".parquet"):
        path.stat()  # (complains if it is not there: no name of the Hub looks like this)
    if path.exists():
        files = [str(path)] if path.is_file() else sorted(map(str, path.rglob("*.parquet")))
        if not files:
            raise Refusal(f"--prepare {source}: has no parquet file; give such a folder, a text file, or a data set of the Hub")
        rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    else:
        name, _, configuration = source.partition(":")
        rows = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
    if rows.column_names and "text" not in rows.column_names:
        raise Refusal(f"--prepare {source}: has the columns {', '.join(rows.column_names)}; needed is one named text")
    for row in rows.skip(skip):
        yield row["text"]


def encoder():
    """(encode: texts -> lists of tokens, on all cores; the token that begins a document)."""
    import tiktoken
    gpt2 = tiktoken.get_encoding("gpt2")
    return lambda texts: gpt2.encode_ordinary_batch(texts, num_threads=os.cpu_count()), gpt2.eot_token


def write_shard(path, tokens):
    header = np.zeros(HEADER, dtype=np.int32)
    header[:3] = MAGIC, VERSION, len(tokens)
    write_atomically(path, header.tobytes() + tokens.astype(np.uint16).tobytes())


def prepare(config):
    """Write val_000000.bin (val_tokens of it), then train_000001.bin and on (shard_tokens each) into the folder --data.

    Streams; a shard ends with a document, and after each prepare.json says how many are done, so a run that was stopped goes on there.
    """
    from tqdm import tqdm

    folder, source = Path(config.data), config.prepare
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "prepare.json"
    settings = dict(source=source, val_tokens=config.val_tokens, shard_tokens=config.shard_tokens)
    state = dict(settings, shards=0, documents=0, finished=False)
    if note.exists():
        state = json.loads(note.read_text())
        if any(state[k] != v for k, v in settings.items()):
            raise Refusal(f"--data {folder}: holds shards of {state['source']} (--val_tokens {state['val_tokens']} --shard_tokens "
                          f"{state['shard_tokens']}); give another folder, or the same settings to go on")
        if state["finished"]:
            raise Refusal(f"--data {folder}: is finished, {state['shards']} shards of {source}; give another folder")
    elif list(folder.glob("*.bin")):
        raise Refusal(f"--data {folder}: has .bin files that --prepare did not write; give another folder")
    try:
        encode, begin = encoder()
    except Exception as problem:  # (tiktoken downloads its table at first use, and has an exception for every way to fail)
        raise Refusal(f"--prepare: the GPT-2 tokens cannot be had ({type(problem).__name__}); needed is the network once, or "
                      "TIKTOKEN_CACHE_DIR with a copy of tiktoken's cache") from problem
    bar = tqdm(unit="token", unit_scale=True, disable=not sys.stderr.isatty())
    pieces, held, documents = [], 0, state["documents"]  # of the shard to come

    def write(**more):
        nonlocal pieces, held
        if pieces:
            path = folder / ("val_000000.bin" if state["shards"] == 0 else f"train_{state['shards']:06d}.bin")
            write_shard(path, np.concatenate(pieces))
            print(f"{path}: {held:,} tokens", flush=True)
            state.update(shards=state["shards"] + 1, documents=documents)
        state.update(more)
        write_atomically(note, (json.dumps(state, indent=1) + "\n").encode())
        pieces, held = [], 0

    def take(texts):
        nonlocal held, documents
        for ids in encode(texts):
            pieces.append(np.array([begin, *ids], dtype=np.uint16))
            held, documents = held + 1 + len(ids), documents + 1
            bar.update(1 + len(ids))
            if held >= (config.val_tokens if state["shards"] == 0 else config.shard_tokens):
                write()

    try:
        texts = []
        for text in documents_of(source, documents):
            texts.append(text)
            if len(texts) == 256:
                take(texts)
                texts = []
        take(texts)
    except (OSError, ValueError, FileNotFoundError) as problem:
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise Refusal(f"--prepare {source}: cannot be read ({reason[:200]}); give a text file, a folder of parquet files or the "
                      "name of a data set of the Hub; what is written stays, and the same command goes on") from problem
    if state["shards"] == 0:
        raise Refusal(f"--prepare {source}: has {held:,} tokens, fewer than --val_tokens {config.val_tokens:,}; give a smaller one")
    write(finished=True)
    bar.close()


# ======================================================================================================================
# MODEL
# ======================================================================================================================
GELU_SLOPE = 1.1289041452  # the steepest slope of GeLU, rounded up
GELU_SCALE = 1.1289  # what the paper divides GeLU by; a little less than the slope, which the certificate has to know
EPSILON = 1e-6  # of the baseline's RMSNorm
SOFTCAP = 15.0  # of the baseline's logits
BLOCK = 128  # positions that flex_attention takes or skips together


def maxmin(z):
    """(max, min) of each pair (neuron i of the first half, of the second): GroupSort of Anil et al. (2019)."""
    a, b = z.chunk(2, -1)
    excess = (a - b).relu()
    return torch.cat([b + excess, a - excess], -1)


def rms_norm(x):
    return F.rms_norm(x, (x.shape[-1],), eps=EPSILON)


def rotate(x_BHTE):
    """RoPE in modded-nanogpt's half-truncated form: E/4 pairs (i, i + E/2) turn, at 1 to 1/1024 radians a token."""
    T, E = x_BHTE.shape[-2:]
    speed = torch.cat([1024 ** -torch.linspace(0, 1, E // 4, device=x_BHTE.device), torch.zeros(E // 4, device=x_BHTE.device)])
    angle = torch.arange(T, device=x_BHTE.device, dtype=torch.float32)[:, None] * speed
    cos, sin = angle.cos().to(x_BHTE.dtype), angle.sin().to(x_BHTE.dtype)
    first, second = x_BHTE.chunk(2, -1)
    return torch.cat([cos * first + sin * second, cos * second - sin * first], -1)


def dense_mask(docs_BT, window):
    """(B, T, T) bool: position t sees j <= t of its own document, fewer than `window` back."""
    t = torch.arange(docs_BT.shape[1], device=docs_BT.device)
    distance_TT = t[:, None] - t
    return (distance_TT >= 0) & (distance_TT < window) & (docs_BT[:, :, None] == docs_BT[:, None, :])


def block_mask(docs_BT, window):
    """The same for flex_attention, made from blocks of 128 positions without ever looking at T x T of them.

    Document numbers rise along a sequence, so a block of queries and one of keys have a document in common if their
    ranges overlap. Blocks with something to see and something not to see are `partial`, and masked entry by entry.
    """
    B, T = docs_BT.shape
    low_BQ, high_BQ = docs_BT.view(B, -1, BLOCK)[..., 0], docs_BT.view(B, -1, BLOCK)[..., -1]
    q = torch.arange(T // BLOCK, device=docs_BT.device)
    back_QQ = BLOCK * (q[:, None] - q)  # from the first query to the first key
    some_BQQ = ((back_QQ >= 0) & (back_QQ - (BLOCK - 1) < window)
                & (low_BQ[:, :, None] <= high_BQ[:, None, :]) & (low_BQ[:, None, :] <= high_BQ[:, :, None]))
    all_BQQ = ((back_QQ > 0) & (back_QQ + BLOCK - 1 < window)
               & (low_BQ[:, :, None] == high_BQ[:, None, :]) & (low_BQ[:, None, :] == high_BQ[:, :, None]))

    def listed(x_BQQ):  # how many key blocks, and which: those there first
        order_BQQ = torch.argsort(x_BQQ.int(), dim=-1, descending=True, stable=True)
        return x_BQQ.sum(-1, dtype=torch.int32)[:, None], order_BQQ.int()[:, None]

    def sees(b, h, t, j):
        return (t >= j) & (t - j < window) & (docs_BT[b, t] == docs_BT[b, j])

    return BlockMask.from_kv_blocks(*listed(some_BQQ & ~all_BQQ), *listed(all_BQQ), BLOCK_SIZE=BLOCK, mask_mod=sees,
                                    seq_lengths=(T, T))


class Block(torch.nn.Module):
    """The matrices of a block: q, k, v, o (D, D), w_in (hidden, D), w_out (D, hidden), and the position bias (H, window)."""

    def __init__(self, config, index):
        super().__init__()
        D = config.width
        for name in ("q", "k", "v", "o") if config.logit_scale > 0 else ("v", "o"):
            setattr(self, name, torch.nn.Parameter(torch.empty(D, D)))
        self.w_in = torch.nn.Parameter(torch.empty(config.hidden, D))
        self.w_out = torch.nn.Parameter(torch.empty(D, config.hidden))
        if config.positions == "bias":  # at the start head h of block i looks at about h 2^i tokens ago
            step = 2 ** min(index, 5)
            centre_H = (step * torch.arange(config.heads)).clamp(max=config.window - 1)
            self.bias_HW = torch.nn.Parameter(-2.0 / step * (torch.arange(config.window) - centre_H[:, None]).abs())

    def matrices(self):
        """[(role, matrix)]"""
        names = dict(q="q", k="k", v="v", o="o", w_in="in", w_out="out")
        return [(role, getattr(self, name)) for name, role in names.items() if hasattr(self, name)]


class Transformer(torch.nn.Module):
    """Embedding, blocks, head: x <- (1 - a) x + a attention(x);  x <- (1 - a) x + a mlp(x);  logits = final_scale * head x.

    No biases and no norm layers, but for the baseline: x <- x + block(norm(x)), and logits 15 tanh(head norm(x) / 15).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.mix = config.residual_scale / (2 * config.blocks)  # a
        self.attention_scale = config.attention_scale or config.heads**-0.5
        self.flex = False  # flex_attention, which a GPU can compile, in the place of a dense mask
        padded = config.vocab if config.vocab % 128 == 0 else config.vocab + 128 - config.vocab % 128
        self.embedding_VD = torch.nn.Parameter(torch.empty(config.vocab, config.width))
        self.blocks = torch.nn.ModuleList(Block(config, i) for i in range(config.blocks))
        self.head_XD = torch.nn.Parameter(torch.zeros(padded, config.width))  # (a round size is faster); rows from V on stay 0

    def initialize(self, seed):
        """Embedding normal; hidden matrices of equal singular values, of norm 1 or the limit; o, w_out and head 0, so that
        the first loss is ln V. Where blocks make up half of the stream (a >= 0.4) zeros would lose the signal: o and w_out
        are orthogonal, too."""
        generator, w_max = torch.Generator().manual_seed(seed), limits(self.config)
        torch.nn.init.normal_(self.embedding_VD, generator=generator)
        for role, W in self.matrices():
            if role == "head" or role in ("o", "out") and self.mix < 0.4 and self.config.constraint != "stiefel":
                W.data.zero_()
            else:
                torch.nn.init.orthogonal_(W, generator=generator)
                W.data.mul_(sigma_per_norm(W) * (w_max[role] if self.config.constraint == "stiefel" else min(1.0, w_max[role])))
        if not self.config.baseline:
            self.embedding_VD.data = cap_rows(self.embedding_VD.data)
        return self

    @property
    def head_VD(self):
        """Of the head, the rows of real tokens."""
        return self.head_XD[:self.config.vocab]

    def matrices(self):
        """[(role, matrix)] of all that the constraint holds."""
        return [pair for block in self.blocks for pair in block.matrices()] + [("head", self.head_XD)]

    def attention(self, block, x_BTD, mask=None):
        """out_t = attention_scale * sum_h o_h sum_j softmax_j(s q_t^h . k_j^h + bias_h(t - j)) v_j^h, over what t sees.

        mask  of dense_mask or block_mask; None: all before, one document
        """
        B, T, D = x_BTD.shape
        H, dtype = self.config.heads, x_BTD.dtype
        s = self.config.logit_scale / (D // H)
        matrices = [block.q, block.k, block.v] if self.config.logit_scale > 0 else [block.v]
        parts_BTX = F.linear(x_BTD, torch.cat([W.to(dtype) for W in matrices]))
        parts = [p.view(B, T, H, D // H).transpose(1, 2) for p in parts_BTX.split(D, -1)]  # each (B, H, T, E)
        v_BHTE = parts[-1]
        q_BHTE, k_BHTE = parts[:2] if self.config.logit_scale > 0 else (torch.zeros_like(v_BHTE),) * 2
        if self.config.baseline:
            q_BHTE, k_BHTE = rms_norm(q_BHTE), rms_norm(k_BHTE)
        if self.config.positions == "rope":
            q_BHTE, k_BHTE = rotate(q_BHTE), rotate(k_BHTE)
        bias_HW = block.bias_HW if self.config.positions == "bias" else None
        if isinstance(mask, BlockMask):
            def score(value, b, h, t, j):
                return value + bias_HW[h, (t - j).clamp(0, bias_HW.shape[1] - 1)]
            # (compiled for a CPU by torch 2.13, the result is wrong if v alone is a view into a longer tensor: seen, so all are whole)
            q_BHTE, k_BHTE, v_BHTE = (p.contiguous() for p in (q_BHTE, k_BHTE, v_BHTE))
            y_BHTE = flex_attention(q_BHTE, k_BHTE, v_BHTE, score if bias_HW is not None else None, mask, scale=s)
        else:
            if mask is None:
                mask = dense_mask(torch.zeros(1, T, dtype=torch.int64, device=x_BTD.device), T)
            mask = mask[:, None]
            if bias_HW is not None:
                t = torch.arange(T, device=x_BTD.device)
                distance_TT = (t[:, None] - t).clamp(0, bias_HW.shape[1] - 1)
                mask = bias_HW.to(dtype)[:, distance_TT].masked_fill(~mask, -math.inf)
            y_BHTE = F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, attn_mask=mask, scale=s)
        return F.linear(y_BHTE.transpose(1, 2).reshape(B, T, D), (self.attention_scale * block.o).to(dtype))

    def mlp(self, block, x_BTD):
        """w_out maxmin(w_in x), or w_out gelu(w_in x) / 1.1289."""
        h_BTX, w_out = F.linear(x_BTD, block.w_in.to(x_BTD.dtype)), block.w_out
        if self.config.activation == "gelu":
            h_BTX, w_out = F.gelu(h_BTX), w_out / GELU_SCALE
        else:
            h_BTX = maxmin(h_BTX)
        return F.linear(h_BTX, w_out.to(x_BTD.dtype))

    def add(self, x, f):
        """One sublayer's step of the stream."""
        return x + f(rms_norm(x)) if self.config.baseline else torch.lerp(x, f(x), self.mix)

    def through(self, block, x_BTD, mask):
        """One block: what is compiled. (Not the whole: gradients of a block can travel while those before it are computed.)"""
        x_BTD = self.add(x_BTD, lambda x: self.attention(block, x, mask))
        return self.add(x_BTD, lambda x: self.mlp(block, x))

    def body(self, x_BTD, docs_BT=None, window=None, seen=None):
        """The stream after the last block, from embedded tokens. docs_BT: number of each token's document (None: all one);
        window: tokens seen in every fourth layer and the last, half of it in others (None: config.window); seen: list to be filled
        with the stream after each block."""
        docs_BT = torch.zeros(1, x_BTD.shape[1], dtype=torch.int64, device=x_BTD.device) if docs_BT is None else docs_BT
        window = self.config.window if window is None else window
        make = block_mask if self.flex else dense_mask
        masks = make(docs_BT, window), make(docs_BT, (window + 1) // 2)
        for i, block in enumerate(self.blocks):
            mask = masks[0 if i % 4 == 0 or i == len(self.blocks) - 1 else 1]
            x_BTD = self.through(block, x_BTD, mask)
            if seen is not None:
                seen.append(x_BTD)
        return rms_norm(x_BTD) if self.config.baseline else x_BTD

    def embed(self, tokens_BT, dtype):
        """(x_BTD, docs_BT)"""
        begin = 0 if self.config.data == "stand-in" else self.config.vocab - 1
        return F.embedding(tokens_BT, self.embedding_VD).to(dtype), (tokens_BT == begin).cumsum(1)

    def forward(self, tokens_BT, dtype=torch.float32):
        """Logits (B, T, V)."""
        return self.logits(self.body(*self.embed(tokens_BT, dtype)))

    def logits(self, x_ND, head_XD=None):
        """(N, V), at least float32, from the end of the stream."""
        head_XD = self.head_XD if head_XD is None else head_XD
        z_NX = F.linear(x_ND, (self.config.final_scale * head_XD).to(x_ND.dtype))[..., :self.config.vocab]
        z_NX = z_NX if z_NX.dtype == torch.float64 else z_NX.float()
        return SOFTCAP * torch.tanh(z_NX / SOFTCAP) if self.config.baseline else z_NX


class HeadLoss(torch.autograd.Function):
    """Sum of cross-entropies of f(x, head), in chunks of tokens, their gradients taken at once: 48k x 50k logits are 10 GB."""

    @staticmethod
    def forward(ctx, x_ND, head_XD, y_N, f, chunk):
        total, dx_ND, dhead_XD = x_ND.new_zeros((), dtype=torch.promote_types(x_ND.dtype, torch.float32)), [], torch.zeros_like(head_XD)
        for x_CD, y_C in zip(x_ND.split(chunk), y_N.split(chunk)):
            with torch.enable_grad():
                x_CD, head = x_CD.detach().requires_grad_(), head_XD.detach().requires_grad_()
                loss = f(x_CD, head, y_C)
            dx_CD, dhead = torch.autograd.grad(loss, (x_CD, head))
            dx_ND.append(dx_CD)
            dhead_XD += dhead
            total += loss.detach()
        ctx.save_for_backward(torch.cat(dx_ND), dhead_XD)
        return total

    @staticmethod
    def backward(ctx, gradient):
        dx_ND, dhead_XD = ctx.saved_tensors
        return dx_ND * gradient, dhead_XD * gradient, None, None, None


# ======================================================================================================================
# CERTIFICATE: how far the logits can move when every token's embedding moves, from the weights alone, as logarithms
# ======================================================================================================================
# The derivation is that of shakespeare.py, where each inequality is proved and attacked; a test holds the two together. In
# short, within the ball rms(x_t) <= R, with C_h = o_h v_h, r = R sqrt(D), s the logits' factor, for any t_h > 0:
#   1. Head h moves by C_h (an average of moved tokens) and C_h (a moved pattern of tokens), the latter of length e_h r if
#      logits move by e_h. Heads add up to at most sigma([C_h / t_h]) sqrt(sum t_h^2 |.|^2).
#   2. e_h <= s (|dq_h| + |q_h|/r) sigma(k_h) r, where all q_h come from one vector and share its energy.
#   3. Derivative <= value + pattern R^2 with  value = beta min(sigma([C_h / t_h]) |t|, sigma(o) |sigma(v_h)|, sum sigma(C_h)),
#      pattern = beta 2 s D min(sigma([C_h / t_h]) sigma(Q~), sigma(o) sigma(Q~ at t_h = sigma(v_h))), Q~ = t_h sigma(k_h) q_h.
#   4. The output of attention is at most value * R, the MLP's at most its gain times R; so R goes on, convexly mixed.
#      Documents and windows take tokens away from an average, and change nothing above: the mask does not move.
# New here:
#   5. Largest singular values come from eigenvalues of the smaller Gram matrix in float64: relative error below 1e-12 for the
#      largest one, and a fraction of an SVD's time, as this is done on 12 blocks of 768 at each validation.
#   6. The baseline, for comparison: n(x) = x / sqrt(mean x^2 + eps) has slope at most 1/sqrt(eps) and rms(n(x)) <= 1. With
#      normed q, k of length sqrt(E) a logit moves by e_h <= s sqrt(E/eps) (sigma(q_h) + sigma(k_h)) per unit (l2) of n(x), so
#      L <- L (1 + (value + sum_h sigma(C_h) e_h sqrt(D)) / sqrt(eps)), MLP likewise, and the last norm is one more 1/sqrt(eps).
#      It is true and useless: norm layers are not what bounds are made of.
def top(G):
    """Largest eigenvalue of symmetric matrices (..., m, m), float64."""
    return torch.linalg.eigvalsh(G)[..., -1].clamp(min=0)


def sigma(W):
    """Largest singular value, float64, of a matrix or each of a stack."""
    return top(W @ W.mT if W.shape[-2] <= W.shape[-1] else W.mT @ W).sqrt()


@torch.no_grad()
def certificate(model, rho=0.0):
    """Certified constant of the map from embedded tokens to logits of real tokens, max-token RMS to max-token RMS, rounded up.

    rho: how far (RMS) embeddings may be from those of the table. Returns dict: rows, one per block (radius before attention,
    radius_mlp before the MLP, value, pattern, attention and mlp with the stream, mlp_derivative, logits: bound on attention's), body_log10,
    log10, simple_log10 (without the residual's tightening and with whole norms), radius at the end, norms {role: largest}.
    """
    if not all(p.isfinite().all() for p in model.parameters()):
        raise Refusal("the model has weights that are not finite, so there is nothing to certify")
    a, up, D, V = model.mix, 1 + 1e-9, model.config.width, model.config.vocab
    table_VD = model.embedding_VD.double()
    R = R_simple = table_VD.square().mean(1).sqrt().max().item() * up + rho
    body = simple = 0.0
    rows, norms = [], {}
    for block in model.blocks:
        row = dict(radius=R, **attention_terms(model, block, R), **mlp_terms(model, block))
        if model.config.baseline:
            row.update(attention=1 + row["baseline"], mlp=1 + row["mlp_derivative"] * EPSILON**-0.5, radius_mlp=math.inf)
            attention_simple, mlp_simple = row["attention"], row["mlp"]
            R = R_simple = math.inf
        else:
            row["attention"] = (1 - a) + a * (row["value"] + row["pattern"] * R * R)
            row["radius_mlp"] = R * ((1 - a) + a * row["value"]) * up
            R = row["radius_mlp"] * ((1 - a) + a * row["mlp_gain"]) * up
            attention_simple = (1 - a) + a * (row["value_simple"] + row["pattern_simple"] * R_simple * R_simple)
            mlp_simple = (1 - a) + a * row["mlp_derivative"]
            R_simple *= ((1 - a) + a * row["value_simple"]) * ((1 - a) + a * row["mlp_gain"])
        body += log10(row["attention"] * up) + log10(row["mlp"] * up)
        simple += log10(attention_simple) + log10(mlp_simple)
        rows.append(row)
        for role, W in block.matrices():
            norms[role] = max(norms.get(role, 0.0), (sigma(W.double()) / sigma_per_norm(W)).item() * up)
    norms["head"] = (sigma(model.head_VD.double()) * (D / V) ** 0.5).item() * up
    norms["embedding"] = table_VD.square().mean(1).sqrt().max().item()
    head = log10(norms["head"] * model.config.final_scale * (EPSILON**-0.5 if model.config.baseline else 1))
    return dict(rows=rows, body_log10=body, log10=body + head, simple_log10=simple + head, radius=R, norms=norms)


def attention_terms(model, block, R):
    """value and pattern of step 3, their simple forms, the bound on logits; and for the baseline what step 6 adds to 1."""
    H, D, beta = model.config.heads, model.config.width, model.attention_scale
    s, up = model.config.logit_scale / (D // H), 1 + 1e-9
    v_HED, o_HDE = block.v.double().view(H, D // H, D), block.o.double().view(D, H, D // H).transpose(0, 1)
    C_HDD = o_HDE @ v_HED
    CC_HDD, v_H, C_H = C_HDD @ C_HDD.mT, sigma(v_HED), sigma(torch.linalg.qr(o_HDE).R @ v_HED)
    o, tiny = sigma(block.o.double()), 1e-9 * (1 + v_H.max())
    starts = [v_H + tiny, (C_H + tiny).sqrt(), torch.ones_like(C_H)]
    bracket = [top((CC_HDD / t_H[:, None, None].square()).sum(0)).sqrt() for t_H in starts]
    value_simple = o * v_H.norm()
    value = torch.stack([*(b * t_H.norm() for b, t_H in zip(bracket, starts)), value_simple, C_H.sum()]).min()
    terms = dict(value=beta * value.item() * up, value_simple=beta * value_simple.item(), pattern=0.0, pattern_simple=0.0, logits=0.0)
    if not hasattr(block, "q"):
        return terms
    q_HED, k_HED = (W.double().view(H, D // H, D) for W in (block.q, block.k))
    q_H, k_H = sigma(q_HED), sigma(k_HED)
    if model.config.baseline:
        e_H = s * (D // H / EPSILON) ** 0.5 * (q_H + k_H)
        change = beta * (value + (C_H * e_H).sum() * D**0.5) * EPSILON**-0.5
        return dict(terms, logits=s * (D // H), baseline=change.item() * up)

    def shared(t_H):  # sigma(Q~)
        return sigma((t_H * k_H)[:, None, None].mul(q_HED).reshape(D, D))

    simple = o * shared(v_H)
    pattern = torch.stack([*(b * shared(t_H) for b, t_H in zip(bracket, starts)), simple]).min()
    return dict(terms, pattern=2 * beta * s * D * pattern.item() * up, pattern_simple=2 * beta * s * D * simple.item(),
                logits=s * (q_H * k_H).max().item() * D * R * R * up)


def mlp_terms(model, block):
    """mlp_derivative and mlp_gain, and mlp, the factor with the stream taken in (steps 7 and 8 of shakespeare.py)."""
    a, w_in, w_out = model.mix, block.w_in.double(), block.w_out.double()
    norms = (sigma(w_in) * sigma(w_out)).item()
    eye = torch.eye(len(w_out), dtype=w_out.dtype, device=w_out.device)
    if model.config.activation == "gelu":
        derivative, gain = GELU_SLOPE / GELU_SCALE * norms, norms / GELU_SCALE
        within = sigma((1 - a) * eye + a / (2 * GELU_SCALE) * w_out @ w_in) + a * (GELU_SLOPE - 0.5) / GELU_SCALE * norms
    else:
        derivative = gain = norms
        (in_1, in_2), (out_1, out_2) = w_in.chunk(2, 0), w_out.chunk(2, 1)
        M = (out_1 + out_2) @ (in_1 + in_2) / 2
        within = sigma((1 - a) * eye + a * M) + a * sigma(out_1 - out_2) * sigma(in_1 - in_2) / 2
    return dict(mlp_derivative=derivative, mlp_gain=gain, mlp=min((1 - a) + a * derivative, within.item()))


# ======================================================================================================================
# PROCESSES: who owns what, and how gradients and weights travel
# ======================================================================================================================
# Every parameter has one owner. Gradients are summed to the owner alone while the backward pass still runs; the owner updates,
# constrains, and sends the new weights to all. Half of the traffic of summing everywhere, no matrix orthogonalised twice,
# and replicas that are bit-identical because there is only one calculation of each weight.
class Team:
    """This process among `world` of them, started by torchrun; alone without it."""

    def __init__(self, config):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        name = config.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and self.world > 1:
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        try:
            self.device = torch.zeros(1, device=name).device
        except (RuntimeError, AssertionError, NotImplementedError) as problem:
            raise Refusal(f"--device {config.device}: cannot be used here ({str(problem).splitlines()[0]}); try cpu, or fewer "
                          "processes than GPUs") from problem
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1:  # (two hours: others wait while rank 0 downloads)
            # torchrun keeps its store over a restart, dead workers' addresses with it (seen in torch 2.13), so each start has its own
            # prefix; not on several nodes, whose counts may differ.
            store, _, _ = next(dist.rendezvous("env://", timeout=datetime.timedelta(hours=2)))
            if os.environ.get("LOCAL_WORLD_SIZE") == str(self.world):
                store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", store=store, rank=self.rank, world_size=self.world,
                                    timeout=datetime.timedelta(hours=2))

    def check_share(self, config):
        if config.batch % self.world:
            raise Refusal(f"--batch {config.batch}: must be a multiple of the number of processes, {self.world}")
        if config.batch // self.world % config.micro_batch:
            raise Refusal(f"--micro_batch {config.micro_batch}: must divide a process's share of the batch, "
                          f"{config.batch} / {self.world} = {config.batch // self.world} sequences")

    def decide(self, f):
        """f() of rank 0, known to all; a Refusal there is one everywhere."""
        answer = [None, None]
        if self.rank == 0:
            try:
                answer[0] = f()
            except Refusal as refusal:
                answer[1] = str(refusal)
        if self.world > 1:
            dist.broadcast_object_list(answer, 0)
        if answer[1] is not None:
            raise Refusal(answer[1])
        return answer[0]

    def sum(self, x):
        """A tensor summed over all processes."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def close(self):
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def owners(model, world):
    """{parameter: rank}: largest work first, each to who has least. Counted in FLOPs of orthogonalising, or bytes times 100."""
    work = {p: p.numel() * 100 for p in model.parameters()}
    work.update({W: 10 * W.numel() * min(W.shape) for _, W in model.matrices()})
    load, owner = [0] * world, {}
    for p in sorted(work, key=work.get, reverse=True):
        owner[p] = min(range(world), key=load.__getitem__)
        load[owner[p]] += work[p]
    return owner


class Exchange:
    """Sends gradients to their owners and weights from them."""

    def __init__(self, model, owner, team):
        self.team, self.owner = team, owner
        self.order = list(model.parameters())[::-1]  # about as they become ready; the same on all, or they would mix them up
        self.ready, self.pending, self.last_micro_step = set(), [], False
        if team.world > 1:
            for p in self.order:
                p.register_post_accumulate_grad_hook(self.is_ready)

    def is_ready(self, p):
        """Called by the backward pass as soon as a gradient is complete."""
        if self.last_micro_step:
            self.ready.add(p)
            while len(self.pending) < len(self.order) and self.order[len(self.pending)] in self.ready:
                p = self.order[len(self.pending)]
                self.pending.append(dist.reduce(p.grad, self.owner[p], async_op=True))

    def gradients(self):
        """Wait until the owners have the sums; drop what is not ours."""
        if self.team.world > 1:
            if len(self.pending) != len(self.order):
                raise RuntimeError("a parameter got no gradient")
            for work in self.pending:
                work.wait()
            for p in self.order:
                if self.owner[p] != self.team.rank:
                    p.grad = None
            self.ready, self.pending = set(), []

    def weights(self):
        if self.team.world > 1:
            for work in [dist.broadcast(p.data, self.owner[p], async_op=True) for p in self.order]:
                work.wait()

    def identical(self):
        """Whether all replicas have the same bits: two checksums of each parameter's bits, compared with rank 0's."""
        if self.team.world == 1:
            return True
        sums = []
        for p in self.order:
            bits = p.data.flatten().view(torch.int64 if p.dtype == torch.float64 else torch.int32).long()
            sums += [bits.sum(), (bits * (torch.arange(len(bits), device=bits.device) % 65521 + 1)).sum()]
        mine = torch.stack(sums)
        first = mine.clone()
        dist.broadcast(first, 0)
        return self.team.sum((mine != first).any().long()).item() == 0


def make_optimizers(config, model, owner, team, dtype):
    """[(optimizer, its learning rate at the peak)] of the parameters that this process owns."""
    w_max, mine = limits(config), [p for p in model.parameters() if owner[p] == team.rank]
    groups = {}
    for role, W in model.matrices():
        if any(W is p for p in mine):
            # (the head's padding must not loosen its limit, which is on the rows of real tokens)
            real = (config.vocab / len(W)) ** 0.5 if role == "head" else 1.0
            groups.setdefault((role == "head", w_max[role] * real), []).append(W)
    low = None if dtype == torch.float64 else dtype if dtype == torch.bfloat16 else torch.float32
    optimizers = [(Muon([dict(params=matrices, w_max=w)], lr=0.0, momentum=config.momentum, constraint=find_constraint(config.constraint),
                        every=config.constrain_every, dtype=low), config.head_lr if head else config.lr) for (head, w), matrices in groups.items()]
    for p, lr in [(model.embedding_VD, config.embed_lr)] + [(b.bias_HW, config.bias_lr) for b in model.blocks if hasattr(b, "bias_HW")]:
        if any(p is q for q in mine):
            optimizers.append((torch.optim.Adam([p], betas=(0.8, 0.95), fused=p.device.type == "cuda"), lr))
    return optimizers


# ======================================================================================================================
# TRAINING
# ======================================================================================================================
def schedule(config, step):
    """(factor on learning rates, momentum, window of attention) at a step."""
    left = (1 - step / config.steps) / config.cooldown if config.cooldown else 1.0
    factor = 1.0 if left >= 1 else left + (1 - left) * config.final_lr
    warm = min(1.0, step / config.momentum_warmup) if config.momentum_warmup else 1.0
    unit = min(BLOCK, config.window)
    window = min(config.window, unit * (1 + int(step / config.steps * math.ceil(config.window / unit))))
    return factor, 0.85 + warm * (config.momentum - 0.85), window


class Stopwatch:
    """Seconds spent inside `with`, summed; on a GPU between events, which do not make the CPU wait."""

    def __init__(self, device):
        self.cuda, self.sum, self.marks = device.type == "cuda", 0.0, []

    def mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self):
        self.marks.append(self.mark())

    def __exit__(self, *problem):
        self.marks.append(self.mark())

    def seconds(self):
        """All so far; waits for the GPU."""
        if self.cuda:
            torch.cuda.synchronize()
        for begin, end in zip(self.marks[::2], self.marks[1::2]):
            self.sum += begin.elapsed_time(end) / 1000 if self.cuda else end - begin
        self.marks = []
        return self.sum


class Trainer:
    """A model, its optimizers and its share of the work, one step at a time."""

    def __init__(self, config, model, team):
        self.config, self.model, self.team, self.dtype = config, model, team, compute_dtype(config, team.device)
        self.owner = owners(model, team.world)
        self.exchange = Exchange(model, self.owner, team)
        self.optimizers = make_optimizers(config, model, self.owner, team, self.dtype)
        self.update_watch = Stopwatch(team.device)
        self.token_loss = self.sum_of_losses
        if config.compile == "on" or config.compile == "auto" and team.device.type == "cuda":
            model.flex = config.seq_len % BLOCK == 0 and team.device.type == "cuda"
            model.through = torch.compile(model.through, dynamic=False)
            self.token_loss = torch.compile(self.sum_of_losses, dynamic=False)

    def sum_of_losses(self, x_ND, head_XD, y_N):
        hot = self.config.loss_temperature  # (on the head, which is smaller than the logits)
        return F.cross_entropy(self.model.logits(x_ND, head_XD if hot == 1 else hot * head_XD), y_N, reduction="sum")

    def stream(self, x_BT, window):
        """The end of the stream, (B T, D), of tokens; `window` as a tensor, or each new one would compile anew."""
        embedded, docs_BT = self.model.embed(x_BT.to(self.team.device), self.dtype)
        window = torch.tensor(window, device=self.team.device) if self.model.flex else window
        return self.model.body(embedded, docs_BT, window).flatten(0, 1)

    def step(self, train, step):
        """One step on `batch` sequences; returns this process's part of the mean loss (a tensor)."""
        config, team = self.config, self.team
        factor, momentum, window = schedule(config, step)
        micro_steps = config.batch // (team.world * config.micro_batch)
        total = 0.0
        for micro in range(micro_steps):
            first = (micro * team.world + team.rank) * config.micro_batch
            x_BT, y_BT = train.sequences(step, config, range(first, first + config.micro_batch))
            self.exchange.last_micro_step = micro == micro_steps - 1
            loss = HeadLoss.apply(self.stream(x_BT, window), self.model.head_XD, y_BT.to(team.device).flatten(), self.token_loss, 8192)
            loss = loss / (config.batch * config.seq_len)
            loss.backward()
            total = total + loss.detach()
        self.exchange.gradients()
        with self.update_watch:
            for optimizer, lr in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr * factor
                    group.update({"momentum": momentum} if "momentum" in group else {})
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if self.owner[self.model.embedding_VD] == team.rank and not config.baseline:
                self.model.embedding_VD.data.copy_(cap_rows(self.model.embedding_VD.data))
        self.exchange.weights()
        return total

    @torch.no_grad()
    def evaluate(self, validation, step):
        """(mean cross-entropy of the logits, the same at the loss temperature, accuracy) of the validation tokens."""
        config, T = self.config, self.config.seq_len
        window = schedule(config, step)[2]
        sequences = (min(config.val_tokens, len(validation) - 1)) // T or 1
        sums = torch.zeros(4, dtype=torch.float64, device=self.team.device)
        for i in range(self.team.rank, sequences, self.team.world):
            tokens = validation.read(i * T, T + 1).to(self.team.device)
            for x_CD, y_C in zip(self.stream(tokens[None, :-1], window).split(8192), tokens[1:].split(8192)):
                z_CV = self.model.logits(x_CD)
                hot = config.loss_temperature
                sums += torch.stack([F.cross_entropy(z_CV, y_C, reduction="sum"), F.cross_entropy(hot * z_CV, y_C, reduction="sum"),
                                     (z_CV.argmax(1) == y_C).sum(), torch.tensor(len(y_C), device=z_CV.device)]).double()
        sums = self.team.sum(sums).tolist()
        return tuple(x / sums[3] for x in sums[:3])

    # ---- all there is to save: weights, and for each two moments, or a momentum ------------------------------------------
    def blank_state(self, p):
        if any(p is W for _, W in self.model.matrices()):
            return dict(momentum=torch.empty_like(p))
        return dict(exp_avg=torch.empty_like(p), exp_avg_sq=torch.empty_like(p))

    def own_state(self, p):
        return next(o.state[p] for o, _ in self.optimizers for group in o.param_groups if any(p is q for q in group["params"]))

    def gather(self):
        """{parameter's name: {moment: tensor}} on rank 0, from all owners; elsewhere nothing."""
        states = {}
        self.forget_norms()
        for name, p in self.model.named_parameters():
            owner = self.owner[p]
            for moment, tensor in self.blank_state(p).items() if self.team.rank in (0, owner) else ():
                if owner == self.team.rank:
                    tensor.copy_(self.own_state(p)[moment])
                if owner != 0 and self.team.rank == owner:
                    dist.send(tensor, 0)
                elif owner != 0:
                    dist.recv(tensor, owner)
                if self.team.rank == 0:
                    states.setdefault(name, {})[moment] = tensor.cpu()
        return states

    def forget_norms(self):
        """At each save and load, so that the run that goes on and the one that is loaded do the same (see Muon.state_dict)."""
        for optimizer, _ in self.optimizers:
            if isinstance(optimizer, Muon):
                optimizer.forget()

    @torch.no_grad()
    def scatter(self, state, step):
        """Weights and moments of a checkpoint that rank 0 has read, to whoever needs them."""
        self.forget_norms()
        for name, p in self.model.named_parameters():
            moments = self.blank_state(p)
            if self.team.rank == 0:
                p.data.copy_(state["model"][name])
                saved = state["optimizer"][name]
                for moment, tensor in moments.items():
                    tensor.copy_(saved[moment])
            for tensor in (p.data, *moments.values()) if self.team.world > 1 else ():
                dist.broadcast(tensor, 0)
            if self.owner[p] == self.team.rank:
                own = self.own_state(p)
                own.update(moments)
                if "exp_avg" in own:
                    own["step"] = torch.tensor(float(step), device=p.device if p.device.type == "cuda" else "cpu")


@torch.no_grad()
def observe(model, validation, tokens=512):
    """What the first validation tokens do, in float32: per block the largest entry and token RMS after it, and the largest attention
    logit in it; and the range of the output's logits."""
    device, config = model.head_XD.device, model.config
    wide = torch.float64 if model.head_XD.dtype == torch.float64 else torch.float32
    x_BTD, docs_BT = model.embed(validation.read(0, min(tokens, config.seq_len))[None].to(device), wide)
    flex, model.flex, streams = model.flex, False, []
    end = model.body(x_BTD, docs_BT, config.window, streams)
    model.flex = flex
    rows = []
    for block, before, after in zip(model.blocks, [x_BTD, *streams], streams):
        row = dict(entry=after.abs().max().item(), rms=after.square().mean(-1).sqrt().max().item(), attention_logit=0.0)
        if hasattr(block, "q"):
            x = rms_norm(before) if config.baseline else before
            q, k = (F.linear(x, W.to(wide)).unflatten(-1, (config.heads, -1)).transpose(1, 2) for W in (block.q, block.k))
            q, k = (rms_norm(q), rms_norm(k)) if config.baseline else (q, k)
            if config.positions == "rope":
                q, k = rotate(q), rotate(k)
            row["attention_logit"] = (config.logit_scale / q.shape[-1] * (q @ k.mT).tril()).abs().max().item()
        rows.append(row)
    z = model.logits(end)
    return rows, (z.min().item(), z.max().item())


def train(trainer, data, out, progress):
    """Train from progress["step"] to the end, with `evals` evaluations and checkpoints on the way."""
    from tqdm import tqdm

    config, model, team, (training, validation, data_name) = trainer.config, trainer.model, trainer.team, data
    eval_steps = {math.ceil(config.steps * (i + 1) / config.evals) for i in range(config.evals)}
    quiet = team.rank > 0 or not sys.stderr.isatty()
    bar = tqdm(total=config.steps, initial=progress["step"], unit="step", disable=quiet, leave=False)
    tokens, peak = config.batch * config.seq_len, peak_flops(team.device, trainer.dtype) * team.world
    losses, began, watch_from = [], time.perf_counter(), trainer.update_watch.seconds()
    for step in range(progress["step"], config.steps):
        losses.append(trainer.step(training, step))
        done = step + 1
        if done % 10 and done not in eval_steps:  # (not at every step: a GPU would be waited for)
            continue
        recent = team.sum(torch.stack(losses[-10:]))
        if not recent.isfinite().all():
            raise Refusal(f"step {done}: training has diverged, as {first_not_finite(model)}; the last good checkpoint, if any, "
                          f"is in {out}; try a smaller --lr than {config.lr:g}")
        bar.set_postfix(loss=f"{recent[-1]:.3f}", refresh=False)
        bar.update(done - bar.n)
        if done in eval_steps:
            update_seconds = trainer.update_watch.seconds()
            seconds = time.perf_counter() - began
            progress.update(step=done, seconds=progress["seconds"] + seconds)
            if not trainer.exchange.identical():
                raise Refusal(f"step {done}: the processes' weights are not the same any more; the checkpoint in {out} is of before; "
                              "look for a faulty device")
            val_loss, hot_loss, val_accuracy = trainer.evaluate(validation, step)
            all_losses = team.sum(torch.stack(losses)).tolist()
            states = trainer.gather()
            if team.rank == 0:
                bound, (activations, logits) = certificate(model), observe(model, validation)
                ms = 1000 * seconds / len(losses)
                record = dict(step=done, train_loss=sum(all_losses) / len(all_losses), val_loss=val_loss, val_loss_at_temperature=hot_loss,
                              val_accuracy=val_accuracy, norms=bound["norms"], max_weight_norm=max_weight_norm(bound),
                              lipschitz_log10=bound["log10"], blocks_log10=[log10(r["attention"]) + log10(r["mlp"]) for r in bound["rows"]],
                              activations=activations, radii=[r["radius_mlp"] for r in bound["rows"]], logits=logits, ms_per_step=ms,
                              tokens_per_second=tokens / ms * 1000, utilisation=flops_per_token(config, schedule(config, step)[2]) * tokens / ms * 1000 / peak,
                              update_share=(update_seconds - watch_from) / seconds, memory_gib=memory_gib(team.device),
                              losses=all_losses)
                with open(out / "log.jsonl", "a") as f:
                    f.write(as_json(record) + "\n")
                save_checkpoint(out, config, model, states, progress, data_name, len(training))
                entry = max(row["entry"] for row in activations)
                bar.write(f"step {done:5d}/{config.steps}  train loss {record['train_loss']:.3f}  validation loss {hot_loss:.3f}  accuracy "
                          f"{100 * val_accuracy:5.2f} %  bound {power(bound['log10'])}  largest norm {max_weight_norm(bound):.3f}, "
                          f"activation {entry:.2f}  {ms:.0f} ms/step  {record['tokens_per_second']:,.0f} tokens/s  utilisation "
                          f"{100 * record['utilisation']:.0f} %  Muon + constraint {100 * record['update_share']:.1f} %  "
                          f"{ms / 1000 * (config.steps - done):.0f} s left", file=sys.stdout)
                sys.stdout.flush()
            losses, began, watch_from = [], time.perf_counter(), update_seconds
    bar.close()


def first_not_finite(model):
    """In words, the first matrix that is not finite."""
    for name, W in model.named_parameters():
        if not W.isfinite().all():
            return f"{name} {tuple(W.shape)} is not finite"
    return "the logits overflow though all weights are finite"


def max_weight_norm(bound):
    return max(norm for role, norm in bound["norms"].items() if role != "embedding")


# ---- accounting ------------------------------------------------------------------------------------------------------
def flops_per_token(config, window=None):
    """Of forward and backward pass, products only: 6 a weight, and 12 D for each token that attention looks at."""
    T, D, W = config.seq_len, config.width, window or config.window
    matrices = config.blocks * ((4 if config.logit_scale > 0 else 2) * D * D + 2 * D * config.hidden) + config.vocab * D

    def looked_at(w):  # on average, in one document
        w = min(w, T)
        return (w * (w + 1) / 2 + (T - w) * w) / T

    long = sum(i % 4 == 0 or i == config.blocks - 1 for i in range(config.blocks))
    return 6 * matrices + 12 * D * (long * looked_at(W) + (config.blocks - long) * looked_at((W + 1) // 2))


def peak_flops(device, dtype):
    """FLOP/s of one device: the vendor's figure for dense bfloat16, or the best of a few products measured now."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        for name, peak in (("H100", 989e12), ("H200", 989e12), ("A100", 312e12), ("B200", 2250e12)):
            if name in torch.cuda.get_device_name(device):
                return peak
    n = 4096 if device.type == "cuda" else 1024
    A, best, watch = torch.randn(n, n, device=device).to(dtype), math.inf, Stopwatch(device)
    for _ in range(5):
        before = watch.seconds()
        with watch:
            A @ A
        best = min(best, watch.seconds() - before)
    return 2 * n**3 / best


def memory_gib(device):
    """Largest so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    except ImportError:
        return math.nan


def update_flops(config):
    """FLOPs of msign and constraint for all matrices once, counted on a device without memory."""
    from torch.utils.flop_counter import FlopCounterMode

    model = meta_model(config)
    with FlopCounterMode(display=False) as counter:  # (the constraint as if it did not wait)
        for role, W in model.matrices():
            msign(W.bfloat16())
            if config.constraint in ("soft_cap", "specnorm", "hammer"):
                find_constraint(config.constraint)(W, limits(config)[role], config.lr)
    return counter.get_total_flops()


def meta_model(config):
    with torch.device("meta"):
        return Transformer(config)


def activation_bytes(config):
    """Bytes a token leaves behind in one block for the backward pass, in bfloat16: measured on one short sequence."""
    def kept(blocks):
        small = dataclasses.replace(config, blocks=blocks, vocab=128, residual_scale=min(config.residual_scale, 2 * blocks), seq_len=161)
        model, storages = Transformer(small).initialize(0), {}

        def keep(tensor):
            if not any(tensor.untyped_storage().data_ptr() == p.untyped_storage().data_ptr() for p in model.parameters()):
                storages[tensor.untyped_storage().data_ptr()] = tensor  # (held, so that no address comes twice)
            return tensor

        mask = dense_mask(torch.zeros(1, 161, dtype=torch.int64), 161)  # (not counted: flex_attention has none)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            x = torch.randn(1, 161, small.width).bfloat16().requires_grad_()
            for block in model.blocks:
                x = model.through(block, x, mask)
        weights = {p.numel() for p in model.parameters()}  # (in bfloat16: shared by all tokens, as is the mask, which
        return sum(t.untyped_storage().nbytes() for t in storages.values()  # flex_attention does without)
                   if (n := t.untyped_storage().nbytes() // t.element_size()) not in weights and n % 161**2)

    return (kept(2) - kept(1)) / 161


def plan(config):
    """Print what a run needs: parameters, FLOPs, memory of a process by how many there are."""
    model = meta_model(config)
    params, tokens = sum(p.numel() for p in model.parameters()), config.batch * config.seq_len
    step, update = flops_per_token(config) * tokens, update_flops(config)
    print(f"{config.preset}: {params:,} parameters, {tokens:,} tokens a step, {tokens * config.steps:,} in {config.steps} steps")
    print(f"  forward and backward {step:.3g} FLOPs a step; Muon + constraint {update:.3g}, {100 * update / step:.2f} % of that, whatever "
          "the number of processes")
    per_token = activation_bytes(config) * config.blocks + 2 * config.width * 3
    chunk = 8192 * config.vocab * (2 + 4 + 4)  # logits of a chunk, their float32 form and its gradient
    print(f"  memory of a process, GiB: weights and gradients {8 * params / 2**30:.2f}, in bfloat16 for the products {2 * params / 2**30:.2f}, "
          f"logits {chunk / 2**30:.2f}, {per_token / 2**10:.0f} KiB a token")
    print("  processes   fixed   longest micro-batch, in tokens, in 24 / 40 / 80 GB (computed, not measured)")
    for world in (1, 2, 4, 8):
        fixed = 10 * params + chunk + 4 * config.vocab * config.width + 8 * params / world  # (moments; the head's gradient twice)
        fit = [max(0, int((0.9 * gb * 1e9 - fixed) / per_token)) // 128 * 128 for gb in (24, 40, 80)]
        print(f"  {world:9d} {fixed / 2**30:7.1f}   " + " / ".join(f"{n:,}" for n in fit))


# ======================================================================================================================
# MAIN: run folders, checkpoints, the report
# ======================================================================================================================
def log10(x):
    return math.log10(x) if x > 0 else -math.inf


def power(exponent):
    """10^exponent, to read, also where it overflows; rounded up, as it is a bound."""
    if not -300 < exponent < 6:
        return f"10^{math.ceil(exponent * 10) / 10:.1f}" if math.isfinite(exponent) else "0" if exponent < 0 else "infinite"
    unit = 10.0 ** (math.floor(exponent) - 3)
    return f"{math.ceil(10**exponent / unit) * unit:.4g}"


def as_json(record, **kwargs):
    """JSON has no infinity: the logarithm of a constant of 0, or a radius without limit, becomes null."""
    def plain(v):
        if isinstance(v, (list, tuple)):
            return [plain(x) for x in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v
    return json.dumps({k: plain(v) for k, v in record.items()}, **kwargs)


def keep_memory():
    """Have glibc keep freed blocks: by default every large tensor is mapped and page-faulted in anew."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
    except (OSError, AttributeError, TypeError):
        pass  # another C library: nothing lost but speed


def compute_dtype(config, device):
    """Precision of forward and backward. bfloat16 has the exponent range of float32, so nothing needs rescaling."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return fast_dtype(device)


def write_atomically(path, data: bytes):
    """All of it or none: a temporary file, flushed to the disk, takes the place of the old one."""
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def save_checkpoint(out, config, model, states, progress, data_name, tokens):
    """All a run needs to go on, on any number of processes. Data order is a function of the step: there is no other state."""
    buffer = io.BytesIO()
    torch.save(dict(script=SCRIPT, config=dataclasses.asdict(config), step=progress["step"], data=data_name, tokens=tokens,
                    training_seconds=progress["seconds"], model={k: v.cpu() for k, v in model.state_dict().items()},
                    optimizer=states), buffer)
    write_atomically(out / "checkpoint.pt", buffer.getvalue())


def load_checkpoint(folder):
    """The dictionary saved above: tensors, numbers and text only (weights_only), so a hostile file cannot run code."""
    path = Path(folder) / "checkpoint.pt" if Path(folder).is_dir() else Path(folder)
    if not path.is_file():
        raise Refusal(f"{path}: no such checkpoint; give a run folder that has a checkpoint.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # truncated, no checkpoint at all, or with code in it
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise Refusal(f"{path}: cannot be read as a checkpoint ({type(problem).__name__}: {reason[:120]}); it is "
                      "damaged, foreign or unsafe") from problem
    if not isinstance(state, dict) or state.get("script") != SCRIPT:
        made_by = state.get("script") if isinstance(state, dict) else None
        raise Refusal(f"{path}: is a checkpoint of {made_by or 'something else'}; needed is one of {SCRIPT}.py")
    return state


def model_from_checkpoint(state):
    """(config, model) of a checkpoint; a Refusal if they do not fit each other."""
    try:
        config = Config(**state["config"])
        check(config)
        model = Transformer(config)
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, RuntimeError, AttributeError) as problem:
        reason = str(problem).splitlines()[0][:160]
        raise Refusal(f"the checkpoint's weights do not fit its configuration ({reason})") from problem
    return config, model.double() if config.dtype == "float64" else model


def run_folder(config):
    """Where to write: a folder that was empty or not there (nothing is ever overwritten); after torchrun has restarted its
    processes, the folder that they had before, which is the one made under the same launcher."""
    launcher, name = os.getppid(), f"{SCRIPT}_{config.preset}_seed{config.seed}"
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        places = [Path(config.out)] if config.out else sorted(Path("runs").glob(name + "*"), key=lambda p: p.stat().st_mtime)
        for place in reversed(places):
            note = place / "config.json"
            if note.is_file() and json.loads(note.read_text()).get("launcher") == launcher and not (place / "summary.json").exists():
                return place
    out, number = Path(config.out) if config.out else Path("runs") / name, 1
    while not config.out and out.exists():
        number += 1
        out = out.with_name(f"{name}_{number}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Refusal(f"--out {out}: exists and is not empty; choose another" +
                      f", or --resume {out} to go on with it" * (out / "checkpoint.pt").is_file())
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "config.json", (json.dumps(dict(dataclasses.asdict(config), launcher=launcher), indent=1) + "\n").encode())
    return out


def resumed(options, out):
    """(checkpoint, its configuration) of a run that was stopped; its log is cut back to the checkpoint."""
    state = load_checkpoint(out)
    if not out.is_dir():
        raise Refusal(f"--resume {out}: is a file; give the run folder that holds it")
    if (out / "summary.json").exists():
        raise Refusal(f"--resume {out}: that run is finished, see its summary.json; start another with --out")
    config, _ = model_from_checkpoint(state)
    if ":" in config.constraint and options.constraint != config.constraint:  # (a checkpoint must not have code run by itself)
        raise Refusal(f"--resume {out}: was trained with code of yours; say that you trust it: --constraint {config.constraint}")
    known_constraint(config)
    for name in ("data", "device", "compile", "micro_batch") if options.resume else ():
        if getattr(options, name) != getattr(Config(**TINY), name):  # so it was given
            setattr(config, name, getattr(options, name))
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)  # (the last may have been cut off with the run)
    log = [line.strip() for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state["step"]]
    write_atomically(out / "log.jsonl", "".join(line + "\n" for line in log).encode())
    return state, config


def report(config, model, out, data_name, team):
    """The table, the picture and summary.json at the end of a run."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    last, bound = log[-1], certificate(model)
    losses = [loss for record in log for loss in record["losses"]]
    spikes = sum(loss > 0.5 + sorted(losses[max(0, i - 100):i])[min(i, 100) // 2] for i, loss in enumerate(losses) if i >= 10)
    seconds = sum(record["ms_per_step"] * len(record["losses"]) for record in log) / 1000
    summary = dict(
        script=SCRIPT, preset=config.preset, params=sum(p.numel() for p in model.parameters()), steps=config.steps,
        val_loss=last["val_loss"], val_loss_at_temperature=last["val_loss_at_temperature"], val_accuracy=last["val_accuracy"],
        lipschitz_log10=bound["log10"], lipschitz_product_log10=bound["simple_log10"],
        lipschitz_norm="max-token RMS->max-token RMS, embeddings to logits, inside the ball", max_weight_norm=max_weight_norm(bound),
        norms=bound["norms"], w_max=limits(config) if config.constraint != "none" else None, loss_temperature=config.loss_temperature,
        largest_activation=max(row["entry"] for row in last["activations"]), spikes=spikes, train_seconds=seconds,
        ms_per_step=1000 * seconds / config.steps, tokens_per_second=last["tokens_per_second"], utilisation=last["utilisation"],
        update_share=last["update_share"], memory_gib=last["memory_gib"], processes=team.world, baseline=config.baseline,
        data=data_name, device=str(team.device), dtype=str(compute_dtype(config, team.device)).removeprefix("torch."), seed=config.seed,
        torch=torch.__version__)

    kind = "the unconstrained baseline with norms" if config.baseline else f"Muon + {config.constraint}, w_max {config.w_max}"
    title = f"{config.preset}: {kind}, {config.steps} steps, seed {config.seed}, {team.world} process(es)"
    print(f"\n{title}, data: {data_name}")
    at = f"   ({last['val_loss_at_temperature']:.3f} at the loss temperature, {config.loss_temperature:g})" * (config.loss_temperature != 1)
    print(f"  validation, {config.val_tokens:,} tokens at most    accuracy {100 * last['val_accuracy']:.2f} %   cross-entropy of the logits "
          f"{last['val_loss']:.3f}{at}")
    print(f"  steps with a loss more than 0.5 above the median of the 100 before: {spikes}")
    print("  largest norm (RMS->RMS)  " + "   ".join(f"{role} {norm:.4g}" for role, norm in bound["norms"].items()))
    print("  max-token RMS, bound inside the ball and what 512 validation tokens do (on the right)\n    block   attention        MLP"
          "   radius bound |  largest RMS   largest entry   attention logit   its bound")
    for i, (row, seen) in enumerate(zip(bound["rows"], last["activations"])):
        radius = bound["rows"][i + 1]["radius"] if i + 1 < len(bound["rows"]) else bound["radius"]
        print(f"    {i + 1:5d} {power(log10(row['attention'])):>11} {power(log10(row['mlp'])):>10} {power(log10(radius)):>14} | "
              f"{seen['rms']:12.4g} {seen['entry']:15.4g} {seen['attention_logit']:17.4g} {power(log10(row['logits'])):>11}")
    print(f"    LIPSCHITZ CONSTANT {power(bound['log10'])}   (embeddings to logits; simplest form {power(bound['simple_log10'])}); "
          f"the logits lie in [{last['logits'][0]:.3g}, {last['logits'][1]:.3g}]")
    print(f"  {summary['ms_per_step']:.1f} ms a step, {last['tokens_per_second']:,.0f} tokens/s, {100 * last['utilisation']:.1f} % of the device's "
          f"products, Muon + constraint {100 * last['update_share']:.1f} %, {last['memory_gib']:.1f} GiB at most")
    if data_name == "stand-in":
        print("  data: stand-in, the bytes of Python's own library. These figures compare with nothing.")
    draw(model, out, log, losses, bound, title)
    write_atomically(out / "summary.json", (as_json(summary, indent=1) + "\n").encode())
    print(f"Picture, log and checkpoint are in {out}. Go on: python verify_lipschitz.py {out}")


def draw(model, out, log, losses, bound, title):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    figure.suptitle(f"{SCRIPT}, {title}")
    steps = [r["step"] for r in log]
    a.plot(range(1, len(losses) + 1), losses, lw=0.7, label="training")
    a.plot(steps, [r["val_loss_at_temperature"] for r in log], "o-", label="validation")
    a.set(title="loss (at the loss temperature)", xlabel="step", ylabel="nats a token")
    a.legend()
    for role in bound["norms"]:
        b.plot(steps, [r["norms"][role] for r in log], "o-", label=role)
    b.set(title="weight norms, largest of each role", xlabel="step", ylabel="RMS->RMS norm", ylim=(0, None))
    b.legend()
    for role, W in [*model.blocks[-1].matrices(), ("head", model.head_XD)]:
        s = singular_values(W)
        c.plot(np.linspace(0, 1, len(s)), s, label=role)
    c.set(title="singular values, last block and head", xlabel="rank, as a share", ylabel="RMS->RMS", ylim=(0, None))
    c.legend()
    places = range(1, len(bound["rows"]) + 1)
    d.semilogy(places, [row["rms"] for row in log[-1]["activations"]], "o-", label="largest RMS seen")
    if math.isfinite(bound["radius"]):
        d.semilogy(places, [row["radius"] for row in bound["rows"]][1:] + [bound["radius"]], "o:", label="bound")
    d.set(title=f"activations after each block (constant {power(bound['log10'])})", xlabel="block")
    d.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    write_atomically(out / "curves.png", buffer.getvalue())


def main(options):
    check(options)
    if options.plan:
        return plan(options)
    if options.prepare:
        return prepare(options)
    keep_memory()
    team, state = Team(options), None

    def begin():  # on rank 0 alone, which may be the only one to see the disk
        nonlocal state
        if not options.resume:
            team.check_share(options)
            known_constraint(options)
            load_data(options)  # (downloads, and complains before a folder is made)
        out = Path(options.resume) if options.resume else run_folder(options)
        if options.resume or (out / "checkpoint.pt").exists():
            state, config = resumed(options, out)
            return str(out), dataclasses.asdict(config), dict(step=state["step"], seconds=state["training_seconds"])
        return str(out), dataclasses.asdict(options), dict(step=0, seconds=0.0)

    try:
        out, settings, progress = team.decide(begin)
        out, config = Path(out), Config(**settings)
        team.check_share(config)
        data = load_data(config)
        model = Transformer(config).initialize(config.seed).to(team.device)
        model = model.double() if config.dtype == "float64" else model
        trainer = Trainer(config, model, team)
        if progress["step"]:
            team.decide(lambda: same_data(state, data, out))
            trainer.scatter(state, progress["step"])
        if team.rank == 0:
            print(f"device {team.device} x {team.world}, computing in {trainer.dtype} with {model.head_XD.dtype} weights, data: {data[2]} "
                  f"({len(data[0]):,} tokens to train, {len(data[1]):,} to validate), {sum(p.numel() for p in model.parameters()):,} "
                  f"parameters, from step {progress['step']}, run folder {out}", flush=True)
        try:
            train(trainer, data, out, progress)
        except Refusal as refusal:
            refusal.of_one = True
            raise
        if team.rank == 0:
            report(config, model, out, data[2], team)
    finally:
        team.close()


def known_constraint(config):
    try:
        find_constraint(config.constraint)
    except ValueError as problem:
        raise Refusal(f"--constraint {config.constraint}: {problem}") from problem


def same_data(state, data, out):
    if state["tokens"] != len(data[0]):
        raise Refusal(f"--resume {out}: was trained on {state['tokens']} tokens ({state['data']}), and {data[2]} has {len(data[0])}; "
                      "give the same with --data")


if __name__ == "__main__":
    try:
        main(CONFIG)
    except Refusal as refusal:
        if os.environ.get("RANK", "0") == "0" or hasattr(refusal, "of_one"):  # (what all find, one says)
            print(f"{SCRIPT}.py: {refusal}", file=sys.stderr)
        sys.exit(2)
    except OSError as problem:
        print(f"{SCRIPT}.py: {problem}; mend that and start again, or --resume from the last checkpoint", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{SCRIPT}.py: interrupted; --resume RUN_FOLDER goes on from its last checkpoint, if there was one", file=sys.stderr)
        sys.exit(130)
