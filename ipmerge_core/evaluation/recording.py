"""Record the replies of a model and of a merge of it to a set of prompts.

In: a plan of IP-Merging and prompts with images and reference answers. Out: a file that the app
shows as recorded answers, next to the pack of the pair: questions, both replies and their verdict,
with the plan, the date, the device and the versions. Both replies come from one copy of the weights
(`adapters.live`); those of a merge that is written already come from one model after the other, and
are stored. Regressions are kept: every prompt is recorded.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ipmerge_core.adapters.columns import Row
from ipmerge_core.adapters.live import LiveModel
from ipmerge_core.adapters.live_cache import LiveCache
from ipmerge_core.errors import PlanError, RunError
from ipmerge_core.evaluation.replies import Journal, Reply, ReplyStore
from ipmerge_core.inference.images import open_image
from ipmerge_core.inference.loading import ModelCache
from ipmerge_core.inference.precisions import Precision
from ipmerge_core.inference.prompts import Message
from ipmerge_core.inference.sampling import GenerationSettings
from ipmerge_core.inference.streaming import RowState
from ipmerge_core.methods import find_method
from ipmerge_core.models.files import local_copy
from ipmerge_core.planning.map_variants import LARGEST_LAMBDA, variant_with
from ipmerge_core.planning.options import shown
from ipmerge_core.planning.plan import MergePlan
from ipmerge_core.runtime.atomic import write_whole, writing
from ipmerge_core.runtime.input_files import (
    MEGABYTE,
    InvalidContentError,
    Location,
    Schema,
    parse_json,
)
from ipmerge_core.runtime.paths import input_file, output_file
from ipmerge_core.tasks.answers import is_right
from ipmerge_core.version import __version__

if TYPE_CHECKING:
    from ipmerge_core.evaluation.subjects import Subject

MOST_PROMPTS = 1000
_LONGEST_LINE = MEGABYTE
_OF_ANALYSIS = ("temperature", "directions", "rank")


class Prompt(NamedTuple):
    """A question about an image with its reference answer.

    `is_math`: only the stated result counts, see `tasks.answers.is_right`.
    """

    question: str
    image: Path
    answer: str
    is_math: bool = False
    task: str = ""


@dataclass(frozen=True)
class _Line:
    """One line of a file of prompts; other fields are ignored."""

    question: str
    image: Location
    answer: str
    computed: bool = False
    task: str = ""


_LINE = Schema[_Line](_Line)


class RecordStep(NamedTuple):
    """Progress: a prompt was answered, or the merge is being prepared (`number` 0)."""

    number: int
    total: int
    what: str


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read a jsonl file: {"question", "image", "answer"}, optionally "computed" and "task".

    Raises: RunError for a file that cannot be read, an invalid line, or too many lines.
    """
    path = input_file(path, "prompts")
    found: list[Prompt] = []
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE + 1), b""), 1):
            if not line.strip():
                continue
            try:
                entry = _LINE.validate(parse_json(line, _LONGEST_LINE))
            except InvalidContentError as error:
                raise RunError(
                    f"Line {number} of '{path}' is invalid: {error}. Expected "
                    f'{{"question": "...", "image": "picture.png", "answer": "..."}}.'
                ) from error
            image = path.parent / entry.image
            found.append(Prompt(entry.question, image, entry.answer, entry.computed, entry.task))
            if len(found) > MOST_PROMPTS:
                raise RunError(f"'{path}' has more than {MOST_PROMPTS} prompts. Record fewer.")
    if not found:
        raise RunError(f"'{path}' contains no prompts. Expected one JSON object per line.")
    return found


