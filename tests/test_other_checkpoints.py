"""Proves what becomes of checkpoints of other classes: those whose image encoder is CLIP's load exactly, all others are refused
in one line that says what they are and, where there is one, which class loads them."""

import pytest
import torch
from model_classes import ALL_CLASSES
from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    BertConfig,
    BertModel,
    BlipConfig,
    BlipModel,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPSegConfig,
    CLIPSegModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    MetaClip2Config,
    MetaClip2Model,
    MetaClip2VisionConfig,
    MetaClip2VisionModel,
    OwlViTConfig,
    OwlViTModel,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTModel,
    XCLIPConfig,
    XCLIPModel,
)

from hf_maskclip import (
    MaskCLIPForImageClassification,
    MaskCLIPModel,
    MaskCLIPVisionModel,
    MaskCLIPVisionModelWithProjection,
)

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = TOWER | {"vocab_size": 100, "max_position_embeddings": 16, "bos_token_id": 98, "eos_token_id": 99, "projection_dim": 24}
VISION = TOWER | {"image_size": 32, "patch_size": 8, "projection_dim": 24}
WORDS = TOWER | {"vocab_size": 100}
MIT = {"mit_hidden_size": 32, "mit_num_attention_heads": 2, "mit_intermediate_size": 64, "mit_num_hidden_layers": 1}
VISION_ONLY = (MaskCLIPVisionModel, MaskCLIPVisionModelWithProjection)


def whole(config_class, text=TEXT, **more):
    return config_class(text_config=text, vision_config=VISION | more, projection_dim=24)


# What makes a checkpoint, and the classes that load it.
CHECKPOINTS = {
    "clip": (lambda: CLIPModel(whole(CLIPConfig)), ALL_CLASSES),
    "clip vision": (lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)), [MaskCLIPVisionModel]),
    "clip vision with projection": (lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)), VISION_ONLY),
    "clip classifier": (
        lambda: CLIPForImageClassification(whole(CLIPConfig)),
        [MaskCLIPVisionModel, MaskCLIPForImageClassification],
    ),
    "clip text": (lambda: CLIPTextModel(CLIPTextConfig(**TEXT)), []),
    "clipseg": (lambda: CLIPSegModel(whole(CLIPSegConfig)), ALL_CLASSES),
    "metaclip_2": (lambda: MetaClip2Model(whole(MetaClip2Config)), ALL_CLASSES),
    "metaclip_2 with end token 2": (
        lambda: MetaClip2Model(whole(MetaClip2Config, TEXT | {"eos_token_id": 2})),
        [*VISION_ONLY, MaskCLIPForImageClassification],
    ),
    "metaclip_2 vision": (lambda: MetaClip2VisionModel(MetaClip2VisionConfig(**VISION)), [MaskCLIPVisionModel]),
    "chinese_clip": (
        lambda: ChineseCLIPModel(whole(ChineseCLIPConfig, WORDS)),
        [*VISION_ONLY, MaskCLIPForImageClassification],
    ),
    "altclip": (lambda: AltCLIPModel(whole(AltCLIPConfig, WORDS)), [MaskCLIPForImageClassification]),
    "bert": (lambda: BertModel(BertConfig(**WORDS)), []),
    "siglip": (lambda: SiglipModel(SiglipConfig(text_config=WORDS, vision_config=VISION)), []),
    "blip": (lambda: BlipModel(BlipConfig(text_config=WORDS | {"encoder_hidden_size": 32}, vision_config=VISION)), []),
    "owlvit": (lambda: OwlViTModel(OwlViTConfig(text_config=WORDS, vision_config=VISION)), []),
    "xclip": (lambda: XCLIPModel(whole(XCLIPConfig, **MIT)), []),
    "vit": (lambda: ViTModel(ViTConfig(**TOWER, image_size=32, patch_size=8)), []),
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**TOWER, image_size=32, patch_size=8)), []),
}
ROWS = [(name, kind) for name in CHECKPOINTS for kind in ALL_CLASSES]


def pooled(model, pixel_values: torch.Tensor) -> torch.Tensor:
    vision = getattr(model, "vision_model", model)  # a whole CLIP has one, a vision tower is one
    with torch.no_grad():
        return vision.eval()(pixel_values).pooler_output


@pytest.mark.parametrize(("name", "kind"), ROWS, ids=[f"{name}-{kind.__name__}" for name, kind in ROWS])
def test_a_checkpoint_of_another_class_loads_exactly_or_is_refused_in_one_line(name, kind, tmp_path):
    make, loading = CHECKPOINTS[name]
    torch.manual_seed(0)
    source = make()
    source.save_pretrained(tmp_path)
    if kind in loading:
        pixel_values = torch.randn(2, 3, 32, 32)
        model = kind.from_pretrained(tmp_path, patch_mask="random")
        assert torch.equal(pooled(model, pixel_values), pooled(source, pixel_values))
        return
    with pytest.raises(ValueError) as error:
        kind.from_pretrained(tmp_path)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{tmp_path}: ")
    assert f"'{source.config.model_type}'" in message or f"it was saved as {type(source).__name__}" in message
    if loading and "no weights for" not in message:
        names = ["add_patch_mask(AutoModel.from_pretrained(", *(other.__name__ for other in loading)]
        assert any(name in message.partition("; ")[2] for name in names)


def test_the_texts_of_metaclip_2_are_those_of_its_own_class(tmp_path):
    torch.manual_seed(0)
    source = MetaClip2Model(whole(MetaClip2Config)).eval()
    source.save_pretrained(tmp_path)
    input_ids = torch.tensor([[98, 5, 7, 99, 99], [98, 5, 99, 0, 0]])
    with torch.no_grad():
        expected = source.get_text_features(input_ids).pooler_output
        found = MaskCLIPModel.from_pretrained(tmp_path, patch_mask="none").get_text_features(input_ids).pooler_output
    assert torch.equal(found, expected)


def test_a_configuration_that_is_given_is_looked_at_instead_of_the_folders(tmp_path):
    CLIPModel(whole(CLIPConfig)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a 'bert', which takes no patch mask"):
        MaskCLIPModel.from_pretrained(tmp_path, config=BertConfig())


def test_an_empty_folder_is_said_by_transformers(tmp_path):
    with pytest.raises(OSError, match="no file named model.safetensors"):
        MaskCLIPModel.from_pretrained(tmp_path)
