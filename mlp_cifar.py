"""Tutorial 1: an MLP on CIFAR-10 whose Lipschitz constant is enforced at every step, and what that constant buys.

WHAT IT SHOWS. Muon moves every weight matrix by a known amount, a constraint takes back what exceeds the limit, and so
the network is at every moment as Lipschitz as its limits say, not after training and by accident. The constant is then
a certificate: an image whose margin is large enough provably keeps its class under *every* perturbation up to a radius.
(The CIFAR-10 experiments of arXiv 2507.13338. The paper reports bounds and attacks; certified accuracy is ours.)

COMMANDS
    python mlp_cifar.py                                     # under a minute; downloads CIFAR-10, or draws a stand-in
    python mlp_cifar.py --data DIR                          # a folder of parquet files with columns img, label
    python mlp_cifar.py --preset paper                      # the paper's settings; see --help for more presets
    python mlp_cifar.py --optimizer adamw --constraint none # no constraint: see how the norms grow
    python mlp_cifar.py --resume runs/NAME                  # go on where a run was stopped

RESULT (seeds 0, 1, 2; CIFAR-10 re-encoded as JPEG; two cores of an AMD EPYC with bfloat16 instructions; torch 2.13).
    58.9 +- 0.2 % test accuracy at a Lipschitz bound of 88.6 +- 0.1 (RMS->RMS, product of norms; 77.1 by the tight
    certificate), 38.9 +- 0.3 % certified at l2 radius 36/255. 30 s for the whole process.

ANCESTRY. The experiment is the authors' (github Arongil/lipschitz-transformers, in JAX); nothing of their code is used.
The tight certificate is ECLipsE-Fast (Xu and Sivaranjani 2024), certified accuracy as in Tsuzuku et al. (2018).
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import dataclasses
import io
import json
import math
import os
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

SCRIPT = "mlp_cifar"

# ======================================================================================================================
# CONFIG: every field is a flag of the same name
# ======================================================================================================================


def option(default, text, **kwargs):
    return dataclasses.field(default=default, metadata=dict(help=text, **kwargs))


@dataclasses.dataclass
class Config:
    preset: str = option("default", "named settings, see the end of this help; other flags override them")
    # data
    data: str = option("auto", "auto, stand-in, a folder of parquet files, or a data set's name on the Hub")
    holdout: int = option(0, "for tuning: evaluate on this many training images taken out, not on the test set")
    augment: bool = option(False, "random flips and shifts of up to 2 pixels of the training images")
    random_labels: bool = option(False, "train on labels drawn at random: how much can the network memorise?")
    # model
    depth: int = option(3, "number of weight matrices")
    width: int = option(256, "hidden width (neurons)")
    activation: str = option("relu", "relu, or maxmin, which sorts pairs of neurons and so loses no gradient",
                             choices=("relu", "maxmin"))
    bias: bool = option(True, "biases in all layers: they do not enter the Lipschitz constant")
    center: bool = option(True, "subtract the mean training image from the input: nor does that")
    lowpass: int = option(12, "show the network only the K x K lowest frequencies of an image (l2 constant 1); 32: all")
    w_max: str = option("3.4", "limit on the RMS->RMS norm of each layer: one number, or one per layer as 3,4,5")
    # training
    optimizer: str = option("muon", "optimizer of the weight matrices", choices=("muon", "adamw"))
    constraint: str = option("soft_cap", "map that holds each weight matrix within w_max: none, weight_decay, "
                             "spectral_weight_decay, specnorm, stiefel, hammer, soft_cap, hard_cap (table in "
                             "constraints.py), or one of yours as FILE.py:NAME")
    constrain_every: int = option(4, "let specnorm, soft_cap, hard_cap wait about so many steps, where it is certain that "
                                  "the limit holds meanwhile (Muon only; 1: after each step)")
    steps: int = option(2000, "training steps")
    batch: int = option(512, "images a step")
    lr: float = option(0.0, "learning rate at the start, falling linearly to 0; for Muon it is the RMS->RMS norm of a step, "
                            "shared by the layers. 0: 0.2 for Muon, 0.0013 for AdamW")
    bias_lr: float = option(0.01, "learning rate of the biases (Adam), falling likewise")
    momentum: float = option(0.9, "Muon's momentum, or AdamW's first beta")
    adamw_wd: float = option(0.0, "AdamW's own weight decay (besides the constraint)")
    loss_temperature: float = option(1.0, "the loss sees temperature * logits; bounds and val_loss are of the logits")
    margin: float = option(0.0, "and then the right one lowered by this: asks for room around each image")
    # run
    seed: int = option(0, "seed of initialisation, data order, augmentation")
    dtype: str = option("auto", "of the forward and backward pass; weights stay float32. auto: bfloat16 if native",
                        choices=("auto", "float32", "bfloat16"))
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps; auto: cuda if there is one")
    evals: int = option(10, "evaluations (on the whole test set) and checkpoints during a run")
    out: str = option("", "run folder; default runs/mlp_cifar_PRESET_seedN")
    resume: str = option("", "run folder to go on with; its own settings are used")
    # all pairs of optimizer and constraint
    compare: bool = option(False, "train every optimizer with every constraint at several strengths; the same command "
                           "again goes on where it was stopped. Settings: preset compare and other flags")
    minutes: float = option(40.0, "time after which --compare begins no further run, and reports")
    seeds: int = option(1, "seeds that --compare trains each point with")


PRESETS = {
    "default": dict(),
    "paper": dict(bias=False, center=False, lowpass=32, w_max="6"),
    "paper_adamw": dict(bias=False, center=False, lowpass=32, optimizer="adamw", constraint="none", adamw_wd=0.08),
    "accurate": dict(width=512, lowpass=9, w_max="3.15"),
    "tight": dict(activation="maxmin", augment=True, width=512, w_max="1.825", steps=4000),
    "certified": dict(activation="maxmin", augment=True, depth=4, width=512, w_max="1", loss_temperature=15.0,
                      margin=2.0, steps=5000),
    # the paper's network, and the constraint after each step as there
    "compare": dict(bias=False, center=False, lowpass=32, w_max="6", constrain_every=1, steps=1000, evals=1),
}
RADII = {"36/255": 36 / 255, "72/255": 72 / 255, "108/255": 108 / 255, "1": 1.0}  # l2, of pixels in [0, 1]


class Refusal(Exception):
    """Something that the user can mend: one line, exit status 2."""


class Diverged(Refusal):
    """A loss that is not finite."""


def parse_arguments(argv=None):
    """The command line as a Config: defaults, then the preset, then the flags given."""
    presets = "\n".join(f"  {k:13} " + " ".join(f"{a}={b}" for a, b in v.items()) for k, v in PRESETS.items())
    parser = argparse.ArgumentParser(description=__doc__.split("RESULT")[0], epilog="presets:\n" + presets, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(Config):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type)
        if "choices" in f.metadata:
            kind["choices"] = f.metadata["choices"]
        parser.add_argument("--" + f.name, default=argparse.SUPPRESS, **kind,
                            help=f.metadata["help"].replace("%", "%%") + f" [{f.default}]")
    given = vars(parser.parse_args(argv))
    preset = given.get("preset", "compare" if given.get("compare") else "default")
    if preset not in PRESETS:
        parser.error(f"--preset {preset}: must be one of {', '.join(PRESETS)}")
    if given.get("resume") == "":
        parser.error("--resume: is empty; give a run folder")
    for mode, others in (("resume", given.keys() - {"resume", "data", "device", "constraint"}),
                         ("compare", given.keys() & {"optimizer", "constraint", "w_max", "lr", "seed", "resume"})):
        if given.get(mode) and others:
            parser.error(f"{', '.join('--' + name for name in sorted(others))} with --{mode}: a run goes on with its own "
                         "settings" if mode == "resume" else f"--compare sets {', '.join(sorted(others))} itself")
    return Config(**{**PRESETS[preset], **given, "preset": preset})


def check(config):
    """Refuse what cannot be meant, before anything is loaded or written."""
    def need(ok, name, requirement):
        if not ok:
            raise Refusal(f"--{name} {getattr(config, name)}: must be {requirement}")

    for name in ("depth", "width", "steps", "batch", "evals"):
        need(getattr(config, name) >= 1, name, "a whole number of at least 1")
    need(0 < config.loss_temperature < math.inf, "loss_temperature", "a finite number above 0")
    need(config.holdout >= 0, "holdout", "a whole number of at least 0")
    for name in ("lr", "bias_lr", "adamw_wd", "margin"):
        need(0 <= getattr(config, name) < math.inf, name, "a finite number of at least 0")
    need(1 <= config.constrain_every <= 64, "constrain_every", "a whole number from 1 to 64")
    need(config.width <= 2**16 and config.depth <= 1000, "width", "at most 65536 (and --depth at most 1000)")
    need(1 <= config.lowpass <= 32, "lowpass", "a whole number from 1 to 32")
    need(0 <= config.momentum < 1, "momentum", "at least 0 and below 1")
    need(config.activation == "relu" or config.width % 2 == 0, "width", "even for maxmin, which works on pairs")
    need(0 <= config.seed < 2**31, "seed", "a whole number from 0 to 2^31 - 1")
    need(0 <= config.minutes < math.inf, "minutes", "a finite number of at least 0")
    need(1 <= config.seeds <= 1000, "seeds", "a whole number from 1 to 1000")
    limits(config)
    config.evals = min(config.evals, config.steps)
    config.lr = config.lr or (0.2 if config.optimizer == "muon" else 0.0013)


def limits(config):
    """w_max of each layer, from the flag."""
    try:
        w = [float(v) for v in config.w_max.split(",")]
    except ValueError:
        w = []
    if len(w) not in (1, config.depth) or not all(0 < v < math.inf for v in w):
        raise Refusal(f"--w_max {config.w_max}: must be a finite number above 0, or {config.depth} of them with commas "
                      f"(one for each of the {config.depth} layers)")
    return w * config.depth if len(w) == 1 else w


if __name__ == "__main__":
    CONFIG = parse_arguments()  # before the imports that take seconds, so that --help answers at once

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from constraints import after_unknown_step, exact_norm, find_constraint, sigma_per_norm, singular_values  # noqa: E402
from muon import Muon, fast_dtype  # noqa: E402

# Shapes: B images in a batch, N in a set, P = 3072 pixel values, K = 10 classes, F frequencies, X columns, H neurons.


# ======================================================================================================================
# DATA: CIFAR-10 from a folder or the Hub, or drawn here
# ======================================================================================================================
def load_data(config):
    """((train images_NP, labels_N), (test images_NP, labels_N), name): uint8 images and int64 labels on the CPU."""
    source, folder = config.data, Path(os.environ.get("DATA_DIR", "")) / "cifar10"
    if source == "stand-in":
        return (*stand_in(), "stand-in")
    if source != "auto":
        if not Path(source).exists() and (source.startswith((".", "/", "~")) or source.count("/") != 1):
            raise Refusal(f"--data {source}: no such folder; give a folder of parquet files, a Hub name such as "
                          "uoft-cs/cifar10, or auto")
        return load_images(source)
    if os.environ.get("DATA_DIR") and folder.is_dir():
        return load_images(str(folder))
    try:
        return load_images("uoft-cs/cifar10")
    except Refusal as problem:
        print(f"{'!' * 100}\n!!  CIFAR-10 is not here: {problem}\n!!  TRAINING ON A STAND-IN: drawings made by this "
              f"script, not CIFAR-10. Its accuracy compares with nothing.\n{'!' * 100}", flush=True)
        return (*stand_in(), "stand-in")


def hold_out(config, train_set, test_set):
    """With --holdout N, N training images (the same for every seed) take the place of the test set."""
    n = len(train_set[0])
    if config.holdout >= n:
        raise Refusal(f"--holdout {config.holdout}: must be below the number of training images, {n}")
    if config.holdout == 0:
        return train_set, test_set
    order = torch.randperm(n, generator=torch.Generator().manual_seed(2025))
    return tuple(tuple(t[part] for t in train_set) for part in (order[config.holdout:], order[:config.holdout]))


def test_name(config):
    return "held-out" if config.holdout else "test"


def load_images(source):
    """A folder or a data set of the Hub, with splits train and test and columns img (or image) and label."""
    local = Path(source).exists()
    if not local and not hub_answers():
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # look in the cache, do not wait
    import datasets  # takes a second or two, so only where it is needed
    from PIL import Image

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    if local and Path(source).is_file():
        raise Refusal(f"--data {source}: is a file; needed is a folder with a parquet file for train and one for test")
    try:
        splits = datasets.load_dataset(source)
    except Exception as problem:  # the library raises dozens of kinds; all mean that the data cannot be had
        first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        needed = "a folder with a parquet file for train and one for test" if local else "a network, a cached copy, or --data DIR"
        raise Refusal(f"--data {source}: cannot be had ({type(problem).__name__}: {first[:160]}); needed "
                      f"is {needed}") from problem
    sets = []
    for split in ("train", "test"):
        if split not in splits:
            raise Refusal(f"--data {source}: has the splits {', '.join(splits)}; needed are train and test")
        table = splits[split]
        column = next((c for c in ("img", "image") if c in table.column_names), None)
        if column is None or "label" not in table.column_names:
            raise Refusal(f"--data {source}: {split} has the columns {', '.join(table.column_names)}; needed are img "
                          "(or image) and label")
        table = table.cast_column(column, datasets.Image(decode=False))
        images = np.empty((len(table), 32, 32, 3), np.uint8)
        for i, cell in enumerate(table.data.column(column).to_pylist()):
            try:
                picture = Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] else cell["path"])
                images[i] = picture if picture.mode == "RGB" else picture.convert("RGB")
            except Exception as problem:
                raise Refusal(f"--data {source}: image {i} of {split} is no 32 x 32 picture ({problem})") from problem
        try:
            labels = np.asarray(table.data.column("label").to_pylist(), dtype=np.int64)
        except (TypeError, ValueError) as problem:
            raise Refusal(f"--data {source}: the labels of {split} are no whole numbers ({problem})") from problem
        if len(labels) == 0 or labels.min() < 0 or labels.max() > 9:
            raise Refusal(f"--data {source}: {split} has {len(labels)} images" + (len(labels) > 0) *
                          f" with labels from {labels.min()} to {labels.max()}" + "; needed are labels from 0 to 9")
        sets.append((torch.from_numpy(images.reshape(-1, 3072)), torch.from_numpy(labels)))
    return (*sets, source)


def hub_answers(seconds=4.0):
    """Whether the Hub can be reached, known after a few seconds also where a dead network swallows every packet."""
    def ask():
        try:
            urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=seconds).close()
            answer.append(True)
        except urllib.error.HTTPError:
            answer.append(True)  # an error page is an answer
        except (OSError, ValueError):
            pass

    answer = []
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        return False
    thread = threading.Thread(target=ask, daemon=True)  # a name look-up has no timeout of its own
    thread.start()
    thread.join(seconds)
    return bool(answer)


def stand_in(train=20_000, test=4_000):
    """Ten classes of drawings: shapes and textures of random place, size, colour and polarity, in noise.

    Neither colour nor the brightness of any pixel tells the class, so a linear model has little to go by.
    """
    n, generator = train + test, torch.Generator().manual_seed(20_250_713)
    label_N = torch.arange(n) % 10

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    axis = torch.linspace(-1, 1, 32)
    x, y = axis[None, None, :] - uniform(-0.4, 0.4, 1, 1), axis[None, :, None] - uniform(-0.4, 0.4, 1, 1)  # (n, 32, 32)
    size, wave = uniform(0.35, 0.8, 1, 1), uniform(9, 14, 1, 1)
    round_, square = (x * x + y * y).sqrt() / size, x.abs().maximum(y.abs()) / size
    near = x.abs().minimum(y.abs()) / size
    figures = torch.stack([
        round_ < 1, (round_ < 1) & (round_ > 0.6), square < 1, (square < 1) & (square > 0.6),  # disc, ring, box, frame
        (y < size) & (y > 2 * x.abs() - size), (square < 1) & (near < 0.25),  # triangle, cross
        (x * wave).sin() + 0 * y > 0, (y * wave).sin() + 0 * x > 0, ((x + y) * wave).sin() > 0,  # stripes, 3 ways
        (x * wave).sin() * (y * wave).sin() > 0])  # checkerboard
    mask = figures[label_N, torch.arange(n), :, :, None].float()
    ink, paper = uniform(0, 1, 1, 1, 3), uniform(0, 1, 1, 1, 3)
    images = mask * ink + (1 - mask) * paper + 0.25 * torch.randn(n, 32, 32, 3, generator=generator)
    images = (images.clamp(0, 1) * 255).round().to(torch.uint8).reshape(n, 3072)
    return (images[:train], label_N[:train]), (images[train:], label_N[train:])


def batch_indices(step, config, n):
    """Indices of the images of a step: epoch after epoch, each in its own random order, a function of seed and step.

    (So a resumed run sees the same images without having to store where it was.)
    """
    batch = min(config.batch, n)
    per_epoch = n // batch
    epoch, position = divmod(step, per_epoch)
    if batch_indices.epoch != (config.seed, epoch, n):
        batch_indices.epoch = (config.seed, epoch, n)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        batch_indices.order = torch.randperm(n, generator=generator)
    return batch_indices.order[position * batch:(position + 1) * batch]


batch_indices.epoch = None


def augmented(images_BP, step, config):
    """Each image flipped with probability 1/2, shifted by up to 2 pixels, edges repeated; by seed and step."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + 500_009 + step)
    B = len(images_BP)
    flip_B = torch.rand(B, generator=generator) < 0.5
    dx, dy = torch.randint(-2, 3, (2, B, 1), generator=generator)
    columns = torch.arange(32).expand(B, 32)
    columns = (torch.where(flip_B[:, None], 31 - columns, columns) + dx).clamp(0, 31)
    rows = (torch.arange(32) + dy).clamp(0, 31)
    pixel = (rows[:, :, None] * 32 + columns[:, None, :]).reshape(B, 1024, 1).to(images_BP.device)
    return images_BP.view(B, 1024, 3).gather(1, pixel.expand(B, 1024, 3)).reshape(B, 3072)


