"""The words of ``everstep checkpoints …``; ``asked`` answers them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

CHECKPOINTS_END = """\
A checkpoint is meant by its step, by latest, by best, or by the path of its directory, which may also be one that
torch.distributed.checkpoint has written without everstep (it has no digests then, and nothing is verified).
"""
OUTPUT_TEXT = (
    "the ending says the format: .safetensors, .pt or .pth; a name without one becomes a directory of safetensors as "
    "Hugging Face has them"
)


def add_parsers(
    parser: argparse.ArgumentParser, kind: type[argparse.ArgumentParser], add_job: Callable[[Any], None]
) -> dict[str, Any]:
    """The words of every action, by its name; each parser is a ``kind``."""
    parser.epilog = CHECKPOINTS_END
    actions = parser.add_subparsers(
        dest="action",
        metavar="list | verify | inspect | compare | export | prune",
        required=True,
        parser_class=kind,
    )
    listing: argparse.ArgumentParser = actions.add_parser(
        "list", help="every checkpoint, newest first, with sizes and metrics"
    )
    listing.add_argument("--verify", action="store_true", help="read every byte and compare digests")
    verifying: argparse.ArgumentParser = actions.add_parser(
        "verify", help="read every byte and compare digests; exit code 1 if any is bad"
    )
    verifying.add_argument(
        "which",
        nargs="*",
        metavar="CHECKPOINT",
        help="a step, latest, best, or the path of one (default: all)",
    )
    inspecting: argparse.ArgumentParser = actions.add_parser(
        "inspect", help="what is in one: keys, shapes, dtypes, sizes"
    )
    comparing: argparse.ArgumentParser = actions.add_parser(
        "compare", help="metrics, and by how much each tensor has changed"
    )
    comparing.add_argument("--all", action="store_true", help="show every item, also those that are the same")
    exporting: argparse.ArgumentParser = actions.add_parser(
        "export",
        help="to safetensors or torch.save",
        description="Writes a checkpoint, or its weights, to a file for other programs: safetensors or torch.save.",
    )
    exporting.add_argument("-o", "--output", metavar="FILE", required=True, help=OUTPUT_TEXT)
    exporting.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        help="of each file in a directory (default: 5GB); e.g. 500MB, 2GiB",
    )
    for one in (comparing, exporting):
        one.add_argument("--weights-only", action="store_true", help="only the state of the modules")
    pruning: argparse.ArgumentParser = actions.add_parser(
        "prune", help="remove what the retention rules do not keep"
    )
    pruning.add_argument("--dry-run", action="store_true", help="only say which")
    add_retention(pruning)
    pruning.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help="file of options")
    for one, words in ((inspecting, ("which",)), (comparing, ("a", "b")), (exporting, ("which",))):
        for word in words:
            name = "CHECKPOINT" if word == "which" else word.upper()
            one.add_argument(word, metavar=name, help="a step, latest, best, or the path of one")
        one.add_argument("--only", metavar="NAME", help="only what is called NAME or NAME.…, e.g. model")
        one.epilog = CHECKPOINTS_END
    for one in (listing, comparing):
        one.add_argument("--plot", metavar="METRIC", help="show this metric over all checkpoints")
        one.add_argument("-o", "--output", metavar="FILE", help="draw the plot to FILE.svg or FILE.html")
    for one in (listing, verifying, inspecting, comparing, exporting):
        one.add_argument(
            "--best", metavar="METRIC:min|max", help="what `best` goes by (default: keep_best, else loss:min)"
        )
    for one in (listing, verifying, inspecting, comparing, exporting, pruning):
        add_job(one)
        one.add_argument(
            "--checkpoints",
            metavar="PATH|URL",
            default=argparse.SUPPRESS,
            help="where they are, if elsewhere",
        )
    return {
        "list": listing,
        "verify": verifying,
        "inspect": inspecting,
        "compare": comparing,
        "export": exporting,
        "prune": pruning,
    }


def add_retention(parser: Any) -> None:
    """Which checkpoints are kept."""
    suppress = argparse.SUPPRESS
    parser.add_argument(
        "--keep-last", metavar="N", default=suppress, help="keep the newest N checkpoints (default: 3)"
    )
    parser.add_argument(
        "--keep-every", metavar="K", default=suppress, help="and those at a multiple of K steps"
    )
    parser.add_argument(
        "--keep-best", metavar="METRIC:min|max:M", default=suppress, help="and the M best by a logged metric"
    )
