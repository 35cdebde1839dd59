"""Recomputes every number that a training run claims, and attacks its certificates.

WHAT IT SHOWS. A certificate claims that no pair of inputs exceeds a number. This script believes
none. From the weights it recomputes norms, bounds, certified shares, loss and accuracy, and holds
them against what the files of a run say. Then it looks for the pair, in the norm and the ball for
which a bound is claimed: found / certified above 1 is a bug, below 1 the tightness.

COMMANDS
    python verify_lipschitz.py runs/NAME [...]        # run folders, or folders of them
    python verify_lipschitz.py                        # all of runs/
    python verify_lipschitz.py runs/NAME --budget 20  # search twenty times as long

RESULT: a table, verify.json in the run's folder, and an exit status:
    0  held: every claim was recomputed and agrees, and no attack succeeded
    1  BROKEN: a claim is false, two files contradict each other, or an attack succeeded
    2  could not be checked in full: a file, a value or the data are missing (without summary.json:
       nothing claimed)

ANCESTRY. Attacks by projected gradients: Madry et al. (2018), Carlini and Wagner (2017).
"""

import argparse
import dataclasses
import json
import math
import sys
import time
import zipfile
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F

import mlp_cifar
import nanogpt_lipschitz
import shakespeare
from constraints import log10
from mlp_cifar import UserError, flag

# Shapes: S searches side by side, W windows, T tokens (1 for an image), D dimension of a token's
# vector, O of an output's, N images or positions, P pixels, K classes, V characters, H heads. (In float64.)

# ==== Config ======================================================================================
SCRIPTS = {script.SCRIPT: script for script in (mlp_cifar, shakespeare, nanogpt_lipschitz)}


@dataclasses.dataclass
class Config:
    budget: float = flag(1.0, "multiplies the steps of every search", 1e-6)
    images: int = flag(300, "test images to attack", 1)
    windows: int = flag(24, "windows of validation text, a quarter of which is attacked", 1)
    data: str = flag("", "where the run's own data are now, if they moved")
    seed: int = flag(0, "of the searches", 0)


