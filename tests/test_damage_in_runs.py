"""Proves that no damage of a picture ends a training or an evaluation, and that used and skipped samples add up to all."""

import json
import random

import pytest
from damages import FORMS, damaged_pictures, whole_picture
from helpers import write_shard

from hf_maskclip import export_to_clip
from hf_maskclip.data.decoding import decode_image
from hf_maskclip.data.pictures import SkippedSample
from hf_maskclip.evaluation import Request, evaluate, find_evaluations

BATCH_SIZE = 64


def is_readable(picture: bytes) -> bool:
    try:
        decode_image(picture)
    except SkippedSample:
        return False
    return True


@pytest.mark.slow
def test_a_run_and_an_evaluation_on_damaged_pictures_end_with_counts_that_add_up(run, make_model, processor, tmp_path):
    pictures = [(form, picture) for form in FORMS for picture in (*damaged_pictures(form), *[whole_picture(form)] * 100)]
    random.Random(0).shuffle(pictures)
    number_bad = sum(not is_readable(picture) for _, picture in pictures)
    number_good = len(pictures) - number_bad
    assert min(number_bad, number_good) > 200
    samples = {f"{n:04d}": {form.lower(): picture, "txt": f"no {n}".encode()} for n, (form, picture) in enumerate(pictures)}
    data = tmp_path / "damaged.tar"
    write_shard(data, samples)

    steps = number_good // BATCH_SIZE  # the whole batches of an epoch
    export_to_clip(make_model(), tmp_path / "model", processor)
    options = {"model": str(tmp_path / "model"), "max_steps": steps, "batch_size": BATCH_SIZE, "max_skipped_share": 1.0}
    summary, losses, folder = run(train_data=str(data), **options)
    assert len(losses) == steps
    assert summary["samples_seen"] == steps * BATCH_SIZE
    assert set(summary["skipped"]) <= {"image_undecodable", "image_too_large"}
    number_skipped = sum(summary["skipped"].values())
    assert 0.9 * number_bad < number_skipped <= number_bad  # a few are behind the last whole batch
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert sum(last["skipped"].values()) == number_skipped

    (retrieval,) = find_evaluations(str(data), Request("retrieval"))
    (record,) = evaluate(str(folder / "export"), [retrieval]).values()
    assert record["num_undecodable"] == number_bad
    assert record["num_rows"] == number_good
