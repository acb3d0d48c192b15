"""The app without a browser: endpoints, words, permissions, and what is loaded when."""

from __future__ import annotations

import base64
import gc
import io
import re
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gradio as gr
import pytest
from browser_fixtures import free_port, serving
from gradio_client import Client
from gradio_client.exceptions import AppError

from ipmerge_core.errors import PlanError, RunError
from ipmerge_core.tasks.answers import differ, is_right
from ipmerge_core.tasks.demo import problems
from ipmerge_core.ui import errors as messages
from ipmerge_core.ui import pairs as packs
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.chat.active_requests import ActiveRequests
from ipmerge_core.ui.chat.answers import Side
from ipmerge_core.ui.chat.messages import view
from ipmerge_core.ui.chat.recorded import Reference, recorded_examples
from ipmerge_core.ui.chat.turns import Turn, opening_turns, turn_of_example, without_records
from ipmerge_core.ui.format import findings_html, progress_html
from ipmerge_core.ui.merge.download import finished_folder, zip_pieces
from ipmerge_core.ui.merge.summary import result_html
from ipmerge_core.ui.merge.tab import readiness, run_result
from ipmerge_core.ui.plan_choice import PlanChoice, analysis_of, describe_choice, plan_of
from ipmerge_core.ui.runs import find_run
from ipmerge_core.ui.safe_text import as_html, show_text

