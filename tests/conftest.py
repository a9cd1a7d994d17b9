"""What several tests share: real checkpoints where there are any, and tiny seeded ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from edge_llm import LLM

SHARED = Path(__file__).parents[1].parent / "shared"

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEXT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the "
    "age of foolishness, it was the epoch of belief, it was the epoch of incredulity. "
    "Größe, naïveté, 東京, 🙂 and 1,024 other things."
)

settings.register_profile("edge_llm", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("edge_llm")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real checkpoints and texts that lies beside a developer's checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the folder of real checkpoints beside the checkout: {SHARED.name}/")
    return SHARED


MakeLlama = Callable[..., "LlamaForCausalLM"]


@pytest.fixture(scope="session")
def make_llama() -> MakeLlama:
    """A function that writes a tiny seeded Llama checkpoint, tokenizer and chat template included.

    ``make_llama(folder, **config)`` gives the transformers model, float32 and in evaluation mode.
    """

    def make(folder: Path, *, seed: int = 0, **config: Any) -> LlamaForCausalLM:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes: dict[str, Any] = {
            "hidden_size": 64,
            "intermediate_size": 172,
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "vocab_size": 400,
            "max_position_embeddings": 256,
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": None,
        }
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(sizes | config))).float().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "norm" in name:
                    parameter += torch.randn_like(parameter) * 0.3
                else:
                    parameter *= 4  # logits far enough apart for greedy decoding to be stable
        model.save_pretrained(folder)
        write_tokenizer(folder)
        return model

    return make


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of about 350 tokens with ChatML's control tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=[AddedToken(token, special=True) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture(scope="session")
def tiny_checkpoint(make_llama: MakeLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama checkpoint with random weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_llama(folder, tie_word_embeddings=True)
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its float32 bundle."""
    from edge_llm_export import export_model

    folder = tmp_path_factory.mktemp("bundles") / "tiny-fp32"
    export_model(tiny_checkpoint, folder, quantize="fp32")
    return folder


@pytest.fixture
def tiny_llm(tiny_bundle: Path) -> Iterator[LLM]:
    """The float32 bundle, loaded."""
    from edge_llm import LLM

    with LLM(tiny_bundle) as llm:
        yield llm
