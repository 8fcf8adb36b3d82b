"""The four protocols against slow and obvious references, documents, and what the numbers come with."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

import ropex
from ropex.evaluation import Document, PerplexityByLength, documents, long_ppl, perplexity_by_length
from tests.oracles import TRAINED_LENGTH, VOCABULARY, logits, tiny_model, tiny_tokens

LENGTHS = (64, 200, 300)
STRIDE = 48
BOS = 1


def document(seed: int, count: int = 420, bos: int | None = None) -> Document:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (count,), generator=generator)
    counts = torch.randint(1, 5, (count,), generator=generator)
    if bos is not None:
        tokens[0], counts[0] = bos, 0
    return Document(tokens, bos, counts, f"document {seed}")


def losses_of(model: nn.Module, ids: Tensor, bos: int | None) -> list[float]:
    """The loss of each token of a window but the first, from all of its logits."""
    ids = ids.clone()
    if bos is not None:
        ids[0] = bos
    every = logits(model, ids[None])[0].double()
    return [F.cross_entropy(every[i - 1], ids[i]).item() for i in range(1, len(ids))]


def slow(model: nn.Module, doc: Document, protocol: str, length: int, start: int = 0) -> tuple[float, int]:
    """Sum of losses and count, by the words of each protocol."""
    total, count = 0.0, 0
    tokens = doc.tokens
    if protocol == "prefix":
        found = losses_of(model, tokens[:length], doc.bos)
    elif protocol == "binned":
        found = losses_of(model, tokens[:length], doc.bos)[max(start - 1, 0) :]
    elif protocol == "window_mean":
        found = []
        for first in range(0, len(tokens), STRIDE):
            if first + length <= len(tokens):
                found += losses_of(model, tokens[first : first + length], doc.bos)
    else:
        found = losses_of(model, tokens[:length], doc.bos)
        reached = length
        while reached < len(tokens):
            end = min(reached + STRIDE, len(tokens))
            found += losses_of(model, tokens[end - length : end], doc.bos)[reached - end :]
            reached = end
    total, count = sum(found), len(found)
    return total, count


@pytest.mark.parametrize("bos", [None, BOS], ids=["no BOS", "BOS"])
@pytest.mark.parametrize("method", ["yarn", "dynamic_ntk"])
@pytest.mark.parametrize("protocol", ["binned", "press", "window_mean", "prefix"])
def test_a_protocol_is_what_it_says(protocol: Any, method: str, bos: int | None) -> None:
    model = tiny_model("llama", max_position_embeddings=128)
    docs = [document(seed, 420 + 30 * seed, bos) for seed in range(3)]
    with ropex.patch(model, method, factor=2):
        measured = perplexity_by_length(model, docs, protocol=protocol, bins=(0, *LENGTHS), stride=STRIDE)
        starts = (0, *LENGTHS[:-1]) if protocol == "binned" else (0, 0, 0)
        assert measured.bins == tuple(zip(starts, LENGTHS, strict=True))
        for row, (start, length) in enumerate(measured.bins):
            sums = [slow(model, doc, protocol, length, start) for doc in docs]
            assert [tally[row].tokens for tally in measured.tallies] == [count for _, count in sums]
            want = sum(total for total, _ in sums) / sum(count for _, count in sums)
            assert measured.nll[row] == pytest.approx(want, abs=1e-5)


def test_press_scores_every_token_once() -> None:
    doc = document(0)
    measured = perplexity_by_length(tiny_model("llama"), doc, protocol="press", bins=(0, *LENGTHS), stride=STRIDE)
    assert [tally.tokens for tally in measured.tallies[0]] == [len(doc) - 1] * 3


def test_bins_that_do_not_divide_the_length_are_rounded_to_whole_tokens() -> None:
    measured = perplexity_by_length(tiny_model("llama"), document(0), bins=11)
    ends = [end for _, end in measured.bins]
    assert ends == [38, 76, 115, 153, 191, 229, 267, 305, 344, 382, 420]
    assert sum(tally.tokens for tally in measured.tallies[0]) == 419


def test_on_a_static_schedule_one_pass_is_every_length() -> None:
    model, doc = tiny_model("llama"), document(0)
    with ropex.patch(model, "ntk", factor=2):
        whole = perplexity_by_length(model, doc, bins=(0, *LENGTHS))
        for start, end in whole.bins:
            alone = perplexity_by_length(model, Document(doc.tokens[:end]), bins=sorted({0, start, end}))
            assert alone.nll[-1] == pytest.approx(whole.nll[whole.bins.index((start, end))], abs=1e-5)
    assert whole.processed == LENGTHS[-1], "one pass"
    with ropex.patch(model, "dynamic_ntk", factor=2):
        assert perplexity_by_length(model, doc, bins=(0, *LENGTHS)).processed == sum(LENGTHS), "one for each length"


def test_a_window_is_what_the_model_sees() -> None:
    """The truncated row: windows of the trained length that end at the end of what they score, at most a quarter."""
    model, doc, window = tiny_model("llama"), document(0, 600), 200
    measured = perplexity_by_length(model, doc, bins=(0, 100, 350, 600), window=window)
    want: list[list[float]] = [[], [], []]
    first = losses_of(model, doc.tokens[:window], None)
    want[0] += first[:99]
    want[1] += first[99:]
    for start, end in ((200, 250), (250, 300), (300, 350), (350, 400), (400, 450), (450, 500), (500, 550), (550, 600)):
        seen = losses_of(model, doc.tokens[end - window : end], None)
        want[1 if end <= 350 else 2] += seen[start - end :]
    assert measured.nll == pytest.approx([sum(row) / len(row) for row in want], abs=1e-5)
    assert sum(tally.tokens for tally in measured.tallies[0]) == len(doc) - 1
    for protocol in ("press", "window_mean", "prefix"):
        cut = perplexity_by_length(model, doc, protocol=protocol, bins=(0, 300), stride=150, window=window)  # type: ignore[arg-type]
        full = perplexity_by_length(model, doc, protocol=protocol, bins=(0, 300), stride=150)  # type: ignore[arg-type]
        assert [t.tokens for row in cut.tallies for t in row] == [t.tokens for row in full.tallies for t in row]


def test_bits_per_byte_intervals_and_gain() -> None:
    model = tiny_model("llama")
    docs = [document(seed) for seed in range(8)]
    plain = perplexity_by_length(model, docs, bins=(0, 100, 400))
    counts = sum(int(doc.bytes[1:100].sum()) for doc in docs)  # type: ignore[index]
    nats = sum(tally[0].nats for tally in plain.tallies)
    assert plain.bits_per_byte is not None
    assert plain.bits_per_byte[0] == pytest.approx(nats / math.log(2) / counts)
    assert plain.interval is not None
    means = sorted(tally[0].nats / tally[0].tokens for tally in plain.tallies)
    low, high = plain.interval[0]
    assert means[0] < low < plain.nll[0] < high < means[-1]
    half_width = 1.96 * torch.tensor(means).std().item() / 8**0.5
    assert (high - low) / 2 == pytest.approx(half_width, rel=0.25)
    assert plain.tokens_per_second == pytest.approx(plain.processed / plain.seconds)
    with ropex.patch(model, "linear", factor=4):
        scaled = perplexity_by_length(model, docs, bins=(0, 100, 400))
    for row, (gain, ends) in enumerate(scaled.gain_over(plain)):
        assert gain == pytest.approx(plain.nll[row] - scaled.nll[row], abs=1e-9)
        assert ends is not None
        assert ends[0] <= gain <= ends[1]
        assert ends[1] - ends[0] < 0.2 * (high - low), "paired: the documents' own differences cancel"
    with pytest.raises(ValueError, match=r"press over .* does not compare with binned over"):
        plain.gain_over(perplexity_by_length(model, docs, protocol="press", bins=(0, 100, 400), stride=100))
    alone = perplexity_by_length(model, Document(docs[0].tokens), bins=2)
    assert (alone.bits_per_byte, alone.interval) == (None, None)
    assert PerplexityByLength.from_dict(plain.to_dict()) == plain


def word_tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({"<s>": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}, unk_token="w1"))
    words.pre_tokenizer = Whitespace()
    words.add_special_tokens([AddedToken("<s>", special=True)])
    if bos:
        words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")


def test_documents() -> None:
    texts = [" ".join(f"w{1 + (i * k) % 99}" for i in range(250)) for k in (3, 7)]
    plain = documents(texts, word_tokenizer(bos=False), length=100)
    assert [(doc.name, len(doc), doc.bos) for doc in plain] == [
        ("text 0, tokens 0-100", 100, None),
        ("text 1, tokens 0-100", 100, None),
        ("text 0, tokens 100-200", 100, None),
        ("text 1, tokens 100-200", 100, None),
    ], "taken from the texts in turn; what is shorter is left out"
    with_bos = documents(texts, word_tokenizer(bos=True), length=100, limit=3, names=["a", "b"])
    assert [doc.name for doc in with_bos] == ["a, tokens 0-99", "b, tokens 0-99", "a, tokens 99-198"]
    for doc in with_bos:
        assert (doc.bos, int(doc.tokens[0]), len(doc)) == (0, 0, 100)
        assert doc.bytes is not None
        assert int(doc.bytes[0]) == 0
    assert torch.equal(with_bos[0].tokens[1:], plain[0].tokens[:99])
    (whole,) = documents("w1 w22 w3", word_tokenizer(bos=True))
    assert whole.bytes is not None
    assert whole.bytes.tolist() == [0, 2, 4, 3], "with the space before a word"


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, r"texts=\[\]: must hold at least one text"),
        (["w1 w2", " \n"], {}, r"text 1: must not be empty"),
        ("w1 w2 w3", {"length": 9}, r"length=9: the longest text has only 3 tokens; pass a longer text"),
        ("w1 w2 w3", {"length": 1}, r"length=1: must be an int >= 2"),
        ("w1 w2 w3", {"limit": 0}, r"limit=0: must be an int >= 1"),
        (["w1 w2", "w3 w4"], {"names": ["x"]}, r"1 names for 2 texts: must be as many"),
    ],
)
def test_bad_documents(texts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        documents(texts, word_tokenizer(bos=False), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "sliding"}, r"protocol='sliding': must be one of \"binned\", \"press\""),
        ({"stride": 0}, r"stride=0: must be an int >= 1"),
        ({"protocol": "press", "stride": 100, "bins": (0, 64, 200)}, r"stride=100: must be <= the shortest length, 64"),
        ({"window": 2}, r"window=2: must be an int >= 4"),
        ({"bins": (0, 500)}, r"must be increasing edges within 0 \.\. 420, the tokens of the shortest document"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity_by_length(tiny_model("llama"), [document(0), document(1, 900)], **options)


def test_documents_that_contradict_themselves() -> None:
    with pytest.raises(ValueError, match=r"bos=1: must be the first of the tokens"):
        Document(torch.tensor([3, 4]), bos=1)
    with pytest.raises(ValueError, match=r"bytes int64 \[1\]: must be int64 \[2\]"):
        Document(torch.tensor([3, 4]), bytes=torch.tensor([1]))


# --- key tokens -------------------------------------------------------------------------------------------------------


def copying_model() -> nn.Module:
    """Predicts surely, at distance TRAINED_LENGTH / 2, what stood there: a lookup that only a long context allows."""

    class Copying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding.from_pretrained(torch.eye(VOCABULARY))
            self.head = nn.Linear(VOCABULARY, VOCABULARY, bias=False)
            self.head.weight.data = 8 * torch.eye(VOCABULARY)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
            hidden = self.embedding(input_ids)
            back = TRAINED_LENGTH // 2 - 1
            copied = torch.cat((torch.zeros_like(hidden[:, :back]), hidden[:, : hidden.shape[1] - back]), dim=1)
            return type("Output", (), {"logits": self.head(copied[:, : hidden.shape[1]])})

    return Copying().eval()


def test_long_ppl_finds_the_tokens_that_need_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ropex.evaluation.key_tokens.depends_on_length", lambda model: False)
    distance = TRAINED_LENGTH // 2
    tokens = tiny_tokens(600)[0]
    copies = torch.arange(300, 600, 10)
    for place in copies:
        tokens[place] = tokens[place - distance]
    measured = long_ppl(copying_model(), tokens, short=100, stride=50)
    repeats = {int(p) for p in range(distance, 600) if tokens[p] == tokens[p - distance]}
    assert set(measured.positions[0].tolist()) == repeats
    assert measured.key_tokens == len(repeats)
    assert measured.candidates == 450
    sure = math.log1p((VOCABULARY - 1) * math.exp(-8))
    assert measured.nll == pytest.approx(sure, rel=1e-4)
    assert measured.perplexity == pytest.approx(math.exp(sure), rel=1e-4)


def test_long_ppl_by_another_models_key_tokens() -> None:
    model, evaluator = tiny_model("llama"), tiny_model("llama", seed=1)
    tokens = tiny_tokens(400)[0]
    options: dict[str, Any] = {"short": 64, "stride": 32, "gain": 0.0, "floor": -9.0}
    by_other = long_ppl(model, tokens, evaluator=evaluator, **options)
    assert torch.equal(by_other.positions[0], long_ppl(evaluator, tokens, **options).positions[0])
    every = logits(model, tokens[None])[0].double()
    want = [F.cross_entropy(every[p - 1], tokens[p]).item() for p in by_other.positions[0].tolist()]
    assert by_other.nll == pytest.approx(sum(want) / len(want), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"of 400 tokens: must be longer than short \+ stride = 5120"),
        ({"short": 64, "stride": 32}, r"no key token among 304: none gains more than 2\.0 nats"),
        ({"short": 0}, r"short=0: must be an int >= 1"),
        ({"gain": -1}, r"gain=-1: must be a finite number >= 0"),
        ({"floor": 1}, r"floor=1: must be a finite number"),
        ({"evaluator": 1}, r"evaluator with 64 tokens: must have the model's 128"),
    ],
)
def test_bad_long_ppl(options: dict[str, Any], message: str) -> None:
    if "evaluator" in options:
        options = {"evaluator": tiny_model("llama", vocab_size=64)}
    with pytest.raises(ValueError, match=message):
        long_ppl(tiny_model("llama"), tiny_tokens(400)[0], **options)
