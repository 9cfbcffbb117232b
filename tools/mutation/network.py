"""Faults in one norm, one activation or one cut of a single path: training, decoding, exports, checkpoints, optimizer."""

from mutation.mutant import mutants_of

_VARIANTS = "tests/model/test_variants.py::"
_GRADIENTS = f"{_VARIANTS}test_losses_and_gradients_equal_the_plain_decoder"
_DECODING = f"{_VARIANTS}test_decoding_equals_the_dense_pass"
_EXPORTS = f"{_VARIANTS}test_exports_compute_the_plain_decoder"
_TABLE = "tests/model/test_parameters.py"
_DECAY = "tests/optim/test_zero.py::test_norms_and_biases_are_left_alone_where_matrices_decay"
_RESHARD = "tests/checkpoint/test_verify_reshard.py::test_variants_are_resharded_and_verified"
_TOKENIZERS = "tests/checkpoint/hf/test_tokenizer_files.py"

NETWORK = (
    *mutants_of(
        "bd3lm_scale/model/transformer_config.py",
        (_GRADIENTS,),
        ("training activates otherwise", '"activation_func": ACTIVATIONS[arch.mlp],', '"activation_func": ACTIVATIONS["gelu"],'),
    ),
    *mutants_of(
        "bd3lm_scale/model/layer.py",
        (_GRADIENTS,),
        ("training leaves queries as they are", "q_layernorm=HeadNorm if arch.qk_norm else IdentityOp,", "q_layernorm=IdentityOp,"),
        ("the MLP's bias forgotten", "out.float() if bias is None else out.float() + bias.float()", "out.float()"),
    ),
    *mutants_of(
        "bd3lm_scale/model/functions.py",
        (_DECODING,),
        ("decoding normalizes otherwise", "F.rms_norm(x, weight.shape, weight, arch.norm_eps)", "F.layer_norm(x, weight.shape, weight)"),
        ("decoding has another epsilon", "F.rms_norm(x, weight.shape, weight, arch.norm_eps)", "F.rms_norm(x, weight.shape, weight, 1e-2)"),
        ("decoding swaps gate and value", "return function(gate) * value", "return function(value) * gate"),
        ("decoding does not gate", "    if not arch.gates:\n        return function(inner)\n    gate, value", "    gate, value",
         "tests/model/test_fast_decoder.py"),
    ),
    *mutants_of(
        "bd3lm_scale/model/fast_decoder.py",
        (_DECODING,),
        ("decoding leaves queries as they are", "torch.cat([layer.q_norm(query, qkv.dtype), layer", "torch.cat([query, layer"),
        ("decoding norms queries as keys", "layer.q_norm(query, qkv.dtype)", "layer.k_norm(query, qkv.dtype)"),
        ("decoding forgets the bias of q, k, v", "layer.qkv, layer.qkv_bias)", "layer.qkv)"),
    ),
    *mutants_of(
        "bd3lm_scale/model/rotary.py",
        (_GRADIENTS,),
        ("positions not scaled", "return frequency / rope.factor\n", "return frequency\n"),
        ("slow positions kept, fast ones divided", "(1 - smooth) * frequency / rope.factor + smooth * frequency",
         "smooth * frequency / rope.factor + (1 - smooth) * frequency"),
    ),
    *mutants_of(
        "bd3lm_scale/checkpoint/hf/layers_bd3lm.py",
        (_EXPORTS,),
        ("exports normalize otherwise", '"rmsnorm": F.rms_norm}', '"rmsnorm": F.layer_norm}'),
        ("exports have another epsilon", 'NORMS), config.norm_eps', 'NORMS), 1e-5'),
        ("exports swap gate and value", "return F.silu(gate) * value", "return F.silu(value) * gate"),
        ("exports norm queries as keys", "self.q_norm(q).to(q.dtype)", "self.k_norm(q).to(q.dtype)"),
        ("exports share keys in another order", "q, k, v = heads_BHPK.split(self.heads, dim=1)",
         "q, k, v = heads_BHPK.split(self.heads, dim=1)\n        k = k.flip(1)"),
        ("exports scale no positions", '"linear": lambda f, rope: f / rope["factor"]', '"linear": lambda f, rope: f'),
    ),
    *mutants_of(
        "bd3lm_scale/checkpoint/names.py",
        (_EXPORTS,),
        ("exports order heads by group", "return torch.cat([part.flatten(0, 2) for part in groups.split(_heads_of_a_group(arch), dim=1)])",
         "return tensor"),
    ),
    *mutants_of(
        "bd3lm_scale/model/parameters.py",
        (f"{_TABLE}::test_cuts_shares_and_decay_are_those_written_by_hand",),
        ("gate and value cut as one", "gate_and_up = (inner, inner) if arch.gates else ()", "gate_and_up = ()"),
        ("the projection cut by rows", "(width, queries), False, shard_dim=1, layer=layer", "(width, queries), False, shard_dim=0, layer=layer"),
        ("norms of heads not added over ranks", ".weight\", head, HEADS, layer)", ".weight\", head, WHOLE, layer)"),
        ("biases after the sum not added over ranks", "POSITIONS if after_sum else WHOLE", "WHOLE"),
        ("norms decay", "gradient=gradient, decays=False, layer=layer)", "gradient=gradient, layer=layer)"),
        ("biases decay", "else WHOLE, decays=False, rows=rows,", "else WHOLE, rows=rows,"),
    ),
    *mutants_of(
        "bd3lm_scale/checkpoint/boxes.py",
        (_RESHARD,),
        ("checkpoints cut gate and value as one", "for rows in part.parts or (part.global_shape[dim],):", "for rows in (part.global_shape[dim],):"),
    ),
    *mutants_of(
        "bd3lm_scale/optim/zero.py",
        (_DECAY,),
        ("everything decays", '{"params": others, "weight_decay": 0.0}', '{"params": others}'),
        ("norms decay, matrices do not", "for _, parameter in self.named if description_of(parameter).decays]",
         "for _, parameter in self.named if parameter.dim() == 1]"),
        ("matrices alone, whatever is asked", 'self.config.weight_decay_on == "all" or not self.config.weight_decay', "not self.config.weight_decay"),
    ),
    *mutants_of(
        "bd3lm_scale/checkpoint/hf/special_tokens.py",
        (_TOKENIZERS,),
        ("special pieces keep their score", "[name, NEVER if i in special else score]", "[name, score]"),
        ("merges make special tokens", 'if names.isdisjoint((*pair, "".join(pair)))', ""),
        ("special words are whole", "    if readable:\n        borders", "    if False:\n        borders"),
        ("unreadable or not, it is exported", "    if readable:\n        raise", "    if False:\n        raise"),
        ("a second piece of that name", "return next(candidate for candidate in candidates if candidate not in taken)", "return name"),
    ),
)  # fmt: skip
