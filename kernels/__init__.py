"""Functions of tensors. Each takes Triton or Gluon on a GPU and torch on a CPU, by its tensors.

Who multiplies (the matrices of `engine/models/` choose; a row is a token, Hopper is capability 9):

    weights     rows                      by                                     what is inside
    16, 8 bits  1, from attention to the  row_layer          Gluon, Hopper       all, rope_store
                next layer's attention
    16 bits     to 8 (in > 4096: to 4)    skinny_linear      Gluon, Hopper       norm, act, residual
                to 48, 4k to 8k outputs   thin_linear        Gluon, Hopper       residual
                gate/up to 64, 113-128    thin_gated_linear  Gluon, Hopper       act
                gate/up: 256, and more    gated_linear       Gluon, Hopper       act
                gate/up/down: 240-256     pair_mlp           Gluon, Hopper       act
                else                      the library, rms_norm, silu_mul
    float8      1                         skinny_linear      Gluon, Hopper       norm, act, residual
                to 64, 113-128, where
                the above suit            as above           Gluon, Hopper       act, residual
                else, capability 8.9 on   fp8_linear (library's product, scale_product)
    4 bits      to 16                     int4_linear        Gluon, Hopper       norm, act, residual
                else                      int4_linear (widened, then the library)

Who attends:

    decode      any GPU                   split_attention, shares by decode_plan; KV of 8 bits too
    prompts     Hopper, 16 bits, heads    gluon_prefill, pieces by prefill_tiles; KV of 8 bits is
                of 64 or 128, 65 queries  widened by gather_kv where it is not too much
                else                      prefill_attention (Triton), KV of 8 bits too
    both        CPU                       gathered_attention, by attention_plan, attention_steps
paged_attention is the door to decode, attention_backend chooses for prompts.

The rest: rope_store (norm of heads, rotation, store), rms_norm, sum_rms_norm, decode_inputs,
sample (on a GPU by sample_rows, sample_draw and sample_parts, on a CPU by draw; randomness by
splitmix), between ranks peer_sum and peer_add (small and large tensors) and peer_push (logits), in
peer_memory; for the hand-off copy_and_digest, kept_moves, seal_digests, copy_blocks, block_digest
and host_digest; int4_packing. What kernels share is in dispatch and gluon_api; launch is how all of
them are launched. Parts of one kernel each are row_programs, row_phases, row_walk, row_input,
row_peers, skinny_stream, skinny_walk, skinny_copies, skinny_input, skinny_operand, skinny_output,
skinny_peers, thin_ring, pair_programs, decode_tiles, combine_parts, gluon_prefill, gluon_producer
and gluon_consumer.
"""
