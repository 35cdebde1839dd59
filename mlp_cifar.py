"""Tutorial 1: an MLP on CIFAR-10 whose Lipschitz constant is enforced at every step of training.

Muon moves each weight matrix by a known amount and a constraint takes back what exceeds its limit,
so the network is as Lipschitz as the limits say, at every step. That certifies images: one of large
margin keeps its class under *every* perturbation up to a radius.

COMMANDS
    python mlp_cifar.py                                      # a minute, once CIFAR-10 is there
    python mlp_cifar.py --preset paper                       # the paper's settings; --help has more
    python mlp_cifar.py --optimizer adamw --constraint none  # no constraint: see how the norms grow
    python mlp_cifar.py --out DIR                            # DIR holds a stopped run: it goes on
RESULT (seeds 0 to 2; CIFAR-10 re-encoded as JPEG; 30 s on one core of an Intel Xeon with AMX)
    58.4 +- 0.2 % right at a bound of 68.2 +- 0.1 (RMS->RMS), 41.4 +- 0.1 % certified at 36/255.
ANCESTRY. Experiments of arXiv 2507.13338 (its code is in JAX); certification of Tsuzuku et al. (2018).
"""

import argparse
import copy
import dataclasses
import io
import json
import math
import os
import pickle
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from constraints import (CONSTRAINTS, after_unknown_step, ellipsoid, ellipsoid_layer,
                         ellipsoid_norm, ellipsoid_pairs, exact_norm, find_constraint, log10,
                         maxmin, mlp_slopes, power, sigma_per_norm, singular_values, tune)
from muon import Muon, fast_dtype

SCRIPT = "mlp_cifar"
RADII = {"36/255": 36 / 255, "72/255": 72 / 255, "108/255": 108 / 255, "1": 1.0}  # l2, of pixels
# Shapes: B images in a batch, N in a set, P = 3072 pixel values, K classes, F frequencies.


# ==== Config: every field is a flag ===============================================================
def flag(default, text, low=None, high=math.inf, choices=None):
    """A field: its default, its help, and the range or the choices that it is checked against."""
    return dataclasses.field(default=default, metadata=dict(help=text, low=low, high=high, choices=choices))


class UserError(Exception):
    """What the user can mend, in one line: what was given, what is needed, how. Exit status 2."""


@dataclasses.dataclass
class Config:
    preset: str = flag("default", "named settings, see the end of this help; other flags override")
    data: str = flag("auto", "auto, stand-in, a folder of pictures or parquet files, or a Hub name")
    label: str = flag("", "column of labels, if it is not label, labels or fine_label")
    holdout: int = flag(0, "for tuning: evaluate on so many training images, taken out", 0)
    augment: bool = flag(False, "flip training images at random, and shift them by up to 2 pixels")
    depth: int = flag(3, "number of weight matrices", 1, 1000)
    width: int = flag(256, "hidden width (neurons)", 1, 65536)
    activation: str = flag("relu", "relu, or maxmin: sorts pairs of neurons", choices=("relu", "maxmin"))
    bias: bool = flag(True, "biases in all layers; they do not enter the Lipschitz constant")
    center: bool = flag(True, "subtract the mean training image; nor does that")
    lowpass: int = flag(12, "use only the K x K lowest frequencies of an image; 32: all", 1, 32)
    mirror: bool = flag(False, "average the logits of each image and its mirror image")
    w_max: str = flag("3.4", "limit on each layer's RMS->RMS norm: one for all, or 3,4,5")
    optimizer: str = flag("muon", "muon or adamw, of the matrices", choices=("muon", "adamw"))
    constraint: str = flag("soft_cap", f"{', '.join(CONSTRAINTS)}, or yours as FILE.py:NAME")
    constrain_every: int = flag(4, "about how many steps a constraint waits that can", 1, 64)
    steps: int = flag(2000, "training steps", 1, 10**9)
    batch: int = flag(512, "images a step", 1)
    lr: float = flag(0.0, "falls to 0; Muon: divided by the depth; 0: 0.2 for Muon, 0.0013 for AdamW", 0)
    momentum: float = flag(0.9, "Muon's momentum, or AdamW's first beta", 0, 0.9999)
    adamw_wd: float = flag(0.0, "AdamW's own weight decay, besides the constraint", 0)
    loss_temperature: float = flag(1.0, "factor on the logits in the loss, not in bounds", 1e-30)
    margin: float = flag(0.0, "taken from the right logit, times its temperature, in the loss", 0)
    seed: int = flag(0, "of initialisation, data order, augmentation", 0, 2**31 - 1)
    dtype: str = flag("auto", "or float32, bfloat16", choices=("auto", "float32", "bfloat16"))
    device: str = flag("auto", "auto, cpu, cuda, cuda:1 or mps; auto: cuda if there is one")
    evals: int = flag(10, "evaluations on the whole test set, each with a checkpoint", 1, 10**6)
    out: str = flag("", "run folder, a stopped run goes on; default: a new one in runs/")

    @classmethod
    def of(cls, preset=None, **given):
        """A preset with changes. `given` is kept: a run that goes on must not contradict it."""
        given = {"preset": preset, **given} if preset else given
        if preset and preset not in PRESETS:
            raise UserError(f"--preset {preset}: must be one of {', '.join(PRESETS)}")
        config = cls(**{**PRESETS[preset or "default"], **given})
        config.given = given
        return config

    def limits(self):
        """w_max of each layer. UserError if a setting is out of its range."""
        for f in dataclasses.fields(self):
            value, kind = getattr(self, f.name), (int, float) if f.type is float else f.type
            low, high, choices = (f.metadata[key] for key in ("low", "high", "choices"))
            if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
                raise UserError(f"--{f.name} {value!r:.99}: must be of type {f.type.__name__}")
            if choices and value not in choices:
                raise UserError(f"--{f.name} {value}: must be one of {', '.join(choices)}")
            if low is not None and not (low <= value <= high and value < math.inf):
                raise UserError(f"--{f.name} {value}: must be a finite number from {low} to {high}")
        if self.activation == "maxmin" and self.width % 2:
            raise UserError(f"--width {self.width}: must be even for maxmin, which works on pairs")
        try:
            find_constraint(self.constraint)
            limits = [float(w) for w in self.w_max.split(",")] * (1 if "," in self.w_max else self.depth)
        except ValueError as problem:
            raise UserError(f"--constraint {self.constraint}, --w_max {self.w_max}: {problem}") from problem
        if len(limits) != self.depth or not all(0 < w < math.inf for w in limits):
            raise UserError(f"--w_max {self.w_max}: must be a number above 0, or {self.depth} with commas")
        return limits


