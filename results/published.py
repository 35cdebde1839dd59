"""A checkpoint that the authors of the paper published, as a run folder of shakespeare.py.

    python results/published.py FILE.npz --out runs/NAME          # evaluates, certifies and samples it
    python shakespeare.py --sample runs/NAME --prompt "ROMEO:"
    python verify_lipschitz.py runs/NAME

Their files are arrays of pickled dictionaries: `args`, the settings, and `weights_checkpoint_0`, a matrix by
its number. They may name code of theirs. Nothing in them is run: what is neither an array nor a plain value
is text here. The vocabulary, 65 characters, is that of tinyshakespeare, which is in no file.
"""

import argparse
import dataclasses
import io
import json
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import shakespeare  # noqa: E402
from shakespeare import Config, UserError, built, reading  # noqa: E402

VOCABULARY = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
ORDER = ("v", "q", "k", "o", "w_in", "w_out")  # of the matrices of a block, in their file


class NumpyOnly(pickle._Unpickler):  # (that in C takes gigabytes if a few bytes ask for them)
    """Builds arrays and plain Python values. Other names become text, and text cannot be called."""

    def find_class(self, module, name):
        if module.startswith("numpy.") and name == "_reconstruct":
            return lambda *kind_and_shape: np.empty(0, np.int8)  # (filled later, which sets both)
        return np.dtype if (module, name) == ("numpy", "dtype") else f"{module}.{name}"


def load_published(path):
    """(config, model) of a published file. UserError if it is no such file."""
    stored = []
    with (reading(path, "checkpoint in the published form, nothing in it was run"),
          open(path, "rb") as file, zipfile.ZipFile(io.BytesIO(file.read(2**27))) as archive):
        for name in ("args.npy", "weights_checkpoint_0.npy"):
            info = archive.getinfo(name)  # (no more than the size it claims is unpacked)
            if info.file_size > 2**26 or info.compress_type not in (0, zipfile.ZIP_DEFLATED):
                raise ValueError("more than 64 MB, or packed in an unusual way")
            with archive.open(info) as array:
                array.readline()  # (the header, which the pickle follows)
                stored.append(NumpyOnly(array).load().item())
        args, weights = stored
        weights = [weights[i] for i in range(len(weights))]  # (each a matrix, or a list of one)
        weights = [W[0] if isinstance(W, list) else W for W in weights]
        config = Config(
            preset="published", steps=1, width=int(args["d_embed"]), blocks=int(args["num_blocks"]),
            heads=int(args["num_heads"]), hidden=len(weights[5]), constraint="none",
            logit_scale=float(args["softmax_scale"]), final_scale=float(args.get("final_scale", 1)),
            residual_scale=float(args["residual_scale"]))
        config.limits()
        names = [f"blocks.{i}.{name}" for i in range(config.blocks) for name in ORDER]
        weights = dict(zip(["embedding_VD", *names, "head_VD"], weights, strict=True))
        weights["embedding_VD"] = weights["embedding_VD"].T
        weights = {name: torch.from_numpy(W).contiguous() for name, W in weights.items()}
        return config, built(config, VOCABULARY, weights)


def main(argv=None):
    """Make the run folder; returns its summary."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="the published file (.npz)")
    parser.add_argument("--out", required=True, help="the run folder to make")
    parser.add_argument("--data", default="auto", help="tinyshakespeare, as for shakespeare.py [auto]")
    options = parser.parse_args(argv)
    config, model = load_published(options.file)
    train_N, validation_N, vocabulary, data_name = shakespeare.load_data(
        dataclasses.replace(config, data=options.data))
    if vocabulary != VOCABULARY:
        raise UserError(f"--data {data_name}: has other characters than tinyshakespeare; give that text")
    shakespeare.copied(model)  # (complains of weights that are not finite)
    out, log = Path(options.out), [shakespeare.measure(model, validation_N, 1, None, 0.0)]
    out.mkdir(parents=True)  # (an old run is not overwritten)
    shakespeare.write(out / "config.json", json.dumps(dataclasses.asdict(config), indent=1))
    torch.save(dict(
        script=shakespeare.SCRIPT, config=dataclasses.asdict(config), step=1, seconds=0.0, log=[],
        data=data_name, tokens=len(train_N), vocabulary=vocabulary, model=model.state_dict(),
        optimizers=[]), buffer := io.BytesIO())
    shakespeare.write(out / "checkpoint.pt", buffer.getvalue())
    return shakespeare.report(config, model, out, log, data_name, validation_N, torch.float32)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # (a terminal may lack characters of the text)
    try:
        main()
    except (UserError, OSError) as problem:
        print(f"published.py: {problem}", file=sys.stderr)
        sys.exit(2)
