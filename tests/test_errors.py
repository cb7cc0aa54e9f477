"""Bad input raises before anything is computed, and the message names the argument."""

import pytest
import torch

import xformer_fast
from xformer_fast import BackendUnavailable, DistanceBias, Rope, T5Bias, dispatch

BACKENDS = ["reference"] + ["cpu"] * (dispatch.build_problem() is None)
Q, K, V = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 5)
ROWS = torch.ones(2, 4, 6, 3)  # of a map of 3 x 3 keys
META = torch.ones(4, 14, device="meta")
LONG, SHORT = torch.ones(100, 2), torch.ones(8, 2)


def attend(query=Q, key=K, value=V, **options):
    return xformer_fast.attention(query, key, value, **options)


DENSE = {  # what is wrong: (arguments, exception, words of the message)
    "query_not_a_tensor": ({"query": [1.0]}, TypeError, "query must be a torch.Tensor"),
    "query_dimensions": ({"query": Q[0]}, ValueError, "query must be"),
    "key_dimensions": ({"key": K[None]}, ValueError, "key must be"),
    "query_dtype": ({"query": Q.int(), "key": K.int(), "value": V.int()}, TypeError, "query must be float"),
    "key_dtype": ({"key": K.half()}, TypeError, "key is torch.float16"),
    "value_dtype": ({"value": V.bfloat16()}, TypeError, "value is torch.bfloat16"),
    "key_batch": ({"key": K[:1]}, ValueError, "key has batch 1"),
    "value_batch": ({"value": V[:1]}, ValueError, "value has batch 1"),
    "head_counts": ({"query": Q[:, :3]}, ValueError, "key has 2 heads"),
    "no_key_heads": ({"key": K[:, :0], "value": V[:, :0]}, ValueError, "key has 0 heads"),
    "value_heads": ({"value": V[:, :1]}, ValueError, "value has 1 heads"),
    "head_dim": ({"key": K[..., :7]}, ValueError, "key has head_dim 7"),
    "no_head_dim": ({"query": Q[..., :0], "key": K[..., :0]}, ValueError, "head_dim >= 1"),
    "value_length": ({"value": V[:, :, :8]}, ValueError, "value has 8 keys"),
    "device": ({"key": K.to("meta")}, ValueError, "key is on meta"),
    "mask_type": ({"mask": "causal"}, TypeError, "mask must be a torch.Tensor"),
    "mask_dtype": ({"mask": torch.ones(6, 9, dtype=torch.int32)}, TypeError, "mask must be bool"),
    "mask_shape": ({"mask": torch.ones(6, 8)}, ValueError, "mask of shape"),
    "mask_dimensions": ({"mask": torch.ones(1, 1, 1, 6, 9)}, ValueError, "mask of shape"),
    "causal": ({"causal": "bottom_right"}, ValueError, "causal must be"),
    "causal_int": ({"causal": 2}, ValueError, "causal must be"),
    "causal_tensor": ({"causal": torch.tensor(True)}, (TypeError, ValueError), "causal must be"),
    "window_type": ({"window": 5}, ValueError, "window must be"),
    "window_length": ({"window": (1, 2, 3)}, ValueError, "window must be"),
    "window_float": ({"window": (1.5, 0)}, TypeError, "window must hold two ints"),
    "window_negative": ({"window": (-2, 0)}, ValueError, "window must hold"),
    "globals_type": ({"global_keys": [0, 1]}, TypeError, "global_keys must be an int"),
    "globals_bool": ({"global_keys": True}, TypeError, "global_keys must be an int"),
    "globals_count": ({"global_keys": -1}, ValueError, "global_keys must be a count"),
    "globals_dtype": ({"global_keys": torch.ones(9)}, TypeError, "global_keys must be int32 or int64"),
    "globals_shape": ({"global_keys": torch.ones(3, 1, dtype=torch.int64)}, ValueError, "global_keys must be"),
    "globals_beyond": ({"window": (1, 1), "global_keys": torch.tensor([0, 9])}, ValueError, r"global_keys\[1\] is 9"),
    "globals_negative": ({"global_keys": torch.tensor([[0, 0], [0, -2]])}, ValueError, r"global_keys\[1, 1\] is -2"),
    "lengths_type": ({"key_lengths": [9, 9]}, TypeError, "key_lengths must be a torch.Tensor"),
    "lengths_dtype": ({"key_lengths": torch.tensor([9.0, 9.0])}, TypeError, "key_lengths must be int32"),
    "lengths_shape": ({"key_lengths": torch.tensor([9])}, ValueError, "key_lengths must have shape"),
    "lengths_negative": ({"key_lengths": torch.tensor([9, -1])}, ValueError, r"key_lengths\[1\] is -1"),
    "lengths_beyond": ({"key_lengths": torch.tensor([10, 9])}, ValueError, r"key_lengths\[0\] is 10"),
    "slopes_shape": ({"alibi_slopes": torch.ones(2)}, ValueError, "alibi_slopes must be"),
    "slopes_batch": ({"alibi_slopes": torch.ones(1, 4)}, ValueError, "alibi_slopes must be"),
    "slopes_dtype": ({"alibi_slopes": torch.ones(4, dtype=torch.int64)}, TypeError, "alibi_slopes must be a float"),
    "sinks_shape": ({"sinks": torch.ones(2, 4)}, ValueError, "sinks must be"),
    "sinks_type": ({"sinks": 0.5}, TypeError, "sinks must be a torch.Tensor"),
    "rope_type": ({"rope": (SHORT, SHORT)}, TypeError, "rope must be"),
    "rope_wide": ({"rope": Rope(torch.ones(9, 5), torch.ones(9, 5))}, ValueError, "rope rotates 10 channels"),
    "rope_short": ({"rope": Rope(SHORT, SHORT)}, ValueError, "rope: tables of 8 positions"),
    "rope_device": ({"rope": Rope(LONG, LONG.to("meta"))}, ValueError, "rope: sin is on meta, query on cpu"),
    "rope_positions_device": (
        {"rope": Rope(LONG, LONG, key_positions=torch.arange(9, device="meta"))},
        ValueError, "rope: key_positions is on meta",
    ),
    "rope_before_zero": (
        {"key": K[:, :, :1], "value": V[:, :, :1], "rope": Rope(LONG[:5], LONG[:5])}, ValueError, "a query 5 before",
    ),
    "rope_positions_shape": (
        {"rope": Rope(LONG, LONG, query_positions=torch.zeros(1, dtype=torch.int64))}, ValueError, "query_positions",
    ),
    "rope_positions_batch": (
        {"rope": Rope(LONG, LONG, key_positions=torch.zeros(3, 9, dtype=torch.int64))}, ValueError, "key_positions",
    ),
    "rope_positions_values": (
        {"rope": Rope(LONG, LONG, key_positions=torch.arange(9) + 95)}, ValueError, "key_positions must lie in",
    ),
    "rope_positions_negative": (
        {"rope": Rope(LONG, LONG, query_positions=torch.arange(6) - 1)}, ValueError, "query_positions must lie in",
    ),
    "bias_type": ({"relative_bias": torch.ones(4, 14)}, TypeError, "relative_bias must be"),
    "bias_heads": ({"relative_bias": T5Bias(torch.ones(32, 3))}, ValueError, "relative_bias has 3 heads"),
    "bias_device": ({"relative_bias": DistanceBias(META)}, ValueError, "relative_bias: values is on meta"),
    "t5_device": ({"relative_bias": T5Bias(META.mT)}, ValueError, "relative_bias: table is on meta"),
    "bias_length": ({"relative_bias": DistanceBias(torch.ones(4, 13))}, ValueError, "relative_bias: values must have"),
    "map_type": ({"decomposed_bias": torch.ones(2, 4, 6, 3)}, TypeError, "decomposed_bias must be a pair"),
    "map_number": ({"decomposed_bias": (ROWS,)}, TypeError, "decomposed_bias must be a pair"),
    "map_dtype": ({"decomposed_bias": (ROWS.int(), ROWS)}, TypeError, "decomposed_bias: rel_h must be a float tensor"),
    "map_device": ({"decomposed_bias": (ROWS, ROWS.to("meta"))}, ValueError, "decomposed_bias: rel_w is on meta"),
    "map_shape": ({"decomposed_bias": (ROWS, ROWS[:, :1])}, ValueError, "decomposed_bias: rel_w must be"),
    "map_dimensions": ({"decomposed_bias": (ROWS[0], ROWS)}, ValueError, "decomposed_bias: rel_h must be"),
    "map_size": ({"decomposed_bias": (ROWS, ROWS[..., :2])}, ValueError, "decomposed_bias is of 3 x 2 keys"),
    "scale_infinite": ({"scale": float("inf")}, ValueError, "scale must be finite"),
    "scale_beyond_float32": ({"scale": -1e300}, ValueError, "scale must be finite in float32"),
    "softcap_beyond_float32": ({"softcap": 1e300}, ValueError, "softcap must be positive and finite in float32"),
    "scale_nan": ({"scale": float("nan")}, ValueError, "scale must be finite"),
    "scale_type": ({"scale": "1"}, TypeError, "scale must be a number"),
    "softcap_negative": ({"softcap": -1.0}, ValueError, "softcap must be"),
    "dropout_one": ({"dropout_p": 1.0}, ValueError, "dropout_p must lie"),
    "dropout_negative": ({"dropout_p": -0.1}, ValueError, "dropout_p must lie"),
    "dropout_none": ({"dropout_p": None}, TypeError, "dropout_p must be a number"),
    "backend_name": ({"backend": "fast"}, ValueError, "backend must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", DENSE)
def test_attention(backend, wrong):
    arguments, exception, words = DENSE[wrong]
    with pytest.raises(exception, match=words):
        attend(**{"backend": backend, **arguments})


X, CU = torch.randn(30, 2, 8), torch.tensor([0, 10, 30], dtype=torch.int32)


def offsets(*values):
    return torch.tensor(values, dtype=torch.int32)


PACKED = {
    "query_dimensions": ({"query": X[None]}, ValueError, "query must be"),
    "offsets_type": ({"cu_seqlens_q": [0, 10, 30]}, TypeError, "cu_seqlens_q must be a torch.Tensor"),
    "offsets_dtype": ({"cu_seqlens_q": CU.long()}, TypeError, "cu_seqlens_q must be int32"),
    "offsets_dimensions": ({"cu_seqlens_q": CU[None]}, ValueError, "cu_seqlens_q must have shape"),
    "offsets_empty": ({"cu_seqlens_q": CU[:0], "cu_seqlens_k": CU[:0]}, ValueError, "cu_seqlens_q must have shape"),
    "offsets_counts": ({"cu_seqlens_k": offsets(0, 30)}, ValueError, "cu_seqlens_k must have shape"),
    "offsets_start": ({"cu_seqlens_q": offsets(1, 10, 30)}, ValueError, "cu_seqlens_q must start at 0"),
    "offsets_decrease": ({"cu_seqlens_k": offsets(0, 31, 30)}, ValueError, "cu_seqlens_k must"),
    "offsets_end": ({"cu_seqlens_q": offsets(0, 10, 29)}, ValueError, "cu_seqlens_q must"),
    "offsets_beyond": ({"cu_seqlens_k": offsets(0, 10, 31)}, ValueError, "cu_seqlens_k must"),
    "longest_short": ({"max_seqlen_q": 19}, ValueError, "max_seqlen_q is 19"),
    "longest_key_short": ({"max_seqlen_k": 19}, ValueError, "max_seqlen_k is 19"),
    "longest_type": ({"max_seqlen_q": 20.0}, ValueError, "max_seqlen_q must be an int"),
    "longest_negative": ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k must be an int"),
    "lengths_beyond": ({"key_lengths": torch.tensor([11, 20])}, ValueError, r"key_lengths\[0\] is 11"),
    "lengths_shape": ({"key_lengths": torch.tensor([1, 2, 3])}, ValueError, "key_lengths must have shape"),
    "bias_kind": ({"relative_bias": DistanceBias(torch.ones(2, 59))}, TypeError, "relative_bias must be a T5Bias"),
    "bias_device": (
        {"relative_bias": T5Bias(torch.empty(32, 2, device="meta"))}, ValueError, "relative_bias: table is on meta",
    ),
    "rope_device": ({"rope": Rope(LONG.to("meta"), LONG)}, ValueError, "rope: cos is on meta, query on cpu"),
    "rope_before_zero": (
        {"cu_seqlens_q": offsets(0, 0, 30), "max_seqlen_q": 30, "cu_seqlens_k": offsets(0, 15, 30),
         "rope": Rope(LONG[:15], LONG[:15])}, ValueError, "rope: tables of 15 .* a query 15 before",
    ),
    "rope_short": ({"rope": Rope(SHORT, SHORT)}, ValueError, "rope"),
    "rope_and_decrease": (
        {"cu_seqlens_q": offsets(0, 31, 30), "rope": Rope(LONG, LONG)}, ValueError, "cu_seqlens_q must start at 0",
    ),
    "rope_and_offsets": ({"cu_seqlens_q": offsets(0, 10, 29), "rope": Rope(LONG, LONG)}, ValueError, "cu_seqlens_q"),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", PACKED)
def test_varlen_attention(backend, wrong):
    arguments, exception, words = PACKED[wrong]
    good = {
        "query": X, "key": X, "value": X, "cu_seqlens_q": CU, "cu_seqlens_k": CU,
        "max_seqlen_q": 20, "max_seqlen_k": 20,
    }  # fmt: skip
    with pytest.raises(exception, match=words):
        xformer_fast.varlen_attention(**{**good, "backend": backend, **arguments})


TORCH = {
    "query_type": ((None, K, V), {}, TypeError, "query must be"),
    "query_dimensions": ((Q[0, 0, 0], K, V), {}, ValueError, "query must have two to five"),
    "key_dimensions": ((Q, K[None, None], V), {}, ValueError, "key must have two to five"),
    "heads": ((Q, K, V), {}, ValueError, "enable_gqa"),
    "gqa_heads": ((Q[:, :3], K, V), {"enable_gqa": True}, ValueError, "must divide 3"),
    "batch": ((torch.randn(3, 2, 6, 8), K, V), {}, ValueError, "must broadcast in batch"),
    "mask_dimensions": (
        (Q, K, V),
        {"enable_gqa": True, "attn_mask": torch.ones(1, 1, 1, 6, 9)},
        ValueError,
        "attn_mask",
    ),
    "mask_type": ((Q, K, V), {"enable_gqa": True, "attn_mask": 1.0}, TypeError, "attn_mask must be"),
    "mask_shape": ((Q, K, V), {"enable_gqa": True, "attn_mask": torch.ones(6, 8)}, ValueError, "mask of shape"),
    "dropout": ((Q, K, V), {"enable_gqa": True, "dropout_p": 2.0}, ValueError, "dropout_p"),
}


@pytest.mark.parametrize("wrong", TORCH)
def test_torch_signature(wrong):
    arguments, options, exception, words = TORCH[wrong]
    with pytest.raises(exception, match=words):
        xformer_fast.scaled_dot_product_attention(*arguments, **options)


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: Rope(torch.ones(9, 4), torch.ones(9, 3)), "cos and sin must both be"),
        (lambda: Rope(torch.ones(9), torch.ones(9)), "cos and sin must both be"),
        (lambda: Rope(SHORT, SHORT, sections=(1, 2)), "sections must sum"),
        (lambda: Rope(SHORT, SHORT, query_positions=torch.zeros(1, 1, 1, 1)), "query_positions must be"),
        (lambda: Rope(SHORT, SHORT, key_positions=torch.zeros(2, 1, 1)), "key_positions of shape"),
        (lambda: DistanceBias(torch.ones(9)), "values must be"),
        (lambda: T5Bias(torch.ones(32)), "table must be"),
        (lambda: T5Bias(torch.ones(32, 4), max_distance=8), "max_distance must exceed"),
        (lambda: Rope(SHORT, SHORT, sections=()), "sections must sum"),
        (lambda: xformer_fast.rope_frequencies(8, base=0), "base must be positive and finite, got 0"),
        (lambda: xformer_fast.rope_frequencies(8, base=float("inf")), "base must be positive and finite, got inf"),
        (lambda: xformer_fast.rope_tables(torch.ones(4), -1), "positions_or_length must be a length >= 0"),
        (lambda: xformer_fast.alibi_slopes(0), "num_heads must be at least 1"),
        (lambda: xformer_fast.explain("softmax"), "op must be one of"),
    ],
)
def test_positions_and_information(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: Rope([1.0], SHORT), "cos must be a torch.Tensor, got list"),
        (lambda: Rope(SHORT, None), "sin must be a torch.Tensor, got NoneType"),
        (lambda: Rope(SHORT, SHORT, sections=4), "sections must be a tuple of ints, got 4"),
        (lambda: Rope(SHORT, SHORT, sections="ab"), "sections must be a tuple of ints, got 'ab'"),
        (lambda: Rope(SHORT, SHORT, sections=(2.0, 2.0)), "sections must be a tuple of ints"),
        (lambda: Rope(SHORT, SHORT, key_positions=[0, 1]), "key_positions must be a torch.Tensor, got list"),
        (lambda: xformer_fast.apply_rope(Q, LONG, LONG, positions=[0] * 6), "positions must be a torch.Tensor"),
        (lambda: xformer_fast.rope_frequencies("8"), "rotary_dim must be an int, got '8'"),
        (lambda: xformer_fast.rope_frequencies(8.0), "rotary_dim must be an int, got 8.0"),
        (lambda: xformer_fast.rope_frequencies(8, base="1e4"), "base must be a number, got str"),
        (lambda: xformer_fast.rope_tables([1.0], 8), "inv_freq must be a torch.Tensor, got list"),
        (lambda: xformer_fast.rope_tables(torch.ones(4), 2.5), "positions_or_length must be an int, got 2.5"),
        (lambda: DistanceBias([[0.0]]), "values must be a torch.Tensor, got list"),
        (lambda: DistanceBias(torch.ones(2, 9).int()), "values must be a float tensor, got torch.int32"),
        (lambda: T5Bias([[0.0]]), "table must be a torch.Tensor, got list"),
        (lambda: T5Bias(torch.ones(32, 4).long()), "table must be a float tensor, got torch.int64"),
        (lambda: T5Bias(torch.ones(32, 4), max_distance="128"), "max_distance must be a number, got str"),
        (lambda: xformer_fast.alibi_slopes(2.5), "num_heads must be an int, got 2.5"),
    ],
)
def test_types_of_positions(make, words):
    with pytest.raises(TypeError, match=words):
        make()


def test_unavailable_backends_say_why():
    double = Q.double()
    cases = [("cpu", {"query": double, "key": K.double(), "value": V.double()}, "float64")]
    wide = torch.randn(1, 1, 4, 513)
    cases.append(("cpu", {"query": wide, "key": wide, "value": wide}, "head_dim is at most 512"))
    if dispatch.triton_problem() is not None:
        cases.append(("triton", {}, "triton"))
    for backend, arguments, words in cases:
        if backend == "cpu" and dispatch.build_problem() is not None:
            words = "cannot run this call"
        with pytest.raises(BackendUnavailable, match=words):
            attend(**arguments, backend=backend)


def test_what_kernels_do_not_take_runs_through_the_formula():
    assert attend(Q.double(), K.double(), V.double()).dtype == torch.float64
    wide = torch.randn(1, 1, 4, 513)
    assert attend(wide, wide, wide).shape == wide.shape


def test_errors_leave_the_operator_usable():
    lengths = torch.tensor([10, 9])
    with pytest.raises(ValueError, match="key_lengths"):
        attend(key_lengths=lengths)
    assert attend(key_lengths=lengths - 1).isfinite().all()
