"""What all MaskCLIP classes share: a patch mask, CLIP's initial weights, and loading that is complete or fails."""

from typing import Any

from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.utils import logging

from .attention import DEFAULT_ATTENTION
from .patch_mask_registry import PatchMaskSpec
from .towers import find_family, known_families

logger = logging.get_logger(__name__)

# Transformers strips the `vision_model.` prefix of CLIP checkpoints by the name of the class: without this line a subclass
# under another name would start from random weights.
register_checkpoint_conversion_mapping(
    "MaskCLIPVisionModel", get_checkpoint_conversion_mapping("CLIPVisionModel"), overwrite=True
)

# What a checkpoint of a whole CLIP holds beyond its vision tower; the vision classes leave it aside without a report.
TEXT_KEYS = [r"^text_model", r"^text_projection", r"^logit_scale"]

# Model types of checkpoints whose vision tower is CLIP's: with a text tower that is CLIP's, with another one, and with none.
WHOLE_CLIP = ("clip", "maskclip", "clipseg", "metaclip_2")
OTHER_TEXTS = ("chinese_clip", "altclip")
TOWER_ALONE = (
    *("clip_vision_model", "maskclip_vision_model", "clipseg_vision_model"),
    *("chinese_clip_vision_model", "metaclip_2_vision_model"),
)
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class MaskCLIPPreTrainedMixin:
    """What all MaskCLIP classes share: a patch mask, CLIP's initial weights, and loading that is complete or fails."""

    # The model types of checkpoints that have the class's weights.
    _checkpoint_types: tuple[str, ...] = (*WHOLE_CLIP, "chinese_clip", *TOWER_ALONE)
    # Weights that a checkpoint may lack: heads that fine-tuning adds.
    _new_weights_allowed: tuple[str, ...] = ()
    # Modules that are in the checkpoint and have no part in the loss. Trainable, their gradients would be waited for by DDP.
    _frozen_modules: tuple[str, ...] = ()

    def post_init(self) -> None:
        super().post_init()
        self._freeze_modules()

    def _freeze_modules(self) -> None:
        for name in self._frozen_modules:
            self.get_submodule(name).requires_grad_(False)

    @classmethod
    def is_custom_code(cls) -> bool:
        # For classes from outside, Transformers skips `_init_weights` on modules without parameters of their own. CLIP sets the
        # weights of its attention and MLP layers from just there, so they would start with another variance than CLIP's.
        return False

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        return super().get_correct_attn_implementation(requested_attention or DEFAULT_ATTENTION, is_init_check)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        patch_mask: PatchMaskSpec | None = None,
        output_loading_info: bool = False,
        **kwargs,
    ):
        """As `PreTrainedModel.from_pretrained`, for MaskCLIP and CLIP checkpoints.

        Args:
            patch_mask: a name, a dict or a mask; by default the one that the checkpoint records. A checkpoint that records
                none, and is given none here, trains on whole images, which is logged once.

        Raises:
            ValueError: a checkpoint of another type, or one that lacks weights of this class; the message names the first of
                them. Or no such mask.
        """
        saved = cls._check_checkpoint(pretrained_model_name_or_path, **kwargs)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        missing = sorted(key for key in info["missing_keys"] if not key.startswith(cls._new_weights_allowed or "\0"))
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path}: has no weights for {len(missing)} tensors of {cls.__name__}, "
                f"such as {missing[0]!r}; it was saved as {', '.join(saved.get('architectures') or ['another class'])}"
            )
        model._freeze_modules()  # loading has made new parameters
        if patch_mask is not None:
            model.set_patch_mask(patch_mask)
        elif model.patch_mask.keeps_all:
            logger.warning_once(
                f"{cls.__name__} without a patch mask: it trains on whole images. Give one by patch_mask=..., such as 'pgs',"
                " or patch_mask='none' if that is meant."
            )
        return (model, info) if output_loading_info else model

    @classmethod
    def _check_checkpoint(cls, source, **kwargs) -> dict[str, Any]:
        """The configuration of a checkpoint, as it is saved. Raises ValueError for a type that this class cannot load.

        It is read before the weights: a report of hundreds of them that do not fit says less.
        """
        config = kwargs.get("config")
        if isinstance(config, PreTrainedConfig):
            saved = config.to_dict()
        else:
            options = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
            try:
                saved, _ = PreTrainedConfig.get_config_dict(config or source, **options)
            except OSError:
                return {}  # Transformers says what is missing, or finds the base of an adapter
        found = saved.get("model_type")
        if found and found not in (*cls._checkpoint_types, cls.config_class.model_type):
            classes = MaskCLIPPreTrainedMixin.__subclasses__()
            loads = [other.__name__ for other in classes if found in other._checkpoint_types]
            if find_family(found):
                loads.insert(0, f"add_patch_mask(AutoModel.from_pretrained({str(source)!r}), ...)")
            if loads:
                raise ValueError(f"{source}: is a {found!r}, which {cls.__name__} cannot load; use {' or '.join(loads)}")
            raise ValueError(f"{source}: is a {found!r}, which takes no patch mask; there are masks for {known_families()}")
        return saved
