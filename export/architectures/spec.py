"""What the graph builder must know of a decoder, whatever its family."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from .rope import RopeConfig

__all__ = ["Activation", "AttentionSpec", "DecoderSpec", "NormSpec", "QKNormSpec", "TensorNames"]

Activation = Literal["silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorNames:
    """Names in the checkpoint, without ``.weight`` or ``.bias``.

    ``{i}`` stands for the layer. A norm stands where it has a name: None means that the family has
    none there.

    Attributes:
        embedding: A row per token.
        positions: A row per position, added to the embedding.
        attention_norm: Of what attention reads.
        qkv: Query, key and value, or one matrix that holds all three.
        query_norm: Of queries before they are turned; ``{h}`` stands for the head, where each has
            its own.
        key_norm: Of keys, likewise.
        attention_output: From the heads back to the stream.
        attention_post_norm: Of attention's result, before it is added.
        mlp_norm: Of what the MLP reads; None in a parallel block: what attention reads.
        gate_up: Gate and up, or one matrix that holds both; in an MLP without a gate, up alone.
        down: From the MLP's width back to the stream.
        mlp_post_norm: Of the MLP's result, before it is added.
        final_norm: Of what the head reads.
        head: A row per token.
    """

    embedding: str = "model.embed_tokens"
    positions: str | None = None
    attention_norm: str | None = "model.layers.{i}.input_layernorm"
    qkv: tuple[str, ...] = (
        "model.layers.{i}.self_attn.q_proj",
        "model.layers.{i}.self_attn.k_proj",
        "model.layers.{i}.self_attn.v_proj",
    )
    query_norm: str = "model.layers.{i}.self_attn.q_norm"
    key_norm: str = "model.layers.{i}.self_attn.k_norm"
    attention_output: str = "model.layers.{i}.self_attn.o_proj"
    attention_post_norm: str | None = None
    mlp_norm: str | None = "model.layers.{i}.post_attention_layernorm"
    gate_up: tuple[str, ...] = ("model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj")
    down: str = "model.layers.{i}.mlp.down_proj"
    mlp_post_norm: str | None = None
    final_norm: str = "model.norm"
    head: str = "lm_head"

    def without(self, prefix: str) -> TensorNames:
        """The names as a checkpoint has them that was saved without the class of its head."""

        def strip(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(one.removeprefix(prefix) for one in value)
            return value and value.removeprefix(prefix)

        return TensorNames(**{one.name: strip(getattr(self, one.name)) for one in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class NormSpec:
    """How a norm computes.

    Attributes:
        kind: "rms" (arXiv 1910.07467) or "layer" (arXiv 1607.06450).
        eps: Added to the mean square, or to the variance.
        bias: "layer" only: a bias is added.
        gain_offset: Added to the stored gain: 1 in Gemma, which stores the gain minus 1.
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: float
    bias: bool = False
    gain_offset: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class QKNormSpec:
    """A norm of queries and keys, before they are turned.

    Attributes:
        norm: How it computes.
        over: What is normalized: each "head" by itself, all with one gain; "each_head" by itself,
            with a gain of its own; or the whole "projection".
    """

    norm: NormSpec
    over: Literal["head", "each_head", "projection"] = "head"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Attention of one layer.

    Attributes:
        rope: How queries and keys turn with their position; None: they do not.
        scale: What the products of queries and keys are multiplied by; None: one over the root of
            the head's size.
        window: Tokens that a token attends to, itself included; None: all before it.
        softcap: ``softcap * tanh(score / softcap)`` bounds the scores; 0: nothing does.
    """

    rope: RopeConfig | None
    scale: float | None = None
    window: int | None = None
    softcap: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """A dense decoder.

    Attributes:
        architecture: The checkpoint's ``model_type``.
        hidden: Width of the residual stream.
        intermediate: Width of the MLP.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Size of a head, before any padding.
        vocab: Rows of the embedding.
        context: Longest sequence that the model was made for, in tokens.
        attention: One entry a layer.
        norm: All norms but those of queries and keys.
        qk_norm: Norm of queries and keys.
        activation: Of the MLP; "gelu_tanh" is the approximation by tanh.
        gated: The MLP is ``down(activation(gate(x)) * up(x))``, else ``down(activation(up(x)))``.
        parallel: Attention and MLP read the same stream, and both results are added to it.
        qkv_by_head: The one matrix of queries, keys and values holds them head by head.
        qkv_bias: Query, key and value projections have a bias.
        output_bias: The attention's output projection has a bias.
        mlp_bias: The MLP's projections have a bias.
        transposed: The projections are stored as [columns, rows].
        tied: The head is the embedding.
        embedding_scale: What the embedding's rows are multiplied by.
        logits_scale: What the head's scores are multiplied by.
        logits_softcap: ``softcap * tanh(score / softcap)`` bounds them; 0: nothing does.
        names: Where the checkpoint keeps each weight.
    """

    architecture: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    attention: tuple[AttentionSpec, ...]
    norm: NormSpec
    qk_norm: QKNormSpec | None = None
    activation: Activation = "silu"
    gated: bool = True
    parallel: bool = False
    qkv_by_head: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    transposed: bool = False
    tied: bool = False
    embedding_scale: float = 1.0
    logits_scale: float = 1.0
    logits_softcap: float = 0.0
    names: TensorNames = TensorNames()

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return len(self.attention)

    @property
    def default_context(self) -> int:
        """Longest sequence for which every part is what it is for a short one, in tokens.

        A bundle has one set of longrope's factors. The long ones change shorter texts too, so they
        are for those who ask for a longer context.
        """
        ropes = [one.rope for one in self.attention if one.rope is not None]
        trained = [rope.original_context for rope in ropes if rope.kind == "longrope"]
        return min([self.context, *trained])

    @property
    def padded_head_dim(self) -> int:
        """Head size in the graph: GroupQueryAttention takes multiples of 16 only."""
        return -(-self.head_dim // 16) * 16

    @property
    def qkv_rows(self) -> tuple[int, ...]:
        """Rows of each of ``names.qkv``."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (queries, keys, keys) if len(self.names.qkv) == 3 else (queries + 2 * keys,)

    @property
    def gate_up_rows(self) -> tuple[int, ...]:
        """Rows of each of ``names.gate_up``."""
        parts = len(self.names.gate_up)
        return ((2 if self.gated else 1) * self.intermediate // parts,) * parts

    def within(self, context: int) -> DecoderSpec:
        """The same for sequences of at most ``context`` tokens: wider windows are none."""
        layers = (
            replace(one, window=None) if one.window is not None and one.window >= context else one
            for one in self.attention
        )
        return replace(self, attention=tuple(layers))

    def as_stored(self, tensors: Collection[str]) -> DecoderSpec:
        """The same with the names of a checkpoint that may lack the prefix of its base model.

        Such checkpoints, gpt2 for one, were saved by the class without a head.

        Args:
            tensors: The names of all its tensors.
        """
        prefix, _, bare = self.names.embedding.partition(".")
        if f"{self.names.embedding}.weight" in tensors or f"{bare}.weight" not in tensors:
            return self
        return replace(self, names=self.names.without(f"{prefix}."))

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the checkpoint must hold, with its shape."""
        names, queries = self.names, self.heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            f"{names.embedding}.weight": (self.vocab, self.hidden)
        }
        if names.positions:
            shapes[f"{names.positions}.weight"] = (self.context, self.hidden)
        for i in range(self.layers):
            for norm in (
                names.attention_norm,
                names.attention_post_norm,
                names.mlp_norm,
                names.mlp_post_norm,
            ):
                shapes |= self._norm_shapes(norm and norm.format(i=i), self.norm, self.hidden)
            shapes |= self._qk_norm_shapes(i)
            for parts, rows, columns, bias in (
                (names.qkv, self.qkv_rows, self.hidden, self.qkv_bias),
                ((names.attention_output,), (self.hidden,), queries, self.output_bias),
                (names.gate_up, self.gate_up_rows, self.hidden, self.mlp_bias),
                ((names.down,), (self.hidden,), self.intermediate, self.mlp_bias),
            ):
                for part, size in zip(parts, rows, strict=True):
                    name = part.format(i=i)
                    stored = (columns, size) if self.transposed else (size, columns)
                    shapes[f"{name}.weight"] = stored
                    if bias:
                        shapes[f"{name}.bias"] = (size,)
        shapes |= self._norm_shapes(names.final_norm, self.norm, self.hidden)
        if not self.tied:
            shapes[f"{names.head}.weight"] = (self.vocab, self.hidden)
        return shapes

    def _norm_shapes(
        self, name: str | None, norm: NormSpec, size: int
    ) -> dict[str, tuple[int, ...]]:
        kinds = ["weight", "bias"] if norm.bias else ["weight"]
        return {f"{name}.{kind}": (size,) for kind in kinds} if name else {}

    def _qk_norm_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        if self.qk_norm is None:
            return shapes
        for name, heads in (
            (self.names.query_norm, self.heads),
            (self.names.key_norm, self.kv_heads),
        ):
            size = self.head_dim * (heads if self.qk_norm.over == "projection" else 1)
            for h in range(heads if self.qk_norm.over == "each_head" else 1):
                shapes |= self._norm_shapes(name.format(i=layer, h=h), self.qk_norm.norm, size)
        return shapes
