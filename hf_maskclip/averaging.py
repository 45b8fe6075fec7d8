"""Moving averages of weights, of which the device is never waited for."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


class MovingAverage(AveragedModel):
    """An exponential moving average of a model's weights, which starts at theirs; `module` is a model of the averages.

    PyTorch's own update looks at how often it was called before, which lies on the device.

    Args:
        momentum: the share of itself that the average keeps at an update, in [0, 1].
    """

    def __init__(self, model: nn.Module, momentum: float):
        super().__init__(model)
        self.momentum = momentum

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Let the average follow the weights of a model on its device."""
        torch._foreach_lerp_([*self.module.parameters()], [*model.parameters()], 1 - self.momentum)
        for ours, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)
        self.n_averaged += 1
