"""schemathesis, all checks on, against the OpenAPI document that a running server gives.

Runs in an environment of its own, which has `schemathesis==4.32.5`:

    python schemathesis_check.py http://127.0.0.1:8000 simple

Twice: with names made up, and with those of a model that is served, so that requests get past
"unknown model". Prints what was found and `N passed of N`; a run that ends with an error counts as
one more case that did not pass.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

TOOL = Path(sys.executable).with_name("schemathesis")
EXAMPLES = 40
MADE_UP = """
[[operations]]
# Whether a region is there is the machine's state, not the request's form.
include-path-regex = "/region/.*/register"
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", "400", "409"]

[[operations]]
# A repository says why it cannot load what is not there, and whether it may be told to at all.
include-path-regex = "/v2/repository/models/.*"
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", "400", "404", "503"]
[operations.checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "503"]
"""
SERVED = """
[parameters]
"path.model" = "{model}"
"path.version" = "1"

[[operations]]
# Which tensors a model takes is its signature's matter, not the document's.
include-path-regex = "/(infer|generate|generate_stream)$"
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", "400"]
"""
PATHS = "^/v2/models/[{]model"
SUMMARY = re.compile(r"Test cases:\s+(\d+) generated(?:, (\d+) found)?")


def checked(url: str, config: str, *options: str) -> tuple[int, int]:
    """(passed, all)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "schemathesis.toml"
        path.write_text(config)
        line = [str(TOOL), "--config-file", str(path), "run"]
        line += [f"{url}/openapi.json", "--checks", "all", "--continue-on-failure"]
        line += ["--max-examples", str(EXAMPLES), "--request-timeout", "30", *options]
        done = subprocess.run(line, capture_output=True, text=True, cwd=folder)
    found = SUMMARY.search(done.stdout)
    if done.returncode or found is None:
        sys.stdout.write(done.stdout + done.stderr)
    if found is None or not int(found[1]):
        return 0, 1
    cases, failed = int(found[1]), int(found[2] or 0)
    if done.returncode and not failed:  # it says nothing of cases that it could not finish
        return cases, cases + 1
    return cases - failed, cases


def main(url: str, model: str) -> int:
    runs = (
        checked(url, MADE_UP),
        checked(url, SERVED.format(model=model), "--include-path-regex", PATHS),
    )
    passed, cases = (sum(one) for one in zip(*runs, strict=True))
    sys.stdout.write(f"{passed} passed of {cases}\n")
    return int(passed < cases)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
