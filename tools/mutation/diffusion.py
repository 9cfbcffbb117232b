"""Faults in diffusion/ and rng.py: schedules, times, masks, losses, likelihoods, the clip search, the samplers."""

from mutation.mutant import mutants_of

_HERE = "bd3lm_scale/diffusion/"
_TESTS = "tests/diffusion/"
_NOISE = f"{_TESTS}test_noising.py::"
_SEARCH = f"{_TESTS}test_clip_search.py::"
_LAWS = f"{_TESTS}samplers/test_sampler_laws.py::"
_EXACT = f"{_TESTS}samplers/test_exact_distributions.py::"

DIFFUSION = (
    *mutants_of(
        f"{_HERE}schedule.py",
        (f"{_TESTS}test_schedule.py",),
        ("sigma without its cap", "(-torch.log1p(-mask_rate)).clamp(max=MAX_SIGMA)", "-torch.log1p(-mask_rate)"),
        ("weight p' in place of p'/p", "self.mask_rate_slope(time) / self.mask_rate(time)", "self.mask_rate_slope(time)"),
    ),
    *mutants_of(
        f"{_HERE}schedules/standard.py",
        (f"{_TESTS}test_schedule.py",),
        ("cosine slope without the inner derivative", "* (math.pi / 2)) * (math.pi / 2),", "* (math.pi / 2)),"),
        ("weight below the floor of a power schedule", "rises = t.pow(exponent) > MIN_MASK_RATE", "rises = t > 0"),
        ("natural logarithm for the log schedule", "lambda t: torch.log1p(t) / math.log(2),", "torch.log1p,"),
        ("MDLM's scale without its margin", '_linear("loglinear", 1.0 - MIN_MASK_RATE)', '_linear("loglinear", 1.0)'),
    ),
    *mutants_of(
        f"{_HERE}noising.py",
        (f"{_NOISE}test_every_position_sees_all_times_at_micro_batch_1",),
        ("blocks keep their strata over the steps", 'f"{use} times", number)', 'f"{use} times", 0)'),
        ("the upper end of the interval forgotten", "low + (high - low) *", "low + high *"),
        (
            "the same rotation at every step",
            'f"{use} rotation", number)', 'f"{use} rotation", 0)',
            f"{_NOISE}test_the_rotation_of_the_strata_is_uniform_and_new_at_every_step",
        ),
        (
            "the middle of each stratum",
            "(point_BN + rotation) / size", "(point_BN + 0.5) / size",
            f"{_NOISE}test_the_rotation_of_the_strata_is_uniform_and_new_at_every_step",
        ),
        (
            "evaluation at training's times",
            'draw_times(seed, "evaluation", draw', 'draw_times(seed, "train", draw',
            f"{_NOISE}test_evaluation_times_do_not_follow_training_times_and_differ_by_draw",
        ),
    ),
    *mutants_of(
        f"{_HERE}noising.py",
        (f"{_NOISE}test_masks_are_drawn_anew_for_every_step_draw_row_and_seed",),
        ("training masks without the step", '"train masks", step, p)', '"train masks", p)'),
        ("training masks without the row", '"train masks", step, p)', '"train masks", step, 0)'),
        ("evaluation masks without the draw", '"evaluation masks", draw, row)', '"evaluation masks", row)'),
        (
            "evaluation counts a first token that is given",
            "counts_BL[first] &= training", "counts_BL[first] &= True",
            f"{_NOISE}test_evaluation_leaves_the_first_token_out_only_when_it_is_given",
        ),
        (
            "padding rows are scored",
            "is_scored_BL = is_masked_BL & is_real_B1", "is_scored_BL = is_masked_BL",
            f"{_NOISE}test_padding_rows_change_nothing",
        ),
        (
            "evaluation under the training schedule",
            'process.schedule if process.schedule.name == "loglinear" else get_schedule("loglinear")',
            "process.schedule",
            f"{_NOISE}test_evaluation_leaves_the_first_token_out_only_when_it_is_given",
        ),
        (
            "the clean half first",
            "torch.cat([noisy_BL, clean_BL], dim=1)", "torch.cat([clean_BL, noisy_BL], dim=1)",
            f"{_NOISE}test_masked_tokens_read_the_mask_and_weigh_p_prime_over_p",
        ),
        (
            "AR scored against the token before",
            "rows.tokens_BL.roll(-1, dims=1)", "rows.tokens_BL.roll(1, dims=1)",
            f"{_NOISE}test_next_token_rows_shift_by_one",
        ),
        (
            "the stream's hash without the times",
            "tokens.sum(dtype=np.uint64) + times.sum(dtype=np.uint64)", "tokens.sum(dtype=np.uint64)",
            f"{_NOISE}test_hash_notices_every_kind_of_change",
        ),
        (
            "resampling without its upper end",
            "(count_BN < first) | (count_BN > last)", "(count_BN < first)",
            f"{_NOISE}test_resample_keeps_the_masked_share_inside_the_interval",
        ),
    ),
    *mutants_of(
        f"{_HERE}loss.py",
        (f"{_TESTS}test_loss.py",),
        ("score entropy without its constant", "(head.target_logit_R - log_n) - 1.0", "(head.target_logit_R - log_n)"),
        (
            "padding rows multiplied away",
            "torch.where(head.is_real_R, loss_R * weight_R, 0.0)", "loss_R * weight_R * head.is_real_R",
        ),
        (
            "AR's mean over L tokens",
            'targets.first if process.objective == "ar" else 0', "0",
        ),
    ),
    *mutants_of(
        "bd3lm_scale/values.py",
        (f"{_TESTS}test_visibility.py",),
        ("a noisy block sees its own clean one", "(block_k < block_q)", "(block_k <= block_q)"),
        ("noisy text of earlier blocks is seen", "(view_k == CLEAN_VIEW) & (block_k < block_q)", "(block_k < block_q)"),
    ),
    *mutants_of(
        f"{_HERE}likelihood.py",
        (f"{_TESTS}test_likelihood.py",),
        ("rows' error without R/(R-1)", "math.sqrt(residual * rows / (rows - 1)) / n", "math.sqrt(residual) / n"),
        ("draws' error without 1/J", "loss_RJ.var(1).sum() / draws", "loss_RJ.var(1).sum()"),
        ("bits per byte from tokens", "x / (math.log(2) * num_bytes)", "nelbo / math.log(2)"),
    ),
    *mutants_of(
        f"{_HERE}mask_counts.py",
        (f"{_NOISE}test_full_masking_weighs_one",),
        ("t = 1 left to the schedule", "torch.where(time >= 1.0, 1.0, schedule.mask_rate(time))", "schedule.mask_rate(time)"),
        ("the weight at t = 1 left to the schedule", "torch.where(time >= 1.0, 1.0, schedule.loss_weight(time))", "schedule.loss_weight(time)"),
        (
            "stratified counts rounded to the nearest",
            "* size).ceil().long()", "* size).round().long()",
            f"{_NOISE}test_stratified_counts_are_equally_frequent_and_their_places_uniform",
        ),
        (
            "stratified weights without 1/k",
            "slope_BN * process.block_size / stratified_counts(time_BN, process))", "slope_BN * process.block_size)",
            f"{_NOISE}test_counts_and_weights_are_drawn_from_their_law",
        ),
    ),
    *mutants_of(
        f"{_HERE}clip_search.py",
        (f"{_SEARCH}test_choice_changes_only_for_more_than_one_percent",),
        ("no hysteresis", "in_force * (1.0 - HYSTERESIS)", "in_force"),
        (
            "a smaller loss is a less noisy one",
            "self.variance / self.weight**2", "self.variance",
            f"{_SEARCH}test_a_smaller_scale_of_the_loss_is_no_advantage",
        ),
        (
            "the mean not squared away",
            "variance = square - mean**2 +", "variance = square - mean +",
            f"{_SEARCH}test_every_interval_has_the_enumerated_variance_within_its_error_bar",
        ),
        (
            "padding rows measured",
            "keep = noisy.is_real_B[:, None].cpu()", "keep = torch.ones_like(noisy.is_real_B)[:, None].cpu()",
            f"{_SEARCH}test_moments_add_up_over_ranks_and_survive_a_checkpoint",
        ),
    ),
    *mutants_of(
        f"{_HERE}variance.py",
        (f"{_TESTS}test_variance.py",),
        ("gradient variance over K", "/ self.count) / (self.count - 1)", "/ self.count) / self.count"),
        ("noise left in the signal", "max(0.0, mean_norm - variance / self.count)", "max(0.0, mean_norm)"),
    ),
    *mutants_of(
        f"{_HERE}samplers/blocks.py",
        (f"{_LAWS}test_what_lies_behind_the_length_is_not_part_of_a_sample",),
        ("the tail of the last block is searched", "num_done = min(num_done, self.request.length)", "num_done = num_done + 0"),
        ("samples as long as their blocks", "np.full(size, request.length)", "np.full(size, padded_length)"),
        (
            "the tail counts as progress",
            "task.is_masked_BS[:, : request.length - start].sum()", "task.is_masked_BS.sum()",
            f"{_LAWS}test_progress_adds_up_to_the_new_tokens",
        ),
    ),
    *mutants_of(
        f"{_HERE}samplers/request.py",
        (f"{_LAWS}test_draws_depend_on_the_position_alone", f"{_LAWS}test_a_sample_does_not_depend_on_its_batch"),
        ("draws keyed by the place in the batch", "request.sample_index[row], *coordinates", "row, *coordinates"),
        ("every block draws the same", "counter=start).reshape", "counter=0).reshape"),
        ("when and which from one draw", "return draws[:, :, 0], draws[:, :, 1]", "return draws[:, :, 0], draws[:, :, 0]",
         f"{_EXACT}test_first_hitting_draws_from_the_exact_joint",
         f"{_EXACT}test_parallel_decoding_draws_from_its_exact_joint",
         f"{_EXACT}test_ancestral_with_few_steps_draws_from_its_exact_joint"),
    ),
    *mutants_of(
        f"{_HERE}samplers/reveal.py",
        (f"{_LAWS}test_reveal_steps_take_every_masked_position_once_in_falling_order",),
        ("rising order of reveal", "np.unique(-cell_BS[row, is_masked]", "np.unique(cell_BS[row, is_masked]"),
    ),
    *mutants_of(
        f"{_HERE}samplers/stopping.py",
        (f"{_LAWS}test_end_of_text_ends_a_sample_just_after_its_first_one_behind_the_prompt",),
        ("the end of text cut off", 'return "eos", first + int(found[0]) + 1', 'return "eos", first + int(found[0])'),
        ("a prompt may end a sample", "first = max(prompt_length, num_checked)", "first = num_checked"),
    ),
    *mutants_of(
        f"{_HERE}samplers/filtering.py",
        (f"{_TESTS}samplers/test_filtering.py",),
        (
            "the token that crosses p is kept",
            'token_filter.nucleus_p * sums[-1], side="right")))', 'token_filter.nucleus_p * sums[-1], side="right")) + 1)',
        ),
        ("temperature multiplies", "logits_V.dtype.type(token_filter.factor)", "logits_V.dtype.type(token_filter.temperature)"),
    ),
    *mutants_of(
        f"{_HERE}samplers/analytic.py",
        (f"{_EXACT}test_sedd_analytic_draws_from_the_joint_its_scores_belong_to",
         f"{_EXACT}test_sedd_reveals_in_proportion_to_the_total_score"),
        ("reveals without the total score", "share * log_z_BI.exp().cpu().numpy()", "share + 0 * log_z_BI.cpu().numpy()"),
    ),
    *mutants_of(
        "bd3lm_scale/rng.py",
        (f"{_NOISE}test_masks_are_drawn_anew_for_every_step_draw_row_and_seed",),
        ("keys without the seed", "[str(int(seed)), purpose,", "[purpose,"),
        ("keys without coordinates", "*(str(int(c)) for c in coordinates)]", "]"),
    ),
)  # fmt: skip
