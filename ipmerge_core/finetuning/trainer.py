"""Set up a `GuidedTrainer` from the settings of a run, and refuse what it cannot train.

In: a model, its guide, examples and `TrainingSettings`. Out: a Trainer that reports every step and
can be stopped at any of them, with a checkpoint. Parameters that are partitioned over processes
(FSDP, DeepSpeed) are refused: the rule needs norms of whole tensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ipmerge_core.errors import RunError, explained, first_line
from ipmerge_core.finetuning.dataset import Datasets
from ipmerge_core.finetuning.examples import collate
from ipmerge_core.finetuning.guidance import GradientGuide
from ipmerge_core.finetuning.guided_trainer import Logs, guided_trainer, unreadable
from ipmerge_core.finetuning.settings import DriftSettings, Precision, TrainingSettings

_PARTITIONING = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
KEPT_CHECKPOINTS = 2


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


def refuse_integrations(names: Sequence[str]) -> None:
    """Refuse integrations of the Trainer that are unknown or not installed. Raises: RunError."""
    if not names:
        return
    from transformers.integrations import get_available_reporting_integrations

    available = get_available_reporting_integrations()
    missing = next((name for name in names if name not in available), None)
    if missing is not None:
        raise RunError(
            f"The integration '{missing[:80]}' is unknown or not installed. Available here: "
            f"{', '.join(available) or 'none'}. Install it, or omit --report-to."
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
    from transformers import PrinterCallback

    how = settings.training
    pad = data.encoder.processor.tokenizer.pad_token_id
    evaluates = len(data.held_out) > 0
    trainer = guided_trainer()(
        guide=guide,
        patience=how.patience,
        on_each_backward=settings.prior.per_micro_batch,
        model=model,
        args=training_arguments(how, folder, device, evaluates=evaluates),
        train_dataset=data.train,
        eval_dataset=data.held_out if evaluates else None,
        data_collator=partial(collate, pad=0 if pad is None else pad),
        callbacks=[_reporting(hooks, how.patience)],
    )
    _refuse_partitioned(trainer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def evaluations_without_gain(history: Sequence[Mapping[str, Any]]) -> int:
    """Count the evaluations since the one with the lowest held-out loss.

    >>> evaluations_without_gain([{"eval_loss": 2.0}, {"loss": 0.1}, {"eval_loss": 2.0}])
    1
    """
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def load_finished(trainer: Any, checkpoint: str) -> bool:  # noqa: ANN401
    """Load the result of a training that ended at a checkpoint, or return False.

    The Trainer itself would train to the end of an epoch that it has begun. Raises: RunError if the
    checkpoint cannot be read.
    """
    from transformers.trainer_callback import TrainerState

    with explained(partial(unreadable, checkpoint)):
        state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        spent = evaluations_without_gain(state.log_history)
        stopped_early = trainer.patience is not None and spent >= trainer.patience
        if state.global_step < state.max_steps and not stopped_early:
            return False
        trainer.state = state
        if state.best_model_checkpoint is None:
            trainer._load_from_checkpoint(checkpoint)
        else:
            trainer._load_best_model()
        return True


def _reporting(hooks: TrainerHooks, patience: int | None) -> Any:  # noqa: ANN401
    """Return a callback that reports logs and stops after a step, with a checkpoint.

    It also stops early: how long the loss has not fallen follows from the history, which a
    checkpoint has, so that a resumed run stops at the same step.
    """
    from transformers import TrainerCallback

    class Reporting(TrainerCallback):  # type: ignore[misc]
        """Calls the hooks; all processes stop after the same step."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Logs, **_: Any) -> None:  # noqa: ANN401
            hooks.log(state.global_step, state.max_steps, logs)
            self._stop(args, control)

        def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
            if patience is not None and evaluations_without_gain(state.log_history) >= patience:
                control.should_training_stop = True

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
