"""onnxruntime-genai's own model builder, under the transformers that the tests compare with.

The builder (0.18) was written for transformers 5: it imports two names that 4.57 lacks, of models
that it is not asked for here, and wants ``rope_scaling`` to be a dictionary where 4.57 says None.
Checkpoints that transformers 5 saved name their tokenizer's class as 4.57 does not know it.
Arguments are the builder's own.

    python benchmarks/genai_builder.py -i CHECKPOINT -o FOLDER -p int4 -e cpu -c CACHE
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before onnxruntime is imported

import transformers
from transformers.models.auto import tokenization_auto

NEWER = ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration")


def main() -> None:
    """Run the builder."""
    for name in NEWER:
        if not hasattr(transformers, name):
            setattr(transformers, name, None)
    read = transformers.AutoConfig.from_pretrained

    def read_config(*args: Any, **options: Any) -> Any:
        config = read(*args, **options)
        if getattr(config, "rope_scaling", 0) is None:
            config.rope_scaling = {"rope_type": "default"}
        return config

    find = tokenization_auto.tokenizer_class_from_name

    def find_class(name: str) -> Any:
        return transformers.PreTrainedTokenizerFast if name == "TokenizersBackend" else find(name)

    transformers.AutoConfig.from_pretrained = read_config
    tokenization_auto.tokenizer_class_from_name = find_class
    sys.argv[0] = "builder"
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")


if __name__ == "__main__":
    main()