# ======================================================================================================================
# MODEL: matrices and ReLU, nothing else
# ======================================================================================================================
def maxmin(z_BH):
    """(max, min) of each pair (neuron i of the first half, of the second): GroupSort of Anil et al. (2019)."""
    a, b = z_BH.chunk(2, -1)
    return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], -1)


class MLP(torch.nn.Module):
    """logits = W_d relu(... relu(W_1 T (x - mean) + b_1) ...) + b_d, for pixels x in [0, 1]; or with maxmin for relu.

    The shift by the mean and the biases cancel in differences of outputs: neither enters a Lipschitz constant. T keeps
    the lowest frequencies of each colour channel, as coefficients of the orthonormal cosine transform: an orthogonal
    projection, of constant 1 (l2->l2). What it hides is what an MLP on pixels uses to memorise its training images.
    """

    def __init__(self, config, mean_P=None):
        super().__init__()
        sizes = [3 * config.lowpass**2] + [config.width] * (config.depth - 1) + [10]
        shapes = list(zip(sizes[1:], sizes[:-1]))
        self.weights = torch.nn.ParameterList(torch.zeros(shape) for shape in shapes)
        self.biases = [0.0] * config.depth
        if config.bias:
            self.biases = torch.nn.ParameterList(torch.zeros(fan_out) for fan_out, _ in shapes)
        self.register_buffer("mean_P", (torch.zeros(3072) if mean_P is None else mean_P) if config.center else None)
        self.cosines_FX = cosines(config.lowpass) if config.lowpass < 32 else None  # float64, on the CPU
        self.activation = F.relu if config.activation == "relu" else maxmin
        generator = torch.Generator().manual_seed(config.seed)
        for W, w_max in zip(self.weights, limits(config)):
            # All singular values equal, of norm 1 (or the limit): inside every constraint, on the manifold for stiefel.
            torch.nn.init.orthogonal_(W, generator=generator)
            W.data.mul_(sigma_per_norm(W) * (w_max if config.constraint == "stiefel" else min(1.0, w_max)))

    def features(self, x_BP):
        """T (x - mean): what the first matrix sees."""
        h = x_BP if self.mean_P is None else x_BP - self.mean_P.to(x_BP.dtype)
        if self.cosines_FX is None:
            return h
        cosines_XF = self.cosines_FX.to(h.dtype).to(h.device).T
        h = h.reshape(-1, 32, 96).mT @ cosines_XF  # rows to frequencies: (B, 32 columns * 3, F)
        h = h.reshape(len(x_BP), 32, -1).mT @ cosines_XF  # columns to frequencies: (B, 3 * F, F)
        return h.reshape(len(x_BP), -1)

    def forward(self, x_BP):
        """Logits (B, 10) of pixels in [0, 1], computed in the precision of x_BP (float64 for certificates)."""
        h = self.features(x_BP)
        for i, (W, b) in enumerate(zip(self.weights, self.biases)):
            h = F.linear(h if i == 0 else self.activation(h), W.to(h.dtype))
            h = h + (b.to(h.dtype) if isinstance(b, torch.Tensor) else b)
        return h


