"""What the tests share: the roster of schedules, independent closed forms, tiny models, and the tolerances."""

from __future__ import annotations

import math
from pathlib import Path

import mpmath
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

import ropex
from ropex import draws
from ropex.patching import cache_argument
from ropex.scaling.base import innermost

GOLDEN = Path(__file__).parent / "golden"

# One line per schedule: every law of test_schedules.py runs on each.
ROSTER = [
    ropex.schedule("none"),
    ropex.schedule("linear", factor=4),
    ropex.schedule("ntk", factor=4),
    ropex.schedule("ntk", factor=4, alpha=11.5),
    ropex.schedule("dynamic_ntk", factor=3.0),
    ropex.schedule("dynamic_ntk", factor=3.0, floor=5000),
    ropex.schedule("yarn", factor=4),
    ropex.schedule("yarn", factor=4, ramp="rotations", beta_fast=16.0),
    ropex.schedule("yarn", factor=4, blend="wavelength", truncate=False),
    ropex.schedule("yarn", factor=4, mscale=1.0, mscale_all_dim=0.5),
    ropex.schedule("abf", base=5e7, factor=4),
    ropex.schedule("abf", factor=4),
    ropex.schedule("ntk_by_parts", factor=4),
    ropex.schedule("ntk_by_parts", factor=4, variant="v1"),
    ropex.schedule("dynamic_yarn"),
    ropex.schedule("dynamic_yarn", floor=5000, ramp="rotations", blend="wavelength"),
    ropex.schedule("llama3", factor=4),
    ropex.schedule("longrope", factor=4),
    ropex.schedule("longrope", factor=4, keep_first=4, amplitude=1.0),
    ropex.schedule("truncated"),
    ropex.schedule("truncated", factor=4, exponent=0.1, cutoff_length=500),
    ropex.schedule("power", factor=4),
    ropex.schedule("drope"),
    ropex.schedule("proportional"),
    ropex.schedule("resonance", factor=4),
    ropex.schedule("resonance", inner="dynamic_ntk", floor=5000),
    ropex.schedule("clex", max_factor=3),
    ropex.schedule("clex", max_factor=3, factor=2.5, step=1.0, activation="silu", width=2, net_base=10_000.0),
    ropex.schedule("e2llm"),
    ropex.schedule("e2llm", factor=4, g_max=6, keep_first=0),
    ropex.schedule("pose", factor=4),
    ropex.schedule("pose", inner="dynamic_yarn", floor=5000),
    ropex.schedule("random_positions", factor=4),
    ropex.schedule("random_positions", inner="resonance", factor=4, variant="steps"),
    ropex.schedule("random_positions", inner=ropex.schedule("clex", max_factor=3), factor=4),
]

GEOMETRIES = [
    ropex.Geometry(dim=128, base=10_000.0, trained_length=2048),
    ropex.Geometry(dim=64, base=100_000.0, trained_length=8192),
    ropex.Geometry(dim=80, base=1_000_000.0, trained_length=1000, rounded=False),
    ropex.Geometry(dim=2, base=10_000.0, trained_length=63),
]

# Goldens carry 12 significant digits.
GOLDEN_RELATIVE = 1e-10
# cos and sin in float32: half a unit in the last place at 1 is 6e-8; the frequency's own float64 rounding adds 1e-9 at
# ten million. The promise is 2e-7.
TABLE_ERROR = 2e-7
# One product and one sum of unit-variance numbers in float32, each rounded: below 3 * 2**-24 * |x| with |x| < 6.
ROTATION_ERROR = 2e-6
# Tiny models in float32: logits of size 1, whose tables differ by transformers' float32 angles at 4096 positions.
LOGIT_ERROR = 1e-5


def relative_error(got: torch.Tensor, want: object) -> float:
    """The largest one; a zero must be a zero."""
    want = torch.as_tensor(want, dtype=torch.float64)
    return ((got.flatten() - want).abs() / torch.where(want == 0, 1e-300, want.abs())).max().item()


def true_cos_sin(position: int, inv_freq: float) -> tuple[float, float]:
    """Cos and sin of position * inv_freq in 200 bits, rounded once."""
    with mpmath.workprec(200):
        angle = mpmath.mpf(position) * mpmath.mpf(inv_freq)
        return float(mpmath.cos(angle)), float(mpmath.sin(angle))


