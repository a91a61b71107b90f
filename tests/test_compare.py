"""The comparison can be repeated: it runs, and writes a page that says what was done."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from scenario import ROOT, environment


def compare(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench.compare", *arguments],
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.timeout(300)
def test_one_server_goes_through_scenarios_and_a_page_is_written(tmp_path: Path) -> None:
    done = compare(
        "--quick", "--servers", "segue", "--scenarios", "import,signal,memory", "--out", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "comparison.md").read_text()
    assert "| New code fails at import | old code serves, 0 failed; mended in " in page
    assert "segue serve app:app" in page
    assert "A quick run" in page
    kept = Path(next(line for line in done.stdout.splitlines() if line.startswith("results: "))[9:])
    found = {run["scenario"]: run["found"] for run in json.loads(kept.read_text())["runs"]}
    kept.unlink()
    assert found["signal"]["not_done"] == 0
    assert 0 < found["signal"]["median_s"] < 60
    assert 0 < found["memory"]["master_mib"] < 100


def test_the_page_can_be_written_again_and_says_where_segue_loses(tmp_path: Path) -> None:
    def run(contestant: str, scenario: str, **found: object) -> dict[str, object]:
        return {"scenario": scenario, "contestant": contestant, "run": 1, "found": found}

    def contestant(key: str) -> dict[str, str]:
        return {"key": key, "name": key, "of": key, "command": f"{key} app:app", "note": ""}

    broken: dict[str, object] = {"failed": 0, "serves": True, "ended": None}
    broken |= {"mend_tried": True, "mended_s": 0.5, "ended_when_mended": None}
    results = {
        "begun": 0.0,
        "seconds": 60.0,
        "quick": False,
        "runs_each": 1,
        "machine": {"cpus": 2, "cpu": "a", "kernel": "b"},
        "versions": {},
        "contestants": [contestant("segue"), contestant("other")],
        "scenarios": {"import": "new code fails at import", "throughput": "requests/s"},
        "runs": [
            run("segue", "import", **broken),
            run("other", "import", **broken | {"serves": False, "failed": 12, "ended": 3}),
            run("segue", "throughput", one=1000.0, two=1500.0),
            run("other", "throughput", one=2000.0, two=1400.0),
        ],
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    done = compare("--page", str(tmp_path / "results.json"), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "comparison.md").read_text()
    assert "| old code serves, 0 failed; mended in 0.5 s | **outage**: it ends with status 3 |" in page
    losses = page.partition("## What segue loses")[2].partition("##")[0]
    assert "- Requests/s, 1 worker: other 2,000; segue 1,000." in losses
    assert "2 workers" not in losses
    again = results | {"runs": [run("segue", "throughput", one=3000.0, two=1500.0)]}
    (tmp_path / "again.json").write_text(json.dumps(again))
    both = [str(tmp_path / name) for name in ("results.json", "again.json")]
    assert compare("--page", *both, "--out", str(tmp_path)).returncode == 0
    page = (tmp_path / "comparison.md").read_text()
    assert "| Requests/s, 1 worker | 3,000 | 2,000 |" in page
    assert "in 2 minutes" in page


def test_wrong_arguments_are_named() -> None:
    done = compare("--servers", "apache")
    assert done.returncode == 2
    assert "apache" in done.stderr
