"""What low precision costs: the same model with weights and activations rounded, constrained or not.

    python results/precision.py runs/NAME ...        # run folders of mlp_cifar.py and shakespeare.py
    python results/precision.py runs/NAME --data DIR --csv FILE.csv

Both operands of every matrix product and the embedding tables are rounded, with one scale for a tensor and
nothing calibrated. For each run and format: loss, accuracy, and the largest entry that a linear layer is
given. An MLP is evaluated on all test images, a transformer on its whole validation text.
"""

import argparse
import csv
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).parent.parent))

import mlp_cifar  # noqa: E402
import shakespeare  # noqa: E402
from protocol import validation_text  # noqa: E402


# ==== Formats =====================================================================================
def to_bfloat16(x):
    return x.bfloat16().to(x.dtype)


def to_e4m3(x):
    scale = 448 / x.abs().amax().clamp(min=1e-30)  # 448 is the largest number of the format
    return (x * scale).to(torch.float8_e4m3fn).to(x.dtype) / scale


def to_integers(x, largest):
    scale = largest / x.abs().amax().clamp(min=1e-30)
    return (x * scale).round() / scale


FORMATS = {"full": lambda x: x, "bfloat16": to_bfloat16, "float8 e4m3": to_e4m3,
           "int8": lambda x: to_integers(x, 127), "6 bits": lambda x: to_integers(x, 31)}


class Rounded(TorchFunctionMode):
    """Within it both operands of every matrix product are rounded, and embedding tables.

    largest    the largest entry of what linear layers were given
    """

    def __init__(self, form):
        super().__init__()
        self.form, self.largest = FORMATS[form], 0.0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
            if func is F.linear:
                self.largest = max(self.largest, args[0].abs().max().item())
            args = (self.form(args[0]), self.form(args[1]), *args[2:])
        elif func is F.embedding:
            args = (args[0], self.form(args[1]), *args[2:])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def low_precision(evaluate):
    """[dict(format, loss, accuracy, largest_activation)] of a function that evaluates a model."""
    rows = []
    for form in FORMATS:
        with Rounded(form) as mode:
            loss, accuracy = evaluate()
        rows.append(dict(format=form, loss=loss, accuracy=accuracy, largest_activation=mode.largest))
    return rows


# ==== Runs ========================================================================================
def evaluation(folder, data):
    """A function that evaluates the model of a run folder: () -> (loss, accuracy)."""
    with mlp_cifar.explain(f"{folder}: is no run folder", "give one of mlp_cifar.py or shakespeare.py"):
        state = torch.load(Path(folder, "checkpoint.pt"), map_location="cpu", weights_only=True)
        tutorial = dict(mlp_cifar=mlp_cifar, shakespeare=shakespeare)[state["script"]]
    config, model, _ = tutorial.load_checkpoint(folder)
    config.data = data or config.data
    if tutorial is mlp_cifar:
        images_NP, labels_N = mlp_cifar.load_data(config)[1]
        if labels_N.max() >= len(model.weights[-1]):
            raise mlp_cifar.UserError(f"--data {config.data}: more classes than the run's; give its images")
        return lambda: mlp_cifar.evaluate(model, images_NP, labels_N)
    validation_N = validation_text(config, model)

    def evaluate():
        loss, *_, accuracy = shakespeare.evaluate(model, shakespeare.windows(validation_N, config.seq_len))
        return loss, accuracy

    return evaluate


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--data", help="where the data are, if not where the run had them")
    parser.add_argument("--csv", help="file to write the figures to as well")
    options = parser.parse_args(argv)
    rows = []
    for folder in options.runs:
        print(folder)
        for row in low_precision(evaluation(folder, options.data)):
            rows.append(dict(run=Path(folder).name, **row))
            print(f"  {row['format']:12} accuracy {100 * row['accuracy']:6.2f} %  loss {row['loss']:.4f}  "
                  f"largest activation {row['largest_activation']:.4g}", flush=True)
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    try:
        main()
    except (mlp_cifar.UserError, shakespeare.UserError, OSError) as problem:
        print(f"precision.py: {problem}", file=sys.stderr)
        sys.exit(2)
