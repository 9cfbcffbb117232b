"""Perplexity on several prepared corpora: the command; the work is in `evaluation/corpora.py`."""

import sys

from bd3lm_scale.evaluation.corpora import main

if __name__ == "__main__":
    sys.exit(main())