def iter_recording(
    plan: MergePlan,
    prompts: Sequence[Prompt],
    out: str | Path,
    *,
    settings: GenerationSettings | None = None,
    device: str = "cpu",
    precision: Precision = "stored",
    updates: str | Path | None = None,
) -> Iterator[RecordStep]:
    """Answer every prompt with the MLLM and with the merge, and write the file `out`.

    Images that are elsewhere are copied next to it. The file appears when it is complete.

    Raises:
        PlanError: the app cannot express the plan, so that it could not show it.
        IPMergeError: a model, an image or a prompt cannot be used, or the file not be written.
    """
    out, settings = output_file(out), settings or GenerationSettings()
    choice = choice_of(plan)
    source = plan.sources.mllm
    folder = Path(source.id) if source.revision is None else local_copy(source.id, source.revision)
    cache = LiveCache(ModelCache(1), None if updates is None else Path(updates))
    yield RecordStep(0, len(prompts), "loading the model")
    live = cache.model(folder, device, precision=precision)
    yield RecordStep(0, len(prompts), "preparing the merge")
    column = cache.column(live, plan, "merged", device=device)
    examples: list[dict[str, Any]] = []
    for number, prompt in enumerate(prompts, 1):
        states = _states(live, [live.base("base"), column], prompt, settings)
        replies = [state.text for state in states]
        image = _copied(prompt.image, out, number)
        examples.append(_example(prompt, image, replies))
        yield RecordStep(number, len(prompts), examples[-1]["verdict"])
    content = {
        **_circumstances(live, device, settings),
        **_of_plan(plan),
        "choice": choice,
        "examples": examples,
    }
    write_whole(out, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def iter_model_recording(
    models: Sequence[Subject],
    plan: MergePlan,
    prompts: Sequence[Prompt],
    out: str | Path,
    store: ReplyStore,
    *,
    settings: GenerationSettings | None = None,
    device: str = "cpu",
) -> Iterator[RecordStep]:
    """Answer every prompt with the unmerged model and with its finished merge, and write `out`.

    The models are in memory one after the other. Replies are stored as those of an evaluation, so
    that an interrupted recording continues at its next prompt, and a finished one loads no model.
    A plan that the app cannot express is recorded without its choice, and the app does not show it.

    Args:
        models: the unmerged model and the merge.
        plan: the plan of the merge.
        prompts: the questions with their images.
        out: the file; images that are elsewhere are copied next to it.
        store: where replies are stored.
        settings: of the replies.
        device: a torch device name.

    Raises: as `iter_recording`, except for such a plan.
    """
    out, settings = output_file(out), settings or GenerationSettings()
    keys = [_key(prompt) for prompt in prompts]
    total, known = len(models) * len(prompts), list[dict[str, Reply]]()
    facts: dict[str, Any] = {}
    for number, subject in enumerate(models):
        journal = _journal(store, subject, settings, device)
        known.append({key: reply for key, reply in journal.read().items() if key in keys})
        done = number * len(prompts) + sum(key in known[-1] for key in keys)
        yield RecordStep(done, total, f"{subject.name}: {len(known[-1])} replies are stored")
        missing = {key: p for key, p in zip(keys, prompts, strict=True) if key not in known[-1]}
        if missing:
            yield RecordStep(done, total, f"loading {subject.name}")
            for reply in _answered(subject, missing, journal, settings, device):
                known[-1][reply.item] = reply
                done = number * len(prompts) + sum(key in known[-1] for key in keys)
                yield RecordStep(done, total, subject.name)
        facts = facts or journal.read_facts()
    examples = [
        _example(prompt, _copied(prompt.image, out, number), [each[key].text for each in known])
        for number, (key, prompt) in enumerate(zip(keys, prompts, strict=True), 1)
    ]
    content = {
        **facts,
        **_of_plan(plan),
        "choice": _choice_if_any(plan),
        "examples": examples,
    }
    write_whole(out, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _key(prompt: Prompt) -> str:
    """Return a hash of a question and its image. Raises: RunError if it cannot be read."""
    image = input_file(prompt.image, "image").read_bytes()
    return hashlib.sha256(prompt.question.encode() + b"\0" + image).hexdigest()


def _journal(
    store: ReplyStore, subject: Subject, settings: GenerationSettings, device: str
) -> Journal:
    how = {**asdict(settings), "device": device.partition(":")[0]}
    return store.journal(subject.key, "chat", how)


def _answered(
    subject: Subject,
    missing: Mapping[str, Prompt],
    journal: Journal,
    settings: GenerationSettings,
    device: str,
) -> Iterator[Reply]:
    """Answer prompts by key with one model, storing each reply, and how they were made."""
    with subject.loaded(device) as loaded:
        live = LiveModel(loaded)
        journal.write_facts(_circumstances(live, device, settings))
        for key, prompt in missing.items():
            (state,) = _states(live, [live.base(subject.name)], prompt, settings)
            tokens = len(state.ids) + (not state.is_cut)  # with the one that ends it
            reply = Reply(key, state.text, tokens, state.is_cut, state.seconds)
            journal.append([reply])
            yield reply


def _choice_if_any(plan: MergePlan) -> dict[str, Any] | None:
    try:
        return choice_of(plan)
    except PlanError:
        return None


def choice_of(plan: MergePlan) -> dict[str, Any]:
    """Return the plan in the format of the app's map. Raises: PlanError if it has none."""
    found, variant = plan.parameters, variant_with(_changed(plan))
    analysed = plan.analysed or {}
    for name in _OF_ANALYSIS:
        if name in found and found[name] != analysed.get(name, found[name]):
            raise PlanError(
                f"Plan {plan.hash} has {name} {found[name]}, and its analysis has "
                f"{analysed[name]}; the layer map, which would show its answers, draws that of "
                f"the analysis. Analyse with this {name}, or make a plan without it."
            )
    limited = set(plan.options.changed()) - {"overrides", "anchor"}
    gain = found.get("lambda_")
    if isinstance(gain, float) and gain > LARGEST_LAMBDA:
        raise PlanError(
            f"Plan {plan.hash} has lambda {gain:g}; the layer map, which would show its answers, "
            f"goes to {LARGEST_LAMBDA:g}. Choose a smaller lambda."
        )
    if plan.method != "ip_merging" or variant is None or limited:
        raise PlanError(
            f"Plan {plan.hash} cannot be recorded for the app, which shows IP-Merging as the layer "
            f"map draws it: with a threshold, lambda, a budget, rules by matrix, and one of its "
            f"updates (gamma_norm, an ablation, protect, a complement or a truncation). Make such "
            f"a plan."
        )
    return {
        "s": plan.similarity_threshold,
        "lambda": found["lambda_"],
        "similarity": plan.similarity,
        "variant": variant,
        "overrides": dict(plan.options.overrides),
        "budget": found["budget"] or 0.0,
    }


def _changed(plan: MergePlan) -> dict[str, Any]:
    """Return the parameters that make the update of IP-Merging another one, apart from its size."""
    own = ("lambda_", "budget", "energy", *_OF_ANALYSIS)
    usual, found = find_method("ip_merging").complete({}), plan.parameters
    changed = {n: v for n, v in found.items() if n not in own and v != usual.get(n)}
    if changed.get("projector") == "complement":
        changed["energy"] = found["energy"]
    return changed


def verdict(prompt: Prompt, base: str, merged: str) -> str:
    """Describe the effect of a merge on one reply: better, worse, both right or both wrong."""
    was, now = is_right(prompt, base), is_right(prompt, merged)
    if was == now:
        return "both right" if now else "both wrong"
    return "better" if now else "worse"


def _states(
    live: LiveModel, columns: Sequence[Any], prompt: Prompt, settings: GenerationSettings
) -> list[RowState]:
    messages = [Message("user", prompt.question, (open_image(prompt.image),))]
    *_, states = live.stream([Row(column, messages, settings) for column in columns])
    failed = next((state for state in states if state.state == "failed"), None)
    if failed is not None:
        raise RunError(f"The prompt '{prompt.question[:80]}' was not answered: {failed.note}")
    return states


def _copied(image: Path, out: Path, number: int) -> str:
    """Copy an image next to the file, if it is not there; returns its path relative to it."""
    if image.resolve().is_relative_to(out.parent.resolve()):
        return image.resolve().relative_to(out.parent.resolve()).as_posix()
    place = Path(f"{out.name.partition('.')[0]}-images") / f"{number:03d}{image.suffix.lower()}"
    with writing(out.parent / place):
        (out.parent / place).parent.mkdir(parents=True, exist_ok=True)
        (out.parent / place).write_bytes(image.read_bytes())
    return place.as_posix()


def _example(prompt: Prompt, image: str, replies: Sequence[str]) -> dict[str, Any]:
    base, merged = replies
    return {
        "image": image,
        "task": prompt.task,
        "question": prompt.question,
        "answer": prompt.answer,
        "reference": prompt.answer,
        "computed": prompt.is_math,
        "base": base,
        "merged": merged,
        "verdict": verdict(prompt, base, merged),
    }


def _of_plan(plan: MergePlan) -> dict[str, Any]:
    """Describe a plan: its pair and models, its hash, and what of it the analysis fixes."""
    fixed = {name: plan.parameters[name] for name in _OF_ANALYSIS if name in plan.parameters}
    return {
        "pair": plan.name,
        "models": sorted(source.fingerprint for source in plan.sources.all()),
        "plan": _described(plan),
        "plan_hash": plan.hash,
        "analysis": fixed,
    }


def _circumstances(live: LiveModel, device: str, settings: GenerationSettings) -> dict[str, Any]:
    """Describe how replies are made: date, machine, versions and settings."""
    import transformers

    processor = live.loaded.processor.image_processor
    versions = {
        "ipmerge": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {
        "recorded": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} {platform.machine()} cores, {torch.get_num_threads()} "
        f"threads, torch {torch.__version__}, {processor}",
        "device": device,
        "dtype": str(live.loaded.model.dtype).removeprefix("torch."),
        "versions": versions,
        "temperature": settings.temperature,
        "max_new_tokens": settings.max_new_tokens,
        "seed": settings.seed,
    }


def _described(plan: MergePlan) -> str:
    if plan.method != "ip_merging":
        return f"{find_method(plan.method).label} (plan {plan.hash})"
    gain, budget = plan.parameters["lambda_"], plan.parameters["budget"]
    update = [f"{name}={shown(value)}" for name, value in _changed(plan).items()]
    size = [f"lambda {gain:g}", *([f"budget {budget:g}"] if budget else [])]
    chosen, total = len(plan.selected), len(plan.decisions)
    which = "all matrices" if chosen == total else f"{chosen} of {total} matrices"
    words = ["IP-Merging", *(update or ["gamma_norm=sum"]), *size, which]
    return f"{', '.join(words)} (plan {plan.hash})"
