"""`python -m hf_maskclip` is `hf-maskclip`, also for several processes: `accelerate launch -m hf_maskclip evaluate ...`."""

import sys

from .cli import main

sys.exit(main())
