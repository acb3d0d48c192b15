"""Modules are joined into one script that does what they do, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from node_runner import run_node

from ipmerge_core.ui.web.modules import join_modules


def write(folder: Path, **files: str) -> Path:
    """Write modules, `main` among them, and return its path."""
    for name, text in files.items():
        (folder / f"{name}.js").write_text(text, encoding="utf-8")
    return folder / "main.js"


def printed(script: str) -> str:
    """What a script prints when it runs inside a function, as Gradio runs it."""
    done = run_node("--eval", "new Function(fs.readFileSync(0, 'utf8'))()", stdin=script)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_runs_once_after_what_it_imports(tmp_path: Path):
    entry = write(
        tmp_path,
        main='import { b } from "./b.js";\nimport { c } from "./c.js";\n'
        "export function start(...words) { console.log(...words, b(), c()); }\n",
        b='import { A } from "./a.js";\nexport function b() { return A.n += 1; }\n',
        c='import {\n  A,\n  make,\n} from "./a.js";\nexport const c = () => make(A.n);\n',
        a='console.log("once");\nexport const A = { n: 1 };\nexport class Made {}\n'
        "export function make(n) { return [n, new Made().constructor.name].join(); }\n"
        "export async function later() {}\n",
    )
    assert printed(join_modules(entry, "start('>')")) == "once\n> 2 2,Made\n"


def test_what_is_not_exported_stays_private(tmp_path: Path):
    entry = write(
        tmp_path,
        main='import { b } from "./b.js";\nconst SECRET = "main";\n'
        "export function start() { console.log(SECRET, b(), typeof HIDDEN); }\n",
        b='const SECRET = "b", HIDDEN = 1;\nexport const b = () => SECRET;\n',
    )
    assert printed(join_modules(entry, "start()")) == "main b undefined\n"


def test_modules_of_one_name_in_two_folders_are_two(tmp_path: Path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    write(tmp_path / "one", a='export const A = "one";\n')
    entry = write(
        tmp_path / "two",
        a='export const B = "two";\n',
        main='import { A } from "../one/a.js";\nimport { B } from "./a.js";\n'
        "export function start() { console.log(A, B); }\n",
    )
    assert printed(join_modules(entry, "start()")) == "one two\n"


def test_comments_stay_behind_and_code_that_looks_like_one_does_not(tmp_path: Path):
    entry = write(
        tmp_path,
        main="// @ts-check\n/** @import { X } from './x.d.ts' */\n\n/**\n * Says it.\n *\n"
        " * @param {string} word\n */\nexport function start(word) {\n  // aside\n"
        '  console.log(word, "/** kept */", "https://arxiv.org" /* kept */); // kept\n'
        '  /** kept */ console.log("cast"); /** @type {string} */\n}\n',
    )
    script = join_modules(entry, "start('hello')")
    assert "Says it" not in script
    assert "aside" not in script
    assert script.count("kept") == 4
    assert printed(script) == "hello /** kept */ https://arxiv.org\ncast\n"


@pytest.mark.parametrize(
    ("main", "message"),
    [
        ('import { a } from "./a.js";\nimport { z } from "./a.js";\n', "'z', which a.js does not"),
        ('import { a, a } from "./a.js";\n', "main.js has the name 'a' twice"),
        ('import { a } from "./a.js";\nimport { a } from "./b.js";\n', "the name 'a' twice"),
        ("export function a() {}\nexport const a = 1;\n", "main.js has the name 'a' twice"),
        ('import { a as b } from "./a.js";\n', "'a as b'; renaming is not understood"),
        (
            'import { a } from "./nowhere.js";\n',
            'imports from "./nowhere.js", which does not exist',
        ),
        ('import { a } from "a";\n', 'imports from "a", which does not exist'),
        ('import a from "./a.js";\n', "only named imports"),
        ('import * as a from "./a.js";\n', "only named imports"),
        ('import "./a.js";\n', "only named imports"),
        ("export default function a() {}\n", "export default function a"),
        ("export let a = 1;\n", "export let a"),
        ('export { a } from "./a.js";\n', "export { a }"),
        ('export * from "./a.js";\n', r"export \* from"),
        ('const a = await import("./a.js");\n', "import"),
        ('import { c } from "./c.js";\n', "circle: main.js -> c.js -> main.js"),
    ],
)
def test_what_cannot_be_joined_is_refused_by_name(tmp_path: Path, main: str, message: str):
    entry = write(
        tmp_path,
        main=main,
        a="export const a = 1;\n",
        b="export const a = 2;\n",
        c='import { m } from "./main.js";\nexport const c = 1;\n',
    )
    if "./c.js" in main:
        write(tmp_path, main=main + "export const m = 1;\n")
    with pytest.raises(ValueError, match=message):
        join_modules(entry, "start()")


def test_two_folders_of_one_name_with_one_file_name_are_refused(tmp_path: Path):
    for folder in ("x/web", "y/web"):
        (tmp_path / folder).mkdir(parents=True)
        write(tmp_path / folder, a=f'export const {folder[0]} = "{folder}";\n')
    entry = write(
        tmp_path,
        main='import { x } from "./x/web/a.js";\nimport { y } from "./y/web/a.js";\n'
        "export function start() { console.log(x, y); }\n",
    )
    with pytest.raises(ValueError, match="would both be called web__a"):
        join_modules(entry, "start()")
