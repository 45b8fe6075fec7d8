"""Where a model lies that a command is given: a folder of one, of a run, or a Hub id."""

from pathlib import Path

from huggingface_hub import file_exists, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import httpx

from .errors import fail

NO_ANSWER = (OSError, httpx.HTTPError)  # of a Hub that is not reached; HF_HUB_OFFLINE is an OSError, too


def find_model(source: str) -> str:
    """The folder of the model that a run's folder holds: its export, or its last checkpoint where it has not ended.

    Raises:
        ConfigError: there is no such folder, or it holds no model. Or it may be a Hub id, and the Hub cannot be reached.
    """
    folder = Path(source).expanduser()
    if not folder.exists():
        if source.count("/") > 1 or source.startswith((".", "/", "~")) or source.endswith("/"):
            fail(f"{source}: no such folder")
        check_reachable(source, "config.json")
        return source
    if not folder.is_dir():
        fail(f"{source}: is a file, not the folder of a model")
    if (folder / "config.json").is_file():
        return str(folder)
    models = [*sorted(folder.glob("checkpoints/step-*[0-9]/config.json")), *folder.glob("export/config.json")]
    if not models:
        fail(f"{source}: holds no model, it has neither config.json nor export/ nor checkpoints/")
    return str(models[-1].parent)


def check_reachable(repo_id: str, file: str) -> None:
    """Raise a ConfigError at once for a file that is not kept here where the Hub is silent; loading would try for a minute."""
    try:
        if isinstance(try_to_load_from_cache(repo_id, file), str):
            return
        file_exists(repo_id, file)
    except HfHubHTTPError:
        return  # an answer; what it means is said where the file is loaded
    except HFValidationError:
        fail(f"{repo_id}: no such folder, and no Hub id, such as org/name")
    except NO_ANSWER as error:
        fail(f"{repo_id}: no such folder, nor kept here of the Hub, which cannot be asked ({type(error).__name__})")
