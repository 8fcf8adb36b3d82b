"""Texts of any size: read and tokenised as far as documents need them, with the tokens that the whole text has."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
from pathlib import Path
from pydoc_data import topics
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ropex.evaluation import documents
from ropex.evaluation.documents import TextFile

TEXT = "\n\n".join(topics.topics.values())
CHINESE = "".join(chr(0x4E00 + (7 * i * i + i // 3) % 900) for i in range(40_000))
TEXTS = {"reference": TEXT, "one run": "a" * 60_000, "no blanks": TEXT.replace(" ", ""), "Chinese": CHINESE}


@functools.cache
def tokenizer(kind: str) -> Any:
    """Of each kind that models have, trained on some of the texts."""
    special = ["<unk>", "<s>"]
    if kind == "byte-level BPE":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(vocab_size=1000, special_tokens=special, show_progress=False)
    elif kind == "BPE over the whole text":
        made = Tokenizer(models.BPE(unk_token="<unk>"))
        trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=special, show_progress=False)
        made.train_from_iterator([line[:200] for line in TEXT[:60_000].splitlines()] + [CHINESE[:500]], trainer)
        return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    else:
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=800, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    made.train_from_iterator([TEXT[:60_000], CHINESE[:2000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["byte-level BPE", "BPE over the whole text", "unigram"])
def test_tokens_are_those_of_the_whole_text(kind: str, text: str) -> None:
    whole = torch.tensor(tokenizer(kind)(TEXTS[text], add_special_tokens=False, verbose=False)["input_ids"])
    for length, limit in ((100, 7), (1500, 3), (700, None)):
        found = documents(TEXTS[text], tokenizer(kind), length=length, limit=limit)
        assert len(found) == min(limit or 10**9, len(whole) // length)
        for i, document in enumerate(found):
            assert torch.equal(document.tokens, whole[i * length : (i + 1) * length]), (i, length)
            assert document.name.endswith(f"tokens {i * length}-{(i + 1) * length}")


def test_texts_are_taken_in_turn() -> None:
    """Also where one ends before the others."""
    texts = [TEXT[:30_000], "short", TEXT[30_000:33_900], TEXT[40_000:]]
    found = documents(texts, tokenizer("byte-level BPE"), length=500, limit=8, names=["a", "b", "c", "d"])
    assert [each.name[0] for each in found] == ["a", "c", "d", "a", "c", "d", "a", "d"]


def test_no_more_texts_are_read_than_it_takes() -> None:
    class Counts:
        """A tokenizer that counts what it is given."""

        is_fast, bos_token_id, given = True, None, 0

        def __call__(self, text: str, **options: Any) -> Any:
            self.given += len(text)
            return tokenizer("byte-level BPE")(text, **options)

    counts = Counts()
    assert len(documents([TEXT] * 50, counts, length=200, limit=2)) == 2
    assert counts.given < 30_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"must not be empty"),
        (b" \n\t" * 5000, r"must not be empty"),
        (b"\xef\xbb\xbf", r"must not be empty"),
        (b"\xef\xbb\xbf\n", r"must not be empty"),
        ("text".encode("utf-16"), r"must be UTF-8 text, 'utf-8' codec can't decode"),
        ("text".encode("utf-16-le"), r"must be UTF-8 text, and it holds zero bytes, as UTF-16"),
        (b"\x00" * 100, r"holds zero bytes"),
        (b"GGUF\x03\x00\x00\x00", r"holds zero bytes"),
        ("Käse".encode("latin-1"), r"must be UTF-8 text"),
    ],
)
def test_what_is_no_text(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        documents(TextFile(path), tokenizer("byte-level BPE"), length=10, limit=1)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, mark in (("with", b"\xef\xbb\xbf"), ("without", b"")):
        (tmp_path / name).write_bytes(mark + TEXT[:5000].encode())
    found = [
        documents(TextFile(tmp_path / name), tokenizer("byte-level BPE"), length=200) for name in ("with", "without")
    ]
    assert [each.tokens.tolist() for each in found[0]] == [each.tokens.tolist() for each in found[1]]


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    """As a shell hands over `--text <(command)`."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text(TEXT[:50_000], encoding="utf-8"))
    writer.start()
    found = documents(TextFile(tmp_path / "pipe"), tokenizer("byte-level BPE"), length=3000, limit=2)
    writer.join()
    wanted = documents(TEXT[:50_000], tokenizer("byte-level BPE"), length=3000, limit=2)
    assert [each.tokens.tolist() for each in found] == [each.tokens.tolist() for each in wanted]


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    """1 GB, sparse behind its beginning, in a process that may not grow by as much."""
    path = tmp_path / "large.txt"
    path.write_text(TEXT[:200_000], encoding="utf-8")
    with path.open("r+b") as file:
        file.truncate(10**9)
    code = f"""
import resource, sys
from pathlib import Path
from ropex.evaluation import documents
from ropex.evaluation.documents import TextFile
from tests.test_texts import tokenizer
made = tokenizer("byte-level BPE")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = documents(TextFile(Path({str(path)!r})), made, length=8192, limit=1)
print(len(found[0]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    tokens, grown = map(int, done.stdout.split())
    assert tokens == 8192
    assert grown * (1024 if sys.platform == "linux" else 1) < 300e6