PRESETS = {
    "default": dict(),
    "paper": dict(bias=False, center=False, lowpass=32, w_max="6"),
    "paper_adamw": dict(bias=False, center=False, lowpass=32, optimizer="adamw", adamw_wd=0.08,
                        constraint="none"),
    "accurate": dict(mirror=True, width=512, lowpass=9, w_max="3.4"),
    "tight": dict(activation="maxmin", mirror=True, augment=True, depth=5, width=512, w_max="1.465",
                  batch=1024, steps=3000),
    "certified": dict(activation="maxmin", augment=True, depth=7, width=512, w_max="1", batch=2048,
                      steps=3000, loss_temperature=30.0, margin=5.66),
    # The size of AOL-FC (Prach and Lampert 2022), which certifies 58.5 % at 36/255. For a GPU; not run.
    "certified_gpu": dict(activation="maxmin", augment=True, depth=8, width=4096, w_max="1", batch=2048,
                          steps=12_000, loss_temperature=30.0, margin=5.66),
}


def parse_arguments(argv=None):
    """The command line as a Config: defaults, then the preset, then the flags given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"preset {name}: {settings}" for name, settings in PRESETS.items()),
        allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in dataclasses.fields(Config):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type)
        parser.add_argument(f"--{f.name}", help=f"{f.metadata['help']} [{f.default}]", **kind)
    return Config.of(**vars(parser.parse_args(argv)))


# ==== Model: matrices and an activation, nothing else =============================================
class MLP(torch.nn.Module):
    """logits = W_d relu(... relu(W_1 T (x - mean) + b_1) ...) + b_d, for pixels x in [0, 1].

    The mean and the biases cancel in differences: neither enters a Lipschitz constant. T keeps the
    lowest frequencies of each colour by an orthonormal cosine transform: a projection, constant 1.
    With `mirror` the logits are the average of those of x and of its mirror image.
    """

    def __init__(self, config, mean_P=None, classes=10):
        super().__init__()
        sizes = [3 * config.lowpass**2] + [config.width] * (config.depth - 1) + [classes]
        self.rms_per_l2 = (3072 / classes) ** 0.5  # a constant l2->l2, times this, is RMS->RMS
        self.weights = torch.nn.ParameterList(torch.zeros(m, n) for n, m in zip(sizes, sizes[1:]))
        self.biases = torch.nn.ParameterList(torch.zeros(m) for m in sizes[1:] if config.bias)
        self.register_buffer("mean_P", torch.zeros(3072) if mean_P is None or not config.center else mean_P)
        self.mirror, self.activation = config.mirror, F.relu if config.activation == "relu" else maxmin
        x, f = torch.arange(32).double(), torch.arange(config.lowpass).double()[:, None]
        self.cosines_FX = torch.cos(math.pi * f * (2 * x + 1) / 64) / (16 + 16 * (f == 0).double()).sqrt()
        generator = torch.Generator().manual_seed(config.seed)
        for W, w_max in zip(self.weights, config.limits()):
            # All singular values equal: norm 1 if that is within the limit; the limit for stiefel.
            torch.nn.init.orthogonal_(W, generator=generator)
            if config.activation == "maxmin" and W.shape[0] == W.shape[1]:
                torch.nn.init.eye_(W)  # (as Prach and Lampert (2022) start theirs)
            norm = w_max if config.constraint == "stiefel" else min(1.0, w_max)
            W.data.mul_(sigma_per_norm(W) * norm)

    def forward(self, x_BP):
        """Logits (B, K) of pixels in [0, 1], in the precision of x_BP (certificates: float64)."""
        h = x_BP - self.mean_P.to(x_BP.dtype)
        if self.mirror:
            h = torch.cat([h, h.view(-1, 32, 32, 3).flip(2).reshape(h.shape)])
        if len(self.cosines_FX) < 32:
            cosines_XF = self.cosines_FX.to(h).T
            h = h.reshape(-1, 32, 96).mT @ cosines_XF  # rows to frequencies: (B, 32 columns * 3, F)
            h = (h.reshape(len(h), 32, -1).mT @ cosines_XF).flatten(1)  # and columns
        for i, W in enumerate(self.weights):
            bias = self.biases[i].to(h.dtype) if self.biases else None
            h = F.linear(h if i == 0 else self.activation(h), W.to(h.dtype), bias)
        return (h[:len(x_BP)] + h[len(x_BP):]) / 2 if self.mirror else h


# ==== Certificate: numbers that no pair of images can exceed, from the weights alone ==============
# Let two images differ by dx, |dx| <= 1 (l2), and the vectors before activation i by dz_i, after it
# by dh_i, so that dz_{i+1} = W_{i+1} dh_i. Slopes of ReLU are in [0, 1], and sorting pairs brings
# none further apart, so |dh| <= |dz|: the constant is at most the product, prod_i sigma(W_i).
# Tight: follow an ellipsoid E(S) = {z : z^T S^-1 z <= 1} (constraints.py) instead of a length.
#   1. dz_1 = W_1 T dx lies in E(W_1 W_1^T), as T is a projection.
#   2. ReLU: dh = dz / 2 + v / 2 with |v_i| <= |dz_i|. MaxMin of a pair is ((a + b) +- |a - b|) / 2,
#      and |a - b| moves by at most |d(a - b)|.
#   3. With W' behind it, dz' = A dz + B v with |v_i| <= |(F dz)_i| (mlp_slopes, ellipsoid_layer).
#   4. In the end |dz_d| <= sqrt(sigma(S_d)).
#   5. f_y - f_j, two logits, moves by at most L_yj, the largest |(e_y - e_j) z| in E(S_d), and by
#      the product, |w_y - w_j| sigma(W_1) ... sigma(W_{d-1}) with rows of W_d.
#   6. If f_y(x) - f_j(x) > eps L_yj for all j != y, all images within eps (l2) of x have class y.
#   7. A mirror image is a permutation of pixels, and the average of two functions has at most the larger
#      of their constants: 4 to 6 stand with `mirror`.
#   8. Neurons have free multipliers in 3: equal at first, then `tune` goes on by descent.
# The smaller of ellipsoid and product counts. Bounds are logarithms, as deep products overflow.
def follow(model, free):
    """(S, log): dz_d lies in E(exp(log) S), steps 1 to 3. `free` is filled with zeros."""
    first, *weights = [W.detach().cpu().double() for W in model.weights]
    S, log = ellipsoid(first @ first.T)
    for i, W in enumerate(weights):
        eye, spread = torch.eye(W.shape[1]).double(), None if model.activation is maxmin else 0.5
        F_NM, A, B, _ = mlp_slopes(0.0, eye, W, spread)
        free_N = free.setdefault(f"neurons {i}", torch.zeros(len(F_NM)).double())
        S, log = ellipsoid_layer(S, log, F_NM, A, B, free_N, free.setdefault(f"share {i}", torch.zeros(())))
    return S, log


def certificate(model, steps=0):
    """Certified constants of a model, in float64 and rounded up, as logarithms to base 10.

    norms             RMS->RMS norm of each layer
    product_log10     prod_i sigma(W_i), l2->l2. Times model.rms_per_l2: RMS->RMS, of all pixels
    tight_log10       the certificate used, l2->l2; pairs_log10_KK: L_yj of step 5
    Argument steps: of the descent of step 8, for the bound and again for the pairs; 0: untuned.
    """
    if not all(p.isfinite().all() for p in model.state_dict().values()):
        raise UserError("the model has weights that are not finite: there is nothing to certify")
    norms, free = [exact_norm(W).item() for W in model.weights], {}
    steps = steps if len(model.weights[0]) <= 1024 else 0  # (the descent of wide networks takes hours)
    eye = torch.eye(len(model.weights[-1])).double()
    logs = [log10(norm * sigma_per_norm(W)) for norm, W in zip(norms, model.weights)]
    tune(lambda free: ellipsoid_norm(*follow(model, free), eye), free, steps)
    tight = ellipsoid_norm(*follow(model, free), eye).item() / math.log(10)
    tune(lambda free: ellipsoid_pairs(*follow(model, free), eye).clamp(min=-700).mean(), free, steps)
    pairs_KK = ellipsoid_pairs(*follow(model, free), eye) / math.log(10)
    last = model.weights[-1].detach().cpu().double()
    apart_KK = ellipsoid_pairs(torch.eye(last.shape[1]).double(), 0.0, last) / math.log(10)  # |w_y - w_j|
    return dict(norms=norms, product_log10=sum(logs), tight_log10=min(sum(logs), tight),
                pairs_log10_KK=torch.minimum(pairs_KK, apart_KK + sum(logs[:-1])))


@torch.no_grad()
def certified_radii(model, pairs_log10_KK, images_NP, labels_N):
    """l2 radius in which an image keeps its class (step 6, less rounding); < 0 if wrong or tied."""
    model = copy.deepcopy(model).cpu()  # float64 is not on every device
    logits_NK = torch.cat([model(x.double() / 255) for x in images_NP.split(2000)])
    margin_NK = logits_NK.gather(1, labels_N[:, None]) - logits_NK
    margin_NK -= 1e-9 * max(p.detach().abs().max().item() for p in (logits_NK, *model.biases))
    return (margin_NK / 10 ** pairs_log10_KK[labels_N]).scatter(1, labels_N[:, None], math.inf).amin(1)


# ==== Data: pictures from a folder or the Hub, or drawn here ======================================
def load_data(config):
    """((train images_NP, labels_N), the same of the test set, name): uint8 images, int64 labels."""
    name, local = config.data, Path(os.environ.get("DATA_DIR", "")) / "cifar10"
    if name == "auto":
        name = str(local) if "DATA_DIR" in os.environ and local.is_dir() else "uoft-cs/cifar10"
    try:
        sets = stand_in() if name == "stand-in" else load_images(name, config.label)
    except UserError as problem:
        if config.data != "auto":
            raise
        print(f"{'!' * 98}\n!!  CIFAR-10 is not here (see DATA_DIR): {problem}\n!!  TRAINING ON A STAND-IN: "
              f"drawings made by this script. Its accuracy compares with nothing.\n{'!' * 98}", flush=True)
        sets, name = stand_in(), "stand-in"
    h, N = config.holdout, len(sets[0][1])
    if h >= N or not sets[0][1].any():
        raise UserError(f"--data {name}: needed are at least 2 classes and more than {h} (--holdout) images")
    if h:  # the same images for every seed
        held, rest = torch.randperm(N, generator=torch.Generator().manual_seed(2025)).split([h, N - h])
        sets = [[part[index] for part in sets[0]] for index in (rest, held)]
        name += f", evaluated on {h} training images held out"
    return *sets, name


def load_images(source, label=""):
    """[(images_NP, labels_N)] of the splits train and test of a folder or a data set on the Hub."""
    import datasets  # takes a second, so only where it is needed
    import huggingface_hub
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # (what it raises is said below)
    folder, split, labels, sizes, sets = Path(source).expanduser(), "train", [], set(), []
    names = [label] if label else ["label", "labels", "fine_label", "fine_labels"]
    try:
        options = dict(path=source)
        if folder.exists():  # read as it is, as links without [brackets], which are patterns there
            cache = tempfile.TemporaryDirectory()  # (the library's own need not be writable)
            data = shutil.copytree(folder.resolve(), f"{cache.name}/x", copy_function=os.symlink)
            options = dict(path=data, streaming=True, cache_dir=cache.name)
        else:
            try:
                huggingface_hub.HfApi().dataset_info(source, timeout=3)
            except Exception:  # no network: look in the cache. load_dataset would wait a minute
                datasets.config.HF_HUB_OFFLINE = True
        for split, files in ("train", ("data_batch_[1-5]", "train")), ("test", ("test_batch", "test")):
            rows, images, labels = [], [], []
            paths = [path for name in files for path in sorted(folder.glob(name)) if path.is_file()]
            for path in paths:  # (the official archives, unpacked)
                batch = NumpyOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
                column = next((name for name in names if name.encode() in batch), names[0]).encode()
                arrays = (x.reshape(3, 1024).T.reshape(32, 32, 3) for x in batch[b"data"])
                rows += zip(map(Image.fromarray, arrays), batch[column], strict=True)
            if not paths:
                table = datasets.load_dataset(split=split, **options)
                columns = table.column_names or list(next(iter(table), {}))
                column = next((name for name in names if name in columns), names[0])
                image = "img" if "img" in columns else "image"
                table = table.select_columns([image, column]).cast_column(image, datasets.Image())
                rows = ((row[image], row[column]) for row in table)
            for picture, y in rows:
                if type(y) is not int or not 0 <= y < 1000:  # (certificates have all pairs)
                    raise ValueError(f"label {y!r} is no whole number from 0 to 999")
                images.append(pixels(picture))
                sizes.add(picture.size)
                labels.append(y)
            sets.append((torch.from_numpy(np.stack(images)).view(-1, 3072), torch.tensor(labels)))
    except Exception as problem:  # the libraries raise dozens of kinds: the data cannot be had
        raise UserError(
            f"--data {source}: cannot be used ({split}, row {len(labels)}: {problem!r:.200}); needed "
            "are train and test: folders CLASS/x.png in each, or tables with pictures in img or image and "
            "numbers in label, labels, fine_label or --label COLUMN") from problem
    if sizes != {(32, 32)}:
        print(f"{source}: pictures of {min(sizes)} to {max(sizes)} pixels are resized to 32 x 32")
    return sets


def pixels(picture):
    """(32, 32, 3), uint8: what a picture shows. Transparent is white, 16 bits are scaled."""
    if picture is None or picture.mode in ("I", "F"):
        raise ValueError("no picture, or one of 32 bits a colour")
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    return np.asarray(picture.convert("RGB").resize((32, 32)))


class NumpyOnly(pickle.Unpickler):
    """Builds numpy arrays and plain Python values. Whatever else a file names is refused."""

    def find_class(self, module, name):
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise ValueError(f"it names {module}.{name}, and only arrays and plain values are read")


def stand_in(train=20_000, test=4_000):
    """Ten classes of drawings of random place, size, colour, in noise: hard for a linear model."""
    n, generator = train + test, torch.Generator().manual_seed(20_250_713)
    label_N = torch.arange(n) % 10
    u_N = torch.rand(10, n, 1, 1, generator=generator)
    axis = torch.linspace(-1, 1, 32)
    x, y = axis - 0.8 * u_N[0] + 0.4, axis[:, None] - 0.8 * u_N[1] + 0.4  # (n, 1, 32), (n, 32, 1)
    size, wave = 0.35 + 0.45 * u_N[2], 9 + 5 * u_N[3]
    disc, box = (x * x + y * y).sqrt() / size, x.abs().maximum(y.abs()) / size
    cross, stripes, bars = x.abs().minimum(y.abs()) / size, (x * wave).sin() + 0 * y, (y * wave).sin() + 0 * x
    figures = torch.stack([disc < 1, (disc < 1) & (disc > 0.6), box < 1, (box < 1) & (box > 0.6),
                           (y < size) & (y > 2 * x.abs() - size), (box < 1) & (cross < 0.25),
                           stripes > 0, bars > 0, ((x + y) * wave).sin() > 0, stripes * bars > 0])
    mask = figures[label_N, torch.arange(n), :, :, None].float()
    ink, paper = u_N[4:7, :, 0].permute(1, 2, 0)[:, None], u_N[7:10, :, 0].permute(1, 2, 0)[:, None]
    images = mask * ink + (1 - mask) * paper + 0.25 * torch.randn(n, 32, 32, 3, generator=generator)
    images = (images.clamp(0, 1) * 255).round().to(torch.uint8).reshape(n, 3072)
    return (images[:train], label_N[:train]), (images[train:], label_N[train:])


def augmented(images_BP, step, config):
    """Each image flipped with probability 1/2 and shifted by up to 2 pixels, by seed and step."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + 500_009 + step)
    B, line = len(images_BP), torch.arange(32)
    flip_B = torch.rand(B, generator=generator) < 0.5
    dx, dy = torch.randint(-2, 3, (2, B, 1), generator=generator)
    columns_BX = (torch.where(flip_B[:, None], 31 - line, line) + dx).clamp(0, 31)
    pixel_BYX = 32 * (line + dy).clamp(0, 31)[:, :, None] + columns_BX[:, None, :]
    pixel_BP = 3 * pixel_BYX.reshape(B, 1024, 1) + torch.arange(3)
    return images_BP.gather(1, pixel_BP.reshape(B, 3072).to(images_BP.device))


