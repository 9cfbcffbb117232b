"""YAML's traps and limits: no number is read as another one, nothing unfolds, nests or hangs without end."""

import itertools
import time

import pytest

from bd3lm_scale.config.checks import _nearest_micro_batch_size
from bd3lm_scale.config.load import from_dict, load_config
from bd3lm_scale.config.schema import MOST
from bd3lm_scale.config.yaml_text import MAX_ALIASES, MAX_DEPTH, MAX_VALUES, YamlTextError, parse
from bd3lm_scale.errors import ConfigError
from tools.fuzz_config import attempt, cases

MINIMAL = "run_dir: runs/x\ndata: {path: data/x}\n"


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL)
    return file


def problems_of(path, *overrides) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    return caught.value.problems


def test_a_thousand_random_documents_and_overrides_run_or_are_refused_clearly(tmp_path):
    outcomes = [(case, *attempt(case, tmp_path)) for case in itertools.islice(cases(seed=20), 1000)]
    assert [found for found in outcomes if found[1] == "failed"] == []
    for outcome in ("accepted", "refused"):
        assert sum(found[1] == outcome for found in outcomes) > 20, outcome


@pytest.mark.parametrize(
    ("override", "shown", "reason", "remedy"),
    [
        ("train.steps=010", "010", "octal", "use 10,"),
        ("train.steps=-010", "-010", "octal", "use -10,"),
        ("train.steps=0_17", "0_17", "octal", "use 17,"),
        ("train.steps=08", "08", "whole number", "use train.steps=8"),
        ("train.steps=1:30", "1:30", "sixties", "plain number"),
        ("optim.lr=1:30.5", "1:30.5", "sixties", "plain number"),
        ("data.path=010", "010", "octal", "quotes"),
        ("logging.wandb_name=no", "no", "must be text", "quotes: logging.wandb_name='\"no\"'"),
        ("logging.wandb_name=1_000", "1_000", "must be text", "'\"1_000\"'"),
        ("run_dir=1e3", "1e3", "must be text", "'\"1e3\"'"),
        ("logging.wandb=off", "off", "must be one of", "use disabled"),
        ("parallel.recompute=no", "no", "must be one of", "use none"),
        ("train.compile=1", "1", "true or false", "use train.compile=true"),
        ("train.steps=abc", "abc", "whole number", "for example train.steps=1000000"),
        ("train.steps=10k", "10k", "whole number", "use train.steps=10000"),
        ("train.steps=1,000", "1,000", "whole number", "use train.steps=1000"),
        ("train.steps=1.5", "1.5", "whole number", "use train.steps=1 or train.steps=2"),
        ("optim.lr=3e-4x", "3e-4x", "a number", "for example optim.lr=0.0003"),
        ("diffusion.clip_high=50%", "50%", "a number", "use diffusion.clip_high=0.5"),
        ("model.num_layers=1000000000", "1000000000", "must lie in [1, 10000]", "use for example 12"),
    ],
)
def test_a_value_that_is_not_what_it_seems_is_shown_as_written_with_what_was_meant(
    path, override, shown, reason, remedy
):
    (line,) = problems_of(path, override)
    assert line.startswith(f"{override.partition('=')[0]} ({shown}): ")
    assert reason in line
    assert remedy in line
    name, _, value = override.partition("=")
    file = path.with_name("whole.yaml")
    section, _, leaf = name.rpartition(".")
    rest = "" if name == "run_dir" else "run_dir: runs/x\n"
    rest += "" if section == "data" else "data: {path: data/x}\n"
    file.write_text(
        rest + (f"{section}: {{{leaf}: {value}}}\n" if section and "," not in value else f"{name}: {value}\n")
    )
    if "," not in value:
        assert problems_of(file) == [line], "the same in a file"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=1e3", 1000), ("train.steps=1_000", 1000), ("train.steps=0x10", 16), ("train.compile=yes", True),
        ("train.compile=off", False), ("optim.lr=1e-3", 1e-3), ("data.path=2024-01-01", "2024-01-01"),
        ("data.path='010'", "010"), ("optim.min_lr=0", 0.0), ("data.path=!!str 5", "5"),
    ],
)  # fmt: skip
def test_what_has_one_reading_is_read(path, override, value):
    name = override.partition("=")[0]
    section, leaf = name.split(".")
    read = getattr(getattr(load_config(path, [override]), section), leaf)
    assert read == value
    assert type(read) is type(value)


def test_an_override_takes_the_place_of_a_value_with_two_readings(path):
    path.write_text(MINIMAL + "train: {steps: 010}\n")
    assert "octal" in problems_of(path)[0]
    assert load_config(path, ["train.steps=10"]).train.steps == 10


def test_anchors_and_merge_keys_work_within_the_limits(path):
    path.write_text(
        "run_dir: x\ndata: {mixture: [&a {path: a, weight: 2}, {<<: *a, path: b}]}\n"
        "checkpoint: {every_steps: &n 50, keep_every: *n}\n"
    )
    config = load_config(path)
    assert [(source.path, source.weight) for source in config.data.mixture] == [("a", 2.0), ("b", 2.0)]
    assert (config.checkpoint.every_steps, config.checkpoint.keep_every) == (50, 50)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "deeper"),
        ("[" * 100_000, "deeper"),
        ("a: &a [*a]", "stands in"),
        ("a: &a 1\nb: [" + "*a, " * (MAX_ALIASES + 1) + "]", "aliases"),
        ("a0: &a0 [1, 1, 1, 1]\n" + "\n".join(f"a{i}: &a{i} [*a{i-1}, *a{i-1}, *a{i-1}, *a{i-1}]" for i in range(1, 9)),
         "values"),
        ("a: [" + "1, " * (MAX_VALUES + 1) + "]", "values"),
        ("a: " + "x" * 300_000, "larger"),
        ("a: 1\na: 2", "twice"),
        ("1: 2\n? [a]\n: 3", "must be a name"),
        ("a: !!binary aGk=", "tag"),
        ("a: !!bool 3", "is no bool"),
        ("a: !!int x", "is no int"),
        ("a: !!float abc", "is no float"),
        ("a: " + "9" * 5000, "is no int"),
    ],
)  # fmt: skip
def test_what_is_too_deep_too_large_or_refers_to_itself_is_refused_at_once(text, reason):
    started = time.process_time()
    with pytest.raises(YamlTextError, match=reason) as caught:
        parse(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert time.process_time() - started < 1.0


def test_saved_configurations_have_the_same_limits():
    deep: dict = {}
    for _ in range(50_000):
        deep = {"a": deep}
    for values, reason in ((deep, "deeper"), ({"a": [1] * 100_000}, "values"), ({1: 2}, "text")):
        with pytest.raises(ConfigError, match=reason):
            from_dict(values)
        with pytest.raises(ConfigError, match=reason):
            from_dict(values, ["train.steps=5"])


def test_the_nearest_micro_batch_size_is_that_of_a_search_over_all():
    for rows, replicas, stages, wanted in itertools.product(range(1, 40), (1, 2, 3, 5), (2, 3, 4), (1, 2, 5, 40)):
        legal = [size for size in range(1, rows + 1) if -(-rows // (replicas * size)) % stages == 0]
        best = min(legal, key=lambda size: (abs(size - wanted), size), default=None)
        assert _nearest_micro_batch_size(rows, replicas, stages, wanted) == best, (rows, replicas, stages, wanted)
    started = time.process_time()
    assert _nearest_micro_batch_size(MOST, 1, 3, 8) is not None
    assert time.process_time() - started < 1.0
