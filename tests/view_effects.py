"""Where the options of views and of phases have their effects; the table of test_options.py has them as rows."""

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


def image_size(on: Effects):
    assert on.both(lambda run: next(iter(run.data.loader)).pixel_values.shape[2:], image_size=32) == ((64, 64), (32, 32))


def phases(on: Effects):
    _, steps, _ = on.run(phases=[{"share": 0.5, "image_size": 32}, {"share": 0.5}])
    assert [(record["phase"], record["image_size"]) for record in steps] == [(1, 32), (1, 32), (2, 64), (2, 64)]
