"""Answer questions with a model, batch by batch: greedily, or sampled as in training."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from tqdm import tqdm

from common.config import Config
from data import PromptEncoder, Question, Vocabulary, load_vocabulary
from data.choice import prompt_encoder
from data.encode import LoadImage
from data.images import load_image
from grpo.sampler import sample_groups, sampling_noise
from model import Qwen2VL, load_model


class Answer(NamedTuple):
    """A completion: its text, its length in tokens (end of turn included), and whether it ended
    before the length limit.
    """

    text: str
    tokens: int
    ended: bool


class Examinee(NamedTuple):
    """A model under evaluation, with the encoder of its prompts and the config with its limits.

    `watch` is called with the tokens of each sampling step, and may raise to stop.
    """

    model: Qwen2VL
    vocabulary: Vocabulary
    encoder: PromptEncoder
    config: Config
    watch: Callable[[Tensor], None] | None = None

    def answers(
        self,
        questions: Sequence[Question],
        label: str,
        places: Sequence[int],
        samples: int = 0,
        load: LoadImage = load_image,
        share: slice = slice(None),
    ) -> Iterator[tuple[int, list[Answer]]]:
        """Yields (index of a question, its answers), in order of prompt length.

        Args:
            label: the title of the progress bar.
            places: indices of the questions to answer.
            samples: 0 for one greedy answer to each question; k for k answers sampled at the
                config's temperature.
            load: reads an image file.
            share: which of the batches to answer. They are those of all places, so that an answer
                does not depend on how many processes share the work.
        """
        config = self.config
        noise_NGT = None
        lengths = {place: self.encoder.count_tokens(questions[place]) for place in places}
        order = sorted(lengths, key=lengths.__getitem__)  # similar lengths need little padding
        # k answers to a question take k sequences of the batch.
        for batch in in_batches(order, config.eval_batch_prompts // max(1, samples), label, share):
            if samples:
                # The noise that training would draw in the step after its last.
                noise_NGT = sampling_noise(
                    config.seed, config.steps, batch, samples, config.max_new_tokens
                )
            rollout = sample_groups(
                self.model,
                self.vocabulary,
                [self.encoder.encode(questions[place], load) for place in batch],
                noise_NGT,
                temperature=config.temperature if samples else 1.0,
                max_new_tokens=config.max_new_tokens,
                watch=self.watch,
            )
            lengths_NG = rollout.mask_NGT.sum(-1).tolist()
            groups = zip(batch, rollout.texts, lengths_NG, rollout.ended_NG.tolist(), strict=True)
            for place, texts, lengths_G, ended_G in groups:
                yield place, list(map(Answer, texts, lengths_G, ended_G))

    def greedy_texts(self, questions: Sequence[Question], label: str) -> list[str]:
        """The greedy completion of each question, in the order of the questions."""
        texts = [""] * len(questions)
        for place, (answer,) in self.answers(questions, label, range(len(questions))):
            texts[place] = answer.text
        return texts


def load_examinee(folder: Path, config: Config) -> Examinee:
    """Load the model of a checkpoint folder. InputError if it can't be used."""
    # Evaluation needs no gradients; without them no activations are kept.
    model = load_model(folder, config.device, config.dtype).requires_grad_(False)
    vocabulary = load_vocabulary(folder, model.config, config.device)
    return Examinee(model, vocabulary, prompt_encoder(vocabulary, model.config, config), config)


def in_batches(
    places: Sequence[int], size: int, label: str, share: slice = slice(None)
) -> Iterable[Sequence[int]]:
    """The share of the batches of `size` places (at least 1), with a progress bar."""
    size = max(1, size)
    batches = [places[start : start + size] for start in range(0, len(places), size)]
    return tqdm(batches[share], label, unit="batch", leave=False, disable=not places)
