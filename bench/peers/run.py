"""One pipeline of bench/data.py, started by it in the environment of that pipeline.

python -m bench.peers.run energon epoch JOB.json     # or resume; prints one line of JSON
python -m bench.peers.run streaming convert FROM TO
"""

import argparse
import importlib.metadata
import json
from pathlib import Path

import torch

from bench.peers.common import Job, Opener, measure_epoch, measure_resume

PACKAGES = {
    "ours": "torch",
    "plain": "webdataset",
    "plain_fast": "simplejpeg",
    "energon": "megatron-energon",
    "streaming": "mosaicml-streaming",
}


def opener(pipeline: str) -> Opener:
    """Imported here, because each environment has the packages of one."""
    match pipeline:
        case "ours":
            from bench.peers.ours import open_stream
        case "plain":
            from bench.peers.plain import open_stream
        case "plain_fast":
            from bench.peers.plain_fast import open_stream
        case "energon":
            from bench.peers.energon import open_stream
        case _:
            from bench.peers.streaming import open_stream
    return open_stream


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pipeline", choices=PACKAGES)
    parser.add_argument("what", choices=("epoch", "resume", "convert"))
    parser.add_argument("paths", nargs="+", type=Path)
    options = parser.parse_args()
    if options.what == "convert":
        from bench.peers.streaming import convert

        convert(*options.paths)
        return
    torch.set_num_threads(1)
    (path,) = options.paths
    job = Job(**json.loads(path.read_text()))
    measure = measure_epoch if options.what == "epoch" else measure_resume
    figures = measure(opener(options.pipeline), job, path.with_suffix(".state"))
    version = importlib.metadata.version(PACKAGES[options.pipeline])
    print(json.dumps({**figures, "version": version}), flush=True)


if __name__ == "__main__":
    main()
