"""Proves that only matrices decay and that a logit scale that is trained stays below its bound, as in CLIP."""

import torch

from hf_maskclip import MaskCLIPModel
from hf_maskclip.losses import MAX_LOGIT_SCALE, clamp_logit_scale
from training.model.optimization import parameter_groups


def test_only_matrices_decay(make_model):
    model = make_model()
    groups = parameter_groups(model, 0.2)
    decayed, rest = ([p for g in groups if g["weight_decay"] == decay for p in g["params"]] for decay in (0.2, 0.0))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(parameter.ndim >= 2 for parameter in decayed)
    assert len(decayed) + len(rest) == len(names)
    kept = {names[id(parameter)].split(".")[-1] for parameter in rest if parameter.ndim < 2}
    assert kept == {"bias", "weight", "logit_scale", "class_embedding"}  # one-dimensional weights are those of norms
    assert not any("embedding" in names[id(parameter)] for parameter in decayed)


def test_the_logit_scale_stays_below_its_bound(run, data, tmp_path):
    _, _, folder = run(max_steps=1)
    model = MaskCLIPModel.from_pretrained(folder / "export")
    with torch.no_grad():
        model.logit_scale.fill_(MAX_LOGIT_SCALE + 1)
    for name in (folder / "export").iterdir():
        (tmp_path / "hot").mkdir(exist_ok=True)
        (tmp_path / "hot" / name.name).write_bytes(name.read_bytes())
    model.save_pretrained(tmp_path / "hot")
    _, steps, _ = run(model=str(tmp_path / "hot"), output_dir=str(tmp_path / "clamped"))
    assert steps[0]["logit_scale"] > 271  # that the first loss was taken with
    assert all(record["logit_scale"] <= 100.001 for record in steps[1:])


def test_a_frozen_logit_scale_stays_as_it_is(make_model):
    """OpenAI's CLIPs have 4.6052, which is a little above the bound."""
    model = make_model()
    for is_trained, expected in ((False, 4.6052), (True, MAX_LOGIT_SCALE)):
        model.logit_scale.requires_grad_(is_trained).data.fill_(4.6052)
        clamp_logit_scale(model)
        assert model.logit_scale.item() == torch.tensor(expected).item()
