"""Write the chosen merge as JSON, Python, command line, gradio_client, curl and BibTeX.

In: a `ChosenMerge` and the app's address. Out: texts that run without changes and give the same
plan. Every value is quoted for its language; no text has an absolute path of the server. A plan of
the map needs no torch.
"""

from __future__ import annotations

import json
import re
import shlex
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ipmerge_core.models.files import is_hub_id
from ipmerge_core.planning.choice_file import FORMAT, VERSION
from ipmerge_core.planning.map_variants import VARIANTS
from ipmerge_core.planning.options import PlanOptions, shown
from ipmerge_core.runtime.host import space_host, space_id
from ipmerge_core.ui.chosen_merge import ChosenMerge
from ipmerge_core.ui.method_choice import EXPLORED_METHOD, MethodChoice
from ipmerge_core.ui.pairs import find_pack, load_pack
from ipmerge_core.ui.plan_choice import PlanChoice, shown_path

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


NO_ENDPOINT = """\
# The endpoints of this app take what Explore and the Merge tab can set.
# Use Python or the command line for this merge.
"""


class Snippets(NamedTuple):
    """The texts that reproduce or cite a plan."""

    json: str
    python: str
    shell: str
    client: str
    curl: str
    bibtex: str


def snippets_of(chosen: ChosenMerge, address: str) -> Snippets:
    """Write the chosen merge in every language.

    Raises: PlanError for an unknown pair, or an option that is not valid.
    """
    choice, method = chosen.recipe
    pack = load_pack(chosen.pack_id)
    file = shown_path(find_pack(chosen.pack_id).path)
    client, curl = NO_ENDPOINT, NO_ENDPOINT
    if method.name != EXPLORED_METHOD:
        client = _client_text(chosen, space_id() or address)
        curl = _curl_text(chosen, address)
    return Snippets(
        json=_json_text(chosen, pack),
        python=_python_text(file, chosen),
        shell=_shell_text(file, choice, method),
        client=client,
        curl=curl,
        bibtex=bibtex_of(pack, method.name),
    )


def arguments_of(chosen: ChosenMerge) -> Json:
    """Return the keyword arguments of `make_plan` for the chosen merge. Raises: PlanError."""
    choice, method = chosen.recipe
    options = PlanOptions.read(method.options).changed()
    options = {name: list(v) if isinstance(v, tuple) else v for name, v in options.items()}
    if not method.name:
        return {**choice.arguments, **method.values, **options}
    data = {"calibration": shown_path(method.calibration)} if method.calibration else {}
    rules = {"overrides": dict(choice.overrides)} if choice.overrides else {}
    return {"method": method.name, **method.values, **options, **rules, **data}


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


def bibtex_of(pack: Json, method: str = "") -> str:
    """Return BibTeX entries of IP-Merging, of task arithmetic, and of the models on the hub.

    The source of another `method` is a comment above them.

    >>> "2510.14387" in bibtex_of({"sources": {"mllm": None, "base": None, "math": []}})
    True
    """
    sources = pack["sources"]
    named = [sources["mllm"], sources["base"], sources.get("base_mllm"), *sources["math"]]
    ids = {source["id"]: source for source in named if source and is_hub_id(source["id"])}
    entries = [IP_MERGING, TASK_ARITHMETIC, *(_model_entry(s) for s in ids.values())]
    return "\n".join([*([_source_of(method)] if method else []), *entries])


def _source_of(method: str) -> str:
    from ipmerge_core.methods import find_method

    found = find_method(method)
    return f"% The chosen method is {found.label}: {found.source}\n"


def endpoint_of(chosen: ChosenMerge) -> tuple[str, Json]:
    """Return the endpoint that describes the merge, with its arguments in their order.

    It is `preview` for a plan that the map draws, else `plan_check`: not every change is known
    before the merge.
    """
    choice, method = chosen.recipe
    values: Json = {
        "pack": chosen.pack_id,
        "similarity_threshold": choice.similarity_threshold,
        "lambda_": choice.lambda_,
        "similarity": choice.similarity,
        "variant": choice.variant,
        "overrides": dict(choice.overrides),
    }
    more: Json = {
        "method": method.name or EXPLORED_METHOD,
        "parameters": dict(method.values),
        "options": dict(method.options),
        "calibration": shown_path(method.calibration) if method.calibration else "",
    }
    if chosen.map_plan is None:
        return "plan_check", {**values, "device": "auto", **more}
    return "preview", values | (more if method.options else {})


