"""Merges folders of the shapes of an 8-billion-parameter model, almost all holes, and says what memory it took.

    python scripts/merge_large.py --folder=/tmp/large [--models=2] [--methods=mean,ties] [--layers=32]

Weights are bfloat16, 16 GB a model, of which a few kilobytes a tensor are stored; the merged model is written whole.
"""

import argparse
import json
import os
import pathlib
import shutil
import sys
import time
import zlib

import ml_dtypes
import numpy as np

HIDDEN, WIDE, KEYS, VOCAB = 4096, 14336, 1024, 128256
STORED = 32768  # entries of each tensor that are not holes


def shapes(layers):
    """Tensors of a model, by shard; each shard is under 1 GiB."""
    block = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN), "self_attn.v_proj": (KEYS, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (WIDE, HIDDEN), "mlp.up_proj": (WIDE, HIDDEN),
        "mlp.down_proj": (HIDDEN, WIDE), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip
    shards = [{"model.embed_tokens.weight": (VOCAB, HIDDEN)}, {"lm_head.weight": (VOCAB, HIDDEN)}]
    for first in range(0, layers, 2):
        own = range(first, min(first + 2, layers))
        shards.append({f"model.layers.{n}.{k}.weight": shape for n in own for k, shape in block.items()})
    shards[-1]["model.norm.weight"] = (HIDDEN,)
    return shards


def make(folder, layers, seed):
    """Writes one model; `seed` None for the base."""
    os.makedirs(folder)
    where, count = {}, len(found := shapes(layers))
    for number, tensors in enumerate(found):
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        header, position = {"__metadata__": {"format": "pt"}}, 0
        for tensor, shape in tensors.items():
            size = 2 * int(np.prod(shape))
            header[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, position + size]}
            where[tensor], position = name, position + size
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % 64)
        with open(folder / name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + position)
            for tensor in tensors:
                entries = min(STORED, int(np.prod(tensors[tensor])))
                values = np.random.default_rng(zlib.crc32(tensor.encode())).standard_normal(entries)
                if seed is not None:
                    values = values + 0.1 * np.random.default_rng([seed, zlib.crc32(tensor.encode())]).standard_normal(
                        entries
                    )
                file.seek(8 + len(text) + header[tensor]["data_offsets"][0])
                file.write(values.astype(ml_dtypes.bfloat16).tobytes())
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "bfloat16"}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--models", type=int, default=2)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--methods", default="mean")
    options = parser.parse_args()
    from jaxsub import hostmemory
    from jaxsub.pipelines import merge, plan

    folder = options.folder
    if not (folder / "base").exists():
        for n in range(options.models):
            make(folder / "models" / f"m{n}", options.layers, n)
        make(folder / "base", options.layers, None)
    largest = 2 * VOCAB * HIDDEN
    for method in options.methods.split(","):
        out, base = folder / "out", "" if method == "mean" else str(folder / "base")
        shutil.rmtree(out, ignore_errors=True)
        before, started = hostmemory.resident(), time.perf_counter()
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        config = merge.Config(collection=(str(folder / "models"),), method=method, base=base, out=str(out))
        merge.run(config, stream=sys.stderr)
        grown, seconds = plan.peak_resident() - before, time.perf_counter() - started
        sys.stdout.write(
            f"{method}: {options.models} models, {seconds:.0f} s, {grown / 2**20:.0f} MiB beyond the program's own, "
            f"{grown / largest:.2f} of the largest layer ({largest / 2**20:.0f} MiB)\n"
        )
        sys.stdout.flush()
    shutil.rmtree(folder / "out", ignore_errors=True)


if __name__ == "__main__":
    main()
