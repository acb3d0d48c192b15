"""Generation settings, and exact sampling with a random stream of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ipmerge_core.errors import RunError
from ipmerge_core.inference.thinking import ThinkingTokens

if TYPE_CHECKING:
    import torch

MOST_NEW_TOKENS = 2048
MOST_THINKING_TOKENS = 32_768
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class GenerationSettings:
    """Generation settings. Temperature 0 selects the most likely token.

    `max_new_tokens` limits the answer. A model that thinks first may use `max_thinking_tokens` in
    addition; then the end of its thinking part is inserted, so that it answers.
    """

    temperature: float = 0.0
    max_new_tokens: int = 256
    seed: int = 0
    max_thinking_tokens: int = 1024

    def __post_init__(self) -> None:
        """Validate the values. Raises: RunError."""
        if not 0 <= self.temperature <= 5:  # also rejects NaN
            raise RunError(
                f"The temperature is {self.temperature}; expected a number from 0 (greedy "
                f"decoding) to 5."
            )
        if not 1 <= self.max_new_tokens <= MOST_NEW_TOKENS:
            raise RunError(
                f"The number of new tokens is {self.max_new_tokens}; expected an integer from "
                f"1 to {MOST_NEW_TOKENS}."
            )
        if not 0 <= self.seed <= LARGEST_SEED:
            raise RunError(
                f"The seed is {self.seed}; expected an integer from 0 to {LARGEST_SEED}."
            )
        if not 0 <= self.max_thinking_tokens <= MOST_THINKING_TOKENS:
            raise RunError(
                f"The number of thinking tokens is {self.max_thinking_tokens}; expected an integer "
                f"from 0 to {MOST_THINKING_TOKENS}."
            )

    def most_tokens(self, marks: ThinkingTokens) -> int:
        """Return the largest number of tokens of a reply, its thinking part included."""
        return self.max_new_tokens + (self.max_thinking_tokens + 2 if marks.end else 0)


class Sampler:
    """Exact sampling at a temperature with its own seeded random stream.

    Math:   argmax_i (logit_i + T g_i), g_i = -log(-log u_i), draws i with probability
            softmax(logits / T)_i (the Gumbel-max trick, times T, which is finite for every T).
    """

    def __init__(self, settings: GenerationSettings) -> None:
        import torch

        self.temperature = settings.temperature
        self.random = torch.Generator().manual_seed(settings.seed)

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        """Add noise to the scores of one row or of a batch, so that its largest is a sample."""
        import torch

        uniform = torch.rand(scores.shape, generator=self.random, dtype=torch.float64)
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-12)))
        return scores.float() + (self.temperature * gumbel).to(scores.device, torch.float32)
