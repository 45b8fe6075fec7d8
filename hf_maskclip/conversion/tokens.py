"""Whether a tokenizer fits a text tower of CLIP, which pools a caption at its end token."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

LEGACY_END_TOKEN = 2  # of a text tower that Transformers pools at the highest id of a caption
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")


def lacks_tokenizer(name: str) -> bool:
    """Whether a name is a folder without tokenizer files, of which Transformers makes a tokenizer of two tokens."""
    folder = Path(name)
    return folder.is_dir() and not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern))


def ends_otherwise(tokenizer: PreTrainedTokenizerBase) -> str:
    """Why a tokenizer's captions cannot be pooled, whatever the text tower; empty where they can."""
    missing = [key for key in ("eos_token", "pad_token") if getattr(tokenizer, f"{key}_id") is None]
    if missing:
        return f"has no {' and no '.join(missing)}; CLIP pools a caption at its end token"
    token_ids = tokenizer("a dog")["input_ids"]
    if not token_ids or token_ids[-1] != tokenizer.eos_token_id:
        end = f"{tokenizer.eos_token_id} {str(tokenizer.eos_token)!r}"
        return f"does not end a caption with its end token {end}; CLIP pools a caption at it ('a dog' is {token_ids})"
    return ""


def misfit_of_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> str:
    """Why a text tower cannot take a tokenizer's ids, whatever it pools at; empty where it can."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocab_size:
        return f"its highest id is {highest}"
    return "" if tokenizer.pad_token_id is not None else "it has no pad_token, and captions of a batch differ in length"


def misfit(tokenizer: PreTrainedTokenizerBase, vocab_size: int, end_token: int, is_clip: bool = True) -> str:
    """Why a text tower cannot take a tokenizer; empty where it can. A vocabulary may be larger, which is how it is padded.

    Args:
        vocab_size: tokens that the text tower knows.
        end_token: that it pools at. To a CLIP, 2 is the highest of a caption.
        is_clip: the text tower is CLIP's own, not that of MetaCLIP 2.
    """
    if reason := misfit_of_vocabulary(tokenizer, vocab_size):
        return reason
    highest, end = max(tokenizer.get_vocab().values()), tokenizer.eos_token_id
    if end_token != LEGACY_END_TOKEN or not is_clip:
        return "" if end == end_token else "the text tower pools at another token than the captions end with"
    if end != highest:
        return f"with the end token {LEGACY_END_TOKEN} Transformers pools at a caption's highest id, not at {end}"
    return ""
