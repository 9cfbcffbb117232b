"""Every layout trains the same model: losses, gradient norms, streams, weights and optimizer state equal one process's.

fp32 tolerance: matrix products and all-reduces sum in another order under another layout (relative 1e-7 each), and
Adam divides by the root of second moments that may be tiny; after 5 steps losses agree to 1e-5 relative and weights to
1e-2 of the learning rate times the number of steps.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bd3lm_scale.checkpoint.reader import find_checkpoint, open_checkpoint
from tests.training_runs import free_port
from tests.variants import overrides

WORKER = Path(__file__).parent / "parallel" / "worker.py"
TP2, TP4 = "parallel.tensor_parallel_size=2", "parallel.tensor_parallel_size=4"
PP2, PP4 = "parallel.pipeline_parallel_size=2", "parallel.pipeline_parallel_size=4"
VPP2, SP = "parallel.virtual_pipeline_parallel_size=2", "parallel.sequence_parallel=true"
Z2, Z3, BF16 = "optim.zero_stage=2", "optim.zero_stage=3", "precision=bf16"
TIED, FULL = "model.tie_embeddings=true", "parallel.recompute=full"
PACKED = "data.packing=documents"
AR, MDLM, SEDD = ([f"diffusion.objective={name}"] for name in ("ar", "mdlm", "sedd"))
ALL_PARTS, DROPOUT, FAR_CLIP = "partition=all", "model.dropout=0.2", "optim.grad_clip=1e9"
DECAY = ["optim.weight_decay=0.5", "optim.weight_decay_on=matrices"]
DECODER, MIXED = [*overrides("decoder"), *DECAY], [*overrides("mixed"), *DECAY]
NAN, SPIKE, ABSENT = "harm=nan", "harm=spike", "harm=absent"
LR, WEIGHT_TOLERANCE = 0.003, 0.003 * 5 * 1e-2

# world size -> {case: (the one-process case it equals, overrides)}
CASES = {
    1: {
        "plain": ("plain", []),
        "tied": ("tied", [TIED]),
        "single": ("single", ["diffusion.block_size=1"]),
        "whole": ("whole", ["diffusion.block_size=32"]),
        "ar": ("ar", AR),
        "sedd": ("sedd", SEDD),
        "mdlm": ("mdlm", MDLM),
        "bf16": ("bf16", [BF16]),
        "bf16_unclipped": ("bf16_unclipped", [BF16, FAR_CLIP]),
        "zero2_bf16": ("bf16_unclipped", [BF16, Z2, FAR_CLIP]),
        "zero3_bf16": ("bf16_unclipped", [BF16, Z3, FAR_CLIP]),
        "decoder": ("decoder", DECODER),
        "decoder_bf16": ("decoder_bf16", [*DECODER, BF16]),
        "mixed": ("mixed", MIXED),
        "mixed_recompute": ("mixed", [*MIXED, FULL]),
        "clipped": ("clipped", ["optim.grad_clip=0.05"]),
        "one_micro_batch": ("plain", ["train.micro_batch_size=8"]),
        "one_row_micro_batches": ("plain", ["train.micro_batch_size=1"]),
        "recompute": ("plain", [FULL]),
        "recompute_attention": ("plain", ["parallel.recompute=selective"]),
        "zero2": ("plain", [Z2]),
        "zero3": ("plain", [Z3]),
        "dense_attention": ("plain", ["model.attention=dense"]),
        "packed": ("packed", [PACKED]),
        "packed_dense_recompute": ("packed", [PACKED, "model.attention=dense", FULL]),
        "packed_recompute_attention": ("packed", [PACKED, "parallel.recompute=selective", "train.micro_batch_size=8"]),
        "packed_ar": ("packed_ar", [PACKED, *AR]),
        "packed_mdlm": ("packed_mdlm", [PACKED, *MDLM]),
        "dropout": ("dropout", [DROPOUT]),
        "dropout_recompute": ("dropout", [DROPOUT, FULL]),
        "absent": ("absent", [ABSENT]),
        "absent_bf16": ("absent_bf16", [ABSENT, BF16]),
    },
    2: {
        "dp2": ("plain", []),
        "tp2": ("plain", [TP2]),
        "tp2_sp": ("plain", [TP2, SP]),
        "pp2": ("plain", [PP2]),
        "dp2_zero2": ("plain", [Z2]),
        "dp2_zero3": ("plain", [Z3]),
        "pp2_vpp2": ("plain", [PP2, VPP2]),
        "pp2_vpp1": ("plain", [PP2, "parallel.virtual_pipeline_parallel_size=1", "train.micro_batch_size=3"]),
        "pp2_tied": ("tied", [PP2, TIED]),
        "tp2_zero3_tied": ("tied", [TP2, Z3, TIED]),
        "tp2_single": ("single", [TP2, "diffusion.block_size=1"]),
        "tp2_sp_single": ("single", [TP2, SP, "diffusion.block_size=1"]),  # 2L - 1 positions cannot be halved
        "pp2_whole": ("whole", [PP2, "diffusion.block_size=32"]),
        "pp2_ar": ("ar", [PP2, *AR]),
        "tp2_decoder": ("decoder", [*DECODER, TP2]),
        "tp2_sp_mixed": ("mixed", [*MIXED, TP2, SP]),  # one head of keys and values for two ranks
        "pp2_vpp2_decoder": ("decoder", [*DECODER, PP2, VPP2]),
        "dp2_zero3_decoder": ("decoder", [*DECODER, Z3, ALL_PARTS]),
        "tp2_decoder_bf16": ("decoder_bf16", [*DECODER, TP2, BF16]),
        "broken_shares": ("broken", [*DECODER, TP2, "sabotage=no hook"]),
        "tp2_sp_sedd": ("sedd", [TP2, SP, *SEDD]),
        "pp2_sedd": ("sedd", [PP2, *SEDD]),
        "tp2_bf16": ("bf16", [TP2, BF16]),
        "dp2_zero3_bf16": ("bf16", [Z3, BF16]),
        "tp2_clipped": ("clipped", [TP2, "optim.grad_clip=0.05"]),
        "pp2_vpp2_tied": ("tied", [PP2, VPP2, TIED]),
        "pp2_vpp2_dropout_recompute": ("dropout", [PP2, VPP2, DROPOUT, FULL]),
        "tp2_dropout": ("dropout", [TP2, DROPOUT]),
        "dp2_zero3_partitioned_tied": ("tied", [Z3, ALL_PARTS, TIED]),
        "dp2_zero3_partitioned_bf16_recompute": ("bf16", [Z3, ALL_PARTS, BF16, FULL]),
        "dp2_zero2_bf16": ("bf16", [Z2, BF16]),
        "dp2_packed": ("packed", [PACKED, "train.micro_batch_size=3"]),
        "tp2_sp_packed": ("packed", [PACKED, TP2, SP]),
        "pp2_vpp2_packed_recompute": ("packed", [PACKED, PP2, VPP2, FULL]),
        "pp2_packed_ar": ("packed_ar", [PACKED, PP2, *AR]),
        "tp2_packed_mdlm": ("packed_mdlm", [PACKED, TP2, *MDLM]),
        "dp2_nan": ("absent", [NAN]),
        "dp2_zero2_nan": ("absent", [Z2, NAN]),
        "dp2_zero3_nan": ("absent", [Z3, ALL_PARTS, NAN]),
        "dp2_zero2_spike": ("absent", [Z2, SPIKE]),
        "dp2_zero3_spike": ("absent", [Z3, ALL_PARTS, SPIKE]),
        "pp2_nan": ("absent", [PP2, NAN]),
        "dp2_bf16_nan": ("absent_bf16", [BF16, NAN]),
        "dp2_zero2_bf16_nan": ("absent_bf16", [Z2, BF16, NAN]),
        "dp2_bf16_spike": ("absent_bf16", [BF16, SPIKE]),
        "broken_mpu": ("broken", [TP2, "sabotage=no mpu"]),
        "broken_hook": ("broken", [TP2, SP, "sabotage=no hook"]),
        "broken_tie": ("broken", [PP2, TIED, "sabotage=no tied sum"]),
    },
    3: {
        "dp3": ("plain", []),
        "dp3_zero3": ("plain", [Z3]),
        "dp3_zero2": ("plain", [Z2]),
    },
    4: {
        "tp4": ("plain", [TP4]),
        "pp4": ("plain", [PP4]),
        "dp4": ("plain", []),
        "tp2_pp2": ("plain", [TP2, PP2]),
        "tp2_pp2_sp": ("plain", [TP2, PP2, SP]),
        "tp2_pp2_vpp2_sp_recompute": ("plain", [TP2, PP2, VPP2, SP, FULL]),
        "tp2_dp2_zero2_sp": ("plain", [TP2, SP, Z2]),
        "tp2_dp2_zero3_sp_recompute": ("plain", [TP2, SP, Z3, FULL]),
        "pp2_dp2_zero2": ("plain", [PP2, Z2, "parallel.experimental=true"]),
        "pp2_dp2_tied": ("tied", [PP2, TIED]),
        "tp2_pp2_sp_tied": ("tied", [TP2, PP2, SP, TIED]),
        "tp2_pp2_bf16": ("bf16", [TP2, PP2, BF16]),
        "tp2_pp2_sp_packed_recompute": ("packed", [PACKED, TP2, PP2, SP, FULL]),
        "tp2_pp2_mdlm": ("mdlm", [TP2, PP2, *MDLM]),
        "tp4_decoder": ("decoder", [*DECODER, TP4]),  # two heads of keys and values for four ranks
        "tp2_pp2_sp_decoder_recompute": ("decoder", [*DECODER, TP2, PP2, SP, FULL]),
        "tp4_sp_mixed": ("mixed", [*MIXED, TP4, SP]),
        "tp2_dp2_zero2_mixed": ("mixed", [*MIXED, TP2, Z2]),
        "tp2_dp2_zero3_sp_mixed": ("mixed", [*MIXED, TP2, SP, Z3]),
        "pp2_dp2_clipped": ("clipped", [PP2, "optim.grad_clip=0.05"]),
    },
}  # fmt: skip
ALL = {name: (world, *case) for world, cases in CASES.items() for name, case in cases.items()}
STAGES, REDUCE_DTYPES = (1, 2, 3), {1: ("fp32",), 3: ("fp32",), 4: ("fp32", "bf16")}


def reductions(world: int) -> dict[str, list[str]]:
    """Pure data parallelism per ZeRO stage and way to sum, gradients recorded."""
    return {
        f"reduce_zero{stage}_{dtype}": [
            "gradients=record", BF16, f"optim.zero_stage={stage}", f"optim.reduce_dtype={dtype}",
            "train.global_batch_size=24", "train.micro_batch_size=2",
        ]
        for stage in STAGES for dtype in REDUCE_DTYPES.get(world, ())
    }  # fmt: skip


def launch(world: int, folder: Path, cases: dict[str, list[str]]) -> None:
    """All cases of one world size in one set of processes."""
    folder.mkdir(exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(world), "--master-port", str(free_port())]
    command = [sys.executable, *torchrun, str(WORKER), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    causes = [part for part in done.stderr.split("Traceback") if "ChildFailedError" not in part]
    assert done.returncode == 0, "\n".join(causes)[-6000:]


def read_gradients(folder: Path, name: str, world: int) -> tuple[dict, dict]:
    """By parameter: gradients that entered the reduction (world, micro-batches, elements); what came out (elements)."""
    ranks = [dict(np.load(folder / f"{name}.rank{rank}.npz")) for rank in range(world)]
    entered = {key[:-3]: np.stack([rank[key] for rank in ranks]) for key in ranks[0] if key.endswith("/in")}
    left = {key: np.full(grads.shape[-1], np.nan, np.float32) for key, grads in entered.items()}
    for rank in ranks:
        for key, part in rank.items():
            if not key.endswith("/in"):
                parameter, start = key.split("/out/")
                left[parameter][int(start) : int(start) + len(part)] = part
    return entered, left


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    found = {}
    for world, cases in CASES.items():
        plain = {name: overrides for name, (_, overrides) in cases.items()}
        launch(world, folder / str(world), plain | reductions(world))
        found |= {(world, name): read_gradients(folder / str(world), name, world) for name in reductions(world)}
        for name in cases:
            record = json.loads((folder / str(world) / f"{name}.json").read_text())
            if name != "broken_mpu":
                record["checkpoint"] = open_checkpoint(find_checkpoint(folder / str(world) / name))
            found[name] = record
    return found


@pytest.mark.parametrize("name", [n for n, (_, twin, _) in ALL.items() if twin not in (n, "broken")])
def test_layout_equals_one_process(results, name):
    _, twin, overrides = ALL[name]
    here, serial = results[name], results[twin]
    is_bf16 = BF16 in overrides
    loss_tolerance, norm_tolerance = (2e-3, 5e-3) if is_bf16 else (1e-5, 1e-5)
    for a, b in zip(here["steps"], serial["steps"], strict=True):
        assert a["stream_hash"] == b["stream_hash"]
        assert a["loss"] == pytest.approx(b["loss"], rel=loss_tolerance)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=norm_tolerance)
    assert here["validation"]["nelbo"] == pytest.approx(serial["validation"]["nelbo"], rel=loss_tolerance)
    assert here["validation"]["num_tokens"] == serial["validation"]["num_tokens"]
    ours, theirs = here["checkpoint"], serial["checkpoint"]
    assert ours.names() == theirs.names()
    for parameter in theirs.names():
        for kind in ("master", "ema"):
            difference = (ours.read(parameter, kind) - theirs.read(parameter, kind)).abs().max().item()
            # Adam moves every weight by about the learning rate whatever its gradient: bf16 noise can flip a sign.
            assert difference <= (2 * LR * 5 if is_bf16 else WEIGHT_TOLERANCE), (parameter, kind, difference)


def test_training_moves_weights_further_than_the_tolerance(results):
    """The comparison above would notice a layout that does not train."""
    reader, start = results["plain"]["checkpoint"], results["tied"]["checkpoint"]
    moved = (reader.read("head.output.weight")).abs().max().item()
    assert moved > 20 * WEIGHT_TOLERANCE
    assert not torch.equal(reader.read("embedding.weight"), start.read("embedding.weight"))


def test_a_step_left_out_matters(results):
    """The cases with a bad step would notice one that was taken."""
    kept = [step for step in results["plain"]["steps"] if step["step"] != 3]
    for a, b in zip(results["absent"]["steps"][2:], kept[2:], strict=True):
        assert a["stream_hash"] == b["stream_hash"]
        assert a["loss"] != pytest.approx(b["loss"], rel=1e-4)


def test_streams_differ_by_step_and_the_clip_matters(results):
    """That losses fall is tests/training/test_step.py's."""
    hashes = {step["stream_hash"] for step in results["plain"]["steps"]}
    assert len(hashes) == 5
    assert results["clipped"]["steps"][-1]["loss"] != results["plain"]["steps"][-1]["loss"]


