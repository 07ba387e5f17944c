"""kernels.attention: every case that a backend of the table serves, against a formula by hand and transformers."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, Gemma3TextConfig, PaliGemmaConfig, masking_utils
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.gpt_oss import modeling_gpt_oss

import kernels

host = importlib.import_module("kernels.attention_documents")
flex = importlib.import_module("torch.nn.attention.flex_attention")
HERE = ("documents", "sdpa", "sdpa_float32", "reference", "flex")
TABLE = {b.name: b for b in kernels.BACKENDS["attention"]}
DOCS = Path(__file__).parents[2] / "docs" / "kernels.md"
PAIRS = [(name, case) for name in HERE for case in ("plain", *kernels.CASES) if case in {"plain", *TABLE[name].cases}]


@pytest.fixture(autouse=True)
def every_backend_runs_here(monkeypatch):
    """Admit FlexAttention on the CPU: uncompiled it is a composite with a gradient, which PyTorch refuses to give.

    And take it as it is, not compiled anew for each shape.
    """
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    table = tuple(b._replace(serves=("*",)) if b.name == "flex" else b for b in TABLE.values())
    monkeypatch.setitem(kernels.BACKENDS, "attention", table)


# by hand -------------------------------------------------------------------------------------------------------------


def sees(query, key, window, causal) -> bool:
    """Say whether a token sees another; each is (segment, position, prefix, parent)."""
    far = query[1] - key[1]
    if key[0] not in (query[0], query[3] or query[0]) or window is not None and far >= window:
        return False
    if not causal:
        return window is None or -far < window
    return far >= 0 or query[2] == key[2] != 0


def by_hand(q, k, v, queries, keys, window=None, scale=None, causal=True, softcap=None, sinks=None):
    """Attend in the inputs' dtype: sum of exp(score) v over what is seen, by the sum of exp(score) and of the sink."""
    G, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5 if scale is None else scale
    rows = []
    for b in range(q.shape[0]):
        seen = [[float(sees(i, j, window, causal)) for j in keys[b]] for i in queries[b]]
        heads = []
        for n in range(q.shape[2]):
            score = q[b, :, n] @ k[b, :, n // G].T * scale
            score = score if softcap is None else softcap * torch.tanh(score / softcap)
            part = torch.exp(score) * torch.tensor(seen, dtype=q.dtype)
            total = part.sum(1, keepdim=True) + (0 if sinks is None else torch.exp(sinks[n]))
            heads.append(part @ v[b, :, n // G] / total)
        rows.append(torch.stack(heads, 1))
    return torch.stack(rows)


def columns(segments, positions, prefix=None, parents=None):
    """Return (segment, position, prefix, parent) of each token of each row."""
    more = [torch.zeros_like(segments) if x is None else x.long() for x in (prefix, parents)]
    return [list(zip(*row, strict=True)) for row in torch.stack([segments, positions, *more], 1).tolist()]


@st.composite
def calls(draw, case: str, served: frozenset[str] = frozenset(kernels.CASES)):
    """Draw a call of `case`, with whatever else is served: q, k, v, an output gradient, columns, options."""
    on = {c: c == case or c in served and draw(st.booleans()) for c in kernels.CASES}
    on["bidirectional"] &= case not in ("prefix", "cache", "parents")
    on["prefix"] &= not on["bidirectional"]
    on["cache"] &= not on["bidirectional"] and case != "parents"
    on["parents"] &= not on["bidirectional"] and not on["cache"]
    B, S = draw(st.integers(1, 3)), draw(st.integers(1, 13))
    kv, groups, H = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([2, 3, 8]))
    V = draw(st.sampled_from([1, 5, 16])) if on["value_dim"] else H
    segments, positions, prefix, parents = torch.zeros(4, B, S, dtype=torch.int64)
    for row in range(B):
        end, ends = 0, {0: 0}  # of segments without a parent, the position that follows
        for i, length in enumerate(draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))):
            at = slice(end, end := min(end + length, S))
            segments[row, at], first = i + 1, draw(st.sampled_from([0, 0, 5]))
            if on["parents"] and (parent := draw(st.sampled_from([*ends]))):
                parents[row, at], first = parent, ends[parent]
            else:
                ends[i + 1] = first + at.stop - at.start
            positions[row, at] = first + torch.arange(at.stop - at.start)
            prefix[row, at] = torch.tensor(draw(st.lists(st.sampled_from([0, 1, 1, 2]), min_size=S, max_size=S)))[
                : at.stop - at.start
            ]
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    make = lambda *shape: torch.randn(shape, generator=gen, dtype=torch.float64)  # noqa: E731
    q, k, v, grad = make(B, S, kv * groups, H), make(B, S, kv, H), make(B, S, kv, V), make(B, S, kv * groups, V)
    prefix = prefix > 0 if draw(st.booleans()) else prefix
    rows = (segments, positions, prefix)
    options = {"scale": draw(st.sampled_from([None, 0.3])), "causal": not on["bidirectional"]}
    options["window"] = draw(st.sampled_from([1, 2, 3, 6, 100])) if on["window"] else None
    options["softcap"] = draw(st.sampled_from([0.5, 3.0])) if on["softcap"] else None
    options["sinks"] = make(kv * groups) * 2 if on["sinks"] else None
    if on["cache"]:  # the queries are the last tokens, the keys of a slot more
        first, slots = draw(st.integers(0, S - 1)), draw(st.integers(0, 2))
        k, v = (torch.cat([x, 9 * make(B, slots, *x.shape[2:])], 1) for x in (k, v))
        held = [torch.cat([x, x.new_zeros(B, slots)], 1) for x in rows]
        q, grad, rows = q[:, first:], grad[:, first:], tuple(x[:, first:] for x in rows)
    else:
        held = None
    options["parents"] = parents if on["parents"] else None
    return (q, k, v, grad), rows, held, options, on["prefix"]


