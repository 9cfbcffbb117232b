"""What torchrun, srun and Slurm say in the environment, and what an empty or odd variable means."""

import pytest

from bd3lm_scale.config.environment import number_from_environment
from bd3lm_scale.errors import ConfigError
from bd3lm_scale.parallel.mesh import choose_device, read_launch
from bd3lm_scale.runtime.command_line import for_a_restart, parse_train_arguments
from bd3lm_scale.runtime.exit_codes import ExitCode
from bd3lm_scale.runtime.run_folder import current_rank

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID",
         "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that what read_launch sets is taken back, too
    return monkeypatch.setenv


def test_an_empty_variable_is_none(environment):
    launch = read_launch()
    assert (launch.rank, launch.world_size, launch.local_rank) == (0, 1, 0)
    assert number_from_environment("MASTER_PORT") > 0
    assert current_rank() == 0


def test_torchrun_goes_before_srun(environment):
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1"), ("SLURM_PROCID", "0")):
        environment(name, value)
    launch = read_launch()
    assert (launch.rank, launch.world_size, launch.local_rank) == (3, 4, 1)
    assert current_rank() == 3


def test_srun_alone(environment):
    for name, value in (("SLURM_PROCID", "2"), ("SLURM_STEP_NUM_TASKS", "4"), ("SLURM_LOCALID", "0")):
        environment(name, value)
    environment("MASTER_ADDR", "node1")
    assert read_launch().rank == current_rank() == 2


def test_ranks_of_another_shell_are_refused_under_srun(environment):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("SLURM_PROCID", "1"), ("SLURM_STEP_NUM_TASKS", "2")):
        environment(name, value)
    with pytest.raises(ConfigError, match="unset RANK and WORLD_SIZE"):
        read_launch()
    environment("TORCHELASTIC_RUN_ID", "none")  # a torchrun of its own in every task
    assert read_launch().world_size == 1


@pytest.mark.parametrize(
    ("name", "value"), [("RANK", "one"), ("WORLD_SIZE", "-2"), ("LOCAL_RANK", "1.5"), ("RANK", "4")]
)
def test_an_odd_variable_is_named(environment, name, value):
    for key, number in (("RANK", "0"), ("WORLD_SIZE", "2"), (name, value)):
        environment(key, number)
    with pytest.raises(ConfigError, match=name):
        read_launch()


def test_each_rank_has_the_gpu_it_can_see(environment, monkeypatch):
    """All GPUs of the node and the local rank chooses, or, where Slurm gives each task its own, device 0."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: visible)
    for name in ("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND"):
        environment(name, "")
    visible = 4
    assert [choose_device("auto", rank).index for rank in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="local rank 4 has no GPU of its own: this process sees 4"):
        choose_device("auto", 4)
    visible = 1
    with pytest.raises(ValueError, match="let each see all GPUs of its node"):
        choose_device("cuda", 3)
    for name, value in (("SLURM_GPUS_PER_TASK", "1"), ("SLURM_GPU_BIND", "single:1")):
        environment(name, value)
        assert choose_device("cuda", 3).index == 0
        environment(name, "")
    environment("SLURM_GPUS_PER_TASK", "2")
    visible = 2
    with pytest.raises(ValueError, match="local rank 2"):
        choose_device("cuda", 2)


def test_a_restart_goes_on_whatever_the_first_start_asked_for():
    words = ["a.yaml", "--checkpoint", "5", "x.y=1", "--fresh", "--checkpoint=7", "run_dir=--fresh"]
    assert for_a_restart(words) == ["a.yaml", "x.y=1", "run_dir=--fresh"]


@pytest.mark.parametrize(
    "words", [["a.yaml", "--bogus"], ["a.yaml", "--check", "5"], ["a.yaml", "--checkpoint", "x"], []]
)
def test_wrong_command_lines_are_configuration_errors(words, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_train_arguments(words)
    assert ended.value.code == ExitCode.CONFIG
    assert "error:" in capsys.readouterr().err
