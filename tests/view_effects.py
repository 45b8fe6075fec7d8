"""Where the option of views has its effect; the table of test_options.py has it as a row."""

from option_effects import Effects, first_step

from training.run import Run


def views(on: Effects):
    def images_of_a_step(run: Run) -> int:
        seen = []
        run.learner.model.vision_model.register_forward_hook(
            lambda module, args, output: seen.append(len(output.pooler_output))
        )
        first_step(run)
        return seen[0]

    assert on.both(images_of_a_step, views="two") == (4, 8)