def cosines(frequencies, size=32):
    """The first rows of the orthonormal discrete cosine transform (DCT-II), (frequencies, size), float64."""
    x, f = torch.arange(size, dtype=torch.float64), torch.arange(frequencies, dtype=torch.float64)[:, None]
    C = (2 / size) ** 0.5 * torch.cos(math.pi * f * (2 * x + 1) / (2 * size))
    C[0] /= 2**0.5
    return C


# ======================================================================================================================
# CERTIFICATE: numbers that no pair of images can exceed, from the weights alone
# ======================================================================================================================
# Let two inputs differ by dx, the vectors before layer i's activation by z_i, after it by h_i: z_{i+1} = W_{i+1} h_i.
#
# Product. ReLU has slope in [0, 1], and sorting pairs brings no two vectors further apart, so ||h|| <= ||z||; with
# ||W h|| <= sigma(W) ||h|| this makes L = prod_i sigma(W_i).
#
# Tighter (ECLipsE-Fast, Xu and Sivaranjani 2024). Follow not one length but an ellipsoid through the network.
#   1. The claim kept up is  z_i^T S_i^-1 z_i <= ||dx||^2  (where S_i is singular: z_i in its range; or take limits).
#      It holds at the start with S_1 = W_1 W_1^T: ||dx||^2 is at least that of the shortest dx with W_1 dx = z_1.
#   2. ReLU: slopes in [0, 1] mean h (z - h) >= 0 in every neuron, so for any lambda >= 0:
#          ||dx||^2  >=  z^T S^-1 z  >=  z^T S^-1 z - lambda h^T (z - h).
#   3. Minimise the right side over z for the given h: z = lambda S h / 2 and
#          ||dx||^2  >=  h^T M h,    M = lambda I - lambda^2 S / 4.
#   4. M is positive definite for lambda < 4 / sigma(S); its smallest eigenvalue is largest, 1 / sigma(S), at
#          lambda = 2 / sigma(S).
#   5. z' = W' h of the next layer then satisfies 1 with S' = W' M^-1 W'^T, as in the start with W' M^-1/2 for W_1.
#   6. After the last layer: ||z_d||^2 <= sigma(S_d) ||dx||^2, so L = sqrt(sigma(S_d)). Never more than the product, as
#      M^-1 <= sigma(S) I. (maxmin, in place of 2 to 4: ||h||^2 <= ||z||^2 <= sigma(S) ||dx||^2, so M = I / sigma(S)
#      and L is the product. A finer one gains 0.2 % on a trained network: left out.)
#   7. One difference of logits f_y - f_j is a network with the single last row w_y - w_j: its constant is
#          L_yj = sqrt((w_y - w_j)^T M^-1 (w_y - w_j)).
#   8. If f_y(x) - f_j(x) > eps L_yj for all j != y then every image within eps (l2) of x is still classified as y.
def certificate(model):
    """Certified constants of a model, from exact singular values in float64.

    norms      RMS->RMS norm of each layer
    product    prod of layer norms, l2->l2
    tight      steps 1-6 above, l2->l2: the certificate used
    pairs_KK   L_yj of step 7, l2 -> |f_y - f_j|
    All rounded up by 1e-9 or more. Multiply l2->l2 by RMS_PER_L2 for RMS->RMS.
    """
    weights = [W.detach().cpu().double() for W in model.weights]
    if not all(W.isfinite().all() for W in weights):
        raise Refusal("the model has weights that are not finite, so there is nothing to certify")
    norms = [exact_norm(W).item() for W in weights]
    product = math.prod(n * sigma_per_norm(W) for n, W in zip(norms, weights))
    root = weights[0]  # any matrix with root root^T = W M^-1 W^T, here for the layer under way
    for W in weights[1:]:
        S = root @ root.T
        sigma = torch.linalg.matrix_norm(S, ord=2)
        if sigma == 0:
            root = torch.zeros_like(W)
            continue
        if model.activation is maxmin:
            root = sigma.sqrt() * W
            continue
        M = (2 * torch.eye(len(S), dtype=S.dtype) - S / sigma) / sigma  # lambda I - lambda^2 S / 4
        root = torch.linalg.solve_triangular(torch.linalg.cholesky(M), W.T, upper=False).T  # W C^-T with M = C C^T
    tight = min(product, torch.linalg.matrix_norm(root, ord=2).item() * (1 + 1e-9))
    pairs_KK = torch.linalg.vector_norm(root[:, None] - root[None, :], dim=-1) * (1 + 1e-9)
    return dict(norms=norms, product=product, tight=tight, pairs_KK=pairs_KK)


