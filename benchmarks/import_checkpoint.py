"""Memory and time of loading a Hugging Face checkpoint, on one or several hosts.

    python -m benchmarks.import_checkpoint --model=qwen2.5-7b [--hosts=4] [--devices=2]

writes a checkpoint of the model's shape to disk (the numbers are noise) and loads it in as many
processes as there are to be hosts, which form one mesh over loopback. Each says how far its memory
rose above what its devices hold at the end, in units of the largest tensor; on CPU the devices'
memory is the process's own. Nothing is mapped into memory, so what counts is what was needed.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
# Layers, width, query heads, key heads, head, mlp, vocabulary, of the published config.json.
MODELS = {
    "tiny": (3, 64, 4, 2, 16, 128, 1000),
    "qwen2.5-0.5b": (24, 896, 14, 2, 64, 4864, 151_936),
    "qwen2.5-7b": (28, 3584, 28, 4, 128, 18_944, 152_064),
}
_FILE_BYTES = 4 * 10**9  # about what published checkpoints have
_NOISE_BYTES = 2**24


def settings(model: str) -> dict[str, Any]:
    """The config.json of a model of this shape, without tied embeddings."""
    layers, width, heads, kv_heads, head_dim, mlp, vocab = MODELS[model]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    }


def write_checkpoint(folder: Path, model: str) -> int:
    """Writes config.json and bfloat16 safetensors files, never holding a tensor.

    Returns:
        Bytes of the tensors.
    """
    from flowrl_jax.models.hf_config import read_config
    from flowrl_jax.models.hf_names import leaves

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings(model)))
    config = read_config(folder)
    files: list[dict[str, tuple[int, ...]]] = [{}]
    size = total = 0
    for leaf in leaves(config):
        for layer in range(config.num_layers if leaf.stacked else 1):
            nbytes = 2 * int(np.prod(leaf.tensor_shape))
            if files[-1] and size + nbytes > _FILE_BYTES:
                files.append({})
                size = 0
            files[-1][leaf.name(layer)] = leaf.tensor_shape
            size, total = size + nbytes, total + nbytes
    place = {}
    for number, tensors in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        _write_file(folder / name, tensors)
        place |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": place})
    )
    return total


def _write_file(file: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    header, offset = {}, 0
    for name, shape in tensors.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # The upper halves of small float32 numbers: finite bfloat16.
    numbers = np.random.default_rng(0).normal(0, 0.02, _NOISE_BYTES // 2).astype(np.float32)
    noise = (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        while offset > 0:
            stream.write(noise[:offset])
            offset -= len(noise)


def load(folder: str, host: int, hosts: int, port: int) -> dict[str, Any]:
    """Loads the checkpoint as one of several hosts; memory in bytes, time in seconds."""
    import jax
    import jax.numpy as jnp

    if hosts > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", hosts, host)
    from flowrl_jax.models.hf import load_policy
    from flowrl_jax.models.hf_config import read_config
    from flowrl_jax.models.hf_files import Checkpoint
    from flowrl_jax.models.hf_names import leaves
    from flowrl_jax.sharding import MeshConfig, make_mesh

    mesh = make_mesh(MeshConfig())
    jax.jit(lambda x: x + 1)(jnp.zeros(8)).block_until_ready()
    read = [0]
    plain = Checkpoint.read

    def counted(self: Checkpoint, name: str, index: tuple[slice, ...]) -> np.ndarray:
        part = plain(self, name, index)
        read[0] += part.nbytes
        return part

    Checkpoint.read = counted
    before, began = _memory("VmRSS"), time.perf_counter()
    _, params = load_policy(folder, mesh=mesh, dtype=jnp.bfloat16)
    jax.block_until_ready(params)
    seconds, peak = time.perf_counter() - began, _memory("VmHWM")
    held = sum(
        shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards
    )
    config = read_config(Path(folder))
    largest = 2 * max(int(np.prod(leaf.tensor_shape)) for leaf in leaves(config))
    return {
        "host": host,
        "seconds": seconds,
        "read_bytes": read[0],
        "held_bytes": held,
        "largest_tensor_bytes": largest,
        "above_held_bytes": peak - before - held,
        "above_held_tensors": (peak - before - held) / largest,
    }


def _memory(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status: this benchmark needs Linux")


def measure(folder: Path, hosts: int, devices: int) -> list[dict[str, Any]]:
    """Loads in `hosts` processes of `devices` devices each."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "benchmarks.import_checkpoint", f"--folder={folder}"]
    children = [
        subprocess.Popen(
            [*command, f"--hosts={hosts}", f"--child={host}:{port}"],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        for host in range(hosts)
    ]
    outputs = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise RuntimeError("a host failed: see its message above")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Memory and time of loading a checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", choices=MODELS, default="qwen2.5-7b", help="whose shape")
    parser.add_argument("--hosts", type=int, default=1, help="processes that share the model")
    parser.add_argument("--devices", type=int, default=1, help="of each host")
    parser.add_argument("--folder", default="", help="of a checkpoint to use; else one is made")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    values = parser.parse_args()
    if values.child:
        host, port = map(int, values.child.split(":"))
        print(json.dumps(load(values.folder, host, values.hosts, port)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(values.folder or scratch)
        if not values.folder:
            print(f"{values.model}: {write_checkpoint(folder, values.model) / 1e9:.2f} GB on disk")
        results = measure(folder, values.hosts, values.devices)
    for found in results:
        print(
            f"host {found['host']}: held {found['held_bytes'] / 1e9:.2f} GB, read"
            f" {found['read_bytes'] / 1e9:.2f} GB in {found['seconds']:.1f} s; at most"
            f" {found['above_held_bytes'] / 1e9:.2f} GB more, {found['above_held_tensors']:.2f}"
            f" of the largest tensor ({found['largest_tensor_bytes'] / 1e9:.2f} GB)"
        )
    if values.json:
        values.json.write_text(json.dumps({"hosts": results}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
