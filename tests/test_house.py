"""The rules of the house, read from the source and tried from the command line.

Files are found, not listed: a stage that does not exist yet is fine, a file that the design does not name is not.
"""

import ast
import dataclasses
import importlib
import importlib.metadata
import inspect
import json
import os
import re
import subprocess
import sys
import typing

import pytest
import tyro
from conftest import ROOT, run_script

# a file imports project modules from lower lines only, never from its own
LEVELS = [
    "common kernels",
    "chat",
    "model tokenizer clean demo_corpus optim",
    "checkpoint inference",
    "data lora parallel state",
    "generate plan",
    "train quantize",
    "sft",
    "reward dpo evaluate rag",
    "ppo serve bench_kernels",
    "bench",
]
LEVEL = {name: i for i, line in enumerate(LEVELS) for name in line.split()}
HUGGING_FACE = {
    "transformers",
    "tokenizers",
    "peft",
    "datasets",
    "accelerate",
    "huggingface_hub",
    "trl",
    "optimum",
}
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jinja2"}

TOP = sorted(ROOT.glob("*.py"))
PRODUCT = TOP + sorted((ROOT / "kernels").glob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in PRODUCT}
each_file = pytest.mark.parametrize("path", PRODUCT, ids=lambda p: str(p.relative_to(ROOT)))


def imports(tree: ast.AST) -> list[tuple[str, int]]:
    """Every imported module's dotted name with its line, wherever the import stands."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


# --- 1. who imports whom -------------------------------------------------------------------------------------


def test_every_top_level_file_is_named_in_the_design():
    assert {p.stem for p in TOP} <= set(LEVEL)


@pytest.mark.parametrize("path", TOP, ids=lambda p: p.name)
def test_a_file_imports_from_lower_lines_only(path):
    ours = [(name.split(".")[0], line) for name, line in imports(TREES[path]) if name.split(".")[0] in LEVEL]
    wrong = [f"{path.name}:{line} imports {n}" for n, line in ours if LEVEL[n] >= LEVEL[path.stem]]
    assert not wrong


@pytest.mark.parametrize("path", [p for p in PRODUCT if p.parent.name == "kernels"], ids=lambda p: p.name)
def test_a_kernel_imports_no_other_kernel_and_nothing_above(path):
    """An op's file may import `kernels` itself and private files of its own name (attention: _attention_triton).

    dispatch and tables, which say what runs where, are for all.
    """
    siblings = {p.stem for p in path.parent.glob("*.py")} - {"__init__", "dispatch", "tables"}
    for name, line in imports(TREES[path]):
        top, *rest = name.split(".")
        assert top == "kernels" or top not in LEVEL, f"{path.name}:{line} imports {name}"
        if top == "kernels" and path.stem != "__init__" and rest and rest[0] in siblings:
            own = path.stem.removeprefix("_").removesuffix("_triton")
            assert rest[0].strip("_").removesuffix("_triton") == own, f"{path.name}:{line} imports {name}"


def test_nothing_imports_the_tests():
    names = {name.split(".")[0] for tree in TREES.values() for name, _ in imports(tree)}
    assert not names & {"tests", "conftest", "pytest"}


def test_the_rule_about_lines_would_notice_a_mistake():
    assert imports(ast.parse("def f():\n    from train import fit")) == [("train.fit", 2)]
    assert LEVEL["train"] > LEVEL["generate"] > LEVEL["checkpoint"] > LEVEL["model"] > LEVEL["kernels"]


# --- 2. what is never used -----------------------------------------------------------------------------------


@each_file
def test_no_hugging_face_library_is_imported(path):
    """Nowhere but in bench.py, where transformers is the peer that we are measured against."""
    if path.name == "bench.py":
        return
    assert not [(n, line) for n, line in imports(TREES[path]) if n.split(".")[0] in HUGGING_FACE]


@each_file
def test_no_pickle_and_no_jinja(path):
    assert not [(n, line) for n, line in imports(TREES[path]) if n.split(".")[0] in PICKLES]
    for node in calls(TREES[path]):
        name = ast.unparse(node.func)
        assert name not in ("torch.load", "torch.save"), f"line {node.lineno}: {name} pickles"
        for word in node.keywords:
            allowed = not (
                word.arg == "allow_pickle"
                and not (isinstance(word.value, ast.Constant) and not word.value.value)
            )
            assert allowed, f"line {node.lineno}: allow_pickle"


@each_file
def test_no_eval_and_no_exec(path):
    for node in calls(TREES[path]):
        name = ast.unparse(node.func)
        assert name not in ("eval", "exec", "__import__", "builtins.eval", "builtins.exec"), (
            f"line {node.lineno}: {name}"
        )
        words = {w.arg: ast.unparse(w.value) for w in node.keywords}
        assert words.get("shell") != "True", f"line {node.lineno}: a shell"
        assert words.get("trust_remote_code") != "True", f"line {node.lineno}: remote code"


@each_file
def test_no_bare_except_and_no_silent_one(path):
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: bare except"
            broad = ast.unparse(node.type) in ("Exception", "BaseException")
            reraises = any(isinstance(n, ast.Raise) for n in ast.walk(node))
            assert not broad or reraises, f"line {node.lineno}: swallows {ast.unparse(node.type)}"


@each_file
def test_no_weights_are_loaded_with_strict_false(path):
    for node in calls(TREES[path]):
        if ast.unparse(node.func).endswith("load_state_dict"):
            assert not [w for w in node.keywords if w.arg == "strict" and ast.unparse(w.value) == "False"]


@each_file
def test_every_file_opens_with_a_docstring(path):
    text = ast.get_docstring(TREES[path]) or ""
    assert len(text.splitlines()) >= 3, path.name


def test_common_imports_torch_inside_functions_only():
    tree = TREES[ROOT / "common.py"]
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    outside = ast.Module(
        [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom) and id(n) not in inside], []
    )
    assert {n.split(".")[0] for n, _ in imports(outside)} <= set(sys.stdlib_module_names) | {"__future__"}


@pytest.mark.parametrize(
    "name", [n for n in ("common", "clean", "demo_corpus") if (ROOT / f"{n}.py").exists()]
)
def test_a_worker_starts_without_loading_torch(name):
    done = run_script("-c", f"import sys, {name}; print('torch' in sys.modules)")
    assert done.returncode == 0 and done.stdout.strip() == "False", done.stderr


# --- 3. the command line -------------------------------------------------------------------------------------


def is_main(node) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def commands(path) -> list[str]:
    """The functions that the file's last lines hand to common.run."""
    block = next(n for n in TREES[path].body if is_main(n))
    runs = [c for c in calls(block) if ast.unparse(c.func) in ("run", "common.run")]
    return [ast.unparse(a) for c in runs for a in c.args]


