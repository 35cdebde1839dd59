"""Token shards of a text of yours, for nanogpt_lipschitz.py: GPT-2's tokens, as the FineWeb shards have them.

    python results/prepare.py SOURCE --data DIR
    python nanogpt_lipschitz.py --data DIR --vocab 50257 --batch 8 --micro_batch 8

SOURCE is a text in UTF-8, a file of JSON lines (.jsonl, .json) or .parquet with texts in a column text, a
folder of these (.txt), or a data set on the Hub, NAME or NAME:CONFIG. In a text <|endoftext|> ends a
document, or a blank line where there is no such mark. GPT-2's vocabulary comes from the network, once, or
from TIKTOKEN_CACHE_DIR.
"""

import argparse
import contextlib
import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import nanogpt_lipschitz  # noqa: E402
from nanogpt_lipschitz import HEADER, MAGIC, VERSION, UserError, told, write  # noqa: E402

SHARD = 10**8  # tokens in a shard


def documents(source):
    """The texts of a source, one after the other; of a row without text, None or an empty one."""
    path, kinds, mark = Path(source), (".txt", ".jsonl", ".json", ".parquet"), "<|endoftext|>"
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in kinds and file.is_file())
    for file in files if path.is_dir() else [path]:
        with told(f"{file}: cannot be read", "give a text in UTF-8 (unpacked; iconv -f UTF-16 or "
                  "CP1252 -t UTF-8), JSON lines or parquet with texts in a column text, or a folder"):
            rows = None
            if not path.exists():
                import datasets  # takes a second, so only where it is needed
                rows = datasets.load_dataset(*source.split(":"), split="train", streaming=True)
            elif file.suffix.lower() == ".parquet":
                from pyarrow import parquet
                batches = parquet.ParquetFile(file).iter_batches(1024, columns=["text"])
                rows = (row for batch in batches for row in batch.to_pylist())
            elif file.suffix.lower() in (".jsonl", ".json"):  # (with an object a line)
                rows = (json.loads(line) for line in open(file, encoding="utf-8-sig") if line.strip())
            if rows is not None:
                yield from (row["text"] and row["text"] + "" for row in rows)  # (else no text)
                continue
            held, end = "", "\n\n"  # (in a text without marks, blank lines end documents)
            with open(file, encoding="utf-8-sig") as f:  # (which takes off a byte-order mark)
                while piece := f.read(2**14):
                    if "\0" in piece:
                        raise UnicodeError("it holds NUL characters")
                    end = mark if mark in held + piece else end
                    text, found, held = (held + piece).rpartition(end)
                    if len(held) > 2**18:  # (so does this length: memory is finite)
                        text, held = held, ""
                    yield from filter(None, (text + found).split(mark))
            yield from filter(None, [held])


def prepare(source, folder, val_tokens):
    """Shards of a source in a folder: val_tokens of it, at most a tenth, to validate, then the rest."""
    folder, encoding, rows = Path(folder), nanogpt_lipschitz.gpt2(), documents(source)
    if list(folder.glob("*.bin")):
        raise UserError(f"--data {folder}: has shards already; give another folder, or remove them")
    held, shards, empty, texts = bytearray(), 0, 0, True  # (2 bytes a token)
    with contextlib.ExitStack() as if_it_fails:  # (all shards or none)
        while texts:
            texts = list(itertools.islice(rows, 256))
            known = [text for text in texts if text]
            empty += len(texts) - len(known)
            for ids in encoding.encode_ordinary_batch(known, num_threads=os.cpu_count()):
                held += np.array([encoding.eot_token, *ids], np.uint16).tobytes()
            if not texts and not shards and len(held) < 40:
                raise UserError(f"{source}: has {len(held) // 2} tokens; give more text")
            while len(held) >= 2 * (val_tokens + SHARD) or not texts and held:
                first = val_tokens if texts else min(val_tokens, len(held) // 20)
                data = held[:2 * (SHARD if shards else first)]
                header = np.array([MAGIC, VERSION, len(data) // 2] + [0] * (HEADER - 3), np.int32)
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / (f"train_{shards:06d}.bin" if shards else "val_000000.bin")
                if_it_fails.callback(path.unlink, missing_ok=True)
                write(path, header.tobytes() + data)
                print(f"{path}: {len(data) // 2:,} tokens", flush=True)
                held, shards = held[len(data):], shards + 1
        if_it_fails.pop_all()
    print(f"{folder}: {shards} shards; {empty} rows without text were skipped")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="what to read, see above")
    parser.add_argument("--data", required=True, help="folder to make, or without shards as yet")
    parser.add_argument("--val_tokens", type=int, default=10_485_760, help="to validate [10485760]")
    options = parser.parse_args(argv)
    if options.val_tokens < 1:
        raise UserError(f"--val_tokens {options.val_tokens}: must be at least 1")
    prepare(options.source, options.data, options.val_tokens)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # (a terminal may lack characters of a path)
    try:
        main()
    except (UserError, OSError) as problem:
        print(f"prepare.py: {problem}", file=sys.stderr)
        sys.exit(2)
