"""Proves that each protocol gives the numbers of hand-made cases, that constant, random and NaN features score at most chance
on all of them, and that features are computed once, for the right weights, as the model has them in evaluation mode."""

import itertools

import pytest
import torch
from conftest import random_picture
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil, CLIPProcessor

from hf_maskclip.errors import ConfigError
from hf_maskclip.evaluation import (
    Accuracy,
    Encoder,
    HardNegativeAccuracy,
    ImageSet,
    MeanAveragePrecision,
    average_by_kind,
    evaluate_compositionality,
    evaluate_linear_probe,
    evaluate_multi_label,
    evaluate_retrieval,
    evaluate_zero_shot,
    linear_probe,
    recall_at_k,
)
from hf_maskclip.evaluation.encoder import ImageFeatures
from hf_maskclip.evaluation.linear_probe import fit_by_gradient_descent, fit_logistic_regression
from hf_maskclip.evaluation.metrics import rank_of_nearest
from hf_maskclip.evaluation.report import mean_of_robustness
from hf_maskclip.evaluation.zero_shot import class_features

NAN = float("nan")


# ---- Metrics on hand-made cases -----------------------------------------------------------------------------------------


def test_accuracy_by_hand():
    scores = torch.tensor(
        [
            [0.9, 0.1, 0.2, 0.3, 0.4, 0.5],  # class 0, first
            [0.1, 0.9, 0.2, 0.3, 0.4, 0.5],  # class 0, last
            [0.5, 0.9, 0.1, 0.2, 0.3, 0.4],  # class 0, second
            [0.0, 0.7, 0.7, 0.0, 0.0, 0.0],  # class 1, tied with class 2
            [0.0, 0.1, 0.7, 0.0, 0.0, NAN],  # class 2, but no better than what is not a number
            [0.0, 0.1, 0.7, 0.0, 0.0, 0.0],  # class 2, first
        ]
    )
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    ranks = rank_of_nearest(scores, F.one_hot(labels, 6).bool())
    assert ranks.tolist() == [0, 5, 1, 1, 1, 0]
    # Classes 3 to 5 have no picture and no part in the mean over classes.
    expected = {"top1": 2 / 6, "top5": 5 / 6, "mean_per_class": (1 / 3 + 0 + 1 / 2) / 3}
    assert Accuracy().compute(ranks=ranks, references=labels, num_classes=[6] * 6) == pytest.approx(expected)
    one = Accuracy().compute(ranks=[0], references=[3], num_classes=[5])
    assert one == {"top1": 1.0, "mean_per_class": 1.0}  # among five classes all are among five


def test_mean_average_precision_by_hand():
    scores = [[0.9, 0.5, 0.1], [0.8, 0.5, 0.2], [0.7, 0.5, 0.3], [0.6, 0.1, 0.4]]
    shown = [[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]]
    # Class 0: right at places 1 and 3. Class 1: tied with two wrong ones, so at place 3. Class 2: in no picture, left out.
    expected = ((1 + 2 / 3) / 2 + 1 / 3) / 2
    assert MeanAveragePrecision().compute(predictions=scores, references=shown) == pytest.approx(
        {"mean_average_precision": expected}
    )
    scores[0][0] = NAN  # now last for class 0
    expected = ((1 / 2 + 2 / 4) / 2 + 1 / 3) / 2
    assert MeanAveragePrecision().compute(predictions=scores, references=shown)["mean_average_precision"] == pytest.approx(
        expected
    )


def test_recall_of_three_queries_over_six_targets():
    # Similarities of each query to the targets, given as features by an identity basis.
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.0, 0.3, 0.2], [0.5, 0.4, 0.3, 0.2, 0.1, 0.0], [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]])
    positives = torch.tensor([[0, 0], [0, 2], [1, 2], [1, 5], [2, 0]])
    # Best positives: query 0 ranks first, query 1 third (targets 0 and 1 are nearer), query 2 last. No recall at 10 of six.
    assert recall_at_k(torch.eye(3), scores.t(), positives) == pytest.approx({"recall@1": 1 / 3, "recall@5": 2 / 3})


