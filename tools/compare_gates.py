#!/usr/bin/env python3
"""Write a run's initial weights with adaLN's gates at 1 instead of 0: residual branches start open, as AR's do.

python tools/compare_gates.py CONFIG CHECKPOINT [a.b=c ...]        then train with train.init_from=CHECKPOINT
"""

import argparse
import sys

import torch

from bd3lm_scale.checkpoint.metadata import weights_meta
from bd3lm_scale.checkpoint.write import write_weights
from bd3lm_scale.config.load import load_config
from bd3lm_scale.data.stream import open_stream
from bd3lm_scale.engine import build_engine
from bd3lm_scale.model.denoiser import named_parameters
from bd3lm_scale.parallel.mesh import init_mesh, shutdown


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("checkpoint", help="folder to write")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    args = parser.parse_args(argv)
    config = load_config(args.config, args.overrides)
    stream = open_stream(config.data, config.seed, block_size=config.document_block)
    mesh = init_mesh(config.parallel, "cpu")
    engine = build_engine(config, mesh, stream.vocab_size, stream.mask_token_id, for_training=False)
    weights = dict(named_parameters(engine.chunks))
    with torch.no_grad():
        for name, parameter in weights.items():
            if name.startswith("decoder.") and name.endswith(".modulation.bias"):
                # shift, scale, gate of attention, then of the MLP
                parameter.view(2, 3, -1)[:, 2] = 1.0
    meta = weights_meta(config, stream.vocab_size, stream.mask_token_id, "initial weights with open gates")
    write_weights(args.checkpoint, [(name, "master", parameter) for name, parameter in weights.items()], meta)
    shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
