"""`disaggworker prefill|decode|mixed|pair|router|fetch|profile …`: the data plane's processes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from disaggworker.errors import StartError, WorkerError

_USAGE = "usage: disaggworker prefill|decode|mixed|pair|router|fetch|profile|--speak vllm [flags]; each knows --help"

_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*"]
_FILES += ["special_tokens_map.json", "vocab.json", "merges.txt", "chat_template.jinja"]


def main(argv: list[str] | None = None) -> int:
    """Run the process that the first argument names and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv else ""
    try:
        match command:
            case "prefill" | "decode" | "mixed":
                # torch takes seconds to import: only who needs it pays.
                from disaggworker.worker.main import run

                return run(argv)
            case "pair":
                from disaggworker.worker.pair import run as run_pair

                return run_pair(argv[1:])
            case "router":
                from disaggworker.router.main import run as run_router

                return int(run_router(argv) or 0)
            case "fetch":
                return fetch(argv[1:])
            case "--speak":
                if argv[1:2] != ["vllm"]:
                    print(
                        "--speak: vllm is the only engine that this worker can stand in for", file=sys.stderr
                    )
                    return 2
                from disaggworker.speak.vllm import run as run_vllm

                return run_vllm(argv[2:])
            case "profile":
                from disaggworker.profiling.main import run as run_profile

                return run_profile(argv[1:])
            case _:
                print(_USAGE, file=sys.stderr)
                return 0 if command in ("-h", "--help") else 2
    except WorkerError as e:
        print(e, file=sys.stderr)
        return 1


def fetch(argv: Sequence[str]) -> int:
    """Download a model's safetensors, config and tokenizer into a folder. Raises `StartError`."""
    parser = argparse.ArgumentParser(prog="disaggworker fetch", allow_abbrev=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--revision", required=True)
    parser.add_argument("--to", required=True)
    flags = parser.parse_args(argv)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        snapshot_download(flags.model, revision=flags.revision, local_dir=flags.to, allow_patterns=_FILES)
    except (HFValidationError, OSError) as e:
        reason = " ".join(str(e).split())
        raise StartError(
            f"{flags.model} at {flags.revision} could not be fetched into {flags.to}: {reason}"
        ) from e
    return 0


if __name__ == "__main__":
    sys.exit(main())
