"""The closed forms against the published tables of the work counts, digit by digit.

Source of the numbers: the project's performance spec, sections 1.1 to 1.4 and 3.7; parameter
counts from the key lists of the real checkpoints.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from xicon_infer import formulas, formulas_vae
from xicon_infer.formulas import H100, SCAIL_14B, WAN_I2V_14B, WAN_T2V_1_3B, WAN_T2V_14B
from xicon_infer.formulas_vae import VaeShape, decode_work, encode_work
from xicon_infer.types import latent_frames

# size F T hw L (L without pose) linear attention cross total GB, then H100 seconds of a forward:
# bf16, fp8 linears, fp8 linears and 8-bit attention.
SCAIL_TABLE = """\
416x672 17 5 1092 7917 6552 189 51 5.0 246 76 0.35 0.28 0.25
416x672 33 9 1092 13377 10920 320 147 8.4 475 129 0.69 0.56 0.50
416x672 49 13 1092 18837 15288 450 291 11.9 753 181 1.10 0.92 0.79
416x672 81 21 1092 29757 24024 711 725 18.7 1456 286 2.15 1.87 1.55
512x896 17 5 1792 12992 10752 311 138 8.2 457 125 0.66 0.54 0.48
512x896 33 9 1792 21952 17920 525 395 13.8 933 211 1.37 1.16 0.99
512x896 49 13 1792 30912 25088 739 783 19.5 1541 298 2.28 1.98 1.64
512x896 81 21 1792 48832 39424 1167 1953 30.8 3152 470 4.70 4.24 3.39
480x832 17 5 1560 11310 9360 270 105 7.1 382 109 0.55 0.45 0.40
480x832 33 9 1560 19110 15600 457 299 12.0 768 184 1.12 0.94 0.81
480x832 49 13 1560 26910 21840 643 593 17.0 1254 259 1.85 1.59 1.33
480x832 81 21 1560 42510 34320 1016 1480 26.8 2523 409 3.75 3.35 2.70
704x1280 17 5 3520 25520 21120 610 534 16.1 1160 246 1.71 1.46 1.23
704x1280 33 9 3520 43120 35200 1031 1523 27.2 2581 415 3.84 3.43 2.77
704x1280 49 13 3520 60720 49280 1452 3020 38.3 4510 584 6.75 6.18 4.87
704x1280 81 21 3520 95920 77440 2293 7537 60.4 9891 923 14.92 14.01 10.77
"""

STEADY_DANCER_TABLE = """\
416x672 17 5 1092 7644 183 48 4.8 235 74 0.34 0.27 0.24
416x672 33 9 1092 12012 287 118 7.6 413 116 0.60 0.48 0.43
416x672 49 13 1092 16380 392 220 10.3 622 158 0.91 0.75 0.65
416x672 81 21 1092 25116 600 517 15.8 1133 242 1.67 1.43 1.20
512x896 17 5 1792 12544 300 129 7.9 437 121 0.63 0.51 0.46
512x896 33 9 1792 19712 471 318 12.4 802 190 1.17 0.99 0.85
512x896 49 13 1792 26880 643 592 16.9 1251 259 1.84 1.59 1.33
512x896 81 21 1792 41216 985 1392 26.0 2403 397 3.57 3.18 2.57
480x832 17 5 1560 10920 261 98 6.9 366 105 0.53 0.43 0.38
480x832 33 9 1560 17160 410 241 10.8 662 165 0.97 0.80 0.70
480x832 49 13 1560 23400 559 449 14.7 1023 225 1.50 1.28 1.08
480x832 81 21 1560 35880 858 1055 22.6 1935 345 2.87 2.53 2.07
704x1280 17 5 3520 24640 589 497 15.5 1102 237 1.62 1.39 1.17
704x1280 33 9 3520 38720 926 1228 24.4 2178 373 3.23 2.87 2.33
704x1280 49 13 3520 52800 1262 2284 33.3 3579 508 5.34 4.84 3.85
704x1280 81 21 3520 80960 1936 5369 51.0 7356 779 11.07 10.30 7.98
"""

# size F decode-TF decode-GB calls encode-TF encode-GB
VAE_TABLE = """\
416x672 17 40.9 91 634 24.4 57
416x672 33 78.8 177 1142 46.9 110
416x672 49 116.7 262 1650 69.4 163
416x672 81 192.5 434 2666 114.4 270
512x896 17 67.3 149 634 40.2 92
512x896 33 129.6 289 1142 77.2 180
512x896 49 191.9 429 1650 114.2 267
512x896 81 316.5 710 2666 188.3 441
480x832 17 58.6 129 634 34.9 81
480x832 33 112.8 252 1142 67.1 156
480x832 49 167.0 374 1650 99.3 232
480x832 81 275.4 619 2666 163.7 384
704x1280 17 133.0 291 634 79.7 181
704x1280 33 255.9 566 1142 153.0 352
704x1280 49 378.9 842 1650 226.3 523
704x1280 81 624.9 1392 2666 373.0 864
"""


def _rows(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines()]


def _size(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(width), int(height)


def _printed(tokens: int) -> list[str]:
    """Returns the columns from linear TF to the last H100 seconds, rounded as in the table."""
    shape = SCAIL_14B
    work = [
        f"{formulas.linear_flops(shape, tokens) / 1e12:.0f}",
        f"{formulas.self_attention_flops(shape, tokens) / 1e12:.0f}",
        f"{formulas.cross_attention_flops(shape, tokens) / 1e12:.1f}",
        f"{formulas.forward_flops(shape, tokens) / 1e12:.0f}",
        f"{formulas.elementwise_bytes(shape, tokens) / 1e9:.0f}",
    ]
    modes = ({}, {"fp8": True}, {"fp8": True, "attention_8bit": True})
    return work + [f"{formulas.floor_seconds(shape, tokens, H100, **m):.2f}" for m in modes]


@pytest.mark.parametrize("row", _rows(SCAIL_TABLE), ids=" ".join)
def test_scail_rows_as_printed(row: list[str]) -> None:
    frames, hw = latent_frames(int(row[1])), formulas.frame_tokens(*_size(row[0]))
    assert [frames, hw] == [int(row[2]), int(row[3])]
    tokens = formulas.scail_tokens(frames, hw)
    assert tokens == int(row[4])
    assert formulas.scail_tokens(frames, hw, pose=False) == int(row[5])
    assert _printed(tokens) == row[6:]


@pytest.mark.parametrize("row", _rows(STEADY_DANCER_TABLE), ids=" ".join)
def test_steady_dancer_rows_as_printed(row: list[str]) -> None:
    tokens = formulas.steady_dancer_tokens(
        latent_frames(int(row[1])), formulas.frame_tokens(*_size(row[0]))
    )
    assert tokens == int(row[4])
    assert _printed(tokens) == row[5:]


@pytest.mark.parametrize(
    ("size", "tokens", "linear", "attention", "seconds"),
    [
        ("480x832", 32760, "783", "879", ["2.49", "2.18", "1.79"]),
        ("704x1280", 73920, "1767", "4476", ["9.45", "8.75", "6.82"]),
    ],
)
def test_plain_wan_rows_as_printed(
    size: str, tokens: int, linear: str, attention: str, seconds: list[str]
) -> None:
    assert formulas.wan_tokens(21, formulas.frame_tokens(*_size(size))) == tokens
    printed = _printed(tokens)
    assert [printed[0], printed[1], *printed[5:]] == [linear, attention, *seconds]


@pytest.mark.parametrize("row", _rows(VAE_TABLE), ids=" ".join)
def test_vae_rows_as_printed(row: list[str]) -> None:
    width, height = _size(row[0])
    frames = int(row[1])
    decode, _ = decode_work(width, height, frames)
    encode, _ = encode_work(width, height, frames)
    assert f"{formulas_vae.decode_flops(width, height, frames) / 1e12:.1f}" == row[2]
    assert f"{2 * (decode.moved + decode.weights) / 1e9:.0f}" == row[3]
    assert decode.calls == int(row[4])
    assert f"{formulas_vae.encode_flops(width, height, frames) / 1e12:.1f}" == row[5]
    assert f"{2 * (encode.moved + encode.weights) / 1e9:.0f}" == row[6]


def test_vae_counts_equal_the_flop_counter_of_torch() -> None:
    # torch.utils.flop_counter over diffusers' AutoencoderKLWan on meta tensors, 416x672x17.
    assert formulas_vae.decode_flops(416, 672, 17) == 40_923_740_282_880
    assert formulas_vae.encode_flops(416, 672, 17) == 24_384_404_029_440
    assert 2 * decode_work(416, 672, 17)[0].moved == 90_049_569_792
    assert 2 * encode_work(416, 672, 17)[0].moved == 55_980_674_688
    assert formulas_vae.parameters() == 126_892_531


@pytest.mark.parametrize(
    ("shape", "parameters", "outer"),
    [
        (SCAIL_14B, 16_394_965_824, 241_427_264),
        (WAN_I2V_14B, 16_394_878_784, 241_340_224),
        (WAN_T2V_14B, 14_288_491_584, 232_719_424),
        (WAN_T2V_1_3B, 1_418_996_800, 25_775_680),
    ],
)
def test_parameters_of_the_published_models(
    shape: formulas.DitShape, parameters: int, outer: int
) -> None:
    assert formulas.parameters(shape) == parameters
    assert formulas.outer_parameters(shape) == outer


def test_constants_of_section_1_1() -> None:
    assert formulas.block_parameters(WAN_I2V_14B) == 403_838_464
    assert formulas.linear_flops(SCAIL_14B, 1) == 2 * 40 * 298_844_160
    assert formulas.self_attention_flops(SCAIL_14B, 1) == 819_200
    assert formulas.cross_kv_flops(SCAIL_14B) == 2 * 769 * 2 * 5120**2 * 40
    assert formulas.cross_kv_parameters(SCAIL_14B) == 4_194_304_000
    assert f"{formulas.cross_kv_bytes(SCAIL_14B) / 1e9:.2f}" == "0.63"
    # Attention and linears cost the same at L = 29,184.
    crossover = 29_184
    linear = formulas.linear_flops(SCAIL_14B, crossover)
    assert formulas.self_attention_flops(SCAIL_14B, crossover) == pytest.approx(linear, rel=1e-4)


def test_memory_plan_of_section_3_7() -> None:
    without_kv = formulas.weight_bytes(SCAIL_14B, 1, keep_cross_kv=False)
    matrices = formulas.matrix_parameters(SCAIL_14B) - formulas.cross_kv_parameters(SCAIL_14B)
    assert f"{matrices / 1e9:.2f}" == "11.95"
    assert f"{formulas.activation_bytes(SCAIL_14B, 29_757) / 1e9:.1f}" == "2.3"
    total = without_kv + formulas.sampling_bytes(SCAIL_14B, 29_757)
    assert 15e9 < total < 16e9  # "about 16 GB"
    assert f"{formulas.lora_bytes(SCAIL_14B, 64) / 1e9:.2f}" == "0.72"


def test_encoders() -> None:
    assert f"{formulas.umt5_flops(512) / 1e12:.2f}" == "4.84"
    assert f"{formulas.umt5_flops(64) / 1e12:.1f}" == "0.6"
    assert formulas.clip_flops(layers=32) / 1e12 == pytest.approx(0.335, rel=5e-3)
    assert formulas.clip_flops(2) == 2 * formulas.clip_flops()
    assert formulas.clip_flops(layers=30) < formulas.clip_flops()
    assert f"{2 * formulas.UMT5_PARAMETERS / 1e9:.2f}" == "11.36"
    assert f"{2 * formulas.CLIP_PARAMETERS / 1e9:.2f}" == "1.26"


def test_forward_is_the_sum_at_any_size() -> None:
    small = formulas.DitShape(64, 160, 3, 4, 20, image_tokens=5, text_tokens=7)
    # Written out by hand: 3 layers, 10 tokens, d = 64, ffn = 160, 12 context tokens.
    linear = 2 * 3 * (6 * 64 * 64 + 2 * 64 * 160) * 10
    assert formulas.linear_flops(small, 10) == linear
    attention = 4 * 3 * 64 * 10 * 10
    cross = 4 * 3 * 64 * 12 * 10
    assert formulas.forward_flops(small, 10) == linear + attention + cross


@pytest.mark.parametrize(
    "change",
    [
        {"dim": 5248},
        {"ffn_dim": 13952},
        {"layers": 41},
        {"in_channels": 36},
        {"image_tokens": 0},
        {"pose_channels": 0},
        {"text_dim": 512},
        {"image_dim": 640},
        {"time_dim": 128},
    ],
)
def test_every_size_counts_in_the_parameters(change: dict[str, int]) -> None:
    changed = replace(SCAIL_14B, **change)
    assert formulas.parameters(changed) != formulas.parameters(SCAIL_14B)


def test_every_argument_of_the_memory_counts() -> None:
    base = formulas.sampling_bytes(SCAIL_14B, 1000)
    assert formulas.sampling_bytes(SCAIL_14B, 1001) > base
    assert formulas.sampling_bytes(SCAIL_14B, 1000, element_bytes=4) == 2 * base
    assert formulas.sampling_bytes(SCAIL_14B, 1000, branches=2) > base
    assert formulas.sampling_bytes(SCAIL_14B, 1000, batch=2) > base
    weights = formulas.weight_bytes(SCAIL_14B, 1)
    assert formulas.weight_bytes(SCAIL_14B, 2) > weights
    assert formulas.weight_bytes(SCAIL_14B, 1, 4) > weights
    assert formulas.lora_bytes(SCAIL_14B, 32) * 2 == formulas.lora_bytes(SCAIL_14B, 64)


def test_tokens_of_absent_parts() -> None:
    assert formulas.scail_tokens(21, 1092, reference=False) == 21 * 1092 + 21 * 1092 // 4
    assert formulas.scail_tokens(21, 1092, pose=False, reference=False) == 21 * 1092


def test_a_gpu_without_8_bit_is_refused() -> None:
    a100 = formulas.Ceiling(260e12, None, 204e12, None, 1.6e12)
    assert formulas.floor_seconds(SCAIL_14B, 29_757, a100) == pytest.approx(6.56, abs=0.05)
    with pytest.raises(ValueError, match="8-bit"):
        formulas.floor_seconds(SCAIL_14B, 29_757, a100, fp8=True)


def test_vae_memory_grows_with_size_frames_and_precision() -> None:
    base = formulas_vae.decode_bytes(416, 672, 81)
    assert 2e9 < base < 3e9  # "2-3 GB work"
    assert formulas_vae.decode_bytes(416, 704, 81) > base
    assert formulas_vae.decode_bytes(416, 672, 85) > base
    assert formulas_vae.decode_bytes(416, 672, 81, element_bytes=4) == 2 * base
    assert formulas_vae.decode_bytes(416, 672, 81, VaeShape(base=8)) < base
    assert formulas_vae.encode_bytes(416, 672, 81) < base
    assert formulas_vae.encode_bytes(416, 672, 1) < formulas_vae.encode_bytes(416, 672, 81)


@pytest.mark.parametrize("change", [{"base": 48}, {"z": 8}, {"mult": (1, 2, 2, 4)}, {"blocks": 1}])
def test_every_width_of_the_vae_counts(change: dict[str, object]) -> None:
    changed = VaeShape(**change)  # type: ignore[arg-type]
    assert formulas_vae.parameters(changed) < formulas_vae.parameters()
    assert formulas_vae.decode_flops(128, 128, 17, changed) < formulas_vae.decode_flops(
        128, 128, 17
    )
    assert formulas_vae.encode_flops(128, 128, 17, changed) < formulas_vae.encode_flops(
        128, 128, 17
    )


def test_tiles_cover_a_side_and_stop_at_its_end() -> None:
    # 34 x 34 latent tiles at stride 18 and 16, as the original graph decodes 416 x 672.
    assert formulas_vae.tile_spans(84, 34, 18) == [(0, 34), (18, 52), (36, 70), (54, 84)]
    assert formulas_vae.tile_spans(52, 34, 16) == [(0, 34), (16, 50), (32, 52)]
    assert formulas_vae.tile_spans(34, 34, 16) == [(0, 34)]
    assert formulas_vae.tile_spans(20, 34, 16) == [(0, 20)]
