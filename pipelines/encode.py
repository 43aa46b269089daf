"""Text, pictures and videos as the transformer wants them: every recipe encodes with these.

Each function brings its encoder to the device only if there is something to do,
and keeps the result by content (`pipelines.condition_cache`): the second character of one dance
does not encode the dance and the prompt again.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pipelines.components import Components
from pipelines.condition_cache import content_key
from pipelines.frames import encode_frames, piece_length
from xicon_infer.models.i2v_condition import I2VImages, build_condition
from xicon_infer.models.text import encode_prompts
from xicon_infer.models.vision import PreprocessMode, encode_image
from xicon_infer.ops.pixels import frames_to_model
from xicon_infer.types import Progress, UInt8Array


def encode_text(parts: Components[Any], prompts: list[str], progress: Progress) -> list[Tensor]:
    """Returns the states of each prompt, [L_i, C] on the device, L_i its real length.

    Args:
        parts: the networks.
        prompts: texts as the user wrote them.
        progress: told of the stage.
    """
    keys = [content_key("text", prompt) for prompt in prompts]
    with progress.stage("encode text"):
        states = [parts.cache.get(key) for key in keys]
        missing = [i for i, state in enumerate(states) if state is None]
        if missing:
            wanted = [prompts[i] for i in missing]
            with parts.on_device("text_encoder"):
                made = encode_prompts(
                    parts.text_encoder, parts.tokenizer, wanted, device=parts.device
                )
            for i, state in zip(missing, made, strict=True):
                states[i] = state
                parts.cache.put(keys[i], state)
        return [state.to(parts.device) for state in states if state is not None]


def encode_picture(
    parts: Components[Any], picture: UInt8Array, preprocess: PreprocessMode, progress: Progress
) -> Tensor:
    """Returns the CLIP states of a picture, [1, S, C] on the device.

    Args:
        parts: the networks; they have an image encoder.
        picture: uint8 [H, W, 3].
        preprocess: how it becomes square, see `xicon_infer.models.vision`.
        progress: told of the stage.
    """
    encoder = parts.image_encoder
    assert encoder is not None  # the recipes of text-only models do not ask

    def make() -> Tensor:
        with parts.on_device("image_encoder"):
            return encode_image(encoder, [picture], preprocess)

    with progress.stage("encode image"):
        key = content_key("image", picture, preprocess)
        return parts.cache.recall(key, make).to(parts.device)


def encode_video(parts: Components[Any], frames: UInt8Array, progress: Progress) -> Tensor:
    """Returns normalised latents float32 [1, 16, T, H / 8, W / 8] on the device.

    The stage is the caller's: most encode two things in one.

    Args:
        parts: the networks.
        frames: uint8 [F, H, W, 3]; F = 4n + 1.
        progress: told of finished frames.
    """

    def make() -> Tensor:
        with parts.on_device("vae"):
            return encode_frames(parts.vae, frames, progress, parts.vae_chunk)

    return parts.cache.recall(content_key("video", frames), make).to(parts.device)


def encode_start(
    parts: Components[Any],
    picture: UInt8Array,
    num_frames: int,
    *,
    last: UInt8Array | None = None,
) -> Tensor:
    """Returns the condition of a video that starts with a picture, [1, 20, T, H / 8, W / 8].

    The stage is the caller's. Four mask channels, then the latents of the picture followed by
    mid-grey. The grey is encoded only until its latents repeat themselves, which is exact.

    Args:
        parts: the networks.
        picture: uint8 [H, W, 3], at the size of the video.
        num_frames: F = 4n + 1.
        last: the picture that the video ends with, for models made for that.
    """
    vae = parts.vae

    def encode(video: Tensor) -> Tensor:
        weight = vae.conv2.weight
        chunks = iter((video.to(weight.device, weight.dtype),))
        piece = parts.vae_chunk or piece_length(*picture.shape[:2])
        return vae.normalize(vae.encode_chunks(chunks, chunk=piece)).float()

    def make() -> Tensor:
        start = frames_to_model(picture[None])[0]
        end = None if last is None else frames_to_model(last[None])[0]
        images = I2VImages(start, end)
        with parts.on_device("vae"):
            return build_condition(encode, images, num_frames, look_back=vae.config.look_back)[None]

    key = content_key("start", picture, last, num_frames)
    return parts.cache.recall(key, make).to(parts.device)
