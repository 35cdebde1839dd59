"""Tiny runs of mlp_cifar.py, and small sets of pictures in the Hub's layout but without the Hub's metadata."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import mlp_cifar

TINY = dict(data="stand-in", steps=6, batch=64, width=16, evals=2, lowpass=6)


def run(out, **changes):
    """A run in this process. Returns its folder and what its summary.json holds, which has to be strict JSON."""
    mlp_cifar.main(mlp_cifar.Config(**{**TINY, "out": str(out), **changes}))
    return out, json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail)


def flags(out, **changes):
    """The command line of the same run."""
    return [f"--{name}={value}" for name, value in {**TINY, "out": out, **changes}.items()]


def checkpoint(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def same(a, b):
    """Whether two states are equal to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def encode(picture):
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def noise_pictures(n):
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(n)]


def parquet_folder(path, columns, files, labels=None, splits=("train", "test")):
    """A folder with one parquet file a split, all with the same rows. Labels count, unless they are given."""
    path.mkdir(parents=True)
    labels = labels or list(range(len(files)))
    pictures = [dict(bytes=file, path=None) for file in files]
    for split in splits:
        pq.write_table(pa.table(dict(zip(columns, (pictures, labels)))), path / f"{split}-00000-of-00001.parquet")
    return path


def folder_of_pictures(path, n=40, labels=None, columns=("img", "label"), **more):
    """Noise, of ten classes unless labels are given."""
    labels = labels or [i % 10 for i in range(n)]
    return parquet_folder(path, columns, [encode(picture) for picture in noise_pictures(n)], labels, **more)
