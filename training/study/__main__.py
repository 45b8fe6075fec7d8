"""`python -m training.study STUDY.yaml --output_dir FOLDER`, from a clone."""

import sys

from training.study.study import program

sys.exit(program(sys.argv[1:]))
