"""The sandbox: programs get what they need, hostile ones get nowhere and leave nothing behind."""

import os
import signal
import socket
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanochat.execution import execute_code
from tasks.humaneval import HumanEval, extract_program
from tests.conftest import needs_shared_data

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
ISOLATED = execute_code("pass").isolation == "" if sys.platform == "linux" else False
needs_namespaces = pytest.mark.skipif(not ISOLATED, reason="the kernel grants no namespaces here")


def test_programs_run():
    result = execute_code("import math, json, collections\nprint(json.dumps({'x': math.gcd(12, 18)}))")
    assert result.success and result.stdout == '{"x": 6}\n' and result.stderr == "" and result.error is None
    failed = execute_code("def f():\n    raise ValueError('no \\u00e9')\nf()")
    assert not failed.success and failed.error == "ValueError: no \u00e9" and "line 2, in f" in failed.stderr
    assert execute_code("x = ").error.startswith("SyntaxError")
    assert execute_code("").success and execute_code("if __name__ == '__main__':\n    print(1)").stdout == "1\n"
    written = execute_code("open('a.txt', 'w').write('x' * 1000)\nprint(len(open('a.txt').read()))\nimport tempfile\n"
                           "with tempfile.NamedTemporaryFile() as f: f.write(b'y')")
    assert written.stdout == "1000\n" and written.success
    assert execute_code("import subprocess\nprint(subprocess.run(['echo', 'hi'], capture_output=True, text=True).stdout)").stdout == "hi\n\n"
    assert execute_code("import threading\nt = threading.Thread(target=print, args=('in a thread',))\nt.start(); t.join()").stdout == "in a thread\n"


def test_from_many_threads():
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda i: execute_code(f"print({i} * {i})").stdout, range(24)))
    assert results == [f"{i * i}\n" for i in range(24)]


