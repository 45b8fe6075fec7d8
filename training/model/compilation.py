"""Compiling the encoders of a model, such that lengths that differ from step to step are of one graph each."""

from collections.abc import Callable

from transformers import PreTrainedModel

from hf_maskclip.texts import family_of


def compile_encoders(model: PreTrainedModel, backend: str | Callable = "inductor") -> None:
    """Compile the layers of both towers in place: the keys of the weights stay.

    The vision tower marks the packed tokens, whose number differs. Captions differ in multiples of 8.
    """
    model.get_submodule("vision_model.encoder").compile(backend=backend)
    model.get_submodule(family_of(model.config).text_encoder).compile(backend=backend, dynamic=True)
