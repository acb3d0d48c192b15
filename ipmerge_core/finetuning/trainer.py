"""A `transformers.Trainer` whose gradients are tilted by a `GradientGuide`.

In: a model, its guide, examples and `TrainingSettings`. Out: a Trainer that reports every step and
can be stopped at any of them, with a checkpoint. The rule acts after the gradients of all
micro-batches and processes are averaged and before they are clipped. Parameters that are
partitioned over processes (FSDP, DeepSpeed) are refused: the rule needs norms of whole tensors.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ipmerge_core.errors import RunError, explained, first_line
from ipmerge_core.finetuning.dataset import Datasets
from ipmerge_core.finetuning.examples import collate
from ipmerge_core.finetuning.guidance import GradientGuide, measure_distances
from ipmerge_core.finetuning.settings import DriftSettings, Precision, TrainingSettings
from ipmerge_core.runtime.atomic import write_whole, writing

COMPLETE = "ipmerge-complete.json"  # written last: a checkpoint without it is of a killed process
_PARTITIONING = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
_SMALL = 50_000_000  # elements of the prior up to which distances are measured with every log
KEPT_CHECKPOINTS = 2
_KEPT = "complete checkpoints are kept"

Logs = dict[str, float]


class TrainerHooks(NamedTuple):
    """What the trainer calls: with the step and its logs, and whether to stop after it."""

    log: Callable[[int, int, Logs], None]
    must_stop: Callable[[], bool]


def refuse_partitioning(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse launchers that partition parameters or gradients over processes.

    Raises: RunError for FSDP, and for DeepSpeed in any stage.
    """
    for variable, name in _PARTITIONING.items():
        if environment.get(variable, "").lower() in ("1", "true", "yes"):
            raise RunError(
                f"DRIFT does not support {name}: its rules need the norm and the direction of "
                f"whole gradients, which {name} partitions over the processes. Launch with plain "
                f"data parallelism (accelerate launch --multi_gpu, or torchrun)."
            )


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Hide the progress bars of transformers, next to those of a run."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def join_processes(device: str) -> None:
    """Connect the processes of a launcher once for the whole run, as the Trainer expects them.

    Call it before `Ranks` is entered: a second group on the same store can wait forever for an
    address of the first. Raises: RunError if they cannot be connected.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        def failed(error: Exception) -> RunError:
            return RunError(
                f"Cannot connect the processes of the launcher ({first_line(error)}). Start with "
                f"`torchrun` or `accelerate launch`, or unset WORLD_SIZE."
            )

        with explained(failed):
            PartialState(cpu=device == "cpu")


def _refuse_partitioned(trainer: Any) -> None:  # noqa: ANN401
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        refuse_partitioning(dict.fromkeys(_PARTITIONING, "true"))


def _loss_scale(accelerator: Any) -> float:  # noqa: ANN401
    """Return the factor of the loss, which only fp16 training has."""
    scaler = accelerator.scaler
    return 1.0 if scaler is None else float(scaler.get_scale())


def resolve_precision(precision: Precision, device: str) -> Precision:
    """Return the precision on a device; "auto" is fp32 on a CPU and bf16-mixed elsewhere.

    Raises: RunError for fp16 on a CPU, which has no loss scaling.

    >>> resolve_precision("auto", "cpu")
    'fp32'
    """
    on_cpu = device.partition(":")[0] == "cpu"
    if precision == "fp16-mixed" and on_cpu:
        raise RunError("fp16-mixed needs a GPU. Use bf16-mixed or fp32 on a CPU.")
    if precision == "auto":
        return "fp32" if on_cpu else "bf16-mixed"
    return precision


def training_arguments(how: TrainingSettings, folder: Path, device: str, *, evaluates: bool) -> Any:  # noqa: ANN401
    """Return the arguments of the Trainer for these settings."""
    from transformers import TrainingArguments

    strategy = "epoch" if how.save_every is None else "steps"
    every = {} if how.save_every is None else {"save_steps": how.save_every}
    if evaluates and how.save_every is not None:
        every["eval_steps"] = how.save_every
    precision = resolve_precision(how.precision, device)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=how.batch_size,
        per_device_eval_batch_size=how.batch_size,
        gradient_accumulation_steps=how.accumulation,
        num_train_epochs=how.epochs,
        max_steps=how.max_steps or -1,
        learning_rate=how.learning_rate,
        lr_scheduler_type=how.schedule,
        warmup_steps=how.warmup if how.warmup < 1 else 0.99,
        weight_decay=how.weight_decay,
        max_grad_norm=how.max_grad_norm,
        seed=how.seed,
        bf16=precision == "bf16-mixed",
        fp16=precision == "fp16-mixed",
        logging_steps=how.log_every,
        logging_nan_inf_filter=False,  # a loss that is not finite raises an error instead
        save_strategy=strategy,
        eval_strategy=strategy if evaluates else "no",
        save_total_limit=KEPT_CHECKPOINTS,
        load_best_model_at_end=evaluates,
        metric_for_best_model="eval_loss" if evaluates else None,
        greater_is_better=False if evaluates else None,
        report_to=list(how.report_to) or "none",
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
        remove_unused_columns=False,
        disable_tqdm=True,
        prediction_loss_only=True,
        ddp_find_unused_parameters=how.trained == "all",  # the language model uses all of its own
        **every,
    )
    _refuse_other_device(device, arguments.device)
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs need several processes
    return arguments


def _refuse_other_device(wanted: str, found: torch.device) -> None:
    """Refuse a device that the Trainer does not use: it takes the first that is visible."""
    kind, _, index = wanted.partition(":")
    if found.type != kind or (index and int(index) != (found.index or 0)):
        raise RunError(
            f"The Trainer uses '{found}' where '{wanted}' is requested. Select a GPU with "
            f"CUDA_VISIBLE_DEVICES={index or 0} and --device {kind}."
        )


def make_trainer(
    model: Any,  # noqa: ANN401
    guide: GradientGuide,
    data: Datasets,
    settings: DriftSettings,
    folder: Path,
    device: str,
    hooks: TrainerHooks,
) -> Any:  # noqa: ANN401
    """Return a Trainer for a model whose trainable parameters require a gradient."""
    from transformers import EarlyStoppingCallback, PrinterCallback

    how = settings.training
    pad = data.encoder.processor.tokenizer.pad_token_id
    evaluates = len(data.held_out) > 0
    callbacks: list[Any] = [_reporting(hooks)]
    if how.patience is not None:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=how.patience))
    trainer = _guided_trainer()(
        guide=guide,
        on_each_backward=settings.prior.per_micro_batch,
        model=model,
        args=training_arguments(how, folder, device, evaluates=evaluates),
        train_dataset=data.train,
        eval_dataset=data.held_out if evaluates else None,
        data_collator=partial(collate, pad=0 if pad is None else pad),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


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


def _reporting(hooks: TrainerHooks) -> Any:  # noqa: ANN401
    """Return a callback that reports logs and stops after a step, with a checkpoint."""
    from transformers import TrainerCallback

    class Reporting(TrainerCallback):  # type: ignore[misc]
        """Calls the hooks; all processes stop after the same step."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Logs, **_: Any) -> None:  # noqa: ANN401
            hooks.log(state.global_step, state.max_steps, logs)
            self._stop(args, control)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
            self._stop(args, control)

        def _stop(self, args: Any, control: Any) -> None:  # noqa: ANN401
            if _agreed(hooks.must_stop(), args):
                control.should_training_stop = control.should_save = True

    return Reporting()


