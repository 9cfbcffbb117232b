"""Whatever happens to the files: an older checkpoint with a message, or a clear error; never wrong weights."""

import json
import logging
import os
import pickle
import re
import shutil

import pytest
import torch

from bd3lm_scale.checkpoint import manifest as manifest_module
from bd3lm_scale.checkpoint.reader import find_checkpoint, open_checkpoint
from bd3lm_scale.checkpoint.reshard import reshard
from bd3lm_scale.checkpoint.store import CheckpointStore
from bd3lm_scale.checkpoint.verify import verify
from bd3lm_scale.config.schema import CheckpointConfig
from bd3lm_scale.errors import CheckpointError
from tests.checkpoint.layouts import cut, whole_state

SHAPES = {"embedding.weight": (12, 8), "norm.weight": (8,), "fc2.weight": (8, 32)}
DIMS = dict.fromkeys(SHAPES)
FILES = ("part_00000.safetensors", "part_00001.safetensors", "part_00002.safetensors", "manifest.json")


class Bomb:
    """Unpickling it leaves a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def truncate(path, keep):
    path.write_bytes(path.read_bytes()[: keep(path.stat().st_size)])


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place(len(data))] ^= 1
    path.write_bytes(data)


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def replace_by_dangling_link(path):
    path.unlink()
    path.symlink_to("nowhere")


def swap_halves(path):
    data = path.read_bytes()
    path.write_bytes(data[len(data) // 2 :] + data[: len(data) // 2])


DAMAGES = {
    "removed": lambda path: path.unlink(),
    "emptied": lambda path: truncate(path, lambda size: 0),
    "cut in half": lambda path: truncate(path, lambda size: size // 2),
    "last byte lost": lambda path: truncate(path, lambda size: size - 1),
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "first bit": lambda path: flip(path, lambda size: 0),
    "bit in the header": lambda path: flip(path, lambda size: 40),
    "bit in the middle": lambda path: flip(path, lambda size: size // 2),
    "last bits": lambda path: flip(path, lambda size: size - 2),
    "swapped halves": swap_halves,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Bomb(path.parent.parent / "exploded"))),
    "folder": replace_by_folder,
    "dangling link": replace_by_dangling_link,
}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """A run with steps 1 and 2; step 2 in three files."""
    run = tmp_path_factory.mktemp("run")
    store = CheckpointStore(run / "checkpoints", CheckpointConfig(asynchronous=False))
    for step in (1, 2):
        store.save(step, cut(SHAPES, DIMS, 1, 1, 1, whole_state(SHAPES, step))[0], {"tokens": step})
    second = store.folder / "step_00000002"
    reshard(second, run / "three", num_files=3)
    shutil.rmtree(second)
    (run / "three").rename(second)
    assert sorted(path.name for path in second.iterdir()) == sorted(FILES)
    return run


@pytest.fixture
def run(healthy, tmp_path):
    return shutil.copytree(healthy, tmp_path / "run")


def resume(run, step=None):
    return CheckpointStore(run / "checkpoints", CheckpointConfig()).newest(step)


def assert_is_step(reader, step):
    assert reader.meta["step"] == step
    state = whole_state(SHAPES, step)
    assert all(torch.equal(reader.read(n, k), state[k][n]) for k in state for n in SHAPES)


def test_undamaged_resumes_the_newest(run):
    assert_is_step(resume(run), 2)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_table(run, name, damage, caplog):
    path = run / "checkpoints" / "step_00000002" / name
    DAMAGES[damage](path)
    (report,) = verify(run, step=2) if name != "manifest.json" else verify(run / "checkpoints")[1:]
    assert not report.is_valid
    assert name in str(report)
    with pytest.raises(CheckpointError, match=name):
        resume(shutil.copytree(run, run.with_name("chosen"), symlinks=True), step=2)
    with caplog.at_level(logging.WARNING, logger="bd3lm_scale"):
        reader = resume(run)
    assert_is_step(reader, 1)
    assert "step_00000002 is damaged" in caplog.text
    assert name in caplog.text
    assert "set aside as step_00000002.damaged" in caplog.text
    assert find_checkpoint(run).name == "step_00000001"
    assert not list(run.rglob("exploded"))


def test_two_damaged_checkpoints_of_one_step_are_both_kept(run):
    folder = run / "checkpoints"
    saved = shutil.copytree(folder / "step_00000002", run / "copy")
    (folder / "step_00000002" / FILES[0]).unlink()
    assert_is_step(resume(run), 1)
    saved.rename(folder / "step_00000002")
    (folder / "step_00000002" / FILES[1]).unlink()
    assert_is_step(resume(run), 1)
    assert sorted(path.name for path in folder.glob("*.damaged*")) == [
        "step_00000002.damaged",
        "step_00000002.damaged.1",
    ]


def test_nothing_valid_left_is_an_error_not_a_fresh_start(run):
    for path in (run / "checkpoints").rglob("*.safetensors"):
        path.unlink()
    for _ in range(2):  # the second time they carry their new names
        with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged .*use another run_dir"):
            resume(run)


def edit(path, change, signed=True):
    """Change the manifest; signed: as somebody would who knows how its checksum is made."""
    content = json.loads(path.read_text())
    change(content)
    if signed:
        content.pop("sha256")
        content["sha256"] = manifest_module._digest(content)
    path.write_text(json.dumps(content))


def first_box(content):
    return content["files"]["part_00000.safetensors"]["boxes"][0]


def rename_file(content):
    content["files"]["../step_00000001/rank_00000.safetensors"] = content["files"].pop("part_00000.safetensors")


def move_box(content):
    first_box(content)[2][0] += 1


HOSTILE = {
    "step changed": (lambda c: c["meta"].update(step=99), False),
    "a checksum changed": (lambda c: c["files"]["part_00001.safetensors"].update(sha256="0" * 64), True),
    "a size changed": (lambda c: c["files"]["part_00001.safetensors"].update(bytes=7), True),
    "a file outside": (rename_file, True),
    "a file forgotten": (lambda c: c["files"].pop("part_00002.safetensors"), True),
    "no files": (lambda c: c.pop("files"), True),
    "a box moved": (move_box, True),
    "a box before the file": (lambda c: first_box(c).__setitem__(4, -4), True),
    "a box behind the file": (lambda c: first_box(c).__setitem__(4, 10**6), True),
    "a box of negative size": (lambda c: first_box(c)[3].__setitem__(0, -1), True),
    "a box of another rank": (lambda c: first_box(c)[3].append(1), True),
    "a huge shape": (lambda c: c["shapes"].update({"embedding.weight": [10**30, 8]}), True),
    "an unknown kind": (lambda c: first_box(c).__setitem__(0, "pickle"), True),
    "an unknown parameter": (lambda c: first_box(c).__setitem__(1, "x"), True),
    "numbers as lists": (lambda c: first_box(c).__setitem__(4, []), True),
    "meta no object": (lambda c: c.update(meta=[1]), True),
    "another format": (lambda c: c.update(format="something else"), True),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_edited_manifest_is_refused(run, case):
    change, signed = HOSTILE[case]
    path = run / "checkpoints" / "step_00000002"
    edit(path / "manifest.json", change, signed)
    try:
        problem = open_checkpoint(path).verify()[0]
    except CheckpointError as error:
        problem = str(error)
    assert "manifest.json" in problem or "part_0000" in problem
    assert_is_step(resume(run), 1)


def test_deeply_nested_manifest_is_refused(run):
    (run / "checkpoints" / "step_00000002" / "manifest.json").write_text("[" * 100_000)
    assert_is_step(resume(run), 1)


def test_swapped_files_are_found_out(run):
    folder = run / "checkpoints" / "step_00000002"
    (folder / FILES[0]).rename(folder / "x")
    (folder / FILES[1]).rename(folder / FILES[0])
    (folder / "x").rename(folder / FILES[1])
    assert_is_step(resume(run), 1)


def test_future_version_is_a_clear_error_and_is_not_set_aside(run):
    edit(run / "checkpoints" / "step_00000002" / "manifest.json", lambda c: c.update(version=2))
    with pytest.raises(CheckpointError, match=r"format version 2, this code reads version 1"):
        resume(run)
    assert (run / "checkpoints" / "step_00000002").is_dir()


def test_old_version_is_migrated(run, monkeypatch):
    def migrate(content):
        return {**content, "meta": {**content["meta"], "migrated": True}}

    edit(run / "checkpoints" / "step_00000002" / "manifest.json", lambda c: c.update(version=0))
    with pytest.raises(CheckpointError, match="format version 0"):
        resume(run)
    monkeypatch.setitem(manifest_module.MIGRATIONS, 0, migrate)
    reader = resume(run)
    assert reader.meta["migrated"]
    assert_is_step(reader, 2)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(run):
    reader = resume(run)
    flip(reader.path / FILES[0], lambda size: size - 1)
    assert reader.size_problems() == []
    truncate(reader.path / FILES[1], lambda size: size // 2)
    (problem,) = reader.size_problems()
    assert re.search(r"part_00001\.safetensors has [\d,]+ bytes, the manifest says", problem)
    with pytest.raises(CheckpointError, match=r"part_00001\.safetensors ends before its data"):
        list(reader.scan())


def test_no_number_leaves_a_damaged_file_even_without_verify(run):
    """evaluate, sample and init_from open a checkpoint without searching a run."""
    flip(run / "checkpoints" / "step_00000002" / FILES[2], lambda size: size - 1)
    reader = open_checkpoint(find_checkpoint(run))
    assert reader.meta["step"] == 2
    with pytest.raises(CheckpointError, match=r"part_00002\.safetensors does not have the SHA-256"):
        assert_is_step(reader, 2)
