"""Proves of the command for whoever has a GPU: it refuses in one line where there is none; its checks pass on a CPU, and fail
where what they check is broken."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from hf_maskclip.models.packed_attention import Packing

BENCHMARKS = Path(__file__).resolve().parents[1] / "training" / "benchmarks"


@pytest.fixture
def checks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_checks

    return gpu_checks


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused_in_one_line():
    done = subprocess.run([sys.executable, BENCHMARKS / "gpu.py"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("device='cuda': PyTorch sees no GPU here")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["packed images, float32", "packed images, bf16", "masks as on a CPU", "chunks"])
def test_a_check_passes_on_a_cpu(name, checks, tmp_path):
    assert checks.CHECKS[name](checks.Setting("cpu", "tiny", tmp_path, 64))


@pytest.mark.slow
def test_a_check_fails_where_packed_images_are_mixed_up(checks, tmp_path, monkeypatch):
    check = partial(checks.packed_is_one_by_one, checks.Setting("cpu", "tiny", tmp_path, 64), "float32")
    assert "features differ by" in check()
    monkeypatch.setattr(Packing, "starts", property(lambda packing: packing.lengths.cumsum(dim=0) - packing.lengths + 1))
    with pytest.raises(checks.CheckFailed, match="^features differ by .* more than 0.001"):
        check()