def _agreed(stop: bool, arguments: Any) -> bool:  # noqa: ANN401
    """Return whether any process is to stop."""
    if arguments.world_size <= 1:
        return stop
    flag = torch.tensor(float(stop), device=arguments.device)
    torch.distributed.all_reduce(flag)
    return bool(flag > 0)


def _refuse_non_finite(loss: torch.Tensor, step: int) -> None:
    if not torch.isfinite(loss):
        raise RunError(
            f"The loss is {float(loss)} in step {step}. The last checkpoint is kept; train with a "
            f"lower learning rate or a smaller strength."
        )


@contextmanager
def _completed(folder: Path, *, first: bool) -> Iterator[None]:
    """Mark a checkpoint as complete at the end, or remove it; a full disk becomes a RunError.

    `first` is whether this process is the one that writes the mark.
    """
    try:
        with writing(folder, _KEPT):
            yield
    except BaseException:
        if first:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if first and folder.is_dir():
        write_whole(folder / COMPLETE, "{}\n", _KEPT)


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
            f"run the same command again; {_KEPT}."
        ) from error


def _guided_trainer() -> Any:  # noqa: ANN401
    """Return the subclass of Trainer; transformers is imported when it is first needed."""
    from transformers import Trainer

    class GuidedTrainer(Trainer):  # type: ignore[misc]
        """A Trainer that applies a guide, logs the alignment, and saves checkpoints safely."""

        def __init__(self, guide: GradientGuide, on_each_backward: bool, **how: Any) -> None:  # noqa: ANN401
            super().__init__(**how)
            self.guide, self.on_each_backward = guide, on_each_backward
            guide.loss_scale = partial(_loss_scale, self.accelerator)
            _refuse_partitioned(self)

        def training_step(self, *arguments: Any, **how: Any) -> torch.Tensor:  # noqa: ANN401
            """Compute the gradients of a micro-batch, and tilt them after the last of a step."""
            loss: torch.Tensor = super().training_step(*arguments, **how)
            _refuse_non_finite(loss, self.state.global_step + 1)
            if not self.on_each_backward and self.accelerator.sync_gradients:
                self.guide.act()
            return loss

        def log(self, logs: Logs, *arguments: Any, **how: Any) -> None:  # noqa: ANN401
            """Add the alignment and the distances, for all integrations."""
            if "loss" in logs:
                logs["cosine"] = self.guide.take_cosine()
            if "eval_loss" in logs or self.guide.prior.match.numel <= _SMALL:
                logs |= measure_distances(self.guide.guided, self.guide.prior)._asdict()
            super().log(logs, *arguments, **how)

        def _save_checkpoint(self, *arguments: Any, **how: Any) -> None:  # noqa: ANN401
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
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
