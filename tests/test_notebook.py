"""Proves that the notebook runs from its first cell to its last, without a network, and stands in git as it was run."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoModel, CLIPModel

from hf_maskclip import MaskCLIPConfig, MaskCLIPModel, export_to_clip

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "mask_an_existing_clip.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_the_notebook_runs_on_an_export(config_parts, processor, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    parts = config_parts()
    parts["text_config"]["max_position_embeddings"] = 128  # its captions are long for the tests' small vocabulary
    export_to_clip(MaskCLIPModel(MaskCLIPConfig(**parts)), "runs/quickstart/export", processor)
    names: dict = {}
    for cell in CODE:
        exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), names)
    printed = capsys.readouterr().out
    assert "visible patches of each picture: [" in printed
    assert "step 20: loss" in printed
    assert printed.count("%  ") == 4
    assert type(AutoModel.from_pretrained("runs/notebook/export")) is CLIPModel


def test_the_notebook_was_run_in_order_and_names_no_machine():
    assert len(CODE) > 5
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output["output_type"] == "error" for output in outputs)
    texts = [line for cell in CELLS for line in cell["source"]]
    texts += [line for output in outputs for line in (*output.get("text", []), *output.get("data", {}).get("text/plain", []))]
    assert any("visible patches of each picture" in text for text in texts)
    assert [text for text in texts if re.search(r"(?<![\w.:/])/\w+/", text)] == []  # no path from a machine's root
