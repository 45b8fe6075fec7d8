"""The demo of a model as a Space of the Hub: its front matter, an app.py, and this package, which is read from beside it."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from huggingface_hub import SpaceCard, SpaceCardData

from .. import __version__
from ..errors import fail
from .repository import Pushed, upload

PACKAGE = Path(__file__).parents[1]
PACKAGE_FILES = (".py", ".json", ".md", ".css")
APP = '''"""The demo of {repo_id}; hf_maskclip lies beside this file."""

from hf_maskclip.demo import build_demo

demo = build_demo("{repo_id}")

if __name__ == "__main__":
    demo.launch()
'''
TEXT = """
The masks of hf_maskclip with sliders, and the zero-shot scores of `{repo_id}` as patches go.

The folder `hf_maskclip/` is the package, version {version}, as it was where this Space was pushed from. While the model is
private, the Space needs a token that may read it, as the secret `HF_TOKEN`.
"""


@dataclass
class SpaceRepository:
    """The files of a Space that shows the demo of a model on the Hub. It carries this package, which no index has.

    Args:
        repo_id: `org/name` of the model, which is the Space's too.
    """

    repo_id: str
    repo_type = "space"

    def content(self) -> dict[str, bytes | Path]:
        """All files: path in the repository, and the file's bytes or its path here."""
        written = {
            "README.md": str(self.card()),
            "app.py": APP.format(repo_id=self.repo_id),
            "requirements.txt": requirements(),
        }
        files = sorted(path for path in PACKAGE.rglob("*") if path.suffix in PACKAGE_FILES)
        package = {path.relative_to(PACKAGE.parent).as_posix(): path for path in files}
        return {name: text.encode() for name, text in written.items()} | package

    def card(self) -> SpaceCard:
        """README.md, whose front matter says how the Hub runs the Space."""
        try:
            gradio = version("gradio")
        except PackageNotFoundError:
            fail('push --space: needs Gradio, whose version it records: pip install "hf_maskclip[demo]"')
        data = SpaceCardData(
            title=self.repo_id.split("/")[1],
            sdk="gradio",
            sdk_version=gradio,
            app_file="app.py",
            license="apache-2.0",
            models=[self.repo_id],
            tags=["clip", "hf_maskclip"],
            short_description="Patch masks, and zero-shot scores as patches go",
        )
        return SpaceCard(f"---\n{data}\n---\n{TEXT.format(repo_id=self.repo_id, version=__version__)}")

    def push(self, private: bool = True) -> Pushed:
        """Create the Space where it is not there, and upload everything in one commit."""
        return Pushed(upload(self.repo_id, self.content(), private=private, repo_type=self.repo_type, space_sdk="gradio"))


def requirements() -> str:
    """requirements.txt: what the package needs without its extras. Gradio is there by the front matter's `sdk_version`."""
    return "".join(f"{line}\n" for line in requires("hf_maskclip") if "extra ==" not in line)
