"""Define the API endpoints: typed functions that check every argument again.

In: plain JSON values. Out: plain JSON values; long runs return their id and key immediately.
Use them with gradio_client: `Client(url).predict(pack="pack", api_name="/preview")`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr
from gradio.block_function import BlockFunction
from gradio.components.api_component import Api
from gradio.events import api

from ipmerge_core.errors import PlanError
from ipmerge_core.inference.generation import GenerationSettings
from ipmerge_core.inference.images import open_image
from ipmerge_core.runtime.jobs import JobStatus
from ipmerge_core.runtime.paths import expand_path
from ipmerge_core.spectral.kinds import TEMPERATURE
from ipmerge_core.ui.analyse.models_form import AnalysisRequest, start_analysis
from ipmerge_core.ui.api_requests import decoded_image, read_conversation, typed
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.chat.answers import Side, answer_question
from ipmerge_core.ui.chat.columns import BASE, PLAN
from ipmerge_core.ui.chat.question import Question
from ipmerge_core.ui.chosen_merge import ChosenMerge
from ipmerge_core.ui.errors import public_text, show_errors
from ipmerge_core.ui.evaluate.endpoints import evaluation_endpoints
from ipmerge_core.ui.finished_merges import find_merge
from ipmerge_core.ui.live_answers import AskedColumn, answer_columns
from ipmerge_core.ui.merge.tab import check_digest, readiness_of
from ipmerge_core.ui.method_choice import (
    EXPLORED,
    EXPLORED_METHOD,
    FIELDS,
    MethodChoice,
    chosen_plan,
    data_kind,
)
from ipmerge_core.ui.pairs import list_packs, load_pack
from ipmerge_core.ui.plan_choice import PlanChoice, read_commit

if TYPE_CHECKING:
    from gradio.state_holder import SessionState

    from ipmerge_core.planning.plan import MergePlan

Json = dict[str, Any]
ANSWERING = ("answer_pair", "answer")  # endpoints that run models


class AppBlocks(gr.Blocks):
    """Blocks whose endpoints accept calls that omit trailing arguments with a default.

    gradio_client sends all arguments. Calls by curl send a list, and an endpoint with new optional
    arguments must still accept the lists of existing programs.
    """

    async def preprocess_data(
        self,
        block_fn: BlockFunction,
        inputs: list[Any],
        state: SessionState | None,
        explicit_call: bool = False,
    ) -> list[Any]:
        """Complete the arguments of an endpoint with its defaults. Raises: ValueError."""
        if block_fn.fn is not None and all(isinstance(block, Api) for block in block_fn.inputs):
            missing = list(inspect.signature(block_fn.fn).parameters.values())[len(inputs) :]
            if all(each.default is not each.empty for each in missing):
                inputs = [*inputs, *(each.default for each in missing)]
        found = super().preprocess_data(block_fn, inputs, state, explicit_call)
        return await found  # type: ignore[no-any-return]


def add_endpoints(backend: Backend) -> None:
    """Add every endpoint to the open Blocks."""
    for make in (_packs, _plans, _runs, _evaluations, _answers):
        for endpoint in make(backend):
            api(
                show_errors(typed(endpoint), in_page=False),
                api_name=endpoint.__name__,
                concurrency_id="models" if endpoint.__name__ in ANSWERING else None,
                concurrency_limit=1 if endpoint.__name__ in ANSWERING else "default",
            )


def _packs(_: Backend) -> list[Callable[..., Any]]:
    def packs() -> list[dict[str, str]]:
        """List the analysed pairs by id and name."""
        return [{"id": entry.id, "name": entry.label} for entry in list_packs()]

    def pack(pack: str) -> Json:
        """Return the whole analysis of a pair: one record per matrix and expert."""
        return load_pack(pack)

    return [packs, pack]


def _plans(backend: Backend) -> list[Callable[..., Any]]:
    def preview(
        pack: str,
        similarity_threshold: float = 0.4,
        lambda_: float = 1.0,
        similarity: str = "first",
        variant: str = "sum",
        overrides: dict[str, str] = {},  # noqa: B006 (never changed; the type is the endpoint's)
        method: str = EXPLORED_METHOD,
        parameters: dict[str, Any] = {},  # noqa: B006
        options: dict[str, Any] = {},  # noqa: B006
        calibration: str = "",
    ) -> Json:
        """Compute exactly what a plan would change, without reading weights.

        `parameters` are those of the method by name, `options` are include, exclude, layer_gains,
        norms, embeddings and anchor, and `calibration` is the name of a finished calibration or,
        if this is not a Space, its folder.
        """
        choice = _choice(pack, similarity_threshold, lambda_, similarity, variant, overrides)
        asked = PlanRequest(method, parameters, options, calibration)
        plan = _requested_plan(backend, pack, choice, asked)
        return {"hash": plan.hash, **asdict_of(plan.preview())}

    def plan_check(
        pack: str,
        similarity_threshold: float = 0.4,
        lambda_: float = 1.0,
        similarity: str = "first",
        variant: str = "sum",
        overrides: dict[str, str] = {},  # noqa: B006
        device: str = "auto",
        method: str = EXPLORED_METHOD,
        parameters: dict[str, Any] = {},  # noqa: B006
        options: dict[str, Any] = {},  # noqa: B006
        calibration: str = "",
        force: bool = False,
    ) -> Json:
        """Check that a plan can be merged here: models, dtypes, common base, disk space.

        The plan is described as for /preview. The estimate has bytes, seconds on the device, and
        advice if there is a faster way. With `force` the plan is ready although the sibling check
        refuses the models. Pass the digest to /merge_start to merge only what was checked.
        """
        choice = _choice(pack, similarity_threshold, lambda_, similarity, variant, overrides)
        asked = PlanRequest(method, parameters, options, calibration)
        plan = _requested_plan(backend, pack, choice, asked)
        found = readiness_of(backend, pack, plan, device, force=force)
        return {
            "hash": plan.hash,
            "ready": found.ready,
            "digest": found.digest,
            "device": found.device,
            "suggested_folder": found.folder,
            "findings": [finding._asdict() for finding in found.findings],
            "estimate": found.estimate._asdict() if found.estimate else None,
        }

    return [preview, plan_check]


def _runs(backend: Backend) -> list[Callable[..., Any]]:
    def merge_start(
        pack: str,
        folder: str,
        similarity_threshold: float = 0.4,
        lambda_: float = 1.0,
        similarity: str = "first",
        variant: str = "sum",
        overrides: dict[str, str] = {},  # noqa: B006
        device: str = "auto",
        digest: str = "",
        method: str = EXPLORED_METHOD,
        parameters: dict[str, Any] = {},  # noqa: B006
        options: dict[str, Any] = {},  # noqa: B006
        calibration: str = "",
        force: bool = False,
    ) -> dict[str, str]:
        """Start a merge into a new folder; returns the run's id and key immediately.

        The plan is described as for /preview. The device is auto (the best one) or a torch device
        such as cpu, cuda or cuda:1. With the digest of /plan_check, anything but what was checked
        is rejected. Models that the sibling check refuses are merged only with `force`.
        """
        choice = _choice(pack, similarity_threshold, lambda_, similarity, variant, overrides)
        asked = PlanRequest(method, parameters, options, calibration)
        plan = _requested_plan(backend, pack, choice, asked)
        from ipmerge_core.planning.plan import require_common_base

        if digest:
            check_digest(backend, digest, pack, plan, device)
        require_common_base(plan, force=force)
        started = backend.start_merge(plan, folder, device=device, force=force)
        return {"job_id": started.id, "key": started.key}

    def analyse_start(
        mllm: str,
        math: list[str],
        base: str,
        base_mllm: str = "",
        quick: bool = False,
        rank: int = 0,
        device: str = "auto",
        temperature: float = TEMPERATURE,
        directions: str = "existing",
    ) -> dict[str, str]:
        """Start an analysis of models by hub id, or by folder if this is not a Space.

        Returns the run's id, its key and the id of the new pair immediately. `quick` is
        approximate; rank 0 keeps all directions, `directions` is existing or all. The run fails if
        the sibling check does.
        """
        models = mllm, _several(math), base, base_mllm
        asked = AnalysisRequest(*models, quick, rank or None, temperature, directions, device)
        started = start_analysis(backend, asked)
        return {"job_id": started.id, "key": started.key, "pack": started.pack}

    def job_status(job_id: str) -> Json:
        """Return the status of a run."""
        return _status_json(backend, backend.store.status(job_id))

    def job_cancel(job_id: str, key: str) -> Json:
        """Stop a run after its current tensor; completed work is kept."""
        return _status_json(backend, backend.store.cancel(job_id, key))

    def job_resume(job_id: str, key: str) -> Json:
        """Resume a run that was cancelled, failed or interrupted."""
        return _status_json(backend, backend.store.resume(job_id, key))

    return [merge_start, analyse_start, job_status, job_cancel, job_resume]


def _evaluations(backend: Backend) -> list[Callable[..., Any]]:
    def read_plan(pack: str, chosen: tuple[Any, ...], asked: tuple[Any, ...]) -> MergePlan:
        return _requested_plan(backend, pack, _choice(pack, *chosen), PlanRequest(*asked))

    return evaluation_endpoints(backend, read_plan)


def _answers(backend: Backend) -> list[Callable[..., Any]]:
    def answer_pair(
        pack: str,
        question: str,
        image: str = "",
        similarity_threshold: float = 0.4,
        lambda_: float = 1.0,
        similarity: str = "first",
        variant: str = "sum",
        temperature: float = 0.0,
        max_new_tokens: int = 128,
        seed: int = 0,
        left: str = BASE,
        right: str = PLAN,
        left_key: str = "",
        right_key: str = "",
        overrides: dict[str, str] = {},  # noqa: B006
    ) -> Iterator[Json]:
        """Answer with two models; `base` is the answer of the left and `merged` of the right one.

        Each is "base" (the unmerged vision-language model), "plan" (of the values given here), or a
        finished merge of the pair, by run id or folder name. On a Space a merge needs the id and
        the key returned by `merge_start`. The image is a base64-encoded file.
        """
        choice = _choice(pack, similarity_threshold, lambda_, similarity, variant, overrides)
        settings = GenerationSettings(temperature, max_new_tokens, seed)
        pictures = (open_image(decoded_image(image)),) if image else ()
        keys = _checked_sides(backend, pack, {left: left_key, right: right_key})
        chosen = ChosenMerge(pack, choice, by="explore")
        asked = Question(chosen, question, pictures, settings, (left, right), keys)
        for first, second in answer_question(backend, asked):
            yield {"base": _side_json(first), "merged": _side_json(second)}

    def answer(
        pack: str,
        question: str,
        columns: list[dict[str, Any]] = [],  # noqa: B006
        images: list[str] = [],  # noqa: B006
        history: list[dict[str, str]] = [],  # noqa: B006
        system: str = "",
        temperature: float = 0.0,
        max_new_tokens: int = 256,
        max_thinking_tokens: int = 1024,
        seed: int = 0,
    ) -> Iterator[Json]:
        """Answer a conversation with several columns from one copy of the weights.

        A column is {"model": "base"}; {"model": "plan"} with the values that describe a plan as for
        /preview (similarity_threshold, lambda_, similarity, variant, overrides, method, parameters,
        options, calibration); or {"model": a finished merge, by run id or folder name, "key": its
        key}. The default is the base and the default plan. `history` is a list of {"role": "user"
        or "assistant", "text": ...}; images are base64-encoded files of the question.
        """
        settings = GenerationSettings(temperature, max_new_tokens, seed, max_thinking_tokens)
        messages = read_conversation(question, images, history, system)
        given = columns or [{"model": BASE}, {"model": PLAN}]
        asked = [_asked_column(backend, pack, column) for column in given]
        for answers in answer_columns(backend, pack, asked, messages, settings):
            yield {"columns": [each._asdict() for each in answers]}

    return [answer_pair, answer]


def _asked_column(backend: Backend, pack: str, column: object) -> AskedColumn:
    """Read one column of a request. Raises: PlanError or RunError for anything unknown."""
    if not isinstance(column, Mapping) or not isinstance(column.get("model"), str):
        raise PlanError('A column must be an object with a "model": base, plan or a merge.')
    values = {str(name): value for name, value in column.items() if name != "model"}
    model = str(column["model"])
    if model not in (BASE, PLAN):
        key = values.pop("key", "")
        _refuse_more(values, model)
        merge = find_merge(backend, pack, model, {model: str(key)})
        return AskedColumn(merge.label, folder=merge.folder)
    if model == BASE:
        _refuse_more(values, model)
        return AskedColumn(BASE)
    names = ("similarity_threshold", "lambda_", "similarity", "variant", "overrides")
    defaults: tuple[Any, ...] = (0.4, 1.0, "first", "sum", {})
    choice = _choice(pack, *(values.pop(n, d) for n, d in zip(names, defaults, strict=True)))
    rest = {"method": EXPLORED_METHOD, "parameters": {}, "options": {}, "calibration": ""}
    asked = PlanRequest(**{name: values.pop(name, value) for name, value in rest.items()})
    _refuse_more(values, model)
    plan = _requested_plan(backend, pack, choice, asked)
    return AskedColumn(f"plan {plan.hash}", plan=plan)


def _refuse_more(values: Mapping[str, Any], model: str) -> None:
    if values:
        raise PlanError(f"A column of the model '{model[:80]}' has no value {min(values)!r:.80}.")


def _choice(
    pack: str,
    similarity_threshold: float,
    lambda_: float,
    similarity: str,
    variant: str,
    overrides: dict[str, str],
) -> PlanChoice:
    """Check the values of a plan like those sent by the page. Raises: PlanError."""
    values = {
        "s": similarity_threshold,
        "lambda": lambda_,
        "similarity": similarity,
        "variant": variant,
        "overrides": overrides,
    }
    return read_commit(values, load_pack(pack))


class PlanRequest(NamedTuple):
    """The arguments of an endpoint that describe a plan, in addition to those of Explore."""

    method: str
    parameters: Json
    options: Json
    calibration: str


def _requested_plan(
    backend: Backend, pack: str, choice: PlanChoice, asked: PlanRequest
) -> MergePlan:
    """Make the plan of a request. Raises: PlanError for a value that the method does not use."""
    from ipmerge_core.methods import find_method

    found = find_method(str(asked.method))
    for name, values in (("parameters", asked.parameters), ("options", asked.options)):
        if not isinstance(values, Mapping):
            raise PlanError(f"`{name}` must map names to values.")
    unknown = sorted(set(asked.options) - {option.name for option in FIELDS})
    if unknown:
        known = ", ".join(option.name for option in FIELDS)
        raise PlanError(f"Unknown option {unknown[0]!r}. Available: {known}.")
    usual = PlanChoice().arguments
    given = {name: value for name, value in choice.arguments.items() if value != usual.get(name)}
    twice = sorted(set(given) & set(asked.parameters))
    if twice:
        raise PlanError(f"{twice[0]} is given twice, as an argument and in `parameters`.")
    found.complete(asked.parameters)
    folder = _calibration_folder(backend, pack, asked)
    if found.name == EXPLORED_METHOD:
        how = MethodChoice(EXPLORED, asked.parameters, asked.options, folder)
        return chosen_plan(pack, choice, how)
    unused = sorted(set(given) - {p.name for p in found.parameters} - {"overrides"})
    if unused:
        raise PlanError(f"{found.label} does not use {unused[0]}. Omit it.")
    return chosen_plan(
        pack, choice, MethodChoice(found.name, asked.parameters, asked.options, folder), **given
    )


def _calibration_folder(backend: Backend, pack: str, asked: PlanRequest) -> str:
    """Return the folder of a calibration: a finished one of the app by its name, or a path.

    Raises: PlanError for a path on a Space, or one that is not valid.
    """
    if not asked.calibration:
        return ""
    explored = asked.method == EXPLORED_METHOD
    name = EXPLORED if explored else asked.method
    kind = data_kind(MethodChoice(name, asked.parameters, asked.options))
    if kind is None:
        raise PlanError("These parameters need no calibration. Omit it.")
    folders = backend.finished_calibrations(pack, kind)
    for folder in folders:
        if folder.name == asked.calibration:
            return str(folder)
    if not backend.hosted:
        return str(expand_path(asked.calibration))
    known = ", ".join(folder.name for folder in folders) or "none"
    raise PlanError(f"Unknown calibration {asked.calibration[:80]!r}. Available: {known}.")


def asdict_of(preview: Any) -> Json:  # noqa: ANN401 (a Preview; plan is imported late)
    """Return a preview as JSON values."""
    values = asdict(preview)
    layers = {str(layer): change for layer, change in preview.layer_change.items()}
    return {**values, "selected": list(preview.selected), "layer_change": layers}


def _several(names: object) -> tuple[str, ...]:
    """Check that the names are a list; `start_analysis` checks the names. Raises: PlanError."""
    if not isinstance(names, list):
        raise PlanError("`math` must be a list of model names.")
    return tuple(names)


def _status_json(backend: Backend, status: JobStatus) -> Json:
    values = asdict(status)
    arguments = {} if backend.hosted else dict(status.arguments)
    values |= {"error": status.error and public_text(status.error)}
    return {**values, "arguments": arguments, "can_resume": status.can_resume}


def _checked_sides(backend: Backend, pack: str, keys: dict[str, str]) -> dict[str, str]:
    """Check that the models of both sides exist before a run starts. Raises: IPMergeError."""
    for who in set(keys) - {BASE, PLAN}:
        find_merge(backend, pack, who, keys)
    return keys


def _side_json(side: Side) -> Json:
    names = ("state", "text", "note", "source", "image_processor")
    return {name: getattr(side, name) for name in names}
