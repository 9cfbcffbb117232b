"""Faults in the model, the training step and what judges it."""

from mutation.mutant import mutants_of

_DROPOUT = "tests/model/test_dropout.py::"
_UNRELATED = f"{_DROPOUT}test_every_layer_and_place_of_a_pass_has_a_mask_of_its_own"
_OBJECTIVE = "tests/test_objective_laws.py::"
_STEP = "tests/training/test_step.py::"
_TILES = "tests/model/test_tiles.py::"
_ANOMALY = "tests/runtime/test_anomaly.py::"

TRAINING = (
    *mutants_of(
        "bd3lm_scale/model/layer.py",
        (_UNRELATED,),
        (
            "dropout without 1/(1 - rate)",
            "return x * keep / (1 - rate)", "return x * keep",
            f"{_DROPOUT}test_what_is_kept_is_enlarged_so_that_the_mean_stays",
        ),
        ("dropout keyed without the layer", "dropout_site(self.layer_number, index, shard)", "dropout_site(0, index, shard)"),
        ("dropout keyed without the place", "dropout_site(self.layer_number, index, shard)", "dropout_site(self.layer_number, 0, shard)"),
        ("dropout keyed without the site", '"dropout", *coordinates)', '"dropout")'),
        ("dropout in evaluation", "context_mask if self.training else None", "context_mask"),
        (
            "scale without 1 +",
            "normed_PBD, 1 + scale_BD)", "normed_PBD, scale_BD)",
            f"{_OBJECTIVE}test_the_vectorized_pass_equals_two_passes",
        ),
        (
            "one gate for both branches",
            "return torch.addcmul(x, gate_m,", "return torch.addcmul(x, gate_a,",
            f"{_OBJECTIVE}test_the_vectorized_pass_equals_two_passes",
        ),
    ),
    *mutants_of(
        "bd3lm_scale/model/attention.py",
        (f"{_OBJECTIVE}test_the_vectorized_pass_equals_two_passes",),
        ("a causal mask for all", "is_causal=not self.is_full", "is_causal=True", f"{_OBJECTIVE}test_baselines_equal_the_plain_model"),
        ("one block more than the window", "distance < self.window_blocks", "distance <= self.window_blocks",
         "tests/model/test_decoding.py"),
        ("decoding sees earlier blocks only", "allowed = distance >= 0", "allowed = distance > 0", "tests/model/test_decoding.py"),
    ),
    *mutants_of(
        "bd3lm_scale/model/tiles.py",
        (f"{_TILES}test_any_pattern_is_summed_up_as_the_rule_says",),
        ("a tile whose last block is seen counts whole", "np.where(own_view, k_last <= q_first,", "np.where(own_view, k_last <= q_last,"),
        ("a tile whose first block is not seen is dropped", "(is_clean & (k_first < q_last))", "(is_clean & (k_last < q_last))"),
        ("blocks left out inside a piece", " | (step > 1)", ""),
        ("chunks without their bias", "None if bool(allowed.all()) else allowed", "None",
         f"{_TILES}test_chunks_cover_exactly_what_is_seen_and_share_their_biases"),
    ),
    *mutants_of(
        "bd3lm_scale/model/head.py",
        ("tests/model/test_head.py",),
        ("the mask is a candidate", " | (ids == config.mask_token_id)", ""),
        ("bf16 logits", "F.linear(x_RD.float(), weight_VD.float(), None if bias_V is None else bias_V.float())",
         "F.linear(x_RD.to(weight_VD.dtype), weight_VD, bias_V).float()"),
        ("no gradient for the bias", "grad_bias_V += grad_tile_V", "pass"),
        ("only the last tile's gradient", "grad_weight_VD.add_(grad_tile_VD)", "grad_tile_VD"),
        ("the target's gradient forgotten", "grad_TV.scatter_add_(1, local_T[:, None],", "(0 * grad_TV).scatter_add_(1, local_T[:, None],"),
    ),
    *mutants_of(
        "bd3lm_scale/model/denoiser.py",
        (f"{_OBJECTIVE}test_baselines_equal_the_plain_model",),
        ("sine before cosine in the time embedding", "torch.cat([angles.cos(), angles.sin()]", "torch.cat([angles.sin(), angles.cos()]"),
    ),
    *mutants_of(
        "bd3lm_scale/model/denoiser.py",
        (f"{_OBJECTIVE}test_the_vectorized_pass_equals_two_passes",),
        ("the clean half at later places", "(config.sequence_length) % config.context_length", "(config.sequence_length)"),
    ),
    *mutants_of(
        "bd3lm_scale/training/step.py",
        (f"{_STEP}test_every_step_and_micro_batch_has_its_own_noise_and_dropout",),
        ("dropout keyed without the step", '"dropout", step, int(n.position_B[0]))', '"dropout", int(n.position_B[0]))'),
        ("dropout alike in all micro-batches", '"dropout", step, int(n.position_B[0]))', '"dropout", step)'),
        ("the same noise at every step", "seed=config.seed, step=step, global", "seed=config.seed, step=0, global"),
        (
            "the loss not divided by the tokens",
            "        loss=loss_sum / tokens,", "        loss=loss_sum,",
            f"{_STEP}test_the_loss_starts_at_ln_of_the_ids_and_falls",
        ),
        (
            "gradients of the wrong sign",
            "scale = len(noised.micro_batches) *", "scale = -len(noised.micro_batches) *",
            f"{_STEP}test_the_loss_starts_at_ln_of_the_ids_and_falls",
        ),
        (
            "gradients not divided by the tokens",
            "* engine.mesh.data_size / tokens", "* engine.mesh.data_size",
            "tests/test_goldens.py::test_training_trajectory_equals_the_published_one",
        ),
    ),
    *mutants_of(
        "bd3lm_scale/training/trainer.py",
        ("tests/training/test_trainer.py",),
        ("a rollback reads the bad rows again", "(failed.step + 1 - self.step)", "(failed.step - self.step)"),
        ("a rollback forgets damaged shards", "Cursor(self.step, offset, failed.excluded_shards)", "Cursor(self.step, offset, ())"),
    ),
    *mutants_of(
        "bd3lm_scale/runtime/anomaly.py",
        (f"{_ANOMALY}test_spikes_are_judged_against_the_median_of_good_steps",),
        ("spikes judged from the first step", "len(self._losses) < MIN_STEPS_FOR_MEDIAN", "not self._losses"),
        (
            "scattered skips add up",
            "            self._skips_in_a_row = 0\n", "",
            f"{_ANOMALY}test_skips_in_a_row_end_the_run_but_scattered_ones_do_not",
        ),
        (
            "an infinite gradient passes",
            "if not math.isfinite(grad_norm):", "if False:",
            f"{_ANOMALY}test_non_finite_figures_get_the_configured_answer",
        ),
    ),
)  # fmt: skip
