"""Token shards of a text of yours, for nanogpt_lipschitz.py: GPT-2's tokens, as the FineWeb shards have them.

    python results/prepare.py SOURCE --data DIR
    python nanogpt_lipschitz.py --data DIR --vocab 50257 --batch 8 --micro_batch 8
    python results/prepare.py SOURCE --data DIR --bytes    # no vocabulary, so no network: --vocab 256

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
from nanogpt_lipschitz import HEADER, MAGIC, VERSION, UserError, explain, write  # noqa: E402

SHARD = 10**8  # tokens in a shard


def documents(source):
    """The texts of a source, one after the other; of a row without text, None or an empty one."""
    path = Path(source).expanduser()
    files = [path]
    if path.is_dir():
        kinds = (".txt", ".jsonl", ".json", ".parquet")
        found = sorted(path.rglob("*"))
        files = [file for file in found if file.suffix.lower() in kinds and file.is_file()]
    for file in files:
        with explain(f"{file}: cannot be read", "give a text in UTF-8 (unpacked; iconv -f UTF-16 or "
                     "CP1252 -t UTF-8), JSON lines or parquet with texts in a column text, or a folder"):
            kind = file.suffix.lower()
            if not path.exists():
                rows = rows_of_hub(source)
            elif kind == ".parquet":
                rows = rows_of_parquet(file)
            elif kind in (".jsonl", ".json"):
                rows = rows_of_json(file)
            else:
                yield from texts_of_prose(file)
                continue
            for row in rows:
                text = row["text"]
                yield text and text + ""  # a TypeError, if it is something else than text


def rows_of_hub(source):
    """Rows of NAME or NAME:CONFIG."""
    import datasets  # takes a second, so only where it is needed
    return datasets.load_dataset(*source.split(":"), split="train", streaming=True)


def rows_of_parquet(file):
    from pyarrow import parquet
    for batch in parquet.ParquetFile(file).iter_batches(1024, columns=["text"]):
        yield from batch.to_pylist()


def rows_of_json(file):
    """An object on each line."""
    with open(file, encoding="utf-8-sig") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


def texts_of_prose(file):
    """Documents of a text: they end at marks, or, where there is none, at blank lines."""
    mark = "<|endoftext|>"
    end = "\n\n"
    held = ""
    with open(file, encoding="utf-8-sig") as f:  # -sig takes off a byte-order mark
        while True:
            piece = f.read(2**14)
            if not piece:
                break
            if "\0" in piece:
                raise UnicodeError("it holds NUL characters")
            if mark in held + piece:
                end = mark
            text, found, held = (held + piece).rpartition(end)
            if len(held) > 2**18:  # this length ends a document, too: memory is finite
                text = held
                held = ""
            yield from filter(None, (text + found).split(mark))
    if held:
        yield held


class Bytes:
    """Tokens that need no vocabulary. 255, which no text in UTF-8 has, begins a document."""
    eot_token = 255

    def encode_ordinary_batch(self, texts, num_threads):
        return [list(text.encode(errors="replace")) for text in texts]  # half a character: ?


def prepare(source, folder, val_tokens, tokens_are_bytes=False):
    """Shards of a source in a folder: val_tokens of it, at most a tenth, to validate, then the rest."""
    folder = Path(folder).expanduser()
    if list(folder.glob("*.bin")):
        raise UserError(f"--data {folder}: has shards already; give another folder, or remove them")
    rows = documents(source)
    texts = list(itertools.islice(rows, 256))  # a missing source is named before the vocabulary
    encoding = Bytes() if tokens_are_bytes else nanogpt_lipschitz.load_gpt2()
    held = bytearray()  # 2 bytes a token
    shards = 0
    empty = 0
    with contextlib.ExitStack() as if_it_fails:  # all shards or none
        while True:
            known = [text for text in texts if text]
            empty += len(texts) - len(known)
            for ids in encoding.encode_ordinary_batch(known, num_threads=os.cpu_count()):
                held += np.array([encoding.eot_token, *ids], np.uint16).tobytes()
            if not texts and not shards and len(held) < 40:
                raise UserError(f"{source}: has {len(held) // 2} tokens; give more text")
            while len(held) >= 2 * (val_tokens + SHARD) or not texts and held:
                count = SHARD
                path = folder / f"train_{shards:06d}.bin"
                if shards == 0:
                    path = folder / "val_000000.bin"
                    count = val_tokens if texts else min(val_tokens, len(held) // 20)
                data = held[:2 * count]
                held = held[2 * count:]
                shards += 1
                header = np.zeros(HEADER, np.int32)
                header[:3] = MAGIC, VERSION, len(data) // 2
                folder.mkdir(parents=True, exist_ok=True)
                if_it_fails.callback(path.unlink, missing_ok=True)
                write(path, header.tobytes() + data)
                print(f"{path}: {len(data) // 2:,} tokens", flush=True)
            if not texts:
                break
            texts = list(itertools.islice(rows, 256))
        if_it_fails.pop_all()
    print(f"{folder}: {shards} shards; {empty} rows without text were skipped")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="what to read, see above")
    parser.add_argument("--data", required=True, help="folder to make, or without shards as yet")
    parser.add_argument("--val_tokens", type=int, default=10_485_760, help="to validate [10485760]")
    parser.add_argument("--bytes", action="store_true", help="tokens are bytes, not GPT-2's")
    options = parser.parse_args(argv)
    if options.val_tokens < 1:
        raise UserError(f"--val_tokens {options.val_tokens}: must be at least 1")
    prepare(options.source, options.data, options.val_tokens, options.bytes)


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack characters of a path
        sys.stdout.reconfigure(errors="replace")
    try:
        main()
    except (UserError, OSError) as problem:
        print(f"prepare.py: {problem}", file=sys.stderr)
        sys.exit(2)
