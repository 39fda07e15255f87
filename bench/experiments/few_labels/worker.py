"""One process that does units. Used by ``schedule``."""

import sys
from pathlib import Path
from typing import Any

from ftengine.bench.experiments.few_labels.protocol import load_protocol
from ftengine.bench.experiments.few_labels.units import Unit, write_result
from ftengine.experiments.serve import Advance, serve


def main() -> None:
    """``python -m ftengine.bench.experiments.few_labels.worker DIR DEVICE``."""
    folder, device = Path(sys.argv[1]), sys.argv[2]
    protocol = load_protocol(folder / "protocol.yaml")
    from ftengine.bench.experiments.few_labels.work import do

    def work(payload: dict[str, Any], _advance: Advance) -> None:
        unit = Unit(**payload)
        write_result(folder, unit, do(folder, unit, protocol, device))

    serve(work)


if __name__ == "__main__":
    main()
