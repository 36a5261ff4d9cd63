"""The chat server under load, over a tiny model: many streaming clients, more clients than places, clients that vanish.

python -m dev.bench_server
python -m dev.bench_server --seconds 20 --clients 16
"""

import asyncio
import json
import os
import random
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from nanochat.common import Parser, integer, run_script
from dev.parrot import ANSWERS, serve, teach

WORDS = ("tell me about the cat that sat on my mat and how many letters there are in this long sentence please now "
         "because I would like to know what you think of rivers and mountains").split()


def a_request(rng: random.Random) -> dict:
    """Questions with known answers and others, conversations of up to five turns, short and long answers."""
    messages = []
    for _ in range(rng.choice((0, 0, 1, 2))):
        messages += [{"role": "user", "content": " ".join(rng.choices(WORDS, k=rng.randrange(2, 20)))},
                     {"role": "assistant", "content": " ".join(rng.choices(WORDS, k=rng.randrange(2, 20)))}]
    question = rng.choice((rng.choice(["Count", "Rich", "Hack"]), " ".join(rng.choices(WORDS, k=rng.randrange(1, 30)))))
    return {"messages": [*messages, {"role": "user", "content": question}], "temperature": rng.choice((0, 0.8, 1.5)),
            "max_tokens": rng.randrange(32, 256), "seed": rng.randrange(2**32)}


async def post(port: int, body: dict, stop_after: int | None = None) -> dict:
    """One streamed answer over a raw connection; with `stop_after` the client vanishes after so many events."""
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    payload = json.dumps(body).encode()
    writer.write(b"POST /chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                 b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(payload), payload))
    result = {"status": 0, "tokens": 0, "first_s": None, "gap_s": 0.0, "done": False, "retry_after": None}
    last = start
    try:
        while line := await reader.readline():
            if line.startswith(b"HTTP/1.1"):
                result["status"] = int(line.split()[1])
            elif line.lower().startswith(b"retry-after"):
                result["retry_after"] = int(line.split(b":")[1])
            elif line.startswith(b"data: "):
                now = time.perf_counter()
                if result["first_s"] is None:
                    result["first_s"] = now - start
                else:
                    result["gap_s"] = max(result["gap_s"], now - last)
                last = now
                event = json.loads(line[6:])
                if event.get("done"):
                    result |= {"done": True, "tokens": event["completion_tokens"]}
                if stop_after is not None:
                    stop_after -= 1
                    if stop_after < 0:
                        break
    finally:
        writer.transport.abort() if stop_after is not None else writer.close()
    return result | {"seconds": time.perf_counter() - start}


async def get(port: int, path: str) -> dict:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    return json.loads(answer.split(b"\r\n\r\n", 1)[1])


async def clients(port: int, count: int, seconds: float) -> dict:
    """`count` clients, each asking again and again for so long."""
    deadline = time.perf_counter() + seconds

    async def client(number):
        rng, results = random.Random(number), []
        while time.perf_counter() < deadline:
            results.append(await post(port, a_request(rng)))
        return results

    start = time.perf_counter()
    by_client = await asyncio.gather(*map(client, range(count)))
    took = time.perf_counter() - start
    results = [result for each in by_client for result in each]
    first = sorted(result["first_s"] for result in results if result["first_s"])
    speeds = [sum(r["tokens"] for r in each) / sum(r["seconds"] for r in each) for each in by_client]
    return {"answers": len(results), "failed": sum(not r["done"] or r["status"] != 200 for r in results),
            "tokens_per_s": sum(r["tokens"] for r in results) / took, "first_p50_ms": 1e3 * first[len(first) // 2],
            "first_p95_ms": 1e3 * first[int(0.95 * len(first))], "longest_gap_s": max(r["gap_s"] for r in results),
            "median_over_slowest": statistics.median(speeds) / min(speeds)}


async def overload(port: int, count: int) -> dict:
    """All at once, each a long answer."""
    body = {"messages": [{"role": "user", "content": "Count"}], "temperature": 0, "max_tokens": 200}
    results = await asyncio.gather(*(post(port, body) for _ in range(count)))
    refused = [r for r in results if r["status"] == 503]
    return {"clients": count, "served": sum(r["done"] for r in results), "refused with 503": len(refused),
            "of these with Retry-After": sum(r["retry_after"] is not None for r in refused),
            "anything else": sum(r["status"] != 503 and not r["done"] for r in results)}


async def vanish(port: int, count: int) -> dict:
    """Clients that leave after some events; then how many slots are still taken."""
    rng = random.Random(0)
    at_once = asyncio.Semaphore(48)
    body = {"messages": [{"role": "user", "content": "Count"}], "temperature": 0, "max_tokens": 250}

    async def client():
        async with at_once:
            return await post(port, body, stop_after=rng.randrange(0, 20))

    results = await asyncio.gather(*(client() for _ in range(count)))
    await asyncio.sleep(1)
    stats = await get(port, "/stats")
    again = await post(port, body)
    return {"vanished": sum(not r["done"] for r in results), "running afterwards": stats["running"],
            "slots taken afterwards": stats["slots"]["active"], "cancelled": stats["requests"]["cancelled"],
            "next client served": again["done"]}


def print_table(title: str, rows: dict) -> None:
    print(f"\n{title}")
    for name, value in rows.items():
        print(f"  {name.replace('_', ' '):28s} {value:,.2f}" if isinstance(value, float) else f"  {name:28s} {value}")


def main(argv=None) -> dict:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=integer(1), default=120, help="of the load with all clients")
    parser.add_argument("--clients", type=integer(2), default=64)
    args = parser.parse_args(argv)
    base = Path(tempfile.mkdtemp(prefix="bench-server-"))
    os.environ["NANOCHAT_BASE_DIR"] = str(base)
    print(f"teaching a tiny model {len(ANSWERS)} answers ...", flush=True)
    teach(base)
    report = {}
    process, port = serve(base)
    drain = subprocess.Popen(["cat"], stdin=process.stdout, stdout=subprocess.DEVNULL)
    try:
        asyncio.run(clients(port, 4, 3))  # warm up
        report["one client"] = asyncio.run(clients(port, 1, max(5, args.seconds / 6)))
        report[f"{args.clients} clients"] = asyncio.run(clients(port, args.clients, args.seconds))
        report["one client again"] = asyncio.run(clients(port, 1, max(5, args.seconds / 6)))
        report["500 clients at once"] = asyncio.run(overload(port, 500))
        report["1000 clients that vanish"] = asyncio.run(vanish(port, 1000))
    finally:
        process.terminate()
        process.wait(60)
        drain.wait(5)
    alone = statistics.mean(report[name]["tokens_per_s"] for name in ("one client", "one client again"))
    report[f"{args.clients} clients"]["times_one_client"] = report[f"{args.clients} clients"]["tokens_per_s"] / alone
    for title, rows in report.items():
        print_table(title, rows)
    return report


if __name__ == "__main__":
    run_script(main)
