"""results/prepare.py: shards of texts of all kinds, which nanogpt_lipschitz.py then reads."""

import gzip
import json
import math
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import test_nanogpt_lipschitz
import torch
from test_nanogpt_lipschitz import one_clear_line, run

import nanogpt_lipschitz as nano
from nanogpt_lipschitz import Config, UserError

sys.path.insert(0, str(Path(__file__).parent.parent / "results"))

import prepare  # noqa: E402

small_stand_in = test_nanogpt_lipschitz.small_stand_in  # a fixture, for all tests of this file

class Bytes:
    """Bytes in the place of GPT-2's tokens, whose table needs the network; 256 begins a document."""
    eot_token = 256

    def encode_ordinary_batch(self, texts, num_threads):
        return [list(text.encode()) for text in texts]

    def encode_ordinary(self, text):
        return list(text.encode())

    def decode_bytes(self, tokens):
        return bytes(t for t in tokens if t < 256)


@pytest.fixture
def as_bytes(monkeypatch):
    monkeypatch.setattr(nano, "load_gpt2", Bytes)
    monkeypatch.setattr(prepare, "SHARD", 9000)


def all_tokens(folder):
    files = sorted(folder.glob("*.bin"), key=lambda p: ("val" not in p.name, p.name))
    return np.concatenate([nano.read_shard(p)[1] for p in files]).tolist()


def test_prepare_bytes(tmp_path, monkeypatch):
    """Without any vocabulary; the model that reads them takes 255 for the start of a document."""
    monkeypatch.setattr(nano, "load_gpt2", None)
    (tmp_path / "a.txt").write_text("é and more<|endoftext|>next " + "x" * 50)
    prepare.main([str(tmp_path / "a.txt"), "--data", str(tmp_path / "shards"), "--bytes"])
    known = [255, *"é and more".encode(), 255, *b"next ", *b"x" * 50]
    found = all_tokens(tmp_path / "shards")
    assert [t for t in found if t != ord("\n")] == known
    model = nano.Transformer(nano.Config.of("tiny", width=16, blocks=1, content="0", hidden=8))
    _, docs_BT = model.embed(torch.tensor([found]), torch.float32)
    assert docs_BT.max() == 2


def test_prepare_parquet_and_json(tmp_path, as_bytes, capsys):
    """Rows without text are skipped and counted; shards of the size asked for; nothing is written over."""
    import pandas

    texts = [f"document {i} " + "x" * (i * 37 % 200) for i in range(700)]
    (tmp_path / "source").mkdir()
    rows = dict(text=[*texts[:300], None, None], other=0)
    pandas.DataFrame(rows).to_parquet(tmp_path / "source" / "a.parquet")
    lines = [json.dumps(dict(text=text)) + "\n" for text in [*texts[300:], None, ""]]
    (tmp_path / "source" / "b.jsonl").write_text("".join(lines))
    (tmp_path / "source" / "other.csv").write_text("text\nnot this\n")
    settings = str(tmp_path / "source"), str(tmp_path / "shards"), 1000
    prepare.prepare(*settings)
    assert all_tokens(tmp_path / "shards") == [t for text in texts for t in [256, *text.encode()]]
    sizes = [len(nano.read_shard(p)[1]) for p in sorted((tmp_path / "shards").glob("*.bin"))]
    assert sizes[-1] == 1000 and set(sizes[:-2]) == {9000} and sizes[-2] < 10_000
    assert "4 rows without text" in capsys.readouterr().out
    with pytest.raises(UserError, match="has shards already"):
        prepare.prepare(*settings)


def test_prepare_text_files(tmp_path, monkeypatch, small_stand_in):
    """Documents end at marks, or at blank lines; byte-order marks are none of the text; a tenth validates."""
    monkeypatch.setattr(nano, "load_gpt2", Bytes)
    text = small_stand_in[:300_000]
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    prepare.prepare(str(tmp_path / "text.txt"), str(tmp_path / "shards"), 500)
    tokens = all_tokens(tmp_path / "shards")
    assert bytes(t for t in tokens if t < 256).decode() == text and 5 < tokens.count(256) < 30
    ends = [i for i, t in enumerate(tokens) if t == 256][1:]
    assert all(bytes(tokens[i - 2:i]) == b"\n\n" for i in ends)
    assert len(nano.read_shard(tmp_path / "shards" / "val_000000.bin")[1]) == 500  # at most a tenth
    _, summary = run(tmp_path, data=str(tmp_path / "shards"), vocab=257)
    assert summary["data"] == str(tmp_path / "shards") and summary["val_loss"] < math.log(257)

    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "a.txt").write_text("one<|endoftext|>two\n\n" + "2" * 20_000 + "\n\nthree")
    (tmp_path / "folder" / "deep" / "b.txt").write_text("four")
    (tmp_path / "folder" / "a_folder.txt").mkdir()
    prepare.prepare(str(tmp_path / "folder"), str(tmp_path / "more"), 10**7)
    count = len(all_tokens(tmp_path / "more"))
    assert len(nano.read_shard(tmp_path / "more" / "val_000000.bin")[1]) == count // 10
    texts = bytes(0 if t == 256 else t for t in all_tokens(tmp_path / "more")).decode().split("\0")
    assert texts == ["", "one", "two\n\n" + "2" * 20_000 + "\n\nthree", "four"]


