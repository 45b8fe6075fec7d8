"""Proves that a picture on several rows, with a caption each, is evaluated as one picture with a list of captions, and that a
recall that no model could miss is no result."""

import pytest
from helpers import encode_image, random_picture, write_shard

from hf_maskclip.evaluation import Encoder, ImageSet, evaluate_retrieval
from hf_maskclip.evaluation.command import numbers_of
from hf_maskclip.evaluation.datasets.find import Request, find_evaluations
from hf_maskclip.evaluation.runner import run_evaluations

CAPTIONS = [["a red ball", "two blue fish"], ["a small house"], ["a green tree", "a car", "two blue fish"], ["grass", "a ball"]]
CAPTIONS += [["left of a car"], ["a house on grass"], ["a red tree", "blue"]]


@pytest.fixture
def encoder(make_model, processor) -> Encoder:
    return Encoder(make_model("random"), processor, batch_size=3)


def test_a_row_a_caption_is_as_a_list_of_captions(encoder):
    lists = ImageSet([(random_picture(n), captions) for n, captions in enumerate(CAPTIONS)])
    by_picture = [(random_picture(n), [text]) for n, captions in enumerate(CAPTIONS) for text in captions]
    by_turns = sorted(by_picture, key=lambda sample: sample[1])  # rows of one picture need not follow each other
    expected = evaluate_retrieval(encoder, lists)
    assert (expected["n"], expected["num_rows"], expected["num_texts"]) == (7, 7, 11)
    assert 0 < expected["text_to_image_recall@5"] < 1
    for rows in (by_picture, by_turns):
        found = evaluate_retrieval(encoder, ImageSet(rows))
        assert found == expected | {"num_rows": 12}


def test_rows_of_shards_are_grouped_and_kept_features_too(encoder, tmp_path):
    rows = [(n, text) for n, captions in enumerate(CAPTIONS) for text in captions]
    samples = {f"s{k:02}": {"png": encode_image(random_picture(n)), "txt": text.encode()} for k, (n, text) in enumerate(rows)}
    (tmp_path / "rows").mkdir()
    write_shard(tmp_path / "rows" / "0.tar", samples)
    expected = evaluate_retrieval(encoder, ImageSet([(random_picture(n), texts) for n, texts in enumerate(CAPTIONS)]))
    ((_, record),) = run_evaluations(encoder, find_evaluations(str(tmp_path / "rows" / "0.tar"), Request("retrieval")))
    assert {key: record[key] for key in expected} == expected | {"num_rows": 12}
    kept = [
        Encoder(encoder.model, encoder.processor, batch_size=3, cache_dir=tmp_path / "kept")
        for _ in range(2)  # the second reads the features that the first has kept
    ]
    images = ImageSet([(random_picture(n), [text]) for n, text in rows], fingerprint="rows")
    assert [evaluate_retrieval(one, images) for one in kept] == [expected | {"num_rows": 12}] * 2


@pytest.mark.parametrize(
    ("captions", "metrics"),
    [
        ([["a", "b", "c"]], []),
        ([["a"], ["b"]], ["image_to_text_recall@1", "text_to_image_recall@1"]),
        ([["a", "b", "c"], ["d", "e", "f"]], ["image_to_text_recall@1", "text_to_image_recall@1"]),
        ([["a"]] * 3, []),  # one text that belongs to all pictures
        ([["x"], ["b", "c", "d", "e", "f"]], ["image_to_text_recall@1", "image_to_text_recall@5", "text_to_image_recall@1"]),
    ],
)
def test_what_no_model_could_miss_is_left_out(captions, metrics, encoder):
    record = evaluate_retrieval(encoder, ImageSet([(random_picture(n), texts) for n, texts in enumerate(captions)]))
    assert [key for key in record if "recall" in key] == metrics
    assert ("too few pictures for a metric" in numbers_of(record)) == (not metrics)


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({}, "(n = 30)"),
        ({"num_undecodable": 0}, "(n = 30)"),
        ({"num_undecodable": 10}, "(n = 30, 10 unreadable pictures left out)"),
        (
            {"num_undecodable": 1, "num_train_undecodable": 4},
            "1 unreadable pictures left out, 4 unreadable training pictures left",
        ),
    ],
)
def test_what_was_left_out_is_said(counts, said):
    assert said in numbers_of({"top1": 0.5, "n": 30} | counts)