SCRIPTS = [p for p in TOP if any(map(is_main, TREES[p].body))]
COMMANDS = [(p, name) for p in SCRIPTS for name in commands(p)]
each_command = pytest.mark.parametrize("path, name", COMMANDS, ids=lambda x: getattr(x, "stem", x))


def words(path, name) -> list[str]:
    """What the user types for this command: the file, and the subcommand if there are several."""
    return [path.name] + ([name] if len(commands(path)) > 1 else [])


def config_of(path, name) -> type:
    function = getattr(importlib.import_module(path.stem), name)
    hints = typing.get_type_hints(function)
    hints.pop("return", None)
    return next(iter(hints.values()))


def fields(config) -> dict[str, tuple[bool, dataclasses.Field, object]]:
    """Name -> (is it positional, the field, its type)."""
    hints = typing.get_type_hints(config, include_extras=True)
    marks = {n: getattr(t, "__metadata__", ()) for n, t in hints.items()}
    return {
        f.name: (tyro.conf.Positional in marks[f.name], f, hints[f.name])
        for f in dataclasses.fields(config)
        if f.init
    }


def ask(*args) -> subprocess.CompletedProcess:
    return run_script(*args, COLUMNS=200, NO_COLOR=1)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_a_script_shows_its_docstring_with_help(path):
    done = ask(path.name, "--help")
    assert done.returncode == 0 and not done.stderr, done.stderr
    first = ast.get_docstring(TREES[path]).splitlines()[0]
    assert first[:40] in done.stdout
    for name in commands(path) if len(commands(path)) > 1 else []:
        assert re.search(rf"\b{name}\b", done.stdout), name


@each_command
def test_help_of_a_command_mentions_every_field(path, name):
    done = ask(*words(path, name), "--help")
    assert done.returncode == 0 and not done.stderr, done.stderr
    for field, (positional, _, _) in fields(config_of(path, name)).items():
        if not positional:
            assert re.search(rf"--[\w.]*\b{field}\b", done.stdout), field
    if any(positional for positional, _, _ in fields(config_of(path, name)).values()):
        assert "positional arguments" in done.stdout


