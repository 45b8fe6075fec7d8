"""Which precision a device computes fastest in."""

import re
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
# CPUs that multiply bf16 in hardware: x86 by matrix units or AVX-512, and Arm. Others emulate it, slower than float32.
BF16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}


def fastest_precision() -> str:
    """`bf16` where the accelerator, or without one the CPU, multiplies it in hardware; else `no`, which is float32."""
    import torch  # here, so that the options' help does not wait for it

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if torch.accelerator.is_available():
        return "bf16"
    return "bf16" if BF16_FLAGS & cpu_flags() else "no"


def cpu_flags() -> set[str]:
    """What Linux says that the first CPU can do; nothing elsewhere."""
    if not CPU_INFO.is_file():
        return set()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", CPU_INFO.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return set(found[1].split()) if found else set()
