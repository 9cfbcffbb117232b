"""Tasks of the lm-evaluation-harness: the command; the work is in `evaluation/harness.py`."""

import sys

if __name__ == "__main__":
    try:
        from bd3lm_scale.evaluation.harness import main
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        sys.exit("the lm-evaluation-harness is not installed; use: pip install 'bd3lm_scale[eval]'")
    sys.exit(main())
