"""A tokenizer in the manner of Qwen2-VL's, byte-level BPE with its special tokens and chat
template, but tiny.

It is trained on the miniature's own words, each given often enough to become one token with its
leading space: the base finds an option's letter by attention from a word to the same word, and that
is far easier token to token.
"""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data.prompt import TASK

from .words import EMPTY_THOUGHTS, LETTERS, QUESTIONS, SPARE_NOUNS, STATEMENTS, VALUES

SYSTEM = "You are a helpful assistant."
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
# Not special: decoding keeps them, for the format reward to read.
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
# Qwen's own: contractions, words with one character before them, digits, punctuation, white space.
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Renders what Qwen2-VL's does, without its numbering of pictures.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train it: the same tokens on every machine, in a fraction of a second."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_QWEN_SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,  # never reached: training stops by itself when every word is one token
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # its own order is a set's
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=1024,
        additional_special_tokens=SPECIAL,
        chat_template=CHAT_TEMPLATE,
    )
    fast.add_tokens(TAGS, special_tokens=False)
    return fast


def _texts() -> list[str]:
    """Every text of the miniature, without the tags (they are whole tokens anyway)."""
    task = TASK
    for tag in TAGS:
        task = task.replace(tag, "")
    texts = [SYSTEM, "system\nuser\nassistant\n", f"?\n{task}", "The answer is A.", *EMPTY_THOUGHTS]
    for phrasings in QUESTIONS.values():
        texts += phrasings
    for statements in STATEMENTS.values():
        texts += [statement.format("") for statement in statements]
    for letter in LETTERS:
        texts += [f"{letter}) {word}\n" for word in (*VALUES, *SPARE_NOUNS)]
    return texts
