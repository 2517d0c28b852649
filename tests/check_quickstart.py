"""python tests/check_quickstart.py RESULTS.json: did the quickstart reach its aim?"""

import json
import pathlib
import sys


def shortfalls(results: dict) -> list[str]:
    """What is missing from a recovery of 0.98 with every other ability kept within 2.5 points."""
    found = []
    if results["recovery"] < 0.98:
        found.append(f"recovery is {results['recovery']:.3f}, less than 0.98")
    if results["base"]["accuracy"] > 0.01:
        found.append("the base knows the key already: nothing is shown")
    if results["student"]["forward_kl"] >= 0.1 * results["base"]["forward_kl"]:
        found.append("the student's distance to the prompted teacher has hardly fallen")
    for name, share in results["retention"].items():
        if share["after"] < share["before"] - 0.025:
            found.append(f"{name} fell from {share['before']:.3f} to {share['after']:.3f}")
    return found


if __name__ == "__main__":
    missing = shortfalls(json.loads(pathlib.Path(sys.argv[1]).read_text()))
    sys.exit("\n".join(missing) or 0)  # a message is exit code 1, even an empty one
