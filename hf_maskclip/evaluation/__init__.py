"""Evaluation of any CLIP that Transformers loads: one protocol a file."""

from .compositionality import average_by_kind, evaluate_compositionality
from .datasets.find import Request, find_evaluations
from .encoder import Encoder, ImageSet
from .linear_probe import evaluate_linear_probe
from .metrics import Accuracy, HardNegativeAccuracy, MeanAveragePrecision, RecallAtK
from .retrieval import evaluate_retrieval, recall_at_k
from .runner import evaluate
from .zero_shot import evaluate_multi_label, evaluate_zero_shot

__all__ = [
    "Accuracy",
    "Encoder",
    "HardNegativeAccuracy",
    "ImageSet",
    "MeanAveragePrecision",
    "RecallAtK",
    "Request",
    "average_by_kind",
    "evaluate",
    "evaluate_compositionality",
    "evaluate_linear_probe",
    "evaluate_multi_label",
    "evaluate_retrieval",
    "evaluate_zero_shot",
    "find_evaluations",
    "recall_at_k",
]
