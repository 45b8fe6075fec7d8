"""Evaluation of any CLIP that Transformers loads: one protocol a file."""

from .retrieval import evaluate_retrieval, recall_at_k
from .zero_shot import classification_scores, evaluate_zero_shot

__all__ = ["classification_scores", "evaluate_retrieval", "evaluate_zero_shot", "recall_at_k"]
