"""Four parsers under a fuzzer guided by coverage: whatever the bytes, a model, or an InputError that names the file.

    pip install atheris
    python scripts/fuzz_parsers.py --parser=torch --seconds=3600      # safetensors, torch, numpy, msgpack

Of a torch file the pickle stream is what is changed, in an archive that is whole. What stops the fuzzer is left in the
folder `--corpus`, where a later run also begins: another exception, ten seconds on one input, or 2 GiB. Ends with
exit status 0 if nothing did.
"""

import argparse
import io
import json
import os
import re
import resource
import struct
import subprocess
import sys
import tempfile
import zipfile

import numpy as np

LIMIT_MB = 2048
ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)
NAMES = {"safetensors": "m.safetensors", "torch": "m.pt", "numpy": "m.npy", "msgpack": "m.msgpack"}


def archive(stream):
    """The bytes of a torch file with this pickle stream and one storage."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("archive/data.pkl", stream)
        file.writestr("archive/data/0", ARRAY.tobytes())
    return out.getvalue()


def _text(word):
    return b"X" + struct.pack("<I", len(word)) + word.encode()


def seed(parser):
    """A good input, small."""
    if parser == "safetensors":
        header = {"__metadata__": {"k": "v"}, "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + ARRAY.tobytes()
    if parser == "torch":
        storage = b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + _text("cpu") + b"K\x06tQ"
        tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00(K\x02K\x03t(K\x03K\x01t\x89"
        return b"\x80\x02}" + _text("a") + tensor + b"ccollections\nOrderedDict\n)RtRs."
    if parser == "numpy":
        out = io.BytesIO()
        np.save(out, ARRAY)
        return out.getvalue()
    from flax import serialization

    return serialization.to_bytes({"params": {"a": ARRAY, "b": {"c": ARRAY[0]}}})


def child(parser, corpus, seconds):
    """Fuzzes in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["jaxsub.formats", "jaxsub.errors", "jaxsub.descriptors"]):
        from jaxsub import errors, formats

    folder = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    path = os.path.join(folder, NAMES[parser])

    def one(data):
        with open(path, "wb") as file:
            file.write(archive(data) if parser == "torch" else data)
        try:
            model = formats.open_model(path)
            for tensor in model.tensors.values():
                formats.read(model, tensor)
        except errors.InputError as error:
            if path not in str(error):
                raise

    # libFuzzer counts the largest memory so far, which Linux hands on from the process that started this one.
    inherited = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    limits = ["-timeout=10", f"-rss_limit_mb={inherited + LIMIT_MB}", f"-malloc_limit_mb={LIMIT_MB}"]
    limits += ["-max_len=4096", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", f"-artifact_prefix={corpus}/stop-", *limits, corpus], one)
    atheris.Fuzz()


def run(parser, corpus, seconds):
    """(exit status, inputs tried) of a fuzzer in a process of its own."""
    os.makedirs(corpus, exist_ok=True)
    with open(os.path.join(corpus, "seed"), "wb") as file:
        file.write(seed(parser))
    command = [sys.executable, __file__, f"--parser={parser}", f"--corpus={corpus}", f"--seconds={seconds}", "--child"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    found = re.search(r"number_of_executed_units:\s*(\d+)", done.stderr)
    if done.returncode or not found:
        print(done.stderr[-4000:], file=sys.stderr)
    return done.returncode, int(found[1]) if found else 0


def main():
    """Runs one fuzzer and says how many inputs it tried."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parser", choices=sorted(NAMES), required=True)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", default="")
    parser.add_argument("--child", action="store_true")
    args = parser.parse_args()
    corpus = args.corpus or os.path.join(tempfile.gettempdir(), f"jaxsub-fuzz-{args.parser}")
    if args.child:
        child(args.parser, corpus, args.seconds)
        return
    status, tried = run(args.parser, corpus, args.seconds)
    print(f"{args.parser}: {tried} inputs in {args.seconds} s, exit status {status}")
    sys.exit(bool(status))


if __name__ == "__main__":
    main()