def parse_arguments(argv=None):
    """(run folders and files, Config) of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("ANCESTRY")[0], allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="run folders, or folders of those [runs]")
    for f in dataclasses.fields(Config):
        text = f"{f.metadata['help']} [{f.default}]"
        parser.add_argument(f"--{f.name}", type=f.type, default=f.default, help=text)
    given = vars(parser.parse_args(argv))
    for f in dataclasses.fields(Config):
        value, low = given[f.name], f.metadata["low"]
        if low is not None and not low <= value < 2**31:
            parser.error(f"--{f.name} {value}: must be from {low} to 2147483647")
    return given.pop("runs"), Config(**given)


# ==== Search: two inputs whose outputs are as far apart as possible for their distance ============
# A map f of sequences has constant L on a ball if for all x, d with x + d and x - d in the ball
#     max_t rms(f(x + d)_t - f(x - d)_t)  <=  L * 2 max_t rms(d_t).
# So any such quotient is a lower bound on L, at any distance (not only d -> 0: where f is piecewise
# linear, its Jacobian gives no direction in which to move x). With d = h w and rms(w_t) = 1:
#   1. w moves 0.3 of the way to the gradient of how far an output token moved, normalised token by
#      token; in the last third, where x rests, all the way: power iteration.
#   2. x follows its gradient, by steps that shrink to 0, and stays in the ball.
#   3. Each search has its own output token (the first ones see few others), and its own h.
TOLERANCE = 1e-8  # relative: what rounding can add to a quotient at the smallest distance


def rms(x):
    """Root mean square of each vector, also where squares overflow. (The gradient at 0 is 0.)"""
    scale = x.detach().abs().amax(-1).clamp(min=1e-300)
    return scale * (x / scale[..., None]).square().mean(-1).clamp(min=1e-300).sqrt()


def unit(x):
    """Each vector at RMS 1 (0 stays 0)."""
    return x / rms(x).clamp(min=1e-300)[..., None]


def into_ball(x, radius):
    """Each vector scaled back to an RMS of at most radius."""
    radius = min(max(radius, 1e-300), 1e300)  # (neither 0 / 0 nor inf / inf)
    return x * (radius / rms(x).clamp(min=radius))[..., None]


def directions(*shape, seed):
    """Random vectors of RMS 1."""
    generator = torch.Generator().manual_seed(seed)
    return unit(torch.randn(shape, generator=generator, dtype=torch.float64))


def climb(f, x_STD, radius=math.inf, steps=80, seed=0):
    """(S,) largest quotients found, from x_STD on. f maps (S, T, D) to (S, T, O), each of S by itself."""
    (S, T, _), moving, scale = x_STD.shape, steps * 2 // 3, radius if radius < math.inf else 1.0
    h_S = scale * torch.logspace(math.log10(0.5), -6, S, dtype=torch.float64)
    x, w = x_STD.double(), directions(*x_STD.shape, seed=seed)
    best_S = torch.zeros(S, dtype=torch.float64)
    for step in range(steps):
        x = into_ball(x, radius - 1e-4 * scale).detach().requires_grad_()
        w = w.detach().requires_grad_()
        d = w * (h_S[:, None, None] if step < moving else 1e-4 * scale)
        ends = into_ball(x + d, radius), into_ball(x - d, radius)  # (the claim is about no others)
        apart_STO = f(ends[0]) - f(ends[1])
        moved_ST = rms(apart_STO.detach())
        distance_S = rms((ends[0] - ends[1]).detach()).amax(-1).clamp(min=1e-300)
        best_S = torch.maximum(best_S, moved_ST.amax(-1) / distance_S)
        t_S = T - 1 - torch.arange(S) % T if step < moving else moved_ST.argmax(-1)
        length = apart_STO[torch.arange(S), t_S].norm(dim=-1).sum()
        u_STD, v_STD = torch.autograd.grad(length, (x, w), allow_unused=True, materialize_grads=True)
        if step < moving:
            x = x + 0.15 * scale * (1 - step / moving) * unit(u_STD)
            w = unit(0.7 * w + 0.3 * unit(v_STD))
        else:
            w = unit(v_STD)
    return best_S


def margins(logits_NK, y_N):
    """(N,) logit of the right class minus the largest other one."""
    right_N1 = logits_NK.gather(1, y_N[:, None])
    return (right_N1 - logits_NK.scatter(1, y_N[:, None], -math.inf)).amin(1)


def withstands(logits, x, y_N, radius, steps, restarts=1, seed=0):
    """(N,) bool: predicted right, and still so all along a descent of the margin within radius (RMS)."""
    stands_N = torch.ones(len(y_N), dtype=torch.bool)
    for restart in range(restarts if radius else 1):  # (the first starts at x)
        d = radius * directions(*x.shape, seed=seed + restart) * (restart > 0)
        for _ in range(steps + 1):
            d.requires_grad_()
            margin_N = margins(logits(x + d), y_N)
            stands_N &= (margin_N > 0).detach()
            goal = margin_N[stands_N].clamp(min=1e-300).log().sum()  # (those near the edge count most)
            gradient, = torch.autograd.grad(goal, d)
            d = into_ball(d.detach() - 2.5 * radius / steps**0.5 * unit(gradient), radius)
    return stands_N


# ==== Claims: what the files of a run say, beside what the weights give ===========================
# A claimed number has to be the recomputed one, or in the range of a tuple (recomputed, low, high).
#   1. Norms and products are of float64, to 7e-10 (1000 layers): ROUNDING is a thousand times that.
#   2. A tuned bound, or a share certified with it, may be claimed weaker than here, not stronger.
#   3. Loss and accuracy come from float32 (nanogpt: the run's dtype). If logits are off by e here,
#      then by up to 4 e on other machines; a margin or a loss by 8 e. A prediction with a smaller
#      margin may count either way.
ROUNDING = dict(rel_tol=1e-6, abs_tol=1e-9)
SLACK = 1e-4  # of a limit on the weights, which a constraint keeps in float32 (constraints.py)
LARGEST = 1e13  # parameters times tokens of an evaluation: more would take hours here
MEMORY = 2**26  # numbers that an evaluation holds several times at once: 0.5 GB each time
NORM = "max-token RMS->max-token RMS"
# Settings that say where, not what, may differ. What a run did its weights do not tell.
PLACES = {"out", "data", "device", "prompt", "length", "temperature", "micro_batch", "sample"}
HISTORY = {"train_loss", "train_seconds", "ms_per_step", "device", "dtype", "torch", "activations",
           "tokens_per_second", "memory_gib", "processes"}


def holds(claim, low, high):
    """Whether a claimed number is in a range. (JSON has no infinity: it is a word.)"""
    try:
        claim = float(claim)
    except (TypeError, ValueError, OverflowError):
        return False
    return low <= claim <= high or any(math.isclose(claim, end, **ROUNDING) for end in (low, high))


def shares(certified):
    """{name: range of the share} of {name: predictions certified}."""
    found = {str(name): kept_N.double().mean().item() for name, kept_N in certified.items()}
    return {name: (share, 0.0, share) for name, share in found.items()}


def evaluation(logits, batches, hot=None, dtype=torch.float32):
    """Ranges of the losses (at temperature `hot` too, if any) and the accuracy over all batches."""
    temperatures = [1.0] if hot is None else [1.0, hot]
    sums, count = 0.0, 0
    for x, y in batches:
        exact_NK, y_N = logits(x, torch.float64).flatten(0, -2), y.flatten()
        e_N = 8 * (exact_NK - logits(x, dtype).flatten(0, -2)).abs().amax(1)
        margin_N = margins(exact_NK, y_N)
        losses = [F.cross_entropy(t * exact_NK, y_N, reduction="sum") for t in temperatures]
        rights = [(margin_N > at).sum() for at in (0, e_N, -e_N)]
        sums, count = sums + torch.stack([e_N.sum(), *rights, *losses]), count + len(y_N)
    off, right, low, high, *losses = (sums / count).tolist()
    found = [(loss, loss - t * off, loss + t * off) for loss, t in zip(losses, temperatures)]
    return dict(zip(("val_loss", "val_loss_at_temperature"), found), val_accuracy=(right, low, high))


class Table:
    """Rows: claims and what was recomputed; bounds (log10) and shares, and what attacks found."""

    def __init__(self, config):
        self.config, self.seed, self.steps = config, config.seed, max(6, int(120 * config.budget))
        self.rows, self.data_name = [], ""
        self.of_weights, self.of_data = {}, {}  # what was recomputed, by the names of summary.json

    def add(self, kind, where, what, claimed, found, verdict, **more):
        self.rows.append(dict(kind=kind, where=where, what=what, claimed=claimed, found=found,
                              verdict=verdict, **more))

    def claim(self, where, name, claimed, expected):
        """Compare a file (no name), or a value of it, with what was recomputed."""
        if claimed is None and expected is not None:  # (a file or a value is missing, or null)
            verdict = "not claimed" if name or where != "summary.json" else "nothing claimed"
            self.add("claim", where, name or "the file", None, None, verdict)
        elif isinstance(expected, dict) and isinstance(claimed, (dict, list)):
            claimed = dict(enumerate(claimed)) if isinstance(claimed, list) else claimed
            for key, value in expected.items():
                self.claim(where, f"{name} {key}".strip(), claimed.get(key), value)
            for key in sorted(claimed.keys() - expected.keys() - HISTORY - PLACES):
                unknown = "not checked: nothing recomputes it"
                self.add("claim", where, f"{name} {key}".strip(), str(claimed[key]), None, unknown)
        else:
            recomputed, low, high = expected if isinstance(expected, tuple) else (expected,) * 3
            number = isinstance(recomputed, float)
            agrees = holds(claimed, low, high) if number else claimed == recomputed
            self.add("claim", where, name, claimed, recomputed, "agrees" if agrees else "BROKEN")

    def bound(self, where, what, certified, found, norm, slack=TOLERANCE):
        """Compare the log10 of a bound with what was found against it, a number."""
        overflow, found = math.isnan(found), log10(found)
        verdict = "held" if found <= certified + math.log10(1 + slack) else "BROKEN"
        verdict = "not checked: overflow" if overflow else verdict
        tightness = 10 ** min(9.0, found - certified) if math.isfinite(found) else 0.0
        self.add("bound", where, what, certified, found, verdict, norm=norm, tightness=tightness)

    def attack(self, where, what, certified, f, x_STD, radius=math.inf, norm=NORM):
        """Search for a pair of inputs that exceeds the log10 of a bound."""
        found = climb(f, x_STD, radius, self.steps, self.seed).max().item()
        self.bound(where, what, certified, found, norm)

    def attack_predictions(self, where, norm, certified, logits, x, y_N, length, steps, restarts=1):
        """Every prediction certified at a radius (`length` of it is the RMS) must survive there."""
        steps = max(2, int(steps * self.config.budget))
        for radius, certified_N in certified.items():
            print(f"  attacking {len(y_N)} predictions within {radius:.3g} ...", flush=True)
            stands_N = withstands(logits, x, y_N, radius * length, steps, restarts, self.seed)
            kept_N = certified_N[:len(y_N)]
            shares = [part_N.double().mean().item() for part_N in (kept_N, stands_N)]
            verdict = "BROKEN" if (kept_N & ~stands_N).any() else "held"
            self.add("share", where, f"predictions right within {radius:.3g}", *shares, verdict,
                     norm=norm, radius=radius)

    def verdict(self):
        """Of the whole run."""
        seen = {row["verdict"] for row in self.rows}
        for worst in ("BROKEN", "nothing claimed"):
            if worst in seen:
                return worst
        return "held" if seen <= {"held", "agrees"} else "could not be checked in full"


def evaluation_data(table, script, run, model, trained_on):
    """The run's own test images and labels, or validation tokens; others if those are not here."""
    there = "stand-in" if trained_on.startswith("stand-in") else run.data
    run = dataclasses.replace(run, data=table.config.data or there)
    try:
        _, data, *vocabulary, table.data_name = script.load_data(run)
        if vocabulary and vocabulary[0] != model.vocabulary:
            raise script.UserError(f"--data {run.data}: has other characters than the run's text; give it")
        return data.read(0, min(len(data), run.val_tokens + 1)) if hasattr(data, "read") else data
    except script.UserError:
        if table.config.data:
            raise
    table.data_name, generator = "random, not the run's", torch.Generator().manual_seed(table.seed)
    if script is mlp_cifar:
        return mlp_cifar.stand_in()[1]
    return torch.randint(len(model.embedding_VD), (20 * run.seq_len + 1,), generator=generator)