def test_recall_in_chunks_is_that_of_the_full_matrix():
    generator = torch.Generator().manual_seed(0)
    queries, targets = torch.randn(2500, 8, generator=generator), torch.randn(700, 8, generator=generator)
    positives = torch.stack([torch.arange(2500), torch.randint(700, (2500,), generator=generator)], dim=1)
    scores = queries @ targets.t()
    rank = (scores > scores.gather(1, positives[:, 1:])).sum(dim=1)
    recall = recall_at_k(queries, targets, positives)
    assert recall == pytest.approx({f"recall@{k}": (rank < k).float().mean().item() for k in (1, 5, 10)})
    assert 0 < recall["recall@1"] < recall["recall@10"] < 1


def test_hard_negatives_and_averages_by_hand():
    accuracy = HardNegativeAccuracy().compute(predictions=[0.9, 0.5, 0.1, NAN], references=[0.1, 0.5, 0.9, 0.0])
    assert accuracy == {"accuracy": 1 / 4}
    kinds = ("replace_object", "swap_object", "add_object", "replace_attribute", "swap_attribute", "add_attribute")
    averages = average_by_kind({kind: value for value, kind in enumerate(kinds)} | {"replace_relation": 13})
    assert averages == {"object": 1, "attribute": 4, "relation": 13, "mean": 4}
    assert mean_of_robustness({"plain": 1.0, "noise": 0.5, "blur": 0.0}) == {"ID avg": 0.5, "OOD avg": 0.25}


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


# ---- Protocols with a model ------------------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="class index 2: there are 2 class names"):
        evaluate_zero_shot(encoder, ImageSet([(random_picture(0), 2)]), ["ball", "fish"], ["a {c}"])
    with pytest.raises(ValueError, match="a target of 3 classes: there are 2 class names"):
        evaluate_multi_label(encoder, ImageSet([(random_picture(0), [0, 1, 0])]), ["ball", "fish"], ["a {c}"])
    with pytest.raises(ValueError, match="evaluation data is empty"):
        evaluate_zero_shot(encoder, ImageSet([]), ["ball", "fish"], ["a {c}"])


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("fit", [fit_by_gradient_descent, fit_logistic_regression])
def test_a_probe_learns_what_is_linear(fit, num_classes):
    pytest.importorskip("sklearn")
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


