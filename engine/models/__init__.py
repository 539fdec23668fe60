"""The decoder that every supported family is an instance of. Where to look:

facts      config over json_facts; quantization: how the matrices are stored
the start  loading: from a folder to a model with its weights
layers     decoder over decoder_layer; rope: its tables
matrices   linear, quantized_linear
steps      of one sequence row_pass, of some 250 pair_pass; all others are decoder's
"""