# ==== Run folders: one rule for starting and going on =============================================
def load_checkpoint(folder, asked=None):
    """(config, model, all that main saved); no code is run. `asked`: a Config that goes on."""
    path = Path(folder) / "checkpoint.pt" if Path(folder).is_dir() else Path(folder)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["script"] != SCRIPT:
            raise ValueError(f"it is of {state['script']}.py")
        own, log, weights = Config(**state["config"]), state["log"], state["model"]
        plain = dataclasses.replace(own, constraint="none")  # (its own may be code: it is not run)
        plain.limits()
        sizes = [3 * own.lowpass**2] + [own.width] * (own.depth - 1) + [state["classes"]]
        count = 3072 + sum(m * (n + own.bias) for n, m in zip(sizes, sizes[1:]))
        if count != sum(W.numel() for W in weights.values() if W.is_contiguous()):
            raise ValueError(f"its weights are not {count} numbers")  # (before memory is taken)
        model = MLP(plain, classes=state["classes"])
        model.load_state_dict(weights)
        momentum = [values for saved in state["optimizers"] for values in saved["state"].values()]
        shapes = [{value.shape for value in values.values() if value.ndim} for values in momentum]
        keys = ("step", "val_loss", "val_accuracy", "ms_per_step")
        figures = torch.tensor([[record[key] for key in keys] + record["norms"] for record in log])
        if (shapes != [{p.shape} for p in model.parameters()] or figures.shape[1] != 4 + own.depth
                or (type(state["data"]), type(state["images"])) != (str, int)
                or not state["step"] == log[-1]["step"] in range(1, own.steps + 1)):
            raise ValueError("its parts do not fit each other")
    except Exception as problem:  # truncated, no checkpoint at all, or with code in it
        raise UserError(f"{path}: is no checkpoint of {SCRIPT}.py to be used ({problem!r:.200}); give "
                        "another run folder") from problem
    if asked is None:
        return own, model, state
    given = getattr(asked, "given", dataclasses.asdict(asked))
    for name, value in given.items():
        if name not in ("out", "data", "device") and value != getattr(own, name):
            raise UserError(f"--{name} {value}: the run in {folder} has {getattr(own, name)}; "
                            "leave it out to go on with that run, or give another --out")
    if ":" in str(own.constraint) and "constraint" not in given:  # (nobody's code runs unasked)
        raise UserError(f"--out {folder}: was trained with code of yours; say that you trust it: "
                        f"--constraint {own.constraint}")
    own.out, own.device, own.data = asked.out, asked.device, given.get("data", own.data)
    return own, model, state


