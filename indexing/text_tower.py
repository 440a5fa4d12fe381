"""A BERT text tower that starts fast.

``import open_clip`` costs more than twice what ``import torch`` does, and a query needs only the
text half of a model. When that half is an ordinary BERT (as in the bundled model), the sixty
lines below read it straight from the checkpoint; the tests hold them equal to open_clip's own.

Architecture: Devlin et al., "BERT", 2018 (post-norm encoder, learned positions), mean pooling over
tokens and a bias-free projection (open_clip's HFTextEncoder with ``mean_pooler`` and ``linear``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class BertConfig:
    """The figures of a BERT encoder, named as in Hugging Face's ``config.json``."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    pad_token_id: int

    @classmethod
    def read(cls, path: Path) -> BertConfig:
        """Read ``config.json``; fields of no concern here are left out."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__})


class BertLayer(nn.Module):
    """Self-attention and feed-forward, each followed by residual and LayerNorm (post-norm)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.layer_norm_eps
        self.heads = config.num_attention_heads
        self.query, self.key, self.value = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.attended = nn.Linear(d, d)
        self.attended_norm = nn.LayerNorm(d, eps)
        self.widen = nn.Linear(d, config.intermediate_size)
        self.narrow = nn.Linear(config.intermediate_size, d)
        self.output_norm = nn.LayerNorm(d, eps)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Map states x (Q, T, d) under mask (Q, 1, 1, T), True where a token may be seen."""
        q, k, v = (
            each(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (Q, H, T, d/H)
            for each in (self.query, self.key, self.value)
        )
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (Q, H, T, d/H)
        seen = self.attended(seen.transpose(1, 2).flatten(2))  # (Q, T, d)
        x = self.attended_norm(x + seen)  # (Q, T, d)
        return self.output_norm(x + self.narrow(F.gelu(self.widen(x))))  # (Q, T, d)


class BertTextTower(nn.Module):
    """Token ids to a pooled vector in the image-text space and the last hidden states."""

    def __init__(self, config: BertConfig, embed_dim: int) -> None:
        super().__init__()
        d = config.hidden_size
        self.pad_id = config.pad_token_id
        self.word = _blank_embedding(config.vocab_size, d)
        self.position = _blank_embedding(config.max_position_embeddings, d)
        self.segment = _blank_embedding(config.type_vocab_size, d)
        self.norm = nn.LayerNorm(d, config.layer_norm_eps)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.proj = nn.Linear(d, embed_dim, bias=False)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map ids (Q, T) to a pooled vector (Q, D), not normalised, and token states (Q, T, d)."""
        mask = ids != self.pad_id  # (Q, T)
        positions = torch.arange(ids.shape[1], device=ids.device)  # (T,)
        x = self.word(ids) + self.position(positions) + self.segment.weight[0]  # (Q, T, d)
        x = self.norm(x)  # (Q, T, d)
        for layer in self.layers:
            x = layer(x, mask[:, None, None, :])  # (Q, T, d)
        kept = mask.unsqueeze(-1).to(x.dtype)  # (Q, T, 1)
        mean = (x * kept).sum(1) / kept.sum(1)  # (Q, d)
        return self.proj(mean), x


def _blank_embedding(rows: int, width: int) -> nn.Embedding:
    """An embedding without the random start, which costs more time than all the rest.

    The meta device would avoid it too, but its random numbers import torch's compiler (1 s).
    """
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


# Our names for the parts of a layer, and Hugging Face's.
_LAYER_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attended": "attention.output.dense",
    "attended_norm": "attention.output.LayerNorm",
    "widen": "intermediate.dense",
    "narrow": "output.dense",
    "output_norm": "output.LayerNorm",
}
_OUTER_NAMES = {
    "word": "transformer.embeddings.word_embeddings",
    "position": "transformer.embeddings.position_embeddings",
    "segment": "transformer.embeddings.token_type_embeddings",
    "norm": "transformer.embeddings.LayerNorm",
    "proj": "proj",
}


def checkpoint_name(parameter: str) -> str:
    """Translate a parameter of BertTextTower to its name in an open_clip checkpoint."""
    if parameter.startswith("layers."):
        _, number, part, kind = parameter.split(".")
        return f"text.transformer.encoder.layer.{number}.{_LAYER_NAMES[part]}.{kind}"
    part, kind = parameter.split(".")
    return f"text.{_OUTER_NAMES[part]}.{kind}"


def load_bert_tower(config: Path, checkpoint: Path, embed_dim: int) -> BertTextTower:
    """Build the tower and fill it from an open_clip safetensors checkpoint, in fp32.

    Raises:
        KeyError: the checkpoint lacks one of the tower's tensors.
    """
    from safetensors import safe_open

    tower = BertTextTower(BertConfig.read(config), embed_dim)
    with safe_open(checkpoint, framework="pt") as file:
        stored = set(file.keys())
        wanted = {name: checkpoint_name(name) for name, _ in tower.named_parameters()}
        if missing := sorted(set(wanted.values()) - stored):
            raise KeyError(", ".join(missing))
        weights = {name: file.get_tensor(there).float() for name, there in wanted.items()}
    tower.load_state_dict(weights, strict=True, assign=True)
    return tower.eval()
