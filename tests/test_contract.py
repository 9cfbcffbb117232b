"""Every private name of DeepSpeed, Megatron and torch that we lean on, and what for: an upgrade that drops one says so.

The names are checked on live objects (each ZeRO stage, each precision), in the libraries' own text where our CPU shim
rebinds them, and the list is complete: a test reads our modules and finds no name that is not on it.
"""

import ast
import inspect
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_block import TransformerBlock
from torch.distributed import distributed_c10d

from bd3lm_scale.config.load import load_config
from bd3lm_scale.engine import Engine, build_engine
from bd3lm_scale.optim import zero
from bd3lm_scale.parallel import cpu_shim
from bd3lm_scale.parallel.mesh import init_mesh, shutdown
from bd3lm_scale.runtime.anomaly import AnomalyPolicy
from bd3lm_scale.training.step import noise_step, train_step
from bd3lm_scale.values import Interval, Rows

TINY = [
    "data.context_length=16", "diffusion.block_size=4", "model.num_layers=1", "model.hidden_size=32",
    "model.num_heads=2", "model.cond_dim=8", "train.global_batch_size=2", "train.micro_batch_size=2",
    "runtime.device=cpu", "data.path=unused",
]  # fmt: skip
KINDS = {
    "zero1": ["precision=fp32"],
    "zero1 bf16": ["precision=bf16"],
    "zero2": ["precision=fp32", "optim.zero_stage=2"],
    "zero3": ["precision=fp32", "optim.zero_stage=3"],
}
PLAIN, BF16, THREE, ALL = ("zero1", "zero2"), ("zero1 bf16",), ("zero3",), tuple(KINDS)

# name on ZeroOptimizer.inner -> (which kinds have it, what it is used for)
INNER = {
    "optimizer": (ALL, "the AdamW that DeepSpeed calls"),
    "overflow": (ALL, "whether the step was skipped for a gradient that is not finite"),
    "_global_grad_norm": (ALL, "the gradient's norm before the update is queued"),
    "clear_backward_seen_flag": (("zero2",), "several backward passes in a row under 1F1B"),
    "update_lp_params": (("zero1", "zero1 bf16", "zero2"), "publishing restored and averaged weights"),
    "single_partition_of_fp32_groups": (PLAIN, "the fp32 masters that checkpoints hold"),
    "get_param_gradient_attribute": (PLAIN, "summing the gradients of a tied embedding"),
    "fp32_groups_flat_partition": (BF16, "the fp32 masters that checkpoints hold"),
    "fp32_groups_gradients": (BF16, "summing the fp32 gradients of a tied embedding"),
    "bf16_groups": (BF16, "finding a parameter's fp32 gradient"),
    "fp32_partitioned_groups_flat": (THREE, "the fp32 masters that checkpoints hold"),
    "fp16_groups": (THREE, "publishing restored and averaged weights"),
    "persistent_parameters": (THREE, "publishing the parameters that are never partitioned"),
    "grad_position": (THREE, "where a parameter's part lies in the flat partition"),
    "get_param_id": (THREE, "where a parameter's part lies in the flat partition"),
    "_partition_all_parameters": (THREE, "publishing restored and averaged weights"),
    "_reassign_or_swap_out_partitioned_parameters": (THREE, "publishing restored and averaged weights"),
}
ENGINE = {"step": "the update", "train": "dropout and recomputation"}
PARAMETER = {
    "_hp_mapping": (("zero1", "zero1 bf16", "zero2"), "which run of a parameter this rank owns"),
    "ds_numel": (THREE, "which run of a parameter this rank owns"),
}
FRAGMENT = {
    "lp_fragment_address": "the run inside the parameter",
    "hp_fragment_address": "the run inside the flat partition",
    "param_group_index": "which flat partition",
}
# names in the text of Megatron's modules that the CPU shim rebinds or derives from
SHIM = {
    "random": {
        "_CUDA_RNG_STATE_TRACKER": "named generator states on the CPU",
        "_CUDA_RNG_STATE_TRACKER_INITIALIZED": "keeping ours in place",
        "_get_cuda_rng_state": "recomputation on the CPU",
        "_set_cuda_rng_state": "recomputation on the CPU",
        "CudaRNGStatesTracker": "named generator states on the CPU",
        "_MODEL_PARALLEL_RNG_TRACKER_NAME": "named generator states on the CPU",
    },
    "layers": {
        "LinearWithGradAccumulationAndAsyncCommunication": "linear layers without CUDA's autocast",
        "LinearWithFrozenWeight": "linear layers without CUDA's autocast",
    },
    "schedules": {"torch": 'device="cuda" inside the schedules'},
}
TRACKER = ("seeds_", "states_", "_is_initialized", "_current_state_name")