RMS_PER_L2 = (3072 / 10) ** 0.5  # multiply an l2->l2 constant of a map pixels -> logits by this for RMS->RMS


@torch.no_grad()
def certified_radii(model, pairs_KK, images_NP, labels_N):
    """l2 radius, for pixels in [0, 1], in which each image provably keeps its right class (step 8); < 0 if wrong."""
    model = copy.deepcopy(model).cpu()  # float64 is not on every device
    logits_NK = torch.cat([model(x.double() / 255) for x in images_NP.split(2000)])
    margin_NK = logits_NK.gather(1, labels_N[:, None]) - logits_NK
    radius_NK = margin_NK / pairs_KK[labels_N].clamp(min=1e-300)  # (a constant of 0: far if right, 0 if tied)
    return radius_NK.scatter(1, labels_N[:, None], math.inf).amin(1)


def largest_jacobian_norm(model, images_NP):
    """The largest l2->l2 norm of the Jacobian among some images: a lower bound to hold the certificate against."""
    x = (images_NP.double() / 255).requires_grad_()
    logits_NK = copy.deepcopy(model).cpu()(x)
    rows = [torch.autograd.grad(logits_NK[:, k].sum(), x, retain_graph=True)[0] for k in range(logits_NK.shape[1])]
    return torch.linalg.matrix_norm(torch.stack(rows, 1), ord=2).max().item()


