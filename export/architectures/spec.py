"""What the graph builder must know of a decoder, whatever its family."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import RopeConfig

__all__ = ["DecoderSpec", "TensorNames"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorNames:
    """Names in the checkpoint, without ``.weight`` or ``.bias``; ``{i}`` stands for the layer."""

    embedding: str = "model.embed_tokens"
    input_norm: str = "model.layers.{i}.input_layernorm"
    query: str = "model.layers.{i}.self_attn.q_proj"
    key: str = "model.layers.{i}.self_attn.k_proj"
    value: str = "model.layers.{i}.self_attn.v_proj"
    attention_output: str = "model.layers.{i}.self_attn.o_proj"
    post_attention_norm: str = "model.layers.{i}.post_attention_layernorm"
    gate: str = "model.layers.{i}.mlp.gate_proj"
    up: str = "model.layers.{i}.mlp.up_proj"
    down: str = "model.layers.{i}.mlp.down_proj"
    final_norm: str = "model.norm"
    head: str = "lm_head"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """A dense pre-norm decoder: rotary attention and a gated MLP.

    Attributes:
        architecture: The checkpoint's ``model_type``.
        layers: Number of blocks.
        hidden: Width of the residual stream.
        intermediate: Width of the MLP.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Size of a head, before any padding.
        vocab: Rows of the embedding.
        context: Longest sequence that the model was made for, in tokens.
        norm_eps: Epsilon of the root-mean-square norms.
        rope: Rotary embedding.
        qkv_bias: Query, key and value projections have a bias.
        output_bias: The attention's output projection has a bias.
        mlp_bias: The MLP's three projections have a bias.
        tied: The head is the embedding.
        names: Where the checkpoint keeps each weight.
    """

    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    norm_eps: float
    rope: RopeConfig
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    names: TensorNames = TensorNames()

    @property
    def padded_head_dim(self) -> int:
        """Head size in the graph: GroupQueryAttention takes multiples of 16 only."""
        return -(-self.head_dim // 16) * 16

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the checkpoint must hold, with its shape."""
        names, queries, keys = self.names, self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {}

        def linear(name: str, rows: int, columns: int, bias: bool) -> None:
            shapes[f"{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{name}.bias"] = (rows,)

        linear(names.embedding, self.vocab, self.hidden, False)
        for i in range(self.layers):
            for norm in (names.input_norm, names.post_attention_norm):
                shapes[f"{norm.format(i=i)}.weight"] = (self.hidden,)
            linear(names.query.format(i=i), queries, self.hidden, self.qkv_bias)
            linear(names.key.format(i=i), keys, self.hidden, self.qkv_bias)
            linear(names.value.format(i=i), keys, self.hidden, self.qkv_bias)
            linear(names.attention_output.format(i=i), self.hidden, queries, self.output_bias)
            linear(names.gate.format(i=i), self.intermediate, self.hidden, self.mlp_bias)
            linear(names.up.format(i=i), self.intermediate, self.hidden, self.mlp_bias)
            linear(names.down.format(i=i), self.hidden, self.intermediate, self.mlp_bias)
        shapes[f"{names.final_norm}.weight"] = (self.hidden,)
        if not self.tied:
            linear(names.head, self.vocab, self.hidden, False)
        return shapes