def run(fn, call):
    """Return output, dq, dk, dv and dsinks of `fn(q, k, v, sinks)`; the output gradient is 0 at padding."""
    (*qkv, grad), rows, _, options, _ = call
    leaves = [t.detach().clone().requires_grad_() for t in (*qkv, options["sinks"]) if t is not None]
    out = fn(*leaves[:3], leaves[3] if len(leaves) > 3 else None)
    real = (rows[0] != 0)[..., None, None]
    return out * real, *torch.autograd.grad(out, leaves, (grad * real).to(out.dtype))


def ours(backend, call, q, k, v, sinks):
    _, (segments, positions, prefix), held, options, blocks = call
    options = {k: v for k, v in options.items() if k not in ("sinks", "parents")}
    options |= {"sinks_N": sinks, "parents_BS": call[3]["parents"]}
    if blocks:
        options |= {"prefix_BS": prefix} | ({"key_prefix_BT": held[2]} if held else {})
    return kernels.attention(q, k, v, segments, positions, *(held or ())[:2], **options, backend=backend)


def wanted(call, q, k, v, sinks):
    _, rows, held, options, blocks = call
    options = options | {"sinks": sinks}
    parents = options.pop("parents")
    queries, keys = (columns(*x[:2], x[2] if blocks else None, parents) for x in (rows, held or rows))
    return by_hand(q, k, v, queries, keys, **options)


def agree(backend, call, tolerance):
    got, want = run(lambda *x: ours(backend, call, *x), call), run(lambda *x: wanted(call, *x), call)
    for name, a, b in zip(("out", "dq", "dk", "dv", "dsinks"), got, want, strict=False):
        most = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(
            a.double(), b, rtol=tolerance, atol=tolerance * most, msg=lambda m, n=name: f"{n} {m}"
        )
    return got


@pytest.mark.parametrize(("backend", "case"), [pair for pair in PAIRS if pair[0] != "flex"])
@given(data=st.data())
@settings(max_examples=20)
def test_every_case_of_every_backend_equals_the_formula(backend, case, data):
    agree(backend, data.draw(calls(case, TABLE[backend].cases)), 1e-9)


@pytest.mark.parametrize("case", ["plain", *kernels.CASES])
@given(data=st.data())
@settings(max_examples=6)
def test_every_case_of_flex_equals_the_formula(case, data):
    agree("flex", data.draw(calls(case, TABLE["flex"].cases)), 1e-9)