@each_command
def test_every_field_has_a_comment_that_becomes_its_help(path, name):
    config = config_of(path, name)
    explained = set()
    for c in config.__mro__:
        if dataclasses.is_dataclass(c):
            lines = inspect.getsource(c).splitlines()
            for before, line in zip(["", *lines], lines):
                found = re.match(r"\s+(\w+)\s*:", line)
                if found and ("#" in line or before.strip().startswith("#")):
                    explained.add(found[1])
    silent = set(fields(config)) - explained
    assert not silent


@each_command
def test_a_misspelt_flag_exits_2_and_names_the_right_one(path, name):
    known = fields(config_of(path, name))
    given, optional = [], []
    for field, (positional, f, kind) in known.items():
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            value = "1" if re.search(r"\b(int|float)\b", str(kind)) else "x"
            given += [value] if positional else [f"--{field}", value]
        elif not positional:
            optional.append(field)
    flags = optional or [field for field, (positional, _, _) in known.items() if not positional]
    if not flags:  # it takes files only
        assert ask(*words(path, name), *given, "--nosuch").returncode == 2
        return
    right = max(flags, key=len)
    wrong = right[:-2] + right[-1] + right[-2] if right[-1] != right[-2] else right[:-1]
    assert wrong not in known
    done = ask(*words(path, name), *given, f"--{wrong}", "1")
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"--{wrong}" in done.stderr and re.search(rf"--{right}\b", done.stderr), done.stderr


# --- 4. the core lines of requirements.txt are enough --------------------------------------------------------

OPTIONAL = {
    "matplotlib",
    "opencc",
    "tiktoken",
    "fastapi",
    "uvicorn",
    "regex",
    "zstandard",
    "pyarrow",
    "rensa",
    "datasketch",
}


def plain(name: str) -> str:
    return re.split(r"[^\w.-]", name.strip())[0].lower().replace("_", "-").replace(".", "-")


def core() -> set[str]:
    """The distributions above "Used where installed", and what they themselves need."""
    text = (ROOT / "requirements.txt").read_text().split("# Used where installed")
    assert len(text) == 2
    todo = [plain(line) for line in text[0].splitlines() if line.strip() and not line.startswith("#")]
    seen = set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        todo += [plain(need) for need in needs if "extra ==" not in need]
    return seen


IMPORT_ALL = """
import importlib, importlib.abc, importlib.util, json, sys, traceback
blocked, names = map(json.loads, sys.argv[1:3])

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

def find_spec(name, package=None, ask=importlib.util.find_spec):
    return None if name.split(".")[0] in blocked else ask(name, package)

importlib.util.find_spec = find_spec  # torch asks whether there is a pandas
sys.meta_path.insert(0, Blocker())
errors = {}
for name in names:
    try:
        importlib.import_module(name)
    except BaseException:
        errors[name] = traceback.format_exc()
print(json.dumps([errors, sorted(set(sys.modules) & set(blocked))]))
"""


@pytest.fixture(scope="module")
def imported_on_the_core():
    """(module -> traceback if it did not import, blocked modules that got in all the same)."""
    mine = core()
    blocked = set(OPTIONAL) | HUGGING_FACE
    for module, owners in importlib.metadata.packages_distributions().items():
        if not {plain(o) for o in owners} & mine:
            blocked.add(module)
    blocked -= set(sys.stdlib_module_names) | {
        "pip",
        "setuptools",
        "pkg_resources",
        "_distutils_hack",
        "torch",
        "numpy",
    }
    done = run_script(
        "-c", IMPORT_ALL, json.dumps(sorted(blocked)), json.dumps([p.stem for p in TOP] + ["kernels"])
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [p.stem for p in TOP] + ["kernels"])
def test_a_module_needs_only_the_core_lines(name, imported_on_the_core):
    errors, leaked = imported_on_the_core
    assert name not in errors, errors[name]
    assert not leaked


def test_a_script_starts_without_importing_the_compiler():
    """torch._dynamo takes two seconds, and brings Triton along."""
    done = run_script("-c", "import generate, sys; print({'torch._dynamo', 'triton'} & set(sys.modules))")
    assert done.stdout == "set()\n", done.stderr


def test_the_core_is_what_the_user_listed():
    assert {"torch", "numpy", "sentencepiece", "safetensors", "tyro", "tqdm"} <= core()
    assert not core() & ({n.replace("_", "-") for n in HUGGING_FACE} | {"regex", "protobuf", "matplotlib"})


def test_the_product_leaves_the_environment_alone():
    """Importing our modules sets no environment variable and starts no process group."""
    code = "import os; a = dict(os.environ); import common, model, checkpoint, tokenizer; b = dict(os.environ); print(a == b)"
    done = run_script("-c", code)
    assert done.stdout.strip() == "True", done.stderr
    assert "RANK" not in os.environ
