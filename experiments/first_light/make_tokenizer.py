"""Build `experiments/first_light/tokenizer/`: a small byte-level BPE learned from the wordings of the dataset.

    python -m experiments.first_light.make_tokenizer [FOLDER]

Every word of a wording is one token, so is every capital letter to sort and every digit (with the space before it, if
there is one: tens and units look different), and any other text falls back to bytes. In the chat template a turn is
a token that names its role and the text; an assistant's turn ends with <|end|>, and generation marks surround it.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from experiments.first_light import tasks

FOLDER = Path(__file__).parent / "tokenizer"
SPECIAL = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|call|>", "<|end|>")
SPLIT = (  # GPT-2's and Qwen's: contractions, words and single digits with the space before them, punctuation, spaces
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = """\
{%- if tools %}
{{- '<|system|>Tools:\\n' }}
{%- for tool in tools %}
{{- (tool | tojson) + '\\n' }}
{%- endfor %}
{%- endif %}
{%- for message in messages %}
{{- '<|' + message.role + '|>' }}
{%- if message.role == 'assistant' %}
{%- generation %}
{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}
{{- '<|call|>' + ((call.function or call) | tojson) }}
{%- endfor %}
{{- '<|end|>' }}
{%- endgeneration %}
{%- else %}
{{- message.content }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' }}
{%- endif %}
"""


PHRASINGS = [text.replace("{}", "0 1 2 3 4 5 6 7 8 9") for texts in tasks.PHRASINGS.values() for text in texts]


def build(texts: Sequence[str] = PHRASINGS) -> Tokenizer:
    """Learn the merges until every word of the texts is one token, and add the marks of the chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=100_000, min_frequency=1, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def write(folder: Path = FOLDER, texts: Sequence[str] = PHRASINGS) -> None:
    """Write tokenizer.json, tokenizer_config.json (with the chat template) and generation_config.json into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build(texts)
    tokenizer.save(str(folder / "tokenizer.json"))
    pad, eos = tokenizer.token_to_id("<|pad|>"), tokenizer.token_to_id("<|end|>")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "chat_template": TEMPLATE,
    }
    generation = {"do_sample": False, "eos_token_id": eos, "pad_token_id": pad}
    for name, value in {"tokenizer_config.json": config, "generation_config.json": generation}.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if sys.argv[1:] else FOLDER)
