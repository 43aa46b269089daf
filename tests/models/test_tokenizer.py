"""The tokenizer: its ids, its cut, and the three places it can come from."""

from __future__ import annotations

import io
import json

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from xicon_infer.errors import InvalidRequest, WeightsError
from xicon_infer.models.prompt import clean_prompt
from xicon_infer.models.tokenizer import (
    MAX_TOKENS,
    load_tokenizer,
    tiny_tokenizer,
    tokenizer_from_bytes,
)

TINY = tiny_tokenizer()
CORPUS = [
    "the human starts to dance in the rain",
    "a woman running on a beach with a red dress",
    "色调艳丽，过曝，静态，细节模糊不清，字幕",
    "smooth natural movements, high quality, detailed 12345",
] * 20
LETTERS = "abcdefghijklmnopqrstuvwxyz   0123456789,.红色调艳🦙éß①ﬁ"
UMT5_IDS = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
TRAININGS = {
    "byte fallback": {"byte_fallback": True, "vocab_size": 400},
    "unknown id": {"vocab_size": 130},
    "no normalising": {"vocab_size": 130, "normalization_rule_name": "identity"},
    "no prefix": {"vocab_size": 130, "add_dummy_prefix": False},
    "spaces kept": {"vocab_size": 130, "remove_extra_whitespaces": False},
    "unknown id moved": {"vocab_size": 130, "unk_id": 0, "pad_id": 3},
}
_trained: dict[str, bytes] = {}


def spiece(training: str, **options) -> bytes:
    """Returns a SentencePiece model trained on CORPUS, trained once a run."""
    if training not in _trained:
        out = io.BytesIO()
        settings = UMT5_IDS | TRAININGS.get(training, {}) | options
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=out,
            hard_vocab_limit=False,
            num_threads=1,
            minloglevel=2,
            **settings,
        )
        _trained[training] = out.getvalue()
    return _trained[training]


def ids_of(tokenizer, text: str, **options) -> list[int]:
    ids, _ = tokenizer.tokenize([text], **options)
    return ids[0].tolist()


def test_special_ids_are_those_of_umt5():
    names = ("<pad>", "</s>", "<s>", "<unk>")
    assert [TINY.backend.token_to_id(name) for name in names] == [0, 1, 2, 3]
    assert (TINY.pad_id, TINY.eos_id, TINY.vocab_size) == (0, 1, 311)


def test_tiny_tokenizer_is_the_same_every_time():
    assert tiny_tokenizer().backend.to_str() == TINY.backend.to_str()
    # Written down, because the tiny preset's videos depend on them.
    assert ids_of(TINY, "the dance!") == [304, 305, 309, 301, 1]


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_can_be_read_back(text):
    # "▁" stands for a space, "<s>" and "<0x41>" for ids: these cannot be told apart again.
    text = " ".join(clean_prompt(text).replace("▁", "").replace("<", "").split())
    ids = ids_of(TINY, text, max_length=10**6)
    assert ids[-1] == TINY.eos_id
    assert TINY.backend.token_to_id("<unk>") not in ids
    assert TINY.backend.decode(ids).strip() == text


