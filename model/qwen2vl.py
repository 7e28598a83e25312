"""Qwen2-VL, assembled: vision tower, token embeddings, decoder, head; and the three ways in which GRPO runs it.

- `forward`: right-padded sequences, logits everywhere. Plain and slow; the twin that the fast ways are tested against.
- `prefill` and `decode`: the rollout. Prompts once per group, then one token per completion and call.
- `completion_hidden`: the update. Each prompt once, its G completions after it (shared prefix).
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from .attention import SharedPrefix, causal_attention
from .cache import GroupCache
from .config import Qwen2VLConfig
from .decoder import Attend, DecoderLayer, RMSNorm
from .rope import batch_positions, text_rotary
from .vision import VisionTower


class Qwen2VL(nn.Module):
    """Letters: B rows, L tokens, S patches, I images, N prompts of P tokens, G completions of T tokens, D hidden."""

    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__()
        self.config = config
        self.source: Path | None = None  # the folder it was loaded from: its tokenizer files go along when it is saved
        self.visual = VisionTower(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the matrix that turns hidden states into logits, tied to the embeddings or not."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

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
            patches_SC: patches of all images in reading order, as the Hugging Face image processor lays them out.
            grids_I3: patches of each image as (t, h, w).
            lengths_B: tokens of each row without padding; None if all rows are full.
        """
        if lengths_B is None:
            lengths_B = torch.full((len(tokens_BL),), tokens_BL.shape[1])
        merge = self.config.vision.spatial_merge_size
        positions = batch_positions(tokens_BL, lengths_B, grids_I3, self.config.image_token_id, merge)
        return self.hidden(tokens_BL, positions, patches_SC, grids_I3) @ self.head_weight.T

    def hidden(
        self, tokens_BL: Tensor, positions_3BL: Tensor, patches_SC: Tensor | None = None, grids_I3: Tensor | None = None
    ) -> Tensor:
        """Final hidden states (B, L, D), each token seeing its past."""
        x = self.embed_prompt(tokens_BL, patches_SC, grids_I3)
        return self._decode_layers(x, positions_3BL, lambda layer, q, k, v: causal_attention(q, k, v))

    def embed_prompt(self, tokens_BL: Tensor, patches_SC: Tensor | None, grids_I3: Tensor | None) -> Tensor:
        """Token embeddings (B, L, D), the image tokens' rows replaced by what the vision tower sees."""
        x = self.embed(tokens_BL)
        if patches_SC is None or not len(patches_SC):
            return x
        seen = self.visual(patches_SC, grids_I3)
        places = tokens_BL == self.config.image_token_id
        if int(places.sum()) != len(seen):
            raise ValueError(f"{int(places.sum())} image tokens in the batch, but the images make {len(seen)}")
        return x.masked_scatter(places[..., None], seen.to(x.dtype))

    def prefill(
        self,
        tokens_NP: Tensor,
        positions_3NP: Tensor,
        lengths_N: Tensor,
        patches_SC: Tensor | None,
        grids_I3: Tensor | None,
        group_size: int,
        max_new_tokens: int,
    ) -> tuple[Tensor, GroupCache]:
        """Run right-padded prompts once; returns each one's last hidden state (N, D) and the cache for its group."""
        cache = GroupCache(lengths_N, tokens_NP.shape[1], group_size, max_new_tokens)
        x = self.embed_prompt(tokens_NP, patches_SC, grids_I3)
        hidden = self._decode_layers(x, positions_3NP, cache.prefill)
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths_N - 1], cache

    def decode(self, tokens_NG: Tensor, positions_N: Tensor, cache: GroupCache) -> Tensor:
        """Add one token to every completion: ids (N, G) at M-RoPE positions (N,) -> hidden states (N, G, D)."""
        N, G = tokens_NG.shape
        positions = positions_N.repeat_interleave(G).view(1, N * G, 1).expand(3, -1, -1)
        hidden = self._decode_layers(self.embed(tokens_NG.reshape(-1, 1)), positions, cache.decode)
        cache.step += 1
        return hidden.view(N, G, -1)

    def completion_hidden(
        self,
        tokens_NP: Tensor,
        positions_3NP: Tensor,
        lengths_N: Tensor,
        patches_SC: Tensor | None,
        grids_I3: Tensor | None,
        completions_NGT: Tensor,
    ) -> Tensor:
        """Hidden states (N, G, T, D) that predict each completion token; image and prompt are run once per group.

        The prompt's last state predicts a completion's first token, so that a completion's own last token is never run.
        """
        N, G, T = completions_NGT.shape
        P = tokens_NP.shape[1]
        rows = torch.arange(N, device=tokens_NP.device)
        x = self.embed_prompt(tokens_NP, patches_SC, grids_I3)
        if T > 1:
            x = torch.cat((x, self.embed(completions_NGT[..., :-1].reshape(N, -1))), dim=1)
            after = positions_3NP.amax(dim=(0, 2))[:, None] + 1 + torch.arange(T - 1, device=x.device)
            positions_3NP = torch.cat((positions_3NP, after.repeat(1, G).expand(3, -1, -1)), dim=2)
        hidden = self._decode_layers(x, positions_3NP, SharedPrefix(lengths_N, P, G))
        first = hidden[rows, lengths_N - 1].view(N, 1, 1, -1).expand(N, G, 1, -1)
        return torch.cat((first, hidden[:, P:].unflatten(1, (G, T - 1))), dim=2)

    def _decode_layers(self, x_BLD: Tensor, positions_3BL: Tensor, attend: Attend) -> Tensor:
        config = self.config
        cos, sin = text_rotary(positions_3BL, config.head_dim, config.rope_theta, config.mrope_section)
        cos, sin = cos.to(x_BLD.dtype), sin.to(x_BLD.dtype)
        for layer in self.layers:
            x_BLD = layer(x_BLD, cos, sin, attend)
        return self.norm(x_BLD)
