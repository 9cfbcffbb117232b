"""The likelihood of held-out text under a trained model: the command; the work is in `evaluation/likelihood.py`."""

import sys

from bd3lm_scale.evaluation.likelihood import main

if __name__ == "__main__":
    sys.exit(main())
