"""Proves that the metrics are right on hand-made cases, and that constant and NaN models do not profit from ties."""

import pytest
import torch
from conftest import random_picture
from hf_maskclip.evaluation.features import image_features, text_features

from hf_maskclip.evaluation import classification_scores, evaluate_retrieval, evaluate_zero_shot, recall_at_k
from hf_maskclip.evaluation.zero_shot import class_features


def test_recall_of_three_queries_over_six_targets():
    # Similarities of each query to the targets, given as features by an identity basis.
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.0, 0.3, 0.2], [0.5, 0.4, 0.3, 0.2, 0.1, 0.0], [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]])
    positives = torch.tensor([[0, 0], [0, 2], [1, 2], [1, 5], [2, 0]])
    # Best positives: query 0 ranks first, query 1 third (targets 0 and 1 are nearer), query 2 last.
    recall = recall_at_k(torch.eye(3), scores.t(), positives, ks=(1, 2, 3, 5, 6))
    assert recall == pytest.approx({1: 1 / 3, 2: 1 / 3, 3: 2 / 3, 5: 2 / 3, 6: 1.0})


def test_recall_in_chunks_is_that_of_the_full_matrix():
    generator = torch.Generator().manual_seed(0)
    queries, targets = torch.randn(2500, 8, generator=generator), torch.randn(700, 8, generator=generator)
    positives = torch.stack([torch.arange(2500), torch.randint(700, (2500,), generator=generator)], dim=1)
    scores = queries @ targets.t()
    rank = (scores > scores.gather(1, positives[:, 1:])).sum(dim=1)
    recall = recall_at_k(queries, targets, positives)
    assert recall == pytest.approx({k: (rank < k).float().mean().item() for k in (1, 5, 10)})
    assert 0 < recall[1] < recall[10] < 1


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan")])
def test_constant_and_nan_features_score_nothing(value):
    queries, targets = torch.full((20, 4), value), torch.full((30, 4), value)
    positives = torch.stack([torch.arange(20), torch.arange(20)], dim=1)
    assert set(recall_at_k(queries, targets, positives).values()) == {0.0}
    scores = classification_scores(torch.full((20, 12), value), torch.arange(20) % 12)
    assert set(scores.values()) == {0.0}


def test_classification_scores_by_hand():
    scores = torch.tensor(
        [
            [0.9, 0.1, 0.2, 0.3, 0.4, 0.5],  # class 0, first
            [0.1, 0.9, 0.2, 0.3, 0.4, 0.5],  # class 0, last
            [0.5, 0.9, 0.1, 0.2, 0.3, 0.4],  # class 0, second
            [0.0, 0.7, 0.7, 0.0, 0.0, 0.0],  # class 1, tied with class 2
            [0.0, 0.1, 0.7, 0.0, 0.0, 0.0],  # class 2, first
        ]
    )
    expected = {"top1": 2 / 5, "top5": 4 / 5, "mean_per_class": (1 / 3 + 0 + 1) / 3}
    assert classification_scores(scores, torch.tensor([0, 0, 0, 1, 2])) == pytest.approx(expected)


def test_equal_captions_are_one_text_that_belongs_to_all_its_pictures(make_model, processor):
    captions = [["a red ball"], ["a red ball"], ["two blue fish", "a small house"]]
    result = evaluate_retrieval(make_model(), processor, [(random_picture(i), c) for i, c in enumerate(captions)])
    assert (result["num_images"], result["num_texts"]) == (3, 3)
    assert result["image_to_text_recall@5"] == result["text_to_image_recall@5"] == 1.0


def test_features_are_those_of_the_model_in_evaluation_mode_and_the_mode_comes_back(make_model, processor):
    model = make_model("random").train()
    pictures = [random_picture(i) for i in range(5)]
    features, labels = image_features(model, processor, [(p, i) for i, p in enumerate(pictures)], batch_size=2)
    assert model.training and labels == [0, 1, 2, 3, 4]
    with torch.no_grad():
        expected = model.eval().get_image_features(**processor(images=pictures, return_tensors="pt")).pooler_output
    torch.testing.assert_close(features, torch.nn.functional.normalize(expected, dim=-1))


def test_text_features_do_not_depend_on_padding_and_long_texts_are_cut(make_model, processor):
    texts = ["a ball", "a small house " * 100, "two fish"]
    together = text_features(make_model().eval(), processor, texts)
    alone = torch.cat([text_features(make_model().eval(), processor, [text]) for text in texts])
    torch.testing.assert_close(together, alone)


def test_class_features_average_the_prompts(make_model, processor):
    model = make_model().eval()
    features = class_features(model, processor, ["ball", "fish"], ["a {c}", "the small {c}"])
    prompts = text_features(model, processor, ["a ball", "the small ball", "a fish", "the small fish"])
    expected = torch.nn.functional.normalize(prompts.view(2, 2, -1).mean(dim=1), dim=-1)
    torch.testing.assert_close(features, expected)
    with pytest.raises(ValueError, match="'a photo': has no {c}"):
        class_features(model, processor, ["ball"], ["a photo"])


def test_a_label_outside_the_names_gives_no_number(make_model, processor):
    with pytest.raises(ValueError, match="class index 2: there are 2 class names"):
        evaluate_zero_shot(make_model(), processor, [(random_picture(0), 2)], ["ball", "fish"], ["a {c}"])
    with pytest.raises(ValueError, match="evaluation data is empty"):
        evaluate_zero_shot(make_model(), processor, [], ["ball", "fish"], ["a {c}"])
