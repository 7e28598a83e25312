"""A model's answers to questions, batch by batch: greedy, or sampled as in training."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from common.config import Config
from data import PromptEncoder, Question, Vocabulary
from data.encode import LoadImage
from data.images import load_image
from grpo.sampler import sample_groups, sampling_noise
from model import Qwen2VL


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion's text; its length, end of turn included; whether it ended by itself, or at the
    limit.
    """

    text: str
    tokens: int
    ended: bool


def answer_questions(
    model: Qwen2VL,
    vocabulary: Vocabulary,
    encoder: PromptEncoder,
    questions: Sequence[Question],
    *,
    config: Config,
    label: str,
    places: Sequence[int] | None = None,
    samples: int = 0,
    load: LoadImage = load_image,
) -> Iterator[list[tuple[int, list[Answer]]]]:
    """Yields, a batch at a time, (place among the questions, its answers).

    Args:
        label: what the progress bar calls it.
        places: which of the questions to ask; None asks all.
        samples: 0 gives each question its one greedy answer; k gives it k answers drawn at the
            config's temperature, with the numbers that a training step after the last would draw
            for these places.
        load: how an image file becomes an image.
    """
    lengths = {
        i: encoder.count_tokens(questions[i])
        for i in (range(len(questions)) if places is None else places)
    }
    order = sorted(lengths, key=lengths.__getitem__)  # like lengths together: little padding
    size = max(1, config.eval_batch_prompts // max(1, samples))
    with tqdm(
        total=len(order),
        desc=label,
        unit="question",
        dynamic_ncols=True,
        leave=False,
        disable=not order,
    ) as bar:
        for start in range(0, len(order), size):
            asked = order[start : start + size]
            prompts = [encoder.encode(questions[i], load) for i in asked]
            noise = (
                sampling_noise(config.seed, config.steps, asked, samples, config.max_new_tokens)
                if samples
                else None
            )
            rollout = sample_groups(
                model,
                vocabulary,
                prompts,
                noise,
                temperature=config.temperature if samples else 1.0,
                max_new_tokens=config.max_new_tokens,
            )
            lengths_NG, ended_NG = rollout.mask_NGT.sum(-1).tolist(), rollout.ended_NG.tolist()
            groups = zip(rollout.texts, lengths_NG, ended_NG, strict=True)
            yield [
                (i, [Answer(*one) for one in zip(*group, strict=True)])
                for i, group in zip(asked, groups)
            ]
            bar.update(len(asked))


def answer_greedily(
    model: Qwen2VL,
    vocabulary: Vocabulary,
    encoder: PromptEncoder,
    questions: Sequence[Question],
    *,
    config: Config,
    label: str,
) -> list[str]:
    """The model's most likely completion of each question, in the order of the questions."""
    texts = [""] * len(questions)
    for batch in answer_questions(
        model, vocabulary, encoder, questions, config=config, label=label
    ):
        for i, (answer,) in batch:
            texts[i] = answer.text
    return texts
