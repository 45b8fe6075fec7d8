"""Where the options of tuning have their effects; the table of test_options.py has them as its rows."""

import pytest
from option_effects import Effects

from training.run import Run


def freeze(on: Effects):
    def trained(run: Run) -> set[str]:
        return {name.partition(".")[0] for name, weight in run.learner.model.named_parameters() if weight.requires_grad}

    assert trained(on.prepared(model=on.base(), freeze="text")) == {"vision_model", "visual_projection", "logit_scale"}


def lora_rank(on: Effects):
    pytest.importorskip("peft", reason="peft is of the test extra")
    model = on.prepared(model=on.base(), lora_rank=3).learner.model
    ranks = {len(weight) for name, weight in model.named_parameters() if "lora_A" in name}
    assert ranks == {3}


def interpolate_weights(on: Effects):
    run = on.prepared(model=on.base(), interpolate_weights=0.25)
    first = run.learner.model.logit_scale.item()
    run.learner.model.logit_scale.data += 1
    assert run.learner.result().logit_scale.item() == pytest.approx(first + 0.25)


def rates_of_towers(run: Run) -> dict[str, float]:
    groups = run.learner.parallel.optimizer.param_groups
    return {group["tower"]: rate for group, rate in zip(groups, run.learner.schedule.get_last_lr(), strict=True)}


def learning_rate_vision(on: Effects):
    rates = rates_of_towers(on.prepared(learning_rate=0.5, learning_rate_vision=0.25, warmup_steps=0))
    assert rates == {"": 0.5, "vision": 0.25, "text": 0.5}


def learning_rate_text(on: Effects):
    rates = rates_of_towers(on.prepared(learning_rate=0.5, learning_rate_text=0.25, warmup_steps=0))
    assert rates == {"": 0.5, "vision": 0.5, "text": 0.25}
