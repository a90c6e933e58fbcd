"""Each attention backend that this machine has, against fp32 attention and against Triton.

Blocks that nobody owns, and what lies behind the end of a context, hold NaN: a backend that reads
them shows.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from openlora.engine import Completion, Engine, EngineConfig, Request, SamplingParams
from openlora.engine.attention_backends import TRITON_ATTENTION, AttentionChoice
from openlora.engine.attention_binding import AttentionBinding
from openlora.engine.attention_libraries import (
    LIBRARIES,
    AttentionNeeds,
    Library,
    LibraryBroken,
)
from openlora.engine.config import block_size_for
from openlora.engine.step_inputs import query_tiles
from openlora.kernels.flash_attention import Chunks
from openlora.kernels.triton_attention import DecodeScratch, decode_splits
from openlora.kernels.triton_prefill_attention import prefill_tile_tokens
from tests.engine.tiny_model import VOCAB_SIZE, make_tiny_model
from tests.kernels.test_triton_attention import PagedCase

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

TOLERANCE = 2e-2
"""bf16 against fp32."""
SHAPES = [((32, 8, 128), 0, 0.0), ((9, 3, 64), 40, 0.0), ((8, 4, 128), 0, 20.0)]
"""((heads, KV heads, head_dim), window, soft cap)"""
DECODES = [1, 15, 16, 17, 64, 65, 127, 129, 300]
"""Contexts of rows of one token."""
CHUNKS = [(2, 0), (16, 0), (63, 1), (65, 40), (130, 200)]
"""(tokens, cached positions before them)"""


def chosen(library: Library | None, head_dim: int, block_size: int) -> AttentionChoice:
    """For both phases; skips where it cannot be used here."""
    if library is None:
        return TRITON_ATTENTION
    needs = AttentionNeeds(torch.cuda.get_device_capability(), torch.bfloat16, head_dim, block_size)
    reason = library.why_not(needs)
    if reason is not None:
        pytest.skip(f"{library.name}: {reason}")
    try:
        flash = library.load()
    except LibraryBroken as broken:
        pytest.skip(str(broken))
    return AttentionChoice(flash, flash)


def usual_block_size(library: Library | None) -> int:
    return block_size_for("auto" if library is None else library.name)


EACH = pytest.mark.parametrize(
    "library", [None, *LIBRARIES], ids=lambda library: "triton" if library is None else library.name
)


def binding_of(
    case: PagedCase, choice: AttentionChoice, num_decodes: int, chunks: list[tuple[int, int]]
) -> AttentionBinding:
    """Of ``num_decodes`` rows of one token, then the chunks."""
    counts = [1] * num_decodes + [count for count, _ in chunks]
    firsts = list(itertools.accumulate(counts, initial=0))
    starts = [length - count for length, count in zip(case.lens, counts, strict=True)]

    def ints(values: list) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    spans = ints(list(zip(firsts, counts, starts, strict=False)))
    tile_tokens = prefill_tile_tokens(case.num_heads, case.num_kv_heads)
    tiles = query_tiles(spans.cpu().numpy(), num_decodes, tile_tokens)
    lens = ints(case.lens)
    splits = decode_splits(len(counts), case.num_kv_heads, 132, 512)
    heads = (case.num_heads, case.num_kv_heads, case.head_dim)
    return AttentionBinding(
        num_decodes=num_decodes,
        block_tables=case.tables,
        context_lens=lens,
        scratch=DecodeScratch(len(counts), *heads, splits, case.cache.device),
        spans=spans,
        tiles=torch.from_numpy(tiles).cuda(),
        chunks=None
        if not chunks
        else Chunks(
            ints(firsts)[num_decodes:],
            lens[num_decodes:],
            ints([0, *itertools.accumulate(case.lens)])[num_decodes:],
            case.tables[num_decodes:],
            max(count for count, _ in chunks),
        ),
        choice=choice,
    )


@EACH
@pytest.mark.parametrize(("heads", "window", "cap"), SHAPES)
@torch.inference_mode()
def test_a_ragged_mixed_step(library, heads, window, cap):
    block_size = usual_block_size(library)
    choice = chosen(library, heads[2], block_size)
    lens = DECODES + [count + start for count, start in CHUNKS]
    case = PagedCase(lens, heads, torch.bfloat16, block_size)
    q = case.queries(len(DECODES) + sum(count for count, _ in CHUNKS))
    binding = binding_of(case, choice, len(DECODES), CHUNKS)
    out = binding.attend(q, case.cache, heads[2] ** -0.5, window=window, soft_cap=cap)
    for row, (first, count, start) in enumerate(binding.spans.tolist()):
        part = slice(first, first + count)
        expected = case.expected(row, q[part], start, window, cap)
        torch.testing.assert_close(
            out[part].float().cpu(), expected, rtol=TOLERANCE, atol=TOLERANCE
        )


@EACH
@torch.inference_mode()
def test_a_graph_of_decodes_with_padding_repeats_the_eager_result(library):
    block_size = usual_block_size(library)
    heads = (32, 8, 128)
    choice = chosen(library, heads[2], block_size)
    case = PagedCase([*DECODES, 0, 0], heads, torch.bfloat16, block_size)
    case.tables.clamp_(max=case.cache.shape[1] - 1)
    q = case.queries(len(case.lens))
    binding = binding_of(case, choice, len(case.lens), [])
    scale = heads[2] ** -0.5
    eager = binding.attend(q, case.cache, scale, window=0, soft_cap=0.0).clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = binding.attend(q, case.cache, scale, window=0, soft_cap=0.0)
    real = len(DECODES)
    for _ in range(2):
        graph.replay()
        assert torch.equal(out[:real], eager[:real])
    # Other contexts of the same rows, in the same graph.
    binding.context_lens[:real] = torch.arange(1, real + 1, dtype=torch.int32).clamp(max=1)
    graph.replay()
    for row in range(real):
        expected = case.kv[row][1].repeat_interleave(4, 0)[:, 0].reshape(-1)
        torch.testing.assert_close(out[row].float().cpu(), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random Llama with heads of 64, which the libraries take."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_tiny_model(folder, hidden_size=256, intermediate_size=512, initializer_range=0.1)
    return folder


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_an_engine_says_what_it_says_on_triton(tiny, library):
    block_size = usual_block_size(library)
    chosen(library, 64, block_size)
    generator = torch.Generator().manual_seed(5)
    prompts = [
        torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in (1, 16, 33, 65)
    ]
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)

    def run(backend: str) -> tuple[list[Completion], str]:
        engine = Engine(
            EngineConfig(
                str(tiny),
                device="cuda",
                dtype="bfloat16",
                block_size=block_size,
                num_kv_blocks=64,
                adapter_pages=(0,) * 4,
                max_num_seqs=8,
                max_num_batched_tokens=48,
                attention_backend=backend,
            )
        )
        done = engine.generate([Request(prompt_token_ids=p, params=params) for p in prompts])
        return done, engine.model_info.attention_backend

    expected, _ = run("triton")
    done, backend = run(library.name)
    assert backend == library.name
    pairs = [
        (ours, theirs)
        for one, other in zip(done, expected, strict=True)
        for ours, theirs in zip(one.token_ids, other.token_ids, strict=True)
    ]
    # In bf16 a near tie may fall either way, and from there on the texts part.
    assert sum(ours == theirs for ours, theirs in pairs) > len(pairs) // 2
