"""Live columns: the base model and merges of it, answered from one copy of the weights.

In: a loaded MLLM, and merges of it as columns. Out: the replies of several rows, each exactly what
its column would say if it were loaded alone. An IP-Merging plan is a column of gains on factors, so
that another threshold, lambda or override takes effect at the next question. Any other plan and any
finished model is a column of the tensors that differ; all others are shared. Rows of the base and
of factors are generated in one batch where the inputs of the family allow it; the columns of
tensors take turns with them, one token each.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ipmerge_core.adapters.factor_set import FactorSet
from ipmerge_core.adapters.first_difference import TokenChoice, next_choices
from ipmerge_core.errors import IPMergeError, ModelLoadError, PlanError
from ipmerge_core.inference.batching import combine_inputs
from ipmerge_core.inference.generation import encode_messages, on_device, run_in_turns
from ipmerge_core.inference.loading import LoadedModel
from ipmerge_core.inference.module_names import module_names
from ipmerge_core.inference.prompts import Message
from ipmerge_core.inference.rows import RowTokens
from ipmerge_core.inference.sampling import GenerationSettings
from ipmerge_core.inference.shared_weights import SwappedWeights, weights_in_memory
from ipmerge_core.inference.streaming import Job, RowState, Stream, stream_jobs
from ipmerge_core.models.addresses import split_address
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.models.matrix_kinds import is_expert
from ipmerge_core.models.pairing import ModelPair
from ipmerge_core.planning.plan import MergePlan


@dataclass(frozen=True, eq=False)
class Column:
    """One model on the shared weights.

    Attributes:
        name: what the caller calls it.
        kind: "base" for the unchanged model, "factors" for gains on factors, "tensors" for tensors
            of its own.
        gains: the gain on the factors of each matrix and expert.
        factors: the set that the gains belong to.
        weights: the tensors of its own.
        nbytes: memory in addition to the model and to factors that other columns share.
    """

    name: str
    kind: Literal["base", "factors", "tensors"]
    gains: Mapping[tuple[str, int], float]
    factors: FactorSet | None = None
    weights: SwappedWeights | None = None
    nbytes: int = 0

    def scaled(self, gain: float, name: str = "") -> Column:
        """Return the column with all gains multiplied: lambda times `gain`.

        Raises: PlanError for a column of tensors, whose change is not kept apart.
        """
        if self.kind == "tensors":
            raise PlanError(
                f"'{self.name}' is not a column of factors, so that its lambda cannot be scaled. "
                f"Use a plan of IP-Merging with projection."
            )
        gains = {key: gain * value for key, value in self.gains.items()}
        return Column(name or f"{self.name} x {gain:g}", self.kind, gains, self.factors)


class Row(NamedTuple):
    """A conversation to continue with one column; `stops` are events that end this row only."""

    column: Column
    messages: Sequence[Message]
    settings: GenerationSettings = GenerationSettings()
    stops: Sequence[threading.Event] = ()


class _Entry(NamedTuple):
    """Where the factors of one matrix and expert are among the directions of a module."""

    key: tuple[str, int]
    start: int
    stop: int


@dataclass
class _Stack:
    """The factors of a set on one module, next to each other: dW = B diag(gains) A.

    Shapes: A (q, n), B (m, q); q is the sum of the ranks of all its matrices and experts.
    """

    A: Tensor
    B: Tensor
    entries: list[_Entry]

    def gains(self, columns: Sequence[Column]) -> Tensor | None:
        """Return the gain of every row on every direction, (rows, q); None if all are zero."""
        found = self.A.new_zeros(len(columns), len(self.A))
        for row, column in enumerate(columns):
            for key, start, stop in self.entries:
                found[row, start:stop] = column.gains.get(key, 0.0)
        return found if bool(found.any()) else None


class _Active(NamedTuple):
    """What a hook adds to the output of its module: dy = ((x A^T) gains) B^T."""

    stack: _Stack
    gains: Tensor


class _Installed(NamedTuple):
    """What the hooks of a batch add, by module, and the modules that have run since."""

    modules: Mapping[str, list[_Active]] = {}
    used: set[str] = set()  # noqa: RUF012 (the empty one is never written)


class LiveModel:
    """A loaded model whose rows are answered by different columns at the same time.

    Columns are values: any number of them, and several conversations in different threads, share
    one model, which they use in turns.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self._stacks: dict[tuple[str, float, int], dict[str, _Stack]] = {}
        self._installed = _Installed()
        self._hooks: dict[str, Any] = {}
        self._lock = threading.Lock()

    # --- columns ---

    def base(self, name: str = "base") -> Column:
        """Return the column of the unchanged model."""
        return Column(name, "base", {})

    def holds(self, factors: FactorSet) -> bool:
        """Return whether the factors are on the device already."""
        return _key(factors) in self._stacks

    def add_factors(self, factors: FactorSet, pair: ModelPair) -> int:
        """Put the factors of a pair next to the model; returns the bytes they take there.

        Every plan of that variant is then a column without further work.

        Raises:
            PlanError: the pair's MLLM is another model, or a matrix is not the weight of a module.
            ModelLoadError: transformers cannot build the model, to find its modules.
        """
        self._refuse_other(pair.mllm.fingerprint, pair.mllm.id)
        with self._lock:
            if _key(factors) not in self._stacks:
                stacks = self._stacks_of(factors, pair)
                for module in stacks:
                    self._hook(module)
                self._stacks[_key(factors)] = stacks
            stacks = self._stacks[_key(factors)]
        return sum(stack.A.nbytes + stack.B.nbytes for stack in stacks.values())

    def drop_factors(self, factors: FactorSet) -> None:
        """Release the memory of a set of factors; its columns can no longer answer."""
        with self._lock:
            self._stacks.pop(_key(factors), None)

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
        """Return what each row's column would say after a shared beginning of the reply.

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
            batch = combine_inputs(given, pad)
            if batch is not None:
                found.append((numbers, batch))
            else:
                found += [([n], dict(inputs)) for n, inputs in zip(numbers, given, strict=True)]
        return found

    def installed(self, columns: Sequence[Column]) -> tuple[Callable[[], None], Callable[[], None]]:
        """Return the functions that prepare the model for a batch, and undo it.

        Raises: PlanError for a column whose factors were dropped.
        """
        return self._functions(columns[0].weights, _Installed(self._active_for(columns), set()))

    def _functions(
        self, weights: SwappedWeights | None, installed: _Installed
    ) -> tuple[Callable[[], None], Callable[[], None]]:
        def install() -> None:
            self._installed = installed
            if weights is not None:
                weights.install()

        def remove() -> None:
            self._installed = _Installed()
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
            columns = [rows[n].column for n in numbers]
            own = [streams[n] for n in numbers]
            for stream in own:
                stream.is_batched = len(own) > 1
            jobs.append(Job(self._answering(columns, own, inputs), own, self.loaded.folder.name))
        return jobs

    def _answering(
        self, columns: Sequence[Column], streams: Sequence[Stream], inputs: Mapping[str, Any]
    ) -> Callable[[], None]:
        def run() -> None:
            installed = _Installed(self._active_for(columns), set())
            functions = self._functions(columns[0].weights, installed)
            ready = on_device(inputs, self.loaded.model.device)
            run_in_turns(self.loaded, ready, [s.tokens for s in streams], *functions)
            unused = set(installed.modules) - installed.used
            if unused and streams[0].tokens.ids:
                raise ModelLoadError(
                    f"'{self.loaded.folder.name}' does not call its layer '{min(unused)}', "
                    f"so that the merge had no effect there. Merge into a folder instead."
                )

        return run

    def _active_for(self, columns: Sequence[Column]) -> dict[str, list[_Active]]:
        active: dict[str, list[_Active]] = {}
        for factors in {id(c.factors): c.factors for c in columns if c.factors}.values():
            if not self.holds(factors):
                raise PlanError("The factors of a column were released. Prepare the plan again.")
            own = [c if c.factors is factors else self.base() for c in columns]
            for module, stack in self._stacks[_key(factors)].items():
                gains = stack.gains(own)
                if gains is not None:
                    active.setdefault(module, []).append(_Active(stack, gains))
        return active

    def _stacks_of(self, factors: FactorSet, pair: ModelPair) -> dict[str, _Stack]:
        stored: dict[str, list[tuple[tuple[str, int], range | None]]] = {}
        for matrix in pair.matrices:
            address = split_address(matrix.mllm)
            for expert in range(len(pair.math)):
                if (matrix.name, expert) in factors.factors:
                    key = (matrix.name, expert)
                    stored.setdefault(address.name, []).append((key, address.rows))
        modules = module_names(pair.mllm, stored)
        return {
            modules[name]: self._stack(factors, pair.mllm.spec(name).shape[0], members, name)
            for name, members in stored.items()
        }

    def _stack(
        self,
        factors: FactorSet,
        height: int,
        members: Sequence[tuple[tuple[str, int], range | None]],
        name: str,
    ) -> _Stack:
        like = next(p for p in self.loaded.model.parameters() if p.is_floating_point())
        As, Bs, entries, start = [], [], [], 0
        for key, rows in members:
            low = factors.factors[key]
            B = low.B.new_zeros(height, low.rank)
            where = rows or range(height)
            if B[where.start : where.stop].shape != low.B.shape:
                raise PlanError(
                    f"The factors of '{key[0]}' do not fit '{name}'. Prepare them again."
                )
            B[where.start : where.stop] = low.B
            As.append(low.A)
            Bs.append(B)
            entries.append(_Entry(key, start, start + low.rank))
            start += low.rank
        A, B = torch.cat(As), torch.cat(Bs, dim=1)
        return _Stack(A.to(like.device, like.dtype), B.to(like.device, like.dtype), entries)

    def _hook(self, name: str) -> None:
        if name not in self._hooks:
            module = self.loaded.model.get_submodule(name)
            self._hooks[name] = module.register_forward_hook(self._adding(name))

    def _adding(self, name: str) -> Callable[..., Tensor | None]:
        def add(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            active = self._installed.modules.get(name)
            if not active:
                return None
            self._installed.used.add(name)
            (x,) = inputs
            for stack, gains in active:
                A, B, own = (each.to(x.device) for each in (stack.A, stack.B, gains))
                through = (x.to(A.dtype) @ A.T) * _per_token(own, x)
                output = output + (through @ B.T).to(output.dtype)
            return output

        return add

    def _refuse_other(self, fingerprint: str, name: str) -> None:
        if fingerprint != self.loaded.fingerprint:
            raise PlanError(
                f"The plan is one of '{name}', whose weights are not those of the loaded "
                f"'{self.loaded.folder.name}'. Load that model, or make the plan from this one."
            )


def why_not_factors(plan: MergePlan) -> str:
    """Explain why a plan cannot be a column of factors; "" if it can."""
    if plan.method != "ip_merging" or plan.parameters["ablation"] != "none":
        return f"The change of plan {plan.hash} ({plan.method}) has full rank: it has no factors."
    if plan.extras:
        return f"Plan {plan.hash} also merges {', '.join(plan.extras)}, which have no factors."
    experts = [d.name for d in plan.selected if is_expert(d.module)]
    if experts:
        return (
            f"Plan {plan.hash} merges {len(experts)} matrices of experts, which transformers holds "
            f"in stacks without factors."
        )
    return ""


def _per_token(gains: Tensor, x: Tensor) -> Tensor:
    """Return the gains in the shape of x A^T: one row of the batch has one line of gains."""
    rows, width = gains.shape
    if x.ndim > 2 and x.shape[0] == rows:
        return gains.view(rows, *(1 for _ in x.shape[1:-1]), width)
    if x.ndim == 2 and x.shape[0] % rows == 0:  # tokens of all rows, one row after another
        return gains.repeat_interleave(x.shape[0] // rows, dim=0)
    if rows == 1:
        return gains[0]
    raise ModelLoadError(
        f"This model mixes the rows of a batch (an input of shape {tuple(x.shape)} for {rows} "
        f"rows), so that they cannot have different gains."
    )


def _key(factors: FactorSet) -> tuple[str, float, int]:
    return factors.fingerprint, factors.tolerance, factors.max_rank
