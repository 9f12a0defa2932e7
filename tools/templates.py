"""Writes cachebuilder/deepgemm/templates.json: the parameters of every kernel template in several copies of DeepGEMM.

    python tools/templates.py DEEP_GEMM_FOLDER…

The file keeps what it has; the named copies add to it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cachebuilder.deepgemm import templates


def main() -> None:
    """Read the copies that the command line names, write the table, and print what is new."""
    path = Path(templates.__file__).with_suffix(".json")
    table: dict[str, list[list[str]]] = json.loads(path.read_text()) if path.exists() else {}
    for folder in sys.argv[1:]:
        added = 0
        for name, declared in templates.declared_templates(Path(folder) / "include" / "deep_gemm").items():
            if declared not in table.setdefault(name, []):
                table[name].append(declared)
                added += 1
        print(f"{folder}: {added} new declarations")
    lines = [
        f' "{name}": [\n' + ",\n".join(f"  {json.dumps(one)}" for one in sorted(ways)) + "\n ]"
        for name, ways in sorted(table.items())
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