# name -> program; a line that begins with "!" says what may become of it (else it must not succeed)
HOSTILE = {
    # processes
    "fork bomb": "import os\nwhile True: os.fork()",
    "fork bomb that ignores errors": "import os\nwhile True:\n    try: os.fork()\n    except Exception: pass",
    "threads without end": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(100,)).start()",
    "child that goes on in a session of its own": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(300)\nos._exit(0)",
    "daemon by double fork": "!any\nimport os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(300)\n    os._exit(0)\nprint('done')",
    "child that outlives the program": "!any\nimport subprocess\nsubprocess.Popen(['sleep', '300'])",
    "posix_spawn": "!any\nimport os\nos.posix_spawn('/bin/sleep', ['sleep', '300'], {})",
    "exec of another program": "import os\nos.execv('/bin/sleep', ['sleep', '300'])",
    "shell in the background": "!any\nimport os\nos.system('sleep 300 &')",
    "multiprocessing": "import multiprocessing, time\nfor _ in range(100): multiprocessing.Process(target=time.sleep, args=(300,)).start()",
    # memory
    "a list without end": "x = []\nwhile True: x.append(' ' * 10**6)",
    "one huge allocation": "x = bytearray(10**11)",
    "memory in many children": "import os\nfor _ in range(10):\n    if os.fork() == 0:\n        x = bytearray(60 * 2**20)\n        break\nimport time\ntime.sleep(100)",
    "mmap": "import mmap\nm = mmap.mmap(-1, 2**32)\nm.write(b'x' * 2**31)",
    "huge power": "x = 10 ** 10 ** 10",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
    "recursive repr": "x = []\nfor _ in range(10**6): x = [x]\nprint(repr(x))",
    "memory file": "import os\nf = os.memfd_create('x')\nwhile True: os.write(f, b'x' * 2**20)",
    # disk
    "fill the disk": "with open('x', 'wb') as f:\n    while True: f.write(b'x' * 2**20)",
    "fill the disk with many files": "i = 0\nwhile True:\n    open(f'x{i}', 'wb').write(b'x' * 2**20)\n    i += 1",
    "files without end": "i = 0\nwhile True:\n    open(f'x{i}', 'w').close()\n    i += 1",
    "open files without end": "import os\nx = []\nwhile True: x.append(os.open('/dev/null', 0))",
    "delete its directory": "!any\nimport os, shutil\nshutil.rmtree(os.getcwd(), ignore_errors=True)",
    "write outside": "open(CANARY, 'w').write('changed')",
    "delete outside": "import os\nos.remove(CANARY)",
    "delete everything": "!any\nimport os, shutil\nshutil.rmtree(os.path.dirname(CANARY), ignore_errors=True)",
    "rename outside": "import os\nos.rename(CANARY, CANARY + '.moved')",
    "change permissions outside": "import os\nos.chmod(CANARY, 0)",
    "hard link and write": "import os\nos.link(CANARY, 'here')\nopen('here', 'w').write('changed')",
    "write into shared memory": "open('/dev/shm/nanochat-test', 'w').write('x')",
    "mount": "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nassert libc.mount(b'none', b'/', None, 4096 | 32, None) == 0\nopen(CANARY, 'w').write('changed')",
    "new namespaces": "!any\nimport ctypes\nlibc = ctypes.CDLL(None)\nlibc.unshare(0x10020000)\nlibc.mount(None, b'/', None, 4096 | 32, None)\ntry: open(CANARY, 'w').write('changed')\nexcept OSError: pass",
    # output
    "output without end": "while True: print('x' * 10**6)",
    "errors without end": "import sys\nwhile True: sys.stderr.write('x' * 10**6)",
    "a single huge line": "print('x' * 10**8)",
    "forged report": "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'{\"finished\": true, \"reason\": \"\", \"code\": 0, \"isolation\": \"\"}')\n    except OSError: pass\nos._exit(0)",
    "reads its supervisor's command line": "import re, os\nsecret = re.search('\"secret\": \"(.*?)\"', open('/proc/1/cmdline').read())[1]\nfor fd in range(3, 64):\n    try: os.write(fd, secret.encode())\n    except OSError: pass\nos._exit(0)",
    "bytes that are no text": "!any\nimport sys\nsys.stdout.buffer.write(bytes(range(256)))",
    # time
    "busy for ever": "while True: pass",
    "asleep for ever": "import time\ntime.sleep(10**6)",
    "waiting for input": "input()",
    "catastrophic regular expression": "import re\nre.match(r'(a+)+$', 'a' * 60 + 'b')",
    "stopped": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "waiting for a lock": "import threading\nl = threading.Lock()\nl.acquire()\nl.acquire()",
    # network
    "connect": "import socket\nsocket.create_connection(('127.0.0.1', PORT), timeout=2)",
    "connect by IPv6": "import socket\nsocket.create_connection(('::1', PORT), timeout=2)",
    "look up a name": "import socket\nsocket.getaddrinfo('example.com', 80)",
    "abstract socket": "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('\\0' + ABSTRACT)",
    # signals
    "ignores signals": "import signal, time\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: time.sleep(1)",
    "signals its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nimport time\ntime.sleep(100)",
    "signals everybody": "import os, signal\nos.kill(-1, signal.SIGKILL)\nimport time\ntime.sleep(100)",
    "signals the tests": "import os, signal\nos.kill(PARENT, signal.SIGUSR1)",
    "signals its process group": "import os, signal\nos.killpg(0, signal.SIGKILL)",
    # interpreter tricks
    "exits early with success": "import os\nos._exit(0)",
    "sys.exit(0)": "import sys\nsys.exit(0)",
    "segmentation fault": "import ctypes\nctypes.string_at(0)",
    "reloads os and kills": "import importlib, os\nos.kill = None\nimportlib.reload(os)\nos.kill(PARENT, 10)",
    "ctypes kill": "import ctypes\nassert ctypes.CDLL(None).kill(PARENT, 10) == 0",
    "the parent's environment": "data = open(f'/proc/{PARENT}/environ').read()\nassert 'PATH' in data",
    "any environment": "import glob\nfor path in glob.glob('/proc/[0-9]*/environ'):\n    if SECRET in open(path).read(): break\nelse: raise SystemExit(1)",
    "own environment": "import os\nassert SECRET in str(os.environ)",
    "its own memory of the parent": "open(f'/proc/{PARENT}/mem', 'rb').read(1)",
    "ptrace": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, PARENT, 0, 0) == 0",
    "excepthook and atexit": "import atexit, sys, time\natexit.register(time.sleep, 100)\nsys.excepthook = lambda *a: time.sleep(100)\nraise ValueError",
    "builtins broken": "import builtins\nbuiltins.__import__ = None\nbuiltins.print = None\nraise KeyError",
    "raises a BaseException": "class E(BaseException): pass\nraise E",
}


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """What the programs must not reach: a file, two sockets, a signal handler, a secret in the environment."""
    folder = tmp_path_factory.mktemp("outside")
    canary = folder / "canary.txt"
    canary.write_text("untouched")
    listening = socket.create_server(("127.0.0.1", 0))
    abstract = socket.socket(socket.AF_UNIX)
    name = f"nanochat-test-{os.getpid()}"
    abstract.bind("\0" + name)
    abstract.listen()
    signals = []
    previous = signal.signal(signal.SIGUSR1, lambda *_: signals.append(1))
    os.environ["NANOCHAT_TEST_SECRET"] = "secret-4711"
    values = {"CANARY": str(canary), "PORT": listening.getsockname()[1], "PARENT": os.getpid(), "ABSTRACT": name, "SECRET": "secret-4711"}
    yield canary, signals, "".join(f"{key} = {value!r}\n" for key, value in values.items())
    del os.environ["NANOCHAT_TEST_SECRET"]
    signal.signal(signal.SIGUSR1, previous)
    listening.close()
    abstract.close()


