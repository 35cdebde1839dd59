"""Loss, accuracy and bound of transformers as the code of the paper has them, beside ours.

    python results/protocol.py runs/NAME ...         # run folders of shakespeare.py
    python results/protocol.py runs/NAME --data FILE

That is 20 batches of 512 windows that start one character apart: the first 20 * 512 + 256 characters of the
validation text, most of them counted 256 times. They are easier than the rest.

The paper's bound uses the norms of whole matrices, where heads have to be counted: valid for one head,
too small for several. (And it divides GeLU's 1.1289 out twice.)
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import shakespeare  # noqa: E402
from constraints import exact_norm, log10, sigma  # noqa: E402


def validation_text(config, model):
    """The tokens of a run's validation text. UserError if the text that is here has other characters."""
    _, validation_N, vocabulary, name = shakespeare.load_data(config)
    if vocabulary != model.vocabulary:
        raise shakespeare.UserError(f"--data {name}: other characters than the run's; give its text")
    return validation_N


def paper_protocol(model, tokens_N, windows=20 * 512):
    """(loss, accuracy) over windows at stride 1."""
    window_WT = tokens_N.unfold(0, model.config.seq_len + 1, 1)[:windows]
    batches = ((window_BT[:, :-1], window_BT[:, 1:]) for window_BT in window_WT.split(32))
    loss, *_, accuracy = shakespeare.evaluate(model, batches)
    return loss, accuracy


def paper_formula(model):
    """log10 of the constant from embeddings to logits by the formula of the paper's code."""
    config = model.config
    a = model.mix
    scale = shakespeare.GELU_SCALE if config.activation == "gelu" else 1.0
    R = shakespeare.largest_embedding(model)
    total = 0.0
    for block in model.blocks:
        sigmas = {role: sigma(W.double()).item() for role, W in block.matrices()}
        gain = block.attention_scale * sigmas["o"] * sigmas["v"]
        pattern = 2 * config.logit_scale * sigmas.get("q", 0.0) * sigmas.get("k", 0.0) * R * R
        mlp = sigmas["in"] * sigmas["out"] / scale
        total += log10((1 - a) + a * gain * (1 + pattern)) + log10((1 - a) + a * mlp)
        R *= ((1 - a) + a * gain) * ((1 - a) + a * mlp)
    return total + log10(exact_norm(model.head_VD).item() * config.final_scale)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--data", help="where the text is, if not where the run had it")
    options = parser.parse_args(argv)
    for folder in options.runs:
        config, model, _ = shakespeare.load_checkpoint(folder)
        config.data = options.data or config.data
        validation_N = validation_text(config, model)
        whole = shakespeare.evaluate(model, shakespeare.windows(validation_N, config.seq_len))
        loss, accuracy = paper_protocol(model, validation_N)
        print(f"{folder}: whole text {100 * whole[-1]:.2f} %, loss {whole[0]:.4f}; the paper's protocol "
              f"{100 * accuracy:.2f} %, loss {loss:.4f}; its formula for the bound "
              f"10^{paper_formula(model):.3f}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (shakespeare.UserError, OSError) as problem:
        print(f"protocol.py: {problem}", file=sys.stderr)
        sys.exit(2)
