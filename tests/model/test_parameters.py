"""The table of parameters is the network's: a model that differs from it does not start."""

from dataclasses import replace

import pytest

from bd3lm_scale.model import denoiser
from bd3lm_scale.model.parameters import Parameter, parameters
from bd3lm_scale.parallel.mesh import shutdown
from bd3lm_scale.parallel.shards import description_of
from tests.model.test_fast_decoder import build


@pytest.fixture(autouse=True, scope="module")
def _leave_groups():
    yield
    shutdown()


def changed(table: tuple[Parameter, ...]) -> list[Parameter]:
    """One parameter less, one more, one of another shape."""
    kept = [p for p in table if p.name != "decoder.layers.1.mlp.linear_fc2.bias"]
    wider = [replace(p, shape=(65,)) if p.name == "head.norm.weight" else p for p in kept]
    return [*wider, Parameter("decoder.layers.0.gate.weight", (4, 4), "blocks.0.gate.weight", layer=0)]


def test_a_network_that_differs_from_the_table_is_refused_with_the_names(monkeypatch):
    build()
    monkeypatch.setattr(denoiser, "parameters", lambda arch: changed(parameters(arch)))
    with pytest.raises(ValueError, match="differ; correct one of them") as error:
        build()
    for line in (
        "decoder.layers.0.gate.weight is in the table, not in the model",
        "decoder.layers.1.mlp.linear_fc2.bias is in the model, not in the table",
        "head.norm.weight is (64,) in the model, (65,) in the table",
    ):
        assert line in str(error.value)


def test_every_parameter_knows_its_description():
    model = build()
    table = {p.name: p for p in parameters(model.config.architecture)}
    found = dict(denoiser.named_parameters([model]))
    assert found.keys() == table.keys()
    assert all(description_of(found[name]) is table[name] for name in table)