@given(st.lists(st.text(alphabet=LETTERS, max_size=30), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_a_batch_is_its_prompts_padded(prompts):
    ids, mask = TINY.tokenize(prompts)
    assert ids.shape == mask.shape
    assert int(mask.sum(1).max()) == ids.shape[1]
    for text, row, real in zip(prompts, ids, mask.bool(), strict=True):
        assert row[real].tolist() == ids_of(TINY, text)
        assert row[~real].eq(TINY.pad_id).all()
        assert not real[int(real.sum()) :].any()


@pytest.mark.parametrize("words", [300, 255, 256, 1])
def test_a_long_prompt_is_cut_as_transformers_does(words):
    text = " ".join(["xx"] * words)
    reference = tokenizers.Tokenizer.from_str(TINY.backend.to_str())
    reference.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    reference.enable_truncation(max_length=MAX_TOKENS)
    ids = ids_of(TINY, text)
    assert ids == reference.encode(text).ids
    assert len(ids) == min(512, 3 * words + 1)
    assert ids[-1] == TINY.eos_id


def test_the_cut_keeps_the_beginning_and_the_end_mark():
    whole = ids_of(TINY, "qwertyuiop")
    assert ids_of(TINY, "qwertyuiop", max_length=5) == [*whole[:4], 1]
    assert ids_of(TINY, "qwertyuiop", max_length=1) == [1]
    assert ids_of(TINY, "qwertyuiop", max_length=len(whole)) == whole


def test_an_empty_prompt_is_its_end_mark():
    assert ids_of(TINY, "") == [1]


def test_a_written_end_mark_is_an_end_mark():
    # As in the official tokenizer, which reads special tokens in a prompt.
    for tokenizer in (TINY, tokenizer_from_bytes(spiece("byte fallback"))):
        assert ids_of(tokenizer, "a</s>").count(1) == 2
        assert ids_of(tokenizer, "</s>a")[0] == 1


def test_impossible_requests_are_refused():
    with pytest.raises(InvalidRequest, match="max_length must be at least 1, got 0"):
        TINY.tokenize(["a"], max_length=0)
    with pytest.raises(InvalidRequest, match="got none"):
        TINY.tokenize([])


@pytest.mark.parametrize("training", TRAININGS)
def test_sentencepiece_model_gives_the_ids_of_sentencepiece(training):
    data = spiece(training)
    reference = sentencepiece.SentencePieceProcessor(model_proto=data)
    tokenizer = tokenizer_from_bytes(data)
    assert tokenizer.pad_id == reference.pad_id()
    assert tokenizer.eos_id == reference.eos_id()
    assert tokenizer.vocab_size == reference.get_piece_size()

    @given(st.text(alphabet=LETTERS, max_size=40))
    @settings(max_examples=100, deadline=None)
    def same(text):
        if training == "spaces kept":
            text = text.strip()  # the one known difference; cleaned prompts begin with no space
        assert ids_of(tokenizer, text) == [*reference.encode(text), reference.eos_id()]

    same()
    for text in (*CORPUS[:4], "  spaces   around  ", " "):
        same.hypothesis.inner_test(text)


def test_trainings_differ():
    # If two of them split alike, the test above would not see a setting that is ignored.
    text = "the  ①  ﬁ 🦙 dance"
    results = {tuple(ids_of(tokenizer_from_bytes(spiece(t)), text)) for t in TRAININGS}
    assert len(results) == len(TRAININGS)


def test_json_gives_the_same_ids_whatever_settings_it_carries():
    tokenizer = tokenizer_from_bytes(spiece("byte fallback"))
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.enable_truncation(max_length=3)
    backend.enable_padding(length=64)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 1)]
    )
    again = tokenizer_from_bytes(backend.to_str().encode())
    assert ids_of(again, CORPUS[0]) == ids_of(tokenizer, CORPUS[0])


def test_both_kinds_of_file_load(tmp_path):
    model, other = tmp_path / "spiece.model", tmp_path / "tokenizer.json"
    model.write_bytes(spiece("byte fallback"))
    tokenizer = load_tokenizer(model)
    other.write_text(tokenizer.backend.to_str(pretty=True))
    assert ids_of(load_tokenizer(other), "a dance") == ids_of(tokenizer, "a dance")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"cannot read .*absent\.json .*No such file"):
        load_tokenizer(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no pieces"),
        (b"\x00\x01junk", "neither JSON nor a SentencePiece model"),
        (b"\x0f", "wire type 7"),
        (b"\x0a\x05ab", "cut short"),
        (b"\x0a\xff", "neither JSON nor"),
        (b"\x0a\x02\x08\x01", "wrong type"),
        (b'{"model": {"type": "Unigram"', "broken JSON"),
        (b'{"tokenizer_class": "T5Tokenizer"}', "tokenizer_config.json"),
    ],
)
def test_damaged_data_is_refused(data, reason):
    with pytest.raises(WeightsError, match=reason) as caught:
        tokenizer_from_bytes(data, source="disk/file")
    assert "disk/file" in str(caught.value)
    assert caught.value.field == "tokenizer"


def test_a_sentencepiece_model_that_ends_early_is_refused():
    data = spiece("byte fallback")
    for length in range(len(data) - 20, len(data)):
        with pytest.raises(WeightsError):
            tokenizer_from_bytes(data[:length])


def test_other_models_are_refused():
    with pytest.raises(WeightsError, match="model type 2; UMT5 is unigram"):
        tokenizer_from_bytes(spiece("bpe", model_type="bpe", vocab_size=130))


@pytest.mark.parametrize(
    ("options", "missing"), [({"pad_id": -1}, "<pad>"), ({"eos_id": -1}, "</s>")]
)
def test_a_vocabulary_without_special_tokens_is_refused(options, missing):
    data = spiece(f"without {missing}", vocab_size=130, **options)
    with pytest.raises(WeightsError, match=f"has no {missing} token"):
        tokenizer_from_bytes(data)


def test_a_json_without_special_tokens_is_refused():
    content = json.loads(TINY.backend.to_str())
    content["added_tokens"] = []
    content["model"]["vocab"][1][0] = "<end>"
    with pytest.raises(WeightsError, match="has no </s> token"):
        tokenizer_from_bytes(json.dumps(content).encode())
