"""The UMT5 text encoder: sizes, module, and prompts to embeddings.

The module is transformers' UMT5EncoderModel; only the tying of its embedding differs. Embeddings
are not padded to 512 rows here: the transformer does that, and only real tokens are run.

Shape letters: B prompts, L tokens, C model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from xicon_infer.errors import BackendUnavailable, InvalidRequest, WeightsError
from xicon_infer.models.prompt import clean_prompt
from xicon_infer.models.tokenizer import MAX_TOKENS, Tokenizer


@dataclass(frozen=True)
class TextConfig:
    """Sizes of a UMT5 encoder.

    d_kv is the width of one head; num_heads * d_kv need not be d_model. num_buckets and
    max_distance (tokens) shape the relative position bias that every layer has of its own.
    """

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_buckets: int = 32
    max_distance: int = 128


UMT5_XXL = TextConfig(
    vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64
)
"""The text encoder of every Wan2.1 model (5.68 G parameters)."""


def config_from_shapes(
    shapes: Mapping[str, Sequence[int]], *, max_distance: int = 128
) -> TextConfig:
    """Returns the sizes that a checkpoint was made for.

    Args:
        shapes: tensor name -> shape, in transformers' naming (`weights.keymaps_encoders` gives it).
        max_distance: tokens; leaves no trace in the shapes, all published encoders use 128.

    Raises:
        WeightsError: a tensor that the sizes are read from is missing.
    """
    attention = "encoder.block.0.layer.0.SelfAttention"
    try:
        vocab_size, d_model = shapes["shared.weight"]
        inner = shapes[f"{attention}.q.weight"][0]
        num_buckets, num_heads = shapes[f"{attention}.relative_attention_bias.weight"]
        d_ff = shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0]
    except KeyError as error:
        raise WeightsError(
            f"text_encoder: the file has no tensor {error}, so it is no UMT5 encoder; use one of "
            "the umt5-xxl files",
            field="text_encoder",
        ) from error
    layers = {int(key.split(".")[2]) for key in shapes if key.startswith("encoder.block.")}
    return TextConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=inner // num_heads,
        d_ff=d_ff,
        num_layers=len(layers),
        num_heads=num_heads,
        num_buckets=num_buckets,
        max_distance=max_distance,
    )


def build_text_encoder(config: TextConfig) -> nn.Module:
    """Returns a UMT5 encoder with no weights loaded, in evaluation mode.

    Under `torch.device("meta")` it costs no memory; then load with `strict=True, assign=True`.

    Args:
        config: the sizes.

    Returns:
        A transformers UMT5EncoderModel.

    Source: huggingface/transformers: models/umt5/modeling_umt5.py. Differs from it: `shared` and
        `encoder.embed_tokens` are one module, so that loading with `assign` keeps them one tensor
        (2.1 GB of bfloat16 in UMT5-XXL).
    """
    from transformers import UMT5Config, UMT5EncoderModel

    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=config.vocab_size,
            d_model=config.d_model,
            d_kv=config.d_kv,
            d_ff=config.d_ff,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            relative_attention_num_buckets=config.num_buckets,
            relative_attention_max_distance=config.max_distance,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    encoder.shared = encoder.encoder.embed_tokens
    model: nn.Module = encoder
    return model.eval().requires_grad_(False)


@torch.no_grad()
def encode_ids(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Returns the embeddings of tokenized prompts, padding cut off.

    Args:
        model: from `build_text_encoder`, weights loaded.
        ids: int64 [B, L].
        mask: int64 [B, L], 1 for a token and 0 for padding at the end.

    Returns:
        B tensors [L_i, C] in the model's dtype, on its device; L_i counts the end mark.

    Raises:
        BackendUnavailable: the weights are float16.
        WeightsError: an id is beyond the vocabulary of the model.

    Source: Wan-Video/Wan2.1: wan/modules/t5.py, T5EncoderModel
    """
    table = model.get_parameter("shared.weight")
    if table.dtype == torch.float16:
        raise BackendUnavailable(
            "text encoder dtype: float16 is not allowed, its hidden states exceed 65504, the "
            "largest float16, and overflow; use bfloat16 or float32",
            field="dtype",
        )
    if int(ids.max()) >= table.shape[0]:
        raise WeightsError(
            f"tokenizer: gives id {int(ids.max())}, but the text encoder knows {table.shape[0]} "
            "ids; use the tokenizer that belongs to the encoder",
            field="tokenizer",
        )
    ids, mask = ids.to(table.device), mask.to(table.device)
    hidden_states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return [rows[: int(n)] for rows, n in zip(hidden_states, mask.sum(1), strict=True)]


def encode_prompts(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: list[str],
    *,
    device: torch.device | str,
    weights: list[float] | None = None,
    max_length: int = MAX_TOKENS,
) -> list[torch.Tensor]:
    """Returns the embedding of each prompt, run as one batch.

    Args:
        model: from `build_text_encoder`, weights loaded; it is moved nowhere.
        tokenizer: the encoder's own.
        prompts: B texts as the user wrote them; cleaned here.
        device: where the embeddings are wanted.
        weights: one factor per prompt for its whole embedding (`prompt.parse_prompt`); None is 1.
        max_length: tokens kept per prompt, end mark included.

    Returns:
        B tensors [L_i, C] in the model's dtype; L_i is the real length with the end mark.

    Raises:
        InvalidRequest: there is no prompt, or not one weight per prompt.
        BackendUnavailable: the weights of the model are float16.
        WeightsError: the tokenizer does not belong to the model.
    """
    if weights is not None and len(weights) != len(prompts):
        raise InvalidRequest(
            f"prompt weights: {len(weights)} given for {len(prompts)} prompts; give one per prompt",
            field="prompt",
        )
    ids, mask = tokenizer.tokenize([clean_prompt(p) for p in prompts], max_length=max_length)
    embeds = encode_ids(model, ids, mask)
    if weights is not None:
        embeds = [rows * weight for rows, weight in zip(embeds, weights, strict=True)]
    return [rows.to(device) for rows in embeds]
