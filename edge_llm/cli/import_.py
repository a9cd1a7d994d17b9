"""``edge-llm import``: a folder that another program made, as a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path

from edge_llm.cli.command import Command
from edge_llm.cli.layout import Progress, megabytes, report_bundle
from edge_llm.cli.options import add_variant_flag

__all__ = ["COMMAND"]


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Copy a model that onnxruntime-genai, transformers.js or optimum runs into a bundle, with "
        "sizes and hashes. Such a folder can be run as it is, too: edge-llm run -m FOLDER."
    )
    parser.add_argument("source", metavar="FOLDER", help="the model's folder")
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="the bundle's folder, new or empty"
    )
    add_variant_flag(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a bundle that is there")
    parser.add_argument("--json", action="store_true", help="write one JSON object at the end")


def _run(arguments: argparse.Namespace) -> int:
    from edge_llm.importing import import_folder

    line = Progress()
    try:
        manifest = import_folder(
            arguments.source,
            arguments.output,
            variant=arguments.variant,
            overwrite=arguments.overwrite,
            progress=lambda done, total: line.show(
                f"copying {megabytes(done)} of {megabytes(total)} ..."
            ),
        )
    finally:
        line.show("")
    report_bundle(Path(arguments.output), manifest, as_json=arguments.json)
    return 0


COMMAND = Command("import", "turn another program's ONNX folder into a bundle", _configure, _run)
