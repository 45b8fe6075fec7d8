"""The two towers of a model: which weights are whose, and a tower that stays as it is."""

from torch import nn

# The parts of each tower, where a family has them: SigLIP has no projections.
PARTS = {"vision": ("vision_model", "visual_projection"), "text": ("text_model", "text_projection")}


def tower_of(weight: str) -> str:
    """`vision` or `text`, by the name of a weight; `""` for what is of neither, such as the logit scale."""
    part = weight.partition(".")[0]
    return next((tower for tower, parts in PARTS.items() if part in parts), "")


def freeze(model: nn.Module, tower: str) -> list[nn.Module]:
    """Let no weight of a tower ask for a gradient, and return its parts. Of their forward pass autograd keeps nothing.

    Args:
        tower: `vision` or `text`; of another name nothing is frozen.
    """
    parts = [part for name, part in model.named_children() if name in PARTS.get(tower, ())]
    for part in parts:
        part.requires_grad_(False)
    return parts