# ======================================================================================================================
# TRAINING
# ======================================================================================================================
def make_optimizers(config, model):
    """[(optimizer, its learning rate at the start)]: one for the matrices, one for the biases if there are any."""
    w_max = limits(config)
    if config.optimizer == "muon":
        dtype = compute_dtype(config, model.weights[0].device)
        # The layers share the learning rate: a step moves the product of their norms by about lr / w_max in all.
        optimizers = [(Muon([dict(params=[W], w_max=w) for W, w in zip(model.weights, w_max)], momentum=config.momentum,
                            constraint=find_constraint(config.constraint), every=config.constrain_every, dtype=dtype),
                       config.lr / config.depth)]
    else:
        optimizers = [(torch.optim.AdamW(model.weights, betas=(config.momentum, 0.95), weight_decay=config.adamw_wd),
                       config.lr)]
    if config.bias:
        optimizers.append((torch.optim.Adam(model.biases, betas=(0.9, 0.99)), config.bias_lr))
    return optimizers


def train_step(config, model, optimizers, images_BP, labels_B, step, dtype):
    """One step; returns the loss (a tensor)."""
    fraction = 1 - step / config.steps
    x_BP = images_BP.to(dtype).div_(255)
    logits_BK = config.loss_temperature * model(x_BP).float()
    if config.margin:
        logits_BK = logits_BK - config.margin * F.one_hot(labels_B, logits_BK.shape[1])
    loss = F.cross_entropy(logits_BK, labels_B)
    loss.backward()
    for optimizer, lr in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * fraction
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if config.optimizer == "adamw" and config.constraint != "none":
        for W, w_max in zip(model.weights, limits(config)):  # (Muon does it by itself)
            W.data.copy_(after_unknown_step(find_constraint(config.constraint), W, w_max, config.lr * fraction))
    return loss.detach()


@torch.no_grad()
def evaluate(model, images_NP, labels_N):
    """(mean cross-entropy of the logits, accuracy) over a whole set, in float32."""
    device, loss, right = model.weights[0].device, 0.0, 0
    for x, y in zip(images_NP.split(2000), labels_N.split(2000)):
        logits, y = model(x.to(device).float() / 255), y.to(device)
        loss += F.cross_entropy(logits, y, reduction="sum").item()
        right += (logits.argmax(1) == y).sum().item()
    return loss / len(labels_N), right / len(labels_N)


def first_not_finite(model):
    """In words, the first layer whose weights are not finite."""
    for i, W in enumerate(model.weights):
        if not W.isfinite().all():
            return f"the weights of layer {i + 1} (of {len(model.weights)}) are not finite"
    return "the logits overflow though all weights are finite"


def train(config, model, optimizers, train_set, test_set, data_name, out, progress):
    """Train from progress["step"] to the end, with `evals` evaluations and checkpoints on the way."""
    from tqdm import tqdm

    device, dtype = model.weights[0].device, compute_dtype(config, model.weights[0].device)
    images_NP, labels_N = train_set
    if config.random_labels:
        labels_N = torch.randint(10, labels_N.shape, generator=torch.Generator().manual_seed(config.seed))
    if device.type != "cpu":  # the uint8 images of the whole set are 150 MB: no loader, no copies
        images_NP, labels_N = images_NP.to(device), labels_N.to(device)
    eval_steps = {math.ceil(config.steps * (i + 1) / config.evals) for i in range(config.evals)}
    bar = tqdm(total=config.steps, initial=progress["step"], unit="step", disable=not sys.stderr.isatty(), leave=False)
    losses, began = [], time.perf_counter()
    for step in range(progress["step"], config.steps):
        index = batch_indices(step, config, len(labels_N)).to(device)
        images_BP = images_NP.index_select(0, index)
        if config.augment:
            images_BP = augmented(images_BP, step, config)
        losses.append(train_step(config, model, optimizers, images_BP, labels_N[index], step, dtype))
        done = step + 1
        if done % 10 == 0 or done in eval_steps:  # (not at every step: on a GPU that would wait for it)
            if not (torch.stack(losses[-10:]).isfinite().all() and all(W.isfinite().all() for W in model.weights)):
                raise Diverged(f"step {done}: training has diverged, as {first_not_finite(model)}; the last good checkpoint, "
                               f"if any, is in {out}; try a smaller --lr than {config.lr:g}")
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update(done - bar.n)
        if done in eval_steps:
            progress["seconds"] += time.perf_counter() - began
            progress["step"] = done
            val_loss, val_accuracy = evaluate(model, *test_set)
            bound = certificate(model)
            constant, ms = bound["tight"] * RMS_PER_L2, 1000 * progress["seconds"] / done
            record = dict(step=done, train_loss=torch.stack(losses).mean().item(), val_loss=val_loss,
                          val_accuracy=val_accuracy, norms=bound["norms"], max_weight_norm=max(bound["norms"]),
                          lipschitz_log10=log10(constant), ms_per_step=ms)
            with open(out / "log.jsonl", "a") as f:
                f.write(json.dumps(record) + "\n")
            save_checkpoint(out, config, model, optimizers, progress, data_name, len(labels_N))
            left = ms / 1000 * (config.steps - done)
            bar.write(f"step {done:5d}/{config.steps}  train loss {record['train_loss']:.3f}  {test_name(config)} loss "
                      f"{val_loss:.3f}  accuracy {100 * val_accuracy:5.2f} %  largest norm {max(bound['norms']):.3f}  bound "
                      f"(RMS->RMS) {constant:.4g}  {ms:.1f} ms/step  {left:.0f} s left", file=sys.stdout)
            sys.stdout.flush()
            losses, began = [], time.perf_counter()
    bar.close()


