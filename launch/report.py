"""Makes one self-contained HTML page of any number of runs.

  python -m launch.report runs/baseline runs/energy --out runs/report

The first run is the one the others' configs are compared with. Runs that are still training can be
reported too. The page needs no network and runs no script: mail it, or open it from disk.
"""

import argparse
from collections.abc import Sequence

from jaxlab.report.page import write_report
from launch import cli


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "workdirs", metavar="DIR", nargs="+", help="a run's folder: the --workdir of launch.train"
    )
    parser.add_argument(
        "--out",
        metavar="REPORT_DIR",
        required=True,
        help="where to write index.html, comparison.md, metrics.csv and plots/*.png",
    )
    args = parser.parse_args(argv)
    print(write_report(args.workdirs, args.out))
    return 0


if __name__ == "__main__":
    cli.run(main)
