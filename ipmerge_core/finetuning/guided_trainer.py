"""A `transformers.Trainer` whose gradients are tilted by a `GradientGuide`, with safe checkpoints.

In: what a Trainer takes, and a guide. Out: its subclass. The rule acts after the gradients of all
micro-batches and processes are averaged and before they are clipped. A loss or weights that are not
finite end the run before they are saved; a checkpoint that cannot be read is one clear error.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ipmerge_core.errors import RunError, explained, first_line
from ipmerge_core.finetuning.checkpoints import KEPT, is_complete, mark_complete
from ipmerge_core.finetuning.guidance import GradientGuide, measure_distances
from ipmerge_core.runtime.atomic import writing

_SMALL = 50_000_000  # elements of the prior up to which distances are measured with every log

Logs = dict[str, float]


def refuse_incomplete(model: torch.nn.Module, loaded: Any) -> None:  # noqa: ANN401
    """Raise RunError if a checkpoint did not have every weight of a model; tied ones count once."""
    weights = model.state_dict()
    found = {weights[n].data_ptr() for n in weights if n not in set(loaded.missing_keys)}
    missing = [n for n in loaded.missing_keys if weights[n].data_ptr() not in found]
    wrong = [*missing, *loaded.unexpected_keys]
    if wrong:
        raise RunError(
            f"The checkpoint does not fit the model: {len(missing)} weights are missing and "
            f"{len(loaded.unexpected_keys)} unexpected, such as '{wrong[0]}'. It is damaged or of "
            f"another version of transformers; start over with --no-resume."
        )


def unreadable(checkpoint: str, error: Exception) -> RunError:
    """Return the error for a checkpoint that another library cannot read."""
    return RunError(
        f"The checkpoint '{checkpoint}' cannot be read ({first_line(error)}). Delete its folder to "
        f"continue from the one before it, or start over with --no-resume."
    )


def _loss_scale(accelerator: Any) -> float:  # noqa: ANN401
    """Return the factor of the loss, which only fp16 training has."""
    scaler = accelerator.scaler
    return 1.0 if scaler is None else float(scaler.get_scale())


def _refuse_non_finite(loss: torch.Tensor | float, step: int, which: str = "loss") -> None:
    if not math.isfinite(float(loss)):
        raise RunError(
            f"The {which} is {float(loss)} in step {step}. The last checkpoint is kept; train with "
            f"a lower learning rate or a smaller strength."
        )


def _refuse_diverged(model: torch.nn.Module, step: int) -> None:
    """Refuse to save weights with which no run could continue."""
    trained = (p for p in model.parameters() if p.requires_grad)
    if not all(bool(torch.isfinite(parameter).all()) for parameter in trained):
        raise RunError(
            f"Weights are NaN or infinite after step {step}. The checkpoint before it is kept; "
            f"train with a lower learning rate or a smaller strength."
        )


def _add_figures(logs: Logs, guide: GradientGuide, step: int) -> None:
    """Add the alignment and the distances. Raises: RunError for a held-out loss that is NaN."""
    if "eval_loss" in logs:
        _refuse_non_finite(logs["eval_loss"], step, "held-out loss")
    if "loss" in logs:
        logs["cosine"] = guide.take_cosine()
    if "eval_loss" in logs or guide.prior.match.numel <= _SMALL:
        logs |= measure_distances(guide.guided, guide.prior)._asdict()


@contextmanager
def _completed(folder: Path, *, first: bool) -> Iterator[None]:
    """Mark a checkpoint as complete at the end, or remove it; a full disk becomes a RunError.

    `first` is whether this process is the one that writes the mark.
    """
    try:
        with writing(folder, KEPT):
            yield
    except BaseException:
        if first:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if first and folder.is_dir():
        mark_complete(folder)


@contextmanager
def _stream_errors(folder: Path) -> Iterator[None]:
    """Convert the error with which torch.save reports a full disk."""
    try:
        yield
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        raise RunError(
            f"Cannot write the checkpoint '{folder}' ({first_line(error)}). Free some space, then "
            f"run the same command again; {KEPT}."
        ) from error


class _ReadsCheckpoints:
    """Reads checkpoints like a Trainer, with clear errors."""

    def _load_from_checkpoint(self, checkpoint: str, *rest: Any) -> None:  # noqa: ANN401
        with explained(partial(unreadable, checkpoint)):
            super()._load_from_checkpoint(checkpoint, *rest)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        """Find the best checkpoint in the current folder, which may have been moved."""
        trainer: Any = self
        best = Path(trainer.args.output_dir) / Path(trainer.state.best_model_checkpoint).name
        if not is_complete(best):
            raise unreadable(str(best), FileNotFoundError("it has the best weights"))
        trainer.state.best_model_checkpoint = str(best)
        with explained(partial(unreadable, str(best))):
            super()._load_best_model()  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with explained(partial(unreadable, str(checkpoint))):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with explained(partial(unreadable, str(checkpoint))):
            super()._load_rng_state(checkpoint)  # type: ignore[misc]


def guided_trainer() -> Any:  # noqa: ANN401
    """Return the subclass of Trainer; transformers is imported when it is first needed."""
    from transformers import Trainer

    class GuidedTrainer(_ReadsCheckpoints, Trainer):  # type: ignore[misc]
        """A Trainer that applies a guide, logs the alignment, and saves checkpoints safely."""

        def __init__(
            self,
            guide: GradientGuide,
            on_each_backward: bool,
            patience: int | None,
            **how: Any,  # noqa: ANN401
        ) -> None:
            super().__init__(**how)
            self.guide, self.on_each_backward = guide, on_each_backward
            self.patience = patience
            guide.loss_scale = partial(_loss_scale, self.accelerator)

        def training_step(self, *arguments: Any, **how: Any) -> torch.Tensor:  # noqa: ANN401
            """Compute the gradients of a micro-batch, and tilt them after the last of a step."""
            loss: torch.Tensor = super().training_step(*arguments, **how)
            _refuse_non_finite(loss, self.state.global_step + 1)
            if not self.on_each_backward and self.accelerator.sync_gradients:
                self.guide.act()
            return loss

        def log(self, logs: Logs, *arguments: Any, **how: Any) -> None:  # noqa: ANN401
            """Add the alignment and the distances, for all integrations."""
            _add_figures(logs, self.guide, self.state.global_step)
            super().log(logs, *arguments, **how)

        def _save_checkpoint(self, *arguments: Any, **how: Any) -> None:  # noqa: ANN401
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            _refuse_diverged(self.model, self.state.global_step)
            with _completed(folder, first=self.args.should_save), _stream_errors(folder):
                super()._save_checkpoint(*arguments, **how)

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ANN401
            """Save the weights by their names in memory, which is what the Trainer loads.

            By default a vision-language model is saved by the names of the hub, and the Trainer
            then loads none of its weights when it resumes, without an error.
            """
            if self.args.should_save:
                folder = self.args.output_dir if output_dir is None else output_dir
                self.model.save_pretrained(
                    folder, state_dict=state_dict, save_original_format=False
                )

        def _issue_warnings_after_load(self, load_result: Any) -> None:  # noqa: ANN401
            refuse_incomplete(self.model, load_result)

    return GuidedTrainer