# ======================================================================================================================
# MAIN: devices, run folders, checkpoints, the report
# ======================================================================================================================
def log10(x):
    """log10, or None for the constant 0 of a network that ignores its input (JSON has no -infinity)."""
    return math.log10(x) if x > 0 else None


def keep_memory():
    """Have glibc keep freed blocks: by default every large tensor is mapped and page-faulted in anew."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
    except (OSError, AttributeError, TypeError):
        pass  # another C library: nothing lost but speed


def choose_device(config):
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        reason = str(problem).splitlines()[0]
        raise Refusal(f"--device {config.device}: cannot be used here ({reason}); try auto") from problem


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


def save_checkpoint(out, config, model, optimizers, progress, data_name, images):
    """All a run needs to go on. Data order and augmentation are functions of seed and step: there is no other state."""
    buffer = io.BytesIO()
    torch.save(dict(script=SCRIPT, config=dataclasses.asdict(config), step=progress["step"], data=data_name,
                    images=images, training_seconds=progress["seconds"], model=model.state_dict(),
                    optimizers=[optimizer.state_dict() for optimizer, _ in optimizers]), buffer)
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
        model = MLP(config)
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, RuntimeError, AttributeError) as problem:
        reason = str(problem).splitlines()[0][:160]
        raise Refusal(f"the checkpoint's weights do not fit its configuration ({reason})") from problem
    return config, model


def new_run_folder(config):
    """A folder that was empty or not there. Nothing is ever overwritten."""
    out = Path(config.out) if config.out else Path("runs") / f"{SCRIPT}_{config.preset}_seed{config.seed}"
    number = 1
    while not config.out and out.exists():
        number += 1
        out = out.with_name(f"{SCRIPT}_{config.preset}_seed{config.seed}_{number}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Refusal(f"--out {out}: exists and is not empty; choose another" +
                      f", or --resume {out} to go on with it" * (out / "checkpoint.pt").is_file())
    out.mkdir(parents=True, exist_ok=True)
    return out


def report(config, model, out, data_name, test_set):
    """The table, the picture and summary.json at the end of a run."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    record, bound = log[-1], certificate(model)
    radius_N = certified_radii(model, bound["pairs_KK"], *test_set)
    certified = {name: (radius_N > r).double().mean().item() for name, r in RADII.items()}
    jacobian = largest_jacobian_norm(model, test_set[0][:500])
    device = model.weights[0].device
    summary = dict(
        script=SCRIPT, preset=config.preset, params=sum(p.numel() for p in model.parameters()), steps=config.steps,
        val_loss=record["val_loss"], val_accuracy=record["val_accuracy"],
        lipschitz_log10=log10(bound["tight"] * RMS_PER_L2),
        lipschitz_product_log10=log10(bound["product"] * RMS_PER_L2),
        lipschitz_norm="RMS->RMS, pixels in [0, 1] to logits",
        lipschitz_l2=bound["tight"], lipschitz_product_l2=bound["product"], largest_jacobian_l2=jacobian,
        certified_accuracy=certified, max_weight_norm=max(bound["norms"]), norms=bound["norms"],
        w_max=limits(config) if config.constraint != "none" else None, loss_temperature=config.loss_temperature,
        train_seconds=record["ms_per_step"] * config.steps / 1000, ms_per_step=record["ms_per_step"], data=data_name,
        device=str(device), dtype=str(compute_dtype(config, device)).removeprefix("torch."), seed=config.seed,
        torch=torch.__version__)
    draw(config, model, out, log, bound, radius_N, data_name)
    write_atomically(out / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())

    print(f"\n{config.preset}: {config.optimizer} + {config.constraint}, {config.steps} steps, seed {config.seed}, "
          f"data: {data_name}")
    print(f"  {test_name(config) + ' accuracy':27}      {100 * record['val_accuracy']:8.2f} %     cross-entropy of the logits "
          f"{record['val_loss']:.3f}" + (f" (trained at loss temperature {config.loss_temperature:g})"
                                         if config.loss_temperature != 1 else ""))
    for i, (norm, w) in enumerate(zip(bound["norms"], limits(config))):
        limit = f"limit {w:g}" if config.constraint != "none" else "no limit"
        print(f"  layer {i + 1} norm (RMS->RMS)          {norm:8.4f}       {limit}")
    if config.lowpass < 32:
        print(f"  low-pass in front (RMS->RMS)     {32 / config.lowpass:8.4f}       fixed; 1 in l2->l2")
    print("  Lipschitz constant                l2->l2     RMS->RMS")
    for name, value in (("certified, product", bound["product"]), ("certified, tight", bound["tight"]),
                        (f"found on 500 {test_name(config)} images", jacobian)):
        print(f"    {name:26} {value:12.4g} {value * RMS_PER_L2:12.4g}")
    print("  certified accuracy at l2 radius   " + "   ".join(f"{k}: {100 * v:.2f} %" for k, v in certified.items()))
    if data_name.startswith("stand-in"):
        print("  data: stand-in. These figures are not about CIFAR-10.")
    print(f"\nPicture, log and checkpoint are in {out}. Compare: python {SCRIPT}.py --optimizer adamw --constraint none")


