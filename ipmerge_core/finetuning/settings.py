"""The settings of a fine-tuning run: the prior, the training, and what may be resumed.

In: values of a form or a command line. Out: frozen dataclasses that validate themselves. No torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ipmerge_core.errors import PlanError
from ipmerge_core.finetuning.scope import MOST_STRENGTH, Scope
from ipmerge_core.finetuning.validation import (
    check_choice,
    check_flag,
    check_integer,
    check_number,
    check_texts,
)

RuleName = Literal["adaptive", "grad_norm", "absolute", "none"]
PlacementName = Literal["cpu", "device", "files"]
Precision = Literal["auto", "fp32", "bf16-mixed", "fp16-mixed", "bf16"]
Trained = Literal["language", "all"]
Schedule = Literal["cosine", "linear", "constant_with_warmup"]
RULE_NAMES: tuple[RuleName, ...] = get_args(RuleName)
PLACEMENT_NAMES: tuple[PlacementName, ...] = get_args(PlacementName)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
TRAINED: tuple[Trained, ...] = get_args(Trained)
_NUMBERS = (  # of TrainingSettings, with their ranges
    ("learning_rate", 1e-12, 1.0),
    ("epochs", 1e-3, 10_000),
    ("warmup", 0, 1),
    ("weight_decay", 0, 1),
    ("max_grad_norm", 0, 1e9),
    ("held_out", 0, 0.5),
)
_INTEGERS = (  # with their names in messages, where these are others
    *((name, "", 1, 10_000_000) for name in ("max_steps", "batch_size", "accumulation")),
    *((name, "", 1, 10_000_000) for name in ("patience", "save_every")),
    ("log_every", "", 1, 1_000_000),
    ("seed", "", 0, 2**32 - 1),
    ("longest", "maximum number of tokens", 16, 1_000_000),
    ("most_pixels", "maximum number of pixels", 64, 100_000_000),
)
_OPTIONAL = ("max_steps", "patience", "save_every")


@dataclass(frozen=True)
class PriorSettings:
    """How the prior acts.

    Attributes:
        rule: the gradient rule; "none" is plain supervised fine-tuning, which is measured against
            the prior all the same.
        strength: 1 is alpha = -1 in the paper.
        scope: the parameters that it acts on.
        per_micro_batch: act on every backward pass instead of the accumulated gradient.
        normalize: scale D to the norm of its parameter, see `ReasoningPrior`.
        placement: where D is kept.
    """

    rule: RuleName = "adaptive"
    strength: float = 1.0
    scope: Scope = field(default_factory=Scope)
    per_micro_batch: bool = False
    normalize: bool = False
    placement: PlacementName = "cpu"

    def __post_init__(self) -> None:
        """Validate the values. Raises: PlanError."""
        check_choice("rule", self.rule, RULE_NAMES)
        check_choice("placement of the prior", self.placement, PLACEMENT_NAMES)
        check_number("strength", self.strength, -MOST_STRENGTH, MOST_STRENGTH)
        check_flag("per_micro_batch", self.per_micro_batch)
        check_flag("normalize", self.normalize)

    @property
    def warnings(self) -> list[str]:
        """Remarks on combinations that rarely are what a user wants."""
        found = []
        if self.normalize and self.rule == "absolute":
            found.append(
                "normalize scales the prior to the norm of each weight, and the absolute rule adds "
                "all of it to every gradient: the paper's ablation collapses with it. Use a "
                "strength near 1e-3, or another rule."
            )
        elif self.normalize:
            found.append(f"normalize has no effect on the rule {self.rule}: it uses D / ||D||.")
        if self.rule == "none" and self.strength != 1.0:
            found.append("the strength has no effect without a rule.")
        return found


@dataclass(frozen=True)
class TrainingSettings:
    """How the model is trained; the defaults are those of the paper where it states them.

    Attributes:
        learning_rate, epochs, warmup, schedule: 1e-6, 3, 5 % and cosine.
        max_steps: optimizer steps instead of epochs.
        batch_size: conversations of a micro-batch and process.
        accumulation: micro-batches per optimizer step.
        max_grad_norm: maximum norm of the whole gradient, after the rule; 0 for none.
        precision: "auto" is fp32 on a CPU and bf16-mixed (fp32 weights, bf16 arithmetic) elsewhere.
            "bf16" keeps weights in bf16, in which small steps are rounded away.
        trained: the language model, or all of the model.
        longest: maximum number of tokens of a conversation; longer ones are skipped.
        most_pixels: larger images are scaled down to it.
        held_out: share of the conversations that the loss is evaluated on.
        patience: stop after so many evaluations without a lower loss; needs `held_out`.
        save_every: optimizer steps between two checkpoints and evaluations; by default an epoch.
        log_every: optimizer steps between two points of the curves.
        tokens: tokens to add to the vocabulary, such as `<think>`.
        report_to: integrations of the Trainer, such as trackio or tensorboard.
    """

    learning_rate: float = 1e-6
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 1
    accumulation: int = 1
    warmup: float = 0.05
    schedule: Schedule = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    trained: Trained = "language"
    longest: int = 32_768
    most_pixels: int = 262_144
    held_out: float = 0.0
    patience: int | None = None
    save_every: int | None = None
    log_every: int = 1
    tokens: tuple[str, ...] = ()
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Validate the values. Raises: PlanError."""
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("trained part", self.trained, TRAINED)
        check_choice("schedule", self.schedule, get_args(Schedule))
        check_flag("gradient_checkpointing", self.gradient_checkpointing)
        for name, least, most in _NUMBERS:
            check_number(name.replace("_", " "), getattr(self, name), least, most)
        for name, words, first, last in _INTEGERS:
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                check_integer(words or name.replace("_", " "), value, first, last)
        check_texts("added tokens", self.tokens)
        check_texts("integrations", self.report_to)
        if self.patience is not None and not self.held_out:
            raise PlanError(
                "Early stopping needs a loss that training does not minimise: set a held-out share "
                "such as 0.05."
            )
        for token in self.tokens:
            if not token.strip() or len(token) > 100 or not token.isprintable():
                raise PlanError(
                    f"Cannot add the token {token[:80]!r}; expected 1 to 100 printable characters."
                )


@dataclass(frozen=True)
class DriftSettings:
    """All settings of a run."""

    prior: PriorSettings = field(default_factory=PriorSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def as_json(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> DriftSettings:
        """Return the settings that `as_json` returned. Raises: PlanError for other content."""
        try:
            prior, training = dict(content["prior"]), dict(content["training"])
            scope = dict(prior.pop("scope"))
            scope["strengths"] = tuple((pattern, s) for pattern, s in scope["strengths"])
            scope["modules"] = tuple(scope["modules"])
            training |= {name: tuple(training[name]) for name in ("tokens", "report_to")}
            made = PriorSettings(scope=Scope(**scope), **prior)
            return cls(made, TrainingSettings(**training))
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"The settings of the run are damaged ({error}).") from error

    def digest(self, sources: Mapping[str, str]) -> str:
        """Return the SHA-256 of everything that determines the result, to resume the same work.

        Where the prior is kept and what is logged do not change the result.
        """
        content = self.as_json()
        content["prior"].pop("placement")
        for name in ("report_to", "log_every"):
            content["training"].pop(name)
        text = json.dumps({**content, "sources": dict(sources)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def training_folder(out: Path) -> Path:
    """Return the folder of the checkpoints of an unfinished run.

    >>> training_folder(Path("models/a")).name
    'a.training'
    """
    return out.with_name(f"{out.name}.training")
