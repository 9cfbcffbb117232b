import numpy as np
import torch

from bd3lm_scale.runtime.bad_batches import dump_batch
from bd3lm_scale.values import Rows


def test_rows_come_back_without_unpickling(tmp_path):
    parts = [
        Rows(torch.arange(8).reshape(2, 4) + 8 * i, torch.tensor([2 * i, 2 * i + 1]), torch.tensor([True, i == 0]))
        for i in range(2)
    ]
    path = dump_batch(tmp_path, 12, 3, parts, seed=1, data_offset=512, reason="loss is nan")
    assert path == tmp_path / "bad_batches" / "step_00000012_rank_00003.npz"
    with np.load(path, allow_pickle=False) as kept:
        assert (kept["tokens"] == np.arange(16).reshape(4, 4)).all()
        assert kept["position"].tolist() == [0, 1, 2, 3]
        assert kept["is_real"].tolist() == [True, True, True, False]
        assert (int(kept["step"]), int(kept["seed"]), int(kept["data_offset"])) == (12, 1, 512)
        assert str(kept["reason"]) == "loss is nan"
