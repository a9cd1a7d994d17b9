"""The model's tokenizer: a small byte-level BPE, and the chat template."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from .answer import Answer
from .generator import samples

PAD, BOS, EOS, ANSWER = "<pad>", "<s>", "</s>", "<|answer|>"
VOCABULARY = 1024
_SEED = 7001
_SAMPLES = 120_000

_KEYS = "|".join(Answer.__dataclass_fields__)
# Small words carry their space; others do not, so that a word is the same tokens wherever it
# stands and a label can be copied token by token. Digits stand alone, so that numbers can be too.
_SPACED = (
    "the|a|an|in|to|for|at|my|of|on|off|up|down|by|and|please|is|it|me|you|about|that|with|i|"
    "percent"
)
SPLIT = (
    rf'"?[{{,]"(?:{_KEYS})":"?|"?\}}'
    r"|, (?:above|below|within) the |(?: limit| minimum)\.| °[CF]"
    rf"| (?:{_SPACED})(?![\p{{L}}\p{{M}}\p{{N}}_'])"
    r"|'(?:s|t|m|d|ll|re|ve)(?!\p{L})"
    r"|[\p{L}\p{M}]+(?:_[\p{L}\p{M}]+)*|\p{N}|\s|[^\s\p{L}\p{M}\p{N}]"
)

# The last user message only, lower case, single spaces.
CHAT_TEMPLATE = (
    "{%- set last = namespace(text='') -%}"
    "{%- for message in messages if message['role'] == 'user' -%}"
    "{%- set last.text = message['content'] -%}"
    "{%- endfor -%}"
    "{{- bos_token + (last.text | lower).split() | join(' ') -}}"
    "{%- if add_generation_prompt -%}{{- '<|answer|>' -}}{%- endif -%}"
)


def rendered(request: str) -> str:
    """What the chat template makes of a request, without BOS and the answer mark."""
    return " ".join(request.lower().split())


def _corpus() -> Iterator[str]:
    for sample in islice(samples(_SEED), _SAMPLES):
        yield rendered(sample.request)
        yield sample.answer


def train_tokenizer() -> Tokenizer:
    """Train the byte-level BPE on generated pairs; deterministic."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS, ANSWER],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[ANSWER],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
