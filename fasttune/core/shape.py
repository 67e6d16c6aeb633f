"""The sizes of a model that decide its memory and its speed, from its config.json alone. Pure, no torch."""

from dataclasses import dataclass, replace
from typing import Any

from fasttune import metrics
from fasttune.errors import ModelError
from fasttune.metrics import Flops

NEEDED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # as Qwen, Mixtral and DeepSeek call them
MLP = ("gate_proj", "up_proj", "down_proj")


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
    experts: int = 1  # MLPs of a layer, each `mlp` wide
    active_experts: int = 1  # of them, those that a token runs through

    @classmethod
    def of(cls, architecture: Any) -> "Shape":
        """From a transformers config. Raises ModelError where it does not say a size."""
        if missing := [name for name in NEEDED if not getattr(architecture, name, None)]:
            kind = getattr(architecture, "model_type", "unknown")
            raise ModelError(
                f"model.name: its config.json ({kind}) has no {', '.join(missing)}, which its size depends on; "
                "choose a decoder with attention"
            )
        hidden, heads = architecture.hidden_size, architecture.num_attention_heads
        head = getattr(architecture, "head_dim", None) or hidden // heads
        key_heads = getattr(architecture, "num_key_value_heads", None) or heads
        mlp = getattr(architecture, "intermediate_size", None) or 4 * hidden
        routed = max(getattr(architecture, name, None) or 1 for name in EXPERTS)
        shared = 0
        if routed > 1:
            mlp = getattr(architecture, "moe_intermediate_size", None) or mlp
            shared = getattr(architecture, "n_shared_experts", None) or 0
            shared += -(-(getattr(architecture, "shared_expert_intermediate_size", None) or 0) // mlp)
        return cls(
            layers=architecture.num_hidden_layers,
            hidden=hidden,
            mlp=mlp,
            heads=heads,
            query_width=heads * head,
            key_width=key_heads * head,
            vocab=architecture.vocab_size,
            tied=bool(getattr(architecture, "tie_word_embeddings", False)),
            experts=routed + shared,
            active_experts=(getattr(architecture, "num_experts_per_tok", None) or routed) + shared,
        )

    @property
    def computed(self) -> "Shape":
        """The dense model that a token runs through: an MLP as wide as its active experts together."""
        return replace(self, mlp=self.mlp * self.active_experts, experts=1, active_experts=1)

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
        sizes = self.projections.items()
        return self.layers * sum(self._copies(name) * before * after for name, (before, after) in sizes)

    @property
    def parameters(self) -> int:
        norms = (2 * self.layers + 1) * self.hidden
        return self.linear_weights + norms + self.vocab * self.hidden * (1 if self.tied else 2)

    def adapter_weights(self, rank: int, targets: list[str]) -> int:
        """Weights of a LoRA adapter; a target with a name of its own counts as the widest."""
        widest = (self.hidden, self.mlp)
        sums = (self._copies(target) * sum(self.projections.get(target, widest)) for target in targets)
        return self.layers * rank * sum(sums)

    def _copies(self, projection: str) -> int:
        return self.experts if projection in MLP else 1

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
