"""Loading: defaults < YAML < overrides, typed, every problem at once, and back without loss."""

import json
import re

import pytest

from bd3lm_scale.config.fields import field_names, field_rules, value_of
from bd3lm_scale.config.load import from_dict, load_config, to_dict, to_yaml
from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    def write(text: str):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


MINIMAL = "run_dir: runs/x\ndata: {path: data/x}\n"


def problems_of(path, *overrides) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    assert len(str(caught.value).splitlines()) == 1 + len(caught.value.problems)
    return caught.value.problems


def test_overrides_win_over_yaml_and_yaml_over_defaults(write):
    path = write(MINIMAL + "train: {steps: 7, micro_batch_size: 2}\n")
    config = load_config(path, ["train.steps=9", "optim.lr=1e-3", "data.cache_dir=null"])
    assert (config.train.steps, config.train.micro_batch_size) == (9, 2)
    assert config.train.global_batch_size == RunConfig().train.global_batch_size
    assert config.optim.lr == 1e-3
    assert config.data.cache_dir is None


def test_values_arrive_with_the_type_of_the_schema(write):
    config = load_config(
        write(MINIMAL), ["train.steps=1e6", "optim.lr=1", "diffusion.clip_search.widths=[0.5,1]", "train.compile=true"]
    )
    assert config.train.steps == 1_000_000
    assert type(config.train.steps) is int
    assert type(config.optim.lr) is float
    assert config.diffusion.clip_search.widths == (0.5, 1.0)
    assert config.train.compile is True
    for name in field_names():
        value = value_of(config, name)
        assert value is None or isinstance(value, bool | int | float | str | tuple), name


def test_mixture_is_read_as_typed_sources(write):
    config = load_config(write("run_dir: r\n"), ["data.mixture=[{path: a, weight: 2}, {path: b}]"])
    assert [(source.path, source.weight) for source in config.data.mixture] == [("a", 2.0), ("b", 1.0)]
    assert from_dict(to_dict(config)) == config


def test_dict_json_and_yaml_round_trips_lose_nothing(write, tmp_path):
    config = load_config(
        write(MINIMAL), ["optim.lr=3e-05", "sampling.top_k=5", "diffusion.time_epsilon=0.0012345678901"]
    )
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    copy = tmp_path / "config.yaml"
    copy.write_text(to_yaml(config))
    assert load_config(copy) == config


def test_all_problems_are_reported_at_once_with_field_value_reason_and_remedy(write):
    path = write(MINIMAL + "optim: {lr: fast}\ntrain: {stepz: 5}\n")
    found = problems_of(path, "precision=float16", "data.workers=-1", "diffusion.block_size=15")
    assert [line.split(" ")[0] for line in sorted(found)] == [
        "data.workers",
        "diffusion.block_size",
        "optim.lr",
        "precision",
        "train.stepz",
    ]
    for line in found:
        assert re.match(r"[\w.]+ \(.*\): ", line), line
        assert "use " in line or "did you mean" in line, line


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("train.stepz=1", "train.steps"),
        ("block_size=4", "diffusion.block_size"),
        ("optim.learning_rat=1", "optim"),
        ("model.layers=2", "model.num_layers"),
        ("diffusion.clip_search.stp=0.1", "diffusion.clip_search.step"),
        ("modle.num_layers=1", "model"),
        ("data.mixture=[{path: a, wight: 2}]", "weight"),
    ],
)
def test_unknown_fields_name_what_was_meant(write, override, meant):
    lines = [line for line in problems_of(write(MINIMAL), override) if "unknown field" in line]
    assert len(lines) == 1
    assert meant in lines[0].split("unknown field")[1]


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.steps=1.5", "whole number"),
        ("train.steps=true", "whole number"),
        ("train.steps=null", "whole number"),
        ("train.steps=.inf", "whole number"),
        ("optim.lr=abc", "a number"),
        ("train.compile=1", "true or false"),
        ("run_dir=2024", "must be text"),
        ("data=3", "is a section"),
        ("diffusion.clip_search.widths=0.5", "must be a list"),
        ("data.mixture=[3]", "is a section"),
        ("run_dir=${oc.env:HOME}", "interpolation"),
        ("optim.eps=${optim.lr}", "interpolation"),
        ("optim.lr=.nan", "must lie in"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(write, override, reason):
    found = problems_of(write(MINIMAL), override)
    assert any(line.startswith(override.split("=")[0]) and reason in line for line in found), found


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("run_dir: [", "not readable as YAML"),
        ("run_dir: a\nrun_dir: b\n", "not readable as YAML"),
        ("- 1\n- 2\n", "holds no sections"),
        ("", "run_dir (???): is required; use run_dir=..."),
        ("run_dir: !!python/object/apply:os.system [x]\n", "not readable as YAML"),
        ("run_dir: ${\n", ""),
    ],
)
def test_broken_files_are_one_clear_error(write, text, reason):
    assert any(reason in line for line in problems_of(write(text)))


def test_missing_file_names_a_near_one(write):
    path = write(MINIMAL)
    assert str(path) in problems_of(path.with_name("rum.yaml"))[0]


def test_an_override_without_a_value_is_refused(write):
    assert "train.steps" in problems_of(write(MINIMAL), "train.steps")[0]


def test_every_number_has_an_interval_and_every_name_its_choices():
    """A number without an interval or a name without its choices would slip through unchecked."""
    free_text = {"run_dir", "data.path", "data.cache_dir", "data.tokenizer", "train.init_from"}
    free_text |= {"logging.wandb_project", "logging.wandb_name", "data.mixture[].path"}
    elsewhere = {"optim.zero_stage"}
    rules = field_rules()
    for name, rule in rules.items():
        if rule.kind in (int, float):
            assert rule.interval is not None or name in elsewhere, name
        elif rule.kind is str:
            assert bool(rule.choices) != (name in free_text), name
    assert free_text | elsewhere <= set(rules)
