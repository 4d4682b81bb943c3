"""Which file imports which: never in a circle, and sampling imports nothing that only training needs."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT


def imports(path):
    """The files of this project that a file imports, as paths from the project's root without suffix."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.replace(".", "/") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module.replace(".", "/")
            found |= {module, *(f"{module}/{alias.name}" for alias in node.names)}
    return {name for name in found if (ROOT / f"{name}.py").exists()}


def test_imports_run_one_way():
    files = [path for folder in ("", "support", "tools") for path in (ROOT / folder).glob("*.py")]
    graph = {path.relative_to(ROOT).with_suffix("").as_posix(): imports(path) for path in files}
    assert {name for name in graph if "/" not in name} >= {"train0", "train", "sample", "evaluate", "unified_model"}
    scripts = {"train0", "train", "sample", "evaluate"}
    for name, needed in graph.items():
        assert name in ("tools/benchmark", "tools/plane") or not needed & scripts, name         # which run their steps
        assert not any(file.startswith("tools/") for file in needed), name
        if name.startswith("support/"):             # support/ would serve any training: it knows nothing of DMD2
            assert not needed & {"guidance", "unified_model"}, name
    while graph:                                    # remove the files whose imports are gone; a circle would remain
        free = {name for name, needed in graph.items() if not needed & set(graph)}
        assert free, sorted(graph)
        graph = {name: needed for name, needed in graph.items() if name not in free}


@pytest.mark.parametrize("script", ["train0", "train", "sample", "evaluate"])
def test_help_and_wrong_flags_do_not_wait_for_torch(script):
    def run(*flags):
        heavy = {"torch", "numpy", "PIL", "torchvision", "torch_fidelity", "tensorboard", "tqdm"}
        program = (
            f"import atexit, runpy, sys; atexit.register(lambda: print('loaded:', *{heavy} & set(sys.modules))); "
            f"runpy.run_path('{script}.py', run_name='__main__')"
        )
        return subprocess.run([sys.executable, "-c", program, *flags], cwd=ROOT, capture_output=True, text=True)

    shown, wrong = run("--help"), run("--seed", "x")
    assert shown.returncode == 0 and shown.stdout.startswith("usage: ") and shown.stdout.endswith("\nloaded:\n")
    assert wrong.returncode == 2 and wrong.stdout == "loaded:\n"
    assert wrong.stderr.endswith("error: argument --seed: invalid int value: 'x' (see --help)\n")
    if "train" in script:
        wrong = run("--preset", "x")
        assert wrong.returncode == 2 and wrong.stdout == "loaded:\n"
        assert wrong.stderr.startswith(f"{script}.py: error: unknown preset 'x'") and wrong.stderr.count("\n") == 1


@pytest.mark.parametrize("program", ["import sample", "from support import checkpoint, sampling"])
def test_sampling_needs_no_lock_no_tensorboard_and_no_torchvision(program):
    heavy = {"support.run_folder", "tensorboard", "torch_fidelity", "torchvision", "torch._dynamo"}
    check = f"import sys; {program}; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)
