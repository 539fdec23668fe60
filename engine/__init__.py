"""One model, one paged cache, one step. Where to look:

a step       loop (loop_parts: whom it drives; commands: what others ask of it; loop_errors,
             out_of_memory) -> engine -> step_pipeline -> model_runner; schedule says what is to
             compute; rehearsal keeps the way there warm
inputs       input_buffer; prompts: batch, block_tables; rows of a captured step: step_rows over
             row_inputs, of decoding sequences decode_rows, of short ends of prompts prompt_rows;
             cuda_graphs
tokens       sampler, by sampling_plan, penalties and logprobs; stopping
KV           kv_cache (tensors), block_manager over counted_blocks, prefix_cache, lent_blocks and
             reservation (numbers only); cache_journal (what others are told), steps_in_flight,
             held_prefix, block_audit
host memory  host_blocks (what moves when, as block_copies) over host_tier (slots, by block_names);
             host_copier moves the bytes to and from host_memory, restores brings back what another
             node is given
sequences    sequence, waiting_queue
weights      checkpoint_files -> weights -> stored_matrices (layouts) -> weight_views (memory to
             fill); quantized_tensors (arithmetic), kv_scales, offload
the model    models/decoder over decoder_layer, linear and quantized_linear; models/config;
             models/row_pass for one sequence, models/pair_pass for some 250
the start    config (options) -> limits ("auto") -> models/loading -> kv_allocation, by workspace
             and memory -> warm_up; kept_products: what a CPU compiles
many GPUs    tensor_parallel/
for others   facts, load, cache_report, metrics
"""