def write(path, data):
    """Text or bytes, all of it or none: what is written beside takes the place of the old file."""
    if isinstance(data, str):  # (JSON has no infinity: the logarithm of 0 is a word)
        data = data.replace("-Infinity", '"-inf"').replace("Infinity", '"inf"').encode()
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


# ==== Main ========================================================================================
@torch.no_grad()
def evaluate(model, images_NP, labels_N):
    """(mean cross-entropy of the logits, accuracy) over a whole set, in float32."""
    logits_NK = torch.cat([model(x.to(model.mean_P.device) / 255).cpu() for x in images_NP.split(2000)])
    right_N = logits_NK.argmax(1) == labels_N
    return F.cross_entropy(logits_NK, labels_N).item(), right_N.double().mean().item()


def main(config):
    """Train, or go on; certify; report. Returns the summary."""
    config, model, state = copy.copy(config), None, dict(step=0, log=[], optimizers=[])
    if config.out and (Path(config.out) / "checkpoint.pt").exists():
        config, model, state = load_checkpoint(config.out, config)
        if (Path(config.out) / "summary.json").exists():
            print(f"The run in {config.out} is finished: see summary.json, or give another --out.")
            return json.loads((Path(config.out) / "summary.json").read_text())
    limits, constraint = config.limits(), find_constraint(config.constraint)
    try:
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.zeros(1, device=auto if config.device == "auto" else config.device).device
    except Exception as problem:
        raise UserError(f"--device {config.device}: cannot be used here; try auto") from problem
    dtype = fast_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
    (images_NP, labels_N), test_set, data_name = load_data(config)
    N, classes = len(labels_N), 1 + torch.cat([labels_N, test_set[1]]).max().item()
    if model and (state["images"], state["classes"]) != (N, classes):
        raise UserError(f"--data {data_name}: {N} images, {classes} classes; the run in {config.out} had "
                        f"{state['images']} and {state['classes']}, of {state['data']}")
    model = (model or MLP(config, images_NP.sum(0) / (255 * N), classes)).to(device)
    if config.optimizer == "muon":  # layers share the learning rate: the product moves by lr / w_max
        groups = [dict(params=[W], w_max=w_max) for W, w_max in zip(model.weights, limits)]
        optimizers = [(Muon(groups, momentum=config.momentum, constraint=constraint, dtype=dtype,
                            every=config.constrain_every), (config.lr or 0.2) / config.depth)]
    else:
        optimizers = [(torch.optim.AdamW(model.weights, betas=(config.momentum, 0.95),
                                         weight_decay=config.adamw_wd), config.lr or 0.0013)]
    if config.bias:
        optimizers.append((torch.optim.Adam(model.biases, betas=(0.9, 0.99)), 0.01))
    start, log, seconds = int(state["step"]), state["log"], 0.0
    for (optimizer, _), saved in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(dict(saved, param_groups=optimizer.state_dict()["param_groups"]))
    stem, number = f"runs/{SCRIPT}_{config.preset}_seed{config.seed}", 1
    out = Path(config.out or stem)
    while out.exists() and not config.out:
        number += 1
        out = Path(f"{stem}_{number}")
    out.mkdir(parents=True, exist_ok=bool(config.out))  # (so two runs never share a folder)
    settings, kept = json.dumps(dataclasses.asdict(config), indent=1), out / "config.json"
    if start == 0 and kept.exists() and kept.read_text() != settings:  # (it has no checkpoint yet)
        raise UserError(f"--out {out}: holds a run begun with other settings; give them, or another")
    write(kept, settings)
    print(f"device {device}, computing in {dtype} with float32 weights, data: {data_name} ({N} to train, "
          f"{len(test_set[1])} to test, {classes} classes), run folder {out}, from step {start}", flush=True)
    # ---- train
    batch, images_NP, labels_N = min(config.batch, N), images_NP.to(device), labels_N.to(device)
    eval_steps = {math.ceil(config.steps * (i + 1) / config.evals) for i in range(config.evals)}
    order_N, losses, began = None, [], time.perf_counter()
    for step in range(start, config.steps):
        # Each epoch has its own random order, a function of seed and epoch: nothing of it is saved.
        epoch, position = divmod(step, N // batch)
        if position == 0 or order_N is None:
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
            order_N = torch.randperm(N, generator=generator).to(device)
        index_B = order_N[position * batch:(position + 1) * batch]
        images_BP, labels_B = images_NP[index_B], labels_N[index_B]
        if config.augment:
            images_BP = augmented(images_BP, step, config)
        logits_BK = config.loss_temperature * model(images_BP.to(dtype) / 255).float()
        loss = F.cross_entropy(logits_BK - config.margin * F.one_hot(labels_B, classes), labels_B)
        loss.backward()
        fraction = 1 - step / config.steps
        for optimizer, lr in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * fraction
            optimizer.step()
            optimizer.zero_grad()
        if config.optimizer == "adamw" and config.constraint != "none":  # (Muon does it by itself)
            for W, w_max in zip(model.weights, limits):
                W.data.copy_(after_unknown_step(constraint, W, w_max, optimizers[0][1] * fraction))
        losses.append(loss.detach())
        done = step + 1
        if done % 10 == 0 or done in eval_steps:  # (not at each step: a GPU would have to wait)
            if not all(t.isfinite().all() for t in (torch.stack(losses[-10:]), *model.weights)):
                raise UserError(f"step {done}: training has diverged: loss or weights are not finite; "
                                f"a last good checkpoint may be in {out}; try a smaller --lr")
        if done in eval_steps:
            seconds += time.perf_counter() - began
            val_loss, val_accuracy = evaluate(model, *test_set)
            bound, ms = certificate(model), 1000 * seconds / (done - start)  # (report tunes it)
            constant, largest = bound["tight_log10"] + math.log10(model.rms_per_l2), max(bound["norms"])
            log.append(dict(
                step=done, train_loss=torch.stack(losses).mean().item(), val_loss=val_loss,
                val_accuracy=val_accuracy, norms=bound["norms"], max_weight_norm=largest,
                lipschitz_log10=constant, ms_per_step=ms))
            buffer = io.BytesIO()
            torch.save(dict(
                script=SCRIPT, config=dataclasses.asdict(config), classes=classes, step=done,
                log=log, data=data_name, images=N, model=model.state_dict(),
                optimizers=[optimizer.state_dict() for optimizer, _ in optimizers]), buffer)
            write(out / "checkpoint.pt", buffer.getvalue())
            write(out / "log.jsonl", "".join(json.dumps(record) + "\n" for record in log))
            print(f"step {done:5d}/{config.steps}  train loss {log[-1]['train_loss']:.3f}  test "
                  f"loss {val_loss:.3f}  accuracy {100 * val_accuracy:5.2f} %  largest norm "
                  f"{largest:.3f}  untuned bound (RMS->RMS) {power(constant)}  {ms:.1f} ms/step  "
                  f"{ms / 1000 * (config.steps - done):.0f} s left", flush=True)
            losses, began = [], time.perf_counter()
    return report(config, model, out, log, data_name, test_set, dtype)


def report(config, model, out, log, data_name, test_set, dtype):
    """summary.json, the table and the picture at the end of a run. Returns the summary."""
    last, bound, limits = log[-1], certificate(model, steps=30), config.limits()
    radius_N = certified_radii(model, bound["pairs_log10_KK"], *test_set)
    certified = {name: (radius_N > r).double().mean().item() for name, r in RADII.items()}
    network, K = copy.deepcopy(model).cpu(), len(bound["pairs_log10_KK"])
    x_NP = test_set[0][:5000 // K].double() / 255
    jacobians_NKP = torch.func.vmap(torch.func.jacrev(lambda x_P: network(x_P[None])[0]))(x_NP)
    jacobian = torch.linalg.matrix_norm(jacobians_NKP, ord=2).max().item()  # a bound from below
    tight, product, to_rms = bound["tight_log10"], bound["product_log10"], math.log10(model.rms_per_l2)
    summary = dict(
        {key: last[key] for key in last if key not in ("step", "train_loss")}, script=SCRIPT,
        preset=config.preset, params=sum(p.numel() for p in model.parameters()), steps=config.steps,
        lipschitz_log10=tight + to_rms, lipschitz_product_log10=product + to_rms,
        lipschitz_norm="RMS->RMS, pixels in [0, 1] to logits", largest_jacobian_l2=jacobian,
        certified_accuracy=certified, loss_temperature=config.loss_temperature, seed=config.seed,
        w_max=None if config.constraint == "none" else limits, data=data_name,
        train_seconds=last["ms_per_step"] * config.steps / 1000, device=str(model.mean_P.device),
        dtype=str(dtype).removeprefix("torch."), torch=torch.__version__)
    write(out / "summary.json", json.dumps(summary, indent=1))
    print(f"\n{config.preset}: {config.optimizer} + {config.constraint}, {config.steps} steps, seed "
          f"{config.seed}, data: {data_name}\n  test accuracy {100 * last['val_accuracy']:.2f} %, "
          f"cross-entropy {last['val_loss']:.3f} (loss temperature {config.loss_temperature:g})")
    for i, (norm, limit) in enumerate(zip(bound["norms"], summary["w_max"] or ["none"] * len(limits))):
        print(f"  layer {i + 1} norm (RMS->RMS)     {norm:8.4f}     limit {limit}")
    print("  Lipschitz constant               l2->l2     RMS->RMS")
    for name, L in (("product", product), ("tight", tight), ("found: Jacobians", log10(jacobian))):
        print(f"    {name:25} {power(L):>12} {power(L + to_rms):>12}")
    print("  certified accuracy at l2 radius", *(f" {r}: {100 * p:.2f} %" for r, p in certified.items()))
    from matplotlib.figure import Figure  # (not pyplot: whoever calls main keeps their backend)
    figure, steps = Figure(figsize=(11, 7), layout="tight"), [record["step"] for record in log]
    a, b, c, d = figure.subplots(2, 2).flat
    a.plot(steps, [100 * record["val_accuracy"] for record in log], "o-")
    a.set(title="test accuracy", xlabel="step", ylabel="%")
    b.plot(steps, [record["norms"] for record in log], "o-")
    b.hlines(summary["w_max"] or [], 0, config.steps, "grey", ":")
    b.set(title="norms and limits (dotted)", xlabel="step", ylabel="RMS->RMS", ylim=(0, None))
    for W in model.weights:
        c.plot(np.linspace(0, 1, min(W.shape)), singular_values(W))
    c.set(title="singular values", xlabel="rank, share", ylabel="RMS->RMS", ylim=(0, None))
    d.plot(radius_N.sort(descending=True).values, np.linspace(0, 100, len(radius_N)))
    d.set(title="certified accuracy", xlabel="l2 radius", ylabel="%", xlim=(0, 1), ylim=(0, None))
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=110)
    write(out / "curves.png", buffer.getvalue())
    print(f"\nPicture, log, checkpoint: {out}. Attack its claims: python verify_lipschitz.py {out}")
    return summary


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except (UserError, OSError) as problem:
        print(f"{SCRIPT}.py: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{SCRIPT}.py: interrupted; with a checkpoint it goes on by --out FOLDER", file=sys.stderr)
        sys.exit(130)
