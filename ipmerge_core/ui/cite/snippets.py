"""Write a plan as JSON, Python, command line, gradio_client and curl, with BibTeX entries.

In: a pair's id, a `PlanChoice` and the app's address. Out: texts that run without changes and give
the same plan. Every value is quoted for its language. Does not import torch.
"""

from __future__ import annotations

import json
import re
import shlex
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ipmerge_core.models.files import is_hub_id
from ipmerge_core.planning.choice_file import FORMAT, VERSION
from ipmerge_core.runtime.host import is_hosted, space_host, space_id
from ipmerge_core.ui.pairs import ROOT, find_pack, load_pack
from ipmerge_core.ui.plan_choice import VARIANTS, PlanChoice

Json = dict[str, Any]
IP_MERGING = """\
@inproceedings{hu2025ipmerging,
  title         = {Can {MLLMs} Absorb Math Reasoning Abilities from {LLMs} as Free Lunch?},
  author        = {Hu, Yijie and Zhou, Zihao and Huang, Kaizhu and Huang, Xiaowei and
                   Wang, Qiufeng},
  booktitle     = {Advances in Neural Information Processing Systems},
  year          = {2025},
  eprint        = {2510.14387},
  archiveprefix = {arXiv}
}
"""
TASK_ARITHMETIC = """\
@inproceedings{ilharco2023editing,
  title         = {Editing Models with Task Arithmetic},
  author        = {Ilharco, Gabriel and Ribeiro, Marco Tulio and Wortsman, Mitchell and
                   Gururangan, Suchin and Schmidt, Ludwig and Hajishirzi, Hannaneh and
                   Farhadi, Ali},
  booktitle     = {International Conference on Learning Representations},
  year          = {2023},
  eprint        = {2212.04089},
  archiveprefix = {arXiv}
}
"""


class Snippets(NamedTuple):
    """The texts that reproduce or cite a plan."""

    json: str
    python: str
    shell: str
    client: str
    curl: str
    bibtex: str


def snippets_of(pack_id: str, choice: PlanChoice, address: str) -> Snippets:
    """Write a choice in every language. Raises: PlanError for an unknown pair."""
    pack = load_pack(pack_id)
    file = pack_file(pack_id)
    return Snippets(
        json=_json_text(pack_id, pack, choice),
        python=_python_text(file, choice),
        shell=_shell_text(file, choice),
        client=_client_text(pack_id, choice, space_id() or address),
        curl=_curl_text(pack_id, choice, address),
        bibtex=bibtex_of(pack),
    )


def pack_file(pack_id: str) -> str:
    """Return the pack's file; on a Space, its path relative to the Space's repository."""
    path = find_pack(pack_id).path
    if not is_hosted():
        return str(path)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def page_address(referer: str) -> str:
    """Return the address of the app from the referer of a request.

    >>> page_address("http://127.0.0.1:7860/?v=1&pack=pack")
    'http://127.0.0.1:7860'
    """
    if host := space_host():
        return f"https://{host}"
    parts = urlsplit(referer)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        return "http://127.0.0.1:7860"
    return f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")


def bibtex_of(pack: Json) -> str:
    """Return BibTeX entries of the method, of task arithmetic, and of the models on the hub.

    >>> "2510.14387" in bibtex_of({"sources": {"mllm": None, "base": None, "math": []}})
    True
    """
    sources = pack["sources"]
    named = [sources["mllm"], sources["base"], sources.get("base_mllm"), *sources["math"]]
    ids = {source["id"]: source for source in named if source and is_hub_id(source["id"])}
    return "\n".join([IP_MERGING, TASK_ARITHMETIC, *(_model_entry(s) for s in ids.values())])


def endpoint_values(pack_id: str, choice: PlanChoice) -> Json:
    """Return the arguments of the endpoint `preview`, in its order."""
    return {
        "pack": pack_id,
        "similarity_threshold": choice.similarity_threshold,
        "lambda_": choice.lambda_,
        "similarity": choice.similarity,
        "variant": choice.variant,
        "overrides": dict(choice.overrides),
    }


def _json_text(pack_id: str, pack: Json, choice: PlanChoice) -> str:
    content = {
        "format": FORMAT,
        "version": VERSION,
        "pair": {
            "id": pack_id,
            **{key: pack[key] for key in ("name", "engine", "created", "parameters")},
        },
        "plan": choice.to_browser(),
        "arguments": choice.arguments,
    }
    return json.dumps(content, indent=2) + "\n"


def _python_text(file: str, choice: PlanChoice) -> str:
    arguments = "".join(f"    {key}={value!r},\n" for key, value in _needed(choice).items())
    return (
        "from ipmerge_core import Analysis, make_plan, merge\n\n"
        f"analysis = Analysis.load({file!r})\n"
        f"plan = make_plan(\n    analysis,\n{arguments})\n"
        "print(plan.hash, len(plan.selected), plan.preview().relative_change)\n"
        'plan.save("plan.json")\n'
        'merge(plan, "merged-model")\n'
    )


def _shell_text(file: str, choice: PlanChoice) -> str:
    options = [
        f"--similarity-threshold {choice.similarity_threshold!r}",
        f"--lambda {choice.lambda_!r}",
        f"--similarity {choice.similarity}",
        *(f"--set {name}={value}" for name, value in VARIANTS[choice.variant].items()),
        *(f"--force-{rule} {shlex.quote(name)}" for name, rule in choice.overrides.items()),
        "-o plan.json",
    ]
    lines = [f"ipmerge plan {shlex.quote(file)}", *options]
    return " \\\n  ".join(lines) + "\nipmerge merge plan.json -o merged-model\n"


def _client_text(pack_id: str, choice: PlanChoice, address: str) -> str:
    values = endpoint_values(pack_id, choice)
    arguments = "".join(f"    {key}={value!r},\n" for key, value in values.items())
    return (
        "from gradio_client import Client\n\n"
        f"client = Client({address!r})\n"
        f'preview = client.predict(\n{arguments}    api_name="/preview",\n)\n'
        'print(preview["hash"], preview["relative_change"])\n'
    )


def _curl_text(pack_id: str, choice: PlanChoice, address: str) -> str:
    data = json.dumps({"data": list(endpoint_values(pack_id, choice).values())})
    url = shlex.quote(f"{address}/gradio_api/call/preview")
    return (
        f"EVENT=$(curl -s {url} \\\n"
        '  -H "Content-Type: application/json" \\\n'
        f"  -d {shlex.quote(data)} \\\n"
        '  | sed \'s/.*"event_id": *"\\([^"]*\\)".*/\\1/\')\n'
        f"curl -sN {url}/$EVENT\n"
    )


def _needed(choice: PlanChoice) -> Json:
    return {key: value for key, value in choice.arguments.items() if value != {}}


def _model_entry(source: Json) -> str:
    name = source["id"]
    key = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    revision = (
        f",\n  note          = {{revision {source['revision']}}}" if source["revision"] else ""
    )
    title = name.replace("_", r"\_")
    return (
        f"@misc{{{key},\n  title         = {{{title}}},\n"
        f"  howpublished  = {{\\url{{https://huggingface.co/{name}}}}}{revision}\n}}\n"
    )
