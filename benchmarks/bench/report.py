"""Lists every committed benchmark against its targets: ``make bench-report``."""

import json
import sys

from record import FOLDER, lines


def main() -> int:
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))]
    listed = [line for record in records for line in lines(record)]
    print("\n".join(listed) or f"no results in {FOLDER}")
    missed = sum(line.startswith("MISS") for line in listed)
    print(f"{len(listed) - missed} of {len(listed)} targets met")
    return 0


if __name__ == "__main__":
    sys.exit(main())
