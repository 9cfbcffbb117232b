import json
import math

import pytest

from bd3lm_scale.config.schema import RuntimeConfig
from bd3lm_scale.runtime.anomaly import AnomalyPolicy


@pytest.mark.parametrize(("loss", "grad_norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
@pytest.mark.parametrize("action", ["skip", "rollback", "stop"])
def test_non_finite_figures_get_the_configured_answer(action, loss, grad_norm):
    policy = AnomalyPolicy(RuntimeConfig(on_nan=action))
    assert policy.observe(1, 2.0, 1.0) == "ok"
    assert policy.reason == ""
    assert policy.observe(2, loss, grad_norm) == action
    assert policy.counts["non_finite"] == 1
    assert ("loss" if not math.isfinite(loss) else "gradient") in policy.reason
    assert policy.observe(3, 2.0, 1.0) == "ok"


def test_skips_in_a_row_end_the_run_but_scattered_ones_do_not():
    policy = AnomalyPolicy(RuntimeConfig(on_nan="skip", max_skips=3))
    for step in range(20):
        assert policy.observe(step, math.nan if step % 2 else 1.0, 1.0) == ("skip" if step % 2 else "ok")
    answers = [policy.observe(20 + i, math.nan, 1.0) for i in range(4)]
    assert answers == ["skip", "skip", "stop", "stop"]  # step 19 was a skip too
    assert "runtime.max_skips" in policy.reason
    assert policy.counts["skip"] == 12


def test_rollbacks_without_getting_past_the_bad_step_end_the_run():
    policy = AnomalyPolicy(RuntimeConfig(on_nan="rollback", max_rollbacks=2))
    answers = []
    for _ in range(3):  # steps 5..9 go well each time, step 10 never does
        answers += [policy.observe(step, 1.0, 1.0) for step in range(5, 10)] + [policy.observe(10, math.nan, 1.0)]
    assert [a for a in answers if a != "ok"] == ["rollback", "rollback", "stop"]

    policy = AnomalyPolicy(RuntimeConfig(on_nan="rollback", max_rollbacks=2))
    for bad in (10, 20, 30, 40):
        assert policy.observe(bad, math.nan, 1.0) == "rollback"
        assert policy.observe(bad + 1, 1.0, 1.0) == "ok"
    assert policy.counts["rollback"] == 4


def test_spikes_are_judged_against_the_median_of_good_steps():
    policy = AnomalyPolicy(RuntimeConfig(spike_factor=2.0, on_nan="skip"))
    assert policy.observe(0, 1000.0, 1.0) == "ok", "no judgement before there is a median"
    for step in range(1, 40):
        assert policy.observe(step, 100.0 if step == 19 else 4.0, 1.0) == "ok", "the 20th step is not judged yet"
    assert policy.observe(40, 8.1, 1.0) == "skip"
    assert policy.observe(41, 7.9, 1.0) == "ok"
    assert policy.counts == {"non_finite": 0, "spike": 1, "skip": 1, "rollback": 0}
    assert AnomalyPolicy(RuntimeConfig()).observe(41, 1e9, 1.0) == "ok", "off by default"


def test_resumed_policy_decides_like_the_uninterrupted_one():
    config = RuntimeConfig(spike_factor=1.5, on_nan="skip", max_skips=3)
    losses = [3 + math.sin(7 * i) for i in range(60)] + [
        9,
        3,
        math.nan,
        math.nan,
        3,
        9,
        math.nan,
        math.nan,
        math.nan,
        3,
    ]
    whole = AnomalyPolicy(config)
    expected = [whole.observe(step, loss, 1.0) for step, loss in enumerate(losses)]
    assert {"ok", "skip", "stop"} == set(expected)
    for cut in (1, 30, 63, 67):
        first = AnomalyPolicy(config)
        answers = [first.observe(step, losses[step], 1.0) for step in range(cut)]
        second = AnomalyPolicy(config)
        second.restore(json.loads(json.dumps(first.state())))
        answers += [second.observe(step, losses[step], 1.0) for step in range(cut, len(losses))]
        assert answers == expected
        assert second.counts == whole.counts


def test_rollback_does_not_forget_that_it_happened():
    policy = AnomalyPolicy(RuntimeConfig(on_nan="rollback"))
    saved = policy.state()
    policy.observe(3, math.nan, 1.0)
    policy.restore(saved)
    assert policy.counts["rollback"] == 1
