"""Measuring long context on any causal language model."""

from ropex.evaluation.compare import compare_methods
from ropex.evaluation.documents import Document, documents
from ropex.evaluation.perplexity import PerplexityByLength, perplexity_by_length
from ropex.evaluation.retrieval import RetrievalResult, retrieval
from ropex.evaluation.tasks import tasks

__all__ = [
    "Document",
    "PerplexityByLength",
    "RetrievalResult",
    "compare_methods",
    "documents",
    "perplexity_by_length",
    "retrieval",
    "tasks",
]
