"""The table of parameters is the network's: a model that differs from it does not start."""

from dataclasses import replace

import pytest

from bd3lm_scale.model import denoiser
from bd3lm_scale.model.parameters import Architecture, Parameter, parameters
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


LAYER = "decoder.layers.0."
BY_HAND = {
    # name -> (dimension cut, parts, what one rank's gradient covers, whether it decays)
    "embedding.weight": (0, (), "whole", True),
    "time_embedding.linear1.weight": (None, (), "whole", True),
    "time_embedding.linear1.bias": (None, (), "whole", False),
    "time_embedding.linear2.weight": (None, (), "whole", True),
    "time_embedding.linear2.bias": (None, (), "whole", False),
    f"{LAYER}input_layernorm.weight": (None, (), "positions", False),
    f"{LAYER}self_attention.linear_qkv.weight": (0, (), "whole", True),
    f"{LAYER}self_attention.linear_qkv.bias": (0, (), "whole", False),
    f"{LAYER}self_attention.q_layernorm.weight": (None, (), "heads", False),
    f"{LAYER}self_attention.k_layernorm.weight": (None, (), "heads", False),
    f"{LAYER}self_attention.linear_proj.weight": (1, (), "whole", True),
    f"{LAYER}pre_mlp_layernorm.weight": (None, (), "positions", False),
    f"{LAYER}mlp.linear_fc1.weight": (0, (12, 12), "whole", True),
    f"{LAYER}mlp.linear_fc1.bias": (0, (12, 12), "whole", False),
    f"{LAYER}mlp.linear_fc2.weight": (1, (), "whole", True),
    f"{LAYER}mlp.linear_fc2.bias": (None, (), "positions", False),
    f"{LAYER}modulation.weight": (None, (), "whole", True),
    f"{LAYER}modulation.bias": (None, (), "whole", False),
    "head.norm.weight": (None, (), "whole", False),
    "head.output.weight": (0, (), "whole", True),
    "head.output.bias": (0, (), "whole", False),
    "head.modulation.weight": (None, (), "whole", True),
    "head.modulation.bias": (None, (), "whole", False),
}


def test_cuts_shares_and_decay_are_those_written_by_hand():
    arch = Architecture(
        1, 8, 4, 4, 4, 10, mlp="swiglu", ffn_hidden_size=12, num_kv_heads=2, qk_norm=True, qkv_bias=True
    )
    found = {p.name: (p.shard_dim, p.parts, p.gradient, p.decays) for p in parameters(arch)}
    assert found == BY_HAND
    plain = {p.name: p for p in parameters(Architecture(1, 8, 4, 4, 4, 10))}
    assert plain[f"{LAYER}mlp.linear_fc1.weight"].parts == (), "without a gate the inner layer is cut as one"
    assert set(BY_HAND) - set(plain) == {n for n in BY_HAND if "q_layer" in n or "k_layer" in n or "qkv.bias" in n}