def misfit(entered: dict, left: dict) -> float:
    """Share of the reduced gradient's elements further from the exact mean over ranks than fp32 rounding explains."""
    far = total = 0
    for name, grads in entered.items():
        world, micro_batches, elements = grads.shape
        terms = grads.astype(np.float64) / world
        rounding = (world * micro_batches + 2) * 2.0**-24 * np.abs(terms).sum((0, 1)) + 1e-40
        far += int((~(np.abs(left[name] - terms.sum((0, 1))) <= rounding)).sum())
        total += elements
    return far / total


@pytest.mark.parametrize("world", REDUCE_DTYPES)
@pytest.mark.parametrize("stage", STAGES)
def test_bf16_gradients_are_summed_over_ranks_in_fp32(results, world, stage):
    """To fp32 rounding, whatever the number of ranks."""
    entered, left = results[world, f"reduce_zero{stage}_fp32"]
    assert all(np.abs(grads).max() > 0 for grads in entered.values())
    assert misfit(entered, left) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_reduce_dtype_bf16_rounds_the_sums(results, stage):
    """The field is obeyed, and the comparison above would see a rounded sum."""
    assert misfit(*results[4, f"reduce_zero{stage}_bf16"]) > 0.3


@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_leaves_the_accumulated_gradient_alone(results, stage):
    """With nobody to add to, the reduction changes no bit of the fp32 sum of the micro-batches."""
    entered, left = results[1, f"reduce_zero{stage}_fp32"]
    for name, grads in entered.items():
        total = np.zeros(grads.shape[-1], np.float32)
        for gradient in grads[0]:
            total += gradient
        assert np.array_equal(left[name], total), name


