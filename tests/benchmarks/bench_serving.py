"""Tokens a second that a server writes for 1, 8 and 32 clients at once: `forescale serve`, in fp32
and with int8=true, beside `transformers serve` with its continuous batching, and llama.cpp's server
in fp32 and q8_0. All have the same weights, prompts and cores, and take the likeliest token.

    FORESCALE_SERVED=DIR python tests/benchmarks/run.py serving

DIR: a model as Hugging Face transformers saves it, of a family that llama.cpp knows. Needs the
packages fastapi (for transformers) and xllamacpp; a server without its package is left out.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import torch

from forescale.data.tokenizer import byte_tokenizer
from forescale.inference.export import export_gguf
from forescale.inference.view import open_view
from tests.benchmarks.pairing import Result, interleaved

PATIENCE = 600.0  # seconds until a server listens
LLAMA = """
import sys, xllamacpp
path, port, slots, tokens, threads = sys.argv[1], *map(int, sys.argv[2:])
params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_parallel = path, port, slots
params.n_ctx, params.n_predict = slots * tokens, tokens
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(params)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Sizes:
    """clients: at once, in turn; tokens: of an answer; folder: of the model, None: a toy."""

    clients: tuple[int, ...]
    tokens: int
    folder: str | None = None


REAL, TOY = Sizes((1, 8, 32), 32, os.environ.get("FORESCALE_SERVED")), Sizes((2,), 4)


class Server:
    """A server that runs until `close`. It answers /v1/completions at `url`."""

    def __init__(self, command: list[str], url: str, log: Path, model: str):
        self.url, self.model, self._log = url, model, log
        quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        quiet["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=quiet
            )

    def wait(self) -> "Server":
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(OSError):
                self.tokens("Hello", 1)
                return self
            time.sleep(0.5)
        self.close()
        raise RuntimeError(f"it doesn't answer:\n{self._log.read_text()[-4000:]}")

    def tokens(self, prompt: str, most: int) -> int:
        """Return the number of tokens that it writes to a prompt."""
        body = dict(model=self.model, prompt=prompt, max_tokens=most, temperature=0.0)
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            number: int = json.load(answer)["usage"]["completion_tokens"]
        return number

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def servers(folder: Path, scratch: Path, sizes: Sizes) -> Iterator[dict[str, Server]]:
    """Yield those that can be started, by name."""
    view, most = open_view(folder), max(sizes.clients)
    threads = len(os.sched_getaffinity(0))
    files = {}
    if find_spec("xllamacpp"):
        files = {dtype: scratch / f"{dtype}.gguf" for dtype in ("fp32", "q8_0")}
        for dtype, file in files.items():
            export_gguf(view, view.checkpoint(None), file, dtype)
    opened: dict[str, Server] = {}

    def add(name: str, *command: str, model: str = str(folder)) -> None:
        port = free_port()
        words = [word.replace("PORT", str(port)) for word in command]
        url, log = f"http://127.0.0.1:{port}", scratch / f"{len(opened)}.log"
        opened[name] = Server([sys.executable, *words], url, log, model)

    python = ("-P", "-m", "forescale", "serve", str(folder), "port=PORT", f"batch={most}")
    python += (f"queue={most}", f"connections={4 * most}")
    try:
        add("ours", *python, model=view.name)
        add("ours, int8", *python, "int8=true", model=view.name)
        if find_spec("fastapi"):
            start = "from transformers.cli.transformers import main; main()"
            words = ("serve", str(folder), "--host", "127.0.0.1", "--port", "PORT")
            words += ("--device", "cpu", "--dtype", "float32", "--continuous-batching")
            add("transformers serve", "-c", start, *words)
        for dtype, file in files.items():
            words = (str(file), "PORT", str(most), str(sizes.tokens + 64), str(threads))
            add(f"llama.cpp, {dtype}", "-c", LLAMA, *words)
        yield {name: server.wait() for name, server in opened.items()}
    finally:
        for server in opened.values():
            server.close()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def measure(rounds: int, sizes: Sizes = REAL) -> list[Result]:
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(max(sizes.clients)) as pool:
        folder = Path(sizes.folder).absolute() if sizes.folder else toy(Path(scratch) / "toy")
        with servers(folder, Path(scratch), sizes) as running:
            numbers = count()

            def rate(server: Server, clients: int) -> float:
                # No prompt twice: a server may keep what it has read.
                prompts = [f"Story number {next(numbers)} is about a" for _ in range(clients)]
                began = time.perf_counter()
                counts = pool.map(lambda prompt: server.tokens(prompt, sizes.tokens), prompts)
                return sum(counts) / (time.perf_counter() - began)

            results = []
            for clients in sizes.clients:
                for side, rival in PAIRS:
                    if rival not in running:
                        continue
                    sides = [lambda s=running[n]: rate(s, clients) for n in (side, rival)]  # noqa: B023
                    rows = interleaved(min(rounds, 5), *sides)
                    name = f"{clients} client{'s' * (clients > 1)}"
                    results.append(Result(name, "tokens/s", (side, rival), rows))
    return results


PAIRS = (
    ("ours", "transformers serve"),
    ("ours", "llama.cpp, fp32"),
    ("ours, int8", "llama.cpp, q8_0"),
    ("ours, int8", "ours"),
)


def toy(folder: Path) -> Path:
    """Write a model of random weights with its tokenizer, and return its directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    sizes: dict[str, Any] = dict(hidden_size=512, intermediate_size=512, num_hidden_layers=1)
    sizes |= dict(num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256)
    size = tokenizer.get_vocab_size()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=size, bos_token_id=size - 1, eos_token_id=size - 1, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    end = tokenizer.id_to_token(size - 1)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end})
    )
    return folder
