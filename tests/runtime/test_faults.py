import os
import signal
import subprocess
import sys

import pytest

from bd3lm_scale.runtime import faults


def test_nothing_happens_without_the_variable(monkeypatch):
    monkeypatch.delenv(faults.VARIABLE, raising=False)
    assert faults.point("step", step=7) is False


def test_nan_strikes_only_where_ordered(monkeypatch):
    monkeypatch.setenv(faults.VARIABLE, "nan@step=7:rank=0:attempt=0.0")
    monkeypatch.delenv("BD3LM_ATTEMPT", raising=False)
    monkeypatch.setenv("RANK", "0")
    assert [faults.point("step", step) for step in (6, 7, 8)] == [False, True, False]
    monkeypatch.setenv("BD3LM_ATTEMPT", "0.1")
    assert not faults.point("step", 7)
    monkeypatch.setenv(faults.VARIABLE, "nan@loss:step=7:rank=1")
    assert not faults.point("loss", 7)


def test_points_inside_a_save_know_the_step(monkeypatch):
    monkeypatch.setenv(faults.VARIABLE, "error@save:before_manifest:step=5")
    faults.point("step", 4)
    faults.point("save:before_manifest")
    faults.point("step", 5)
    with pytest.raises(faults.InjectedError):
        faults.point("save:before_manifest")


def test_a_fault_can_strike_a_limited_number_of_times(monkeypatch):
    monkeypatch.setenv(faults.VARIABLE, "nan@loss:step=7:times=2")
    assert [faults.point("loss", step) for step in (7, 6, 7, 7)] == [True, False, True, False]


@pytest.mark.parametrize("text", ["explode@step=3", "kill@step=3:colour=red"])
def test_wrong_orders_are_named(text):
    with pytest.raises(ValueError, match=text):
        faults.parse(text)


@pytest.mark.parametrize("order", ["kill@step=2", "kill@step=2:after=0.05"])
def test_kill_is_a_real_kill(order):
    code = (
        "import time\nfrom bd3lm_scale.runtime.faults import point\n"
        "for step in range(5):\n    point('step', step)\n    print(step, flush=True)\n    time.sleep(0.2)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {faults.VARIABLE: order},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.split() == (["0", "1"] if "after" not in order else ["0", "1", "2"])
