"""`hf-maskclip evaluate`, under its name in a clone: `accelerate launch training/evaluate.py --model ... --suite ...`."""

import sys

del sys.path[0]  # this folder, in which this file would hide the package `evaluate`

from hf_maskclip.cli import main  # noqa: E402

sys.exit(main(["evaluate", *sys.argv[1:]]))
