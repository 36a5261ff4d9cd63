"""Two machines, with disks of their own, train as one with two processes; one is killed, the other ends, both resume;
then they finetune and evaluate together.

The machines are network namespaces joined by a virtual cable where the kernel allows that (Linux, root), else two
torchruns on the loopback device.

python -m dev.two_hosts
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from dev import tiny
from nanochat.checkpoint_manager import find_steps
from nanochat.common import Parser, integer, repo_dir, run_script

NAMES, ADDRESSES = ("nanochat-a", "nanochat-b"), ("10.77.0.1", "10.77.0.2")
CABLE = ("nchat-a", "nchat-b")


def ip(*arguments: str) -> bool:
    return subprocess.run(["ip", *arguments], capture_output=True).returncode == 0


def join_namespaces() -> bool:
    """Make both namespaces and the cable between them; False where that is not permitted."""
    remove_namespaces()
    try:
        steps = [("netns", "add", name) for name in NAMES]
        steps += [("link", "add", CABLE[0], "netns", NAMES[0], "type", "veth", "peer", "name", CABLE[1], "netns", NAMES[1])]
        for name, cable, address in zip(NAMES, CABLE, ADDRESSES):
            steps += [("-n", name, "addr", "add", f"{address}/24", "dev", cable), ("-n", name, "link", "set", cable, "up"),
                      ("-n", name, "link", "set", "lo", "up")]
        return all(ip(*step) for step in steps)
    except FileNotFoundError:
        return False


def remove_namespaces() -> None:
    try:
        for name in NAMES:
            ip("netns", "del", name)
    except FileNotFoundError:
        pass


def start_node(node: int, arguments: list[str], base: Path, data: Path, namespaces: bool, port: int) -> subprocess.Popen:
    """torchrun on one of two machines, one process each."""
    address = ADDRESSES[node] if namespaces else "127.0.0.1"
    master = ADDRESSES[0] if namespaces else "127.0.0.1"
    env = tiny.environment(base, data, GLOO_SOCKET_IFNAME=CABLE[node] if namespaces else "lo")
    launcher = ["torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d",
                f"--rdzv-endpoint={master}:{port}", "--rdzv-id=two-hosts", f"--local-addr={address}",
                f"--rdzv-conf=is_host={int(node == 0)}", "-m"]
    prefix = ["ip", "netns", "exec", NAMES[node]] if namespaces else []
    return subprocess.Popen([*prefix, sys.executable, "-m", *launcher, arguments[0], "--", *arguments[1:]], cwd=repo_dir(),
                            env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def kill_node(process: subprocess.Popen) -> None:
    """What a machine that vanishes looks like: everything on it is gone at once."""
    for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        victim.send_signal(signal.SIGKILL)


def main(argv=None) -> dict:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=integer(10), default=40, help="of pretraining")
    parser.add_argument("--loopback", action="store_true", help="no namespaces")
    args = parser.parse_args(argv)
    namespaces = not args.loopback and join_namespaces()
    print("two network namespaces joined by a veth pair" if namespaces else "two processes on the loopback device")
    training = [*tiny.BASE, f"--num-iterations={args.steps}", "--save-every=5"]
    try:
        with tempfile.TemporaryDirectory() as folder:
            folder, port = Path(folder), 29600 + os.getpid() % 1000
            data = tiny.write_corpus(folder / "data")
            bases = [folder / "host0", folder / "host1"]
            for base in (folder / "single", *bases):
                tiny.run(tiny.TOKENIZER, tiny.environment(base, data))
            tiny.run(training, tiny.environment(folder / "single", data), 2)

            def both(arguments, attempt):
                return [start_node(node, arguments, bases[node], data, namespaces, port + attempt) for node in (0, 1)]

            nodes, seen = both(training, 0), ""
            for line in nodes[0].stdout:
                seen += line
                if line.startswith(f"step {args.steps // 2}/"):
                    kill_node(nodes[1])
                    killed = time.monotonic()
                    break
            else:
                sys.exit(f"the pair did not come to step {args.steps // 2}:\n{seen[-2000:]}\n{nodes[1].communicate()[0][-2000:]}")
            rest, _ = nodes[0].communicate()
            lines = [line for line in rest.splitlines() if line.startswith("[rank 0]")]
            print(f"host 1 killed at step {args.steps // 2}; host 0 ended {time.monotonic() - killed:.1f} s later, code "
                  f"{nodes[0].returncode}: {lines[0] if lines else rest[-500:]}")
            print(f"checkpoints then: {[find_steps(base / tiny.SOURCES['base']) for base in bases]}")
            nodes[1].wait()
            outputs = [process.communicate()[0] for process in both(training, 1)]
            if "resumed" not in outputs[0]:
                sys.exit("the pair did not resume:\n" + "\n".join(outputs)[-4000:])
            expected = tiny.final_tensors(folder / "single", "base")
            got = [tiny.final_tensors(base, "base") for base in bases]
            same = all(torch.equal(expected[name], tensors[name]) for tensors in got for name in tensors)
            complete = set(got[0]) | set(got[1]) == set(expected)
            losses = tiny.losses(bases[0], "base") == tiny.losses(folder / "single", "base")
            print(f"resumed and finished: losses {'equal' if losses else 'DIFFER FROM'}, weights and both ranks' optimizer "
                  f"state {'equal' if same and complete else 'DIFFER FROM'} those of one machine with two processes")
            finetuning = [*tiny.SFT, "--num-iterations=10"]
            tiny.run(finetuning, tiny.environment(folder / "single", data), 2)
            outputs = [process.communicate()[0] for process in both(finetuning, 2)]
            sft = tiny.losses(bases[0], "sft") == tiny.losses(folder / "single", "sft")
            print(f"finetuning on both, 10 steps: losses {'equal' if sft else 'DIFFER FROM'} those of one machine")
            evaluation = ["scripts.base_eval", "--eval=bpb", "--split-tokens=4000", "--device-batch-size=4"]
            expected = tiny.run(evaluation, tiny.environment(folder / "single", data)).splitlines()
            outputs = [process.communicate()[0] for process in both(evaluation, 3)]
            bpb = [line for line in expected if " bpb: " in line]
            evaluated = all(line in outputs[0] for line in bpb)
            print(f"evaluation on both: {bpb[-1] if evaluated else outputs[0][-1000:]}, as on one machine")
            files = [sorted(p.name for p in (base / tiny.SOURCES["base"]).glob(f"*_{args.steps:06d}*")) for base in bases]
            print(f"files of the last step: host 0 {files[0]}, host 1 {files[1]}")
            if not (same and complete and losses and sft and evaluated):
                sys.exit(1)
    finally:
        if namespaces:
            remove_namespaces()
    return {"namespaces": namespaces}


if __name__ == "__main__":
    run_script(main)
