"""`xicon-infer weights`: fetch, find, check, pin, prepare and remove model files.

Only arguments are here; `weights_cli_work` does what they say. `list` and `--help` answer without
PyTorch. Results go to standard output,
progress and warnings to standard error. An error is raised; `xicon_infer.run` reports it.

Exit codes: those of `xicon_infer.run`; `verify`, `lock` and `inspect` give 5 if a file is
at fault.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from xicon_infer.errors import InvalidRequest
from xicon_infer.job_flags import Parser, parse
from xicon_infer.weights_cli_work import (
    STORAGES,
    Options,
    Workers,
    run_inspect,
    run_list,
    run_lock,
    run_prepare,
    run_prune,
    run_pull,
    run_verify,
)

_MOST_JOBS = 32


def main(argv: Sequence[str], *, workers: Workers | None = None) -> int:
    """Runs one subcommand and returns the exit code.

    Args:
        argv: the words after `xicon-infer weights`.
        workers: what does the work and shows progress; silent if None.

    Raises:
        XiconError: whatever the subcommand cannot do.
    """
    words = list(argv)
    name = words[0] if words else "--help"
    if name not in COMMANDS:
        if name.startswith("-"):
            parse(_overview(), words or ["--help"])
        known = ", ".join(COMMANDS)
        raise InvalidRequest(
            f"unknown subcommand {name!r}: weights has {known}", code="INVALID_ARGUMENTS"
        )
    options = parse(parser_of(name), words[1:])
    return COMMANDS[name].run(options, workers or Workers())


@dataclass(frozen=True)
class Command:
    """One subcommand: what it does, examples, its own arguments, and the function."""

    help: str
    examples: tuple[str, ...]
    arguments: Callable[[Parser], None]
    run: Callable[[Options, Workers], int]


def _takes_sets(parser: Parser, what: str) -> None:
    parser.add_argument(
        "sets",
        nargs="*",
        metavar="SET",
        help=f"{what}: PIPELINE/PRESET as scail/fp8, PIPELINE for its default preset, or the id "
        "of a file",
    )
    parser.add_argument("--manifest", metavar="FILE", type=Path, help="another list of files")


def _takes_folder(parser: Parser, text: str) -> None:
    parser.add_argument("--models-dir", metavar="PATH", type=Path, help=text)


def _takes_jobs(parser: Parser, text: str) -> None:
    parser.add_argument("--jobs", metavar="N", type=_count, help=f"{text} (default: 4)")


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= _MOST_JOBS:
        raise argparse.ArgumentTypeError(f"must be a number from 1 to {_MOST_JOBS}, got {text!r}")
    return int(text)


def _list_arguments(parser: Parser) -> None:
    _takes_sets(parser, "what to list (default: every preset)")
    _takes_folder(parser, "searched before all other folders")


def _pull_arguments(parser: Parser) -> None:
    _takes_sets(parser, "what to fetch")
    _takes_folder(
        parser,
        "where to put files (default: the first folder of XICON_MODELS_DIR, the models folder of "
        "a network volume, or ./models)",
    )
    _takes_jobs(parser, "files fetched at the same time")
    parser.add_argument(
        "--offline", action="store_true", help="fetch nothing; fail if a file is missing"
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not compare the sha256 of what was fetched"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be fetched, and fetch nothing"
    )


def _verify_arguments(parser: Parser) -> None:
    _takes_sets(parser, "what must be there and right (default: whatever is there)")
    _takes_folder(parser, "searched before all other folders")
    _takes_jobs(parser, "files read at the same time")
    parser.add_argument(
        "--quick", action="store_true", help="compare sizes and headers, not sha256"
    )


def _lock_arguments(parser: Parser) -> None:
    _takes_sets(parser, "what to pin (default: every file of the manifest)")
    parser.add_argument(
        "--update",
        action="store_true",
        help="pin the newest revision; pinned sizes and hashes may change",
    )
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="where to write (default: over the manifest)"
    )


def _prepare_arguments(parser: Parser) -> None:
    parser.add_argument(
        "transformer",
        metavar="TRANSFORMER",
        help="a file, or PIPELINE/PRESET or an id, whose transformer is taken",
    )
    parser.add_argument(
        "--lora",
        dest="loras",
        metavar="LORA",
        action="append",
        help="file, or name of a file in a loras folder, with strength after a colon; repeatable",
    )
    parser.add_argument(
        "--storage",
        metavar="{" + ",".join(STORAGES) + "}",
        choices=STORAGES,
        help=f"how weights are stored (default: {STORAGES[0]})",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="the file to write, NAME.safetensors; NAME.kv.safetensors comes beside it",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    parser.add_argument("--manifest", metavar="FILE", type=Path, help="another list of files")
    _takes_folder(parser, "searched before all other folders")


def _prune_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--keep",
        metavar="SET",
        action="append",
        help="keep only what this preset needs; repeatable (default: every preset)",
    )
    parser.add_argument("--manifest", metavar="FILE", type=Path, help="another list of files")
    parser.add_argument(
        "--prepared", action="store_true", help="also prepared files whose source is gone"
    )
    parser.add_argument("--yes", action="store_true", help="remove; without it, only list")
    _takes_folder(parser, "the folder (default: as for pull)")


def _inspect_arguments(parser: Parser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", type=Path, help="weights files")
    parser.add_argument(
        "--check-finite", action="store_true", help="also read all weights and look for NaN; slow"
    )


COMMANDS: dict[str, Command] = {
    "list": Command(
        "say which files a preset needs, which are there, where, and how large they are",
        ("list", "list scail/fp8 pose", "list --json"),
        _list_arguments,
        run_list,
    ),
    "pull": Command(
        "fetch what is missing; goes on where an earlier run was stopped",
        ("pull scail/fp8", "pull scail/fp8 pose/commercial --models-dir /data/models"),
        _pull_arguments,
        run_pull,
    ),
    "verify": Command(
        "compare files with the manifest: size, sha256, header",
        ("verify", "verify scail/fp8", "verify scail/fp8 --quick --json"),
        _verify_arguments,
        run_verify,
    ),
    "lock": Command(
        "pin revision, size and sha256 to what is published",
        ("lock", "lock scail/fp8 --output weights_manifest.json", "lock --update"),
        _lock_arguments,
        run_lock,
    ),
    "prepare": Command(
        "write the file that loads fastest: LoRAs merged, weights in their final storage",
        (
            "prepare scail/fp8 --output models/scail-fast.safetensors "
            "--lora lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16.safetensors:1.0",
        ),
        _prepare_arguments,
        run_prepare,
    ),
    "prune": Command(
        "list what pull left that no preset needs, and remove it with --yes",
        ("prune", "prune --keep scail/fp8 --keep pose --yes"),
        _prune_arguments,
        run_prune,
    ),
    "inspect": Command(
        "say what a file is: format, dtypes, model, missing and unexpected tensors",
        ("inspect model.safetensors", "inspect model.gguf --json"),
        _inspect_arguments,
        run_inspect,
    ),
}


def _overview() -> Parser:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return Parser(
        prog="xicon-infer weights",
        usage="xicon-infer weights SUBCOMMAND ...",
        description="The model files: what is needed, where it is, and getting it.\n\n"
        + "\n".join(lines),
        epilog="`xicon-infer weights SUBCOMMAND --help` explains one. docs/weights.md tells how to "
        "use the files\nof a ComfyUI, RunPod's model cache, and a machine without a network.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def parser_of(name: str) -> Parser:
    """Returns the parser of one subcommand.

    Args:
        name: a key of `COMMANDS`.
    """
    command = COMMANDS[name]
    examples = "".join(f"  xicon-infer weights {example}\n" for example in command.examples)
    parser = Parser(
        prog=f"xicon-infer weights {name}",
        description=command.help[0].upper() + command.help[1:] + ".",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.arguments(parser)
    parser.add_argument("--json", action="store_true", help="print only JSON on standard output")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser
