"""`coverage json -o - | python coverage_floor.py PERCENT`: print what tests reach, and fail below a floor of lines.

`coverage report --fail-under` counts lines and branches together. In the JSON report they stand apart.
"""

from __future__ import annotations

import argparse
import json
import sys

LEAST_COVERED = 10  # files to list


def share(covered: int, of: int) -> float:
    """Return a percentage; 100 of nothing."""
    return 100 * covered / of if of else 100.0


def main(given: list[str] | None = None) -> int:
    """Print the shares and the least covered files; return 1 if fewer lines than the floor are reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("floor", type=float, help="the percentage of lines")
    floor = parser.parse_args(given).floor
    found = json.load(sys.stdin)
    total = found["totals"]
    lines = share(total["covered_lines"], total["num_statements"])
    branches = share(total["covered_branches"], total["num_branches"])
    files = {name: file["summary"] for name, file in found["files"].items()}
    least = sorted(files, key=lambda name: share(files[name]["covered_lines"], files[name]["num_statements"]))
    for name in least[:LEAST_COVERED]:
        reached, number = files[name]["covered_lines"], files[name]["num_statements"]
        print(f"{share(reached, number):5.1f} % of {number:4} lines  {name}")
    print(
        f"{lines:.1f} % of {total['num_statements']:,} lines, {branches:.1f} % of {total['num_branches']:,} branches; "
        f"the floor is {floor:g} % of lines"
    )
    return int(lines < floor)


if __name__ == "__main__":
    sys.exit(main())
