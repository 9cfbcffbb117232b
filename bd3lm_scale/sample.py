"""Text from a trained model: the command; the work is in `inference/sampling.py`."""

import sys

from bd3lm_scale.inference.sampling import main

if __name__ == "__main__":
    sys.exit(main())
