"""Qwen2-VL: vision tower, token embeddings, decoder and head, with three ways to run them.

- `forward`: right-padded sequences, logits at every position. Plain and slow, the twin that the
  other two are tested against.
- `prefill` and `decode`: the rollout. Prompts once per group, then one token per completion in each
  call.
- `completion_hidden`: the update. Each prompt once, followed by its G completions (shared prefix).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .attention import SharedPrefix, causal_attention
from .cache import GroupCache
from .config import Qwen2VLConfig
from .decoder import Attend, DecoderLayer
from .linear import Linear, linear
from .rope import batch_positions, text_rotary
from .vision import VisionTower, run_block


class Qwen2VL(nn.Module):
    """Letters: B rows, L tokens, S patches, I images, N prompts of P tokens, G completions of T
    tokens, D hidden.
    """

    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__()
        self.config = config
        # Whether the backward pass recomputes each block's activations instead of keeping them.
        self.recompute = False
        # The sampler's buffers and graphs, kept between steps on a GPU. They must not refer to the
        # model: the cycle would hold a dropped model's memory until the next garbage collection.
        self.rollout_state: Any = None
        # Files of the checkpoint that are saved along with the model, by name (`read_companions`).
        self.companions: dict[str, bytes] = {}
        self.visual = VisionTower(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = (DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head: Linear | None = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the matrix that maps hidden states to logits; the embedding itself if tied."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def decoding_weights(self) -> list[Tensor]:
        """The matrices that `decode` and the head multiply by."""
        modules = self.layers.modules()
        weights = [module.weight for module in modules if isinstance(module, Linear)]
        return [*weights, self.head_weight]

    def forward(
        self,
        tokens_BL: Tensor,
        patches_SC: Tensor | None = None,
        grids_I3: Tensor | None = None,
        lengths_B: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, L, V) of right-padded sequences; those of padding are meaningless.

        Args:
            tokens_BL: int64 token ids, with every image expanded to its image tokens.
            patches_SC: the patches of all images in reading order, in the layout of the Hugging
                Face image processor.
            grids_I3: the grid of patches of each image, (t, h, w).
            lengths_B: tokens in each row without padding; None if no row is padded.
        """
        if lengths_B is None:
            lengths_B = torch.full(tokens_BL.shape[:1], tokens_BL.shape[1])
        positions_3BL = batch_positions(tokens_BL, lengths_B, grids_I3, self.config)
        hidden_BLD = self.hidden(tokens_BL, positions_3BL, patches_SC, grids_I3)
        return linear(hidden_BLD, self.head_weight)

    def hidden(
        self,
        tokens_BL: Tensor,
        positions_3BL: Tensor,
        patches_SC: Tensor | None = None,
        grids_I3: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states (B, L, D), each token attending to its past."""
        x_BLD = self.embed_prompt(tokens_BL, patches_SC, grids_I3)
        return self._run_layers(
            x_BLD, positions_3BL, lambda layer, q, k, v: causal_attention(q, k, v)
        )

    def encode_images(self, patches_SC: Tensor, grids_I3: Tensor) -> Tensor:
        """The vision tower's features, one row (D,) per image token in reading order."""
        return self.visual(patches_SC, grids_I3, recompute=self.recompute)

    def embed_prompt(
        self,
        tokens_BL: Tensor,
        images: Tensor | None,
        grids_I3: Tensor | None,
    ) -> Tensor:
        """Token embeddings (B, L, D), with the rows of image tokens replaced by image features.

        `images` are patches with their grids. If `grids_I3` is None, they are the features that
        `encode_images` has already computed.
        """
        x_BLD = self.embed(tokens_BL)
        if images is None or not len(images):
            return x_BLD
        features = images if grids_I3 is None else self.encode_images(images, grids_I3)
        places_BL = tokens_BL == self.config.image_token_id
        return x_BLD.masked_scatter(places_BL[..., None], features.to(x_BLD.dtype))

    def prefill(
        self,
        tokens_NP: Tensor,
        positions_3NP: Tensor,
        lengths_N: Tensor,
        images: Tensor | None,
        grids_I3: Tensor | None,
        cache: GroupCache,
    ) -> Tensor:
        """Run right-padded prompts into the cache. Returns their last hidden states (N, D).

        `images` and `grids_I3`: see `embed_prompt`.
        """
        cache.begin(lengths_N)
        x_NPD = self.embed_prompt(tokens_NP, images, grids_I3)
        hidden_NPD = self._run_layers(x_NPD, positions_3NP, cache.prefill)
        rows = torch.arange(len(lengths_N), device=lengths_N.device)
        return hidden_NPD[rows, lengths_N - 1]

    def decode(
        self,
        tokens_R: Tensor,
        positions_R: Tensor,
        cache: GroupCache,
        span: int,
        padded: bool = False,
    ) -> Tensor:
        """Run one token of every growing completion: ids (R,), positions (R,) -> hidden (R, D).

        Attention reads the first `span` slots of each row. These are the filled ones, this token's
        included, or with `padded` some more, which are masked on the device.
        """
        # Nothing here makes the host wait, and with `padded` no shape changes from call to call, so
        # a CUDA graph can capture the call.
        own_mask = cache.slots[:span] <= cache.step if padded else None
        attend = partial(cache.decode, span=span, own_mask=own_mask)
        x_R1D = self.embed(tokens_R[:, None])
        positions_3R1 = positions_R[:, None].expand(3, -1, -1)  # text: all three positions equal
        hidden_R1D = self._run_layers(x_R1D, positions_3R1, attend)
        cache.step += 1
        return hidden_R1D[:, 0]

    def completion_hidden(
        self,
        tokens_NP: Tensor,
        positions_3NP: Tensor,
        lengths_N: Tensor,
        images: Tensor | None,
        grids_I3: Tensor | None,
        completions_NGT: Tensor,
        mask_NGT: Tensor,
    ) -> Tensor:
        """Hidden states (M, D) that predict the M completion tokens in the mask, in mask order.

        Images and prompt run once per group, and padding never runs. `mask_NGT` must be True on the
        leading tokens of each completion. The last state of the prompt predicts the first token of
        a completion, so the last token of a completion never runs.
        """
        device = tokens_NP.device
        prompt_NP = torch.arange(tokens_NP.shape[1], device=device) < lengths_N[:, None]
        run_NGT = mask_NGT[..., 1:]  # a token runs only if it has a successor to predict
        own_tokens = completions_NGT[..., :-1][run_NGT]
        tokens_L = torch.cat((tokens_NP[prompt_NP], own_tokens))

        # A completion continues after its prompt's largest position, as text: one number is enough.
        largest_N = positions_3NP.amax(dim=(0, 2))
        steps = torch.arange(1, mask_NGT.shape[2], device=device)
        after_N1T = largest_N[:, None, None] + steps
        own_positions = after_N1T.expand_as(run_NGT)[run_NGT].expand(3, -1)
        positions_3L = torch.cat((positions_3NP[:, prompt_NP], own_positions), dim=1)

        x_1LD = self.embed_prompt(tokens_L[None], images, grids_I3)
        config = self.config
        heads_each = config.num_attention_heads // config.num_key_value_heads
        attend = SharedPrefix(prompt_NP, run_NGT, heads_each, x_1LD.dtype)
        hidden_LD = self._run_layers(x_1LD, positions_3L[:, None], attend)[0]

        return hidden_LD.index_select(0, _predictors(mask_NGT, lengths_N))

    def _run_layers(self, x_BLD: Tensor, positions_3BL: Tensor, attend: Attend) -> Tensor:
        cos, sin = text_rotary(positions_3BL, self.config).to(x_BLD.dtype)
        for layer in self.layers:
            x_BLD = run_block(self.recompute, layer, x_BLD, cos, sin, attend)
        return self.norm(x_BLD)


def _predictors(mask_NGT: Tensor, lengths_N: Tensor) -> Tensor:
    """Places (M,) in the packed row of the states that predict the tokens in the mask."""
    # The prompt's last state predicts a completion's first token. The state of the token before
    # predicts any other; the completions come after all prompts.
    N, G, _ = mask_NGT.shape
    last_N11 = lengths_N.cumsum(0).view(N, 1, 1) - 1
    last_NG1 = last_N11.expand(N, G, 1)
    run_NGT = mask_NGT[..., 1:]
    count_NGT = run_NGT.flatten().cumsum(0).view_as(run_NGT)
    own_NGT = count_NGT - 1 + lengths_N.sum()
    return torch.cat((last_NG1, own_NGT), dim=2)[mask_NGT]
