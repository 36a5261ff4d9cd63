"""The architecture: imports point down, importing does nothing, and the README knows every file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
LEVELS = {
    0: "sandbox execution ranks hardware common schedule packing calculator cpu_kernels gpu_kernels flash_attention loss optim synthetic sampling answer",
    1: "hub progress results tokenizer kv_cache gpt choice_scoring",
    2: "fp8 scaling dataset train_step api",
    3: "checkpoint_manager dataloader decode_graph engine",
    4: "loss_eval huggingface core_eval chat_eval rollout report replica service server",
}
LEVEL = {name: level for level, names in LEVELS.items() for name in names.split()}


def imports(path: Path) -> set[str]:
    """Modules of ours that a file imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.split(".")[0] in ("nanochat", "tasks", "scripts", "dev")}


@pytest.mark.parametrize("path", sorted((REPO / "nanochat").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_library_imports_point_down(path):
    """A module imports its own level (leaves of level 0: the modules above them in the list) or lower ones."""
    assert path.stem in LEVEL, f"{path.stem} has no level"
    for name in imports(path):
        package, _, module = name.partition(".")
        assert package == "nanochat", f"{path.name} imports {name}"
        module = module.split(".")[0]
        if module in LEVEL:
            order = list(LEVEL)
            assert order.index(module) < order.index(path.stem), f"{path.name} imports {name}, which is not below it"


def test_scripts_and_tasks():
    for path in (REPO / "scripts").glob("[a-z]*.py"):
        assert not any(name.startswith(("scripts", "dev")) for name in imports(path)), path
    for path in (REPO / "tasks").glob("[a-z]*.py"):
        assert not any(name.startswith(("scripts", "dev")) for name in imports(path)), path


def test_importing_does_nothing(tmp_path):
    """No files, no device, no output, no logging set-up, no network library at work."""
    modules = [f"nanochat.{name}" for name in LEVEL if (REPO / "nanochat" / f"{name}.py").exists()]
    modules += [f"{d}.{p.stem}" for d in ("tasks", "scripts") for p in (REPO / d).glob("[a-z]*.py")]
    program = (f"import importlib, logging, socket\n"
               f"def refuse(*a, **k): raise SystemExit('network')\n"
               f"socket.socket.connect = refuse\n"
               f"import torch\nbefore = (logging.root.handlers[:], logging.root.level)\n"
               f"for m in {modules!r}: importlib.import_module(m)\n"
               f"assert (logging.root.handlers[:], logging.root.level) == before\n"
               f"assert not torch.cuda.is_initialized()\n")
    base = tmp_path / "base"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True,
                          env={"PATH": "/usr/bin:/bin", "NANOCHAT_BASE_DIR": str(base), "HOME": str(tmp_path)})
    assert done.returncode == 0 and not done.stdout, done.stderr + done.stdout
    assert not base.exists()


def test_readme_names_every_file():
    readme = (REPO / "README.md").read_text()
    files = [p for d in ("nanochat", "scripts", "tasks", "runs", "dev") for p in (REPO / d).iterdir()
             if p.is_file() and p.name != "__init__.py"]
    assert not [p.name for p in files if p.name not in readme]