def test_zero_stages_train_bf16_alike(results):
    """One rank: the same losses, bit for bit (each sums the norm in its own order, so nothing is clipped here)."""
    names = ("bf16_unclipped", "zero2_bf16", "zero3_bf16")
    one, two, three = ([step["loss"] for step in results[name]["steps"]] for name in names)
    assert one == two == three


def largest_difference(ours, theirs) -> float:
    """Largest difference between two checkpoints' weights."""
    return max((ours.read(name) - theirs.read(name)).abs().max().item() for name in theirs.names())


@pytest.mark.parametrize(
    ("name", "twin"),
    [("broken_mpu", "plain"), ("broken_hook", "plain"), ("broken_tie", "tied"), ("broken_shares", "decoder")],
)
def test_a_layout_with_a_piece_missing_is_noticed(results, name, twin):
    """Forgotten mpu adapter, unsummed shares of a gradient (positions, heads), unsummed tied gradients: none unseen."""
    here, serial = results[name], results[twin]
    same = [
        a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
        for a, b in zip(here["steps"], serial["steps"], strict=True)
    ]
    # half a gradient is a step of another direction: Adam shows it in the weights before the loss does
    assert not all(same) or largest_difference(here["checkpoint"], serial["checkpoint"]) > 2 * WEIGHT_TOLERANCE
