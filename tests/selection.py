"""Which of many parametrized cases run by default."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def slow_but(fast: Sequence[int], rows: Iterable[Any]) -> list[Any]:
    """``rows`` for ``parametrize``, of which those at the positions ``fast`` run by default, all others when slow."""
    rows = list(rows)
    assert set(fast) <= set(range(len(rows))), f"{fast} of {len(rows)} rows"
    values = [row if isinstance(row, tuple) else (row,) for row in rows]
    return [
        row if number in fast else pytest.param(*value, marks=pytest.mark.slow)
        for number, (row, value) in enumerate(zip(rows, values))
    ]


def one_each(first: Iterable[Any], second: Iterable[Any], fast: Sequence[tuple[int, int]] = ()) -> list[Any]:
    """All pairs for ``parametrize``; by default as many run as show each of ``first`` and each of ``second``.

    ``fast``: the positions of other pairs, to run in place of those.
    """
    firsts, seconds = ([row if isinstance(row, tuple) else (row,) for row in rows] for rows in (first, second))
    less = min(len(firsts), len(seconds))
    pairs = [(i, j) for i in range(len(firsts)) for j in range(len(seconds))]
    assert set(fast) <= set(pairs), f"{fast} of {len(firsts)} x {len(seconds)} pairs"
    chosen = [
        number for number, pair in enumerate(pairs) if (pair in fast if fast else pair[0] % less == pair[1] % less)
    ]
    return slow_but(chosen, [firsts[i] + seconds[j] for i, j in pairs])


# Rows and tests that repeat a kind which another default one shows, and take seconds: slow, wherever they are made.
REPEATED = """
analysis/test_folded_text.py::test_folds_say_exactly_what_they_hide[models.llama-mesh3-*
analysis/test_folded_text.py::test_folds_say_exactly_what_they_hide[models.t5-*
analysis/test_footprint.py::test_traffic_is_that_of_a_step[dp=2,tp=3-megatron]
analysis/test_footprint.py::test_traffic_is_that_of_a_step[dp=2-none]
autodiff/test_deepen.py::test_programs_are_those_of_all_blocks[a sum over blocks]
autodiff/test_deepen.py::test_programs_are_those_of_all_blocks[a weight is returned]
autodiff/test_deepen.py::test_programs_are_those_of_all_blocks[a weight of all]
autodiff/test_deepen.py::test_programs_are_those_of_all_blocks[in another order before the run]
autodiff/test_deepen.py::test_programs_are_those_of_all_blocks[in another order each time]
autodiff/test_deepen.py::test_programs_are_those_of_all_blocks[in another order once]
autodiff/test_deepen.py::test_programs_are_those_of_all_blocks[kinds in turns]
autodiff/test_deepen.py::test_programs_are_those_of_all_blocks[recomputed]
benchmarks/test_experts.py::test_the_peer_computes_what_the_model_computes[1]
benchmarks/test_experts.py::test_the_peer_computes_what_the_model_computes[2]
benchmarks/test_sequence.py::test_peers_compute_what_the_model_computes[2-ring]
checkpoint/test_checkpoints.py::test_from_mesh_to_mesh[from a split sequence]
checkpoint/test_torch_checkpoints.py::test_a_run_moves_to_another_mesh[tp-zero]
commands/test_command_line.py::test_compile_and_run
commands/test_models_by_name.py::test_coverage_takes_a_model_of_any_form
data/test_padding.py::test_results_are_those_without_padding[t5-sp=2]
end_to_end/test_data_axes.py::test_no_byte_more_than_the_formulas_for_all_ranks_together[dp=1,sp=4]
end_to_end/test_data_axes.py::test_training_a_transformer_equals_one_process[*
end_to_end/test_equivalence.py::test_equals_the_model[cnn-dp=3,tp=2]
end_to_end/test_equivalence.py::test_equals_the_model[gpt-dp=3,tp=2]
end_to_end/test_equivalence.py::test_equals_the_model[hf:bert-dp=3,tp=2]
end_to_end/test_equivalence.py::test_equals_the_model[hf:gpt2-dp=3,tp=2]
end_to_end/test_equivalence.py::test_equals_the_model_of_torch_layers[dlrm-dp=3]
end_to_end/test_equivalence.py::test_equals_the_model_with_the_sequence_split[hf:vit-dp=2,tp=2]
end_to_end/test_equivalence.py::test_equals_the_model_with_the_sequence_split[llama-*
end_to_end/test_equivalence.py::test_equals_the_model_with_the_sequence_split[vit-*
end_to_end/test_experts.py::test_real_ranks[ep=3-1]
end_to_end/test_experts_over_data.py::test_equals_the_model[dp=2,ep=2-0]
end_to_end/test_experts_over_data.py::test_equals_the_model[dp=2,ep=2-3]
end_to_end/test_experts_over_data.py::test_equals_the_model[dp=2,ep=3-*
end_to_end/test_experts_over_data.py::test_equals_the_model[ep=1-0]
end_to_end/test_experts_over_data.py::test_equals_the_model[ep=2,sp=2-*
end_to_end/test_experts_over_data.py::test_equals_the_model[ep=2,tp=2-0]
end_to_end/test_experts_over_data.py::test_equals_the_model[ep=2,tp=2-3]
end_to_end/test_experts_over_data.py::test_equals_the_model[ep=2-*
end_to_end/test_experts_over_data.py::test_equals_the_model[ep=3-3]
end_to_end/test_experts_over_data.py::test_equals_the_model[pp=2,ep=2-0]
end_to_end/test_experts_over_data.py::test_no_byte_of_experts_more_than_the_formulas[gpt_oss-*
end_to_end/test_last_batches.py::test_batches_that_do_not_divide[0]
end_to_end/test_scripts.py::test_five_steps[nanogpt-*
end_to_end/test_sequence.py::test_a_training_step_does_not_make_the_other_outputs[sp=2-2]
end_to_end/test_sequence.py::test_dropout_draws_the_masks_of_one_rank[dp=2,sp=2]
end_to_end/test_sequence.py::test_dropout_draws_the_masks_of_one_rank[sp=3]
end_to_end/test_sequence.py::test_half_precision_is_no_worse_than_on_one_rank[gather]
end_to_end/test_sequence.py::test_half_precision_is_no_worse_than_on_one_rank[hybrid]
end_to_end/test_sequence.py::test_real_ranks[sp=3-ring]
end_to_end/test_training.py::test_an_update_that_no_counter_shows[optimizer]
end_to_end/test_training.py::test_how_often_parameters_are_gathered[1-1]
end_to_end/test_training.py::test_how_often_parameters_are_gathered[2-1]
end_to_end/test_training.py::test_training_equals_one_process[llama-*
end_to_end/test_training.py::test_training_with_sharded_parameters_equals_one_process[llama-*
end_to_end/test_training.py::test_training_with_sharded_parameters_equals_one_process[tiny-dp=3-1]
end_to_end/test_zero_beside_experts.py::test_each_parameter_is_split_over_what_does_not_split_it_yet[dp=2,ep=2,sp=2]
end_to_end/test_zero_beside_experts.py::test_each_parameter_is_split_over_what_does_not_split_it_yet[dp=2,ep=3]
exporters/test_families.py::test_what_has_no_dynamic_form_is_told
exporters/test_verify.py::test_a_program_on_disk_is_compared_with_its_source[{'pp': 2}-*
families/test_family.py::test_no_family[longer_than_twenty]
fitting/test_fit.py::test_guesses_come_before_any_way_to_split_layers_is_priced
fitting/test_fit.py::test_microbatches_of_a_loss_that_is_no_sum_are_weighed_by_their_own_statistics
fitting/test_fit.py::test_two_depths_tell_the_memory_of_the_whole_model[*
frontend/test_looked_at.py::test_buffers_decide_for_all_parts[pp]
frontend/test_looked_at.py::test_each_batch_takes_its_branch[initialised]
frontend/test_looked_at.py::test_each_batch_takes_its_branch[skips_mask]
frontend/test_looked_at.py::test_on_two_processes
frontend/test_rows_asked.py::test_what_changes_is_refused[a multiple-dp=1]
frontend/test_rows_asked.py::test_what_changes_is_refused[a number-pp=2]
frontend/test_rows_asked.py::test_what_changes_is_refused[another part-pp=2]
frontend/test_rows_asked.py::test_what_changes_is_refused[between-pp=2]
frontend/test_rows_asked.py::test_what_changes_is_refused[equal-dp=1]
frontend/test_rows_asked.py::test_what_changes_is_refused[larger-dp=1]
frontend/test_torch_layers.py::test_attention[bias-kv-tp=4-False-True]
frontend/test_torch_layers.py::test_attention[causal-dp=3-False-False]
frontend/test_torch_layers.py::test_attention[masked-padded-tp=4-False-True]
frontend/test_torch_layers.py::test_attention[other-widths-dp=2,tp=2-False-False]
frontend/test_torch_layers.py::test_attention[padded-dp=3-False-False]
frontend/test_torch_layers.py::test_attention[plain-tp=4-False-False]
frontend/test_torch_layers.py::test_inference_by_the_fast_path[{'classes': 12}-tp=4]
frontend/test_torch_layers.py::test_inference_by_the_fast_path[{}-dp=3]
frontend/test_torch_layers.py::test_padding_comes_out_as_eager_gives_it[right-plain]
inductor/test_compiled_region.py::test_a_region_is_compiled_once_for_each_kind_of_strides_and_frees_what_it_takes
masks/test_long.py::test_nothing_is_quadratic[*-dp]
masks/test_long.py::test_nothing_is_quadratic[llama-packed-tp]
masks/test_long.py::test_nothing_is_quadratic[mistral-plain-tp]
models/test_models.py::test_the_export_equals_the_model_in_float64[lstm-gru]
models/test_models.py::test_the_export_equals_the_model_in_float64[moe-balanced]
models/test_models.py::test_the_export_equals_the_model_in_float64[t5-padded-untied]
models/test_models.py::test_training_lowers_the_loss[lstm-gru]
models/test_models.py::test_training_lowers_the_loss[moe-balanced]
models/test_models.py::test_training_lowers_the_loss[t5-padded-untied]
observation/test_observation.py::test_a_change_makes_another_program[1 to 1.0 of a power]
observation/test_observation.py::test_a_change_makes_another_program[a dict in place]
observation/test_observation.py::test_a_change_makes_another_program[a function]
observation/test_observation.py::test_a_change_makes_another_program[a hook before]
observation/test_observation.py::test_a_change_makes_another_program[a layer more]
observation/test_observation.py::test_a_change_makes_another_program[a slot]
observation/test_observation.py::test_a_change_makes_another_program[an attribute that hides the class's]
observation/test_observation.py::test_a_change_makes_another_program[another activation]
observation/test_observation.py::test_a_change_makes_another_program[another config]
observation/test_observation.py::test_a_change_makes_another_program[another head]
observation/test_observation.py::test_a_change_makes_another_program[epsilon]
observation/test_observation.py::test_a_change_makes_another_program[momentum]
observation/test_observation.py::test_a_change_makes_another_program[no bias]
passes/test_canonicalize.py::test_model_is_exact[bart]
passes/test_canonicalize.py::test_model_is_exact[gemma2]
passes/test_cast_parameters.py::test_computing_in_float64_is_exact[gpt]
passes/test_draw_dropout.py::test_noise_is_the_same_on_any_mesh[bernoulli of a number]
passes/test_draw_dropout.py::test_noise_is_the_same_on_any_mesh[normal]
passes/test_draw_dropout.py::test_noise_is_the_same_on_any_mesh[randn_like]
passes/test_enter_parameters.py::test_gradients_are_exact_and_send_what_the_formulas_say[as they are-*
passes/test_enter_parameters.py::test_gradients_are_exact_and_send_what_the_formulas_say[concatenated-*
passes/test_enter_parameters.py::test_gradients_are_exact_and_send_what_the_formulas_say[scaled by the other-*
passes/test_overlap_collectives.py::test_the_same_bits[Plan(sequence='none'*
passes/test_pad_rows.py::test_a_transformer_with_any_number_of_rows[dp-tp]
passes/test_pad_rows.py::test_copies_count_nothing[dp-mixed]
passes/test_pad_rows.py::test_copies_count_nothing[replicas-sums]
passes/test_recognise_masks.py::test_models_on_a_mesh[t5-padded-*
passes/test_route_experts.py::test_dropout_inside_experts_draws_the_same_masks[ep=3-{'recompute': 'full'}]
passes/test_route_experts.py::test_exact_for_any_number_of_ranks_and_experts[1-12-usual]
passes/test_route_experts.py::test_exact_for_any_number_of_ranks_and_experts[2-10-usual]
passes/test_route_experts.py::test_exact_for_any_number_of_ranks_and_experts[3-3-usual]
passes/test_route_experts.py::test_exact_with_every_other_axis[pp=2,ep=2-{'microbatches': 3}-plain]
passes/test_route_experts.py::test_whole_experts_over_several_axes[ep=2,sp=2-0-plain]
passes/test_route_experts.py::test_whole_experts_over_several_axes[ep=2,tp=2-1-biased]
passes/test_stack_experts.py::test_every_spelling_is_exact[litgpt-all_used]
passes/test_stack_experts.py::test_every_spelling_is_two_products[mixtral]
passes/test_stack_experts.py::test_experts_of_other_forms[*
passes/test_stack_experts.py::test_experts_of_other_forms[matrices]
passes/test_stack_experts.py::test_experts_that_differ_stay_apart_and_exact[activation]
passes/test_stack_experts.py::test_experts_that_differ_stay_apart_and_exact[frozen]
passes/test_stack_experts.py::test_one_and_three_choices*
passes/test_stack_parameters.py::test_exact_on_meshes[ep=3]
passes/test_unstack_recurrent_layers.py::test_equals_the_model[gru-both-ways-dp=3]
passes/test_unstack_recurrent_layers.py::test_equals_the_model[gru-stacked-dp=3]
passes/test_unstack_recurrent_layers.py::test_equals_the_model[lstm-both-ways-dp=3]
passes/test_unstack_recurrent_layers.py::test_equals_the_model[lstm-dp=3]
passes/test_unstack_recurrent_layers.py::test_equals_the_model[lstm-projected-dp=3]
passes/test_weigh_microbatches.py::test_losses_that_people_have[bce]
passes/test_weigh_microbatches.py::test_losses_that_people_have[kl batchmean]
passes/test_weigh_microbatches.py::test_losses_that_people_have[over a count and a half]
passes/test_weigh_microbatches.py::test_losses_that_people_have[over the batch size]
passes/test_weigh_microbatches.py::test_losses_that_people_have[two counts]
passes/test_weigh_microbatches.py::test_statistics_of_the_batch_on_one_rank
passes/test_write_bags.py::test_bags_are_split_by_batch[ragged-max]
passes/test_write_bags.py::test_bags_are_split_by_batch[regular-mean]
passes/test_write_bags.py::test_tables_lie_as_the_plan_says[None-ragged]
passes/test_write_bags.py::test_tables_lie_as_the_plan_says[column-ragged]
passes/test_write_bags.py::test_tables_lie_as_the_plan_says[column-regular]
passes/test_write_bags.py::test_tables_lie_as_the_plan_says[replicate-ragged]
passes/test_write_bags.py::test_tables_lie_as_the_plan_says[row-ragged]
pipeline/test_assignment.py::test_on_a_mesh[0-t5]
pipeline/test_checkpoints.py::test_safetensors[pp=2,tp=2]
pipeline/test_commands.py::test_compile_and_run
pipeline/test_commands.py::test_train_and_resume
pipeline/test_footprint.py::test_sent[pp=2-plan0]
pipeline/test_simulated.py::test_a_loss_that_is_no_mean_counts_by_rows[pp-ep]
pipeline/test_simulated.py::test_frozen_parameters[blocks-1f1b]
pipeline/test_simulated.py::test_frozen_parameters[blocks-dualpipe-v]
pipeline/test_simulated.py::test_frozen_parameters[blocks.0-1f1b]
pipeline/test_simulated.py::test_frozen_parameters[head-1f1b]
pipeline/test_simulated.py::test_other_axes_and_choices[llama-*
pipeline/test_simulated.py::test_the_unmodified_model[llama-zb-v-2-5]
pipeline/test_simulated.py::test_the_unmodified_model[moe-*
pipeline/test_simulated.py::test_the_unmodified_model[t5-*
pipeline/test_simulated.py::test_the_unmodified_model[vit-zb-h1-*
proof/test_alike.py::test_a_large_model_is_built_anew_from_its_config
proof/test_sized_models.py::test_right_numbers_are_accepted[mean_over_pairs-dp, sp]
proof/test_sized_models.py::test_right_numbers_are_accepted[smoothed_labels-dp, sp]
proof/test_sized_models.py::test_wrong_ones_are_refused[mean_over_pairs-*
routing/test_buffers.py::test_drops_by_the_rule_of_each_rank[1-12-*
routing/test_buffers.py::test_drops_by_the_rule_of_each_rank[1-3-*
routing/test_buffers.py::test_drops_by_the_rule_of_each_rank[6-10-*
routing/test_buffers.py::test_every_other_axis[dp=2,ep=2-zero-12_1]
routing/test_buffers.py::test_every_other_axis[dp=2,ep=3-zero-recompute-10]
routing/test_buffers.py::test_every_other_axis[ep=2,sp=2-expert_axes-12_1]
routing/test_buffers.py::test_every_other_axis[ep=2,tp=2-expert_axes-12_1]
routing/test_buffers.py::test_every_other_axis[ep=2,tp=2-expert_axes-sequence-10]
routing/test_buffers.py::test_every_other_axis[tp=3-expert_axes-12]
routing/test_buffers.py::test_recomputation_sends_nothing_again[selective]
routing/test_placement.py::test_placed_experts_compute_the_same_on_other_ranks[ep=2,sp=2-1]
routing/test_placement.py::test_the_load_is_that_of_the_whole_batch[dp=2,ep=3-1]
routing/test_placement.py::test_the_load_is_that_of_the_whole_batch[ep=2,tp=2-*
routing/test_placement.py::test_the_load_is_that_of_the_whole_batch[ep=2-0]
routing/test_placement.py::test_the_load_is_that_of_the_whole_batch[ep=4-0]
rules/test_dtensor.py::test_averages_are_right_elsewhere
rules/test_dtensor.py::test_every_difference_is_listed
rules/test_dtensor.py::test_every_difference_is_proved
rules/test_dtensor.py::test_report
rules/test_dtensor.py::test_where_dtensor_is_wrong*
runtime/test_accumulate.py::test_a_step_in_parts_is_the_step_of_the_whole[3-llama]
runtime/test_accumulate.py::test_counts_of_the_whole_batch[pp-dp-local]
schedules/test_schedule_orders.py::test_every_size_is_accepted[inference]
schedules/test_schedule_orders.py::test_the_work_of_a_check_grows_with_the_instructions[gpipe]
schedules/test_schedule_orders.py::test_the_work_of_a_check_grows_with_the_instructions[inference]
split/test_buffers_in_parts.py::test_on_a_mesh[counter-mesh(pp=2)]
split/test_buffers_in_parts.py::test_on_one_rank[rows_seen]
split/test_equal_layers.py::test_equal_layers_of_a_deep_mixture
split/test_seams.py::test_a_sequence_as_long_as_other_dims[shift_by_cat]
split/test_seams.py::test_a_sequence_as_long_as_other_dims[twice]
split/test_seams.py::test_a_shifted_loss_sends_only_numbers[classes_second-4]
split/test_seams.py::test_a_shifted_loss_sends_only_numbers[each_token-2]
split/test_seams.py::test_a_shifted_loss_sends_only_numbers[shifted_views-4]
split/test_seams.py::test_a_shifted_loss_sends_only_numbers[summed-4]
split/test_seams.py::test_exact_on_any_number_of_ranks[from_log_softmax-zigzag]
split/test_seams.py::test_exact_on_any_number_of_ranks[padded_in_front-zigzag]
split/test_seams.py::test_exact_on_any_number_of_ranks[prompt-zigzag]
split/test_seams.py::test_exact_on_any_number_of_ranks[twice-zigzag]
split/test_seams.py::test_only_the_positions_beside_a_part_travel[dilated-plain]
split/test_seams.py::test_only_the_positions_beside_a_part_travel[padded_in_front-plain]
split/test_seams.py::test_only_the_positions_beside_a_part_travel[turned-plain]
split/test_seams.py::test_only_the_positions_beside_a_part_travel[twice-plain]
split/test_seams.py::test_only_the_positions_beside_a_part_travel[two_dims-zigzag]
split/test_seams.py::test_with_other_axes[two_ahead-*
split/test_state_space.py::test_exact[mamba-*
test_stored_programs.py::test_four_ranks_start_from_one_program[pipeline]
test_torch_doors.py::test_bindings_call_the_operators_of_the_graph[autopar.models.t5]
traces/test_chakra.py::test_nodes_come_after_what_they_need[experts]
verification/test_coverage.py::test_the_command
weights/test_clipping.py::test_equals_one_device[tied dp=1 zero 0]
weights/test_identity.py::test_an_optimizer_from_before[tp-started]
weights/test_identity.py::test_data_is_written[axes5-0]
weights/test_identity.py::test_optimizers_are_right_or_refused[pp]
zoo/test_experts.py::test_all_layers_of_a_mixture_are_recognised[granitemoe]
zoo/test_experts.py::test_all_layers_of_a_mixture_are_recognised[llama4_text]
zoo/test_experts.py::test_all_layers_of_a_mixture_are_recognised[moe]
zoo/test_experts.py::test_all_layers_of_a_mixture_are_recognised[qwen3_moe]
zoo/test_experts.py::test_no_experts_are_seen_in_a_dense_model[bert1]
zoo/test_experts.py::test_no_experts_are_seen_in_a_dense_model[deberta_v2]
zoo/test_experts.py::test_no_experts_are_seen_in_a_dense_model[llama1]
zoo/test_experts.py::test_no_experts_are_seen_in_a_dense_model[mamba2]
zoo/test_experts.py::test_no_experts_are_seen_in_a_dense_model[t5_0]
zoo/test_experts.py::test_no_experts_are_seen_in_a_dense_model[t5_1]
zoo/test_experts.py::test_no_experts_are_seen_in_a_dense_model[transformer]
zoo/test_experts.py::test_no_experts_are_seen_in_a_dense_model[unet]
zoo/test_experts.py::test_no_experts_are_seen_in_a_dense_model[vit1]
zoo/test_zoo.py::test_architecture[bloom]
zoo/test_zoo.py::test_architecture[deberta_v2]
zoo/test_zoo.py::test_architecture[mamba2]
zoo/test_zoo.py::test_architecture[whisper]
"""


LINES = REPEATED.strip().splitlines()
_WHOLE = frozenset(line for line in LINES if "*" not in line)
_CUT = [(line, *line.split("*")) for line in LINES if "*" in line]


def repeated_by(name: str) -> set[str]:
    """The lines of :data:`REPEATED`, where ``*`` is anything, that mean ``name``, an id without ``tests/``."""
    return {line for line, start, end in _CUT if name.startswith(start) and name.endswith(end)} | (_WHOLE & {name})


def without_a_test(names: Iterable[str]) -> list[str]:
    """The lines of :data:`REPEATED` that mean no test of their file, of which ``names`` has all ids or none."""
    names = set(names)
    met = set[str]().union(*map(repeated_by, names))
    files = {name.partition("::")[0] for name in names}
    return [line for line in LINES if line not in met and line.partition("::")[0] in files]