@pytest.mark.parametrize("dense", [0, 3])
@pytest.mark.parametrize("case", [c for c in kernels.CASES if c != "cache"])
@given(data=st.data(), tile=st.sampled_from([1, 60, 2**18]))
@settings(max_examples=25)
def test_long_documents_too(dense, case, data, tile):
    """Documents of more than `dense` tokens are flash calls, or a tile for each key head if scores are capped."""
    call = data.draw(calls(case, TABLE["documents"].cases))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "DENSE", dense)
        patch.setattr(host, "TILE", tile)
        host._plan.cache_clear()
        agree("documents", call, 1e-9)
    host._plan.cache_clear()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("backend", HERE)
@given(data=st.data())
@settings(max_examples=8)
def test_backends_are_as_exact_as_their_dtype(backend, dtype, tolerance, data):
    (*tensors,), *rest, options, blocks = data.draw(calls("sinks", TABLE[backend].cases))
    tensors = [t.to(dtype) for t in tensors]
    options["sinks"] = options["sinks"].to(dtype)
    call = tensors, *rest, options, blocks
    got = run(lambda *x: ours(backend, call, *x), call)
    exact = [t.double() for t in tensors], *rest, options | {"sinks": options["sinks"].double()}, blocks
    for a, b in zip(got, run(lambda *x: wanted(exact, *x), exact), strict=True):
        assert a.dtype == dtype
        atol = tolerance * max(1.0, b.abs().max().item()) if b.numel() else 0
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=atol)


ALL = {
    "bidirectional": {"causal": False},
    "parents": {"parents_BS": torch.tensor([[0, 0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1]])},
    "prefix": {"prefix_BS": torch.tensor([[1, 1, 0, 2, 2, 0, 0], [0, 0, 1, 1, 0, 1, 1]])},
}


@pytest.mark.parametrize("rule", ALL)
@pytest.mark.parametrize("backend", HERE)
def test_compiled_is_the_same(backend, rule):
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 0], [1, 1, 2, 2, 2, 2, 2]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 0], [0, 1, 0, 1, 2, 3, 4]])
    options = ALL[rule] | {"window": 3} | ({} if backend.startswith("sdpa") else {"softcap": 2.0})
    gen = torch.Generator().manual_seed(0)
    leaves = [torch.randn(2, 7, *s, generator=gen).requires_grad_() for s in ((6, 8), (2, 8), (2, 5))]
    leaves.append(torch.randn(6, generator=gen).requires_grad_())

    def fn(q, k, v, sinks):
        return kernels.attention(q, k, v, segments, positions, sinks_N=sinks, **options, backend=backend)

    torch._dynamo.reset()
    got, want = torch.compile(fn, fullgraph=True, backend="aot_eager")(*leaves), fn(*leaves)
    grads = [torch.autograd.grad(x, leaves, torch.ones_like(x)) for x in (got, want)]
    torch.testing.assert_close((got, *grads[0]), (want, *grads[1]), rtol=1e-4, atol=1e-5)


@given(data=st.data(), case=st.sampled_from([c for c in kernels.CASES if c != "cache"]))
@settings(max_examples=25)
def test_shapes_of_every_case(data, case):
    """On meta tensors the default holds the output and gives gradients of every leaf's shape."""
    (*tensors,), rows, held, options, blocks = data.draw(calls(case, frozenset(kernels.CASES) - {"cache"}))
    move = lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x  # noqa: E731
    options = {k: move(v) for k, v in options.items()}
    call = [move(t) for t in tensors], tuple(move(r) for r in rows), held, options, blocks
    out, *grads = run(lambda *x: ours(None, call, *x), call)
    assert out.shape == tensors[3].shape and out.device.type == "meta"
    leaves = [*tensors[:3], *([] if options["sinks"] is None else [options["sinks"]])]
    assert [g.shape for g in grads] == [x.shape for x in leaves]


# transformers --------------------------------------------------------------------------------------------------------

B, S, N, K = 2, 11, 6, 2
POSITIONS = torch.arange(S).expand(B, -1)
ONE = torch.ones(B, S, dtype=torch.int64)


def masked(make, config, **options):
    """Return transformers' additive mask in float64 (B, 1, S, S)."""
    config._attn_implementation = "eager"
    x = torch.zeros(B, S, 8, dtype=torch.float64)
    return make(config=config, inputs_embeds=x, attention_mask=torch.ones(B, S), past_key_values=None, **options)


