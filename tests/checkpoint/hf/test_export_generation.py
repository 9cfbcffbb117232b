"""generation_config.json says what the run's samples would have: its start, its sampler, its filters."""

import json
from dataclasses import replace

import pytest

from bd3lm_scale.checkpoint.hf.export import chosen_sampler, export_hf, generation_fields
from bd3lm_scale.checkpoint.hf.importing import import_hf
from bd3lm_scale.checkpoint.hf.modeling_bd3lm import BD3LM
from bd3lm_scale.checkpoint.hf.tokenizer_files import TokenizerReport
from tests.checkpoint.test_conversion import configuration, native

TOKENIZER = TokenizerReport(
    "sentencepiece", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "mask_token_id": 9}
)


def fields_of(config, tokenizer=TOKENIZER, sampler=None):
    return generation_fields(config, tokenizer, chosen_sampler(config, sampler))


def sampling(objective="bd3lm", **values):
    config = configuration(objective)
    return replace(config, sampling=replace(config.sampling, **values))


def test_text_starts_with_what_precedes_documents_in_training():
    config = configuration()
    assert fields_of(config)["bos_token_id"] == 2, "EOS stands between documents"
    wrapped = replace(config, data=replace(config.data, wrap_rows=True))
    assert fields_of(wrapped)["bos_token_id"] == 1, "wrapped rows begin with BOS"
    assert "bos_token_id" not in fields_of(config, tokenizer=None)


@pytest.mark.parametrize(
    ("objective", "sampler", "expected"),
    [
        ("bd3lm", "auto", "first_hitting"),
        ("bd3lm", "ancestral", "ancestral"),
        ("bd3lm", "confidence", "confidence"),
        ("mdlm", "entropy", "entropy"),
        ("sedd", "auto", "analytic"),
        ("ar", "auto", "ar"),
    ],
)
def test_the_runs_sampler_is_the_exports(tmp_path, objective, sampler, expected):
    config = sampling(objective, sampler=sampler, threshold=0.7, steps=11, nucleus_p=0.8, top_k=5, length=12)
    assert fields_of(config)["sampler"] == expected
    export_hf(native(tmp_path / "native", config), tmp_path / "hf")
    model = BD3LM.from_pretrained(tmp_path / "hf")
    settings = model._settings(None, {})
    assert (settings.sampler, settings.threshold, settings.num_steps) == (expected, 0.7, 11)
    assert (settings.top_p, settings.top_k, settings.max_new_tokens, settings.do_sample) == (0.8, 5, 12, True)


def test_a_greedy_run_gives_a_greedy_export(tmp_path):
    export_hf(native(tmp_path / "native", sampling(temperature=0.0, top_k=50)), tmp_path / "hf")
    settings = BD3LM.from_pretrained(tmp_path / "hf")._settings(None, {})
    assert (settings.do_sample, settings.top_k) == (False, 50)


def test_a_sampler_the_class_does_not_have_is_refused_and_can_be_replaced(tmp_path):
    config = sampling(sampler="analytic")
    with pytest.raises(ValueError, match=r"sampling.sampler \(analytic\).*--sampler first_hitting or ancestral"):
        chosen_sampler(config)
    with pytest.raises(ValueError, match=r"sampling.sampler \(mine\)"):
        export_hf(native(tmp_path / "native", configuration()), tmp_path / "none", sampler="mine")
    assert not (tmp_path / "none").exists(), "nothing was written"
    export_hf(native(tmp_path / "other", sampling(sampler="ancestral")), tmp_path / "hf", sampler="entropy")
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["sampler"] == "entropy"


def test_earlier_exports_are_read_as_they_were_meant(tmp_path):
    """They say first_hitting of every model, name no threshold, and leave top_k out where there is none."""
    for objective, expected in (("sedd", "analytic"), ("ar", "ar"), ("bd3lm", "first_hitting")):
        folder = tmp_path / objective
        export_hf(native(tmp_path / f"{objective}_native", configuration(objective)), folder)
        path = folder / "generation_config.json"
        old = {
            "do_sample": True,
            "max_new_tokens": 8,
            "temperature": 1.0,
            "top_p": 0.9,
            "sampler": "first_hitting",
            "num_steps": 4,
        }
        path.write_text(json.dumps(old))
        settings = BD3LM.from_pretrained(folder)._settings(None, {})
        assert (settings.sampler, settings.top_k, settings.max_new_tokens, settings.do_sample) == (
            expected,
            None,
            8,
            True,
        )


def test_wrapped_rows_survive_the_way_back(tmp_path):
    config = configuration()
    for wrap in (True, False):
        export_hf(
            native(tmp_path / f"n{wrap}", replace(config, data=replace(config.data, wrap_rows=wrap))),
            tmp_path / f"{wrap}",
        )
        _, meta = import_hf(tmp_path / f"{wrap}")
        assert meta["config"]["data"]["wrap_rows"] is wrap
