"""A checkpoint is opened under the layout asked for, whatever trained it."""

import pytest

from bd3lm_scale.config.checks import problems
from bd3lm_scale.config.load import from_dict
from bd3lm_scale.inference.loading import ONE_PROCESS

TRAINED = {
    "optim": {"zero_stage": 3},
    "parallel": {"tensor_parallel_size": 4, "sequence_parallel": True, "recompute": "full"},
    "train": {"compile": True},
}


@pytest.mark.parametrize("layout", [[], ["parallel.pipeline_parallel_size=2"], ["parallel.tensor_parallel_size=2"]])
def test_a_zero3_run_can_be_evaluated_in_any_layout(layout):
    """Also in stages, which training under ZeRO-3 cannot have."""
    config = from_dict({"run_dir": "unused", "data": {"path": "unused"}, **TRAINED}, [*ONE_PROCESS, *layout])
    assert problems(config, 2) == []
    assert not config.train.compile