def missing(library: str, name: str, purpose: str) -> str:
    """The message of a broken contract."""
    return f"{library} {version(library)} no longer has {name}, used for {purpose}"


@pytest.fixture
def build():
    """build(kind): a tiny engine for training under that kind of ZeRO."""

    def build(kind: str) -> Engine:
        config = load_config("configs/demo.yaml", [*TINY, *KINDS[kind]])
        return build_engine(config, init_mesh(config.parallel, "cpu"), 50, 49)

    yield build
    shutdown()


def broken(engine: Engine, kind: str) -> list[str]:
    """Every name of DeepSpeed that this kind of engine should have and has not."""
    optimizer, found = engine.optimizer, []
    assert optimizer is not None
    train_once(engine, kind)  # some names appear with the first step
    tables: list[tuple[Any, dict[str, tuple[tuple[str, ...], str]]]] = [(optimizer.inner, INNER)]
    tables.append((optimizer.engine, {name: (ALL, purpose) for name, purpose in ENGINE.items()}))
    tables.append((optimizer.named[0][1], PARAMETER))
    if kind != "zero3":
        fragment = next(p._hp_mapping for _, p in optimizer.named if p._hp_mapping is not None)
        tables.append((fragment, {name: (ALL, purpose) for name, purpose in FRAGMENT.items()}))
    for thing, names in tables:
        for name, (kinds, purpose) in names.items():
            if kind in kinds and not hasattr(thing, name):
                found.append(missing("deepspeed", f"{type(thing).__name__}.{name}", purpose))
    return found


def train_once(engine: Engine, kind: str) -> None:
    config = load_config("configs/demo.yaml", [*TINY, *KINDS[kind]])
    rows = Rows(torch.arange(32).reshape(2, 16), torch.arange(2), torch.ones(2, dtype=torch.bool))
    noised = noise_step(engine, config, 0, [rows], Interval(0.0, 1.0))
    assert train_step(engine, config, 0, noised, AnomalyPolicy(config.runtime)).verdict == "ok"


@pytest.mark.parametrize("kind", KINDS)
def test_deepspeed_has_every_name(build, kind):
    assert broken(build(kind), kind) == []


def test_a_name_that_is_gone_is_told_with_its_purpose(build, monkeypatch):
    engine = build("zero2")
    monkeypatch.delattr(type(engine.optimizer.inner), "update_lp_params")
    (message,) = broken(engine, "zero2")
    assert message == (
        f"deepspeed {version('deepspeed')} no longer has DeepSpeedZeroOptimizer.update_lp_params, "
        "used for publishing restored and averaged weights"
    )


def test_megatron_has_every_name_that_the_cpu_shim_rebinds():
    import megatron.core.pipeline_parallel.schedules as schedules
    import megatron.core.tensor_parallel.layers as layers
    import megatron.core.tensor_parallel.random as random

    found = []
    for label, module in (("random", random), ("layers", layers), ("schedules", schedules)):
        names = top_level_names(inspect.getsource(module))
        for name, purpose in SHIM[label].items():
            if name not in names:
                found.append(missing("megatron-core", f"{module.__name__}.{name}", purpose))
    source = inspect.getsource(random.CudaRNGStatesTracker)
    for name in TRACKER:
        if f"self.{name}" not in source:
            found.append(missing("megatron-core", f"CudaRNGStatesTracker.{name}", "named generator states on the CPU"))
    for name in ("self.input_tensor", "set_input_tensor"):
        if name not in inspect.getsource(TransformerBlock):
            found.append(missing("megatron-core", f"TransformerBlock.{name}", "what the previous stage sent"))
    assert found == []


