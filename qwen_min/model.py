"""The Qwen2.5 decoder. Modules have the names of the checkpoint, so that loading needs no key map.

Shapes: B batch, T new tokens, S cached + new tokens, C hidden size, F feed-forward size,
H query heads, K key/value heads, D head size, V vocabulary.

Where numbers are cast to fp32 and back follows `modeling_qwen2.py` of transformers.
"""

import torch
from torch import Tensor, nn

from qwen_min.attention import attention, grouped_bias, pairs_mask, runs_in_blocks
from qwen_min.autograd import rms_norm, swiglu
from qwen_min.cache import KVCache
from qwen_min.config import QwenConfig
from qwen_min.linear import Linear, linear, unpack_trained

INITIAL_STD = 0.02  # of embedding and head, as `initializer_range` of the checkpoints; larger logits start a loss high


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, of the given size."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., C); the shape is kept."""
        return rms_norm(x, self.weight, self.eps)


def rotary_tables(positions: Tensor, config: QwenConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles of `positions` (B or 1, T), each (B or 1, 1, T, D).

    They are computed in fp32 and cast at the end: bf16 cannot distinguish position 257 from 256.
    RoFormer (arXiv 2104.09864), section 3.2.2, in the half-split layout of the checkpoints.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    inv_freq = (config.rope_theta**exponents).reciprocal()  # (D/2)
    angles = positions[:, None, :, None].float() * inv_freq  # (B, 1, T, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((sin, sin), dim=-1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) of x (B, heads, T, D) by its angle; cos and sin from `rotary_tables`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attention_mask_and_positions(
    num_cached: int, num_new: int, real: Tensor | None, device: torch.device
) -> tuple[Tensor | None, Tensor]:
    """The mask for `attention` and the position of each new token, (B or 1, T).

    real (B, S) is 0 on padding; None means no padding. The returned mask has a row for each query, unless attention
    runs in blocks and needs none: a long text would need much memory for it.
    """
    total = num_cached + num_new
    if real is None:
        positions = torch.arange(num_cached, total, device=device)[None]  # (1, T)
        if num_cached == 0 or num_new == 1:
            return None, positions
    else:
        real = real.bool()[:, None, None]  # (B, 1, 1, S)
        # the first real token of a left-padded row has position 0
        positions = (real[:, 0, 0].cumsum(-1) - 1).clamp(min=0)[:, num_cached:]  # (B, T)
    by_query = device.type == "cuda" or not runs_in_blocks(num_new, masked=True)
    return pairs_mask(num_new, total, device, real) if by_query else real, positions


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; a bias on q, k and v only."""

    def __init__(self, config: QwenConfig, layer: int):
        super().__init__()
        hidden, size = config.hidden_size, config.head_dim
        self.layer = layer
        self.head_dim = size
        self.q_proj = Linear(hidden, config.num_attention_heads * size, bias=True)
        self.k_proj = Linear(hidden, config.num_key_value_heads * size, bias=True)
        self.v_proj = Linear(hidden, config.num_key_value_heads * size, bias=True)
        self.o_proj = Linear(config.num_attention_heads * size, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        """Attention output, (B, T, C), for x (B, T, C); arguments as in `Block.forward`."""

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        q = rotate(heads(self.q_proj(x)), cos, sin)  # (B, H, T, D)
        k = rotate(heads(self.k_proj(x)), cos, sin)  # (B, K, T, D)
        v = heads(self.v_proj(x))  # (B, K, T, D)
        if cache is None:
            out = attention(q, k, v, mask)  # (B, H, T, D)
        else:
            k, v = cache.write(self.layer, k, v)  # (B, K, S, D), with the tokens before
            out = cache.attend(self.layer, q, k, v, mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, T, C)


class MLP(nn.Module):
    """SwiGLU feed-forward (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: QwenConfig):
        super().__init__()
        hidden, width = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(hidden, width, bias=False)
        self.up_proj = Linear(hidden, width, bias=False)
        self.down_proj = Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Feed-forward output, (B, T, C), for x (B, T, C); each token is processed independently.

        Without gradients `swiglu` writes over the gate: a hook that keeps gate_proj's output should clone it.
        """
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """One layer: attention, then feed-forward. Each reads the normalised residual stream and adds its output to it."""

    def __init__(self, config: QwenConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        """The residual stream (B, T, C) after this layer, for x (B, T, C); cos and sin from `rotary_tables`.

        mask as in `attention`; None: every token sees itself and all earlier tokens. cache None: there are no tokens
        before x, and nothing is stored.
        """
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def initial_matrix(config: QwenConfig) -> Tensor:
    """A new embedding or head (V, C): small normal numbers, as the checkpoints began with."""
    matrix = torch.empty(config.vocab_size, config.hidden_size)
    # on the meta device, drawing numbers would import a compiler
    return matrix if matrix.is_meta else matrix.normal_(std=INITIAL_STD)


class Decoder(nn.Module):
    """Token ids to hidden states: the part of the checkpoint whose names begin with `model.`"""

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding.from_pretrained(initial_matrix(config), freeze=False)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids: Tensor, cache: KVCache | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, C) of ids (B, T); arguments and errors as in `Qwen.forward`."""
        num_cached, num_new, real = 0, ids.shape[1], attention_mask
        self.check_length(num_new + (0 if cache is None else cache.num_tokens))
        if attention_mask is not None and attention_mask.shape != ids.shape:
            shapes = f"{tuple(attention_mask.shape)}, expected {tuple(ids.shape)}"
            raise ValueError(f"attention_mask is {shapes}: one column for each new token")
        if cache is not None:
            num_cached, real = cache.length, cache.reserve(len(ids), num_new, attention_mask)
        mask, positions = attention_mask_and_positions(num_cached, num_new, real, ids.device)
        hidden = self.hidden_states(ids, positions, mask, cache)
        if cache is not None:
            cache.advance(num_new, attention_mask is not None)
        return hidden

    def check_length(self, total: int) -> None:
        """Raise ValueError when the model has fewer than `total` positions."""
        if total > self.config.max_position_embeddings:
            positions = self.config.max_position_embeddings
            raise ValueError(f"{total} tokens exceed the model's {positions} positions; shorten the text")

    def hidden_states(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        """Embedding, layers and norm: hidden states (B, T, C) of ids (B, T) at positions (B or 1, T).

        mask and cache as in `Block.forward`.
        """
        unpack_trained(self.embed_tokens.weight)  # a tied head may have packed it
        x = self.embed_tokens(ids)  # (B, T, C)
        cos, sin = rotary_tables(positions, self.config, x.dtype)
        if mask is not None and x.is_cuda:
            mask = grouped_bias(mask, self.config.num_attention_heads // self.config.num_key_value_heads, x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, mask, cache)
        return self.norm(x)


class Qwen(nn.Module):
    """The language model: decoder and head. The head is the embedding matrix where the config ties them."""

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            # an Embedding is no Linear, so it takes no adapter: losses and grammars multiply by some rows of the matrix
            # directly, and would ignore the adapter
            self.lm_head = nn.Embedding.from_pretrained(initial_matrix(config), freeze=False)

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix (V, C)."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, ids: Tensor, cache: KVCache | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of ids (B, T).

        With a cache, ids continue the tokens in the cache, and its length grows by T. attention_mask (B, T) is 1 on
        real tokens and 0 on padding, left of a prompt; None means no padding. The cache remembers it for later passes.
        Raises ValueError when the tokens exceed the model's positions or the cache's capacity, or when the cache or the
        mask has the wrong shape.
        """
        return linear(self.model(ids, cache, attention_mask), self.head_weight)
