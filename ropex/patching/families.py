"""What detection cannot see, one line per family: the only place in ropex that names model families.

Keys are `config.model_type`, of a model or of its text part.
"""

from __future__ import annotations

__all__ = ["NOT_ROTARY", "NOT_SUPPORTED"]

# Why there is nothing to patch.
_LEARNED = "it adds learned position embeddings to its inputs"
_ALIBI = "it biases attention by distance (ALiBi)"
_STATE_SPACE = "it is a state-space model, whose positions come from its recurrence"
_RECURRENT = "it is a recurrent model, whose positions come from its recurrence"
_NO_POSITIONS = "its attention layers have no positions; those come from its state-space layers"

NOT_ROTARY = {
    "biogpt": _LEARNED,
    "bloom": _ALIBI,
    "codegen": "its attentions look sines up in tables of their own, up to the trained length",
    "falcon_mamba": _STATE_SPACE,
    "gpt2": _LEARNED,
    "gpt_bigcode": _LEARNED,
    "gpt_neo": _LEARNED,
    "gptj": "its attentions look sines up in tables of their own, up to the trained length",
    "jamba": _NO_POSITIONS,
    "mamba": _STATE_SPACE,
    "mamba2": _STATE_SPACE,
    "mpt": _ALIBI,
    "nemotron_h": _NO_POSITIONS,
    "openai-gpt": _LEARNED,
    "opt": _LEARNED,
    "inkling2_text": "its attention is biased by distance, learned per token",
    "roformer": "its layers look sinusoids up in a table of their own, up to the trained length",
    "rwkv": _RECURRENT,
    "xglm": "it adds fixed sinusoids to its inputs",
    "xlstm": _RECURRENT,
}

# Rotary, but a patch would not do what it says.
NOT_SUPPORTED = {
    "deepseek_v4": "it also rotates blocks of tokens at positions of their own, and turns its outputs back",
}