def _json_text(chosen: ChosenMerge, pack: Json) -> str:
    content: Json = {
        "format": FORMAT,
        "version": VERSION,
        "pair": {
            "id": chosen.pack_id,
            **{key: pack[key] for key in ("name", "engine", "created", "parameters")},
        },
        "arguments": arguments_of(chosen),
    }
    if chosen.map_plan is not None:
        content["plan"] = chosen.map_plan.to_browser()
    return json.dumps(content, indent=2) + "\n"


def _where(file: str) -> str:
    """Return a comment with the folder that a relative path starts from."""
    if file.startswith("~/"):
        return ""
    folder = "of the IPMerge repository" if "/" in file else f"that contains {file}"
    return f"# Run this in the folder {folder}.\n"


def _python_text(file: str, chosen: ChosenMerge) -> str:
    values = {name: value for name, value in arguments_of(chosen).items() if value != {}}
    texts = {name: _python_path(value) for name, value in values.items()}
    arguments = "".join(f"    {key}={text},\n" for key, text in texts.items())
    uses_home = file.startswith("~/") or str(values.get("calibration", "")).startswith("~/")
    change = "" if chosen.map_plan is None else ", plan.preview().relative_change"
    return (
        f"{_where(file)}"
        f"{'from pathlib import Path' + chr(10) * 2 if uses_home else ''}"
        "from ipmerge_core import Analysis, make_plan, merge\n\n"
        f"analysis = Analysis.load({_python_path(file)})\n"
        f"plan = make_plan(\n    analysis,\n{arguments})\n"
        f"print(plan.hash, len(plan.selected){change})\n"
        'plan.save("plan.json")\n'
        'merge(plan, "merged-model")\n'
    )


def _python_path(value: object) -> str:
    """Write a value; a path in the home folder is completed where it runs."""
    if isinstance(value, str) and value.startswith("~/"):
        return f"Path({value!r}).expanduser()"
    return repr(value)


def _shell_text(file: str, choice: PlanChoice, method: MethodChoice) -> str:
    chosen = [f"--method {method.name}"] if method.name else _map_flags(choice)
    chosen += [*_value_flags(method), *_option_flags(method)]
    rules = [f"--force-{rule} {shlex.quote(name)}" for name, rule in choice.overrides.items()]
    lines = [f"ipmerge plan {_shell_path(file)}", *chosen, *rules, "-o plan.json"]
    made = " \\\n  ".join(lines) + "\nipmerge merge plan.json -o merged-model\n"
    return f"{_where(file)}{made}"


def _map_flags(choice: PlanChoice) -> list[str]:
    return [
        f"--similarity-threshold {choice.similarity_threshold!r}",
        f"--lambda {choice.lambda_!r}",
        f"--similarity {choice.similarity}",
        *(f"--set {name}={value}" for name, value in VARIANTS[choice.variant].items()),
    ]


def _value_flags(method: MethodChoice) -> list[str]:
    own = {"similarity_threshold": "--similarity-threshold", "similarity": "--similarity"}
    own |= {"lambda_": "--lambda"}
    flags = [
        f"{own[name]} {shlex.quote(shown(value))}"
        if name in own
        else f"--set {shlex.quote(f'{name}={shown(value)}')}"
        for name, value in method.values.items()
    ]
    data = [f"--calibration {_shell_path(shown_path(method.calibration))}"]
    return [*flags, *(data if method.calibration else [])]


def _option_flags(method: MethodChoice) -> list[str]:
    return [
        f"--{name.replace('_', '-')} {text if name == 'layer_gains' else shlex.quote(text)}"
        for name, text in method.options.items()
    ]


def _shell_path(path: str) -> str:
    """Quote a path; a leading tilde is left for the shell."""
    return f"~/{shlex.quote(path[2:])}" if path.startswith("~/") else shlex.quote(path)


def _client_text(chosen: ChosenMerge, address: str) -> str:
    endpoint, values = endpoint_of(chosen)
    arguments = "".join(f"    {key}={value!r},\n" for key, value in values.items())
    second = "relative_change" if endpoint == "preview" else "ready"
    return (
        "from gradio_client import Client\n\n"
        f"client = Client({address!r})\n"
        f'found = client.predict(\n{arguments}    api_name="/{endpoint}",\n)\n'
        f'print(found["hash"], found["{second}"])\n'
    )


def _curl_text(chosen: ChosenMerge, address: str) -> str:
    endpoint, values = endpoint_of(chosen)
    data = json.dumps({"data": list(values.values())})
    url = shlex.quote(f"{address}/gradio_api/call/{endpoint}")
    return (
        f"EVENT=$(curl -s {url} \\\n"
        '  -H "Content-Type: application/json" \\\n'
        f"  -d {shlex.quote(data)} \\\n"
        '  | sed \'s/.*"event_id": *"\\([^"]*\\)".*/\\1/\')\n'
        f"curl -sN {url}/$EVENT\n"
    )


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
