"""Proves that constant, random and NaN features score at most chance by every protocol of evaluation, and that the protocols
find what is there."""

import pytest
import torch
from helpers import random_picture
from torch.nn import functional as F

from hf_maskclip.errors import ConfigError
from hf_maskclip.evaluation import (
    Encoder,
    ImageSet,
    evaluate_compositionality,
    evaluate_linear_probe,
    evaluate_multi_label,
    evaluate_retrieval,
    evaluate_zero_shot,
    linear_probe,
)
from hf_maskclip.evaluation.encoder import ImageFeatures
from hf_maskclip.evaluation.linear_probe import fit_by_gradient_descent, fit_logistic_regression
from hf_maskclip.evaluation.zero_shot import class_features

NAN = float("nan")


# ---- No model profits from what it does not know ---------------------------------------------------------------------------


class FeaturesWithoutAModel:
    """Stands in for an Encoder: features of one kind, whatever the pictures and texts."""

    def __init__(self, kind: str):
        self.kind, self.generator = kind, torch.Generator().manual_seed(0)

    def features(self, n: int) -> torch.Tensor:
        constant = F.normalize(torch.ones(n, 16), dim=-1)
        random = F.normalize(torch.randn(n, 16, generator=self.generator), dim=-1)
        return {"constant": constant, "random": random, "nan": torch.full((n, 16), NAN)}[self.kind]

    def encode_images(self, images: ImageSet) -> ImageFeatures:
        targets = [target for _, target in images.samples]
        return ImageFeatures(self.features(len(targets)), targets)

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        return self.features(len(texts))


class ConstantPictures(FeaturesWithoutAModel):
    """All pictures alike, texts all different."""

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        return F.normalize(torch.randn(len(texts), 16, generator=self.generator), dim=-1)


def targets_set(targets) -> ImageSet:
    return ImageSet([(None, target) for target in targets])


CLASSES = [f"class {m}" for m in range(20)]
LABELS = targets_set([m for m in range(20) for _ in range(50)])
MULTI_HOT = targets_set([[int(m in (n % 20, (n * 7 + 1) % 20)) for m in range(20)] for n in range(1000)])
CAPTIONS = targets_set([[f"caption {i} {n}" for n in range(3)] for i in range(400)])
PAIRS = targets_set([(f"true {i}", f"false {i}") for i in range(1000)])
# Protocol: what it gives for an encoder, and by metric the chance and the number of independent tries that it is a mean of.
PROTOCOLS = {
    "zero_shot": (
        lambda e: evaluate_zero_shot(e, LABELS, CLASSES, ["a {c}"]),
        {"top1": (1 / 20, 1000), "top5": (5 / 20, 1000), "mean_per_class": (1 / 20, 1000)},
    ),
    "multi_label": (
        lambda e: evaluate_multi_label(e, MULTI_HOT, CLASSES, ["a {c}"]),
        {"mean_average_precision": (1 / 10, 1000)},
    ),
    "retrieval": (
        lambda e: evaluate_retrieval(e, CAPTIONS),
        {f"image_to_text_recall@{k}": (k * 3 / 1200, 400) for k in (1, 5, 10)}
        | {f"text_to_image_recall@{k}": (k / 400, 1200) for k in (1, 5, 10)},
    ),
    "linear_probe": (
        lambda e: evaluate_linear_probe(e, LABELS, LABELS, 20),
        {"top1": (1 / 20, 1000), "top5": (5 / 20, 1000), "mean_per_class": (1 / 20, 1000)},
    ),
    "compositionality": (lambda e: evaluate_compositionality(e, PAIRS), {"accuracy": (1 / 2, 1000)}),
}


