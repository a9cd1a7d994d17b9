"""One small file per model family.

How to add one, by the example of OLMo 2:

1. **Compare.** Read ``modeling_olmo2.py`` of transformers with ``spec.py`` beside it. The graph
   builder knows no family; it builds what a ``DecoderSpec`` says. Ask of the family:

   - Where do norms stand: before attention and MLP, behind them, both? A norm stands where
     ``TensorNames`` has a name for it. (OLMo 2: behind. The defaults are Llama's: before.)
   - Which norm, with a bias, with an offset of its gain? ``NormSpec``. (RMS, neither.)
   - Are queries and keys normalized: by head, by projection? ``QKNormSpec``. (By projection.)
   - What does each layer attend to and turn by: a window, a rotary embedding or none, a scale, a
     softcap? One ``AttentionSpec`` a layer. (All alike, and as in Llama.)
   - The MLP: which activation, with a gate? Do attention and MLP run in parallel?
   - Which projections have biases? Is one matrix stored where the builder wants several?
   - Is anything multiplied: the embedding, residuals, logits? A multiplier that can be folded into
     a weight, a norm or its epsilon costs no node; see ``granite.py``.

   If a question has no answer in the spec, give the spec a field, with a default that leaves every
   other family as it is, and ``graph/blocks.py`` what it means.

2. **Read config.json.** ``olmo2.py`` is this function, with a docstring:

        def read_olmo2(config: ConfigReader) -> DecoderSpec:
            sizes = read_sizes(config, context=2048)
            norm = NormSpec(eps=config.get("rms_norm_eps", float, 1e-5, at_least=0))
            attention = AttentionSpec(rope=read_rope(config))
            bias = config.get("attention_bias", bool, False)
            return DecoderSpec(
                architecture="olmo2",
                **sizes,
                attention=(attention,) * read_layers(config),
                norm=norm,
                qk_norm=QKNormSpec(norm=norm, over="projection"),
                activation=read_activation(config, "hidden_act", "silu"),
                qkv_bias=bias,
                output_bias=bias,
                tied=config.get("tie_word_embeddings", bool, False),
                names=TensorNames(
                    attention_norm=None,
                    attention_post_norm="model.layers.{i}.post_attention_layernorm",
                    mlp_norm=None,
                    mlp_post_norm="model.layers.{i}.post_feedforward_layernorm",
                ),
            )

   Its defaults are those of transformers' ``Olmo2Config``. ``ConfigReader`` keeps count of the
   keys: one that no line reads, and that is not known to change nothing in any family, is refused
   by its name. So read each key and use it, let ``honour`` refuse the values that you do not
   support, and ``skip`` what this family's modeling file never reads. Where null means something
   else than an absent key, ``optional`` tells them apart.

3. **Register.** A row in ``registry.py``: ``"olmo2": read_olmo2``.

4. **Test.** Put the config.json of a published checkpoint into ``tests/export/configs``, its
   parameters into ``MILLIONS`` of ``test_architectures.py``, and every quirk that config.json can
   turn on into ``VARIANTS`` of ``test_parity.py``: heads that are no multiple of 16, a large
   epsilon, biases, windows shorter than the prompt. The tests then compare tensors, defaults and
   logits with transformers.

       pytest tests/export/test_architectures.py tests/export/test_parity.py -k olmo
       python benchmarks/families.py olmo-2-0425-1b

   The second prints the family's row for the table in the README.
"""