def draw(config, model, out, log, bound, radius_N, data_name):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [r["step"] for r in log]
    figure, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    name = "/".join(Path(data_name).parts[-2:])  # (a picture is shown around: not where the data lie)
    figure.suptitle(f"{SCRIPT}, {config.preset}: {config.optimizer} + {config.constraint}, data: {name}")
    a.plot(steps, [100 * r["val_accuracy"] for r in log], "o-")
    a.set(title="accuracy", xlabel="step", ylabel=f"{test_name(config)} accuracy (%)")
    for i, w in enumerate(limits(config)):
        line, = b.plot(steps, [r["norms"][i] for r in log], "o-", label=f"layer {i + 1}")
        if config.constraint != "none":
            b.axhline(w, color=line.get_color(), linestyle=":")
            b.set_ylim(0, 1.1 * max(limits(config)))
        s = singular_values(model.weights[i])
        c.plot(np.linspace(0, 1, len(s)), s, label=f"layer {i + 1}")
    b.set(title="weight norms and their limits (dotted)", xlabel="step", ylabel="RMS->RMS norm")
    c.set(title="singular values at the end", xlabel="rank, as a share", ylabel="RMS->RMS", ylim=(0, None))
    b.legend()
    c.legend()
    r = np.linspace(0, 1, 200)
    d.plot(r, [100 * (radius_N.numpy() > v).mean() for v in r])
    d.set(title=f"certified accuracy (constant {bound['tight']:.3g}, l2->l2)", xlabel="l2 radius", ylabel="%")
    d.set_ylim(0, None)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    write_atomically(out / "curves.png", buffer.getvalue())


def resumed(config):
    """(run folder, checkpoint, configuration) of a run that was stopped."""
    out, state = Path(config.resume), load_checkpoint(config.resume)
    if not out.is_dir():
        raise Refusal(f"--resume {out}: is a file; give the run folder that holds it")
    if (out / "summary.json").exists():
        raise Refusal(f"--resume {out}: that run is finished, see its summary.json; start another with --out")
    own, _ = model_from_checkpoint(state)
    if ":" in own.constraint and config.constraint != own.constraint:  # (a checkpoint must not have code run by itself)
        raise Refusal(f"--resume {out}: was trained with code of yours; say that you trust it: --constraint {own.constraint}")
    own.device = config.device
    own.data = config.data if config.data != "auto" else own.data
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)  # (the last may have been cut off with the run)
    log = [line.strip() for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state["step"]]
    write_atomically(out / "log.jsonl", "".join(line + "\n" for line in log).encode())
    return out, state, own


# ---- --compare: every optimizer with every constraint -----------------------------------------------------------------
# (optimizer, constraint): (learning rate, strengths). A strength is w_max, so for the decays the inverse of a weight decay.
# Learning rates: the best of three to four on 5,000 held-out training images, at a strength in the middle, 1000 steps, one seed.
PAIRS = {
    ("muon", "none"): (0.1, (1,)), ("adamw", "none"): (0.002, (1,)),
    ("muon", "weight_decay"): (0.4, (2, 3.5, 6)), ("adamw", "weight_decay"): (0.002, (0.05, 0.2, 0.5)),
    ("muon", "spectral_weight_decay"): (0.1, (0.2, 0.5, 1)), ("adamw", "spectral_weight_decay"): (0.004, (0.01, 0.03, 0.1)),
    ("muon", "specnorm"): (0.4, (2, 3.5, 6)), ("adamw", "specnorm"): (0.001, (2, 3.5, 6)),
    ("muon", "stiefel"): (0.4, (2, 3.5, 6)), ("adamw", "stiefel"): (0.004, (2, 3.5, 6)),
    ("muon", "hammer"): (0.4, (2, 3.5, 6)), ("adamw", "hammer"): (0.002, (2, 3.5, 6)),
    ("muon", "soft_cap"): (0.4, (2, 3.5, 6)), ("adamw", "soft_cap"): (0.002, (2, 3.5, 6)),
    ("muon", "hard_cap"): (0.4, (2, 3.5, 6)), ("adamw", "hard_cap"): (0.004, (2, 3.5, 6)),
}
BOUND, BOUND_NAME, BOUNDS = "lipschitz_product_log10", "RMS->RMS, product of norms", (1, 1.5, 2)  # where the table compares
CERTIFIED = ("certified_accuracy", "36/255", "l2 radius 36/255")
COLUMNS = ("val_accuracy", "val_loss", "lipschitz_product_log10", "lipschitz_log10", "max_weight_norm", "ms_per_step")


def compare(config):
    """Train each point of PAIRS with each seed, in a folder of its own below --out, until all are there or the time is
    over; then a table, compare.csv and compare.png of all that are there."""
    base, began, trained, rows, missing = Path(config.out or f"runs/{SCRIPT}_compare"), time.perf_counter(), 0, [], 0
    if base.exists() and not (base / "compare.json").exists() and (not base.is_dir() or any(base.iterdir())):
        raise Refusal(f"--out {base}: exists and is no comparison; choose another")
    data = load_data(config)
    settings = dataclasses.asdict(dataclasses.replace(config, compare=False, minutes=0.0, seeds=1, out="", device="auto"))
    settings = json.dumps(dict(settings, data=data[-1]), indent=1) + "\n"
    if (base / "compare.json").exists() and (base / "compare.json").read_text() != settings:
        raise Refusal(f"--out {base}: holds a comparison with other settings (see compare.json there); choose another")
    base.mkdir(parents=True, exist_ok=True)
    write_atomically(base / "compare.json", settings.encode())
    points = [(seed, *pair, w, lr) for seed in range(config.seeds) for pair, (lr, strengths) in PAIRS.items() for w in strengths]
    for seed, optimizer, constraint, w, lr in points:
        out, spent = base / f"{optimizer}_{constraint}_{w:g}_seed{seed}", time.perf_counter() - began
        fresh = not (out / "summary.json").exists()
        if fresh and (missing or spent + spent / max(1, trained) > 60 * config.minutes):
            missing += 1
            continue
        if fresh:
            shutil.rmtree(out, ignore_errors=True)  # (what an interrupted run has left: less than a minute's work)
            point = dataclasses.replace(config, compare=False, optimizer=optimizer, constraint=constraint, w_max=str(w), lr=lr,
                                        seed=seed, out=str(out))
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    main(point, data)
            except Diverged as problem:
                write_atomically(out / "summary.json", (json.dumps(dict(diverged=str(problem))) + "\n").encode())
            trained += 1
        summary, row = json.loads((out / "summary.json").read_text()), dict(optimizer=optimizer, constraint=constraint, w_max=w, lr=lr, seed=seed)
        row.update({key: summary[key] for key in COLUMNS if key in summary})
        if "diverged" not in summary:
            row["certified"] = summary[CERTIFIED[0]][CERTIFIED[1]]
        rows.append(row)
        if fresh:
            print(f"{len(rows):3d}/{len(points)}  {optimizer:5} {constraint:21} w_max {w:<5g} seed {seed}  " + (
                "diverged" if "diverged" in summary else f"accuracy {100 * row['val_accuracy']:.2f} %  loss {row['val_loss']:.3f}  bound 10^"
                f"{row[BOUND] or -math.inf:.2f}  certified at {CERTIFIED[2]} {100 * row['certified']:.2f} %")
                + f"  {time.perf_counter() - began:.0f} s", flush=True)
    report_comparison(rows, base, data[-1])
    if missing:
        print(f"{missing} of {len(points)} runs are still to come: give the same command again.")


