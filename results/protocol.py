"""Loss and accuracy of transformers as the code of the paper measures them, beside those on the whole text.

    python results/protocol.py runs/NAME ...         # run folders of shakespeare.py
    python results/protocol.py runs/NAME --data FILE

That is 20 batches of 512 windows that start one character apart: the first 20 * 512 + 256 characters of the
validation text, most of them counted 256 times. They are easier than the rest.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import shakespeare  # noqa: E402


def paper_protocol(model, tokens_N, windows=20 * 512):
    """(loss, accuracy) over windows at stride 1."""
    window_WT = tokens_N.unfold(0, model.config.seq_len + 1, 1)[:windows]
    batches = ((window_BT[:, :-1], window_BT[:, 1:]) for window_BT in window_WT.split(32))
    loss, *_, accuracy = shakespeare.evaluate(model, batches)
    return loss, accuracy


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--data", help="where the text is, if not where the run had it")
    options = parser.parse_args(argv)
    for folder in options.runs:
        config, model, _ = shakespeare.load_checkpoint(folder)
        config.data = options.data or config.data
        validation_N = shakespeare.load_data(config)[1]
        whole = shakespeare.evaluate(model, shakespeare.windows(validation_N, config.seq_len))
        loss, accuracy = paper_protocol(model, validation_N)
        print(f"{folder}: whole text {100 * whole[-1]:.2f} %, loss {whole[0]:.4f}; the paper's protocol "
              f"{100 * accuracy:.2f} %, loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (shakespeare.UserError, OSError) as problem:
        print(f"protocol.py: {problem}", file=sys.stderr)
        sys.exit(2)
