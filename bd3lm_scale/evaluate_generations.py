"""Generative perplexity and diversity of samples: the command; the work is in `evaluation/generations.py`."""

import sys

from bd3lm_scale.evaluation.generations import main

if __name__ == "__main__":
    sys.exit(main())
