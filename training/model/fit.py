"""Whether model, tokenizer and image processor fit each other, found before a run starts."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hf_maskclip.conversion.tokens import TOKENIZER_FILES, ends_otherwise, lacks_tokenizer, misfit, misfit_of_vocabulary
from hf_maskclip.errors import fail
from hf_maskclip.texts import family_of

LOOKED_AT = 200  # captions of the run


def check_has_tokenizer(name: str) -> None:
    """Raise a ConfigError for a folder without tokenizer files, of which Transformers makes a tokenizer of two tokens."""
    if lacks_tokenizer(name):
        fail(f"tokenizer={name!r}: the folder has no tokenizer files ({', '.join(TOKENIZER_FILES)}); name one by --tokenizer")


def check_tokens(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise a ConfigError for a tokenizer without the tokens that CLIP's text tower needs, whatever its size."""
    if reason := ends_otherwise(tokenizer):
        fail(f"tokenizer={name!r}: {reason}")


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, name: str, config: PreTrainedConfig, model: str, captions: Iterable[str]
) -> None:
    """Raise a ConfigError for a tokenizer that does not fit a text tower or tells nothing of captions apart.

    Args:
        name, model: what messages call the two.
        config: of the whole model.
        captions: of the run; the first `LOOKED_AT` of them are looked at.
    """
    text: Any = config.text_config
    sizes = (
        f"tokenizer={name!r} ({len(tokenizer)} tokens, end token {_end_of(tokenizer)}) does not fit "
        f"model={model!r} (vocabulary of {text.vocab_size}, end token {text.eos_token_id})"
    )
    family = family_of(config)
    if family.pools_at_end:
        check_tokens(tokenizer, name)
        reason = misfit(tokenizer, text.vocab_size, text.eos_token_id, family.model_type == "clip")
    else:
        reason = misfit_of_vocabulary(tokenizer, text.vocab_size)
    if reason:
        fail(f"{sizes}: {reason}")
    _check_captions(tokenizer, sizes, captions)


def _check_captions(tokenizer: PreTrainedTokenizerBase, sizes: str, captions: Iterable[str]) -> None:
    """Of captions that differ in more than case, more than half must differ in known tokens."""
    special = set(tokenizer.all_special_ids)
    texts = {" ".join(caption.casefold().split()) for caption in islice(captions, LOOKED_AT)}
    tokens = {tuple(i for i in tokenizer(text, verbose=False)["input_ids"] if i not in special) for text in sorted(texts)}
    if texts and (tokens == {()} or (len(texts) > 1 and len(tokens) <= len(texts) / 2)):
        known = 0 if tokens == {()} else len(tokens)
        fail(
            f"{sizes}: of {len(texts)} captions it tells {known} apart; a folder without tokenizer files gives such a one, "
            "name another by --tokenizer"
        )


def _end_of(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"{tokenizer.eos_token_id} {str(tokenizer.eos_token)!r}"


def check_image_processor(image_processor: Any, vision: Any, model: str) -> None:
    """Raise a ConfigError for a processor whose pictures the vision tower does not take."""
    if vision.num_channels != 3:
        fail(f"model={model!r}: its vision tower takes {vision.num_channels} channels; training reads pictures of 3")
    options: dict[str, Any] = image_processor.to_dict()
    if "max_num_patches" in options:  # NaFlex: pictures of any shape
        if options["patch_size"] != vision.patch_size:
            found, needed = options["patch_size"], vision.patch_size
            fail(f"model={model!r}: its image processor cuts patches of {found} pixels, its vision tower takes {needed}")
        return
    size = options["crop_size"] if options.get("do_center_crop") else options["size"]
    found = (size.get("height"), size.get("width"))
    if found != (vision.image_size, vision.image_size):
        is_square = None not in found
        gives = f"{found[0]} x {found[1]} pixels" if is_square else f"pictures of any shape ({dict(size)})"
        fail(
            f"model={model!r}: its image processor gives {gives}, its vision tower takes "
            f"{vision.image_size} x {vision.image_size}: change preprocessor_config.json or config.json"
        )


def check_is_no_run(model: str) -> None:
    """Raise a ConfigError for the folder of a run in the place of its export."""
    folder = Path(model)
    if not (folder / "config.yaml").is_file() or (folder / "config.json").exists():
        return
    checkpoints = sorted(path for path in folder.glob("checkpoints/step-*") if path.suffix != ".partial")
    models = [folder / "export"] if (folder / "export").is_dir() else checkpoints[-1:]
    where = f"its model is {models[0]}" if models else "it has no export and no checkpoint yet"
    fail(f"model={model!r}: is the folder of a run; {where}")