def plain_frequency(geometry: ropex.Geometry, pair: int) -> float:
    """theta_i as the model has it, by scalar arithmetic."""
    if geometry.rounded:
        return geometry.inv_freq()[pair].item()
    return geometry.base ** (-2 * pair / geometry.dim)


def yarn_frequency(geometry: ropex.Geometry, pair: int, factor: float) -> float:
    """YaRN's default, pair by pair in scalar arithmetic."""

    def index(turns: float) -> float:
        return geometry.dim * math.log(geometry.trained_length / (turns * 2 * math.pi)) / (2 * math.log(geometry.base))

    low = max(math.floor(index(32)), 0)
    high = min(math.ceil(index(1)), geometry.dim - 1)
    ramp = min(max((pair - low) / (high - low if high != low else 0.001), 0), 1)
    theta = plain_frequency(geometry, pair)
    return theta / factor * ramp + theta * (1 - ramp)


def fitted(schedule: ropex.FrequencySchedule, geometry: ropex.Geometry) -> ropex.FrequencySchedule:
    """The schedule for this geometry; a learned one with weights that change its frequencies by some per cent."""
    schedule = schedule.for_geometry(geometry)
    if isinstance(net := innermost(schedule), torch.nn.Module):
        generator = torch.Generator().manual_seed(geometry.dim)
        with torch.no_grad():
            for name, std in (("up_proj", geometry.dim**-0.5), ("down_proj", 0.02 / geometry.dim)):
                weight = net.get_parameter(name)
                weight.copy_(std * torch.randn(weight.shape, generator=generator))
    return schedule


def training_request(geometry: ropex.Geometry, tokens: int = 16, batch: int = 3, **fields: object) -> ropex.Request:
    """What a module in training asks: rows of `tokens` tokens, one key each."""
    values = {
        "positions": torch.arange(tokens).expand(batch, tokens),
        "length": torch.full((batch,), tokens),
        "key": draws.sample_keys(0, torch.tensor(7), torch.arange(batch)),
    }
    return ropex.Request(geometry, training=True, **{**values, **fields})


# The families that the patch must know, by detection alone: tiny random models, weights of std 0.02.
FAMILIES = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "gpt_neox": "GPTNeoXConfig",
}
# Found by the same detection, with interleaved channels and tables, or rotation of a slice.
MORE_FAMILIES = {"cohere": "CohereConfig", "glm": "GlmConfig", "phi": "PhiConfig"}
TRAINED_LENGTH = 512
VOCABULARY = 128


def tiny_config(family: str, **options: object) -> transformers.PretrainedConfig:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": TRAINED_LENGTH,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family != "gpt_neox":
        sizes["num_key_value_heads"] = 2
    if family in ("glm", "mistral"):  # their configs do not derive it
        sizes["head_dim"] = 16
    return getattr(transformers, (FAMILIES | MORE_FAMILIES)[family])(**(sizes | options))


def scaled_config(family: str, **rope_parameters: object) -> transformers.PretrainedConfig:
    """A config that carries transformers' own scaling, the way of its version."""
    config = tiny_config(family)
    if hasattr(config, "rope_parameters"):
        config.rope_parameters = {**config.rope_parameters, **rope_parameters}
    else:
        config.rope_theta = rope_parameters.pop("rope_theta", config.rope_theta)
        config.rope_scaling = rope_parameters
    return config


def tiny_model(family: str, seed: int = 0, **options: object) -> torch.nn.Module:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(family, **options)).eval()


def tiny_tokens(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor, **inputs: object) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False, **inputs).logits


def cached(model: torch.nn.Module, cache: object) -> dict[str, object]:
    """A cache as an argument of a model's forward, or of generate."""
    return {cache_argument(model): cache}


def byte_tokenizer(bos: bool = False) -> transformers.PreTrainedTokenizerFast:
    """A token for each byte of UTF-8, 256 for BOS, which it puts in front of every text if asked to."""
    alphabet = sorted(ByteLevel.alphabet())
    words = Tokenizer(BPE({character: i for i, character in enumerate(alphabet)}, []))
    words.pre_tokenizer = ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens([AddedToken("<s>", special=True)])
    if bos:
        words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")
