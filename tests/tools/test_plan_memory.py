"""The planner's activation memory is what autograd saves, traffic is what the rings send."""

import pytest
import torch

from bd3lm_scale.config import sizes
from bd3lm_scale.config.load import load_config
from bd3lm_scale.config.sizes import count_on_rank
from bd3lm_scale.config.traffic import BETWEEN, INSIDE, traffic
from bd3lm_scale.model import attention
from bd3lm_scale.parallel.mesh import shutdown
from tests.variants import overrides
from tools.benchmarks.plan import SMALL, layer_bytes

TINY = [*SMALL, "data.context_length=64", "model.hidden_size=64", "model.cond_dim=16"]
NETWORKS = {
    "dit": [],
    "decoder": overrides("decoder"),
    "mixed": overrides("mixed"),
    "mdlm": ["diffusion.objective=mdlm"],
    "ar": ["diffusion.objective=ar"],
    "several runs of queries": ["data.context_length=400"],
}


@pytest.fixture(autouse=True, scope="module")
def _leave_groups():
    yield
    shutdown()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_layers_activations_are_predicted(name, precision, recompute):
    settings = [f"precision={precision}", f"parallel.recompute={recompute}"]
    config = load_config("configs/demo.yaml", [*TINY, *NETWORKS[name], *settings])
    predicted, measured = layer_bytes(config)
    assert predicted == pytest.approx(measured, rel=0.03)


def test_runs_of_queries_are_as_long_as_attentions():
    assert sizes.CPU_QUERIES == attention._CHUNK
    assert torch.get_num_threads() > 0


def config_of(*settings):
    base = ["parallel.virtual_pipeline_parallel_size=null", "train.micro_batch_size=1", "train.global_batch_size=64"]
    return load_config("configs/owt_7b_tp4_pp4.yaml", [*base, *settings])


def test_gradients_go_round_the_ring_once_per_step_and_per_micro_batch_where_zero_cuts_them():
    flat = ["parallel.tensor_parallel_size=1", "parallel.pipeline_parallel_size=1", "parallel.sequence_parallel=false"]
    one, two, three, small = (
        traffic(config_of(*flat, *more), 16, 50258)
        for more in (
            ["optim.zero_stage=1"],
            ["optim.zero_stage=2"],
            ["optim.zero_stage=3"],
            ["optim.zero_stage=1", "optim.reduce_dtype=bf16"],
        )
    )
    weights, share, micro_batches = count_on_rank(config_of(*flat), 50258, 0), 15 / 16, 4
    assert one.data == share * weights * (2 * 4 + 2)
    assert small.data == share * weights * (2 * 2 + 2)
    assert two.data == share * weights * (2 * 4 * micro_batches + 2)
    assert three.data == share * weights * micro_batches * (2 * 2 + 4)
    assert (one.tensor, one.pipeline) == (0, 0)
    assert one.links["data"] == BETWEEN
    assert traffic(config_of(*flat), 8, 50258).links["data"] == INSIDE


def test_activations_travel_in_every_layer_and_between_stages():
    config = config_of("parallel.recompute=none", "optim.zero_stage=1")
    ends, middle = traffic(config, 64, 50258, 0), traffic(config, 64, 50258, 1)
    row, layers, micro_batches = config.sequence_length * config.model.hidden_size, config.model.num_layers / 4, 16
    assert ends.tensor == 4 * layers * micro_batches * 2 * 3 / 4 * row * 2
    assert ends.pipeline == micro_batches * row * 4 / (4 if config.parallel.sequence_parallel else 1)
    assert middle.pipeline == 2 * ends.pipeline
    assert middle.links == {"tensor": INSIDE, "data": BETWEEN, "pipeline": BETWEEN}
    assert traffic(config_of("parallel.recompute=full"), 64, 50258).tensor == 1.5 * ends.tensor
    assert middle.seconds(1e9, 1e8) == pytest.approx(middle.tensor / 1e9 + (middle.data + middle.pipeline) / 1e8)


def test_slow_links_between_nodes_change_what_is_suggested():
    """Where the network is slow, layouts that send less over it win; the plan says what is sent."""
    from dataclasses import replace

    from tools import plan_run

    config, gpu = config_of(), plan_run.GPUS["h100"]
    fast = plan_run.suggest(config, 64, 50258, replace(gpu, between_nodes=1e15, inside_node=1e15))
    slow_gpu = replace(gpu, between_nodes=1e8)
    slow = plan_run.suggest(config, 64, 50258, slow_gpu)
    assert plan_run.step_seconds(slow, 64, 50258, slow_gpu, 0.4) < plan_run.step_seconds(fast, 64, 50258, slow_gpu, 0.4)


def test_a_plan_warns_of_too_few_open_files(monkeypatch, capsys):
    from tools import plan_run

    arguments = ["configs/owt_7b_tp4_pp4.yaml", "--gpus", "1024", "--between-nodes", "25"]
    assert plan_run.main(arguments) == 0
    text = capsys.readouterr().out
    assert "traffic" in text
    assert "25 GB/s between nodes" in text
    monkeypatch.setattr(plan_run.resource, "getrlimit", lambda _: (1024, 1024))
    assert plan_run.main(arguments) == 0
    assert "WARNING: the hard limit here is 1,024" in capsys.readouterr().out