def running() -> set[str]:
    """Processes that could be left of a program."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if b"sandbox.py" in line or line.startswith((b"sleep\x00300", b"/bin/sleep")):
            found.add(path.parent.name)
    return found


def nothing_left() -> bool:
    """Whether all are gone, if not at once (the kernel ends a namespace in the background) then within a second."""
    deadline = time.monotonic() + 1
    while running() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not running()


@needs_namespaces
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_are_contained(name, outside):
    canary, signals, values = outside
    program = HOSTILE[name]
    may_succeed = program.startswith("!any\n")
    before, start = set(Path(tempfile.gettempdir()).glob("nanochat-program-*")), time.monotonic()
    result = execute_code(values + program.removeprefix("!any\n"), timeout=1.0, maximum_memory_bytes=128 * 2**20)
    assert time.monotonic() - start < 4.5
    assert may_succeed or not result.success
    assert result.success or result.error
    assert canary.read_text() == "untouched" and canary.stat().st_mode & 0o777 and len(list(canary.parent.iterdir())) == 1
    assert not signals and not Path("/dev/shm/nanochat-test").exists()
    assert len(result.stdout) <= 2**16 and len(result.stderr) <= 2**16
    assert nothing_left() and set(Path(tempfile.gettempdir()).glob("nanochat-program-*")) <= before


@pytest.mark.parametrize("name", ["fork bomb", "child that goes on in a session of its own", "daemon by double fork",
                                  "child that outlives the program", "a list without end", "fill the disk", "output without end",
                                  "busy for ever", "ignores signals", "exits early with success", "sys.exit(0)"])
def test_without_namespaces_limits_and_killing_do(name):
    program = HOSTILE[name]
    result = execute_code(program.removeprefix("!any\n"), timeout=1.0, maximum_memory_bytes=128 * 2**20, namespaces=False)
    assert (program.startswith("!any\n") or not result.success) and result.isolation
    assert nothing_left()


def test_what_was_exceeded_is_told():
    assert execute_code("while True: pass", timeout=0.5).timeout
    assert execute_code("x = bytearray(2**31)", maximum_memory_bytes=2**27).memory_exceeded
    assert execute_code("print('x' * 10**6)").error == "too much output"
    assert execute_code("import os\nos._exit(3)").error == "ended with exit code 3 before its last line"


def test_threads_do_not_disturb_signals():
    """Programs may run off the main thread, where Python takes no signals."""
    results = []
    thread = threading.Thread(target=lambda: results.append(execute_code("while True: pass", timeout=0.5)))
    thread.start()
    thread.join(10)
    assert results[0].timeout


# --- HumanEval --------------------------------------------------------------------------------------------------------


def test_extract_program():
    assert extract_program("Sure:\n```python\ndef f():\n    return 1\n```\nThat is it.") == "def f():\n    return 1"
    assert extract_program("```\nx = 1\n```") == "x = 1" and extract_program("def f(): pass") == "def f(): pass"
    assert extract_program("```python\ncut off") == "cut off"


@pytest.fixture
def humaneval(tmp_path, monkeypatch):
    source = needs_shared_data("humaneval", "test.parquet")
    target = tmp_path / "openai" / "openai_humaneval" / "openai_humaneval" / "test.parquet"
    target.parent.mkdir(parents=True)
    target.symlink_to(source)
    monkeypatch.setenv("NANOCHAT_DATASETS_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return HumanEval()


def test_canonical_solutions_pass(humaneval):
    assert len(humaneval) == 164

    def solved(index):
        conversation = humaneval[index]
        return humaneval.evaluate(conversation, conversation["messages"][1]["content"])

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(solved, range(164)))


def test_answers_are_judged(humaneval):
    conversation = humaneval[0]
    prompt, whole = (message["content"] for message in conversation["messages"])
    body = whole.removeprefix(prompt)
    name = conversation["entry_point"]
    assert humaneval.evaluate(conversation, f"Here you are:\n\n```python\n{whole}\n```\nI hope it helps.")
    assert humaneval.evaluate(conversation, body)  # only the rest of the function
    for wrong in ("", "I do not know.", f"def {name}(*args):\n    return None", f"def {name}(*args): return True",
                  f"import os\ndef {name}(*args): os._exit(0)", f"def {name}(*args): raise SystemExit(0)"):
        assert not humaneval.evaluate(conversation, wrong)
