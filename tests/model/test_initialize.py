"""Initial weights: any part of any parameter, drawn alone, is that part of what torch.rand gives for the whole."""

import itertools
import math

import pytest
import torch

from bd3lm_scale.checkpoint.boxes import boxes_of
from bd3lm_scale.model import draws, initialize
from bd3lm_scale.model.draws import UniformStream
from bd3lm_scale.model.parameters import Architecture, Parameter, parameters
from bd3lm_scale.rng import derive_key
from bd3lm_scale.values import StateSlice
from tests.checkpoint.layouts import shard

ARCHITECTURES = {
    "paper": Architecture(1, 16, 4, 8, 4, 50),
    "gated and grouped": Architecture(1, 16, 4, 8, 4, 50, mlp="swiglu", num_kv_heads=4, qkv_bias=True, head_dim=8),
}
SEED = 11


def whole_value(parameter: Parameter) -> torch.Tensor:
    """What a model of one process starts with, written down once more."""
    if parameter.start != "uniform":
        return torch.full(parameter.shape, float(parameter.start == "ones"))
    bound = 1.0 / math.sqrt(parameter.fan_in)
    generator = torch.Generator().manual_seed(derive_key(SEED, "init " + parameter.name) & (2**63 - 1))
    return torch.rand(parameter.shape, generator=generator).mul_(2 * bound).sub_(bound)


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**40 + 123, 2**63 - 1])
def test_the_stream_is_torchs_from_any_place(monkeypatch, seed):
    monkeypatch.setattr(draws, "_JUMP_FROM", 5000)  # jumps, near enough to be compared with what lies between
    whole = torch.rand(120_000, generator=torch.Generator().manual_seed(seed))
    stream = UniformStream(seed)
    for place in (0, 1, 623, 624, 625, 5, 25_007, 25_008, 99_990, 31, 50_001, 60_003, 119_000):
        stream.seek(place)
        for count in (1, 700, 2):
            assert torch.equal(stream.draw(count), whole[place : place + count]), (place, count)
            place += count


def test_a_jump_is_as_far_as_drawing(monkeypatch):
    """Over many squarings, from the middle of a state: two streams, one of which reads what it passes."""
    far = 3_000_000
    jumping, reading = UniformStream(5), UniformStream(5)
    monkeypatch.setattr(draws, "_JUMP_FROM", 10**12)
    reading.seek(far + 17)
    monkeypatch.setattr(draws, "_JUMP_FROM", 1000)
    jumping.draw(10)
    jumping.seek(far + 17)
    assert torch.equal(jumping.draw(2000), reading.draw(2000))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("at_once", [5, 70, 2**17])
def test_every_cut_of_every_parameter_is_a_part_of_the_whole(monkeypatch, name, at_once):
    """Tensor-parallel shards, and uneven runs of them as ZeRO cuts them; pieces smaller than a row, and of rows."""
    monkeypatch.setattr(initialize, "_DRAWN_AT_ONCE", at_once)
    for parameter in parameters(ARCHITECTURES[name]):
        value = whole_value(parameter)
        for tensor in (1, 2, 4):
            is_cut = parameter.shard_dim is not None and tensor > 1
            count = tensor if is_cut else 1
            for rank in range(count):
                mine = shard(value, parameter.shard_dim if is_cut else None, rank, count, parameter.parts).flatten()
                ends = [0, mine.numel() // 3 + 1, mine.numel() // 2 + 2, mine.numel()]
                for start, stop in itertools.pairwise(ends):
                    cut = (parameter.shard_dim if is_cut else None, rank, count, start, stop)
                    run = StateSlice(parameter.name, parameter.shape, *cut, parts=parameter.parts if is_cut else ())
                    out = torch.full((stop - start,), math.nan)
                    for box in boxes_of(run):
                        place = out.narrow(0, box.start, box.volume)
                        initialize.draw(place, parameter, box.offset, box.shape, SEED, torch.float32)
                    assert torch.equal(out, mine[start:stop]), (parameter.name, cut)


def test_masters_start_equal_to_bf16_weights():
    parameter = next(p for p in parameters(ARCHITECTURES["paper"]) if p.name == "embedding.weight")
    out = torch.empty(parameter.size)
    initialize.draw(out, parameter, (0, 0), parameter.shape, SEED, torch.bfloat16)
    assert torch.equal(out, whole_value(parameter).bfloat16().float().flatten())
    assert not torch.equal(out, whole_value(parameter).flatten())
