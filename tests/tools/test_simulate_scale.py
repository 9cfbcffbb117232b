"""Growth laws: what a rank of a larger world costs, from the program's own code."""

import json

import pytest

from bd3lm_scale.config.load import load_config
from bd3lm_scale.config.sizes import parameters
from bd3lm_scale.config.traffic import traffic
from bd3lm_scale.parallel.mesh import shutdown
from tools import simulate_scale
from tools.simulate_scale import checkpoint_of, drawn_of, groups_of

VOCAB = 50258
BATCH = ["train.global_batch_size=1024", "train.micro_batch_size=1"]


@pytest.fixture(autouse=True)
def _alone():
    shutdown()
    yield
    shutdown()


def config_of(*settings):
    return load_config("configs/owt_7b_tp4_pp4.yaml", [*BATCH, *settings])


def test_a_rank_attends_as_many_groups_in_a_world_of_any_size():
    config = config_of()
    attended = {world: groups_of(config, world, world - 1) for world in (64, 256, 1024)}
    assert {len(groups) for groups in attended.values()} == {len(attended[64])}
    assert 0 < len(attended[64]) <= 10
    for world, groups in attended.items():
        assert len(set(groups)) == len(groups), "groups of the same ranks are one"
        assert all(world - 1 in group for group in groups), "a rank makes no group that it is not in"
        sizes = {len(group) for group in groups}
        assert {4, world // 16} <= sizes, "tensor and pipeline, and data"


def test_a_ranks_share_of_traffic_is_bounded_and_its_share_of_files_shrinks():
    config = config_of()
    worlds = (128, 256, 512, 1024)
    sent = [traffic(config, world, VOCAB) for world in worlds]
    saved = [checkpoint_of(config, world, VOCAB) for world in worlds]
    drawn = [drawn_of(config, world, VOCAB) for world in worlds]
    assert sent[-1].data < 1.15 * sent[0].data, "rings: (k - 1) / k"
    for i in range(len(worlds) - 1):
        assert sent[i + 1].tensor == sent[i].tensor / 2, "half as many micro-batches"
        assert sent[i + 1].pipeline == sent[i].pipeline / 2
        for part in ("own", "verified", "filled"):
            assert saved[i + 1][part] == saved[i][part] / 2
        assert drawn[i + 1] == drawn[i] / 2
        assert saved[i + 1]["total"] == saved[i]["total"]


def test_what_all_ranks_hold_is_the_checkpoint_and_tensor_peers_copies():
    config = config_of()
    held = 16 * sum(checkpoint_of(config, 64, VOCAB, stage)["own"] for stage in range(4))
    uncut = sum(p.size for p in parameters(config, 50304).values() if p.shard_dim is None)
    assert held == pytest.approx(checkpoint_of(config, 64, VOCAB)["total"] + 3 * 16 * uncut, rel=1e-12)


def test_the_table_says_how_each_line_is_known(tmp_path, capsys):
    assert simulate_scale.main(["--ranks", "1024", "--json", str(tmp_path / "table.json")]) == 0
    text = capsys.readouterr().out
    table = json.loads((tmp_path / "table.json").read_text())
    for words in ("sockets", "groups", "traffic", "to verify", "to fill", "drawn", "open files"):
        assert any(words in what for what, _, _ in table), words
    assert {mark for _, _, mark in table} == {"S", "C"}
    assert all(figure in text for _, figure, _ in table)
    documented = (simulate_scale.Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    for _, figure, _ in table:
        assert figure in documented, f"docs/scale.md does not say {figure}"


def test_a_world_that_cannot_be_cut_is_refused(capsys):
    assert simulate_scale.main(["--ranks", "1000"]) == 2
    assert "1000" in capsys.readouterr().err