# ==== MLP: an image is one token, so that the same search serves ==================================
def verify_mlp(table, script, run, model, trained_on):
    bound, to_rms = mlp_cifar.certificate(model, steps=30), log10(model.rms_per_l2)
    tight, pairs_KK = bound["tight_log10"] + to_rms, bound["pairs_log10_KK"]
    images_NP, labels_N = evaluation_data(table, script, run, model, trained_on)
    x_NP, K = images_NP[:table.config.images].double() / 255, len(pairs_KK)
    labels_N = labels_N % K  # (those of other data)
    for i, (W, norm) in enumerate(zip(model.weights, bound["norms"])):
        start = directions(8, 1, W.shape[1], seed=table.seed)
        table.attack(f"layer {i + 1}", "norm", log10(norm), lambda x: x @ W.T, start, norm="RMS->RMS")
    starts = torch.cat([x_NP[:24, None], 0.5 + 0.3 * directions(8, 1, 3072, seed=table.seed)])
    table.attack("network", "tight certificate", tight, lambda x: model(x[:, 0])[:, None], starts,
                 norm="RMS->RMS")
    y_S, j_S = torch.triu_indices(K, K, 1)[:, ::max(1, K * (K - 1) // 90)]  # at most 90 pairs of classes
    eye, L_S1 = torch.eye(K).double(), 10 ** pairs_KK[y_S, j_S, None].clamp(min=-300)
    aim_SK = (eye[y_S] - eye[j_S]) / L_S1 / 3072**0.5  # in units of the certificate
    table.attack("network", "two logits / their certificate", 0.0,
                 lambda x: (model(x[:, 0]) * aim_SK).sum(-1)[:, None, None],
                 x_NP[torch.arange(len(y_S)) % len(x_NP), None], norm="l2->abs")
    radius_N = mlp_cifar.certified_radii(model, pairs_KK, images_NP, labels_N)
    certified = {r: radius_N > r for r in (0.0, *mlp_cifar.RADII.values())}
    table.attack_predictions("test images", "l2 radius, pixels in [0, 1]", certified, model, x_NP,
                             labels_N[:len(x_NP)], length=3072**-0.5, steps=20, restarts=4)
    few_NP = images_NP[:5000 // K].double() / 255  # (as in the script's report)
    jacobians_NKP = torch.func.vmap(torch.func.jacrev(lambda x_P: model(x_P[None])[0]))(few_NP)
    table.of_weights = dict(
        norms=dict(enumerate(bound["norms"])), lipschitz_log10=(tight, tight, math.inf),
        lipschitz_product_log10=bound["product_log10"] + to_rms,
        lipschitz_norm="RMS->RMS, pixels in [0, 1] to logits")
    batches = zip(images_NP.split(2000), labels_N.split(2000))
    table.of_data = dict(
        evaluation(lambda x, dtype: model(x.to(dtype) / 255), batches),
        largest_jacobian_l2=torch.linalg.matrix_norm(jacobians_NKP, ord=2).max().item(),
        certified_accuracy=shares({name: radius_N > r for name, r in mlp_cifar.RADII.items()}))


# ==== Transformer: sublayers, blocks and the whole, inside the ball of its certificate ============
def verify_transformer(table, script, run, model, trained_on):
    free = script.tuned(model)
    bound = script.certificate(model, free=free)
    tokens_N = evaluation_data(table, script, run, model, trained_on)
    embedding_VD, T = model.embedding_VD, run.seq_len
    table.of_weights = dict(
        norms=bound["norms"], lipschitz_log10=(bound["log10"], bound["log10"], math.inf),
        lipschitz_product_log10=bound["product_log10"],
        lipschitz_norm=f"{NORM}, embeddings to logits, inside the ball")
    widest, count = max(len(embedding_VD), run.hidden, run.heads * T), len(tokens_N)  # (of what a token has)
    if sum(W.numel() for W in model.parameters()) * count < LARGEST and T * widest < MEMORY:
        print(f"  evaluating {count} tokens ...", flush=True)
        dtype = torch.float32
        if script is nanogpt_lipschitz:  # (auto was bfloat16, if that was fast)
            dtype = torch.bfloat16 if run.dtype == "auto" else getattr(torch, run.dtype)
        batches = shakespeare.windows(tokens_N, T, batch=max(1, min(8192, MEMORY // widest) // T))
        table.of_data = evaluation(model, batches, getattr(run, "loss_temperature", None), dtype)
    if getattr(run, "baseline", False):  # (norm layers: no promise that an attack could reach)
        return
    body, U = model.blocks if script is shakespeare else model.body, run.final_scale * model.head_VD
    real_STD = F.embedding(tokens_N.unfold(0, min(32, T), T)[:8], embedding_VD)
    attack_layers(table, model, bound, real_STD)
    print("  searching the network ...", flush=True)
    R = bound["norms"]["embedding"] * (1 + 1e-9)
    starts = torch.cat([real_STD, R * directions(*real_STD.shape, seed=table.seed)])
    table.attack("network", "certificate", bound["log10"], lambda x: body(x) @ U.T, starts, R)
    if script is shakespeare and len(embedding_VD) <= 1024 and 32 * T * widest <= 2 * MEMORY:  # (for memory)
        print("  certificates of tokens ...", flush=True)
        n = min(max(1, table.config.windows // 4), (len(tokens_N) - 1) // T) * T  # positions
        certified = script.certified_tokens(model, tokens_N, free)
        table.attack_predictions(
            "validation text", "rho: RMS at every embedding", certified,
            lambda x: (body(x) @ U.T).flatten(0, 1),
            F.embedding(tokens_N[:n].view(-1, T), embedding_VD), tokens_N[1:n + 1], length=1, steps=10)
        table.of_data["certified_token_accuracy"] = shares(certified)


def attack_layers(table, model, bound, real_STD):
    """Each sublayer, alone and with the stream; and the ball that the stream is to stay in."""
    (_, T, D), seed = real_STD.shape, table.seed

    def streams(x_STD):
        """The stream before each sublayer, and at the end."""
        parts = [f for block in model.blocks for f in (block.attention, block.mlp)]
        return list(accumulate(parts, lambda x, f: torch.lerp(x, f(x), model.mix), initial=x_STD))

    real = [x_STD.nan_to_num(0, 0, 0) for x_STD in streams(real_STD)]
    for i, (block, row) in enumerate(zip(model.blocks, bound["rows"])):
        where, a = f"block {i + 1}", model.mix
        print(f"  searching {where} of {len(model.blocks)} ...", flush=True)
        R, R_mlp = (10.0 ** min(60.0, row[key]) for key in ("radius_log10", "radius_mlp_log10"))
        starts = torch.cat([real[2 * i], R * directions(8, T, D, seed=seed + i),
                            split_tokens(block, model.config.heads, T, R)])
        single = torch.cat([x[:, -4:].reshape(-1, 1, D) for x in (starts, real[2 * i + 1])])
        for what, f, x_STD, radius, alone, with_stream in (
                ("attention", block.attention, starts, R,
                 log10(row["value"] + row["pattern"] * R * R), row["attention_log10"]),
                ("MLP", block.mlp, single, R_mlp, log10(row["mlp"]), log10((1 - a) + a * row["mlp"]))):
            table.attack(where, what, alone, f, x_STD, radius)
            table.attack(where, f"{what} + stream", with_stream,
                         lambda x: torch.lerp(x, f(x), a), x_STD, radius)
    # The ball: ascent of the largest token at the end.
    print("  searching the way out of the ball ...", flush=True)
    radii = [row[key] for row in bound["rows"] for key in ("radius_log10", "radius_mlp_log10")]
    radii, R = [*radii, bound["radius_log10"]], 10.0 ** radii[0]
    x_STD = torch.cat([real_STD, directions(8, T, D, seed=seed)])
    for _ in range(table.steps):
        x_STD = into_ball(x_STD, R).detach().requires_grad_()
        largest_S = rms(streams(x_STD)[-1]).amax(-1)
        gradient, = torch.autograd.grad(largest_S.sum(), x_STD)
        x_STD = x_STD.detach() + 0.3 * R * unit(gradient)
    for i, (radius, x_STD) in enumerate(zip(radii, streams(into_ball(x_STD, R)))):
        table.bound("stream", f"radius after {i} sublayers", radius, rms(x_STD).max().item(), "max-token RMS")


def split_tokens(block, heads, T, R):
    """Inputs that break a bound without heads: each has its slice of the value in its own token."""
    v_HED = block.v.detach().unflatten(0, (heads, -1))
    first_HD = torch.linalg.svd(v_HED, full_matrices=False)[2][:, 0]
    return R * unit(torch.stack([first_HD[(torch.arange(T) + s) % heads] for s in range(8)]))


# ==== Main: the files of a run, the report ========================================================
def read_json(path):
    """What a file of a run holds, of .jsonl a list; None if there is none. UserError, naming it."""
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > 2**24:
            raise ValueError(f"{path.stat().st_size} bytes, at most {2**24} are read")
        text = path.read_text(encoding="utf-8")
        return json.loads(f"[{','.join(text.splitlines())}]" if path.suffix == ".jsonl" else text)
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{path.name}: is no JSON of a run ({problem})") from problem


def read_checkpoint(path):
    """All that a run saved. UserError if what it unpacks to is larger than the file."""
    size = path.stat().st_size
    if not path.is_file() or sum(part.file_size for part in zipfile.ZipFile(path).infolist()) > size:
        raise UserError(f"{path}: is a pipe, or compressed, as no run's is")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if 4 * sum(W.numel() for W in saved["model"].values()) > size:  # (views of fewer numbers)
        raise UserError(f"{path}: its weights are more than the file holds")
    return saved


def verify(table, path):
    """Fill the table of a run folder or file."""
    summary, written, lines = [read_json(path / f) for f in ("summary.json", "config.json", "log.jsonl")]
    saved = read_checkpoint(path / "checkpoint.pt")
    script, trained_on = SCRIPTS[saved["script"]], str(saved["data"])
    # As they come back from JSON: what is neither text nor numbers is refused.
    text = json.dumps([saved["config"], saved["step"], saved["log"]]).replace("-Infinity", '"-inf"')
    settings, step, log = json.loads(text.replace("Infinity", '"inf"'))
    table.claim("config.json", "", written, {k: settings[k] for k in settings if k not in PLACES})
    limits = script.Config(**dict(saved["config"], constraint="none")).limits()  # (runs no code of a file)
    run, model, _ = script.load_checkpoint(path)
    if bad := [name for name, W in model.state_dict().items() if not W.isfinite().all()]:
        table.bound(bad[0], "is not finite", -math.inf, math.inf, "")
        return
    print("  certificates, then searches ...", flush=True)
    verify_script = verify_mlp if script is mlp_cifar else verify_transformer
    verify_script(table, script, run, model.double().requires_grad_(False), trained_on)
    if not table.config.data and table.data_name != trained_on:
        missing, table.of_data = "not checked: its data are not here", {}
        table.add("claim", "checkpoint", "data of the run", trained_on, table.data_name, missing)
    norms = table.of_weights["norms"]
    caps = dict(enumerate(limits)) if script is mlp_cifar else dict(limits, embedding=1.0)
    if run.constraint in ("specnorm", "stiefel", "soft_cap", "hard_cap"):  # (they promise a limit)
        for key, norm in norms.items():
            table.bound("weights", f"limit on {key}", log10(caps[key]), norm, "RMS->RMS", SLACK)
    expected = dict(
        {k: settings[k] for k in ("preset", "seed", "baseline") if k in settings},
        loss_temperature=settings.get("loss_temperature", 1.0),
        script=script.SCRIPT, steps=step, data=trained_on, **table.of_weights, **table.of_data,
        params=sum(p.numel() for p in model.parameters()),
        max_weight_norm=max(norm for key, norm in norms.items() if key != "embedding"),
        w_max=None if run.constraint == "none" else limits)
    table.claim("summary.json", "", summary, expected)
    last = dict(log[-1]) if log else {}
    names = last.keys() & expected.keys()  # (what is printed after every evaluation)
    table.claim("checkpoint's log", "", *({n: d[n] for n in names} for d in (last, expected)))
    agree = lines is None or lines == log[:len(lines)]  # (if the run was killed, the last may lack)
    table.claim("log.jsonl", "is the checkpoint's log", agree, True)


def print_report(table, seconds):
    print(f"\n  data: {table.data_name}\n  where             what  {'claimed or certified':>48} "
          f"{'found':>12}  verdict, found / certified")
    for row in table.rows:
        if row["verdict"] == "agrees" and row["where"] != "summary.json":  # (verify.json has all)
            continue
        values, note = [row["claimed"], row["found"]], ""
        if row["kind"] == "bound":
            values = [10**x if abs(x) < 6 else f"10^{x:.2f}" for x in values]
            note = f"{row['tightness']:.4f}  {row['norm']}"
        texts = [f"{x:.5g}" if isinstance(x, float) else ascii(x).strip("'") for x in values]
        if max(map(len, texts)) > 12:  # too long for the columns: whole, at the end
            note, texts = " / ".join(dict.fromkeys(texts))[:300], ["", "at the end"]
        what = ascii(row["what"])[1:-1][:100]
        print(f"  {row['where']:17} {what:40} {texts[0]:>12} {texts[1]:>12}  {row['verdict']}  {note}")
    print(f"  {table.verdict()}: {len(table.rows)} rows, {seconds:.0f} s")


def main(names, config):
    """Verify all; returns the exit status."""
    verdicts, paths = [], []
    for path in map(Path, names or ["runs"]):  # (a run, or a folder of runs)
        inside = [] if (path / "checkpoint.pt").exists() else path.glob("*/checkpoint.pt")
        paths += sorted(p.parent for p in inside) or [path]
    for path in paths:
        began, table = time.perf_counter(), Table(config)
        print(f"\n{path}", flush=True)
        try:
            verify(table, path)
        except Exception as problem:  # a file may be wrong in hundreds of ways
            if table.verdict() != "BROKEN":  # (else a setting was changed, and fits no weights)
                reason = ascii(f"{type(problem).__name__}: {problem}")[1:-1][:300]
                print(f"verify_lipschitz.py: {path}: could not be checked ({reason}); needed is the "
                      f"folder of a run of {', '.join(SCRIPTS)}", file=sys.stderr)
                verdicts.append("could not be checked")
                continue
        print_report(table, time.perf_counter() - began)
        verdicts.append(table.verdict())
        result = dict(verdict=table.verdict(), data=table.data_name, rows=table.rows)
        mlp_cifar.write(path / "verify.json", json.dumps(result, indent=1))
        print(f"All rows: {path}/verify.json", flush=True)
    print("; ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts)))
    return 1 if "BROKEN" in verdicts else 0 if set(verdicts) == {"held"} else 2


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # (a terminal may lack characters of a path)
    try:
        sys.exit(main(*parse_arguments()))
    except OSError as problem:
        print(f"verify_lipschitz.py: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nverify_lipschitz.py: interrupted", file=sys.stderr)
        sys.exit(130)
