"""Faults in what lasts: the sample order, the optimizer, the checkpoints."""

from mutation.mutant import mutants_of

_ORDER = "tests/data/test_order.py::"
_STORE = "tests/checkpoint/test_store.py::"
_CUT = (
    "tests/test_power_cut.py::test_every_cut_resumes_to_the_undisturbed_run",
    "tests/test_power_cut.py::test_no_cut_leaves_a_file_that_a_later_start_cannot_use",
)
_ROWS = f"{_ORDER}test_rows_are_permuted_anew_in_every_window_epoch_and_source"

STATE = (
    *mutants_of(
        "bd3lm_scale/data/order.py",
        (_ROWS,),
        ("rows keyed without the window", '"rows", self.source, epoch, int(number))', '"rows", self.source, epoch)'),
        ("rows keyed without the epoch", '"rows", self.source, epoch, int(number))', '"rows", self.source, int(number))'),
        ("rows keyed without the source", '"rows", self.source, epoch, int(number))', '"rows", epoch, int(number))'),
        (
            "shards keyed without the epoch",
            '"shards", self.source, epoch)', '"shards", self.source)',
            f"{_ORDER}test_shards_are_permuted_anew_in_every_epoch_and_source",
        ),
        (
            "the last window forgotten",
            "table.shard[window * self.window : (window + 2) * self.window]",
            "table.shard[window * self.window : (window + 1) * self.window]",
            f"{_ORDER}test_shards_needed_are_those_of_this_window_and_the_next",
        ),
        (
            "substitutes alike for all samples",
            "astype(np.uint64) ^ base)", "astype(np.uint64) * 0 ^ base)",
            f"{_ORDER}test_substitutes_are_spread_over_all_that_is_left",
        ),
        (
            "the mixture alike in every period",
            '"mixture", int(number))', '"mixture")',
            f"{_ORDER}test_mixture_uses_every_sample_once_and_weights_hold_in_each_period",
        ),
    ),
    *mutants_of(
        "bd3lm_scale/optim/lr.py",
        ("tests/optim/test_lr.py",),
        ("half of the cosine", "math.cos(math.pi * progress)", "math.cos(math.pi * progress / 2)"),
        ("the warm-up one step ahead", "config.lr * step / config.warmup_steps", "config.lr * (step + 1) / config.warmup_steps"),
        ("the cosine over the warm-up too", "(step - config.warmup_steps) / span", "step / span"),
    ),
    *mutants_of(
        "bd3lm_scale/optim/ema.py",
        ("tests/optim/test_ema.py",),
        ("the average at the wrong end", "weight: Tensor | float = 1 - self.ema_decay", "weight: Tensor | float = self.ema_decay"),
        ("the decay without its warm-up", "min(decay, (1 + updates) / (10 + updates))", "decay"),
        ("a discarded step is taken", "self.found_inf = dropped.float()", "self.found_inf = dropped.float() * 0"),
        ("a discarded step is averaged in", "weight = torch.where(dropped, 0.0, weight)", "pass"),
    ),
    *mutants_of(
        "bd3lm_scale/optim/zero.py",
        ("tests/optim/test_zero.py",),
        ("gradients reduced in the model's precision", '"communication_data_type": config.reduce_dtype,', ""),
        ("gradients accumulated in bf16", 'derived["data_types"] = {"grad_accum_dtype": "fp32"}', "pass"),
    ),
    *mutants_of(
        "bd3lm_scale/checkpoint/files.py",
        ("tests/checkpoint/test_damage.py::test_damage_table",),
        ("a data file not durable", "        os.fsync(file.fileno())\n    return DataFile(", "    return DataFile(", *_CUT),
        ("checksums not compared", "return None if found == sha256 else", "return None if True else"),
        (
            "sizes not compared",
            "if size != size_bytes:", "if False:",
            "tests/checkpoint/test_damage.py::test_a_file_that_shrinks_while_it_is_read_is_an_error",
        ),
    ),
    *mutants_of(
        "bd3lm_scale/checkpoint/folders.py",
        (f"{_STORE}test_keep_last_and_keep_every",),
        ("one checkpoint too few is kept", "list_steps(folder)[max(1, keep_last) :]", "list_steps(folder)[max(1, keep_last - 1) :]"),
        ("keep_every ignored", "if not (keep_every and number % keep_every == 0):", "if True:"),
        (
            "the future of an abandoned line stays",
            "if item[0] > step):", "if item[0] > step and False):",
            f"{_STORE}test_going_back_abandons_the_later_checkpoints",
        ),
        (
            "a replaced checkpoint does not come back",
            "            rename(path, original)", "            shutil.rmtree(path)",
            f"{_STORE}test_death_between_the_two_renames_of_a_replacement_loses_nothing",
        ),
        (
            "leftovers of dead saves stay",
            "shutil.rmtree(left, ignore_errors=True)", "pass",
            f"{_STORE}test_leftovers_of_dead_saves_are_ignored_and_removed",
        ),
        (
            "a checkpoint's name not durable",
            "    temporary.rename(final)\n    sync_folder(final.parent)\n", "    temporary.rename(final)\n",
            f"{_STORE}test_a_finished_checkpoint_has_a_durable_name",
        ),
    ),
    *mutants_of(
        "bd3lm_scale/runtime/durable.py",
        _CUT,
        (
            "a run's small file not durable",
            "            file.flush()\n            os.fsync(file.fileno())\n", "            file.flush()\n",
        ),
        (
            "a copied tokenizer not durable",
            '            with open(Path(folder, name), "rb") as file:\n                os.fsync(file.fileno())\n',
            "            pass\n",
        ),
    ),
    *mutants_of(
        "bd3lm_scale/checkpoint/store.py",
        (f"{_STORE}test_asynchronous_save_holds_the_moment_of_the_call",),
        (
            "an asynchronous save without a copy",
            "return boxes, self._copy(runs) if self.config.asynchronous else runs", "return boxes, runs",
        ),
        ("a checkpoint's entries not durable before its name", "                sync_folder(folder)\n", "", *_CUT),
    ),
)  # fmt: skip
