"""What a GPU is asked to do in a micro-batch, counted without one: it cannot grow unseen."""

from pathlib import Path

from bd3lm_scale.config.flops import flops_per_token
from bd3lm_scale.config.load import load_config
from bd3lm_scale.parallel.mesh import shutdown
from tools.benchmarks.rehearse import VOCAB_SIZE, rehearse

CONFIG = Path(__file__).parents[2] / "configs" / "owt_110m_block16.yaml"


def test_a_micro_batch_of_the_110m_configuration_stays_within_its_budget():
    """Eager, 16 rows of 1,024 tokens; docs/benchmarks.md has the table."""
    config = load_config(CONFIG)
    try:
        counts = rehearse(config)
        without_dropout = rehearse(load_config(CONFIG, ["model.dropout=0"]))
    finally:
        shutdown()
    assert counts["kernels"] <= 1_790
    assert counts["gigabytes_moved"] <= 250
    assert counts["saved_gigabytes"] <= 17.2
    assert counts["largest_buffer_gigabytes"] <= 0.27, "no buffer holds the logits of all scored rows (1.8 GB)"
    assert counts["host_waits"] == 0
    # the products counted one by one, and those of the configuration: the head's are done again in the backward pass,
    # the last layer's clean queries are made and not used, and attention's backward pass recomputes its scores
    tokens = config.train.micro_batch_size * config.data.context_length
    assert 1 < counts["tflop"] * 1e12 / (flops_per_token(config, VOCAB_SIZE) * tokens) < 1.1
    assert counts["gigabytes_moved"] - without_dropout["gigabytes_moved"] > 10
    assert counts["tflop"] == without_dropout["tflop"]
