"""A run as a model repository: its files, and the push to the Hub."""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, file_exists, hf_hub_download
from huggingface_hub.utils import validate_repo_id

from ..errors import as_config_error, fail
from ..model_folder import NO_ANSWER
from .card import EXAMPLE, PICTURES, WEIGHTS, card_of_run, check_card
from .licenses import check_license

SIGNATURE = b"<!-- written by hf_maskclip, sha256 "


@dataclass
class ModelRepository:
    """The files of a run as they lie in its model repository: the export, its card, results and pictures.

    Args:
        run_dir: a run's folder, with `config.yaml`, `export/`, `eval.json`, and further `eval*.json`.
        repo_id: `org/name`.
        license: of the weights, as the Hub names it.

    Raises:
        ConfigError: the folder lacks a part of a run, or the name or the license is none of the Hub's.
    """

    run_dir: Path
    repo_id: str
    license: str = "apache-2.0"
    repo_type = "model"

    def __post_init__(self):
        if self.repo_id.count("/") != 1:
            fail(f"repository {self.repo_id!r}: must be in the form org/name")
        with as_config_error("repository", self.repo_id):
            validate_repo_id(self.repo_id)
        check_license(self.license)
        needed = ("config.yaml", "eval.json", f"export/{WEIGHTS}")
        if absent := [name for name in needed if not (self.run_dir / name).is_file()]:
            fail(f"{self.run_dir}: is no finished run, it has no {', '.join(absent)}")

    def files(self) -> dict[str, Path]:
        """The files but the card: path in the repository, path here."""
        export = {path.name: path for path in sorted((self.run_dir / "export").iterdir()) if path.is_file()}
        others = [*sorted(self.run_dir.glob("eval*.json")), *(self.run_dir / name for name in (*PICTURES, *EXAMPLE))]
        return export | {path.name: path for path in others if path.is_file()}

    def card(self) -> ModelCard:
        return card_of_run(self.run_dir, self.repo_id, self.license)

    def content(self) -> dict[str, bytes | Path]:
        """All files, the checked card first: path in the repository, and the file's bytes or its path here."""
        return dict(self._content)

    @cached_property
    def _content(self) -> dict[str, bytes | Path]:
        return {"README.md": _signed(str(check_card(self.card())))} | self.files()

    def has_edited_card(self) -> bool:
        """Whether the Hub has a card that somebody has changed, or has written, since it was pushed from here.

        Raises:
            ConfigError: the Hub cannot be asked, which is known at once.
        """
        try:
            if not file_exists(self.repo_id, "README.md"):
                return False
            text = Path(hf_hub_download(self.repo_id, "README.md")).read_bytes()
        except NO_ANSWER as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            fail(f"the Hub cannot be asked whether the card of {self.repo_id} was edited there ({why})")
        found = re.search(rb"\n" + SIGNATURE + rb"([0-9a-f]{64}) -->\n$", text)
        return found is None or hashlib.sha256(text[: found.start()]).hexdigest().encode() != found[1]

    def push(self, private: bool = True) -> "Pushed":
        """Create the repository where it is not there, and upload everything in one commit, but a card over an edited one."""
        content = self.content()
        if keeps_card := self.has_edited_card():
            del content["README.md"]
        return Pushed(upload(self.repo_id, content, private=private, repo_type=self.repo_type), keeps_card)


class Pushed(NamedTuple):
    """The address of what was pushed, and whether an edited card was kept there."""

    address: str
    keeps_card: bool = False


def _signed(card: str) -> bytes:
    """A card with its own hash at the end, by which a later push knows whether it was changed."""
    text = card.encode()
    return text + b"\n" + SIGNATURE + hashlib.sha256(text).hexdigest().encode() + b" -->\n"


def upload(
    repo_id: str, content: dict[str, bytes | Path], *, private: bool, repo_type: str, space_sdk: str | None = None
) -> str:
    """Create a repository where it is not there, and send it files in one commit. Returns its address."""
    api = HfApi()
    repo = api.create_repo(repo_id, private=private, exist_ok=True, repo_type=repo_type, space_sdk=space_sdk)
    api.create_commit(
        repo_id,
        operations=[CommitOperationAdd(name, source) for name, source in content.items()],
        commit_message="Upload from hf_maskclip",
        repo_type=repo_type,
    )
    return str(repo)