def test_logistic_regression_says_what_it_needs(monkeypatch):
    with pytest.raises(ValueError, match="logistic_regression: the features of training pictures are not all finite numbers"):
        evaluate_linear_probe(FeaturesWithoutAModel("nan"), LABELS, LABELS, 20, solver="logistic_regression")
    monkeypatch.setattr(linear_probe, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs scikit-learn: pip install .hf_maskclip\[probe\]"):
        evaluate_linear_probe(FeaturesWithoutAModel("random"), LABELS, LABELS, 20, solver="logistic_regression")


# ---- Features ------------------------------------------------------------------------------------------------------------


def test_features_are_those_of_the_model_in_evaluation_mode_and_the_mode_comes_back(make_model, processor):
    model = make_model("random").train()
    pictures = [random_picture(i) for i in range(5)]
    found = Encoder(model, processor, batch_size=2).encode_images(ImageSet([(p, i) for i, p in enumerate(pictures)]))
    assert model.training and found.targets == [0, 1, 2, 3, 4]
    with torch.no_grad():
        expected = model.eval().get_image_features(**processor(images=pictures, return_tensors="pt")).pooler_output
    torch.testing.assert_close(found.features, F.normalize(expected, dim=-1))


def test_masked_features_are_the_same_each_time_and_differ_from_whole_ones(make_model, make_clip, processor):
    images = ImageSet([(random_picture(i), i) for i in range(5)])
    model = make_model({"name": "random", "mask_ratio": 0.75})
    whole = Encoder(model, processor).encode_images(images).features
    masked, again = (Encoder(model, processor, apply_patch_mask=True).encode_images(images).features for _ in range(2))
    torch.testing.assert_close(masked, again, rtol=0, atol=0)
    assert (masked - whole).norm(dim=1).min() > 1e-3
    with pytest.raises(ValueError, match="a CLIPModel has no patch mask; load it as a MaskCLIPModel"):
        Encoder(make_clip(), processor, apply_patch_mask=True)


def test_text_features_do_not_depend_on_padding_and_long_texts_are_cut(encoder):
    texts = ["a ball", "a small house " * 100, "two fish"]
    alone = torch.cat([encoder.encode_texts([text]) for text in texts])
    torch.testing.assert_close(encoder.encode_texts(texts), alone)


def test_what_cannot_be_decoded_is_left_out_and_counted(encoder):
    samples = [(lambda: None, 0), (lambda: random_picture(1), 1), (random_picture(2), 2), (lambda: None, 3), (lambda: None, 4)]
    found = encoder.encode_images(ImageSet(samples))
    assert (found.targets, found.num_undecodable, len(found.features)) == ([1, 2], 3, 2)


class CountedSamples:
    """Four pictures, and how often they were read."""

    def __init__(self):
        self.times_read = 0

    def __iter__(self):
        self.times_read += 1
        return iter([(random_picture(i), i) for i in range(4)])


def test_pictures_with_a_fingerprint_are_encoded_once(encoder):
    samples = CountedSamples()
    for _ in range(3):
        encoder.encode_images(ImageSet(samples, "four pictures"))
    assert samples.times_read == 1
    encoder.encode_images(ImageSet(samples, "others"))
    encoder.encode_images(ImageSet(samples))
    encoder.encode_images(ImageSet(samples))
    assert samples.times_read == 4


def test_kept_features_are_those_of_the_weights_the_processor_and_the_mask(make_model, processor, tokenizer, tmp_path):
    samples = CountedSamples()
    images = ImageSet(samples, "four pictures")

    def features(seed=0, processor=processor, **kwargs) -> torch.Tensor:
        return Encoder(make_model(seed=seed), processor, cache_dir=tmp_path, **kwargs).encode_images(images).features

    first = features()
    torch.testing.assert_close(features(), first, rtol=0, atol=0)
    assert samples.times_read == 1
    size = {"height": 32, "width": 32}
    other_crop = CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=size), tokenizer)
    for number, changed in enumerate(({"seed": 1}, {"processor": other_crop}, {"apply_patch_mask": True})):
        assert (features(**changed) - first).norm() > 1e-3 and samples.times_read == number + 2, changed
    bf16 = Encoder(make_model().to(torch.bfloat16), processor, cache_dir=tmp_path).encode_images(images).features
    assert samples.times_read == 5 and 0 < (bf16 - first).norm() < 0.2
    assert len(list(tmp_path.iterdir())) == 5


def test_a_record_says_what_the_result_depends_on(make_model, processor, tokenizer):
    about = Encoder(make_model(), processor).describe()
    assert about["precision"] == "float32" and about["image_backend"] == "torchvision" and about["patch_mask"] is None
    assert (about["resize"], about["crop"]) == ({"shortest_edge": 32}, {"height": 32, "width": 32})
    assert set(about["versions"]) >= {"hf_maskclip", "transformers", "torch"}
    assert about["model_hash"] != Encoder(make_model(seed=1), processor).model_hash
    pil = CLIPProcessor(CLIPImageProcessorPil(do_center_crop=False), tokenizer)
    masked = Encoder(make_model("random"), pil, apply_patch_mask=True).describe()
    assert (masked["image_backend"], masked["crop"], masked["patch_mask"]["name"]) == ("pil", None, "random")


def test_pictures_of_every_mode_are_encoded(encoder):
    modes = ("RGB", "L", "RGBA", "P", "CMYK", "1")
    found = encoder.encode_images(ImageSet([(Image.new(mode, (20, 30)), mode) for mode in modes]))
    assert found.targets == list(modes)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(found.features[[0, 4]], 2))
