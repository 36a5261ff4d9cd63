"""One decoding step captured as a CUDA graph, for several batch sizes: the host launches one graph a token, not hundreds
of kernels."""

import torch

from nanochat.common import announced, compile_problem, print0
from nanochat.gpt import Block
from nanochat.kv_cache import CacheRows, KVCache

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # a batch is filled up to the next of these
WARM_UP_STEPS = 3


class DecodeGraphs:
    """`next_logits` for one token of each row, by graphs that are captured when first needed.

    What fills up a batch reads and writes the cache's spare slot.
    """

    def __init__(self, model, cache: KVCache):
        self.model, self.cache, self.failed = model, cache, False
        self._graphs: dict[int, tuple] = {}  # size -> graph, inputs (2, size): tokens and slots, logits (size, V)
        self._pool = torch.cuda.graph_pool_handle()

    def next_logits(self, tokens: list[int], slots: list[int]) -> torch.Tensor:
        """Logits (B, V) after these tokens; valid until the next call."""
        size = next(size for size in (*SIZES, len(slots)) if size >= len(slots))
        if not self.failed and size not in self._graphs:
            self._capture(size)
        if self.failed:
            return self.model.next_logits(torch.tensor(tokens, device=self.model.device)[:, None], self.cache.rows(slots))
        graph, inputs, logits = self._graphs[size]
        fill = size - len(slots)
        inputs.copy_(torch.tensor([tokens + [0] * fill, slots + [self.cache.batch_size] * fill]), non_blocking=True)
        graph.replay()
        for slot in slots:
            self.cache.lengths[slot] += 1
        return logits[:len(slots)]

    def _step(self, inputs: torch.Tensor) -> torch.Tensor:
        logits = self.model.next_logits(inputs[0][:, None], CacheRows.on_device(self.cache, inputs[1]))
        self.cache.forget_spare()
        return logits

    def _capture(self, size: int) -> None:
        device = self.model.device
        inputs = torch.tensor([[0] * size, [self.cache.batch_size] * size], device=device)
        try:
            if not self._graphs:
                self._compile()
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_STEPS):
                    self._step(inputs)
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                logits = self._step(inputs)
        except RuntimeError as error:
            self.failed = True
            print0(f"decoding without CUDA graphs, which cannot be captured here ({str(error).splitlines()[0]})")
            return
        self._graphs[size] = graph, inputs, logits

    def _compile(self) -> None:
        """Compile the halves of a layer around attention, once a model and process."""
        if self.model.decode_halves is not None or compile_problem(self.model.device):
            return
        self.model.decode_halves = tuple(torch.compile(half, dynamic=True) for half in (Block.begin, Block.close))
        with announced("compiling the decoding step, about half a minute"):
            for size in (1, 2):  # two rows stand for any number of them
                self._step(torch.tensor([[0] * size, [self.cache.batch_size] * size], device=self.model.device))
