"""The variance of the loss and of its gradient: `evaluate --variance` under a name of its own."""

import sys

from bd3lm_scale.evaluation.likelihood import main

if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--variance"]))