def accuracy_within(rows, bound_log10):
    """Accuracy reached at no more than this bound by runs of one pair and seed: linear in the bound's logarithm between two."""
    points = sorted((row[BOUND], row["val_accuracy"]) for row in rows if row.get(BOUND) is not None)
    x, y = zip(*points) if points else ((math.inf,), (0.0,))
    return float(np.interp(bound_log10, x, np.maximum.accumulate(y), left=math.nan))


def report_comparison(rows, base, data_name):
    """compare.csv, a line a run; compare.png; on the terminal each constraint's accuracy at equal bounds, Muon / AdamW."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def spread(values):
        values = [100 * v for v in values if not math.isnan(v)]
        return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "") if values else "-"

    with io.StringIO() as text:
        writer = csv.DictWriter(text, ["optimizer", "constraint", "w_max", "lr", "seed", *COLUMNS, "certified"])
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(base / "compare.csv", text.getvalue().encode())
    figure, panels = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    seeds, constraints = sorted({row["seed"] for row in rows}), list(dict.fromkeys(constraint for _, constraint in PAIRS))
    print(f"\naccuracy (%) at a bound ({BOUND_NAME}) of at most, Muon / AdamW; {len(seeds)} seed(s), data: {data_name}\n" + " " * 23
          + "".join(f"{f'10^{bound:g}':^27}" for bound in BOUNDS) + "best: accuracy at bound 10^, Muon / AdamW")
    for constraint in constraints:
        cells, best = [[] for _ in BOUNDS], []
        for optimizer, style in (("muon", "o-"), ("adamw", "x--")):
            mine = [row for row in rows if (row["optimizer"], row["constraint"]) == (optimizer, constraint)]
            by_seed = [[row for row in mine if row["seed"] == seed] for seed in seeds]
            by_seed = [curve for curve in by_seed if len(curve) == len(PAIRS.get((optimizer, constraint), (0, ()))[1])]  # (whole ones)
            for cell, bound in zip(cells, BOUNDS):
                cell.append(spread([accuracy_within(curve, bound) for curve in by_seed]))
            mine = [row for row in mine if row.get(BOUND) is not None]
            means = [{key: np.mean([row[key] for row in mine if row["w_max"] == w]) for key in ("val_accuracy", BOUND, "certified")}
                     for w in sorted({row["w_max"] for row in mine})]
            top = max(means, key=lambda point: point["val_accuracy"], default=None)
            best.append(f"{100 * top['val_accuracy']:.1f} at {top[BOUND]:.2f}" if top else "-")
            accuracy, color = [100 * point["val_accuracy"] for point in means], f"C{constraints.index(constraint)}"
            panels[0].plot([point[BOUND] for point in means], accuracy, style, color=color, label=f"{optimizer} {constraint}")
            panels[1].plot(accuracy, [100 * point["certified"] for point in means], style, color=color)
        print(f"  {constraint:21}" + "".join(f"{' / '.join(cell):^27}" for cell in cells) + " / ".join(best))
    panels[0].set(title=f"{SCRIPT}, data: {'/'.join(Path(data_name).parts[-2:])}", xlabel=f"log10 of the Lipschitz bound ({BOUND_NAME})", ylabel="accuracy (%)")
    panels[1].set(title=f"certified at {CERTIFIED[2]}", xlabel="accuracy (%)", ylabel="certified accuracy (%)")
    panels[0].legend(fontsize=6)
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format="png", dpi=110)
        write_atomically(base / "compare.png", buffer.getvalue())
    plt.close(figure)
    print(f"Every run: {base / 'compare.csv'}; picture: {base / 'compare.png'}")


def main(config, data=None):
    """One training, or with --compare many; `data` as load_data gives it, where it is loaded already."""
    state = None
    if config.resume:
        out, state, config = resumed(config)
    check(config)
    try:
        find_constraint(config.constraint)
    except ValueError as problem:
        raise Refusal(f"--constraint {config.constraint}: {problem}") from problem
    keep_memory()
    if config.compare:
        return compare(config)
    device = choose_device(config)
    train_set, test_set, data_name = data or load_data(config)
    train_set, test_set = hold_out(config, train_set, test_set)
    data_name += f" (evaluated on {config.holdout} training images held out)" * (config.holdout > 0)
    if state and (state["data"].startswith("stand-in") != data_name.startswith("stand-in")
                  or state["images"] != len(train_set[0])):
        raise Refusal(f"--resume {out}: was trained on {state['images']} images ({state['data']}), and this is "
                      f"{data_name} with {len(train_set[0])}; give the same with --data")
    if state:
        _, model = model_from_checkpoint(state)
    else:
        out = new_run_folder(config)
        write_atomically(out / "config.json", (json.dumps(dataclasses.asdict(config), indent=1) + "\n").encode())
        model = MLP(config, train_set[0].sum(0) / (255 * len(train_set[0])))
    model.to(device)
    optimizers = make_optimizers(config, model)
    if state:
        for (optimizer, _), saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
    print(f"device {device}, computing in {compute_dtype(config, device)} with float32 weights, data: {data_name} "
          f"({len(train_set[0])} images to train, {len(test_set[0])} {test_name(config)}), run folder {out}", flush=True)
    progress = dict(step=state["step"], seconds=state["training_seconds"]) if state else dict(step=0, seconds=0.0)
    train(config, model, optimizers, train_set, test_set, data_name, out, progress)
    report(config, model, out, data_name, test_set)


if __name__ == "__main__":
    try:
        main(CONFIG)
    except Refusal as refusal:
        print(f"{SCRIPT}.py: {refusal}", file=sys.stderr)
        sys.exit(2)
    except OSError as problem:
        print(f"{SCRIPT}.py: {problem}; mend that and start again, or --resume from the last checkpoint", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{SCRIPT}.py: interrupted; --resume RUN_FOLDER goes on from its last checkpoint, if there was one", file=sys.stderr)
        sys.exit(130)
