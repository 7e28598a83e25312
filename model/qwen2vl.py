"""Qwen2-VL, assembled: vision tower, token embeddings, decoder, head; and the three ways in which
GRPO runs it.

- `forward`: right-padded sequences, logits everywhere. Plain and slow; the twin that the fast ways
  are tested against.
- `prefill` and `decode`: the rollout. Prompts once per group, then one token per completion and
  call.
- `completion_hidden`: the update. Each prompt once, its G completions after it (shared prefix).
"""

from functools import partial

import torch
from torch import Tensor, nn

from .attention import SharedPrefix, causal_attention
from .cache import GroupCache
from .config import Qwen2VLConfig
from .decoder import Attend, DecoderLayer, RMSNorm
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
        self.recompute = (
            False  # whether backward makes each block's activations anew in place of keeping them
        )
        self.rollout_state: object | None = (
            None  # what the sampler keeps from one step to the next, on a GPU
        )
        self.companions: dict[
            str, bytes
        ] = {}  # files that it was loaded with and is saved with: `read_companions`
        self.visual = VisionTower(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(config.hidden_size, config.vocab_size, bias=False)
        )

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the matrix that turns hidden states into logits, tied to the embeddings or
        not.
        """
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def decoding_weights(self) -> list[Tensor]:
        """The matrices that `decode` and the head multiply by."""
        layers = (module.weight for module in self.layers.modules() if isinstance(module, Linear))
        return [*layers, self.head_weight]

    def forward(
        self,
        tokens_BL: Tensor,
        patches_SC: Tensor | None = None,
        grids_I3: Tensor | None = None,
        lengths_B: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, L, V) of right-padded sequences; rows of padding hold nothing of meaning.

        Args:
            tokens_BL: int64 token ids, images expanded to their image tokens.
            patches_SC: patches of all images in reading order, as the Hugging Face image processor
                lays them out.
            grids_I3: patches of each image as (t, h, w).
            lengths_B: tokens of each row without padding; None if all rows are full.
        """
        if lengths_B is None:
            lengths_B = torch.full((len(tokens_BL),), tokens_BL.shape[1])
        merge = self.config.vision.spatial_merge_size
        positions = batch_positions(
            tokens_BL, lengths_B, grids_I3, self.config.image_token_id, merge
        )
        return linear(self.hidden(tokens_BL, positions, patches_SC, grids_I3), self.head_weight)

    def hidden(
        self,
        tokens_BL: Tensor,
        positions_3BL: Tensor,
        patches_SC: Tensor | None = None,
        grids_I3: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states (B, L, D), each token seeing its past."""
        x = self.embed_prompt(tokens_BL, patches_SC, grids_I3)
        return self._run_layers(x, positions_3BL, lambda layer, q, k, v: causal_attention(q, k, v))

    def encode_images(self, patches_SC: Tensor, grids_I3: Tensor) -> Tensor:
        """What the vision tower makes of images: one row (D,) for each of their tokens, in reading
        order.
        """
        return self.visual(patches_SC, grids_I3, recompute=self.recompute)

    def embed_prompt(
        self, tokens_BL: Tensor, images: Tensor | None, grids_I3: Tensor | None
    ) -> Tensor:
        """Token embeddings (B, L, D), the image tokens' rows replaced by what the vision tower
        sees.

        `images` are patches with their grids, or, if `grids_I3` is None, what `encode_images` made
        of them before.
        """
        x = self.embed(tokens_BL)
        if images is None or not len(images):
            return x
        seen = images if grids_I3 is None else self.encode_images(images, grids_I3)
        places = tokens_BL == self.config.image_token_id
        if int(places.sum()) != len(seen):
            raise ValueError(
                f"{int(places.sum())} image tokens in the batch, but the images make {len(seen)}"
            )
        return x.masked_scatter(places[..., None], seen.to(x.dtype))

    def prefill(
        self,
        tokens_NP: Tensor,
        positions_3NP: Tensor,
        lengths_N: Tensor,
        images: Tensor | None,
        grids_I3: Tensor | None,
        cache: GroupCache,
    ) -> Tensor:
        """Run right-padded prompts once into the cache; returns each one's last hidden state (N,
        D).

        `images` and `grids_I3`: see `embed_prompt`.
        """
        cache.begin(lengths_N)
        hidden = self._run_layers(
            self.embed_prompt(tokens_NP, images, grids_I3), positions_3NP, cache.prefill
        )
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths_N - 1]

    def decode(
        self,
        tokens_R: Tensor,
        positions_R: Tensor,
        cache: GroupCache,
        span: int,
        padded: bool = False,
    ) -> Tensor:
        """Add one token to every growing completion: ids (R,) at M-RoPE positions (R,) -> hidden
        states (R, D).

        Attention looks at the first `span` slots of each row: as many as are filled now, this
        token's among them, or with `padded` some more, whose emptiness is found on the device.
        Nothing here makes the host wait or changes a shape, so that the call can be captured in a
        CUDA graph.
        """
        positions = positions_R.view(1, -1, 1).expand(3, -1, -1)
        seen = cache.places[:span] <= cache.step if padded else None
        hidden = self._run_layers(
            self.embed(tokens_R[:, None]),
            positions,
            partial(cache.decode, span=span, own_seen=seen),
        )
        cache.step += 1
        return hidden[:, 0]

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
        """Hidden states (M, D) that predict the M completion tokens of the mask, in its order.

        Image and prompt are run once per group, and of all tokens only the real ones: `mask_NGT` is
        true on the first ones of every completion. The prompt's last state predicts a completion's
        first token, so that a completion's own last token is never run.
        """
        N, G, T = completions_NGT.shape
        P = tokens_NP.shape[1]
        prompt_NP = torch.arange(P, device=tokens_NP.device) < lengths_N[:, None]
        run_NGT = mask_NGT[..., 1:]  # a token is run where there is one after it to predict
        after = (
            positions_3NP.amax(dim=(0, 2))[:, None, None]
            + 1
            + torch.arange(T - 1, device=tokens_NP.device)
        )
        positions = torch.cat(
            (positions_3NP[:, prompt_NP], after.expand(N, G, T - 1)[run_NGT].expand(3, -1)), dim=1
        )
        tokens = torch.cat((tokens_NP[prompt_NP], completions_NGT[..., :-1][run_NGT]))
        x = self.embed_prompt(tokens[None], images, grids_I3)
        hidden = self._run_layers(x, positions[:, None], SharedPrefix(prompt_NP, run_NGT))[0]

        # Where in `hidden` the state lies that predicts a token: the prompt's last, or the one
        # before it.
        prompt_tokens = lengths_N.sum()
        own = torch.cumsum(run_NGT.flatten(), 0).view(N, G, T - 1) - 1 + prompt_tokens
        last = (lengths_N.cumsum(0) - 1)[:, None, None].expand(N, G, 1)
        return hidden.index_select(0, torch.cat((last, own), dim=2)[mask_NGT])

    def _run_layers(self, x_BLD: Tensor, positions_3BL: Tensor, attend: Attend) -> Tensor:
        config = self.config
        cos, sin = text_rotary(
            positions_3BL, config.head_dim, config.rope_theta, config.mrope_section
        )
        cos, sin = cos.to(x_BLD.dtype), sin.to(x_BLD.dtype)
        for layer in self.layers:
            x_BLD = run_block(self.recompute, layer, x_BLD, cos, sin, attend)
        return self.norm(x_BLD)
