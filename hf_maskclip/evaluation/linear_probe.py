"""Linear probe: a linear classifier on frozen image features.

Shapes: N pictures, M classes, E projection size.
"""

import logging
import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from ..errors import fail
from .details import of_classification
from .encoder import Encoder, ImageFeatures, ImageSet
from .labels import check_samples, class_label
from .zero_shot import accuracy_over_processes, class_indices

EPOCHS, LEARNING_RATE, BATCH_SIZE = 10, 0.1, 512  # of CLIP-PGS (arXiv 2503.17080)
INVERSE_REGULARIZATIONS = tuple(10.0**exponent for exponent in range(-2, 7))

logger = logging.getLogger(__name__)

Solver = Literal["gradient_descent", "logistic_regression"]


def evaluate_linear_probe(
    encoder: Encoder,
    train: ImageSet,
    test: ImageSet,
    num_classes: int,
    *,
    solver: Solver = "gradient_descent",
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    details: bool = False,
) -> dict[str, Any]:
    """Top-1 and top-5 accuracy and its mean over classes, on `test`, of a linear classifier trained on `train`.

    Args:
        train, test: pictures whose targets are class indices.
        num_classes: M.
        solver: `gradient_descent`, the papers' protocol ([`fit_by_gradient_descent`]); or `logistic_regression`
            ([`fit_logistic_regression`]).
        seed: of the classifier's first weights and of the order of its batches, or of the pictures that C is chosen on.
        class_names: M names, for the details; by default the indices.
        details: with each picture's prediction and each class's accuracy, under `details`.

    Returns:
        the accuracies, and under `settings` what the solver chose, such as C: no metric.

    Raises:
        ConfigError: a class index outside the classes, no picture, `logistic_regression` on features that are not numbers.
        ConfigError: `logistic_regression` without scikit-learn.
    """
    for images in (train, test):
        check_samples(images, class_label, num_classes)
    trained_on, labels = _features_and_labels(encoder, train, num_classes)
    found, test_labels = _features_and_labels(encoder, test, num_classes)
    features = trained_on.features
    if solver == "logistic_regression":  # checked on all processes: an error on one alone would leave the others waiting
        if find_spec("sklearn") is None:
            fail('solver="logistic_regression": needs scikit-learn: pip install "hf_maskclip[probe]"')
        if not features.isfinite().all():
            fail("logistic_regression: the features of training pictures are not all finite numbers")
    (weight, bias), settings = _fit_on_one_process(features, labels, num_classes, solver, seed)
    scores, predicted = accuracy_over_processes(lambda rows: F.linear(found.features[rows], weight, bias), test_labels)
    scores |= {"n": len(test_labels), "num_undecodable": found.num_undecodable}
    scores |= {"num_train": len(labels), "num_train_undecodable": trained_on.num_undecodable}
    scores |= {"solver": solver, "settings": settings}
    names = class_names or [str(index) for index in range(num_classes)]
    return scores | ({"details": of_classification(found, test_labels, predicted, names)} if details else {})


def _fit_on_one_process(
    features: torch.Tensor, labels: torch.Tensor, num_classes: int, solver: Solver, seed: int
) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, Any]]:
    """The classifier of the main process, on all of them, and what its solver chose."""
    fitted: list[Any] = [None]
    if PartialState().is_main_process:
        if solver == "gradient_descent":
            fitted = [(fit_by_gradient_descent(features, labels, num_classes, seed), {})]
        else:
            fitted = [fit_logistic_regression(features, labels, num_classes, seed)]
    return broadcast_object_list(fitted)[0]


def fit_by_gradient_descent(
    features: torch.Tensor, labels: torch.Tensor, num_classes: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten epochs of AdamW without weight decay in batches of 512, the learning rate falling from 0.1 by half a cosine.

    That is clip_benchmark's probe with the arguments of CLIP-PGS (arXiv 2503.17080).

    Args:
        features: (N, E), unit length.
        labels: LongTensor (N,).

    Returns:
        the weights (M, E) and biases (M,) of the classifier.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = nn.Linear(features.shape[1], num_classes)
        batches = DataLoader(TensorDataset(features, labels), batch_size=BATCH_SIZE, shuffle=True)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        num_steps = EPOCHS * len(batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / num_steps)) / 2)
        for _ in range(EPOCHS):
            for inputs, targets in batches:
                optimizer.zero_grad()
                F.cross_entropy(classifier(inputs), targets).backward()
                optimizer.step()
                schedule.step()
    return classifier.weight.detach(), classifier.bias.detach()


def fit_logistic_regression(
    features: torch.Tensor, labels: torch.Tensor, num_classes: int, seed: int = 0
) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, Any]]:
    """Scikit-learn's logistic regression. C is chosen among nine values (0.01 to 1e6) on a held-out fifth.

    It may take minutes where there are many classes, and says so.

    Returns:
        the weights (M, E) and biases (M,) of the classifier, and `{"C": ...}`. A class without a picture is never predicted.
    """
    from sklearn.linear_model import LogisticRegression  # an optional package
    from sklearn.model_selection import train_test_split

    x, y = features.numpy(), labels.numpy()
    fit_x, choose_x, fit_y, choose_y = train_test_split(x, y, test_size=0.2, random_state=seed)

    def accuracy(c: float) -> float:
        return LogisticRegression(C=c, max_iter=1000).fit(fit_x, fit_y).score(choose_x, choose_y)

    num_fits = len(INVERSE_REGULARIZATIONS) + 1
    logger.info("logistic regression: %d fits to %d pictures of %d classes", num_fits, len(y), num_classes)
    best = max(tqdm(INVERSE_REGULARIZATIONS, unit="fit", disable=None), key=accuracy)
    model = LogisticRegression(C=best, max_iter=1000).fit(x, y)
    weight, bias = torch.zeros(num_classes, x.shape[1]), torch.full((num_classes,), -torch.inf)
    coefficients, intercepts = torch.from_numpy(model.coef_).float(), torch.from_numpy(model.intercept_).float()
    if len(model.classes_) == 2:  # scikit-learn keeps the second class alone
        coefficients, intercepts = torch.cat([-coefficients, coefficients]) / 2, torch.cat([-intercepts, intercepts]) / 2
    weight[model.classes_], bias[model.classes_] = coefficients, intercepts
    return (weight, bias), {"C": best}


def _features_and_labels(encoder: Encoder, images: ImageSet, num_classes: int) -> tuple[ImageFeatures, torch.Tensor]:
    found = encoder.encode_images(images)
    return found, class_indices(found.targets, num_classes)
