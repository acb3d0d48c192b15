"""Live columns: the base model and merges of it, answered from one copy of the weights.

In: a loaded MLLM, and merges of it as columns. Out: the replies of several rows, each exactly that
of its column loaded alone. An IP-Merging plan is a column of gains on factors, so
that another threshold, lambda or override takes effect at the next question. Any other plan and any
finished model is a column of the tensors that differ; all others are shared. Rows of the base and
of factors are generated in one batch where the inputs of the family allow it; the columns of
tensors take turns with them, one token each.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ipmerge_core.adapters.columns import Column, Row, why_not_factors
from ipmerge_core.adapters.factor_set import FactorSet
from ipmerge_core.adapters.first_difference import TokenChoice, next_choices
from ipmerge_core.adapters.hooks import Additions, FactorHooks
from ipmerge_core.errors import IPMergeError, ModelLoadError, PlanError, explained
from ipmerge_core.inference.batched_generation import join
from ipmerge_core.inference.generation import encode_messages, on_device, run_in_turns
from ipmerge_core.inference.loading import LoadedModel
from ipmerge_core.inference.prompts import Message
from ipmerge_core.inference.rows import RowTokens
from ipmerge_core.inference.sampling import GenerationSettings
from ipmerge_core.inference.shared_weights import SwappedWeights, weights_in_memory
from ipmerge_core.inference.streaming import Job, RowState, Stream, failed_generation, stream_jobs
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.models.pairing import ModelPair
from ipmerge_core.planning.plan import MergePlan


class _Member(NamedTuple):
    """One row of a batch, with its own inputs."""

    column: Column
    stream: Stream
    inputs: Mapping[str, Any]


class LiveModel:
    """A loaded model whose rows are answered by different columns at the same time.

    Columns are values: any number of them, and several conversations in different threads, share
    one model, which they use in turns.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self._hooks = FactorHooks(loaded.model)
        self._batches = True  # until the model has failed to run a batch
        self._lock = threading.Lock()

    # --- columns ---

    def base(self, name: str = "base") -> Column:
        """Return the column of the unchanged model."""
        return Column(name, "base", {})

    def holds(self, factors: FactorSet) -> bool:
        """Return whether the factors are on the device already."""
        return self._hooks.holds(factors)

    def add_factors(self, factors: FactorSet, pair: ModelPair) -> int:
        """Put the factors of a pair next to the model; returns the bytes they take there.

        Every plan of that variant is then a column without further work.

        Raises:
            PlanError: the pair's MLLM is another model, or a matrix is not the weight of a module.
            ModelLoadError: transformers cannot build the model, to find its modules.
        """
        self._refuse_other(pair.mllm.fingerprint, pair.mllm.id)
        with self._lock:
            return self._hooks.add(factors, pair)

    def drop_factors(self, factors: FactorSet) -> None:
        """Release the memory of a set of factors; its columns can no longer answer."""
        with self._lock:
            self._hooks.drop(factors)

    def plan_column(self, name: str, plan: MergePlan, factors: FactorSet) -> Column:
        """Return the column of an IP-Merging plan, which only selects and scales factors.

        Raises: PlanError if the plan is of another model or variant, or merges what has no factors:
            experts of a mixture, norms, biases or rows of the vocabulary.
        """
        self._refuse_other(plan.sources.mllm.fingerprint, plan.sources.mllm.id)
        if reason := why_not_factors(plan):
            raise PlanError(reason)
        gains = {
            (decision.name, expert): float(plan.parameters_for(decision.layer)["lambda_"] or 0.0)
            for decision in plan.selected
            for expert in decision.experts
        }
        unknown = [name for name, expert in gains if (name, expert) not in factors.factors]
        if unknown or not self.holds(factors):
            what = f"'{unknown[0]}' has no factors" if unknown else "the factors are not loaded"
            raise PlanError(
                f"Plan {plan.hash} cannot be a live column: {what}. Prepare them first."
            )
        return Column(name, "factors", gains, factors)

    def tensor_column(self, name: str, mllm: Checkpoint, tensors: Mapping[str, Tensor]) -> Column:
        """Return a column with tensors of its own, by the names of the MLLM's files.

        They are those of `iter_merged_tensors` or `changed_tensors`; everything else is shared.

        Raises: PlanError for tensors of another model; ModelLoadError for a quantised one.
        """
        self._refuse_other(mllm.fingerprint, mllm.id)
        weights = SwappedWeights(self.loaded, weights_in_memory(mllm, tensors))
        return Column(name, "tensors", {}, weights=weights, nbytes=weights.nbytes)

    # --- answers ---

    def stream(
        self, rows: Sequence[Row], stops: Sequence[threading.Event] = ()
    ) -> Iterator[list[RowState]]:
        """Answer all rows at the same time; yields the state of every row, in order.

        Closing the generator, or setting one of `stops`, ends all rows at the next token. A row
        whose prompt cannot be encoded fails alone, with the reason in its state.
        """
        closed = threading.Event()
        marks = self.loaded.processor.thinking
        streams: list[Stream] = []
        encoded: list[dict[str, Any] | None] = []
        known: dict[int, dict[str, Any] | IPMergeError] = {}
        for row in rows:
            found = known.get(id(row.messages)) or self._encoded(row, stops)
            known[id(row.messages)] = found
            tokens = RowTokens(row.settings, [closed, *stops, *row.stops])
            stream = Stream(tokens)
            if isinstance(found, IPMergeError):
                stream.error, stream.is_done = found, True
            else:
                tokens.opened = marks.opens(found["input_ids"][0].tolist())
                tokens.is_thinking = tokens.opened
            streams.append(stream)
            encoded.append(None if isinstance(found, IPMergeError) else found)
        jobs = self._jobs(rows, streams, encoded)
        yield from stream_jobs(jobs, streams, self.loaded.processor, marks, closed)

    def strip(
        self,
        column: Column,
        gains: Sequence[float],
        messages: Sequence[Message],
        settings: GenerationSettings | None = None,
        stops: Sequence[threading.Event] = (),
    ) -> Iterator[list[RowState]]:
        """Answer one conversation with a column at several gains, in one batch.

        Raises: PlanError for a column of tensors.
        """
        how = settings or GenerationSettings()
        columns = [column.scaled(gain) for gain in gains]
        return self.stream([Row(each, messages, how) for each in columns], stops)

    def next_tokens(
        self,
        rows: Sequence[Row],
        prefix: Sequence[int],
        top: int = 5,
        stops: Sequence[threading.Event] = (),
    ) -> list[list[TokenChoice]]:
        """Return the likely next tokens of each row after a shared beginning of the reply.

        One pass over the prompt and the prefix. `top` choices per row, the most likely first.

        Raises: as `encode_messages`; ModelLoadError if the model fails; RunCancelled.
        """
        return next_choices(self, rows, prefix, top, stops)

    # --- the model ---

    def groups(
        self, rows: Sequence[Row], encoded: Sequence[Mapping[str, Any] | None]
    ) -> list[tuple[list[int], dict[str, Any]]]:
        """Divide the rows into batches: their numbers, and the combined inputs.

        A column of tensors has batches of its own. Rows whose inputs cannot be combined are alone.
        """
        pad = self.loaded.model.generation_config.pad_token_id or 0
        places: dict[int, list[int]] = {}
        for number, (row, inputs) in enumerate(zip(rows, encoded, strict=True)):
            if inputs is not None:
                places.setdefault(id(row.column.weights), []).append(number)
        found: list[tuple[list[int], dict[str, Any]]] = []
        for numbers in places.values():
            given = [inputs for n in numbers if (inputs := encoded[n]) is not None]
            batch = join(given, pad) if self._batches or len(given) == 1 else None
            if batch is not None:
                found.append((numbers, batch))
            else:
                found += [([n], dict(inputs)) for n, inputs in zip(numbers, given, strict=True)]
        return found

    def installed(self, columns: Sequence[Column]) -> tuple[Callable[[], None], Callable[[], None]]:
        """Return the functions that prepare the model for a batch, and undo it.

        Raises: PlanError for a column whose factors were dropped.
        """
        return self._functions(columns[0].weights, self._hooks.additions(columns))

    def _functions(
        self, weights: SwappedWeights | None, added: Additions
    ) -> tuple[Callable[[], None], Callable[[], None]]:
        def install() -> None:
            self._hooks.installed = added
            if weights is not None:
                weights.install()

        def remove() -> None:
            self._hooks.installed = Additions()
            if weights is not None:
                weights.remove()

        return install, remove

    def _encoded(self, row: Row, stops: Sequence[threading.Event]) -> dict[str, Any] | IPMergeError:
        try:
            return encode_messages(self.loaded, row.messages, [*stops, *row.stops])
        except IPMergeError as error:
            return error

    def _jobs(
        self,
        rows: Sequence[Row],
        streams: Sequence[Stream],
        encoded: Sequence[Mapping[str, Any] | None],
    ) -> list[Job]:
        jobs = []
        for numbers, inputs in self.groups(rows, encoded):
            members = [_Member(rows[n].column, streams[n], encoded[n] or {}) for n in numbers]
            own = [member.stream for member in members]
            jobs.append(Job(partial(self._answer, members, inputs), own, self.loaded.folder.name))
        return jobs

    def _answer(self, members: Sequence[_Member], inputs: Mapping[str, Any]) -> None:
        """Answer a batch; where the model cannot run it as one, each row by itself.

        Not every family batches its images. Rows that have begun are never started again.
        """
        name = self.loaded.folder.name
        try:
            with explained(partial(failed_generation, name)):
                self._answer_batch(members, inputs)
        except ModelLoadError as error:
            has_begun = any(member.stream.tokens.ids for member in members)
            if error.__cause__ is None or has_begun or len(members) == 1:
                raise
            self._batches = isinstance(error.__cause__, torch.OutOfMemoryError)
            jobs = [
                Job(partial(self._answer_batch, [member], member.inputs), [member.stream], name)
                for member in members
            ]
            for thread in [job.start() for job in jobs]:
                thread.join()

    def _answer_batch(self, members: Sequence[_Member], inputs: Mapping[str, Any]) -> None:
        columns = [member.column for member in members]
        for member in members:
            member.stream.is_batched = len(members) > 1
        added = self._hooks.additions(columns)
        functions = self._functions(columns[0].weights, added)
        ready = on_device(inputs, self.loaded.model.device)
        rows = [member.stream.tokens for member in members]
        run_in_turns(self.loaded, ready, rows, *functions)
        unused = set(added.modules) - added.used
        if unused and rows[0].ids:
            error = ModelLoadError(
                f"'{self.loaded.folder.name}' does not call its layer '{min(unused)}', so that the "
                f"merge had no effect there. Merge into a folder instead."
            )
            for member in members:
                member.stream.error = error

    def _refuse_other(self, fingerprint: str, name: str) -> None:
        if fingerprint != self.loaded.fingerprint:
            raise PlanError(
                f"The plan is one of '{name}', whose weights are not those of the loaded "
                f"'{self.loaded.folder.name}'. Load that model, or make the plan from this one."
            )