def compare_with(forward, mask, H=8, V=8, sinks=None, their=None, **options):
    """Compare outputs and gradients of every backend that serves the call with transformers' eager function."""
    gen = torch.Generator().manual_seed(0)
    sizes = (S, N, H), (S, K, H), (S, K, V)
    leaves = [torch.randn(B, *s, generator=gen, dtype=torch.float64).requires_grad_() for s in sizes]
    leaves += [] if sinks is None else [sinks]
    module = SimpleNamespace(num_key_value_groups=N // K, training=False, sinks=sinks)
    q, k, v = (x.transpose(1, 2) for x in leaves[:3])
    want, _ = forward(module, q, k, v, mask, scaling=0.3, **(their or {}))
    along = torch.randn(want.shape, generator=gen, dtype=torch.float64)
    grads = torch.autograd.grad(want, leaves, along)
    for backend in HERE:
        if "softcap" in options and "softcap" not in TABLE[backend].cases:
            continue
        extra = {} if sinks is None else {"sinks_N": sinks}
        got = kernels.attention(*leaves[:3], ONE, POSITIONS, scale=0.3, **options, **extra, backend=backend)
        pairs = zip((got, *torch.autograd.grad(got, leaves, along)), (want, *grads), strict=True)
        for a, b in pairs:  # theirs is a softmax in float32
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, w=backend: f"{w} {m}")


@pytest.mark.parametrize("window", [None, 4])
def test_equals_gpt_oss(window):
    config = modeling_gpt_oss.GptOssConfig(sliding_window=window)
    make = masking_utils.create_causal_mask if window is None else masking_utils.create_sliding_window_causal_mask
    sinks = torch.randn(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    forward = modeling_gpt_oss.eager_attention_forward
    compare_with(forward, masked(make, config), sinks=sinks, window=window)


@pytest.mark.parametrize("window", [None, 4])
def test_equals_gemma_2(window):
    config = modeling_gemma2.Gemma2Config(sliding_window=window)
    make = masking_utils.create_causal_mask if window is None else masking_utils.create_sliding_window_causal_mask
    compare_with(
        modeling_gemma2.eager_attention_forward,
        masked(make, config),
        their={"softcap": 1.5},
        softcap=1.5,
        window=window,
    )


def test_equals_deepseek_v3():
    mask = masked(masking_utils.create_causal_mask, modeling_deepseek_v3.DeepseekV3Config())
    compare_with(modeling_deepseek_v3.eager_attention_forward, mask, H=24, V=16)


def test_equals_a_bidirectional_encoder():
    mask = masked(masking_utils.create_bidirectional_mask, BertConfig())
    compare_with(modeling_deepseek_v3.eager_attention_forward, mask, causal=False)


def test_equals_embedding_gemma():
    """Bidirectional and windowed: closer than the window on either side."""
    overlay = modeling_gemma3._bidirectional_window_overlay(4)
    config = Gemma3TextConfig(sliding_window=4)
    mask = masked(masking_utils.create_sliding_window_causal_mask, config, or_mask_function=overlay)
    compare_with(modeling_deepseek_v3.eager_attention_forward, mask, causal=False, window=4)


def test_equals_pali_gemma():
    """The prompt sees itself whole, what follows sees all before."""
    prompt = POSITIONS < torch.tensor([[4], [7]])
    config = PaliGemmaConfig().get_text_config()
    mask = masked(masking_utils.create_causal_mask, config, block_sequence_ids=torch.where(prompt, 0, -1))
    compare_with(modeling_deepseek_v3.eager_attention_forward, mask, prefix_BS=prompt)


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_equals_gemma_3(kind):
    """Two images of several tokens each in a text; windows reach less far back than an image is long."""
    images = torch.tensor([[0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1]])
    config = Gemma3TextConfig(
        sliding_window=3, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]
    )
    blocks = modeling_gemma3.get_block_sequence_ids_for_mask(images)
    make = modeling_gemma3.create_masks_for_vision_model
    mask = masked(make, config, block_sequence_ids=blocks, position_ids=POSITIONS)[kind]
    window = 3 if kind == "sliding_attention" else None
    compare_with(modeling_deepseek_v3.eager_attention_forward, mask, prefix_BS=blocks + 1, window=window)


# the table, and what is refused --------------------------------------------------------------------------------------


