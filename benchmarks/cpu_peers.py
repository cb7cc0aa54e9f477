"""Optional CPU peers from PyPI: OpenVINO, ONNX Runtime and zentorch. None of them has a backward.

Inputs are handed over without a copy where the peer's own layout allows it; a copy into its layout happens before the
clock. All of them use as many threads as torch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import warnings

import torch

from .naive import split_options, structure
from .peers import Peer, Prepared


class OptionalPeer(Peer):
    packages: tuple[str, ...]

    @property
    def version(self) -> str:
        return importlib.metadata.version(self.packages[0])

    def why_not(self, case, dtype, mode, device):
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            return f"{' and '.join(missing)} not installed"
        if mode != "fwd":
            return f"{self.name} has no backward"
        return None


def _combined_mask(inputs) -> torch.Tensor | None:
    query, key, _, mask, options = split_options(inputs)
    bias = structure(query, key, **options)
    return mask if bias is None else bias if mask is None else mask + bias


class OpenVino(OptionalPeer):
    name = "openvino"
    packages = ("openvino",)

    def prepare(self, case, inputs):
        import numpy as np
        import openvino as ov
        import openvino.opset13 as ops

        tensors = [inputs["query"], inputs["key"], inputs["value"]]
        dtype = inputs["query"].dtype
        element = {torch.float32: ov.Type.f32, torch.bfloat16: ov.Type.bf16, torch.float16: ov.Type.f16}[dtype]
        causal = case.causal and not (case.window or case.padded or case.alibi or case.seqlen_q != case.seqlen_k)
        mask = _combined_mask({**inputs, "causal": False} if causal else inputs)
        if mask is not None:
            tensors.append(mask[(None,) * (4 - mask.dim())].contiguous())  # it misreads masks of fewer axes
        query, *kv = parameters = [ops.parameter(list(x.shape), element) for x in tensors]
        group = case.heads // case.heads_kv
        kv, attn_mask = kv[:2], kv[2] if mask is not None else None
        if group > 1:
            grouped = [case.batch, case.heads_kv, group, case.seqlen_k, case.head_dim]
            merged = [case.batch, case.heads, case.seqlen_k, case.head_dim]

            def repeat(x):  # the form of grouped queries that OpenVINO recognises
                x = ops.unsqueeze(x, ops.constant([2], np.int64))
                x = ops.broadcast(x, ops.constant(grouped, np.int64), broadcast_spec="BIDIRECTIONAL")
                return ops.reshape(x, ops.constant(merged, np.int64), special_zero=False)

            kv = [repeat(x) for x in kv]
        node = ops.scaled_dot_product_attention(query, *kv, attn_mask, None, causal=causal)
        config = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": element,
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = ov.Core().compile_model(ov.Model([node], parameters, "attention"), "CPU", config)
        request = compiled.create_infer_request()

        def share(x):
            if x.dtype is torch.bfloat16:
                return ov.Tensor(x.view(torch.int16).numpy().view(np.uint16), list(x.shape), ov.Type.bf16)
            return ov.Tensor(x.numpy(), shared_memory=True)

        shared = [share(x) for x in tensors]
        for i, x in enumerate(shared):
            request.set_input_tensor(i, x)

        def output(_):
            data = torch.from_numpy(request.get_output_tensor(0).data.view(np.int16)).clone()
            return data.view(dtype).reshape(inputs["query"].shape)

        def call():
            request.infer()
            return shared  # the request holds the addresses of these tensors, not the tensors

        return Prepared(call, output)


class OnnxRuntime(OptionalPeer):
    """Its GroupQueryAttention for causal cases, MultiHeadAttention for the rest, ONNX's Attention where Sq != Sk."""

    name = "onnxruntime"
    packages = ("onnxruntime", "onnx")

    def why_not(self, case, dtype, mode, device):
        if dtype is torch.bfloat16:
            return "ONNX Runtime's attention has no bfloat16 on a CPU"
        return super().why_not(case, dtype, mode, device)

    def prepare(self, case, inputs):
        import numpy as np
        import onnx.helper as oh
        import onnxruntime
        from onnx import TensorProto

        query, key, value, mask, options = split_options(inputs)
        element = TensorProto.FLOAT if query.dtype is torch.float32 else TensorProto.FLOAT16
        scale = case.head_dim**-0.5
        feeds, types, outputs = {}, {}, ["out"]
        heads_last = True

        def feed(name, x, kind=element):
            feeds[name], types[name] = x, kind
            return name

        def packed(x):  # (batch, seqlen, heads * head_dim)
            return x.transpose(1, 2).flatten(2).numpy()

        if case.seqlen_q != case.seqlen_k:
            heads_last = False
            names = [feed(n, x.numpy()) for n, x in (("q", query), ("k", key), ("v", value))]
            bias = _combined_mask(inputs)
            if bias is not None:
                names.append(feed("bias", bias.expand(case.batch, case.heads, -1, -1).numpy()))
            node = oh.make_node("Attention", names, outputs, scale=scale)
        elif case.causal and mask is None and not (case.alibi or case.padded or case.global_keys):
            names = [feed(n, packed(x)) for n, x in (("q", query), ("k", key), ("v", value))] + ["", ""]
            names.append(feed("seqlens", np.full(case.batch, case.seqlen_k - 1, np.int32), TensorProto.INT32))
            names.append(feed("total", np.array(case.seqlen_k, np.int32), TensorProto.INT32))
            attributes = {"num_heads": case.heads, "kv_num_heads": case.heads_kv, "scale": scale}
            window = case.window[0] + 1 if case.window else -1
            outputs = ["out", "present_key", "present_value"]
            node = oh.make_node(
                "GroupQueryAttention", names, outputs, domain="com.microsoft", local_window_size=window, **attributes
            )
        else:
            names = [feed(n, packed(x)) for n, x in (("q", query), ("k", key), ("v", value))] + ["", "", ""]
            if case.padded:
                names[4] = feed("lengths", options.pop("key_lengths").int().numpy(), TensorProto.INT32)
            bias = structure(query, key, **options)
            bias = mask if bias is None else bias if mask is None else mask + bias
            if bias is not None:
                names[5] = feed("bias", bias.expand(1, case.heads, -1, -1).contiguous().numpy())
            while not names[-1]:
                names.pop()
            node = oh.make_node(
                "MultiHeadAttention", names, outputs, domain="com.microsoft", num_heads=case.heads, scale=scale
            )

        def value_info(name, kind):
            return oh.make_tensor_value_info(name, kind, None)

        graph = oh.make_graph(
            [node], "attention", [value_info(n, t) for n, t in types.items()], [value_info(n, element) for n in outputs]
        )
        opsets = [oh.make_opsetid("", 23), oh.make_opsetid("com.microsoft", 1)]
        model = oh.make_model(graph, opset_imports=opsets, ir_version=10)
        session_options = onnxruntime.SessionOptions()
        session_options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), session_options, providers=["CPUExecutionProvider"]
        )

        def output(results):
            out = torch.from_numpy(results[0])
            if heads_last:
                out = out.reshape(case.batch, case.seqlen_q, case.heads, -1).transpose(1, 2)
            return out

        return Prepared(functools.partial(session.run, ["out"], feeds), output)


class Zentorch(OptionalPeer):
    """zentorch's SDPA, or its kernel for windows where the case has one; ALiBi is a dense mask (its own differs)."""

    name = "zentorch"
    packages = ("zentorch",)

    def prepare(self, case, inputs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("zentorch")
        query, key, value, _, options = split_options(inputs)
        scale = case.head_dim**-0.5
        square = case.seqlen_q == case.seqlen_k
        if case.window and square and not (case.global_keys or case.padded or case.alibi or case.bias):
            out = torch.empty_like(query)
            call = functools.partial(
                torch.ops.zentorch.zentorch_sdpa_attn, query, key, value, out, scale, case.causal, None, *case.window
            )
            return Prepared(call, lambda _: out)
        causal = case.causal and square and len(options) == 1
        bias = _combined_mask({**inputs, "causal": False} if causal else inputs)
        call = functools.partial(
            torch.ops.zentorch.zentorch_sdpa, query, key, value, 0.0, causal, attn_mask=bias, scale=scale
        )
        return Prepared(call, lambda result: result[0])
