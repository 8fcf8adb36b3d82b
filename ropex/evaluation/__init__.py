"""Measuring long context on any causal language model."""

from ropex.evaluation.compare import compare_methods
from ropex.evaluation.curves import LossCurve, effective_length, fit_loss_curve
from ropex.evaluation.documents import Document, TextFile, documents
from ropex.evaluation.key_tokens import KeyTokenPerplexity, long_ppl
from ropex.evaluation.lm_harness import harness
from ropex.evaluation.perplexity import PerplexityByLength, perplexity_by_length
from ropex.evaluation.retrieval import RetrievalResult, retrieval
from ropex.evaluation.shifts import ShiftDeviation, shift_deviation
from ropex.evaluation.tasks import Question, Sample, Task, tasks

__all__ = [
    "Document",
    "KeyTokenPerplexity",
    "LossCurve",
    "PerplexityByLength",
    "Question",
    "RetrievalResult",
    "Sample",
    "ShiftDeviation",
    "Task",
    "TextFile",
    "compare_methods",
    "documents",
    "effective_length",
    "fit_loss_curve",
    "harness",
    "long_ppl",
    "perplexity_by_length",
    "retrieval",
    "shift_deviation",
    "tasks",
]
