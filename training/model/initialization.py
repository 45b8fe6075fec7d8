"""The random weights that CLIP begins with, as in its authors' code (github.com/openai/CLIP) and in open_clip.

Transformers begins a `CLIPModel` with others: it swaps the sizes of attention's inputs and outputs, so that attention is nearly
uniform at first, and has smaller patch and position embeddings. A small model learns more slowly from these.
"""

from torch import nn
from transformers.models.clip.modeling_clip import CLIPEncoder

from hf_maskclip import MaskCLIPModel


def initialize_as_clip(model: MaskCLIPModel) -> None:
    """Draw the weights anew, in place: the text tower from normal distributions, the vision tower as PyTorch's layers begin.

    What Transformers draws alike stays: both projections, the class and token embeddings, norms, and the logit scale.
    """
    _initialize_text(model.text_model.encoder, model.config.text_config.hidden_size)
    nn.init.normal_(model.text_model.embeddings.position_embedding.weight, std=0.01)
    _initialize_vision(model.vision_model.encoder)
    embeddings = model.vision_model.embeddings
    embeddings.patch_embedding.reset_parameters()
    nn.init.normal_(embeddings.position_embedding.weight, std=model.config.vision_config.hidden_size**-0.5)


def _initialize_text(encoder: CLIPEncoder, width: int) -> None:
    std = width**-0.5
    residual_std = std * (2 * len(encoder.layers)) ** -0.5  # of what is added to the states, twice a layer
    for layer in encoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            nn.init.normal_(linear.weight, std=std)
        nn.init.normal_(attention.out_proj.weight, std=residual_std)
        mlp.fc1.reset_parameters()  # for its bias
        mlp.fc2.reset_parameters()
        nn.init.normal_(mlp.fc1.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(mlp.fc2.weight, std=residual_std)


def _initialize_vision(encoder: CLIPEncoder) -> None:
    for layer in encoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            # Xavier's for the three as one matrix (3 D, D), as `nn.MultiheadAttention` has them: sqrt(6 / (D + 3 D)).
            nn.init.xavier_uniform_(linear.weight, gain=0.5**0.5)
        attention.out_proj.reset_parameters()
        nn.init.zeros_(attention.out_proj.bias)
        mlp.fc1.reset_parameters()
        mlp.fc2.reset_parameters()