UTF16 = "hello world, é\n" * 50


@pytest.mark.parametrize("name, content, says", [
    ("nothing.txt", None, "cannot be read"), ("empty.txt", b"", "has 0 tokens"),
    ("short.txt", b"short", "has 6 tokens"),
    ("wrong.jsonl", b'{"txt": "no such column"}\n', "'text'"),
    ("row.jsonl", b'{"text": "good"}\n{"text": 5}\n', "cannot be read"),
    ("pretty.json", b'[\n{\n"text": "a"}]', "JSON lines"), ("broken.jsonl", b'{"text": "a"', "cannot be read"),
    ("latin.txt", "é".encode("latin1") * 50, "iconv"), ("utf16.txt", UTF16.encode("utf-16"), "iconv"),
    ("utf16_without_a_mark.txt", "hello world\n".encode("utf-16-le") * 50, "NUL"),
    ("packed.txt", gzip.compress(b"hello world\n" * 100, mtime=0), "unpacked"),
    ("code.parquet", pickle.dumps(Path), "cannot be read"),
    ("late.txt", b"hello world\n" * 10_000 + b"\xff", "decode")])
def test_prepare_refuses(tmp_path, name, content, says, as_bytes):
    """In one line that names the file, alone and in a folder of good ones; nothing is left."""
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / name
    sources = [path] if content is None or "tokens" in says else [path, path.parent]
    if content is not None:
        path.write_bytes(content)
    if sources[1:]:
        (tmp_path / "folder" / "a_good_one.txt").write_text("good\n\n" * 9000)
    for source in sources:
        with pytest.raises(UserError, match=says) as error:
            prepare.prepare(str(source), str(tmp_path / "out"), 1000)
        one_clear_line(error)
        assert name in str(error.value) and not list(tmp_path.rglob("*.bin"))


def test_prepare_without_a_network(tmp_path, monkeypatch):
    """A missing source is named before GPT-2's vocabulary is asked for; and what helps without a network is."""
    import tiktoken

    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: 1 / 0)
    with pytest.raises(UserError, match="/no/such: cannot be read"):
        prepare.prepare("/no/such", str(tmp_path / "out"), 1000)
    (tmp_path / "text.txt").write_text("text\n\n" * 100)
    with pytest.raises(UserError, match="set TIKTOKEN_CACHE_DIR to a folder") as error:
        prepare.prepare(str(tmp_path / "text.txt"), str(tmp_path / "out"), 1000)
    one_clear_line(error)


@pytest.mark.parametrize("text", ["a" * 20_000, "word " * 4000, "\n" * 20_000, "\r\n" * 9000, "é" * 9000,
                                  "<|endoftext|>a" * 3000, "line\n" * 4000])
def test_any_text_of_20_kb_trains(text, tmp_path, monkeypatch, capsys):
    """Of one character repeated, one line, blank lines, marks: no token is lost, and both kinds of shard come out."""
    monkeypatch.setattr(nano, "load_gpt2", Bytes)
    (tmp_path / "br[a]cket").mkdir()
    (tmp_path / "br[a]cket" / "a b.txt").write_bytes(text.encode())
    prepare.prepare(str(tmp_path / "br[a]cket"), str(tmp_path / "shards"), 500)
    assert "2 shards; 0 rows" in capsys.readouterr().out
    kept = bytes(t for t in all_tokens(tmp_path / "shards") if t < 256).decode()
    assert kept == text.replace("\r\n", "\n").replace("<|endoftext|>", "")
    run(tmp_path, data=str(tmp_path / "shards"), vocab=257, steps=1, evals=1)


def test_long_texts_without_blank_lines_are_cut(tmp_path):
    """Else one line of gigabytes would have to fit into memory, many times over."""
    (tmp_path / "x.txt").write_text("0123456789" * 100_000)
    texts = list(prepare.documents(str(tmp_path / "x.txt")))
    assert "".join(texts) == "0123456789" * 100_000 and max(map(len, texts)) < 300_000
    long = "0123456789" * 10_000
    (tmp_path / "x.txt").write_text(f"first<|endoftext|>{long}\n\n{long}<|endoftext|>last")
    assert [len(text) for text in prepare.documents(str(tmp_path / "x.txt"))] == [5, 200_002, 4]


CACHE = Path(os.environ.get("DATA_DIR", "/nowhere"), "tiktoken-cache")


@pytest.mark.skipif(not CACHE.is_dir(), reason="needs GPT-2's table of tokens")
def test_gpt2_tokens(tmp_path, monkeypatch, capsys):
    import tiktoken
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
    text = "It was the best of times, it was the worst of times.\n" * 50
    (tmp_path / "text.txt").write_text(text)
    prepare.main([str(tmp_path / "text.txt"), "--data", str(tmp_path / "shards")])
    tokens = all_tokens(tmp_path / "shards")
    assert tokens[0] == 50256 and tiktoken.get_encoding("gpt2").decode(tokens[1:]) == text
    out, _ = run(tmp_path, data=str(tmp_path / "shards"), vocab=50257, steps=2)
    capsys.readouterr()
    sampled = nano.main(Config.of(sample=str(out), prompt="It was", length=3))
    assert capsys.readouterr().out == sampled + "\n" and sampled.startswith("It was")
