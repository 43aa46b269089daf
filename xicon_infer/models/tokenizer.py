"""Text to UMT5 token ids, with the `tokenizers` library alone.

Reads a `tokenizer.json`, or the SentencePiece model that Comfy-Org's text encoder files carry.
The latter is parsed here: a protobuf message of three fields is less code than the protobuf and
sentencepiece packages are trouble. Special ids are looked up by name, because UMT5's differ from
T5's: `<pad>` 0, `</s>` 1, `<s>` 2, `<unk>` 3.

Shape letters: B prompts, L tokens.
"""

from __future__ import annotations

import json
import string
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers

from xicon_infer.errors import InvalidRequest, WeightsError

MAX_TOKENS = 512
"""Tokens a prompt may have with its end mark: the text length the Wan models were trained with."""

_PAD, _EOS, _BOS, _UNK = "<pad>", "</s>", "<s>", "<unk>"
_SPACE = "▁"
"""What SentencePiece writes for a space (U+2581)."""


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary and the two ids that every sequence needs.

    backend: does the splitting; its own post-processing, padding and truncation are not used.
    pad_id: fills a batch. eos_id: ends every prompt.
    """

    backend: tokenizers.Tokenizer
    pad_id: int
    eos_id: int

    @property
    def vocab_size(self) -> int:
        """The number of ids, added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def tokenize(
        self, prompts: list[str], *, max_length: int = MAX_TOKENS
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the ids of some prompts, each with its end mark, and which of them are real.

        No start mark is added. A prompt that is too long loses its end, never its end mark.

        Args:
            prompts: B cleaned texts; an empty one is its end mark alone.
            max_length: tokens kept per prompt, end mark included; at least 1.

        Returns:
            ids: int64 [B, L], padded at the end to the longest of the batch.
            mask: int64 [B, L], 1 for a token and 0 for padding.

        Raises:
            InvalidRequest: max_length is below 1, or there is no prompt.

        Source: Wan-Video/Wan2.1: wan/modules/tokenizers.py. Differs from it: padded to the
            longest prompt instead of to max_length; the mask makes the two equal.
        """
        if max_length < 1:
            raise InvalidRequest(f"max_length must be at least 1, got {max_length}")
        if not prompts:
            raise InvalidRequest("prompts must hold at least one text, got none", field="prompt")
        rows = [[*self._split(text)[: max_length - 1], self.eos_id] for text in prompts]
        length = max(len(row) for row in rows)
        ids = torch.full((len(rows), length), self.pad_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        return ids, mask

    def _split(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids


def load_tokenizer(path: Path) -> Tokenizer:
    """Returns the tokenizer of a `tokenizer.json` or `spiece.model` file.

    Args:
        path: the file.

    Raises:
        WeightsError: the file cannot be read, or holds no usable vocabulary.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WeightsError(
            f"tokenizer: cannot read {path} ({error.strerror}); a tokenizer.json or spiece.model "
            "of google/umt5-xxl is needed",
            field="tokenizer",
        ) from error
    return tokenizer_from_bytes(data, source=str(path))


def tokenizer_from_bytes(data: bytes, *, source: str = "tokenizer") -> Tokenizer:
    """Returns the tokenizer written in some bytes.

    Args:
        data: the content of a tokenizer.json, or a SentencePiece unigram model (Comfy-Org's
            text encoder files hold one as the uint8 tensor `spiece_model`).
        source: what to call the data in an error.

    Raises:
        WeightsError: the data is neither, is cut short, or lacks `<pad>` or `</s>`.
    """
    if data.lstrip()[:1] == b"{":
        return _finish(_from_json(data, source), source)
    return _finish(_from_sentencepiece(data, source), source)


def tiny_tokenizer() -> Tokenizer:
    """Returns a tokenizer of 311 ids that needs no file, for tests and dry runs.

    It has UMT5's special ids, single letters, a few longer pieces, and one id per byte for
    everything else, so that no text is unknown to it.
    """
    pieces = [(name, 0.0) for name in (_PAD, _EOS, _BOS, _UNK)]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    letters = _SPACE + string.ascii_lowercase + string.digits + ".,-'!?"
    pieces += [(letter, -3.0) for letter in letters]
    # Dearer than one letter, cheaper than two: the split depends on the neighbours.
    pieces += [(piece, -4.0) for piece in ("▁a", "▁the", "▁dan", "ing", "er", "an", "ce", "on")]
    return _finish(_build(_Pieces(tuple(pieces), unk_id=3, byte_fallback=True)), "tiny tokenizer")


@dataclass(frozen=True)
class _Pieces:
    """What defines a unigram tokenizer; the defaults are SentencePiece's own."""

    pieces: tuple[tuple[str, float], ...]
    unk_id: int = 0
    byte_fallback: bool = False
    charsmap: bytes = b""
    prefix_space: bool = True
    collapse_spaces: bool = True
    specials: tuple[str, ...] = field(default=(_PAD, _EOS, _BOS, _UNK))


def _build(spec: _Pieces) -> tokenizers.Tokenizer:
    """Returns the tokenizer that splits as SentencePiece would.

    Differs from it: a model that keeps spaces gets no extra one before a leading space.
    """
    backend = tokenizers.Tokenizer(
        models.Unigram(list(spec.pieces), spec.unk_id, spec.byte_fallback)
    )
    steps: list[normalizers.Normalizer] = []
    if spec.charsmap:
        steps.append(normalizers.Precompiled(spec.charsmap))
    if spec.collapse_spaces:
        steps.append(normalizers.Strip())
        steps.append(normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=_SPACE, prepend_scheme="always" if spec.prefix_space else "never"
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(
        [tokenizers.AddedToken(name, normalized=False, special=True) for name in spec.specials]
    )
    return backend


def _finish(backend: tokenizers.Tokenizer, source: str) -> Tokenizer:
    """Returns the tokenizer with its special ids, all other settings of the file switched off."""
    backend.no_truncation()
    backend.no_padding()
    pad_id, eos_id = backend.token_to_id(_PAD), backend.token_to_id(_EOS)
    if pad_id is None or eos_id is None:
        missing = _PAD if pad_id is None else _EOS
        raise WeightsError(
            f"tokenizer: {source} has no {missing} token; the tokenizer of google/umt5-xxl is "
            "needed",
            field="tokenizer",
        )
    return Tokenizer(backend=backend, pad_id=pad_id, eos_id=eos_id)


def _from_json(data: bytes, source: str) -> tokenizers.Tokenizer:
    try:
        content = json.loads(data)
    except ValueError as error:
        raise _damaged(source, f"broken JSON ({error})") from error
    if not isinstance(content.get("model"), dict):
        raise _damaged(source, "JSON without a `model`; is it tokenizer_config.json?")
    return tokenizers.Tokenizer.from_str(data.decode())


def _from_sentencepiece(data: bytes, source: str) -> tokenizers.Tokenizer:
    """Returns the tokenizer of a SentencePiece model.

    Source: google/sentencepiece: src/sentencepiece_model.proto (field numbers).
    """
    try:
        spec, model_type = _read_model(data)
    except (IndexError, ValueError, struct.error) as error:
        raise _damaged(source, f"neither JSON nor a SentencePiece model ({error})") from error
    if model_type != _UNIGRAM:
        raise _damaged(source, f"SentencePiece model type {model_type}; UMT5 is unigram (1)")
    return _build(spec)


def _damaged(source: str, reason: str) -> WeightsError:
    return WeightsError(
        f"tokenizer: {source} is not a usable tokenizer: {reason}. Download it again, or use the "
        "tokenizer.json of google/umt5-xxl",
        field="tokenizer",
    )


# Wire types and field numbers of the protobuf message ModelProto.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_UNIGRAM = 1
_CONTROL, _USER_DEFINED = 3, 4


def _read_model(data: bytes) -> tuple[_Pieces, int]:
    """Returns the vocabulary and settings of a model, and its type (1 unigram, 2 BPE)."""
    pieces: list[tuple[str, float]] = []
    specials: list[str] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _wire_fields(data):
        if number == 1 and isinstance(value, bytes):
            piece = dict(_wire_fields(value))
            name = _as_bytes(piece.get(1)).decode()
            pieces.append((name, struct.unpack("<f", _as_bytes(piece.get(2, bytes(4))))[0]))
            if piece.get(3) in (_CONTROL, _USER_DEFINED):
                specials.append(name)
        elif number == 2 and isinstance(value, bytes):
            trainer = dict(_wire_fields(value))
        elif number == 3 and isinstance(value, bytes):
            normalizer = dict(_wire_fields(value))
    if not pieces:
        raise ValueError("no pieces")
    spec = _Pieces(
        pieces=tuple(pieces),
        unk_id=int(trainer.get(40, 0)),
        byte_fallback=bool(trainer.get(35, 0)),
        charsmap=_as_bytes(normalizer.get(2, b"")),
        prefix_space=bool(normalizer.get(3, 1)),
        collapse_spaces=bool(normalizer.get(4, 1)),
        specials=tuple(specials),
    )
    return spec, int(trainer.get(3, _UNIGRAM))


def _as_bytes(value: int | bytes | None) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a field has the wrong type")
    return value


def _wire_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields (field number, value) of one protobuf message; fixed-width values stay bytes."""
    position = 0
    while position < len(data):
        tag, position = _read_varint(data, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == _VARINT:
            value, position = _read_varint(data, position)
            yield number, value
            continue
        if wire_type == _BYTES:
            length, position = _read_varint(data, position)
        elif wire_type in (_FIXED32, _FIXED64):
            length = 4 if wire_type == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire_type} at byte {position}")
        if position + length > len(data):
            raise ValueError(f"cut short at byte {position}")
        yield number, data[position : position + length]
        position += length


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """Returns the little-endian base-128 number at a position, and the position after it."""
    result = shift = 0
    while True:
        byte = data[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
        shift += 7
