"""Prompts as text, and the text encoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.parity.encoders import load_text_encoder, replay_text_encoder
from tests.parity.golden import Golden, rel_max
from xicon_infer.errors import BackendUnavailable, InvalidRequest, WeightsError
from xicon_infer.models.prompt import (
    clean_prompt,
    extract_weight,
    parse_prompt,
    split_prompts,
)
from xicon_infer.models.text import (
    UMT5_XXL,
    TextConfig,
    build_text_encoder,
    config_from_shapes,
    encode_ids,
    encode_prompts,
)
from xicon_infer.models.tokenizer import tiny_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
FILE = Golden(GOLDEN / "wan_core" / "umt5_tiny.safetensors", [GOLDEN])
TOKENIZER = tiny_tokenizer()
PROMPTS = ["a dance in the rain", "x", "the human starts to dance, smooth and natural"]


@pytest.fixture(scope="module")
def model():
    return load_text_encoder(FILE)


def built(config: TextConfig, dtype=torch.float32):
    """Returns an encoder whose weights depend on their names alone."""
    model = build_text_encoder(config)
    for i, (_, parameter) in enumerate(sorted(model.named_parameters())):
        generator = torch.Generator().manual_seed(i)
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype)


TINY = TextConfig(vocab_size=320, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=2)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a\n dance \t now ", "a dance now"),
        ("rock &amp;amp; roll", "rock & roll"),
        ("&lt;b&gt;", "<b>"),
        ("<i> &amp;lt;", "<i> <"),
        ("the cafÃ© is open", "the café is open"),
        ("\u201cquoted\u201d", '"quoted"'),
        ("wide\u3000space\u00a0here", "wide space here"),
        ("ｆｕｌｌ", "full"),
        ("色调艳丽，过曝", "色调艳丽,过曝"),
        ("a\x00b\ud800", "ab\ufffd"),
        ("(a:1.3) | b", "(a:1.3) | b"),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_cleaning(raw, clean):
    assert clean_prompt(raw) == clean


@given(st.text(st.characters()))
def test_cleaned_text_has_single_spaces_and_is_valid_utf8(text):
    clean = clean_prompt(text)
    assert clean.encode().decode() == clean
    assert clean.split() == clean.split(" ") or not clean


@pytest.mark.parametrize(
    ("raw", "text", "weight"),
    [
        ("a (dance:1.5) now", "a dance now", 1.5),
        ("(a:1.5) and (b:0.5)", "a and b", 0.75),
        ("(a:2)(a:2)", "aa", 4.0),
        ("(a:.5)", "a", 0.5),
        ("(a b:1.)", "a b", 1.0),
        ("(a)", "(a)", 1.0),
        ("(a:b)", "(a:b)", 1.0),
        ("(a:1.2.3)", "(a:1.2.3)", 1.0),
        ("a:1.3", "a:1.3", 1.0),
        ("(two\nlines:1.3)", "(two\nlines:1.3)", 1.0),
    ],
)
def test_weights(raw, text, weight):
    assert extract_weight(raw) == (text, pytest.approx(weight))


def test_syntax_is_off_unless_asked_for():
    raw = "(a:1.5) | b |"
    assert parse_prompt(raw) == [(raw, 1.0)]
    assert parse_prompt(raw, syntax=True) == [("a", 1.5), ("b", 1.0), ("", 1.0)]
    assert split_prompts("no bar") == ["no bar"]


def test_reference_outputs():
    checks = replay_text_encoder(FILE)
    assert checks is not None
    names = {check.name.partition(":")[2] for check in checks}
    kept = {key for key in FILE.keys if key.startswith(("out.", "mid."))}
    assert kept <= names
    for check in checks:
        assert check.ok, check


def test_sizes_are_read_from_the_tensors(model):
    options = FILE.meta["config"]
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert config_from_shapes(shapes) == TextConfig(
        vocab_size=options["vocab"],
        d_model=options["dim"],
        d_kv=options["dim_attn"] // options["num_heads"],
        d_ff=options["dim_ffn"],
        num_layers=options["num_layers"],
        num_heads=options["num_heads"],
    )
    assert config_from_shapes(shapes, max_distance=64).max_distance == 64


def test_the_published_size_builds_without_memory():
    with torch.device("meta"):
        model = build_text_encoder(UMT5_XXL)
    state = model.state_dict()
    assert config_from_shapes({key: value.shape for key, value in state.items()}) == UMT5_XXL
    assert len(state) == 243  # 24 layers of 10, two norms and tables, one table under two names
    assert sum(p.numel() for p in model.parameters()) == 5_680_910_336
    assert not any(p.requires_grad for p in model.parameters())


def test_a_tensor_that_is_missing_is_named():
    with pytest.raises(WeightsError, match=r"no tensor 'shared\.weight'"):
        config_from_shapes({"norm.weight": (8,)})


def test_loading_onto_meta_keeps_the_embedding_one_tensor(model):
    with torch.device("meta"):
        other = build_text_encoder(config_from_shapes(shapes_of(model)))
    other.load_state_dict(model.state_dict(), strict=True, assign=True)
    assert other.get_parameter("shared.weight") is other.get_parameter(
        "encoder.embed_tokens.weight"
    )
    assert not list(other.buffers())
    for a, b in zip(encode(model), encode(other), strict=True):
        assert torch.equal(a, b)


def shapes_of(model):
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def encode(model, prompts=PROMPTS, **options):
    return encode_prompts(model, TOKENIZER, prompts, device="cpu", **options)


def test_a_batch_is_its_prompts_one_by_one(model):
    _, mask = TOKENIZER.tokenize(PROMPTS)
    embeds = encode(model)
    assert [len(rows) for rows in embeds] == mask.sum(1).tolist()
    for prompt, rows in zip(PROMPTS, embeds, strict=True):
        (alone,) = encode(model, [prompt])
        assert rel_max(rows, alone) < 1e-5


def test_padding_would_count_without_the_mask(model):
    ids, mask = TOKENIZER.tokenize(PROMPTS)
    masked = encode_ids(model, ids, mask)[1]
    bare = encode_ids(model, ids, torch.ones_like(mask))[1][: len(masked)]
    assert rel_max(masked, bare) > 1e-2


def test_nothing_is_random():
    model = built(TINY)
    assert not model.training
    before = encode(model)
    for a, b in zip(before, encode(model.train()), strict=True):
        assert torch.equal(a, b)


def test_an_empty_prompt_has_one_row(model):
    assert [rows.shape for rows in encode(model, [""])] == [(1, 48)]


def test_prompts_are_cleaned(model):
    assert torch.equal(encode(model, [" a  &amp; b "])[0], encode(model, ["a & b"])[0])
    assert not torch.equal(encode(model, ["a | b"])[0], encode(model, ["a b"])[0][:4])


def test_weights_scale_whole_embeddings(model):
    plain, weighted = encode(model), encode(model, weights=[1.5, 1.0, 0.0])
    for rows, scaled, weight in zip(plain, weighted, (1.5, 1.0, 0.0), strict=True):
        assert torch.equal(scaled, rows * weight)
    with pytest.raises(InvalidRequest, match="2 given for 3 prompts"):
        encode(model, weights=[1.0, 1.0])


def test_long_prompts_are_cut(model):
    long = ["dance " * 600]
    assert len(encode(model, long)[0]) == 512
    assert len(encode(model, long, max_length=20)[0]) == 20
    assert rel_max(encode(model, long, max_length=20)[0], encode(model, long)[0][:20]) > 1e-3


def test_the_embedding_goes_to_the_asked_device(model):
    assert encode_prompts(model, TOKENIZER, ["a"], device="meta")[0].device.type == "meta"


@pytest.mark.parametrize("change", [{"max_distance": 16}, {"num_layers": 1}])
def test_sizes_change_the_result(change):
    state = built(TINY).state_dict()
    other = build_text_encoder(replace(TINY, **change))
    other.load_state_dict({key: state[key] for key in other.state_dict()}, strict=True)
    prompt = ["the human starts to dance in the rain and on the beach, natural"]
    assert rel_max(encode(other, prompt)[0], encode(built(TINY), prompt)[0]) > 1e-3


@pytest.mark.parametrize(
    "field", ["vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "num_buckets"]
)
def test_every_size_reaches_the_module(field):
    config = replace(TINY, **{field: 2 * getattr(TINY, field)})
    assert config_from_shapes(shapes_of(build_text_encoder(config))) == config


def test_bfloat16_is_close_to_float32():
    full, half = encode(built(TINY)), encode(built(TINY, torch.bfloat16))
    for a, b in zip(full, half, strict=True):
        assert b.dtype == torch.bfloat16
        assert 0 < rel_max(b, a) < 5e-2


def test_float16_is_refused():
    with pytest.raises(BackendUnavailable, match=r"float16 is not allowed.*overflow") as caught:
        encode(built(TINY, torch.float16))
    assert caught.value.field == "dtype"


def test_a_foreign_tokenizer_is_refused():
    small = built(replace(TINY, vocab_size=300))
    with pytest.raises(WeightsError, match="gives id 304, but the text encoder knows 300"):
        encode(small, ["the"])