def test_the_hosts_own_op_is_the_default_of_every_case_but_a_cache():
    cases = tuple(kernels.CASES)
    assert kernels.pick("attention", "cpu", needs=cases[1:]).name == "documents"
    assert kernels.pick("attention", "cpu", needs=("cache", "sinks", "prefix")).name == "sdpa_float32"
    assert kernels.pick("attention", "meta", needs=cases[1:]).name == "shapes"
    for device in ("cpu", "cuda", "npu"):
        assert kernels.pick("attention", device, needs=cases).name == "reference"
        wanted = "sdpa_float32" if device == "cpu" else "sdpa"
        assert kernels.pick("attention", device, needs=("cache", "window")).name == wanted


def test_docs_have_the_table():
    words = {"*": "any", "": "none", "cpu": "CPU", "cuda": "CUDA", "meta": "meta"}
    said = lambda devices: words[", ".join(devices)]  # noqa: E731
    lines = [["backend", "runs on", "default on", *(case.replace("_", " ") for case in kernels.CASES)], ["---"] * 11]
    for b in TABLE.values():
        assert b.cases <= set(kernels.CASES)
        served = ["yes" if case in b.cases else "" for case in kernels.CASES]
        lines.append([f"`{b.name}`", said(b.serves), said(b.default_on), *served])
    table = "".join(f"| {' | '.join(line)} |\n".replace("|  ", "| ") for line in lines)
    assert table in DOCS.read_text("utf-8"), table


Q, KV = torch.randn(1, 4, 6, 8), torch.randn(1, 4, 2, 8)
ROWS = torch.ones(1, 4, dtype=torch.int64), torch.arange(4)[None]


def test_a_backend_that_cannot_serve_a_case_names_it_and_those_that_can():
    wrong = r"'sdpa' does not serve softcap \(scores capped .*\); on 'cpu' this call is for documents, flex, reference"
    with pytest.raises(ValueError, match=wrong):
        kernels.attention(Q, KV, KV, *ROWS, softcap=5.0, window=2, backend="sdpa")
    with pytest.raises(
        ValueError, match=r"'varlen' does not serve sinks .*, prefix .*; on 'cuda' this call is for sdpa"
    ):
        kernels.pick("attention", "cuda", "varlen", ("window", "sinks", "prefix"))


