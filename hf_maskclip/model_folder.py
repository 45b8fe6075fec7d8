"""Where a model lies that a command is given: a folder of one, of a run, or a Hub id."""

from pathlib import Path

from .errors import fail


def find_model(source: str) -> str:
    """The folder of the model that a run's folder holds: its export, or its last checkpoint where it has not ended.

    Raises:
        ConfigError: there is no such folder, or it holds no model.
    """
    folder = Path(source).expanduser()
    if not folder.exists():
        if source.count("/") > 1 or source.startswith((".", "/", "~")) or source.endswith("/"):
            fail(f"{source}: no such folder")
        return source
    if not folder.is_dir():
        fail(f"{source}: is a file, not the folder of a model")
    if (folder / "config.json").is_file():
        return str(folder)
    models = [*sorted(folder.glob("checkpoints/step-*[0-9]/config.json")), *folder.glob("export/config.json")]
    if not models:
        fail(f"{source}: holds no model, it has neither config.json nor export/ nor checkpoints/")
    return str(models[-1].parent)
