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
import json
import math
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import shakespeare  # noqa: E402
from shakespeare import Config, UserError, explain  # noqa: E402

VOCABULARY = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
ORDER = ("v", "q", "k", "o", "w_in", "w_out")  # of the matrices of a block, in their file


class NumpyOnly(pickle.Unpickler):
    """Builds arrays and plain Python values. Other names become text, and text cannot be called."""

    def find_class(self, module, name):
        if module.startswith("numpy.") and name == "_reconstruct":
            return new_array
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        return f"{module}.{name}"


def new_array(kind, shape, dtype):
    """An array of nothing: shape, type and values follow in the pickle."""
    return np.empty(0, np.int8)


def read_entry(archive, name):
    """The dictionary in an array of one object."""
    with archive.open(f"{name}.npy") as array:
        array.readline()  # the header, which the pickle follows
        return NumpyOnly(array).load().item()


def load_published(path):
    """(config, model) of a published file. UserError if it is no such file."""
    with (explain(f"{path}: is no checkpoint in the published form; nothing in it was run",
                  "give a file of the authors"),
          zipfile.ZipFile(path) as archive):
        args = read_entry(archive, "args")
        stored = read_entry(archive, "weights_checkpoint_0")
        weights = []
        for i in range(len(stored)):
            W = stored[i][0] if isinstance(stored[i], list) else stored[i]
            weights.append(torch.from_numpy(W))
        weights[0] = weights[0].T  # the embedding
        config = Config(
            preset="published", steps=1, width=int(args["d_embed"]), blocks=int(args["num_blocks"]),
            heads=int(args["num_heads"]), hidden=len(weights[5]), constraint="none",
            logit_scale=float(args["softmax_scale"]), final_scale=float(args.get("final_scale", 1)),
            residual_scale=float(args["residual_scale"]))
        model = shakespeare.build_model(config, dict(vocabulary=VOCABULARY))
        names = [f"blocks.{i}.{name}" for i in range(config.blocks) for name in ORDER]
        model.load_state_dict(dict(zip(["embedding_VD", *names, "head_VD"], weights, strict=True)))
        return config, model


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
    nothing = [torch.tensor(math.nan)]  # losses of training, which are not known
    log = [shakespeare.measure(model, validation_N, 1, nothing, 0.0)]  # refuses NaN in weights
    out = Path(options.out).expanduser()
    out.mkdir(parents=True)  # an old run is not overwritten
    shakespeare.write(out / "config.json", json.dumps(vars(config), indent=1))
    shakespeare.save(out, config, 1, [], data=data_name, tokens=len(train_N),
                     vocabulary=vocabulary, model=model.state_dict(), optimizers=[])
    return shakespeare.report(config, model, out, log, data_name, validation_N, torch.float32)


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack characters of the text
        sys.stdout.reconfigure(errors="replace")
    try:
        main()
    except (UserError, OSError) as problem:
        print(f"published.py: {problem}", file=sys.stderr)
        sys.exit(2)
