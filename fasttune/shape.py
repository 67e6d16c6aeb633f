"""The sizes of a model that decide its memory and its speed, from its config.json alone. Pure, no torch."""

from dataclasses import dataclass
from typing import Any

from fasttune import metrics
from fasttune.metrics import Flops


@dataclass(frozen=True)
class Shape:
    """A Llama-like decoder: attention with grouped keys, gated MLP, embeddings and head. Widths are values a token."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    query_width: int  # heads × head_dim
    key_width: int  # key heads × head_dim
    vocab: int
    tied: bool  # the head is the embedding

    @classmethod
    def of(cls, architecture: Any) -> "Shape":
        """From a transformers config."""
        hidden, heads = architecture.hidden_size, architecture.num_attention_heads
        head = getattr(architecture, "head_dim", None) or hidden // heads
        key_heads = getattr(architecture, "num_key_value_heads", None) or heads
        return cls(
            layers=architecture.num_hidden_layers,
            hidden=hidden,
            mlp=getattr(architecture, "intermediate_size", None) or 4 * hidden,
            heads=heads,
            query_width=heads * head,
            key_width=key_heads * head,
            vocab=architecture.vocab_size,
            tied=bool(architecture.tie_word_embeddings),
        )

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear layer of a decoder layer."""
        return {
            "q_proj": (self.hidden, self.query_width),
            "k_proj": (self.hidden, self.key_width),
            "v_proj": (self.hidden, self.key_width),
            "o_proj": (self.query_width, self.hidden),
            "gate_proj": (self.hidden, self.mlp),
            "up_proj": (self.hidden, self.mlp),
            "down_proj": (self.mlp, self.hidden),
        }

    @property
    def linear_weights(self) -> int:
        """Weights of all linear layers of the decoder, the head left out."""
        return self.layers * sum(before * after for before, after in self.projections.values())

    @property
    def parameters(self) -> int:
        norms = (2 * self.layers + 1) * self.hidden
        return self.linear_weights + norms + self.vocab * self.hidden * (1 if self.tied else 2)

    def adapter_weights(self, rank: int, targets: list[str]) -> int:
        """Weights of a LoRA adapter; a target with a name of its own counts as the widest."""
        widest = (self.hidden, self.mlp)
        return self.layers * rank * sum(sum(self.projections.get(target, widest)) for target in targets)

    def flops(self, full: bool, adapter_weights: int) -> Flops:
        """FLOPs per token of a training step, as metrics.count_flops counts them for the live model."""
        return metrics.count_flops(
            linear_weights=self.linear_weights + adapter_weights,
            trained_weights=self.linear_weights if full else adapter_weights,
            head_weights=self.vocab * self.hidden,
            head_trained=full,
            layers=self.layers,
            attention_width=self.query_width,
        )
