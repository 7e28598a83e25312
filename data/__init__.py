"""Question readers, the prompt template, image preprocessing, the tokenizer, the prompt stream."""

from .encode import Prompt, PromptEncoder
from .images import load_image
from .prompt import prompt_text
from .question import Question, canonical_modality
from .readers import read_questions
from .stream import prompts_of_steps, questions_of_step
from .vocabulary import Vocabulary, allowed_tokens_V, load_vocabulary

__all__ = [
    "Prompt",
    "PromptEncoder",
    "Question",
    "Vocabulary",
    "allowed_tokens_V",
    "canonical_modality",
    "load_image",
    "load_vocabulary",
    "prompt_text",
    "prompts_of_steps",
    "questions_of_step",
    "read_questions",
]