def test_groups_are_made_and_named_by_the_functions_we_replace():
    """parallel/groups.py replaces both while Megatron initializes."""
    names = inspect.signature(parallel_state.create_group).parameters
    assert {"ranks", "timeout", "use_local_synchronization"} <= set(names), missing(
        "megatron-core", "parallel_state.create_group(ranks, timeout, use_local_synchronization)", "fewer groups"
    )
    assert "_hash_ranks_to_str" in inspect.getsource(distributed_c10d._process_group_name), missing(
        "torch", "distributed_c10d._hash_ranks_to_str", "equal names of a group on all its members"
    )


def test_deepspeed_starts_on_parameters_without_values():
    """optim/partition.py replaces these while DeepSpeed is started."""
    from deepspeed.runtime import bf16_optimizer, engine
    from deepspeed.runtime.zero import partition_parameters, stage_1_and_2

    init = inspect.getsource(partition_parameters.Init)
    for name in ("_convert_to_zero_parameters", "_convert_to_deepspeed_param", "_aligned_size", "ds_numel_aligned"):
        assert name in init, missing("deepspeed", f"zero.Init.{name}", "a part of each parameter in place of the whole")
    for name in ("ds_numel", "status", "final_location"):
        assert f"param.ds_tensor.{name} =" in init, missing("deepspeed", f"ds_tensor.{name}", "parts of parameters")
    assert "'ds_optim_param'" in inspect.getsource(engine.DeepSpeedEngine._broadcast_model), missing(
        "deepspeed", "ds_optim_param", "not sending weights that have no values"
    )
    for module in (bf16_optimizer, stage_1_and_2):
        assert "self.flatten = _flatten_dense_tensors" in inspect.getsource(module), missing(
            "deepspeed", f"{module.__name__}._flatten_dense_tensors", "flat buffers that are not copied"
        )


def test_torch_drops_an_update_on_the_device():
    """Fused AdamW reads `found_inf` from the optimizer: the GradScaler's door, which no documentation promises."""
    parameter = torch.nn.Parameter(torch.ones(4))
    adam = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    parameter.grad = torch.ones(4)
    adam.found_inf = torch.ones(())
    adam.step()
    purpose = "dropping an update without asking the host"
    assert torch.equal(parameter.detach(), torch.ones(4)), missing("torch", "AdamW.found_inf", purpose)
    adam.found_inf = torch.zeros(())
    adam.step()
    assert float(adam.state[parameter]["step"]) == 1
    assert (parameter < 1).all()


def test_torch_has_stateless_philox_and_dimensions_marked_as_dynamic():
    purpose = "dropout on CUDA, keyed on the device, in a compiled layer"
    schema = str(torch.ops.aten._philox_uniform_.default._schema)
    assert "(Tensor(a!) self, Tensor key, float low=0., float high=1.)" in schema, missing("torch", "philox", purpose)
    mark = getattr(torch._dynamo, "mark_dynamic", None)
    assert callable(mark), missing(
        "torch", "_dynamo.mark_dynamic", "tiles of the head of any number of rows, one graph"
    )


def test_the_list_is_complete():
    """Every name our modules take from DeepSpeed's objects, and from the modules that the shim rebinds, is listed."""
    used = attributes_of(Path(zero.__file__), {"self.inner", "self._inner"})
    assert used <= set(INNER), "names of DeepSpeed's optimizer without a line in tests/test_contract.py"
    assert set(INNER) - used <= {"fp32_groups_gradients"}, "listed, and used no more"
    assert attributes_of(Path(zero.__file__), {"self.engine"}) == set(ENGINE)
    assert attributes_of(Path(zero.__file__), {"fragment"}) == set(FRAGMENT)
    taken = {name for name in attributes_of(Path(zero.__file__), {"parameter"}) if name.startswith(("_", "ds_"))}
    assert taken == set(PARAMETER) | {"ds_pipe_replicated"}
    for label, names in SHIM.items():
        assert attributes_of(Path(cpu_shim.__file__), {label}) == set(names), label


def attributes_of(path: Path, owners: set[str]) -> set[str]:
    """Names after the dot, wherever one of `owners` stands before it."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if ast.unparse(node.value) in owners}


def top_level_names(source: str) -> set[str]:
    """What a module defines or imports at its top."""
    names: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names
