"""Measuring long context on any causal language model."""

from ropex.evaluation.compare import compare_methods
from ropex.evaluation.perplexity import PerplexityByLength, perplexity_by_length

__all__ = ["PerplexityByLength", "compare_methods", "perplexity_by_length"]