ROOT = Path(__file__).parents[1]
PACK = "pack"
EVERYTHING = {"similarity_threshold": 0.0, "variant": "select_only"}
ENDPOINTS = {
    "/packs": [],
    "/pack": ["pack"],
    "/preview": [
        "pack", "similarity_threshold", "lambda_", "similarity", "variant", "overrides",
        "method", "parameters", "options", "calibration",
    ],
    "/plan_check": [
        "pack", "similarity_threshold", "lambda_", "similarity", "variant", "overrides", "device",
        "method", "parameters", "options", "calibration", "force",
    ],
    "/merge_start": [
        "pack", "folder", "similarity_threshold", "lambda_", "similarity", "variant", "overrides",
        "device", "digest", "method", "parameters", "options", "calibration", "force",
    ],
    "/analyse_start": [
        "mllm", "math", "base", "base_mllm", "quick", "rank", "device", "temperature", "directions",
    ],
    "/job_status": ["job_id"],
    "/job_cancel": ["job_id", "key"],
    "/job_resume": ["job_id", "key"],
    "/answer": [
        "pack", "question", "columns", "images", "history", "system", "temperature",
        "max_new_tokens", "max_thinking_tokens", "seed",
    ],
    "/evaluate_start": [
        "pack", "tasks", "limit", "kind", "parameter", "values", "parameter2", "values2", "merges",
        "keys", "replace_by", "modules", "stride", "seed", "device", "similarity_threshold",
        "lambda_", "similarity", "variant", "overrides", "method", "parameters", "options",
        "calibration",
    ],
    "/evaluation_result": ["job_id", "key"],
    "/answer_pair": [
        "pack", "question", "image", "similarity_threshold", "lambda_", "similarity", "variant",
        "temperature", "max_new_tokens", "seed", "left", "right", "left_key", "right_key",
        "overrides",
    ],
}  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep what tests make out of the user's own folder."""
    monkeypatch.setenv("IPMERGE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SPACE_ID", raising=False)
    return tmp_path / "home"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of the real app."""
    home = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPMERGE_HOME", str(home))
        with serving(home / "log", "app.py", port=free_port()) as url:
            client = Client(url, verbose=False)
            yield client
            client.close()
    with warnings.catch_warnings():  # gradio_client leaves event loops open
        warnings.simplefilter("ignore", ResourceWarning)
        del client
        gc.collect()


def wait_for_job(client: Client, job: str) -> dict[str, object]:
    for _ in range(300):
        status = client.predict(job_id=job, api_name="/job_status")
        if status["state"] not in ("running", "cancelling"):
            return status
        time.sleep(0.1)
    raise AssertionError(status)


# --- endpoints -------------------------------------------------------------------------------


def test_the_api_lists_exactly_these_endpoints_and_their_arguments(client):
    listed = client.view_api(return_format="dict", print_info=False)
    found = {
        name: [parameter["parameter_name"] for parameter in endpoint["parameters"]]
        for name, endpoint in listed["named_endpoints"].items()
    }
    assert found == ENDPOINTS
    assert not listed["unnamed_endpoints"]


def test_packs_and_pack_tell_what_is_there(client):
    listed = client.predict(api_name="/packs")
    assert {"id": PACK, "name": analysis_of(PACK).name} in listed
    content = client.predict(pack=PACK, api_name="/pack")
    assert content["format"] == "ipmerge-pack"
    assert len(content["records"]) == 28


def test_preview_is_the_plan_s_own(client):
    found = client.predict(pack=PACK, **EVERYTHING, api_name="/preview")
    plan = plan_of(PACK, PlanChoice(0.0, variant="select_only"))
    assert found["hash"] == plan.hash
    assert found["relative_change"] == plan.preview().relative_change
    assert len(found["selected"]) == 28


def test_plan_check_finds_the_demo_trio_ready(client):
    found = client.predict(pack=PACK, **EVERYTHING, api_name="/plan_check")
    assert found["ready"]
    assert {finding["level"] for finding in found["findings"]} <= {"ok", "warning"}
    assert found["estimate"]["n_merged"] == 28
    assert found["estimate"]["seconds"] > 0


def test_an_evaluation_by_endpoints_returns_its_result(client):
    asked = {"kind": "sweep", "parameter": "lambda", "values": "1,8", "limit": 1}
    started = client.predict(
        pack=PACK, similarity_threshold=0.1, **asked, api_name="/evaluate_start"
    )
    assert wait_for_job(client, started["job_id"])["state"] == "finished"
    found = client.predict(**started, api_name="/evaluation_result")
    assert found["format"] == "ipmerge-sweep"
    assert [point["label"] for point in found["points"]] == ["unmerged", "lambda 1", "lambda 8"]
    parts = {part["part"]: part for part in found["report"]["results"][0]["parts"]}
    assert {"math", "perception"} <= set(parts)
    for wrong, message in (
        ({"kind": "other"}, "Unknown kind"),
        ({"tasks": "demo"}, "must be a list"),
        ({"kind": "sweep"}, "one or two parameters"),
    ):
        with pytest.raises(AppError, match=message):
            client.predict(pack=PACK, **wrong, api_name="/evaluate_start")


def test_a_merge_by_endpoints_runs_to_its_end(client):
    started = client.predict(pack=PACK, folder="by-api", **EVERYTHING, api_name="/merge_start")
    status = wait_for_job(client, started["job_id"])
    assert status["state"] == "finished"
    out = Path(status["arguments"]["out"])
    assert (out / "model.safetensors").is_file()
    assert out.name == "by-api"
    with pytest.raises(AppError, match="exists and is not empty"):
        client.predict(pack=PACK, folder="by-api", **EVERYTHING, api_name="/merge_start")
    with pytest.raises(AppError, match="Only the browser that started this run"):
        client.predict(job_id=started["job_id"], key="guess", api_name="/job_cancel")
    with pytest.raises(AppError, match="nothing to resume"):
        client.predict(**started, api_name="/job_resume")

    asked = {"pack": PACK, "question": "What is this?", "max_new_tokens": 4}
    sides = {"left": started["job_id"], "right": "by-api"}
    last = client.submit(**asked, **sides, api_name="/answer_pair").result(timeout=120)
    assert {side["state"] for side in last.values()} == {"finished"}
    assert last["base"]["text"] == last["merged"]["text"]
    assert last["base"]["source"].startswith("by-api · IP-Merging · plan ")
    with pytest.raises(AppError, match="There is no merge 'by-nobody'"):
        client.submit(**asked, right="by-nobody", api_name="/answer_pair").result(timeout=60)


def test_an_analysis_by_endpoints_adds_a_pair(client):
    demo = {name: str(packs.DEMO / name) for name in ("mllm", "base")}
    asked = {**demo, "math": [str(packs.DEMO / "math")], "quick": True}
    started = client.predict(**asked, api_name="/analyse_start")
    status = wait_for_job(client, started["job_id"])
    assert (status["state"], status["step"]["number"]) == ("finished", 28)
    assert started["pack"] in [pack["id"] for pack in client.predict(api_name="/packs")]
    values = {"pack": started["pack"], **EVERYTHING}
    assert len(client.predict(**values, api_name="/preview")["selected"]) == 28
    assert client.predict(**values, api_name="/plan_check")["ready"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"math": []}, "Missing: math model"),
        ({"math": "org/math"}, "must be a list of model names"),
        ({"math": ["org/math"] * 9}, "at most 8"),
        ({"math": [{}]}, "is not a string"),
        ({"base": ""}, "Missing: base"),
        ({"rank": -1}, "rank is -1"),
        ({"rank": "many"}, "rank is 'many'"),
    ],
)
def test_an_analysis_of_nonsense_comes_back_as_one_sentence(client, values, words):
    asked = {"mllm": "org/mllm", "math": ["org/math"], "base": "org/base", **values}
    with pytest.raises(AppError, match=words):
        client.predict(**asked, api_name="/analyse_start")


def test_answer_pair_streams_and_ends_with_both_answers(client):
    problem = problems("sides", 1, seed=3)[0]
    file = io.BytesIO()
    problem.image.save(file, "PNG")
    job = client.submit(
        pack=PACK,
        question=problem.question,
        image="data:image/png;base64," + base64.b64encode(file.getvalue()).decode(),
        **EVERYTHING,
        api_name="/answer_pair",
    )
    answer = job.outputs()[-1] if job.result(timeout=120) and job.outputs() else job.result()
    assert {side["state"] for side in answer.values()} == {"finished"}
    assert answer["base"]["text"].strip()
    used = {side["image_processor"] for side in answer.values()}
    assert used < {"CLIPImageProcessorPil (pil)", "CLIPImageProcessor (torchvision)"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"pack": "nobody"}, "Unknown pair 'nobody'"),
        ({"pack": PACK, "similarity_threshold": 1.5}, "similarity threshold is '1.5'"),
        ({"pack": PACK, "similarity_threshold": "x"}, "similarity threshold is 'x'"),
        ({"pack": PACK, "lambda_": -1.0}, "lambda is '-1.0'"),
        ({"pack": PACK, "variant": "all"}, "Unknown update 'all'"),
        ({"pack": PACK, "overrides": {"no.such": "merge"}}, "no.such"),
    ],
)
def test_bad_arguments_come_back_as_one_sentence(client, values, words):
    with pytest.raises(AppError, match=words):
        client.predict(**values, api_name="/preview")


@pytest.mark.parametrize(
    ("endpoint", "values", "words"),
    [
        ("/job_status", [["a"]], r"job id is \['a'\]; expected a text"),
        ("/job_status", [7], "job id is 7; expected a text"),
        ("/evaluation_result", [7], "job id is 7; expected a text"),
        ("/merge_start", [PACK, 5], "folder is 5; expected a text"),
        ("/merge_start", [PACK, "/"], "The output folder is '/', the root"),
        ("/evaluate_start", [PACK, ["demo"], "x"], "limit is 'x'; expected an integer"),
        ("/evaluate_start", [PACK, ["demo"], 2.5], "limit is 2.5; expected an integer"),
        ("/evaluate_start", [PACK, ["demo"], True], "limit is True; expected an integer"),
        ("/answer_pair", [PACK, 5], "question is 5; expected a text"),
    ],
)
def test_values_of_another_type_come_back_as_one_sentence(client, endpoint, values, words):
    with pytest.raises(AppError, match=words):
        client.predict(*values, api_name=endpoint)


def test_a_knockout_of_nothing_is_refused_before_it_starts(client):
    for wrong in ({"stride": 0}, {"modules": ["x"]}, {"modules": []}):
        with pytest.raises(AppError, match="stride is 0|no module|module"):
            client.predict(pack=PACK, kind="knockout", api_name="/evaluate_start", **wrong)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"question": ""}, "The question is empty"),
        ({"question": "x", "image": "not base64!"}, "not a base64"),
        ({"question": "x", "image": "aGVsbG8="}, "not a readable image"),
        ({"question": "x", "temperature": -1}, "temperature is -1"),
        ({"question": "x", "max_new_tokens": 10**6}, "new tokens is 1000000"),
    ],
)
def test_bad_questions_come_back_as_one_sentence(client, values, words):
    if values["question"]:
        with pytest.raises(AppError, match=words):
            client.submit(pack=PACK, **values, api_name="/answer_pair").result(timeout=60)
    else:
        answer = client.submit(pack=PACK, **values, api_name="/answer_pair").result(timeout=120)
        assert words in answer["base"]["note"]


def test_a_long_question_is_a_sentence_of_every_column_with_its_length_and_the_limit(client):
    for question, words in [
        ("x" * 100_000, "has 100000 characters; the maximum is 16000"),
        ("9 " * 500, r"has 1\d\d\d tokens; the context of 'mllm' is 256 tokens"),
    ]:
        asked = client.submit(PACK, question, api_name="/answer")
        columns = asked.result(timeout=180)["columns"]
        assert [column["state"] for column in columns] == ["failed", "failed"]
        assert all(re.search(words, column["note"]) for column in columns)


# --- start -----------------------------------------------------------------------------------


def test_the_page_is_answered_before_torch_or_transformers_are_loaded():
    code = (
        "import gzip, sys, threading, urllib.request\n"
        "from ipmerge_core.ui.app import launch\n"
        "from ipmerge_core.ui.backend import Backend\n"
        "used = threading.Event()\n"
        "Backend.use = lambda _: used.set()\n"  # which imports them in the background
        "_, url, _ = launch(block=False)\n"
        "asked = urllib.request.Request(url, headers={'Accept-Encoding': 'gzip'})\n"
        "packed = urllib.request.urlopen(asked).read()\n"
        "page = gzip.decompress(packed)\n"
        "assert len(packed) < len(page) / 3, (len(packed), len(page))\n"
        "assert b'IPMerge' in page, page[:200]\n"
        "heavy = {'torch', 'transformers', 'scipy', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert used.wait(60), 'the answer of the page starts them'\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_editor_stubs_are_written_into_the_package():
    assert not list((ROOT / "ipmerge_core").rglob("*.pyi"))


# --- folders and permissions -----------------------------------------------------------------


def test_output_folders_are_names_or_full_paths(home, tmp_path):
    backend = Backend()
    assert backend.output_folder(" merged-1.0 ") == home / "models" / "merged-1.0"
    assert backend.output_folder(str(tmp_path / "x")) == tmp_path / "x"
    for name in ("", "a/b", "../x", ".hidden"):
        with pytest.raises(RunError, match="output folder"):
            backend.output_folder(name)


def test_a_space_takes_plain_names_only_and_hides_its_folders(monkeypatch, home, tmp_path):
    monkeypatch.setenv("SPACE_ID", "org/ipmerge")
    backend = Backend()
    with pytest.raises(RunError, match="expected a name of A-Z"):
        backend.output_folder(str(tmp_path))
    text = messages.sentence_of(RunError(f"'{home}/models/x' is full, see {packs.ROOT}/assets"))
    assert text == "'models/x' is full, see assets"


def test_an_error_of_the_package_becomes_a_message_and_a_bug_stays_a_bug():
    def refuse() -> None:
        raise PlanError("No such plan.")

    def step_and_refuse() -> Iterator[int]:
        yield 1
        raise PlanError("No such plan.")

    with pytest.raises(gr.Error) as caught:
        messages.show_errors(refuse)()
    assert caught.value.message == "No such plan."
    steps = messages.show_errors(step_and_refuse)()
    assert next(steps) == 1
    with pytest.raises(gr.Error):
        next(steps)
    with pytest.raises(ZeroDivisionError):
        messages.show_errors(lambda: 1 / 0)()


def test_a_download_is_a_whole_zip_for_its_owner_alone(home):
    backend = Backend()
    started = backend.start_merge(plan_of(PACK, PlanChoice(0.0)), "mine")
    while backend.store.status(started.id).is_running:
        time.sleep(0.05)
    with pytest.raises(RunError, match="Only the browser"):
        finished_folder(backend, started.id, "guess")
    folder = finished_folder(backend, started.id, started.key)
    archive = zipfile.ZipFile(io.BytesIO(b"".join(zip_pieces(folder))))
    assert archive.testzip() is None
    assert {f"mine/{path.name}" for path in folder.iterdir()} == set(archive.namelist())
    assert archive.read("mine/model.safetensors") == (folder / "model.safetensors").read_bytes()
    assert backend.finished_merge(plan_of(PACK, PlanChoice(0.0))) == folder
    assert backend.finished_merge(plan_of(PACK, PlanChoice(1.0))) is None
    assert "Download" in run_result(backend, find_run(backend, started._asdict()))
    assert "Only the browser" in run_result(backend, find_run(backend, {"id": started.id}))


def test_a_pair_whose_models_are_gone_is_refused_in_the_check(home, tmp_path):
    (home / "packs").mkdir(parents=True)
    analysis_of(PACK).save(home / "packs" / "moved.pack.json.gz")
    content = packs.read_pack_file(home / "packs" / "moved.pack.json.gz")
    assert content["sources"]["mllm"]["id"].endswith("mllm")
    own = next(entry for entry in packs.list_packs() if entry.id.startswith("packs-"))
    assert readiness(Backend(), own.id, PlanChoice(0.0)).ready
    damaged = (home / "packs" / "moved.pack.json.gz").read_bytes()[:100]
    (home / "packs" / "moved.pack.json.gz").write_bytes(damaged)
    with pytest.raises(PlanError, match="is not a pack of this version"):
        packs.load_pack(own.id)


def test_a_new_request_stops_the_one_before_of_the_same_session():
    requests = ActiveRequests()
    first, other = requests.start("a"), requests.start("b")
    second = requests.start("a")
    stops = [request.stop_all.is_set() for request in (first, second, other)]
    assert stops == [True, False, False]
    requests.stop("a")
    requests.stop("nobody")
    assert second.stop_all.is_set()


def test_a_stop_of_one_column_leaves_the_others_and_a_retry_joins_what_is_running():
    requests = ActiveRequests()
    running = requests.start("a", 3)
    requests.stop("a", 1)
    requests.stop("a", 7)
    assert [running.is_stopped(n) for n in range(3)] == [False, True, False]
    assert requests.retry("a", 2)
    assert not requests.retry("a", 3)
    assert not requests.retry("b", 0)
    assert not running.close()  # a retry is waiting
    assert running.take_retries() == [2]
    assert running.close()
    assert not requests.retry("a", 1)


# --- words -----------------------------------------------------------------------------------


def test_a_view_says_what_all_sides_do():
    turn = Turn("How many?", (), "a pair", (Side("Base"), Side("Merged")))
    assert view([turn], 2).status == "Base is loading. Merged is loading."
    replies = (("Base", "2+3."), ("Merged", "2+3=5."))
    both = tuple(Side(name, "", "finished", text) for name, text in replies)
    reference = Reference("How many?", "x.png", "5", True)
    shown = view([Turn("How many?", (), "p", both, reference)], 2)
    assert shown.status == "Base finished. Merged finished. The answers differ."
    assert "✕ wrong" in shown.verdicts[0]
    assert "✓ correct" in shown.verdicts[1]
    failed = (both[0], Side("Merged", "", "failed", note="No <room>."))
    shown = view([Turn("How many?", (), "p", failed)], 2)
    assert shown.status == "Base finished. Merged failed."
    text = shown.chats[1][-1]["content"][-1]["text"]
    assert "<strong>No answer.</strong> No &lt;room&gt;." in text
    assert view([], 3).chats == [[], [], []]


def test_every_answer_says_what_gave_it():
    def side(source: str) -> Side:
        return Side("Merged", source, "finished", "5.")

    first = (side("mllm, unmerged"), side("by-ties · TIES · plan 1a2b"))
    turns = [
        Turn("a", (), "first pair", first, pack_id="1"),
        Turn("b", (), "second pair", (side("org/b, unmerged"), side("")), pack_id="2"),
    ]
    shown = view(turns, 2)

    def said(messages):
        return [
            [part["text"] for part in m["content"]] for m in messages if m["role"] == "assistant"
        ]

    answer = show_text("5.")
    divider = ['<p class="divider">pair first pair → second pair</p>']
    assert said(shown.chats[0]) == [
        ['<p class="note">mllm, unmerged · first pair</p>', answer],
        divider,
        ['<p class="note">org/b, unmerged · second pair</p>', answer],
    ]
    assert said(shown.chats[1]) == [
        ['<p class="note">by-ties · TIES · plan 1a2b · first pair</p>', answer],
        divider,
        [answer],  # nothing was found that could have answered
    ]
    assert "A: mllm, unmerged. B: by-ties · TIES · plan 1a2b. Pair: first pair." in (
        view(turns[:1], 2).source
    )
    assert "Image processor" not in view(turns, 2).source
    resized = tuple(replace(each, image_processor="A (pil)") for each in first)
    turn = replace(turns[0], answers=resized)
    assert "Pair: first pair. Image processor: A (pil)." in view([turn], 2).source


@pytest.mark.parametrize("name", ["my_model", "_m_", "*m* `m` ~m~", r"\(m\) $m$", "1. m"])
def test_the_name_of_what_answered_is_shown_as_it_is_written(name):
    turn = Turn("q", (), "pair", (Side("Merged", name, "finished", "5."),))
    caption = view([turn], 1).chats[0][-1]["content"][0]["text"]
    assert caption == f'<p class="note">{as_html(name)} · pair</p>'


def test_records_of_another_pair_do_not_stay_and_questions_do():
    live = Turn("a", (), "first pair", pack_id="packs-a")
    record = turn_of_example(recorded_examples()[0])
    assert record.pack_id == PACK
    assert without_records([record, live], "packs-a") == [live]
    assert without_records([record, live], PACK) == [record, live]
    assert opening_turns(PACK) == [record]
    assert opening_turns("packs-none") == []


def test_a_recorded_answer_says_what_gave_it_and_when():
    example = recorded_examples()[0]
    shown = view([turn_of_example(example)], 2)
    left, right = (messages[-1]["content"][0]["text"] for messages in shown.chats)
    said = f"· demo trio · recorded {example.recorded}</p>"
    assert left == f'<p class="note">mllm, unmerged {said}'
    assert ("IP-Merging" in right) == example.plan.startswith("IP-Merging")
    assert right.endswith(said)


def test_recorded_examples_judge_as_they_were_recorded():
    examples = recorded_examples()
    assert [e.outcome for e in examples] == sorted(
        [e.outcome for e in examples], key=["fixed", "broken", "both right", "both wrong"].index
    )
    for example in examples:
        shown = view([turn_of_example(example)], 2)
        assert example.recorded in shown.source
        assert example.plan.replace("&", "&amp;") in shown.source


def test_answers_are_compared_by_their_results():
    assert not differ("6+4=10.", "10.")
    assert differ("6+4=10.", "6+4=11.")
    assert not differ("Circle.", "circle")
    assert is_right(Reference("q", "i", "20", True), "6+4=10; 10*2=20.")
    assert not is_right(Reference("q", "i", "20", True), "6+4; 10*2.")


def test_names_in_html_are_escaped():
    from ipmerge_core.models.pairing import Finding
    from ipmerge_core.runtime.jobs import JobStatus

    evil = "<script>alert(1)</script>"
    status = JobStatus("0" * 32, evil, "failed", {"tensor": evil}, error=evil)
    pieces = [
        findings_html([Finding("refusal", evil, evil, evil)]),
        progress_html(status),
        result_html(evil, f"x?key={evil}", show_path=True),
    ]
    assert not any("<script" in piece for piece in pieces)
    assert "expected &lt;script" in view(
        [Turn("q", (), evil, (Side("Base", evil, "finished", "1"),
              Side("Merged", evil, "finished", "1")), Reference("q", "i", evil, True))], 2
    ).verdicts[0]  # fmt: skip


def test_a_choice_is_described_in_a_few_words():
    assert describe_choice(PlanChoice()) == "Sα 0.4, λ 1"
    chosen = PlanChoice(0.1, 2.0, "max", "rescale_only", {"a": "keep"})
    assert describe_choice(chosen) == "Sα 0.1, λ 2, similarity max, rescale only, 1 set by hand"
