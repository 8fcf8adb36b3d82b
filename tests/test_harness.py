"""lm-evaluation-harness on a patched model: two tasks of RULER that need no download."""

from __future__ import annotations

import sys
from pathlib import Path
from pydoc_data import topics

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

import ropex
from ropex.evaluation import harness
from tests.oracles import TRAINED_LENGTH, byte_tokenizer, tiny_model

# Of the harness, its tasks and what they import.
pytestmark = pytest.mark.filterwarnings("ignore")


def word_piece_tokenizer() -> PreTrainedTokenizerFast:
    """Some characters a token: RULER's examples must fit its 500 tokens."""
    pieces = Tokenizer(BPE())
    pieces.pre_tokenizer, pieces.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = "\n".join(topics.topics.values())
    trainer = BpeTrainer(vocab_size=4000, special_tokens=["<s>"], initial_alphabet=ByteLevel.alphabet())
    pieces.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token="<s>", eos_token="<s>")


def test_ruler_runs_on_a_patched_model(tmp_path: Path) -> None:
    import lm_eval

    tokenizer = word_piece_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    model = tiny_model("llama", vocab_size=len(tokenizer))
    lengths: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append((args[0] if args else kwargs["input_ids"]).shape[1]),
        with_kwargs=True,
    )
    with ropex.patch(model, "yarn", factor=4):
        lm = harness(model, tokenizer)
        assert lm.max_length == 4 * TRAINED_LENGTH
        done = lm_eval.simple_evaluate(
            lm,
            tasks=["ruler_vt", "ruler_fwe"],
            metadata={"max_seq_lengths": [1024], "tokenizer": str(tmp_path)},
            limit=1,
            bootstrap_iters=0,
        )
    hook.remove()
    for task in ("ruler_vt", "ruler_fwe"):
        assert 0 <= done["results"][task]["1024,none"] <= 1
        (sample,) = done["samples"][task]
        assert isinstance(sample["resps"][0][0], str)
    assert max(lengths) > 1.4 * TRAINED_LENGTH, "the prompts are not cut to the trained length"


def test_the_length_is_what_the_patch_reaches() -> None:
    model, tokenizer = tiny_model("llama", vocab_size=260), byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<s>"})
    assert harness(model, tokenizer).max_length == TRAINED_LENGTH
    with ropex.patch(model, "yarn", factor=4):
        assert harness(model, tokenizer).max_length == 4 * TRAINED_LENGTH
        assert harness(model, tokenizer, max_length=700).max_length == 700


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"batch_size=0: must be an int >= 1"):
        harness(model, byte_tokenizer(), batch_size=0)
    with pytest.raises(ValueError, match=r"max_length=0: must be an int >= 1"):
        harness(model, byte_tokenizer(), max_length=0)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(ValueError, match=r"is missing: must be installed; run `pip install 'ropex\[harness\]'`"):
        harness(model, byte_tokenizer())
