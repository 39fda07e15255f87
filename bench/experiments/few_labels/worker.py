"""One process that does units: takes them as lines of JSON on stdin, answers each with a line on stdout. Used by ``schedule``."""

import json
import os
import sys
import traceback
from pathlib import Path

from ftengine.bench.experiments.few_labels.protocol import load_protocol
from ftengine.bench.experiments.few_labels.units import Unit, write_result
from ftengine.errors import FtengineError


def main() -> None:
    """``python -m ftengine.bench.experiments.few_labels.worker DIR DEVICE``."""
    folder, device = Path(sys.argv[1]), sys.argv[2]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints goes to the log
    protocol = load_protocol(folder / "protocol.yaml")
    from ftengine.bench.experiments.few_labels.work import InterruptedRunError, do

    for line in sys.stdin:
        unit = Unit(**json.loads(line))
        error = None
        try:
            write_result(folder, unit, do(folder, unit, protocol, device))
        except InterruptedRunError:
            return
        except FtengineError as problem:
            error = str(problem)
        except Exception as problem:  # noqa: BLE001 - a bug in one unit must not stop the others
            traceback.print_exc()
            error = f"{type(problem).__name__}: {problem}"
        answers.write(json.dumps({"error": error}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