@pytest.mark.parametrize(
    ("message", "tensors", "options"),
    [
        ("6 query heads are not a multiple of 4 key heads", (Q, *(torch.randn(1, 4, 4, 8),) * 2), {}),
        (r"k has shape \(1, 4, 2, 7\), expected \(1, 4, 2, 8\)", (Q, KV[..., :7], KV), {}),
        (r"v has shape \(1, 3, 2, 8\), expected \(1, 4, 2, 8\)", (Q, KV, KV[:, :3]), {}),
        ("4 queries and 3 keys without key_segment_ids", (Q, KV[:, :3], KV[:, :3]), {}),
        (r"positions has shape \(1, 3\), expected \(1, 4\)", (Q, KV, KV), {"positions_BS": ROWS[1][:, :3]}),
        ("window is 0, expected at least 1", (Q, KV, KV), {"window": 0}),
        ("softcap is 0.0, expected a number above 0", (Q, KV, KV), {"softcap": 0.0}),
        (r"sinks has shape \(2,\), expected \(6,\)", (Q, KV, KV), {"sinks_N": torch.zeros(2)}),
        ("sinks are torch.int64, expected floating point", (Q, KV, KV), {"sinks_N": torch.zeros(6).long()}),
        (r"prefix has shape \(4,\), expected \(1, 4\)", (Q, KV, KV), {"prefix_BS": ROWS[1][0]}),
        ("prefix is torch.float32, expected bool or integer", (Q, KV, KV), {"prefix_BS": ROWS[1].float()}),
        ("expected no prefix with it", (Q, KV, KV), {"prefix_BS": ROWS[1], "causal": False}),
        (
            "expected no KV cache with it", (Q, KV, KV),
            {"key_segment_ids_BT": ROWS[0], "key_positions_BT": ROWS[1], "causal": False},
        ),
        ("need key_segment_ids, key_positions", (Q, KV, KV), {"key_segment_ids_BT": ROWS[0]}),
        ("need key_segment_ids, key_positions", (Q, KV, KV), {"key_positions_BT": ROWS[1]}),
        (
            "and, with prefix, key_prefix", (Q, KV, KV),
            {"key_segment_ids_BT": ROWS[0], "key_positions_BT": ROWS[1], "prefix_BS": ROWS[1]},
        ),
        (
            r"key_positions has shape \(1, 3\), expected \(1, 4\)", (Q, KV, KV),
            {"key_segment_ids_BT": ROWS[0], "key_positions_BT": ROWS[1][:, :3]},
        ),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_refused(message, tensors, options):
    rows = {"segment_ids_BS": ROWS[0], "positions_BS": ROWS[1]}
    with pytest.raises(ValueError, match=f"^kernels.attention: .*{message}"):
        kernels.attention(*tensors, **rows | options)


# varlen calls, which run on accelerators only ------------------------------------------------------------------------

attention = importlib.import_module("kernels.attention")


def sequences(q, k, v, ends, scale, left, right, softcap):
    """Attend as varlen kernels say that they do: sequence by sequence, and (left, right) of -1 means all."""
    assert ends.dtype == torch.int32 and q.shape[2] == k.shape[2] == v.shape[2] and q.shape[2] % 8 == 0
    out = torch.zeros_like(q)
    for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        at = range(stop - start)
        seen = [[(left < 0 or i - j <= left) and (right < 0 or j - i <= right) for j in at] for i in at]
        mask = torch.tensor(seen, dtype=torch.bool).view(len(at), len(at))
        qs, ks, vs = (x[start:stop].repeat_interleave(q.shape[1] // x.shape[1], 1).transpose(0, 1) for x in (q, k, v))
        scores = qs @ ks.mT * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        out[start:stop] = (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ vs).transpose(0, 1)
    return out


def flash_attn_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    """Have the arguments of flash-attn 2.8's flash_attn_varlen_func."""
    assert (cu_seqlens_q == cu_seqlens_k).all() and torch.diff(cu_seqlens_q).max() <= max_seqlen_q == max_seqlen_k
    left, right = window_size[0], 0 if causal else window_size[1]
    return sequences(q, k, v, cu_seqlens_q, softmax_scale, left, right, softcap)


def flash_attn_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    return_attn_probs=False,
):  # fmt: skip
    """Have the arguments of hopper/flash_attn_interface.py; older ones also return the logsumexp."""
    common = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size, "softcap": softcap}
    return flash_attn_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **common), None


def varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    """Have the arguments of varlen_attn that PyTorch 2.11 and 2.13 share."""
    common = {"softmax_scale": scale, "window_size": window_size}
    return flash_attn_2(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, **common)


@pytest.mark.parametrize("backend", ["flash_attn", "flash_attn_3", "varlen"])
@given(data=st.data())
@settings(max_examples=30)
def test_varlen_calls_are_given_what_they_ask_for(backend, data):
    """The real ones are compared in gpu_suite.py; here something that takes their arguments stands in for them."""
    case = data.draw(st.sampled_from(["plain", *sorted(TABLE[backend].cases)]))
    call = data.draw(calls(case, TABLE[backend].cases))
    _, (segments, positions, _), _, options, _ = call
    rows = attention.Rows(segments, positions, segments, positions, options["window"], options["causal"])
    capped = {} if options["softcap"] is None else {"softcap": options["softcap"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_2))
        patch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(flash_attn_varlen_func=flash_attn_3))
        patch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
        scale = options["scale"] or call[0][0].shape[3] ** -0.5
        got = run(lambda q, k, v, _: TABLE[backend].fn(q, k, v, rows, scale, **capped), call)
    for a, b in zip(got, run(lambda *x: wanted(call, *x), call), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_pytorchs_varlen_attention_takes_the_call():
    """On meta tensors, with its own gradient: fewer key heads, a head dim that is padded, values of another."""
    q, k, v = (torch.randn(2, 4, *s, device="meta").requires_grad_() for s in ((6, 12), (2, 12), (2, 5)))
    rows = attention.Rows(*(torch.ones(2, 4, dtype=torch.int64, device="meta"),) * 4, 3)
    out = attention.varlen(q, k, v, rows, 0.3)
    assert out.shape == (2, 4, 6, 5)
    assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]