@pytest.mark.parametrize("kind", ["constant", "constant pictures", "random", "nan"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_features_that_know_nothing_score_at_most_chance(protocol, kind):
    evaluate, chances = PROTOCOLS[protocol]
    encoder = ConstantPictures("constant") if kind == "constant pictures" else FeaturesWithoutAModel(kind)
    scores = evaluate(encoder)
    for metric, (chance, tries) in chances.items():
        # Random features, and constant ones between different texts, scatter around chance: five standard errors are allowed.
        scatters = kind == "random" or (kind == "constant pictures" and protocol in ("compositionality", "multi_label"))
        assert scores[metric] <= chance + (5 * (chance * (1 - chance) / tries) ** 0.5 if scatters else 1e-9), metric


def test_the_protocols_find_what_is_there():
    """The same tasks, with features that know the answer: chance above is not all that the protocols can give."""

    class Oracle:
        def encode_images(self, images):
            targets = [target for _, target in images.samples]
            if isinstance(targets[0], int):
                return ImageFeatures(torch.eye(20)[targets], targets)
            if isinstance(targets[0], tuple) or isinstance(targets[0][0], str):
                return ImageFeatures(torch.eye(len(targets)), targets)
            return ImageFeatures(F.normalize(torch.tensor(targets).float(), dim=-1), targets)

        def encode_texts(self, texts):
            if texts[0].startswith("caption"):
                return torch.eye(400).repeat_interleave(3, dim=0)
            if texts[0].startswith("a class"):
                return torch.eye(20)
            return torch.eye(1000) * (1 if texts[0].startswith("true") else -1)

    for name, (evaluate, chances) in PROTOCOLS.items():
        scores = evaluate(Oracle())
        assert all(scores[metric] == 1.0 for metric in chances), name


# ---- With a model -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def encoder(make_model, processor) -> Encoder:
    return Encoder(make_model(), processor, batch_size=2)


def test_equal_captions_are_one_text_that_belongs_to_all_its_pictures(encoder):
    captions = [["a red ball"], ["a red ball"], ["two blue fish", "a small house"]]
    result = evaluate_retrieval(encoder, ImageSet([(random_picture(i), c) for i, c in enumerate(captions)]))
    assert (result["n"], result["num_texts"]) == (3, 3)


def test_class_features_average_the_prompts(encoder):
    features = class_features(encoder, ["ball", "fish"], ["a {c}", "the small {c}"])
    prompts = encoder.encode_texts(["a ball", "the small ball", "a fish", "the small fish"])
    torch.testing.assert_close(features, F.normalize(prompts.view(2, 2, -1).mean(dim=1), dim=-1))
    with pytest.raises(ValueError, match="'a photo': has no {c}"):
        class_features(encoder, ["ball"], ["a photo"])


def test_classes_without_a_picture_can_be_left_out(encoder):
    images = ImageSet([(random_picture(i), label) for i, label in enumerate((7, 2, 7))])
    names = [f"thing {m}" for m in range(9)]
    among_nine = evaluate_zero_shot(encoder, images, names, ["a {c}"])
    among_two = evaluate_zero_shot(encoder, images, names, ["a {c}"], only_occurring=True)
    assert (among_nine["num_classes"], among_two["num_classes"]) == (9, 2)
    renamed = ImageSet([(random_picture(i), label) for i, label in enumerate((1, 0, 1))])
    assert among_two == evaluate_zero_shot(encoder, renamed, ["thing 2", "thing 7"], ["a {c}"])


def test_targets_outside_the_classes_give_no_number(encoder):
    with pytest.raises(ValueError, match="sample number 0 has class index 2, but there are 2 class names"):
        evaluate_zero_shot(encoder, ImageSet([(random_picture(0), 2)]), ["ball", "fish"], ["a {c}"])
    with pytest.raises(ValueError, match="sample number 0 has 3 classes, but there are 2 class names"):
        evaluate_multi_label(encoder, ImageSet([(random_picture(0), [0, 1, 0])]), ["ball", "fish"], ["a {c}"])
    with pytest.raises(ValueError, match="evaluation data is empty"):
        evaluate_zero_shot(encoder, ImageSet([]), ["ball", "fish"], ["a {c}"])


# ---- Linear probes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("fit", [fit_by_gradient_descent, fit_logistic_regression])
def test_a_probe_learns_what_is_linear(fit, num_classes):
    if fit is fit_logistic_regression:
        pytest.importorskip("sklearn", reason="scikit-learn is of the probe extra")
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3600) % num_classes
    features = F.normalize(2 * torch.eye(8)[labels] + torch.randn(3600, 8, generator=generator), dim=-1)
    train, test = slice(0, 3000), slice(3000, None)
    fitted = fit(features[train], labels[train], num_classes + 1)  # one class more than has pictures
    weight, bias = fitted[0] if fit is fit_logistic_regression else fitted
    predicted = F.linear(features[test], weight, bias).argmax(dim=1)
    centres = F.linear(features[test], torch.eye(8)[:num_classes]).argmax(dim=1)
    assert (predicted == labels[test]).float().mean() > (centres == labels[test]).float().mean() - 0.03
    assert not (predicted == num_classes).any()
    again = fit(features[train], labels[train], num_classes + 1)
    torch.testing.assert_close(again[0], fitted[0], rtol=0, atol=0)  # the same seed, the same classifier


def test_logistic_regression_of_features_that_are_not_numbers_is_refused():
    pytest.importorskip("sklearn", reason="scikit-learn is of the probe extra")
    with pytest.raises(ValueError, match="logistic_regression: the features of training pictures are not all finite numbers"):
        evaluate_linear_probe(FeaturesWithoutAModel("nan"), LABELS, LABELS, 20, solver="logistic_regression")


def test_logistic_regression_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(linear_probe, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs scikit-learn: pip install .hf_maskclip\[probe\]"):
        evaluate_linear_probe(FeaturesWithoutAModel("random"), LABELS, LABELS, 20, solver="logistic_regression")
